#!/usr/bin/env bash
# flax 0.12.8 (JAX 0.10.2, CPU): nnx.BatchNorm computes the batch variance as E[x^2] - E[x]^2 by
# default (use_fast_variance=True), in float32. For activations whose mean is large beside their
# deviation the difference cancels: with a mean of 1000 and a deviation of 1 the normalised values
# are off by a quarter of a deviation, with 4096 they are off by more than a hundred deviations, and
# nothing is said. use_fast_variance=False is right to 1e-3. A network that takes 8-bit pixels as
# they are (mean 120, deviation 60) is not affected; raw sensor values, times and positions are.
# Seen: fast: 1000 -> 2.4e-01, 4096 -> 1.2e+02; otherwise 5.0e-05 and 9.4e-05.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import jax.numpy as jnp
import numpy as np
from flax import nnx

noise = np.random.default_rng(0).normal(size=(64, 8, 8, 4))
seen = {}
for mean in (0, 1000, 4096):
    x = (mean + noise).astype(np.float32)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-3)
    for fast in (True, False):
        norm = nnx.BatchNorm(4, epsilon=1e-3, use_fast_variance=fast, rngs=nnx.Rngs(0))
        seen[mean, fast] = error = float(abs(np.asarray(norm(jnp.asarray(x))) - exact).max())
        print(f"mean {mean}, use_fast_variance={fast}: largest error {error:.1e} deviations")
default = nnx.BatchNorm(4, rngs=nnx.Rngs(0)).use_fast_variance
print(f"use_fast_variance is {default} by default")
as_seen = (
    default
    and seen[0, True] < 1e-5
    and 0.01 < seen[1000, True] < 1
    and seen[4096, True] > 10
    and max(seen[mean, False] for mean in (0, 1000, 4096)) < 1e-3
)
sys.exit(not as_seen)
PYTHON
