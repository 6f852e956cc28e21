#!/usr/bin/env bash
# torchvision 0.29.2 with Pillow 13.0.0: transforms.ToTensor reads a 16-bit grey image (mode "I;16",
# as which Pillow opens a 16-bit PNG) as int16. The brighter half of all levels becomes negative:
# white is -1, next to black. The documentation says that types which it does not scale are returned
# as they are. pil_to_tensor and v2.ToImage give uint16, and are right.
# Seen: 0, 1000, 32767, 32768, 65535 -> 0, 1000, 32767, -32768, -1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torchvision==0.29.2 torch==2.15.0 pillow==13.0.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import numpy as np
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

levels = [0, 1000, 32767, 32768, 65535]
file = io.BytesIO()
Image.fromarray(np.array([levels], np.uint16)).save(file, "png")
image = Image.open(file)
print("mode", image.mode, "levels", np.asarray(image)[0].tolist())
seen = {}
for name, transform in {
    "ToTensor": transforms.ToTensor(),
    "PILToTensor": transforms.PILToTensor(),
    "v2.ToImage": v2.ToImage(),
}.items():
    tensor = transform(image)
    seen[name] = tensor.flatten().tolist()
    print(f"{name}: {seen[name]} {tensor.dtype}")
as_seen = seen["ToTensor"] == [0, 1000, 32767, -32768, -1]
sys.exit(not (as_seen and seen["PILToTensor"] == seen["v2.ToImage"] == levels))
PYTHON
