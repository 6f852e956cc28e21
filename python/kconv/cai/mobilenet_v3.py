"""The original's ``mobilenet_v3``: MobileNet V3 and kMobileNet V3, Large and Small."""
# ruff: noqa: N803 - the original's names

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from kconv.cai._networks import build, no_more, spec, with_weights

Tensor = Any
Shape = tuple[int | None, ...]


def _mobilenet_v3(size: str) -> Callable[..., keras.Model]:
    """The constructor of MobileNet V3."""

    def constructor(
        input_shape: Shape | None = None,
        alpha: float = 1.0,
        minimalistic: bool = False,
        include_top: bool = True,
        weights: str | None = "imagenet",
        input_tensor: Tensor = None,
        classes: int = 1000,
        pooling: str | None = None,
        dropout_rate: float = 0.2,
        **kwargs: Any,
    ) -> keras.Model:
        no_more(kwargs)
        network = spec(
            f"mobilenet_v3_{size.lower()}",
            input_shape=input_shape,
            default_size=224,
            include_top=include_top,
            pooling=pooling,
            classes=classes,
            alpha=alpha,
            minimalistic=minimalistic,
            dropout=dropout_rate,
        )

        def donor() -> keras.Model:
            application = getattr(keras.applications, f"MobileNetV3{size}")
            return application(
                network.input_shape,
                alpha,
                minimalistic,
                include_top=include_top,
                include_preprocessing=False,
            )

        model = build(network, input_tensor, f"MobilenetV3{size.lower()}")
        return with_weights(model, weights, donor)

    constructor.__name__ = constructor.__qualname__ = f"MobileNetV3{size}"
    constructor.__doc__ = f"""MobileNet V3 {size}, not modified.

    Args:
        input_shape: (H, W, channels); H and W may be None.
        alpha: factor on all filters.
        minimalistic: without squeeze and excite, hard swish and 5x5 kernels.
        include_top: whether there is a classifier.
        weights: a file to load, "imagenet" for those of Keras's own application, or None.
        input_tensor: a ``keras.Input`` to build on.
        classes: outputs.
        pooling: "avg" or "max", or None for the feature map where there is no classifier.
        dropout_rate: before the classifier.
        **kwargs: none.

    Returns:
        The model, not compiled.

    Raises:
        ValueError: if an argument has no meaning, or the weights do not fit.
    """
    return constructor


def _kmobilenet_v3(size: str) -> Callable[..., keras.Model]:
    """The constructor of kMobileNet V3."""

    def constructor(
        input_shape: Shape | None = None,
        alpha: float = 1.0,
        minimalistic: bool = False,
        include_top: bool = True,
        input_tensor: Tensor = None,
        classes: int = 1000,
        pooling: str | None = None,
        dropout_rate: float = 0.2,
        kType: int | str = 0,
        **kwargs: Any,
    ) -> keras.Model:
        no_more(kwargs)
        network = spec(
            f"kmobilenet_v3_{size.lower()}",
            input_shape=input_shape,
            default_size=224,
            include_top=include_top,
            pooling=pooling,
            classes=classes,
            alpha=alpha,
            minimalistic=minimalistic,
            dropout=dropout_rate,
            ktype=kType,
        )
        return build(network, input_tensor, f"kMobilenetV3{size.lower()}-{kType}")

    constructor.__name__ = constructor.__qualname__ = f"kMobileNetV3{size}"
    constructor.__doc__ = f"""MobileNet V3 {size} with grouped pointwise convolutions.

    Args:
        input_shape: as in :func:`MobileNetV3{size}`, and so are the other arguments.
        alpha: factor on all filters.
        minimalistic: without squeeze and excite, hard swish and 5x5 kernels.
        include_top: whether there is a classifier.
        input_tensor: a ``keras.Input`` to build on.
        classes: outputs.
        pooling: "avg" or "max", or None for the feature map where there is no classifier.
        dropout_rate: before the classifier.
        kType: the kType's number or name.
        **kwargs: none.

    Returns:
        The model, not compiled.

    Raises:
        NotImplementedError: for a kType that is left out.
        ValueError: if an argument has no meaning.
    """
    return constructor


MobileNetV3Small = _mobilenet_v3("Small")
MobileNetV3Large = _mobilenet_v3("Large")
kMobileNetV3Small = _kmobilenet_v3("Small")  # noqa: N816
kMobileNetV3Large = _kmobilenet_v3("Large")  # noqa: N816
