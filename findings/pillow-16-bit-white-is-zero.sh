#!/usr/bin/env bash
# Pillow 13.0.0: a grey TIFF whose PhotometricInterpretation is 0 (0 is white, as scanners and
# microscopes write) is turned over on reading when it has 8 bits, and is not when it has 16: black
# and white are exchanged, and the mode, "I;16", does not tell.
# Seen: 8 bits 0, 128, 255 -> 255, 127, 0; 16 bits 0, 256, 65535 -> 0, 256, 65535.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct
import sys

import numpy as np
from PIL import Image


def tiff(bits, photometric, pixels):
    """Three grey pixels in a row, uncompressed, by the TIFF 6.0 specification."""
    data = struct.pack(f"<3{'B' if bits == 8 else 'H'}", *pixels)
    tags = [(256, 3), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 122)]
    tags += [(277, 1), (278, 1), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


seen = {}
for bits, pixels in ((8, (0, 128, 255)), (16, (0, 256, 65535))):
    for photometric, meaning in ((1, "black"), (0, "white")):
        image = Image.open(io.BytesIO(tiff(bits, photometric, pixels)))
        seen[bits, photometric] = values = np.asarray(image)[0].tolist()
        print(f"{bits} bits, 0 is {meaning}: {list(pixels)} read as {values}, mode {image.mode}")
right = seen[8, 1] == [0, 128, 255] and seen[8, 0] == [255, 127, 0]
sys.exit(not (right and seen[16, 1] == seen[16, 0] == [0, 256, 65535]))
PYTHON
