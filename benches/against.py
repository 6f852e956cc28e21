"""This kconv beside an older one: the same calls by two processes, which take turns.

    python benches/compare.py against OLD [pointwise|depthwise|interleave|step|inference ...]

OLD is a wheel, or a folder that an older kconv can be imported from. Each process imports its own
kconv, whole, so the two need not understand each other's programs. Results must agree before a time
counts. Prints each call's best times and, for each network, layout, dtype and direction, the sums;
exits with 1 where a sum of this kconv's is slower than ``--limit`` times the older one's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

KERNELS, NETWORKS = ("pointwise", "depthwise", "interleave"), ("step", "inference")
LIMITS = dict.fromkeys(KERNELS, 1.03) | dict.fromkeys(NETWORKS, 1.02)
MORE = 4
"""How many times as many turns a call gets at most where this kconv seems slower."""
LAYOUTS, DTYPES = ("NCHW", "NHWC"), ("float32", "float64", "bfloat16")


class Side:
    """A process that imports kconv from a folder, or from where this one would.

    Args:
        folder: the older kconv's; None for this one.
        settings: what to time, as :func:`_calls` reads it.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        paths = [str(folder)] if folder else []
        paths += os.environ.get("PYTHONPATH", "").split(os.pathsep)
        threads = str(settings["threads"])
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(settings)],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, command: str) -> Any:
        """The answer to "next" or "time"; None where there is no next call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


def main(arguments: list[str]) -> int:
    """Parses the command line and runs; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="compare.py against",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, help="a wheel, or a folder with kconv in it")
    parser.add_argument("what", nargs="*", help=f"of {', '.join(LIMITS)}; default: all")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--networks", nargs="+", help="default: all that compare.py knows")
    parser.add_argument("--batch", type=int, help="images (default: the network's)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--layers", type=int, help="how many of each network, the first ones")
    parser.add_argument("--limit", type=float, help="default: 1.03 for kernels, 1.02 for networks")
    options = parser.parse_args(arguments)
    if unknown := [what for what in options.what if what not in LIMITS]:
        parser.error(f"unknown {unknown[0]!r}; there are {', '.join(LIMITS)}")
    slower = []
    with tempfile.TemporaryDirectory() as folder:
        old = options.old
        if old.suffix == ".whl":
            old = Path(folder) / "old"
            zipfile.ZipFile(options.old).extractall(old)
        if not (old / "kconv").is_dir():
            raise SystemExit(f"{options.old} is neither a wheel nor a folder with kconv in it")
        for settings in _settings(options, Path(folder)):
            limit = options.limit or LIMITS[settings["what"]]
            slower += _compare(old.resolve(), settings, options.turns, limit)
    for line in slower:
        print(f"slower: {line}")
    return int(bool(slower))


def _settings(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """What each pair of processes times: one network in one layout and dtype."""
    import compare
    import networks

    for what in options.what or LIMITS:
        known = networks.NETWORKS if what in NETWORKS else compare.NETWORKS
        for network in options.networks or known:
            if network not in known:
                raise SystemExit(f"unknown network {network!r}; {what} has {', '.join(known)}")
            common = {
                "what": what,
                "network": network,
                "batch": options.batch or known[network][-1],
                "threads": options.threads,
                "layers": options.layers,
                "folder": str(folder),
                "layout": "NCHW",
                "dtype": "float32",
            }
            if what in NETWORKS:
                networks._save(network, folder, [])
                yield common
            else:
                for layout, dtype in product(options.layouts, options.dtypes):
                    yield common | {"layout": layout, "dtype": dtype}


def _compare(old: Path, settings: dict[str, Any], turns: int, limit: float) -> list[str]:
    """Prints a table; returns the lines of the sums that are too slow."""
    title = " ".join(str(settings[name]) for name in ("what", "network", "layout", "dtype"))
    print(f"\n{title}, {settings['batch']} images, {settings['threads']} threads", flush=True)
    print(f"{'best ms':40} {'new':>9} {'old':>9} {'ratio':>6}")
    new_side, old_side = sides = Side(None, settings), Side(old, settings)
    sums: dict[str, list[float]] = {}
    while (call := new_side.ask("next")) is not None:
        other = old_side.ask("next")
        label, direction, result = call
        _check(f"{title} {label} {direction}", result, other and other[2])
        best = [math.inf, math.inf]
        turn = 0
        # Who seems slower may only have been disturbed: both get more turns.
        while turn < turns or (turn < MORE * turns and best[0] > limit * best[1]):
            for i in (0, 1) if turn % 2 else (1, 0):
                best[i] = min(best[i], 1e3 * sides[i].ask("time"))
            turn += 1
        _print_row(f"{label} {direction}", best)
        total = sums.setdefault(direction, [0.0, 0.0])
        sums[direction] = [a + b for a, b in zip(total, best, strict=True)]
    for side in sides:
        side.close()
    slower = []
    for direction, total in sums.items():
        _print_row(f"sum {direction}", total)
        if total[0] > limit * total[1]:
            slower.append(f"{title} {direction}: {total[0] / total[1]:.3f}, limit {limit}")
    return slower


def _print_row(label: str, best: list[float]) -> None:
    print(f"{label:40} {best[0]:9.3f} {best[1]:9.3f} {best[0] / best[1]:6.3f}", flush=True)


def _check(what: str, new: list[float], old: list[float] | None) -> None:
    """Stops unless the results, as :func:`_summary` has them, agree."""
    if old is None or abs(new[0] - old[0]) > 1e-2 * max(abs(old[1]), 1e-6):
        raise SystemExit(f"{what}: the results differ, {new} and {old}")


def _calls(settings: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(layer, direction, call) of everything to be timed, made when its turn has come."""
    what, network, batch = (settings[name] for name in ("what", "network", "batch"))
    if what in NETWORKS:
        import networks

        arguments = (what, network, batch, settings["threads"], Path(settings["folder"]))
        yield network, what, networks._torch_side("kconv-torch", *arguments)
        return
    import compare

    options = argparse.Namespace(**settings, peers=[], patience=0.0)
    options.batch = batch
    bench = compare.Bench(options)
    for case in list(compare.cases(network, what))[: settings["layers"]]:
        for direction, calls in getattr(bench, what)(case, batch):
            yield case.label, direction, calls["kconv"]


def _summary(result: Any) -> list[float]:
    """A result in two numbers: a weighted sum, and what it is to be judged by."""
    import numpy as np

    values = np.asarray(result, np.float64).ravel()
    weights = np.random.default_rng(0).standard_normal(values.size)
    return [float(weights @ values), float(np.linalg.norm(values))]


def _work(settings: dict[str, Any]) -> None:
    """What a process does: answers commands until its input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import limits

    import kconv

    kconv.set_num_threads(settings["threads"])
    calls = _calls(settings)
    call = None
    for command in sys.stdin:
        answer: Any = None
        if command == "next\n":
            following = next(calls, None)
            if following is not None:
                label, direction, call = following
                answer = [label, direction, _summary(call())]
        elif call is not None:
            answer = limits.best([call], 1)[0]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
