"""Parameters and multiply-accumulates of a network, without any framework."""

from __future__ import annotations

import dataclasses
from math import prod
from typing import NamedTuple

from kconv.models.graph import Graph, Layer, Shape
from kconv.models.spec import Spec

MOVING = ("moving_mean", "moving_variance")
"""The weights that are not trained."""


class Counts(NamedTuple):
    """What :func:`count` counts.

    Attributes:
        trainable: trainable parameters.
        total: trainable parameters and the moving statistics of batch norms.
        macs: multiply-accumulates of convolutions and dense layers for one image, biases left
            out; None where the image's size is unknown.
    """

    trainable: int
    total: int
    macs: int | None


def count(model: Spec | Graph, input_shape: Shape | None = None) -> Counts:
    """Parameters and multiply-accumulates of a network.

    Example:
        >>> from kconv.models import create
        >>> count(create("keffnet_b0", ktype="D6_16ch", classes=10))
        Counts(trainable=639702, total=685334, macs=123613524)

    Args:
        model: a spec, or the graph of one.
        input_shape: (H, W, channels) to count at; by default the spec's own.

    Returns:
        The :class:`Counts`.

    Raises:
        TypeError: if an ``input_shape`` is given for a graph, whose shapes are fixed.
    """
    if isinstance(model, Spec):
        spec = model if input_shape is None else dataclasses.replace(model, input_shape=input_shape)
        graph = spec.graph()
    elif input_shape is None:
        graph = model
    else:
        raise TypeError("input_shape: the shapes of a graph are fixed; count its spec instead")
    sizes = [(name, prod(s)) for layer in graph.layers for name, s in layer.weights().items()]
    return Counts(
        trainable=sum(size for name, size in sizes if name not in MOVING),
        total=sum(size for _, size in sizes),
        macs=_sum_known([_macs(layer) for layer in graph.layers]),
    )


def _macs(layer: Layer) -> int | None:
    """Each element of a kernel meets every output pixel once."""
    kernels = [prod(s) for name, s in layer.weights().items() if name.endswith("kernel")]
    if not kernels:
        return 0
    pixels = [size for size in layer.shape[:-1] if size is not None]
    return kernels[0] * prod(pixels) if len(pixels) == len(layer.shape) - 1 else None


def _sum_known(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
