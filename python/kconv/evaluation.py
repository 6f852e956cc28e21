"""How often a classifier is right, and what it takes for what.

Example:
    >>> truth, found = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    >>> confusion_matrix(truth, found, 2).tolist()
    [[1, 1], [0, 2]]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["classification_report", "confusion_matrix", "report_of"]

Labels = NDArray[np.integer[Any]]


def confusion_matrix(labels: Labels, found: Labels, classes: int) -> NDArray[np.int64]:
    """How many images of each class were taken for each.

    Args:
        labels: (N,) what the images are.
        found: (N,) what the model takes them for.
        classes: how many there are.

    Returns:
        (classes, classes): a row for what they are, a column for what they are taken for.
    """
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, found), 1)
    return confusion


def classification_report(labels: Labels, found: Labels, class_names: Iterable[str]) -> str:
    """Precision, recall and F1 of every class, as a table; the mean is of classes with images.

    Example:
        >>> truth, found = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
        >>> print(classification_report(truth, found, ["cat", "dog"]))
        class    precision  recall      F1  images
        cat         1.0000  0.5000  0.6667       2
        dog         0.6667  1.0000  0.8000       2
        mean        0.8333  0.7500  0.7333       4

    Args:
        labels: (N,) what the images are.
        found: (N,) what the model takes them for.
        class_names: One name for each label.

    Returns:
        The table, ending without a newline.
    """
    names = list(class_names)
    return report_of(confusion_matrix(labels, found, len(names)), names)


def report_of(confusion: NDArray[np.int64], class_names: Iterable[str]) -> str:
    """As :func:`classification_report`, of a confusion matrix."""
    names = list(class_names)
    right = np.diag(confusion)
    images, claimed = confusion.sum(axis=1), confusion.sum(axis=0)
    precision = right / np.maximum(claimed, 1)
    recall = right / np.maximum(images, 1)
    f1 = 2 * right / np.maximum(images + claimed, 1)
    table = np.stack([precision, recall, f1], axis=1)
    width = max(map(len, [*names, "class"])) + 3
    lines = [f"{'class':{width}} precision  recall      F1  images"]
    for name, row, count in zip(
        [*names, "mean"],
        [*table, table[images > 0].mean(axis=0)],
        [*images, images.sum()],
        strict=True,
    ):
        lines.append(f"{name:{width}} {row[0]:9.4f}  {row[1]:.4f}  {row[2]:.4f}  {int(count):6d}")
    return "\n".join(lines)
