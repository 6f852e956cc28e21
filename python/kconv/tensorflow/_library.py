"""The native operations: registered with TensorFlow, wrapped for Python, and their gradients.

Without its bias a convolution is bilinear in image and weight, so output, input gradient and weight
gradient form a triangle: the derivatives of each are the other two, to every order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import tensorflow as tf

from kconv import _kconv
from kconv.tensorflow._private import OpList, op_definition, python_wrappers

__all__ = ["attributes", "kernels"]

Tensor = Any


def _register() -> ModuleType:
    """Registers the operations, and makes a module of functions that call them."""
    (library,) = Path(tf.sysconfig.get_lib()).glob("libtensorflow_framework.*")
    definitions = OpList()
    for name in _kconv.register_tensorflow_ops(str(library)):
        definitions.op.append(op_definition(name))
    module = ModuleType("kconv.tensorflow.kernels")
    # What tf.load_op_library does too, with the operations of a library that it loads itself.
    exec(python_wrappers(definitions.SerializeToString()), vars(module))
    return module


kernels: Any = _register()
"""``kconv_pointwise_conv``, ``kconv_depthwise_conv_grad_input`` and so on."""


def attributes(op: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Some of an operation's attributes."""
    values = {name: op.get_attr(name) for name in names}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}


def _register_gradients(
    name: str, conv: Callable[..., Tensor], grad_input: Any, grad_weight: Any, *names: str
) -> None:
    """For a convolution and its gradients, which have attributes of these ``names``."""

    @tf.RegisterGradient(name)
    def _(op: Any, g: Tensor) -> list[Tensor]:
        x, weight, *bias = op.inputs
        arguments = attributes(op, names)
        of_bias = {"interleave": arguments.get("interleave", 1), "layout": arguments["layout"]}
        return [
            grad_input(g, weight, x, **arguments),
            grad_weight(x, g, weight, **arguments),
            *(kernels.kconv_grad_bias(g, b, **of_bias) for b in bias),
        ]

    @tf.RegisterGradient(f"{name}GradInput")
    def _(op: Any, c: Tensor) -> list[Tensor | None]:
        g, weight, _ = op.inputs
        arguments = attributes(op, names)
        return [conv(c, weight, [], **arguments), grad_weight(c, g, weight, **arguments), None]

    @tf.RegisterGradient(f"{name}GradWeight")
    def _(op: Any, c: Tensor) -> list[Tensor | None]:
        x, g, _ = op.inputs
        arguments = attributes(op, names)
        return [grad_input(g, c, x, **arguments), conv(x, c, [], **arguments), None]


_register_gradients(
    "KconvPointwiseConv",
    kernels.kconv_pointwise_conv,
    kernels.kconv_pointwise_conv_grad_input,
    kernels.kconv_pointwise_conv_grad_weight,
    *("groups", "interleave", "layout", "weight_layout"),
)
_register_gradients(
    "KconvDepthwiseConv",
    kernels.kconv_depthwise_conv,
    kernels.kconv_depthwise_conv_grad_input,
    kernels.kconv_depthwise_conv_grad_weight,
    *("stride", "padding", "layout", "weight_layout"),
)


@tf.RegisterGradient("KconvGradBias")
def _(op: Any, c: Tensor) -> list[Tensor | None]:
    arguments = attributes(op, ("interleave", "layout"))
    pixel = tf.reshape(c, (1, -1, 1, 1) if arguments["layout"] == "NCHW" else (1, 1, 1, -1))
    pixel = kernels.kconv_interleave(pixel, arguments["interleave"], arguments["layout"])
    return [tf.broadcast_to(pixel, tf.shape(op.inputs[0])), None]


@tf.RegisterGradient("KconvInterleave")
def _(op: Any, g: Tensor) -> Tensor:
    return kernels.kconv_deinterleave(g, **attributes(op, ("step", "layout")))


@tf.RegisterGradient("KconvDeinterleave")
def _(op: Any, g: Tensor) -> Tensor:
    return kernels.kconv_interleave(g, **attributes(op, ("step", "layout")))
