"""The layers beside nn.Conv2d."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from kconv.ktypes import interleave_index
from kconv.torch import (
    DepthwiseConv2d,
    InterleaveChannels,
    KPointwiseConv2d,
    PointwiseConv2d,
    to_native,
)

POINTWISE = [(15, 30, {"groups": 5}), (7, 3, {"bias": False}), (6, 6, {"groups": 6})]
DEPTHWISE = [
    (5, {"kernel_size": 3}),
    (5, {"kernel_size": 3, "padding": "same"}),
    (4, {"kernel_size": (5, 5), "stride": (2, 2), "padding": (2, 1), "bias": False}),
    (3, {"kernel_size": 7, "stride": 2, "padding": "valid"}),
]


def assert_interchangeable(layer, own):
    """Same initial values from the same seed, same state_dict, same outputs."""
    assert [(k, v.shape) for k, v in layer.state_dict().items()] == [
        (k, v.shape) for k, v in own.state_dict().items()
    ]
    for ours, theirs in zip(layer.parameters(), own.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for x in torch.randn(2, own.in_channels, 9, 8), torch.randn(own.in_channels, 8, 9):
        torch.testing.assert_close(layer(x), own(x), rtol=1e-4, atol=1e-5)
    nn.init.ones_(own.weight)
    layer.load_state_dict(own.state_dict())
    own.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), own(x), rtol=1e-4, atol=1e-5)


def seeded(make):
    torch.manual_seed(7)
    return make()


@pytest.mark.parametrize(("c_in", "c_out", "options"), POINTWISE)
def test_pointwise_is_a_conv2d(c_in, c_out, options):
    layer = seeded(lambda: PointwiseConv2d(c_in, c_out, **options))
    own = seeded(lambda: nn.Conv2d(c_in, c_out, 1, **options))
    assert_interchangeable(layer, own)
    assert isinstance(layer, nn.Conv2d)


@pytest.mark.parametrize(("channels", "options"), DEPTHWISE)
def test_depthwise_is_a_conv2d(channels, options):
    layer = seeded(lambda: DepthwiseConv2d(channels, channels, **options))
    own = seeded(lambda: nn.Conv2d(channels, channels, groups=channels, **options))
    assert_interchangeable(layer, own)


def test_interleave():
    layer = PointwiseConv2d(8, 12, groups=4, interleave=3)
    plain = PointwiseConv2d(8, 12, groups=4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(layer(x), InterleaveChannels(3)(plain(x)))
    torch.testing.assert_close(layer(x), plain(x)[:, interleave_index(12, 3)])


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (7, 9)])
def test_asymmetric_padding(size):
    layer = DepthwiseConv2d(6, 6, 3, stride=2, padding=((0, 1), (1, 2)))
    x = torch.randn(2, 6, *size)
    own = nn.Conv2d(6, 6, 3, 2, groups=6)
    own.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), own(nn.ZeroPad2d((1, 2, 0, 1))(x)))


LAYERS = [
    PointwiseConv2d(6, 6, groups=3, interleave=2),
    DepthwiseConv2d(6, 6, 3, padding=1),
    DepthwiseConv2d(6, 6, 5, stride=2, padding=((1, 2), (2, 2))),
    InterleaveChannels(4),
    KPointwiseConv2d(6, 6, "D6v3_2ch", activation="hard_swish", use_bias=True).eval(),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_copies(layer):
    x = torch.randn(2, 6, 7, 7)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    torch.testing.assert_close(to_native(layer)(x), y, rtol=1e-5, atol=1e-5)
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y, rtol=1e-5, atol=1e-5)
    assert layer(x[:0]).shape == (0, *y.shape[1:])


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_other_devices_and_types(layer):
    x = torch.randn(2, 6, 7, 7)
    meta = copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert meta.device.type == "meta"
    assert meta.shape == layer(x).shape
    double = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(double.float(), layer(x))
    narrow = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    torch.testing.assert_close(narrow.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layer", LAYERS[:4], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_forward_and_backward(layer, memory_format):
    """Each of the results is that of float64 but for its own rounding to 8 bits."""
    narrow = copy.deepcopy(layer).bfloat16()
    x = torch.randn(3, 6, 9, 8).bfloat16().to(memory_format=memory_format)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        module = copy.deepcopy(narrow).to(dtype)
        image = x.detach().to(dtype).requires_grad_()
        y = module(image)
        y.backward(torch.linspace(-1, 1, y.numel()).bfloat16().to(dtype).view_as(y))
        results.append([y, image.grad, *(parameter.grad for parameter in module.parameters())])
    for found, expected in zip(*results, strict=True):
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)


def test_arguments_of_parameters():
    layer = PointwiseConv2d(4, 4, device="meta", dtype=torch.float64)
    assert layer.weight.is_meta
    assert DepthwiseConv2d(4, 4, 3, dtype=torch.float64).bias.dtype is torch.float64


def test_representation():
    assert [repr(layer) for layer in LAYERS[:4]] == [
        "InterleavedPointwiseConv2d(6, 6, groups=3, interleave=2)",
        "DepthwiseConv2d(6, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=6)",
        "DepthwiseConv2d(6, 6, kernel_size=(5, 5), stride=(2, 2), padding=((1, 2), (2, 2)), "
        "groups=6)",
        "InterleaveChannels(4)",
    ]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PointwiseConv2d(6, 4, groups=3), "divisible by groups"),
        (lambda: PointwiseConv2d(6, 4, interleave=0), "interleave must be at least 1, got 0"),
        (lambda: InterleaveChannels(0), "at least 1, got 0"),
        (lambda: DepthwiseConv2d(6, 12, 3), "6 to 12 channels"),
        (lambda: DepthwiseConv2d(6, 6, 9), "kernel_size"),
        (lambda: DepthwiseConv2d(6, 6, 3, groups=2), "in 2 groups"),
        (lambda: DepthwiseConv2d(6, 6, (3, 5)), r"\(3, 5\) is not 3, 5 or 7"),
        (lambda: DepthwiseConv2d(6, 6, 3, stride=3), r"stride=\(3, 3\)"),
        (lambda: DepthwiseConv2d(6, 6, 3, dilation=2), "dilation"),
        (lambda: DepthwiseConv2d(6, 6, 3, 1, 1, padding_mode="reflect"), "reflect"),
        (lambda: DepthwiseConv2d(6, 6, 3, stride=2, padding="same"), "same"),
        (lambda: KPointwiseConv2d(6, 4, "D7_16ch"), "D7_16ch.*D6_16ch"),
        (lambda: KPointwiseConv2d(0, 4), "0"),
        (lambda: KPointwiseConv2d(6, 4, activation="gelu"), "gelu.*swish"),
        (lambda: PointwiseConv2d(6, 4)(torch.zeros(1, 5, 2, 2)), "5"),
        (lambda: PointwiseConv2d(6, 4)(torch.zeros(6)), r"\(6,\)"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()
