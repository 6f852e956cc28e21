#!/usr/bin/env bash
# OpenVINO 2026.4.1 and OpenCV 5.0.0 read an ONNX model's Resize and take no notice of antialias=1
# (opset 18): they compute it without, and say nothing. So a model that carries its own preprocessing
# (torch.onnx.export writes this attribute for F.interpolate(..., antialias=True), which torchvision's
# Resize is) sees other pixels there than in ONNX Runtime 1.32.0, which is right.
# Seen: lines of 255 in every fourth column of black, shrunk by 4, are 63.8 in ONNX Runtime, their mean,
# and 0 in OpenVINO and OpenCV, where they have vanished.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 \
  opencv-python-headless==5.0.0.93 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PYTHON'
import sys

import cv2
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper

x = np.tile(np.where(np.arange(32) % 4 < 1, 255, 0).astype(np.float32), (32, 1))[None, None]
seen = {}
for antialias in (0, 1):
    path = f"{sys.argv[1]}/{antialias}.onnx"
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear", antialias=antialias)
    sizes = helper.make_tensor("sizes", TensorProto.INT64, [4], [1, 1, 8, 8])
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, size, size])
        for name, size in (("x", 32), ("y", 8))
    ]
    graph = helper.make_graph([node], "resize", ends[:1], ends[1:], [sizes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    seen["ONNX Runtime", antialias] = session.run(None, {"x": x})[0]
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    seen["OpenVINO", antialias] = openvino.Core().compile_model(path, "CPU", settings)([x])[0]
    network = cv2.dnn.readNetFromONNX(path)
    network.setInput(x)
    seen["OpenCV", antialias] = network.forward()
for (name, antialias), y in seen.items():
    print(f"{name}, antialias={antialias}: {y[0, 0, 4, 2:6].round(1).tolist()}")
right = seen["ONNX Runtime", 1]
same = {name: np.allclose(seen[name, 0], seen[name, 1], atol=1e-3) for name in ("OpenVINO", "OpenCV")}
plain = all(np.allclose(seen[name, 0], seen["ONNX Runtime", 0], atol=1e-2) for name in same)
print("the attribute changes nothing in:", [name for name in same if same[name]])
sys.exit(not (plain and all(same.values()) and abs(right - seen["ONNX Runtime", 0]).max() > 10))
PYTHON
