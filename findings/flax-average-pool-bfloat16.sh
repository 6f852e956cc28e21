#!/usr/bin/env bash
# JAX 0.10.2 (CPU) with flax 0.12.8 and Keras 3.15.1: an average pool of bfloat16 adds up its window
# in bfloat16. A sum of ones stops at 256, as 257 has no bfloat16, so nnx.avg_pool and Keras's
# AveragePooling2D of an image of ones give 0.33 for windows of 28x28 and 0.25 for 32x32, with or
# without jit; windows of up to 16x16 are right for ones, but 5 % off for pixels between 0 and 1.
# In float16 the sum overflows: the mean of 32x32 values of 100 is inf. jnp.mean and Keras's
# GlobalAveragePooling2D keep their sums in float32, as PyTorch's avg_pool2d does, and are right. So
# a model in mixed_bfloat16 is right with the one layer and not with the other.
# Seen: 28x28 0.326, 32x32 0.25 (flax and Keras), means of the same values 1.0; float16 inf for 100.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 keras==3.15.1 numpy==2.4.6
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import jax.numpy as jnp
import keras
from flax import nnx

seen = {}
for size in (16, 28, 32):
    ones = jnp.ones((1, size, size, 4), jnp.bfloat16)
    window = (size, size)
    seen[size] = [
        float(nnx.avg_pool(ones, window)[0, 0, 0, 0]),
        float(keras.layers.AveragePooling2D(size, dtype="mixed_bfloat16")(ones)[0, 0, 0, 0]),
        float(keras.layers.GlobalAveragePooling2D(dtype="mixed_bfloat16")(ones)[0, 0]),
        float(ones.mean()),
    ]
    names = ("nnx.avg_pool", "AveragePooling2D", "GlobalAveragePooling2D", "jnp.mean")
    print(f"ones of {size}x{size}:", ", ".join(f"{n} {v:.3f}" for n, v in zip(names, seen[size])))
hundreds = jnp.full((1, 32, 32, 1), 100, jnp.float16)
pooled, mean = float(nnx.avg_pool(hundreds, (32, 32))[0, 0, 0, 0]), float(hundreds.mean())
print(f"float16, 32x32 of 100: nnx.avg_pool {pooled}, jnp.mean {mean}")
as_seen = seen[16] == [1, 1, 1, 1] and seen[32] == [0.25, 0.25, 1, 1]
as_seen &= all(abs(value - 0.326) < 1e-3 for value in seen[28][:2]) and seen[28][2:] == [1, 1]
sys.exit(not (as_seen and pooled == float("inf") and mean == 100))
PYTHON
