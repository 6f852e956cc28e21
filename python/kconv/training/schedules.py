"""Learning rates as functions of the step, so that a resumed run needs no state of theirs.

``cosine`` is Keras's ``CosineDecay`` with ``warmup_steps`` and PyTorch's ``CosineAnnealingLR``
after a warm-up; ``one-cycle`` is PyTorch's ``OneCycleLR`` with its defaults, of the rate alone.
Written once they are the same in both frameworks.

Example:
    >>> rates = [learning_rate("cyclic25", e, steps_per_epoch=1, epochs=50) for e in (0, 6, 24)]
    >>> [round(rate, 5) for rate in rates]
    [0.001, 0.004, 0.00025]
"""

from __future__ import annotations

import math

_RISING, _FIRST, _LAST = 0.3, 1 / 25, 1 / 25e4
"""Of one cycle: the share of its steps in which it rises, and its ends, as parts of its peak."""


def learning_rate(
    schedule: str,
    step: int,
    *,
    steps_per_epoch: int,
    epochs: int,
    lr: float = 0.001,
    warmup_epochs: float = 0.0,
) -> float:
    """The learning rate of a step.

    ``cyclic25`` is the papers': every 25 epochs, 7 of warm-up to 4 times the start, then decay.

    Args:
        schedule: One of ``SCHEDULES``.
        step: Of the run, from 0 on.
        steps_per_epoch: How many steps an epoch has.
        epochs: How many the run has.
        lr: What ``cyclic25`` starts from; the highest rate of the others.
        warmup_epochs: In which ``cosine`` and ``constant`` rise to ``lr``.

    Returns:
        The rate.

    Raises:
        ValueError: There is no such schedule.
    """
    total, warmup = epochs * steps_per_epoch, round(warmup_epochs * steps_per_epoch)
    if schedule == "cyclic25":
        epoch = step // steps_per_epoch % 25
        return lr * (1 + 0.5 * epoch) if epoch < 7 else lr * 4 * 0.85 ** (epoch - 7)
    if schedule == "one-cycle":
        peak = _RISING * total - 1
        if step < peak:
            return lr * _between(_FIRST, 1, step / peak)
        return lr * _between(1, _LAST, (step - peak) / max(total - 1 - peak, 1e-9))
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"unknown lr_schedule {schedule!r}")
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return lr
    return lr * _between(1, 0, (step - warmup) / max(total - warmup, 1))


def _between(start: float, end: float, share: float) -> float:
    """Half a cosine from one value to another."""
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1))) / 2
