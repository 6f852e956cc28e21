#!/usr/bin/env bash
# OpenCV 5.0.0 (opencv-python-headless): imread(file, IMREAD_GRAYSCALE) of a colour PNG with a gAMA
# chunk, which screenshots and image editors write, is not the grey of its colours: libpng, which is
# asked for grey, undoes the gamma, mixes, and applies it again. The same pixels without the chunk,
# or read in colour and turned grey by cvtColor, give other levels, and so do Pillow and a JPEG of the
# same picture. Data sets with PNGs of several programs get two kinds of grey.
# Seen: pure red, green, blue, without the chunk: 76, 149, 29; with gAMA 45455: 147, 200, 95.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet opencv-python-headless==5.0.0.93 pillow==13.0.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import struct
import sys
import zlib

import cv2
import numpy as np
from PIL import Image


def png(path, pixels, chunks):
    """An 8-bit RGB file, by the PNG specification."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + body)


pixels = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90]]], np.uint8)
seen = {}
for name, chunks in (("plain", []), ("gAMA", [(b"gAMA", struct.pack(">I", 45455))])):
    png(path := f"{sys.argv[1]}/{name}.png", pixels, chunks)
    grey = cv2.imread(path, cv2.IMREAD_GRAYSCALE)[0].tolist()
    mixed = cv2.cvtColor(cv2.imread(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2GRAY)[0].tolist()
    pillow = np.asarray(Image.open(path).convert("L"))[0].tolist()
    seen[name] = grey, mixed, pillow
    print(f"{name}: IMREAD_GRAYSCALE {grey}, IMREAD_COLOR and cvtColor {mixed}, Pillow {pillow}")
off = abs(np.array(seen["gAMA"][0]) - seen["gAMA"][1])
near = abs(np.array(seen["plain"][0]) - seen["plain"][1]).max() <= 1
sys.exit(not (near and seen["plain"][1:] == seen["gAMA"][1:] and off[:3].min() > 20 and off[3] <= 1))
PYTHON
