"""Instruction sets, threads, fork, and the documentation of the native functions."""

from __future__ import annotations

import doctest
import inspect
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import kconv

HERE = Path(__file__).parent


@pytest.mark.skipif("KCONV_ISA" in os.environ, reason="runs the other tests itself")
@pytest.mark.parametrize("isa", kconv.build_info()["isas"][1:])
def test_other_instruction_sets(isa: str) -> None:
    """Every parity test again with each instruction set beside the default one."""
    check = "import kconv, sys; sys.exit(kconv.build_info()['isa'] != sys.argv[1])"
    env = {**os.environ, "KCONV_ISA": isa}
    assert subprocess.run([sys.executable, "-c", check, isa], env=env).returncode == 0
    files = [HERE / "test_pointwise.py", HERE / "test_depthwise.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parents[1])
    assert run.returncode == 0, run.stdout[-3000:]


def test_unknown_instruction_set() -> None:
    env = {**os.environ, "KCONV_ISA": "mmx"}
    run = subprocess.run(
        [sys.executable, "-c", "import kconv"], env=env, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert 'KCONV_ISA="mmx" is not available on this machine; expected one of' in run.stderr


def test_import_loads_no_framework() -> None:
    code = (
        "import sys; before = set(sys.modules); import kconv;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new & {'torch', 'jax', 'tensorflow', 'keras', 'matplotlib', 'PIL', 'h5py'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_bfloat16_needs_no_ml_dtypes() -> None:
    code = """if True:
        import sys, torch, kconv, numpy as np
        from torch.utils.dlpack import from_dlpack, to_dlpack
        x, weight = torch.ones(1, 2, 2, 2).bfloat16(), torch.ones(3, 2).bfloat16()
        y = from_dlpack(kconv.pointwise_conv(to_dlpack(x), to_dlpack(weight)))
        print(y.dtype, y.sum().item(), "ml_dtypes" in sys.modules)
        kconv.pointwise_conv(to_dlpack(x), np.ones((3, 2), np.float32))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["torch.bfloat16", "24.0", "False"]
    assert "TypeError: weight is float32, expected bfloat16 as the other arrays" in run.stderr


def test_submodules_are_imported_when_used() -> None:
    code = "import kconv; print(kconv.models.count(kconv.models.create('keffnet_b0')).total)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 0
    with pytest.raises(AttributeError, match="no attribute 'layers'"):
        _ = kconv.layers


def test_thread_settings() -> None:
    code = "import kconv; print(kconv.get_num_threads(), kconv.build_info()['threads'])"
    for value, expected in [("3", "3 3"), ("0", None), ("many", None)]:
        env = {**os.environ, "KCONV_NUM_THREADS": value}
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        default = len(os.sched_getaffinity(0))
        assert run.stdout.strip() == (expected or f"{default} {default}")


def _large() -> tuple[np.ndarray, np.ndarray]:
    return np.ones((8, 64, 56, 56), np.float32), np.ones((32, 16), np.float32)


def _child(queue: multiprocessing.Queue[float]) -> None:
    x, weight = _large()
    queue.put(float(kconv.pointwise_conv(x, weight, groups=4).sum()))


def test_pool_survives_fork() -> None:
    x, weight = _large()
    before = kconv.get_num_threads()
    kconv.set_num_threads(2)  # a pool even on one CPU
    try:
        expected = float(kconv.pointwise_conv(x, weight, groups=4).sum())
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_child, args=(queue,))
        child.start()
        assert queue.get(timeout=60) == expected
        child.join(60)
        assert child.exitcode == 0
        assert float(kconv.pointwise_conv(x, weight, groups=4).sum()) == expected
    finally:
        kconv.set_num_threads(before)


def test_calls_from_many_threads() -> None:
    x, weight = _large()
    expected = kconv.pointwise_conv(x, weight, groups=4)
    failures = []

    def work() -> None:
        for threads in (1, 2, 3):
            kconv.set_num_threads(threads)
            y = kconv.pointwise_conv(x, weight, groups=4)
            failures.extend([threads] * (not np.array_equal(y, expected)))

    before = kconv.get_num_threads()
    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    kconv.set_num_threads(before)
    assert not failures


@pytest.mark.parametrize("name", [n for n in kconv.__all__ if inspect.isbuiltin(getattr(kconv, n))])
def test_native_docstrings(name: str) -> None:
    """The examples in the native functions' docstrings run, and every function has one."""
    function = getattr(kconv, name)
    before = kconv.get_num_threads()
    tests = doctest.DocTestParser().get_doctest(
        function.__doc__, {"np": np, "kconv": kconv}, name, None, None
    )
    assert tests.examples, f"{name} has no example"
    results = doctest.DocTestRunner().run(tests)
    kconv.set_num_threads(before)
    assert results.failed == 0
