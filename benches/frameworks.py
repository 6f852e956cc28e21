"""What a call of kconv costs inside each framework, beside the framework's own convolution.

    python benches/compare.py frameworks

Each framework runs in a process of its own, where its threads meet no others. A call on a 1x8x8x8
tensor shows the way to the kernel; one on 64 MB shows in the peak of the process's memory whether
anything is copied on that way, as only the result is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[], Any]
Calls = Iterator[tuple[str, Call, Call]]  # what is measured, kconv's call, the framework's

SMALL, LARGE = (1, 8, 8, 8), (16, 64, 128, 128)
MEGABYTES = 4 * np.prod(LARGE) / 2**20


def torch(shape: tuple[int, ...]) -> Calls:
    """PyTorch without gradients, recording them, and with the backward pass."""
    import torch
    import torch.nn.functional as F

    import kconv
    from kconv.torch import pointwise_conv

    torch.set_num_threads(kconv.get_num_threads())
    x, w = torch.randn(shape), torch.randn(shape[1], shape[1], 1, 1)
    yield "eager", lambda: pointwise_conv(x, w), lambda: F.conv2d(x, w)
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    yield "eager, differentiated", lambda: pointwise_conv(x, w), lambda: F.conv2d(x, w)
    g = torch.randn(shape)

    def gradients(convolution: Callable[..., Any]) -> Any:
        return torch.autograd.grad(convolution(x, w), (x, w), g)

    yield (
        "eager, with backward",
        lambda: gradients(pointwise_conv),
        lambda: gradients(F.conv2d),
    )


def tensorflow(shape: tuple[int, ...]) -> Calls:
    """TensorFlow, which has NHWC only."""
    import tensorflow as tf

    from kconv.tensorflow import pointwise_conv

    n, c, h, w = shape
    x, weight = tf.constant(values(n, h, w, c)), tf.constant(values(1, 1, c, c))

    def ours(x: Any, weight: Any) -> Any:
        return pointwise_conv(x, weight, layout="NHWC", weight_layout="IO")

    def theirs(x: Any, weight: Any) -> Any:
        return tf.nn.conv2d(x, weight, 1, "VALID")

    yield "eager", lambda: ours(x, weight), lambda: theirs(x, weight)
    graphs = [tf.function(f, autograph=False) for f in (ours, theirs)]
    for graph in graphs:
        graph.get_concrete_function(x, weight)
    yield "tf.function", lambda: graphs[0](x, weight), lambda: graphs[1](x, weight)


def jax(shape: tuple[int, ...]) -> Calls:
    """JAX, compiled."""
    import jax

    from kconv.jax import pointwise_conv

    x = jax.numpy.asarray(values(*shape))
    w = jax.numpy.asarray(values(shape[1], shape[1], 1, 1))
    ours, theirs = (
        jax.jit(pointwise_conv),
        jax.jit(lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID")),
    )
    yield "jit", lambda: ours(x, w).block_until_ready(), lambda: theirs(x, w).block_until_ready()


def torch_fingerprints() -> tuple[Call, int]:
    """The comparison that a fused network makes at each call, and how many layers it has."""
    from kconv.models import create
    from kconv.torch import build

    network = build(create("keffnet_b0", classes=10, input_shape=(32, 32, 3)))
    plan = network._current_plan()
    assert plan.holds(network)
    return lambda: plan.holds(network), len(list(network.children()))


def keras_fingerprints() -> tuple[Call, int]:
    """The same of a Keras network, on JAX."""
    os.environ["KERAS_BACKEND"] = "jax"
    from kconv.keras import build
    from kconv.keras._fusion import plan_of
    from kconv.models import create

    network = build(create("keffnet_b0", classes=10, input_shape=(32, 32, 3)))
    calls = plan_of(network).calls
    assert calls.up_to_date
    return lambda: calls.up_to_date, len(network.layers)


_KEPT: list[Any] = []


def values(*shape: int) -> Any:
    """Random values, never freed: what is freed, a call could copy to unseen."""
    _KEPT.append(np.random.default_rng(0).standard_normal(shape, np.float32))
    return _KEPT[-1]


FRAMEWORKS = {"torch": torch, "tensorflow": tensorflow, "jax": jax}
FINGERPRINTS = {"torch": torch_fingerprints, "jax": keras_fingerprints}


def microseconds(calls: tuple[Call, ...], turns: int) -> list[float]:
    """The least time of each call, the calls taking turns of a few milliseconds."""
    times = [np.inf] * len(calls)
    for turn in range(turns + 1):
        for i, call in enumerate(calls):
            start, count = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - start) < 5e-3:
                for _ in range(20):
                    call()
                count += 20
            if turn:  # the first wakes everything up
                times[i] = min(times[i], elapsed / count * 1e6)
    return times


def copies(call: Call, results: list[Any]) -> int | None:
    """How many times as much memory as its result a call takes beside it; Linux can tell.

    The result joins ``results``: freed, it would be memory for the next call to copy to unseen.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def read(name: str) -> float:
        (line,) = (li for li in status.read_text().splitlines() if li.startswith(name))
        return float(line.split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = read("VmRSS")
    results.append(call())
    growth = read("VmHWM") - before
    return int(growth / MEGABYTES + 0.1) - 1


def measure(framework: str, turns: int) -> list[dict[str, Any]]:
    """The rows of one framework."""
    rows = []
    for name, *calls in FRAMEWORKS[framework](SMALL):
        ours, theirs = (np.asarray(to_numpy(call())) for call in calls)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
        ours_us, theirs_us = microseconds((calls[0], calls[1]), turns)
        rows.append({"framework": framework, "call": name, "us": ours_us, "own_us": theirs_us})
    results: list[Any] = []
    for row, (_, call, _) in zip(rows, FRAMEWORKS[framework](LARGE), strict=True):
        if "backward" not in row["call"]:  # whose memory is that of several results
            row["copies"] = copies(call, results)
    if framework in FINGERPRINTS:
        call, layers = FINGERPRINTS[framework]()
        us = microseconds((call,), turns)[0] / layers
        rows.append({"framework": framework, "call": "a fused layer's check", "us": us})
    return rows


def to_numpy(result: Any) -> Any:
    """A result, or the first of several, as an array."""
    result = result[0] if isinstance(result, tuple) else result
    return result.detach() if hasattr(result, "detach") else result


def run(turns: int) -> list[dict[str, Any]]:
    """All frameworks that are installed, each in its own process; prints as it goes."""
    rows = []
    for framework in FRAMEWORKS:
        command = [sys.executable, __file__, framework, str(turns)]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if process.returncode:
            print(f"{framework}: failed, or not installed")
            continue
        for row in json.loads(process.stdout.splitlines()[-1]):
            rows.append(row)
            beside = ""
            if "own_us" in row:
                ratio = row["us"] / row["own_us"]
                beside = f", {ratio:5.2f} x its own {row['own_us']:7.1f} us"
            if row.get("copies") is not None:
                beside += f"  {row['copies']} copies of 64 MB"
            print(f"{row['framework']:11} {row['call']:22} {row['us']:7.2f} us{beside}", flush=True)
    return rows


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
