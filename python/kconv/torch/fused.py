"""Fused segments of a network as one PyTorch operation: see :mod:`kconv.models.fusion`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kconv._kconv import FusedProgram
from kconv.models.fusion import Program, Segment, UnfitError
from kconv.models.graph import BatchNorm, ChannelScale, Conv, DepthwiseConv, Dropout, PReLU
from kconv.torch._layerwise import layerwise
from kconv.torch._parameters import Borrowed
from kconv.torch._private import (
    DeviceContext,
    dispatch_mode_stack,
    flatten_dense_tensors,
    from_dlpack,
    function_mode_stack,
    is_legacy_batchedtensor,
    is_tracing,
    len_function_stack,
    peek_interpreter_stack,
    profiler_enabled,
    to_dlpack,
)
from kconv.torch.ops import memory_format_of

__all__ = ["FusedSegment", "fused", "is_eager", "is_watched", "trains"]


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
    update: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs a program.

    Args:
        program: of a segment.
        layout: "NCHW" or "NHWC".
        x: (N, C, H, W) or (N, H, W, C), float32, float64 or bfloat16, on the CPU.
        parameters: all of them in a row; of bfloat16 images, as all else, in float32.
        masks: (masks, N) factors of images, or None for none.
        statistics: (2, channels of all norms) means and variances to normalise with, or None for
            the batch's own.
        update: is told the statistics that were used. (A checkpoint computes a forward anew until
            what it had saved is there again, so what follows after may not be.)

    Returns:
        The output, like ``x``, and the statistics that were used, variances biased.
    """
    need_grad = _need_grad([x, parameters])
    if not need_grad and statistics is not None and masks is None:
        return _infer(program, layout, x, [parameters], [statistics]), statistics
    program = program.with_input_grad(need_grad and x.requires_grad)
    return _Fused.apply(x, parameters, masks, statistics, program, layout, update)


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
    """Runs a chain of modules, which keep parameters and state, as one operation.

    Args:
        segment: the layers, lifted from the modules.
        modules: by the names of the layers.
    """

    def __init__(self, segment: Segment, modules: Mapping[str, Any]) -> None:
        self.segment = segment
        self._norms = [modules[x.name] for x in segment.layers if isinstance(x, BatchNorm)]
        self._drops = [modules[x.name] for x in segment.layers if isinstance(x, Dropout)]
        self._parameters = [(layer, _WEIGHTS[name]) for layer, name in segment.parameters]
        self._owners = [_holder(modules[layer], name) for layer, name in self._parameters]
        norms = {layer.name for layer in segment.layers if isinstance(layer, BatchNorm)}
        self._kernels = sum(layer not in norms for layer, _ in self._parameters)
        slopes = {x.name: x.channels for x in segment.layers if isinstance(x, PReLU)}
        places = ((i, slopes.get(layer, 0)) for i, (layer, _) in enumerate(self._parameters))
        self._slopes = [(i, channels) for i, channels in places if channels]
        self._passes_input = _passes_input(segment)

    def __call__(self, x: Tensor) -> Tensor | None:
        """The segment's output, or None where its modules must run one by one.

        So for other tensors than the fused operation knows (see :func:`is_eager`), where the
        modules' own computation ends in an error or is a matter of PyTorch's rules (no values, one
        value a channel in training, tensors of different sizes), and where some batch norms train
        and others do not.

        In bfloat16, and under autocast to it, what the operation stores between its layers is
        bfloat16 and what it computes with float32: all of parameters, statistics and sums.

        Args:
            x: (N, C, H, W).

        Returns:
            (N, C, H, W) in the memory format of ``x``, or (N, C) where the segment ends in a mean
            over the pixels.
        """
        if not is_eager(x) or x.shape[1] != self.segment.input_channels or not x.numel():
            return None
        norms = self._norms
        training = trains(norms[0]) if norms else False
        if not all(trains(norm) is training for norm in norms):
            return None
        # Straight from where modules keep them: a fifth of the time of `getattr`.
        parameters = [owner.__dict__[kind][name] for owner, kind, name in self._owners]
        statistics = _running_statistics(norms)
        narrow = x.dtype is torch.bfloat16 or (x.dtype is torch.float32 and _autocasts())
        if not narrow:
            fits = _plain([*parameters, *statistics], {x.dtype})
        else:
            fits = _plain(parameters[: self._kernels], _NARROW if _autocasts() else {x.dtype})
            fits = fits and _plain([*parameters[self._kernels :], *statistics], _NARROW)
        if not fits:
            return None
        try:
            program = self.segment.program((x.shape[2], x.shape[3]), "OI")
        except UnfitError:
            return None
        if training and len(x) * min(program.norm_pixels) == 1:
            return None
        dtype, x = x.dtype, x.to(torch.bfloat16) if narrow else x
        masks = _masks(self._drops, x)
        for i, channels in self._slopes:  # one may stand for all channels
            parameters[i] = parameters[i].expand(channels).contiguous()
        if not profiler_enabled():
            y = self._run(program, x, parameters, masks, statistics, training)
        else:
            with torch.autograd.profiler.record_function(f"kconv::fused {self.segment.name}"):
                y = self._run(program, x, parameters, masks, statistics, training)
        # As PyTorch promotes what a layer adds to an image of float32.
        return y.to(dtype) if self._passes_input else y

    def _run(
        self,
        program: Program,
        x: Tensor,
        parameters: list[Tensor],
        masks: Tensor | None,
        statistics: list[Tensor],
        training: bool,
    ) -> Tensor:
        norms, last = self._norms, memory_format_of(x) is torch.channels_last
        layout, x = ("NHWC", x.permute(0, 2, 3, 1)) if last else ("NCHW", x)
        if not training and masks is None and not _need_grad([x, *parameters]):
            if torch.bfloat16 in map(_DTYPE, (*parameters, *statistics)):
                parameters, statistics = [_row(parameters, x)], [_row(statistics, x)]
            y = _infer(program, layout, x, parameters, statistics)
        else:
            flat = _row(parameters, x)
            rows = None if training else _row(statistics, x).view(2, -1)
            update = partial(_update_statistics, norms, program, len(x)) if training else None
            y, _ = fused(program, layout, x, flat, masks, rows, update)
        y = y.permute(0, 3, 1, 2) if last else y
        return y if self.segment.keeps_pixels else y.flatten(1)


def trains(norm: Any) -> bool:
    """Whether a batch norm uses the batch's own statistics; frozen ones never do."""
    return bool(norm.training) and isinstance(norm, nn.BatchNorm2d | Borrowed)


def _holder(module: Any, name: str) -> tuple[Any, str, str]:
    """A module, where it has a tensor (frozen norms have buffers), and the tensor's name."""
    if isinstance(module, Borrowed):
        module, name = module.places[name]
    return module, "_parameters" if name in module._parameters else "_buffers", name


_WEIGHTS = {
    **dict.fromkeys(("kernel", "gamma", "alpha"), "weight"),
    **dict.fromkeys(("beta", "bias"), "bias"),
    "scale": "gamma",
}
"""PyTorch's names of parameters by those of layers."""
_DTYPE, _IS_CPU, _REQUIRES_GRAD = map(attrgetter, ("dtype", "is_cpu", "requires_grad"))


_NARROW = {torch.float32, torch.bfloat16}
"""What parameters may be where images are bfloat16."""


def _plain(tensors: list[Any], dtypes: set[torch.dtype]) -> bool:
    """Whether these are tensors, of no subclass, on the CPU and of one of these dtypes."""
    return (
        {Tensor, nn.Parameter}.issuperset(map(type, tensors))
        and dtypes.issuperset(map(_DTYPE, tensors))
        and all(map(_IS_CPU, tensors))
    )


def _wide(x: Tensor) -> torch.dtype:
    """What values of a tensor's dtype are computed with."""
    return torch.float32 if x.dtype is torch.bfloat16 else x.dtype


def _row(tensors: list[Tensor], x: Tensor) -> Tensor:
    """All values of tensors in a row, of the dtype that images like ``x`` are computed with."""
    if not tensors:
        return x.new_empty(0, dtype=_wide(x))
    if len(set(map(_DTYPE, tensors))) > 1:
        tensors = [tensor.to(_wide(x)) for tensor in tensors]
    return flatten_dense_tensors(tensors).to(_wide(x))


def _passes_input(segment: Segment) -> bool:
    """Whether the dtype of a segment's input reaches its output, which no convolution hides.

    Nor do layers whose own parameters, of float32 under autocast, promote all that they meet.
    """
    passed = {segment.input}
    for layer in segment.layers:
        if isinstance(layer, Conv | DepthwiseConv):
            continue
        if isinstance(layer, ChannelScale | PReLU) or passed.intersection(layer.inputs):
            passed.add(layer.name)
    return segment.name in passed


def _need_grad(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors))


def is_eager(x: Tensor) -> bool:
    """Whether fused operations can stand for what PyTorch computes with a tensor now.

    So for images of float32, float64 or bfloat16 on the CPU, unless somebody watches the operators
    between (compilers, tracers, function transforms, modes, autocast to other dtypes than bfloat16,
    forward-mode differentiation).
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and x.layout is torch.strided
        and x.dim() == 4
        and not x.is_neg()
        and not is_legacy_batchedtensor(x)
        and not is_watched()
    )


def is_watched() -> bool:
    """Whether somebody watches the operators of this thread."""
    return bool(
        torch.compiler.is_compiling()
        or is_tracing()
        or (_autocasts() and not _knows_autocast())
        or peek_interpreter_stack()
        or dispatch_mode_stack()
        or torch.autograd.forward_ad._current_level >= 0
        or (len_function_stack() and _function_modes())
    )


def _autocasts() -> bool:
    return torch.is_autocast_enabled("cpu")


def _knows_autocast() -> bool:
    """Whether fused operations have autocast's dtype; says once what happens if not."""
    dtype = torch.get_autocast_dtype("cpu")
    if dtype is torch.bfloat16:
        return True
    _say_that_layers_run(dtype)
    return False


@cache
def _say_that_layers_run(dtype: torch.dtype) -> None:
    warnings.warn(
        f"fused networks run layer by layer under torch.autocast to {dtype}: fused operations know "
        f"torch.bfloat16",
        stacklevel=2,
    )


def _function_modes() -> bool:
    """Whether there is a mode that functions ask, beside that of a default device."""
    modes = function_mode_stack()
    return any(type(mode) is not DeviceContext for mode in modes)


def _running_statistics(norms: list[Any]) -> list[Any]:
    """(channels) the means of all norms, then their variances; None where there are none."""
    return [norm._buffers.get(name) for name in ("running_mean", "running_var") for norm in norms]


def _masks(drops: list[Any], x: Tensor) -> Tensor | None:
    """(drop-connect layers, N) factors of images."""
    if not any(drop.training for drop in drops):
        return None
    ones = x.new_ones(len(x), 1, 1, 1, dtype=_wide(x))
    return torch.stack([drop(ones).flatten() for drop in drops])


@torch.no_grad()
def _update_statistics(norms: list[Any], program: Program, images: int, used: Tensor) -> None:
    """The moving statistics, as nn.BatchNorm2d updates them."""
    rows = [row.split([norm.channels for norm in program.norms]) for row in used]
    counts = [images * pixels for pixels in program.norm_pixels]
    each = list(zip(norms, counts, *rows, strict=True))
    means = {id(norm._buffers["running_mean"]) for norm in norms}
    variances = {id(norm._buffers["running_var"]) for norm in norms}
    if len(means) == len(variances) == len(norms):
        _move_statistics(each)
    else:  # shared ones move once for each norm, one after the other
        for one in each:
            _move_statistics([one])


def _move_statistics(each: Sequence[tuple[Any, int, Tensor, Tensor]]) -> None:
    """For batch norms, the numbers of values, and their means and biased variances."""
    norms, counts, means, variances = zip(*each, strict=True)
    tracked = [norm.num_batches_tracked for norm in norms]
    if counted := [count for count in tracked if count is not None]:
        torch._foreach_add_(counted, 1)
    weights = [
        norm.momentum if norm.momentum is not None else 0.0 if count is None else 1 / float(count)
        for norm, count in zip(norms, tracked, strict=True)
    ]
    unbiased = [w * n / (n - 1) for w, n in zip(weights, counts, strict=True)]
    for name, values, factors in (
        ("running_mean", means, weights),
        ("running_var", variances, unbiased),
    ):
        moving = [norm._buffers[name] for norm in norms]
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
        update: Callable[[Tensor], None] | None,
    ) -> tuple[Tensor, Tensor]:
        given = None if statistics is None else _array(statistics)
        drop = None if masks is None else _array(masks)
        y, used, workspace = _compiled(program.integers).forward(
            _array(x), _array(parameters), drop, given, layout
        )
        used = _tensor(used)
        if update is not None:
            update(used)
        ctx.save_for_backward(parameters, masks, used, _tensor(workspace))
        # The input is read again only for gradients of gradients, so it may change until then.
        ctx.x, ctx.version = x, None if x.is_inference() else x._version
        ctx.program, ctx.layout, ctx.frozen = program, layout, given is not None
        ctx.mark_non_differentiable(used)
        return _tensor(y), used

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> Sequence[Tensor | None]:
        parameters, masks, statistics, workspace = ctx.saved_tensors
        if torch.is_grad_enabled():  # these gradients are to be differentiated again
            x = ctx.x
            if x._version != ctx.version:
                raise RuntimeError(
                    f"the input of a fused operation, of shape {tuple(x.shape)}, has been changed "
                    f"in place, and gradients of its gradients need it; change a copy of it, or "
                    f"use fused=False"
                )
            given = statistics if ctx.frozen else None
            wanted = [t for t in (x, parameters) if t.requires_grad]
            with torch.autocast("cpu", enabled=False):
                wide = x.to(parameters.dtype)
                y = layerwise(ctx.program, ctx.layout, wide, parameters, masks, given).to(x.dtype)
            grads = iter(torch.autograd.grad(y, wanted, grad_output, create_graph=True))
            both = [next(grads) if t.requires_grad else None for t in (x, parameters)]
            return *both, None, None, None, None, None
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
        return grad_x if input_grad else None, grad_parameters, None, None, None, None, None


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

    An operator of its own, so that PyTorch can batch it.
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


def _array(x: Tensor) -> Any:
    """What kernels read: of bfloat16, which NumPy does not know, a DLPack capsule."""
    return to_dlpack(x.detach()) if x.dtype is torch.bfloat16 else x.detach().numpy()


def _tensor(x: Any) -> Tensor:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else from_dlpack(x)
