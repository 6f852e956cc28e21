"""Whole training steps and inference of a network, kconv's front ends beside plain layers.

Every side has the same weights and the same images, and runs in a process of its own, so that the
peak of its resident memory is its own too. Sides take turns; before a time counts, the first loss
(or the outputs' mean) must agree with that of PyTorch's own layers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kconv.models import create

NETWORKS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "keffnet32": ("keffnet_b0", {"ktype": "D6_16ch", "skip_stride_cnt": 3}, 32, 64),
    "keffnet224": ("keffnet_b0", {"ktype": "D6_16ch"}, 224, 16),
    "kmobilenet": ("kmobilenet", {"ktype": "D6_32ch"}, 224, 16),
    "kmobilenet_v3": ("kmobilenet_v3_large", {"ktype": "D6_16ch"}, 224, 16),
    "kdensenet": ("kdensenet_bc_l100", {"ktype": "D6_12ch"}, 32, 64),
}
SIDES = {
    "torch": {},
    "torch-nhwc": {},
    "torch-kept": {  # glibc told to keep freed memory
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
        "MALLOC_TOP_PAD_": "268435456",
    },
    "torch-compile": {},
    "kconv-torch-plain": {},
    "kconv-torch": {},
    "kconv-keras-jax": {"KERAS_BACKEND": "jax"},
}
WARM_UP = 2
"""Steps that compile, and touch memory for the first time."""


def spec_of(network: str) -> Any:
    """The spec, without what is random in training."""
    name, options, size, _ = NETWORKS[network]
    steady = {"dropout": 0.0, "drop_connect": 0.0} if "effnet" in name else {"dropout": 0.0}
    return create(name, classes=10, input_shape=(size, size, 3), **steady, **options)


def batch(network: str, images: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3, H, W) images and their classes."""
    rng = np.random.default_rng(0)
    size = NETWORKS[network][2]
    x = rng.normal(size=(images, 3, size, size)).astype(np.float32)
    return x, np.arange(images) % 10


def run(options: Any) -> list[dict[str, Any]]:
    """Times all sides in turns and prints a table."""
    sides = options.sides or list(SIDES)
    images = options.batch or NETWORKS[options.model][3]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        _save_weights(options.model, weights)
        results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(options.turns):
            for side in sides:
                results[side].append(
                    _in_a_process(options.operation, options.model, side, images, weights)
                )
    reference = results[sides[0]][0]["check"]
    rows = []
    print(f"{options.operation} of {options.model}, {images} images")
    print(f"{'':20} {'best s':>8} {'median':>8} {'images/s':>9} {'peak MB':>8} {'ratio':>6}")
    for side in sides:
        times = [t for result in results[side] for t in result["times"]]
        checks = [result["check"] for result in results[side]]
        if not np.allclose(checks, reference, rtol=1e-3):
            raise SystemExit(f"{side} computes {checks}, expected {reference}")
        peak = max(result["peak"] for result in results[side])
        rows.append({"side": side, "best": min(times), "median": median(times), "peak": peak})
    ours = next((row["best"] for row in rows if row["side"] == "kconv-torch"), rows[-1]["best"])
    for row in rows:
        print(
            f"{row['side']:20} {row['best']:8.3f} {row['median']:8.3f} {images / row['best']:9.1f}"
            f" {row['peak'] / 1e6:8.0f} {row['best'] / ours:6.2f}"
        )
    print("ratio: the best time beside kconv-torch's")
    return rows


def _save_weights(network: str, path: Path) -> None:
    import torch

    import kconv
    import kconv.torch

    torch.manual_seed(0)
    kconv.save_weights(kconv.torch.build(spec_of(network)), path)


def _in_a_process(
    operation: str, network: str, side: str, images: int, weights: Path
) -> dict[str, Any]:
    arguments = [sys.executable, __file__, operation, network, side, str(images), str(weights)]
    environment = os.environ | SIDES[side]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{side} failed:\n{result.stderr[-2000:]}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


def _torch_side(
    side: str, operation: str, network: str, images: int, weights: str
) -> Callable[[], float]:
    import torch
    from torch import nn

    import kconv
    import kconv.torch

    own = not side.startswith("kconv")
    spec = spec_of(network)
    model = kconv.torch.build(
        spec, kernels="torch" if own else "kconv", fused=side == "kconv-torch"
    )
    kconv.load_weights(model, weights)
    x, y = map(torch.from_numpy, batch(network, images))
    if side in ("torch-nhwc", "torch-compile"):
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    call = torch.compile(model) if side == "torch-compile" else model
    if operation == "inference":
        model.eval()

        def infer() -> float:
            with torch.no_grad():
                return float(call(x).softmax(1).square().mean())

        return infer
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-3, alpha=0.9)

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(call(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _keras_side(operation: str, network: str, images: int, weights: str) -> Callable[[], float]:
    import keras

    import kconv
    import kconv.keras

    model = kconv.keras.build(spec_of(network))
    kconv.load_weights(model, weights)
    x, y = batch(network, images)
    x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    model.compile(keras.optimizers.RMSprop(1e-3), "sparse_categorical_crossentropy")
    if operation == "inference":
        return lambda: float(np.square(model.predict_on_batch(x)).mean())
    return lambda: float(model.train_on_batch(x, y))


def _one_side(operation: str, network: str, side: str, images: str, weights: str) -> None:
    """What a process does: prints the first result, the times and the peak memory."""
    import resource

    if side == "kconv-keras-jax":
        call = _keras_side(operation, network, int(images), weights)
    else:
        call = _torch_side(side, operation, network, int(images), weights)
    check = call()
    for _ in range(WARM_UP - 1):
        call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"check": check, "times": times, "peak": peak}))


if __name__ == "__main__":
    _one_side(*sys.argv[1:])
