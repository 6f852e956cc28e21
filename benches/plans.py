"""Every algorithm of every layer of the benched networks, forced, beside the predicted costs.

    python benches/compare.py plans [--layouts NHWC] [--dtypes float32] [--networks keffnet32 ...]

For each layer, direction and algorithm that applies: the predicted cost beside the cheapest's, and
the time beside the fastest's. An algorithm's worth is what a network's sum would lose without it:
each layer that chooses it would take the next best. Names each algorithm that no layer chooses, or
that is not worth 5 % of any network's sum: it is to be deleted. ``--layers`` prints the layers as
the table in ``src/conv1x1/tests.rs`` has them, and times nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np

import kconv

DIRECTIONS = ("forward", "grad_input", "grad_weight")
OPERATIONS = {"pointwise": "pointwise_conv", "depthwise": "depthwise_conv"}
WORTH = 0.05
"""Of a network's sum: what an algorithm has to be worth."""
MAX_VALUES = 6 << 20
"""Of an array: batches are cut to it."""


def calls(
    case: Any, operation: str, n: int, layout: str, dtype: Any
) -> dict[str, Callable[[], Any]]:
    """A layer's three directions."""
    layer, (height, width) = case.layer, case.size
    rng = np.random.default_rng(0)

    def array(channels: int, rows: int, columns: int) -> Any:
        sizes = (channels, rows, columns) if layout == "NCHW" else (rows, columns, channels)
        return rng.standard_normal((n, *sizes), np.float32).astype(dtype)

    x = array(layer.in_channels, height, width)
    if operation == "depthwise":
        kernel, stride = layer.kernel_size, layer.strides
        w = rng.standard_normal((layer.in_channels, kernel, kernel), np.float32).astype(dtype)
        kw: dict[str, Any] = {"stride": stride, "padding": "same", "layout": layout}
        g = array(layer.in_channels, -(-height // stride), -(-width // stride))
        return {
            "forward": lambda: kconv.depthwise_conv(x, w, **kw),
            "grad_input": lambda: kconv.depthwise_conv_grad_input(g, w, (height, width), **kw),
            "grad_weight": lambda: kconv.depthwise_conv_grad_weight(x, g, kernel, **kw),
        }
    g = array(layer.filters, height, width)
    shape = (layer.filters, layer.in_channels // layer.groups)
    w = rng.standard_normal(shape, np.float32).astype(dtype)
    kw = {"groups": layer.groups, "interleave": case.step, "layout": layout}
    return {
        "forward": lambda: kconv.pointwise_conv(x, w, **kw),
        "grad_input": lambda: kconv.pointwise_conv_grad_input(g, w, **kw),
        "grad_weight": lambda: kconv.pointwise_conv_grad_weight(x, g, **kw),
    }


def explain(case: Any, operation: str, direction: str, n: int, layout: str, dtype: str) -> Any:
    """The candidates of a layer, as ``kconv._kconv.explain`` tells them."""
    layer, (height, width) = case.layer, case.size
    problem = {"in_channels": layer.in_channels, "images": n, "height": height, "width": width}
    if operation == "depthwise":
        problem |= {"out_channels": layer.in_channels}
        problem |= {"kernel": layer.kernel_size, "stride": layer.strides}
    else:
        problem |= {"out_channels": layer.filters, "groups": layer.groups, "interleave": case.step}
    return kconv._kconv.explain(OPERATIONS[operation], direction, layout, dtype, **problem)


def measure(algorithms: list[str], call: Callable[[], Any], seconds: float) -> dict[str, float]:
    """The best time of each algorithm, which take turns."""
    best = dict.fromkeys(algorithms, np.inf)
    end, turns = time.perf_counter() + seconds * len(algorithms), 0
    try:
        while turns < 3 or time.perf_counter() < end:
            for name in algorithms:
                kconv._kconv.force_algorithm(name)
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)
            turns += 1
    finally:
        kconv._kconv.force_algorithm(None)
    return best


def layers(options: argparse.Namespace) -> Iterator[tuple[str, Any, int]]:
    """The networks' layers, and as many images as the benches or memory have."""
    import compare

    for network in options.networks or compare.NETWORKS:
        batch = compare.NETWORKS[network][2]
        for case in compare.cases(network, options.operation):
            values = max(case.layer.in_channels, getattr(case.layer, "filters", 0))
            values *= case.size[0] * case.size[1]
            yield network, case, max(1, min(batch, MAX_VALUES // values))


def print_layers(options: argparse.Namespace) -> None:
    """The layers as a table of Rust, with the networks' own batches."""
    import compare

    for network in options.networks or compare.NETWORKS:
        name, arguments, batch = compare.NETWORKS[network]
        size = arguments.get("input_shape", (224, 224, 3))
        title = f"{name} {arguments['ktype']} {size[0]}x{size[1]}"
        for operation in ("pointwise", "interleave"):
            for case in compare.cases(network, operation):
                layer, pixels = case.layer, case.size[0] * case.size[1]
                numbers = (batch, pixels, layer.in_channels, layer.filters, layer.groups, case.step)
                print(f'    ("{title}", case({", ".join(map(str, numbers))})),')


def main(arguments: list[str]) -> int:
    """Parses the command line and runs; returns 1 if an algorithm is to be deleted."""
    parser = argparse.ArgumentParser(
        prog="compare.py plans",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("operation", nargs="?", choices=OPERATIONS, default="pointwise")
    parser.add_argument("--layouts", nargs="+", choices=("NCHW", "NHWC"), default=("NCHW", "NHWC"))
    parser.add_argument("--dtypes", nargs="+", default=("float32",))
    parser.add_argument("--networks", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.05, help="for each algorithm of a call")
    parser.add_argument("--layers", action="store_true", help="print the layers and stop")
    options = parser.parse_args(arguments)
    if options.layers:
        print_layers(options)
        return 0
    kconv.set_num_threads(options.threads)
    sums: dict[Any, float] = defaultdict(float)
    losses: dict[Any, float] = defaultdict(float)
    chosen: dict[str, int] = {}
    for layout, dtype in product(options.layouts, options.dtypes):
        if dtype == "bfloat16":
            __import__("ml_dtypes")  # tells NumPy
        for network, case, n in layers(options):
            functions = calls(case, options.operation, n, layout, np.dtype(dtype))
            for direction in DIRECTIONS:
                rows = explain(case, options.operation, direction, n, layout, dtype)
                applicable = [row for row in rows if row["applies"]]
                names = [row["algorithm"] for row in applicable]
                times = measure(names, functions[direction], options.seconds)
                least, cheapest = min(times.values()), min(row["cost"] for row in applicable)
                print(f"{network} {case.label} {layout} {dtype} {direction}, {n} images")
                for row in applicable:
                    name, cost = row["algorithm"], row["cost"] / cheapest if cheapest else 1.0
                    mark = "*" if row["chosen"] else " "
                    print(
                        f"  {mark} {name:16} cost {row['cost']:8.2f} ({cost:5.2f})"
                        f" {times[name] * 1e3:8.3f} ms ({times[name] / least:5.2f})",
                        flush=True,
                    )
                mine = next(row["algorithm"] for row in rows if row["chosen"])
                for row in rows:
                    chosen[row["algorithm"]] = chosen.get(row["algorithm"], 0) + row["chosen"]
                key = (network, layout, dtype, direction)
                sums[key] += times[mine]
                others = [times[name] for name in names if name != mine]
                losses[mine, key] += min(others, default=np.inf) - times[mine]
    print(f"\n{'algorithm':18} chosen by   worth of a network's sum, at most")
    useless = []
    for name, count in chosen.items():
        worth, where = max(
            ((loss / sums[key], key) for (found, key), loss in losses.items() if found == name),
            default=(0.0, ()),
        )
        print(f"{name:18} {count:4} calls {worth:8.1%} {' '.join(where)}")
        if worth < WORTH:
            useless.append(f"{name} ({'chosen nowhere' if count == 0 else f'{worth:.1%}'})")
    if useless:
        print(f"to be deleted, as far as these networks tell: {', '.join(useless)}")
    return int(bool(useless))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
