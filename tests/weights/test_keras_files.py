"""Keras's files by what layers are, in all formats, within Keras and between frameworks."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import torch
from keras import layers as L
from safetensors.numpy import load_file
from torch import nn

import kconv.keras
import kconv.torch
from kconv.weights import load_weights, save_weights


def sequential(shape: tuple[int, ...], *makers: Callable[[], keras.Layer]) -> keras.Model:
    return keras.Sequential([keras.Input(shape), *(make() for make in makers)])


def norms() -> keras.Model:
    return sequential(
        (4, 4, 3),
        L.Normalization,
        lambda: L.BatchNormalization(center=False),
        lambda: L.BatchNormalization(scale=False),
        lambda: L.BatchNormalization(scale=False, center=False),
        L.LayerNormalization,
        lambda: L.LayerNormalization(axis=(1, 2, 3)),
        lambda: L.GroupNormalization(3),
        L.PReLU,
        lambda: L.PReLU(shared_axes=[1, 2]),
    )


def convolutions() -> keras.Model:
    return sequential(
        (6, 6, 3),
        lambda: L.SeparableConv2D(2, 3, depth_multiplier=2),
        lambda: L.Conv2DTranspose(3, 2),
        lambda: L.DepthwiseConv2D(2, depth_multiplier=2),
        lambda: L.Reshape((-1, 6)),
        lambda: L.Conv1D(4, 3),
        lambda: L.SeparableConv1D(3, 3),
    )


def recurrent() -> keras.Model:
    return sequential(
        (6, 3),
        lambda: L.LSTM(4, return_sequences=True),
        lambda: L.GRU(3, return_sequences=True),
        lambda: L.Bidirectional(L.LSTM(2, return_sequences=True)),
        lambda: L.TimeDistributed(L.Dense(3)),
        lambda: L.Dropout(0.5),
    )


def attention() -> keras.Model:
    x = keras.Input((6, 4))
    y = L.MultiHeadAttention(2, 3)(x, x)
    return keras.Model(x, L.Dense(2)(L.MultiHeadAttention(2, 3)(y, x)))


def nested() -> keras.Model:
    """Two layers of one name in different models, one of them frozen, and automatic names."""
    one = keras.Sequential(
        [keras.Input((4, 4, 3)), L.Conv2D(3, 1, name="same"), L.BatchNormalization()], name="one"
    )
    two = keras.Sequential(
        [keras.Input((4, 4, 3)), L.Conv2D(3, 1, name="same"), L.Conv2D(3, 1)], name="two"
    )
    two.layers[0].trainable = False
    x = keras.Input((4, 4, 3))
    return keras.Model(x, L.Conv2D(3, 1, name="same")(two(one(x))))


def blocks() -> keras.Model:
    return sequential(
        (4, 4, 8),
        lambda: kconv.keras.ConvUnit(8, groups=2),
        lambda: kconv.keras.MBConv(8, expand_ratio=1),
        lambda: kconv.keras.MBConv(8, expand_ratio=1),
    )


def low_precision() -> keras.Model:
    return sequential(
        (4, 4, 3),
        lambda: L.Conv2D(2, 1, dtype="bfloat16"),
        lambda: L.BatchNormalization(dtype="bfloat16"),
        lambda: L.Dense(2, dtype="float16"),
    )


class Subclassed(keras.Model):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.stem = L.Conv2D(3, 1)
        self.parts = [L.Dense(3), L.Dense(3)]
        self.scale = self.add_weight(shape=(3,), name="scale")

    def call(self, x):
        x = self.stem(x) * self.scale
        for part in self.parts:
            x = part(x)
        return x


def subclassed() -> keras.Model:
    model = Subclassed()
    model(np.zeros((1, 4, 4, 3), "f4"))
    return model


MODELS = (norms, convolutions, recurrent, attention, nested, blocks, low_precision, subclassed)


def fill(model: keras.Model) -> keras.Model:
    rng = np.random.default_rng(0)
    for weight in model.weights:
        value = rng.uniform(0.1, 0.9, weight.shape) if "int" not in weight.dtype else np.array(5)
        weight.assign(value.astype("float32" if "float" in weight.dtype else weight.dtype))
    return model


def values(model: keras.Model) -> list[np.ndarray]:
    arrays = (keras.ops.convert_to_numpy(weight) for weight in model.weights)
    return [np.asarray(array).astype("float32") for array in arrays]


def save(model: keras.Model, path: Path) -> Path:
    if path.name.endswith(".safetensors"):
        save_weights(model, path)
    elif path.name.endswith(".weights.json"):
        largest = max(array.nbytes for array in values(model))
        model.save_weights(path, max_shard_size=(largest + 200) / 2**30)
    elif path.name.endswith(".weights.h5"):
        model.save_weights(path)
    else:
        model.save(path)
    return path


@pytest.mark.parametrize("make", MODELS)
def test_round_trips(make, tmp_path: Path) -> None:
    """Into a second model, whose automatic names have other numbers."""
    source, other = fill(make()), make()
    expected, initial = values(source), values(other)
    for suffix in ("safetensors", "keras", "weights.h5", "h5", "weights.json"):
        if make is subclassed and suffix == "h5":
            continue  # Keras does not write it
        path = save(source, tmp_path / f"a.{suffix}")
        for weight, value in zip(other.weights, initial, strict=True):
            weight.assign(value)
        report = load_weights(other, path)
        assert report.count == len(expected)
        np.testing.assert_equal(values(other), expected, err_msg=suffix)


def test_all_weights_of_blocks_are_saved_under_pytorchs_names(tmp_path: Path) -> None:
    unit = kconv.keras.ConvUnit(8, groups=2, name="unit")
    block = kconv.keras.MBConv(8, expand_ratio=1, name="block")
    model = fill(keras.Sequential([keras.Input((4, 4, 8)), unit, block]))
    save_weights(model, tmp_path / "a.safetensors")
    arrays = load_file(tmp_path / "a.safetensors")
    assert sum(array.size for array in arrays.values()) == model.count_params()
    other = nn.Sequential()
    other.add_module("unit", kconv.torch.ConvUnit(8, 8, groups=2))
    other.add_module("block", kconv.torch.MBConv(8, 8, expand_ratio=1))
    other.eval()
    x = np.random.default_rng(1).random((2, 4, 4, 8), np.float32)
    for path in (tmp_path / "a.safetensors", save(model, tmp_path / "a.keras")):
        load_weights(other, path)
        with torch.no_grad():
            y = other(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        expected = keras.ops.convert_to_numpy(model(x))
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", ["safetensors", "keras", "weights.h5", "h5"])
def test_between_frameworks(suffix: str, tmp_path: Path) -> None:
    """What PyTorch computes with Keras's weights: each layer that both have."""
    x = keras.Input((6, 6, 4))
    y = L.Conv2D(4, 3, name="conv")(x)
    y = L.BatchNormalization(name="bn", epsilon=1e-5)(y)
    y = L.PReLU(shared_axes=[1, 2], name="prelu")(y)
    y = L.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(y)
    y = L.Conv2DTranspose(6, 3, name="transposed")(y)
    y = L.LayerNormalization(name="ln", epsilon=1e-5)(y)
    model = fill(keras.Model(x, L.Dense(3, name="head")(y)))

    parts = {
        "conv": nn.Conv2d(4, 4, 3),
        "bn": nn.BatchNorm2d(4),
        "prelu": nn.PReLU(4),
        "depthwise": nn.Conv2d(4, 8, 3, groups=4),
        "transposed": nn.ConvTranspose2d(8, 6, 3),
        "ln": nn.LayerNorm(6),
        "head": nn.Linear(6, 3),
    }
    other = nn.ModuleDict(parts).eval()
    path = save(model, tmp_path / f"a.{suffix}")
    load_weights(other, path)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 6, 6, 4)).astype("f4")
    z = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        for name in ("conv", "bn", "prelu", "depthwise", "transposed"):
            z = parts[name](z)
        z = parts["head"](parts["ln"](z.permute(0, 2, 3, 1)))
    expected = keras.ops.convert_to_numpy(model(images))
    np.testing.assert_allclose(z.numpy(), expected, rtol=1e-4, atol=1e-4)
    fresh = keras.models.clone_model(model)  # and back again
    save_weights(other, tmp_path / "back.safetensors")
    load_weights(fresh, tmp_path / "back.safetensors")
    np.testing.assert_equal(values(fresh), values(model))


def test_a_scale_is_no_centre(tmp_path: Path) -> None:
    """Weights of the same shapes in the same places, which the configuration tells apart."""
    for suffix in ("keras", "h5", "safetensors"):
        source = sequential((4,), lambda: L.BatchNormalization(center=False, name="b"))
        other = sequential((4,), lambda: L.BatchNormalization(scale=False, name="b"))
        path, before = save(fill(source), tmp_path / f"a.{suffix}"), values(other)
        with pytest.raises(ValueError, match=r"gamma|b\.weight"):
            load_weights(other, path)
        np.testing.assert_equal(values(other), before)


def test_a_transposed_convolution_is_no_other(tmp_path: Path) -> None:
    source = sequential((4, 4, 3), lambda: L.Conv2D(3, 2, name="c"))
    other = nn.ModuleDict({"c": nn.ConvTranspose2d(3, 3, 2)})
    with pytest.raises(ValueError, match="'c' is a Conv2D, the model's a Conv2DTranspose"):
        load_weights(other, save(source, tmp_path / "a.keras"))


def test_names_count(tmp_path: Path) -> None:
    """Layers of the same shapes in another order are found by name; others are refused."""

    def model(*names: str) -> keras.Model:
        return sequential((3,), *(lambda name=name: L.Dense(3, name=name) for name in names))

    source = fill(model("a", "b"))
    for suffix in ("keras", "weights.h5", "h5", "safetensors"):
        path, other = save(source, tmp_path / f"a.{suffix}"), model("b", "a")
        load_weights(other, path)
        a, b = source.get_layer("a"), other.get_layer("a")
        np.testing.assert_equal(*(keras.ops.convert_to_numpy(x.kernel) for x in (a, b)))
        with pytest.raises(ValueError, match=r"only in the file: b\..*only in the model: c\."):
            load_weights(model("a", "c"), path)
        with pytest.raises(ValueError, match=r"only in the file: b\."):
            load_weights(model("a"), path)


def test_collisions(tmp_path: Path) -> None:
    class Twice(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = L.Dense(2, name="d"), L.Dense(2, name="d")

        def call(self, x):
            return self.one(x) + self.two(x)

    model = Twice()
    model(np.zeros((1, 2), "f4"))
    with pytest.raises(ValueError, match=r"two weights 'd\.kernel'"):
        save_weights(model, tmp_path / "a.safetensors")
    fill(model).save_weights(tmp_path / "a.weights.h5")  # attributes tell them apart
    other = Twice()
    other(np.zeros((1, 2), "f4"))
    load_weights(other, tmp_path / "a.weights.h5")
    np.testing.assert_equal(values(other), values(model))


def test_models_without_weights_yet(tmp_path: Path) -> None:
    save(subclassed(), tmp_path / "a.weights.h5")
    with pytest.raises(ValueError, match="is not built yet: call it once, or build it"):
        load_weights(Subclassed(), tmp_path / "a.weights.h5")


def test_an_optimizer_keeps_its_state(tmp_path: Path) -> None:
    source, other = nested(), nested()
    path = save(fill(source), tmp_path / "a.weights.h5")
    other.compile("adam", "mse")
    other.optimizer.build(other.trainable_variables)
    other.optimizer.iterations.assign(7)
    load_weights(other, path)
    np.testing.assert_equal(values(other), values(source))
    assert int(other.optimizer.iterations) == 7
    load_weights(source, save(other, tmp_path / "b.weights.h5"))  # nor is one wanted


def test_adapted_normalization_computes_with_what_was_loaded(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(3, 2, (50, 4)).astype("f4")
    source = sequential((4,), L.Normalization)
    source.layers[0].adapt(data)
    for suffix in ("safetensors", "keras", "h5"):
        other = sequential((4,), L.Normalization)
        load_weights(other, save(source, tmp_path / f"a.{suffix}"))
        outputs = (keras.ops.convert_to_numpy(m(data)) for m in (source, other))
        np.testing.assert_allclose(*outputs, rtol=1e-6)


def strip_names(path: Path) -> None:
    """As Keras 3.5 wrote files: without the layers' names."""

    def visit(_: str, group: h5py.Group) -> None:
        group.attrs.pop("name", None)

    with h5py.File(path, "r+") as file:
        file.visititems(visit)
        file["vars"].attrs.pop("name", None)


@pytest.mark.parametrize("make", [norms, recurrent, attention, nested, blocks, subclassed])
def test_files_without_names(make, tmp_path: Path) -> None:
    source, other, path = fill(make()), make(), tmp_path / "a.weights.h5"
    strip_names(save(source, path))
    load_weights(other, path)
    np.testing.assert_equal(values(other), values(source))


def test_an_unpacked_archive(tmp_path: Path) -> None:
    source, other = fill(nested()), nested()
    with zipfile.ZipFile(save(source, tmp_path / "a.keras")) as archive:
        archive.extractall(tmp_path / "a")
    load_weights(other, tmp_path / "a")
    np.testing.assert_equal(values(other), values(source))


def write_keras2(path: Path, model: keras.Model, names: dict[str, list[str]]) -> None:
    """A file of Keras 2: for each layer, its weights under names of that version."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = np.array([layer.name for layer in model.layers], "S")
        for layer in model.layers:
            group = file.create_group(layer.name)
            texts = names.get(layer.name, [])
            weights = [*layer.trainable_weights, *layer.non_trainable_weights]
            for text, weight in zip(texts, weights, strict=True):
                group[text] = keras.ops.convert_to_numpy(weight)
            group.attrs["weight_names"] = np.array(texts, "S")


def test_keras_2(tmp_path: Path) -> None:
    """Names of inner layers that differ from Keras 3's are matched by their order."""

    def make() -> keras.Model:
        inner = keras.Sequential([keras.Input((6, 3)), L.Conv1D(3, 1), L.Conv1D(3, 1)], name="in")
        return sequential(
            (6, 3),
            lambda: inner,
            lambda: L.LSTM(3, return_sequences=True, name="lstm"),
            lambda: L.TimeDistributed(L.Dense(2), name="td"),
            lambda: L.SeparableConv1D(2, 2, name="sep"),
        )

    path, source, other = tmp_path / "a.h5", fill(make()), make()
    cell = "lstm/lstm_cell_7"
    names = {
        "in": [f"{c}/{w}:0" for c in ("conv1d_98", "conv1d_99") for w in ("kernel", "bias")],
        "lstm": [f"{cell}/{w}:0" for w in ("kernel", "recurrent_kernel", "bias")],
        "td": ["td/kernel:0", "td/bias:0"],
        "sep": [f"sep/{w}:0" for w in ("depthwise_kernel", "pointwise_kernel", "bias")],
    }
    write_keras2(path, source, names)
    load_weights(other, path)
    np.testing.assert_equal(values(other), values(source))
    names["lstm"] = [f"{cell}/{w}:0" for w in ("bias", "recurrent_kernel", "kernel")]
    write_keras2(path, source, names)
    before = values(other)
    with pytest.raises(ValueError, match="only in the file"):
        load_weights(other, path)
    np.testing.assert_equal(values(other), before)


@pytest.mark.parametrize("target", ["torch", "keras"])
def test_activations_of_other_names(target: str, tmp_path: Path) -> None:
    """They are no reason to refuse; another one of the same name is."""
    kinds = {"gelu": nn.GELU, "mish": nn.Mish, "tanh": nn.Tanh, "elu": nn.ELU, "relu": nn.ReLU}

    def make(**changed: str) -> keras.Model:
        return sequential(
            (3,),
            lambda: L.Dense(3, name="d"),
            *(lambda k=k: L.Activation(changed.get(k, k), name=f"my_{k}") for k in kinds),
        )

    path = save(fill(make()), tmp_path / "a.keras")
    if target == "keras":
        load_weights(make(), path)
        with pytest.raises(ValueError, match=r"my_gelu \(gelu in the file, relu in the model"):
            load_weights(make(gelu="relu"), path)
        return

    def module(prefix: str, **changed: type[nn.Module]) -> nn.Module:
        parts = {f"{prefix}_{kind}": (changed.get(kind) or make)() for kind, make in kinds.items()}
        return nn.ModuleDict({"d": nn.Linear(3, 3), **parts})

    load_weights(module("my"), path)
    load_weights(module("other"), path)
    with pytest.raises(ValueError, match=r"my_relu \(relu in the file, relu6 in the model"):
        load_weights(module("my", relu=nn.ReLU6), path)


def test_an_application(tmp_path: Path) -> None:
    """MobileNetV3 by keras.applications: operations, rescaling, automatic names of models."""

    def make() -> keras.Model:
        return keras.applications.MobileNetV3Small(
            (32, 32, 3), alpha=0.25, minimalistic=True, weights=None, classes=2, include_top=True
        )

    source, other = fill(make()), make()
    for suffix in ("keras", "safetensors"):
        load_weights(other, save(source, tmp_path / f"a.{suffix}"))
        np.testing.assert_equal(values(other), values(source))


def test_damaged_configurations(tmp_path: Path) -> None:
    path = save(nested(), tmp_path / "a.keras")
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for config in ([], {"config": {"layers": [3]}}, {"config": {"layers": [{"config": {}}]}}, "{"):
        text = config if isinstance(config, str) else json.dumps(config)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, text if name == "config.json" else content)
        with pytest.raises(ValueError, match=r"a\.keras"):
            load_weights(nested(), path)
