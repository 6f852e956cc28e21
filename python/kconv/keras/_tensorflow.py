"""The kernels on TensorFlow's tensors."""

from kconv.tensorflow._fused import fused
from kconv.tensorflow.ops import depthwise_conv, interleave, pointwise_conv

__all__ = ["depthwise_conv", "fused", "interleave", "pointwise_conv"]
