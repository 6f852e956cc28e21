"""load_weights and save_weights: every format, both frameworks, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import kconv.keras
import kconv.torch.network
from kconv.models import create, graph
from kconv.weights import load_weights, save_weights

REFERENCE = os.environ.get("KCONV_REFERENCE", "")
needs_reference = pytest.mark.skipif(
    not REFERENCE, reason="KCONV_REFERENCE names no folder with the original's outputs"
)
BUILD = {"torch": kconv.torch.network.build, "keras": kconv.keras.build}
both = pytest.mark.parametrize("framework", BUILD)

WHOLE_MODELS = {
    "kEffNetB0_D6_16ch_skip3": create(
        "keffnet_b0", ktype="D6_16ch", skip_stride_cnt=3, classes=10, input_shape=(32, 32, 3)
    ),
    "kMobileNet_D6v3_32ch": create(
        "kmobilenet", ktype="D6v3_32ch", classes=10, input_shape=(64, 64, 3)
    ),
}
PUBLISHED = create(
    "kmobilenet",
    ktype="D6_32ch",
    classes=10,
    input_shape=(None, None, 3),
    conv1_activation="relu6",
    d_separable_activation="relu6",
)
# Between them: "/" in names, automatic names, a batch norm's absent gamma, a depth multiplier.
TINY = {
    "mobilenet_v3": create(
        "kmobilenet_v3_small", alpha=0.25, classes=3, input_shape=(32, 32, 3), ktype="D6v3_4ch"
    ),
    "densenet": create(
        "kdensenet_bc_l100", blocks=2, classes=3, input_shape=(8, 8, 3), ktype="D6_4ch"
    ),
    "multiplied": create(
        "mobilenet", alpha=0.125, depth_multiplier=2, classes=3, input_shape=(32, 32, 3)
    ),
}


def predict(model, images: np.ndarray, batch: int = 47) -> np.ndarray:
    """(N, H, W, C) -> probabilities (N, classes)."""
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    if isinstance(model, keras.Model):
        call = model.predict_on_batch if len(parts) > 1 else model  # compiling takes its time
        return np.concatenate([keras.ops.convert_to_numpy(call(part)) for part in parts])
    model.eval()
    with torch.no_grad():
        tensors = [torch.from_numpy(part).permute(0, 3, 1, 2) for part in parts]
        return torch.cat([model(part).softmax(1) for part in tensors]).numpy()


@cache
def randomised(framework: str, spec):
    """A model none of whose weights has a value that another has; not to be changed."""
    model = BUILD[framework](spec)
    rng = np.random.default_rng(1)
    if framework == "keras":
        for weight in model.weights:
            weight.assign(rng.uniform(0.1, 0.4, weight.shape))
    else:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.copy_(torch.from_numpy(rng.uniform(0.1, 0.4, tensor.shape)))
    return model


def arrays(model) -> dict[str, np.ndarray]:
    if isinstance(model, keras.Model):
        return {weight.path: keras.ops.convert_to_numpy(weight) for weight in model.weights}
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def assert_same_weights(model, other, folder: Path) -> None:
    """Two models of one spec, of whichever framework, have the same weights."""
    files = []
    for name, each in (("a", model), ("b", other)):
        save_weights(each, folder / f"{name}.safetensors")
        weights = load_file(folder / f"{name}.safetensors")
        files.append(
            {
                key.replace("/", "_"): array
                for key, array in weights.items()
                if not key.endswith("num_batches_tracked")
            }
        )
    np.testing.assert_equal(*files)


def write_keras2(
    path: Path, model: keras.Model, spec, first: int = 0, chunks: int = 1, config=None
):
    """The file that Keras 2 would write: "/" in names, automatic names from a number on."""

    names = {layer.name.replace("/", "_"): layer.name for layer in spec.graph().layers}

    def original(layer) -> str:
        name = names[layer.name]
        for kind in ("conv2d", "batch_normalization"):
            if name == kind or name.removeprefix(f"{kind}_").isdigit():
                return f"{kind}_{first + int(name.removeprefix(kind)[1:] or 0)}"
        return name

    def store(attrs, key: str, texts: list[str]) -> None:
        parts = np.array_split(np.array(texts, "S"), chunks)
        for number, part in enumerate(parts):
            attrs[key if chunks == 1 else f"{key}{number}"] = part

    with h5py.File(path, "w") as file:
        root = file if config is None else file.create_group("model_weights")
        if config is not None:
            file.attrs["model_config"] = json.dumps(config)
        store(root.attrs, "layer_names", [original(layer) for layer in model.layers])
        for layer in model.layers:
            name = original(layer)
            group = root.require_group(name)
            texts = []
            for weight in layer.weights:
                depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
                kind = f"depthwise_{weight.name}" if depthwise else weight.name
                texts.append(f"{name}/{kind}:0")
                group[texts[-1]] = keras.ops.convert_to_numpy(weight)
            group.attrs["weight_names"] = np.array(texts, "S")


@needs_reference
@both
@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_original_models(name: str, framework: str) -> None:
    model = BUILD[framework](WHOLE_MODELS[name])
    load_weights(model, f"{REFERENCE}/models/{name}.hdf5")
    expected = np.load(f"{REFERENCE}/models/{name}.npz")
    np.testing.assert_allclose(predict(model, expected["x"]), expected["y"], atol=1e-4)


def published_images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (846, 224, 224, 3), labels, and the original's probabilities."""
    data = np.load(f"{REFERENCE}/published/cifar10_test846.npz")
    images = data["x"].repeat(7, axis=1).repeat(7, axis=2)
    probabilities = np.load(f"{REFERENCE}/published/kMobileNet_D6_32ch_cifar10_probabilities.npy")
    return images, data["y"].ravel(), probabilities


def check_published(framework: str, count: int | None = None) -> None:
    """The original's probabilities, and, with all images, its accuracy."""
    model = BUILD[framework](PUBLISHED)
    load_weights(model, f"{REFERENCE}/published/kMobileNet_D6_32ch_cifar10.hdf5")
    images, labels, expected = (array[:count] for array in published_images())
    found = np.concatenate(
        [
            predict(model, images[start : start + 47] / np.float32(255), batch=24)
            for start in range(0, len(images), 47)
        ]
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    if count is None:
        assert round(float((found.argmax(1) == labels).mean()), 4) == 0.9326


@pytest.mark.slow
@needs_reference
@both
def test_published_checkpoint(framework: str) -> None:
    check_published(framework)


@pytest.mark.slow
@needs_reference
@pytest.mark.parametrize("backend", ["jax", "tensorflow", "torch"])
def test_published_checkpoint_on_other_backends(backend: str) -> None:
    if keras.backend.backend() == backend:
        pytest.skip("this process has it")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_weights import check_published; check_published('keras', 94)"
    )
    env = {**os.environ, "KERAS_BACKEND": backend}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_reference
@both
def test_activations_must_agree(framework: str) -> None:
    model = BUILD[framework](create("kmobilenet", ktype="D6_32ch", classes=10))
    before = arrays(model)
    pattern = r"conv1_act \(absent in the file, swish in the model\), conv1_relu \(relu6 in the"
    with pytest.raises(ValueError, match=pattern):
        load_weights(model, f"{REFERENCE}/published/kMobileNet_D6_32ch_cifar10.hdf5")
    np.testing.assert_equal(arrays(model), before)


FORMATS = (".safetensors", ".keras", ".weights.h5", ".h5", ".pt", ".hdf5")


@pytest.mark.parametrize("target", BUILD)
@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *(("densenet", suffix) for suffix in FORMATS),
        *((name, suffix) for name in ("mobilenet_v3", "multiplied") for suffix in FORMATS[-2:]),
    ],
)
def test_round_trip(name: str, suffix: str, target: str, tmp_path: Path) -> None:
    spec, path = TINY[name], tmp_path / f"model{suffix}"
    source = randomised("torch" if suffix == ".pt" else "keras", spec)
    match suffix:
        case ".safetensors":
            save_weights(source, path)
        case ".weights.h5":
            source.save_weights(path)
        case ".pt":
            torch.save(source.state_dict(), path)
        case ".hdf5":
            write_keras2(path, source, spec)
        case _:
            source.save(path)
    model = BUILD[target](spec)
    load_weights(model, path)
    assert_same_weights(model, source, tmp_path)


@pytest.mark.parametrize("name", ["densenet", "multiplied"])
def test_same_outputs_from_the_same_weights(name: str, tmp_path: Path) -> None:
    spec, path = TINY[name], tmp_path / "model.safetensors"
    source, model = randomised("keras", spec), kconv.torch.network.build(spec)
    save_weights(source, path)
    load_weights(model, path)
    images = np.random.default_rng(0).random((3, *spec.input_shape), np.float32)
    np.testing.assert_allclose(predict(model, images), predict(source, images), atol=1e-4)


@both
@pytest.mark.parametrize("first", [1, 5, 93])
def test_automatic_names_match_by_order(framework: str, first: int, tmp_path: Path) -> None:
    """Also where the file's numbers overlap the model's, and "_100" follows "_99"."""
    spec = TINY["densenet"]
    source = randomised("keras", spec)
    write_keras2(tmp_path / "m.hdf5", source, spec, first=first, chunks=3)
    model = BUILD[framework](spec)
    load_weights(model, tmp_path / "m.hdf5")
    assert_same_weights(model, source, tmp_path)


ARCHITECTURES = {
    "DenseNetBC_L100_32": create("densenet_bc_l100"),
    "EfficientNetB0_224": create("efficientnet_b0"),
    "InceptionV3_224": create("inception_v3"),
    "MobileNet_224": create("mobilenet"),
    "MobileNetV3Large_224": create("mobilenet_v3_large"),
    "kDenseNetBC_L100_D6_12ch_32": create("kdensenet_bc_l100", ktype="D6_12ch"),
    "kEffNetB0_D6v3_16ch_32_skip3": create("keffnet_b0", ktype="D6v3_16ch", skip_stride_cnt=3),
    "kInceptionV3_D6_32ch_224": create("kinception_v3", ktype="D6_32ch"),
    "kMobileNetV3Large_D6_32ch_224": create("kmobilenet_v3_large", ktype="D6_32ch"),
    "kMobileNetV3Small_D6_32ch_224": create("kmobilenet_v3_small", ktype="D6_32ch"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_of_every_network(name: str, tmp_path: Path) -> None:
    """A file with the original's names, shapes and activations loads; each weight has a number."""
    source = Path(__file__).parents[1] / "data" / "architectures" / f"{name}.json"
    layers = json.loads(source.read_text("utf-8"))["layers"]

    def shifted(layer: str) -> str:
        """Automatic names as they are in a session that has made other models before."""
        found = re.fullmatch(r"(conv2d|batch_normalization|activation|re_lu)(?:_(\d+))?", layer)
        return f"{found[1]}_{int(found[2] or 0) + 7}" if found else layer

    config = {"config": {"layers": []}}
    expected: dict[str, list[float]] = {}
    numbers = itertools.count(1)
    with h5py.File(tmp_path / "model.hdf5", "w") as file:
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = np.array([shifted(layer["name"]) for layer in layers], "S")
        for layer in layers:
            own = shifted(layer["name"])
            weights = layer["weights"]
            for (weight, shape), number in zip(weights.items(), numbers, strict=False):
                root.create_dataset(f"{own}/{own}/{weight}:0", shape, "f4", fillvalue=number)
                expected.setdefault(layer["name"].replace("/", "_"), []).append(number)
            texts = [f"{own}/{weight}:0" for weight in weights]
            root.require_group(own).attrs["weight_names"] = np.array(texts, "S")
            settings = {"max_value": float(layer["max_value"]) if "max_value" in layer else None}
            config["config"]["layers"].append(
                {"class_name": layer["type"], "config": {**layer, **settings, "name": own}}
            )
        file.attrs["model_config"] = json.dumps(config)
    classes = layers[-1]["output_shape"][-1]
    model = kconv.torch.network.build(dataclasses.replace(ARCHITECTURES[name], classes=classes))
    load_weights(model, tmp_path / "model.hdf5")
    found: dict[str, list[float]] = {}
    for key, tensor in model.state_dict().items():
        owner, _, weight = key.replace("/", "_").rpartition(".")
        if weight != "num_batches_tracked":
            assert tensor.min() == tensor.max()
            found.setdefault(owner, []).append(tensor.min().item())
    assert found == expected


def keras2_config(spec, **kinds: str) -> dict:
    """The part of a model's configuration that concerns activations."""
    layers = [{"class_name": "InputLayer", "config": {"name": "input_1"}}]
    for layer in spec.graph().layers:
        if isinstance(layer, graph.Activation):
            kind = kinds.get(layer.name, layer.kind)
            activation = {"hard_swish": "HardSwish", "hard_sigmoid": "HardSigmoid"}.get(kind, kind)
            config = {"name": layer.name, "activation": activation}
            layers.append({"class_name": "Activation", "config": config})
    return {"class_name": "Functional", "config": {"layers": layers}}


@both
def test_custom_and_automatic_activations(framework: str, tmp_path: Path) -> None:
    spec = TINY["mobilenet_v3"]
    source, model = randomised("keras", spec), BUILD[framework](spec)
    write_keras2(tmp_path / "good.hdf5", source, spec, config=keras2_config(spec))
    load_weights(model, tmp_path / "good.hdf5")
    other = keras2_config(spec, activation="relu6")
    write_keras2(tmp_path / "bad.hdf5", source, spec, config=other)
    with pytest.raises(ValueError, match=r"other activations: unnamed ones .*relu6"):
        load_weights(model, tmp_path / "bad.hdf5")


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 4}, r"Logits.weight \(4, \d+, 1, 1\) in the file, \(3, \d+, 1, 1\) in the mo"),
        ({"alpha": 0.5}, r"Conv.*in the file.*in the model"),
        ({"size": "large"}, r"only in the file: .*conv_11_depthwise.*only in the model: "),
        ({"ktype": "conv"}, r"only in the file: .*expand_conv.weight \(.*only in the model: "),
    ],
)
def test_mismatch_changes_nothing(framework: str, change, message: str, tmp_path: Path) -> None:
    options = {"alpha": 0.25, "classes": 3, "input_shape": (32, 32, 3), "ktype": "D6v3_4ch"}
    other = create("kmobilenet_v3_small", **{**options, **change})
    save_weights(kconv.keras.build(other), tmp_path / "other.safetensors")
    model = BUILD[framework](TINY["mobilenet_v3"])
    before = arrays(model)
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "other.safetensors")
    np.testing.assert_equal(arrays(model), before)


@pytest.mark.parametrize("suffix", [".safetensors", ".keras", ".weights.h5", ".pt", ".hdf5"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_truncated_files(suffix: str, part: float, tmp_path: Path) -> None:
    spec, path = TINY["densenet"], tmp_path / f"model{suffix}"
    source = randomised("keras", spec)
    match suffix:
        case ".safetensors":
            save_weights(source, path)
        case ".weights.h5":
            source.save_weights(path)
        case ".pt":
            torch.save(randomised("torch", spec).state_dict(), path)
        case ".hdf5":
            write_keras2(path, source, spec)
        case _:
            source.save(path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=str(path)):
        load_weights(source, path)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n....", "neither HDF5"),
        (b"PK\x03\x04 but not an archive", "damaged"),
        (b"\x08\0\0\0\0\0\0\0{nonsense", "damaged"),
        (pickle.dumps(Evil()), "damaged, or holds no model's weights"),
        (pickle.dumps([1, 2]), "damaged, or holds no model's weights"),
    ],
)
def test_wrong_files(content: bytes, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "file")
    assert not (tmp_path / "evil").exists()


def test_wrong_contents(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    torch.save({"epoch": 3, "best": {"accuracy": 0.5}}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match="holds a dict without a state_dict of tensors"):
        load_weights(model, tmp_path / "nested.pt")
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(ValueError, match="it has no layers with weights"):
        load_weights(model, tmp_path / "data.h5")
    save_file({"a/b.weight": np.zeros(1), "a_b.weight": np.zeros(1)}, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=r"two weights 'a_b\.weight'"):
        load_weights(model, tmp_path / "t.safetensors")
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path / "absent.h5")


def remove_names(path: Path) -> None:
    """Make a ``.weights.h5`` as older versions of Keras wrote it."""

    def visit(_: str, group: h5py.Group) -> None:
        group.attrs.pop("name", None)

    with h5py.File(path, "r+") as file:
        file.visititems(visit)


def test_numbered_weights_without_names(tmp_path: Path) -> None:
    """Older ``.weights.h5`` files lack the layers' names; a ``.keras`` has them beside."""
    spec, path = TINY["densenet"], tmp_path / "model.weights.h5"
    source = randomised("keras", spec)
    source.save_weights(path)
    remove_names(path)
    with pytest.raises(ValueError, match="have no layer's name"):
        load_weights(kconv.torch.network.build(spec), path)
    model = kconv.keras.build(spec)
    load_weights(model, path)  # Keras goes by classes and their order
    assert_same_weights(model, source, tmp_path)


def test_older_keras_archive(tmp_path: Path) -> None:
    spec = TINY["densenet"]
    source = randomised("keras", spec)
    source.save(tmp_path / "new.keras")
    with zipfile.ZipFile(tmp_path / "new.keras") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    weights = tmp_path / "w.h5"
    weights.write_bytes(files["model.weights.h5"])
    remove_names(weights)
    with h5py.File(weights, "r+") as file:
        file.move("layers", "_layer_checkpoint_dependencies")
    files["model.weights.h5"] = weights.read_bytes()
    with zipfile.ZipFile(tmp_path / "old.keras", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    model = kconv.torch.network.build(spec)
    load_weights(model, tmp_path / "old.keras")
    assert_same_weights(model, source, tmp_path)


def test_trained_keras_files(tmp_path: Path) -> None:
    """A compiled model's file holds an optimizer's state too."""
    spec = TINY["densenet"]
    source = kconv.keras.build(spec)
    source.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    source.optimizer.build(source.trainable_variables)
    source.save(tmp_path / "model.keras")
    model = kconv.torch.network.build(spec)
    load_weights(model, tmp_path / "model.keras")
    assert_same_weights(model, source, tmp_path)


def test_compiled_and_low_precision_modules(tmp_path: Path) -> None:
    source = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    compiled = torch.nn.Module()  # what torch.compile gives
    compiled._orig_mod = source
    save_weights(compiled, tmp_path / "a.safetensors")
    half = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()).bfloat16()
    load_weights(half, tmp_path / "a.safetensors")
    assert torch.equal(half[0].weight, source[0].weight.bfloat16())
    save_weights(half, tmp_path / "half.safetensors")
    load_weights(source, tmp_path / "half.safetensors")
    assert torch.equal(half[0].weight.float(), source[0].weight)
    torch.save(half.state_dict(), tmp_path / "half.pt")
    load_weights(compiled, tmp_path / "half.pt")


def test_save_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    model, path = torch.nn.Linear(2, 2), tmp_path / "model.safetensors"
    save_weights(model, path)
    before = path.read_bytes()

    def fail(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kconv.weights.write_safetensors", fail)
    with pytest.raises(OSError, match="No space left"):
        save_weights(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"m\.pt' does not end in \.safetensors"):
        save_weights(torch.nn.Linear(2, 2), tmp_path / "m.pt")
    for call in (load_weights, save_weights):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
            call(TINY["densenet"], tmp_path / "m.safetensors")
