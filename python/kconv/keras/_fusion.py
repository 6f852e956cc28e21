"""How a functional model's calls run: chains of layers as one operation each, the rest as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import keras
from keras import ops

from kconv.keras._graph import CallGraph, call_graph
from kconv.keras._native import LAYOUTS, fused, is_compiling, runs_natively
from kconv.keras._private import AutocastScope
from kconv.models import graph
from kconv.models.fusion import Segment, UnfitError, partition

__all__ = ["Plan", "plan_of", "run_fused"]

Tensor = Any


Parts = list[graph.Layer | Segment]
"""What runs one after the other."""


@dataclass(frozen=True)
class Plan:
    """A model's calls, and the chains among them.

    Attributes:
        calls: the model's.
        parts: the largest chains, and what runs by itself.
        fuses: whether there are chains.
        recompute: whether chains compute values anew in the backward pass.
        split: parts whose chains hold no batch norms of two kinds, by the norms that train.
    """

    calls: CallGraph
    parts: Parts
    fuses: bool
    recompute: bool
    split: dict[frozenset[str], Parts]

    def parts_for(self, training: bool) -> Parts:
        """Those in which the batch norms of a chain all use the batch's statistics, or none does.

        Args:
            training: whether the model is called to train; norms that are frozen do not, then.
        """
        norms = [x.name for x in self.calls.graph.layers if isinstance(x, graph.BatchNorm)]
        frozen = frozenset(x for x in norms if not self.calls.operations[x].trainable)
        if not training or len(frozen) in (0, len(norms)):
            return self.parts
        if frozen not in self.split:
            self.split[frozen] = partition(
                self.calls.graph, recompute=self.recompute, frozen=frozen
            )
        return self.split[frozen]


_PLANS: WeakKeyDictionary[keras.Model, Plan] = WeakKeyDictionary()


def plan_of(model: keras.Model) -> Plan:
    """The plan of a functional model whose layers are as they are now."""
    plan = _PLANS.get(model)
    recompute = bool(getattr(model, "recompute", False))
    if plan is None or plan.recompute != recompute or not plan.calls.up_to_date:
        calls = call_graph(model)
        parts = partition(calls.graph, recompute=recompute)
        fuses = any(isinstance(part, Segment) for part in parts)
        plan = Plan(calls, parts, fuses, recompute, {})
        _PLANS[model] = plan
    return plan


def run_fused(
    model: keras.Model,
    one_by_one: Callable[..., Tensor],
    inputs: Tensor,
    operation_fn: Any = None,
    call_fn: Any = None,
) -> Tensor:
    """Keras's walk over the layers' calls, to which a functional model's ``call`` comes down.

    Args:
        model: the functional model.
        one_by_one: Keras's own walk over it, without fusion.
        inputs: of the model.
        operation_fn: from a layer to what is called in its place.
        call_fn: calls it.
    """
    tensors = keras.tree.flatten(inputs)
    on_numbers = not any(isinstance(x, keras.KerasTensor) for x in tensors)
    watched = call_fn or not operation_fn or is_compiling() or hasattr(model, "_nnx_op_mapping")
    plan = plan_of(model) if on_numbers and not watched else None
    training = operation_fn(_Probe())() if plan and plan.fuses else None
    if plan is None or not plan.fuses or not isinstance(training, bool | int | None):
        options = {"call_fn": call_fn} if call_fn else {}
        if operation_fn:
            options["operation_fn"] = operation_fn
        return one_by_one(inputs, **options)
    values = dict(zip(map(id, model.inputs), tensors, strict=True))
    for part in plan.parts_for(bool(training)):
        if isinstance(part, Segment):
            source, target = (plan.calls.tensors[name] for name in (part.input, part.name))
            y = _run(part, plan.calls, values[id(source)], bool(training))
            if y is not None:
                values[id(target)] = y
                continue
        for layer in part.layers if isinstance(part, Segment) else [part]:
            for node in plan.calls.nodes.get(layer.name, ()):
                if id(node.outputs[0]) not in values:
                    args, kwargs = node.arguments.fill_in(values)
                    outputs = operation_fn(node.operation)(*args, **kwargs)
                    values.update(
                        zip(map(id, node.outputs), keras.tree.flatten(outputs), strict=False)
                    )
    return keras.tree.pack_sequence_as(
        model._outputs_struct, [values[id(tensor)] for tensor in model.outputs]
    )


class _Probe:
    """An operation that tells which ``training`` Keras's layers are called with."""

    _call_has_training_arg = True
    _call_context_args = frozenset({"training"})

    def __call__(self, training: Any = None) -> Any:
        return training


def _run(segment: Segment, calls: CallGraph, x: Tensor, training: bool) -> Tensor | None:
    """A segment's output, or None where its layers must run one by one."""
    dtypes = {calls.dtypes[layer.name] for layer in segment.layers}
    if len(dtypes) > 1 or len(x.shape) != 4 or getattr(x, "_keras_mask", None) is not None:
        return None
    if not keras.backend.is_float_dtype(x.dtype):
        return None
    (dtype,) = dtypes
    height = 1 if calls.data_format == "channels_last" else 2
    size = x.shape[height], x.shape[height + 1]
    if None in size or 0 in (*size, x.shape[0]) or not runs_natively(x):
        return None
    if x.shape[3 if height == 1 else 1] != segment.input_channels:
        return None
    try:
        program = segment.program(size, "IO")
    except UnfitError:
        return None

    norms = [calls.operations[norm.name] for norm in program.norms]
    own = [training and norm.trainable for norm in norms]
    if len(set(own)) > 1:
        return None
    parameters = [calls.variables[key] for key in program.parameters]
    x = ops.cast(x, dtype)  # as the layers do: a model's input is float32 by default
    wide = "float32" if dtype == "bfloat16" else dtype  # in which sums are and statistics
    masks = None
    if training and program.masks:
        ones = ops.ones((ops.shape(x)[0], 1, 1, 1), wide)
        drops = [calls.operations[x.name](ones, training=True) for x in program.masks]
        masks = ops.cast(ops.stack([ops.reshape(drop, (-1,)) for drop in drops]), wide)
    with AutocastScope(None):
        flat = _row(parameters, wide)
        statistics = None
        if norms and not any(own):
            means = _row([norm.moving_mean for norm in norms], wide)
            variances = _row([norm.moving_variance for norm in norms], wide)
            statistics = ops.stack([means, variances])
        y, used = fused(program, LAYOUTS[calls.data_format], x, flat, masks, statistics)
        if any(own):
            _update_statistics(norms, used)
    return y if segment.keeps_pixels else ops.reshape(y, (-1, program.output_size[0]))


def _row(variables: list[Any], dtype: str) -> Tensor:
    """The values of variables in a row."""
    rows = [ops.reshape(variable, (-1,)) for variable in variables]
    return ops.cast(ops.concatenate(rows), dtype)


def _update_statistics(norms: list[Any], used: Tensor) -> None:
    """The moving statistics, as keras.layers.BatchNormalization updates them."""
    start = 0
    for norm in norms:
        end = start + norm.moving_mean.shape[0]
        for moving, values in zip((norm.moving_mean, norm.moving_variance), used, strict=True):
            kept = ops.cast(moving, values.dtype) * norm.momentum
            new = kept + values[start:end] * (1 - norm.momentum)
            moving.assign(ops.cast(new, moving.dtype))
        start = end
