"""Models of Keras 2, as ``tools/make_keras2_models.py`` made them, and ones that are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

import kconv.cai as cai

FILES = sorted((Path(__file__).parents[1] / "data" / "keras2").glob("*.h5"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_same_outputs_as_in_keras_2(file: Path, tmp_path) -> None:
    expected = np.load(file.with_suffix(".npz"))
    model = cai.models.load_kereas_model(file)
    if file.stem == "sequential":
        model.save(tmp_path / "m.keras")
        model = cai.models.load_kereas_model(tmp_path / "m.keras")
    found = model.predict(expected["x"], verbose=0)
    for number, output in enumerate(found if isinstance(found, list) else [found]):
        np.testing.assert_allclose(output, expected[f"y{number}"], atol=1e-5)


def test_what_is_frozen_stays_so() -> None:
    model = cai.models.load_kereas_model(next(f for f in FILES if f.stem == "nested"))
    trainable = {weight.path.split("/")[0] for weight in model.trainable_weights}
    assert not any("frozen" in name for name in trainable)
    assert len(model.trainable_weights) == 8
    assert model.get_layer("shared").get_layer("shared_conv").filters == 3


@pytest.fixture
def changed(tmp_path):
    """A copy of the sequential file, with changes."""

    def change(config=None, weights=None) -> Path:
        target = tmp_path / "m.h5"
        shutil.copy(next(f for f in FILES if f.stem == "sequential"), target)
        with h5py.File(target, "r+") as file:
            if config:
                model = json.loads(file.attrs["model_config"])
                config(model["config"]["layers"])
                file.attrs["model_config"] = json.dumps(model)
            if weights:
                weights(file["model_weights"], tmp_path)
        return target

    return change


def another_file(root: h5py.Group, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["bias"] = np.zeros(3, np.float32)
    del root["dense/dense/bias:0"]
    root["dense/dense/bias:0"] = h5py.ExternalLink(str(folder / "other.h5"), "bias")


def outside_of_hdf5(root: h5py.Group, folder: Path) -> None:
    (folder / "raw").write_bytes(bytes(12))
    del root["dense/dense/bias:0"]
    root["dense"].create_dataset(
        "dense/bias:0", (3,), np.float32, external=[(str(folder / "raw"), 0, 12)]
    )


def another_shape(root: h5py.Group, folder: Path) -> None:
    del root["dense/dense/bias:0"]
    root["dense/dense/bias:0"] = np.zeros(4, np.float32)


def another_name(root: h5py.Group, folder: Path) -> None:
    root.move("dense/dense/bias:0", "dense/dense/offset:0")
    root["dense"].attrs["weight_names"] = [b"dense/kernel:0", b"dense/offset:0"]


def no_weights(root: h5py.Group, folder: Path) -> None:
    root["dense"].attrs["weight_names"] = np.array([], "S1")


def no_layer(root: h5py.Group, folder: Path) -> None:
    names = [*map(str, root.attrs["layer_names"][:-1]), "dense_9"]
    root.attrs["layer_names"] = np.array(names, "S")
    root.move("dense", "dense_9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_file, "its layer 'dense' lacks dense/bias:0"),
        (outside_of_hdf5, "its weight for .*dense/bias' lies in another file"),
        (another_shape, r"its weight for .* has shape \(4,\), expected \(3,\)"),
        (another_name, "its layer 'dense' has the weights kernel, offset, expected kernel, bias"),
        (no_weights, "it has no weights for .*dense/kernel"),
        (no_layer, "its layer 'dense_9' lacks a place"),
    ],
)
def test_weights_that_are_not_the_models(changed, change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cai.models.load_kereas_model(changed(weights=change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda last: last.update(class_name="TFOpLambda"), "'dense' is a TFOpLambda, which Keras"),
        (lambda last: last.update(class_name="Lambda"), "Lambda layer 'dense' is a program"),
        (
            lambda last: last["config"].update(groups=3),
            "the layer 'dense' has groups=3, which Dense of Keras 3 has not",
        ),
        (lambda last: last["config"].update(units=-1), "units"),
        (lambda last: last.pop("config"), "'config'"),
    ],
)
def test_layers_that_keras_3_does_not_have(changed, change, message: str) -> None:
    file = changed(config=lambda layers: change(layers[-1]))
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} holds no model.*{message}"):
        cai.models.load_kereas_model(file)


def test_arguments_without_a_meaning_today_are_dropped(changed) -> None:
    def old(layers) -> None:
        layers[0]["config"].update(sparse=False, ragged=False)
        layers[-1]["config"].update(groups=1, time_major=False, batch_input_shape=[None, 9])
        for layer in layers[1:]:  # as Keras 2.2 wrote initializers
            for key in ("kernel_initializer", "bias_initializer"):
                if key in layer["config"]:
                    layer["config"][key]["config"]["dtype"] = "float32"

    assert cai.models.load_kereas_model(changed(config=old)).output_shape == (None, 3)
