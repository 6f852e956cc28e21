"""Networks by name, timm's registry, and what a block says of itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import kconv
import kconv.torch
from kconv import models


def test_arguments_reach_the_spec() -> None:
    model = kconv.torch.create_model(
        "keffnet_s", ktype="D6_32ch", num_classes=7, in_chans=2, image_size=(9, 8), width=0.5
    )
    spec = models.create("keffnet_s", ktype="D6_32ch", classes=7, input_shape=(9, 8, 2), width=0.5)
    expected = kconv.torch.build(spec).state_dict()
    found = model.state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    assert model.eval()(torch.ones(1, 2, 9, 8)).shape == (1, 7)
    assert kconv.list_models() == models.list_models()


def test_weights_of_a_run_bring_its_options(tmp_path: Path) -> None:
    source = kconv.torch.create_model("keffnet_s", num_classes=3, image_size=8, ktype="D6_4ch")
    kconv.save_weights(source, path := tmp_path / "model.safetensors")
    from kconv._model_folder import ImageInput, ModelConfig, write_config

    spec = models.create("keffnet_s", classes=3, input_shape=(8, 8, 3), ktype="D6_4ch")
    image = ImageInput(height=8, width=8, channels=3)
    write_config(tmp_path, ModelConfig(network=spec, class_names=("a", "b", "c"), image=image))
    x = torch.randn(2, 3, 8, 8)
    same = kconv.torch.create_model("keffnet_s", weights=tmp_path)
    torch.testing.assert_close(same.eval()(x), source.eval()(x))
    other = kconv.torch.create_model("keffnet_s", weights=tmp_path, num_classes=5)
    assert other(x).shape == (2, 5)
    np.testing.assert_array_equal(
        other.k_stem_conv.weight.detach(), source.k_stem_conv.weight.detach()
    )
    file = kconv.torch.create_model(
        "keffnet_s", weights=path, num_classes=3, image_size=8, ktype="D6_4ch"
    )
    torch.testing.assert_close(file.eval()(x), source(x))
    with pytest.raises(
        ValueError, match=r"with width=1\.0, the model is a keffnet_s with width=2\.0"
    ):
        kconv.torch.create_model("keffnet_s", weights=tmp_path, width=2.0)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("kefnet_b0", {}, ValueError, "did you mean 'keffnet_b0'"),
        ("keffnet_s", {"num_class": 3}, TypeError, "keffnet_s has no option 'num_class'"),
        ("mobilenet", {"ktype": "D6_4ch"}, TypeError, "mobilenet has no option 'ktype'"),
        ("keffnet_s", {"num_classes": 0}, ValueError, "classes=0 is below 1"),
        ("keffnet_s", {"num_classes": 3, "classes": 5}, TypeError, "classes=5 and num_classes=3"),
        ("keffnet_s", {"image_size": 9, "input_shape": (8, 8, 3)}, TypeError, "and image_size=9"),
        ("keffnet_s", {"weights": True}, TypeError, "True is neither a path nor the name"),
    ],
)
def test_wrong_arguments_are_named(
    name: str, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kconv.torch.create_model(name, **options)


def test_build_of_a_name_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"kconv\.torch\.create_model\('keffnet_b0'\) builds"):
        kconv.torch.build("keffnet_b0")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"spec is a int, expected what kconv\.models\.create"):
        kconv.torch.build(3)  # type: ignore[arg-type]


def test_timm_knows_the_names() -> None:
    timm = pytest.importorskip("timm")
    names = kconv.torch.register_timm()
    assert set(timm.list_models("kconv_*")) == set(names)
    assert kconv.torch.register_timm() == names  # again
    model = timm.create_model("kconv_keffnet_s", num_classes=4, in_chans=1, img_size=8)
    assert model.eval()(torch.ones(2, 1, 8, 8)).shape == (2, 4)
    with pytest.raises(ValueError, match="timm has no weights of kconv_keffnet_s"):
        timm.create_model("kconv_keffnet_s", pretrained=True)


def test_blocks_tell_their_arguments_in_a_line() -> None:
    blocks = [
        kconv.torch.MBConv(16, 24, 5, 2, ktype=5),
        kconv.torch.KPointwiseConv2d(16, 24, "D6_16ch"),
        kconv.torch.ConvUnit(16, 24, stride=2),
    ]
    assert list(map(repr, blocks)) == [
        "MBConv(16, 24, kernel_size=5, stride=2, expand_ratio=6, se_ratio=0.25, ktype='D10')",
        "KPointwiseConv2d(16, 24, ktype='D6_16ch', activation=None)",
        "ConvUnit(16, 24, kernel_size=1, stride=2, groups=1, activation='swish', interleave=1, "
        "residual=False)",
    ]


def test_the_package_lists_its_own_names() -> None:
    names = dir(kconv)
    assert not any(name.startswith("_") and name != "__version__" for name in names)
    assert {"load", "list_models", "export", "runtime"} <= set(names)
    for name in set(names) - {"cai", "jax", "keras", "tensorflow"}:
        assert getattr(kconv, name) is not None
