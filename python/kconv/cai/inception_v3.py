"""The original's ``inception_v3``: Inception V3 and kInception V3."""
# ruff: noqa: N802, N803 - the original's names

from __future__ import annotations

from typing import Any

import keras

from kconv.cai._networks import build, no_more, refuse, spec, with_weights

Tensor = Any
Shape = tuple[int | None, ...]

LAST_MIXED = 10
"""The network's last module."""


def InceptionV3(
    include_top: bool = True,
    weights: str | None = "imagenet",
    input_tensor: Tensor = None,
    input_shape: Shape | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    **kwargs: Any,
) -> keras.Model:
    """Inception V3, not modified.

    Example:
        >>> InceptionV3(weights=None, include_top=False).output_shape
        (None, None, None, 2048)

    Args:
        include_top: whether there is a classifier.
        weights: a file to load, "imagenet" for those of Keras's own application, or None.
        input_tensor: a ``keras.Input`` to build on.
        input_shape: (H, W, channels); H and W may be None.
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
        "inception_v3",
        input_shape=input_shape,
        default_size=299,
        include_top=include_top,
        pooling=pooling,
        classes=classes,
    )

    def donor() -> keras.Model:
        return keras.applications.InceptionV3(
            include_top, input_shape=network.input_shape, pooling=pooling
        )

    return with_weights(build(network, input_tensor), weights, donor)


def two_path_inception_v3(
    include_top: bool = True,
    weights: str | None = None,
    input_shape: Shape = (224, 224, 3),
    pooling: str | None = None,
    classes: int = 1000,
    two_paths_partial_first_block: int = 0,
    two_paths_first_block: bool = False,
    two_paths_second_block: bool = False,
    deep_two_paths: bool = False,
    deep_two_paths_compression: float = 0.655,
    deep_two_paths_bottleneck_compression: float = 0.5,
    l_ratio: float = 0.5,
    ab_ratio: float = 0.5,
    max_mix_idx: int = 10,
    max_mix_deep_two_paths_idx: int = -1,
    model_name: str = "two_path_inception_v3",
    kType: int | str = 0,
    **kwargs: Any,
) -> keras.Model:
    """The kInception V3 network, which this function gives without two paths.

    Example:
        >>> model = two_path_inception_v3(include_top=False, max_mix_idx=3, kType=13)
        >>> model.output_shape
        (None, 12, 12, 768)

    Args:
        include_top: whether there is a classifier.
        weights: a file to load, or None.
        input_shape: (H, W, channels); H and W may be None.
        pooling: "avg" or "max", or None for the feature map where there is no classifier.
        classes: outputs.
        two_paths_partial_first_block: 0, as there are no two-path networks in kconv.
        two_paths_first_block: False.
        two_paths_second_block: False.
        deep_two_paths: False.
        deep_two_paths_compression: of no effect without ``deep_two_paths``.
        deep_two_paths_bottleneck_compression: likewise.
        l_ratio: of no effect without two paths.
        ab_ratio: likewise.
        max_mix_idx: the last module, from 0 to 10.
        max_mix_deep_two_paths_idx: of no effect without ``deep_two_paths``.
        model_name: name of the model.
        kType: the kType's number or name.
        **kwargs: none.

    Returns:
        The model, not compiled.

    Raises:
        NotImplementedError: for two paths, or a kType that is left out.
        ValueError: if an argument has no meaning, or the weights do not fit.
    """
    no_more(kwargs)
    refuse(
        "two_path_inception_v3",
        two_paths_partial_first_block=(two_paths_partial_first_block, 0),
        two_paths_first_block=(two_paths_first_block, False),
        two_paths_second_block=(two_paths_second_block, False),
        deep_two_paths=(deep_two_paths, False),
    )
    if max_mix_idx not in range(LAST_MIXED + 1):
        raise ValueError(f"max_mix_idx={max_mix_idx!r} is not from 0 to {LAST_MIXED}")
    network = spec(
        "kinception_v3",
        input_shape=input_shape,
        default_size=224,
        include_top=False,
        pooling=None,
        classes=classes,
        ktype=kType,
    )
    features = build(network)
    x = features.get_layer(f"mixed{max_mix_idx}").output
    if pooling == "max":
        x = keras.layers.GlobalMaxPooling2D(name="max_pool")(x)
    elif pooling == "avg" or include_top:
        x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    if include_top:
        x = keras.layers.Dense(classes, activation="softmax", name="predictions")(x)
    return with_weights(keras.Model(features.input, x, name=model_name), weights)
