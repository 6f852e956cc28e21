"""The original's ``mobilenet``: MobileNet and kMobileNet."""
# ruff: noqa: N802, N803 - the original's names

from __future__ import annotations

from typing import Any

import keras

from kconv.cai._networks import (
    ActivationFn,
    activation_name,
    build,
    no_more,
    refuse,
    spec,
    with_weights,
)

Tensor = Any
Shape = tuple[int | None, ...]


def MobileNet(
    input_shape: Shape | None = None,
    alpha: float = 1.0,
    depth_multiplier: int = 1,
    dropout: float = 0.001,
    include_top: bool = True,
    weights: str | None = None,
    input_tensor: Tensor = None,
    pooling: str | None = None,
    classes: int = 1000,
    **kwargs: Any,
) -> keras.Model:
    """MobileNet, not modified.

    Example:
        >>> MobileNet((32, 32, 3), alpha=0.25, classes=10).output_shape
        (None, 10)

    Args:
        input_shape: (H, W, channels); H and W may be None.
        alpha: factor on all filters.
        depth_multiplier: outputs of a depthwise convolution per channel.
        dropout: rate before the classifier.
        include_top: whether there is a classifier.
        weights: a file to load, "imagenet" for those of Keras's own application, or None.
        input_tensor: a ``keras.Input`` to build on.
        pooling: "avg" or "max", or None for the feature map where there is no classifier.
        classes: outputs.
        **kwargs: none.

    Returns:
        The model, not compiled.

    Raises:
        ValueError: if an argument has no meaning, or the weights do not fit.
    """
    no_more(kwargs)
    network = spec(
        "mobilenet",
        input_shape=input_shape,
        default_size=224,
        include_top=include_top,
        pooling=pooling,
        classes=classes,
        alpha=alpha,
        depth_multiplier=depth_multiplier,
        dropout=dropout,
    )

    def donor() -> keras.Model:
        return keras.applications.MobileNet(
            network.input_shape, alpha, depth_multiplier, include_top=include_top
        )

    return with_weights(build(network, input_tensor, "mobilenetv1"), weights, donor)


def kMobileNet(
    input_shape: Shape | None = None,
    alpha: float = 1.0,
    depth_multiplier: int = 1,
    dropout: float = 0.001,
    include_top: bool = True,
    weights: str | None = None,
    input_tensor: Tensor = None,
    pooling: str | None = None,
    classes: int = 1000,
    conv1_activation: ActivationFn = keras.activations.swish,
    d_separable_activation: ActivationFn = keras.activations.swish,
    activation: ActivationFn = keras.activations.swish,
    kType: int | str = 0,
    l_ratio: float = 0.0,
    ab_ratio: float = 0.0,
    skip_stride_cnt: int = -1,
) -> keras.Model:
    """kMobileNet: MobileNet with grouped pointwise convolutions.

    Example:
        >>> kMobileNet((None, None, 3), alpha=0.25, classes=10, kType=13).output_shape
        (None, 10)

    Args:
        input_shape: (H, W, channels); H and W may be None.
        alpha: factor on all filters.
        depth_multiplier: outputs of a depthwise convolution per channel.
        dropout: rate before the classifier.
        include_top: whether there is a classifier.
        weights: a file to load, or None.
        input_tensor: a ``keras.Input`` to build on.
        pooling: "avg" or "max", or None for the feature map where there is no classifier.
        classes: outputs.
        conv1_activation: after the stem; None is relu6.
        d_separable_activation: after the depthwise convolutions; None is relu6.
        activation: after the pointwise convolutions.
        kType: the kType's number or name.
        l_ratio: 0, as there are no two-path networks in kconv.
        ab_ratio: likewise.
        skip_stride_cnt: for small images: from 0 on the stem has stride 1, and so have that
            many of the blocks that halve the image, the first ones.

    Returns:
        The model, not compiled.

    Raises:
        NotImplementedError: for two paths, or a kType that is left out.
        ValueError: if an argument has no meaning, or the weights do not fit.
    """
    refuse("kMobileNet", l_ratio=(l_ratio, 0.0), ab_ratio=(ab_ratio, 0.0))
    network = spec(
        "kmobilenet",
        input_shape=input_shape,
        default_size=224,
        include_top=include_top,
        pooling=pooling,
        classes=classes,
        alpha=alpha,
        depth_multiplier=depth_multiplier,
        dropout=dropout,
        conv1_activation=activation_name(conv1_activation, "relu6"),
        d_separable_activation=activation_name(d_separable_activation, "relu6"),
        activation=activation_name(activation),
        ktype=kType,
        skip_stride_cnt=skip_stride_cnt,
    )
    return with_weights(build(network, input_tensor, f"kmobilenetv1-{kType}"), weights)
