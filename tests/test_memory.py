"""Freed memory stays with the process once it was asked to keep it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from kconv._memory import keep_freed_memory
assert keep_freed_memory()
def faults():
    bytes(64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults() for _ in range(6)]
print(counts[-1] - counts[-2])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_keep_freed_memory():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 100  # against the 16,384 pages of 64 MiB
