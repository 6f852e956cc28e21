"""Every layer of every network against the original's layer lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kconv.models import count, create
from kconv.models import graph as ir

ARCHITECTURES = Path(__file__).parents[1] / "data" / "architectures"
NETWORKS = {
    "DenseNetBC_L100_32": ("densenet_bc_l100", {}),
    "EfficientNetB0_224": ("efficientnet_b0", {}),
    "InceptionV3_224": ("inception_v3", {}),
    "MobileNet_224": ("mobilenet", {}),
    "MobileNetV3Large_224": ("mobilenet_v3_large", {}),
    "kDenseNetBC_L100_D6_12ch_32": ("kdensenet_bc_l100", {"ktype": "D6_12ch"}),
    "kEffNetB0_D6_16ch_224": ("keffnet_b0", {"ktype": "D6_16ch"}),
    "kEffNetB0_D6v3_16ch_32_skip3": (
        "keffnet_b0",
        {"ktype": 32, "skip_stride_cnt": 3, "input_shape": (32, 32, 3)},
    ),
    "kInceptionV3_D6_32ch_224": ("kinception_v3", {"ktype": "D6_32ch"}),
    "kMobileNet_D6_32ch_224": ("kmobilenet", {"ktype": "D6_32ch"}),
    "kMobileNetV3Large_D6_32ch_224": ("kmobilenet_v3_large", {"ktype": "D6_32ch"}),
    "kMobileNetV3Small_D6_32ch_224": ("kmobilenet_v3_small", {"ktype": "D6_32ch"}),
}
INITIALIZERS = {
    "glorot_uniform": {"GlorotUniform": {}},
    "conv_normal": {
        "VarianceScaling": {"scale": 2.0, "mode": "fan_out", "distribution": "truncated_normal"}
    },
    "dense_uniform": {
        "VarianceScaling": {"scale": 1 / 3, "mode": "fan_out", "distribution": "uniform"}
    },
}
ACTIVATIONS = {"hard_sigmoid": "HardSigmoid", "hard_swish": "HardSwish"}


def keras_layers(graph):
    """A graph as the original's layer list: name -> (type, inputs, shape, weights, settings)."""
    renamed = {"input": "input_1"}
    layers = {}
    for layer in graph.layers:
        inputs = [renamed.get(name, name) for name in layer.inputs]
        fused = inputs and layer.name == f"{layer.inputs[0]}_activation"
        if fused:  # The original has it inside the convolution.
            assert isinstance(layer, ir.Activation)
            layers[inputs[0]]["activation"] = layer.kind
            renamed[layer.name] = inputs[0]
            continue
        layers[renamed.get(layer.name, layer.name)] = {
            "inputs": inputs,
            "output_shape": list(layer.shape),
            "weights": {name: list(shape) for name, shape in layer.weights().items()},
            **settings(layer),
        }
    return layers


def settings(layer):
    """Type and settings of a layer in the words of the original's layer list."""
    match layer:
        case ir.Input():
            return {"type": "InputLayer"}
        case ir.ZeroPad():
            return {"type": "ZeroPadding2D", "padding": [list(side) for side in layer.padding]}
        case ir.Conv():
            return {
                "type": "Conv2D",
                "filters": layer.filters,
                "kernel_size": list(layer.kernel_size),
                "strides": list(layer.strides),
                "padding": layer.padding,
                "groups": layer.groups,
                "use_bias": layer.use_bias,
                "activation": "linear",
                "kernel_initializer": INITIALIZERS[layer.initializer],
            }
        case ir.DepthwiseConv():
            return {
                "type": "DepthwiseConv2D",
                "kernel_size": [layer.kernel_size] * 2,
                "strides": [layer.strides] * 2,
                "padding": layer.padding,
                "depth_multiplier": layer.depth_multiplier,
                "groups": 1,
                "use_bias": layer.use_bias,
                "activation": "linear",
                "depthwise_initializer": INITIALIZERS[layer.initializer],
            }
        case ir.BatchNorm():
            return {
                "type": "BatchNormalization",
                "epsilon": layer.epsilon,
                "momentum": layer.momentum,
                "scale": layer.scale,
                "center": True,
                "axis": [3],
            }
        case ir.Activation():
            return {"type": "Activation", "activation": ACTIVATIONS.get(layer.kind, layer.kind)}
        case ir.Interleave():
            return {"type": "InterleaveChannels", "step_size": layer.step}
        case ir.CopyChannels():
            return {
                "type": "CopyChannels",
                "channel_start": layer.start,
                "channel_count": layer.count,
            }
        case ir.Concat():
            return {"type": "Concatenate", "axis": 3}
        case ir.Add() | ir.Multiply() | ir.Flatten():
            return {"type": type(layer).__name__}
        case ir.Pool():
            return {
                "type": {"max": "MaxPooling2D", "avg": "AveragePooling2D"}[layer.kind],
                "pool_size": [layer.pool_size] * 2,
                "strides": [layer.strides] * 2,
                "padding": layer.padding,
            }
        case ir.GlobalPool():
            return {"type": "GlobalAveragePooling2D", "keepdims": layer.keepdims}
        case ir.Reshape():
            return {"type": "Reshape", "target_shape": list(layer.shape)}
        case ir.Dropout():
            noise = {"noise_shape": [None, 1, 1, 1]} if layer.per_sample else {}
            return {"type": "Dropout", "rate": layer.rate, **noise}
        case ir.Dense():
            return {
                "type": "Dense",
                "units": layer.units,
                "use_bias": True,
                "activation": layer.activation,
                "kernel_initializer": INITIALIZERS[layer.initializer],
            }


def in_our_words(layer):
    """A layer of the original's list, with Keras's synonyms of a kind made one."""
    layer = dict(layer)
    del layer["name"]
    weights = layer["weights"].items()  # "/" in a layer's name leaves traces in its weights'.
    layer["weights"] = {name.rpartition("/")[2]: shape for name, shape in weights}
    if layer["type"] == "ReLU":
        kind = "relu6" if layer.pop("max_value", None) == "6.0" else "relu"
        layer |= {"type": "Activation", "activation": kind}
    if layer["type"] == "Softmax":
        assert layer.pop("axis") == -1
        layer |= {"type": "Activation", "activation": "softmax"}
    if layer["type"] == "Reshape" and len(layer["target_shape"]) == 1:
        del layer["target_shape"]
        layer["type"] = "Flatten"
    return layer


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_the_originals(name):
    original = json.loads((ARCHITECTURES / f"{name}.json").read_text())
    model, options = NETWORKS[name]
    graph = create(model, **{"classes": 10, **options}).graph()
    expected = {layer["name"]: in_our_words(layer) for layer in original["layers"]}
    found = keras_layers(graph)
    assert sorted(found) == sorted(expected)
    for layer, properties in expected.items():
        assert found[layer] == properties, layer
    assert graph.output == graph.layers[-1].name

    counts = count(graph)
    assert counts.trainable == original["trainable_params"]
    assert counts.total == original["total_params"]
