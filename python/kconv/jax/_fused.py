"""Fused segments of a network as one JAX operation: see :mod:`kconv.models.fusion`."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kconv import _kconv
from kconv.jax import _kernels
from kconv.models.fusion import Program

__all__ = ["fused"]


def fused(
    program: Program,
    layout: str,
    x: jax.Array,
    parameters: jax.Array,
    masks: jax.Array | None,
    statistics: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Runs a program.

    Args:
        program: of a segment.
        layout: "NCHW" or "NHWC".
        x: (N, C, H, W) or (N, H, W, C), float32 or float64.
        parameters: all of them in a row.
        masks: (masks, N) factors of images, or None for none.
        statistics: (2, channels of all norms) means and variances to normalise with, or None for
            the batch's own.

    Returns:
        The output, like ``x``, and the statistics that were used, variances biased.
    """
    none = jnp.zeros(0, x.dtype)
    masks = none if masks is None else masks
    return _fused(program, layout, x, parameters, masks, none if statistics is None else statistics)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(
    program: Program,
    layout: str,
    x: jax.Array,
    parameters: jax.Array,
    masks: jax.Array,
    statistics: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    if masks.size == 0 and (statistics.size or not program.norms):
        used = statistics if statistics.size else jnp.zeros((2, 0), x.dtype)
        (y,) = _call(
            "fused_infer", program, layout, [_output(program, layout, x)], x, parameters, used
        )
        return y, used
    y, used, _ = _forward(program, layout, x, parameters, masks, statistics)
    return y, used


def _forward(program: Program, layout: str, x: jax.Array, *operands: jax.Array) -> list[jax.Array]:
    results = [
        _output(program, layout, x),
        jax.ShapeDtypeStruct((2, program.norm_channels), x.dtype),
        jax.ShapeDtypeStruct((_compiled(program).workspace * len(x),), x.dtype),
    ]
    return _call("fused_forward", program, layout, results, x, *operands)


def _output(program: Program, layout: str, x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((len(x), *program.output_shape(layout)), x.dtype)


def _vjp_forward(
    program: Program, layout: str, x: Any, parameters: Any, masks: Any, statistics: Any
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    operands = [operand.value for operand in (x, parameters, masks, statistics)]
    y, used, workspace = _forward(program, layout, *operands)
    # Known when the program is traced, so a part of the structure and not of the values.
    known = _Static((x.value.shape if x.perturbed else None, statistics.value.size > 0))
    return (y, used), (operands[1], operands[2], used, workspace, known)


def _vjp_backward(
    program: Program, layout: str, kept: tuple[Any, ...], grads: tuple[Any, Any]
) -> tuple[Any, ...]:
    parameters, masks, used, workspace, known = kept
    shape, frozen = known.value
    grad = grads[0]
    if type(grad) is jax.custom_derivatives.SymbolicZero:
        grad = jnp.zeros(grad.shape, grad.dtype)
    program = program.with_input_grad(shape is not None)
    results = [
        jax.ShapeDtypeStruct(parameters.shape, parameters.dtype),
        jax.ShapeDtypeStruct((0,) if shape is None else shape, parameters.dtype),
    ]
    grad_parameters, grad_x = _call(
        "fused_backward",
        program,
        layout,
        results,
        grad,
        parameters,
        masks,
        used,
        workspace,
        frozen=int(frozen),
    )
    return None if shape is None else grad_x, grad_parameters, None, None


_fused.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)


@jax.tree_util.register_static
class _Static:
    """A value that is part of a program's structure."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return hash(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.value == other.value


def _call(
    kernel: str,
    program: Program,
    layout: str,
    results: list[jax.ShapeDtypeStruct],
    *operands: jax.Array,
    **attributes: int,
) -> list[jax.Array]:
    if _kernels.ffi_available():
        numbers = {name: np.int64(value) for name, value in attributes.items()}
        call = jax.ffi.ffi_call(f"kconv_{kernel}", results)
        encoded = np.array(program.integers, np.int64)
        return list(call(*operands, program=encoded, layout=layout, **numbers))
    on_host = partial(_ON_HOST[kernel], _compiled(program), layout, **attributes)
    return list(jax.pure_callback(on_host, results, *operands, vmap_method="sequential"))


@cache
def _compiled(program: Program) -> Any:
    return _kconv.FusedProgram(program.integers)


def _forward_on_host(compiled: Any, layout: str, x: Any, *operands: Any) -> Any:
    parameters, masks, given = (np.asarray(operand) for operand in operands)
    optional = (array if array.size else None for array in (masks, given))
    return compiled.forward(np.asarray(x), parameters, *optional, layout=layout)


def _infer_on_host(compiled: Any, layout: str, *operands: Any) -> Any:
    return (compiled.infer(*map(np.asarray, operands), layout=layout),)


def _backward_on_host(compiled: Any, layout: str, *operands: Any, frozen: int) -> Any:
    grad, parameters, masks, *rest = map(np.asarray, operands)
    drop = masks if masks.size else None
    grad_x, grad_parameters = compiled.backward(
        grad, parameters, drop, *rest, bool(frozen), layout=layout
    )
    return grad_parameters, np.zeros(0, grad.dtype) if grad_x is None else grad_x


_ON_HOST: dict[str, Any] = {
    "fused_forward": _forward_on_host,
    "fused_infer": _infer_on_host,
    "fused_backward": _backward_on_host,
}
