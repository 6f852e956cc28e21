"""Moving statistics of batch norms, estimated anew."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kconv.keras._private import all_layers

Tensor = Any


class RecalibrateBatchNorms(keras.callbacks.Callback):
    """Estimates the moving statistics of all batch norms anew before each validation.

    With the usual momentum of 0.99 they follow the weights some hundred steps behind: where a whole
    run has a few hundred steps, a network that has learnt its task well predicts nothing in
    inference mode. This callback averages the statistics of some training images under the weights
    as they are. Frozen batch norms keep theirs.

    Example:
        >>> x = keras.Input((4, 4, 2))
        >>> y = keras.layers.GlobalAveragePooling2D()(keras.layers.BatchNormalization()(x))
        >>> model = keras.Model(x, y)
        >>> model.compile("sgd", "mse")
        >>> images = np.full((6, 4, 4, 2), 8.0, np.float32)
        >>> _ = model.fit(images, images[:, 0, 0], verbose=0, validation_data=(
        ...     images, images[:, 0, 0]), callbacks=[RecalibrateBatchNorms(images, batch_size=3)])
        >>> keras.ops.convert_to_numpy(model.layers[1].moving_mean).round(4)
        array([8., 8.], dtype=float32)

    Args:
        images: (N, H, W, C), as the training sees them.
        batch_size: that of the training; images after the last whole batch are left out.

    Raises:
        ValueError: if there are no images, or ``batch_size`` is below 1.
    """

    def __init__(self, images: ArrayLike, batch_size: int = 64) -> None:
        super().__init__()
        self.images, self.batch_size = np.asarray(images), batch_size
        if not len(self.images):
            raise ValueError("there are no images to take statistics of")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is below 1")

    def set_model(self, model: keras.Model) -> None:
        """Called by Keras before the training."""
        super().set_model(model)
        self._recalibrator = Recalibrator(model)

    def on_test_begin(self, logs: Any = None) -> None:
        """Called by Keras before each validation."""
        starts = range(0, max(1, len(self.images) - self.batch_size + 1), self.batch_size)
        self._recalibrator(self.images[start : start + self.batch_size] for start in starts)


class Recalibrator:
    """Replaces a model's moving statistics by the mean of those of some batches.

    Args:
        model: of (N, H, W, C); it compiles once, however often this is called.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._in_training_mode = _InTrainingMode(model)

    def __call__(self, batches: Iterable[NDArray[Any]]) -> None:
        """Estimate the statistics of all batch norms but the frozen ones.

        Args:
            batches: at least one, of (N, H, W, C) each.
        """
        norms = [norm for norm in _batch_norms(self._model) if norm.trainable and norm.momentum < 1]
        before = [(variable, _numbers(variable)) for norm in norms for variable in _moving(norm)]
        rest = iter(batches)
        updates = self._first_batch(norms, next(rest))
        count = 1
        for images in rest:
            self._in_training_mode.predict_on_batch(images)
            count += 1
        for variable, values in before:
            if not updates[id(variable)]:  # of a norm that the model does not call
                variable.assign(values)
        # A moving average that started from zero lacks the share momentum^updates.
        for norm in norms:
            for variable in _moving(norm):
                if updates[id(variable)]:
                    share = 1 - norm.momentum ** (count * updates[id(variable)])
                    variable.assign(variable / share)

    def _first_batch(self, norms: list[Any], images: NDArray[Any]) -> dict[int, int]:
        """Averages of one batch that start from zeros, and how often each is updated in a batch.

        A norm may be called several times, and a wrapper such as TimeDistributed calls it for
        every step. What a start from ones leaves more than one from zeros is momentum^updates.
        """
        # The batch is run twice, so what else a run moves (random seeds) starts from the same.
        others = [(v, _numbers(v)) for v in self._model.non_trainable_variables]
        ends = []
        for start in (np.ones, np.zeros):
            for variable, values in others:
                variable.assign(values)
            for norm in norms:
                for variable in _moving(norm):
                    variable.assign(start(variable.shape))
            self._in_training_mode.predict_on_batch(images)
            ends.append({id(v): _numbers(v) for norm in norms for v in _moving(norm)})
        from_ones, from_zeros = ends
        updates = {}
        for norm in norms:
            for variable in _moving(norm):
                left = float(np.median(from_ones[id(variable)] - from_zeros[id(variable)]))
                few = max(left, 1e-30)
                none = left > 1 - 0.5 * (1 - norm.momentum)
                number = math.log(few) / math.log(norm.momentum) if norm.momentum > 0 else 1
                updates[id(variable)] = 0 if none else max(1, round(number))
        return updates


def _moving(norm: Any) -> list[Any]:
    return [norm.moving_mean, norm.moving_variance]


def _numbers(variable: Any) -> NDArray[Any]:
    return np.array(keras.ops.convert_to_numpy(variable))


class _InTrainingMode(keras.Model):
    """A model that runs another as training does, so that predicting moves its statistics."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__(name="in_training_mode")  # TensorFlow refuses a name that begins with "_"
        self.model = model
        self.built = True  # else Keras builds it by running it, one operation at a time

    def call(self, images: Tensor) -> Tensor:
        return self.model(images, training=True)


def _batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """Those of a model, also inside other models, blocks and wrappers, each once."""
    kind = keras.layers.BatchNormalization
    norms = [layer for layer in all_layers(model) if isinstance(layer, kind) and layer.built]
    return list({id(norm): norm for norm in norms}.values())
