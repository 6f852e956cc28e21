"""Trained networks under a name: each front end and each command finds and fills by it."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import kconv
from kconv import _published, cli, models, training
from kconv._creating import fill_network
from kconv._model_folder import ImageInput, ModelConfig, expected_weights, read_config
from kconv.runtime import FrozenNetwork

NAMES = ("ant", "bee", "cat")
NETWORK = "kdensenet_bc_l100"
TINY = {"ktype": "D6_4ch", "blocks": 1, "growth_rate": 4, "bottleneck": 8}
SPEC = models.create(NETWORK, classes=3, input_shape=(8, 8, 3), **TINY)
STEM, HEAD = "conv2d", "softmax"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one trained network, in the place of the package's own."""
    config = ModelConfig(
        network=SPEC,
        class_names=NAMES,
        image=ImageInput(height=8, width=8, channels=3),
        dataset="insects",
    )
    rng = np.random.default_rng(0)
    weights = {
        key: rng.uniform(0.1, 0.4, shape).astype(np.float32) - (key[1] == "kernel") / 4
        for key, (_, shape) in expected_weights(SPEC.graph()).items()
    }
    FrozenNetwork(config, weights).save(tmp_path / "store" / f"{NETWORK}-insects")
    monkeypatch.setattr(_published, "FOLDER", tmp_path / "store")
    monkeypatch.delenv("KCONV_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "store"


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8)


def scaled(images: np.ndarray) -> np.ndarray:
    return images / np.float32(64) - np.float32(2)


def test_names_and_networks(store: Path, images: np.ndarray) -> None:
    assert kconv.list_weights() == [f"{NETWORK}-insects"]
    assert kconv.list_weights(NETWORK) == [f"{NETWORK}-insects"]
    assert kconv.list_weights("keffnet_b0") == []
    net = kconv.load(f"{NETWORK}-insects")
    assert net.class_names == NAMES
    np.testing.assert_array_equal(net(images), kconv.load(store / f"{NETWORK}-insects")(images))


def test_a_path_comes_before_a_name(store: Path) -> None:
    (store.parent / f"{NETWORK}-insects").mkdir()
    with pytest.raises(ValueError, match=r"is no run, as it has no config\.json"):
        kconv.load(f"{NETWORK}-insects")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (f"{NETWORK}-insect", rf"did you mean '{NETWORK}-insects'\?"),
        ("missing", f"there is no folder or file missing.*known are {NETWORK}-insects"),
    ],
)
def test_unknown_names_say_what_there_is(store: Path, given: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        kconv.load(given)


def test_a_folder_of_ones_own(
    store: Path, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the package's, and before it where both have a name."""
    net = kconv.load(f"{NETWORK}-insects")
    weights = {**net.weights, (HEAD, "bias"): np.array([9, 0, 0], np.float32)}
    other = FrozenNetwork(net.config, weights)
    other.save(tmp_path / "own" / f"{NETWORK}-insects")
    other.save(tmp_path / "own" / "mine")
    monkeypatch.setenv("KCONV_WEIGHTS", str(tmp_path / "own"))
    assert kconv.list_weights() == [f"{NETWORK}-insects", "mine"]
    for name in kconv.list_weights():
        np.testing.assert_array_equal(kconv.load(name)(images), other(images))
    monkeypatch.setenv("KCONV_WEIGHTS", str(tmp_path / "missing"))
    np.testing.assert_array_equal(kconv.load(f"{NETWORK}-insects")(images), net(images))


def torch_outputs(model: Any, images: np.ndarray) -> np.ndarray:
    import torch

    x = torch.from_numpy(scaled(images)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return model.eval()(x).softmax(1).numpy()


def test_torch(store: Path, images: np.ndarray) -> None:
    import kconv.torch

    expected = kconv.load(f"{NETWORK}-insects")(images)
    for model in (
        kconv.torch.create_model(NETWORK, weights="insects"),
        kconv.torch.build(SPEC, weights="insects"),
        kconv.torch.build(SPEC, "torch", weights=f"{NETWORK}-insects"),
    ):
        np.testing.assert_allclose(torch_outputs(model, images), expected, atol=1e-5)
    other = kconv.torch.create_model(NETWORK, weights="insects", num_classes=5)
    assert getattr(other, HEAD).out_features == 5
    stem = kconv.load(f"{NETWORK}-insects").weights[STEM, "kernel"]
    np.testing.assert_array_equal(getattr(other, STEM).weight.detach(), stem)


def test_keras(store: Path, images: np.ndarray) -> None:
    from keras.ops import convert_to_numpy

    import kconv.keras

    expected = kconv.load(f"{NETWORK}-insects")(images)
    for model in (
        kconv.keras.create_model(NETWORK, weights="insects"),
        kconv.keras.build(SPEC, weights="insects"),
    ):
        found = convert_to_numpy(model(scaled(images), training=False))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_flax(store: Path, images: np.ndarray, tmp_path: Path) -> None:
    from flax import nnx

    from kconv.jax.nnx import build, create_model

    expected = kconv.load(f"{NETWORK}-insects")(images)
    network = create_model(NETWORK, weights="insects", rngs=nnx.Rngs(0))
    network.eval()
    np.testing.assert_allclose(network(scaled(images)), expected, atol=1e-5)
    # A network of Flax is a model as the others are, for files of either kind.
    kconv.save_weights(network, tmp_path / "a.safetensors")
    other = build(SPEC, rngs=nnx.Rngs(1))
    report = kconv.load_weights(other, tmp_path / "a.safetensors")
    assert report.count == len(expected_weights(SPEC.graph()))
    other.eval()
    np.testing.assert_allclose(other(scaled(images)), expected, atol=1e-5)
    five = create_model(NETWORK, weights="insects", num_classes=5, rngs=nnx.Rngs(0))
    assert five(scaled(images)).shape == (4, 5)
    expected = "with blocks=1, the model is a kdensenet_bc_l100 with blocks=2"
    with pytest.raises(ValueError, match=expected):
        create_model(NETWORK, weights="insects", blocks=2, rngs=nnx.Rngs(0))


def test_flax_reads_files_of_keras(images: np.ndarray, tmp_path: Path) -> None:
    from flax import nnx

    import kconv.keras
    from kconv.jax.nnx import build

    model = kconv.keras.build(SPEC)
    model.save_weights(tmp_path / "a.weights.h5")
    model.save(tmp_path / "a.keras")
    expected = np.asarray(model(scaled(images), training=False))
    network = build(SPEC, rngs=nnx.Rngs(0))
    kconv.load_weights(network, tmp_path / "a.keras")
    network.eval()
    np.testing.assert_allclose(network(scaled(images)), expected, atol=1e-5)


def test_an_exchanged_layer_of_flax_is_named() -> None:
    from flax import nnx

    from kconv.jax.nnx import build

    network = build(SPEC, rngs=nnx.Rngs(0))
    setattr(network, HEAD, nnx.Linear(7, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=f"'{HEAD}' was exchanged: it has no kernel"):
        kconv.save_weights(network, "a.safetensors")


def test_weights_of_another_network_are_refused(store: Path) -> None:
    """Shapes alone would let them in."""
    import kconv.torch

    with pytest.raises(ValueError, match=r"with activation='swish', the model is a .*'relu'"):
        kconv.torch.create_model(NETWORK, weights="insects", activation="relu")
    # Another size of images is what fine-tuning is for.
    larger = kconv.torch.create_model(NETWORK, weights="insects", image_size=16)
    stem = kconv.load(f"{NETWORK}-insects").weights[STEM, "kernel"]
    np.testing.assert_array_equal(getattr(larger, STEM).weight.detach(), stem)
    spec = models.create(NETWORK, classes=3, input_shape=(8, 8, 3), **{**TINY, "ktype": "D6_8ch"})
    model = kconv.torch.build(spec)
    with pytest.raises(
        ValueError, match=r"with ktype='D6_4ch', the model is a .* with ktype='D6_8ch'"
    ):
        fill_network(model, spec, "insects")


def test_commands(
    store: Path, images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    assert cli.main(["predict", f"{NETWORK}-insects", "a.png"]) == 0
    label = kconv.load(f"{NETWORK}-insects").predict(tmp_path / "a.png")
    assert capsys.readouterr().out.startswith(f"a.png: {label} ")
    assert cli.main(["models"]) == 0
    assert f"trained: {NETWORK}-insects" in capsys.readouterr().out
    before = sorted(store.rglob("*"))
    assert cli.main(["export", f"{NETWORK}-insects", "--format", "onnx"]) == 0
    assert (tmp_path / "model.onnx").is_file()
    assert sorted(store.rglob("*")) == before  # nothing is written into the package


def test_training_starts_from_a_name(store: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    config = training.Config(
        model=NETWORK,
        ktype=TINY["ktype"],
        model_options={name: value for name, value in TINY.items() if name != "ktype"},
        weights="insects",
        framework="torch",
        image_size=8,
        train_images=30,
        test_images=10,
        batch_size=12,
        epochs=1,
        dataset=str(_folder_of_images(tmp_path)),
    )
    training.train(config, tmp_path / "run", log=lines.append)
    assert "weights      insects, with a new classifier" in lines
    wrong = dataclasses.replace(config, weights="insect")
    with pytest.raises(FileNotFoundError, match="did you mean 'insects'"):
        training.train(wrong, tmp_path / "other", log=lines.append)


def _folder_of_images(folder: Path) -> Path:
    rng = np.random.default_rng(2)
    for part, count in (("train", 15), ("test", 5)):
        for name in ("one", "two"):
            (folder / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
                image.save(folder / "images" / part / name / f"{number}.png")
    return folder / "images"


@pytest.mark.slow
def test_a_run_becomes_a_network_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = training.Config(
        model=NETWORK,
        ktype=TINY["ktype"],
        model_options={name: value for name, value in TINY.items() if name != "ktype"},
        framework="torch",
        dataset=str(_folder_of_images(tmp_path)),
        image_size=8,
        batch_size=12,
        epochs=1,
        lr_schedule="constant",
    )
    training.train(config, tmp_path / "run", log=lambda line: None)
    tool = Path(__file__).parents[2] / "tools/publish_weights.py"
    name = f"{NETWORK}-insects"
    options = ["--dataset", "insects", "--machine", "a machine", "--into", str(tmp_path / "store")]
    options += ["--pictures", str(tmp_path / "pictures")]
    monkeypatch.setattr(sys, "argv", [str(tool), str(tmp_path / "run"), name, *options])
    runpy.run_path(str(tool), run_name="__main__")
    assert f"{name}: " in capsys.readouterr().out
    assert (tmp_path / "pictures" / f"{name}.png").is_file()
    monkeypatch.setenv("KCONV_WEIGHTS", str(tmp_path / "store"))
    published, run = kconv.load(name), kconv.load(tmp_path / "run")
    images = np.random.default_rng(3).integers(0, 256, (4, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(published(images), run(images), atol=5e-3)  # float16 kernels
    assert published.config.dataset == "insects"
    card = (tmp_path / "store" / name / "README.md").read_text()
    assert card.index("[start:card]") < card.index("| network |") < card.index("[end:card]")
    accuracy = published.config.metrics["test_accuracy"]
    assert f"| test accuracy | **{accuracy:.2%}** of 10 images |" in card
    assert "--ktype D6_4ch --dataset insects" in card
    assert "--model-option blocks=1" in card
    assert str(tmp_path) not in card


# What the package brings.

SHIPPED = sorted(path.parent.name for path in _published.FOLDER.glob("*/config.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_each_has_a_card_and_is_small(name: str) -> None:
    folder = _published.FOLDER / name
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    config = read_config(folder)
    ktype = getattr(config.network, "ktype", "").partition("_")[0].lower()
    assert name in (f"{config.name}-{config.dataset}", f"{config.name}-{config.dataset}_{ktype}")
    card = (folder / "README.md").read_text()
    assert f"**{config.metrics['test_accuracy']:.2%}**" in card
    assert (Path(__file__).parents[2] / f"docs/weights/{name}.png").is_file()


@pytest.mark.parametrize("name", SHIPPED)
def test_each_knows_its_classes(name: str) -> None:
    """As well as its card says, on the images in the package, where they are of its kind."""
    from kconv import datasets

    config = read_config(_published.FOLDER / name)
    if config.dataset != "fashion_mnist":
        pytest.skip("the package has no images of its data set")
    net = kconv.load(name)
    data = datasets.load("fashion_mnist_mini", image_size=config.image.height, train_images=10)
    accuracy = (net(data.x_test).argmax(1) == data.y_test).mean()
    assert accuracy > config.metrics["test_accuracy"] - 0.03
