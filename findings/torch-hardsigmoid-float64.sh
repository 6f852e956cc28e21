#!/usr/bin/env bash
# PyTorch 2.15.0 (CPU): the derivative of F.hardsigmoid in float64 is a sixth rounded to float32,
# while its value is computed with a whole float64 sixth. So torch.autograd.gradcheck's numeric
# derivative and the backward pass differ by 3e-8, relatively, and squeeze-and-excite blocks
# (MobileNet V3) cannot be compared in float64 more closely than that. x.add(3).clamp(0, 6).div(6),
# the same function, has the exact derivative. F.hardswish is right in value and derivative.
# Seen: 6 * derivative - 1 is 2.98e-08 (hardsigmoid) and 0 (clamp); the value at 1 is 2 / 3 exactly.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.nn import functional


def derivative(function, at):
    x = torch.tensor([at], dtype=torch.float64, requires_grad=True)
    y = function(x)
    y.sum().backward()
    return y.item(), x.grad.item()


value, slope = derivative(functional.hardsigmoid, 1.0)
_, exact = derivative(lambda x: x.add(3).clamp(0, 6).div(6), 1.0)
_, swish = derivative(functional.hardswish, 1.0)
print(f"hardsigmoid(1) - 2/3 = {value - 2 / 3:.3g}; its derivative * 6 - 1 = {slope * 6 - 1:.3g}")
print(f"clamp's derivative * 6 - 1 = {exact * 6 - 1:.3g}; hardswish's * 6 / 5 - 1 = {swish * 6 / 5 - 1:.3g}")
as_seen = abs(value - 2 / 3) < 1e-15 and 2e-8 < abs(slope * 6 - 1) < 4e-8 and abs(exact * 6 - 1) < 1e-15
sys.exit(not (as_seen and abs(swish * 6 / 5 - 1) < 1e-15))
PYTHON
