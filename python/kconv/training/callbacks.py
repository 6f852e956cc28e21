"""What may follow a run: trackers of experiments, and whatever else users have.

Example:
    >>> class Losses(Callback):
    ...     def on_epoch_end(self, epoch):
    ...         print(f"epoch {epoch.epoch}: {epoch.val_loss:.2f}")

A tracker is ten lines. Weights & Biases, for one, with ``import wandb``::

    class WandB(Callback):
        def on_train_begin(self, config, output):
            self.run = wandb.init(project="kconv", config=dataclasses.asdict(config))

        def on_epoch_end(self, epoch):
            self.run.log(dataclasses.asdict(epoch), step=epoch.epoch)

        def on_train_end(self, result):
            self.run.summary["test_accuracy"] = result.test_accuracy
            self.run.finish()

MLflow, with ``import mlflow``::

    class MLflow(Callback):
        def on_train_begin(self, config, output):
            mlflow.start_run()
            mlflow.log_params(dataclasses.asdict(config))

        def on_epoch_end(self, epoch):
            mlflow.log_metrics(dataclasses.asdict(epoch), step=epoch.epoch)

        def on_train_end(self, result):
            mlflow.log_metric("test_accuracy", result.test_accuracy)
            mlflow.end_run()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from kconv._require import require
from kconv.training.config import Config
from kconv.training.run import Epoch, Result

__all__ = ["Callback", "TensorBoard", "checked"]


class Callback:
    """Is told what happens in a run; in several processes, the first one's are.

    What it raises ends the run.
    """

    def on_train_begin(self, config: Config, output: Path) -> None:
        """Before the first step, with what is to be done and the run's folder."""

    def on_step_end(self, step: int, loss: float, accuracy: float, learning_rate: float) -> None:
        """After a step, counted from 1 over the whole run; the figures are of this process."""

    def on_epoch_end(self, epoch: Epoch) -> None:
        """After an epoch and its evaluation."""

    def on_train_end(self, result: Result) -> None:
        """After the test of the best state."""


def checked(callbacks: Iterable[Callback]) -> list[Callback]:
    """See that callbacks are some before a run begins.

    Args:
        callbacks: objects with the methods of :class:`Callback`, of this class or not.

    Returns:
        Them.

    Raises:
        TypeError: one lacks a method, or is a class.
    """
    methods = [name for name in vars(Callback) if name.startswith("on_")]
    for one in (found := list(callbacks)):
        lacks = [name for name in methods if not callable(getattr(one, name, None))]
        if isinstance(one, type) or lacks:
            why = (
                "is a class, not an object of it" if isinstance(one, type) else f"lacks {lacks[0]}"
            )
            raise TypeError(f"the callback {one!r} {why}; expected a kconv.training.Callback")
    return found


class TensorBoard(Callback):
    """Writes events for TensorBoard, by tensorboardX, which needs neither framework.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self) -> None:
        self._library = require("tensorboardX", "tensorboardX", "writing TensorBoard's events")

    def on_train_begin(self, config: Config, output: Path) -> None:
        """Open the file, in ``tensorboard/`` of the run's folder."""
        self._writer = self._library.SummaryWriter(str(output / "tensorboard"))

    def on_epoch_end(self, epoch: Epoch) -> None:
        """Write the epoch's figures."""
        for name, value in dataclasses.asdict(epoch).items():
            if name != "epoch":
                self._writer.add_scalar(name, value, epoch.epoch)
        self._writer.flush()

    def on_train_end(self, result: Result) -> None:
        """Write the test's accuracy, and close the file."""
        self._writer.add_scalar("test_accuracy", result.test_accuracy, len(result.history))
        self._writer.close()
