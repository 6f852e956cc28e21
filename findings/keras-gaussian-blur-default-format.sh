#!/usr/bin/env bash
# Keras 3.15.1 on its JAX backend (JAX 0.10.2), and on PyTorch's likewise: ops.image.gaussian_blur
# without a data_format, which its documentation says is keras.config.image_data_format(), takes
# channels_last images for channels_first ones: it blurs over columns and channels, and not over
# rows. The shape is right, and the result looks like a blur. Said outright, "channels_last" is
# right; the NumPy and TensorFlow backends are right without it.
# Seen: one pixel of 1 in channel 0 spreads to channel 1 and to no other row (jax), or to the eight
# neighbours in its own channel (numpy, and jax with data_format="channels_last").
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/probe.py" <<'PYTHON'
import sys

import keras
import numpy as np

x = np.zeros((1, 5, 5, 2), "float32")
x[0, 2, 2, 0] = 1
backend = keras.backend.backend()
print(f"{backend}: image_data_format is {keras.config.image_data_format()}")
seen = []
for arguments in ({}, {"data_format": "channels_last"}):
    y = keras.ops.convert_to_numpy(keras.ops.image.gaussian_blur(x, **arguments))[0]
    pixels, rows = int((y[..., 0] > 0).sum()), int((y.sum((1, 2)) > 0).sum())
    seen.append((pixels, rows, float(y[..., 1].sum())))
    print(f"  {arguments}: {pixels} pixels in {rows} rows of channel 0, {seen[-1][2]:.2f} of channel 1")
right = (9, 3, 0)
wrong = seen[0][:2] == (3, 1) and seen[0][2] > 0.2
sys.exit(not (seen[1] == right and (wrong if backend == "jax" else seen[0] == right)))
PYTHON
for backend in jax numpy; do
  KERAS_BACKEND=$backend JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/probe.py"
done
