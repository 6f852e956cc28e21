"""Training from the command line and from Python: one loop, the same for every framework.

A run lives in a folder, which is a model: ``model.safetensors`` and ``config.json`` are the state
of the lowest validation loss, as :func:`kconv.load` opens it. Beside them are ``last.npz``
(everything needed to go on, written after each epoch and every ``checkpoint_steps``),
``config.toml`` (all options), ``results.csv``, ``curves.png``, ``report.txt`` and
``confusion.png``. Every file is replaced as a whole or not at all. While it goes on it holds a lock
on the folder's ``.lock``, which the system releases even where it is killed.

Example:
    >>> config = Config(model="mobilenet", optimizer="adamw", lr_schedule="cosine", lr=0.002)
    >>> train(config, Path("runs/mobilenet"))  # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path as Path  # for the example

from kconv.training._loop import Trainer, train
from kconv.training.callbacks import Callback, TensorBoard
from kconv.training.config import (
    FRAMEWORKS,
    OPTIMIZERS,
    PRESETS,
    SCHEDULES,
    SHORT_RUN_STEPS,
    Config,
    config_from,
    options_table,
    read_toml,
    to_toml,
)
from kconv.training.run import RUNS, Epoch, Result, load_config, reserve
from kconv.training.schedules import learning_rate

__all__ = [
    "FRAMEWORKS",
    "OPTIMIZERS",
    "PRESETS",
    "RUNS",
    "SCHEDULES",
    "SHORT_RUN_STEPS",
    "Callback",
    "Config",
    "Epoch",
    "Result",
    "TensorBoard",
    "Trainer",
    "config_from",
    "learning_rate",
    "load_config",
    "options_table",
    "read_toml",
    "reserve",
    "to_toml",
    "train",
]
