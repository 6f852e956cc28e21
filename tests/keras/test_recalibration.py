"""Moving statistics of batch norms, estimated before each validation."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from kconv.keras import RecalibrateBatchNorms


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
        np.testing.assert_allclose(keras.ops.convert_to_numpy(moving), expected, rtol=0.02)
    assert not np.any(keras.ops.convert_to_numpy(frozen.moving_mean))
    assert seen[-1]["val_loss"] == pytest.approx(model.evaluate(*data, verbose=0), rel=1e-5)


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
