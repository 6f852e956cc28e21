"""One call of a Keras layer or operation as layers of a graph of :mod:`kconv.models`.

:func:`lift` makes them. All that it reads of the layer it reads through :func:`fingerprint`, so two
equal fingerprints mean that the graph's layers still hold. What another kind of layer computes is
one more entry in ``_KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import keras
from keras import activations, layers, ops

from kconv.keras._private import operation_of
from kconv.keras.layers import (
    CopyChannels,
    DepthwiseConv2D,
    InterleaveChannels,
    PointwiseConv2D,
    SumIntoHalfChannels,
)
from kconv.models import graph
from kconv.models.activations import ACTIVATIONS, FUSED_ACTIVATIONS, ActivationName
from kconv.models.fusion import is_fusable

__all__ = [
    "ACTIVATION_NAMES",
    "Call",
    "KeptError",
    "Lifted",
    "Product",
    "Scalar",
    "fingerprint",
    "is_convolution",
    "lift",
    "same",
]

ACTIVATION_NAMES: dict[Any, ActivationName] = {
    getattr(activations, ACTIVATIONS[name].keras): name for name in FUSED_ACTIVATIONS
}
"""kconv's names of Keras's activations, which are themselves meant and not their names."""

Read = Any
"""What a fingerprint holds, by its names."""
Made: TypeAlias = graph.Layer | tuple[graph.Layer, ...]
Shape = tuple[int | None, ...]


class KeptError(ValueError):
    """Why a layer runs by itself."""


@dataclass(frozen=True, kw_only=True)
class Scalar(graph.Layer):
    """Sum or product of all elements and a number, part of what :func:`lift` does not see whole."""

    kind: Literal["add", "multiply"]
    value: float


@dataclass(frozen=True, kw_only=True)
class Product(graph.Layer):
    """Product of two tensors of one shape, likewise."""


@dataclass(frozen=True)
class Call:
    """How a layer was called.

    Attributes:
        common: what a graph layer has whatever its kind.
        operands: tensors and, of operations, numbers.
        dtype: of the result.
        data_format: of images.
    """

    common: dict[str, Any]
    operands: list[Any]
    dtype: str
    data_format: str

    @property
    def shape(self) -> graph.Shape:
        shape: graph.Shape = self.common["shape"]
        return shape

    @property
    def shapes(self) -> list[Shape]:
        return [tuple(x.shape) for x in self.operands if isinstance(x, keras.KerasTensor)]

    @property
    def numbers(self) -> list[Any]:
        return [x for x in self.operands if not isinstance(x, keras.KerasTensor)]

    @property
    def axis(self) -> int:
        """The axis of an image's channels."""
        return 3 if self.data_format == "channels_last" else 1

    def is_channels(self, axis: Any) -> bool:
        return axis in (self.axis, self.axis - 4)

    def channels(self) -> int:
        """Of the input."""
        channels = self.shapes[0][self.axis]
        assert channels is not None
        return channels


@dataclass(frozen=True)
class Lifted:
    """What stands for a call.

    Attributes:
        layers: in their order; the last has the call's result.
        dtype: in which they compute.
        variables: of the layers' weights, by (layer, weight).
    """

    layers: tuple[graph.Layer, ...]
    dtype: str
    variables: dict[tuple[str, str], Any]


def _conv(read: Read, call: Call) -> Made:
    kernel = _conv_kernel(read)
    if kernel[2] * read.groups != call.channels():
        raise KeptError(f"groups={read.groups}, with a kernel of the shape {kernel}")
    conv = graph.Conv(
        **call.common,
        kernel_size=read.kernel_size,
        strides=read.strides,
        padding=read.padding,
        use_bias=read.use_bias,
        groups=read.groups,
        filters=read.filters,
        in_channels=kernel[2] * read.groups,
        interleave=getattr(read, "interleave", 1),
        dilation=read.dilation_rate,
    )
    return _activated(conv, read.activation)


def _depthwise(read: Read, call: Call) -> Made:
    kernel = _conv_kernel(read)
    _check_square(read)
    conv = graph.DepthwiseConv(
        **call.common,
        kernel_size=read.kernel_size[0],
        strides=read.strides[0],
        padding=read.padding,
        use_bias=read.use_bias,
        depth_multiplier=read.depth_multiplier,
        in_channels=kernel[2],
    )
    return _activated(conv, read.activation)


def _separable(read: Read, call: Call) -> Made:
    """A depthwise convolution, and a pointwise one that has the bias and the activation."""
    _check_convolution(read)
    _check_square(read)
    channels = read.depthwise_kernel.shape[2]
    wide = channels * read.depth_multiplier
    inner = {"name": f"{call.common['name']}/depthwise", "inputs": call.common["inputs"]}
    depthwise = graph.DepthwiseConv(
        **inner,
        shape=(*call.shape[:-1], wide),
        kernel_size=read.kernel_size[0],
        strides=read.strides[0],
        padding=read.padding,
        depth_multiplier=read.depth_multiplier,
        in_channels=channels,
    )
    outer = {**call.common, "inputs": (depthwise.name,)}
    options = {"filters": read.filters, "in_channels": wide, "use_bias": read.use_bias}
    pointwise = _activated(graph.Conv(**outer, **options), read.activation)
    return depthwise, *(pointwise if isinstance(pointwise, tuple) else (pointwise,))


def _dense(read: Read, call: Call) -> Made:
    """Of vectors or single pixels, as in a squeeze-excite: a pointwise convolution."""
    if getattr(read, "lora_enabled", False):
        raise KeptError("it has LoRA weights")
    shape = call.shapes[0]
    pixel = len(shape) == 4 and shape[1:3] == (1, 1) and call.data_format == "channels_last"
    if len(shape) != 2 and not pixel:
        raise KeptError(f"its input has the shape {shape}")
    channels = shape[-1]
    kernel = tuple(read._kernel.shape)
    if kernel != (channels, read.units):
        raise KeptError(f"its kernel has the shape {kernel}")
    options = {"filters": read.units, "in_channels": channels, "use_bias": read.use_bias}
    return _activated(graph.Conv(**call.common, padding="valid", **options), read.activation)


def _conv_kernel(read: Read) -> tuple[int, ...]:
    """The shape of a convolution's kernel."""
    _check_convolution(read)
    return tuple((read.kernel if read._kernel is None else read._kernel).shape)


def _check_convolution(read: Read) -> None:
    if getattr(read, "lora_enabled", False):
        raise KeptError("it has LoRA weights")
    if read.padding not in ("same", "valid"):
        raise KeptError(f"padding={read.padding!r}")


def _check_square(read: Read) -> None:
    for name in ("kernel_size", "strides"):
        if len(set(getattr(read, name))) > 1:
            raise KeptError(f"{name}={getattr(read, name)}")
    if read.dilation_rate != (1, 1):
        raise KeptError(f"dilation_rate={read.dilation_rate}")


def _activated(layer: graph.Layer, function: Any) -> Made:
    """A layer whose result goes through an activation, as two layers."""
    if function is None or function is activations.linear:
        return layer
    inner = replace(layer, name=f"{layer.name}/linear")  # no Keras layer's name has a "/"
    common = {"name": layer.name, "inputs": (inner.name,), "shape": layer.shape}
    return inner, _activation_of(function, common)


_FUNCTIONS: dict[Any, tuple[ActivationName, tuple[float, ...]]] = {
    **{function: (name, ()) for function, name in ACTIVATION_NAMES.items()},
    activations.leaky_relu: ("leaky_relu", (0.2,)),
    activations.elu: ("elu", (1.0,)),
    activations.gelu: ("gelu", ()),
    activations.mish: ("mish", ()),
}
"""Those of users' models, too: names and parameters, which are Keras's defaults."""


def _activation_of(function: Any, common: Mapping[str, Any]) -> graph.Activation:
    for known, (kind, parameters) in _FUNCTIONS.items():
        if function is known:
            return graph.Activation(**common, kind=kind, parameters=parameters)
    raise KeptError(f"activation={getattr(function, '__name__', function)}")


def _norm(read: Read, call: Call) -> Made:
    if not call.is_channels(read.axis):
        raise KeptError(f"axis={read.axis}")
    for name, wanted in (("center", True), ("renorm", False), ("synchronized", False)):
        if bool(getattr(read, name)) is not wanted:
            raise KeptError(f"{name}={getattr(read, name)}")
    options = {"epsilon": read.epsilon, "momentum": read.momentum, "scale": bool(read.scale)}
    return graph.BatchNorm(**call.common, **options)


def _activation(read: Read, call: Call) -> Made:
    if read.activation is activations.linear:
        return graph.Identity(**call.common)
    return _activation_of(read.activation, call.common)


def _relu(read: Read, call: Call) -> Made:
    if read.threshold or (read.negative_slope and read.max_value is not None):
        raise KeptError(f"threshold={read.threshold}, negative_slope={read.negative_slope}")
    if read.negative_slope:
        return _leaky_relu(read, call)
    if read.max_value in (None, 6):
        return graph.Activation(**call.common, kind="relu" if read.max_value is None else "relu6")
    return graph.Activation(**call.common, kind="clip", parameters=(0.0, float(read.max_value)))


def _leaky_relu(read: Read, call: Call) -> Made:
    parameters = (float(read.negative_slope),)
    return graph.Activation(**call.common, kind="leaky_relu", parameters=parameters)


def _elu(read: Read, call: Call) -> Made:
    return graph.Activation(**call.common, kind="elu", parameters=(float(read.alpha),))


def _zero_pad(read: Read, call: Call) -> Made:
    return graph.ZeroPad(**call.common, padding=read.padding)


def _interleave(read: Read, call: Call) -> Made:
    return graph.Interleave(**call.common, step=max(read.step_size, 1))


def _copy_channels(read: Read, call: Call) -> Made:
    if read.channel_count != call.shape[-1]:
        raise KeptError(f"channel_count={read.channel_count}")
    return graph.CopyChannels(**call.common, start=read.channel_start, count=read.channel_count)


def _fold_halves(read: Read, call: Call) -> Made:
    return graph.FoldHalves(**call.common)


def _dropout(read: Read, call: Call) -> Made:
    if read.noise_shape != (None, 1, 1, 1):
        raise KeptError("it drops single elements")
    return graph.Dropout(**call.common, rate=read.rate, per_sample=True)


def _mean(read: Read, call: Call) -> Made:
    return graph.GlobalPool(**call.common, keepdims=bool(read.keepdims))


def _pool(read: Read, call: Call, kind: Literal["avg", "max"]) -> Made:
    (height, width), strides = read.pool_size, read.strides
    if height != width or strides[0] != strides[1]:
        raise KeptError(f"pool_size={read.pool_size}, strides={strides}")
    options = {"pool_size": height, "strides": strides[0], "padding": read.padding}
    return graph.Pool(**call.common, kind=kind, **options)


def _average_pool(read: Read, call: Call) -> Made:
    return _pool(read, call, "avg")


def _max_pool(read: Read, call: Call) -> Made:
    return _pool(read, call, "max")


def _reshape(read: Read, call: Call) -> Made:
    if read.target_shape == call.shapes[0][1:]:
        return graph.Identity(**call.common)
    pixel = [1, 1, 1]
    pixel[call.axis - 1] = call.shape[-1] or -1
    vector = len(call.shapes[0]) == 2 and call.shapes[0][1] == call.shape[-1]
    if not vector or read.target_shape != tuple(pixel):
        raise KeptError(f"target_shape={read.target_shape}")
    return graph.Reshape(**call.common)


def _flatten(read: Read, call: Call) -> Made:
    shape = call.shapes[0]
    if len(shape) != 4 or shape[1] * shape[2] * shape[3] != call.channels():  # type: ignore[operator]
        raise KeptError(f"it flattens {shape}")
    return graph.Flatten(**call.common)


def _add(read: Read, call: Call) -> Made:
    if call.numbers:
        return _scalar("add", call)
    if len(set(call.shapes)) > 1:
        raise KeptError(f"it adds tensors of the shapes {call.shapes}")
    return graph.Add(**call.common)


def _concatenate(read: Read, call: Call) -> Made:
    if not call.is_channels(read.axis):
        raise KeptError(f"axis={read.axis}")
    return graph.Concat(**call.common)


def _multiply(read: Read, call: Call) -> Made:
    """An image's product with a gate, which may come first."""
    if call.numbers:
        return _scalar("multiply", call)
    if len(call.shapes) == 2 and all(len(shape) == 4 for shape in call.shapes):
        for order in (1, -1):
            x, gate = call.shapes[::order]
            pixels = [size for axis, size in enumerate(gate) if axis not in (0, call.axis)]
            if pixels == [1, 1] and x[call.axis] == gate[call.axis]:
                inputs = call.common["inputs"][::order]
                return graph.Multiply(**{**call.common, "inputs": inputs})
        if call.shapes[0] == call.shapes[1]:
            return Product(**call.common)
    raise KeptError(f"it multiplies tensors of the shapes {call.shapes}")


def _divide(read: Read, call: Call) -> Made:
    if len(call.operands) == 2 and call.numbers == [call.operands[1]]:
        value = _number(call)
        if value:
            return Scalar(**call.common, kind="multiply", value=1 / value)
    raise KeptError("it divides by a tensor")


def _scalar(kind: Literal["add", "multiply"], call: Call) -> Made:
    return Scalar(**call.common, kind=kind, value=_number(call))


def _number(call: Call) -> float:
    if (
        len(call.operands) != 2
        or len(call.numbers) != 1
        or type(call.numbers[0]) not in (int, float)
    ):
        raise KeptError("its operands are neither two tensors nor a tensor and a number")
    return float(call.numbers[0])


def _made_by(function: Callable[[Any], Any]) -> type:
    """The class of the operation that a function of a symbolic tensor is."""
    result = function(keras.KerasTensor((1, 1, 1, 1)))
    return type(operation_of(result))


# Only what all of a class's layers have: PyTorch's modules take long to say that they lack a name.
_DEPTHWISE = (
    *("kernel_size", "strides", "padding", "dilation_rate", "use_bias", "activation"),
    *("data_format", "depth_multiplier"),
)
_CONV = (*_DEPTHWISE[:-1], "groups", "filters", "lora_enabled", "convolution_op")
_SEPARABLE = (*_DEPTHWISE, "filters")
_DENSE = ("units", "use_bias", "activation", "lora_enabled")
_NORM = ("axis", "epsilon", "momentum", "center", "scale", "renorm", "synchronized")
_POOL = ("pool_size", "strides", "padding", "data_format")
# The graph's names of weights, and the layers' attributes.
_KERNEL = {"kernel": "_kernel", "bias": "bias"}
_DEPTHWISE_KERNEL = {"depthwise_kernel": "kernel", "bias": "bias"}
_TWO_KERNELS = {
    "depthwise_kernel": "depthwise_kernel",
    "kernel": "pointwise_kernel",
    "bias": "bias",
}
_STATISTICS = {name: name for name in ("gamma", "beta", "moving_mean", "moving_variance")}


@dataclass(frozen=True)
class _Kind:
    """What is read of the layers of a class, subclasses not counted, and what is made of it."""

    lift: Callable[[Read, Call], Made]
    names: tuple[str, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)


def _elementwise(name: ActivationName) -> _Kind:
    return _Kind(lambda read, call: graph.Activation(**call.common, kind=name))


_KINDS = {
    layers.Conv2D: _Kind(_conv, _CONV, _KERNEL),
    PointwiseConv2D: _Kind(_conv, (*_CONV, "interleave"), _KERNEL),
    layers.DepthwiseConv2D: _Kind(_depthwise, _DEPTHWISE, _DEPTHWISE_KERNEL),
    DepthwiseConv2D: _Kind(_depthwise, _DEPTHWISE, _DEPTHWISE_KERNEL),
    layers.Dense: _Kind(_dense, _DENSE, _KERNEL),
    layers.SeparableConv2D: _Kind(_separable, _SEPARABLE, _TWO_KERNELS),
    layers.BatchNormalization: _Kind(_norm, _NORM, _STATISTICS),
    layers.Activation: _Kind(_activation, ("activation",)),
    layers.ReLU: _Kind(_relu, ("negative_slope", "max_value", "threshold")),
    layers.LeakyReLU: _Kind(_leaky_relu, ("negative_slope",)),
    layers.ELU: _Kind(_elu, ("alpha",)),
    layers.ZeroPadding2D: _Kind(_zero_pad, ("padding", "data_format")),
    InterleaveChannels: _Kind(_interleave, ("step_size", "data_format")),
    CopyChannels: _Kind(_copy_channels, ("channel_start", "channel_count", "data_format")),
    SumIntoHalfChannels: _Kind(_fold_halves, ("data_format",)),
    layers.Dropout: _Kind(_dropout, ("noise_shape", "rate")),
    layers.GlobalAveragePooling2D: _Kind(_mean, ("keepdims", "data_format")),
    layers.AveragePooling2D: _Kind(_average_pool, _POOL),
    layers.MaxPooling2D: _Kind(_max_pool, _POOL),
    layers.Reshape: _Kind(_reshape, ("target_shape",)),
    layers.Flatten: _Kind(_flatten, ("data_format",)),
    layers.Add: _Kind(_add),
    layers.Concatenate: _Kind(_concatenate, ("axis",)),
    layers.Multiply: _Kind(_multiply),
    _made_by(lambda x: x + 1.0): _Kind(_add),
    _made_by(lambda x: x * 2.0): _Kind(_multiply),
    _made_by(lambda x: x / 2.0): _Kind(_divide),
    **{
        _made_by(getattr(ops, ACTIVATIONS[name].keras)): _elementwise(name)
        for name in FUSED_ACTIVATIONS
    },
}

# Where a layer's computation can be exchanged, in an instance or in its class. (PyTorch's modules,
# which Keras's layers are on that backend, have a `forward`.)
_METHODS = ("__call__", "call", "forward", "convolution_op")
_ORIGINALS = {
    kind: {name: getattr(kind, name) for name in _METHODS if hasattr(kind, name)} for kind in _KINDS
}
_OF_LAYERS = ("forward",) if hasattr(layers.Layer, "forward") else ()
_OF_LAYERS = (*_OF_LAYERS, "activity_regularizer", "dtype_policy", "autocast")


def _names(kind: type, entry: _Kind) -> tuple[str, ...]:
    own = _OF_LAYERS if issubclass(kind, layers.Layer) else ()
    return ("__call__", "call", *own, *entry.names, *entry.weights.values())


_NAMES = {kind: _names(kind, entry) for kind, entry in _KINDS.items()}


def is_convolution(layer: Any) -> bool:
    """Whether this is a convolution that may be lifted."""
    return type(layer) in _KINDS and "kernel_size" in _KINDS[type(layer)].names


def fingerprint(layer: Any) -> list[Any]:
    """All that :func:`lift` reads of a layer or an operation."""
    names = _NAMES.get(kind := type(layer))
    if names is None:
        return [kind]
    return [kind, _hooked(layer), *[getattr(layer, name, None) for name in names]]


def _no_hooks(layer: Any) -> bool:
    return False


def _torch_hooks(layer: Any) -> bool:
    return isinstance(layer, layers.Layer) and bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


_hooked = _torch_hooks if keras.backend.backend() == "torch" else _no_hooks


def same(before: list[Any], after: list[Any]) -> bool:
    """Whether two fingerprints are equal; what cannot be compared is not."""
    try:
        return before == after and all(
            old is new  # a variable of one element equals another of that value
            for old, new in zip(before, after, strict=True)
            if isinstance(new, keras.Variable)
        )
    except Exception:  # an array's equality has no truth
        return False


def lift(values: list[Any], call: Call) -> Lifted:
    """The graph's layers that stand for a call of a layer or an operation.

    Args:
        values: the layer's fingerprint.
        call: how it is called.

    Raises:
        KeptError: if there are none.
    """
    kind, *rest = values
    if kind not in _KINDS:
        raise KeptError(f"no fused operation has the class {kind.__name__}")
    if rest.pop(0):
        raise KeptError("it has hooks")
    entry = _KINDS[kind]
    read = SimpleNamespace(**{"_kernel": None, **dict(zip(_NAMES[kind], rest, strict=True))})
    for name, original in _ORIGINALS[kind].items():
        if getattr(getattr(read, name), "__func__", None) is not original:
            raise KeptError(f"it has a {name} of its own")
    dtype, stored = _dtypes(kind, read, call)
    if getattr(read, "data_format", call.data_format) != call.data_format:
        raise KeptError(f"data_format={read.data_format!r}")
    try:
        hash(tuple(getattr(read, name) for name in entry.names))  # a list could change unnoticed
        made = entry.lift(read, call)
        made = made if isinstance(made, tuple) else (made,)
        variables = {
            (layer.name, name): getattr(read, entry.weights[name])
            for layer in made
            for name in layer.weights()
        }
        shapes = {(x.name, name): shape for x in made for name, shape in x.weights().items()}
        if kind is layers.Dense:  # whose kernel has no axes of a window
            shapes = {key: shape[-2:] for key, shape in shapes.items()}
        for key, variable in variables.items():
            found = keras.backend.standardize_dtype(variable.dtype)
            if tuple(variable.shape) != shapes[key] or found != stored:
                raise KeptError(f"its {key[1]} is {found} of the shape {tuple(variable.shape)}")
    except KeptError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        # Attributes of other types than Keras's layers set.
        raise KeptError("its attributes are not those of Keras's layer") from None
    if len(made) > 1 and not all(map(is_fusable, made)):  # it cannot be in two parts
        raise KeptError("no fused operation has all of it")
    return Lifted(made, dtype, variables)


def _dtypes(kind: type, read: Read, call: Call) -> tuple[str, str]:
    """In which a call computes, and its result is; and that of its layer's weights."""
    if not issubclass(kind, layers.Layer):
        dtype = stored = call.dtype
    else:
        policy = read.dtype_policy
        dtype, stored = str(policy.compute_dtype), str(policy.variable_dtype)
        if type(policy) is not keras.DTypePolicy:
            raise KeptError(f"its dtype policy is a {type(policy).__name__}")
        if read.activity_regularizer is not None:
            raise KeptError("it has an activity regularizer")
        if not read.autocast:
            raise KeptError("autocast=False")
    if dtype not in ("float32", "float64", "bfloat16"):
        raise KeptError(f"it computes in {dtype}")
    return dtype, stored
