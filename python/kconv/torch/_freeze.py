"""From a PyTorch model to a network on NumPy alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import nn

from kconv._freezing import dense_of, frozen
from kconv._model_folder import expected_weights
from kconv.models import graph
from kconv.runtime import FrozenNetwork
from kconv.torch import _functions
from kconv.torch._conversion import copied, report, unwrapped
from kconv.torch._fuse import traced, unfuse
from kconv.torch._lift import Derived
from kconv.torch._plan import Call
from kconv.torch._trace import is_opaque
from kconv.torch.layers import NativeInterleaveChannels
from kconv.torch.network import Network
from kconv.weights._entries import Array

__all__ = ["freeze"]


def freeze(
    model: nn.Module,
    *,
    class_names: Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    interpolation: str = "bilinear",
    scale: float | Sequence[float] = 1 / 64,
    offset: float | Sequence[float] = -2.0,
    softmax: bool = True,
) -> FrozenNetwork:
    """A model as it is now, on NumPy alone: weights are copied, and run as one operation.

    It computes what the model does in evaluation mode, in float32; a softmax follows a classifier.

    Example:
        >>> import kconv.torch
        >>> from kconv.models import create
        >>> model = kconv.torch.build(create("keffnet_b0", classes=10, input_shape=(32, 32, 3)))
        >>> net = freeze(model, image_size=32)
        >>> net
        FrozenNetwork(keffnet_b0, 10 classes, 32x32x3)
        >>> x = torch.randn(2, 3, 32, 32)
        >>> expected = model.eval()(x).softmax(1).detach().numpy()
        >>> bool(abs(net(x.numpy(), layout="NCHW") - expected).max() < 1e-5)
        True

    Args:
        model: of :func:`kconv.torch.build` or another :class:`kconv.torch.Network`, or one that
            :func:`kconv.torch.fuse` was given; all that it calls is of classes that kconv knows.
        class_names: one name for each output; numbers by default.
        image_size: height and width to which image files are resized; None keeps theirs.
        interpolation: how, "bilinear" or "nearest".
        scale: what bytes are multiplied by, one number or one for each channel. The defaults are
            those of ``kconv train``; ``1 / (255 * std)`` elsewhere.
        offset: what is added then; ``-mean / std`` elsewhere.
        softmax: whether a softmax follows a classifier, as PyTorch's end in logits; none follows
            means of pixels, which are features, or a softmax or sigmoid.

    Returns:
        The network, which :meth:`~kconv.runtime.FrozenNetwork.save` writes.

    Raises:
        ValueError: a module or a call is none that can be frozen, the model has hooks or a forward
            of its own, a fused model's forward cannot be followed or has several inputs or outputs,
            or an option does not fit.
        TypeError: the model is none of kconv's, and has not been fused, or an option is of another
            type.
    """
    model = unwrapped(model)
    if isinstance(model, Network):
        layers, modules = _layers_of_network(model)
    elif _was_fused(model):
        layers, modules = _layers_of_fused(model)
    else:
        raise TypeError(
            f"model is a {type(model).__name__}, expected a kconv.torch.Network, as "
            "kconv.torch.build makes it, or a model that kconv.torch.fuse was given"
        )
    output = layers[layers.output]
    if softmax and len(output.shape) == 1 and _is_classifier(output, layers):
        probabilities = graph.Activation(
            name="probabilities", inputs=(output.name,), shape=output.shape, kind="softmax"
        )
        layers = graph.Graph(layers.name, (*layers.layers, probabilities), probabilities.name)
    return frozen(
        layers,
        _weights_of(layers, modules),
        class_names=class_names,
        image_size=image_size,
        interpolation=interpolation,
        scale=scale,
        offset=offset,
    )


Layers = tuple[graph.Graph, Mapping[str, Any]]
"""A model's layers, and the modules by their names."""


def _layers_of_network(model: Network) -> Layers:
    name = getattr(model, "_name", "") or type(model).__name__
    reason = is_opaque(model)
    if type(model).forward is not Network.forward:
        reason = "its class has a forward of its own"
    if reason:
        raise ValueError(f"the {name} cannot be frozen: {reason}")
    plan = model._current_plan()
    start = plan.graph.layers[0]
    return _layers_of(name, start, plan.calls, plan.graph.output, plan.graph.layers)


def _was_fused(model: nn.Module) -> bool:
    try:
        return report(model).action == "fuse"
    except ValueError:  # there is none
        return False


def _layers_of_fused(model: nn.Module) -> Layers:
    """Those of the calls in evaluation mode; a copy is in it, so that the model stays as it is."""
    model = copied(model, "freeze")
    unfuse(model)
    for module in model.modules():
        module.training = False
    name = type(model).__name__
    if reason := is_opaque(model):
        raise ValueError(f"the {name} cannot be frozen: {reason}")
    plan = traced(model)
    if plan.parts is None:
        raise ValueError(f"the {name} cannot be frozen: {plan.reason}")
    if len(plan.sources) != 1 or plan.output is None:
        raise ValueError(f"the {name} cannot be frozen: expected one tensor in, and one out")
    calls = [call for part in plan.parts for call in part.calls]
    start = plan.layers[plan.sources[0]]
    found, modules = _layers_of(name, start, calls, plan.output, plan.layers.values())
    if None in (start.shape[-1], *found[found.output].shape[-1:]):
        raise ValueError(f"the {name} cannot be frozen: nothing in it tells how many channels")
    return found, modules


def _layers_of(
    name: str,
    start: graph.Layer,
    calls: Sequence[Call],
    output: str,
    planned: Iterable[graph.Layer],
) -> Layers:
    plain = {layer.name for layer in planned if type(layer) is graph.Layer}
    layers: dict[str, graph.Layer] = {start.name: start}
    modules: dict[str, Any] = {}
    for call in calls:
        for layer in _frozen(call, [layers[name] for name in call.inputs], call.name in plain):
            layers[layer.name], modules[layer.name] = layer, call.owner_of(layer)
    kept = tuple(layer for layer in layers.values() if not isinstance(layer, Derived))
    if output not in {layer.name for layer in kept}:
        raise ValueError(f"the {name} cannot be frozen: its output is no layer's")
    return graph.Graph(name, kept, output), modules


def _frozen(call: Call, inputs: Sequence[graph.Layer], plain: bool) -> tuple[graph.Layer, ...]:
    """A call's layers; ``plain`` tells that no layer stands for it where models are trained."""
    module = call.module
    # Lifted again, as more is known now of what it reads; but what is changed in place others see.
    made = () if plain and call.in_place else call.lift(inputs)
    if not made and module is not None and len(inputs) == 1 and not _has_hooks(module):
        found = _lift(module, {"name": call.name, "inputs": call.inputs}, inputs)
        made = () if found is None else (found,)
    if not made:
        what = f"module {call.label or call.name!r}, a {type(module).__name__},"
        if module is None:
            what = f"the call {call.label!r}" if call.label else f"the tensor {call.name!r}"
        raise ValueError(f"{what} cannot be frozen as it is")
    return tuple(map(_settled, made, repeat(inputs[0]))) if inputs else made


def _settled(layer: graph.Layer, source: graph.Layer) -> graph.Layer:
    """A layer as the runtime has it."""
    if not isinstance(layer, graph.Conv):
        return layer
    if len(layer.shape) == 1:  # of vectors
        return dense_of(layer)
    if layer.is_pointwise and source.shape[:2] == (1, 1):
        return replace(layer, shape=(1, 1, layer.filters))
    return layer


def _is_classifier(layer: graph.Layer, layers: graph.Graph) -> bool:
    """Whether a vector is that of a classifier: no means of pixels, and no probabilities."""
    while isinstance(layer, graph.Identity | graph.Dropout | graph.Flatten):
        layer = layers[layer.inputs[0]]
    probabilities = isinstance(layer, graph.Activation) and layer.kind in ("softmax", "sigmoid")
    return not (probabilities or isinstance(layer, graph.GlobalPool))


def _has_hooks(module: nn.Module) -> bool:
    own = vars(module)
    return "forward" in own or bool(own["_forward_hooks"] or own["_forward_pre_hooks"])


def _lift(
    module: nn.Module, common: dict[str, Any], inputs: Sequence[graph.Layer]
) -> graph.Layer | None:
    """The layer for a module that no fused operation stands for; None where there is none."""
    shape = inputs[0].shape
    kind = type(module)
    if isinstance(module, NativeInterleaveChannels) and kind is NativeInterleaveChannels:
        return graph.Interleave(**common, shape=shape, step=module.step)
    if kind in _NOTHING_IN_EVALUATION:
        return graph.Dropout(**common, shape=shape, rate=0.0)
    if kind is nn.Softmax and isinstance(module, nn.Softmax) and module.dim in (1, -1):
        return graph.Activation(**common, shape=shape, kind="softmax") if len(shape) == 1 else None
    if len(shape) != 3:
        return None
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and kind in (nn.MaxPool2d, nn.AvgPool2d):
        return _pool(module, common, inputs)
    if isinstance(module, _functions.Call) and module.function is torch.amax and len(inputs) == 1:
        keeps = module.options.get("keepdim", False)
        if module.options != {"dim": (2, 3), "keepdim": keeps}:
            return None
        pixel = (1, 1, shape[-1]) if keeps else (shape[-1],)
        return graph.GlobalPool(**common, shape=pixel, kind="max", keepdims=keeps)
    return None


_NOTHING_IN_EVALUATION = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _pool(
    pool: nn.MaxPool2d | nn.AvgPool2d, common: dict[str, Any], inputs: Sequence[graph.Layer]
) -> graph.Layer | None:
    size, stride, padding = pool.kernel_size, pool.stride, pool.padding
    same = type(size) is int and size % 2 == 1 and stride == 1 and padding == size // 2
    if (not same and padding != 0) or type(size) is not int or type(stride) is not int:
        return None
    if pool.ceil_mode or getattr(pool, "dilation", 1) != 1 or getattr(pool, "return_indices", 0):
        return None
    average = isinstance(pool, nn.AvgPool2d)
    if average and (pool.divisor_override is not None or (padding and pool.count_include_pad)):
        return None
    return graph.Pool(
        **common,
        shape=(None, None, inputs[0].shape[-1]),
        kind="avg" if average else "max",
        pool_size=size,
        strides=stride,
        padding="same" if same and size > 1 else "valid",
    )


def _weights_of(
    layers: graph.Graph, modules: Mapping[str, nn.Module]
) -> dict[tuple[str, str], Array]:
    arrays = {}
    for (layer, weight), (name, shape) in expected_weights(layers).items():
        tensor = getattr(modules[layer], name.rpartition(".")[2], None)
        if tensor is None:  # a linear layer without bias
            arrays[layer, weight] = torch.zeros(shape).numpy()
            continue
        if not tensor.is_floating_point() or tensor.is_meta:
            raise ValueError(f"{name!r} is {tensor.dtype} on {tensor.device}, expected floats")
        values = tensor.detach().to("cpu", torch.float32, copy=True)
        arrays[layer, weight] = values.reshape(shape).contiguous().numpy()
    return arrays
