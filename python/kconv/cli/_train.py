"""``kconv train``."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
from pathlib import Path
from typing import Any, get_type_hints

from kconv import datasets, training
from kconv._memory import leave_out_tensorflow
from kconv.cli._signals import interrupted
from kconv.training.config import alternatives

_PATHS = ("dataset", "data_dir", "weights", "teacher", "compress_from")


def add(commands: Any) -> None:
    """Add the command."""
    _add_train(commands.add_parser("train", help="train a network on images"))


def _add_train(parser: argparse.ArgumentParser) -> None:
    """Options are the fields of Config, whose defaults hold for those not given."""
    parser.description = (
        "Train a network on images, keep its best state by validation loss, test it, and write "
        "a report. Ctrl-C loses the steps since the last checkpoint: --resume goes on from there."
    )
    parser.set_defaults(run=_train)
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.toml", help="file with any of the options"
    )
    parser.add_argument(
        "--preset",
        default=argparse.SUPPRESS,
        choices=tuple(training.PRESETS),
        help="a set of options, which the file and other options overrule",
    )
    hints = get_type_hints(training.Config)
    for field in dataclasses.fields(training.Config):
        _add_option(parser, field, hints[field.name])
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--output", type=Path, metavar="DIR", help="the run's folder (default: a new one in runs/)"
    )
    where.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with the run in this folder"
    )


def _add_option(parser: argparse.ArgumentParser, field: Any, hint: Any) -> None:
    kinds = alternatives(hint)
    default = field.metadata["unset"] if field.default in (None, ()) else field.default
    shown = "" if default in (None, dataclasses.MISSING) else f" (default: {default})"
    keywords: dict[str, Any] = {
        "default": argparse.SUPPRESS,
        "help": (field.metadata["meaning"] + shown).replace("%", "%%"),
    }
    name = f"--{field.name.replace('_', '-')}"
    if field.name == "model_options":
        name, keywords["action"], keywords["dest"] = "--model-option", "append", "model_option"
        keywords["help"] = "another option of the model, such as width=0.5; may be repeated"
    if bool in kinds:
        keywords["action"] = argparse.BooleanOptionalAction
    elif field.metadata["choices"]:
        keywords["choices"] = field.metadata["choices"]
    else:
        keywords["metavar"] = field.metadata["metavar"]
        kind = next((kind for kind in (int, float) if kind in kinds), None)
        if field.name == "class_weights":
            keywords["type"] = _class_weights
        elif kind is not None:
            keywords["type"] = kind
    parser.add_argument(name, **keywords)


def _train(options: argparse.Namespace) -> int:
    fields = {field.name for field in dataclasses.fields(training.Config)} | {"preset"}
    given: dict[str, Any] = training.read_toml(options.config) if options.config else {}
    told = {name: value for name, value in vars(options).items() if name in fields}
    if "model_option" in options:
        told["model_options"] = dict(map(_model_option, options.model_option))
        # Each of them overrules that of its name in the file.
        options_in_file = given.get("model_options", {})
        if isinstance(options_in_file, dict):
            told["model_options"] = {**options_in_file, **told["model_options"]}
    given |= told
    for name in _PATHS:  # a run may be resumed from elsewhere
        text = given.get(name)
        if isinstance(text, str) and text and text not in datasets.names() and Path(text).exists():
            given[name] = str(Path(text).resolve())
    output, resume = options.output, options.resume
    # Where torchrun is to start processes anew, they go on: after one was lost, which its count of
    # restarts tells on that machine alone, and after a machine came or went, which nothing tells.
    again = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if again and output is not None and (output / "last.npz").exists():
        resume = output
    source = str(options.config) if options.config else "the configuration"
    if resume:
        stored = dataclasses.asdict(training.load_config(resume))
        config = training.config_from({**stored, **_resolved(given)}, source)
        output = resume
    else:
        config = training.config_from(given, source)
        if output is None and "RANK" not in os.environ:  # of several processes the first makes it
            output = training.reserve(config)
    leave_out_tensorflow()
    try:
        training.train(config, output, resume=bool(resume))
    except KeyboardInterrupt as stop:
        if output is None or not (output / "last.npz").exists():
            raise
        return interrupted(stop, f"; go on with: kconv train --resume {output}")
    return 0


def _resolved(given: dict[str, Any]) -> dict[str, Any]:
    """Options with those of a preset beside them, which the run's own do not overrule."""
    return {**training.PRESETS.get(given.get("preset", ""), {}), **given}


def _class_weights(text: str) -> Any:
    if text == "balanced":
        return text
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither 'balanced' nor numbers, such as 1,2.5,1"
        ) from None


def _model_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"--model-option {text!r} is not of the form NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a bare word is text
