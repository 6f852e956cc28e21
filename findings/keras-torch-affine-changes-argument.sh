#!/usr/bin/env bash
# Keras 3.15.1 on its PyTorch backend (torch 2.15.0): keras.ops.image.affine_transform changes the
# tensor of transforms that it is given: it exchanges the parts of rows and columns in place. The
# same call with the same tensor gives another result the second time (and the first one the third
# time), so that images and masks that are turned by one tensor no longer match. A NumPy array, a
# Keras variable or a list is copied first, and stays; so does a JAX array on the JAX backend.
# Seen: [1, 0.5, 2, 0, 1, 3, 0, 0] after a call is [1, 0.5, 3, 0, 1, 2, 0, 0]; results differ by 0.95.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 torch==2.15.0 numpy==2.4.6
KERAS_BACKEND=torch "$folder/venv/bin/python" - <<'PYTHON'
import sys

import keras
import numpy as np
import torch

image = np.random.default_rng(0).uniform(size=(1, 6, 7, 3)).astype("float32")
shear = [[1, 0.5, 2, 0, 1, 3, 0, 0]]
seen = {}
for name, transform in {
    "torch.Tensor": torch.tensor(shear, dtype=torch.float32),
    "numpy.ndarray": np.array(shear, "float32"),
}.items():
    first, second = (keras.ops.image.affine_transform(image, transform) for _ in range(2))
    kept = keras.ops.image.affine_transform(image, np.array(shear, "float32"))
    seen[name] = float(abs(first - second).max())
    print(f"{name}: the second call differs from the first by {seen[name]:.2f}")
    assert float(abs(first - kept).max()) == 0
once = torch.tensor(shear, dtype=torch.float32)
keras.ops.image.affine_transform(image, once)
print("the tensor after one call:", once[0].tolist())
as_seen = once[0].tolist() == [1, 0.5, 3, 0, 1, 2, 0, 0]
sys.exit(not (as_seen and seen["torch.Tensor"] > 0.1 and seen["numpy.ndarray"] == 0))
PYTHON
