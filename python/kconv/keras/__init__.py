"""kconv for Keras 3, on its JAX, TensorFlow and PyTorch backends.

Example:
    >>> import keras, kconv.keras
    >>> x = keras.Input((32, 32, 64))
    >>> y = kconv.keras.DepthwiseConv2D(3, padding="same")(x)
    >>> y = kconv.keras.PointwiseConv2D(48, groups=4, interleave=12)(y)
    >>> keras.Model(x, y).output_shape
    (None, 32, 32, 48)
"""

import keras as _keras

from kconv._versions import warn_of_version
from kconv.keras._create import create_model
from kconv.keras._freeze import freeze
from kconv.keras._fuse import fuse, restore
from kconv.keras.blocks import kPointwiseConv2D
from kconv.keras.builder import build
from kconv.keras.convert import accelerate, compress, report, to_native
from kconv.keras.layers import (
    CopyChannels,
    DepthwiseConv2D,
    InterleaveChannels,
    PointwiseConv2D,
    SumIntoHalfChannels,
)
from kconv.keras.network import Network
from kconv.keras.recalibration import RecalibrateBatchNorms
from kconv.keras.units import ConvUnit, MBConv

__all__ = [
    "ConvUnit",
    "CopyChannels",
    "DepthwiseConv2D",
    "InterleaveChannels",
    "MBConv",
    "Network",
    "PointwiseConv2D",
    "RecalibrateBatchNorms",
    "SumIntoHalfChannels",
    "accelerate",
    "build",
    "compress",
    "create_model",
    "freeze",
    "fuse",
    "kPointwiseConv2D",
    "report",
    "restore",
    "to_native",
]

warn_of_version("keras", _keras.__version__)


def __dir__() -> list[str]:
    return sorted(__all__)
