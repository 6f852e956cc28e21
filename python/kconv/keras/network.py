"""A Keras model whose chains of layers run as one operation each."""

from __future__ import annotations

from typing import Any

import keras

from kconv.keras._fusion import run_fused

Tensor = Any


@keras.saving.register_keras_serializable(package="kconv")
class Network(keras.Model):
    """A functional model whose chains of convolutions, batch norms and the like run fused.

    It is made, saved, loaded and trained as every functional model, and has the same layers with
    the same weights. When it is called on numbers, the longest chains of layers that
    :mod:`kconv.models.fusion` knows run as one operation each, on their layers' weights. They run
    layer by layer where it cannot stand for them: in float16, on other devices than the CPU,
    for images without pixels and batches without images, with masks, and where some of a
    chain's batch norms are frozen and others are not.

    What is changed of a layer counts from the next call on, as in every Keras model: an attribute,
    its ``call``, an activation, a regularizer. A layer that is then none of those that a chain
    knows runs by itself.

    Example:
        >>> x = keras.Input((8, 8, 16))
        >>> y = keras.layers.BatchNormalization()(keras.layers.Conv2D(24, 1, groups=4)(x))
        >>> model = Network(x, keras.layers.Activation("silu")(y))
        >>> model(keras.ops.ones((2, 8, 8, 16))).shape
        (2, 8, 8, 24)
    """

    recompute = False
    """Whether training keeps little of what chains compute, and computes it anew when wanted."""

    def _run_through_graph(
        self, inputs: Tensor, operation_fn: Any = None, call_fn: Any = None
    ) -> Tensor:
        return run_fused(self, super()._run_through_graph, inputs, operation_fn, call_fn)
