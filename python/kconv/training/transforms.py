"""Users' transforms of training images, from the libraries that have them.

A transform of each image is one of torchvision's (``transforms.v2.TrivialAugmentWide()``,
``RandomErasing(p=0.25)``, a ``Compose`` of them), one of albumentations', a Keras layer
(``keras.layers.RandAugment((0, 255))``), or a function of bytes (H, W, C). A transform of whole
batches, after them, is a function of (images, labels), such as torchvision's ``MixUp`` and
``CutMix``, or Keras's layer of these names.

Their chance is that of the batch, so that a run goes on as if it had not been interrupted: what
Python's ``random``, NumPy's and PyTorch's functions without a generator draw, Albumentations', and
the seeds of Keras's layers, whatever they were.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kconv import augment
from kconv.datasets import Images

__all__ = ["Change", "changed_batch", "changed_images"]


_ONE_AT_A_TIME = threading.Lock()
"""Of the threads that read ahead: transforms draw from what all threads share."""


@dataclass(frozen=True)
class Change:
    """What becomes of the images of an epoch's batches; it goes to the workers that decode them.

    Attributes:
        seed: of the run.
        epoch: which.
        rank: of the process.
        recipe: how far they are moved, or None.
        transform: the user's, or None.
    """

    seed: int
    epoch: int
    rank: int
    recipe: augment.Recipe | None
    transform: Any = None

    def __call__(self, number: int, images: Images) -> Images:
        """(N, H, W, C) uint8 of a batch to the same."""
        rng = np.random.default_rng([self.seed, self.epoch, 1, number, self.rank])
        if self.recipe is not None:
            images = augment.augment(images, rng, self.recipe)
        if self.transform is not None:
            images = changed_images(self.transform, images, rng)
        return images


def _library(transform: Any) -> str:
    """Which library's protocol it follows: by its class, or that of what it inherits from."""
    for kind in type(transform).__mro__:
        name = kind.__module__.partition(".")[0]
        if name in ("albumentations", "torchvision"):
            return name
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if keras is not None and isinstance(transform, keras.layers.Layer):
        return "keras"
    return "torchvision" if torch and isinstance(transform, torch.nn.Module) else "function"


def changed_images(transform: Any, images: Images, rng: np.random.Generator) -> Images:
    """What a transform of single images makes of some.

    Args:
        transform: of one of the libraries, whose chance is drawn from ``rng``.
        images: (N, H, W, C) uint8.
        rng: the batch's chance.

    Returns:
        (N, H, W, C) uint8.

    Raises:
        TypeError: the transform gives something else.
        ValueError: it gives images of another shape.
    """
    with _seeded(transform, int(rng.integers(2**31))) as library:
        found = _each_changed(library, transform, images)
    for one in found:
        if not isinstance(one, np.ndarray) or one.dtype != np.uint8:
            raise TypeError(_unexpected(one))
        if one.shape != images.shape[1:]:
            raise ValueError(
                f"the transform makes images of {one.shape}, expected {images.shape[1:]} as before"
            )
    return np.stack(found) if found else images


def _each_changed(library: str, transform: Any, images: Images) -> list[Any]:
    if library == "keras":
        import keras

        output = transform(images.astype(np.float32), training=True)
        numbers = keras.ops.convert_to_numpy(output)
        return list(np.clip(np.rint(numbers), 0, 255).astype(np.uint8))
    if library == "torchvision":
        import torch

        found: list[Any] = []
        for image in images:
            output = transform(torch.from_numpy(image.copy()).permute(2, 0, 1))
            if not isinstance(output, torch.Tensor):
                raise TypeError(_unexpected(output))
            found.append(output.permute(1, 2, 0).numpy())
        return found
    if library == "albumentations":
        return [transform(image=image)["image"] for image in images]
    return [transform(image) for image in images]


@contextmanager
def _seeded(transform: Any, seed: int) -> Iterator[str]:
    """Have a transform draw its chance from a seed; its library.

    What else draws from the same sources goes on there as if nothing had been drawn.
    """
    library, torch = _library(transform), sys.modules.get("torch")
    with (
        _ONE_AT_A_TIME,
        nullcontext() if torch is None else torch.random.fork_rng(devices=[]),
    ):
        # What users' functions draw from.
        of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        if torch is not None:
            torch.manual_seed(seed)
        if library == "albumentations" and hasattr(transform, "set_random_seed"):
            transform.set_random_seed(seed)
        elif library == "keras":
            _seed_layer(transform, seed)
        try:
            yield library
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


def _seed_layer(layer: Any, seed: int) -> None:
    from keras.random import SeedGenerator

    from kconv.keras._private import all_layers

    # By their order, in which the model within a Sequential, made at its first call, adds nothing.
    values = [value for one in all_layers(layer) for value in vars(one).values()]
    generators = {id(value): value for value in values if isinstance(value, SeedGenerator)}
    for number, generator in enumerate(generators.values()):
        generator.state.assign(np.array([seed, number << 16], generator.state.dtype))


def _unexpected(value: Any) -> str:
    kind = getattr(value, "dtype", type(value).__name__)
    return f"the transform of images gives {kind}, expected bytes (uint8) as it is given"


def _pair(output: Any) -> Any:
    if not isinstance(output, tuple | list) or len(output) != 2:
        raise TypeError(
            f"the transform of batches gives a {type(output).__name__}, expected images and labels"
        )
    return output


def changed_batch(
    transform: Callable[..., Any],
    images: NDArray[np.float32],
    targets: NDArray[np.float32],
    labels: NDArray[np.int64],
    seed: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a transform of batches makes of one.

    Args:
        transform: of one of the libraries.
        images: (N, H, W, C) float32, scaled.
        targets: (N, classes): the truth, one class each.
        labels: (N,) the same as numbers.
        seed: of the batch's chance.

    Returns:
        (N, H, W, C), and (N, classes): shares of each class.

    Raises:
        TypeError: the transform gives something else.
        ValueError: the shapes have changed.
    """
    with _seeded(transform, seed % 2**31) as library:
        if library == "torchvision":
            import torch

            given = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
            mixed, shares = _pair(transform(*given))
            if shares.ndim == 1:
                shares = torch.nn.functional.one_hot(shares, targets.shape[1])
            found, new = mixed.permute(0, 2, 3, 1).numpy(), shares.numpy()
        elif library == "keras":
            import keras

            output = transform({"images": images, "labels": targets}, training=True)
            found, new = (keras.ops.convert_to_numpy(output[key]) for key in ("images", "labels"))
        else:
            found, new = _pair(transform(images, targets))
    if found.shape != images.shape or new.shape != targets.shape:
        raise ValueError(
            f"the transform of batches gives images {found.shape} and shares {new.shape}, expected "
            f"{images.shape} and {targets.shape}"
        )
    return np.ascontiguousarray(found, np.float32), np.ascontiguousarray(new, np.float32)
