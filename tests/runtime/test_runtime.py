"""Networks on NumPy alone: their results, files that lie, threads and forks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

import kconv
import kconv.torch
from kconv import models
from kconv.runtime import FrozenNetwork

NAMES = ("ant", "bee", "cat")


def network(name: str = "keffnet_s", **options: Any) -> torch.nn.Module:
    """A network in evaluation mode, whose batch norms do something."""
    torch.manual_seed(0)
    options = {"classes": 3, "input_shape": (16, 13, 3), **options}
    model = kconv.torch.build(models.create(name, **options), kernels="torch")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def net() -> FrozenNetwork:
    return kconv.torch.freeze(network(), class_names=NAMES, image_size=(16, 13))


@pytest.fixture(scope="module")
def run(net: FrozenNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    net.save(folder := tmp_path_factory.mktemp("saved") / "new" / "folder")
    return folder


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


# Results


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("keffnet_s", {}, 2),
        ("kmobilenet_v3_small", {"ktype": "D6v3_4ch"}, 2),
        ("kdensenet_bc_l100", {"blocks": 1, "growth_rate": 5}, 2),
        ("inception_v3", {"input_shape": (75, 77, 3)}, 2),
        ("keffnet_s", {"include_top": False, "pooling": "max", "activation": "hard_swish"}, 2),
        ("keffnet_s", {"include_top": False, "pooling": None}, 1),
    ],
)
def test_computes_what_pytorch_does(name: str, options: dict[str, Any], steps: int) -> None:
    model = network(name, **options)
    frozen = kconv.torch.freeze(model)
    height, width = options.get("input_shape", (16, 13))[:2]
    x = images(3, height, width, 3)
    with torch.no_grad():
        expected = model(torch.tensor(x).permute(0, 3, 1, 2))
    if options.get("include_top", True):
        expected = expected.softmax(1)
    elif expected.dim() == 4:
        expected = expected.permute(0, 2, 3, 1)
    assert len(frozen._steps) == steps
    y = frozen(x)
    assert y.dtype == np.float32
    scale = float(expected.abs().max())
    np.testing.assert_allclose(y, expected.numpy(), atol=1e-5 * scale)
    nchw = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    z = frozen(nchw, layout="NCHW")
    np.testing.assert_allclose(z.transpose(0, 2, 3, 1) if z.ndim == 4 else z, y, atol=1e-6 * scale)
    assert frozen(x[:0]).shape == (0, *y.shape[1:])


def test_bytes_are_scaled_as_in_training(net: FrozenNetwork) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (4, 16, 13, 3), np.uint8)
    expected = net(pixels.astype(np.float64) / 64 - 2)
    np.testing.assert_array_equal(net(pixels), expected)
    other = kconv.torch.freeze(network(), scale=(1, 2, 3), offset=(0.5, 0, -1))
    np.testing.assert_allclose(
        other(pixels), net(pixels.astype(np.float32) * (1, 2, 3) + (0.5, 0, -1)), atol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": "abc"}, "class_names='abc', expected a text for each output"),
        ({"class_names": [1, 2, 3]}, "expected a text for each output"),
        ({"image_size": (16,)}, "expected pixels, or a height and a width"),
        ({"scale": None}, "scale=None, expected a number, or one for each channel"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        kconv.torch.freeze(network(), **options)


def test_scales_may_be_arrays() -> None:
    scale = 1 / np.array([50.0, 60.0, 70.0])
    net = kconv.torch.freeze(network(), scale=scale, offset=np.float32(0.5))
    x = np.full((1, 16, 13, 3), 100, np.uint8)
    np.testing.assert_allclose(net(x), net((x * scale + 0.5).astype(np.float32)), rtol=1e-6)


def test_weights_are_copied() -> None:
    model = network()
    frozen = kconv.torch.freeze(model)
    before = frozen(images(1, 16, 13, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(frozen(images(1, 16, 13, 3)), before)


def test_without_softmax_come_the_logits() -> None:
    model = network()
    x = images(2, 16, 13, 3)
    with torch.no_grad():
        expected = model(torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    frozen = kconv.torch.freeze(model, softmax=False)
    np.testing.assert_allclose(frozen(x), expected, atol=1e-5)
    assert not frozen.gives_probabilities
    with pytest.raises(ValueError, match="ends in no softmax, so that it gives no probabilities"):
        frozen.predict("a.png", top=2)
    assert kconv.torch.freeze(model).gives_probabilities


def test_few_of_many_sizes_are_kept() -> None:
    """Each has packed weights of its own."""
    frozen = kconv.torch.freeze(network())
    first = frozen(images(1, 16, 13, 3))
    for width in range(14, 30):
        frozen(images(1, 16, width, 3))
    kept = [len(getattr(step._function, "_programs", ())) for step in frozen._steps]
    assert max(kept) == 8, kept
    np.testing.assert_array_equal(frozen(images(1, 16, 13, 3)), first)


def test_what_cannot_be_frozen_is_named() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"model is a Linear, expected a kconv\.torch\.Network"):
        kconv.torch.freeze(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="2 class_names, and 3 outputs"):
        kconv.torch.freeze(model, class_names=["a", "b"])
    with pytest.raises(ValueError, match="interpolation='cubic'"):
        kconv.torch.freeze(model, interpolation="cubic")
    with pytest.raises(ValueError, match=r"scale=.*not one number for each"):
        kconv.torch.freeze(model, scale=(1, 2))
    hook = model.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="keffnet_s cannot be frozen: it has hooks"):
        kconv.torch.freeze(model)
    hook.remove()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="cannot be frozen: it has a forward of its own"):
        kconv.torch.freeze(model)
    del model.forward
    model.__class__ = type("Other", (type(model),), {"forward": lambda self, x: x})
    with pytest.raises(ValueError, match="cannot be frozen: its class has a forward of its own"):
        kconv.torch.freeze(model)
    model.__class__ = kconv.torch.Network
    model.k_probs.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="module 'k_probs', a Linear, cannot be frozen"):
        kconv.torch.freeze(model)
    model.k_probs = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match="module 'k_probs', a Bilinear, cannot be frozen"):
        kconv.torch.freeze(model)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 16, 13, 1), {}, r"shape \(1, 16, 13, 1\), expected \(N, H, W, 3\) in NHWC"),
        ((1, 16, 13, 3), {"layout": "NCHW"}, r"expected \(N, 3, H, W\) in NCHW"),
        ((16, 13, 3), {}, "have shape"),
        ((1, 16, 13, 3), {"layout": "HWC"}, "layout='HWC', expected 'NHWC' or 'NCHW'"),
        ((1, 0, 13, 3), {}, "images of 0x13 pixels leave"),
    ],
)
def test_bad_images_are_named(
    net: FrozenNetwork, shape: tuple[int, ...], options: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        net(images(*shape), **options)


def test_images_of_other_types_are_refused(net: FrozenNetwork) -> None:
    with pytest.raises(TypeError, match="images are int64, expected uint8 or floats"):
        net(np.zeros((1, 16, 13, 3), np.int64))
    with pytest.raises(TypeError, match="images are a list"):
        net([[1]])  # type: ignore[arg-type]


# Image files


def test_labels_of_files(net: FrozenNetwork, tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (20, 17, 3), np.uint8)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        Image.fromarray(pixels).save(path)
        pixels = pixels[::-1]
    resized = np.asarray(Image.open(paths[0]).resize((13, 16), Image.Resampling.BILINEAR))
    expected = net(resized[None])[0]
    ranked = net.predict(paths[0], top=2)
    assert [label for label, _ in ranked] == [NAMES[i] for i in np.argsort(-expected)[:2]]
    assert ranked[0][1] == pytest.approx(expected.max(), abs=1e-6)
    assert net.predict(str(paths[0])) == ranked[0][0]
    assert net.predict(paths)[0] == ranked[0][0]
    assert len(net.predict(paths, top=5)[2]) == 3
    assert net.predict([]) == []
    with pytest.raises(ValueError, match="top=0 must be at least 1"):
        net.predict(paths[0], top=0)
    with pytest.raises(TypeError, match="path is a ndarray, expected image files"):
        net.predict(np.zeros((2, 8, 8, 3), np.uint8))


def test_grey_networks_read_colours_as_grey(tmp_path: Path) -> None:
    frozen = kconv.torch.freeze(network(input_shape=(8, 8, 1)), image_size=8)
    Image.new("RGB", (8, 8), (200, 10, 30)).save(tmp_path / "a.png")
    grey = np.asarray(Image.open(tmp_path / "a.png").convert("L"))[None, :, :, None]
    ((_, probability),) = frozen.predict(tmp_path / "a.png", top=1)
    assert probability == pytest.approx(frozen(grey).max(), abs=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text", "is not a readable image: it is none of"),
        (b"", "is not a readable image"),
        (None, "has 1x1 pixels, too few"),
    ],
)
def test_unreadable_files_are_named(
    net: FrozenNetwork, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "a.png"
    if content is None:
        Image.new("RGB", (1, 1)).save(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.png {message}"):
        net.predict(path)
    with pytest.raises(FileNotFoundError):
        net.predict(tmp_path / "b.png")


# Folders


def test_saved_network_computes_the_same(net: FrozenNetwork, run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {"config.json", "model.safetensors"}
    again = kconv.load(run)
    x = images(2, 16, 13, 3)
    np.testing.assert_array_equal(again(x), net(x))
    assert again.class_names == NAMES
    assert repr(again) == "FrozenNetwork(keffnet_s, 3 classes, 16x13x3)"
    with kconv_threads():
        np.testing.assert_array_equal(kconv.load(run, threads=1)(x), net(x))
        assert kconv.get_num_threads() == 1
    with pytest.raises(ValueError, match="dtype='bfloat16'"):
        kconv.load(run, dtype="bfloat16")
    with pytest.raises(ValueError, match="0"):
        kconv.load(run, threads=0)


class kconv_threads:  # noqa: N801
    def __enter__(self) -> None:
        self.before = kconv.get_num_threads()

    def __exit__(self, *_: object) -> None:
        kconv.set_num_threads(self.before)


def test_weights_have_pytorchs_names_and_layouts(run: Path) -> None:
    """So the file loads into PyTorch's own layers."""
    state = load_file(run / "model.safetensors")
    model = network()
    expected = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value.numpy(), err_msg=name)
    report = kconv.load_weights(model, run)
    assert report.count == len(state)


def test_narrower_weights_are_read(run: Path, tmp_path: Path, net: FrozenNetwork) -> None:
    state = {k: v.astype(np.float16) for k, v in load_file(run / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    x = images(1, 16, 13, 3)
    np.testing.assert_allclose(kconv.load(tmp_path)(x), net(x), atol=1e-2)


def changed(**entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: {**config, **entries}


def with_layer(number: int, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    def change(config: dict[str, Any]) -> Any:
        config["graph"]["layers"][number].update(fields)
        return config

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(model_type="bert"), '"model_type": "kconv"'),
        (lambda config: [config], '"model_type": "kconv"'),
        (changed(label_names=["a"]), "1 label_names, the network has 3 outputs"),
        (changed(label_names=[1, 2, 3]), "label_names are no list of texts"),
        (changed(num_classes=2), "its num_classes is 2, the network has 3 outputs"),
        (changed(metrics={"a": "b"}), "metrics are no numbers"),
        (changed(image={}), "its image has not exactly"),
        (changed(graph=None), "the graph has no list of layers"),
        (changed(spec={}), "both a spec and a graph"),
        (with_layer(1, type="Exec"), "a 'Exec', which is unknown"),
        (with_layer(1, inputs=["k_probs"]), "reads 'k_probs', no layer before it"),
        (with_layer(1, shape=[-1, 2, 3]), "which it cannot be"),
        (with_layer(1, shape=[2**40, 2, 3]), "which it cannot be"),
        (with_layer(2, name="input"), "two layers 'input'"),
        (with_layer(1, shape=[]), "which it cannot be"),
        (with_layer(2, strides=[0, 1]), "strides is (0, 1), which it cannot be"),
        (with_layer(1, colour="red"), "has an unknown 'colour'"),
        (with_layer(0, inputs=["x"]), "reads 'x', no layer before it"),
        (with_layer(0, shape=[16, 13, 4]), "its images have 3 channels, the network reads 4"),
    ],
)
def test_configurations_are_checked(
    run: Path, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    config = change(json.loads((run / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json is not a configuration.*") as caught:
        kconv.load(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("depth", 1e9), ("width", float("inf")), ("classes", 2**40), ("nonsense", 1), ("dropout", {})],
)
def test_specs_are_checked(tmp_path: Path, run: Path, option: str, value: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    del config["graph"]
    config["architecture"], config["spec"] = "keffnet_s", {"classes": 3, option: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json is not a configuration"):
        kconv.load(tmp_path)


def test_weights_of_another_model_are_refused(run: Path, tmp_path: Path) -> None:
    other = kconv.torch.freeze(network(width=0.5), class_names=NAMES)
    other.save(tmp_path)
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged, or another model's: its"):
        kconv.load(tmp_path)
    whole = (run / "model.safetensors").read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"text", whole + b"x", b"\xff" * 100):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged, or another model's"):
            kconv.load(tmp_path)
    state = load_file(run / "model.safetensors")
    for change in ({"extra": np.zeros(1, np.float32)}, {"k_probs.bias": np.zeros(3, np.int32)}):
        save_file({**state, **change}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"extra|k_probs|integer"):
            kconv.load(tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        kconv.load(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"is no run, as it has no config\.json"):
        kconv.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is no folder of a run, but a file"):
        kconv.load(tmp_path / "file")


# Processes


def test_threads_get_the_same_results(net: FrozenNetwork) -> None:
    batches = [images(n, 16, 13, 3)[::-1].copy() for n in (1, 2, 3, 5)]
    expected = [net(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for number, y in enumerate(pool.map(net, batches * 16)):
            np.testing.assert_array_equal(y, expected[number % len(batches)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_children_of_forks_compute(run: Path) -> None:
    script = f"""
import os, threading, numpy as np, kconv
net = kconv.load({str(run)!r})
x = np.random.default_rng(0).standard_normal((2, 16, 13, 3), np.float32)
expected = net(x)
stop = threading.Event()
thread = threading.Thread(target=lambda: [net(x) for _ in iter(stop.is_set, True)])
thread.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(net(x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_needs_numpy_alone(run: Path) -> None:
    """In a process that imports nothing else; kconv adds little to NumPy's own 0.1 s."""
    script = f"""
import sys, time, numpy as np
start = time.process_time()
import kconv
seconds = time.process_time() - start
net = kconv.load({str(run)!r})
net(np.zeros((1, 16, 13, 3), np.uint8))
loaded = {{"torch", "keras", "jax", "tensorflow", "PIL", "h5py", "safetensors"}} & set(sys.modules)
assert not loaded, loaded
assert seconds < 0.05, seconds
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_keras_and_pytorch_freeze_to_the_same() -> None:
    keras = pytest.importorskip("keras")
    import kconv.keras

    spec = models.create("keffnet_s", classes=3, input_shape=(16, 13, 3))
    model = kconv.keras.build(spec)
    frozen = kconv.keras.freeze(model, class_names=NAMES)
    x = images(2, 16, 13, 3)
    expected = keras.ops.convert_to_numpy(model(x, training=False))
    np.testing.assert_allclose(frozen(x), expected, atol=1e-5)
    assert (frozen.config.image.height, frozen.config.image.width) == (16, 13)

    inputs = keras.Input((9, 9, 4))
    y = keras.layers.Conv2D(6, 3, padding="same", activation=None)(inputs)
    y = keras.layers.MaxPooling2D(3, 2, "same")(keras.layers.ReLU()(y))
    y = keras.layers.AveragePooling2D(2, 1, "same")(y)
    y = keras.layers.GaussianNoise(1.0)(keras.layers.SpatialDropout2D(0.5)(y))
    y = keras.layers.Dropout(0.5)(keras.layers.GlobalMaxPooling2D()(y))
    own = keras.Model(inputs, keras.layers.Dense(5, use_bias=False)(y))
    x = images(2, 9, 9, 4)
    expected = keras.ops.convert_to_numpy(own(x, training=False))
    np.testing.assert_allclose(kconv.keras.freeze(own)(x), expected, atol=1e-5)
    other = keras.Model(inputs, keras.layers.LayerNormalization(name="norm")(inputs))
    with pytest.raises(ValueError, match="layer 'norm', a LayerNormalization, cannot be frozen"):
        kconv.keras.freeze(other)
    with pytest.raises(TypeError, match="expected a functional"):
        kconv.keras.freeze(keras.layers.Dense(3))


# Models that were fused


class Gate(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = torch.nn.Linear(channels, 3), torch.nn.Linear(3, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.expand(torch.relu(self.reduce(x.mean((2, 3)))))
        return x * torch.sigmoid(y)[:, :, None, None]


class Mobile(torch.nn.Module):
    """A small network as its users write one."""

    def __init__(self, tail: torch.nn.Module) -> None:
        super().__init__()
        nn = torch.nn
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU6(inplace=True),
            nn.Dropout2d(0.5),
        )
        self.depthwise, self.norm = nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.BatchNorm2d(6)
        self.gate, self.project = Gate(6), nn.Conv2d(6, 6, 1)
        self.drop, self.tail = nn.Dropout(0.5), tail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.project(self.gate(torch.nn.functional.silu(self.norm(self.depthwise(x)))))
        x = torch.nn.functional.adaptive_avg_pool2d(x, 1)
        return self.tail(self.drop(torch.flatten(x, 1)))


class Head(torch.nn.Linear):
    """Hands its parameters to a function, as timm's networks do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


def mobile(tail: torch.nn.Module) -> torch.nn.Module:
    """Fused, with norms that do something."""
    torch.manual_seed(0)
    model = Mobile(tail)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return kconv.torch.fuse(model)


@pytest.mark.parametrize("tail", ["classifier", "function", "probabilities", "each", "features"])
def test_a_fused_model_of_pytorchs(tail: str, tmp_path: Path) -> None:
    """In training mode and its own class it stays; a softmax follows a classifier only."""
    classifier = torch.nn.Linear(6, 3)
    model = mobile(
        {
            "classifier": classifier,
            "function": Head(6, 3),
            "probabilities": torch.nn.Sequential(classifier, torch.nn.Softmax(1)),
            "each": torch.nn.Sequential(classifier, torch.nn.Sigmoid()),
            "features": torch.nn.Identity(),
        }[tail]
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = kconv.torch.freeze(model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert len(kconv.torch.report(model).changed) == 1
    torch.testing.assert_close(model.state_dict(), before)
    x = images(3, 11, 14, 3)
    with torch.no_grad():
        expected = kconv.torch.restore(model).eval()(torch.tensor(x).permute(0, 3, 1, 2))
    if tail in ("classifier", "function"):
        expected = expected.softmax(1)
    np.testing.assert_allclose(frozen(x), expected.numpy(), atol=1e-6)
    frozen.save(tmp_path)
    np.testing.assert_array_equal(kconv.load(tmp_path)(x), frozen(x))


def test_maps_have_the_layout_of_the_images() -> None:
    model = kconv.torch.fuse(mobile(torch.nn.Linear(6, 3)).stem)
    x = torch.rand(2, 3, 7, 9)
    with torch.no_grad():
        expected = model.eval()(x)
    y = kconv.torch.freeze(model)(x.numpy(), layout="NCHW")
    np.testing.assert_allclose(y, expected.numpy(), atol=1e-6)


class Sum(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mobile(torch.nn.Linear(6, 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.body(y)


class Undecided(Sum):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) if x.sum() > 0 else x


def test_fused_models_that_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match="module 'tail', a LayerNorm, cannot be frozen as it is"):
        kconv.torch.freeze(mobile(torch.nn.LayerNorm(6)))
    for module, message in (
        (Sum(), "the Sum cannot be frozen: expected one tensor in, and one out"),
        (Undecided(), "the Undecided cannot be frozen: its forward cannot be traced"),
    ):
        with pytest.raises(ValueError, match=message):
            kconv.torch.freeze(kconv.torch.fuse(module))
    hooked = mobile(torch.nn.Linear(6, 3))
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="the Mobile cannot be frozen: it has hooks"):
        kconv.torch.freeze(hooked)
    restored = kconv.torch.restore(mobile(torch.nn.Linear(6, 3)))
    with pytest.raises(TypeError, match=r"a Mobile, expected .* that kconv\.torch\.fuse was given"):
        kconv.torch.freeze(restored)


def test_a_fused_model_of_keras() -> None:
    keras = pytest.importorskip("keras")
    import kconv.keras

    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((9, 7, 3)),
            layers.Conv2D(6, 3, use_bias=False),
            layers.BatchNormalization(moving_mean_initializer="ones"),
            layers.ReLU(6.0),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    x = images(2, 9, 7, 3)
    expected = keras.ops.convert_to_numpy(model(x, training=False))
    frozen = kconv.keras.freeze(kconv.keras.fuse(model), class_names=NAMES)
    np.testing.assert_allclose(frozen(x), expected, atol=1e-6)
    assert (frozen.config.image.height, frozen.config.image.width) == (9, 7)
    model.layers[-1].quantize("int8")
    with pytest.raises(ValueError, match=r"layer 'dense\w*', a Dense, cannot be frozen as it is"):
        kconv.keras.freeze(model)
