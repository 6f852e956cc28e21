"""From the original's arguments to kconv's specs and Keras models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import keras

import kconv.keras
from kconv.cai._convolutions import check_ktype
from kconv.models import Spec, create
from kconv.models.activations import FUSED_ACTIVATIONS, SYNONYMS
from kconv.weights import load_weights

Tensor = Any
ActivationFn = str | Callable[[Tensor], Tensor] | None


def activation_name(function: ActivationFn, default: str = "relu") -> str:
    """The name that specs have for an activation; the ``default`` stands for None.

    Raises:
        ValueError: if specs do not have it.
    """
    if function is None:
        return default
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    known = SYNONYMS.get(name.lower())
    if known not in FUSED_ACTIVATIONS:
        raise ValueError(
            f"unknown activation {function!r}; known are {', '.join(FUSED_ACTIVATIONS)}"
        )
    return known


def refuse(described: str, **arguments: tuple[Any, Any]) -> None:
    """Raise for arguments, given as (value, default), that differ from their default.

    Raises:
        NotImplementedError: naming the first such argument.
    """
    for name, (value, default) in arguments.items():
        if value != default:
            raise NotImplementedError(f"{described} of kconv has no {name}={value!r}")


def no_more(arguments: Mapping[str, Any]) -> None:
    """Raise if there are arguments that nobody knows.

    Raises:
        TypeError: naming the first.
    """
    for name in arguments:
        raise TypeError(f"unexpected argument {name!r}")


def spec(
    network: str,
    *,
    input_shape: tuple[int | None, ...] | None,
    default_size: int,
    include_top: bool,
    pooling: str | None,
    classes: int,
    **options: Any,
) -> Spec:
    """The spec of a network, with the original's defaults for the input and the pooling.

    Without ``input_shape`` the images have the default size, or any if there is no classifier.
    """
    size = default_size if include_top else None
    if "ktype" in options:
        check_ktype(options["ktype"])
    return create(
        network,
        input_shape=input_shape or (size, size, 3),
        include_top=include_top,
        pooling=pooling or ("avg" if include_top else None),
        classes=classes,
        **options,
    )


def build(network: Spec, input_tensor: Tensor = None, name: str | None = None) -> keras.Model:
    """The Keras model of a spec, on an input of its own or on a given ``keras.Input``.

    Raises:
        ValueError: if ``input_tensor`` comes from anything else.
    """
    if input_tensor is not None:
        network = replace(network, input_shape=tuple(input_tensor.shape[1:]))
    if name is not None:
        network = replace(network, name=name)
    model = kconv.keras.build(network)
    if input_tensor is None:
        return model
    clone = keras.models.clone_model(model, input_tensors=input_tensor)
    if clone.inputs[0] is not input_tensor:
        raise ValueError("input_tensor is not a keras.Input; apply the model to it instead")
    return clone


def with_weights(
    model: keras.Model, weights: str | None, donor: Callable[[], keras.Model] | None = None
) -> keras.Model:
    """The model with the weights of a file, or "imagenet" those of Keras's own application.

    Raises:
        ValueError: if the donor's weights are of other shapes, or there is no such file.
    """
    if weights == "imagenet" and donor is not None:
        model.set_weights(donor().get_weights())
    elif weights is not None:
        load_weights(model, weights)
    return model
