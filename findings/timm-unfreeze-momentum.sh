#!/usr/bin/env bash
# timm 1.0.31: unfreeze_batch_norm_2d does not undo freeze_batch_norm_2d. Norms come back with
# PyTorch's default momentum of 0.1 in the place of their own, so that the moving statistics of a
# model that was made with another one (TensorFlow's and Keras's 0.99 is 0.01 here) follow ten times
# as few batches when training goes on. eps is kept.
# Seen: a norm of momentum 0.01 and eps 0.001 comes back with momentum 0.1 and eps 0.001.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 timm==1.0.31 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import timm
from timm.utils.model import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch.nn import BatchNorm2d

model = timm.create_model("efficientnet_lite0", bn_momentum=0.01, bn_eps=1e-3)
settings = lambda: {(m.momentum, m.eps) for m in model.modules() if isinstance(m, BatchNorm2d)}
before = settings()
model = unfreeze_batch_norm_2d(freeze_batch_norm_2d(model))
print(f"momentum and eps before: {before}, after: {settings()}")
sys.exit((before, settings()) != ({(0.01, 1e-3)}, {(0.1, 1e-3)}))
PYTHON
