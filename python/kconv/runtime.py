"""Trained networks on NumPy alone: from arrays or image files to probabilities and labels.

:func:`load` opens the folder that ``kconv train`` or :meth:`FrozenNetwork.save` has written, and
``kconv.torch.freeze`` and ``kconv.keras.freeze`` make the same object of a model. No framework is
imported; Pillow is needed for image files alone.

Example:
    >>> import numpy as np
    >>> import kconv
    >>> net = kconv.load("runs/keffnet_b0-cifar10-1")  # doctest: +SKIP
    >>> net(np.zeros((2, 32, 32, 3), np.uint8)).shape  # doctest: +SKIP
    (2, 10)
    >>> net.predict("cat.jpg")  # doctest: +SKIP
    'cat'
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kconv import models, set_num_threads
from kconv._frozen_graph import Step, compile_graph, inference_graph
from kconv._model_folder import (
    ModelConfig,
    expected_weights,
    read_config,
    read_weights,
    write_config,
    write_weights,
)
from kconv._published import find_network
from kconv.weights._entries import Array

__all__ = ["FrozenNetwork", "load"]

StrPath = str | os.PathLike[str]
Images = NDArray[np.uint8] | NDArray[np.floating[Any]]
_AT_ONCE = 64
"""Image files that are decoded before they are computed: enough to keep all threads at work."""


def load(path: StrPath, *, threads: int | None = None, dtype: str = "float32") -> FrozenNetwork:
    """Open a trained network.

    Args:
        path: the folder of a run, one that :meth:`FrozenNetwork.save` has written, or a name of
            :func:`kconv.list_weights`.
        threads: how many all of kconv uses from now on; None leaves it as it is
            (see :func:`kconv.set_num_threads`).
        dtype: that of the computation, "float32".

    Returns:
        The network.

    Raises:
        ValueError: the folder holds no model, its files are damaged or of different models, or
            there is no such dtype.
        OSError: it cannot be read.
    """
    if dtype != "float32":
        raise ValueError(f"dtype={dtype!r}: whole networks are computed in 'float32' alone")
    if threads is not None:
        set_num_threads(threads)
    folder = find_network(path)
    config = read_config(folder)
    return FrozenNetwork(config, read_weights(folder, config.graph()))


class FrozenNetwork:
    """A network whose weights stay what they are, computed by kconv's kernels on NumPy arrays.

    It may be called from several threads at once, and by the children of a process that forks.
    :func:`load` and the front ends' ``freeze`` make it.

    Args:
        config: the network, its classes and how an image becomes its input.
        weights: float32 arrays by (layer, weight), in PyTorch's layouts.

    Raises:
        ValueError: a weight is missing or has another shape, or a layer cannot be computed.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[tuple[str, str], Array]) -> None:
        graph = config.graph()
        for key, (name, shape) in expected_weights(graph).items():
            found = weights[key].shape if key in weights else None
            if found != shape:
                raise ValueError(f"the weight {name!r} has shape {found}, expected {shape}")
        self._config = config
        self._weights = dict(weights)
        graph = inference_graph(graph)
        self._input, self._output = graph.layers[0].name, graph.output
        self._gives_probabilities = getattr(graph[graph.output], "kind", None) == "softmax"
        self._steps = compile_graph(graph, self._weights)
        self._finished = _last_uses(self._steps, self._output)

    def __repr__(self) -> str:
        image = self._config.image
        size = "any size" if image.height is None else f"{image.height}x{image.width}"
        return (
            f"FrozenNetwork({self._config.name}, {len(self.class_names)} classes, "
            f"{size}x{image.channels})"
        )

    @property
    def config(self) -> ModelConfig:
        """What the folder's ``config.json`` says."""
        return self._config

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name for each output."""
        return self._config.class_names

    @property
    def gives_probabilities(self) -> bool:
        """Whether it ends in a softmax, so that its outputs are probabilities of the classes."""
        return self._gives_probabilities

    @property
    def graph(self) -> models.Graph:
        """The network's layers."""
        return self._config.graph()

    @property
    def weights(self) -> dict[tuple[str, str], Array]:
        """Float32 arrays by (layer, weight), in PyTorch's layouts; not to be changed."""
        return dict(self._weights)

    def __call__(self, images: Images, *, layout: str = "NHWC") -> NDArray[np.float32]:
        """The network's output.

        Args:
            images: (N, H, W, channels) bytes, which are scaled as in training, or floats, which
                are taken as they are; with ``layout="NCHW"`` (N, channels, H, W).
            layout: "NHWC" or "NCHW".

        Returns:
            (N, classes) probabilities, if the network ends in a softmax as those of ``kconv train``
            do; float32. Without a classifier, its features; maps of them have the images' layout.

        Raises:
            ValueError: the shape or the layout is not one of these, or the images are too small.
            TypeError: the images are no array of bytes or floats.
        """
        values = {self._input: self._prepared(images, layout)}
        for step, finished in zip(self._steps, self._finished, strict=True):
            values[step.name] = step(*[values[name] for name in step.inputs])
            for name in finished:
                del values[name]
        y = values[self._output]
        return y.transpose(0, 3, 1, 2) if layout == "NCHW" and y.ndim == 4 else y

    def _prepared(self, images: Images, layout: str) -> NDArray[np.float32]:
        """(N, H, W, channels) float32, scaled."""
        if layout not in ("NHWC", "NCHW"):
            raise ValueError(f"layout={layout!r}, expected 'NHWC' or 'NCHW'")
        if not isinstance(images, np.ndarray):
            raise TypeError(f"images are a {type(images).__name__}, expected a NumPy array")
        channels = self._config.image.channels
        if images.ndim != 4 or images.shape[3 if layout == "NHWC" else 1] != channels:
            sizes = ("N", "H", "W", str(channels))
            wanted = sizes if layout == "NHWC" else (sizes[0], sizes[3], *sizes[1:3])
            raise ValueError(
                f"images have shape {images.shape}, expected ({', '.join(wanted)}) in {layout}"
            )
        if layout == "NCHW":
            images = images.transpose(0, 2, 3, 1)
        if images.dtype == np.uint8:
            image = self._config.image
            scale, offset = (np.asarray(x, np.float32) for x in (image.scale, image.offset))
            return np.asarray(images * scale + offset, np.float32)
        if images.dtype.kind != "f":
            raise TypeError(f"images are {images.dtype}, expected uint8 or floats")
        return images.astype(np.float32, copy=False)

    def predict(self, path: StrPath | Iterable[StrPath], *, top: int | None = None) -> Any:
        """What image files show.

        Args:
            path: a file of any of ``kconv.datasets.IMAGE_SUFFIXES``, or several of them.
            top: how many labels to give, the likeliest first, with their probabilities.

        Returns:
            The label of the file; with ``top`` a list of labels and probabilities. For several
            files, a list of these.

        Raises:
            ValueError: a file is no image that can be read, ``top`` is below 1 or is given to a
                network that ends in no softmax, or an output is not finite.
            OSError: a file cannot be opened.
            ImportError: Pillow is not installed.
            TypeError: a path is none; arrays are for calls of the network itself.
        """
        if top is not None:
            if top < 1:
                raise ValueError(f"top={top} must be at least 1")
            self.expect_probabilities()
        single = isinstance(path, str | os.PathLike)
        paths = [path] if isinstance(path, str | os.PathLike) else list(path)
        for one in paths:
            if not isinstance(one, str | os.PathLike):
                raise TypeError(
                    f"path is a {type(one).__name__}, expected image files; a call of the network "
                    "itself takes arrays"
                )
        found: list[Any] = []
        for start in range(0, len(paths), _AT_ONCE):
            pixels = [
                self.read_image(Path(one).read_bytes(), one)
                for one in paths[start : start + _AT_ONCE]
            ]
            for probabilities in self.each(pixels):
                ranked = self.ranked(probabilities, top or 1)
                found.append(ranked if top else ranked[0][0])
        return found[0] if single else found

    def each(self, pixels: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """The outputs for images, which are computed together if they are of one size.

        Args:
            pixels: (H, W, channels) uint8 each.

        Returns:
            (classes,) for each.
        """
        if len({image.shape for image in pixels}) > 1:
            return [self(image[None])[0] for image in pixels]
        return list(self(np.stack(pixels))) if pixels else []

    def ranked(self, probabilities: NDArray[np.float32], top: int) -> list[tuple[str, float]]:
        """Labels and probabilities of an image, the likeliest first.

        Args:
            probabilities: (classes,) of one image.
            top: how many to give at most.

        Returns:
            (label, probability) pairs.

        Raises:
            ValueError: these are no numbers for each class, or not finite.
        """
        if probabilities.shape != (len(self.class_names),):
            raise ValueError(
                f"the network gives {probabilities.shape} of an image, not a number for each class"
            )
        self.expect_finite(probabilities)
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [(self.class_names[i], float(probabilities[i])) for i in order]

    def expect_probabilities(self) -> None:
        """See that the outputs are probabilities.

        Raises:
            ValueError: the network ends in no softmax.
        """
        if not self.gives_probabilities:
            raise ValueError("the network ends in no softmax, so that it gives no probabilities")

    def expect_finite(self, outputs: NDArray[np.float32]) -> None:
        """See that outputs are numbers.

        Args:
            outputs: of images, which are finite.

        Raises:
            ValueError: some are NaN or infinite, as where training has diverged.
        """
        if not np.isfinite(outputs).all():
            raise ValueError("the network's outputs are not finite, as its weights have diverged")

    def read_image(self, data: bytes, name: object = "the image") -> NDArray[np.uint8]:
        """Decode an image file, and resize it as in training.

        Args:
            data: the file's contents.
            name: what an error calls it.

        Returns:
            (H, W, channels) uint8.

        Raises:
            ValueError: it is no image that can be read, or is of less than 2x2 pixels.
            ImportError: Pillow is not installed.
        """
        from kconv.datasets.decode import decode, pillow

        image = self._config.image
        if image.channels not in (1, 3):
            raise ValueError(f"image files have 1 or 3 channels, the network {image.channels}")
        resampling = pillow().Resampling[image.interpolation.upper()]
        try:
            picture = decode(data)
        except Exception as error:  # whatever Pillow says of a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{name} is not a readable image: {reason}") from None
        if min(picture.size) < 2:
            width, height = picture.size
            raise ValueError(f"{name} has {width}x{height} pixels, too few to show anything")
        if image.channels == 1:
            picture = picture.convert("L")
        if image.height and image.width and picture.size != (image.width, image.height):
            picture = picture.resize((image.width, image.height), resampling)
        pixels = np.asarray(picture)
        return pixels.reshape(*pixels.shape[:2], image.channels)

    def save(self, path: StrPath) -> None:
        """Write the network into a folder, for :func:`load`.

        Args:
            path: the folder, made if need be; it gets ``model.safetensors`` and ``config.json``.

        Raises:
            OSError: it cannot be written.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        names = expected_weights(self.graph)
        write_weights(folder, {names[key][0]: array for key, array in self._weights.items()})
        write_config(folder, self._config)


def _last_uses(steps: Sequence[Step], output: str) -> list[tuple[str, ...]]:
    """The values that each step reads as the last."""
    last = {name: number for number, step in enumerate(steps) for name in step.inputs}
    last.pop(output, None)
    return [tuple(name for name, number in last.items() if number == i) for i in range(len(steps))]
