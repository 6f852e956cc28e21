"""Models of timm and torchvision: layer by layer in both layouts, accelerated, fused.

    python benches/compare.py fuse --models mobilenetv2_100 tv.shufflenet_v2_x1_0 --size 96
    python benches/compare.py fuse --models keras.MobileNetV2 --size 96 --batch 4

Models of keras.applications run as they are and fused, on JAX, which compiles them, and on PyTorch.

Each side runs in a process of its own, so that the peak of its resident memory is its own, from
the second step on; the processes take turns, call by call. Before a time counts, losses must agree
with the first side's.
The bound is that of the convolutions and linear layers alone: for each the larger of its
multiply-adds at the measured peak and its input, output and weights at the bandwidth of a copy of
memory, three times for a step.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMM = (
    *("efficientnet_b0", "tf_efficientnet_lite0", "efficientnetv2_rw_t", "mobilenetv2_100"),
    *("mobilenetv3_large_100", "mobilenetv4_conv_small", "mnasnet_100", "ghostnet_100"),
    *("regnety_008", "rexnet_100", "resnet50", "densenet121", "convnext_atto"),
)
TORCHVISION = ("tv.mobilenet_v3_small", "tv.shufflenet_v2_x1_0", "tv.efficientnet_b0")
KERAS = (
    *("keras.MobileNetV2", "keras.EfficientNetB0", "keras.MobileNetV3Large"),
    *("keras.DenseNet121", "keras.NASNetMobile"),
)
SIDES = (
    *("eager", "channels_last", "compile"),
    *("accelerate", "accelerate_channels_last", "fuse", "fuse_channels_last"),
)
KERAS_SIDES = ("jax", "jax_fuse", "torch", "torch_fuse")
KINDS = ("step", "inference", "one")
"""A training step (SGD), inference of the batch, and of one image."""


def main(arguments: list[str]) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="compare.py fuse", description=__doc__)
    parser.add_argument("--models", nargs="+", default=[*TIMM, *TORCHVISION, *KERAS])
    every = (*SIDES, *KERAS_SIDES)
    parser.add_argument("--sides", nargs="+", choices=every, default=every)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    for model in options.models:
        rows += _model(model, options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


class _Side:
    """A process that makes a call whenever it is asked to."""

    def __init__(self, name: str, model: str, options: Any) -> None:
        call = [name, model, options.size, options.batch, options.threads]
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, __file__, *map(str, call)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.best: dict[str, float] = {}
        self.about = self._answer()

    def call(self, kind: str) -> float:
        """Seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind}\n")
        self._process.stdin.flush()
        seconds: float = self._answer()["seconds"]
        self.best[kind] = min(self.best.get(kind, seconds), seconds)
        return seconds

    def finish(self) -> int:
        """The most bytes that were resident."""
        assert self._process.stdin is not None
        self._process.stdin.write("end\n")
        self._process.stdin.close()
        return int(self._answer()["peak"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise _MissingError(f"{self.name} ended with status {self._process.wait()}")
        return dict(json.loads(line))


class _MissingError(Exception):
    """A side cannot run here."""


def _model(model: str, options: Any) -> list[dict[str, Any]]:
    sides = []
    known = KERAS_SIDES if model.startswith("keras.") else SIDES
    for name in (side for side in options.sides if side in known):
        try:
            sides.append(_Side(name, model, options))
        except _MissingError as error:
            print(f"{model}, {error}: missing", flush=True)
    for kind in KINDS:
        for turn in range(options.turns + 1):
            for side in sides:
                side.call(kind)
                if not turn:  # the first call touches memory for the first time
                    side.best.pop(kind)
    losses = {side.name: side.about["loss"] for side in sides}
    for name, loss in losses.items():
        if abs(loss - sides[0].about["loss"]) > 1e-3 * abs(loss):
            raise SystemExit(f"{model}: {name} computes a loss of {loss}, expected {losses}")
    print(
        f"\n{model}, {options.batch} x {options.size} x {options.size}, {options.threads} threads"
    )
    print(f"{'':26}{'step ms':>9}{'inference':>10}{'one image':>10}{'peak MB':>9}{'first s':>9}")
    rows = []
    for side in sides:
        peak = side.finish()
        times = [1e3 * side.best[kind] for kind in KINDS]
        last = f"{peak / 1e6:9.0f}{side.about['first step']:9.2f}"
        print(f"{side.name:26}{times[0]:9.1f}{times[1]:10.1f}{times[2]:10.2f}{last}")
        rows.append({"model": model, "side": side.name, "peak": peak, **side.best, **side.about})
    bounds = [side.about["bound"] for side in sides if "bound" in side.about]
    if bounds:  # each has measured the machine's limits
        times = [1e3 * min(bound[kind] for bound in bounds) for kind in KINDS]
        print(f"{'bound':26}{times[0]:9.1f}{times[1]:10.1f}{times[2]:10.2f}")
    _print_ratios(sides)
    return rows


def _print_ratios(sides: list[_Side]) -> None:
    """Of the framework's own layers beside kconv's, PyTorch's in the faster of its two layouts."""
    for side in sides:
        backend, _, last = side.name.rpartition("_")
        own = (backend,) if last == "fuse" and backend else ("eager", "channels_last")
        peers = [x for x in sides if x.name in own]
        if peers and (last == "fuse" or side.name.startswith(("accelerate", "fuse"))):
            layers = side.about.get("layers")
            note = f"; {layers[0]} of {layers[1]} layers fused" if layers else ""
            print(f"{side.name}: {_ratios(peers, side)} of {' or '.join(own)}{note}")
    fused = {side.name: side for side in sides}
    if "jax_fuse" in fused and "torch_fuse" in fused:
        print(f"jax_fuse: {_ratios([fused['torch_fuse']], fused['jax_fuse'])} of torch_fuse")


def _ratios(peers: list[_Side], side: _Side) -> str:
    """How many times a side's times the least of its peers' are."""
    ratios = [min(x.best[kind] for x in peers) / side.best[kind] for kind in KINDS]
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def _serve(side: str, name: str, size: int, batch: int, threads: int) -> None:
    """What a process does: says what it has made, then times the calls that it is told."""
    if name.startswith("keras."):
        from fuse_keras import make
    else:
        make = _make
    about, calls, convolutions = make(side, name.removeprefix("keras."), size, batch, threads)
    if convolutions:
        about["bound"] = _bound(convolutions, batch)
    start = time.perf_counter()
    about["loss"] = calls["step"]()
    about["first step"] = time.perf_counter() - start
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            status = Path("/proc/self/status").read_text()
            peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
            print(json.dumps({"peak": peak}), flush=True)
            return
        start = time.perf_counter()
        calls[line.strip()]()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def _make(side: str, name: str, size: int, batch: int, threads: int) -> tuple[Any, ...]:
    """What the side knows of its model, its calls by their kinds, and its layers for the bound."""
    import torch

    import kconv
    import kconv.torch

    kconv.set_num_threads(threads)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model: Any = _made(name)
    x, labels = torch.randn(batch, 3, size, size), torch.arange(batch)
    about: dict[str, Any] = {}
    convolutions = _convolutions(model, x[:1]) if side == "fuse" else []
    if side.endswith("channels_last"):
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    if side.startswith("accelerate"):
        kconv.torch.accelerate(model)
    if side.startswith("fuse"):
        start = time.perf_counter()
        kconv.torch.fuse(model)
        about["fuse seconds"] = time.perf_counter() - start
        about["layers"] = _layers(model)
    call = torch.compile(model) if side == "compile" else model
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def step() -> float:
        model.train()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(call(x), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    def infer(images: Any) -> None:
        model.eval()
        with torch.no_grad():
            call(images)

    calls: dict[str, Callable[[], Any]] = {
        "step": step,
        "inference": lambda: infer(x),
        "one": lambda: infer(x[:1]),
    }
    return about, calls, convolutions


def _convolutions(model: Any, x: Any) -> list[tuple[int, int, int]]:
    """Multiply-adds of an image, its values and the weights, of each convolution and linear."""
    import torch
    from torch import nn

    calls: list[tuple[int, int, int]] = []

    def record(layer: Any, inputs: Any, y: Any) -> None:
        weights = layer.weight.numel()
        multiply_adds = y.numel() * weights // layer.weight.shape[0]
        calls.append((multiply_adds, inputs[0].numel() + y.numel(), weights))

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return calls


def _bound(convolutions: list[tuple[int, int, int]], batch: int) -> dict[str, float]:
    """The least seconds of each kind of call, as the machine's limits have them."""
    from limits import measure_limits

    limits = measure_limits()

    def least(images: int) -> float:
        sizes = ((images * adds, 4 * (images * values + w)) for adds, values, w in convolutions)
        return sum(limits.milliseconds(adds, size) for adds, size in sizes) / 1e3

    return {"step": 3 * least(batch), "inference": least(batch), "one": least(1)}


def _made(name: str) -> Any:
    """The model, with new weights and without what is random in training."""
    if name.startswith("tv."):
        from torch import nn
        from torchvision import models

        model = getattr(models, name[3:])()
        for module in model.modules():
            if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
                module.p = 0.0
        return model
    import timm

    return timm.create_model(name, drop_rate=0.0)


def _layers(model: Any) -> tuple[int, int]:
    """How many convolutions and norms are in chains, and how many there are."""
    from torch import nn

    import kconv.torch

    kinds = (nn.Conv2d, nn.modules.batchnorm._BatchNorm)
    names = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    outside = names & set(kconv.torch.report(model).kept)
    return len(names) - len(outside), len(names)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
