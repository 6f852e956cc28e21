"""Trained networks under a name: runs' folders in the package and in a folder of the user's."""

from __future__ import annotations

import os
from pathlib import Path

from kconv._names import did_you_mean

__all__ = ["FOLDER", "find_network", "list_weights"]

FOLDER = Path(__file__).parent / "data" / "weights"
VARIABLE = "KCONV_WEIGHTS"
"""Of the environment: a folder of further runs, each in a folder of its name."""


def _folders() -> dict[str, Path]:
    """Where each network is; the user's come before the package's of the same name."""
    own = os.environ.get(VARIABLE)
    stores = [FOLDER, *([Path(own)] if own else [])]
    return {path.parent.name: path.parent for one in stores for path in one.glob("*/config.json")}


def list_weights(model: str | None = None) -> list[str]:
    """The trained networks that :func:`kconv.load` knows by name.

    They come with the package, or lie in the folder that the environment's ``KCONV_WEIGHTS`` names,
    as `kconv train` and :meth:`kconv.runtime.FrozenNetwork.save` write them. A name is that of the
    network, "-", and that of the data set: ``weights="cifar10"`` of a front end's ``create_model``
    or ``build`` is short for "keffnet_b0-cifar10" where the network is "keffnet_b0".

    Example:
        >>> all(name.startswith("keffnet_b0-") for name in list_weights("keffnet_b0"))
        True

    Args:
        model: of :func:`kconv.list_models`, to list those of this network alone.

    Returns:
        The names, in alphabetical order.
    """
    names = sorted(_folders())
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
        TypeError: it can be neither.
    """
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"{given!r} is neither a path nor the name of a trained network")
    path = Path(given)
    if path.exists():
        return path
    known = _folders()
    for name in (str(given), f"{model}-{given}"):
        if name in known:
            return known[name]
    own = list_weights(model)
    close = did_you_mean(given, [*known, *(name.rpartition("-")[2] for name in own)])
    raise FileNotFoundError(
        f"there is no folder or file {given}, and no trained network of this name{close}"
        + (f"; known are {', '.join(sorted(known))}" if known and not close else "")
    )
