#!/usr/bin/env bash
# PyTorch 2.15.0: torch.optim.swa_utils.update_bn, which estimates the statistics of batch norms for
# averaged weights, takes the mean of its batches' statistics, and counts a last batch of one image
# as much as one of 64. Its variance is that of the batches alone, without what lies between their
# means. In the moving statistics of training a last batch is a tenth; here it may be half of all.
# Seen: of 64 images of zeros and one of ones the mean is 0.5 (1/65 is right) and the variance 0
# (0.015 is right); with drop_last=True the mean is 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader

images = torch.cat([torch.zeros(64, 1, 4, 4), torch.ones(1, 1, 4, 4)])
found = []
for drop_last in (False, True):
    model = AveragedModel(torch.nn.BatchNorm2d(1))
    update_bn(DataLoader(images, batch_size=64, drop_last=drop_last), model)
    norm = model.module
    found += [(round(float(norm.running_mean), 4), round(float(norm.running_var), 4))]
    print(f"drop_last={drop_last}: mean and variance {found[-1]}")
print(f"of all images: {float(images.mean()):.4f}, {float(images.var()):.4f}")
sys.exit(found != [(0.5, 0.0), (0.0, 0.0)])
PYTHON
