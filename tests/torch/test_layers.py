"""The layers beside nn.Conv2d."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kconv.ktypes import interleave_index
from kconv.torch import (
    AcceleratedConv2d,
    DepthwiseConv2d,
    InterleaveChannels,
    InterleavedPointwiseConv2d,
    KPointwiseConv2d,
    PointwiseConv2d,
    accelerate,
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


def computed(module, x):
    """Output and gradients, or the class of the error."""
    x = x.detach().clone().requires_grad_(x.is_floating_point() or x.is_complex())
    module.zero_grad()
    try:
        y = module(x)
    except (RuntimeError, ValueError) as error:
        return type(error)
    if y.requires_grad:
        (y * torch.linspace(1, 2, y.numel()).view_as(y)).abs().sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in module.parameters())]


# Which of PyTorch's arguments somebody sets afterwards, and whether the kernels still compute it.
CHANGES = {
    "stride of 2": {"stride": (2, 2)},
    "stride in one direction": {"stride": (1, 2)},
    "stride as a number": {"stride": 2},
    "padding": {"padding": (1, 0)},
    "padding as a number": {"padding": 2},
    "padding of one number": {"padding": (1,)},
    "negative padding": {"padding": (-1, -1)},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "same with stride": {"padding": "same", "stride": (2, 2)},
    "unknown padding": {"padding": "full"},
    "dilation": {"dilation": (2, 2), "padding": (2, 2)},
    "dilation of nothing": {"dilation": (0, 0)},
    "reflect": {"padding_mode": "reflect"},
    "circular": {"padding_mode": "circular"},
    "no bias": {"bias": None},
    "groups": {"groups": 2, "weight": (6, 3, 1, 1)},
    "other kernel": {"groups": 2, "weight": (6, 3, 3, 5)},
    "more channels": {"groups": 6, "weight": (12, 1, 3, 3), "bias": None},
    "wrong groups": {"groups": 4},
    "channels that do not fit": {"groups": 1, "weight": (6, 5, 1, 1)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_attributes_count_at_every_call(kernel_size, change):
    torch.manual_seed(5)
    options = {"padding": kernel_size // 2, "groups": 6 if kernel_size > 1 else 1}
    own = nn.Conv2d(6, 6, kernel_size, **options, dtype=torch.float64)
    accelerated = copy.deepcopy(accelerate(copy.deepcopy(own)))
    cls = PointwiseConv2d if kernel_size == 1 else DepthwiseConv2d
    layer = cls(6, 6, **({"kernel_size": 3, **options} if kernel_size > 1 else {})).double()
    layer.load_state_dict(own.state_dict())
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    for module in own, accelerated, layer:
        module(x)
        for name, value in change.items():
            if name == "weight":
                value = nn.Parameter(
                    torch.linspace(-1, 1, 300).double()[: math.prod(value)].view(value)
                )
            setattr(module, name, value)
    expected = computed(own, x)
    for module in accelerated, layer:
        found = computed(module, x)
        if isinstance(expected, type):
            # The layers that are named for what they compute say by a ValueError what they expect.
            assert found is expected or (module is layer and found is ValueError)
        else:
            torch.testing.assert_close(found, expected)


def test_asymmetric_padding_with_other_attributes():
    layer = DepthwiseConv2d(4, 4, 3, padding=((0, 1), (2, 1)))
    x = torch.randn(2, 4, 7, 6)
    for change in {"dilation": (2, 2)}, {"padding_mode": "circular"}, {"stride": (3, 1)}:
        for name, value in change.items():
            setattr(layer, name, value)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x, (2, 1, 0, 1), mode)
        weights = layer.weight, layer.bias
        expected = F.conv2d(padded, *weights, layer.stride, 0, layer.dilation, 4)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(to_native(layer)(x), expected)


@pytest.mark.parametrize("change", [{"stride": (2, 2)}, {"padding": (1, 2)}, {"dilation": (2, 2)}])
def test_attributes_of_interleaving_layers(change):
    layer = PointwiseConv2d(6, 8, groups=2, interleave=3)
    own = nn.Conv2d(6, 8, 1, groups=2)
    own.load_state_dict(layer.state_dict())
    native = to_native(layer)
    for module in layer, own, native:
        for name, value in change.items():
            setattr(module, name, value)
    x = torch.randn(2, 6, 5, 4)
    expected = own(x)[:, interleave_index(8, 3)]
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(native(x), expected)


class Doubling(torch.Tensor):
    """A tensor of somebody's, whose convolutions come out twice as large."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 2 if func is F.conv2d else result


X = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(6))
INPUTS = {
    "complex": (X.to(torch.complex128) * (1 + 2j), torch.complex128),
    "int": (X.int(), torch.int32),
    "another dtype": (X.double(), torch.float32),
    "integers into floats": (X.int(), torch.float32),
    "float16": (X.half(), torch.float16),
    "negative bit": (torch.complex(X, -X).conj().imag, torch.float32),
    "all zero": (torch._efficientzerotensor(2, 6, 5, 4), torch.float32),
    "sparse": (X.to_sparse(), torch.float32),
    "mkldnn": (X.to_mkldnn(), torch.float32),
    "meta": (X.to("meta"), torch.float32),
    "no images": (X[:0], torch.float32),
    "no batch": (X[0], torch.float32),
    "too few axes": (X[0, 0], torch.float32),
    "a subclass": (X.as_subclass(Doubling), torch.float32),
}


@pytest.mark.parametrize(("x", "dtype"), INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("depthwise", [False, True])
def test_inputs_of_any_kind(depthwise, x, dtype):
    own = nn.Conv2d(6, 6, 3, 1, 1, groups=6) if depthwise else nn.Conv2d(6, 6, 1)
    for name, parameter in list(own.named_parameters()):
        value = parameter.detach().to("meta" if x.is_meta else "cpu", dtype)
        own.register_parameter(name, nn.Parameter(value, requires_grad=False))
    results = []
    for module in own, accelerate(copy.deepcopy(own)):
        try:
            results.append(module(x))
        except RuntimeError as error:
            results.append(type(error))
    expected, found = results
    if isinstance(expected, type):
        assert found is expected
        return
    assert (type(found), found.dtype, found.shape) == (
        type(expected),
        expected.dtype,
        expected.shape,
    )
    if not x.is_meta:
        plain = [y.to_dense().as_subclass(torch.Tensor) for y in results]
        tolerance = 2e-3 if dtype is torch.float16 else 1e-5
        torch.testing.assert_close(*plain, rtol=tolerance, atol=tolerance)


def test_quantized_input_is_refused_in_words():
    x = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
    for layer in accelerate(nn.Conv2d(6, 6, 1)), PointwiseConv2d(6, 6, interleave=2):
        with pytest.raises(NotImplementedError, match=r"quantized.*kconv\.torch\.restore"):
            layer(x)


def test_gradients_with_the_negative_bit():
    gradients = []
    for module in seeded(lambda: nn.Conv2d(6, 6, 1)), seeded(lambda: PointwiseConv2d(6, 6)):
        x = X.clone().requires_grad_()
        grad = torch.complex(X, X).conj().imag
        assert grad.is_neg()
        gradients.append(torch.autograd.grad(module(x), [x, module.weight], grad))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_interleaving_layers_are_no_conv2d():
    layer = PointwiseConv2d(6, 8, groups=2, interleave=4).eval()
    norm = nn.BatchNorm2d(8).eval()
    for module in layer, to_native(layer):
        assert not isinstance(module, nn.Conv2d)
        with pytest.raises(ValueError, match="order before the interleave"):
            fuse_conv_bn_eval(module, norm)
        assert list(module.state_dict()) == ["weight", "bias"]
    assert isinstance(layer, InterleavedPointwiseConv2d)
    layer.register_parameter("bias", None)
    assert layer(X).shape == (2, 8, 5, 4)
    plain = PointwiseConv2d(6, 8, groups=2).eval()
    fused = fuse_conv_bn_eval(plain, norm)
    torch.testing.assert_close(fused(X), norm(plain(X)))


def test_subclasses_of_the_pointwise_layer():
    class Doubled(PointwiseConv2d):
        def forward(self, x):
            return super().forward(x) * 2

    layer = Doubled(6, 4)
    torch.testing.assert_close(layer(X), 2 * F.conv2d(X, layer.weight, layer.bias))
    assert copy.deepcopy(layer)(X).shape == (2, 4, 5, 4)
    with pytest.raises(ValueError, match="interleave=2 needs a subclass of Interleaved"):
        Doubled(6, 4, interleave=2)


def test_files_of_earlier_versions():
    """There, accelerated and interleaving layers were of the classes that are plain ones now."""
    accelerated, interleaving = PointwiseConv2d(6, 6), PointwiseConv2d(6, 6)
    accelerated.__dict__["accelerated"] = True
    interleaving.__dict__["interleave"] = 3
    accelerated, interleaving = pickle.loads(pickle.dumps((accelerated, interleaving)))
    assert type(accelerated) is AcceleratedConv2d
    assert type(interleaving) is InterleavedPointwiseConv2d
    expected = F.conv2d(X, interleaving.weight, interleaving.bias)[:, interleave_index(6, 3)]
    torch.testing.assert_close(interleaving(X), expected)
    assert copy.deepcopy(interleaving).interleave == 3
