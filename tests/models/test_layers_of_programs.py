"""Each kind of layer that fused programs have, beside the frameworks' own functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kconv.models import graph as layers
from kconv.models.fusion import Segment, partition
from kconv.models.graph import Graph, Input, Layer

torch = pytest.importorskip("torch")
F = torch.nn.functional

CHANNELS = 6
SIZE = (7, 10)

Make = Callable[..., Layer]


def conv(channels: int = CHANNELS, **options: Any) -> Make:
    def make(inputs: tuple[str, ...], name: str, before: int) -> Layer:
        shape = (None, None, channels)
        return layers.Conv(
            name=name, inputs=inputs, shape=shape, filters=channels, in_channels=before, **options
        )

    return make


def layer(cls: type[Layer], /, **options: Any) -> Make:
    def make(inputs: tuple[str, ...], name: str, before: int) -> Layer:
        return cls(name=name, inputs=inputs, shape=(None, None, before), **options)

    return make


def chain(*makes: Make, channels: int = CHANNELS) -> Segment:
    """A segment: an image through these layers one after the other."""
    made: list[Layer] = [Input(name="input", inputs=(), shape=(None, None, channels))]
    for number, make in enumerate(makes):
        last = made[-1]
        made.append(make((last.name,), f"layer_{number}", last.channels))
    (segment,) = partition(Graph("chain", tuple(made), made[-1].name))
    assert isinstance(segment, Segment)
    assert len(segment.layers) == len(makes)
    return segment


NORM = layer(layers.BatchNorm)
WIDE = 18  # channels that are unfolded
DENSE = ((1, 1), (1, 1))


def activation(kind: str, *parameters: float) -> list[Make]:
    return [conv(), NORM, layer(layers.Activation, kind=kind, parameters=parameters), conv()]


def convolution(channels: int = CHANNELS, **options: Any) -> list[Make]:
    swish = layer(layers.Activation, kind="swish")
    return [conv(channels), NORM, swish, conv(channels, **options), NORM]


def pool(kind: str, size: tuple[int, int], strides: tuple[int, int], **options: Any) -> list[Make]:
    window = layer(layers.WindowPool, kind=kind, kernel_size=size, strides=strides, **options)
    return [conv(), NORM, layer(layers.Activation, kind="gelu"), window, NORM]


CASES: dict[str, list[Make]] = {
    "relu": activation("relu"),
    "clip": activation("clip", -0.5, 0.75),
    "leaky_relu": activation("leaky_relu", 0.1),
    "elu": activation("elu", 0.7),
    "gelu": activation("gelu"),
    "gelu_tanh": activation("gelu_tanh"),
    "mish": activation("mish"),
    "3x3": convolution(WIDE, kernel_size=(3, 3), padding=DENSE, use_bias=True),
    "3x3 in groups, stride 2": convolution(
        2 * WIDE, kernel_size=(3, 3), padding="same", strides=(2, 2), groups=2
    ),
    "3x3 of many channels": convolution(80, kernel_size=(3, 3), padding=DENSE, use_bias=True),
    "1x1, stride 2": convolution(WIDE, strides=(2, 2)),
    "rows": convolution(kernel_size=(1, 5), padding="same"),
    "columns, strides": convolution(kernel_size=(5, 1), padding="same", strides=(2, 1)),
    "dilation": convolution(kernel_size=(3, 3), dilation=(2, 3), padding=((2, 2), (3, 1))),
    "dilation and stride": convolution(
        kernel_size=(3, 3), dilation=(2, 2), strides=(2, 2), padding="same"
    ),
    "depthwise with dilation": convolution(
        kernel_size=(3, 3), dilation=(2, 2), padding=((2, 2), (2, 2)), groups=CHANNELS
    ),
    "depthwise, 4x2": convolution(kernel_size=(4, 2), padding="valid", groups=CHANNELS),
    "patches": convolution(kernel_size=(4, 4), strides=(4, 4), padding="valid", use_bias=True),
    "stride 3": convolution(WIDE, kernel_size=(3, 3), strides=(3, 3), padding=((0, 1), (2, 0))),
    "max": pool("max", (3, 3), (2, 2), padding=DENSE),
    "max, ceil": pool("max", (2, 3), (2, 2), ceil_mode=True),
    "max, dilation": pool("max", (3, 2), (1, 1), dilation=(2, 3)),
    "mean": pool("avg", (3, 3), (1, 1), padding=DENSE),
    "mean of pixels": pool("avg", (3, 3), (1, 1), padding=DENSE, count_include_pad=False),
    "mean, ceil": pool("avg", (3, 3), (2, 2), padding=DENSE, ceil_mode=True),
    "mean, sides": pool("avg", (3, 2), (2, 1), padding=((0, 2), (1, 0))),
    "mean, same": [conv(), layer(layers.Pool, kind="avg", pool_size=3, strides=2, padding="same")],
    "max, same": [conv(), layer(layers.Pool, kind="max", pool_size=3, strides=2, padding="same")],
    "scale": [conv(), NORM, layer(layers.ChannelScale), NORM],
    "prelu": [conv(), NORM, layer(layers.PReLU), conv()],
}


def values(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def parameters(segment: Segment) -> Any:
    shapes = {layer.name: layer.weights() for layer in segment.layers}
    return values(
        sum(int(np.prod(shapes[name][weight])) for name, weight in segment.parameters), seed=1
    )


@pytest.mark.parametrize("case", CASES)
def test_beside_pytorch(case: str) -> None:
    from kconv.torch._layerwise import layerwise
    from kconv.torch.fused import fused

    segment = chain(*CASES[case])
    program = segment.program(SIZE, "OI")
    x, weights = values(3, CHANNELS, *SIZE), parameters(segment)
    results = []
    for run in (lambda *a: fused(*a)[0], layerwise):
        operands = [torch.from_numpy(a).requires_grad_() for a in (x, weights)]
        y = run(program, "NCHW", *operands, None, None)
        assert y.shape[1:] == program.output_size
        grads = torch.autograd.grad(
            (y * torch.from_numpy(values(*y.shape, seed=2))).sum(), operands
        )
        results.append([y, *grads])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # Inference, and float32.
    given = torch.from_numpy(np.abs(values(2, program.norm_channels, seed=3)) + 0.1)
    operands = [torch.from_numpy(a) for a in (x, weights)]
    expected = layerwise(program, "NCHW", *operands, None, given)
    torch.testing.assert_close(fused(program, "NCHW", *operands, None, given)[0], expected)
    x_float, weights_float, given_float = (a.float() for a in (*operands, given))
    last = x_float.permute(0, 2, 3, 1).contiguous()
    found = fused(program, "NHWC", last, weights_float, None, given_float)[0]
    torch.testing.assert_close(found.permute(0, 3, 1, 2).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_interpreter(case: str) -> None:
    keras = pytest.importorskip("keras")
    from kconv.models.interpreter import interpret
    from kconv.torch._layerwise import layerwise

    segment = chain(*CASES[case])
    program = segment.program(SIZE, "IO")
    x, weights = values(2, CHANNELS, *SIZE), parameters(segment)
    operands = [torch.from_numpy(a) for a in (x, weights)]
    expected = layerwise(program, "NCHW", *operands, None, None)
    tensors = [keras.ops.convert_to_tensor(a, "float32") for a in (x, weights)]
    found = interpret(keras.ops, program.integers, "NCHW", *tensors, None, None)[0]
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(found), expected.numpy(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("ceil", [False, True])
def test_pools_are_pytorchs(include: bool, ceil: bool) -> None:
    from kconv.torch._layerwise import _window_pool

    x = torch.from_numpy(values(2, 3, *SIZE))
    for kernel, strides, sides in [((3, 2), (2, 3), (1, 0)), ((2, 5), (2, 2), (0, 2))]:
        (top, left) = sides
        pooled = layers.WindowPool(
            name="pool",
            inputs=("x",),
            shape=(None, None, 3),
            kind="avg",
            kernel_size=kernel,
            strides=strides,
            padding=((top, top), (left, left)),
            ceil_mode=ceil,
            count_include_pad=include,
        )
        expected = F.avg_pool2d(x, kernel, strides, sides, ceil, include)
        torch.testing.assert_close(_window_pool(pooled, x), expected)
        assert pooled.size(SIZE) == tuple(expected.shape[2:])
        expected = F.max_pool2d(x, kernel, strides, sides, 1, ceil)
        torch.testing.assert_close(_window_pool(replace(pooled, kind="max"), x), expected)


def test_large_windows_stay_outside() -> None:
    """What no program has is not part of a segment."""
    for make in (
        conv(kernel_size=(65, 1)),
        conv(kernel_size=(3, 3), padding=((3, 0), (0, 0))),
        layer(layers.WindowPool, kind="avg", kernel_size=(2, 2), strides=(1, 1), dilation=(2, 1)),
        layer(layers.Activation, kind="softmax"),
        layer(layers.Activation, kind="elu"),
    ):
        with pytest.raises(ValueError, match="to unpack"):
            chain(conv(), make, conv())
