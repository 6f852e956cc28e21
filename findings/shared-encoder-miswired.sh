#!/usr/bin/env bash
# A model that applies one inner model (an encoder, say) to two inputs, saved as HDF5 by tf_keras
# 2.21.0 (Keras 2), is loaded by Keras 3.15.1 without a word, and wired otherwise. In the file an
# inner model's calls count from 1. Keras 3 subtracts that 1 for the outputs of the whole model, but
# not for the inputs of its layers: the layer behind the first call reads the second one. (Where a
# layer reads the last call there is none after it, and loading fails.)
# Seen: encoder(left) = 6, encoder(right) = 60; Keras 2 gives them as [6, 60], Keras 3 as [60, 60].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorflow-cpu==2.21.0 tf_keras==2.21.0 keras==3.15.1 h5py==3.14.0
KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PYTHON'
import sys

import keras
import numpy as np
import tf_keras
from tf_keras import layers

x = layers.Input((3,))
encoder = tf_keras.Model(x, layers.Dense(1, kernel_initializer="ones")(x), name="encoder")
left, right = layers.Input((3,), name="left"), layers.Input((3,), name="right")
first, second = encoder(left), encoder(right)
old = tf_keras.Model([left, right], [layers.ReLU()(first), second])
old.save(f"{sys.argv[1]}/model.h5")
new = keras.models.load_model(f"{sys.argv[1]}/model.h5", compile=False)

data = [np.array([[1, 2, 3]], np.float32), np.array([[10, 20, 30]], np.float32)]
before, after = ([float(y[0, 0]) for y in m.predict(data, verbose=0)] for m in (old, new))
print(f"tf_keras {tf_keras.__version__}, keras {keras.__version__}")
print("saved by Keras 2:  ", before)
print("loaded by Keras 3: ", after)
sys.exit(before != [6, 60] or after != [60, 60])
PYTHON
