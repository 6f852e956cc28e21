"""The original's ``efficientnet``: EfficientNet and kEffNet, B0-B7 and S."""
# ruff: noqa: N802, N803 - the original's names

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import keras

from kconv.cai._networks import ActivationFn, activation_name, build, no_more, refuse, spec
from kconv.models import EfficientNet as EfficientNetSpec
from kconv.models import GraphBuilder, KEffNet, Spec
from kconv.models.blocks import Pointwise
from kconv.models.efficientnet import STAGES, Stage

Tensor = Any
Shape = tuple[int | None, ...]
KType = int | str | list[int | str]

DEFAULT_BLOCKS_ARGS = [
    {
        "kernel_size": stage.kernel_size,
        "repeats": stage.repeats,
        "filters_in": before.filters if before else 32,
        "filters_out": stage.filters,
        "expand_ratio": stage.expand_ratio,
        "id_skip": True,
        "strides": stage.strides,
        "se_ratio": 0.25,
    }
    for before, stage in zip((None, *STAGES), STAGES, strict=False)
]
"""The stages of the network, as Keras's applications write them down."""


def swish(x: Tensor) -> Tensor:
    """X times its sigmoid.

    Example:
        >>> float(swish(keras.ops.zeros(())))
        0.0
    """
    return keras.ops.silu(x)


def EfficientNet(
    width_coefficient: float,
    depth_coefficient: float,
    default_size: int,
    dropout_rate: float = 0.2,
    drop_connect_rate: float = 0.2,
    depth_divisor: int = 8,
    activation_fn: ActivationFn = swish,
    blocks_args: list[dict[str, Any]] = DEFAULT_BLOCKS_ARGS,
    model_name: str = "efficientnet",
    include_top: bool = True,
    input_tensor: Tensor = None,
    input_shape: Shape | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    **kwargs: Any,
) -> keras.Model:
    """EfficientNet, not modified.

    Example:
        >>> EfficientNet(0.2, 0.3, 32, classes=3).output_shape
        (None, 3)

    Args:
        width_coefficient: factor on all filters.
        depth_coefficient: factor on the repeats of each stage.
        default_size: height and width of the images, where ``input_shape`` is not given.
        dropout_rate: before the classifier.
        drop_connect_rate: at which the last residual branches are dropped.
        depth_divisor: of which all filters are multiples.
        activation_fn: of the network.
        blocks_args: the stages.
        model_name: name of the model.
        include_top: whether there is a classifier.
        input_tensor: a ``keras.Input`` to build on.
        input_shape: (H, W, channels); H and W may be None.
        pooling: "avg" or "max", or None for the feature map where there is no classifier.
        classes: outputs.
        **kwargs: none.

    Returns:
        The model, not compiled.

    Raises:
        NotImplementedError: for stages without a residual connection, or with another squeeze.
        ValueError: if an argument has no meaning.
    """
    no_more(kwargs)
    network = spec(
        "efficientnet_b0",
        width=width_coefficient,
        depth=depth_coefficient,
        input_shape=input_shape,
        default_size=default_size,
        include_top=include_top,
        pooling=pooling,
        classes=classes,
        dropout=dropout_rate,
        drop_connect=drop_connect_rate,
        activation=activation_name(activation_fn),
    )
    network = _recast(
        network, EfficientNetSpec, stages=_stages(blocks_args), divisor=_divisor(depth_divisor)
    )
    return build(network, input_tensor, model_name)


def _efficientnet(
    number: int, width: float, depth: float, size: int, dropout: float
) -> Callable[..., keras.Model]:
    """The constructor of a variant."""

    def constructor(
        include_top: bool = True,
        input_tensor: Tensor = None,
        input_shape: Shape | None = None,
        pooling: str | None = None,
        classes: int = 1000,
        dropout_rate: float = dropout,
        drop_connect_rate: float = 0.2,
        **kwargs: Any,
    ) -> keras.Model:
        return EfficientNet(
            width,
            depth,
            size,
            include_top=include_top,
            input_tensor=input_tensor,
            input_shape=input_shape,
            pooling=pooling,
            classes=classes,
            dropout_rate=dropout_rate,
            drop_connect_rate=drop_connect_rate,
            **{"model_name": f"efficientnet-b{number}", **kwargs},
        )

    constructor.__name__ = constructor.__qualname__ = f"EfficientNetB{number}"
    constructor.__doc__ = f":func:`EfficientNet` B{number}."
    return constructor


EfficientNetB0 = _efficientnet(0, 1.0, 1.0, 224, 0.2)
EfficientNetB1 = _efficientnet(1, 1.0, 1.1, 240, 0.2)
EfficientNetB2 = _efficientnet(2, 1.1, 1.2, 260, 0.3)
EfficientNetB3 = _efficientnet(3, 1.2, 1.4, 300, 0.3)
EfficientNetB4 = _efficientnet(4, 1.4, 1.8, 380, 0.4)
EfficientNetB5 = _efficientnet(5, 1.6, 2.2, 456, 0.4)
EfficientNetB6 = _efficientnet(6, 1.8, 2.6, 528, 0.5)
EfficientNetB7 = _efficientnet(7, 2.0, 3.1, 600, 0.5)


def kEfficientNet(
    width_coefficient: float,
    depth_coefficient: float,
    skip_stride_cnt: int = -1,
    dropout_rate: float = 0.2,
    drop_connect_rate: float = 0.2,
    depth_divisor: int = 8,
    activation_fn: ActivationFn = swish,
    blocks_args: list[dict[str, Any]] = DEFAULT_BLOCKS_ARGS,
    model_name: str = "efficientnet",
    include_top: bool = True,
    input_tensor: Tensor = None,
    input_shape: Shape | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    kType: KType = 2,
    concat_paths: bool = True,
    dropout_all_blocks: bool = False,
    name_prefix: str = "k_",
    **kwargs: Any,
) -> keras.Model:
    """kEffNet: EfficientNet with grouped pointwise convolutions.

    Example:
        >>> model = kEfficientNet(0.2, 0.3, skip_stride_cnt=3, classes=3, kType=[2, 32])
        >>> model.input_shape, model.output_shape
        ((None, None, None, 3), (None, 3))

    Args:
        width_coefficient: factor on all filters.
        depth_coefficient: factor on the repeats of each stage.
        skip_stride_cnt: for small images: from 0 on the stem has stride 1, and so have that
            many stages after it.
        dropout_rate: before the classifier.
        drop_connect_rate: at which the last residual branches are dropped.
        depth_divisor: of which all filters are multiples.
        activation_fn: of the network.
        blocks_args: the stages.
        model_name: name of the model.
        include_top: whether there is a classifier.
        input_tensor: a ``keras.Input`` to build on.
        input_shape: (H, W, channels); H and W may be None, and are without this argument.
        pooling: "avg" or "max", or None for the feature map where there is no classifier.
        classes: outputs.
        kType: the kType's number or name; a list makes parallel paths.
        concat_paths: whether parallel paths are concatenated, or else added.
        dropout_all_blocks: whether blocks without a residual connection are dropped too.
        name_prefix: of the layers' names.
        **kwargs: none.

    Returns:
        The model, not compiled.

    Raises:
        NotImplementedError: for stages without a residual connection, or with another squeeze, or
            a kType that is left out.
        ValueError: if an argument has no meaning.
    """
    no_more(kwargs)
    return _keffnet(
        "keffnet_b0",
        model_name,
        input_tensor,
        dropout_all_blocks,
        {
            "prefix": name_prefix,
            "stages": _stages(blocks_args),
            "divisor": _divisor(depth_divisor),
        },
        width=width_coefficient,
        depth=depth_coefficient,
        skip_stride_cnt=skip_stride_cnt,
        dropout=dropout_rate,
        drop_connect=drop_connect_rate,
        activation=activation_name(activation_fn),
        include_top=include_top,
        input_shape=input_shape or (None, None, 3),
        pooling=pooling,
        classes=classes,
        ktype=kType,
        concat_paths=concat_paths,
    )


def _kefficientnet(name: str, dropout: float) -> Callable[..., keras.Model]:
    """The constructor of a variant."""

    def constructor(
        include_top: bool = True,
        input_tensor: Tensor = None,
        input_shape: Shape | None = None,
        pooling: str | None = "avg",
        classes: int = 1000,
        kType: KType = 2,
        dropout_rate: float = dropout,
        drop_connect_rate: float = 0.2,
        skip_stride_cnt: int = -1,
        activation_fn: ActivationFn = swish,
        dropout_all_blocks: bool = False,
        **kwargs: Any,
    ) -> keras.Model:
        concat_paths = kwargs.pop("concat_paths", True)
        no_more(kwargs)
        return _keffnet(
            f"keffnet_{name.lower()}",
            f"kEffNet-{name.lower()}",
            input_tensor,
            dropout_all_blocks,
            {},
            skip_stride_cnt=skip_stride_cnt,
            dropout=dropout_rate,
            drop_connect=drop_connect_rate,
            activation=activation_name(activation_fn),
            include_top=include_top,
            input_shape=input_shape or (None, None, 3),
            pooling=pooling,
            classes=classes,
            ktype=kType,
            concat_paths=concat_paths,
        )

    constructor.__name__ = constructor.__qualname__ = f"kEfficientNet{name}"
    constructor.__doc__ = f":func:`kEfficientNet` {name}."
    return constructor


kEfficientNetS = _kefficientnet("S", 0.2)  # noqa: N816
kEfficientNetB0 = _kefficientnet("B0", 0.2)  # noqa: N816
kEfficientNetB1 = _kefficientnet("B1", 0.2)  # noqa: N816
kEfficientNetB2 = _kefficientnet("B2", 0.3)  # noqa: N816
kEfficientNetB3 = _kefficientnet("B3", 0.3)  # noqa: N816
kEfficientNetB4 = _kefficientnet("B4", 0.4)  # noqa: N816
kEfficientNetB5 = _kefficientnet("B5", 0.4)  # noqa: N816
kEfficientNetB6 = _kefficientnet("B6", 0.5)  # noqa: N816
kEfficientNetB7 = _kefficientnet("B7", 0.5)  # noqa: N816
_VARIANTS = (
    kEfficientNetB0,
    kEfficientNetB1,
    kEfficientNetB2,
    kEfficientNetB3,
    kEfficientNetB4,
    kEfficientNetB5,
    kEfficientNetB6,
    kEfficientNetB7,
)


def kEfficientNetBN(
    N: int = 0,
    include_top: bool = True,
    input_tensor: Tensor = None,
    input_shape: Shape | None = None,
    pooling: str | None = "avg",
    classes: int = 1000,
    kType: KType = 2,
    dropout_rate: float | None = None,
    drop_connect_rate: float = 0.2,
    skip_stride_cnt: int = -1,
    dropout_all_blocks: bool = False,
    **kwargs: Any,
) -> keras.Model:
    """The kEffNet of a number, B0 to B7; see :func:`kEfficientNet` for the other arguments.

    Example:
        >>> kEfficientNetBN(0, include_top=False).output_shape
        (None, 1280)

    Raises:
        ValueError: if N is none of 0 to 7.
    """
    if N not in range(len(_VARIANTS)):
        raise ValueError(f"N={N!r} is not from 0 to {len(_VARIANTS) - 1}")
    if dropout_rate is not None:
        kwargs["dropout_rate"] = dropout_rate
    return _VARIANTS[N](
        include_top,
        input_tensor,
        input_shape,
        pooling,
        classes,
        kType,
        drop_connect_rate=drop_connect_rate,
        skip_stride_cnt=skip_stride_cnt,
        dropout_all_blocks=dropout_all_blocks,
        **kwargs,
    )


def _keffnet(
    network: str,
    model_name: str,
    input_tensor: Tensor,
    dropout_all_blocks: bool,
    constants: dict[str, Any],
    **options: Any,
) -> keras.Model:
    kind = _DroppingAllBlocks if dropout_all_blocks else KEffNet
    keffnet = _recast(spec(network, default_size=224, **options), kind, **constants)
    return build(keffnet, input_tensor, model_name)


def _recast(network: Spec, kind: type[Spec], **constants: Any) -> Spec:
    """The spec as one of another kind, whose class has these constants."""
    options = {field.name: getattr(network, field.name) for field in fields(network)}
    return type(kind.__name__, (kind,), constants)(**options)


def _divisor(depth_divisor: int) -> int:
    if depth_divisor < 1:
        raise ValueError(f"depth_divisor={depth_divisor!r} is below 1")
    return depth_divisor


def _stages(blocks_args: list[dict[str, Any]]) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    for number, block in enumerate(blocks_args, start=1):
        filters_in = stages[-1].filters if stages else 32
        if block["filters_in"] != filters_in:
            raise ValueError(
                f"stage {number} of blocks_args has filters_in={block['filters_in']}, and what "
                f"comes before it {filters_in} filters"
            )
        refuse(
            "EfficientNet",
            id_skip=(block["id_skip"], True),
            se_ratio=(block["se_ratio"], 0.25),
        )
        stages.append(
            Stage(
                kernel_size=block["kernel_size"],
                repeats=block["repeats"],
                filters=block["filters_out"],
                expand_ratio=block["expand_ratio"],
                strides=block["strides"],
            )
        )
    return tuple(stages)


@dataclass(frozen=True, kw_only=True)
class _DroppingAllBlocks(KEffNet):
    """kEffNet that has drop-connect in blocks without a residual connection too."""

    def _block(
        self,
        g: GraphBuilder,
        x: str,
        prefix: str,
        stage: Stage,
        strides: int,
        drop_rate: float,
        pointwise: Pointwise,
    ) -> str:
        y = super()._block(g, x, prefix, stage, strides, drop_rate, pointwise)
        residual = strides == 1 and g.channels(x) == g.channels(y)
        if residual or drop_rate == 0:
            return y
        return g.dropout(f"{prefix}drop", y, drop_rate, per_sample=True)
