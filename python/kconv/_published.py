"""Trained networks that come with the package, each a run's folder under a name."""

from __future__ import annotations

import os
from pathlib import Path

from kconv._names import did_you_mean

__all__ = ["FOLDER", "find_network", "list_weights"]

FOLDER = Path(__file__).parent / "data" / "weights"


def list_weights(model: str | None = None) -> list[str]:
    """The trained networks that come with kconv, as :func:`kconv.load` takes their names.

    Each is named after its network and its data set; ``weights="cifar10"`` of a front end's
    ``create_model`` or ``build`` is short for the one of that network.

    Example:
        >>> all(name.startswith("keffnet_b0-") for name in list_weights("keffnet_b0"))
        True

    Args:
        model: of :func:`kconv.list_models`, to list those of this network alone.

    Returns:
        The names, in alphabetical order.
    """
    names = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
    return [name for name in names if model is None or name.rpartition("-")[0] == model]


def find_network(given: str | os.PathLike[str], model: str | None = None) -> Path:
    """Where weights are: a file or folder that is there, or one of :func:`list_weights`.

    Args:
        given: a path or a name.
        model: the network whose name may be left out.

    Returns:
        The path.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(given)
    if path.exists():
        return path
    known = list_weights()
    for name in (str(given), f"{model}-{given}"):
        if name in known:
            return FOLDER / name
    own = known if model is None else list_weights(model)
    close = did_you_mean(given, [*known, *(name.rpartition("-")[2] for name in own)])
    raise FileNotFoundError(
        f"there is no folder or file {given}, and no weights of this name come with kconv{close}"
        + (f"; known are {', '.join(known)}" if known and not close else "")
    )
