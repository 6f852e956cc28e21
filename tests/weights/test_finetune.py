"""Weights to go on from, with a new classifier where the number of classes differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kconv
import kconv.torch
from kconv import models
from kconv.weights._finetune import load_pretrained


def spec(classes: int, name: str = "keffnet_s") -> models.Spec:
    return models.create(name, classes=classes, input_shape=(8, 8, 3))


def head_of(state: dict[str, Any]) -> str:
    return list(state)[-1].rpartition(".")[0]


@pytest.mark.parametrize("name", ["keffnet_s", "kmobilenet_v3_small"])
@pytest.mark.parametrize("kind", ["safetensors", "checkpoint", "keras"])
@pytest.mark.parametrize("classes", [3, 5])
def test_all_but_the_classifier(tmp_path: Path, name: str, kind: str, classes: int) -> None:
    source = kconv.torch.build(spec(3, name))
    if kind == "safetensors":
        kconv.save_weights(source, path := tmp_path / "model.safetensors")
    elif kind == "checkpoint":
        state = {f"module.{key}": value for key, value in source.state_dict().items()}
        torch.save({"state_dict": state}, path := tmp_path / "model.pt")
    else:
        if name != "keffnet_s":
            pytest.skip("one is enough")
        from kconv.keras import build

        kconv.save_weights(source, tmp_path / "model.safetensors")
        keras_model = build(spec(3, name))
        kconv.load_weights(keras_model, tmp_path / "model.safetensors")
        keras_model.save(path := tmp_path / "model.keras")
    target = kconv.torch.build(spec(classes, name))
    before = {key: value.clone() for key, value in target.state_dict().items()}
    whole = load_pretrained(target, path, spec(classes, name).graph())
    assert whole == (classes == 3)
    head = head_of(before)
    for key, value in target.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        own = key.startswith(head) and not whole
        expected = before[key] if own else source.state_dict()[key]
        np.testing.assert_array_equal(value.numpy(), expected.numpy(), err_msg=key)


def test_other_networks_are_refused(tmp_path: Path) -> None:
    kconv.save_weights(kconv.torch.build(spec(3)), tmp_path / "a.safetensors")
    wide = models.create("keffnet_s", classes=5, input_shape=(8, 8, 3), width=2)
    target = kconv.torch.build(wide)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"the weights of .*a\.safetensors are not the model's"):
        load_pretrained(target, tmp_path / "a.safetensors", wide.graph())
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
