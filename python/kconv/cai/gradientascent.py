"""The original's ``gradientascent``: images that excite a part of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from numpy.typing import ArrayLike, NDArray

Tensor = Any
Image = NDArray[np.float32]


def calc_sum_channel_mean_from_model(img: Tensor, model: keras.Model) -> Tensor:
    """The mean of a model's output for an image; with several outputs, the sum of their means.

    Example:
        >>> model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.ReLU()])
        >>> float(calc_sum_channel_mean_from_model(keras.ops.ones((4, 4, 3)), model))
        1.0

    Args:
        img: (H, W, C).
        model: of (N, H, W, C) to one output or several.

    Returns:
        A scalar tensor.
    """
    outputs = keras.tree.flatten(model(keras.ops.expand_dims(img, 0), training=False))
    return sum(keras.ops.mean(output) for output in outputs)


class GradientAscent:
    """Moves an image uphill, towards a larger mean of a model's output, within [-1, 1].

    Example:
        >>> model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.ReLU()])
        >>> loss, image = GradientAscent(model)(np.full((4, 4, 3), 0.5), 3, 0.01)
        >>> loss > 0.5, image.shape
        (True, (4, 4, 3))

    Args:
        model: of (N, H, W, C) to any outputs.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model

    def __call__(self, img: ArrayLike, steps: int, step_size: float) -> tuple[float, Image]:
        """Take ``steps`` steps from an image (H, W, C).

        Args:
            img: the start, from -1 to 1.
            steps: how many.
            step_size: on the gradient, whose deviation is brought to 1.

        Returns:
            The mean's value before the last step, and the image from -1 to 1.
        """
        image, loss = np.array(img, np.float32), 0.0
        value_and_gradient = self._value_and_gradient()
        for _ in range(steps):
            value, direction = value_and_gradient(image)
            loss, gradient = float(value), keras.ops.convert_to_numpy(direction)
            image += step_size * gradient / (gradient.std() + 1e-8)
            np.clip(image, -1, 1, out=image)
        return loss, image

    def _value_and_gradient(self) -> Callable[[Image], tuple[Tensor, Tensor]]:
        """A function of an image, for the weights that the model has now."""

        def value(tensor: Tensor) -> Tensor:
            return calc_sum_channel_mean_from_model(tensor, self.model)

        match keras.backend.backend():
            case "jax":
                import jax

                return jax.jit(jax.value_and_grad(value))
            case "torch":

                def in_torch(image: Image) -> tuple[Tensor, Tensor]:
                    tensor = keras.ops.convert_to_tensor(image).requires_grad_()
                    mean = value(tensor)
                    mean.backward()
                    return mean, tensor.grad

                return in_torch
            case _:
                import tensorflow

                @tensorflow.function
                def in_tensorflow(tensor: Tensor) -> tuple[Tensor, Tensor]:
                    with tensorflow.GradientTape() as tape:
                        tape.watch(tensor)
                        mean = value(tensor)
                    return mean, tape.gradient(mean, tensor)

                return lambda image: in_tensorflow(tensorflow.convert_to_tensor(image))


def run_gradient_ascent(
    img: ArrayLike, partial_model: keras.Model, steps: int = 100, step_size: float = 0.01
) -> Image:
    """The image after some steps of gradient ascent.

    Example:
        >>> model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.ReLU()])
        >>> run_gradient_ascent(np.ones((4, 4, 3), np.float32), model, steps=2).shape
        (4, 4, 3)

    Args:
        img: (H, W, C), from -1 to 1, as each step clips it.
        partial_model: of (N, H, W, C) to what is to become large.
        steps: how many.
        step_size: of each.

    Returns:
        (H, W, C), from -1 to 1.
    """
    return GradientAscent(partial_model)(img, steps, step_size)[1]


def run_gradient_ascent_octaves(
    img: ArrayLike,
    partial_model: keras.Model,
    steps: int = 50,
    step_size: float = 0.01,
    octave_scale: float = 1.3,
    low_range: int = -2,
    high_range: int = 3,
) -> Image:
    """Gradient ascent over a pyramid of scales, from small to large.

    Example:
        >>> model = keras.Sequential([keras.Input((None, None, 3)), keras.layers.ReLU()])
        >>> image = np.ones((9, 9, 3), np.float32)
        >>> run_gradient_ascent_octaves(image, model, steps=1).shape  # 1.3 ** 2 times as large
        (15, 15, 3)
        >>> run_gradient_ascent_octaves(image, model, steps=1, high_range=1).shape
        (9, 9, 3)

    Args:
        img: (H, W, C), from -1 to 1.
        partial_model: of images of any size to what is to become large.
        steps: how many on each scale.
        step_size: of each.
        octave_scale: the factor between neighbouring scales.
        low_range: exponent of the first scale.
        high_range: exponent after that of the last.

    Returns:
        (H', W', C), of the size of the last scale, and from -1 to 1.
    """
    image = np.asarray(img, np.float32)
    size = np.array(image.shape[:2], np.float32)
    for octave in range(low_range, high_range):
        height, width = np.maximum(1, (size * np.float32(octave_scale**octave)).astype(int))
        image = _resized(image, (int(height), int(width)))
        image = run_gradient_ascent(image, partial_model, steps, step_size)
    return image


def _resized(image: Image, size: tuple[int, int]) -> Image:
    resized = keras.ops.image.resize(image, size, data_format="channels_last")
    return keras.ops.convert_to_numpy(resized)
