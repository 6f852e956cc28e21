"""Less memory for programs that train."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_COMPILED = "/jax/core/compile/backend_compile_duration"


def peak_memory() -> int:
    """The most bytes of memory that this process has held at once."""
    with suppress(OSError):  # Linux; getrusage there counts what the process was forked from, too
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def return_freed_memory() -> bool:
    """Give back to the system what the C library keeps of freed memory.

    Returns:
        Whether the C library can; only glibc does.
    """
    trim = None if os.name == "nt" else getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True


@cache
def return_memory_of_compilers() -> None:
    """Call :func:`return_freed_memory` after each long compilation by JAX, before its result runs.

    XLA's compiler leaves the heap full of small holes: 0.7 GB stay with the process, of a
    kEffNet-B0 whose training step needs 1.1 GB of its own.
    """
    from jax import monitoring

    def trim(event: str, seconds: float, **_: Any) -> None:
        if event == _COMPILED and seconds > 0.5:
            return_freed_memory()

    monitoring.register_event_duration_secs_listener(trim)


def leave_out_tensorflow() -> None:
    """Keep Keras from importing TensorFlow for the rest of the process, unless it runs on it.

    With any backend Keras imports TensorFlow, where it is installed, when it saves a model, only to
    ask whether something is TensorFlow's: 0.45 GB and some seconds.
    """
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        sys.modules.setdefault("tensorflow", None)  # type: ignore[arg-type]
