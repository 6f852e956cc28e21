"""Lines for whoever looks on."""

from __future__ import annotations

import sys

__all__ = ["show"]


def show(line: str) -> None:
    """Print a line at once, also into a pipe; what its encoding lacks is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
