"""ONNX: a node for each layer, two for a swish."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kconv._files import replacing
from kconv._require import require
from kconv.export import INPUT, Run, output_name
from kconv.export._layers import plain_graph
from kconv.ktypes import interleave_index
from kconv.models import graph
from kconv.runtime import FrozenNetwork
from kconv.weights._entries import Array

__all__ = ["model_of", "runner", "write"]

OPSET, IR_VERSION = 17, 8
"""Of 2022: what ONNX Runtime 1.14, OpenVINO 2023, and their like read."""


def write(net: FrozenNetwork, path: Path) -> list[Path]:
    """Write the file; return it."""
    content = model_of(net).SerializeToString()
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return [path]


def runner(net: FrozenNetwork, path: Path) -> tuple[Run, str]:
    """ONNX Runtime, or the slow evaluator that comes with ONNX."""
    if importlib.util.find_spec("onnxruntime") is None:
        reference = require("onnx.reference", "onnx", "running ONNX")
        session = reference.ReferenceEvaluator(str(path))
        by = f"onnx {require('onnx', 'onnx', 'running ONNX').__version__}'s reference"
    else:
        runtime = require("onnxruntime", "onnxruntime", "running ONNX")
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        by = f"onnxruntime {runtime.__version__}"

    def run(images: Array) -> Any:
        return session.run(None, {INPUT: np.ascontiguousarray(images.transpose(0, 3, 1, 2))})[0]

    return run, by


def model_of(net: FrozenNetwork) -> Any:
    """The network as an ``onnx.ModelProto``.

    Raises:
        ImportError: onnx is not installed.
        ValueError: a layer has no node.
    """
    onnx = require("onnx", "onnx", "exporting to ONNX")
    require("onnx.checker", "onnx", "exporting to ONNX")
    layers = plain_graph(net.graph)
    writer = _Writer(onnx, layers, net.weights)
    image = net.config.image
    size = ["N", image.channels, image.height or "H", image.width or "W"]
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    inputs = helper.make_tensor_value_info(INPUT, float32, size)
    name = output_name(net)
    shape = ["N", len(net.class_names)]
    if len(layers[layers.output].shape) == 3:
        shape += ["output_height", "output_width"]
    outputs = helper.make_tensor_value_info(name, float32, shape)
    writer.names[layers.layers[0].name] = INPUT
    writer.names[layers.output] = name
    for layer in layers.layers[1:]:
        writer.add(layer)
    body = helper.make_graph(
        writer.nodes, layers.name, [inputs], [outputs], list(writer.constants.values())
    )
    model = helper.make_model(
        body,
        producer_name="kconv",
        producer_version=net.config.kconv_version,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model)
    return model


_ACTIVATIONS = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "hard_swish": "HardSwish",
    "tanh": "Tanh",
    "selu": "Selu",
    "celu": "Celu",
    "softplus": "Softplus",
    "softsign": "Softsign",
}


class _Writer:
    def __init__(
        self,
        onnx: Any,
        layers: graph.Graph,
        weights: Mapping[tuple[str, str], Array],
    ) -> None:
        self.onnx, self.layers, self.weights = onnx, layers, weights
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.names: dict[str, str] = {}

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(
            self.onnx.helper.make_node(kind, inputs, [output], name=output, **attributes)
        )
        return output

    def constant(self, name: str, values: Any) -> str:
        if name not in self.constants:
            self.constants[name] = self.onnx.numpy_helper.from_array(np.asarray(values), name)
        return name

    def add(self, layer: graph.Layer) -> None:
        """The node of a layer, or its few nodes."""
        inputs = [self.names.get(name, name) for name in layer.inputs]
        output = self.names.get(layer.name, layer.name)
        x = inputs[0]
        match layer:
            case graph.Conv() | graph.DepthwiseConv():
                self._conv(layer, x, output)
            case graph.BatchNorm():
                self._norm(layer, x, output)
            case graph.Dense():
                parameters = [self._weight(layer, name) for name in ("kernel", "bias")]
                self.node("Gemm", [x, *parameters], output, transB=1)
            case graph.Activation():
                self._activation(layer, x, output)
            case graph.Interleave():
                self._interleave(layer, x, output)
            case graph.CopyChannels():
                self._narrow(x, layer.start, layer.start + layer.count, output)
            case graph.FoldHalves():
                half = layer.channels
                halves = [
                    self._narrow(x, start, start + half, f"{output}/{start}") for start in (0, half)
                ]
                self.node("Add", halves, output)
            case graph.ZeroPad():
                (top, bottom), (left, right) = layer.padding
                sides = np.array([0, 0, top, left, 0, 0, bottom, right])
                self.node("Pad", [x, self.constant(f"{output}/sides", sides)], output)
            case graph.Pool():
                self._pool(layer, x, output)
            case graph.WindowPool():
                self._window_pool(layer, x, output)
            case graph.GlobalPool():
                kind = "GlobalMaxPool" if layer.kind == "max" else "GlobalAveragePool"
                if layer.keepdims:
                    self.node(kind, [x], output)
                else:
                    self.node("Flatten", [self.node(kind, [x], f"{output}/pixel")], output)
            case graph.Reshape():
                axes = self.constant("pixel_axes", np.array([2, 3]))
                self.node("Unsqueeze", [x, axes], output)
            case graph.Flatten():
                self.node("Flatten", [x], output)
            case graph.Concat():
                self.node("Concat", inputs, output, axis=1)
            case graph.Add():
                self.node("Add" if len(inputs) == 2 else "Sum", inputs, output)
            case graph.Multiply():
                self.node("Mul", inputs, output)
            case _:
                raise ValueError(f"layer {layer.name!r}, a {type(layer).__name__}, has no node")

    def _weight(self, layer: graph.Layer, name: str) -> str:
        # A layer whose interleave has become one of its own has another name than its weights.
        key = layer.name if (layer.name, name) in self.weights else layer.name.removesuffix("_raw")
        return self.constant(f"{key}.{name}", self.weights[key, name])

    def _conv(self, layer: graph.Conv | graph.DepthwiseConv, x: str, output: str) -> None:
        if isinstance(layer, graph.Conv):
            kernel, strides, groups = layer.kernel_size, layer.strides, layer.groups
            weight, dilation = "kernel", layer.dilation
        else:
            kernel = (layer.kernel_size, layer.kernel_size)
            strides, groups = (layer.strides, layer.strides), layer.in_channels
            weight, dilation = "depthwise_kernel", (1, 1)
        reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
        names = [weight, *(["bias"] if layer.use_bias else [])]
        self.node(
            "Conv",
            [x, *(self._weight(layer, name) for name in names)],
            output,
            kernel_shape=kernel,
            strides=strides,
            dilations=dilation,
            group=groups,
            **_padding(layer.padding, (reach[0], reach[1]), strides),
        )

    def _norm(self, layer: graph.BatchNorm, x: str, output: str) -> None:
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        parameters = [
            self.constant(f"ones{layer.channels}", np.ones(layer.channels, np.float32))
            if name == "gamma" and not layer.scale
            else self._weight(layer, name)
            for name in names
        ]
        self.node("BatchNormalization", [x, *parameters], output, epsilon=layer.epsilon)

    def _activation(self, layer: graph.Activation, x: str, output: str) -> None:
        match layer.kind:
            case "relu6":
                limits = [
                    self.constant(name, np.array(value, np.float32))
                    for name, value in (("zero", 0), ("six", 6))
                ]
                self.node("Clip", [x, *limits], output)
            case "swish":
                gate = self.node("Sigmoid", [x], f"{output}/sigmoid")
                self.node("Mul", [x, gate], output)
            case "hard_sigmoid":
                self.node("HardSigmoid", [x], output, alpha=1 / 6, beta=0.5)
            case "softmax":
                self.node("Softmax", [x], output, axis=1)
            case "clip":
                limits = [
                    self.constant(f"{output}/{i}", np.array(value, np.float32))
                    for i, value in enumerate(layer.parameters)
                ]
                self.node("Clip", [x, *limits], output)
            case "leaky_relu" | "elu":
                node = {"leaky_relu": "LeakyRelu", "elu": "Elu"}[layer.kind]
                self.node(node, [x], output, alpha=layer.parameters[0])
            case "gelu":
                root = self.constant("half_root", np.array(0.5**0.5, np.float32))
                one, half = (
                    self.constant(name, np.array(value, np.float32))
                    for name, value in (("one", 1), ("half", 0.5))
                )
                erf = self.node(
                    "Erf", [self.node("Mul", [x, root], f"{output}/z")], f"{output}/erf"
                )
                gate = self.node("Add", [erf, one], f"{output}/gate")
                self.node("Mul", [self.node("Mul", [x, half], f"{output}/half"), gate], output)
            case "mish":
                gate = self.node("Softplus", [x], f"{output}/softplus")
                self.node("Mul", [x, self.node("Tanh", [gate], f"{output}/tanh")], output)
            case kind:
                if kind not in _ACTIVATIONS:
                    raise ValueError(f"layer {layer.name!r}: the activation {kind!r} has no node")
                self.node(_ACTIVATIONS[kind], [x], output)

    def _interleave(self, layer: graph.Interleave, x: str, output: str) -> None:
        channels, step = layer.channels, layer.step
        index = np.array(interleave_index(channels, step))
        order = self.constant(f"interleave_{channels}_{step}", index)
        self.node("Gather", [x, order], output, axis=1)

    def _narrow(self, x: str, start: int, end: int, output: str) -> str:
        bounds = [
            self.constant(f"at{value}", np.array([value], np.int64)) for value in (start, end, 1)
        ]
        return self.node("Slice", [x, *bounds], output)

    def _pool(self, layer: graph.Pool, x: str, output: str) -> None:
        kernel, strides = (layer.pool_size,) * 2, (layer.strides,) * 2
        attributes = _padding(layer.padding, kernel, strides)
        if layer.kind == "avg":
            attributes["count_include_pad"] = 0
        kind = "MaxPool" if layer.kind == "max" else "AveragePool"
        self.node(kind, [x], output, kernel_shape=kernel, strides=strides, **attributes)

    def _window_pool(self, layer: graph.WindowPool, x: str, output: str) -> None:
        if layer.ceil_mode:  # of windows that are not whole, runtimes have rules of their own
            raise ValueError(f"layer {layer.name!r}: a pool with ceil_mode=True has no node")
        attributes = _padding(layer.padding, layer.kernel_size, layer.strides)
        if layer.kind == "avg":
            attributes["count_include_pad"] = int(layer.count_include_pad)
        else:
            attributes["dilations"] = layer.dilation
        kind = "MaxPool" if layer.kind == "max" else "AveragePool"
        shapes = {"kernel_shape": layer.kernel_size, "strides": layer.strides}
        self.node(kind, [x], output, **shapes, **attributes)


def _padding(
    padding: graph.Padding | graph.Borders, kernel: tuple[int, int], strides: tuple[int, int]
) -> dict[str, Any]:
    if padding == "valid":
        return {}
    if padding == "same" and strides != (1, 1):  # depends on the image's size
        return {"auto_pad": "SAME_UPPER"}
    if padding == "same":
        before = [(k - 1) // 2 for k in kernel]
        after = [k - 1 - b for k, b in zip(kernel, before, strict=True)]
    else:
        before, after = ([sides[i] for sides in padding] for i in range(2))
    return {"pads": [*before, *after]}
