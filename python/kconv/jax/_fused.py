"""Fused segments of a network as one JAX operation: see :mod:`kconv.models.fusion`.

The operation is a primitive of JAX's, as it has to know how it is differentiated. Its first
derivatives in reverse mode are the native backward pass, ``backward``. What nobody has written
natively comes from :func:`kconv.models.interpreter.interpret`, which has all derivatives::

    forward   jvp: tangent(residuals, dx, dparameters)
    tangent   transposed: backward(residuals, dy); run, or differentiated: the interpreter's
    backward  differentiated: the interpreter's

Batches (``jax.vmap``) run one after the other: each has statistics of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from kconv import _kconv
from kconv.jax import _kernels
from kconv.jax._operations import operations
from kconv.models.fusion import Program
from kconv.models.interpreter import interpret

__all__ = ["fused", "runs_natively"]


def runs_natively(x: jax.Array) -> bool:
    """Whether the operation can take an array: on the CPU, and not divided among devices.

    Where devices may hold parts of it, the layers' own operations know what that means.
    """
    return jax.default_backend() == "cpu" and not _kernels.is_divided(x)


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
        x: (N, C, H, W) or (N, H, W, C), float32, float64 or bfloat16.
        parameters: all of them in a row; of bfloat16 images, as all else, in float32.
        masks: (masks, N) factors of images, or None for none.
        statistics: (2, channels of all norms) means and variances to normalise with, or None for
            the batch's own.

    Returns:
        The output, like ``x``, and the statistics that were used, variances biased.
    """
    none = jnp.zeros(0, _wide(x))
    options = {"program": program, "layout": layout}
    if masks is None and (statistics is not None or not program.norms):
        used = jnp.zeros((2, 0), _wide(x)) if statistics is None else statistics
        (y,) = _infer_p.bind(x, parameters, used, **options)
        return y, used
    masks = none if masks is None else masks
    statistics = none if statistics is None else statistics
    y, used, _ = _forward_p.bind(x, parameters, masks, statistics, **options)
    return y, used


def _wide(x: Any) -> Any:
    """What values of an array's dtype are computed with."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _interpret(
    program: Program, layout: str, x: Any, parameters: Any, masks: Any, statistics: Any
) -> tuple[Any, Any]:
    given = [operand if operand.size else None for operand in (masks, statistics)]
    wide = x.astype(_wide(x))
    y, used = interpret(operations, program.integers, layout, wide, parameters, *given)
    return y.astype(x.dtype), used


# The primitives' functions.


def _forward(
    x: Any, parameters: Any, masks: Any, statistics: Any, *, program: Program, layout: str
) -> list[Any]:
    """Output, the statistics that were used, and what the backward pass needs."""
    results = _forward_results(x, program, layout)
    return _call("fused_forward", program, layout, results, x, parameters, masks, statistics)


def _forward_results(x: Any, program: Program, layout: str) -> list[jax.ShapeDtypeStruct]:
    return [
        _output(x, program, layout),
        jax.ShapeDtypeStruct((2, program.norm_channels), _wide(x)),
        jax.ShapeDtypeStruct((_compiled(program).workspace * x.shape[0],), x.dtype),
    ]


def _output(x: Any, program: Program, layout: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], *program.output_shape(layout)), x.dtype)


def _infer(x: Any, parameters: Any, used: Any, *, program: Program, layout: str) -> list[Any]:
    """The output in inference, without anything for a backward pass."""
    results = [_output(x, program, layout)]
    return _call("fused_infer", program, layout, results, x, parameters, used)


def _backward(
    grad: Any,
    x: Any,
    parameters: Any,
    masks: Any,
    statistics: Any,
    used: Any,
    workspace: Any,
    *,
    program: Program,
    layout: str,
    input_grad: bool,
) -> list[Any]:
    """The gradients by the parameters and, where it is wanted, by the input."""
    results = _backward_results(x, parameters, input_grad)
    operands = (grad, parameters, masks, used, workspace)
    frozen = int(statistics.size > 0 or not program.norms)
    gradients = _call(
        "fused_backward",
        program.with_input_grad(input_grad),
        layout,
        results if input_grad else [*results, jax.ShapeDtypeStruct((0,), x.dtype)],
        *operands,
        frozen=frozen,
    )
    return gradients[: len(results)]


def _backward_results(x: Any, parameters: Any, input_grad: bool) -> list[jax.ShapeDtypeStruct]:
    wanted = [parameters, x] if input_grad else [parameters]
    return [jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in wanted]


def _backward_interpreted(
    grad: Any,
    x: Any,
    parameters: Any,
    masks: Any,
    statistics: Any,
    used: Any,
    workspace: Any,
    *,
    program: Program,
    layout: str,
    input_grad: bool,
) -> list[Any]:
    def output(parameters: Any, x: Any) -> Any:
        return _interpret(program, layout, x, parameters, masks, statistics)[0]

    gradients = jax.vjp(output, parameters, x)[1](grad)
    return list(gradients if input_grad else gradients[:1])


def _tangent(
    x: Any,
    parameters: Any,
    masks: Any,
    statistics: Any,
    used: Any,
    workspace: Any,
    *linear: Any,
    program: Program,
    layout: str,
    of: tuple[bool, bool],
) -> list[Any]:
    """How output and statistics change with input and parameters, or one ``of`` the two."""
    changes = iter(linear)
    dx, dparameters = (
        next(changes) if changed else jnp.zeros_like(operand)
        for changed, operand in zip(of, (x, parameters), strict=True)
    )

    def results(x: Any, parameters: Any) -> tuple[Any, Any]:
        return _interpret(program, layout, x, parameters, masks, statistics)

    return list(jax.jvp(results, (x, parameters), (dx, dparameters))[1])


# Their rules.


def _primitive(
    name: str,
    function: Callable[..., list[Any]],
    results: Callable[..., list[jax.ShapeDtypeStruct]],
) -> Primitive:
    primitive = Primitive(f"kconv_fused_{name}")
    primitive.multiple_results = True
    primitive.def_impl(function)

    def abstract(*operands: Any, **options: Any) -> list[Any]:
        shapes = results(*operands, **options)
        return [jax.core.ShapedArray(result.shape, result.dtype) for result in shapes]

    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True))
    return primitive


def _one_by_one(primitive: Primitive, operands: Any, axes: Any, **options: Any) -> Any:
    """The rule for ``jax.vmap`` of a native operation."""
    batched = [axis is not None for axis in axes]
    first = tuple(
        jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes, strict=True)
        if axis is not None
    )

    def one(parts: tuple[Any, ...]) -> Any:
        part = iter(parts)
        own = [
            next(part) if mapped else operand
            for mapped, operand in zip(batched, operands, strict=True)
        ]
        return primitive.bind(*own, **options)

    results = jax.lax.map(one, first)
    return results, [0] * len(results)


_forward_p = _primitive(
    "forward",
    _forward,
    lambda x, *_, program, layout: _forward_results(x, program, layout),
)
_infer_p = _primitive("infer", _infer, lambda x, *_, program, layout: [_output(x, program, layout)])
_backward_p = _primitive(
    "backward",
    _backward,
    lambda grad, x, parameters, *_, program, layout, input_grad: _backward_results(
        x, parameters, input_grad
    ),
)
_tangent_p = _primitive(
    "tangent",
    _tangent,
    lambda x, *_, program, layout, of: _forward_results(x, program, layout)[:2],
)
for _native in (_forward_p, _infer_p, _backward_p):
    batching.primitive_batchers[_native] = partial(_one_by_one, _native)


def _instantiated(tangents: Any) -> list[Any]:
    return [ad.instantiate_zeros(tangent) for tangent in tangents]


def _is_zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero


def _forward_jvp(primals: Any, tangents: Any, *, program: Program, layout: str) -> Any:
    results = _forward_p.bind(*primals, program=program, layout=layout)
    none = ad.Zero(jax.typeof(results[2]))
    if not all(map(_is_zero, tangents[2:])):  # masks or statistics change, too
        own = partial(_interpret, program, layout)
        changes = jax.jvp(own, tuple(primals), tuple(_instantiated(tangents)))[1]
        return results, [*changes, none]
    of = tuple(not _is_zero(tangent) for tangent in tangents[:2])
    linear = [tangent for tangent in tangents[:2] if not _is_zero(tangent)]
    residuals = (*primals, *results[1:])
    options = {"program": program, "layout": layout, "of": of}
    return results, [*_tangent_p.bind(*residuals, *linear, **options), none]


def _infer_jvp(primals: Any, tangents: Any, *, program: Program, layout: str) -> Any:
    x, parameters, used = primals
    none = jnp.zeros(0, _wide(x))
    # Without norms nothing is given, and an empty array would say so all the same.
    operands = (x, parameters, none, used if used.size else none)
    changes = [*tangents[:2], ad.Zero(jax.typeof(none)), tangents[2]]
    if not used.size:
        changes[3] = ad.Zero(jax.typeof(none))
    results, changes = _forward_jvp(operands, changes, program=program, layout=layout)
    return results[:1], changes[:1]


def _tangent_transposed(
    changes: Any, *operands: Any, program: Program, layout: str, of: tuple[bool, bool]
) -> Any:
    residuals, linear = operands[:6], operands[6:]
    if all(map(_is_zero, changes)):
        return [None] * len(operands)
    options = {"program": program, "layout": layout}
    if _is_zero(changes[1]):
        grad = ad.instantiate_zeros(changes[0])
        gradients = _backward_p.bind(grad, *residuals, **options, input_grad=of[0])
        grads = dict(zip(("parameters", "x"), gradients, strict=False))
    else:  # the statistics that were used matter, too
        x, parameters, masks, statistics = residuals[:4]

        def results(parameters: Any, x: Any) -> Any:
            return _interpret(program, layout, x, parameters, masks, statistics)

        pull = jax.vjp(results, parameters, x)[1]
        grads = dict(zip(("parameters", "x"), pull(tuple(_instantiated(changes))), strict=True))
    names = [name for name, changed in zip(("x", "parameters"), of, strict=True) if changed]
    wanted = [
        grads[name] if ad.is_undefined_primal(operand) else None
        for name, operand in zip(names, linear, strict=True)
    ]
    return [None] * 6 + wanted


def _backward_transposed(
    changes: Any, grad: Any, *residuals: Any, program: Program, layout: str, input_grad: bool
) -> Any:
    dparameters, *dx = _instantiated(changes)
    options = {"program": program, "layout": layout, "of": (input_grad, True)}
    return [_tangent_p.bind(*residuals, *dx, dparameters, **options)[0], *[None] * len(residuals)]


def _differentiate(function: Callable[..., list[Any]], primitive: Primitive) -> Callable[..., Any]:
    """The rule of a primitive whose derivatives are those of a function of JAX's operations."""

    def rule(primals: Any, tangents: Any, **options: Any) -> Any:
        changes = jax.jvp(
            partial(function, **options), tuple(primals), tuple(_instantiated(tangents))
        )[1]
        return primitive.bind(*primals, **options), changes

    return rule


def _tangent_batched(operands: Any, axes: Any, **options: Any) -> Any:
    results = jax.vmap(partial(_tangent, **options), in_axes=tuple(axes))(*operands)
    return results, [0] * len(results)


ad.primitive_jvps[_forward_p] = _forward_jvp
ad.primitive_jvps[_infer_p] = _infer_jvp
ad.primitive_jvps[_tangent_p] = _differentiate(_tangent, _tangent_p)
ad.primitive_jvps[_backward_p] = _differentiate(_backward_interpreted, _backward_p)
ad.primitive_transposes[_tangent_p] = _tangent_transposed
ad.primitive_transposes[_backward_p] = _backward_transposed
batching.primitive_batchers[_tangent_p] = _tangent_batched


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
    x = np.asarray(x)
    y, used, workspace = compiled.forward(x, parameters, *optional, layout=layout)
    return y, used, workspace.view(x.dtype)


def _infer_on_host(compiled: Any, layout: str, *operands: Any) -> Any:
    return (compiled.infer(*map(np.asarray, operands), layout=layout),)


def _backward_on_host(compiled: Any, layout: str, *operands: Any, frozen: int) -> Any:
    grad, parameters, masks, used, workspace = map(np.asarray, operands)
    drop = masks if masks.size else None
    grad_x, grad_parameters = compiled.backward(
        grad, parameters, drop, used, workspace.view(used.dtype), bool(frozen), layout=layout
    )
    return grad_parameters, np.zeros(0, grad.dtype) if grad_x is None else grad_x


_ON_HOST: dict[str, Any] = {
    "fused_forward": _forward_on_host,
    "fused_infer": _infer_on_host,
    "fused_backward": _backward_on_host,
}
