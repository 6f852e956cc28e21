"""From a PyTorch model to a network on NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kconv._freezing import frozen
from kconv._model_folder import expected_weights
from kconv.models import graph
from kconv.runtime import FrozenNetwork
from kconv.torch._functions import Call
from kconv.torch._lift import is_in_place, lift
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
        model: of :func:`kconv.torch.build` or another :class:`kconv.torch.Network`, all of whose
            modules are of classes that kconv knows.
        class_names: one name for each output; numbers by default.
        image_size: height and width to which image files are resized; None keeps theirs.
        interpolation: how, "bilinear" or "nearest".
        scale: what bytes are multiplied by, one number or one for each channel. The defaults are
            those of ``kconv train``; ``1 / (255 * std)`` elsewhere.
        offset: what is added then; ``-mean / std`` elsewhere.
        softmax: whether a softmax follows a classifier, as PyTorch's end in logits.

    Returns:
        The network, which :meth:`~kconv.runtime.FrozenNetwork.save` writes.

    Raises:
        ValueError: a module is none that can be frozen, or an option does not fit.
        TypeError: the model is none of kconv's.
    """
    if not isinstance(model, Network):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a kconv.torch.Network, as "
            "kconv.torch.build makes it"
        )
    layers, modules = _layers_of(model)
    output = layers[layers.output]
    if softmax and len(output.shape) == 1 and not isinstance(output, graph.GlobalPool):
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


def _layers_of(model: Network) -> tuple[graph.Graph, Mapping[str, Any]]:
    """The model's layers, and the modules by their names."""
    plan = model._current_plan()
    modules = plan.modules
    layers: dict[str, graph.Layer] = {}
    for layer in plan.graph.layers:
        if not isinstance(layer, graph.Input):
            module, inputs = modules[layer.name], [layers[name] for name in layer.inputs]
            # Again, as more is known now of what it reads; but what is changed in place others see.
            stays = type(layer) is graph.Layer and is_in_place(module)
            stays |= type(module) is nn.Linear  # a classifier's keeps its own kind of layer
            made = () if stays else lift(module, layer.name, inputs)
            found = made[0] if len(made) == 1 else None
            if found is None and module is not None and not _has_hooks(module):
                found = _lift(module, {"name": layer.name, "inputs": layer.inputs}, inputs)
            if found is None:
                raise ValueError(
                    f"module {layer.name!r}, a {type(module).__name__}, cannot be frozen as it is"
                )
            if isinstance(found, graph.Conv) and found.is_pointwise and _is_pixel(inputs[0]):
                found = replace(found, shape=(1, 1, found.filters))
            layer = found
        layers[layer.name] = layer
    name = getattr(model, "_name", "") or type(model).__name__
    return graph.Graph(name, tuple(layers.values()), plan.graph.output), modules


def _is_pixel(layer: graph.Layer) -> bool:
    return layer.shape[:2] == (1, 1)


def _has_hooks(module: nn.Module) -> bool:
    own = vars(module)
    return "forward" in own or bool(own["_forward_hooks"] or own["_forward_pre_hooks"])


def _lift(
    module: nn.Module, common: dict[str, Any], inputs: Sequence[graph.Layer]
) -> graph.Layer | None:
    """The layer for a module that no fused operation stands for; None where there is none."""
    shape = inputs[0].shape
    kind = type(module)
    if isinstance(module, nn.Linear) and kind is nn.Linear:
        return graph.Dense(
            **common,
            shape=(module.out_features,),
            units=module.out_features,
            in_features=module.in_features,
        )
    if isinstance(module, NativeInterleaveChannels) and kind is NativeInterleaveChannels:
        return graph.Interleave(**common, shape=shape, step=module.step)
    if kind is nn.Dropout:
        return graph.Dropout(**common, shape=shape, rate=0.0)
    if kind is nn.Softmax and isinstance(module, nn.Softmax) and module.dim in (1, -1):
        return graph.Activation(**common, shape=shape, kind="softmax") if len(shape) == 1 else None
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and kind in (nn.MaxPool2d, nn.AvgPool2d):
        return _pool(module, common, inputs)
    if isinstance(module, Call) and module.function is torch.amax and len(inputs) == 1:
        keeps = module.options.get("keepdim", False)
        if module.options != {"dim": (2, 3), "keepdim": keeps}:
            return None
        pixel = (1, 1, shape[-1]) if keeps else (shape[-1],)
        return graph.GlobalPool(**common, shape=pixel, kind="max", keepdims=keeps)
    return None


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


_NAMES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def _weights_of(
    layers: graph.Graph, modules: Mapping[str, nn.Module]
) -> dict[tuple[str, str], Array]:
    arrays = {}
    for (layer, weight), (name, shape) in expected_weights(layers).items():
        tensor = getattr(modules[layer], _NAMES[weight], None)
        if tensor is None:  # a linear layer without bias
            arrays[layer, weight] = torch.zeros(shape).numpy()
            continue
        if not tensor.is_floating_point() or tensor.is_meta:
            raise ValueError(f"{name!r} is {tensor.dtype} on {tensor.device}, expected floats")
        values = tensor.detach().to("cpu", torch.float32, copy=True)
        arrays[layer, weight] = values.reshape(shape).contiguous().numpy()
    return arrays
