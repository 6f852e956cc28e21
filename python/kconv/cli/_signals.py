"""How commands are ended from outside."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["interrupted", "terminable"]


@contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM end a command as Ctrl-C does, in one line.

    Schedulers send it, and torchrun to those that are left where a process was lost, twice.
    """

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # not while the first is seen to
        raise KeyboardInterrupt("SIGTERM")

    if threading.current_thread() is not threading.main_thread():  # which alone may set it
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupted(stop: KeyboardInterrupt, what_then: str = "") -> int:
    """Say in one line that a command was ended; the exit status of that."""
    terminated = bool(stop.args)
    print(f"\n{'terminated' if terminated else 'interrupted'}{what_then}", file=sys.stderr)
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)
