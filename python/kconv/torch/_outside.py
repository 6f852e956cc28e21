"""What the code of forwards reads that is in no module, and whether it still is what it was.

That is globals, attributes of classes and of other objects, and variables of the functions round a
function. Python's compiler notes the names that a function uses, and what it may call is found
under these names: rather too much than too little is looked at.
"""

from __future__ import annotations

import random
import sys
import types
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache, partial
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["GENERATORS", "Outside", "frozen", "members", "refill"]

GENERATORS = random.Random, torch.Generator, np.random.Generator, np.random.RandomState
_LIBRARIES = frozenset({"torch", "numpy", "kconv", "builtins"}) | sys.stdlib_module_names
"""Packages whose functions are what they are."""
_MOVING = frozenset({"os", "time", "datetime", "secrets", "uuid"})
"""Modules whose functions tell something else at each call."""


class Outside:
    """What the forwards of modules may read outside of them.

    Args:
        modules: whose forwards are followed.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.names: set[str] = set()
        self._seen: dict[tuple[int, type], str | None] = {}
        self._kept: list[Any] = []  # so that no id is given to something else
        self._places: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._cells: dict[int, tuple[Any, Any]] = {}
        self._mutable: dict[int, Any] = {}
        self._reasons: dict[nn.Module, str] = {}
        for module in modules:
            if reason := self._of_module(module):
                self._reasons[module] = reason
        values = list(self._mutable.values())
        self._frozen = [(value, frozen(value, self.names)) for value in values]
        self._copies = [(v, type(v)(v)) for v in values if type(v) in (list, dict, set)]
        places = list(self._places.values())
        self._groups = [_group(mapping, found) for mapping, found in places]
        # torch.fx itself replaces functions while it traces.
        values_alone = [(m, {k: v for k, v in f.items() if not callable(v)}) for m, f in places]
        self._values = [(mapping, found) for mapping, found in values_alone if found]
        self._value_groups = [_group(mapping, found) for mapping, found in self._values]
        self._cell_values = list(self._cells.values())

    def reason(self, module: nn.Module) -> str | None:
        """Why a module's forward cannot be followed; None if it can, for all that is known here."""
        return self._reasons.get(module)

    def unchanged(self) -> bool:
        """Whether all is as it was."""
        return self._are_same(self._groups)

    def put_back(self) -> bool:
        """Whether a forward has changed something; it has no more, as far as that is possible."""
        if self._are_same(self._value_groups):
            return False
        for mapping, found in self._values:
            if isinstance(mapping, dict):
                mapping.update(found)
        for cell, value in self._cell_values:
            cell.cell_contents = value
        for value, copy in self._copies:
            if members(value) != members(copy):
                refill(value, copy)
        return True

    def _are_same(self, groups: list[Any]) -> bool:
        try:
            return (
                all(get(mapping) == values for mapping, get, values in groups)
                and all(_CONTENTS(cell) is value for cell, value in self._cell_values)
                and all(frozen(value, self.names) == was for value, was in self._frozen)
            )
        except Exception:  # what cannot be compared is not what it was
            return False

    def _of_module(self, module: nn.Module) -> str | None:
        cls = getattr(type(module), "own_class", type(module))  # of a fused one
        reasons = [self._of_function(cls.forward, cls)]
        for value in module.__dict__.values():
            if isinstance(value, _CALLABLE):
                reasons.append(self._of_value(value, cls))
        return next(filter(None, reasons), None)

    def _of_function(self, function: Any, cls: type) -> str | None:
        """Notes what a function reads that is called by a class's forward; why it cannot be."""
        if not isinstance(function, types.FunctionType):
            return None
        key = id(function), cls
        if key in self._seen:
            return self._seen[key]
        self._seen[key] = None
        self._kept.append(function)
        reasons = [self._of_cell(cell, cls) for cell in function.__closure__ or ()]
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        reasons += [self._of_value(value, cls) for value in defaults]
        if _package(function.__globals__.get("__name__")) not in _LIBRARIES:
            names = _names(function.__code__)
            self.names |= names
            if "type" in names and "Tensor" in names:
                reasons.append("it asks of which type a tensor is")
            if "print" in names:
                reasons.append("it prints")
            reasons += [
                self._of_place(function.__globals__, name, names, cls)
                for name in names & function.__globals__.keys()
            ]
            reasons += [
                self._of_value(vars(base)[name], cls)
                for base in cls.__mro__
                if base not in (nn.Module, object)
                for name in names & vars(base).keys()
            ]
        self._seen[key] = next(filter(None, reasons), None)
        return self._seen[key]

    def _of_cell(self, cell: types.CellType, cls: type) -> str | None:
        try:
            value = cell.cell_contents
        except ValueError:  # it is empty
            return None
        self._cells[id(cell)] = cell, value
        return self._of_value(value, cls)

    def _of_place(self, mapping: Any, name: str, names: frozenset[str], cls: type) -> str | None:
        """What stands under a name in the globals of a module or in a class."""
        value = mapping[name]
        _, found = self._places.setdefault(id(mapping), (mapping, {}))
        if name in found:
            return None
        found[name] = value
        if isinstance(value, types.ModuleType):
            package = _package(value.__name__)
            if package in _MOVING or value.__name__.startswith(_BEYOND):
                return f"it asks the module {value.__name__!r}"
            if value is torch and not names.isdisjoint(_BEYOND_NAMES):
                return "it asks torch.func or torch.distributed"
            if package in _LIBRARIES:
                return None
            reasons = [
                self._of_place(vars(value), n, names, cls) for n in names & vars(value).keys()
            ]
        elif isinstance(value, type):
            if _package(value.__module__) in _LIBRARIES or issubclass(value, nn.Module):
                return None
            own = names | {"__init__", "__call__"}
            self._kept.append(proxy := vars(value))
            reasons = [self._of_place(proxy, n, names, cls) for n in own & proxy.keys()]
        else:
            return self._of_value(value, cls)
        return next(filter(None, reasons), None)

    def _of_value(self, value: Any, cls: type) -> str | None:
        """Something that code reads: a function is looked into, what can change is kept in mind."""
        if isinstance(value, GENERATORS):
            return "it draws random numbers"
        if isinstance(value, ContextVar):
            return "it asks a ContextVar"
        if isinstance(value, torch.jit.ScriptFunction):
            return "it calls a function of TorchScript"
        if str(getattr(value, "__module__", "")).startswith(_BEYOND):
            return f"it asks {value.__module__}"
        if isinstance(value, types.FunctionType):
            return self._of_function(value, cls)
        if isinstance(value, staticmethod | classmethod | types.MethodType):
            return self._of_function(value.__func__, cls)
        if isinstance(value, property):
            return self._of_function(value.fget, cls)
        if isinstance(value, partial):
            values = [value.func, *value.args, *value.keywords.values()]
            return next(filter(None, [self._of_value(v, cls) for v in values]), None)
        if isinstance(value, (*PLAIN, type, types.ModuleType, nn.Module)) or _is_built_in(value):
            return None
        self._mutable[id(value)] = value
        if _package(type(value).__module__) in _LIBRARIES:
            return None
        methods = [
            vars(base).get(n) for base in type(value).__mro__ for n in ("__call__", *self.names)
        ]
        functions = [m for m in methods if isinstance(m, types.FunctionType | property)]
        return next(filter(None, [self._of_value(f, type(value)) for f in functions]), None)


_BEYOND = "torch.distributed", "torch.func", "torch._functorch"
_BEYOND_NAMES = frozenset({"distributed", "func"})
"""What takes tensors as they lie in memory, where a tracer's are not."""
_CALLABLE: Any = torch.jit.ScriptFunction | types.FunctionType | types.MethodType | partial
_CONTENTS = attrgetter("cell_contents")


def _group(mapping: Any, found: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Names in a mapping, for a comparison of their values at once."""
    values = tuple(found.values())
    return mapping, itemgetter(*found), values if len(values) != 1 else values[0]


def _package(name: Any) -> str:
    return str(name).partition(".")[0]


def _is_built_in(value: Any) -> bool:
    return isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType)


@lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """The names in a function and those in it; texts are names, too, for ``getattr``."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            names.add(constant)
    return frozenset(names)


def frozen(value: Any, names: Any = frozenset(), depth: int = 4) -> Any:
    """Something that is equal as long as what can be changed in its place is not.

    Args:
        value: anything.
        names: of objects inside, the attributes of these names are looked into.
        depth: of what is in what.
    """
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor | np.ndarray):
        return id(value), _contents(value)
    if isinstance(value, list | tuple | deque) and depth:
        return (type(value), *(frozen(item, names, depth - 1) for item in value))
    if isinstance(value, dict) and depth:
        return (dict, *((key, frozen(item, names, depth - 1)) for key, item in value.items()))
    if isinstance(value, set | frozenset):
        return (set, frozenset(map(id, value)))
    if depth and not isinstance(value, _WHOLE):
        own = ((k, v) for k, v in _attributes(value) if k in names or isinstance(v, _LOOKED_INTO))
        return (type(value), id(value), *((k, frozen(v, names, depth - 1)) for k, v in own))
    return id(value)


PLAIN = (int, float, complex, str, bytes, bool, type(None))
"""What PyTorch calls constants."""
_LOOKED_INTO = (*PLAIN, list, tuple, dict, Tensor, np.ndarray)
_WHOLE = nn.Module | type | types.ModuleType | types.FunctionType | types.BuiltinFunctionType
_FEW = 16


def _contents(values: Any) -> Any:
    """What Python may have decided by, as far as one can look in a short time."""
    if isinstance(values, np.ndarray):
        return values.shape, zlib.crc32(values.tobytes())
    if type(values) is not Tensor or values.is_inference():
        return None
    few = values.numel() <= _FEW and values.device.type == "cpu" and not values.is_quantized
    return values._version, repr(values.tolist()) if few else None


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    own = getattr(value, "__dict__", None)
    if type(own) is dict:
        yield from own.items()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield name, getattr(value, name)


def members(value: Any) -> Any:
    """A list, dict or set as something to compare."""
    if isinstance(value, dict):
        return [(id(key), id(item)) for key, item in value.items()]
    return list(map(id, value)) if isinstance(value, list) else set(map(id, value))


def refill(value: Any, copy: Any) -> None:
    """Makes a list, dict or set what its copy is."""
    value.clear()
    value.extend(copy) if isinstance(value, list) else value.update(copy)
