"""The same training in every framework: eight steps in float64 from the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kconv.jax
import kconv.torch
from kconv.models import create, graph

OPTIONS = {
    "ktype": "D6_16ch",
    "classes": 10,
    "input_shape": (32, 32, 3),
    "dropout": 0.0,
    "drop_connect": 0.0,
}
SPEC = create("keffnet_s", **OPTIONS)
IMAGES = np.random.default_rng(0).normal(size=(8, 3, 32, 32))
LABELS = np.arange(8)
STEPS, RATE = 8, 0.01


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with the weights to start from, and the images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start")
    model = kconv.torch.build(SPEC).double()
    # Small logits, as the losses of Keras do not see probabilities below 1e-7.
    model.get_submodule(SPEC.graph().output).weight.data *= 0.1
    kconv.save_weights(model, folder / "weights.safetensors")
    np.savez(folder / "data.npz", x=IMAGES.transpose(0, 2, 3, 1), y=LABELS)
    return folder


def train_torch(folder, kernels):
    model = kconv.torch.build(SPEC, kernels=kernels).double()
    kconv.load_weights(model, folder / "weights.safetensors")
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.from_numpy(IMAGES)), torch.from_numpy(LABELS))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def expected(start):
    """The losses of the network in PyTorch's own layers."""
    losses = train_torch(start, "torch")
    assert losses[-1] < 0.1 * losses[0]
    return losses


def test_torch(start, expected):
    np.testing.assert_allclose(train_torch(start, "kconv"), expected, rtol=1e-3)


KERAS = """
import json, sys
import keras, numpy as np
import kconv, kconv.keras
from kconv.models import create
keras.config.set_floatx("float64")
if keras.backend.backend() == "jax":
    import jax
    jax.config.update("jax_enable_x64", True)
folder, steps, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
model = kconv.keras.build(create("keffnet_s", **json.loads(sys.argv[4])))
kconv.load_weights(model, folder + "/weights.safetensors")
model.compile(keras.optimizers.SGD(rate), "sparse_categorical_crossentropy")
data = np.load(folder + "/data.npz")
for _ in range(steps):
    model.reset_metrics()
    print("loss", float(model.train_on_batch(data["x"], data["y"])))
"""


@pytest.mark.parametrize("backend", ["jax", "tensorflow", "torch"])
def test_keras(backend, start, expected):
    run = subprocess.run(
        [sys.executable, "-c", KERAS, str(start), str(STEPS), str(RATE), json.dumps(OPTIONS)],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    lines = [line.split() for line in run.stdout.splitlines()]
    losses = [float(line[1]) for line in lines if line[:1] == ["loss"]]
    assert len(losses) == STEPS, run.stderr[-4000:]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


def logits(weights, x):
    """The network by JAX's and kconv.jax's functions; images and weights as PyTorch's."""
    values = {}
    for layer in SPEC.graph().layers:
        inputs = [values[name] for name in layer.inputs] or [x]
        y = inputs[0]

        def of(name, layer=layer):
            return weights.get(f"{layer.name}.{name}")

        match layer:
            case graph.Input():
                pass
            case graph.ZeroPad():
                y = jnp.pad(y, ((0, 0), (0, 0), *layer.padding))
            case graph.Conv(is_pointwise=True):
                y = kconv.jax.pointwise_conv(y, of("weight"), of("bias"), groups=layer.groups)
            case graph.Conv():
                y = jax.lax.conv(y, of("weight"), layer.strides, layer.padding.upper())
            case graph.DepthwiseConv(strides=stride, padding=padding):
                y = kconv.jax.depthwise_conv(y, of("weight"), stride=stride, padding=padding)
            case graph.BatchNorm():
                mean, variance = (f((0, 2, 3), keepdims=True) for f in (y.mean, y.var))
                y = (y - mean) / jnp.sqrt(variance + layer.epsilon)
                y = y * of("weight")[:, None, None] + of("bias")[:, None, None]
            case graph.Activation(kind=kind):
                y = {"swish": jax.nn.silu, "sigmoid": jax.nn.sigmoid}[kind](y)
            case graph.Interleave(step=step):
                y = kconv.jax.interleave(y, step)
            case graph.GlobalPool():
                y = y.mean((2, 3))
            case graph.Reshape():
                y = y[:, :, None, None]
            case graph.Add():
                y = sum(inputs)
            case graph.Multiply():
                y = inputs[0] * inputs[1]
            case graph.Dense():
                y = y @ of("weight").T + of("bias")
            case _:
                raise TypeError(f"no function for {layer}")
        values[layer.name] = y
    return y


def test_jax(start, expected):
    with jax.enable_x64(True):
        model = kconv.torch.build(SPEC).double()
        kconv.load_weights(model, start / "weights.safetensors")
        weights = {name: jnp.asarray(p.detach().numpy()) for name, p in model.named_parameters()}

        @jax.jit
        def step(weights):
            def loss(weights):
                chances = jax.nn.log_softmax(logits(weights, jnp.asarray(IMAGES)))
                return -chances[jnp.arange(8), LABELS].mean()

            value, gradients = jax.value_and_grad(loss)(weights)
            return value, {name: w - RATE * gradients[name] for name, w in weights.items()}

        losses = []
        for _ in range(STEPS):
            value, weights = step(weights)
            losses.append(float(value))
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
