"""PyTorch's steps: accumulation, clipping, averages and decay, beside the same by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from kconv import datasets, models
from kconv.training import Config, _loop
from kconv.training._torch import TorchTrainer
from kconv.training.ranks import Ranks

SPEC = models.create(
    "kdensenet_bc_l100",
    blocks=1,
    growth_rate=4,
    bottleneck=8,
    ktype="D6_4ch",
    classes=3,
    input_shape=(8, 8, 1),
)
SGD = Config(optimizer="sgd", momentum=0.0, lr=0.1)


def batches(count: int = 2) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((count, 5, 8, 8, 1)).astype(np.float32)
    targets = rng.dirichlet([1, 1, 1], (count, 5)).astype(np.float32)
    return list(zip(images, targets, strict=True))


def gradients(trainer: TorchTrainer) -> dict[str, torch.Tensor]:
    """The mean over the batches, by autograd alone."""
    model = trainer.model.train()
    for images, targets in batches():
        logits = model(torch.from_numpy(images).permute(0, 3, 1, 2))
        loss = -(torch.from_numpy(targets) * functional.log_softmax(logits, 1)).sum(1).mean()
        (loss / 2).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def step(trainer: TorchTrainer, rate: float = 0.1) -> None:
    for number, (images, targets) in enumerate(batches()):
        trainer.train_step(images, targets, rate, scale=0.5, update=number == 1, seed=7)


def test_accumulated_gradients_make_one_clipped_update() -> None:
    config = dataclasses.replace(SGD, clip_grad_norm=0.01, gradient_accumulation=2)
    trainer = TorchTrainer(SPEC, config, Ranks())
    expected = gradients(trainer)
    norm = torch.stack([g.square().sum() for g in expected.values()]).sum().sqrt()
    assert norm > 0.02
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    step(trainer)
    for name, parameter in trainer.model.named_parameters():
        change = before[name] - parameter.detach()
        torch.testing.assert_close(change, 0.1 * expected[name] * 0.01 / norm, rtol=1e-2, atol=1e-7)


def test_last_accumulation_is_divided_by_its_own_batches(tmp_path: Path) -> None:
    run = _loop._Run(
        Config(batch_size=4, gradient_accumulation=3, framework="torch"), tmp_path, Ranks(), print
    )
    run.data = datasets.load("fashion_mnist_mini", image_size=8, train_images=20, test_images=10)
    run.weights = run.teacher = None
    told: list[tuple[float, bool]] = []

    class Trainer:
        def train_step(self, *batch: Any, scale: float, update: bool, seed: int) -> Any:
            told.append((scale, update))
            return 0.0, 0.0

    run.trainer = Trainer()  # type: ignore[assignment]
    batches = run._batches(run.data.x_train, np.arange(20))
    for step_number in range(len(batches)):
        run._step(batches, step_number, batches[step_number], 0.1, 0)
    third, half = 1 / 3, 1 / 2
    expected = [(third, False), (third, False), (third, True), (half, False), (half, True)]
    assert told == expected


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
def test_decay_leaves_norms_and_biases_alone(optimizer: str) -> None:
    config = Config(optimizer=optimizer, weight_decay=0.5, lr=0.1)
    trainer = TorchTrainer(SPEC, config, Ranks())
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    for parameter in trainer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    trainer._update(0.1)
    for name, parameter in trainer.parameters.items():
        factor = 0.95 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_averages_follow_and_go_in_and_out() -> None:
    trainer = TorchTrainer(SPEC, dataclasses.replace(SGD, ema_decay=0.75), Ranks())
    seen = []
    for _ in range(3):
        step(trainer)
        seen.append([p.detach().clone() for p in trainer.parameters.values()])
    expected = [0.75 * (0.75 * a + 0.25 * b) + 0.25 * c for a, b, c in zip(*seen, strict=True)]
    state = trainer.state()
    with trainer.averaged():
        for parameter, average in zip(trainer.parameters.values(), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), average)
        trainer.recalibrate(images for images, _ in batches())
    for name, value in trainer.state().items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


def test_state_of_another_optimizer_is_seen() -> None:
    trainer = TorchTrainer(SPEC, Config(optimizer="adamw"), Ranks())
    step(trainer)
    state = trainer.state()
    assert trainer.state_shapes(state) == {name: array.shape for name, array in state.items()}
    assert any(name.startswith("optimizer/exp_avg/") for name in state)
    other = TorchTrainer(SPEC, Config(optimizer="adamw"), Ranks())
    other.load_state(state)
    step(trainer)
    step(other)
    for name, value in trainer.state().items():
        np.testing.assert_array_equal(value, other.state()[name], err_msg=name)
    wrong = {**state, "optimizer/exp_avg/nothing": np.zeros(3)}
    assert "optimizer/exp_avg/nothing" not in trainer.state_shapes(wrong)


def test_threads_stay_within_a_containers_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        monkeypatch.setattr("kconv.training._torch.available_cpus", lambda: 1)
        TorchTrainer(SPEC, SGD, Ranks())
        assert torch.get_num_threads() == 1
        ranks = Ranks()
        ranks.threads = 3
        TorchTrainer(SPEC, SGD, ranks)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_precision_and_recomputation() -> None:
    """What is stored may be bfloat16, or computed anew; weights and losses stay float32."""
    plain = TorchTrainer(SPEC, SGD, Ranks())
    start = {name: value.clone() for name, value in plain.model.state_dict().items()}
    expected = None
    for options in ({}, {"recompute": True}, {"precision": "bfloat16"}):
        trainer = TorchTrainer(SPEC, dataclasses.replace(SGD, **options), Ranks())
        trainer.model.load_state_dict(start)
        (images, targets), _ = batches()
        loss, _ = trainer.train_step(images, targets, 0.1, scale=1.0, update=True, seed=7)
        changes = torch.cat(
            [(p.detach() - start[n]).flatten() for n, p in trainer.parameters.items()]
        )
        assert changes.dtype is torch.float32
        assert trainer.predict(images).dtype == np.float32
        if expected is None:
            expected = loss, changes
        error = (changes - expected[1]).norm() / expected[1].norm()
        tolerance = 0.2 if options.get("precision") else 1e-4
        assert error < tolerance
        assert (error > 1e-4) == ("precision" in options)
        assert abs(loss - expected[0]) < tolerance * expected[0]
    with pytest.raises(ValueError, match="recompute=True needs fused layers"):
        Config(framework="torch", sync_bn=True, recompute=True)
