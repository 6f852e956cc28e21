"""Which activations a model has: a file that names others is of another model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from kconv.models.activations import ACTIVATIONS, FUSED_ACTIVATIONS, SYNONYMS
from kconv.weights._layouts import snake_case
from kconv.weights._matching import listed

__all__ = ["activation_kinds", "activations", "check_activations", "outside"]

# PyTorch's classes.
activation_kinds = {
    row.torch_module: row.name for row in ACTIVATIONS.values() if row.name != "softmax"
}
# Those that the original's networks and kconv's have. Others are compared only where file and model
# have an activation of the same name, as frameworks disagree on which are layers.
_COMPARED = frozenset(FUSED_ACTIVATIONS)

_LAYERS = ("ELU", "LeakyReLU", "PReLU", "Softmax")  # Keras's classes that are activations


def activations(layers: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """Activations by layer, but for the softmax, which PyTorch models leave to the loss.

    One inside another layer counts as a layer of its own, ``<name>_activation``.

    Args:
        layers: each one's class and configuration.
    """
    result = {}
    for kind, config in layers:
        if "name" not in config:
            continue
        name = config["name"].replace("/", "_")
        activation = config.get("activation")
        if kind == "ReLU":
            limit = config.get("max_value")
            activation = "relu" if limit is None else f"relu{limit:g}"
            activation = "leaky_relu" if config.get("negative_slope") else activation
        elif kind in _LAYERS:
            activation = snake_case(kind) if kind != "ELU" else "elu"
        elif kind != "Activation":
            name = f"{name}_activation"
        if isinstance(activation, dict):  # a function that is not Keras's own
            inner = activation.get("config")
            activation = inner if isinstance(inner, str) else activation.get("class_name")
        if isinstance(activation, str):
            activation = activation.rpartition(">")[2].lower()
            result[name] = SYNONYMS.get(activation, activation)
    return {n: kind for n, kind in result.items() if kind not in ("linear", "softmax")}


def outside(
    file: dict[str, str], model: dict[str, str], layers: set[Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Both's activations but for those of blocks, which are one layer in a configuration.

    Args:
        file: kinds by names.
        model: kinds by names; those of modules in modules have dots.
        layers: the names of the layers in the file's configuration.
    """
    blocks: set[str] = set()
    rest = {}
    for name, kind in model.items():
        parts = name.split(".")
        owners = {".".join(parts[:end]) for end in range(1, len(parts))} & layers
        blocks |= owners
        if not owners:
            rest[name] = kind
    ours = {n: kind for n, kind in file.items() if n.removesuffix("_activation") not in blocks}
    return ours, rest


def check_activations(file: dict[str, str], model: dict[str, str], *, exact: bool) -> None:
    """Raise unless file and model have the same activations.

    Those of the same name are compared with one another, the others by how many there are of a
    kind.

    Args:
        file: kinds by names.
        model: kinds by names.
        exact: whether the model's are all it has; a PyTorch module may call functions too.

    Raises:
        ValueError: naming those that differ.
    """
    automatic = re.compile(
        r"(?:activation|re_lu|(?:(?:pointwise_|depthwise_)?conv2d|batch_normalization|dense)"
        r"(?:_\d+)?_activation)(?:_\d+)?"
    )
    shared = {name for name in file.keys() & model.keys() if not automatic.fullmatch(name)}
    differing = {name for name in shared if file[name] != model[name]}

    def rest(kinds: dict[str, str]) -> dict[str, str]:
        return {n: kind for n, kind in kinds.items() if n not in shared and kind in _COMPARED}

    ours, theirs = rest(file), rest(model)
    counts, wanted = Counter(ours.values()), Counter(theirs.values())
    named = {name for name in (*ours, *theirs) if not automatic.fullmatch(name)}
    problems = []
    if wanted - counts or (exact and counts != wanted):
        differing |= named
        unnamed, other = (
            Counter(kind for name, kind in kinds.items() if name not in named)
            for kinds in (ours, theirs)
        )
        if unnamed != other:
            problems = [f"unnamed ones ({dict(unnamed)} in the file, {dict(other)} in the model)"]
    texts = [
        f"{name} ({file.get(name, 'absent')} in the file, {model.get(name, 'absent')} in the model)"
        for name in sorted(differing)
    ]
    if texts or problems:
        raise ValueError(f"it is of a model with other activations: {listed(texts + problems)}")
