"""How fast whole networks have been: a line for each run in history.jsonl, and a picture of them.

    python benches/compare.py step --model keffnet32 --history    # adds a line
    python benches/history.py history.png                         # draws all, as `make docs` does

A line has the date, the commit, the machine, and how many times as long each peer took as
kconv.torch, in turns, in that run. Times of different runs are not comparable; ratios nearly are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

import kconv
from kconv._machine import processor

FILE = Path(__file__).with_name("history.jsonl")
OURS = "kconv-torch"


def append(what: str, rows: list[dict[str, Any]], path: Path = FILE) -> None:
    """Add a run.

    Args:
        what: such as "step keffnet32 64".
        rows: of each side, its name and its best time.
        path: the file.

    Raises:
        SystemExit: kconv.torch or every peer is missing.
    """
    best = {row["side"]: row["best"] for row in rows}
    peers = {side: time for side, time in best.items() if not side.startswith("kconv")}
    if OURS not in best or not peers:
        raise SystemExit(f"--history needs {OURS} and a peer, there are {', '.join(best)}")
    build = kconv.build_info()
    line = {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "kconv": build["version"],
        "machine": processor(),
        "isa": build["isa"],
        "threads": kconv.get_num_threads(),
        "what": what,
        "ratios": {side: round(time / best[OURS], 3) for side, time in peers.items()},
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _commit() -> str:
    """The commit, and whether the files are those of it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    done = subprocess.run(command, cwd=FILE.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def read(path: Path = FILE) -> list[dict[str, Any]]:
    """All runs, the oldest first."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot(runs: list[dict[str, Any]], picture: Path) -> None:
    """For each network a line of the ratio to its fastest peer, over the runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    numbers: dict[str, list[tuple[int, float]]] = {}
    for number, run in enumerate(runs):
        series = f"{run['what']}, {run['machine']}"
        numbers.setdefault(series, []).append((number, min(run["ratios"].values())))
    for series, points in numbers.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=series)
    axes.set_xticks(range(len(runs)), [f"{run['date']}\n{run['commit'][:7]}" for run in runs])
    axes.set(ylabel="times as fast as the fastest peer", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    plot(read(), parser.parse_args().picture)


if __name__ == "__main__":
    main()
