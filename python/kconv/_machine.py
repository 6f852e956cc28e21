"""What machine this is, for what says how fast something was on it."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

__all__ = ["processor"]


def processor() -> str:
    """What the system calls the processor.

    Example:
        >>> bool(processor())
        True
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
