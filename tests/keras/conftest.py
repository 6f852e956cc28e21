"""Gradients of Keras models on whichever backend runs the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

Gradients = tuple[np.ndarray, np.ndarray, list[np.ndarray]]


def _jax(model: keras.Model, x: np.ndarray, gy: np.ndarray | None) -> Gradients:
    import jax

    others = [v.value for v in model.non_trainable_variables]

    @jax.jit
    def run(weights: Any, x: Any, gy: Any) -> Any:
        def forward(weights: Any, x: Any) -> Any:
            return model.stateless_call(weights, others, x, training=True)

        y, vjp, state = jax.vjp(forward, weights, x, has_aux=True)
        return y, state, *vjp(jax.numpy.ones_like(y) if gy is None else gy)

    y, state, dw, dx = run([v.value for v in model.trainable_variables], x, gy)
    for variable, value in zip(model.non_trainable_variables, state, strict=True):
        variable.assign(value)
    return np.asarray(y), np.asarray(dx), [np.asarray(g) for g in dw]


def _torch(model: keras.Model, x: np.ndarray, gy: np.ndarray | None) -> Gradients:
    import torch

    inputs = torch.tensor(x, requires_grad=True)
    weights = [v.value for v in model.trainable_variables]
    y = model(inputs, training=True)
    gy = torch.ones_like(y) if gy is None else torch.tensor(gy)
    dx, *dw = torch.autograd.grad(y, [inputs, *weights], gy)
    return y.detach().numpy(), dx.numpy(), [g.numpy() for g in dw]


def _tensorflow(model: keras.Model, x: np.ndarray, gy: np.ndarray | None) -> Gradients:
    import tensorflow as tf

    @tf.function
    def run(inputs: Any) -> Any:
        weights = [v.value for v in model.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = model(inputs, training=True)
        return y, tape.gradient(y, [inputs, *weights], gy)

    y, (dx, *dw) = run(tf.constant(x))
    return y.numpy(), dx.numpy(), [g.numpy() for g in dw]


@pytest.fixture
def gradients() -> Callable[..., Gradients]:
    """(model, x, gy) -> output in training mode, dx, gradients of the trainable variables.

    gy, the gradient by the output, defaults to ones. Moving statistics of the model move.
    """
    return {"jax": _jax, "torch": _torch, "tensorflow": _tensorflow}[keras.backend.backend()]
