"""What freezing a model has in common in all frameworks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kconv._model_folder import ImageInput, ModelConfig
from kconv.models import graph
from kconv.runtime import FrozenNetwork
from kconv.weights._entries import Array

__all__ = ["dense_of", "frozen"]


def frozen(
    layers: graph.Graph,
    weights: Mapping[tuple[str, str], Array],
    *,
    class_names: Sequence[str] | None,
    image_size: int | tuple[int, int] | None,
    interpolation: str,
    scale: float | Sequence[float],
    offset: float | Sequence[float],
) -> FrozenNetwork:
    """The network of a graph; the options are those of the front ends' ``freeze``.

    Raises:
        ValueError: an option does not fit.
        TypeError: an option is of another type.
    """
    count = layers[layers.output].channels
    names = tuple(map(str, range(count)) if class_names is None else class_names)
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names={class_names!r}, expected a text for each output")
    if len(names) != count:
        raise ValueError(f"there are {len(names)} class_names, and {count} outputs")
    size = tuple(image_size) if isinstance(image_size, list | tuple) else (image_size, image_size)
    if len(size) != 2:
        raise ValueError(f"image_size={image_size!r}, expected pixels, or a height and a width")
    image = ImageInput(
        height=size[0],
        width=size[1],
        channels=layers.layers[0].channels,
        interpolation=interpolation,  # type: ignore[arg-type]  # it is checked there
        scale=_numbers("scale", scale),
        offset=_numbers("offset", offset),
    )
    config = ModelConfig(network=layers, class_names=names, image=image)
    return FrozenNetwork(config, weights)


def _numbers(name: str, value: Any) -> float | tuple[float, ...]:
    """A number, or several of any kind of sequence."""
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        numbers = None
    if value is None or numbers is None or numbers.ndim > 1:
        raise TypeError(f"{name}={value!r}, expected a number, or one for each channel")
    return float(numbers) if numbers.ndim == 0 else tuple(numbers.tolist())


def dense_of(layer: graph.Conv) -> graph.Dense:
    """What a convolution of vectors is in a frozen network."""
    return graph.Dense(
        name=layer.name,
        inputs=layer.inputs,
        shape=layer.shape,
        units=layer.filters,
        in_features=layer.in_channels,
    )
