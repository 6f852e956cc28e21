"""``kconv models``, ``kconv table`` and ``kconv info``: what there is."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import kconv
from kconv import models
from kconv._machine import processor
from kconv.cli._output import add_formats, print_records

Row = dict[str, Any]


def add(commands: Any) -> None:
    """Add the commands."""
    known = commands.add_parser("models", help="parameters and multiply-accumulates of the models")
    known.set_defaults(run=_models)
    add_formats(known)
    table = commands.add_parser("table", help="the papers' tables, with the sizes computed here")
    table.set_defaults(run=_table)
    add_formats(table)
    info = commands.add_parser("info", help="version, instruction set, threads, frameworks")
    info.set_defaults(run=_info)


def _models(options: argparse.Namespace) -> int:
    rows = models.table()
    if options.format:
        print_records([row._asdict() for row in rows], options.format)
        return 0
    print("10 classes, 224x224 images\n")
    _print_table(
        ("model", "kType", "parameters", "multiply-accumulates"),
        [(row.model, row.ktype, f"{row.trainable:,}", f"{row.macs:,}") for row in rows],
    )
    others = [name for name in models.list_models() if name not in {row.model for row in rows}]
    print("\nothers:", ", ".join(others))
    print("trained:", ", ".join(kconv.list_weights()) or "none")
    return 0


def _table(options: argparse.Namespace) -> int:
    titles = {"V1": "MENDEL 28(1), 2022", "V2": "Entropy 24(9):1264, 2022"}
    runs = itertools.groupby(
        models.paper_table(), lambda row: (row.paper, row.dataset, row.classes, row.epochs)
    )
    totals: list[str] = []
    if options.format:
        print_records(list(map(_paper_record, models.paper_table())), options.format)
        return 0
    for (paper, dataset, classes, epochs), rows in runs:
        print(f"{titles[paper]}: {dataset}, {classes} classes, {epochs} epochs\n")
        lines = []
        for row in rows:
            if row.published_is_total:
                totals.append(f"{row.published_parameters:,}")
            lines.append(
                (
                    row.model,
                    row.ktype,
                    row.input,
                    f"{row.counts.trainable:,}" + "*" * row.published_is_total,
                    f"{row.saving:.0%}",
                    f"{row.counts.macs:,}",
                    f"{row.published_accuracy:.2%}",
                )
            )
        quantities = ("parameters", "saved", "multiply-accumulates", "published accuracy")
        _print_table(("model", "kType", "images", *quantities), lines)
        print()
    print(f"* The paper counts the statistics of batch norms, too: {', '.join(totals)}.")
    return 0


def _paper_record(row: models.PaperRow) -> Row:
    """A row of the papers with its counts beside the other columns."""
    record = row._asdict()
    return record | record.pop("counts")._asdict()


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as they need to be, those of numbers flush right."""
    table = [header, *rows]
    columns = []
    for column in zip(*table, strict=True):
        width = max(map(len, column))
        number = set(column[-1]) <= set("0123456789,.%*")
        columns.append([f"{cell:>{width}}" if number else f"{cell:<{width}}" for cell in column])
    for line in zip(*columns, strict=True):
        print("  ".join(line).rstrip())


def _info(options: argparse.Namespace) -> int:
    build = kconv.build_info()
    lines = {
        "version": kconv.__version__,
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "instruction set": f"{build['isa']} (of {', '.join(build['isas'])})",
        "threads": str(build["threads"]),
    }
    lines["python"] = sys.version.split()[0]
    for package in ("numpy", "torch", "jax", "tensorflow", "keras"):
        lines[package] = _version(package)
    lines["keras backend"] = os.environ.get("KERAS_BACKEND", "none installed")
    for key, value in lines.items():
        print(f"{key:16} {value}")
    return 0


def _version(module: str) -> str:
    """The installed version, under whichever name its package has (tensorflow-cpu)."""
    if importlib.util.find_spec(module) is None:
        return "not installed"
    packages = importlib.metadata.packages_distributions().get(module, [module])
    return importlib.metadata.version(packages[0])
