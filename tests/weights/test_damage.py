"""Damaged files and files that claim what is not so: one ValueError, and a model as it was."""

from __future__ import annotations

import json
import os
import resource
import struct
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

from kconv.weights import load_weights, save_weights


def torch_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def keras_model() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            layers.Conv2D(4, 1, name="c"),
            layers.BatchNormalization(name="b"),
        ]
    )


def values(model) -> list[np.ndarray]:
    if isinstance(model, nn.Module):
        return [tensor.numpy().copy() for tensor in model.state_dict().values()]
    return [keras.ops.convert_to_numpy(weight) for weight in model.weights]


def write(path: Path) -> None:
    """A good file, of the format that the name says."""
    model = torch_model()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    match path.name:
        case "zip.pt":
            torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
        case "legacy.pt":
            torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
        case "a.safetensors":
            save_weights(model, path)
        case "plain.npz":
            np.savez(path, **state)
        case "packed.npz":
            np.savez_compressed(path, **state)
        case "a.weights.h5":
            keras_model().save_weights(path)
        case _:
            keras_model().save(path)


FORMATS = (
    *("zip.pt", "legacy.pt", "a.safetensors", "plain.npz", "packed.npz"),
    *("a.keras", "a.weights.h5", "a.h5"),
)


@pytest.mark.parametrize("name", FORMATS)
def test_damage(name: str, tmp_path: Path) -> None:
    """Files cut short, or with some bytes changed: loaded, or refused as a whole."""
    path = tmp_path / name
    write(path)
    good, rng = path.read_bytes(), np.random.default_rng(1)
    model = keras_model() if "h5" in name or "keras" in name else torch_model()
    load_weights(model, path)
    before, refused = values(model), 0
    only_cut = path.suffix == ".h5"  # HDF5's own structures are its library's to check
    for number in range(45):
        content = bytearray(good)
        if number % 3 == 0 or only_cut:
            content = content[: rng.integers(len(good))]
        for _ in range(0 if only_cut else number % 3 * 4):
            content[rng.integers(len(good))] = rng.integers(256)
        path.write_bytes(content)
        message = None
        try:
            load_weights(model, path)
        except ValueError as error:
            message = str(error)
        if message is None:  # some bytes are unused, or are a weight's
            before = values(model)
            continue
        refused += 1
        assert str(path) in message
        assert "\n" not in message
        np.testing.assert_equal(values(model), before)
    assert refused > 20


@pytest.mark.parametrize("length", [256, 384, 640, 0x4B50])
def test_a_safetensors_length_that_looks_like_another_format(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    source, model = nn.Linear(2, 2), nn.Linear(2, 2)
    save_weights(source, path)
    content = path.read_bytes()
    (old,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + old].rstrip().ljust(length)
    path.write_bytes(struct.pack("<Q", length) + header + content[8 + old :])
    load_weights(model, path)
    assert torch.equal(model.weight, source.weight)


def test_safetensors_headers_that_are_not_so(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for changed, message in (
        ({"shape": [1 << 60]}, "is not where its header says"),
        ({"shape": [-2]}, "are no numbers"),
        ({"shape": [2.0]}, "are no numbers"),
        ({"data_offsets": [4, 12]}, "is not where its header says"),
        ({"dtype": "F4"}, "unknown type 'F4'"),
        ({"dtype": "C64", "shape": [1]}, "complex"),
        ({"data_offsets": None}, "does not describe 'weight'"),
    ):
        header = json.dumps({"weight": {**entry, **changed}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        with pytest.raises(ValueError, match=message):
            load_weights(nn.LayerNorm(1, bias=False), path)
    header = json.dumps({"a": entry, "b": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="overlap"):
        load_weights(nn.Linear(2, 2), path)


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_declared_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    huge = 1 << 32
    model = keras_model()
    write(tmp_path / "a.weights.h5")
    load_weights(model, tmp_path / "a.weights.h5")  # whatever is imported for it is there then
    before = peak_memory()
    with h5py.File(tmp_path / "a.weights.h5", "r+") as file:
        group = file["layers/conv2d/vars"]
        del group["0"]
        group.create_dataset("0", (huge,), "f4", chunks=(1 << 20,), compression="gzip")
    with pytest.raises(ValueError, match=rf"c\.0 \({huge},\) in the file"):
        load_weights(model, tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5", "r+") as file:
        group = file["layers/conv2d/vars"]
        del group["0"]
        chunks = (1, 1, 3, 1 << 27)
        group.create_dataset("0", (1, 1, 3, 4), "f4", chunks=chunks, maxshape=(1, 1, 3, None))
    with pytest.raises(ValueError, match="has chunks of shape"):
        load_weights(model, tmp_path / "a.weights.h5")
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bias.npy", "w") as file,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": (huge,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="'bias' of shape"):
        load_weights(nn.Linear(2, 2), tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        with archive.open("model.weights.h5", "w") as file:
            for _ in range(80):
                file.write(bytes(1 << 20))
    with pytest.raises(ValueError, match=r"'model\.weights\.h5' has .* too many for this model"):
        load_weights(model, tmp_path / "a.keras")
    # A view of four bytes that claims to be large.
    tensor = torch.zeros(1).expand(huge)
    torch.save({"weight": tensor, "bias": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"weight \({huge},\) in the file"):
        load_weights(nn.Linear(2, 2), tmp_path / "a.pt")
    assert peak_memory() - before < 1 << 30


def test_weights_in_other_files(tmp_path: Path) -> None:
    """External links, external storage, virtual data sets, and soft links, which may lead there."""
    model, path = keras_model(), tmp_path / "a.weights.h5"
    before = values(model)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["0"] = np.ones((1, 1, 3, 4), "f4")
    (tmp_path / "raw").write_bytes(np.ones(12, "f4").tobytes())
    layout = h5py.VirtualLayout((1, 1, 3, 4), "f4")
    layout[...] = h5py.VirtualSource(str(tmp_path / "other.h5"), "0", (1, 1, 3, 4))

    def external_storage(group: h5py.Group) -> None:
        raw = [(str(tmp_path / "raw"), 0, 48)]
        group.create_dataset("0", (1, 1, 3, 4), "f4", external=raw)

    changes = {
        "external link": lambda group: group.__setitem__("0", h5py.ExternalLink("other.h5", "/0")),
        "soft link": lambda group: group.__setitem__("0", h5py.SoftLink("/layers/x")),
        "external storage": external_storage,
        "virtual": lambda group: group.create_virtual_dataset("0", layout),
    }
    for kind, change in changes.items():
        write(path)
        with h5py.File(path, "r+") as file:
            group = file["layers/conv2d/vars"]
            del group["0"]
            change(group)
        message = "is a link" if "link" in kind else "in another file"
        with pytest.raises(ValueError, match=rf"'layers/conv2d/vars/0'.*{message}"):
            load_weights(model, path)
        np.testing.assert_equal(values(model), before)


def test_links_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5", "r+") as file:
        file["layers/again"] = file["layers"]
    load_weights(keras_model(), tmp_path / "a.weights.h5")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        load_weights(torch_model(), tmp_path / "fifo")
    with pytest.raises(ValueError, match=r"the folder has none of model\.safetensors"):
        load_weights(torch_model(), tmp_path)
    with pytest.raises(FileNotFoundError):
        load_weights(torch_model(), tmp_path / "absent")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "text")
    with pytest.raises(ValueError, match=r"neither \.keras, of torch\.save nor \.npz"):
        load_weights(torch_model(), tmp_path / "a.zip")


@pytest.mark.parametrize("target", ["torch", "keras"])
def test_the_last_of_many_entries_is_bad(target: str, tmp_path: Path) -> None:
    """Nothing is set before everything has been read."""
    source = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, name="a"), layers.Dense(4, name="b")]
    )
    source.weights[-1].assign(np.full(4, 1e30, "f4"))
    if target == "torch":
        model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 4)}).half()
    else:
        inputs = keras.Input((3,), dtype="float16")
        a, b = (layers.Dense(4, name=name, dtype="float16") for name in "ab")
        model = keras.Model(inputs, b(a(inputs)))
    before = values(model)
    save_weights(source, tmp_path / "a.safetensors")
    source.save(tmp_path / "a.keras")
    source.save(tmp_path / "a.h5")
    for name in ("a.safetensors", "a.keras", "a.h5"):
        with pytest.raises(ValueError, match="do not fit into the model's float16"):
            load_weights(model, tmp_path / name)
        np.testing.assert_equal(values(model), before)
