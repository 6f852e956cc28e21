"""The Keras side of ``kconv train``."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

import kconv.keras
from kconv._memory import return_memory_of_compilers
from kconv.keras.recalibration import Recalibrator
from kconv.models import Spec
from kconv.training.config import Config

_POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


class KerasTrainer:
    """A model of ``kconv.keras``; see :class:`kconv.training.Trainer`.

    ``fit`` is not used, as it goes on after whole epochs only and hides the model's state from
    callbacks within one; optimizers, clipping, accumulation and averages are Keras's.
    """

    def __init__(self, spec: Spec, config: Config) -> None:
        keras.config.set_image_data_format("channels_last")  # as the images come
        # Keras draws all its seeds from here; keras.utils.set_random_seed would import TensorFlow,
        # where it is installed, only to seed it too.
        random.seed(config.seed)
        _seed_backend(config.seed)
        if keras.backend.backend() == "jax":
            return_memory_of_compilers()
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(_POLICIES[config.precision])
        try:
            self.model = kconv.keras.build(spec, recompute=config.recompute)
        finally:
            keras.config.set_dtype_policy(before)
        # The loss is of float32.
        self.model.layers[-1].dtype_policy = keras.DTypePolicy("float32")
        optimizer = _optimizer(config)
        # Weight decay is for kernels alone: norms and biases have one axis.
        optimizer.exclude_from_weight_decay(
            var_list=[v for v in self.model.trainable_variables if len(v.shape) <= 1]
        )
        self.model.compile(
            optimizer=optimizer, loss="categorical_crossentropy", metrics=["accuracy"]
        )
        optimizer.build(self.model.trainable_variables)
        self.recalibrator = Recalibrator(self.model)
        self.swap = None
        if config.ema_decay is not None:
            self.swap = keras.callbacks.SwapEMAWeights()
            self.swap.set_model(self.model)

    def train_step(
        self,
        images: NDArray[np.float32],
        targets: NDArray[np.float32],
        learning_rate: float,
        *,
        scale: float,
        update: bool,
        seed: int,
    ) -> tuple[float, float]:
        # Accumulation is the optimizer's own, and chance is in the model's variables but for this.
        del scale, update
        _seed_backend(seed)
        self.model.optimizer.learning_rate = learning_rate
        logs = self.model.train_on_batch(images, targets, return_dict=True)
        return float(logs["loss"]), float(logs["accuracy"])

    def predict(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.model.predict_on_batch(images)

    def recalibrate(self, batches: Iterable[NDArray[np.float32]]) -> None:
        self.recalibrator(batches)

    def share_statistics(self) -> None:
        pass

    @contextmanager
    def averaged(self) -> Iterator[None]:
        # Before the first update the averages are none yet.
        if self.swap is None or not int(self.model.optimizer.iterations):
            yield
            return
        current = [(v, np.array(_numbers(v))) for v in self.model.non_trainable_variables]
        self.swap.on_test_begin()
        try:
            yield
        finally:
            self.swap.on_test_end()
            for variable, values in current:
                variable.assign(values)

    def state(self) -> dict[str, NDArray[Any]]:
        return {name: _numbers(variable) for name, variable in self._variables().items()}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        for name, variable in self._variables().items():
            variable.assign(state[name])

    def state_shapes(self, stored: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
        """The shapes that a state must have."""
        return {name: tuple(variable.shape) for name, variable in self._variables().items()}

    def _variables(self) -> dict[str, keras.Variable]:
        # Numbered by their order: a seed generator's own name counts up from model to model.
        return {
            f"{part}/{number:04d}/{variable.name}": variable
            for part, owner in (("model", self.model), ("optimizer", self.model.optimizer))
            for number, variable in enumerate(owner.variables)
        }


def _seed_backend(seed: int) -> None:
    """Fix what Keras's layers draw from PyTorch's own chance on it, such as dropout."""
    if keras.backend.backend() == "torch":
        import torch

        torch.manual_seed(seed)


def _numbers(variable: keras.Variable) -> NDArray[Any]:
    return keras.ops.convert_to_numpy(variable)


def _optimizer(config: Config) -> keras.optimizers.Optimizer:
    common: dict[str, Any] = {
        "weight_decay": config.weight_decay,
        "global_clipnorm": config.clip_grad_norm,
    }
    if config.ema_decay is not None:
        common |= {"use_ema": True, "ema_momentum": config.ema_decay}
    if config.gradient_accumulation > 1:
        common["gradient_accumulation_steps"] = config.gradient_accumulation
    if config.optimizer == "adamw":
        return keras.optimizers.AdamW(**common)
    if config.optimizer == "sgd":
        return keras.optimizers.SGD(momentum=config.momentum, **common)
    return keras.optimizers.RMSprop(rho=0.9, epsilon=1e-7, **common)
