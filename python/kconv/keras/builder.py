"""From a model spec to a Keras model."""

from __future__ import annotations

from typing import Literal

import keras

from kconv._creating import Weights, expect_spec, fill_network
from kconv.keras._model import model_of
from kconv.keras.convert import to_native
from kconv.models import Spec

Kernels = Literal["kconv", "keras"]


def build(
    spec: Spec,
    kernels: Kernels = "kconv",
    *,
    fused: bool = True,
    weights: Weights = None,
    recompute: bool = False,
) -> keras.Model:
    """The Keras model of a spec, ending in a softmax as the original does.

    Layers have the original's names, with "_" in the place of "/". The images' data format is
    Keras's setting.

    Example:
        >>> from kconv.models import create
        >>> model = build(create("keffnet_b0", classes=10, input_shape=(32, 32, 3)))
        >>> model.output_shape, tuple(model.get_layer("k_stem_conv").kernel.shape)
        ((None, 10), (3, 3, 3, 32))

    Args:
        spec: a spec of :mod:`kconv.models`.
        kernels: "kconv", or "keras" for the same network of Keras's own layers alone; both have
            the same weights in the same order.
        fused: whether chains of layers run as one operation each (see
            :class:`kconv.keras.Network`); the layers and their weights are the same.
        weights: what to fill it with, as for :func:`kconv.keras.create_model`.
        recompute: whether training keeps little of what the layers compute, and computes it anew in
            the backward pass: less memory for about a third more time. The model's attribute of
            this name, which is not saved.

    Returns:
        A functional model from (N, H, W, channels) to (N, classes), not compiled.

    Raises:
        ValueError: if ``kernels`` is unknown, the weights are of another network, or nothing is
            fused that could compute anew.
        TypeError: if ``spec`` is none.
    """
    if kernels not in ("kconv", "keras"):
        raise ValueError(f"kernels={kernels!r}, expected 'kconv' or 'keras'")
    fused = fused and kernels == "kconv"
    if recompute and not fused:
        raise ValueError("recompute=True, expected kernels='kconv' and fused=True with it")
    expect_spec(spec, "keras")
    model = model_of(spec.graph(), fused=fused)
    if fused:
        model.recompute = recompute
    if weights is not None:
        fill_network(model, spec, weights)
    return model if kernels == "kconv" else to_native(model)
