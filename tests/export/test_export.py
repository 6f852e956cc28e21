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

import kconv.torch
from kconv import export, models
from kconv.export import _onnx
from kconv.runtime import FrozenNetwork
from kconv.torch.native import make_native

NEEDS = {"openvino": "openvino", "mnn": "MNN", "keras": "keras"}


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


@pytest.mark.parametrize("form", [form for form in export.FORMATS if form != "onnx"])
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
