"""Which versions of the frameworks kconv was made for and is tested with."""

from __future__ import annotations

import warnings

__all__ = ["warn_of_version"]

_TESTED = {
    "flax": ((0, 11), (0, 12)),
    "jax": ((0, 5), (0, 10)),
    "keras": ((3, 5), (3, 15)),
    "tensorflow": ((2, 16), (2, 21)),
    "torch": ((2, 5), (2, 15)),
}


def warn_of_version(framework: str, version: str) -> None:
    """Says so where a framework is of another version than those that kconv was made for.

    Example:
        >>> warn_of_version("torch", "2.15.0+cu132")

    Args:
        framework: the name of its module.
        version: its version.
    """
    oldest, newest = _TESTED[framework]
    major, minor, *_ = version.split(".")
    if not oldest <= (int(major), int(minor)) <= newest:
        first, last = (".".join(map(str, bound)) for bound in (oldest, newest))
        warnings.warn(
            f"kconv was made for {framework} {first} to {last}; this is {version}", stacklevel=3
        )
