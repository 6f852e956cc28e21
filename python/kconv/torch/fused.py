"""Fused segments of a network as one PyTorch operation: see :mod:`kconv.models.fusion`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _to_dlpack as to_dlpack
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.hooks import RemovableHandle

from kconv._kconv import FusedProgram
from kconv.models.fusion import Program, Segment
from kconv.torch.layers import DropConnect

__all__ = ["FusedSegment"]


@cache
def _compiled(integers: tuple[int, ...]) -> Any:
    return FusedProgram(integers)


def fused(
    program: Program,
    layout: str,
    x: Tensor,
    parameters: Tensor,
    masks: Tensor | None,
    statistics: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Runs a program.

    Args:
        program: of a segment.
        layout: "NCHW" or "NHWC".
        x: (N, C, H, W) or (N, H, W, C), float32 or float64, on the CPU.
        parameters: all of them in a row.
        masks: (masks, N) factors of images, or None for none.
        statistics: (2, channels of all norms) means and variances to normalise with, or None for
            the batch's own.

    Returns:
        The output, like ``x``, and the statistics that were used, variances biased.
    """
    need_grad = _need_grad([x, parameters])
    if not need_grad and statistics is not None and masks is None:
        return _infer(program, layout, x, [parameters], [statistics]), statistics
    program = program.with_input_grad(need_grad and x.requires_grad)
    return _Fused.apply(x, parameters, masks, statistics, program, layout)


def _infer(
    program: Program, layout: str, x: Tensor, parameters: list[Tensor], statistics: list[Tensor]
) -> Tensor:
    """The output of a program without gradients, whose parameters and statistics come in pieces.

    One after the other they are what :func:`fused` takes. (Putting the 291 of a kEffNet-B0 into a
    row takes 0.35 to 0.6 ms, of 5 ms for an image of 224 x 224; pointing at them 0.06 to 0.12.)
    """
    pieces = (list(map(to_dlpack, tensors)) for tensors in (parameters, statistics))
    return _tensor(_compiled(program.integers).infer(_array(x), *pieces, layout))


class FusedSegment:
    """Runs a chain of a network's modules, which keep parameters and state, as one operation.

    Args:
        segment: the layers.
        modules: the network's modules; a padding may be part of the convolution that follows.
    """

    def __init__(self, segment: Segment, modules: Mapping[str, nn.Module]) -> None:
        self.segment = segment
        names = [layer.name for layer in segment.layers if layer.name in modules]
        self._names = names
        self._kinds = [type(modules[name]) for name in names]
        self._drops = [name for name in names if isinstance(modules[name], DropConnect)]
        program = segment.program((64, 64), "OI")
        weight = {
            "kernel": "weight",
            "depthwise_kernel": "weight",
            "gamma": "weight",
            "beta": "bias",
        }
        self._parameters = [(layer, weight.get(name, name)) for layer, name in program.parameters]
        self._norms = [norm.name for norm in program.norms]
        # What the operation assumes; `compress` puts batch norms of another epsilon into a block.
        self._epsilons = [modules[name].eps for name in self._norms]
        # The modules without hooks, and how many hooks there had been anywhere.
        self._hookless: tuple[list[nn.Module], int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hookless": None}  # other processes count for themselves

    def __call__(self, modules: Mapping[str, nn.Module], x: Tensor) -> Tensor | None:
        """The segment's output, or None where its modules must run one by one.

        So where somebody watches or changes what happens between them (hooks, other modules in
        their places, compilers, tracers and function transforms), for other dtypes and devices
        than the CPU's float32 and float64, and where some batch norms train and others do not.

        Args:
            modules: the network's modules.
            x: (N, C, H, W).

        Returns:
            (N, C, H, W), or (N, C) where the segment ends in a mean over the pixels.
        """
        if not (_eager(x) and self._untouched(modules)):
            return None
        norms: list[Any] = [modules[name] for name in self._norms]
        # Straight from where modules keep them: a fifth of the time of `getattr`.
        parameters: list[Any] = [
            modules[layer]._parameters[name] for layer, name in self._parameters
        ]
        training = norms[0].training if norms else False
        if not all(norm.training is training and norm.track_running_stats for norm in norms):
            return None
        statistics = [] if training else _running_statistics(norms)
        if not _plain([*parameters, *statistics], x.dtype):
            return None
        program = self.segment.program((x.shape[2], x.shape[3]), "OI")
        masks = _masks([modules[name] for name in self._drops], x)
        if not training and masks is None and not _need_grad([x, *parameters]):
            y = _infer(program, "NCHW", x, parameters, statistics)
        else:
            flat = torch._utils._flatten_dense_tensors(parameters)
            rows = None if training else torch.cat([x.new_empty(0), *statistics]).view(2, -1)
            y, used = fused(program, "NCHW", x, flat, masks, rows)
            if training:
                _update_statistics(norms, used, program, len(x))
        return y if self.segment.keeps_pixels else y.flatten(1)

    def _untouched(self, modules: Mapping[str, nn.Module]) -> bool:
        # Without a loop of Python's over hundreds of modules, which takes as long as some layers.
        own = list(map(modules.__getitem__, self._names))
        if list(map(type, own)) != self._kinds:
            return False
        if list(map(_EPS, map(modules.__getitem__, self._norms))) != self._epsilons:
            return False
        # Each new hook anywhere takes the next number, so these modules are looked at again only
        # then: that takes 0.05 to 0.25 ms.
        if self._hookless != (own, RemovableHandle.next_id):
            if any(any(map(hooks, own)) for hooks in _HOOKS):
                return False
            self._hookless = (own, RemovableHandle.next_id)
        return not _has_any_global_hook()


_EPS, _DTYPE, _IS_CPU, _REQUIRES_GRAD = map(attrgetter, ("eps", "dtype", "is_cpu", "requires_grad"))
_HOOKS = [
    attrgetter(hooks)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
]


def _plain(tensors: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether tensors are no subclass's, on the CPU and of a dtype."""
    return (
        {Tensor, nn.Parameter}.issuperset(map(type, tensors))
        and {dtype}.issuperset(map(_DTYPE, tensors))
        and all(map(_IS_CPU, tensors))
    )


def _need_grad(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors))


def _eager(x: Tensor) -> bool:
    """Whether a tensor's own values are computed with, now, by PyTorch's eager mode."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.dim() == 4
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._functorch.peek_interpreter_stack()
        and not _get_current_dispatch_mode_stack()
        and not torch.autograd.forward_ad._current_level >= 0
    )


def _running_statistics(norms: list[Any]) -> list[Tensor]:
    """(channels) the means of all norms, then their variances."""
    return [norm._buffers[name] for name in ("running_mean", "running_var") for norm in norms]


def _masks(drops: list[nn.Module], x: Tensor) -> Tensor | None:
    """(drop-connect layers, N) factors of images."""
    if not any(drop.training for drop in drops):
        return None
    ones = x.new_ones(len(x), 1, 1, 1)
    return torch.stack([drop(ones).flatten() for drop in drops])


@torch.no_grad()
def _update_statistics(norms: list[Any], used: Tensor, program: Program, images: int) -> None:
    """The moving statistics, as nn.BatchNorm2d updates them."""
    counts = [images * pixels for pixels in program.norm_pixels]
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    weights = [
        1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        for norm in norms
    ]
    unbiased = [w * n / max(n - 1, 1) for w, n in zip(weights, counts, strict=True)]
    rows = (row.split([norm.num_features for norm in norms]) for row in used)
    for name, values, factors in zip(
        ("running_mean", "running_var"), rows, (weights, unbiased), strict=True
    ):
        moving = [getattr(norm, name) for norm in norms]
        torch._foreach_mul_(moving, [1 - weight for weight in weights])
        torch._foreach_add_(moving, torch._foreach_mul(values, factors))


class _Fused(torch.autograd.Function):
    """(x, parameters, masks, statistics) to (output, statistics)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        parameters: Tensor,
        masks: Tensor | None,
        statistics: Tensor | None,
        program: Program,
        layout: str,
    ) -> tuple[Tensor, Tensor]:
        given = None if statistics is None else _array(statistics)
        drop = None if masks is None else _array(masks)
        y, used, workspace = _compiled(program.integers).forward(
            _array(x), _array(parameters), drop, given, layout
        )
        used = _tensor(used)
        ctx.save_for_backward(parameters, masks, used, _tensor(workspace))
        ctx.program, ctx.layout, ctx.frozen = program, layout, given is not None
        ctx.mark_non_differentiable(used)
        return _tensor(y), used

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> Sequence[Tensor | None]:
        parameters, masks, statistics, workspace = ctx.saved_tensors
        grad_parameters, grad_x = _backward(
            grad_output,
            parameters,
            masks,
            statistics,
            workspace,
            ctx.program.integers,
            ctx.frozen,
            ctx.layout,
        )
        input_grad = ctx.needs_input_grad[0]
        return grad_x if input_grad else None, grad_parameters, None, None, None, None


@torch.library.custom_op("kconv::fused_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    parameters: Tensor,
    masks: Tensor | None,
    statistics: Tensor,
    workspace: Tensor,
    program: Sequence[int],
    frozen: bool,
    layout: str,
) -> tuple[Tensor, Tensor]:
    """The gradients by parameters and input (empty where it is not wanted).

    An operator of its own, so that PyTorch can batch it, and says so where second derivatives are
    asked for, which a fused network does not have.
    """
    grad_x, grad_parameters = _compiled(tuple(program)).backward(
        _array(grad_output),
        _array(parameters),
        None if masks is None else _array(masks),
        _array(statistics),
        _array(workspace),
        frozen,
        layout,
    )
    x = grad_output.new_empty(0) if grad_x is None else _tensor(grad_x)
    return _tensor(grad_parameters), x


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    return x.detach().numpy()


def _tensor(x: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(x)
