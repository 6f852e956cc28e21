"""Blocks and networks of Flax's layers, chains of which run as one operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kconv import ktypes
from kconv._creating import Weights, create, expect_spec, fill_network
from kconv.jax._fused import fused as run_program
from kconv.jax._fused import runs_natively
from kconv.jax._nnx_layers import DepthwiseConv, InterleaveChannels, PointwiseConv
from kconv.jax._operations import operations
from kconv.models import Spec, graph
from kconv.models.activations import ACTIVATIONS, ActivationName
from kconv.models.blocks import conv_unit_graph, mbconv_graph
from kconv.models.fusion import Segment, UnfitError, partition

__all__ = ["ConvUnit", "MBConv", "Network", "build", "create_model"]


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a network is made of; the same one in all copies, as Flax compares it by identity.

    Attributes:
        whole: the layers.
        parts: chains that run as one operation, and other layers.
        made: the settings of the layers' modules as they were made, by their names.
    """

    whole: graph.Graph
    parts: tuple[graph.Layer | Segment, ...]
    made: dict[str, dict[str, Any]]


class Network(nnx.Module):
    """The layers of a graph of :mod:`kconv.models` as Flax's own, called in its order.

    Each layer that has weights or a state is an attribute of its name in the graph, with "_" for
    "/": ``nnx.Conv`` (or kconv's, which is one), ``nnx.BatchNorm``, ``nnx.Dropout``,
    ``nnx.Linear``. ``train()`` and ``eval()`` switch them as they do in every Flax module. Chains
    run as one operation on the layers' parameters; layer by layer where it cannot stand for them:
    on other devices than the CPU, in other dtypes than float32, float64 and bfloat16 (of which only
    what is stored is: sums and statistics are float32), where some batch norms use their running
    averages and others do not, and where a layer was changed or exchanged.

    Args:
        layers: the graph.
        rngs: the keys of the initial values ("params") and of dropout ("dropout").
        fused: whether chains run as one operation.
        dtype: of the parameters.
        recompute: whether these keep little for their backward passes, and compute it anew there.

    Input: (N, H, W, C). Output: as the graph has it.

    Raises:
        ValueError: if the input has other axes or channels.
        TypeError: if ``rngs`` are none.
    """

    def __init__(
        self,
        layers: graph.Graph,
        *,
        rngs: nnx.Rngs,
        fused: bool = True,
        dtype: Any = jnp.float32,
        recompute: bool = False,
    ) -> None:
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs={rngs!r}, expected flax.nnx.Rngs, such as nnx.Rngs(0)")
        made = {}
        for layer in layers.layers:
            module = _module(layer, rngs, dtype)
            if module is not None:
                setattr(self, _attribute(layer.name), module)
                made[layer.name] = _settings(module)
        parts = tuple(partition(layers, recompute=recompute)) if fused else layers.layers[1:]
        self._plan = _Plan(layers, parts, made)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Run the layers; see the class for the shapes."""
        channels = self._plan.whole.input_shape[-1]
        if inputs.ndim != 4 or inputs.shape[-1] != channels:
            raise ValueError(f"input of shape {inputs.shape}, expected (N, H, W, {channels})")
        values = {self._plan.whole.layers[0].name: inputs}
        for part in self._plan.parts:
            if isinstance(part, Segment):
                y = self._run(part, values[part.input])
                if y is not None:
                    values[part.name] = y
                    continue
            for layer in part.layers if isinstance(part, Segment) else (part,):
                module = getattr(self, _attribute(layer.name), None)
                values[layer.name] = _call(layer, module, [values[x] for x in layer.inputs])
        return values[self._plan.whole.output]

    def _run(self, segment: Segment, x: jax.Array) -> jax.Array | None:
        """A segment's output, or None where its layers must run one by one."""
        plan = self._plan
        modules = {
            layer.name: getattr(self, _attribute(layer.name))
            for layer in segment.layers
            if layer.name in plan.made
        }
        if any(_settings(module) != plan.made[name] for name, module in modules.items()):
            return None
        size = (x.shape[1], x.shape[2])
        if 0 in x.shape or not runs_natively(x):
            return None
        try:
            program = segment.program(size, "IO")
        except UnfitError:
            return None
        parameters = [
            getattr(modules[name], _PARAMETERS[weight])[...] for name, weight in program.parameters
        ]
        dtypes = {parameter.dtype for parameter in parameters}
        dtype = next(iter(dtypes))
        if len(dtypes) > 1 or dtype not in _DTYPES or jnp.promote_types(x.dtype, dtype) != dtype:
            return None
        norms = [modules[norm.name] for norm in program.norms]
        frozen = {bool(norm.use_running_average) for norm in norms}
        if len(frozen) > 1:
            return None
        masks, statistics = None, None
        wide = jnp.promote_types(dtype, jnp.float32)
        drops = [modules[drop.name] for drop in program.masks]
        if any(not drop.deterministic and drop.rate > 0 for drop in drops):
            ones = jnp.ones((x.shape[0], 1, 1, 1), wide)
            masks = jnp.stack([drop(ones).reshape(-1) for drop in drops])
        if frozen == {True}:
            rows = [[norm.mean[...] for norm in norms], [norm.var[...] for norm in norms]]
            statistics = jnp.stack([jnp.concatenate(row) for row in rows]).astype(wide)
        flat = jnp.concatenate([parameter.reshape(-1) for parameter in parameters]).astype(wide)
        y, used = run_program(program, "NHWC", x.astype(dtype), flat, masks, statistics)
        if statistics is None:
            _update_statistics(norms, used)
        return y if segment.keeps_pixels else y.reshape(x.shape[0], -1)


_PARAMETERS = {
    "kernel": "kernel",
    "depthwise_kernel": "kernel",
    "bias": "bias",
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
}
"""Flax's names of weights."""


def graph_and_weights(network: Network) -> tuple[graph.Graph, dict[tuple[str, str], nnx.Variable]]:
    """A network's layers, and its parameters and running averages by the graph's names.

    Raises:
        ValueError: if a layer was exchanged for one that lacks them.
    """
    layers, found = network._plan.whole, {}
    for layer in layers.layers:
        module = getattr(network, _attribute(layer.name), None)
        for weight, shape in layer.weights().items():
            variable = getattr(module, _PARAMETERS[weight], None)
            if not isinstance(variable, nnx.Variable) or variable[...].size != prod(shape):
                raise ValueError(f"{layer.name!r} was exchanged: it has no {weight} of {shape}")
            found[layer.name, weight] = variable
    return layers, found


_DTYPES = tuple(map(jnp.dtype, ("float32", "float64", "bfloat16")))


def _attribute(name: str) -> str:
    return name.replace("/", "_")


def _settings(module: nnx.Module) -> dict[str, Any]:
    """A module's class and all that it was made with but arrays and the mode that it is in."""
    settings = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in ("deterministic", "use_running_average")
        and not isinstance(value, nnx.Variable | nnx.Module | nnx.RngStream)
    }
    return {**settings, "class": type(module)}


def _update_statistics(norms: list[Any], used: jax.Array) -> None:
    """The running averages, as ``nnx.BatchNorm`` updates them."""
    start = 0
    for norm in norms:
        end = start + norm.num_features
        for average, values in zip((norm.mean, norm.var), used, strict=True):
            new = values[start:end].astype(average[...].dtype)
            average[...] = norm.momentum * average[...] + (1 - norm.momentum) * new
        start = end


def _module(layer: graph.Layer, rngs: nnx.Rngs, dtype: Any) -> nnx.Module | None:
    """The Flax module of a layer that has weights or a state."""
    options = {"rngs": rngs, "param_dtype": dtype}
    match layer:
        case graph.Conv() | graph.DepthwiseConv():
            return _convolution(layer, options)
        case graph.BatchNorm():
            return nnx.BatchNorm(
                layer.channels,
                momentum=layer.momentum,
                epsilon=layer.epsilon,
                use_scale=layer.scale,
                use_fast_variance=False,
                **options,
            )
        case graph.Dropout():
            dims = (1, 2, 3) if layer.per_sample else ()
            return nnx.Dropout(layer.rate, broadcast_dims=dims, rngs=rngs)
        case graph.Dense():
            init = _initializer(layer.initializer)
            return nnx.Linear(layer.in_features, layer.units, kernel_init=init, **options)
        case _:
            return None


def _convolution(layer: graph.Conv | graph.DepthwiseConv, options: dict[str, Any]) -> nnx.Conv:
    init = _initializer(layer.initializer)
    options = {**options, "use_bias": layer.use_bias}
    padding: Any = layer.padding.upper() if isinstance(layer.padding, str) else layer.padding
    if isinstance(layer, graph.DepthwiseConv):
        shape = layer.weights()["depthwise_kernel"]

        def depthwise_init(key: Any, flax_shape: tuple[int, ...], *args: Any) -> jax.Array:
            return init(key, shape, *args).reshape(flax_shape)  # its fans are the original's

        options |= {"kernel_init": depthwise_init, "padding": padding}
        if layer.depth_multiplier == 1 and layer.kernel_size in (3, 5, 7):
            return DepthwiseConv(layer.in_channels, layer.kernel_size, layer.strides, **options)
        return nnx.Conv(
            layer.in_channels,
            layer.channels,
            (layer.kernel_size, layer.kernel_size),
            layer.strides,
            feature_group_count=layer.in_channels,
            **options,
        )
    options["kernel_init"] = init
    if layer.is_pointwise:
        return PointwiseConv(
            layer.in_channels, layer.filters, layer.groups, layer.interleave, **options
        )
    return nnx.Conv(
        layer.in_channels,
        layer.filters,
        layer.kernel_size,
        layer.strides,
        padding=padding,
        feature_group_count=layer.groups,
        **options,
    )


def _initializer(name: graph.Initializer) -> Callable[..., jax.Array]:
    match name:
        case "conv_normal":
            return nnx.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
        case "dense_uniform":
            return nnx.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
        case _:
            return nnx.initializers.glorot_uniform()


def _call(layer: graph.Layer, module: Any, inputs: list[jax.Array]) -> jax.Array:
    """A layer's output by itself."""
    x = inputs[0]
    match layer:
        case graph.Dense():
            y = module(x)
            return jax.nn.softmax(y) if layer.activation == "softmax" else y
        case _ if module is not None:
            return module(x)
        case graph.Activation():
            return getattr(jax.nn, ACTIVATIONS[layer.kind].keras)(x)
        case graph.ZeroPad():
            return jnp.pad(x, ((0, 0), *layer.padding, (0, 0)))
        case graph.Interleave():
            return InterleaveChannels(layer.step)(x)
        case graph.CopyChannels():
            return x[..., layer.start : layer.start + layer.count]
        case graph.FoldHalves():
            half = x.shape[-1] // 2
            return x[..., :half] + x[..., half : 2 * half]
        case graph.Concat():
            return jnp.concatenate(inputs, -1)
        case graph.Add():
            return sum(inputs[1:], x)
        case graph.Multiply():
            return x * inputs[1]
        case graph.GlobalPool():
            mean_or_max = jnp.mean if layer.kind == "avg" else jnp.max
            return mean_or_max(x, (1, 2), keepdims=layer.keepdims)
        case graph.Pool():
            pool = operations.max_pool if layer.kind == "max" else operations.average_pool
            return pool(x, layer.pool_size, layer.strides, layer.padding, "channels_last")
        case graph.Reshape():
            return x.reshape(-1, 1, 1, x.shape[-1])
        case graph.Flatten():
            return x.reshape(x.shape[0], -1)
        case graph.Identity():
            return x
        case _:
            raise TypeError(f"no Flax layer for {layer}")


def build(
    spec: Spec,
    *,
    rngs: nnx.Rngs | None = None,
    fused: bool = True,
    dtype: Any = jnp.float32,
    weights: Weights = None,
    recompute: bool = False,
) -> Network:
    """The Flax network of a spec, ending in a softmax as the original does.

    Example:
        >>> from kconv.models import create
        >>> spec = create("keffnet_b0", classes=10, input_shape=(32, 32, 3))
        >>> network = build(spec, rngs=nnx.Rngs(0))
        >>> network.eval()
        >>> network.k_stem_conv.kernel.shape
        (3, 3, 3, 32)
        >>> nnx.jit(lambda network, x: network(x))(network, jnp.ones((2, 32, 32, 3))).shape
        (2, 10)

    Args:
        spec: of :mod:`kconv.models`.
        rngs: the keys of the initial values ("params") and of dropout and drop-connect ("dropout");
            there is no default.
        fused: whether chains of layers run as one operation each; the layers and their weights are
            the same.
        dtype: of the parameters.
        weights: what to fill it with, as for :func:`create_model`.
        recompute: whether training keeps little of what the layers compute, and computes it anew in
            the backward pass: less memory for about a third more time.

    Returns:
        A :class:`Network` from (N, H, W, channels) to (N, classes), in training mode.

    Raises:
        TypeError: if ``spec`` is none, or ``rngs`` are missing.
        ValueError: if the weights are of another network, or nothing is fused that could compute
            anew.
    """
    if recompute and not fused:
        raise ValueError("recompute=True, expected fused=True with it")
    expect_spec(spec, "jax.nnx")
    options: dict[str, Any] = {"fused": fused, "dtype": dtype, "recompute": recompute}
    network = Network(spec.graph(), rngs=rngs, **options)
    if weights is not None:
        fill_network(network, spec, weights)
    return network


def create_model(
    name: str,
    *,
    rngs: nnx.Rngs | None = None,
    ktype: str | int | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: Weights = None,
    **options: Any,
) -> Network:
    """A network by name, under the arguments of ``kconv.torch.create_model``.

    Example:
        >>> network = create_model("keffnet_s", num_classes=10, image_size=16, rngs=nnx.Rngs(0))
        >>> network(jnp.ones((2, 16, 16, 3))).shape
        (2, 10)

    Args:
        name: of :func:`kconv.list_models`.
        rngs: the keys of the initial values ("params") and of dropout and drop-connect ("dropout");
            there is no default.
        ktype: kind of pointwise convolution, its name or its number; by default the network's own.
        num_classes: outputs of the classifier, by default 1000.
        in_chans: channels of the images, by default 3.
        image_size: height and width of the images, on which paddings depend; by default 224.
        weights: a name of :func:`kconv.list_weights` ("cifar10" for this network's trained on it),
            a file that :func:`kconv.load_weights` reads, or the folder of a run; a run's options
            are then the defaults of the other arguments. Where the number of classes is another
            one, the classifier starts anew.
        **options: further fields of the network's spec (see :mod:`kconv.models`).

    Returns:
        The network, which ends in a softmax, in training mode.

    Raises:
        ValueError: an option makes no sense, or the weights are of another network.
        TypeError: the network has no such option, or ``rngs`` are missing.
    """
    return create(
        partial(build, rngs=rngs),
        name,
        ktype=ktype,
        num_classes=num_classes,
        in_chans=in_chans,
        image_size=image_size,
        weights=weights,
        options=options,
    )


class ConvUnit(Network):
    """Convolution, batch norm and activation as one operation, with what often follows.

    After the activation the channels are interleaved, and the input is added, if so asked. Two
    grouped units, the first with ``interleave``, the second with ``residual``, are the papers'
    block where channels stay as many (section 3 of V1, MENDEL 28(1), 2022).

    Example:
        >>> unit = ConvUnit(32, 48, groups=4, interleave=12, activation="swish", rngs=nnx.Rngs(0))
        >>> unit(jnp.ones((2, 7, 5, 32))).shape, unit.conv.kernel.shape, unit.bn.mean.shape
        ((2, 7, 5, 48), (1, 1, 8, 48), (48,))

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        kernel_size: height and width of the kernel.
        strides: in both directions; padding is "SAME".
        groups: divides the channels of input and output; as many as the input's channels make a
            depthwise convolution.
        activation: "swish" or another of ``kconv.models.FUSED_ACTIVATIONS``; None for none.
        interleave: step of the interleave after the activation; 1 for none.
        residual: whether the input is added at the end.
        epsilon: of the batch norm.
        momentum: of the batch norm, in Flax's sense.
        rngs: the keys of the initial values.
        fused: whether the layers run as one operation.
        dtype: of the parameters.

    Input: (N, H, W, in_features). Output: (N, H/strides, W/strides, out_features), rounded up.

    Raises:
        ValueError: if the activation is unknown, a size is below 1, groups do not divide the
            channels, or a residual unit changes the shape.
        TypeError: if a size is not a whole number.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 1,
        strides: int = 1,
        groups: int = 1,
        *,
        activation: ActivationName | None = "swish",
        interleave: int = 1,
        residual: bool = False,
        epsilon: float = 1e-3,
        momentum: float = 0.99,
        rngs: nnx.Rngs,
        fused: bool = True,
        dtype: Any = jnp.float32,
    ) -> None:
        layers = conv_unit_graph(
            in_features,
            out_features,
            kernel_size,
            strides,
            groups,
            activation,
            interleave,
            residual,
            epsilon,
            momentum,
        )
        super().__init__(layers, rngs=rngs, fused=fused, dtype=dtype)


class MBConv(Network):
    """EfficientNet's block (Tan and Le, 2019) as one operation, with grouped convolutions.

    Expanding convolution, depthwise convolution, squeeze and excite, projecting convolution; where
    the shape stays, drop-connect and the sum with the input. The kType tells what stands for the
    pointwise convolutions (section 3 of V1, MENDEL 28(1), 2022, and of V2, Entropy 24(9):1264,
    2022).

    Example:
        >>> block = MBConv(16, 24, kernel_size=5, strides=2, rngs=nnx.Rngs(0))
        >>> block(jnp.ones((2, 9, 7, 16))).shape
        (2, 5, 4, 24)

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        kernel_size: of the depthwise convolution.
        strides: of the depthwise convolution.
        expand_ratio: inner channels for each of the input's; 1 for no expansion.
        se_ratio: channels of squeeze and excite for each of the input's; 0 for none.
        ktype: a kType, its name or its number; None for ordinary pointwise convolutions.
        activation: as that of :class:`ConvUnit`; the projecting convolution has none.
        drop_connect: rate at which an image's residual branch is dropped in training.
        rngs: the keys of the initial values and, "dropout", of drop-connect.
        fused: whether the layers run as one operation.
        dtype: of the parameters.

    Input: (N, H, W, in_features). Output: (N, H/strides, W/strides, out_features), rounded up.

    Raises:
        ValueError: if the kType or the activation is unknown, a size is below 1, or a rate not from
            0 to below 1.
        TypeError: if a size is not a whole number or a ratio not a number.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        strides: int = 1,
        expand_ratio: float = 6,
        se_ratio: float = 0.25,
        ktype: ktypes.KType | str | int | None = "D6_16ch",
        *,
        activation: ActivationName | None = "swish",
        drop_connect: float = 0.0,
        rngs: nnx.Rngs,
        fused: bool = True,
        dtype: Any = jnp.float32,
    ) -> None:
        layers = mbconv_graph(
            in_features,
            out_features,
            kernel_size,
            strides,
            expand_ratio,
            se_ratio,
            None if ktype is None else ktypes.resolve(ktype),
            activation,
            drop_connect,
        )
        super().__init__(layers, rngs=rngs, fused=fused, dtype=dtype)
