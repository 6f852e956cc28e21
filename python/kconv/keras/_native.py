"""The kernels as functions of the tensors of the Keras backend in use.

``native`` is a module with the functions of :mod:`kconv.jax`: ``pointwise_conv``,
``depthwise_conv`` and ``interleave``.
"""

from __future__ import annotations

from typing import Any

import keras

BACKEND: str = keras.backend.backend()
# Imported by statements, so that tools which pack an application find the modules.
native: Any
fused: Any
"""Runs a program of :mod:`kconv.models.fusion`; see :func:`kconv.torch.fused.fused`."""
match BACKEND:
    case "jax":
        import kconv.jax as native
        from kconv.jax._fused import fused
        from kconv.jax._fused import runs_natively as _runs_natively
    case "torch":
        import kconv.keras._torch as native
        from kconv.torch.fused import _eager as _runs_natively
        from kconv.torch.fused import fused
    case "tensorflow":
        import kconv.tensorflow as native
        from kconv.tensorflow._fused import fused
        from kconv.tensorflow._fused import runs_natively as _runs_natively
    case _:
        raise ImportError(f"kconv.keras has no Keras backend {BACKEND!r}; it has jax, torch, tensorflow")

SUPPORTS_JIT = BACKEND != "tensorflow"
"""Whether Keras may compile the layers: where TensorFlow compiles, its own operations take the
kernels' place."""

_TENSORS = {
    "jax": ("jax", "Array"),
    "torch": ("torch", "Tensor"),
    "tensorflow": ("tensorflow", "Tensor"),
}


def is_dense(x: Any) -> bool:
    """Whether this is one of the backend's own tensors, and not a sparse or a ragged one."""
    module, name = _TENSORS[BACKEND]
    if not isinstance(x, getattr(import_module(module), name)):
        return False
    return BACKEND != "torch" or str(x.layout) == "torch.strided"


LAYOUTS = {"channels_last": "NHWC", "channels_first": "NCHW"}


def runs_natively(x: Any) -> bool:
    """Whether a fused segment can run on a tensor, here and now, as one operation."""
    return keras.distribution.distribution() is None and bool(_runs_natively(x))
