"""kconv's kernels beside their peers and the machine's limits, in one process.

    python benches/compare.py pointwise|interleave|depthwise|memory|frameworks [--layout NHWC] ...

Every result is checked against the peers' before anything is timed. Then kconv and the peers take
turns, and the best of the turns counts; figures are comparable within one run only. The limit of a
layer is the larger of its multiply-adds at the measured peak and its bytes (inputs and outputs
once) at the measured bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import frameworks
import networks
import numpy as np
from limits import Limits, best, measure_limits
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


@dataclass
class Row:
    """One operation of one layer."""

    layer: str
    operation: str
    multiply_adds: float
    bytes: float
    limit: float
    milliseconds: dict[str, float] = field(default_factory=dict)

    @property
    def best_peer(self) -> float:
        """The time of the fastest peer, NaN without any."""
        return min((t for name, t in self.milliseconds.items() if name != "kconv"), default=np.nan)


def layers(network: str, kind: type[graph.Layer]) -> Iterator[tuple[Any, tuple[int, int], int]]:
    """The distinct layers of a kind outside squeeze-excite: layer, height and width, batch."""
    name, options, batch = NETWORKS[network]
    layer_graph = models.create(name, classes=10, **options).graph()
    seen = set()
    for layer in layer_graph.layers:
        if not isinstance(layer, kind):
            continue
        if isinstance(layer, graph.Conv) and not layer.is_pointwise:
            continue
        height, width, channels = layer_graph[layer.inputs[0]].shape
        if (height, width) == (1, 1):
            continue
        key = (channels, layer.shape, getattr(layer, "groups", 0), getattr(layer, "strides", 1))
        if (*key, height, width) not in seen:
            seen.add((*key, height, width))
            yield layer, (height, width), batch


class Bench:
    """Operations of one kind of layer, by kconv and by its peers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.layout: str = options.layout
        self.dtype = np.dtype(options.dtype)
        self.preallocated: bool = options.preallocated
        self.rng = np.random.default_rng(0)
        self.peers = self._find(options.peers)

    def _find(self, names: list[str]) -> list[str]:
        found = []
        for name in names:
            module = "torch" if name.startswith("torch") else name.split("-")[0]
            try:
                __import__(module)
                found.append(name)
            except ImportError:
                print(f"peer {name}: missing (no module {module})")
        if any(name.startswith("torch") for name in found):
            import torch

            torch.set_num_threads(kconv.get_num_threads())
        return found

    def array(self, n: int, c: int, h: int, w: int) -> Array:
        """Random images, (N, C, H, W), in the memory order of the layout."""
        x = self.rng.standard_normal((n, c, h, w), self.dtype)
        return x if self.layout == "NCHW" else as_nhwc(x)

    def empty(self, like: Array) -> Array | None:
        """An array for a result, touched, or None if each call is to allocate its own."""
        return np.copy(like, order="K") if self.preallocated else None

    def pointwise(
        self, layer: graph.Conv, size: tuple[int, int], n: int
    ) -> Iterator[tuple[str, Calls]]:
        c_in, c_out, groups = layer.in_channels, layer.filters, layer.groups
        x, g = self.array(n, c_in, *size), self.array(n, c_out, *size)
        w = self.rng.standard_normal((c_out, c_in // groups), self.dtype)
        y, gx, gw = self.empty(g), self.empty(x), self.empty(w)
        kw = {"groups": groups}
        calls: dict[str, Calls] = {"forward": {}, "grad_input": {}, "grad_weight": {}}
        calls["forward"]["kconv"] = lambda: kconv.pointwise_conv(x, w, out=y, **kw)
        calls["grad_input"]["kconv"] = lambda: kconv.pointwise_conv_grad_input(g, w, out=gx, **kw)
        calls["grad_weight"]["kconv"] = lambda: kconv.pointwise_conv_grad_weight(x, g, out=gw, **kw)
        self._torch(calls, x, w[:, :, None, None], g, groups, (0, 0), 1)
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

    def depthwise(
        self, layer: graph.DepthwiseConv, size: tuple[int, int], n: int
    ) -> Iterator[tuple[str, Calls]]:
        c, k, stride = layer.in_channels, layer.kernel_size, layer.strides
        pad = k // 2 if layer.padding == "same" else 0
        x = self.array(n, c, *size)
        w = self.rng.standard_normal((c, k, k), self.dtype)
        kw = {"stride": stride, "padding": pad}
        g = self.array(n, c, *kconv.depthwise_conv(x[:1, :1], w[:1], **kw).shape[2:])
        y, gx, gw = self.empty(g), self.empty(x), self.empty(w)
        calls: dict[str, Calls] = {
            "forward": {"kconv": lambda: kconv.depthwise_conv(x, w, out=y, **kw)},
            "grad_input": {
                "kconv": lambda: kconv.depthwise_conv_grad_input(g, w, size, out=gx, **kw)
            },
            "grad_weight": {
                "kconv": lambda: kconv.depthwise_conv_grad_weight(x, g, k, out=gw, **kw)
            },
        }
        self._torch(calls, x, w[:, None], g, c, (pad, pad), stride)
        yield from calls.items()

    def interleave(
        self, layer: graph.Conv, size: tuple[int, int], n: int
    ) -> Iterator[tuple[str, Calls]]:
        """The convolution with the interleave fused into it, beside the one without."""
        if layer.groups == 1:
            return
        x = self.array(n, layer.in_channels, *size)
        g = self.array(n, layer.filters, *size)
        w = self.rng.standard_normal((layer.filters, layer.in_channels // layer.groups), self.dtype)
        y = np.copy(g, order="K")
        kw = {"groups": layer.groups, "out": y}
        step = layer.filters // layer.groups
        fused = lambda: kconv.pointwise_conv(x, w, interleave=step, **kw)  # noqa: E731
        plain = lambda: kconv.pointwise_conv(x, w, **kw)  # noqa: E731
        assert np.array_equal(fused().copy(), kconv.interleave(plain().copy(), step))
        yield "forward", {"kconv": fused, "without": plain}

    def _torch(
        self,
        calls: dict[str, Calls],
        x: Array,
        w: Array,
        g: Array,
        groups: int,
        padding: tuple[int, int],
        stride: int,
    ) -> None:
        """PyTorch's convolution and its gradients, in either memory format."""
        for peer in ("torch-nchw", "torch-nhwc"):
            if peer not in self.peers:
                continue
            import torch

            form = torch.channels_last if peer == "torch-nhwc" else torch.contiguous_format
            tx, tw, tg = (torch.from_numpy(a).contiguous(memory_format=form) for a in (x, w, g))
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

    def run(self, operation: str, networks: list[str], limits: Limits, turns: int) -> list[Row]:
        """Checks, then times, every distinct layer of the networks; prints as it goes."""
        kind = graph.DepthwiseConv if operation == "depthwise" else graph.Conv
        rows = []
        for network in networks:
            print(f"\n{network}: {operation}, {self.layout} memory, {self.dtype}")
            total: dict[str, Row] = {}
            for layer, size, n in layers(network, kind):
                for name, calls in getattr(self, operation)(layer, size, n):
                    row = self._time(name, layer, size, n, calls, limits, turns)
                    rows.append(row)
                    print_row(row)
                    sums = total.setdefault(name, Row("sum", name, 0, 0, 0))
                    sums.multiply_adds += row.multiply_adds
                    sums.bytes += row.bytes
                    sums.limit += row.limit
                    best_peer = {"best of peers": row.best_peer}
                    for peer, ms in (row.milliseconds | best_peer).items():
                        sums.milliseconds[peer] = sums.milliseconds.get(peer, 0) + ms
            for sums in total.values():
                print_row(sums)
        return rows

    def _time(
        self,
        operation: str,
        layer: Any,
        size: tuple[int, int],
        n: int,
        calls: Calls,
        limits: Limits,
        turns: int,
    ) -> Row:
        c_in, c_out = layer.in_channels, layer.shape[-1]
        pixels_in, pixels_out = n * size[0] * size[1], n * layer.shape[0] * layer.shape[1]
        if isinstance(layer, graph.Conv):
            label = f"{c_in}>{c_out}/{layer.groups} {size[0]}x{size[1]}"
            multiply_adds = pixels_out * c_out * c_in // layer.groups
        else:
            k = layer.kernel_size
            label = f"{c_in} {k}x{k}/{layer.strides} {size[0]}x{size[1]}"
            multiply_adds = pixels_out * c_out * layer.kernel_size**2
        moved = (pixels_in * c_in + pixels_out * c_out) * self.dtype.itemsize
        check(label, operation, calls)
        row = Row(label, operation, multiply_adds, moved, limits.milliseconds(multiply_adds, moved))
        times = best(list(calls.values()), turns)
        row.milliseconds = {name: t * 1e3 for name, t in zip(calls, times, strict=True)}
        return row


def as_nhwc(x: Array) -> Array:
    """The same (N, C, H, W) array in NHWC memory."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def einsum(peer: str, equation: str, a: Array, b: Array) -> Call:
    """A grouped product by PyTorch's, JAX's or NumPy's einsum."""
    if peer == "torch-einsum":
        import torch

        ta, tb = torch.from_numpy(a), torch.from_numpy(b)
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
    for name, call in calls.items():
        if name in ("kconv", "without"):
            continue
        theirs = np.asarray(call()).reshape(ours.shape)
        error = np.abs(ours - theirs).max() / np.abs(ours).max()
        if not error < 1e-4:
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


def print_row(row: Row) -> None:
    """One line: time, speeds, share of the limit, and the ratio to each peer."""
    ms = row.milliseconds["kconv"]
    ratios = "  ".join(
        f"{name} {t / ms:5.2f}x" for name, t in row.milliseconds.items() if name != "kconv"
    )
    speed, bandwidth = 2 * row.multiply_adds / ms / 1e6, row.bytes / ms / 1e6
    print(
        f"{row.layer:22} {row.operation:11} {ms:8.3f} ms {speed:6.0f} GFLOP/s "
        f"{bandwidth:6.1f} GB/s  {ms / row.limit:5.2f} x limit  {ratios}",
        flush=True,
    )


def roofline(rows: list[Row], limits: Limits, path: Path) -> None:
    """Every operation against the machine's limits, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    intensity = np.geomspace(0.2, 100)
    roof = np.minimum(limits.gflops, intensity * limits.gbytes)
    axes.loglog(intensity, roof, "k-", linewidth=1, label="limit: bandwidth, then multiply-adds")
    names = list(dict.fromkeys(name for row in rows for name in row.milliseconds))
    for name, marker in zip(names, "osvD^<>", strict=False):
        found = [row for row in rows if name in row.milliseconds]
        axes.plot(
            [2 * row.multiply_adds / row.bytes for row in found],
            [2 * row.multiply_adds / row.milliseconds[name] / 1e6 for row in found],
            marker,
            markersize=4,
            alpha=0.7,
            label=name,
        )
    axes.set(xlabel="floating-point operations per byte", ylabel="GFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"roofline: {path}")


def versions() -> str:
    """Machine, instruction set, threads and installed versions, in one line."""
    info = kconv.build_info()
    parts = [
        platform.machine(),
        f"{info['isa']}, {info['threads']} threads",
        f"kconv {info['version']}",
        f"numpy {np.__version__}",
    ]
    for name in ("torch", "jax", "keras", "onnxruntime", "openvino"):
        with suppress(metadata.PackageNotFoundError):
            parts.append(f"{name} {metadata.version(name)}")
    return "; ".join(parts)


def main() -> None:
    """Parses the command line and runs."""
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
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--threads", type=int, default=kconv.get_num_threads())
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["keffnet32"])
    known = ("torch-nchw", "torch-nhwc", "torch-einsum", "jax-einsum", "numpy-einsum")
    parser.add_argument("--peers", nargs="*", choices=known, default=known[:3])
    parser.add_argument("--preallocated", action="store_true", help="kconv writes into used memory")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--model", choices=networks.NETWORKS, default="keffnet32")
    parser.add_argument("--batch", type=int, help="images in a step (default: the network's)")
    parser.add_argument("--sides", nargs="+", choices=networks.SIDES, help="of step and inference")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--roofline", type=Path, metavar="PNG")
    options = parser.parse_args()
    kconv.set_num_threads(options.threads)
    if options.operation == "memory":
        result: Any = memory(options)
    elif options.operation == "frameworks":
        result = frameworks.run(options.turns)
    elif options.operation in ("step", "inference"):
        result = networks.run(options)
    else:
        bench = Bench(options)
        limits = measure_limits()
        print(f"limits: {limits.gflops:.0f} GFLOP/s, {limits.gbytes:.1f} GB/s")
        rows = bench.run(options.operation, options.networks, limits, options.turns)
        result = {"limits": asdict(limits), "rows": [asdict(row) for row in rows]}
        if options.roofline:
            roofline(rows, limits, options.roofline)
    print(f"\n{versions()}")
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(), "result": result}, indent=1))


if __name__ == "__main__":
    main()
