#!/usr/bin/env bash
# tf_keras 2.21.0 (Keras 2) and Keras 3.15.1 call two functions hard_sigmoid: clip(0.2 x + 0.5) and
# clip(x / 6 + 0.5). A model that Keras 2 saved as HDF5 stores the name alone, and Keras 3 loads it
# without a word, into another function: at x = 2.5 it gives 0.9167 for 1. It matters for squeeze
# and excite blocks (MobileNet V3 and its kin) and for LSTM's recurrent_activation of old files.
# Seen: at -2, -1, 1, 2: 0.1, 0.3, 0.7, 0.9 (Keras 2) and 0.1667, 0.3333, 0.6667, 0.8333 (Keras 3).
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

x = np.array([[-2, -1, 0, 1, 2]], np.float32)
inputs = tf_keras.Input((5,))
old = tf_keras.Model(inputs, tf_keras.layers.Activation("hard_sigmoid")(inputs))
old.save(f"{sys.argv[1]}/model.h5")
new = keras.models.load_model(f"{sys.argv[1]}/model.h5")
before, after = old.predict(x, verbose=0)[0], new.predict(x, verbose=0)[0]
print("saved by Keras 2:  ", before.round(4))
print("loaded by Keras 3: ", after.round(4))
as_seen = np.allclose(before, np.clip(0.2 * x[0] + 0.5, 0, 1), atol=1e-6)
as_seen &= np.allclose(after, np.clip(x[0] / 6 + 0.5, 0, 1), atol=1e-6)
sys.exit(not as_seen)
PYTHON
