#!/usr/bin/env bash
# torchvision 0.29.2: transforms.v2.RandomErasing(value="random"), and that of transforms, draw the
# erased pixels from a normal distribution around 0 of deviation 1, which is meant for images that
# are normalized. Of bytes, which both take, they become 0, 1 and 2, and where they are negative 255
# and 254: black with a sixth of white dots, in the place of noise.
# Seen: of the erased bytes 65 to 72 % are 0, 14 to 18 % are 254 or 255, and none is between 8 and
# 247; of floats from 0 to 1, half of the erased ones are negative, and a sixth is above 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 torchvision==0.29.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torchvision import transforms
from torchvision.transforms import v2

torch.manual_seed(0)
image = torch.full((3, 128, 128), 128, dtype=torch.uint8)
options = {"p": 1, "scale": (0.5, 0.5), "ratio": (1, 1), "value": "random"}
as_seen = []
for module in (transforms, v2):
    erased = module.RandomErasing(**options)(image)
    erased = erased[erased != 128].int()
    share = lambda chosen: round(float(chosen.float().mean()), 3)
    black, white = share(erased == 0), share(erased >= 254)
    between = share((erased >= 8) & (erased <= 247))
    print(f"{module.__name__}: {black} black, {white} of 254 and 255, {between} between")
    as_seen += [0.65 < black < 0.72, 0.14 < white < 0.18, between == 0]
floats = v2.RandomErasing(**options)(v2.functional.to_dtype(image, torch.float32, scale=True))
floats = floats[floats != 128 / 255]
below, above = float((floats < 0).float().mean()), float((floats > 1).float().mean())
print(f"of floats from 0 to 1: {below:.2f} below 0, {above:.2f} above 1")
sys.exit(not all(as_seen))
PYTHON
