"""Fused networks in bfloat16, by autocast and by the model's dtype, and those that compute anew."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kconv
import kconv.torch.fused
from kconv._kconv import FusedProgram
from kconv.models import create
from kconv.torch import MBConv, build, fuse

NETWORKS = [
    ("keffnet_b0", {"ktype": "D6_16ch", "skip_stride_cnt": 1}, 32),
    ("kmobilenet_v3_large", {"ktype": "D6_16ch", "alpha": 0.5}, 32),
    ("kdensenet_bc_l100", {"ktype": "D6_12ch", "blocks": 2}, 16),
]


PAIRS = kconv.build_info()["isa"] == "avx512_bf16"
"""Whether pointwise convolutions multiply bfloat16 numbers, as PyTorch's autocast does."""


def network(name, options, size, **how):
    torch.manual_seed(0)
    spec = create(name, classes=5, input_shape=(size, size, 3), dropout=0.0, **options)
    return build(spec, **how)


def images(count, size):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, generator=generator)


def gradients(model, x, autocast=False):
    """Loss and gradients of one step."""
    model.zero_grad()
    torch.manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(x).float(), torch.arange(len(x)) % 5)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def errors(found, expected):
    """Of each tensor, beside its largest magnitude; but for those that are mere rounding."""
    largest = max(grad.abs().max() for grad in expected.values())
    return {
        name: ((found[name].float() - grad).abs().max() / grad.abs().max()).item()
        for name, grad in expected.items()
        if grad.abs().max() > 1e-4 * largest
    }


@pytest.fixture
def counted(monkeypatch):
    """The dtypes of the images that programs run on."""
    dtypes = []
    original = kconv.torch.fused._Fused.forward

    def forward(ctx, x, *operands):
        dtypes.append(x.dtype)
        return original(ctx, x, *operands)

    monkeypatch.setattr(kconv.torch.fused._Fused, "forward", staticmethod(forward))
    return dtypes


@pytest.mark.parametrize(("name", "options", "size"), NETWORKS, ids=lambda value: str(value))
def test_autocast_trains_in_bfloat16(name, options, size, counted):
    model = network(name, options, size)
    x = images(16, size)
    loss, expected = gradients(model, x)
    layers = errors(
        gradients(network(name, options, size, fused=False), x, autocast=True)[1], expected
    )
    counted.clear()
    narrow, found = gradients(network(name, options, size), x, autocast=True)
    assert set(counted) == {torch.bfloat16}
    assert abs(narrow - loss) < 0.02 * loss
    assert all(grad.dtype is torch.float32 for grad in found.values())
    fused = errors(found, expected)
    assert sum(fused.values()) < (1.1 if PAIRS else 0.9) * sum(layers.values())


def test_gradients_of_a_block():
    """Where no depth multiplies them, the errors are those of the rounding: some 2^-9 (with pairs,
    that of weights and of what they are multiplied with too).

    (Gradients by a norm's parameters are sums that later norms make nearly 0.)
    """
    torch.manual_seed(0)
    block = MBConv(32, 32, ktype="D6_16ch")
    x = images(32 * 64, 8)[:, 0].reshape(64, 32, 8, 8)
    results = []
    for autocast in (False, True):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(x)
        (y.float() * images(32 * 64, 8)[:, 1].reshape(y.shape).clamp(min=0)).mean().backward()
        results.append({name: p.grad.clone() for name, p in block.named_parameters()})
    found = errors(results[1], results[0])
    assert max(found.values()) < 0.04
    limit = 1.5e-2 if PAIRS else 1e-2
    assert max(error for name, error in found.items() if "bn" not in name) < limit


def test_a_model_of_bfloat16(counted):
    """Parameters, gradients and moving statistics are of the model's dtype, as PyTorch's are."""
    model = network(*NETWORKS[0]).bfloat16()
    plain = copy.deepcopy(model)
    plain._fuses = False
    x = images(16, 32).bfloat16()
    exact = gradients(copy.deepcopy(model).float(), x.float())[1]
    counted.clear()
    found, layers = (errors(gradients(net, x)[1], exact) for net in (model, plain))
    assert set(counted) == {torch.bfloat16}
    assert sum(found.values()) < 0.9 * sum(layers.values())
    for name, value in plain.state_dict().items():
        moved = model.state_dict()[name]
        assert moved.dtype == value.dtype
        torch.testing.assert_close(moved, value, rtol=0.05, atol=0.05)
    with torch.inference_mode():
        y, expected = (net.eval()(x) for net in (model, plain))
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    # Norms may stay float32, as PyTorch allows; other parameters have to be the images' dtype.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    with torch.inference_mode():
        assert (model(x) - y).abs().max() < 0.05
        with pytest.raises(RuntimeError, match="type"):
            model.float()(x)


def test_inference_in_autocast():
    model = network(*NETWORKS[0]).eval()
    plain = copy.deepcopy(model)
    plain._fuses = False
    for x in (images(3, 32), images(1, 32), images(3, 32).to(memory_format=torch.channels_last)):
        with torch.no_grad():
            exact = model(x)
            with torch.autocast("cpu", torch.bfloat16):
                found, layers = model(x), plain(x)
        assert found.dtype is layers.dtype is torch.bfloat16
        assert (found - exact).abs().max() < max(
            (layers - exact).abs().max(), 0.02 * exact.abs().max()
        )


class Block(nn.Module):
    """Sums that keep an image's dtype and sums that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 16, 1, groups=2), nn.BatchNorm2d(16), nn.SiLU())
        self.last = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8))

    def forward(self, x):
        return F.relu(x + self.last(self.first(x)))


def test_models_of_users():
    torch.manual_seed(0)
    plain = nn.Sequential(Block(), nn.MaxPool2d(2), Block())
    model = fuse(copy.deepcopy(plain))
    x = torch.randn(4, 8, 9, 7, requires_grad=True)
    results = []
    for net, autocast in ((plain, False), (copy.deepcopy(plain), True), (model, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x)
        (grad,) = torch.autograd.grad(y.float().square().mean(), x)
        results.append((y, grad, dict(net.named_buffers())["0.first.1.running_var"]))
    # What is added to an image of float32 is float32, as PyTorch promotes it.
    assert [result.dtype for result in results[2]] == [result.dtype for result in results[1]]
    for exact, layers, found in zip(*results, strict=True):
        bound = max((layers - exact).norm(), 0.01 * exact.norm())
        assert (found - exact).norm() < 2 * bound


def test_float16_runs_layer_by_layer_and_says_so_once():
    model = network(*NETWORKS[0]).eval()
    kconv.torch.fused._say_that_layers_run.cache_clear()
    x = images(1, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        with pytest.warns(
            UserWarning, match=r"layer by layer under torch.autocast to torch.float16"
        ):
            assert model(x).dtype is torch.float16
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)


def test_gradients_of_gradients_in_autocast():
    model = network(*NETWORKS[2])
    x = images(4, 16).requires_grad_()
    results = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x).float()
        (grad,) = torch.autograd.grad(y.square().mean(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    assert (results[1] - results[0]).abs().max() < 0.2 * results[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_computed_anew_is_the_same(dtype):
    model, anew = (network(*NETWORKS[0], recompute=how).to(dtype) for how in (False, True))
    x = images(4, 32).to(dtype)
    results = [gradients(net, x) for net in (model, anew)]
    tolerance = 1e-9 if dtype is torch.float64 else 1e-3
    for name, grad in results[0][1].items():
        bound = tolerance * max(grad.abs().max().item(), 0.1)
        assert (results[1][1][name] - grad).abs().max() <= bound, name
    for name, value in model.state_dict().items():  # moved once
        torch.testing.assert_close(anew.state_dict()[name], value)
    kept = [
        sum(
            FusedProgram(part.segment.program((32, 32), "OI").integers).workspace
            for name, part in net._fused.items()
        )
        for net in (model, anew)
    ]
    assert kept[1] < 0.3 * kept[0]
    with pytest.raises(ValueError, match="recompute=True needs"):
        network(*NETWORKS[0], recompute=True, fused=False)
