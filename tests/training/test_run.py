"""The folder of a run: what goes on with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kconv import datasets, training


def quiet(line: str) -> None:
    pass


def test_run_goes_on_with_its_own_data_alone(tmp_path: Path) -> None:
    """Which the configuration does not tell where the caller gives them."""
    data = datasets.load("fashion_mnist_mini", image_size=8, train_images=40, test_images=20)
    config = training.Config(
        model="kdensenet_bc_l100",
        model_options={"blocks": 1, "growth_rate": 4, "bottleneck": 8},
        ktype="D6_4ch",
        batch_size=12,
        epochs=1,
        framework="torch",
    )
    training.train(config, tmp_path, data=data, log=quiet)
    longer = dataclasses.replace(config, epochs=2)
    with pytest.raises(ValueError, match=r"training images was 40, and these have 6000: it goes"):
        training.train(longer, tmp_path, resume=True, log=quiet)
    other = dataclasses.replace(data, y_train=data.y_train[::-1].copy())
    with pytest.raises(ValueError, match="checksum of labels was"):
        training.train(longer, tmp_path, resume=True, data=other, log=quiet)
    assert len(training.train(longer, tmp_path, resume=True, data=data, log=quiet).history) == 2
