"""Batch norms over the images of all processes; PyTorch's own are for GPUs only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["synchronize_norms"]


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        total = grad_outputs[0].clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose mean and variance in training are those of all processes' images."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        if not self.training:
            return super().forward(x)
        axes = (0, *range(2, x.ndim))
        count = x.new_tensor([x.numel() / x.shape[1]])
        dist.all_reduce(count)
        # Twice, as the sum of squares alone would lose the digits of a small variance.
        mean = _Sum.apply(x.sum(axes)) / count
        centered = x - _like(mean, x)
        variance = _Sum.apply(centered.square().sum(axes)) / count
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                share = self.momentum if self.momentum is not None else 0.1
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), share)
        y = centered * _like((variance + self.eps).rsqrt(), x)
        if self.weight is not None:
            y = y * _like(self.weight, x)
        if self.bias is not None:
            y = y + _like(self.bias, x)
        return y


def _like(values: Tensor, x: Tensor) -> Tensor:
    """(C,), for each image and pixel."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


def synchronize_norms(model: nn.Module) -> None:
    """Make all batch norms of a model synchronised ones, in place; the state stays theirs."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d
