"""Moving statistics of batch norms, estimated before each validation."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import kconv.keras as kk
from kconv.keras import RecalibrateBatchNorms
from kconv.keras.recalibration import Recalibrator


def test_statistics_before_each_validation() -> None:
    """Of a batch norm inside a nested model, under the weights as trained; frozen ones stay."""
    images = np.random.default_rng(0).normal(3, 2, (11, 2, 2, 3)).astype(np.float32)
    inner = keras.Sequential([keras.layers.Dense(4), keras.layers.BatchNormalization()])
    frozen = keras.layers.BatchNormalization(trainable=False)
    flat = [keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((2, 2, 3)), frozen, inner, *flat])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    seen = []
    record = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs))
    callbacks = [RecalibrateBatchNorms(images, batch_size=5), record]
    data = (images, images.sum(axis=(1, 2, 3)))
    model.fit(*data, epochs=2, verbose=0, validation_data=data, callbacks=callbacks)

    dense, norm = inner.layers
    hidden = keras.ops.convert_to_numpy(dense(frozen(images)))
    parts = (hidden[:5], hidden[5:10])  # the eleventh image makes no whole batch
    for moving, statistic in ((norm.moving_mean, np.mean), (norm.moving_variance, np.var)):
        expected = np.mean([statistic(part, axis=(0, 1, 2)) for part in parts], axis=0)
        actual = keras.ops.convert_to_numpy(moving)
        np.testing.assert_allclose(actual, expected, rtol=0.02, atol=0.02)
    assert not np.any(keras.ops.convert_to_numpy(frozen.moving_mean))
    assert seen[-1]["val_loss"] == pytest.approx(model.evaluate(*data, verbose=0), rel=1e-5)


def test_norms_in_blocks_and_wrappers_and_called_twice() -> None:
    """Each statistic is the mean over all calls, whatever holds the norm."""
    steps = np.random.default_rng(1).normal(2, 3, (4, 3, 5, 4, 2)).astype(np.float32)
    norm, twice = (keras.layers.BatchNormalization(momentum=0.9) for _ in range(2))
    unit = kk.ConvUnit(3, name="unit")
    uncalled = keras.layers.BatchNormalization(name="uncalled")
    uncalled.build((None, 3))
    x = keras.Input((3, 5, 4, 2))
    y = keras.layers.TimeDistributed(norm)(x)
    y = keras.layers.TimeDistributed(unit)(y)
    y = keras.layers.Dropout(0.5)(y)
    model = keras.Model(x, twice(twice(y) + 5.0))
    model.extra = uncalled
    uncalled.moving_mean.assign([7.0, 8.0, 9.0])
    Recalibrator(model)([steps, steps])

    def values(variable):
        return keras.ops.convert_to_numpy(variable)

    np.testing.assert_allclose(
        values(norm.moving_mean), steps.mean((0, 1, 2, 3)), rtol=0.1, atol=0.1
    )
    each = np.mean([steps[:, i].var((0, 1, 2)) for i in range(3)], axis=0)
    np.testing.assert_allclose(values(norm.moving_variance), each, rtol=0.1)
    inner = unit.network.get_layer("bn")
    assert np.all(values(inner.moving_variance) != 1)
    assert np.all(values(inner.moving_mean) != 0)
    # The first call's mean, and the second's, which is of beta + 5.
    assert np.all(np.abs(values(twice.moving_mean) - 2.5) < 1)
    np.testing.assert_array_equal(values(uncalled.moving_mean), [7, 8, 9])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": np.ones((0, 2, 2, 3))}, "no images"),
        ({"images": np.ones((1, 2, 2, 3)), "batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_arguments(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecalibrateBatchNorms(**arguments)
