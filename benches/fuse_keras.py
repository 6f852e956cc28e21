"""The sides of `compare.py fuse` that are models of keras.applications, on two of its backends."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

Calls = list[tuple[int, int, int]]
"""For each convolution and linear layer: multiply-adds of an image, its values, and weights."""


def make(side: str, name: str, size: int, batch: int, threads: int) -> tuple[Any, ...]:
    """What the side knows of its model, its calls by their kinds, and its layers for the bound."""
    backend, _, fuses = side.partition("_")
    os.environ["KERAS_BACKEND"] = backend
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # all that JAX goes by
    import keras

    import kconv
    import kconv.keras

    kconv.set_num_threads(threads)
    if backend == "torch":
        import torch

        torch.set_num_threads(threads)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classifier_activation=None
    )
    _settle(model)
    about: dict[str, Any] = {}
    if fuses:
        start = time.perf_counter()
        kconv.keras.fuse(model)
        report = kconv.keras.report(model)  # for which the chains are looked for
        about["fuse seconds"] = time.perf_counter() - start
        about["layers"] = _layers(model, report)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-4), loss)
    x = np.random.default_rng(0).uniform(0, 255, (batch, size, size, 3)).astype(np.float32)
    labels = np.arange(batch)
    calls = {
        "step": lambda: float(model.train_on_batch(x, labels)),
        "inference": lambda: model.predict_on_batch(x),
        "one": lambda: model.predict_on_batch(x[:1]),
    }
    return about, calls, _convolutions(model) if fuses else []


def _settle(model: Any) -> None:
    """The same weights on every backend, and nothing that is random in training."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        shape = variable.shape
        if len(shape) > 1:
            inputs = np.prod(shape[:-1]) / (shape[-2] if "depthwise" in variable.path else 1)
            variable.assign(rng.normal(0, np.sqrt(2 / inputs), shape))
    for layer in model.layers:
        if hasattr(layer, "rate"):
            layer.rate = 0.0


def _layers(model: Any, report: Any) -> tuple[int, int]:
    """How many convolutions and norms are in chains, and how many there are."""
    from keras import layers

    kinds = (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D)
    kinds = (*kinds, layers.BatchNormalization)
    names = {layer.name for layer in model.layers if isinstance(layer, kinds)}
    return len(names & set(report.changed)), len(names)


def _convolutions(model: Any) -> Calls:
    calls = []
    for layer in model.layers:
        kernels = [v.shape for v in layer.weights if "kernel" in v.path.rpartition("/")[2]]
        if not kernels:
            continue
        *pixels, channels = layer.output.shape[1:]
        if len(kernels) == 2:  # a separable convolution's pointwise one, after its depthwise one
            wide = kernels[1][2]
            calls.append(_call(np.prod(kernels[1]), pixels, wide + channels))
            channels = wide
        values = channels + np.prod(layer.input.shape[1:]) / np.prod(pixels)
        calls.append(_call(np.prod(kernels[0]), pixels, values))
    return calls


def _call(weights: Any, pixels: list[int], values: float) -> tuple[int, int, int]:
    """Of a convolution with ``values`` for each of its pixels, those that it reads included."""
    count = int(np.prod(pixels))
    return count * int(weights), int(count * values), int(weights)
