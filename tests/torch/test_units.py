"""Convolution units and MBConv blocks beside the plain layers that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kconv.models import create
from kconv.torch import ConvUnit, KPointwiseConv2d, MBConv, build, to_native
from kconv.torch.layers import DropConnect

BLOCKS = [
    (ConvUnit, (12, 20), {}),
    (ConvUnit, (12, 12), {"groups": 3, "interleave": 5, "activation": "relu", "residual": True}),
    (ConvUnit, (12, 24), {"groups": 12, "kernel_size": 3, "stride": 2, "activation": None}),
    (ConvUnit, (12, 12), {"groups": 12, "kernel_size": 5, "activation": "hard_swish"}),
    (ConvUnit, (12, 8), {"kernel_size": 3, "stride": 2, "eps": 1e-5, "momentum": 0.1}),
    (ConvUnit, (12, 9), {"kernel_size": 4, "stride": 3}),  # layer by layer
    (MBConv, (12, 12), {"drop_connect": 0.5}),
    (MBConv, (12, 24), {"kernel_size": 5, "stride": 2, "ktype": "D6v3_4ch"}),
    (MBConv, (12, 12), {"expand_ratio": 1, "se_ratio": 0, "activation": "relu6"}),
    (MBConv, (12, 16), {"ktype": None, "expand_ratio": 2.5}),
    (KPointwiseConv2d, (96, 48), {"activation": "relu"}),
]


def outcome(block, x):
    """Output, gradients and state after a step, and inference."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # the same images dropped
    y = block.train()(x)
    (y * torch.arange(y.numel(), dtype=x.dtype).view_as(y).cos()).sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in block.parameters())]
    with torch.no_grad():
        return [y.detach(), block.eval()(x), *gradients, *block.state_dict().values()]


@pytest.mark.parametrize(("kind", "channels", "options"), BLOCKS)
@pytest.mark.parametrize("size", [(7, 10), (1, 3)], ids=str)
def test_fused_and_plain(kind, channels, options, size):
    torch.manual_seed(0)
    fused = kind(*channels, **options).double()
    plain = kind(*channels, fused=False, **options).double()
    assert fused._fused
    assert not plain._fused
    plain.load_state_dict(fused.state_dict())
    native = to_native(plain)
    x = torch.randn(4, channels[0], *size, dtype=torch.float64)
    ours = outcome(fused, x)
    stride = options.get("stride", 1)
    assert ours[0].shape == (4, channels[1], *(-(-n // stride) for n in size))
    for theirs in (outcome(plain, x), outcome(native, x)):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "channels", "options"), [BLOCKS[1], BLOCKS[4], BLOCKS[6], BLOCKS[10]]
)
def test_native_blocks_in_torchscript(kind, channels, options):
    torch.manual_seed(0)
    native = to_native(kind(*channels, **options))
    scripted = torch.jit.script(native)
    x = torch.randn(3, channels[0], 7, 10)
    for training in (True, False):  # the compiled one has a mode of its own
        torch.manual_seed(1)
        y = scripted.train(training)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(y, native.train(training)(x))


def test_unit_of_plain_modules():
    """An independent computation of the whole unit."""
    torch.manual_seed(0)
    unit = ConvUnit(8, 8, groups=2, interleave=4, residual=True, activation="relu", eps=0.1)
    conv, norm = nn.Conv2d(8, 8, 1, groups=2, bias=False), nn.BatchNorm2d(8, 0.1, 0.01)
    conv.weight = unit.conv.weight
    x = torch.randn(3, 8, 5, 7)
    y = norm(conv(x)).relu()
    y = y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2) + x
    torch.testing.assert_close(unit(x), y, rtol=0, atol=1e-5)
    torch.testing.assert_close(unit.bn.running_var, norm.running_var)


@pytest.mark.parametrize("name", ["efficientnet_b0", "keffnet_b0"])
def test_block_of_the_network(name):
    """With a network's weights, under the same names, what the network's block computes."""
    torch.manual_seed(0)
    network = build(create(name, classes=2, input_shape=(32, 32, 3))).eval()
    prefix = "block3a_" if name == "efficientnet_b0" else "k_block3a__0"
    ktype = None if name == "efficientnet_b0" else "D6_16ch"
    block = MBConv(24, 40, 5, 2, ktype=ktype).eval()
    state = {
        key.removeprefix(prefix): value
        for key, value in network.state_dict().items()
        if key.startswith(prefix)
    }
    block.load_state_dict(state)
    modules = [m for n, m in network.named_children() if n.startswith(prefix)]
    seen = {}
    modules[0].register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    modules[-1].register_forward_hook(lambda module, args, y: seen.update(y=y))
    network(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(block(seen["x"]), seen["y"], rtol=1e-4, atol=1e-5)


def test_drop_connect_needs_the_residual():
    assert any(
        isinstance(module, DropConnect) for module in MBConv(8, 8, drop_connect=0.2).modules()
    )
    assert not any(
        isinstance(module, DropConnect) for module in MBConv(8, 9, drop_connect=0.2).modules()
    )


@pytest.mark.parametrize(
    ("kind", "arguments", "options", "message"),
    [
        (ConvUnit, (0, 8), {}, "in_channels=0"),
        (ConvUnit, (8, 0), {}, "filters=0"),
        (ConvUnit, (8, 8), {"kernel_size": 0}, "kernel_size=0"),
        (ConvUnit, (8, 8), {"groups": 3}, "groups=3"),
        (ConvUnit, (8, 8), {"groups": 0}, "groups=0"),
        (ConvUnit, (8, 8), {"interleave": 0}, "interleave=0"),
        (ConvUnit, (8, 8), {"activation": "gelu"}, "'gelu'"),
        (ConvUnit, (8, 9), {"residual": True}, "8 to 9 channels"),
        (ConvUnit, (8, 8), {"residual": True, "stride": 2}, "stride of 2"),
        (MBConv, (8, 8), {"stride": 0}, "strides=0"),
        (MBConv, (8, 8), {"expand_ratio": 0}, "expand_ratio=0"),
        (MBConv, (8, 8), {"se_ratio": -1}, "se_ratio=-1"),
        (MBConv, (8, 8), {"drop_connect": 1}, "drop_connect=1"),
        (MBConv, (8, 8), {"ktype": "D7"}, "D7"),
    ],
)
def test_bad_input(kind, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        kind(*arguments, **options)


def test_sizes_are_whole_numbers():
    with pytest.raises(TypeError, match=r"kernel_size=2\.5"):
        MBConv(8, 8, 2.5)
