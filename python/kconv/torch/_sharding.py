"""How the operators compute on DTensors: imported when the first one comes along.

A batch that is sharded stays so: each process convolves its own images, and a weight's gradient is
the sum of theirs. Any other placement is gathered first.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from kconv.torch import _dispatch, ops

__all__: list[str] = []


def _register(op: _dispatch.KernelOp) -> None:
    """Registers an operator whose images' first axis is the batch, and whose weights have none."""

    def rule(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        # One placement a tensor; what is left out of the call, and the geometry, has none.
        images = (*op.images, *[False] * op.has_bias)
        rules = []
        for image, weight, result in (
            (Shard(0), Replicate(), Shard(0) if op.makes_image else Partial()),
            (Replicate(), Replicate(), Replicate()),
        ):
            placements: list[Any] = [None] * len(args)
            for i, is_image in enumerate(images[: len(args)]):
                if args[i] is not None:
                    placements[i] = image if is_image else weight
            rules.append(([result], placements))
        return rules

    register_sharding(op.overload)(rule)
    # All numbers and lists of them belong to the key under which DTensor remembers a call: two
    # gradients of one shape may be of inputs of different sizes.
    info = RuntimeSchemaInfo(len(op.images) + op.has_bias, needs_pytree=True)
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op.overload] = info


for _op in vars(ops).copy().values():
    if isinstance(_op, _dispatch.KernelOp):
        _register(_op)
