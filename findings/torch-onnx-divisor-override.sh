#!/usr/bin/env bash
# PyTorch 2.15.0 with onnxscript 0.7.2: torch.onnx.export (the exporter by default, dynamo=True) leaves
# avg_pool2d's divisor_override out, without a word: the model in ONNX divides by the size of the
# window. ONNX has no such attribute, so that one expects an error or a multiplication. Whoever
# pools sums by divisor_override=1 gets means.
# Seen: ones pooled 3x3 with divisor_override=1 are 9 in PyTorch and 1 in ONNX Runtime 1.32.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PYTHON'
import sys

import onnx
import onnxruntime
import torch

pool, x = torch.nn.AvgPool2d(3, divisor_override=1).eval(), torch.ones(1, 1, 6, 6)
path = f"{sys.argv[1]}/pool.onnx"
torch.onnx.export(pool, (x,), path, verbose=False)
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
(exported,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
expected = pool(x)
print("nodes:", [node.op_type for node in onnx.load(path).graph.node])
print(f"PyTorch {expected.unique().tolist()}, ONNX Runtime {exported.ravel()[:1].tolist()}")
sys.exit(not ((expected == 9).all() and (exported == 1).all()))
PYTHON
