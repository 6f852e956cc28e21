"""What all model specs share, and the registry that finds one by name."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from kconv._names import did_you_mean
from kconv.models.graph import Graph
from kconv.models.options import Check, ImageShape, Pooling, Whole


@cache
def _checks(spec: type[Spec]) -> dict[str, Check]:
    """The checks of a spec's fields."""
    hints = get_type_hints(spec, include_extras=True)
    return {
        name: get_args(hint)[1] for name, hint in hints.items() if get_origin(hint) is Annotated
    }


@dataclass(frozen=True, kw_only=True)
class Spec(ABC):
    """A network as data: its options, from which :meth:`graph` makes the layers.

    Attributes:
        name: the registry's name, such as "keffnet_b0".
        input_shape: (H, W, channels) of the images; H and W may be None (any size).
        classes: outputs of the softmax.
        include_top: whether the network ends in the classifier, or else in features.
        pooling: the global pooling of the features before the classifier; None, without a
            classifier, keeps the feature map.
    """

    name: str
    input_shape: ImageShape = (224, 224, 3)
    classes: Whole = 1000
    include_top: bool = True
    pooling: Pooling = "avg"

    def __post_init__(self) -> None:
        """Check the options and put them in their canonical form.

        Raises:
            ValueError: if one of them has no meaning.
            TypeError: if one of them is of the wrong type.
        """
        for name, check in _checks(type(self)).items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.include_top and self.pooling is None:
            raise ValueError("pooling=None: the classifier (include_top) needs 'avg' or 'max'")

    @abstractmethod
    def graph(self) -> Graph:
        """The network's layers."""


_REGISTRY: dict[str, tuple[type[Spec], dict[str, Any]]] = {}


def register(name: str, spec: type[Spec], **defaults: Any) -> None:
    """Enters a variant: the spec's class and the options that make it this variant."""
    _REGISTRY[name] = (spec, defaults)


def list_models() -> list[str]:
    """The names that :func:`create` knows, in alphabetical order.

    Example:
        >>> [name for name in list_models() if name.startswith("keffnet_b")][:2]
        ['keffnet_b0', 'keffnet_b1']
    """
    return sorted(_REGISTRY)


def create(name: str, /, **options: Any) -> Spec:
    """The spec of a network.

    Example:
        >>> spec = create("keffnet_b0", ktype="D6_16ch", classes=10, input_shape=(32, 32, 3))
        >>> spec.graph().output
        'k_probs'

    Args:
        name: one of :func:`list_models`.
        **options: fields of the network's spec class, in place of their defaults.

    Returns:
        The spec, a frozen dataclass.

    Raises:
        ValueError: if there is no such network, or an option has no meaning.
        TypeError: if the network has no such option.
    """
    if name not in _REGISTRY:
        known = list_models()
        close = did_you_mean(name, known)
        raise ValueError(f"unknown model {name!r}{close}; known are {', '.join(known)}")
    spec, defaults = _REGISTRY[name]
    known = [field.name for field in dataclasses.fields(spec) if field.name != "name"]
    unknown = [option for option in options if option not in known]
    if unknown:
        close = did_you_mean(unknown[0], known)
        raise TypeError(f"{name} has no option {unknown[0]!r}{close}; known are {', '.join(known)}")
    return spec(name=name, **{**defaults, **options})
