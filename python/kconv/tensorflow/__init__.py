"""kconv for TensorFlow: differentiable convolutions, eager and in ``tf.function``.

Example:
    >>> import tensorflow as tf, kconv.tensorflow
    >>> x, weight = tf.ones((2, 5, 5, 8)), tf.Variable(tf.ones((4, 6)))
    >>> with tf.GradientTape() as tape:
    ...     y = kconv.tensorflow.pointwise_conv(
    ...         x, weight, groups=2, layout="NHWC", weight_layout="IO"
    ...     )
    >>> y.shape, tape.gradient(y, weight).shape
    (TensorShape([2, 5, 5, 6]), TensorShape([4, 6]))

Importing this module registers the operations ``Kconv*`` with TensorFlow. A program that loads a
SavedModel which has such operations imports it first::

    import kconv.tensorflow
    model = tf.saved_model.load(path)

Under ``jit_compile=True``, where no operation from outside can go, TensorFlow's own take their
place.
"""

import tensorflow as _tensorflow

from kconv._versions import warn_of_version
from kconv.tensorflow.ops import deinterleave, depthwise_conv, interleave, pointwise_conv

__all__ = ["deinterleave", "depthwise_conv", "interleave", "pointwise_conv"]

warn_of_version("tensorflow", _tensorflow.__version__)


def __dir__() -> list[str]:
    return sorted(__all__)
