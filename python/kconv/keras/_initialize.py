"""First values of weights drawn by NumPy, from Keras's own distributions.

Where Keras draws them itself, JAX compiles a program for each shape: half a minute for the hundred
and more shapes of a kEffNet. The numbers follow ``keras.utils.set_random_seed`` all the same, and
come out alike on every backend.
"""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

import keras
import numpy as np


def call_new_layer(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
    """Call a layer for the first time, which makes its weights."""
    generator = np.random.default_rng(random.getrandbits(64))
    initializers = {
        name: value
        for name, value in vars(layer).items()
        if isinstance(value, keras.initializers.Initializer)
    }
    for name, initializer in initializers.items():
        setattr(layer, name, partial(_draw, initializer, generator))
    outputs = layer(*args, **kwargs)
    for name, initializer in initializers.items():  # which the layer's configuration names
        setattr(layer, name, initializer)
    return outputs


def _draw(
    initializer: keras.initializers.Initializer,
    generator: np.random.Generator,
    shape: tuple[int, ...],
    dtype: str,
) -> Any:
    match initializer:
        case keras.initializers.Zeros():
            return np.zeros(shape, dtype)
        case keras.initializers.Ones():
            return np.ones(shape, dtype)
        case keras.initializers.VarianceScaling():
            return _scaled(initializer, generator, shape).astype(dtype)
        case _:
            return initializer(shape, dtype)


def _scaled(
    initializer: keras.initializers.VarianceScaling,
    generator: np.random.Generator,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Values whose variance is ``scale`` / fan; the last axes of ``shape`` are inputs, outputs."""
    fan_in, fan_out = (math.prod(shape[:-2]) * channels for channels in shape[-2:])
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
    variance = initializer.scale / max(1.0, fan[initializer.mode])
    match initializer.distribution:
        case "uniform":
            limit = math.sqrt(3 * variance)
            return generator.uniform(-limit, limit, shape)
        case "untruncated_normal":
            return generator.normal(0, math.sqrt(variance), shape)
        case _:
            values = generator.normal(size=shape)
            while (outside := np.abs(values) > 2).any():
                values[outside] = generator.normal(size=np.count_nonzero(outside))
            # Cut off at two deviations, a normal distribution keeps this share of its deviation.
            return math.sqrt(variance) / 0.87962566103423978 * values
