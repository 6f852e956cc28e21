#!/usr/bin/env bash
# PyTorch 2.15.0: torch.utils.flop_counter.FlopCounterMode counts the gradient of a grouped
# convolution's weight as if there were no groups. The forward pass and the gradient of the input are
# counted right, so that a depthwise convolution of 32 channels is said to need 33 times its forward
# pass for the backward one, and not twice. Of a training step of an EfficientNet or MobileNet the
# count is several times too large, and figures of utilisation made of it with it.
# Seen: backward / forward 2 (1 group), 5 (4 groups), 33 (32 groups).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

seen = []
for groups in (1, 4, 32):
    conv = torch.nn.Conv2d(32, 32, 3, padding=1, groups=groups, bias=False)
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = conv(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    forward, backward = forward.get_total_flops(), backward.get_total_flops()
    exact = 2 * y.numel() * 9 * 32 // groups  # each product and sum; twice that for both gradients
    print(f"{groups} groups: forward {forward} (exactly {exact}), backward {backward} ({2 * exact})")
    assert forward == exact
    seen.append(backward / forward)
print("backward / forward:", seen)
sys.exit(seen != [2, 5, 33])
PYTHON
