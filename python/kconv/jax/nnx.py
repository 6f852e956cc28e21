"""kconv as layers and networks of Flax (``flax.nnx``), channels last.

The convolutions *are* ``nnx.Conv``, with another computation: the same parameters, of the same
names, shapes and initial values. Blocks and networks are made of Flax's own layers, chains of which
run as one operation.

Example:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from kconv.jax.nnx import DepthwiseConv, MBConv, PointwiseConv
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(
    ...     PointwiseConv(64, 96, groups=4, interleave=24, rngs=rngs),
    ...     DepthwiseConv(96, 3, strides=2, rngs=rngs),
    ...     MBConv(96, 48, strides=2, rngs=rngs),
    ... )
    >>> model(jnp.ones((8, 32, 32, 64))).shape
    (8, 8, 8, 48)
"""

import flax as _flax

from kconv._versions import warn_of_version
from kconv.jax._nnx_layers import DepthwiseConv, InterleaveChannels, PointwiseConv
from kconv.jax._nnx_networks import ConvUnit, MBConv, Network, build, create_model

warn_of_version("flax", _flax.__version__)

__all__ = [
    "ConvUnit",
    "DepthwiseConv",
    "InterleaveChannels",
    "MBConv",
    "Network",
    "PointwiseConv",
    "build",
    "create_model",
]
