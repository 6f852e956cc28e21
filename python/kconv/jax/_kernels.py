"""Calls of the native kernels from inside a JAX program.

The kernels are XLA FFI handlers: a compiled program calls them directly on its own buffers, without
Python and without copies. Where this jaxlib refuses the handlers, the same NumPy functions run
through :func:`jax.pure_callback`, which is slower and copies.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

import kconv
from kconv import _kconv

_READ_FROM_RESULT = ("input_size", "kernel_size")
"""Arguments of the NumPy functions that an XLA handler reads from the shape of its result."""


@functools.cache
def ffi_available() -> bool:
    """Register the handlers with XLA once; False, after one warning, where that fails."""
    # With the backend up, XLA asks each handler for its version as it is registered, and raises a
    # refusal here. Otherwise that would stop the start of the backend, and with it all of JAX.
    jax.devices("cpu")
    try:
        for kernel, handler in _kconv.xla_handlers().items():
            jax.ffi.register_ffi_target(_target(kernel), handler, platform="cpu")
    except Exception as error:  # whatever a past or future jaxlib raises
        warnings.warn(
            f"jax {jax.__version__} refuses kconv's XLA handlers ({error}); "
            "kconv.jax goes through jax.pure_callback instead, which is slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@dataclass(frozen=True)
class Kernel:
    """A call of the function of :mod:`kconv` of that name, on float32, float64 or bfloat16.

    Attributes:
        name: the function's.
        batched: for each operand, whether its first axis is the batch.
        result: the shape of one image's result; or of a sum over the batch, if ``summed``.
        summed: whether images are summed.
        arguments: the function's other arguments.
    """

    name: str
    batched: tuple[bool, ...]
    result: tuple[int, ...]
    summed: bool
    arguments: tuple[tuple[str, Any], ...]

    def __call__(self, *operands: jax.Array) -> jax.Array:
        """Call it on one device."""
        batch = () if self.summed else operands[self.batched.index(True)].shape[:1]
        result = jax.ShapeDtypeStruct((*batch, *self.result), operands[0].dtype)
        if ffi_available():
            encoded = {
                name: _encode(value)
                for name, value in self.arguments
                if name not in _READ_FROM_RESULT
            }
            return jax.ffi.ffi_call(_target(self.name), result)(*operands, **encoded)

        def on_host(*operands: jax.Array) -> np.ndarray:
            return getattr(kconv, self.name)(*map(np.asarray, operands), **dict(self.arguments))

        return jax.pure_callback(on_host, result, *operands, vmap_method="sequential")


class BatchParallel(Protocol):
    """A function of arrays of which each device can compute its own part of the batch.

    It can be hashed, and equals others that compute the same.
    """

    @property
    def batched(self) -> tuple[bool, ...]:
        """For each operand, whether its first axis is the batch."""

    @property
    def summed(self) -> bool:
        """Whether the result is a sum over the batch, and not a batch itself."""

    def __call__(self, *operands: jax.Array) -> jax.Array: ...


def parallel(function: BatchParallel, *operands: jax.Array) -> jax.Array:
    """Call a function so that every device computes those images that it has.

    JAX itself would bring all images to all devices, as it does not know what a kernel computes.
    """
    mesh = _explicit_mesh(operands)
    if mesh is not None:
        specs = [_batch_spec(function.batched, operands)[batched] for batched in function.batched]
        batch = _batch_spec(function.batched, operands)[True]
        part = partial(_part, function, _axes(batch))
        result = PartitionSpec() if function.summed else batch
        return jax.shard_map(
            part, mesh=mesh, in_specs=tuple(specs), out_specs=result, check_vma=False
        )(*operands)
    if _compiler_divides():
        return _partitioned(function, *operands)
    axes = frozenset().union(*map(_varying, operands))
    result = function(*operands)
    return _cast(result, axes - _varying(result))


def aligned(batched: tuple[bool, ...], *operands: jax.Array) -> list[jax.Array]:
    """Operands that vary over the same devices, as the derivatives of a function of them need it.

    Inside ``shard_map`` they all vary where one does, so that the gradient of a weight that all
    devices share is their gradients' sum. With explicit shardings images are split along their
    batch alone, and what is no batch of images is on all devices.
    """
    mesh = _explicit_mesh(operands)
    if mesh is not None:
        spec = _batch_spec(batched, operands)
        return [
            jax.sharding.reshard(operand, NamedSharding(mesh, spec[is_batch]))
            for operand, is_batch in zip(operands, batched, strict=True)
        ]
    axes = frozenset().union(*map(_varying, operands))
    return [_cast(operand, axes - _varying(operand)) for operand in operands]


def is_divided(x: jax.Array) -> bool:
    """Whether devices may hold parts of an array, of which each computes something."""
    return _compiler_divides() or _explicit_mesh((x,)) is not None or bool(_varying(x))


@partial(jax.jit, static_argnums=0)
def _partitioned(function: BatchParallel, *operands: jax.Array) -> jax.Array:
    """Let the compiler split the batch as its images are already."""

    def placement(mesh: Any, shapes: Any) -> tuple[tuple[Any, ...], Any, Any]:
        """The shardings of operands and result, and the mesh's axes of the batch."""
        first = shapes[function.batched.index(True)]
        batch = getattr(first.sharding, "spec", PartitionSpec())[:1]
        batch = batch if _divides(mesh, batch, first.shape[0]) else PartitionSpec()
        spec = {True: PartitionSpec(*batch), False: PartitionSpec()}
        of = {key: NamedSharding(mesh, value) for key, value in spec.items()}
        operands = tuple(of[is_batch] for is_batch in function.batched)
        return operands, of[not function.summed], _axes(spec[True])

    def partition(mesh: Any, shapes: Any, _: Any) -> Any:
        operands, result, axes = placement(mesh, shapes)
        return mesh, partial(_part, function, axes), result, operands

    def infer(mesh: Any, shapes: Any, _: Any) -> Any:
        return placement(mesh, shapes)[1]

    call = custom_partitioning(function)
    call.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=_sharding_rule(function, operands),
    )
    return call(*operands)


def _sharding_rule(function: BatchParallel, operands: tuple[jax.Array, ...]) -> str:
    """Such as "n d0 d1 d2, d3 d4 -> n d5 d6 d7": only the batch is split alike."""
    shape = jax.eval_shape(function, *operands).shape
    names = (f"d{i}" for i in itertools.count())

    def axes(rank: int, is_batch: bool) -> str:
        return " ".join("n" if i == 0 and is_batch else next(names) for i in range(rank))

    mappings = [
        axes(x.ndim, is_batch) for x, is_batch in zip(operands, function.batched, strict=True)
    ]
    return f"{', '.join(mappings)} -> {axes(len(shape), not function.summed)}"


def _part(function: BatchParallel, axes: tuple[str, ...], *operands: jax.Array) -> jax.Array:
    """What one device computes; ``axes`` are the mesh's over which the batch is split."""
    result = function(*operands)
    return jax.lax.psum(result, axes) if function.summed and axes else result


def _axes(spec: Any) -> tuple[str, ...]:
    """The mesh's axes that split a first axis."""
    first = spec[0] if len(spec) else None
    return first if isinstance(first, tuple) else (() if first is None else (first,))


def _divides(mesh: Any, spec: Any, size: int) -> bool:
    return size % math.prod(mesh.shape[axis] for axis in _axes(spec)) == 0


def _type(x: jax.Array) -> Any:
    return jax.typeof(x) if hasattr(jax, "typeof") else None  # from JAX 0.6


def _explicit_mesh(operands: tuple[jax.Array, ...]) -> Any:
    """The mesh over which arrays are split by their types; None where the compiler splits them."""
    for operand in operands:
        mesh = getattr(getattr(_type(operand), "sharding", None), "mesh", None)
        if mesh is not None and "Explicit" in map(_name, getattr(mesh, "axis_types", None) or ()):
            return mesh
    return None


def _name(axis_type: Any) -> str:
    return str(getattr(axis_type, "name", axis_type))


def _batch_spec(
    batched: tuple[bool, ...], operands: tuple[jax.Array, ...]
) -> dict[bool, PartitionSpec]:
    """How operands with and without a batch are to be split."""
    first = operands[batched.index(True)]
    spec = _type(first).sharding.spec
    return {True: PartitionSpec(*spec[:1]), False: PartitionSpec()}


def _compiler_divides() -> bool:
    """Whether the compiler may divide arrays among devices.

    Inside ``shard_map`` it does not, as every device is told what to do.
    """
    mesh = getattr(jax.sharding, "get_abstract_mesh", lambda: None)()
    return len(jax.devices("cpu")) > 1 and not getattr(mesh, "manual_axes", ())


def _varying(x: jax.Array) -> frozenset[str]:
    """The axes of the mesh along which devices have different values, as ``shard_map`` sees it."""
    kind = _type(x)
    return frozenset(getattr(getattr(kind, "mat", kind), "varying", getattr(kind, "vma", ())))


def _cast(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    if not axes:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, tuple(axes), to="varying")
    return jax.lax.pvary(x, tuple(axes))


def _target(kernel: str) -> str:
    return f"kconv_{kernel}"


def _encode(value: Any) -> Any:
    """An attribute as XLA takes it: a string, a 64-bit integer, or a flat array of them."""
    if isinstance(value, str):
        return value
    return np.int64(value) if isinstance(value, int) else np.ravel(value).astype(np.int64)
