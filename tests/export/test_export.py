"""Networks for other programs: each is run there, and its outputs compared with PyTorch's."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import kconv.torch
from kconv import export, models
from kconv.export import _onnx
from kconv.runtime import FrozenNetwork
from kconv.torch.native import make_native

NEEDS = {
    "openvino": "openvino",
    "mnn": "MNN",
    "keras": "keras",
    "ncnn": "ncnn",
    "litert": "litert_torch",
    "executorch": "executorch",
}


def branches(size: tuple[int, int]) -> models.Graph:
    """What Inception's blocks are made of, and what else other networks lack."""
    g = models.GraphBuilder("branches", (*size, 3))
    x = g.conv("a", g.input, 8, 3, 2, padding="valid", use_bias=True, activation="relu6")
    paths = [
        g.pool("max", x, "max", 3, 1, "same"),
        g.pool("mean", x, "avg", 3, 1, "same"),
        g.batch_norm("norm", g.conv("b", x, 4, (1, 3)), scale=False),
    ]
    x = g.concat("joined", paths)
    x = g.pool("smaller", x, "max", 3, 2)
    x = g.copy_channels("some", g.interleave("mixed", x, 3), 1, 17)
    x = g.activation("hard", g.fold_halves("folded", x), "hard_sigmoid")
    x = g.dense("probs", g.global_pool("top", x, "max"), 3)
    return g.build(x)


def pair(name: str, size: tuple[int, int] = (17, 14), **options: Any) -> tuple[Any, FrozenNetwork]:
    """A network of PyTorch's own layers, and the same frozen."""
    torch.manual_seed(0)
    if name == "branches":
        make_native(model := kconv.torch.Network(branches(size)))
    else:
        spec = models.create(name, classes=3, input_shape=(*size, 3), **options)
        model = kconv.torch.build(spec, kernels="torch")
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model, kconv.torch.freeze(model, image_size=size)


NETWORKS = {
    "kmobilenet_v3_small": {},
    "kdensenet_bc_l100": {"blocks": 1, "growth_rate": 5, "ktype": "D6_4ch"},
    "branches": {},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_of_several_networks(name: str, tmp_path: Path) -> None:
    model, net = pair(name, **NETWORKS[name])
    result = export.export(net, tmp_path / "a.onnx", "onnx")
    assert "N, 3," in result.inputs
    run, _ = _onnx.runner(net, tmp_path / "a.onnx")
    height, width = net.config.image.height, net.config.image.width
    x = np.random.default_rng(0).standard_normal((2, height, width, 3), np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(x).permute(0, 3, 1, 2)).softmax(1).numpy()
    np.testing.assert_allclose(run(x), expected, atol=1e-5)


def test_onnx_of_keffnet_is_small(tmp_path: Path) -> None:
    """Under 1,000 nodes, and in the words that the documentation has."""
    _, net = pair("keffnet_b0")
    content = _onnx.model_of(net)
    assert len(content.graph.node) < 500
    assert [entry.version for entry in content.opset_import] == [17]
    assert content.graph.input[0].name == "images"
    assert content.graph.output[0].name == "probabilities"
    dims = content.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["N", 3, 17, 14]
    onnx.checker.check_model(content, full_check=True)


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, marks=[pytest.mark.slow] * (form in ("litert", "executorch")))
        for form in export.FORMATS
        if form != "onnx"
    ],
)
def test_other_formats_compute_the_same(form: str, tmp_path: Path) -> None:
    if form in NEEDS:
        pytest.importorskip(NEEDS[form])
    name = "branches" if form in ("keras", "torch") else "keffnet_s"
    model, net = pair(name)
    path = tmp_path / export.default_name(form)
    result = export.export(net, path, form)
    assert float(re.findall(r"difference (\S+)", result.checked)[0]) < 1e-5
    assert result.path == path
    assert path.exists()
    x = np.random.default_rng(0).standard_normal((1, 17, 14, 3), np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(x).permute(0, 3, 1, 2)).softmax(1).numpy()
    module = sys.modules[f"kconv.export._{form}"]
    run, _ = module.runner(net, path)
    np.testing.assert_allclose(run(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, marks=[pytest.mark.slow] * (form in ("keras", "mnn")))
        for form in export.FORMATS
    ],
)
def test_networks_of_any_size(form: str, tmp_path: Path) -> None:
    """A target takes them at any size, or refuses them."""
    if form in NEEDS:
        pytest.importorskip(NEEDS[form])
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    net = kconv.torch.freeze(kconv.torch.fuse(model))
    path = tmp_path / export.default_name(form)
    if form in ("torch", "ncnn", "litert", "executorch"):
        with pytest.raises(ValueError, match="needs a network of one image size"):
            export.export(net, path, form)
        assert not list(tmp_path.iterdir())
        return
    export.export(net, path, form)
    run, _ = sys.modules[f"kconv.export._{form}"].runner(net, path)
    x = np.random.default_rng(0).standard_normal((2, 9, 14, 3), np.float32)
    y = run(x)
    np.testing.assert_allclose(y if form == "keras" else y.transpose(0, 2, 3, 1), net(x), atol=1e-5)


@pytest.mark.parametrize(
    ("pool", "activation"),
    [
        (nn.MaxPool2d(3, 2, 1), nn.LeakyReLU(0.3)),
        (nn.AvgPool2d((2, 3), (2, 1), (1, 1)), nn.ELU(0.4)),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.GELU()),
        (nn.MaxPool2d(3, 2, 0, 2), nn.Mish()),
        (nn.MaxPool2d((3, 2)), nn.Hardtanh(-0.2, 0.7)),
    ],
)
def test_layers_of_users_models(pool: nn.Module, activation: nn.Module, tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        activation,
        nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        pool,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()
    x = np.random.default_rng(0).standard_normal((2, 13, 11, 3), np.float32) * 3
    with torch.no_grad():
        expected = model(torch.tensor(x).permute(0, 3, 1, 2)).softmax(1).numpy()
    net = kconv.torch.freeze(kconv.torch.fuse(model), image_size=(13, 11))
    for form in ("onnx", "torch"):
        export.export(net, path := tmp_path / export.default_name(form), form)
        run, _ = sys.modules[f"kconv.export._{form}"].runner(net, path)
        np.testing.assert_allclose(run(x), expected, atol=1e-6)


def test_pools_that_targets_lack(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    net = kconv.torch.freeze(kconv.torch.fuse(model.eval()), image_size=(13, 11))
    for form, message in (("onnx", "ceil_mode=True has no node"), ("keras", "no pool with such")):
        pytest.importorskip(NEEDS.get(form, form))
        with pytest.raises(ValueError, match=message):
            export.export(net, tmp_path / export.default_name(form), form)
    assert not list(tmp_path.iterdir())


def test_interleaves_that_ncnn_lacks(tmp_path: Path) -> None:
    pytest.importorskip("ncnn")
    _, net = pair("branches")
    with pytest.raises(ValueError, match="the step divides, not 20 by 3"):
        export.export(net, tmp_path / "a.ncnn.param", "ncnn")
    assert not list(tmp_path.iterdir())


def test_wrong_outputs_are_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, net = pair("keffnet_s")
    monkeypatch.setattr(
        _onnx, "runner", lambda net, path: (lambda images: np.ones((len(images), 3)), "x")
    )
    with pytest.raises(ValueError, match=r"x computes something else: largest difference \d"):
        export.export(net, tmp_path / "a.onnx", "onnx")
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, net = pair("keffnet_s")
    with pytest.raises(ValueError, match=r"unknown format 'onx' \(did you mean 'onnx'\?\)"):
        export.export(net, tmp_path / "a.onnx", "onx")
    with pytest.raises(ValueError, match=r"does not end in \.pt2, as files of torch do"):
        export.export(net, tmp_path / "a.onnx", "torch")
    monkeypatch.setitem(sys.modules, "MNN", None)
    with pytest.raises(ImportError, match="exporting to MNN needs MNN, which is not installed"):
        export.export(net, tmp_path / "a.mnn", "mnn")
    assert not list(tmp_path.iterdir())
