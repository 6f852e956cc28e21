"""Networks by name, under the arguments that all front ends' ``create_model`` have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kconv import models
from kconv._model_folder import CONFIG, read_config
from kconv.weights._finetune import load_pretrained

__all__ = ["create", "expect_spec"]

_DEFAULTS: dict[str, Any] = {"classes": 1000}
_SIZE, _CHANNELS = 224, 3


def create(
    build: Any,
    name: str,
    *,
    ktype: str | int | None,
    num_classes: int | None,
    in_chans: int | None,
    image_size: int | tuple[int, int] | None,
    weights: str | os.PathLike[str] | None,
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
        weights: a file, or the folder of a run, whose options are then those not given.
        options: further fields of the network's spec.

    Returns:
        The model.

    Raises:
        ValueError: an option makes no sense, or the weights are another network's.
        TypeError: the network has no such option.
    """
    known = dict(_DEFAULTS)
    size, channels = (_SIZE, _SIZE), _CHANNELS
    if weights is not None and (Path(weights) / CONFIG).is_file():
        run = read_config(Path(weights)).network
        if isinstance(run, models.Spec) and run.name == name:
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
        load_pretrained(model, Path(weights), spec.graph())
    return model


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
