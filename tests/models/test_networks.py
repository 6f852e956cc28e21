"""Every network in both front ends: gradients, a step of training, files, the same outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import torch

import kconv
import kconv.keras
import kconv.torch
from kconv.models import create, list_models

STEADY = {"dropout": 0.0, "drop_connect": 0.0}  # without what is random in training
SMALL = {
    "efficientnet_b0": {"width": 0.25, "once": True, **STEADY},
    "keffnet_s": {"ktype": "D6v3_4ch", "width": 0.5, **STEADY},
    "mobilenet": {"alpha": 0.125, "dropout": 0.0},
    "kmobilenet": {"alpha": 0.125, "ktype": "D6_4ch", "dropout": 0.0},
    "mobilenet_v3_small": {"alpha": 0.25, "dropout": 0.0},
    "kmobilenet_v3_large": {"alpha": 0.25, "ktype": "D6_4ch", "dropout": 0.0},
    "densenet_bc_l100": {"blocks": 2},
    "kdensenet_bc_l100": {"blocks": 2, "ktype": "D6_4ch"},
    "inception_v3": {},
    "kinception_v3": {"ktype": "D6v3_32ch"},
}
# Keras's models are tested on PyTorch, where nothing is compiled, in a process of its own.
NESTED = "KCONV_NESTED" in os.environ


def spec_of(name: str):
    size = 75 if "inception" in name else 16
    return create(name, classes=4, input_shape=(size, size, 3), **SMALL[name])


def batch(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (8, H, W, 3) and labels."""
    rng = np.random.default_rng(2)
    images = rng.uniform(-2, 2, (8, *spec_of(name).input_shape)).astype(np.float32)
    return torch.from_numpy(images), torch.arange(8) % 4


def probabilities(model, images: torch.Tensor, training: bool = False) -> torch.Tensor:
    """(N, H, W, 3) to (N, classes)."""
    if isinstance(model, keras.Model):
        return model(images, training=training)
    return model.train(training)(images.permute(0, 3, 1, 2)).softmax(1)


def parameters(model) -> dict[str, torch.Tensor]:
    if isinstance(model, keras.Model):
        return {variable.path: variable.value for variable in model.trainable_variables}
    return dict(model.named_parameters())


def follow_the_last_batch(model, share: float) -> None:
    """Lets the moving statistics nearly be the last batch's: new ones let no image through.

    Not quite, as channels that hardly vary would have their rounding errors magnified.
    """
    for layer in model.layers if isinstance(model, keras.Model) else model.modules():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 1 - share
        elif isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = share


def check_a_step_of_training(model, images: torch.Tensor, labels: torch.Tensor) -> None:
    def loss() -> torch.Tensor:
        of_truth = probabilities(model, images, training=True)[range(8), labels]
        return -of_truth.log().mean()

    before, weights = loss(), parameters(model)
    gradients = torch.autograd.grad(before, list(weights.values()), allow_unused=True)
    for path, gradient in zip(weights, gradients, strict=True):
        assert gradient is not None, path
        assert gradient.isfinite().all(), path
        assert gradient.any(), path
    # As far as would take a thousandth of the loss away if it were linear: further it is not.
    step = 0.001 * before / sum(gradient.square().sum() for gradient in gradients)
    with torch.no_grad():
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight -= step * gradient
        assert 0.998 * before < loss() < before


def saved_and_loaded(model, name: str, folder: Path):
    if isinstance(model, keras.Model):
        model.save(folder / "model.keras")
        return keras.models.load_model(folder / "model.keras")
    torch.save(model.state_dict(), folder / "model.pt")
    other = kconv.torch.build(spec_of(name))
    other.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return other


def test_every_kind_of_network_is_here() -> None:
    assert {type(create(name)) for name in SMALL} == {type(create(n)) for n in list_models()}


@pytest.mark.parametrize("name", SMALL)
def test_network(name: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    images, labels = batch(name)
    model = kconv.keras.build(spec_of(name)) if NESTED else kconv.torch.build(spec_of(name))
    follow_the_last_batch(model, share=0.8 if "inception" in name else 0.99)
    check_a_step_of_training(model, images, labels)
    with torch.no_grad():
        expected = probabilities(model, images)
        assert (expected.max(0).values - expected.min(0).values).max() > 0.001  # images differ
        assert torch.equal(probabilities(saved_and_loaded(model, name, tmp_path), images), expected)
        if NESTED:
            kconv.save_weights(model, tmp_path / "model.safetensors")
            other = kconv.torch.build(spec_of(name))
            kconv.load_weights(other, tmp_path / "model.safetensors")
            torch.testing.assert_close(probabilities(other, images), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(NESTED, reason="is already such a process")
def test_keras() -> None:
    """The tests above once more, of Keras's models, with PyTorch's beside them."""
    options = ["-q", "-p", "no:cacheprovider", "--durations=3", __file__]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        env={**os.environ, "KERAS_BACKEND": "torch", "KCONV_NESTED": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:]
