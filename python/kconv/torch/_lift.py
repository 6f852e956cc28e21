"""What PyTorch's modules compute, as layers of :mod:`kconv.models.graph`.

:func:`lift` is the one place that knows how a module becomes such a layer. It goes by what the
module's forward reads (a convolution's weight, not its ``in_channels``), and knows exact classes
only, as a subclass may compute anything. What it reads is the module's fingerprint; a
:class:`Watch` compares those of many modules with what they were.

Example:
    >>> x = graph.Input(name="x", inputs=(), shape=UNKNOWN)
    >>> (layer,) = lift(nn.Conv2d(8, 16, 3, stride=2, padding=1), "conv", [x])
    >>> layer.in_channels, layer.strides, layer.padding
    (8, (2, 2), ((1, 1), (1, 1)))
    >>> lift(nn.Conv2d(8, 16, 3, padding_mode="reflect"), "conv", [x])  # no fused operation has it
    ()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress, repeat
from operator import attrgetter, is_not, itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kconv.models import graph
from kconv.models.activations import ACTIVATIONS, ActivationName
from kconv.torch._functions import Call, add, concatenate, fold_halves
from kconv.torch.layers import (
    AcceleratedConv2d,
    DepthwiseConv2d,
    DropConnect,
    InterleaveChannels,
    InterleavedPointwiseConv2d,
    PaddedConv2d,
    PointwiseConv2d,
)

__all__ = [
    "GELU",
    "UNKNOWN",
    "Derived",
    "Watch",
    "activation",
    "is_chain",
    "is_in_place",
    "is_known",
    "lift",
    "window_pool",
]

UNKNOWN: graph.Shape = (None, None, None)
"""The shape of what nothing is known about."""


@dataclass(frozen=True, kw_only=True)
class Derived(graph.Layer):
    """What is computed on the way from layer to layer, and of no interest to a fused operation.

    Attributes:
        kind: what it is, such as a size of the input or its channels in groups.
        source: the name of the layer that it is about.
        numbers: what else there is to know.
        like: the name of a layer that it is as large as.
        is_new: whether it is in memory of its own.
    """

    kind: str
    source: str
    numbers: tuple[int, ...] = ()
    like: str = ""
    is_new: bool = False


Common = dict[str, Any]
Inputs = Sequence[graph.Layer]


def lift(module: nn.Module | None, name: str, inputs: Inputs) -> tuple[graph.Layer, ...]:
    """The layers of the graph that compute exactly what a module does.

    Args:
        module: as it is now.
        name: of the last layer.
        inputs: the layers that it reads; their channels may be unknown (None).

    Returns:
        The layers, with the channels that the module's parameters have; none for a module of
        another class, one that somebody watches or has changed (hooks, a forward of its own), and
        one that computes what no layer of the graph does.
    """
    kind = _kind_of(type(module))
    if module is None or kind is None or not (inputs and (kind.joins or len(inputs) == 1)):
        return ()
    if any(isinstance(x, Derived) for x in inputs) and not isinstance(module, nn.Hardtanh):
        return ()
    try:
        if _is_touched(module, kind) or not _is_constant(kind.read and kind.read(vars(module))):
            return ()
    except (AttributeError, KeyError):  # of which the module's forward will speak
        return ()
    made = kind.lift(module, {"name": name, "inputs": tuple(x.name for x in inputs)}, inputs)
    return made if isinstance(made, tuple) else () if made is None else (made,)


def is_known(module: nn.Module) -> bool:
    """Whether modules of this class can be lifted, not looked into."""
    return _kind_of(type(module)) is not None and type(module) is not nn.Sequential


def is_chain(module: nn.Module | None) -> bool:
    """Whether a module only calls its children, one after the other."""
    return (
        type(module) is nn.Sequential
        and not _is_touched(module, _KINDS[nn.Sequential])
        and None not in module._modules.values()
    )


def is_in_place(module: nn.Module | None) -> bool:
    """Whether a module writes its result into its input."""
    return bool(getattr(module, "inplace", False))


class Watch:
    """Whether lifting modules again would give the same layers.

    The loops are those of C functions: a look takes a fraction of a microsecond for each module.

    Args:
        modules: of any class; of those that cannot be lifted only the class is watched.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        composite = [m for m in modules if is_known(m) and m._modules]
        self._children = [(m, list(m._modules.values())) for m in composite]
        inner = (child for _, children in self._children for child in children if child is not None)
        modules = self._all = [*modules, *inner]
        self._kinds = list(map(type, self._all))
        self._known = [module for module in modules if _kind_of(type(module))]
        self._classes = [(cls, _KINDS[cls].methods) for cls in {*map(type, self._known)}]
        self._parametrized = [m for m in self._known if _KINDS[type(m)].parametrized]
        self._readable: dict[Callable[[Any], Any], list[int]] = {}
        for place, module in enumerate(self._known):
            read = _KINDS[type(module)].read
            if read and _can(read, module):
                self._readable.setdefault(read, []).append(place)
        self._fingerprints = self._look()
        self._hooked = list(map(_has_hooks, self._known))
        self._next_hook = RemovableHandle.next_id

    def unchanged(self) -> bool:
        """Whether all is as it was when this was made."""
        if list(map(type, self._all)) != self._kinds:
            return False
        for module, children in self._children:
            if list(module._modules.values()) != children:
                return False
        try:
            if self._look() != self._fingerprints:
                return False
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # what cannot be read or compared is not what it was
        # Each new hook anywhere takes the next number, so modules without hooks are looked at again
        # only then: where the caches are cold that takes 0.2 ms for the 392 of a kEffNet-B0.
        if self._next_hook != RemovableHandle.next_id or any(self._hooked):
            self._next_hook = RemovableHandle.next_id
            return list(map(_has_hooks, self._known)) == self._hooked
        return True

    def _look(self) -> list[Any]:
        """What the modules are lifted from but their hooks, as columns."""
        own = list(map(_DICT, self._known))
        parameters = list(map(_PARAMETERS, self._parametrized))
        tensors = [*map(dict.get, parameters, repeat("weight"))]
        tensors += map(dict.get, parameters, repeat("bias"))
        present = list(map(is_not, tensors, repeat(None)))
        return [
            list(map(len, own)),  # one attribute more may stand for a method or a parameter
            list(map(dict.get, own, repeat("forward"))),
            [
                list(map(read, map(own.__getitem__, places)))
                for read, places in self._readable.items()
            ],
            present,
            list(map(_SHAPE, compress(tensors, present))),
            [methods(cls) for cls, methods in self._classes],
            _FUNCTIONS(F),
        ]


_DICT, _PARAMETERS, _SHAPE = map(attrgetter, ("__dict__", "_parameters", "shape"))
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_OWN = frozenset(
    "_call_impl _wrapped_call_impl _compiled_call_impl _conv_forward _check_input_dim "
    "weight bias running_mean running_var num_batches_tracked".split()
)
"""What stands in a module's ``__dict__`` only where somebody put it there."""
_FUNCTIONS = attrgetter(
    *"conv2d batch_norm pad avg_pool2d max_pool2d prelu relu hardtanh silu hardsigmoid".split(),
    *"hardswish leaky_relu elu gelu mish".split(),
)
_OWN_FUNCTIONS = _FUNCTIONS(F)


def _has_hooks(module: nn.Module) -> bool:
    return any(map(module.__dict__.get, _HOOKS))


def _can(read: Callable[[Any], Any], module: nn.Module) -> bool:
    try:
        read(vars(module))
    except (AttributeError, KeyError):
        return False
    return True


def _is_touched(module: nn.Module, kind: _Kind) -> bool:
    """Whether a call of a module does something else than its class's forward, as it came."""
    own = module.__dict__
    forward = own.get("forward")
    if forward is not None and not (
        # What is left when a forward of its own is taken back.
        isinstance(forward, MethodType)
        and forward.__self__ is module
        and forward.__func__ is type(module).forward
    ):
        return True
    return (
        not _OWN.isdisjoint(own)
        or _has_hooks(module)
        or kind.methods(type(module)) != kind.own_methods
        or _FUNCTIONS(F) != _OWN_FUNCTIONS
    )


def _is_constant(value: Any) -> bool:
    """Whether a value cannot change in its place; a list can."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    constants = (int, float, str, bool, type(None), FunctionType, BuiltinFunctionType)
    return isinstance(value, constants)


# How each class of modules is lifted. The channels of an input may be unknown, and are what the
# module takes.


def _convolution(conv: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    strides, dilation, groups = _pair(conv.stride), _pair(conv.dilation), conv.groups
    if weight is None or weight.dim() != 4 or None in (strides, dilation):
        return None
    filters, group_inputs, *kernel = weight.shape
    padding = _convolution_padding(conv, (kernel[0], kernel[1]), strides)
    if (
        padding is None
        or conv.padding_mode != "zeros"
        or min(*strides, *dilation) < 1
        or groups < 1
        or filters % groups
        or (bias is not None and bias.shape != (filters,))
        or not _is_image(inputs[0], group_inputs * groups)
    ):
        return None
    one_pixel = inputs[0].shape[:2] == (1, 1) and padding == _NO_BORDERS
    return graph.Conv(
        **common,
        shape=(*((1, 1) if one_pixel else (None, None)), filters),
        filters=filters,
        in_channels=group_inputs * groups,
        kernel_size=(kernel[0], kernel[1]),
        strides=strides,
        padding=padding,
        groups=groups,
        use_bias=bias is not None,
        dilation=dilation,
        interleave=conv.interleave if isinstance(conv, InterleavedPointwiseConv2d) else 1,
    )


def _linear(linear: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if weight is None or weight.dim() != 2 or len(inputs[0].shape) != 1:
        return None
    if inputs[0].shape[0] not in (None, weight.shape[1]):
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    return graph.Conv(
        **common,
        shape=(weight.shape[0],),
        filters=weight.shape[0],
        in_channels=weight.shape[1],
        padding="valid",
        use_bias=bias is not None,
    )


def _convolution_padding(
    conv: Any, kernel: tuple[int, int], strides: tuple[int, int]
) -> graph.Padding | graph.Borders | None:
    padding = conv.padding
    if type(conv).__name__ == "Conv2dSame":  # timm's, with TensorFlow's padding
        return "same"
    if isinstance(conv, PaddedConv2d):
        if padding not in (0, (0, 0), "valid"):
            return None
        if conv.borders == "same":  # TensorFlow's, which depends on the image's size
            return "same"
        padding = conv.borders
    if padding == "same" and strides == (1, 1):
        totals = [d * (k - 1) for d, k in zip(_pair(conv.dilation), kernel, strict=True)]
        top, left = (total // 2 for total in totals)
        return (top, totals[0] - top), (left, totals[1] - left)
    if padding == "valid":
        return (0, 0), (0, 0)
    explicit = isinstance(conv, PaddedConv2d | DepthwiseConv2d) and isinstance(padding, tuple)
    if explicit and all(isinstance(sides, tuple) for sides in padding):
        sides = [side for sides in padding for side in sides]
        return padding if len(padding) == 2 and len(sides) == 4 and min(sides) >= 0 else None
    pair = _pair(padding)
    if pair is None or min(pair) < 0:
        return None
    return (pair[0], pair[0]), (pair[1], pair[1])


def _batch_norm(norm: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if (
        bias is None
        or bias.dim() != 1
        or (weight is not None and weight.shape != bias.shape)
        or not norm.track_running_stats
        or not norm.eps > 0  # which PyTorch refuses in training
        or not _is_image(inputs[0], len(bias))
    ):
        return None
    shape = (*inputs[0].shape[:2], len(bias))
    epsilon = float(norm.eps)
    return graph.BatchNorm(**common, shape=shape, epsilon=epsilon, scale=weight is not None)


def _batch_norm_act(module: Any, common: Common, inputs: Inputs) -> Lifted:
    """A batch norm of timm's, which activates, too."""
    children = module._modules
    if children.keys() != {"drop", "act"} or type(children["drop"]) is not nn.Identity:
        return None
    norm_name = f"{common['name']}.norm"
    norm = _batch_norm(module, {**common, "name": norm_name}, inputs)
    if norm is None or not lift(children["drop"], "drop", [norm]):
        return None
    activation = lift(children["act"], common["name"], [norm])
    return (norm, *activation) if activation else None


def _frozen_batch_norm(norm: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    tensors = [norm._buffers.get(name) for name in _NORM_BUFFERS]
    channels = len(tensors[0]) if isinstance(tensors[0], Tensor) and tensors[0].dim() == 1 else -1
    if any(not isinstance(t, Tensor) or t.shape != (channels,) for t in tensors):
        return None
    if not _is_image(inputs[0], channels):
        return None
    shape = (*inputs[0].shape[:2], channels)
    return graph.BatchNorm(**common, shape=shape, epsilon=float(norm.eps))


_NORM_BUFFERS = "weight", "bias", "running_mean", "running_var"


def _dropout(module: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    if module.training and module.p != 0:
        return None
    return _identity(module, common, inputs)


def _activation(kind: ActivationName) -> Lifter:
    options = [name for name, _ in ACTIVATIONS[kind].parameters]

    def lift(module: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
        values = tuple(float(getattr(module, name)) for name in options)
        return activation(kind, common["name"], inputs[0], values)

    return lift


def _gelu(module: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    kind = GELU.get(module.approximate)
    return activation(kind, common["name"], inputs[0]) if kind else None


GELU = {"none": "gelu", "tanh": "gelu_tanh"}
"""By PyTorch's ``approximate``."""


def activation(
    kind: ActivationName, name: str, x: graph.Layer, parameters: tuple[float, ...] = ()
) -> graph.Layer | None:
    """An activation of a layer; a few are others with certain parameters."""
    if kind == "clip" and parameters == (0, 6):
        kind, parameters = "relu6", ()
    if isinstance(x, Derived):  # relu6(x + 3), of which a sixth is a hard sigmoid
        clips = kind == "relu6" and x.kind == "shifted"
        return replace(x, name=name, inputs=(x.name,), kind="clipped") if clips else None
    return graph.Activation(
        name=name, inputs=(x.name,), shape=x.shape, kind=kind, parameters=parameters
    )


def _prelu(module: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1:
        return None
    channels = inputs[0].shape[-1] if len(weight) == 1 else len(weight)  # one slope is for all
    if not _is_image(inputs[0], channels):
        return None
    return graph.PReLU(**common, shape=(*inputs[0].shape[:2], channels))


def _layer_scale(module: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    gamma = module._parameters.get("gamma")
    if gamma is None or gamma.dim() != 1 or not _is_image(inputs[0], len(gamma)):
        return None
    return graph.ChannelScale(**common, shape=(*inputs[0].shape[:2], len(gamma)))


def _interleave(module: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    if module.step < 1 or not _is_image(inputs[0]):
        return None
    return graph.Interleave(**common, shape=inputs[0].shape, step=module.step)


def _zero_pad(module: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    padding = module.padding
    if not (isinstance(padding, tuple) and len(padding) == 4 and min(padding) >= 0):
        return None
    if module.value != 0 or not _is_image(inputs[0]):
        return None
    left, right, top, bottom = padding
    shape = (None, None, inputs[0].shape[-1])
    return graph.ZeroPad(**common, shape=shape, padding=((top, bottom), (left, right)))


def _max_pool(pool: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    if pool.return_indices:
        return None
    return window_pool("max", pool, common, inputs)


def _average_pool(pool: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    if pool.divisor_override is not None:
        return None
    return window_pool("avg", pool, common, inputs)


def window_pool(
    kind: Literal["max", "avg"], pool: Any, common: Common, inputs: Inputs
) -> graph.Layer | None:
    """A pool of windows; None for what PyTorch refuses, too.

    Args:
        kind: of it.
        pool: has the attributes of PyTorch's module.
        common: name and inputs.
        inputs: the layer that it reads.
    """
    size, padding = _pair(pool.kernel_size), _pair(pool.padding)
    strides = size if pool.stride is None else _pair(pool.stride)
    dilation = _pair(getattr(pool, "dilation", 1))
    if None in (size, strides, padding, dilation) or not _is_image(inputs[0]):
        return None
    if min(*size, *strides, *dilation) < 1 or min(padding) < 0:
        return None
    if any(2 * side > k for side, k in zip(padding, size, strict=True)):
        return None
    return graph.WindowPool(
        **common,
        shape=(None, None, inputs[0].shape[-1]),
        kind=kind,
        kernel_size=size,
        strides=strides,
        padding=((padding[0],) * 2, (padding[1],) * 2),
        dilation=dilation,
        ceil_mode=bool(pool.ceil_mode),
        count_include_pad=bool(getattr(pool, "count_include_pad", True)),
    )


def _adaptive_pool(pool: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    if pool.output_size not in (1, (1, 1)):
        return None
    return _mean(common, inputs, keepdims=True)


def _mean(common: Common, inputs: Inputs, keepdims: bool) -> graph.Layer | None:
    if not _is_image(inputs[0]):
        return None
    channels = inputs[0].shape[-1]
    shape: graph.Shape = (1, 1, channels) if keepdims else (channels,)
    return graph.GlobalPool(**common, shape=shape, keepdims=keepdims)


def _unflatten(module: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    shape, size = inputs[0].shape, module.unflattened_size
    if module.dim != 1 or len(shape) != 1 or not isinstance(size, tuple) or len(size) != 3:
        return None
    if size[1:] != (1, 1) or shape[0] not in (None, size[0]):
        return None
    return graph.Reshape(**common, shape=(1, 1, size[0]))


def _flatten(module: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    shape = inputs[0].shape
    if (module.start_dim, module.end_dim) != (1, -1) or len(shape) != 3 or shape[:2] != (1, 1):
        return None
    return graph.Flatten(**common, shape=shape[2:])


def _identity(module: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    return graph.Identity(**common, shape=inputs[0].shape)


def _sequential(module: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    return None if len(module) else _identity(module, common, inputs)


def _drop_connect(module: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    if not _is_image(inputs[0]):
        return None
    # The module itself draws the factors, at its rate of that time.
    return graph.Dropout(**common, shape=inputs[0].shape, rate=0.0, per_sample=True)


def _call(module: Any, common: Common, inputs: Inputs) -> graph.Layer | None:
    function, options = module.function, module.options
    shapes = [x.shape for x in inputs]
    channels = {shape[-1] for shape in shapes if shape[-1] is not None}
    one = len(inputs) == 1
    if function is torch.mean and one and options.keys() == {"dim", "keepdim"}:
        return _mean(common, inputs, options["keepdim"]) if options["dim"] == (2, 3) else None
    if function is torch.narrow and one and options.keys() == {"dim", "start", "length"}:
        start, count = options["start"], options["length"]
        if options["dim"] != 1 or not channels or not 0 <= start < start + count <= max(channels):
            return None
        shape = (*shapes[0][:-1], count)
        return graph.CopyChannels(**common, shape=shape, start=start, count=count)
    if options or not all(map(_is_image, inputs)):
        return None
    if function is concatenate and None not in {shape[-1] for shape in shapes}:
        shape = (*shapes[0][:2], sum(x.channels for x in inputs))
        return graph.Concat(**common, shape=shape)
    if function is fold_halves and one and channels and min(channels) > 1:
        return graph.FoldHalves(**common, shape=(*shapes[0][:2], min(channels) // 2))
    if len(channels) > 1:  # PyTorch's broadcasting, or its error
        return None
    shape = (*shapes[0][:2], channels.pop() if channels else None)
    if function is add:
        return graph.Add(**common, shape=shape)
    if function is torch.mul and len(inputs) == 2:
        return graph.Multiply(**common, shape=shape)
    return None


def _read_call(own: dict[str, Any]) -> Any:
    return (own["function"], *own["options"].items())


def _read_padded(own: dict[str, Any]) -> Any:
    return own.get("borders", PaddedConv2d.borders), *itemgetter(*_GEOMETRY.split())(own)


def _pair(value: Any) -> Any:
    """(vertical, horizontal) of a whole number or of two; None for anything else."""
    pair = value if isinstance(value, tuple) else (value, value)
    return pair if len(pair) == 2 and all(type(number) is int for number in pair) else None


def _is_image(layer: graph.Layer, channels: int | None = None) -> bool:
    """Whether a layer's output is an image and can have this number of channels."""
    known = layer.shape[-1]
    return len(layer.shape) == 3 and (None in (known, channels) or known == channels)


Lifted = graph.Layer | tuple[graph.Layer, ...] | None
Lifter = Callable[[Any, Common, Inputs], Lifted]


@dataclass(frozen=True)
class _Kind:
    """A class of modules.

    Attributes:
        lift: makes the layer.
        read: takes the attributes that ``lift`` goes by, beside parameters, from a module's
            ``__dict__``; None for none.
        methods: those of the class that a call runs.
        own_methods: what they were when this module was imported.
        parametrized: whether there are a weight and a bias.
        joins: whether several inputs are read.
    """

    lift: Lifter
    read: Callable[[Any], Any] | None
    methods: Callable[[Any], Any]
    own_methods: Any
    parametrized: bool
    joins: bool


def _kind(
    cls: type[nn.Module],
    lift: Lifter,
    attributes: str = "",
    methods: str = "",
    *,
    read: Callable[[Any], Any] | None = None,
    parametrized: bool = False,
    joins: bool = False,
) -> None:
    getter = attrgetter("forward", "__call__", "_call_impl", *methods.split())
    read = itemgetter(*attributes.split()) if attributes else read
    _KINDS[cls] = _Kind(lift, read, getter, getter(cls), parametrized, joins)


def _kind_of(cls: type) -> _Kind | None:
    """A class's kind; those of other packages are found by name, without importing them."""
    kind = _KINDS.get(cls)
    if kind is None and (named := _NAMED.get(f"{cls.__module__}.{cls.__qualname__}")):
        lifter, attributes, parametrized = named
        _kind(cls, lifter, attributes, parametrized=parametrized)
        kind = _KINDS[cls]
    return kind


_KINDS: dict[type, _Kind] = {}
_NO_BORDERS = ((0, 0), (0, 0))
_GEOMETRY = "stride padding dilation groups padding_mode"
for _cls, _attributes in {
    nn.Conv2d: _GEOMETRY,
    AcceleratedConv2d: _GEOMETRY,
    PointwiseConv2d: _GEOMETRY,
    DepthwiseConv2d: _GEOMETRY,
    PaddedConv2d: "",
    InterleavedPointwiseConv2d: f"{_GEOMETRY} interleave",
}.items():
    _kind(_cls, _convolution, _attributes, "_conv_forward", read=_read_padded, parametrized=True)
_kind(nn.BatchNorm2d, _batch_norm, "eps track_running_stats", "_check_input_dim", parametrized=True)
for _row in ACTIVATIONS.values():
    _cls = getattr(nn, _row.torch_module)
    if _row.code is not None:
        _name = "clip" if issubclass(_cls, nn.Hardtanh) else _row.name  # so is ReLU6
        # A class's __constants__ are the options that its forward reads.
        _names = " ".join(getattr(_cls, "__constants__", ()))
        _kind(_cls, _gelu if _cls is nn.GELU else _activation(_name), _names)
_kind(nn.PReLU, _prelu, parametrized=True)
_kind(InterleaveChannels, _interleave, "step")
_kind(nn.ZeroPad2d, _zero_pad, "padding value")
_kind(
    nn.AvgPool2d,
    _average_pool,
    "kernel_size stride padding ceil_mode count_include_pad divisor_override",
)
_kind(nn.MaxPool2d, _max_pool, "kernel_size stride padding dilation return_indices ceil_mode")
_kind(nn.AdaptiveAvgPool2d, _adaptive_pool, "output_size")
_kind(nn.Unflatten, _unflatten, "dim unflattened_size")
_kind(nn.Flatten, _flatten, "start_dim end_dim")
_kind(nn.Identity, _identity)
_kind(nn.Sequential, _sequential, methods="__iter__")
_kind(DropConnect, _drop_connect)
_kind(Call, _call, read=_read_call, joins=True)
_kind(nn.Linear, _linear, parametrized=True)
_kind(nn.Dropout, _dropout, "p training")
_kind(nn.Dropout2d, _dropout, "p training")

_NORM = "eps track_running_stats"
_NAMED: dict[str, tuple[Lifter, str, bool]] = {
    "timm.layers.activations.GELU": (_activation("gelu"), "", False),
    "timm.layers.activations.GELUTanh": (_activation("gelu_tanh"), "", False),
    "timm.layers.activations.PReLU": (_prelu, "", True),
    "timm.layers.activations.Sigmoid": (_activation("sigmoid"), "inplace", False),
    "timm.layers.conv2d_same.Conv2dSame": (_convolution, _GEOMETRY, True),
    "timm.layers.drop.DropPath": (_drop_connect, "drop_prob scale_by_keep", False),
    "timm.layers.layer_scale.LayerScale2d": (_layer_scale, "inplace", False),
    "timm.layers.norm_act.BatchNormAct2d": (_batch_norm_act, _NORM, True),
    "torchvision.ops.misc.FrozenBatchNorm2d": (_frozen_batch_norm, "eps", False),
    "torchvision.ops.stochastic_depth.StochasticDepth": (_drop_connect, "p mode", False),
}
"""Classes of other packages: how they are lifted, what is read, whether there is a weight."""
