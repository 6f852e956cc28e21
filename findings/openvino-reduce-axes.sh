#!/usr/bin/env bash
# OpenVINO 2026.4.1 takes no notice of the axes of ONNX's ReduceLogSumExp, ReduceLogSum and ReduceL1
# where they are an attribute, as in every opset below 18: it reduces over all axes, images of the batch
# included, and says nothing. So a classifier that gives an energy score (the log of the sum of its
# exponentials) to tell strange images gives one number for a whole batch. The axes of the other
# reductions are kept, and those of all from opset 18 on, where they are an input.
# Seen: two images of three logits have two scores in ONNX Runtime 1.32.0, and one in OpenVINO, unless
# the model is of opset 18.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper

path = f"{sys.argv[1]}/reduce.onnx"
x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
wrong = {}
for opset in (17, 18):
    for kind in ("ReduceLogSumExp", "ReduceLogSum", "ReduceL1", "ReduceL2", "ReduceMean", "ReduceMax"):
        axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
        if opset == 17:
            node = helper.make_node(kind, ["x"], ["y"], axes=[1], keepdims=0)
        else:
            node = helper.make_node(kind, ["x", "axes"], ["y"], keepdims=0)
        graph = helper.make_graph(
            [node],
            "reduce",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
            [] if opset == 17 else [axes],
        )
        opsets = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        right = session.run(None, {"x": x})[0]
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        seen = openvino.Core().compile_model(path, "CPU", settings)([x])[0]
        print(f"opset {opset}, {kind}: {right.round(3).tolist()}, OpenVINO {seen.round(3).tolist()}")
        if seen.shape != right.shape or not np.allclose(seen, right, atol=1e-3):
            wrong.setdefault(opset, []).append(kind)
print("wrong:", wrong)
sys.exit(wrong != {17: ["ReduceLogSumExp", "ReduceLogSum", "ReduceL1"]})
PYTHON
