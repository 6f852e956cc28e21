"""PyTorch's checkpoints as trainers write them, and what modules keep beside their weights."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kconv.weights import LoadReport, load_weights, save_weights


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 2)))


SOURCE = model()
for tensor in SOURCE.state_dict().values():
    tensor.copy_(torch.rand(tensor.shape) if tensor.is_floating_point() else torch.tensor(7))
STATE = SOURCE.state_dict()


def prefixed(prefix: str, state=STATE) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_same(one: nn.Module, other: nn.Module = SOURCE) -> None:
    for (name, tensor), expected in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, expected), name


class Unknown:
    """What no other process could import."""

    def __init__(self) -> None:
        self.rate = 0.1


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("content", "keys", "prefix"),
    [
        (STATE, (), ""),
        (OrderedDict(STATE), (), ""),
        ({"state_dict": STATE, "epoch": 3, "args": argparse.Namespace(lr=1)}, ("state_dict",), ""),
        ({"model": STATE, "optimizer": {"state": {}, "param_groups": []}}, ("model",), ""),
        ({"model_state_dict": STATE, "loss": torch.tensor(0.5)}, ("model_state_dict",), ""),
        ({"net": STATE, "best_acc": 91.2}, ("net",), ""),
        ({"ema": {"module": STATE, "decay": 0.9}}, ("ema", "module"), ""),
        ({"hyper": Unknown(), "state_dict": prefixed("model.")}, ("state_dict",), "model."),
        (prefixed("module."), (), "module."),
        (prefixed("_orig_mod."), (), "_orig_mod."),
        (prefixed("module._orig_mod."), (), "module._orig_mod."),
        ({"state_dict": prefixed("model._orig_mod.module.")}, ("state_dict",), None),
        ({name.replace("2.0", "2._orig_mod.0"): t for name, t in STATE.items()}, (), ""),
        ({"n_averaged": torch.tensor(3), **prefixed("module.")}, (), "module."),
    ],
)
def test_wrappers(content, keys, prefix, legacy: bool, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    other = model()
    report = load_weights(other, tmp_path / "a.pt")
    assert_same(other)
    assert (report.count, report.keys) == (len(STATE), keys)
    assert prefix is None or report.prefix == prefix


def test_the_average_is_taken_and_said(tmp_path: Path) -> None:
    older = {name: tensor * 0 for name, tensor in STATE.items()}
    torch.save({"state_dict": older, "state_dict_ema": STATE}, tmp_path / "a.pt")
    other = model()
    with pytest.warns(UserWarning, match="took 'state_dict_ema', not 'state_dict'"):
        report = load_weights(other, tmp_path / "a.pt")
    assert_same(other)
    assert str(report) == f"{len(STATE)} weights of a PyTorch checkpoint, from 'state_dict_ema'"


def test_the_set_that_fits_is_taken(tmp_path: Path) -> None:
    content = {"ema": nn.Linear(5, 5).state_dict(), "discriminator": STATE}
    torch.save(content, tmp_path / "a.pt")
    other = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_weights(other, tmp_path / "a.pt").keys == ("discriminator",)
    assert_same(other)


def test_a_wrapped_model_takes_the_files_of_a_plain_one(tmp_path: Path) -> None:
    save_weights(SOURCE, tmp_path / "a.safetensors")
    for other in (nn.DataParallel(model()), torch.optim.swa_utils.AveragedModel(model())):
        save_weights(other, tmp_path / "own.safetensors")
        load_weights(other, tmp_path / "own.safetensors")
    other = nn.DataParallel(model())
    load_weights(other, tmp_path / "a.safetensors")
    assert_same(other.module)


def test_extra_weights_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {**prefixed("model."), "loss.weight": torch.ones(2)}}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"only in the file: .*loss\.weight \(2,\)"):
        load_weights(model(), tmp_path / "a")
    torch.save({name: t for name, t in STATE.items() if name != "0.bias"}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"only in the model: 0\.bias \(3,\)$"):
        load_weights(model(), tmp_path / "a")


def test_pickled_modules_are_refused_in_one_sentence(tmp_path: Path) -> None:
    for content, name in ((SOURCE, "it"), ({"model": SOURCE}, "'model'")):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=rf"{name} is a pickled torch\.nn\..*Sequential.*save"):
            load_weights(model(), tmp_path / "a.pt")
    torch.jit.save(torch.jit.script(model()), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="TorchScript program"):
        load_weights(model(), tmp_path / "a.pt")


class Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


def test_nothing_pickled_is_run(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "args": Evil(tmp_path / "evil")}, tmp_path / "a.pt")
    load_weights(model(), tmp_path / "a.pt")
    assert not (tmp_path / "evil").exists()


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("steps", torch.tensor([1, 2], dtype=torch.int8))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.zeros(3), persistent=False)


class Stateful(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.state: object = None

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        if state == "wrong":
            raise KeyError(state)
        self.state = state


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), Scale, lambda: nn.Sequential(Scale())])
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "npz"])
def test_roots_scalars_and_buffers(make, suffix: str, tmp_path: Path) -> None:
    source, other, path = make(), make(), tmp_path / f"a.{suffix}"
    for tensor in source.state_dict().values():
        tensor.copy_(torch.full(tensor.shape, 3) if tensor.dtype != torch.bool else ~tensor)
    match suffix:
        case "safetensors":
            save_weights(source, path)
            assert set(load_file(path)) == set(source.state_dict())
        case "pt":
            torch.save(source.state_dict(), path)
        case _:
            np.savez(path, **{name: t.numpy() for name, t in source.state_dict().items()})
    load_weights(other, path)
    assert_same(other, source)


@pytest.mark.parametrize("state", [{"steps": [1, 2.5, None]}, torch.tensor([1, 2])])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_extra_state(state, suffix: str, tmp_path: Path) -> None:
    source, other, path = nn.Sequential(Stateful()), nn.Sequential(Stateful()), tmp_path / "a"
    source[0].state = state
    if suffix == "pt":
        torch.save(source.state_dict(), path)
    else:
        path = path.with_suffix(".safetensors")
        save_weights(source, path)
    load_weights(other, path)
    assert torch.equal(other[0].weight, source[0].weight)
    found = other[0].state
    assert torch.equal(found, state) if torch.is_tensor(state) else found == state


def test_extra_states_that_fail(tmp_path: Path) -> None:
    source = Stateful()
    source.state = {1, 2}
    with pytest.raises(
        ValueError, match="'_extra_state' is a set, which a safetensors file cannot"
    ):
        save_weights(source, tmp_path / "a.safetensors")
    source.state = "wrong"
    save_weights(source, tmp_path / "a.safetensors")
    other = Stateful()
    before = other.weight.clone()
    with pytest.raises(ValueError, match="cannot be loaded into the model"):
        load_weights(other, tmp_path / "a.safetensors")
    assert torch.equal(other.weight, before)


def test_tied_weights(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        network[1].weight = network[0].weight
        return network

    source, other = tied(), tied()
    save_weights(source, tmp_path / "a.safetensors")
    load_weights(other, tmp_path / "a.safetensors")
    assert torch.equal(other[1].weight, source[0].weight)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    torch.save({**state, "1.weight": state["1.weight"] + 1}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="different values for one weight"):
        load_weights(other, tmp_path / "b.pt")
    del state["1.weight"]  # as Hugging Face's files leave it out
    save_file(state, tmp_path / "c.safetensors")
    other = tied()
    load_weights(other, tmp_path / "c.safetensors")
    assert torch.equal(other[1].weight, source[0].weight)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_other_types(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    """Every code of the types of one byte, and what they become in float32."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype) if dtype.itemsize == 1 else torch.randn(256).to(dtype)
    state = {"weight": values[None], "bias": torch.ones(1)}
    path = tmp_path / f"a.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    other = nn.Linear(256, 1)
    load_weights(other, path)
    torch.testing.assert_close(other.weight[0], values.float(), rtol=0, atol=0, equal_nan=True)


def test_kinds_of_numbers(tmp_path: Path) -> None:
    bad = {
        "complex": (torch.ones(2, 2, dtype=torch.complex64), "values are complex"),
        "integer": (torch.ones(2, 2, dtype=torch.int64), "values are integer"),
        "too large": (torch.full((2, 2), 1e300, dtype=torch.float64), "do not fit"),
    }
    other = nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for value, message in bad.values():
        # The good one comes first.
        torch.save({"bias": torch.zeros(2), "weight": value}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=f"a.pt .*'weight' cannot be read: .*{message}"):
            load_weights(other, tmp_path / "a.pt")
        torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="'weight' is complex"):
        save_weights(nn.Linear(2, 2, dtype=torch.complex64), tmp_path / "a.safetensors")


def test_views_of_storages(tmp_path: Path) -> None:
    flat = torch.randn(20)
    state = {"weight": flat[3:9].view(3, 2).t(), "bias": flat[10:14:2]}
    for legacy in (False, True):
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        other = nn.Linear(3, 2)
        load_weights(other, tmp_path / "a.pt")
        torch.testing.assert_close(dict(other.state_dict()), state, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_and_folders(suffix: str, tmp_path: Path) -> None:
    names = list(STATE)
    base = "model" if suffix == "safetensors" else "pytorch_model"
    places = {}
    for number, part in enumerate((names[:3], names[3:]), 1):
        file = f"{base}-0000{number}-of-00002.{suffix}"
        content = {name: STATE[name].clone() for name in part}
        (save_file if suffix == "safetensors" else torch.save)(content, tmp_path / file)
        places.update(dict.fromkeys(part, file))
    index = tmp_path / f"{base}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    (tmp_path / "config.json").write_text('{"model_type": "tiny"}')
    for path in (index, tmp_path):
        other = model()
        assert "2 shards" in load_weights(other, path).format
        assert_same(other)
    for change, message in (
        ({names[0]: "../outside.safetensors"}, "no file of its own folder"),
        ({names[0]: "absent"}, "'absent' is missing"),
        ({"more": places[names[0]]}, "do not agree on 'more'"),
    ):
        index.write_text(json.dumps({"weight_map": {**places, **change}}))
        with pytest.raises(ValueError, match=message):
            load_weights(model(), index)
    save_weights(SOURCE, tmp_path / "model.safetensors")  # comes before the index
    assert load_weights(other, tmp_path) == LoadReport(len(names), "safetensors")


def test_lazy_modules(tmp_path: Path) -> None:
    save_weights(nn.Linear(2, 3), tmp_path / "a.safetensors")
    other = nn.LazyLinear(3)
    load_weights(other, tmp_path / "a.safetensors")
    assert other.weight.shape == (3, 2)


def test_pickles_that_are_no_checkpoints(tmp_path: Path) -> None:
    for content in ({"a": np.ones(3)}, [1, 2], "text", b"bytes", 3):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"a\.pkl is damaged, or holds no model's weights"):
            load_weights(model(), tmp_path / "a.pkl")
