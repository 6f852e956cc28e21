"""The kernels as functions of the tensors of the Keras backend in use.

``native`` is a module with the functions of :mod:`kconv.jax`: ``pointwise_conv``,
``depthwise_conv`` and ``interleave``.
"""

from __future__ import annotations

from typing import Any

import keras

BACKEND: str = keras.backend.backend()
native: Any
_fused: Any
_Tensor: Any
# Imported by statements, so that tools which pack an application find the modules.
match BACKEND:
    case "jax":
        import jax

        from kconv import jax as native_jax
        from kconv.jax import _fused as fused_jax

        native, _fused, _Tensor = native_jax, fused_jax, jax.Array
    case "torch":
        import torch

        from kconv.keras import _torch as native_torch
        from kconv.torch import fused as fused_torch

        native, _fused, _Tensor = native_torch, fused_torch, torch.Tensor
    case "tensorflow":
        import tensorflow

        from kconv import tensorflow as native_tensorflow
        from kconv.tensorflow import _fused as fused_tensorflow

        native, _fused, _Tensor = native_tensorflow, fused_tensorflow, tensorflow.Tensor
    case _:
        raise ImportError(
            f"kconv.keras has no Keras backend {BACKEND!r}; it has jax, tensorflow, torch"
        )

fused: Any = _fused.fused
"""Runs a program of :mod:`kconv.models.fusion`; see :func:`kconv.torch.fused.fused`."""

SUPPORTS_JIT = BACKEND != "tensorflow"
"""Whether Keras may compile the layers: where TensorFlow compiles, its own operations take the
kernels' place."""


def is_dense(x: Any) -> bool:
    """Whether this is one of the backend's own tensors, and not a sparse or a ragged one."""
    dense = isinstance(x, _Tensor)
    return dense and (BACKEND != "torch" or str(x.layout) == "torch.strided")


LAYOUTS = {"channels_last": "NHWC", "channels_first": "NCHW"}


def runs_natively(x: Any) -> bool:
    """Whether a fused segment can run on a tensor, here and now, as one operation."""
    if keras.distribution.distribution() is not None:
        return False
    if BACKEND == "torch":
        from kconv.torch._private import has_any_global_hook

        return not has_any_global_hook() and bool(_fused.is_eager(x))
    return bool(_fused.runs_natively(x))


def is_compiling() -> bool:
    """Whether PyTorch reads what runs now, to compile it: it gets the layers one by one."""
    if BACKEND != "torch":
        return False
    import torch

    return torch.compiler.is_compiling()
