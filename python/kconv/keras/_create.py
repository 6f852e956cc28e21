"""Networks by name."""

from __future__ import annotations

from typing import Any

import keras

from kconv._creating import Weights, create
from kconv.keras.builder import build

__all__ = ["create_model"]


def create_model(
    name: str,
    *,
    ktype: str | int | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: Weights = None,
    **options: Any,
) -> keras.Model:
    """A network by name, under the arguments of ``kconv.torch.create_model``.

    Example:
        >>> create_model("keffnet_b0", num_classes=10, in_chans=1, image_size=32).output_shape
        (None, 10)

    Args:
        name: of :func:`kconv.list_models`.
        ktype: kind of pointwise convolution, its name or its number; by default the network's own.
        num_classes: outputs of the classifier, by default 1000.
        in_chans: channels of the images, by default 3.
        image_size: height and width of the images, on which paddings depend; by default 224.
        weights: a name of :func:`kconv.list_weights` ("cifar10" for this network's trained on it),
            a file that :func:`kconv.load_weights` reads, or the folder of a run; a run's options
            are then the defaults of the other arguments. Where the number of classes is another
            one, the classifier starts anew.
        **options: further fields of the network's spec (see :mod:`kconv.models`).

    Returns:
        The model, which ends in a softmax.

    Raises:
        ValueError: an option makes no sense, or the weights are of another network.
        TypeError: the network has no such option.
    """
    return create(
        build,
        name,
        ktype=ktype,
        num_classes=num_classes,
        in_chans=in_chans,
        image_size=image_size,
        weights=weights,
        options=options,
    )
