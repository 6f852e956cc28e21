#!/usr/bin/env bash
# accelerate 1.15.0: Accelerator(gradient_accumulation_steps=4) divides every loss by four. The last
# update of an epoch, which it makes with the batches that are left, gets the mean of these times
# their share of four: with five batches in an epoch, the fifth has a quarter of its gradient, and an
# epoch of fewer batches than four makes one update that is too small.
# Seen: SGD of rate 1 with gradients of 1 moves a weight by 1 after four batches, and by 0.25 after
# the fifth, where the mean gradient of that batch is 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 accelerate==1.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
loader = DataLoader(TensorDataset(torch.ones(5, 1)), batch_size=1)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
weights = [0.0]
for (x,) in loader:
    with accelerator.accumulate(model):
        accelerator.backward(-model(x).mean())
        optimizer.step()
        optimizer.zero_grad()
    weights.append(float(next(model.parameters())))
print("the weight after each batch:", weights[1:])
sys.exit(weights != [0, 0, 0, 0, 1, 1.25])
PYTHON
