"""Pictures of what a training run did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

_MOST_NAMES = 40
"""Of more classes than these, a picture has no room for names and numbers."""


def training_curves(
    history: Sequence[Mapping[str, float]],
    path: Path,
    *,
    title: str = "",
    test_accuracy: float | None = None,
) -> None:
    """Draw loss, accuracy and learning rate over the epochs, and save the picture.

    Args:
        history: For each epoch ``epoch``, ``loss``, ``val_loss``, ``accuracy``, ``val_accuracy``
            and ``learning_rate``; what is in no epoch has no curve.
        path: The file; its suffix says which format.
        title: What was trained.
        test_accuracy: Of the best state, if there is one.
    """
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    figure.suptitle(_plain(title))
    epochs = [row["epoch"] for row in history]
    curves = {
        "loss": {"loss": "training", "val_loss": "validation"},
        "accuracy": {"accuracy": "training", "val_accuracy": "validation"},
        "learning rate": {"learning_rate": "learning rate"},
    }
    for axes, (quantity, keys) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        for key, label in keys.items():
            if all(key not in row for row in history):
                continue
            axes.plot(epochs, [row[key] for row in history], marker="o", markersize=4, label=label)
        if quantity == "accuracy" and test_accuracy is not None:
            label = f"test, best state: {test_accuracy:.4f}"
            axes.axhline(test_accuracy, color="gray", linestyle="--", label=label)
        axes.set_xlabel("epoch")
        axes.set_title(quantity)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=100)


def confusion_picture(
    confusion: NDArray[Any], class_names: Sequence[str], title: str, path: Path
) -> None:
    """Draw a confusion matrix, and save the picture.

    Args:
        confusion: (classes, classes) as :func:`kconv.evaluation.confusion_matrix` has it.
        class_names: One name for each class.
        title: What was trained.
        path: The file; its suffix says which format.
    """
    count = len(class_names)
    named = count <= _MOST_NAMES
    side = 4 + 0.35 * min(count, _MOST_NAMES)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if named:
        names = list(map(_plain, class_names))
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
        for row, column in np.argwhere(confusion):
            color = "white" if shares[row, column] > 0.5 else "black"
            number = str(confusion[row, column])
            axes.text(column, row, number, ha="center", va="center", color=color, fontsize=8)
    axes.set_xlabel("taken for")
    axes.set_ylabel("what it is")
    axes.set_title(_plain(title))
    figure.savefig(path, dpi=100)


def _plain(text: str) -> str:
    """A text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")
