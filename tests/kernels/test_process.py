"""Instruction sets, threads, fork, and the documentation of the native functions."""

from __future__ import annotations

import doctest
import inspect
import multiprocessing
import os
import subprocess
import sys
import threading
import time
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
    names = ("KCONV_NUM_THREADS", "OMP_NUM_THREADS")
    others = {name: value for name, value in os.environ.items() if name not in names}
    default = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    for kconv_value, openmp_value, expected in [
        ("3", "5", 3),
        (None, "5", 5),
        (None, "4,2", 4),
        (None, "many", default),  # OpenMP's own to complain about
        ("", None, default),
        (None, None, default),
    ]:
        values = zip(names, (kconv_value, openmp_value), strict=True)
        env = others | {name: value for name, value in values if value is not None}
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert run.stdout.split() == [str(expected)] * 2


@pytest.mark.parametrize("value", ["0", "-1", "5000", "many", "2.0"])
def test_wrong_thread_setting(value: str) -> None:
    env = {**os.environ, "KCONV_NUM_THREADS": value}
    command = [sys.executable, "-c", "import kconv"]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 1
    expected = f'ValueError: KCONV_NUM_THREADS="{value}", expected a number from 1 to 1024'
    assert run.stderr.splitlines()[-1] == expected


TASKS = Path("/proc/self/task")


def _tasks(most: int) -> int:
    """Threads of this process, once there are at most ``most`` or three seconds have passed."""
    end = time.monotonic() + 3
    while (count := sum(1 for _ in TASKS.iterdir())) > most and time.monotonic() < end:
        time.sleep(0.01)
    return count


@pytest.mark.skipif(not TASKS.exists(), reason="needs Linux")
def test_no_threads_are_left_behind() -> None:
    x, weight = _large()
    before = kconv.get_num_threads()
    kconv.set_num_threads(1)
    alone = _tasks(0)  # after three seconds, when those of earlier tests have ended
    try:
        for threads in (2, 7, 3, 12) * 3:
            kconv.set_num_threads(threads)
            kconv.pointwise_conv(x, weight, groups=4)
        assert _tasks(alone + 11) == alone + 11
        kconv.set_num_threads(1)
        assert _tasks(alone) == alone
    finally:
        kconv.set_num_threads(before)


FORKS = """
import os, signal, sys, threading, time
import numpy as np
import kconv
from kconv import _kconv
from kconv.models.wire import Code, Convolution, Step, Term, Window

# A convolution of 256 to 256 channels, 4 x 4, whose weights take longer to prepare than to use.
step = Step(Convolution(Window((1, 1)), 1, True), (Term(0, tuple(range(256)), 0),))
values = ((256, 4, 4), (256, 4, 4))
program = _kconv.FusedProgram(Code("OI", False, 0, values, (), (step,)).encode())
x, none = np.ones((1, 256, 4, 4), np.float32), np.zeros((2, 0), np.float32)
large, weight = np.ones((4, 8, 64, 64), np.float32), np.ones((8, 8), np.float32)
kconv.set_num_threads(2)

def compute(value):
    y = program.infer(x, np.full(program.parameters, value, np.float32), none)
    z = kconv.pointwise_conv(large, weight)
    return y[0, 0, 0, 0] == 257 * value and z[-1, -1, -1, -1] == 8

running, right = True, True
def work(value):
    global right
    while running:
        right &= bool(compute(value))

threads = [threading.Thread(target=work, args=(value,)) for value in (1, 2, 3)]
[thread.start() for thread in threads]
hung = wrong = 0
for _ in range(40):
    child = os.fork()
    if not child:
        # The other threads' locks, as they are at this moment.
        signal.alarm(20)
        os._exit(not all(compute(value) for value in (1, 2, 4)))
    status = os.waitpid(child, 0)[1]
    hung += os.WIFSIGNALED(status)
    wrong += status != 0 and not os.WIFSIGNALED(status)
    if hung > 2:
        break
running = False
[thread.join() for thread in threads]
print(hung, wrong, right)
"""


def test_fork_beside_running_operations() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.stdout == "0 0 True\n", run.stdout + run.stderr


NO_MEMORY = """
import resource
import numpy as np
import kconv
from kconv import _kconv
from kconv.models.wire import Code, Convolution, Step, Term, Window

def limit(more):
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.RLIM_INFINITY))

def expect_no_memory(call, *arguments):
    try:
        call(*arguments)
    except MemoryError as error:
        assert "memory" in str(error), error
    else:
        raise AssertionError("there was memory")

# Convolutions of 1 to 64 channels and back to 1, with the gradient by the input.
def program(side):
    pointwise = Convolution(Window((1, 1)), 1, False)
    steps = Step(pointwise, (Term(0, (0,), 0),)), Step(pointwise, (Term(0, tuple(range(64)), 1),))
    values = ((1, side, side), (64, side, side), (1, side, side))
    return _kconv.FusedProgram(Code("OI", True, 0, values, (), steps).encode())

kconv.set_num_threads(2)
small, large = program(16), program(1024)  # 256 MiB for 64 channels of the latter
weight, none = np.ones(128, np.float32), np.zeros((2, 0), np.float32)
x = np.ones((1, 1, 1024, 1024), np.float32)
few = np.ones((1, 1, 16, 16), np.float32)
def forward(program, x):
    return program.forward(x, weight)
def step(program, x):
    y, used, workspace = forward(program, x)
    grad_x, grad = program.backward(y, weight, None, used, workspace)
    return float(y.max()), float(grad_x.max())
assert step(small, few) == (64, 64 * 64)

# The gradients find no memory, then the forward pass finds none; the process and its threads go on.
y, used, workspace = forward(large, x)
kconv.release_memory()
limit(128 << 20)
expect_no_memory(lambda: large.backward(y, weight, None, used, workspace))
expect_no_memory(forward, large, x)
expect_no_memory(kconv.pointwise_conv, x, np.ones((64, 1), np.float32))
assert step(small, few) == (64, 64 * 64)

# Recycled blocks of another size are given back for what needs their memory.
del workspace
assert kconv.memory_stats()["free"] >= 256 << 20
y = kconv.pointwise_conv(x, np.ones((70, 1), np.float32))
assert y.shape == (1, 70, 1024, 1024) and y[0, 69, 1023, 1023] == 1
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")
def test_no_memory_is_an_error() -> None:
    command = [sys.executable, "-c", NO_MEMORY]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.stdout == "done\n", run.stderr[-2000:]


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
