#!/usr/bin/env bash
# Keras 3.15.1 on its PyTorch backend (torch 2.15.0): AveragePooling2D with padding="same" divides by
# the pixels of the window that lie in the image, as on the other backends, only where the padding
# is the same on both sides. Elsewhere (a stride of 2 and an even size, NASNet's and many others'
# case) it repeats the border's pixels and counts them twice. Keras says that a model computes the
# same on every backend.
# Seen, for 0 1 2 3, a window of 3 and a stride of 2: torch 1, 2.667; jax 1, 2.5, the mean of 2 and 3.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 torch==2.15.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/probe.py" <<'PYTHON'
import sys

import keras
import numpy as np

pool = keras.layers.AveragePooling1D(3, 2, padding="same")
even, odd = (
    keras.ops.convert_to_numpy(pool(np.arange(size, dtype="float32")[None, :, None])).ravel()
    for size in (4, 5)
)
backend = keras.backend.backend()
print(f"{backend}: 0 1 2 3 -> {even.round(3).tolist()}; 0 1 2 3 4 -> {odd.round(3).tolist()}")
border = 8 / 3 if backend == "torch" else 2.5
sys.exit(not (np.allclose(even, [1, border]) and np.allclose(odd, [0.5, 2, 3.5])))
PYTHON
for backend in torch jax; do
  KERAS_BACKEND=$backend JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/probe.py"
done
