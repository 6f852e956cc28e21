"""What training takes of memory: little, and no more in later epochs than in the first."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kconv.training import FRAMEWORKS

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

HOLES = """
import ctypes, resource
from kconv._memory import return_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
blocks = [libc.malloc(65536) for _ in range(4000)]
for block in blocks:
    ctypes.memset(block, 1, 65536)
for index, block in enumerate(blocks):
    if index % 16:
        libc.free(block)
before = resident()
assert return_freed_memory()
print(before - resident())
"""


@GLIBC
def test_freed_memory_is_returned() -> None:
    run = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 200e6  # of 246 MB between the blocks that are still in use


PEAK = """
from kconv._memory import peak_memory
before = peak_memory()
b"1" * (before + 100_000_000)
print(before, peak_memory())
"""


def test_peak_memory_is_the_process_own() -> None:
    held = b"1" * 500_000_000  # which a fork of this process would have, too
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert before < len(held)
    assert 100_000_000 < after - before < 1.5 * before + 200_000_000


TRAINING = """
import sys
from pathlib import Path
from kconv import training
from kconv._memory import leave_out_tensorflow, peak_memory
leave_out_tensorflow()
config = training.Config(framework=sys.argv[1], train_images=160, test_images=64, epochs=6)
peaks = []
def log(line):
    if line.startswith("epoch"):
        peaks.append(peak_memory())
    print(line)
training.train(config, Path(sys.argv[2]), log=log)
assert "tensorflow" not in sys.modules or sys.modules["tensorflow"] is None
print("growth", peaks[-1] / peaks[1])
"""


@GLIBC
@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_training_stays_small(framework: str, tmp_path: Path) -> None:
    """The default model and batch, which are the same in longer runs."""
    env = {**os.environ, "KERAS_BACKEND": "jax"}
    command = [sys.executable, "-c", TRAINING, framework, str(tmp_path / "run")]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    peak = re.search(r"peak memory +([0-9.]+) GB", run.stdout)
    assert peak, run.stdout
    assert float(peak[1]) < {"keras": 2.5, "torch": 2.2}[framework]
    assert float(run.stdout.split()[-1]) < 1.1
