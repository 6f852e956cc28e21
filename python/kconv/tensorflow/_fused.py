"""Fused segments of a network as one TensorFlow operation: see :mod:`kconv.models.fusion`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kconv.models.fusion import Program
from kconv.tensorflow._library import kernels
from kconv.tensorflow.ops import inside_xla

__all__ = ["fused", "runs_natively"]

Tensor = Any


def runs_natively(x: Tensor) -> bool:
    """Whether the operation can take a tensor: XLA does not know it."""
    return not inside_xla()


def fused(
    program: Program,
    layout: str,
    x: Tensor,
    parameters: Tensor,
    masks: Tensor | None,
    statistics: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Runs a program.

    Args:
        program: of a segment.
        layout: "NCHW" or "NHWC".
        x: (N, C, H, W) or (N, H, W, C), float32 or float64.
        parameters: all of them in a row.
        masks: (masks, N) factors of images, or None for none.
        statistics: (2, channels of all norms) means and variances to normalise with, or None for
            the batch's own.

    Returns:
        The output, like ``x``, and the means and the variances that were used, biased; a list, as
        nobody may iterate over a tensor in a graph.
    """
    options = {"program": list(program.integers), "layout": layout}
    none = tf.zeros(0, x.dtype)
    if masks is None and (statistics is not None or not program.norms):
        used = tf.zeros((2, 0), x.dtype) if statistics is None else statistics
        y = kernels.kconv_fused_infer(x, parameters, used, **options)
    else:
        masks = none if masks is None else masks
        given = none if statistics is None else statistics
        y, used, _ = kernels.kconv_fused_forward(x, parameters, masks, given, **options)
    if not tf.executing_eagerly():
        y.set_shape((x.shape[0], *program.output_shape(layout)))
        used.set_shape((2, program.norm_channels))
    return y, tf.unstack(used, 2)
