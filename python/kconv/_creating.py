"""Networks by name, under the arguments that all front ends' ``create_model`` have."""

from __future__ import annotations

import os
from typing import Any

from kconv import models
from kconv._model_folder import CONFIG, read_config
from kconv._published import find_network
from kconv.weights._finetune import load_pretrained

__all__ = ["Weights", "create", "expect_spec", "fill_network"]

Weights = str | os.PathLike[str] | None

_DEFAULTS: dict[str, Any] = {"classes": 1000}
_SIZE, _CHANNELS = 224, 3
_MAY_DIFFER = frozenset({"classes", "input_shape", "skip_stride_cnt", "dropout", "drop_connect"})
"""Options of a spec with which weights of another network are still its own."""


def create(
    build: Any,
    name: str,
    *,
    ktype: str | int | None,
    num_classes: int | None,
    in_chans: int | None,
    image_size: int | tuple[int, int] | None,
    weights: Weights,
    options: dict[str, Any],
) -> Any:
    """Build a network by name, and fill it.

    Args:
        build: makes a model of a spec.
        name: of a network.
        ktype: None for the network's own, or the run's.
        num_classes: likewise; 1000 without a run.
        in_chans: likewise; 3 without a run.
        image_size: likewise; 224 without a run.
        weights: a name of :func:`kconv.list_weights`, a file, or the folder of a run; a run's
            options are then those not given.
        options: further fields of the network's spec.

    Returns:
        The model.

    Raises:
        ValueError: an option makes no sense, or the weights are another network's.
        TypeError: the network has no such option, or one is given by two names.
    """
    _expect_one_name("classes", options, num_classes=num_classes)
    _expect_one_name("input_shape", options, in_chans=in_chans, image_size=image_size)
    known = dict(_DEFAULTS)
    size, channels = (_SIZE, _SIZE), _CHANNELS
    run = None if weights is None else _spec_of(weights, name)
    if run is not None and run.name == name:
        known = {field: value for field, value in vars(run).items() if field != "name"}
        *size, channels = known.pop("input_shape")
    if image_size is not None:
        size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    given = {"ktype": ktype, "classes": num_classes}
    known |= {field: value for field, value in given.items() if value is not None}
    shape = (*size, channels if in_chans is None else in_chans)
    spec = models.create(name, **{**known, "input_shape": shape, **options})
    model = build(spec)
    if weights is not None:
        fill_network(model, spec, weights)
    return model


def _expect_one_name(field: str, options: dict[str, Any], **given: Any) -> None:
    """See that a field of the spec is not given beside an argument that sets it, too."""
    twice = [name for name, value in given.items() if field in options and value is not None]
    if twice:
        raise TypeError(
            f"{field}={options[field]!r} and {twice[0]}={given[twice[0]]!r}, expected one"
        )


def fill_network(model: Any, spec: models.Spec, weights: str | os.PathLike[str]) -> bool:
    """Fill a model of a spec; its classifier stays as it is where the classes are others.

    Args:
        model: of any front end.
        spec: what it was built of.
        weights: a name of :func:`kconv.list_weights`, a file, or the folder of a run.

    Returns:
        Whether the classifier has been filled, too.

    Raises:
        ValueError: the weights are another network's, or their file is damaged.
        OSError: there are none, or they cannot be read.
        ImportError: the file's format needs a package that is not installed.
    """
    run = _spec_of(weights, spec.name)
    if run is not None and type(run) is type(spec):
        for option, value in vars(run).items():
            own = getattr(spec, option)
            if option not in _MAY_DIFFER | {"name"} and own != value:
                raise ValueError(
                    f"the weights of {weights} are of a {run.name} with {option}={value!r}, the "
                    f"model is a {spec.name} with {option}={own!r}"
                )
    return load_pretrained(model, find_network(weights, spec.name), spec.graph())


def _spec_of(weights: str | os.PathLike[str], name: str) -> models.Spec | None:
    """What the network of a run was made of, where the weights are those of one."""
    path = find_network(weights, name)
    if not (path / CONFIG).is_file():
        return None
    network = read_config(path).network
    return network if isinstance(network, models.Spec) else None


def expect_spec(spec: object, front_end: str) -> None:
    """Say what to do with what is no spec.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(spec, models.Spec):
        hint = f": kconv.{front_end}.create_model({spec!r}) builds by name"
        raise TypeError(
            f"spec is a {type(spec).__name__}, expected what kconv.models.create makes"
            + (hint if isinstance(spec, str) else "")
        )
