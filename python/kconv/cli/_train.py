"""``kconv train``."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
from pathlib import Path
from typing import Any

from kconv import datasets, training
from kconv._memory import leave_out_tensorflow


def add(commands: Any) -> None:
    """Add the command."""
    _add_train(commands.add_parser("train", help="train a network on images"))


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
    add(
        "--weights",
        "file, folder of a run, or name of `kconv models`, whose weights to start from; the "
        "classifier starts anew where the classes differ",
        metavar="NAME|PATH",
    )
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
    for name in ("dataset", "data_dir", "weights"):  # a run may be resumed from elsewhere
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
