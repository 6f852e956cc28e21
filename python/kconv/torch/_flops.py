"""What PyTorch's FlopCounterMode counts for the operators: as much as for PyTorch's own."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from kconv.torch import ops as _ops  # noqa: F401  defines the operators

__all__: list[str] = []

_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def _register(counter: Any) -> None:
    """Registers a formula for each operator that multiplies, in PyTorch's own terms."""
    count: Callable[..., int] = counter.conv_flop_count

    def forward(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
        return count(x, weight, out_shape)

    def by_input(grad: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
        return count(grad, weight, out_shape, transposed=True)

    def by_weight(x: Shape, grad: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
        return count(*map(_swapped, (x, grad, out_shape)))

    ops = torch.ops.kconv
    for operator, formula in (
        (ops.pointwise_conv, forward),
        (ops.depthwise_conv, forward),
        (ops.pointwise_conv_grad_input, by_input),
        (ops.depthwise_conv_grad_input, by_input),
        (ops.pointwise_conv_grad_weight, by_weight),
        (ops.depthwise_conv_grad_weight, by_weight),
    ):
        counter.register_flop_formula(operator)(formula)


def _swapped(shape: Shape) -> list[int]:
    return [shape[1], shape[0], *shape[2:]]


class _Finder(importlib.abc.MetaPathFinder):
    """Registers the formulas once somebody imports the counter.

    To import it here would import Triton, which takes longer than all of kconv and aborts the
    process where TensorFlow has been imported first.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _Finder())
