"""The original's ``gradientascent``: images that excite a part of a model."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from numpy.typing import ArrayLike, NDArray

Tensor = Any
Image = NDArray[np.float32]


def calc_sum_channel_mean_from_model(img: Tensor, model: keras.Model) -> Tensor:
    """The mean of each channel of a model's output for an image, summed over the channels.

    Example:
        >>> model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.ReLU()])
        >>> float(calc_sum_channel_mean_from_model(keras.ops.ones((4, 4, 3)), model))
        3.0

    Args:
        img: (H, W, C).
        model: of (N, H, W, C) to (N, ..., channels).

    Returns:
        A scalar tensor.
    """
    output = model(keras.ops.expand_dims(img, 0), training=False)
    return keras.ops.sum(keras.ops.mean(output, axis=tuple(range(len(output.shape) - 1))))


class GradientAscent:
    """Moves an image uphill, towards a larger mean of a model's output.

    Example:
        >>> model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.ReLU()])
        >>> loss, image = GradientAscent(model)(np.ones((4, 4, 3), np.float32), 3, 0.01)
        >>> loss > 3, image.shape
        (True, (4, 4, 3))

    Args:
        model: of (N, H, W, C) to any output with the channels last.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model

    def __call__(self, img: ArrayLike, steps: int, step_size: float) -> tuple[float, Image]:
        """Take so many steps from an image (H, W, C).

        Args:
            img: the start.
            steps: how many.
            step_size: on the gradient, whose deviation is brought to 1.

        Returns:
            The mean's value before the last step, and the image.
        """
        image, loss = np.array(img, np.float32), 0.0
        for _ in range(steps):
            loss, gradient = self._value_and_gradient(image)
            image += step_size * gradient / (gradient.std() + 1e-8)
        return loss, image

    def _value_and_gradient(self, image: Image) -> tuple[float, Image]:
        def value(tensor: Tensor) -> Tensor:
            return calc_sum_channel_mean_from_model(tensor, self.model)

        match keras.backend.backend():
            case "jax":
                import jax

                loss, gradient = jax.value_and_grad(value)(image)
            case "torch":
                tensor = keras.ops.convert_to_tensor(image).requires_grad_()
                loss = value(tensor)
                loss.backward()
                gradient = tensor.grad
            case _:
                import tensorflow

                tensor = tensorflow.convert_to_tensor(image)
                with tensorflow.GradientTape() as tape:
                    tape.watch(tensor)
                    loss = value(tensor)
                gradient = tape.gradient(loss, tensor)
        return float(loss), keras.ops.convert_to_numpy(gradient)


def run_gradient_ascent(
    img: ArrayLike, partial_model: keras.Model, steps: int = 100, step_size: float = 0.01
) -> Image:
    """The image after some steps of gradient ascent.

    Example:
        >>> model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.ReLU()])
        >>> run_gradient_ascent(np.ones((4, 4, 3), np.float32), model, steps=2).shape
        (4, 4, 3)

    Args:
        img: (H, W, C).
        partial_model: of (N, H, W, C) to what is to become large.
        steps: how many.
        step_size: of each.

    Returns:
        (H, W, C).
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
        >>> run_gradient_ascent_octaves(np.ones((9, 9, 3), np.float32), model, steps=1).shape
        (9, 9, 3)

    Args:
        img: (H, W, C).
        partial_model: of images of any size to what is to become large.
        steps: how many on each scale.
        step_size: of each.
        octave_scale: the factor between neighbouring scales.
        low_range: exponent of the first scale.
        high_range: exponent after that of the last.

    Returns:
        (H, W, C), of the size of ``img``.
    """
    image = np.asarray(img, np.float32)
    size = image.shape[:2]
    for octave in range(low_range, high_range):
        scale = octave_scale**octave
        image = _resized(image, (max(1, int(size[0] * scale)), max(1, int(size[1] * scale))))
        image = run_gradient_ascent(image, partial_model, steps, step_size)
    return _resized(image, size)


def _resized(image: Image, size: tuple[int, int]) -> Image:
    resized = keras.ops.image.resize(image, size, data_format="channels_last")
    return keras.ops.convert_to_numpy(resized)
