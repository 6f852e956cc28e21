"""Types of the specs' options.

Each carries its check: called with the option's name and a value it returns the value's canonical
form, raises ValueError if the value has no meaning, and TypeError if it is of the wrong type.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Annotated, Any, Literal

from kconv import ktypes
from kconv.models.activations import FUSED_ACTIVATIONS, ActivationName
from kconv.models.graph import Shape

Check = Callable[[str, Any], Any]


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} is not a whole number") from None


def _whole(name: str, value: Any) -> int:
    number = _integer(name, value)
    if number < 1:
        raise ValueError(f"{name}={number} is below 1")
    return number


def _number(name: str, value: Any) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is not a number")
    return float(value)


def _factor(name: str, value: Any) -> float:
    if not 0 < _number(name, value) < math.inf:
        raise ValueError(f"{name}={value!r} is not above 0, and finite")
    return float(value)


def _rate(name: str, value: Any) -> float:
    if not 0 <= _number(name, value) < 1:
        raise ValueError(f"{name}={value!r} is not a rate from 0 to below 1")
    return float(value)


def _one_of(*choices: str | None) -> Check:
    def check(name: str, value: Any) -> Any:
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
        return value

    return check


def _ktype(name: str, value: Any) -> str:
    try:
        return ktypes.resolve(value).name
    except TypeError:
        raise TypeError(f"{name}={value!r} is neither a kType's name nor its number") from None


def _optional_ktype(name: str, value: Any) -> str | None:
    return None if value is None else _ktype(name, value)


def _ktype_paths(name: str, value: Any) -> str | tuple[str, ...]:
    if not isinstance(value, list | tuple):
        return _ktype(name, value)
    if not value:
        raise ValueError(f"{name}={value!r}: parallel paths need at least one kType")
    return tuple(_ktype(name, path) for path in value)


def _image_shape(name: str, value: Any) -> Shape:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"{name}={value!r} is not (height, width, channels)")
    height, width = (
        None if size is None else _whole(f"{name}[{axis}]", size)
        for axis, size in enumerate(value[:2])
    )
    return height, width, _whole(f"{name}[2]", value[2])


Integer = Annotated[int, _integer]
Whole = Annotated[int, _whole]
Factor = Annotated[float, _factor]
Rate = Annotated[float, _rate]
ImageShape = Annotated[Shape, _image_shape]
Pooling = Annotated[Literal["avg", "max"] | None, _one_of("avg", "max", None)]
ModelSize = Annotated[Literal["large", "small"], _one_of("large", "small")]
Elementwise = Annotated[ActivationName, _one_of(*FUSED_ACTIVATIONS)]
KTypeOption = Annotated[str | int, _ktype]
OptionalKType = Annotated[str | int | None, _optional_ktype]
KTypePaths = Annotated[str | int | Sequence[str | int], _ktype_paths]
