"""How many CPUs this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath

__all__ = ["available_cpus"]


def available_cpus(root: Path = Path("/")) -> int:
    """CPUs that the process may run on, and no more than its container's quota, rounded up.

    A quota of 1.5 CPUs is worth two threads: ``cpu.max`` of cgroup v2, the least of the group's own
    and of those above.

    Example:
        >>> available_cpus() >= 1
        True

    Args:
        root: What stands for "/", for tests.

    Returns:
        One or more.
    """
    everywhere = os.cpu_count() or 1
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everywhere
    return max(1, math.ceil(min(cpus, _quota(root))))


def _quota(root: Path) -> float:
    """CPUs of the tightest quota, infinity where there is none."""
    try:
        groups = (root / "proc/self/cgroup").read_text()
        group = next(line[3:] for line in groups.splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return math.inf
    quota, path = math.inf, PurePosixPath(group.lstrip("/"))
    for above in (path, *path.parents):
        try:
            most, period = (root / "sys/fs/cgroup" / above / "cpu.max").read_text().split()
            quota = min(quota, int(most) / int(period))
        except (OSError, ValueError):  # no such file, or "max 100000"
            continue
    return quota
