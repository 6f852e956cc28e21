#!/usr/bin/env bash
# Keras 3.15.1 (on JAX 0.10.2): an optimizer with gradient_accumulation_steps=4 asks its learning
# rate schedule with the number of batches, not of updates, and moves the averages of use_ema with
# each batch, whether the weights have changed or not; its own `iterations`, and its weight decay,
# count updates. So a schedule over the run's updates is over after a quarter of the run, and an
# average reaches back a quarter as far.
# Seen: a rate of 1, 2, 3, ... by iteration is applied as 4, 8, 12 in updates 1, 2, 3 (of SGD with
# gradients of 1), though iterations is 0, 1, 2 then; averages of momentum 0.5 follow a weight of 1,
# 2, 3, 4 as 1, 1.5, 2.469, 3.467; without accumulation the rates are 1, 2, 3 and the averages 1,
# 1.5, 2.25, 3.125.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import keras
import numpy as np

rate_of_update = keras.optimizers.schedules.PolynomialDecay(1.0, 100, end_learning_rate=101.0)


def applied(steps):
    """The iterations before each of three updates, and how far it moves the weight."""
    optimizer = keras.optimizers.SGD(rate_of_update, gradient_accumulation_steps=steps)
    weight = keras.Variable(np.zeros(1, np.float32))
    optimizer.build([weight])
    found = []
    for _ in range(3):
        before, counted = float(weight.numpy()[0]), int(optimizer.iterations)
        for _ in range(steps or 1):
            optimizer.apply([np.full(1, -1, np.float32)], [weight])
        found.append((counted, round(float(weight.numpy()[0]) - before, 3)))
    return found


def averages(steps):
    """The moving average after each of four updates that add 1 to the weight."""
    optimizer = keras.optimizers.SGD(
        1.0, use_ema=True, ema_momentum=0.5, gradient_accumulation_steps=steps
    )
    weight = keras.Variable(np.zeros(1, np.float32))
    optimizer.build([weight])
    found = []
    for _ in range(4):
        for _ in range(steps or 1):
            optimizer.apply([np.full(1, -1, np.float32)], [weight])
        optimizer.finalize_variable_values([average := keras.Variable(np.zeros(1, np.float32))])
        found.append(round(float(average.numpy()[0]), 3))
    return found


whole, accumulated = (applied(None), averages(None)), (applied(4), averages(4))
print("one batch an update:    iterations and rate", *whole)
print("four batches an update: iterations and rate", *accumulated)
as_seen = whole == ([(0, 1.0), (1, 2.0), (2, 3.0)], [1.0, 1.5, 2.25, 3.125])
as_seen &= accumulated == ([(0, 4.0), (1, 8.0), (2, 12.0)], [1.0, 1.5, 2.469, 3.467])
sys.exit(not as_seen)
PYTHON
