"""Which weight of a file belongs to which of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from kconv.weights._layouts import CLASSES, Shape, snake_case

__all__ = ["MismatchError", "Pairs", "automatic_stem", "listed", "match", "match_names"]

Name = tuple[str, ...]
Shapes = Mapping[str, Shape | None]

# What programs put before the names of a model's weights.
_WRAPPERS = frozenset(
    ("module", "_orig_mod", "model", "net", "network", "ema", "ema_model", "averaged_model")
)
_AUTOMATIC = frozenset((*map(snake_case, CLASSES), "variable"))


class MismatchError(ValueError):
    """File and model do not have the same weights.

    Attributes:
        count: how many differ.
    """

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


@dataclass(frozen=True)
class Pairs:
    """For each weight of the model that the file has, its name in the file.

    Attributes:
        names: the model's name to the file's.
        prefix: what the file has before its names, "module." for example.
    """

    names: dict[str, str]
    prefix: str = ""


def listed(items: list[str], most: int = 20) -> str:
    """The items, of which only the first ``most`` are named."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")


def _optional(name: str) -> bool:
    """Whether a weight may be absent: PyTorch's counter, which no other framework has."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def match(
    file: Shapes,
    model: Shapes,
    ties: Iterable[frozenset[str]] = (),
    stems: frozenset[str] = frozenset(),
) -> Pairs:
    """Pair the weights of a file and a model by PyTorch's names.

    The names themselves decide; else the names without what ``torch.compile``, DataParallel,
    trainers and averages put before or between them; else automatic names by their order.

    Args:
        file: shapes; None for a state that is no tensor.
        model: the same.
        ties: sets of the model's names of one and the same tensor, one of which is enough.
        stems: as for :func:`match_names`.

    Raises:
        MismatchError: naming what is only in one of them, or of another shape.
    """
    best: MismatchError | None = None
    for clean in (_same, _plain, _without_compiler, _without_wrappers):
        renamed, own = _renamed(file, clean), _renamed(model, clean)
        if renamed is None or own is None:
            continue
        for prefix, names in _without_prefixes(renamed, own):
            try:
                pairs = _pair(file, model, names, own, ties)
                return Pairs(pairs, _taken(prefix, pairs))
            except MismatchError as mismatch:
                if best is None or mismatch.count < best.count:
                    best = mismatch
        if clean is _same:
            continue
        for prefix, names in _without_prefixes(renamed, own):
            counted = any(map(_optional, names)) and any(map(_optional, own))
            shapes, wanted = (
                {
                    _split(name): shape[key]
                    for name, key in some.items()
                    if counted or not _optional(name)
                }
                for some, shape in ((names, file), (own, model))
            )
            reordered = {
                ".".join(new): names[".".join(old)]
                for old, new in match_names(shapes, wanted, stems).items()
            }
            if len(reordered) < len(shapes):
                continue
            try:
                return Pairs(_pair(file, model, reordered, own, ties), _taken(prefix, {}))
            except MismatchError as mismatch:
                if best is None or mismatch.count < best.count:
                    best = mismatch
    plain = Counter(map(_plain, file))
    if best is None or max(plain.values(), default=0) > 1:
        raise MismatchError(f"it has two weights {max(plain, key=plain.__getitem__)!r}", 1)
    raise best


def _same(name: str) -> str:
    return name


def _plain(name: str) -> str:
    """A name as Keras allows it."""
    return name.replace("/", "_")


def _without_compiler(name: str) -> str:
    return ".".join(part for part in _plain(name).split(".") if part != "_orig_mod")


def _without_wrappers(name: str) -> str:
    parts = _plain(name).split(".")
    return ".".join(part for part in parts if part not in ("_orig_mod", "module"))


def _split(name: str) -> Name:
    return tuple(name.split("."))


def _renamed(shapes: Shapes, clean: Callable[[str], str]) -> dict[str, str] | None:
    """New names to the old ones; None if two would be the same."""
    names = {clean(name): name for name in shapes}
    return names if len(names) == len(shapes) else None


def _without_prefixes(
    file: dict[str, str], model: dict[str, str]
) -> Iterable[tuple[str, dict[str, str]]]:
    """The file's names, and those without wrappers' prefixes, each with the prefix."""
    prefix = ""
    yield prefix, file
    averaged = "n_averaged"  # torch.optim.swa_utils' counter
    if averaged in file and averaged not in model:
        file = {name: key for name, key in file.items() if name != averaged}
        yield prefix, file
    while file:
        firsts = {name.partition(".")[0] for name in file}
        if len(firsts) > 1 or not firsts <= _WRAPPERS or not all("." in name for name in file):
            return
        prefix += f"{firsts.pop()}."
        file = {name.partition(".")[2]: key for name, key in file.items()}
        if averaged in file and averaged not in model:
            del file[averaged]
        yield prefix, file


def _taken(prefix: str, pairs: Mapping[str, str]) -> str:
    if prefix or not pairs:
        return prefix
    # What was dropped from every name, where it stood in front.
    model, name = next(iter(pairs.items()))
    front = name.removesuffix(model)
    return front if front != name and all(n == front + m for m, n in pairs.items()) else ""


def _pair(
    file: Shapes,
    model: Shapes,
    names: Mapping[str, str],
    own: Mapping[str, str],
    ties: Iterable[frozenset[str]],
) -> dict[str, str]:
    """The model's names to the file's, if all agree."""
    pairs = {key: names[name] for name, key in own.items() if name in names}
    for tie in ties:
        if found := next((pairs[name] for name in sorted(tie) if name in pairs), None):
            for name in tie:
                pairs.setdefault(name, found)
    only_file = [
        f"{key} {_shape(file[key])}"
        for name, key in sorted(names.items())
        if name not in own and not _optional(name)
    ]
    only_model = [
        f"{key} {_shape(model[key])}"
        for key in own.values()
        if key not in pairs and not _optional(key)
    ]
    differing = [
        f"{key} {_shape(file[name])} in the file, {_shape(model[key])} in the model"
        for key, name in pairs.items()
        if model[key] is not None and file[name] != model[key]
    ]
    _raise(only_file, only_model, differing)
    return pairs


def _raise(only_file: list[str], only_model: list[str], differing: list[str]) -> None:
    lists = {"only in the file: ": only_file, "only in the model: ": only_model, "": differing}
    problems = "; ".join(f"{where}{listed(names)}" for where, names in lists.items() if names)
    if problems:
        raise MismatchError(problems, len(only_file) + len(only_model) + len(differing))


def _shape(shape: Shape | None) -> str:
    return "(a state)" if shape is None else str(tuple(shape))


# Automatic names, whose numbers depend on what a process has made before.


def automatic_stem(name: str, more: frozenset[str]) -> str | None:
    """An automatic name without its number; None for other names."""
    match = re.fullmatch(r"((?:forward_|backward_)?(.*?))(?:_\d+)?", name)
    return match[1] if match and (match[2] in _AUTOMATIC or match[2] in more) else None


def _number(name: str) -> int:
    match = re.search(r"_(\d+)$", name)
    return int(match[1]) if match else 0


def match_names(
    file: Mapping[Name, Shape | None],
    model: Mapping[Name, Shape | None],
    stems: frozenset[str] = frozenset(),
) -> dict[Name, Name]:
    """The file's names in the model's terms: automatic names are matched by their order.

    The first layer with certain weights and shapes in the file is the first such in the model, ...;
    likewise within it.

    Args:
        file: shapes by paths of names.
        model: the same.
        stems: automatic names of the model's own classes, beside those of Keras's.

    Returns:
        A new name for each of the file's; its own where the model has no place for it.
    """

    def groups(shapes: Mapping[Name, Shape | None]) -> dict[str, dict[Name, Shape | None]]:
        result: dict[str, dict[Name, Shape | None]] = {}
        for name, shape in shapes.items():
            result.setdefault(name[0], {})[name[1:]] = shape
        return result

    def signature(shapes: Mapping[Name, Shape | None]) -> frozenset[object]:
        counted = Counter(
            (tuple(automatic_stem(part, stems) or part for part in name), shape)
            for name, shape in shapes.items()
        )
        return frozenset(counted.items())

    def ordered(
        parts: Mapping[str, dict[Name, Shape | None]], stem: bool
    ) -> dict[object, list[str]]:
        result: dict[object, list[str]] = {}
        for name in sorted(parts, key=_number):
            if (own := automatic_stem(name, stems)) is not None:
                key = own if stem else None, signature(parts[name])
                result.setdefault(key, []).append(name)
        return result

    ours, theirs = groups(file), groups(model)
    partner = {
        name: name for name in ours if name in theirs and automatic_stem(name, stems) is None
    }
    ordered_ours, ordered_theirs = ordered(ours, True), ordered(theirs, True)
    if {key: len(names) for key, names in ordered_ours.items()} != {
        key: len(names) for key, names in ordered_theirs.items()
    }:  # perhaps one has kconv's layers in the place of Keras's
        ordered_ours, ordered_theirs = ordered(ours, False), ordered(theirs, False)
    for key, names in ordered_ours.items():
        partner.update(zip(names, ordered_theirs.get(key, []), strict=False))
    result: dict[Name, Name] = {}
    for name, inner in ours.items():
        if () in inner or name not in partner:
            result |= {(name, *rest): (partner.get(name, name), *rest) for rest in inner}
        else:
            other = partner[name]
            renamed = match_names(inner, theirs[other], stems)
            result |= {(name, *rest): (other, *new) for rest, new in renamed.items()}
    return result
