"""Pictures of what a training run did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def training_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw loss and accuracy over the epochs, and save the picture.

    Args:
        history: For each epoch ``epoch``, ``loss``, ``val_loss``, ``accuracy``, ``val_accuracy``.
        path: The file; its suffix says which format.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((quantity, "training"), (f"val_{quantity}", "validation")):
            axes.plot(epochs, [row[key] for row in history], marker="o", markersize=4, label=label)
        axes.set_xlabel("epoch")
        axes.set_title(quantity)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
