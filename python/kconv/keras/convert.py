"""kconv in Keras models of any origin: its kernels, or the papers' blocks; and back again.

All functions here return a new functional model and leave the one that they are given as it is.
The copy has its weights, and all that belongs to them: names, the structure and the dtypes of
inputs and outputs, what is shared or frozen, adapted statistics, seeds. It is not compiled, as an
optimizer goes with the weights that it trains. A layer that cannot be copied faithfully (one with a
method of its own, with weights that another layer has too, or without a complete configuration)
stays the same layer in both models. :func:`report` tells which these are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import keras
from keras import layers

from kconv import ktypes
from kconv._geometry import interleave_order
from kconv._report import Report
from kconv.keras._clone import Changes, Exchange, Graph, Plan, clone, copied, from_config
from kconv.keras._fuse import fusion_report, is_fused
from kconv.keras._initialize import call_new_layer
from kconv.keras.blocks import apply_plan
from kconv.keras.layers import (
    CopyChannels,
    DepthwiseConv2D,
    InterleaveChannels,
    PointwiseConv2D,
    SumIntoHalfChannels,
)
from kconv.keras.network import Network
from kconv.keras.units import Block

Tensor = Any
Plans: TypeAlias = dict[int, Exchange | str]

_REPORTS: WeakKeyDictionary[keras.Model, Report] = WeakKeyDictionary()


def report(model: keras.Model) -> Report:
    """What the conversion that made a model changed, what it kept, and why.

    Of a model that :func:`~kconv.keras.fuse` was given: which layers run fused as they are now, in
    which chain, and why others do not.

    Example:
        >>> x = keras.Input((8, 8, 16))
        >>> model = keras.Model(x, layers.Conv2D(24, 1, dilation_rate=2, name="dilated")(x))
        >>> print(report(accelerate(model)))
        accelerate: 0 changed, 1 kept
          kept     dilated  dilation_rate=(2, 2) has no kernel

    Args:
        model: a result of :func:`accelerate`, :func:`compress` or :func:`to_native`, or fused.

    Returns:
        The report, in which layers inside of models have the names "model/layer".

    Raises:
        ValueError: if none of these functions made the model.
    """
    if is_fused(model):
        return fusion_report(model)
    if model not in _REPORTS:
        raise ValueError(f"the model {model.name!r} does not come from a conversion by kconv.keras")
    return _REPORTS[model]


def accelerate(model: keras.Model) -> keras.Model:
    """A copy of a model with its pointwise and depthwise convolutions on kconv's kernels.

    Every ``Conv2D`` with a 1x1 kernel and every ``DepthwiseConv2D`` becomes kconv's layer of the
    same name, configuration and weights, also in models within the model. Subclasses of these
    layers stay. See :mod:`kconv.keras.convert` for what else the copy has of the model.

    Example:
        >>> x = keras.Input((8, 8, 16))
        >>> model = keras.Model(x, layers.Conv2D(24, 1, groups=4, name="mix")(x))
        >>> type(accelerate(model).get_layer("mix")).__name__
        'PointwiseConv2D'

    Args:
        model: a functional or sequential model, built.

    Returns:
        A new functional model with the same weights, not compiled.

    Raises:
        TypeError: if this is no functional or sequential model.
        ValueError: if a sequential model has not been built.
    """

    def exchange(layer: keras.layers.Layer) -> Exchange | str | None:
        if isinstance(layer, PointwiseConv2D | DepthwiseConv2D):
            return None
        if isinstance(layer, layers.DepthwiseConv2D):
            if type(layer) is not layers.DepthwiseConv2D:
                return _SUBCLASS.format(type(layer).__name__)
            return _heir(layer, from_config(DepthwiseConv2D, layer))
        if not isinstance(layer, layers.Conv2D) or layer.kernel_size != (1, 1):
            return None
        if type(layer) is not layers.Conv2D:
            return _SUBCLASS.format(type(layer).__name__)
        if layer.dilation_rate != (1, 1):
            return f"dilation_rate={layer.dilation_rate} has no kernel"
        return _heir(layer, from_config(PointwiseConv2D, layer, kernel_size=None))

    return _convert("accelerate", model, _layer_by_layer(exchange))


def to_native(model: keras.Model) -> keras.Model:
    """A copy of a model in Keras's own layers and operations, for export or another device.

    Example:
        >>> x = keras.Input((8, 8, 16))
        >>> y = PointwiseConv2D(24, groups=4, interleave=6, name="mix")(x)
        >>> type(to_native(keras.Model(x, y)).get_layer("mix")).__name__
        'Conv2D'

    Args:
        model: a functional or sequential model, built.

    Returns:
        A new functional model with the same weights, not compiled; it loads without kconv. Only
        subclasses of kconv's layers stay, as :func:`report` tells. See :mod:`kconv.keras.convert`
        for what else the copy has of the model.

    Raises:
        TypeError: if this is no functional or sequential model.
        ValueError: if a sequential model has not been built.
    """

    def exchange(layer: keras.layers.Layer) -> Exchange | str | None:
        kind = type(layer)
        if kind is PointwiseConv2D:
            return _native_pointwise(layer)
        if kind is DepthwiseConv2D:
            return _heir(layer, from_config(layers.DepthwiseConv2D, layer))
        if kind is InterleaveChannels:
            return Exchange(lambda inputs: _interleave(inputs, layer.step_size, layer.axis), _OPS)
        if kind is CopyChannels:
            start, count = layer.channel_start, layer.channel_count
            return Exchange(lambda inputs: _channels(inputs, start, count, layer.axis), _OPS)
        if kind is SumIntoHalfChannels:
            return Exchange(lambda inputs: _folded(inputs, layer.axis), _OPS)
        if isinstance(layer, Block):
            return Exchange(to_native(layer.network), "a model of its layers")
        return _SUBCLASS.format(kind.__name__) if _is_of_kconv(kind) else None

    return _convert("to_native", model, _layer_by_layer(exchange), plain=Network)


def compress(model: keras.Model, ktype: ktypes.KType | str | int = "D6_16ch") -> keras.Model:
    """A copy of a model with the papers' block in the place of each pointwise convolution.

    The batch norm and the activation that follow the convolution become part of the block's units,
    with the configuration that they had. Blocks start from new weights, so the model is to be
    trained; all else keeps its weights, also a convolution that the kType leaves as it is, such as
    one of few channels. A convolution that is called several times becomes one block that is called
    as often; one whose weights another layer has too, or that has methods of its own, stays.

    Example:
        >>> x = keras.Input((8, 8, 128))
        >>> y = layers.BatchNormalization()(layers.Conv2D(64, 1)(x))
        >>> model = keras.Model(x, layers.ReLU()(y))
        >>> model.count_params(), compress(model, "D6_16ch").count_params()
        (8512, 2176)

    Args:
        model: a functional or sequential model, built.
        ktype: a kType, its name or its number.

    Returns:
        A new functional model, not compiled. See :mod:`kconv.keras.convert` for what it has of the
        model, and :func:`report` for what has become of its convolutions.

    Raises:
        TypeError: if this is no functional or sequential model.
        ValueError: if the kType is unknown, or a sequential model has not been built.
    """
    resolved = ktypes.resolve(ktype)

    def plans(graph: Graph) -> Plans:
        found: Plans = {}
        followers = _followers(graph)
        for layer in graph.model.layers:
            plan = _plan(layer, resolved)
            if not isinstance(plan, ktypes.Plan):
                if plan is not None:
                    found[id(layer)] = plan
                continue
            if id(layer) in graph.bound:
                continue
            norm, activation = followers[id(layer)]
            block = _block(plan, layer, norm, activation)
            if graph.calls[id(layer)] > 1:
                block = _as_model(block, layer)
            found[id(layer)] = Exchange(block, f"a block of {len(plan.units)} convolutions")
            for follower in (norm, activation):
                if follower is not None:
                    found[id(follower)] = Exchange(_identity, f"part of {layer.name}'s block")
        return found

    return _convert("compress", model, plans)


_SUBCLASS = "{} is a class of its own"
_OPS = "operations"


def _convert(
    action: Literal["accelerate", "compress", "to_native"],
    model: keras.Model,
    plan: Plan,
    plain: type | None = None,
) -> keras.Model:
    changes = Changes()
    copy = clone(model, plan, changes, plain=plain)
    _REPORTS[copy] = Report(action, changes.changed, changes.kept)
    return copy


def _layer_by_layer(exchange: Callable[[keras.layers.Layer], Exchange | str | None]) -> Plan:
    def plans(graph: Graph) -> Plans:
        free = (layer for layer in graph.model.layers if id(layer) not in graph.bound)
        found = {id(layer): exchange(layer) for layer in free}
        return {key: value for key, value in found.items() if value is not None}

    return plans


def _heir(layer: keras.layers.Layer, new: keras.layers.Layer) -> Exchange:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return call_new_layer(new, *args, **kwargs)

    return Exchange(call, type(new).__name__, ((layer, new),))


def _native_pointwise(layer: PointwiseConv2D) -> Exchange:
    step, axis = layer.interleave, 3 if layer.data_format == "channels_last" else 1
    changes: dict[str, Any] = {"kernel_size": 1, "interleave": None}
    if step == 1:
        return _heir(layer, from_config(layers.Conv2D, layer, **changes))
    # Most activations do not mind the order of the channels, and stay in the convolution. Others
    # see the interleaved channels, as in kconv's layer.
    activation = layer.activation
    heirs: tuple[tuple[Any, Any], ...] = ()
    after: Callable[[Tensor], Tensor] = _identity
    if isinstance(activation, keras.layers.Layer):
        after = copied(activation)
        heirs = ((activation, after),)
        changes["activation"] = "linear"
    elif not _is_of_any_order(activation):
        after = layers.Activation(activation, name=f"{layer.name}_activation")
        changes["activation"] = "linear"
    new = from_config(layers.Conv2D, layer, **changes)

    def call(inputs: Tensor) -> Tensor:
        return after(_interleave(call_new_layer(new, inputs), step, axis))

    return Exchange(call, "Conv2D and operations", ((layer, new), *heirs))


def _is_of_any_order(activation: Any) -> bool:
    """Whether permuted channels give permuted results: true of Keras's functions but one."""
    if activation is None:
        return True
    known = [f for f in vars(keras.activations).values() if callable(f)]
    return activation in known and activation is not getattr(keras.activations, "glu", None)


def _is_of_kconv(kind: type) -> bool:
    ours = (
        PointwiseConv2D,
        DepthwiseConv2D,
        InterleaveChannels,
        CopyChannels,
        SumIntoHalfChannels,
    )
    return issubclass(kind, ours)


def _identity(inputs: Tensor) -> Tensor:
    return inputs


Follower: TypeAlias = keras.layers.Layer | None


def _followers(graph: Graph) -> dict[int, tuple[Follower, Follower]]:
    """For each convolution the batch norm and activation that follow it and can become its block's.

    Nothing else may read what lies between them, and all are called there only, with nothing but
    the tensor.
    """
    readers: dict[int, list[Any]] = {}
    for node in graph.nodes:
        for x in node.input_tensors:
            readers.setdefault(id(x), []).append(node)
    results = Counter(id(x) for x in graph.model.outputs)  # whoever uses the model reads those
    made = {id(node.operation): node for node in graph.nodes}

    def following(layer: keras.layers.Layer) -> Follower:
        (output,) = made[id(layer)].outputs
        after = readers.get(id(output), [])
        if results[id(output)] or len(after) != 1:
            return None
        (node,) = after
        reader = node.operation
        alone = graph.calls[id(reader)] == 1 and id(reader) not in graph.bound
        given = [*node.arguments.args, *node.arguments.kwargs.values()]
        only_tensor = all(value is None or value is output for value in given)
        return reader if alone and only_tensor else None

    followers = {}
    for layer in graph.model.layers:
        if type(layer) not in (layers.Conv2D, PointwiseConv2D):
            continue
        norm = activation = None
        if graph.calls[id(layer)] == 1 and layer.activation is keras.activations.linear:
            after = following(layer)
            if after is not None and type(after) is layers.BatchNormalization:
                norm, after = after, following(after)
            if after is not None and _is_activation(after):
                activation = after
        followers[id(layer)] = norm, activation
    return followers


def _is_activation(layer: keras.layers.Layer) -> bool:
    """Whether this is an elementwise activation without parameters."""
    if type(layer) is layers.Activation:
        mixing = (keras.activations.softmax, keras.activations.log_softmax)
        return _is_of_any_order(layer.activation) and layer.activation not in mixing
    return type(layer) in (layers.ReLU, layers.LeakyReLU, layers.ELU)


def _plan(layer: keras.layers.Layer, ktype: ktypes.KType) -> ktypes.Plan | str | None:
    """What takes a layer's place; why a pointwise convolution stays; None for other layers."""
    if isinstance(layer, layers.DepthwiseConv2D) or not isinstance(layer, layers.Conv2D):
        return None
    if layer.kernel_size != (1, 1):
        return None
    if type(layer) not in (layers.Conv2D, PointwiseConv2D):
        return _SUBCLASS.format(type(layer).__name__)
    if layer.groups > 1 or getattr(layer, "interleave", 1) > 1:
        return f"it has {layer.groups} groups and interleave={getattr(layer, 'interleave', 1)}"
    *_, c_in, filters = layer.kernel.shape
    plan = ktypes.plan(ktype, c_in, filters, layer.name)
    if plan.out_channels != filters or all(unit.groups == 1 for unit in plan.units):
        return f"{ktype.name} has no groups for {c_in} to {filters} channels"
    return plan


def _block(
    plan: ktypes.Plan, conv: layers.Conv2D, norm: Follower, activation: Follower
) -> Callable[[Tensor], Tensor]:
    """The block in the place of these layers."""

    def named(name: str) -> str:
        return name.replace("/", "_")

    def unit(step: ktypes.Unit, x: Tensor) -> Tensor:
        options = {"filters": step.channels, "groups": step.groups, "name": named(step.conv_name)}
        fixed = {"strides": 1, "dilation_rate": 1, "kernel_size": None}
        without_lora = {"lora_rank": None, "lora_alpha": None}
        new = from_config(PointwiseConv2D, conv, **options, **fixed, **without_lora)
        x = call_new_layer(new, x)
        if norm is not None:
            x = call_new_layer(from_config(type(norm), norm, name=named(step.bn_name)), x)
        if activation is None:
            return x
        return from_config(type(activation), activation, name=named(step.activation_name))(x)

    def block(inputs: Tensor) -> Tensor:
        if tuple(conv.strides) != (1, 1):  # the pixels that the convolution reads
            inputs = layers.MaxPooling2D(
                1, conv.strides, data_format=conv.data_format, name=f"{conv.name}_subsample"
            )(inputs)
        return apply_plan(plan, inputs, unit, conv.data_format, named)

    return block


def _as_model(block: Callable[[Tensor], Tensor], conv: layers.Conv2D) -> keras.Model:
    """A block as a model, which can be called more than once."""
    channels = conv.kernel.shape[2]
    last = conv.data_format == "channels_last"
    x = keras.Input((None, None, channels) if last else (channels, None, None))
    return keras.Model(x, block(x), name=conv.name)


def _folded(x: Tensor, axis: int) -> Tensor:
    half = x.shape[axis] // 2
    return _channels(x, 0, half, axis) + _channels(x, half, half, axis)


def _interleave(x: Tensor, step: int, axis: int) -> Tensor:
    channels = x.shape[axis]
    if not 1 < step < channels:
        return x
    if None in x.shape[1:]:  # a reshape leaves one size open, which is the batch's
        return keras.ops.take(x, interleave_order(channels, step), axis=axis)
    # Else by transposing a table, which exports everywhere: its rows are of ``step``
    # channels, and the columns are taken one by one. Where the last row is not full, the columns
    # that it lengthens are a table of their own.
    rows, rest = divmod(channels, step)
    tables = [_split(_channels(x, 0, rows * step, axis), rows, axis)]
    if rest:
        last_row = _split(_channels(x, rows * step, rest, axis), 1, axis)
        longer = _channels(tables[0], 0, rest, axis + 1)
        others = _channels(tables[0], rest, step - rest, axis + 1)
        tables = [keras.ops.concatenate([longer, last_row], axis), others]
    columns = [_merge(keras.ops.swapaxes(table, axis, axis + 1), axis) for table in tables]
    return keras.ops.concatenate(columns, axis) if rest else columns[0]


def _split(x: Tensor, rows: int, axis: int) -> Tensor:
    """Axis of rows * columns values to (rows, columns)."""
    before, after = x.shape[1:axis], x.shape[axis + 1 :]
    return keras.ops.reshape(x, (-1, *before, rows, x.shape[axis] // rows, *after))


def _merge(x: Tensor, axis: int) -> Tensor:
    """Undoes :func:`_split`."""
    before, after = x.shape[1:axis], x.shape[axis + 2 :]
    return keras.ops.reshape(x, (-1, *before, x.shape[axis] * x.shape[axis + 1], *after))


def _channels(x: Tensor, start: int, count: int, axis: int) -> Tensor:
    return x[(slice(None),) * axis + (slice(start, start + count),)]
