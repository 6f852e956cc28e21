"""The Keras side of ``kconv train``."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

import kconv.keras
from kconv._memory import return_memory_of_compilers
from kconv.datasets import Labels
from kconv.keras.recalibration import Recalibrator
from kconv.models import Spec


class KerasTrainer:
    """A model of ``kconv.keras``; see :class:`kconv.training.Trainer`."""

    def __init__(self, spec: Spec, seed: int) -> None:
        keras.config.set_image_data_format("channels_last")  # as the images come
        # Keras draws all its seeds from here; keras.utils.set_random_seed would import TensorFlow,
        # where it is installed, only to seed it too.
        random.seed(seed)
        if keras.backend.backend() == "jax":
            return_memory_of_compilers()
        self.model = kconv.keras.build(spec)
        self.model.compile(
            optimizer=keras.optimizers.RMSprop(rho=0.9, epsilon=1e-7),
            loss="sparse_categorical_crossentropy",
            metrics=["accuracy"],
        )
        self.model.optimizer.build(self.model.trainable_variables)
        self.recalibrator = Recalibrator(self.model)

    def train_step(
        self, images: NDArray[np.float32], labels: Labels, learning_rate: float
    ) -> tuple[float, float]:
        self.model.optimizer.learning_rate = learning_rate
        logs = self.model.train_on_batch(images, labels, return_dict=True)
        return float(logs["loss"]), float(logs["accuracy"])

    def predict(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.model.predict_on_batch(images)

    def recalibrate(self, batches: Iterable[NDArray[np.float32]]) -> None:
        self.recalibrator(batches)

    def state(self) -> dict[str, NDArray[Any]]:
        return {
            name: keras.ops.convert_to_numpy(variable)
            for name, variable in self._variables().items()
        }

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        for name, variable in self._variables().items():
            variable.assign(state[name])

    def _variables(self) -> dict[str, keras.Variable]:
        # Numbered by their order: a seed generator's own name counts up from model to model.
        return {
            f"{part}/{number:04d}/{variable.name}": variable
            for part, owner in (("model", self.model), ("optimizer", self.model.optimizer))
            for number, variable in enumerate(owner.variables)
        }
