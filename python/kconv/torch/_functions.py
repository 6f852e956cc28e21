"""Functions of tensors as modules."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Call", "add", "concatenate", "fold_halves"]


class Call(nn.Module):
    """A function as a module.

    Args:
        function: of the input tensors.
        **options: keyword arguments to it.
    """

    def __init__(self, function: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        self.function = function
        self.options = options

    def forward(self, *inputs: Tensor) -> Tensor:
        """Calls the function."""
        return self.function(*inputs, **self.options)

    def extra_repr(self) -> str:
        """The function and its arguments."""
        options = (f"{name}={value}" for name, value in self.options.items())
        return ", ".join([self.function.__name__, *options])


def add(*inputs: Tensor) -> Tensor:
    """The sum of tensors."""
    return reduce(operator.add, inputs)


def concatenate(*inputs: Tensor) -> Tensor:
    """(N, C1, H, W), (N, C2, H, W), ... to (N, C1 + C2 + ..., H, W)."""
    return torch.cat(inputs, dim=1)


def fold_halves(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C / 2, H, W): the first half of the channels plus the second."""
    half = x.shape[1] // 2
    return x[:, :half] + x[:, half : 2 * half]
