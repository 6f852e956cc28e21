"""How a kernel becomes a PyTorch operator: registration, differentiation, batching, dispatch.

Every kernel of this package is *multilinear* in its tensors (a convolution is linear in its input
and in its weight), so one class serves all: the derivative by one tensor is another such kernel of
the others, forward mode is the sum over the tensors, and gradients of gradients close the circle.

In eager mode on plain CPU tensors an operator goes straight to the kernel, through one
``autograd.Function`` where something is to be differentiated. Everywhere else (``torch.compile``,
``export``, ``make_fx``, dispatch modes, tracing, profiling, autocast, PyTorch's own tensor
subclasses) it goes through ``torch.ops.kconv``, which those can see, and pays PyTorch's dispatcher
some microseconds more. Tensors that the kernels know nothing of (other devices and layouts, other
people's subclasses) go to PyTorch's own operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from kconv.torch._private import (
    SingleLevelFunction,
    below_autograd,
    dispatch_keys,
    enable_single_level_autograd_function,
    len_dispatch_stack,
    peek_interpreter_stack,
    profiler_enabled,
    set_fwd_grad_enabled,
    tracing_state,
)

__all__ = ["KernelOp"]

_LIBRARY = torch.library.Library("kconv", "DEF")
_PLAIN = frozenset({Tensor, Parameter})
# PyTorch's subclasses that know any operator: FakeTensor, FunctionalTensor, DTensor and the like.
_KNOWN = "torch._subclasses", "torch.distributed"


def _ordinary_keys() -> frozenset[int]:
    """The dispatch keys of a dense CPU tensor, made outside inference mode and inside it.

    Any other key (of a layout, a bit for "negative" or "all zero", a batched tensor) stands for
    something that the memory alone does not tell.
    """
    outside = torch.empty(0)
    with torch.inference_mode():
        made = outside, torch.empty(0)
    return frozenset(dispatch_keys(tensor).raw_repr() for tensor in made)


_ORDINARY = _ordinary_keys()
_NATIVE = frozenset({torch.bfloat16, torch.float32, torch.float64})

Derivative = Callable[..., Tensor]
"""``(grad, *other_tensors, shape, *geometry)`` to the gradient by a tensor of that shape."""


class KernelOp:
    """A multilinear kernel as ``torch.ops.kconv.<name>`` and as a fast call in eager mode.

    Args:
        schema: name and signature in PyTorch's schema language: the tensors, an optional bias, then
            the geometry.
        kernel: computes the result from CPU tensors of bfloat16, float32 or float64.
        fake: gives an empty result of the right shape and memory order, and checks the shapes.
        images: for each tensor the kernel is linear in, whether it is an image (N, C, H, W) or a
            weight (C, ...); a bias is not counted.
        makes_image: whether the result is an image (or a weight).
        autocast: whether autocast lowers the operator's precision.
        native: the same of PyTorch's own operators, for tensors that the kernel does not know.
    """

    derivatives: tuple[Derivative, ...]
    """By each tensor; set once the operators they call exist."""

    def __init__(
        self,
        schema: str,
        kernel: Callable[..., Tensor],
        fake: Callable[..., Tensor],
        *,
        images: tuple[bool, ...],
        makes_image: bool = True,
        autocast: bool = False,
        native: Callable[..., Tensor] | None = None,
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.kernel = kernel
        self.native = native
        self.images = images
        self.makes_image = makes_image
        # A kernel keeps its input's memory order, so compilers must not choose another one for it.
        tag = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, tag))
        self.overload = getattr(torch.ops.kconv, self.name).default
        arguments = self.overload._schema.arguments
        self._defaults = tuple(argument.default_value for argument in arguments)
        self.has_bias = any(argument.name == "bias" for argument in arguments)
        self._leading = len(images) + self.has_bias
        _LIBRARY.impl(self.name, self._compute_with_defaults, "CPU")
        _LIBRARY.impl(self.name, self._autograd, "Autograd")
        self._autocasts = autocast
        if autocast:
            _LIBRARY.impl(self.name, self._autocast, "AutocastCPU")
        qualified = f"kconv::{self.name}"
        torch.library.register_fake(qualified, fake, lib=_LIBRARY)
        torch.library.register_vmap(qualified, self.vmap, lib=_LIBRARY)

    def __call__(self, *args: Any) -> Tensor:
        """Applies the operator, all its arguments given, by the fastest way that all can follow."""
        tensors = args[: self._leading]
        if is_compiling() or profiler_enabled() or not _is_plain(tensors):
            if self.native is not None and not all(map(_is_known, tensors)):
                return self.native(*args)
            return self.overload(*args)
        if self._autocasts and is_autocast_enabled("cpu"):
            return self._autocast(*args)
        if forward_ad._current_level >= 0:
            return _apply(self, args[len(tensors) :], *tensors)
        if is_grad_enabled() and _requires_grad(tensors):
            return _apply_in_eager_mode(self, args[len(tensors) :], *tensors)
        return self._compute(*args)

    def _compute(self, *args: Any) -> Tensor:
        """Runs the kernel, which checks the dtypes; float16 is computed through float32."""
        if args[0].dtype in _NATIVE:
            return self.kernel(*args)
        tensors = args[: self._leading]
        if {t.dtype for t in tensors if t is not None} != {torch.float16}:
            raise TypeError(
                f"{self.name}: all tensors must have one floating dtype of 16 to 64 bits, "
                f"got {', '.join(str(t.dtype) for t in tensors if t is not None)}"
            )
        wide = (t if t is None else t.float() for t in tensors)
        return self.kernel(*wide, *args[len(tensors) :]).to(args[0].dtype)

    def _compute_with_defaults(self, *args: Any) -> Tensor:
        """The dispatcher's kernel; it leaves out arguments that have their defaults."""
        return self._compute(*args, *self._defaults[len(args) :])

    def _autograd(self, *args: Any) -> Tensor:
        """The dispatcher's autograd kernel."""
        args += self._defaults[len(args) :]
        tensors = args[: self._leading]
        recording = is_grad_enabled() and _requires_grad(tensors)
        if not (recording or forward_ad._current_level >= 0):
            return self._below_autograd(*args)
        with enable_single_level_autograd_function():
            return _apply(self, args[len(tensors) :], *tensors)

    def _below_autograd(self, *args: Any) -> Tensor:
        tensors = args[: self._leading]
        if _is_plain(tensors):
            return self._compute(*args)
        if any(map(_is_distributed, tensors)):
            import kconv.torch._sharding  # noqa: F401  registers, the first time
        with below_autograd():
            return self.overload(*args)

    def _with_grad_below(self, *args: Any) -> Tensor:
        """For torch.func, whose transforms may differentiate on a level below this one."""
        if peek_interpreter_stack() is None:
            return self._below_autograd(*args)
        with torch.enable_grad(), set_fwd_grad_enabled(True):
            return self._below_autograd(*args)

    def _autocast(self, *args: Any) -> Tensor:
        """The dispatcher's autocast kernel: the dtype that ``conv2d`` would have there."""
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return self(*(_to_autocast(a, dtype) for a in args))

    def fold_channels(self, size: int, tensors: Sequence[Any], geometry: Sequence[Any]) -> Tensor:
        """Applies the operator where the channels hold ``size`` independent sets of channels."""
        return self(*tensors, *geometry)

    def fold_bias(self, bias: Tensor, *geometry: Any) -> Tensor:
        """Puts the values of a bias, (C,), in the order of the output's channels."""
        return bias

    def unfold_bias(self, bias: Tensor, *geometry: Any) -> Tensor:
        """Undoes :meth:`fold_bias`."""
        return bias

    def vmap(self, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
        """The batching rule: the mapped axis joins the batch, or the channels of mapped weights."""
        args += self._defaults[len(args) :]
        size: int = info.batch_size
        tensors, geometry = args[: self._leading], args[self._leading :]
        dims = (*in_dims, None)[: self._leading]  # a bias that was left out has none
        images = (*self.images, False)[: self._leading]
        same_weights = all(image or dim is None for image, dim in zip(images, dims, strict=True))
        if self.makes_image and same_weights:
            folded = [
                _fold(tensor, dim, size, 0) if image else tensor
                for tensor, dim, image in zip(tensors, dims, images, strict=True)
            ]
            return _unfold(self(*folded, *geometry), size, 0)
        folded = [
            tensor if tensor is None else _fold(tensor, dim, size, int(image))
            for tensor, dim, image in zip(tensors, dims, images, strict=True)
        ]
        result = self.fold_channels(size, folded, geometry)
        return _unfold(result, size, int(self.makes_image))


def _is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are ordinary CPU tensors and nobody is listening to the dispatcher."""
    for tensor in tensors:
        if tensor is None:
            continue
        kind = type(tensor)
        # All the keys of a parameter take twice as long as what can be odd about one.
        if kind is Parameter:
            if not tensor.is_cpu or tensor.is_neg():
                return False
        elif kind is not Tensor or dispatch_keys(tensor).raw_repr() not in _ORDINARY:
            return False
    return not (len_dispatch_stack() or peek_interpreter_stack() is not None or tracing_state())


def _is_known(tensor: Tensor | None) -> bool:
    """Whether the operators know what to do with a tensor."""
    return tensor is None or (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and (type(tensor) in _PLAIN or type(tensor).__module__.startswith(_KNOWN))
    )


def _is_distributed(tensor: Tensor | None) -> bool:
    return type(tensor).__module__.startswith("torch.distributed")


def _requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    for tensor in tensors:  # noqa: SIM110  any() takes twice as long
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _fold(tensor: Tensor, dim: int | None, size: int, axis: int) -> Tensor:
    """Merges the mapped dimension (or ``size`` copies) into ``axis``, as its outer part."""
    moved = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return moved.movedim(0, axis).flatten(axis, axis + 1)


def _unfold(tensor: Tensor, size: int, axis: int) -> tuple[Tensor, int]:
    """Splits ``axis`` again; returns the tensor and its mapped dimension."""
    return tensor.unflatten(axis, (size, tensor.shape[axis] // size)), axis


def _to_autocast(arg: Any, dtype: torch.dtype) -> Any:
    eligible = isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
    return arg.to(dtype) if eligible else arg


class _Backward(SingleLevelFunction):
    """Differentiates a :class:`KernelOp`; applied to it, its geometry, and its tensors.

    The dispatcher has taken torch.func's transforms down to one level by the time it is called, so
    it is of the class that PyTorch itself uses there (``Function.apply`` would start over).
    """

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        op, geometry, shapes = ctx.how
        _, _, *needed = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(needed)
        if grad is not None:
            saved = ctx.saved_tensors
            for i, derivative in enumerate(op.derivatives):
                if needed[i]:
                    others = saved[:i] + saved[i + 1 :]
                    grads[i] = derivative(grad, *others, shapes[i], *geometry)
            if op.has_bias and needed[len(shapes)]:
                grads[len(shapes)] = op.unfold_bias(grad.sum((0, 2, 3)), *geometry)
        return None, None, *grads


def _remember(ctx: Any, op: KernelOp, geometry: tuple[Any, ...], tensors: Sequence[Any]) -> None:
    """Keeps what the backward pass needs."""
    if len(op.images) == 2:  # each is kept for the derivative by the other one only
        first, second = tensors[0], tensors[1]
        ctx.how = op, geometry, (first.shape, second.shape)
        needed = ctx.needs_input_grad
        ctx.save_for_backward(first if needed[3] else None, second if needed[2] else None)
    else:
        ctx.how = op, geometry, (tensors[0].shape,)


class _ApplyInEagerMode(_Backward):
    """Without ``setup_context``, which takes PyTorch several times as long as a small kernel."""

    @staticmethod
    def forward(ctx: Any, op: KernelOp, geometry: tuple[Any, ...], *tensors: Any) -> Tensor:
        _remember(ctx, op, geometry, tensors)
        return op._compute(*tensors, *geometry)


class _Apply(_Backward):
    """Also for torch.func's transforms, which want a ``setup_context``, and for forward mode."""

    @staticmethod
    def forward(op: KernelOp, geometry: tuple[Any, ...], *tensors: Any) -> Tensor:
        return op._with_grad_below(*tensors, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        op, geometry, *tensors = inputs
        _remember(ctx, op, geometry, tensors)
        ctx.set_materialize_grads(False)
        ctx.output_shape = output.shape
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*tensors[: len(op.images)])

    @staticmethod
    def jvp(ctx: Any, _op: None, _geometry: None, *tangents: Any) -> Tensor | None:
        op, geometry, _ = ctx.how
        tensors = ctx.saved_tensors
        no_bias = (None,) * op.has_bias
        total = None
        for i, tangent in enumerate(tangents[: len(op.images)]):
            if tangent is not None:
                term = op(*tensors[:i], tangent, *tensors[i + 1 :], *no_bias, *geometry)
                total = term if total is None else total + term
        if op.has_bias and tangents[len(op.images)] is not None:
            term = op.fold_bias(tangents[len(op.images)], *geometry)
            term = term[:, None, None].expand(ctx.output_shape)
            total = term if total is None else total + term
        return total


_apply: Callable[..., Tensor] = _Apply.apply  # type: ignore[attr-defined]
_apply_in_eager_mode: Callable[..., Tensor] = _ApplyInEagerMode.apply  # type: ignore[attr-defined]
