"""What a classifier's report counts."""

from __future__ import annotations

import numpy as np
import pytest

from kconv.evaluation import classification_report


def test_report_counts_as_by_hand() -> None:
    labels, found = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 1])
    rows = classification_report(labels, found, ["a", "b", "c"]).splitlines()
    values = {row.split()[0]: [float(v) for v in row.split()[1:]] for row in rows[1:]}
    assert values["a"] == pytest.approx([1, 2 / 3, 0.8, 3], abs=1e-4)
    assert values["b"] == pytest.approx([1 / 3, 1 / 2, 0.4, 2], abs=1e-4)
    assert values["c"] == [0, 0, 0, 1]  # never found rightly: no division by zero
    assert values["mean"] == pytest.approx([4 / 9, 7 / 18, 0.4, 6], abs=1e-4)


def test_classes_without_images_leave_the_mean_alone() -> None:
    """As in scikit-learn's balanced accuracy; to take an image for one is still a mistake."""
    labels = np.array([0, 0, 1, 1])
    for found in ([0, 1, 1, 1], [0, 2, 1, 1]):
        mean = classification_report(labels, np.array(found), "abcd").splitlines()[-1].split()
        assert float(mean[2]) == pytest.approx((1 / 2 + 2 / 2) / 2)
