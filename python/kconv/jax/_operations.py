"""What :mod:`kconv.models.interpreter` wants of ``keras.ops``, in JAX's operations alone.

Programs run here without Keras, too, or beside Keras on another backend.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["operations"]

Padding = Literal["same", "valid"]
_IMAGES = ("NHWC", "HWIO", "NHWC")


class _Operations:
    """``operations.name`` is JAX's function of that name where none is written down here."""

    rsqrt = staticmethod(jax.lax.rsqrt)
    convert_to_tensor = staticmethod(jnp.asarray)
    gelu = staticmethod(partial(jax.nn.gelu, approximate=False))

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name, None) or getattr(jax.nn, name)

    def take(self, x: Any, indices: Any, axis: int) -> Any:
        return jnp.take(x, jnp.asarray(indices), axis=axis)

    def moments(self, x: Any, axes: tuple[int, ...]) -> tuple[Any, Any]:
        return jnp.mean(x, axes), jnp.var(x, axes)

    def conv(
        self,
        x: Any,
        kernel: Any,
        strides: Any = 1,
        padding: Padding = "valid",
        data_format: str = "channels_last",
        dilation_rate: Any = 1,
    ) -> Any:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            _pair(strides),
            padding.upper(),
            rhs_dilation=_pair(dilation_rate),
            dimension_numbers=_IMAGES,
            feature_group_count=x.shape[-1] // kernel.shape[-2],
        )

    def depthwise_conv(self, x: Any, kernel: Any, **options: Any) -> Any:
        height, width, channels, multiplier = kernel.shape
        return self.conv(x, kernel.reshape(height, width, 1, channels * multiplier), **options)

    def average_pool(
        self, x: Any, pool_size: Any, strides: Any, padding: Padding, data_format: str
    ) -> Any:
        # A window's sum in bfloat16 would stop at 256 ones, and in float16 overflow.
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        total = partial(_windows, jax.lax.add, 0.0, pool_size, strides, padding)
        return (total(wide) / total(jnp.ones_like(wide[:1, :, :, :1]))).astype(x.dtype)

    def max_pool(
        self, x: Any, pool_size: Any, strides: Any, padding: Padding, data_format: str
    ) -> Any:
        return _windows(jax.lax.max, -jnp.inf, pool_size, strides, padding, x)


def _windows(join: Any, start: float, size: Any, strides: Any, padding: Padding, x: Any) -> Any:
    windows, steps = ((1, *_pair(pair), 1) for pair in (size, strides))
    first = np.array(start, x.dtype)[()]  # JAX differentiates it where it sees the number
    return jax.lax.reduce_window(x, first, join, windows, steps, padding.upper())


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


operations = _Operations()
