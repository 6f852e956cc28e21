"""Networks by name, also by timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kconv import models
from kconv._creating import Weights, create
from kconv._require import require
from kconv.torch.network import Network, build

__all__ = ["create_model", "register_timm"]


def create_model(
    name: str,
    *,
    ktype: str | int | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: Weights = None,
    **options: Any,
) -> Network:
    """A network by name, as timm's function of this name has it.

    Example:
        >>> import torch
        >>> model = create_model("keffnet_b0", num_classes=10, in_chans=1, image_size=32)
        >>> model(torch.randn(2, 1, 32, 32)).shape
        torch.Size([2, 10])

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
        The network, which ends in logits.

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


def register_timm() -> list[str]:
    """Enter the networks into timm's registry, each as "kconv_" and its name.

    ``import kconv.torch`` does so where timm has been imported before.

    Example:
        >>> import timm
        >>> names = register_timm()
        >>> names[0], len(names) == len(models.list_models())
        ('kconv_densenet_bc_l100', True)
        >>> model = timm.create_model("kconv_keffnet_b0", num_classes=10, ktype="D6_32ch")

    Returns:
        The names there.

    Raises:
        ImportError: timm is not installed.
    """
    registry = require("timm.models", "timm", "registering networks in timm")
    names = []
    for name in models.list_models():
        entry = _timm_entry(name)
        if not registry.is_model(entry.__name__):
            registry.register_model(entry)
        names.append(entry.__name__)
    return names


def _timm_entry(name: str) -> Callable[..., Network]:
    def make(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> Network:
        if pretrained:
            raise ValueError(
                f"pretrained=True: timm has no weights of kconv_{name}; weights= takes a name of "
                "kconv.list_weights(), a file or a folder"
            )
        if "img_size" in options:
            options["image_size"] = options.pop("img_size")
        return create_model(name, **options)

    make.__name__ = make.__qualname__ = f"kconv_{name}"
    return make
