"""The PyTorch side of ``kconv train``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

import kconv.torch
from kconv.datasets import Labels
from kconv.models import Spec


class RMSprop(torch.optim.Optimizer):
    """RMSprop as Keras has it: epsilon inside the root, where PyTorch's own has it outside.

    Args:
        params: The parameters.
        lr: Learning rate.
        rho: Decay of the mean of squared gradients.
        epsilon: Added to that mean.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 0.001,
        rho: float = 0.9,
        epsilon: float = 1e-7,
    ) -> None:
        super().__init__(params, {"lr": lr, "rho": rho, "epsilon": epsilon})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["mean_square"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean_square = self.state[parameter]["mean_square"]
                mean_square.lerp_(parameter.grad.square(), 1 - group["rho"])
                scale = (mean_square + group["epsilon"]).sqrt_()
                parameter.addcdiv_(parameter.grad, scale, value=-group["lr"])


class TorchTrainer:
    """A model of ``kconv.torch``; see :class:`kconv.training.Trainer`."""

    def __init__(self, spec: Spec, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = kconv.torch.build(spec)
        self.optimizer = RMSprop(self.model.parameters())

    def train_step(
        self, images: NDArray[np.float32], labels: Labels, learning_rate: float
    ) -> tuple[float, float]:
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.model.train()
        self.optimizer.zero_grad()
        logits = self.model(_nchw(images))
        truth = torch.from_numpy(labels)
        loss = functional.cross_entropy(logits, truth)
        loss.backward()
        self.optimizer.step()
        return loss.item(), (logits.argmax(1) == truth).float().mean().item()

    @torch.inference_mode()
    def predict(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self.model.eval()
        return functional.softmax(self.model(_nchw(images)), dim=1).numpy()

    @torch.no_grad()
    def recalibrate(self, batches: Iterable[NDArray[np.float32]]) -> None:
        norms: list[Any] = [
            module
            for module in self.model.modules()
            if isinstance(getattr(module, "running_mean", None), torch.Tensor)
        ]
        for norm in norms:
            norm.running_mean.zero_()
            norm.running_var.zero_()
        self.model.train()
        count = 0
        for images in batches:
            self.model(_nchw(images))
            count += 1
        # A moving average that started from zero lacks the share (1 - momentum)^count.
        for norm in norms:
            share = 1 - (1 - norm.momentum) ** count
            norm.running_mean /= share
            norm.running_var /= share

    def state(self) -> dict[str, NDArray[Any]]:
        arrays = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        arrays |= {f"optimizer/{name}": value for name, value in self._mean_squares().items()}
        arrays["random"] = torch.get_rng_state()
        return {name: value.numpy() for name, value in arrays.items()}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        self.model.load_state_dict(
            {name: tensors[f"model/{name}"] for name in self.model.state_dict()}
        )
        for name, mean_square in self._mean_squares().items():
            mean_square.copy_(tensors[f"optimizer/{name}"])
        torch.set_rng_state(tensors["random"])

    def _mean_squares(self) -> dict[str, torch.Tensor]:
        return {
            name: self.optimizer.state[parameter]["mean_square"]
            for name, parameter in self.model.named_parameters()
        }


def _nchw(images: NDArray[np.float32]) -> torch.Tensor:
    """(N, H, W, C) to (N, C, H, W), the same memory: what PyTorch calls channels_last."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)
