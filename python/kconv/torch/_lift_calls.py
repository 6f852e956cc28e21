"""What functions and methods of tensors compute, as layers of :mod:`kconv.models.graph`.

A call in a trace is a function of layers and constants. Each entry of the table has the signature
of the PyTorch function that it stands for, so Python itself sorts the arguments; a call that does
not fit it, or that no layer computes, is not lifted.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from kconv.models import graph
from kconv.models.activations import ACTIVATIONS
from kconv.torch import _lift
from kconv.torch._lift import GELU, Derived
from kconv.torch._parameters import Borrowed, Parameter

__all__ = ["lift_call"]

Layer = graph.Layer
Lifter = Callable[..., Layer | None]

_CALLS: dict[Any, Lifter] = {}
"""By function, or name of a method; the first argument is the name of the layer."""
_WEIGHTED: dict[Any, Lifter] = {}
"""Those of functions that read parameters, for which there is another argument before all."""


def lift_call(node: fx.Node, layers: dict[str, Layer], weights: Borrowed) -> tuple[Layer, ...]:
    """The layers that compute what a call does.

    Args:
        node: of a trace, a function's or method's call.
        layers: those that it reads, by name.
        weights: is told which parameters these have.
    """
    of_node: Any = lambda other: layers[other.name]  # noqa: E731
    args: Any = fx.map_arg(node.args, of_node)
    kwargs: Any = fx.map_arg(node.kwargs, of_node)
    layer = None
    try:
        if node.target in _WEIGHTED:
            layer = _WEIGHTED[node.target](weights, node.name, *args, **kwargs)
        if layer is None and node.target in _CALLS:
            layer = _CALLS[node.target](node.name, *args, **kwargs)
    except (TypeError, ValueError):  # other arguments than those of the table
        return ()
    return () if layer is None else (layer,)


def _calls(*targets: Any, table: dict[Any, Lifter] = _CALLS) -> Callable[[Lifter], Lifter]:
    def enter(lifter: Lifter) -> Lifter:
        table.update(dict.fromkeys(targets, lifter))
        return lifter

    return enter


def _is_image(x: Any, *, known: bool = False) -> bool:
    """Whether a value is a layer of images, of which the channels may have to be known."""
    if not isinstance(x, Layer) or isinstance(x, Derived) or len(x.shape) != 3:
        return False
    return x.shape[-1] is not None or not known


def _enter_activations() -> None:
    """Functions and methods that are activations, some of them with parameters."""
    for row in ACTIVATIONS.values():
        if row.code is None or row.torch_function in ("gelu", "hardtanh"):
            continue
        names = row.torch_function, f"{row.torch_function}_"
        functions = [getattr(owner, name, None) for owner in (F, torch) for name in names]
        _calls(*filter(None, functions), *names)(_activation(row.name))


def _activation(kind: str) -> Lifter:
    count = len(ACTIVATIONS[kind].parameters)

    def lift(name: str, x: Layer, *values: Any, inplace: bool = False, **named: Any) -> Any:
        if len(values) > count:  # as the last argument
            *values, inplace = values  # type: ignore[assignment]
        names = [key for key, _ in ACTIVATIONS[kind].parameters]
        given = dict(zip(names, values, strict=False)) | named
        parameters = [given.pop(key, default) for key, default in _DEFAULTS.get(kind, {}).items()]
        if given or not isinstance(inplace, bool) or not isinstance(x, Layer):
            return None
        return _lift.activation(kind, name, x, tuple(map(float, parameters)))

    return lift


_DEFAULTS = {"leaky_relu": {"negative_slope": 0.01}, "elu": {"alpha": 1.0}}
"""PyTorch's, of the functions' parameters."""
_enter_activations()


@_calls(F.gelu)
def _gelu(name: str, x: Layer, approximate: str = "none") -> Layer | None:
    return _lift.activation(GELU[approximate], name, x) if _is_value(x) else None


@_calls(F.hardtanh, F.hardtanh_)
def _hardtanh(
    name: str, x: Layer, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Layer | None:
    limits = float(min_val), float(max_val)
    return _lift.activation("clip", name, x, limits) if isinstance(x, Layer) else None


@_calls(torch.clamp, torch.clip, "clamp", "clamp_", "clip")
def _clamp(name: str, x: Layer, *limits: Any, **named: Any) -> Layer | None:
    given = dict(zip(("min", "max"), limits, strict=False)) | named
    return _lift.activation("relu6", name, x) if given == {"min": 0, "max": 6} else None


@_calls(operator.add, operator.iadd, torch.add, "add", "add_")
def _add(name: str, x: Any, y: Any) -> Layer | None:
    if _is_number(x, 0) or _is_number(y, 0):  # a branch that is not there
        x = y if _is_number(x, 0) else x
        return _contiguous(name, x) if _is_value(x) else None
    if _is_number(x, 3) or _is_number(y, 3):  # of a hard sigmoid
        x = y if _is_number(x, 3) else x
        return replace(_derived(name, x, "shifted"), is_new=True) if _is_value(x) else None
    if not (_is_image(x) and _is_image(y)):
        return None
    channels = {shape for shape in (x.shape[-1], y.shape[-1]) if shape is not None}
    if len(channels) > 1 or (x.shape[:2] == (1, 1)) != (y.shape[:2] == (1, 1)):
        return None
    shape = (*x.shape[:2], channels.pop() if channels else None)
    return graph.Add(name=name, inputs=(x.name, y.name), shape=shape)


@_calls(operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
def _multiply(name: str, x: Any, y: Any) -> Layer | None:
    if _is_number(x, 1 / 6) or _is_number(y, 1 / 6):
        return _sixth(name, y if _is_number(x, 1 / 6) else x)
    for one, gate in ((x, y), (y, x)):
        of_itself = isinstance(gate, graph.Activation) and _is_value(one)
        if of_itself and gate.kind in _GATED and gate.inputs == (one.name,):
            return _lift.activation(_GATED[gate.kind], name, one)
    if isinstance(x, Derived):
        x, y = y, x
    if isinstance(y, Derived) and y.kind == "clipped" and _is_value(x) and y.source == x.name:
        return replace(y, name=name, inputs=(x.name, y.name), kind="gated")  # of a hard swish
    if isinstance(y, Derived) and _is_image(x, known=True):
        if y.kind != "expanded" or y.like != x.name or y.shape[-1] != x.shape[-1]:
            return None
        return graph.Multiply(name=name, inputs=(x.name, y.source), shape=x.shape)
    if not (_is_image(x, known=True) and _is_image(y, known=True)):
        return None
    if x.shape[:2] == (1, 1):
        x, y = y, x
    if y.shape[:2] != (1, 1) or x.shape[:2] == (1, 1) or x.shape[-1] != y.shape[-1]:
        return None
    return graph.Multiply(name=name, inputs=(x.name, y.name), shape=x.shape)


_GATED = {"sigmoid": "swish", "hard_sigmoid": "hard_swish"}
"""What the product of a tensor and its activation is."""


@_calls(operator.truediv, operator.itruediv, torch.div, "div", "div_")
def _divide(name: str, x: Any, y: Any) -> Layer | None:
    return _sixth(name, x) if _is_number(y, 6) else None


def _sixth(name: str, x: Any) -> Layer | None:
    kind = {"clipped": "hard_sigmoid", "gated": "hard_swish"}.get(getattr(x, "kind", ""))
    if not isinstance(x, Derived) or kind is None:
        return None
    return graph.Activation(name=name, inputs=(x.source,), shape=x.shape, kind=kind)


def _is_number(value: Any, number: float) -> bool:
    return type(value) in (int, float) and value == number


@_calls(torch.mean, "mean")
def _mean(name: str, x: Layer, dim: Any, keepdim: bool = False) -> Layer | None:
    if type(dim) is int:
        return _mean_over(name, x, dim, keepdim)
    dims = {d % 4 for d in dim} if isinstance(dim, list | tuple) else {dim}
    if dims != {2, 3} or len(dim) != 2 or not _is_image(x):
        return None
    return _global_pool(name, x, keepdim)


def _mean_over(name: str, x: Layer, dim: int, keepdim: bool) -> Layer | None:
    """Over rows or columns, after the other or for the first time, or over pixels in a row."""
    if not isinstance(x, Derived):
        axis = dim % 4 if -4 <= dim < 4 else 0
        if axis not in (2, 3) or not _is_image(x):
            return None
        return replace(_derived(name, x, "mean", axis, int(keepdim)), is_new=True)
    if x.kind == "mean" and x.numbers[1]:
        last = keepdim and dim in (5 - x.numbers[0], 1 - x.numbers[0])
    else:
        last = x.kind in ("mean", "row") and not keepdim and dim in (2, -1)
    return _global_pool(name, x, keepdim) if last else None


@_calls(F.adaptive_avg_pool2d)
def _adaptive_mean(name: str, x: Layer, output_size: Any) -> Layer | None:
    one = output_size == 1 or tuple(output_size) == (1, 1)
    return _global_pool(name, x, True) if one and _is_image(x) else None


def _global_pool(name: str, x: Layer, keepdims: bool) -> Layer:
    shape = (1, 1, x.shape[-1]) if keepdims else x.shape[-1:]
    source = x.source if isinstance(x, Derived) else x.name
    return graph.GlobalPool(name=name, inputs=(source,), shape=shape, keepdims=keepdims)


@_calls(F.avg_pool2d)
def _average_pool(
    name: str,
    x: Layer,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> Layer | None:
    if divisor_override is not None:
        return None
    if _is_all(kernel_size, x):
        return _global_pool(name, x, True) if stride is None and padding == 0 else None
    window = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    return _pool("avg", name, x, window, ceil_mode=ceil_mode, count_include_pad=count_include_pad)


def _is_all(size: Any, x: Any) -> bool:
    """Whether a size is that of all rows and columns of an image."""
    if not _is_image(x):
        return False
    if isinstance(size, Derived):
        return size.kind == "all" and size.source == x.name
    return isinstance(size, list | tuple) and list(map(_number, size)) == _pixels(x.name)


@_calls(F.max_pool2d, torch.max_pool2d)
def _max_pool(
    name: str,
    x: Layer,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Layer | None:
    if return_indices:
        return None
    window = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    return _pool("max", name, x, window | {"dilation": dilation}, ceil_mode=ceil_mode)


def _pool(kind: Any, name: str, x: Any, window: dict[str, Any], **options: Any) -> Layer | None:
    if not _is_image(x):
        return None
    stride = window["stride"] or None  # PyTorch's own functions take [] for none
    pool = SimpleNamespace(**{k: _tuple(v) for k, v in (window | {"stride": stride}).items()})
    vars(pool).update(options)
    return _lift.window_pool(kind, pool, {"name": name, "inputs": (x.name,)}, [x])


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@_calls(F.pad)
def _pad(name: str, x: Any, pad: Any, mode: str = "constant", value: Any = None) -> Layer | None:
    sides = list(pad) if isinstance(pad, list | tuple) else []
    if len(sides) != 4 or mode != "constant" or value not in (None, 0) or not _is_image(x):
        return None
    if not all(type(side) is int and side >= 0 for side in sides):
        return None
    left, right, top, bottom = sides
    borders = ((top, bottom), (left, right))
    shape = (None, None, x.shape[-1])
    return graph.ZeroPad(name=name, inputs=(x.name,), shape=shape, padding=borders)


# Functions of parameters.


@_calls(F.conv2d, table=_WEIGHTED)
def _convolution(
    weights: Borrowed,
    name: str,
    x: Layer,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    tensors = {"weight": weight, "bias": bias}
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options |= {"padding_mode": "zeros"}
    return weights.lift(_lift._convolution, name, x, tensors, **options)


@_calls(F.batch_norm, table=_WEIGHTED)
def _batch_norm(
    weights: Borrowed,
    name: str,
    x: Layer,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if running_mean is None or running_var is None or type(training) is not bool:
        return None
    weights.training, weights.momentum = training, momentum
    tensors = {"running_mean": running_mean, "running_var": running_var}
    tensors |= {"weight": weight, "bias": bias}
    options = {"eps": eps, "track_running_stats": True}
    return weights.lift(_lift._batch_norm, name, x, tensors, **options)


@_calls(F.prelu, torch.prelu, "prelu", table=_WEIGHTED)
def _prelu(weights: Borrowed, name: str, x: Layer, weight: Any) -> Any:
    return weights.lift(_lift._prelu, name, x, {"weight": weight})


@_calls(F.linear, table=_WEIGHTED)
def _linear(weights: Borrowed, name: str, x: Layer, weight: Any, bias: Any = None) -> Any:
    return weights.lift(_lift._linear, name, x, {"weight": weight, "bias": bias})


@_calls(operator.mul, operator.imul, torch.mul, "mul", "mul_", table=_WEIGHTED)
def _scale(weights: Borrowed, name: str, x: Any, y: Any) -> Layer | None:
    """An image times a number for each channel."""
    if isinstance(x, Parameter):
        x, y = y, x
    if not isinstance(y, Parameter) or not _is_image(x):
        return None
    *ones, channels, height, width = y.numbers if len(y.numbers) in (3, 4) else (0, 0, 0)
    if (height, width) != (1, 1) or ones not in ([], [1]) or x.shape[-1] not in (None, channels):
        return None
    weights.places = {"gamma": (y.owner, y.attribute)}
    shape = (*x.shape[:2], channels)
    return graph.ChannelScale(name=name, inputs=(x.name,), shape=shape)


def _reshaped(name: str, x: Parameter, sizes: Sequence[Any]) -> Parameter | None:
    """A parameter in another shape."""
    count = math.prod(x.numbers)
    known = math.prod(size for size in sizes if size != -1)
    shape = tuple(count // known if size == -1 and known else size for size in sizes)
    if not all(type(size) is int and size > 0 for size in shape) or math.prod(shape) != count:
        return None
    return replace(x, name=name, inputs=(x.name,), numbers=shape)


def _pair(value: Any) -> tuple[int, int]:
    one, other = value if isinstance(value, list | tuple) else (value, value)
    return one, other


@_calls(torch.cat, torch.concat)
def _concatenate(name: str, tensors: Sequence[Layer], dim: int = 0, axis: int = 0) -> Layer | None:
    if (dim or axis) not in (1, -3) or not all(map(_is_image, tensors)):
        return None
    if len(tensors) == 1:
        return graph.Identity(name=name, inputs=(tensors[0].name,), shape=tensors[0].shape)
    if any(x.shape[-1] is None for x in tensors):
        return None
    shape = (*tensors[0].shape[:2], sum(x.channels for x in tensors))
    return graph.Concat(name=name, inputs=tuple(x.name for x in tensors), shape=shape)


@_calls("contiguous")
def _contiguous(name: str, x: Layer) -> Layer | None:
    if isinstance(x, Derived):
        return _derived(name, x, x.kind, *x.numbers) if x.kind in _REGROUPED else None
    return graph.Identity(name=name, inputs=(x.name,), shape=x.shape)


@_calls(F.dropout, F.dropout2d)
def _dropout(
    name: str, x: Layer, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Layer | None:
    return _contiguous(name, x) if (p == 0 or not training) and _is_value(x) else None


def _is_value(x: Any) -> bool:
    return isinstance(x, Layer) and not isinstance(x, Derived)


# Sizes, and tensors in other shapes. What is between has no layer of its own.

_REGROUPED = "groups", "shuffled"


def _derived(name: str, x: Layer, kind: str, *numbers: int) -> Derived:
    about = x.source if isinstance(x, Derived) else x.name
    return Derived(
        name=name, inputs=(x.name,), shape=x.shape, kind=kind, source=about, numbers=numbers
    )


@_calls("size", getattr)
def _size(name: str, x: Layer, dim: Any = None) -> Layer | None:
    if not _is_value(x) or dim not in (None, "shape", 0, 1, 2, 3):
        return None
    if dim in (None, "shape"):
        return _derived(name, x, "sizes")
    return _one_size(name, x, dim)


def _one_size(name: str, x: Layer, dim: int) -> Layer | None:
    """The number of images (numbers: none), of channels, or of rows or columns."""
    if dim == 1 and len(x.shape) in (1, 3):
        return None if x.shape[-1] is None else _derived(name, x, "number", x.channels)
    return _derived(name, x, "batch") if dim == 0 else _derived(name, x, "pixels", dim)


@_calls(operator.floordiv)
def _floor_divide(name: str, x: Any, y: Any) -> Layer | None:
    if not (isinstance(x, Derived) and x.kind == "number" and isinstance(y, int) and y > 0):
        return None
    return _derived(name, x, "number", x.numbers[0] // y)


@_calls(operator.getitem)
def _item(name: str, x: Layer, index: Any) -> Layer | None:
    if isinstance(x, Parameter):
        index = index if isinstance(index, tuple) else (index,)
        if len(x.numbers) != 1 or index.count(slice(None)) != 1 or index.count(None) < 2:
            return None
        sizes = [x.numbers[0] if i == slice(None) else 1 for i in index]
        return _reshaped(name, x, sizes) if len(index) == index.count(None) + 1 else None
    if isinstance(x, Derived):
        if x.kind == "pieces" and isinstance(index, int):
            start, count = x.numbers[2 * index], x.numbers[2 * index + 1]
            inputs, shape = (x.source,), (*x.shape[:-1], count)
            return graph.CopyChannels(
                name=name, inputs=inputs, shape=shape, start=start, count=count
            )
        if x.kind == "sizes" and index in (0, 1, 2, 3):
            return _one_size(name, x, index)
        if x.kind == "sizes" and index in (slice(2, None), slice(-2, None)):
            return _derived(name, x, "all")
        return None
    if not _is_value(x) or not isinstance(index, tuple):
        return None
    everything = slice(None)
    if len(x.shape) == 1:  # [:, :, None, None]
        if index != (everything, everything, None, None):
            return None
        return graph.Reshape(name=name, inputs=(x.name,), shape=(1, 1, x.shape[0]))
    if len(index) < 2 or any(i != everything for i in (index[0], *index[2:])):
        return None
    if not isinstance(index[1], slice) or not _is_image(x, known=True) or len(index) > 4:
        return None
    start, stop, step = index[1].indices(x.channels)
    if step != 1 or stop <= start:
        return None
    return _narrow(name, x, start, stop - start)


def _narrow(name: str, x: Layer, start: int, count: int) -> Layer:
    shape = (*x.shape[:-1], count)
    if count == x.shape[-1]:
        return graph.Identity(name=name, inputs=(x.name,), shape=shape)
    return graph.CopyChannels(name=name, inputs=(x.name,), shape=shape, start=start, count=count)


@_calls(torch.chunk, "chunk")
def _chunk(name: str, x: Layer, chunks: int, dim: int = 0) -> Layer | None:
    if dim not in (1, -3) or not _is_image(x, known=True) or x.channels < chunks:
        return None
    count = -(-x.channels // chunks)
    return _split(name, x, count, 1)


@_calls(torch.split, "split")
def _split(name: str, x: Layer, split_size: Any, dim: int = 0) -> Layer | None:
    if dim not in (1, -3) or not _is_image(x, known=True):
        return None
    if isinstance(split_size, int):
        starts = range(0, x.channels, split_size)
        counts = [min(split_size, x.channels - start) for start in starts]
    else:
        counts = list(split_size)
    if min(counts) < 1 or sum(counts) != x.channels:
        return None
    numbers = [n for i, count in enumerate(counts) for n in (sum(counts[:i]), count)]
    return _derived(name, x, "pieces", *numbers)


@_calls(torch.flatten, "flatten")
def _flatten(name: str, x: Layer, start_dim: int = 0, end_dim: int = -1) -> Layer | None:
    if start_dim == 2 and end_dim in (-1, 3) and _is_image(x):
        return _derived(name, x, "row")
    if (start_dim, end_dim) not in ((1, -1), (1, 3)) or not _is_value(x):
        return None
    if x.shape[:2] != (1, 1) or len(x.shape) != 3:
        return None
    return graph.Flatten(name=name, inputs=(x.name,), shape=x.shape[2:])


@_calls("view", "reshape", torch.reshape)
def _view(name: str, x: Layer, *sizes: Any) -> Layer | None:
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
        sizes = tuple(sizes[0])
    if isinstance(x, Parameter):
        return _reshaped(name, x, sizes)
    known = [_number(size) for size in sizes]
    if None in known:
        return None
    if isinstance(x, Derived):
        return _join_groups(name, x, known)
    channels = x.shape[-1]
    if channels is None or not _is_value(x):
        return None
    rest = known[1:]
    if known[0] not in ("batch", -1) or (known[0] == -1 and -1 in rest):
        return None
    one = len(x.shape) == 1 or x.shape[:2] == (1, 1)
    if one and rest in ([channels], [-1]):
        if len(x.shape) == 1:
            return graph.Identity(name=name, inputs=(x.name,), shape=x.shape)
        return graph.Flatten(name=name, inputs=(x.name,), shape=(channels,))
    if one and rest in ([channels, 1, 1], [-1, 1, 1]):
        kind = graph.Reshape if len(x.shape) == 1 else graph.Identity
        return kind(name=name, inputs=(x.name,), shape=(1, 1, channels))
    if known[0] == "batch" and len(x.shape) == 3 and rest == [channels, -1]:
        return _derived(name, x, "row")
    if known[0] == "batch" and len(x.shape) == 3 and rest[2:] == _pixels(x.name):
        groups, each = rest[:2]  # (N, groups, channels of each, H, W)
        divides = isinstance(groups, int) and groups > 0 and channels % groups == 0
        if divides and each in (-1, channels // groups):
            return _derived(name, x, "groups", groups, channels // groups)
    return None


def _number(size: Any) -> Any:
    """A whole number, "batch", ("pixels", axis, layer); None for what is none of these."""
    if isinstance(size, Derived):
        if size.kind == "number":
            return size.numbers[0]
        if size.kind == "batch":
            return "batch"
        return ("pixels", size.numbers[0], size.source) if size.kind == "pixels" else None
    return size if type(size) is int else None


def _pixels(name: str) -> list[tuple[str, int, str]]:
    """The rows and columns of a layer."""
    return [("pixels", axis, name) for axis in (2, 3)]


def _join_groups(name: str, x: Derived, sizes: list[Any]) -> Layer | None:
    """Channels that were grouped, and the groups exchanged: a shuffle."""
    if x.kind != "shuffled" or sizes[0] != "batch":
        return None
    groups, each = x.numbers
    if sizes[1:] not in ([channels, *_pixels(x.source)] for channels in (-1, groups * each)):
        return None
    return graph.Interleave(name=name, inputs=(x.source,), shape=x.shape, step=each)


@_calls(torch.transpose, "transpose")
def _transpose(name: str, x: Layer, dim0: int, dim1: int) -> Layer | None:
    if not isinstance(x, Derived) or x.kind != "groups" or {dim0, dim1} != {1, 2}:
        return None
    return _derived(name, x, "shuffled", *x.numbers)


@_calls("unsqueeze", torch.unsqueeze)
def _unsqueeze(name: str, x: Layer, dim: int) -> Layer | None:
    """Twice in a row it makes an image of one pixel of a vector."""
    if not _is_value(x):
        if isinstance(x, Derived) and x.kind == "column" and dim in (3, -1, 2):
            return graph.Reshape(name=name, inputs=(x.source,), shape=(1, 1, x.shape[-1]))
        return None
    return _derived(name, x, "column") if len(x.shape) == 1 and dim in (2, -1) else None


@_calls("expand_as")
def _expand(name: str, x: Layer, other: Layer) -> Layer | None:
    """A gate as large as what it scales: lifted with the product that reads it."""
    if not (_is_image(x, known=True) and x.shape[:2] == (1, 1) and _is_image(other)):
        return None
    return Derived(
        name=name, inputs=(x.name,), shape=x.shape, kind="expanded", source=x.name, like=other.name
    )
