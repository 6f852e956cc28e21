"""What freezing a model has in common in all frameworks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kconv._model_folder import ImageInput, ModelConfig
from kconv.models import graph
from kconv.runtime import FrozenNetwork
from kconv.weights._entries import Array

__all__ = ["frozen"]


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
    """
    count = layers[layers.output].channels
    names = map(str, range(count)) if class_names is None else class_names
    names = tuple(names)
    if len(names) != count:
        raise ValueError(f"there are {len(names)} class_names, and {count} outputs")
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    image = ImageInput(
        height=height,
        width=width,
        channels=layers.layers[0].channels,
        interpolation=interpolation,  # type: ignore[arg-type]  # it is checked there
        scale=scale if isinstance(scale, float | int) else tuple(scale),
        offset=offset if isinstance(offset, float | int) else tuple(offset),
    )
    config = ModelConfig(network=layers, class_names=names, image=image)
    return FrozenNetwork(config, weights)
