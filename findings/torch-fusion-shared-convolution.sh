#!/usr/bin/env bash
# PyTorch 2.15.0: torch.fx.experimental.optimization.fuse and torch.ao.quantization.quantize_fx.fuse_fx
# fold a batch norm into the convolution before it. They look whether anybody else reads the
# convolution's output, but not whether its layer is called twice. One convolution with a norm of its
# own for each call, as the heads of EfficientDet and RetinaNet share them over the scales, takes
# the norms into the same weights, and the fused model computes something else, without a word.
# Seen: the outputs are off by 3.0 and 1.5 (fuse), and by 3.7 and 4e-07 (fuse_fx); with a layer for
# each call by 4e-07.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import copy
import sys

import torch
from torch import nn
from torch.ao.quantization.quantize_fx import fuse_fx
from torch.fx.experimental.optimization import fuse


class Head(nn.Module):
    """One convolution for two scales, a norm for each."""

    def __init__(self, shared):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.other = self.conv if shared else copy.deepcopy(self.conv)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, large, small):
        return self.norms[0](self.conv(large)), self.norms[1](self.other(small))


x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
seen = {}
for shared in (True, False):
    torch.manual_seed(0)
    model = Head(shared).eval()
    for norm in model.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        expected = model(x, x[..., :6, :6])
        for name, function in (("fuse", fuse), ("fuse_fx", fuse_fx)):
            outputs = function(copy.deepcopy(model))(x, x[..., :6, :6])
            off = [float((a - b).abs().max()) for a, b in zip(outputs, expected)]
            seen[name, shared] = max(off)
            print(f"{name}, {'one layer' if shared else 'two layers'}: off by {off[0]:.1e}, {off[1]:.1e}")
as_seen = all(seen[name, True] > 0.1 and seen[name, False] < 1e-5 for name in ("fuse", "fuse_fx"))
sys.exit(not as_seen)
PYTHON
