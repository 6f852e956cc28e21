"""Names that somebody may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """What an error may add to an unknown name.

    Example:
        >>> did_you_mean("kefnet_b0", ["keffnet_b0", "mobilenet"])
        " (did you mean 'keffnet_b0'?)"
        >>> did_you_mean("resnet50", ["keffnet_b0", "mobilenet"])
        ''

    Args:
        name: the unknown name.
        known: those that there are.

    Returns:
        The addition; nothing where no name is close.
    """
    close = difflib.get_close_matches(str(name), list(known), 1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""
