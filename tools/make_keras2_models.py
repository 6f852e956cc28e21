"""Make ``tests/data/keras2``: models of Keras 2 as HDF5 files, with an input and the output.

pip install tf_keras
python tools/make_keras2_models.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tf_keras as keras  # type: ignore[import-not-found]
from tf_keras import layers

TARGET = Path(__file__).parents[1] / "tests/data/keras2"
RNG = np.random.default_rng(0)


def save(name: str, model: keras.Model) -> None:
    """Write a model with random weights, its input and what it makes of that."""
    for weight in model.weights:
        values = RNG.normal(size=weight.shape) * 0.3
        if weight.name.endswith("variance:0"):
            values = np.abs(values) + 0.5
        if "/" in weight.name:  # others are Normalization's, which are adapted
            weight.assign(values)
    x = RNG.normal(size=(2, *model.input_shape[1:])).astype(np.float32)
    y = model.predict(x, verbose=0)
    outputs = dict(enumerate(y if isinstance(y, list) else [y]))
    model.save(TARGET / f"{name}.h5", save_format="h5")
    np.savez_compressed(TARGET / f"{name}.npz", x=x, **{f"y{i}": o for i, o in outputs.items()})


def sequential() -> keras.Model:
    """One after another, without names."""
    normalization = layers.Normalization()
    normalization.adapt(RNG.normal(size=(20, 7, 8, 3)) * 3 + 1)
    return keras.Sequential(
        [
            layers.InputLayer((7, 8, 3)),
            normalization,
            layers.Conv2D(4, 1, activation="hard_sigmoid"),
            layers.BatchNormalization(scale=False),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )


def separable() -> keras.Model:
    """Layers of convolutions that have lost arguments since."""
    return keras.Sequential(
        [
            layers.SeparableConv2D(
                4, 3, padding="same", depth_multiplier=2, activation="relu", input_shape=(7, 8, 3)
            ),
            layers.DepthwiseConv2D(3, strides=2),
            layers.LeakyReLU(0.2),
            layers.Conv2DTranspose(3, 3, strides=2),
            layers.PReLU(shared_axes=[1, 2]),
        ]
    )


def nested() -> keras.Model:
    """Models in a model: one of them called twice, and one that contains another."""

    def part(name: str) -> keras.Model:
        x = layers.Input((7, 8, 3))
        y = layers.Conv2D(3, 3, padding="same", name=f"{name}/conv")(x)
        return keras.Model(x, layers.BatchNormalization(name=f"{name}/bn")(y), name=name)

    shared, frozen = part("shared"), part("frozen")
    frozen.trainable = False
    outer = keras.Sequential([part("inner"), layers.Activation("tanh")], name="outer")
    x = layers.Input((7, 8, 3))
    y = layers.Add()([shared(x), shared(frozen(x, training=False))])
    return keras.Model(x, [outer(y), layers.GlobalAveragePooling2D()(y)])


def recurrent() -> keras.Model:
    """Layers around layers."""
    x = layers.Input((5, 3))
    y, state, carry = layers.LSTM(
        4, recurrent_activation="hard_sigmoid", return_sequences=True, return_state=True
    )(x)
    y = layers.Bidirectional(layers.GRU(2, return_sequences=True, reset_after=False))(y)
    y = layers.MultiHeadAttention(2, 3)(y, y)
    y = layers.TimeDistributed(keras.Sequential([layers.Dense(4), layers.Activation("relu")]))(y)
    return keras.Model(x, layers.LSTM(4)(y, initial_state=[state, carry]))


if __name__ == "__main__":
    TARGET.mkdir(exist_ok=True)
    for make in (sequential, separable, nested, recurrent):
        save(make.__name__, make())
