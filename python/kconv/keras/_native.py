"""The kernels as functions of the tensors of the Keras backend in use.

``native`` is a module with the functions of :mod:`kconv.jax`: ``pointwise_conv``,
``depthwise_conv`` and ``interleave``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import keras

_MODULES = {
    "jax": "kconv.jax",
    "torch": "kconv.keras._torch",
    "tensorflow": "kconv.tensorflow",
}

BACKEND: str = keras.backend.backend()
if BACKEND not in _MODULES:
    raise ImportError(f"kconv.keras has no Keras backend {BACKEND!r}; it has {', '.join(_MODULES)}")

native: Any = import_module(_MODULES[BACKEND])

_FUSED = {
    "jax": "kconv.jax._fused",
    "torch": "kconv.torch.fused",
    "tensorflow": "kconv.tensorflow._fused",
}
fused: Any = import_module(_FUSED[BACKEND]).fused
"""Runs a program of :mod:`kconv.models.fusion`; see :func:`kconv.torch.fused.fused`."""

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


def runs_on_cpu() -> bool:
    """Whether functions run on the CPU where kconv's operations can."""
    if BACKEND == "jax":
        import jax

        return bool(jax.default_backend() == "cpu")
    if BACKEND == "tensorflow":
        return not native.ops.inside_xla()
    return True
