"""Where the time of fused networks goes: each kind of step beside the machine's limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from limits import measure_limits

FLOAT = 4
"""Bytes of a value."""
FORWARD, BACKWARD = 1, 2
"""How often a step's multiply-adds and bytes count in each pass: the gradients by input and by
weight each take as many multiply-adds as the output, and to each value there is its gradient."""


@dataclass
class Kind:
    """All steps of a kind, in one call of the network: milliseconds, multiply-adds and bytes."""

    kind: str
    forward: float = 0.0
    backward: float = 0.0
    multiply_adds: int = 0
    bytes: int = 0
    limit: float = 0.0


@contextmanager
def recorded() -> Iterator[list[Any]]:
    """Lists the programs that kconv.torch runs inside the context.

    They are the ones that run, which depend on the size of the images and on the gradients wanted.
    """
    from kconv.torch import fused

    programs: list[Any] = []
    compiled = fused._compiled

    def record(integers: tuple[int, ...]) -> Any:
        program = compiled(integers)
        if program not in programs:
            programs.append(program)
        return program

    fused._compiled = record  # type: ignore[assignment]
    try:
        yield programs
    finally:
        fused._compiled = compiled


def parts(programs: list[Any], times: list[float], images: int, threads: int) -> dict[str, Any]:
    """What the steps took since their times were last taken, and their limits, measured here.

    The limit is the sum over the steps of the larger of multiply-adds at the measured peak and
    bytes (read and written once) at the bandwidth of a copy of memory; what stays in a cache may
    be faster.

    Args:
        programs: of the network's segments; each runs once a call.
        times: the seconds of each call.
        images: in a call.
        threads: that take steps by themselves, so that the steps' times are all threads' sums.

    Returns:
        A dictionary: ``limits`` of the machine, ``kinds`` of steps, and milliseconds a call:
        ``ms`` in all, ``rest`` (copies in and out, optimizer, head, framework) and ``limit``.
    """
    limits = measure_limits()
    kinds: dict[str, Kind] = {}
    for program in programs:
        for name, forward, backward, multiply_adds, values in program.take_times():
            passes = FORWARD * (forward > 0) + BACKWARD * (backward > 0)
            multiply_adds, size = passes * images * multiply_adds, passes * images * values * FLOAT
            kind = kinds.setdefault(name, Kind(name))
            kind.forward += forward * 1e3 / threads / len(times)
            kind.backward += backward * 1e3 / threads / len(times)
            kind.multiply_adds += multiply_adds
            kind.bytes += size
            kind.limit += limits.milliseconds(multiply_adds, size)
    ms = mean(times) * 1e3
    return {
        "limits": asdict(limits),
        "kinds": [asdict(kind) for kind in kinds.values()],
        "rest": ms - sum(kind.forward + kind.backward for kind in kinds.values()),
        "ms": ms,
        "limit": sum(kind.limit for kind in kinds.values()),
    }


def print_table(parts: dict[str, Any]) -> None:
    """A line for each kind of step, one for the rest, and their total."""
    limits, limit = parts["limits"], parts["limit"]
    print("\nkconv-torch, the mean of its calls, in ms")
    print(f"{'':20} {'forward':>9} {'backward':>9} {'both':>9} {'limit':>9} {'ratio':>6}")
    for kind in parts["kinds"]:
        both = kind["forward"] + kind["backward"]
        print(
            f"{kind['kind']:20} {kind['forward']:9.2f} {kind['backward']:9.2f} {both:9.2f}"
            f" {kind['limit']:9.2f} {both / kind['limit']:6.2f}"
        )
    print(f"{'rest':20} {'':19} {parts['rest']:9.2f}")
    print(f"{'total':20} {'':19} {parts['ms']:9.2f} {limit:9.2f} {parts['ms'] / limit:6.2f}")
    print(f"limit: by {limits['gflops']:.0f} GFLOP/s and {limits['gbytes']:.1f} GB/s")
