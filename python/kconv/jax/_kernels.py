"""Calls of the native kernels from inside a JAX program.

The kernels are XLA FFI handlers: a compiled program calls them directly on its own buffers, without
Python and without copies. Where this jaxlib refuses the handlers, the same NumPy functions run
through :func:`jax.pure_callback`, which is slower and copies.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import numpy as np

import kconv
from kconv import _kconv

_READ_FROM_RESULT = ("input_size", "kernel_size")
"""Arguments of the NumPy functions that an XLA handler reads from the shape of its result."""


@functools.cache
def ffi_available() -> bool:
    """Register the handlers with XLA once; False, after one warning, where that fails."""
    # With the backend up, XLA asks each handler for its version as it is registered, and raises a
    # refusal here. Otherwise that would stop the start of the backend, and with it all of JAX.
    jax.devices("cpu")
    try:
        for kernel, handler in _kconv.xla_handlers().items():
            jax.ffi.register_ffi_target(_target(kernel), handler, platform="cpu")
    except Exception as error:  # whatever a past or future jaxlib raises
        warnings.warn(
            f"jax {jax.__version__} refuses kconv's XLA handlers ({error}); "
            "kconv.jax goes through jax.pure_callback instead, which is slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def call(
    kernel: str, result: jax.ShapeDtypeStruct, *operands: jax.Array, **attributes: Any
) -> jax.Array:
    """Call the function of :mod:`kconv` of that name on float32, float64 or bfloat16 operands."""
    if ffi_available():
        encoded = {
            name: _encode(value)
            for name, value in attributes.items()
            if name not in _READ_FROM_RESULT
        }
        return jax.ffi.ffi_call(_target(kernel), result)(*operands, **encoded)

    def on_host(*operands: jax.Array) -> np.ndarray:
        return getattr(kconv, kernel)(*map(np.asarray, operands), **attributes)

    return jax.pure_callback(on_host, result, *operands, vmap_method="sequential")


def _target(kernel: str) -> str:
    return f"kconv_{kernel}"


def _encode(value: Any) -> Any:
    """An attribute as XLA takes it: a string, a 64-bit integer, or a flat array of them."""
    if isinstance(value, str):
        return value
    return np.int64(value) if isinstance(value, int) else np.ravel(value).astype(np.int64)
