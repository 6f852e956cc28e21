"""A Keras model whose chains of layers run as one operation each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import keras
from keras import ops

from kconv.keras._graph import CallGraph, call_graph
from kconv.keras._native import LAYOUTS, fused, is_compiling, runs_natively
from kconv.models import graph
from kconv.models.fusion import Segment, UnfitError, partition

Tensor = Any


@keras.saving.register_keras_serializable(package="kconv")
class Network(keras.Model):
    """A functional model whose chains of convolutions, batch norms and the like run fused.

    It is made, saved, loaded and trained as every functional model, and has the same layers with
    the same weights. When it is called on numbers, the longest chains of layers that
    :mod:`kconv.models.fusion` knows run as one operation each, on their layers' weights. They run
    layer by layer where it cannot stand for them: in mixed precision, on other devices than the
    CPU, for images without pixels and batches without images, with masks, and where some of a
    chain's batch norms are frozen and others are not.

    What is changed of a layer counts from the next call on, as in every Keras model: an attribute,
    its ``call``, an activation, a regularizer. A layer that is then none of those that a chain
    knows runs by itself.

    Example:
        >>> x = keras.Input((8, 8, 16))
        >>> y = keras.layers.BatchNormalization()(keras.layers.Conv2D(24, 1, groups=4)(x))
        >>> model = Network(x, keras.layers.Activation("silu")(y))
        >>> model(keras.ops.ones((2, 8, 8, 16))).shape
        (2, 8, 8, 24)
    """

    def _run_through_graph(
        self, inputs: Tensor, operation_fn: Any = None, call_fn: Any = None
    ) -> Tensor:
        # Keras's walk over the layers' calls, to which `call` comes down.
        tensors = keras.tree.flatten(inputs)
        on_numbers = not any(isinstance(x, keras.KerasTensor) for x in tensors)
        watched = call_fn or not operation_fn or is_compiling()
        plan = _plan(self) if on_numbers and not watched else None
        training = operation_fn(_Probe())() if plan and plan.fuses else None
        if plan is None or not plan.fuses or not isinstance(training, bool | int | None):
            options = {"call_fn": call_fn} if call_fn else {}
            if operation_fn:
                options["operation_fn"] = operation_fn
            return super()._run_through_graph(inputs, **options)
        values = dict(zip(map(id, self.inputs), tensors, strict=True))
        for part in plan.parts:
            if isinstance(part, Segment):
                source, target = (plan.calls.tensors[name] for name in (part.input, part.name))
                y = _run(part, plan.calls, values[id(source)], bool(training))
                if y is not None:
                    values[id(target)] = y
                    continue
            for layer in part.layers if isinstance(part, Segment) else [part]:
                node = plan.calls.nodes.get(layer.name)
                if node is not None and id(node.outputs[0]) not in values:
                    args, kwargs = node.arguments.fill_in(values)
                    outputs = operation_fn(node.operation)(*args, **kwargs)
                    values.update(
                        zip(map(id, node.outputs), keras.tree.flatten(outputs), strict=False)
                    )
        return keras.tree.pack_sequence_as(
            self._outputs_struct, [values[id(tensor)] for tensor in self.outputs]
        )


class _Probe:
    """An operation that tells which ``training`` Keras's layers are called with."""

    _call_has_training_arg = True
    _call_context_args = frozenset({"training"})

    def __call__(self, training: Any = None) -> Any:
        return training


@dataclass(frozen=True)
class _Plan:
    """A model's calls, and the chains among them."""

    calls: CallGraph
    parts: list[graph.Layer | Segment]
    fuses: bool


_PLANS: WeakKeyDictionary[Network, _Plan] = WeakKeyDictionary()


def _plan(model: Network) -> _Plan:
    """The plan of a model whose layers are as they are now."""
    plan = _PLANS.get(model)
    if plan is None or not plan.calls.up_to_date:
        calls = call_graph(model)
        parts = partition(calls.graph)
        plan = _Plan(calls, parts, any(isinstance(part, Segment) for part in parts))
        _PLANS[model] = plan
    return plan


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

    def layer_of(layer: graph.Layer | str) -> Any:
        name = layer if isinstance(layer, str) else layer.name
        return calls.nodes[name].operation

    norms = [layer_of(norm) for norm in program.norms]
    own = [training and norm.trainable for norm in norms]
    if len(set(own)) > 1:
        return None
    parameters = [
        getattr(layer_of(name), _attribute(weight)) for name, weight in program.parameters
    ]
    flat = ops.concatenate([ops.reshape(weight, (-1,)) for weight in parameters])
    x = ops.cast(x, dtype)  # as the layers do: a model's input is float32 by default
    masks = None
    if training and program.masks:
        ones = ops.ones((ops.shape(x)[0], 1, 1, 1), dtype)
        drops = [layer_of(drop)(ones, training=True) for drop in program.masks]
        masks = ops.stack([ops.reshape(drop, (-1,)) for drop in drops])
    statistics = None
    if norms and not any(own):
        means = ops.concatenate([ops.convert_to_tensor(norm.moving_mean) for norm in norms])
        variances = [ops.convert_to_tensor(norm.moving_variance) for norm in norms]
        statistics = ops.stack([means, ops.concatenate(variances)])
    y, used = fused(program, LAYOUTS[calls.data_format], x, flat, masks, statistics)
    if any(own):
        _update_statistics(norms, used)
    return y if segment.keeps_pixels else ops.reshape(y, (-1, program.output_size[0]))


def _attribute(weight: str) -> str:
    return "kernel" if weight == "depthwise_kernel" else weight


def _update_statistics(norms: list[Any], used: Tensor) -> None:
    """The moving statistics, as keras.layers.BatchNormalization updates them."""
    start = 0
    for norm in norms:
        end = start + norm.moving_mean.shape[0]
        for moving, values in zip((norm.moving_mean, norm.moving_variance), used, strict=True):
            moving.assign(moving * norm.momentum + values[start:end] * (1 - norm.momentum))
        start = end
