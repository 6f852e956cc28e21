"""Learning rates beside the frameworks' own schedules."""

from __future__ import annotations

import keras
import pytest
import torch

from kconv.training import learning_rate


def test_cyclic_schedule_is_the_papers() -> None:
    rates = [learning_rate("cyclic25", e, steps_per_epoch=1, epochs=50) for e in range(50)]
    expected = [0.001 * (1 + 0.5 * e) if e < 7 else 0.004 * 0.85 ** (e - 7) for e in range(25)]
    assert rates == pytest.approx(expected * 2, rel=1e-12)
    second = {learning_rate("cyclic25", s, steps_per_epoch=3, epochs=2, lr=0.01) for s in (3, 5)}
    assert second == {0.015}


@pytest.mark.parametrize(("steps", "epochs"), [(10, 2), (7, 3), (1, 1), (2, 1)])
def test_one_cycle_is_pytorchs(steps: int, epochs: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.5, total_steps=max(steps * epochs, 2), cycle_momentum=False
    )
    for step in range(steps * epochs):
        ours = learning_rate("one-cycle", step, steps_per_epoch=steps, epochs=epochs, lr=0.5)
        if steps * epochs > 3:  # PyTorch's first phase ends before it begins otherwise
            assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        assert 0 < ours <= 0.5
        optimizer.step()
        if step + 1 < steps * epochs:
            theirs.step()


def test_cosine_is_keras() -> None:
    kwargs = {"steps_per_epoch": 10, "epochs": 3, "lr": 0.2}
    theirs = keras.optimizers.schedules.CosineDecay(0.2, 30)
    for step in (0, 7, 29):
        assert learning_rate("cosine", step, **kwargs) == pytest.approx(float(theirs(step)), 1e-5)
    warm = [learning_rate("cosine", s, warmup_epochs=0.4, **kwargs) for s in range(5)]
    assert warm == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    held = [learning_rate("constant", s, warmup_epochs=0.1, **kwargs) for s in range(3)]
    assert held == pytest.approx([0.1, 0.2, 0.2])
    with pytest.raises(ValueError, match="unknown lr_schedule 'cosinus'"):
        learning_rate("cosinus", 0, **kwargs)
