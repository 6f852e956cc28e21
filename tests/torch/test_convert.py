"""kconv put into models made of PyTorch's layers, and taken out again."""

from __future__ import annotations

import copy

import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import nn

from kconv.models import create
from kconv.torch import (
    AcceleratedConv2d,
    DepthwiseConv2d,
    KPointwiseConv2d,
    PointwiseConv2d,
    accelerate,
    build,
    compress,
    report,
    restore,
    to_native,
)


class Bottleneck(nn.Module):
    """A residual block whose last activation follows the sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act1 = (
            nn.Conv2d(64, 32, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.SiLU(),
        )
        self.conv2 = nn.Conv2d(32, 32, 3, 2, 1, groups=32)
        self.bn2, self.act2 = nn.BatchNorm2d(32), nn.SiLU()
        self.conv3, self.bn3 = nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64, eps=1e-4)
        self.down = nn.Sequential(nn.Conv2d(64, 64, 1, 2), nn.BatchNorm2d(64))
        self.act3 = nn.SiLU()

    def forward(self, x):
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        return self.act3(self.bn3(self.conv3(y)) + self.down(x))


class Shape(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + x.shape[2]


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 64, 3), Bottleneck(), nn.Conv2d(64, 8, 1), Shape(8, 8, 1)
    return nn.Sequential(*layers).eval()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_accelerate_and_restore(model):
    x = torch.randn(2, 3, 12, 12)
    y, before = model(x), dict(model.named_parameters())
    classes = [type(module) for module in model.modules()]
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    assert accelerate(model) is model
    changed = report(model).changed
    assert list(changed) == ["1.conv1", "1.conv2", "1.conv3", "2"]
    assert set(changed.values()) == {"AcceleratedConv2d"}
    kept = report(model).kept
    assert list(kept) == ["0", "1.down.0", "3"]
    assert "stride=(2, 2)" in kept["1.down.0"]
    assert "Shape" in kept["3"]
    assert type(model[1].conv1) is type(model[1].conv2) is AcceleratedConv2d
    assert type(model[1].down[0]) is nn.Conv2d  # stride 2
    assert type(model[3]) is Shape
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    torch.testing.assert_close(model(x), y)
    assert report(accelerate(model)).changed == {}
    for moved in copy.deepcopy(model), to_native(model):
        torch.testing.assert_close(moved(x), y)
    assert restore(model) is model
    assert report(model).changed.keys() == changed.keys()
    assert report(restore(model)).changed == {}
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(x), y)
    assert calls


def test_accelerate_keeps_training_on_course(model):
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, other)]
    accelerate(model)
    x = torch.randn(4, 3, 12, 12)
    for _ in range(3):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_restore_leaves_kconv_layers_alone():
    layer = PointwiseConv2d(4, 4)
    assert report(restore(nn.Sequential(layer))).changed == {}
    assert type(layer) is PointwiseConv2d


def test_compress(model, tmp_path):
    before = parameters(model)
    assert compress(model.train(), "D6_16ch") is model
    assert parameters(model) < before
    block = model[1]
    assert isinstance(block.conv1, KPointwiseConv2d)
    assert isinstance(block.bn1, nn.Identity)
    assert isinstance(block.conv1.k_bn, nn.BatchNorm2d)
    assert isinstance(block.conv1.k_group_interconn, nn.SiLU)
    assert block.conv3.k_bn.eps == 1e-4
    assert isinstance(block.act3, nn.SiLU)  # it follows the sum, not the convolution
    assert isinstance(block.down[1], nn.Identity)
    x = torch.randn(2, 3, 12, 12)
    y = model(x)
    assert y.shape == (2, 8, 5, 5)
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.save(model.state_dict(), tmp_path / "compressed.pt")
    state = torch.load(tmp_path / "compressed.pt", weights_only=True)
    fresh = nn.Sequential(nn.Conv2d(3, 64, 3), Bottleneck(), nn.Conv2d(64, 8, 1), Shape(8, 8, 1))
    compress(fresh, "D6_16ch").load_state_dict(state)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_compress_keeps_what_is_shared_or_small():
    relu, conv = nn.ReLU(), nn.Conv2d(64, 64, 1)
    model = nn.Sequential(conv, relu, conv, nn.Conv2d(64, 32, 1), relu, nn.Conv2d(32, 8, 1))
    weights = model[5].weight
    compress(model, "D6_32ch")
    assert model[0] is model[2] is conv  # called twice
    assert isinstance(model[3], KPointwiseConv2d)
    assert model[1] is model[4] is relu
    assert not any(isinstance(m, nn.ReLU) for m in model[3].modules())
    assert model[5].weight is weights  # too few channels for groups of 32
    assert isinstance(compress(nn.Conv2d(64, 64, 1)), KPointwiseConv2d)


@pytest.mark.parametrize("ktype", ["D6v3_4ch", "kT3_16ch", "D10", "D8"])
def test_compress_by_other_ktypes(model, ktype):
    compress(model, ktype)
    assert model(torch.randn(1, 3, 12, 12)).shape == (1, 8, 5, 5)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


def test_compress_bad_input(model):
    with pytest.raises(ValueError, match="cannot trace this Untraceable"):
        compress(Untraceable())
    with pytest.raises(ValueError, match="D7"):
        compress(model, "D7")


def test_to_native():
    model = build(create("keffnet_s", ktype="D6v3_16ch", classes=5, input_shape=(32, 32, 3))).eval()
    native = to_native(model)
    kconv = {type(m) for m in native.modules()} & {PointwiseConv2d, DepthwiseConv2d}
    assert not kconv
    assert {type(m) for m in model.modules()} >= {PointwiseConv2d, DepthwiseConv2d}
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(native(x), model(x), rtol=1e-5, atol=1e-5)
    assert native.state_dict().keys() == model.state_dict().keys()
    shared = PointwiseConv2d(4, 4)
    twice = to_native(nn.Sequential(shared, shared))
    assert twice[0] is twice[1]


def test_to_native_exports_to_onnx(tmp_path):
    model = nn.Sequential(
        PointwiseConv2d(6, 12, groups=3, interleave=4),
        DepthwiseConv2d(12, 12, 3, stride=2, padding=((0, 1), (0, 1))),
        KPointwiseConv2d(12, 8, "D6v3_4ch", activation="swish"),
    ).eval()
    x = torch.randn(2, 6, 10, 8)
    torch.onnx.export(to_native(model), (x,), tmp_path / "model.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "name", "before", "after"),
    [
        (timm.create_model, "tf_efficientnet_lite0", 4_652_008, 1_722_568),
        (timm.create_model, "efficientnet_b0", 5_288_548, 1_907_892),
        (timm.create_model, "mobilenetv3_large_100", 5_483_032, 1_669_192),
        (timm.create_model, "resnet50", 25_557_032, 13_819_304),
        (torchvision.models.get_model, "mobilenet_v2", 3_504_872, 1_559_776),
    ],
)
def test_published_models(make, name, before, after, tmp_path):
    """With the numbers of parameters to be trained, for 1,000 classes."""
    torch.manual_seed(0)
    model = make(name).eval()
    x = torch.randn(2, 3, 64, 64)
    y = model(x)
    assert len(report(accelerate(model)).changed) > 30
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4 * y.abs().max().item())
    restore(model)
    assert parameters(model) == before
    compress(model.train())
    assert parameters(model) == after
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.save(model.state_dict(), tmp_path / "compressed.pt")
    other = compress(make(name))
    other.load_state_dict(torch.load(tmp_path / "compressed.pt", weights_only=True))
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_compressed_blocks_keep_the_epsilon_of_the_batch_norm():
    model = nn.Sequential(nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64, eps=0.5), nn.ReLU())
    compress(model, "D6_16ch").eval()
    x = torch.randn(2, 64, 5, 5)
    torch.testing.assert_close(model(x), to_native(model)(x), rtol=1e-4, atol=1e-5)
