"""Names and layouts of weights: what a variable of a Keras layer is called in PyTorch.

Everything goes by the layer's class. A variable of a class that PyTorch has no counterpart of keeps
Keras's name and layout.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from kconv.weights._entries import Array

__all__ = ["Layout", "class_of_name", "keras_class", "layout", "snake_case", "torch_class"]

Shape = tuple[int, ...]

_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}

# Keras's layers with weights, whose automatic names are these in snake case.
CLASSES = (
    *(f"Conv{n}D{suffix}" for n in (1, 2, 3) for suffix in ("", "Transpose")),
    *(f"{kind}Conv{n}D" for n in (1, 2) for kind in ("Depthwise", "Separable")),
    *("Dense", "EinsumDense", "Embedding", "PReLU", "Normalization", "PointwiseConv2D"),
    *(f"{kind}Normalization" for kind in ("Batch", "Layer", "Group", "RMS", "Spectral")),
    *("LSTM", "GRU", "SimpleRNN", "LSTMCell", "GRUCell", "SimpleRNNCell", "StackedRNNCells"),
    *("RNN", "Bidirectional", "TimeDistributed", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"),
    *("MultiHeadAttention", "GroupQueryAttention", "Attention", "AdditiveAttention"),
    *("Model", "Functional", "Sequential", "Network", "ConvUnit", "MBConv"),
)


def snake_case(name: str) -> str:
    """A class's name as Keras makes layers' names of it."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


_BY_SNAKE = {snake_case(name): name for name in CLASSES}


def class_of_name(name: str) -> str | None:
    """The class whose automatic name this is, perhaps with a number."""
    return _BY_SNAKE.get(re.sub(r"_\d+$", "", name))


@dataclass(frozen=True)
class Layout:
    """How a variable of Keras's is called and laid out in PyTorch.

    Attributes:
        name: PyTorch's name, after that of the layer.
        axes: the order in which PyTorch has Keras's axes, or None for the same.
        reshaped: PyTorch's shape where it is not just another order (after the axes are ordered).
    """

    name: str
    axes: tuple[int, ...] | None = None
    reshaped: Shape | None = None

    def shape(self, shape: Shape) -> Shape:
        """PyTorch's shape for Keras's."""
        if self.reshaped is not None:
            return self.reshaped
        return shape if self.axes is None else tuple(shape[axis] for axis in self.axes)

    def to_torch(self, array: Array) -> Array:
        """An array of Keras's in PyTorch's layout."""
        ordered = array if self.axes is None else array.transpose(self.axes)
        return ordered.reshape(self.shape(array.shape))

    def to_keras(self, array: Array, shape: Shape) -> Array:
        """The inverse of :meth:`to_torch`, for a variable of this shape."""
        if self.axes is None:
            return array.reshape(shape)
        ordered = array.reshape([shape[axis] for axis in self.axes])
        return ordered.transpose([self.axes.index(axis) for axis in range(len(shape))])


def layout(kind: str | None, variable: str, shape: Shape) -> Layout:
    """The layout of a variable, by its layer's class.

    Args:
        kind: the class of the layer, one of Keras's own.
        variable: the variable's name.
        shape: the variable's shape.
    """
    rank, kind = len(shape), (kind or "").replace("Convolution", "Conv")
    convolution = re.fullmatch(r"(\w*?)Conv([123])D(Transpose)?", kind)
    if convolution and rank == int(convolution[2]) + 2:
        spatial = tuple(range(rank - 2))
        swapped = Layout("weight", (rank - 1, rank - 2, *spatial))
        channels = math.prod(shape[-2:])
        depthwise = Layout("weight", (rank - 2, rank - 1, *spatial), (channels, 1, *shape[:-2]))
        match convolution[1], variable:
            case "" | "Pointwise", "kernel":  # the transposed one has both swapped already
                return swapped
            case "Depthwise", "kernel" | "depthwise_kernel":
                return depthwise
            case "Separable", "depthwise_kernel":
                return Layout("depthwise.weight", depthwise.axes, depthwise.reshaped)
            case "Separable", "pointwise_kernel":
                return Layout("pointwise.weight", swapped.axes)
    match kind, variable:
        case "SeparableConv1D" | "SeparableConv2D", "bias":
            return Layout("pointwise.bias")
        case "Dense", "kernel" if rank == 2:
            return Layout("weight", (1, 0))
        case "BatchNormalization" | "LayerNormalization" | "GroupNormalization", _ if rank == 1:
            return Layout(_NORM.get(variable, variable))
        case "RMSNormalization", "scale" if rank == 1:
            return Layout("weight")
        case "Embedding", "embeddings":
            return Layout("weight")
        case "PReLU", "alpha" if math.prod(shape[:-1]) == 1:  # one for each channel
            return Layout("weight", tuple(range(rank)), shape[-1:])
    return Layout(variable)


def keras_class(layer: Any) -> str | None:
    """The class of Keras's that a layer has, or inherits from."""
    return next((base.__name__ for base in type(layer).__mro__ if base.__name__ in CLASSES), None)


def torch_class(module: Any, shape: Shape) -> str | None:
    """The class of Keras's that does what a PyTorch module does.

    Args:
        module: the module.
        shape: of Keras's kernel, which tells a depthwise convolution from a grouped one.
    """
    from torch import nn

    transposed = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
    plain = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    for classes, name in ((transposed, "Conv{}DTranspose"), (plain, "Conv{}D")):
        for base, dimensions in classes.items():
            if isinstance(module, base):
                groups, channels = module.groups, module.in_channels
                if len(shape) > 2 and groups == channels == shape[-2] > 1:
                    name = "DepthwiseConv{}D"
                return name.format(dimensions)
    norms: dict[Any, str] = {
        nn.Linear: "Dense",
        nn.modules.batchnorm._BatchNorm: "BatchNormalization",
        nn.LayerNorm: "LayerNormalization",
        nn.GroupNorm: "GroupNormalization",
        nn.Embedding: "Embedding",
        nn.PReLU: "PReLU",
    }
    return next((name for base, name in norms.items() if isinstance(module, base)), None)
