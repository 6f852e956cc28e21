"""What the machine can do, measured, and the timing of calls in turns."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import kconv

CALLS = 3
"""Calls in a turn, at least."""
TURN = 0.08
"""Seconds of a turn, about: the first calls after another library's and a rest are slower, its
threads' stacks and data being in the caches (3x3 over 16 x 1024 planes of 7 x 7: 0.6 ms, after ten
0.4), and on a virtual machine all threads may wake up on one CPU, where Linux leaves them for 30 to
50 ms (40 to 40 channels of 31 x 31: 0.8 ms, then 0.4)."""
PAUSE = 0.03
"""Seconds before a turn. The threads of PyTorch's libgomp wait actively for some milliseconds after
a call (15 on an Intel Xeon) and would take a core from whoever comes next: the medians of calls of
0.5 ms became 4 ms."""


@dataclass(frozen=True)
class Limits:
    """What the machine can do, measured in this process."""

    gflops: float
    gbytes: float

    def milliseconds(self, multiply_adds: float, size: float) -> float:
        """The least time for these multiply-adds and bytes."""
        return max(2 * multiply_adds / self.gflops, size / self.gbytes) / 1e6


def measure_limits() -> Limits:
    """The peak of multiply-adds on registers, and of a copy of memory, with all threads."""
    source = np.ones((64, 64, 128, 128), np.float32)  # 256 MiB
    target = np.ones_like(source)
    copy = best([lambda: kconv.interleave(source, 1, out=target)], 4)[0]
    return Limits(kconv._kconv.fma_peak(), 2 * source.nbytes / copy / 1e9)


def seconds(calls: list[Callable[[], Any]], turns: int) -> list[list[float]]:
    """The seconds of each call in each turn: of those after the first one, which does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(turns):
        for call, taken in zip(calls, times, strict=True):
            time.sleep(PAUSE)
            call()
            end = time.perf_counter() + TURN
            for i in itertools.count():
                start = time.perf_counter()
                if i >= CALLS and start > end:
                    break
                call()
                taken.append(time.perf_counter() - start)
    return times


def best(calls: list[Callable[[], Any]], turns: int) -> list[float]:
    """The least seconds of each call."""
    return [min(taken) for taken in seconds(calls, turns)]
