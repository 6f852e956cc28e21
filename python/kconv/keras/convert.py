"""kconv in Keras models of any origin: its kernels, or the papers' blocks; and back again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import keras
from keras import layers

from kconv import ktypes
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


def accelerate(model: keras.Model) -> keras.Model:
    """A copy of a model with its pointwise and depthwise convolutions on kconv's kernels.

    Every ``Conv2D`` with a 1x1 kernel and no stride, and every ``DepthwiseConv2D``, becomes kconv's
    layer of the same name, configuration and weights, also in models within the model. Subclasses
    of these layers stay.

    Example:
        >>> x = keras.Input((8, 8, 16))
        >>> model = keras.Model(x, layers.Conv2D(24, 1, groups=4, name="mix")(x))
        >>> type(accelerate(model).get_layer("mix")).__name__
        'PointwiseConv2D'

    Args:
        model: a functional or sequential model, built.

    Returns:
        A new functional model with the same weights, not compiled.
    """

    def replace(layer: keras.layers.Layer) -> keras.layers.Layer:
        if type(layer) is layers.DepthwiseConv2D:
            return DepthwiseConv2D.from_config(layer.get_config())
        if type(layer) is layers.Conv2D and layer.kernel_size == layer.strides == (1, 1):
            return _pointwise(layer)
        return layer.__class__.from_config(layer.get_config())

    return _clone(model, replace, call_new_layer)


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
        A new functional model with the same weights, not compiled; it loads without kconv.
    """
    steps: dict[int, int] = {}  # of the new convolutions, by their ids

    def replace(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if isinstance(layer, PointwiseConv2D):
            step = config.pop("interleave")
            native = layers.Conv2D.from_config({**config, "kernel_size": 1})
            steps[id(native)] = step
            return native
        if isinstance(layer, DepthwiseConv2D):
            return layers.DepthwiseConv2D.from_config(config)
        if isinstance(layer, Block):
            return to_native(layer.network)
        return layer.__class__.from_config(config)

    def call(layer: keras.layers.Layer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        match layer:
            case InterleaveChannels():
                return _interleave(x, layer.step_size, layer.axis)
            case CopyChannels():
                return _channels(x, layer.channel_start, layer.channel_count, layer.axis)
            case SumIntoHalfChannels():
                half = x.shape[layer.axis] // 2
                return _channels(x, 0, half, layer.axis) + _channels(x, half, half, layer.axis)
        y = call_new_layer(layer, x, *args, **kwargs)
        if steps.get(id(layer), 1) == 1:
            return y
        return _interleave(y, steps[id(layer)], 3 if layer.data_format == "channels_last" else 1)

    return _clone(model, replace, call, native=True)


def compress(model: keras.Model, ktype: ktypes.KType | str | int = "D6_16ch") -> keras.Model:
    """A copy of a model with the papers' block in the place of each pointwise convolution.

    The batch norm and the activation that follow the convolution become part of the block's units,
    with the configuration that they had. Blocks start from new weights, so the model is to be
    trained; all else keeps its weights, also a convolution that the kType leaves as it is, such as
    one of few channels.

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
        A new functional model, not compiled.

    Raises:
        ValueError: if the kType is unknown.
    """
    ktype = ktypes.resolve(ktype)
    model = _functional(model)
    blocks: dict[str, Callable[[Tensor], Tensor]] = {}
    absorbed: set[str] = set()
    followers = _followers(model)
    for layer in model.layers:
        plan = _plan(layer, ktype) if layer.name in followers else None
        if plan is not None:
            norm, activation = followers[layer.name]
            blocks[layer.name] = _block(plan, layer, norm, activation)
            absorbed |= {follower.name for follower in (norm, activation) if follower}

    def replace(layer: keras.layers.Layer) -> keras.layers.Layer:
        if _is_model(layer):
            return compress(layer, ktype)
        return layer.__class__.from_config(layer.get_config())

    def call(layer: keras.layers.Layer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer.name in absorbed:
            return x
        if layer.name in blocks:
            return blocks[layer.name](x)
        return call_new_layer(layer, x, *args, **kwargs)

    clone = keras.models.clone_model(model, clone_function=replace, call_function=call)
    kept = {layer.name: layer for layer in clone.layers}
    for layer in model.layers:
        if layer.name in kept and layer.name not in blocks and not _is_model(layer):
            kept[layer.name].set_weights(layer.get_weights())
    return clone


Follower: TypeAlias = keras.layers.Layer | None


def _followers(model: keras.Model) -> dict[str, tuple[Follower, Follower]]:
    """For each convolution that is called once, the batch norm and activation that follow it.

    Nothing else may read what lies between them, and they must be called there only.
    """
    modules = {layer.name: layer for layer in model.layers}
    calls = {layer["name"]: layer["inbound_nodes"] for layer in model.get_config()["layers"]}
    readers = [(source, name) for name in calls for source in _sources(calls[name])]
    readers += [(source, "") for source in model.output_names]  # whoever uses the model
    count = Counter(source for source, _ in readers)
    reader = dict(readers)

    def following(name: str) -> Follower:
        after = reader.get(name, "")
        alone = count[name] == 1 and len(calls.get(after, ())) == 1
        return modules.get(after) if alone else None

    followers = {}
    for name, layer in modules.items():
        if type(layer) is not layers.Conv2D or len(calls[name]) != 1:
            continue
        norm = activation = None
        after = following(name)
        if layer.activation is keras.activations.linear:
            if after is not None and type(after) is layers.BatchNormalization:
                norm, after = after, following(after.name)
            if _is_activation(after):
                activation = after
        followers[name] = norm, activation
    return followers


def _sources(value: Any) -> Iterator[str]:
    """The names of the layers that made the tensors in the configuration of a call."""
    if isinstance(value, dict):
        if "keras_history" in value:
            yield value["keras_history"][0]
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _sources(part)


def _is_activation(layer: Follower) -> bool:
    """Whether this is an elementwise activation without parameters."""
    if isinstance(layer, layers.Activation):
        return layer.activation not in (keras.activations.softmax, keras.activations.log_softmax)
    return isinstance(layer, (layers.ReLU, layers.LeakyReLU, layers.ELU))


def _plan(layer: layers.Conv2D, ktype: ktypes.KType) -> ktypes.Plan | None:
    """What takes the place of a convolution; None if it is to stay."""
    if layer.kernel_size != (1, 1) or layer.groups > 1:
        return None
    *_, c_in, filters = layer.kernel.shape
    plan = ktypes.plan(ktype, c_in, filters, layer.name)
    if plan.out_channels != filters or all(unit.groups == 1 for unit in plan.units):
        return None
    return plan


def _block(
    plan: ktypes.Plan, conv: layers.Conv2D, norm: Follower, activation: Follower
) -> Callable[[Tensor], Tensor]:
    """The block in the place of these layers."""

    def named(name: str) -> str:
        return name.replace("/", "_")

    def like(layer: keras.layers.Layer, name: str) -> keras.layers.Layer:
        return layer.__class__.from_config({**layer.get_config(), "name": named(name)})

    def unit(step: ktypes.Unit, x: Tensor) -> Tensor:
        options = {"filters": step.channels, "groups": step.groups, "name": named(step.conv_name)}
        x = call_new_layer(_pointwise(conv, **options), x)
        if norm is not None:
            x = call_new_layer(like(norm, step.bn_name), x)
        return x if activation is None else like(activation, step.activation_name)(x)

    def block(x: Tensor) -> Tensor:
        if conv.strides != (1, 1):  # the pixels that the convolution reads
            x = layers.MaxPooling2D(
                1, conv.strides, data_format=conv.data_format, name=f"{conv.name}_subsample"
            )(x)
        return apply_plan(plan, x, unit, conv.data_format, named)

    return block


def _pointwise(conv: layers.Conv2D, **changes: Any) -> PointwiseConv2D:
    """The layer of kconv in the place of a 1x1 convolution, with its configuration."""
    fixed = ("kernel_size", "strides", "padding", "dilation_rate")
    config = {key: value for key, value in conv.get_config().items() if key not in fixed}
    return PointwiseConv2D.from_config({**config, **changes})


def _is_model(layer: keras.layers.Layer) -> bool:
    """Whether this is a functional or sequential model, whose layers can be exchanged."""
    return isinstance(layer, keras.Model) and hasattr(layer, "inputs")


def _functional(model: keras.Model) -> keras.Model:
    if isinstance(model, keras.Sequential):
        return keras.Model(model.inputs, model.outputs, name=model.name)
    return model


def _clone(
    model: keras.Model,
    replace: Callable[[keras.layers.Layer], keras.layers.Layer],
    call: Callable[..., Tensor],
    *,
    native: bool = False,
) -> keras.Model:
    """A functional copy with other layers, called in another way, but with the same weights.

    It is of the same class, but ``native`` not a :class:`Network`.
    """

    def replace_inner(layer: keras.layers.Layer) -> keras.layers.Layer:
        if _is_model(layer):
            return _clone(layer, replace, call, native=native)
        return replace(layer)

    source = _functional(model)
    if native and isinstance(source, Network):
        source = keras.Model(source.inputs, source.outputs, name=source.name)
    clone = keras.models.clone_model(source, clone_function=replace_inner, call_function=call)
    clone.set_weights(model.get_weights())
    return clone


def _interleave(x: Tensor, step: int, axis: int) -> Tensor:
    channels = x.shape[axis]
    if not 1 < step < channels:
        return x
    if None in x.shape[1:]:  # a reshape leaves one size open, which is the batch's
        return keras.ops.take(x, ktypes.interleave_index(channels, step), axis=axis)
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
