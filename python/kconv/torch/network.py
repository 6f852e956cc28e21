"""Networks from kconv's specs: a PyTorch module for each layer of the graph, under its name."""

from __future__ import annotations

from collections import Counter
from math import prod, sqrt
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from kconv._creating import Weights, expect_spec, fill_network
from kconv.ktypes import KType, resolve
from kconv.models import Graph, GraphBuilder, Layer, Spec, graph
from kconv.models.activations import ACTIVATIONS, FUSED_ACTIVATIONS, ActivationName
from kconv.models.blocks import conv_unit_graph, mbconv_graph
from kconv.models.graph import Initializer
from kconv.torch._functions import Call, add, concatenate, fold_halves
from kconv.torch._plan import Plan
from kconv.torch._private import has_any_global_hook
from kconv.torch.fused import FusedSegment, is_eager
from kconv.torch.layers import (
    DepthwiseConv2d,
    DropConnect,
    InterleaveChannels,
    PaddedConv2d,
    PointwiseConv2d,
    ReadsAsConv2d,
)
from kconv.torch.native import make_native

__all__ = ["ConvUnit", "KPointwiseConv2d", "MBConv", "Network", "build"]


def build(
    spec: Spec,
    kernels: Literal["kconv", "torch"] = "kconv",
    *,
    fused: bool = True,
    weights: Weights = None,
    recompute: bool = False,
) -> Network:
    """The PyTorch model of a spec; it ends in logits.

    Example:
        >>> from kconv.models import create
        >>> model = build(create("keffnet_b0", classes=10, input_shape=(32, 32, 3)))
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        spec: the network (see :func:`kconv.models.create`).
        kernels: "kconv", or "torch" for the same network of PyTorch's own layers.
        fused: whether chains of layers run as one operation each (see
            :class:`Network`); the parameters and their names are the same.
        weights: what to fill it with, as for :func:`kconv.torch.create_model`.
        recompute: whether training keeps little of what the layers compute, and computes it anew in
            the backward pass: less memory for about a third more time.

    Returns:
        A module of (N, C, H, W) to (N, classes), or to (N, C', H', W') for a spec without top.

    Raises:
        ValueError: if ``kernels`` is neither, the weights are of another network, or nothing is
            fused that could compute anew.
        TypeError: if ``spec`` is none.
    """
    if kernels not in ("kconv", "torch"):
        raise ValueError(f"kernels must be 'kconv' or 'torch', got {kernels!r}")
    fused = fused and kernels == "kconv"
    if recompute and not fused:
        raise ValueError("recompute=True needs kernels='kconv' and fused=True")
    expect_spec(spec, "torch")
    layers = spec.graph()
    last = layers[layers.output]
    if isinstance(last, graph.Activation) and last.kind == "softmax":
        layers = Graph(layers.name, layers.layers[:-1], output=last.inputs[0])
    network = Network(layers, fused=fused, recompute=recompute)
    if weights is not None:
        fill_network(network, spec, weights)
    if kernels == "torch":
        make_native(network)
    return network


class Network(nn.Module):
    """A layer graph as a module; its submodules have the names of the layers.

    The softmax of a dense layer is left out.

    Fused, a chain of convolutions, batch norms, activations and the like runs as one operation
    on the parameters and statistics of its modules, as these are at the time of the call: modules
    may be exchanged and changed. One that no fused operation stands for, or that somebody has hooks
    on, runs by itself. All of them do so under compilers, tracers and function transforms, in
    autocast to float16, and on other devices and dtypes than the CPU's float32, float64 and
    bfloat16. In bfloat16, and in autocast to it, what an operation stores on its way is bfloat16,
    and what it computes with float32.

    Args:
        graph: the layers.
        fused: whether chains of layers run as one operation.
        recompute: whether these keep little for their backward passes, and compute it anew there.
    """

    def __init__(self, graph: Graph, *, fused: bool = True, recompute: bool = False) -> None:
        super().__init__()
        self._name, self._input, self._output = graph.name, graph.layers[0].name, graph.output
        paddings = _mergeable_paddings(graph)
        steps: list[tuple[str, tuple[str, ...]]] = []
        for layer in graph.layers[1:]:
            if layer.name not in paddings:
                padding = paddings.get(layer.inputs[0])
                self.add_module(layer.name, _module(layer, padding))
                steps.append((layer.name, padding.inputs if padding else layer.inputs))
        last_use = {name: step for step, inputs in steps for name in inputs}
        self._steps = [
            (step, inputs, tuple(name for name in set(inputs) if last_use[name] == step))
            for step, inputs in steps
        ]
        self._fuses = fused
        self._recomputes = recompute
        self._plan: Plan | None = None  # made when it is needed

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the output of the last layer."""
        if self._fuses and is_eager(x) and not has_any_global_hook():
            return self._current_plan().run(self, x)
        values = {self._input: x}
        for name, inputs, finished in self._steps:
            values[name] = getattr(self, name)(*(values[source] for source in inputs))
            for source in finished:  # so that inference keeps only what is still to be read
                del values[source]
        return values[self._output]

    def _current_plan(self) -> Plan:
        """The plan for the modules as they are now."""
        if self._plan is None or not self._plan.holds(self):
            steps = [(name, inputs) for name, inputs, _ in self._steps]
            self._plan = Plan(self, steps, self._input, self._output, recompute=self._recomputes)
        return self._plan

    _recomputes = False  # of older pickles
    _described = ""
    """A block's arguments, which its repr has in the place of its layers."""

    def __repr__(self) -> str:
        if not self._described:
            return super().__repr__()
        return f"{type(self).__name__}({self._described})"

    @property
    def _fused(self) -> dict[str, FusedSegment]:
        """What runs as one operation, by the name of the tensor that goes in."""
        return self._current_plan().segments if self._fuses else {}

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles: the calls of the modules, one after the other."""
        calls = _Calls().trace(self)
        for node in calls.nodes:
            node.type = None  # TorchScript does not know annotations that are texts
        return fx.GraphModule(self, calls)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_plan": None}
        state.pop("_compiled_call_impl", None)  # as in every module
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Older pickles hold the fused operations instead.
        fuses = bool(state.get("_fused"))
        state = {name: value for name, value in state.items() if name != "_fused"}
        super().__setstate__({"_fuses": fuses, "_plan": None, **state})


class _Calls(fx.Tracer):
    """Keeps a network's modules as they are, but for functions, which TorchScript needs plain."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, Network | Call)


class KPointwiseConv2d(ReadsAsConv2d, Network):
    """The papers' block in place of a pointwise convolution, batch norm and activation.

    Grouped convolutions, interleaved and added up as the kType says (section 3 of V1, MENDEL 28(1),
    2022, and of V2, Entropy 24(9):1264, 2022); see :func:`kconv.ktypes.plan`.

    Example:
        >>> block = KPointwiseConv2d(144, 24, "D6_16ch", activation="swish", use_bias=False)
        >>> block(torch.randn(2, 144, 7, 5)).shape, sum(p.numel() for p in block.parameters())
        (torch.Size([2, 24, 7, 5]), 600)

    Args:
        in_channels: C_in.
        out_channels: C_out.
        ktype: a kType, its name or its number.
        activation: after each batch norm: "swish" or another of
            ``kconv.models.FUSED_ACTIVATIONS``, or "softmax"; None for none.
        use_bias: whether the convolutions have a bias.
        has_batch_norm: whether a batch norm follows each convolution.
        name: the name with which those of the block's layers begin.
        fused: whether the layers run as one operation (see :class:`Network`).

    Raises:
        ValueError: if the kType or the activation is unknown or a channel count is below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ktype: KType | str | int = "D6_16ch",
        activation: ActivationName | None = None,
        use_bias: bool = True,
        has_batch_norm: bool = True,
        name: str = "k",
        *,
        fused: bool = True,
    ) -> None:
        known = (*FUSED_ACTIVATIONS, "softmax")
        if activation is not None and activation not in known:
            raise ValueError(f"unknown activation {activation!r}; known are {', '.join(known)}")
        g = GraphBuilder(name, (None, None, in_channels))
        output = g.pointwise(
            name,
            g.input,
            out_channels,
            ktype,
            activation=activation,
            batch_norm=has_batch_norm,
            use_bias=use_bias,
        )
        super().__init__(g.build(output), fused=fused)
        self.in_channels, self.out_channels = in_channels, out_channels
        self._described = (
            f"{in_channels}, {out_channels}, ktype={resolve(ktype).name!r}, "
            f"activation={activation!r}"
        )


class ConvUnit(Network):
    """Convolution, batch norm and activation as one operation, with what often follows.

    After the activation the channels are interleaved, and the input is added, if so asked. Two
    grouped units, the first with ``interleave``, the second with ``residual``, are the papers'
    block where channels stay as many (section 3 of V1, MENDEL 28(1), 2022).

    Example:
        >>> unit = ConvUnit(32, 48, groups=4, interleave=12, activation="swish")
        >>> unit(torch.randn(2, 32, 7, 5)).shape, list(unit.state_dict())[:2]
        (torch.Size([2, 48, 7, 5]), ['conv.weight', 'bn.weight'])
        >>> depthwise = ConvUnit(48, 48, kernel_size=3, stride=2, groups=48)
        >>> depthwise(torch.randn(2, 48, 7, 5)).shape
        torch.Size([2, 48, 4, 3])

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: height and width of the kernel.
        stride: in both directions; the output has 1/stride of the pixels a side, rounded up
            (TensorFlow's "same" padding).
        groups: divides C_in and C_out; C_in groups make a depthwise convolution.
        activation: "swish" or another of ``kconv.models.FUSED_ACTIVATIONS``; None for none.
        interleave: step of the interleave after the activation; 1 for none.
        residual: whether the input is added at the end.
        eps: of the batch norm.
        momentum: of the batch norm.
        fused: whether the layers run as one operation (see :class:`Network`).

    Raises:
        ValueError: if an activation is unknown, a size is below 1, groups do not divide the
            channels, or a residual unit changes the shape.
        TypeError: if a size is not a whole number.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        activation: ActivationName | None = "swish",
        interleave: int = 1,
        residual: bool = False,
        eps: float = 1e-3,
        momentum: float = 0.01,
        fused: bool = True,
    ) -> None:
        layers = conv_unit_graph(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            groups,
            activation,
            interleave,
            residual,
            eps,
            1 - momentum,
        )
        super().__init__(layers, fused=fused)
        self._described = (
            f"{in_channels}, {out_channels}, kernel_size={kernel_size}, stride={stride}, "
            f"groups={groups}, activation={activation!r}, interleave={interleave}, "
            f"residual={residual}"
        )


class MBConv(Network):
    """EfficientNet's block (Tan and Le, 2019) as one operation, with grouped convolutions.

    Expanding convolution, depthwise convolution, squeeze and excite, projecting convolution; where
    the shape stays, drop-connect and the sum with the input. The kType tells what stands for the
    pointwise convolutions (section 3 of V1, MENDEL 28(1), 2022, and of V2, Entropy 24(9):1264,
    2022).

    Example:
        >>> block = MBConv(16, 24, kernel_size=5, stride=2, ktype="D6_16ch")
        >>> block(torch.randn(2, 16, 9, 7)).shape, sum(p.numel() for p in block.parameters())
        (torch.Size([2, 24, 5, 4]), 5484)
        >>> sum(p.numel() for p in MBConv(16, 24, 5, 2, ktype=None).parameters())
        7540

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: of the depthwise convolution.
        stride: of the depthwise convolution.
        expand_ratio: inner channels for each of the input's; 1 for no expansion.
        se_ratio: channels of squeeze and excite for each of the input's; 0 for none.
        ktype: a kType, its name or its number; None for ordinary pointwise convolutions.
        activation: "swish" or another of ``kconv.models.FUSED_ACTIVATIONS``; the projecting
            convolution has none.
        drop_connect: rate at which an image's residual branch is dropped in training.
        fused: whether the layers run as one operation (see :class:`Network`).

    Raises:
        ValueError: if the kType or the activation is unknown, a size is below 1, or a rate is not
            from 0 to below 1.
        TypeError: if a size is not a whole number, or a ratio not a number.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: float = 6,
        se_ratio: float = 0.25,
        ktype: KType | str | int | None = "D6_16ch",
        *,
        activation: ActivationName | None = "swish",
        drop_connect: float = 0.0,
        fused: bool = True,
    ) -> None:
        layers = mbconv_graph(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            expand_ratio,
            se_ratio,
            ktype,
            activation,
            drop_connect,
        )
        super().__init__(layers, fused=fused)
        kind = None if ktype is None else resolve(ktype).name
        self._described = (
            f"{in_channels}, {out_channels}, kernel_size={kernel_size}, stride={stride}, "
            f"expand_ratio={expand_ratio}, se_ratio={se_ratio}, ktype={kind!r}"
        )


def _module(layer: Layer, padding: graph.ZeroPad | None) -> nn.Module:
    """The module for a layer, with the zero padding that it takes over."""
    match layer:
        case graph.Conv() | graph.DepthwiseConv():
            return _convolution(layer, padding)
        case graph.Dense():
            linear = nn.Linear(layer.in_features, layer.units)
            _initialise(linear, layer.weights()["kernel"], layer.initializer)
            return linear
        case graph.BatchNorm():
            norm = nn.BatchNorm2d(layer.channels, layer.epsilon, momentum=1 - layer.momentum)
            if not layer.scale:
                norm.register_parameter("weight", None)
            return norm
        case graph.Activation():
            function = ACTIVATIONS[layer.kind]
            names = (name for name, _ in function.parameters)
            options = dict(zip(names, layer.parameters, strict=True))
            options |= function.torch_options
            made: nn.Module = getattr(nn, function.torch_module)(**options)
            return made
        case graph.Interleave():
            return InterleaveChannels(layer.step)
        case graph.ZeroPad():
            (top, bottom), (left, right) = layer.padding
            return nn.ZeroPad2d((left, right, top, bottom))
        case graph.Pool():
            return _pool(layer)
        case graph.WindowPool():
            return _window_pool(layer)
        case graph.GlobalPool():
            pool = torch.mean if layer.kind == "avg" else torch.amax
            return Call(pool, dim=(2, 3), keepdim=layer.keepdims)
        case graph.CopyChannels():
            return Call(torch.narrow, dim=1, start=layer.start, length=layer.count)
        case graph.FoldHalves():
            return Call(fold_halves)
        case graph.Concat():
            return Call(concatenate)
        case graph.Add():
            return Call(add)
        case graph.Multiply():
            return Call(torch.mul)
        case graph.Reshape():
            return nn.Unflatten(1, (layer.channels, 1, 1))
        case graph.Flatten():
            return nn.Flatten()
        case graph.Dropout():
            return DropConnect(layer.rate) if layer.per_sample else nn.Dropout(layer.rate)
    raise TypeError(f"layer {layer.name!r}: a {type(layer).__name__} has no PyTorch module")


def _convolution(
    layer: graph.Conv | graph.DepthwiseConv, padding: graph.ZeroPad | None
) -> nn.Conv2d:
    same_strided = layer.padding == "same" and layer.strides not in (1, (1, 1))
    conv: nn.Conv2d
    match layer:
        case graph.Conv(is_pointwise=True):
            conv = PointwiseConv2d(layer.in_channels, layer.filters, layer.groups, layer.use_bias)
        case graph.DepthwiseConv(depth_multiplier=1, kernel_size=3 | 5 | 7) if not same_strided:
            conv = DepthwiseConv2d(
                layer.in_channels,
                layer.channels,
                layer.kernel_size,
                layer.strides,
                padding.padding if padding else layer.padding,
                bias=layer.use_bias,
            )
        case _:
            padding_itself = same_strided or isinstance(layer.padding, tuple)
            conv = (PaddedConv2d if padding_itself else nn.Conv2d)(
                layer.in_channels,
                layer.channels,
                layer.kernel_size,
                layer.strides,
                0 if padding_itself else str(layer.padding),
                groups=layer.groups if isinstance(layer, graph.Conv) else layer.in_channels,
                bias=layer.use_bias,
            )
            if isinstance(conv, PaddedConv2d):
                conv.borders = layer.padding
    _initialise(conv, next(iter(layer.weights().values())), layer.initializer)
    return conv


def _initialise(
    module: nn.Conv2d | nn.Linear, kernel: tuple[int, ...], initializer: Initializer
) -> None:
    """Draws a weight as Keras does for its kernel, of shape (..., inputs, outputs)."""
    pixels = prod(kernel[:-2])
    fan_in, fan_out = pixels * kernel[-2], pixels * kernel[-1]
    match initializer:
        case "glorot_uniform":
            limit = sqrt(6 / (fan_in + fan_out))
            nn.init.uniform_(module.weight, -limit, limit)
        case "dense_uniform":
            limit = sqrt(1 / fan_out)
            nn.init.uniform_(module.weight, -limit, limit)
        case "conv_normal":
            # 0.8796... is the standard deviation of a normal distribution cut off at 2.
            std = sqrt(2 / fan_out) / 0.87962566103423978
            nn.init.trunc_normal_(module.weight, 0, std, -2 * std, 2 * std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _pool(layer: graph.Pool) -> nn.Module:
    size, same = layer.pool_size, layer.padding == "same"
    if same and (layer.strides > 1 or size % 2 == 0):
        raise ValueError(f"layer {layer.name!r}: 'same' needs stride 1 and an odd size in a pool")
    padding = size // 2 if same else 0
    if layer.kind == "max":
        return nn.MaxPool2d(size, layer.strides, padding)
    return nn.AvgPool2d(size, layer.strides, padding, count_include_pad=False)


def _window_pool(layer: graph.WindowPool) -> nn.Module:
    padding = [before for before, _ in layer.padding]
    if layer.padding != tuple((side, side) for side in padding):
        raise ValueError(f"layer {layer.name!r}: PyTorch's pools pad both sides alike")
    size, strides, sides = layer.kernel_size, layer.strides, (padding[0], padding[1])
    if layer.kind == "max":
        return nn.MaxPool2d(size, strides, sides, layer.dilation, ceil_mode=layer.ceil_mode)
    return nn.AvgPool2d(size, strides, sides, layer.ceil_mode, layer.count_include_pad)


def _mergeable_paddings(layers: Graph) -> dict[str, graph.ZeroPad]:
    """The paddings that only a depthwise convolution reads, which pads for itself."""
    readers = Counter(name for layer in layers.layers for name in layer.inputs)
    pads = {layer.name: layer for layer in layers.layers if isinstance(layer, graph.ZeroPad)}
    return {
        layer.inputs[0]: pads[layer.inputs[0]]
        for layer in layers.layers
        if isinstance(layer, graph.DepthwiseConv)
        and layer.padding == "valid"
        and layer.depth_multiplier == 1
        and layer.kernel_size in (3, 5, 7)
        and layer.inputs[0] in pads
        and readers[layer.inputs[0]] == 1
    }


# By these names older pickles know them.
_add, _concatenate, _fold_halves = add, concatenate, fold_halves
