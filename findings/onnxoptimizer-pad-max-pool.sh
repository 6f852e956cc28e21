#!/usr/bin/env bash
# onnxoptimizer 0.4.2 folds zeros around an image into the max pool that follows (its default passes have
# fuse_pad_into_pool). But a pool's own border is minus infinity and not 0: where all pixels of a window
# are below 0, as after ELU, LeakyReLU or a norm, the model gives another maximum at the border than
# before, and nothing says so. Networks pad so that come from Keras or TensorFlow (ZeroPadding2D before
# MaxPooling2D, as in keras.applications' ResNet and DenseNet, there after a ReLU).
# Seen: a 4x4 image of -1 between zeros has maxima of 0 at its border in ONNX Runtime 1.32.0, and -1
# after optimize().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxoptimizer==0.4.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxoptimizer
import onnxruntime
from onnx import TensorProto, helper


def computed(model):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": np.full((1, 1, 4, 4), -1, np.float32)})[0]


nodes = [
    helper.make_node("Pad", ["x", "pads"], ["padded"]),
    helper.make_node("MaxPool", ["padded"], ["y"], kernel_shape=[3, 3], strides=[2, 2]),
]
pads = helper.make_tensor("pads", TensorProto.INT64, [8], [0, 0, 1, 1, 0, 0, 1, 1])
ends = [
    helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, size, size])
    for name, size in (("x", 4), ("y", 2))
]
graph = helper.make_graph(nodes, "pool", ends[:1], ends[1:], [pads])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model, full_check=True)
optimized = onnxoptimizer.optimize(model)
onnx.checker.check_model(optimized, full_check=True)
before, after = computed(model)[0, 0], computed(optimized)[0, 0]
print("before:", [node.op_type for node in model.graph.node], before.tolist())
print("after: ", [node.op_type for node in optimized.graph.node], after.tolist())
sys.exit(not ((before == [[0, 0], [0, -1]]).all() and (after == -1).all()))
PYTHON
