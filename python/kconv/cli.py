"""The command ``kconv``: train a network, list networks and the papers' tables, and more."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import kconv
from kconv import datasets, models, training
from kconv._memory import leave_out_tensorflow

KERAS_BACKENDS = ("jax", "torch", "tensorflow")
"""Named like their packages, the ones to prefer first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; by default the process's own arguments.

    Returns:
        The exit status: 0, 2 for bad input, 1 for what fails later, 130 when interrupted.
    """
    options = _parser().parse_args(arguments)
    for backend in KERAS_BACKENDS:
        if importlib.util.find_spec(backend):
            os.environ.setdefault("KERAS_BACKEND", backend)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `kconv models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _fail(error, 2)
    except (RuntimeError, MemoryError, ArithmeticError) as error:
        return _fail(error, 1)


def _fail(error: Exception, status: int) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        message = f"not enough memory: {message}"
    print(f"kconv: error: {message}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kconv", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a network on images"))
    known = commands.add_parser("models", help="parameters and multiply-accumulates of the models")
    known.set_defaults(run=_models)
    table = commands.add_parser("table", help="the papers' tables, with the sizes computed here")
    table.set_defaults(run=_table)
    info = commands.add_parser("info", help="version, instruction set, threads, frameworks")
    info.set_defaults(run=_info)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    """Options are named after the fields of Config, whose defaults hold for those not given."""
    default = training.Config()
    parser.description = (
        "Train a network on images, keep its best state by validation loss, test it, and write "
        "a report. Ctrl-C loses the running epoch only: --resume goes on after the last whole one."
    )
    parser.set_defaults(run=_train)

    def add(name: str, meaning: str, **keywords: Any) -> None:
        field = name.removeprefix("--").replace("-", "_")
        value = getattr(default, field, None)
        shown = "" if value in (None, {}) else f" (default: {value})"
        parser.add_argument(name, default=argparse.SUPPRESS, help=meaning + shown, **keywords)

    add("--model", "a model of `kconv models`", metavar="NAME")
    add("--ktype", "kind of pointwise convolution, such as D6_16ch or D6v3_32ch", metavar="NAME")
    add("--skip-strides", "strides skipped, by default 3 up to 64x64", type=int, metavar="N")
    add(
        "--model-option",
        "another option of the model, such as width=0.5; may be repeated",
        action="append",
        metavar="NAME=VALUE",
    )
    known = ", ".join(datasets.names())
    add("--dataset", f"{known}, or a folder or archive of images", metavar="NAME|PATH")
    add(
        "--data-dir",
        "folder with the data set's original files or archives (default: Keras's cache, or its "
        "download, of fashion_mnist, mnist, cifar10 and cifar100)",
        metavar="DIR",
    )
    add(
        "--train-images",
        "use N training images, balanced over classes",
        type=int,
        metavar="N",
    )
    add("--test-images", "test on N images, likewise", type=int, metavar="N")
    add(
        "--image-size",
        "resize images to this height and width (default: 224 for the last four of these, else 32)",
        type=int,
        metavar="N",
    )
    add("--interpolation", "how to resize them", choices=datasets.INTERPOLATIONS)
    add("--epochs", "passes over the training images", type=int, metavar="N")
    add("--batch-size", "images in a step", type=int, metavar="N")
    add("--lr-schedule", "learning rate over the epochs", choices=training.SCHEDULES)
    add("--lr", "learning rate that the schedule starts from", type=float, metavar="RATE")
    add("--augment", "augment the training images", action=argparse.BooleanOptionalAction)
    add(
        "--recalibrate-bn",
        "estimate moving statistics anew before each evaluation "
        f"(default: in runs below {training.SHORT_RUN_STEPS:,} steps)",
        action=argparse.BooleanOptionalAction,
    )
    add("--seed", "fixes all chance", type=int, metavar="N")
    add("--framework", "what to train with", choices=training.FRAMEWORKS)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--output", type=Path, metavar="DIR", help="the run's folder (default: a new one in runs/)"
    )
    where.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with the run in this folder"
    )


def _train(options: argparse.Namespace) -> int:
    fields = {field.name for field in dataclasses.fields(training.Config)}
    given = {name: value for name, value in vars(options).items() if name in fields}
    for name in ("dataset", "data_dir"):  # a run may be resumed from elsewhere
        text = given.get(name)
        if text and text not in datasets.names() and Path(text).exists():
            given[name] = str(Path(text).resolve())
    if "model_option" in options:
        given["model_options"] = dict(map(_model_option, options.model_option))
    if options.resume:
        config = dataclasses.replace(training.load_config(options.resume), **given)
        output = options.resume
    else:
        config = training.Config(**given)
        output = options.output or training.reserve(config)
    leave_out_tensorflow()
    try:
        training.train(config, output, resume=bool(options.resume))
    except KeyboardInterrupt:
        if not (output / "last.npz").exists():
            raise
        print(f"\ninterrupted; go on with: kconv train --resume {output}", file=sys.stderr)
        return 130
    return 0


def _model_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"--model-option {text!r} is not of the form NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a bare word is text


def _models(options: argparse.Namespace) -> int:
    rows = models.table()
    print("10 classes, 224x224 images\n")
    _print_table(
        ("model", "kType", "parameters", "multiply-accumulates"),
        [(row.model, row.ktype, f"{row.trainable:,}", f"{row.macs:,}") for row in rows],
    )
    others = [name for name in models.list_models() if name not in {row.model for row in rows}]
    print("\nothers:", ", ".join(others))
    return 0


def _table(options: argparse.Namespace) -> int:
    titles = {"V1": "MENDEL 28(1), 2022", "V2": "Entropy 24(9):1264, 2022"}
    runs = itertools.groupby(
        models.paper_table(), lambda row: (row.paper, row.dataset, row.classes, row.epochs)
    )
    totals: list[str] = []
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
