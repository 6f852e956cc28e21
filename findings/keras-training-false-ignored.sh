#!/usr/bin/env bash
# Keras 3.15.1 (JAX 0.10.2): a functional model that calls a BatchNormalization, or a whole base
# model, with training=False, as guides to transfer learning do, runs it in training mode all the
# same once the outer model is called with training=True, which fit does. The moving statistics that
# were to stay move with every batch. What keeps them is norm.trainable = False.
# Seen: moving means 0 -> 0.03 by one call with training=True and -> 0.09 by fit, for inputs of mean 3;
# with trainable=False 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import keras
import numpy as np

x = np.random.default_rng(0).normal(3, 2, (64, 4)).astype("float32")
seen = []
for what, trainable in (("a norm", True), ("a base model", True), ("a norm that is frozen", False)):
    inputs, norm = keras.Input((4,)), keras.layers.BatchNormalization(trainable=trainable)
    inner = norm
    if what == "a base model":
        base_inputs = keras.Input((4,))
        inner = keras.Model(base_inputs, norm(base_inputs))
    model = keras.Model(inputs, keras.layers.Dense(1)(inner(inputs, training=False)))
    model.compile("sgd", "mse")
    model(x, training=True)
    called = float(norm.moving_mean[0])
    model.fit(x, np.zeros(64), verbose=0)
    seen.append((called, float(norm.moving_mean[0])))
    print(f"{what}, called with training=False: moving mean {called:.3f}, after fit {seen[-1][1]:.3f}")
moved = all(called > 0.01 and fitted > called for called, fitted in seen[:2])
sys.exit(not (moved and seen[2] == (0, 0)))
PYTHON
