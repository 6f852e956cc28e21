"""Fused segments of a network as one TensorFlow operation: see :mod:`kconv.models.fusion`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kconv.models.fusion import Program
from kconv.models.interpreter import interpret
from kconv.models.wire import Code
from kconv.tensorflow._library import attributes, kernels
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
        x: (N, C, H, W) or (N, H, W, C), float32, float64 or bfloat16.
        parameters: all of them in a row; of bfloat16 images, as all else, in float32.
        masks: (masks, N) factors of images, or None for none.
        statistics: (2, channels of all norms) means and variances to normalise with, or None for
            the batch's own.

    Returns:
        The output, like ``x``, and the means and the variances that were used, biased; a list, as
        nobody may iterate over a tensor in a graph.
    """
    options = {"program": list(program.integers), "layout": layout}
    wide = _wide(x)
    none = tf.zeros(0, wide)
    if masks is None and (statistics is not None or not program.norms):
        used = tf.zeros((2, 0), wide) if statistics is None else statistics
        y = kernels.kconv_fused_infer(x, parameters, used, **options)
    else:
        masks = none if masks is None else masks
        given = none if statistics is None else statistics
        y, used, _ = kernels.kconv_fused_forward(x, parameters, masks, given, **options)
    if not tf.executing_eagerly():
        y.set_shape((x.shape[0], *program.output_shape(layout)))
        used.set_shape((2, program.norm_channels))
    if statistics is None and x.shape[0] is None:
        # As elsewhere in TensorFlow, the means of no images are no numbers.
        count = tf.cast(tf.shape(x)[0], wide)
        used *= count / count
    return y, tf.unstack(used, 2)


def _wide(x: Tensor) -> Any:
    """What values of a tensor's dtype are computed with."""
    return tf.float32 if x.dtype == tf.bfloat16 else x.dtype


@tf.RegisterGradient("KconvFusedForward")
def _(op: Any, g: Tensor, *_: Tensor) -> list[Tensor | None]:
    x, parameters, masks, given = op.inputs
    _, used, workspace = op.outputs
    # Of one axis, and empty, where the statistics were the batch's own.
    frozen = given.shape.rank == 2
    return [*_gradients(op, g, x, parameters, masks, used, workspace, frozen), None, None]


@tf.RegisterGradient("KconvFusedInfer")
def _(op: Any, g: Tensor) -> list[Tensor | None]:
    x, parameters, statistics = op.inputs
    none = tf.zeros(0, _wide(x))
    _, used, workspace = kernels.kconv_fused_forward(
        x, parameters, none, statistics, **attributes(op, ("program", "layout"))
    )
    return [*_gradients(op, g, x, parameters, none, used, workspace, frozen=True), None]


def _gradients(
    op: Any,
    g: Tensor,
    x: Tensor,
    parameters: Tensor,
    masks: Tensor,
    used: Tensor,
    workspace: Tensor,
    frozen: bool,
) -> list[Tensor]:
    """The gradients by input and parameters, which are differentiable in their turn.

    Those of the gradients are those of the program in TensorFlow's own operations, as there is no
    native operation for them.
    """
    options = attributes(op, ("program", "layout"))

    @tf.custom_gradient
    def backward(g: Tensor, x: Tensor, parameters: Tensor) -> Any:
        grad_parameters, grad_x = kernels.kconv_fused_backward(
            g, parameters, masks, used, workspace, frozen=int(frozen), **options
        )
        if not tf.executing_eagerly():
            grad_parameters.set_shape(parameters.shape)
            grad_x.set_shape(x.shape)

        def backward_of_backward(*changes: Tensor) -> Any:
            operands = [g, x, parameters]
            with tf.GradientTape() as outer:
                outer.watch(operands)
                with tf.GradientTape() as inner:
                    inner.watch([x, parameters])
                    y = _interpret(options, x, parameters, masks, used if frozen else None)
                gradients = inner.gradient(y, [x, parameters], g)
            zeros = tf.UnconnectedGradients.ZERO
            return outer.gradient(gradients, operands, list(changes), unconnected_gradients=zeros)

        return (grad_x, grad_parameters), backward_of_backward

    return list(backward(g, x, parameters))


def _interpret(
    options: dict[str, Any], x: Tensor, parameters: Tensor, masks: Tensor, given: Tensor | None
) -> Tensor:
    from keras import ops  # on this backend: nothing else than Keras makes programs

    layout, program = options["layout"], tuple(options["program"])
    code = Code.decode(program)
    channels, height, width = code.values[0]  # a graph may have forgotten them
    nchw = (None, channels, height, width)
    dtype = x.dtype
    x = tf.ensure_shape(x, nchw if layout == "NCHW" else (None, height, width, channels))
    x = tf.cast(x, _wide(x))
    parameters = tf.ensure_shape(parameters, (None,))
    drop = None
    if masks.shape.rank != 1:  # of one axis, and empty, where there are none
        drop = tf.ensure_shape(masks, (code.masks, None))
    given = None if given is None else tf.ensure_shape(given, (2, None))
    return tf.cast(interpret(ops, program, layout, x, parameters, drop, given)[0], dtype)
