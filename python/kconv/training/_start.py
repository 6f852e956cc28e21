"""What a run starts from: its data, its weights, its teacher; and whether it can run at all."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kconv import augment, datasets, models
from kconv._model_folder import read_config, read_weights, weight_layouts
from kconv._published import find_network
from kconv._require import require
from kconv.datasets import Dataset, Labels, StreamedImages
from kconv.runtime import load
from kconv.training.batches import progress
from kconv.training.config import Config
from kconv.training.ranks import Ranks
from kconv.weights._models import Source, adapt

__all__ = [
    "Teacher",
    "check_installed",
    "check_step",
    "class_weights",
    "compress_from",
    "described",
    "load_data",
    "loads",
    "targets_of",
]


def load_data(config: Config, data: Any, ranks: Ranks, log: Callable[[str], None]) -> Dataset:
    """The data set: that of the configuration, or what the caller has.

    Args:
        config: the options.
        data: None, a :class:`Dataset`, or parts as :func:`kconv.datasets.from_objects` takes.
        ranks: of which the first loads first, as that may download.
        log: takes what to show.

    Returns:
        The data set.
    """
    if data is not None:
        return _given_data(config, data)
    if ranks.rank:
        ranks.first_of(None)
    unread: dict[str, str] | None = {} if config.on_bad_image == "skip" else None
    loaded = datasets.load(
        config.dataset,
        image_size=config.image_size or (None if config.dataset in datasets.PHOTOGRAPHS else 32),
        interpolation=config.interpolation,
        train_images=config.train_images,
        test_images=config.test_images,
        data_dir=config.data_dir,
        stream=config.stream,
        unread=unread,
        progress=partial(progress, what="decoding", hidden=ranks.rank > 0),
    )
    if not ranks.rank:
        ranks.first_of(None)
    if unread:
        log(f"bad images   {len(unread):,} left out, the first as {next(iter(unread.values()))}")
    return loaded


def _given_data(config: Config, data: Any) -> Dataset:
    """The caller's data, with the options that are for them; others would have no effect."""
    for name in ("dataset", "data_dir", "train_images", "test_images"):
        if (value := getattr(config, name)) != getattr(Config, name):
            raise ValueError(
                f"{name}={value!r} is of no use beside data=, which are what is trained on"
            )
    size, how = config.image_size, config.interpolation
    known = getattr(getattr(data, "x_train", None), "interpolation", how)
    if how not in (known, Config.interpolation):
        raise ValueError(f"interpolation={how!r}: the data's images are resized by {known!r}")
    if isinstance(data, Dataset):
        found, streamed = data, isinstance(data.x_train, StreamedImages)
        if size is not None and (size, size) != found.image_shape[:2]:
            raise ValueError(
                f"image_size={size}: the data's images are {'x'.join(map(str, found.image_shape))}"
            )
    elif isinstance(data, Mapping):
        found, streamed = datasets.from_objects(data, image_size=size, interpolation=how), True
    else:
        raise TypeError(
            f"data is a {type(data).__name__}, expected a kconv.datasets.Dataset or a mapping "
            "with 'train' and 'test'"
        )
    if config.stream is not None and config.stream != streamed:
        kind = "read as they are wanted" if streamed else "arrays in memory"
        raise ValueError(f"stream={config.stream}: the data's images are {kind}")
    return found


def described(data: Dataset) -> dict[str, Any]:
    """What processes that train together have to find alike in their data."""
    parts = {"training": data.y_train, "test": data.y_test, "validation": data.y_val}
    counts = {f"{part} images": 0 if y is None else len(y) for part, y in parts.items()}
    labels = [y.tobytes() for y in parts.values() if y is not None]
    return {
        **counts,
        "image shape": data.image_shape,
        "classes": len(data.class_names),
        "checksum of labels": zlib.crc32(b"".join([*labels, repr(data.class_names).encode()])),
    }


def check_step(config: Config, spec: models.Spec) -> None:
    """See that what a training step has to keep can fit into memory at all.

    These are the convolutions' results, of which the backward pass needs all, and the weights with
    their gradients and the optimizer's means.

    Raises:
        ValueError: It cannot.
    """
    layers = [
        layer
        for layer in spec.graph().layers
        if isinstance(layer, models.graph.Conv | models.graph.DepthwiseConv)
    ]
    results = sum(math.prod(size or 0 for size in layer.shape) for layer in layers)
    least = 4 * (config.batch_size * results + 3 * models.count(spec).trainable)
    if least > (there := datasets.memory()):
        height, width, _ = spec.input_shape
        raise ValueError(
            f"batch_size={config.batch_size}: a step of {spec.name} at {height}x{width} takes "
            f"{least / 1e9:,.1f} GB or more; there are {there / 1e9:,.1f} GB of memory"
        )


def check_installed(config: Config) -> None:
    """Import all that a run needs before its end, so that nothing is missing then."""
    require("tqdm", "tqdm", "the progress bar of training")
    require("matplotlib.figure", "matplotlib", "the picture of the training curves")
    if config.framework == "torch":
        require("torch", "torch", "training by PyTorch")
    else:
        require("keras", "keras jax", "training by Keras")


def loads(config: Config) -> str:
    """Whose loader reads ahead: that of PyTorch wherever it computes.

    Its workers are processes: what transforms draw in threads would come out of the chance that
    Keras's steps have in common with them on PyTorch.
    """
    if config.framework == "torch":
        return "torch"
    backend = require("keras", "keras jax", "training by Keras").backend.backend()
    return "torch" if backend == "torch" else "keras"


def class_weights(config: Config, labels: Labels, classes: int) -> NDArray[np.float32] | None:
    """(classes,) what each class's loss counts, or None if all count the same.

    Raises:
        ValueError: there are more or fewer numbers than classes.
    """
    if config.class_weights is None:
        return None
    if config.class_weights == "balanced":
        counts = np.bincount(labels, minlength=classes)
        return (len(labels) / (classes * np.maximum(counts, 1))).astype(np.float32)
    weights = np.array(config.class_weights, np.float32)
    if weights.shape != (classes,):
        raise ValueError(f"class_weights has {weights.size} numbers for {classes} classes")
    # With 0, targets would not tell the class any more, by which the accuracy is counted.
    return np.maximum(weights, np.float32(1e-30))


def targets_of(
    targets: NDArray[np.float32],
    weights: NDArray[np.float32] | None,
    smoothing: float,
    teacher: NDArray[np.float32] | None,
    share: float,
) -> NDArray[np.float32]:
    """What an image's cross-entropy is of; as it is linear in the truth, so is all of this.

    Args:
        targets: (N, classes): the truth; mixed images have shares of several classes.
        weights: (classes,) what each class's loss counts, or None.
        smoothing: the share of the truth that all classes have in common.
        teacher: (N, classes): another network's probabilities, or None.
        share: of these.

    Returns:
        (N, classes): shares of the classes, times what the image counts.
    """
    if weights is not None:
        targets = targets * weights
    counts = targets.sum(axis=1, keepdims=True)
    found = (1 - np.float32(smoothing)) * targets
    found += np.float32(smoothing) / targets.shape[1] * counts
    if teacher is not None:
        found = (1 - np.float32(share)) * found + np.float32(share) * teacher * counts
    return found


class Teacher:
    """A trained network whose probabilities another one learns.

    Args:
        folder: of its run, or a name.
        data: what it has to know.

    Raises:
        ValueError: it is of other images or classes, or ends in no softmax.
    """

    def __init__(self, folder: str, data: Dataset) -> None:
        self._network = load(folder)
        if not self._network.gives_probabilities:
            raise ValueError(f"teacher={folder!r} ends in no softmax, and gives no probabilities")
        config = self._network.config
        image = config.image
        if (image.height, image.width, image.channels) != data.image_shape:
            raise ValueError(
                f"teacher={folder!r} takes images of {image.height}x{image.width}x"
                f"{image.channels}, the data's are {'x'.join(map(str, data.image_shape))}"
            )
        if config.class_names != data.class_names:
            raise ValueError(f"teacher={folder!r} knows other classes than the data's")
        self._scale = np.asarray(image.scale, np.float32), np.asarray(image.offset, np.float32)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, H, W, C), scaled as for training, to (N, classes)."""
        scale, offset = self._scale
        return self._network(augment.unscale(images) * scale + offset)


def compress_from(model: Any, folder: str, graph: models.Graph) -> tuple[int, int]:
    """Fill what a network has in common with one without kType's blocks.

    Args:
        model: of either framework, built of ``graph``.
        folder: of the other one's run, or a name.
        graph: the network's layers.

    Returns:
        How many weights have been filled, of how many.

    Raises:
        ValueError: the folder is none of a run, or nothing is in common.
    """
    path = find_network(folder)
    theirs = read_config(path).graph()
    values = {
        (_plain_name(layer), weight): array
        for (layer, weight), array in read_weights(path, theirs).items()
    }
    target = adapt(model)
    arrays = target.arrays()[0]
    found = {name.replace("/", "_"): name for name in arrays}
    filled = 0
    for (layer, weight), (name, how, shape) in weight_layouts(graph).items():
        array = values.get((_plain_name(layer), weight))
        if array is not None and array.shape == how.shape(shape) and name in found:
            arrays[found[name]] = array
            filled += 1
    if not filled:
        raise ValueError(f"compress_from={folder!r} has no weights in common with the model")
    target.fill(
        {name: Source(array.shape, partial(_same, array)) for name, array in arrays.items()}
    )
    return filled, len(weight_layouts(graph))


def _same(array: Any) -> Any:
    return array


def _plain_name(layer: str) -> str:
    """A layer's name in the network without kType, of which "k_" and parallel paths are no part."""
    return re.sub(r"__\d+", "_", layer.removeprefix("k_"))
