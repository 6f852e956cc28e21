"""kconv's kernels beside their peers and the machine's limits, in one process.

    python benches/compare.py pointwise|interleave|depthwise|memory|frameworks [--layout NHWC] ...
    python benches/compare.py against OLD_WHEEL ...    # this kconv beside an older one
    python benches/compare.py fuse --models ...        # models of timm and torchvision

Every result is checked against the peers' before anything is timed. Then kconv and the peers take
turns; figures are comparable within one run only. As the peers do, kconv allocates its result
anew in each call; "out=" are its times where the result goes into memory that is there already.
Ratios are those of the best times, and so are the sums, which are also given of the layers bound by
memory and by arithmetic alone. The limit of a layer is the larger of its multiply-adds at the
measured peak and its bytes (inputs and outputs once) at the measured bandwidth of a copy. Beside
the peers stand kconv itself on one thread and, where numbers are bfloat16, in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import against
import frameworks
import fuse
import history
import networks
import numpy as np
import plans
from limits import Limits, best, measure_limits, seconds
from numpy.typing import NDArray

import kconv
from kconv import models
from kconv.models import graph

Array = NDArray[Any]
Call = Callable[[], Any]
Calls = dict[str, Call]

# The networks whose layers are timed: name, options, batch.
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "keffnet224": ("keffnet_b0", {"ktype": "D6_16ch", "input_shape": (224, 224, 3)}, 32),
    "keffnet32": (
        "keffnet_b0",
        {"ktype": "D6_16ch", "input_shape": (32, 32, 3), "skip_stride_cnt": 3},
        64,
    ),
    "keffnet32v3": (
        "keffnet_b0",
        {"ktype": "D6v3_4ch", "input_shape": (32, 32, 3), "skip_stride_cnt": 3},
        64,
    ),
    "kmobilenet": ("kmobilenet", {"ktype": "D6_32ch"}, 16),
    "kmobilenet_v3": ("kmobilenet_v3_large", {"ktype": "D6_16ch"}, 16),
}
PEERS = ("torch-nchw", "torch-nhwc", "torch-einsum", "jax-conv", "jax-einsum", "numpy-einsum")
ONE_THREAD = "one thread"
# kconv, allocating and not; in the same two ways, the convolution without the fused interleave, and
# beside bfloat16 the same call in float32; the convolution, then the interleave; on one thread.
WITHOUT = ("without", "without-out")
OURS = ("kconv", "kconv-out", *WITHOUT, "apart", "float32", "float32-out", ONE_THREAD)
# XLA's grouped convolutions can take thousands of times as long as the others: one turn is enough.
ONE_TURN = ("jax-conv",)


@dataclass(frozen=True)
class Convolution:
    """A convolution as other libraries know it: (N, C, H, W) images and gradient, OIHW weights."""

    x: Array
    w: Array
    g: Array
    groups: int
    padding: tuple[int, int]
    stride: int


@dataclass
class Row:
    """One operation of one layer."""

    layer: str
    operation: str
    multiply_adds: float
    bytes: float
    limit: float
    bound: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    medians: dict[str, float] = field(default_factory=dict)

    @property
    def best_peer(self) -> float:
        """The time of the fastest peer, NaN without any."""
        peers = (t for name, t in self.milliseconds.items() if name not in OURS)
        return min(peers, default=np.nan)


@dataclass(frozen=True)
class Case:
    """A layer at its place in a network."""

    layer: Any
    size: tuple[int, int]
    step: int
    """Of the interleave that follows it; 1 for none."""

    @property
    def label(self) -> str:
        """Channels, groups or kernel, stride, and the size of the images."""
        layer, (height, width) = self.layer, self.size
        if isinstance(layer, graph.DepthwiseConv):
            k = layer.kernel_size
            return f"{layer.in_channels} {k}x{k}/{layer.strides} {height}x{width}"
        step = f" by {self.step}" if self.step > 1 else ""
        return f"{layer.in_channels}>{layer.filters}/{layer.groups}{step} {height}x{width}"


def cases(network: str, operation: str) -> Iterator[Case]:
    """The distinct layers of an operation outside squeeze-excite."""
    name, options, _ = NETWORKS[network]
    layer_graph = models.create(name, classes=10, **options).graph()
    steps = interleave_steps(layer_graph) if operation == "interleave" else {}
    kind = graph.DepthwiseConv if operation == "depthwise" else graph.Conv
    seen = set()
    for layer in layer_graph.layers:
        if not isinstance(layer, kind):
            continue
        if isinstance(layer, graph.Conv) and not layer.is_pointwise:
            continue
        if operation == "interleave" and layer.name not in steps:
            continue
        height, width, _ = layer_graph[layer.inputs[0]].shape
        case = Case(layer, (height, width), steps.get(layer.name, 1))
        if (height, width) != (1, 1) and case.label not in seen:
            seen.add(case.label)
            yield case


def interleave_steps(layer_graph: graph.Graph) -> dict[str, int]:
    """The steps of the interleaves that follow convolutions, by the names of these."""
    steps = {}
    for layer in layer_graph.layers:
        if isinstance(layer, graph.Interleave):
            source = layer_graph[layer.inputs[0]]
            while isinstance(source, graph.BatchNorm | graph.Activation):
                source = layer_graph[source.inputs[0]]
            if isinstance(source, graph.Conv):
                steps[source.name] = layer.step
    return steps


class Bench:
    """Operations of one kind of layer, by kconv and by its peers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.layout: str = options.layout
        if options.dtype == "bfloat16":
            __import__("ml_dtypes")  # tells NumPy
        self.dtype = np.dtype(options.dtype)
        self.patience: float = options.patience
        self.batch: int | None = options.batch
        self.rng = np.random.default_rng(0)
        self.peers = self._find(options.peers)

    def _find(self, names: list[str]) -> list[str]:
        found = []
        for name in names:
            if name == "numpy-einsum" and self.dtype == "bfloat16":
                print(f"peer {name}: left out, it has no bfloat16")
                continue
            module = "torch" if name.startswith("torch") else name.split("-")[0]
            try:
                __import__(module)
                found.append(name)
            except ImportError:
                print(f"peer {name}: missing (no module {module})")
        if any(name.startswith("torch") for name in found):
            import torch

            torch.set_num_threads(kconv.get_num_threads())
        if any(name.startswith("jax") for name in found):
            import jax

            jax.config.update("jax_enable_x64", True)
        return found

    def random(self, *shape: int) -> Array:
        """Random values."""
        drawn = np.float64 if self.dtype == np.float64 else np.float32
        return self.rng.standard_normal(shape, drawn).astype(self.dtype, copy=False)

    def array(self, n: int, c: int, h: int, w: int) -> Array:
        """Random images, (N, C, H, W), in the memory order of the layout."""
        x = self.random(n, c, h, w)
        return x if self.layout == "NCHW" else as_nhwc(x)

    def pointwise(self, case: Case, n: int) -> Iterator[tuple[str, Calls]]:
        layer, size = case.layer, case.size
        c_in, c_out, groups = layer.in_channels, layer.filters, layer.groups
        x, g = self.array(n, c_in, *size), self.array(n, c_out, *size)
        w = self.random(c_out, c_in // groups)
        kw = {"groups": groups}
        calls = {
            "forward": ours(kconv.pointwise_conv, x, w, like=g, **kw),
            "grad_input": ours(kconv.pointwise_conv_grad_input, g, w, like=x, **kw),
            "grad_weight": ours(kconv.pointwise_conv_grad_weight, x, g, like=w, **kw),
        }
        self._convolutions(calls, Convolution(x, w[:, :, None, None], g, groups, (0, 0), 1))
        einsums = [peer for peer in self.peers if peer.endswith("einsum")]
        xs, gs = (np.ascontiguousarray(a).reshape(n, groups, -1, size[0] * size[1]) for a in (x, g))
        ws = w.reshape(groups, c_out // groups, -1)
        equations = {
            "forward": ("goi,ngip->ngop", ws, xs),
            "grad_input": ("goi,ngop->ngip", ws, gs),
            "grad_weight": ("ngop,ngip->goi", gs, xs),
        }
        for peer in einsums:
            for operation, (equation, a, b) in equations.items():
                calls[operation][peer] = einsum(peer, equation, a, b)
        yield from calls.items()

    def depthwise(self, case: Case, n: int) -> Iterator[tuple[str, Calls]]:
        layer, size = case.layer, case.size
        c, k, stride = layer.in_channels, layer.kernel_size, layer.strides
        pad = k // 2 if layer.padding == "same" else 0
        x = self.array(n, c, *size)
        w = self.random(c, k, k)
        kw = {"stride": stride, "padding": pad}
        g = self.array(n, c, *kconv.depthwise_conv(x[:1, :1], w[:1], **kw).shape[2:])
        calls = {
            "forward": ours(kconv.depthwise_conv, x, w, like=g, **kw),
            "grad_input": ours(kconv.depthwise_conv_grad_input, g, w, size, like=x, **kw),
            "grad_weight": ours(kconv.depthwise_conv_grad_weight, x, g, k, like=w, **kw),
        }
        self._convolutions(calls, Convolution(x, w[:, None], g, c, (pad, pad), stride))
        yield from calls.items()

    def interleave(self, case: Case, n: int) -> Iterator[tuple[str, Calls]]:
        """Convolution and gradients with the interleave fused, beside both apart, and without."""
        layer, step = case.layer, case.step
        x = self.array(n, layer.in_channels, *case.size)
        g = self.array(n, layer.filters, *case.size)
        w = self.random(layer.filters, layer.in_channels // layer.groups)
        conv, by_input = kconv.pointwise_conv, kconv.pointwise_conv_grad_input
        by_weight, undo = kconv.pointwise_conv_grad_weight, kconv.deinterleave
        kw = {"groups": layer.groups}
        apart = {
            "forward": lambda: kconv.interleave(conv(x, w, **kw), step),
            "grad_input": lambda: by_input(undo(g, step), w, **kw),
            "grad_weight": lambda: by_weight(x, undo(g, step), **kw),
        }
        assert np.array_equal(conv(x, w, interleave=step, **kw), apart["forward"]())
        for name, function, arguments, like in (
            ("forward", conv, (x, w), g),
            ("grad_input", by_input, (g, w), x),
            ("grad_weight", by_weight, (x, g), w),
        ):
            calls = ours(function, *arguments, like=like, interleave=step, **kw)
            without = ours(function, *arguments, like=like, **kw)
            calls |= {"without": without["kconv"], "without-out": without["kconv-out"]}
            yield name, calls | {"apart": apart[name]}

    def _convolutions(self, calls: dict[str, Calls], conv: Convolution) -> None:
        """The peers that have the convolution itself."""
        self._torch(calls, conv)
        self._jax(calls, conv)

    def _torch(self, calls: dict[str, Calls], conv: Convolution) -> None:
        """PyTorch's convolution and its gradients, in either memory format."""
        padding, stride, groups = conv.padding, conv.stride, conv.groups
        for peer in ("torch-nchw", "torch-nhwc"):
            if peer not in self.peers:
                continue
            import torch

            form = torch.channels_last if peer == "torch-nhwc" else torch.contiguous_format
            arrays = (conv.x, conv.w, conv.g)
            tx, tw, tg = (tensor(a).contiguous(memory_format=form) for a in arrays)
            calls["forward"][peer] = lambda tx=tx, tw=tw: torch.nn.functional.conv2d(
                tx, tw, None, stride, padding, 1, groups
            )
            for operation, mask in (
                ("grad_input", [True, False, False]),
                ("grad_weight", [False, True, False]),
            ):
                calls[operation][peer] = lambda tx=tx, tw=tw, tg=tg, mask=mask: (
                    torch.ops.aten.convolution_backward(
                        tg, tx, tw, None, [stride] * 2, padding, [1, 1], False, [0, 0], groups, mask
                    )[mask.index(True)]
                )

    def _jax(self, calls: dict[str, Calls], conv: Convolution) -> None:
        """JAX's convolution and its gradients, where a call is not beyond the user's patience."""
        if "jax-conv" not in self.peers:
            return
        import jax

        x, w, g = conv.x, conv.w, conv.g
        if self.layout == "NHWC":
            x, g, w = x.transpose(0, 2, 3, 1), g.transpose(0, 2, 3, 1), w.transpose(2, 3, 1, 0)
        axes = ("NCHW", "OIHW", "NCHW") if self.layout == "NCHW" else ("NHWC", "HWIO", "NHWC")

        def convolution(x: Any, w: Any) -> Any:
            return jax.lax.conv_general_dilated(
                x,
                w,
                (conv.stride, conv.stride),
                [(side, side) for side in conv.padding],
                dimension_numbers=axes,
                feature_group_count=conv.groups,
            )

        def by_input(x: Any, w: Any, g: Any) -> Any:
            return jax.vjp(lambda x: convolution(x, w), x)[1](g)[0]

        def by_weight(x: Any, w: Any, g: Any) -> Any:
            return jax.vjp(lambda w: convolution(x, w), w)[1](g)[0]

        functions = {
            "forward": lambda x, w, g: convolution(x, w),
            "grad_input": by_input,
            "grad_weight": by_weight,
        }
        whole, one = (tuple(map(jax.numpy.asarray, a)) for a in ((x, w, g), (x[:1], w, g[:1])))
        for operation, function in functions.items():
            back = (0, 1, 2, 3)
            if self.layout == "NHWC":
                back = (3, 2, 0, 1) if operation == "grad_weight" else (0, 3, 1, 2)
            jitted = jax.jit(function)

            def call(jitted: Any = jitted, arrays: Any = whole, back: Any = back) -> Any:
                return np.asarray(jitted(*arrays)).transpose(back)

            estimate = len(x) * best([partial(call, arrays=one)], 1)[0]
            if estimate <= self.patience:
                calls[operation]["jax-conv"] = call
            else:
                print(f"jax-conv left out: {operation} would take about {estimate:.2g} s a call")

    def run(self, operation: str, networks: list[str], limits: Limits, turns: int) -> list[Row]:
        """Checks, then times, every distinct layer of the networks; prints as it goes."""
        rows = []
        for network in networks:
            print(f"\n{network}: {operation}, {self.layout} memory, {self.dtype}")
            print_header(columns := self._columns(operation))
            total: dict[str, list[Row]] = {}
            n = self.batch or NETWORKS[network][-1]
            for case in cases(network, operation):
                for name, calls in getattr(self, operation)(case, n):
                    row = self._time(name, case, n, calls, limits, turns)
                    rows.append(row)
                    print_row(row, columns)
                    total.setdefault(name, []).append(row)
            for same in total.values():
                print_row(sum_of(same), columns)
                for bound in ("memory", "arithmetic"):
                    if some := [row for row in same if row.bound == bound]:
                        print_row(sum_of(some, f"{len(some)} bound by {bound}"), columns)
        if any(row.best_peer > 0 for row in rows):
            print_slower(rows)
        return rows

    def _columns(self, operation: str) -> list[str]:
        """What the table gives ratios to."""
        if operation == "interleave":
            beside = [*WITHOUT, "apart"]
        else:
            einsums = operation == "pointwise"
            peers = [name for name in self.peers if einsums or "einsum" not in name]
            beside = [*peers, "best peer"]
        wide = ["float32", "float32-out"] if self.dtype == "bfloat16" else []
        return [*beside, ONE_THREAD, *wide]

    def _time(
        self,
        operation: str,
        case: Case,
        n: int,
        calls: Calls,
        limits: Limits,
        turns: int,
    ) -> Row:
        layer, size, label = case.layer, case.size, case.label
        c_in, c_out = layer.in_channels, layer.shape[-1]
        pixels_in, pixels_out = n * size[0] * size[1], n * layer.shape[0] * layer.shape[1]
        if isinstance(layer, graph.Conv):
            multiply_adds = pixels_out * c_out * c_in // layer.groups
        else:
            multiply_adds = pixels_out * c_out * layer.kernel_size**2
        moved = (pixels_in * c_in + pixels_out * c_out) * self.dtype.itemsize
        check(label, operation, calls)
        limit = limits.milliseconds(multiply_adds, moved)
        bound = "memory" if limits.milliseconds(0, moved) == limit else "arithmetic"
        row = Row(label, operation, multiply_adds, moved, limit, bound)
        together = {name: call for name, call in calls.items() if name not in ONE_TURN}
        times = dict(zip(together, seconds(list(together.values()), turns), strict=True))
        for name in set(calls) - set(together):
            start = time.perf_counter()
            calls[name]()  # which is warm, as it was checked
            times[name] = [time.perf_counter() - start]
        row.milliseconds = {name: 1e3 * min(taken) for name, taken in times.items()}
        row.medians = {name: 1e3 * median(taken) for name, taken in times.items()}
        return row


def ours(function: Callable[..., Array], *arguments: Any, like: Array, **options: Any) -> Calls:
    """kconv's call with a result that it allocates, and with one like an array that is there."""
    call = partial(function, *arguments, **options)
    calls = {"kconv": call, "kconv-out": partial(call, out=np.copy(like, order="K"))}
    calls[ONE_THREAD] = partial(on_one_thread, call)
    if like.dtype == "bfloat16":
        wide = [a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in arguments]
        call = partial(function, *wide, **options)
        calls |= {"float32": call, "float32-out": partial(call, out=like.astype(np.float32))}
    return calls


def on_one_thread(call: Call) -> Any:
    """The result of a call of kconv's on one thread."""
    threads = kconv.get_num_threads()
    kconv.set_num_threads(1)
    try:
        return call()
    finally:
        kconv.set_num_threads(threads)


def sum_of(rows: list[Row], label: str = "sum") -> Row:
    """The sums over rows, of peers that did them all."""
    names = set.intersection(*(set(row.milliseconds) for row in rows))
    total = Row(label, rows[0].operation, *(0.0,) * 3, bound="")
    for key in ("multiply_adds", "bytes", "limit"):
        setattr(total, key, sum(getattr(row, key) for row in rows))
    for times in ("milliseconds", "medians"):
        each = {name: sum(getattr(row, times)[name] for row in rows) for name in names}
        setattr(total, times, each)
    total.milliseconds["best peer"] = sum(row.best_peer for row in rows)
    return total


def as_nhwc(x: Array) -> Array:
    """The same (N, C, H, W) array in NHWC memory."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def tensor(a: Array) -> Any:
    """PyTorch's tensor of the same memory."""
    import torch

    if a.dtype == "bfloat16":
        return torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def einsum(peer: str, equation: str, a: Array, b: Array) -> Call:
    """A grouped product by PyTorch's, JAX's or NumPy's einsum."""
    if peer == "torch-einsum":
        import torch

        ta, tb = tensor(a), tensor(b)
        return lambda: torch.einsum(equation, ta, tb)
    if peer == "jax-einsum":
        import jax

        jitted = jax.jit(lambda a, b: jax.numpy.einsum(equation, a, b))
        ja, jb = jax.numpy.asarray(a), jax.numpy.asarray(b)
        return lambda: jitted(ja, jb).block_until_ready()
    return lambda: np.einsum(equation, a, b, optimize=True)


def check(label: str, operation: str, calls: Calls) -> None:
    """Stops unless all peers give kconv's result."""
    ours = np.array(calls["kconv"]())
    narrow = ours.dtype == "bfloat16"
    ours = ours.astype(np.float32) if narrow else ours
    for name, call in calls.items():
        if name in ("kconv", *WITHOUT):
            continue
        result = call()
        # PyTorch gives NumPy no bfloat16.
        theirs = result.float() if narrow and name.startswith("torch") else result
        theirs = np.asarray(theirs, ours.dtype).reshape(ours.shape)
        error = np.abs(ours - theirs).max() / np.abs(ours).max()
        if not error < (2e-2 if narrow else 1e-4):
            sys.exit(f"{label} {operation}: kconv and {name} differ by {error:.1e}")


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the memory of results costs: pages faulted in on first touch, or recycled, or given."""
    rows = []
    for megabytes in (1, 4, 16, 64):
        x = np.ones((megabytes * 4, 64, 32, 32), np.float32)
        out = np.ones_like(x)
        w = np.ones((64, 16), np.float32)
        recycled = partial(kconv.pointwise_conv, x, w, groups=4)

        def fresh(recycled: Call = recycled) -> Any:
            kconv.release_memory()
            return recycled()

        calls = [fresh, recycled, partial(kconv.pointwise_conv, x, w, groups=4, out=out)]
        times = [t * 1e3 for t in best(calls, options.turns)]
        rows.append(
            {"MB": megabytes} | dict(zip(("fresh", "recycled", "given"), times, strict=True))
        )
        print(
            f"{megabytes:4} MB: {times[0]:8.2f} ms into fresh, {times[1]:8.2f} into recycled, "
            f"{times[2]:8.2f} into given memory"
        )
    return rows


def print_header(columns: list[str]) -> None:
    """The names of the columns of `print_row`."""
    titles = ("ms", "median", "out= ms", "median", "GFLOP/s", "GB/s", "x limit", *columns)
    widths = (9, 8, 9, 8, 8, 6, 8, *(max(len(name), 6) + 2 for name in columns))
    row = "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True))
    print(f"{'':22} {'':11}{row}")


def print_row(row: Row, columns: list[str]) -> None:
    """One line: times, speeds, share of the limit, and how many times as long peers take."""
    ms, out = row.milliseconds["kconv"], row.milliseconds["kconv-out"]
    all_times = {"best peer": row.best_peer} | row.milliseconds
    ratios = ""
    for name in columns:
        ratio = all_times.get(name, np.nan) / (out if name.endswith("-out") else ms)
        text = "-" if np.isnan(ratio) else f"{ratio:.3g}" if ratio >= 100 else f"{ratio:.2f}"
        ratios += f"{text:>{max(len(name), 6) + 2}}"
    speed, bandwidth = 2 * row.multiply_adds / ms / 1e6, row.bytes / ms / 1e6
    print(
        f"{row.layer:22} {row.operation:11}{ms:9.3f}{row.medians['kconv']:8.3f}"
        f"{out:9.3f}{row.medians['kconv-out']:8.3f}{speed:8.0f}{bandwidth:6.1f}"
        f"{ms / row.limit:8.2f}{ratios}",
        flush=True,
    )


def print_slower(rows: list[Row]) -> None:
    """How many operations, and which, take longer than their best peer."""
    slower = [row for row in rows if row.best_peer < row.milliseconds["kconv"]]
    print(f"\nslower than the best peer: {len(slower)} of {len(rows)} operations")
    for row in slower:
        ratio = row.best_peer / row.milliseconds["kconv"]
        print(f"  {row.layer:22} {row.operation:11} {ratio:.2f}")


def roofline(rows: list[Row], limits: Limits, path: Path, title: str) -> None:
    """Every operation against the machine's limits, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    operations = list(dict.fromkeys(row.operation for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in row.milliseconds))
    names.remove(ONE_THREAD)
    names.sort(key=lambda name: name in OURS)  # kconv's last, on top of the others
    styles = {"kconv": ("o", "black"), "kconv-out": ("o", "white")}
    others = zip("v^s<>Dp", ("C0", "C1", "C2", "C3", "C4", "C5", "C6"), strict=True)
    styles |= dict(zip((name for name in names if name not in styles), others, strict=False))
    intensities = [2 * row.multiply_adds / row.bytes for row in rows]
    ridge = limits.gflops / limits.gbytes
    ends = [min(*intensities, ridge) / 1.5, ridge, max(*intensities, ridge) * 1.5]
    size = (3 + 3 * len(operations), 4)
    figure, panels = pyplot.subplots(
        1, len(operations), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axes, operation in zip(panels[0], operations, strict=True):
        roof = [min(limits.gflops, intensity * limits.gbytes) for intensity in ends]
        axes.loglog(ends, roof, "k-", linewidth=1, label="limit of memory or arithmetic")
        for name in names:
            found = [r for r in rows if r.operation == operation and name in r.milliseconds]
            marker, color = styles[name]
            axes.plot(
                [2 * row.multiply_adds / row.bytes for row in found],
                [2 * row.multiply_adds / row.milliseconds[name] / 1e6 for row in found],
                marker,
                color=color,
                markeredgecolor="black" if name in OURS else color,
                markersize=5 if name in OURS else 3.5,
                alpha=1 if name in OURS else 0.6,
                label={"kconv-out": "kconv, out="}.get(name, name),
            )
        axes.set(xlabel="operations per byte", title=operation.replace("_", " "))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(ticker.LogFormatter())  # labels where there are few decades
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("GFLOP/s")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"roofline: {path}")


def versions(libraries: bool = True) -> str:
    """Machine, instruction set, threads and installed versions, in one line."""
    info = kconv.build_info()
    processors = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", processors.read_text() if processors.exists() else "")
    parts = [
        names[0] if names else platform.processor() or platform.machine(),
        f"{info['isa']}, {info['threads']} threads",
        f"kconv {info['version']}",
    ]
    for name in ("numpy", "torch", "jax", "keras", "onnxruntime", "openvino") * libraries:
        with suppress(metadata.PackageNotFoundError):
            parts.append(f"{name} {metadata.version(name)}")
    return "; ".join(parts)


def main() -> None:
    """Parses the command line and runs."""
    if sys.argv[1:2] == ["against"]:
        sys.exit(against.main(sys.argv[2:]))
    if sys.argv[1:2] == ["plans"]:
        sys.exit(plans.main(sys.argv[2:]))
    if sys.argv[1:2] == ["fuse"]:
        sys.exit(fuse.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    operations = (
        "pointwise",
        "interleave",
        "depthwise",
        "memory",
        "frameworks",
        "step",
        "inference",
    )
    parser.add_argument("operation", nargs="?", choices=operations, default="pointwise")
    parser.add_argument("--layout", choices=("NCHW", "NHWC"), default="NCHW")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=kconv.get_num_threads())
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["keffnet32"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--patience", type=float, default=2, help="seconds for a call of jax-conv")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--model", choices=networks.NETWORKS, default="keffnet32")
    parser.add_argument("--batch", type=int, help="images (default: the network's)")
    parser.add_argument("--sides", nargs="+", choices=networks.SIDES, help="of step and inference")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--history", action="store_true", help="keep step's and inference's ratios")
    parser.add_argument("--roofline", type=Path, metavar="PNG")
    options = parser.parse_args()
    if options.history and options.operation not in ("step", "inference"):
        parser.error("--history is of step and inference")
    kconv.set_num_threads(options.threads)
    os.environ["NPROC"] = str(options.threads)  # from which XLA takes its number of threads
    if options.operation == "memory":
        result: Any = memory(options)
    elif options.operation == "frameworks":
        result = frameworks.run(options.turns)
    elif options.operation in ("step", "inference"):
        result = networks.run(options)
        if options.history:
            history.append(result["what"], result["rows"])
    else:
        bench = Bench(options)
        limits = measure_limits()
        print(f"limits: {limits.gflops:.0f} GFLOP/s, {limits.gbytes:.1f} GB/s")
        rows = bench.run(options.operation, options.networks, limits, options.turns)
        result = {"limits": asdict(limits), "rows": [asdict(row) for row in rows]}
        if options.roofline:
            what = f"{options.operation}, {options.layout} memory, {options.dtype}"
            roofline(rows, limits, options.roofline, f"{what}\n{versions(libraries=False)}")
    print(f"\n{versions()}")
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(), "result": result}, indent=1))


if __name__ == "__main__":
    main()
