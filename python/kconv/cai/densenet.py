"""The original's ``densenet``: DenseNet-BC and kDenseNet-BC."""
# ruff: noqa: N803 - the original's names

from __future__ import annotations

from typing import Any

import keras

from kconv.cai._networks import ActivationFn, activation_name, build, refuse, spec
from kconv.cai.datasets import train_model_on_dataset
from kconv.models import Spec

Shape = tuple[int | None, ...]


def lrscheduler(epoch: int) -> float:
    """The learning rate of an epoch: 0.1, from epoch 150 on 0.01, from 225 on 0.001.

    Example:
        >>> [lrscheduler(epoch) for epoch in (149, 150, 225)]
        [0.1, 0.01, 0.001]
    """
    return _falling(epoch, 0.1, 150, 225)


def smooth_lrscheduler(epoch: int) -> float:
    """A tenth of :func:`lrscheduler`.

    Example:
        >>> [smooth_lrscheduler(epoch) for epoch in (149, 150, 225)]
        [0.01, 0.001, 0.0001]
    """
    return _falling(epoch, 0.01, 150, 225)


def cyclical_lrscheduler(epoch: int) -> float:
    """Cycles of 100 epochs: 0.1, from the 50th on 0.01, from the 75th on 0.001.

    Example:
        >>> [cyclical_lrscheduler(epoch) for epoch in (49, 50, 75, 100)]
        [0.1, 0.01, 0.001, 0.1]
    """
    return _falling(epoch % 100, 0.1, 50, 75)


def cyclical_smooth_lrscheduler(epoch: int) -> float:
    """A tenth of :func:`cyclical_lrscheduler`.

    Example:
        >>> [cyclical_smooth_lrscheduler(epoch) for epoch in (49, 50, 75, 100)]
        [0.01, 0.001, 0.0001, 0.01]
    """
    return _falling(epoch % 100, 0.01, 50, 75)


def _falling(epoch: int, rate: float, second: int, third: int) -> float:
    """The rate, its tenth from the second epoch given on, its hundredth from the third on."""
    if epoch < second:
        return rate
    return rate / 10 if epoch < third else rate / 100


def simple_densenet(
    pinput_shape: Shape,
    blocks: int = 6,
    growth_rate: int = 12,
    bottleneck: int = 48,
    compression: float = 0.5,
    l2_decay: float = 0.000001,
    num_classes: int = 10,
    extra_compression: bool = False,
    dropout_rate: float = 0.0,
    first_conv_filters: int = 24,
) -> keras.Model:
    """DenseNet-BC, not modified: three dense blocks.

    Example:
        >>> simple_densenet((32, 32, 3), blocks=2).output_shape
        (None, 10)

    Args:
        pinput_shape: (H, W, channels); H and W may be None.
        blocks: layers of each dense block.
        growth_rate: channels that each of them adds.
        bottleneck: channels of its pointwise convolution.
        compression: factor on the channels at transitions.
        l2_decay: of the convolutions' kernels.
        num_classes: outputs.
        extra_compression: not in kconv.
        dropout_rate: after each convolution but the first.
        first_conv_filters: channels of the first convolution.

    Returns:
        The model, not compiled.

    Raises:
        NotImplementedError: for an extra compression.
        ValueError: if an argument has no meaning.
    """
    refuse("simple_densenet", extra_compression=(extra_compression, False))
    network = spec(
        "densenet_bc_l100",
        **_options(pinput_shape, num_classes),
        blocks=blocks,
        growth_rate=growth_rate,
        bottleneck=bottleneck,
        compression=compression,
        dropout=dropout_rate,
        first_conv_filters=first_conv_filters,
    )
    return _decaying(network, l2_decay)


def ksimple_densenet(
    pinput_shape: Shape,
    blocks: int = 6,
    growth_rate: int = 12,
    bottleneck: int = 48,
    compression: float = 0.5,
    l2_decay: float = 0.000001,
    num_classes: int = 10,
    extra_compression: bool = False,
    dropout_rate: float = 0.0,
    kTypeBlock: int | str = 0,
    kTypeTransition: int | str = 13,
    first_conv_filters: int = 24,
    activation: ActivationFn = keras.activations.swish,
    has_interleave_at_transition: bool = False,
) -> keras.Model:
    """kDenseNet-BC: DenseNet-BC with grouped pointwise convolutions.

    Example:
        >>> ksimple_densenet((32, 32, 3), blocks=2, kTypeBlock=40).output_shape
        (None, 10)

    Args:
        pinput_shape: as in :func:`simple_densenet`, and so are the arguments not named here.
        blocks: layers of each dense block.
        growth_rate: channels that each of them adds.
        bottleneck: channels of its pointwise convolution.
        compression: factor on the channels at transitions.
        l2_decay: of the convolutions' kernels.
        num_classes: outputs.
        extra_compression: not in kconv.
        dropout_rate: after each convolution but the first.
        kTypeBlock: number or name of the kType in the dense blocks.
        kTypeTransition: number or name of the kType at the transitions.
        first_conv_filters: channels of the first convolution.
        activation: of the network.
        has_interleave_at_transition: whether the channels that the layers of a block have added
            are interleaved before its transition.

    Returns:
        The model, not compiled.

    Raises:
        NotImplementedError: for an extra compression, or a kType that is left out.
        ValueError: if an argument has no meaning.
    """
    refuse("ksimple_densenet", extra_compression=(extra_compression, False))
    network = spec(
        "kdensenet_bc_l100",
        **_options(pinput_shape, num_classes),
        blocks=blocks,
        growth_rate=growth_rate,
        bottleneck=bottleneck,
        compression=compression,
        dropout=dropout_rate,
        first_conv_filters=first_conv_filters,
        ktype=kTypeBlock,
        ktype_transition=kTypeTransition,
        activation=activation_name(activation),
        interleave_at_transition=has_interleave_at_transition,
    )
    return _decaying(network, l2_decay)


def train_simple_densenet_on_dataset(
    base_model_name: str,
    dataset: Any,
    input_shape: Shape,
    blocks: int = 6,
    growth_rate: int = 12,
    bottleneck: int = 48,
    compression: float = 0.5,
    l2_decay: float = 0.00001,
    batch_size: int = 64,
    epochs: int = 300,
) -> tuple[keras.callbacks.History, str, str]:
    """Train a :func:`simple_densenet` for 10 classes, its learning rate by :func:`lrscheduler`.

    Example:
        >>> from keras.datasets import mnist
        >>> fit_result, best_model, _ = train_simple_densenet_on_dataset(
        ...     "best", mnist, (28, 28, 1), blocks=2, epochs=3)  # doctest: +SKIP

    Args:
        base_model_name: what the files' names begin with.
        dataset: of 10 classes; see :func:`kconv.cai.datasets.load_dataset`.
        input_shape: (H, W, channels) of its images.
        blocks: layers of each dense block.
        growth_rate: channels that each of them adds.
        bottleneck: channels of its pointwise convolution.
        compression: factor on the channels at transitions.
        l2_decay: of the convolutions' kernels.
        batch_size: images in a batch.
        epochs: how many.

    Returns:
        As :func:`kconv.cai.datasets.train_model_on_dataset`.

    Raises:
        ValueError: if the data set has not 10 classes, or an argument has no meaning.
    """
    model = simple_densenet(
        input_shape, blocks, growth_rate, bottleneck, compression, l2_decay, num_classes=10
    )
    return train_model_on_dataset(model, dataset, base_model_name, lrscheduler, batch_size, epochs)


def train_simple_densenet_on_cifar10(
    base_model_name: str,
    blocks: int = 6,
    growth_rate: int = 12,
    bottleneck: int = 48,
    compression: float = 0.5,
    l2_decay: float = 0.00001,
    batch_size: int = 64,
    epochs: int = 300,
) -> tuple[keras.callbacks.History, str, str]:
    """:func:`train_simple_densenet_on_dataset` with CIFAR-10, which is downloaded."""
    return train_simple_densenet_on_dataset(
        base_model_name,
        keras.datasets.cifar10,
        (32, 32, 3),
        blocks,
        growth_rate,
        bottleneck,
        compression,
        l2_decay,
        batch_size,
        epochs,
    )


def _options(input_shape: Shape, classes: int) -> dict[str, Any]:
    return {
        "input_shape": input_shape,
        "default_size": 32,
        "include_top": True,
        "pooling": "avg",
        "classes": classes,
    }


def _decaying(network: Spec, l2_decay: float) -> keras.Model:
    """The network, with L2 regularizers on the convolutions' kernels."""
    model = build(network)
    for layer in model.layers:
        if l2_decay and isinstance(layer, keras.layers.Conv2D):
            layer.kernel_regularizer = layer.kernel.regularizer = keras.regularizers.L2(l2_decay)
    return model
