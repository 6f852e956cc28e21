"""kconv for JAX: differentiable convolutions that go through ``jit``, ``grad``, ``vmap`` and so on.

Example:
    >>> import jax, jax.numpy as jnp, kconv.jax
    >>> loss = lambda w, x: kconv.jax.pointwise_conv(x, w, groups=2).sum()
    >>> jax.jit(jax.grad(loss))(jnp.ones((6, 4)), jnp.ones((2, 8, 5, 5))).shape
    (6, 4)

Images that are split over devices stay so: in ``jax.jit``, ``jax.shard_map`` and with explicit
shardings every device computes its own part of the batch. Where anything else is split, it is
brought together first. For ``jax.export`` allow the custom calls ``kconv_*``; the batch size may be
symbolic. Layers for Flax are in :mod:`kconv.jax.nnx`.
"""

import jax as _jax

from kconv._versions import warn_of_version
from kconv.jax.ops import deinterleave, depthwise_conv, interleave, pointwise_conv

__all__ = ["deinterleave", "depthwise_conv", "interleave", "pointwise_conv"]

warn_of_version("jax", _jax.__version__)


def __dir__() -> list[str]:
    return sorted([*__all__, "nnx"])
