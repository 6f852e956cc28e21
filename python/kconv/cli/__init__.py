"""The command ``kconv``: train a network, try it, measure it, export it, and more."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import kconv
from kconv._names import did_you_mean
from kconv.cli import _explain, _export, _info, _serve, _train
from kconv.cli._signals import interrupted, terminable
from kconv.training.ranks import is_one_of_several

KERAS_BACKENDS = ("jax", "torch", "tensorflow")
"""Named like their packages, the ones to prefer first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; by default the process's own arguments.

    Returns:
        The exit status: 0, 2 for bad input, 1 for what fails later, 130 when interrupted, 143 when
        terminated.
    """
    options = _parser().parse_args(arguments)
    for backend in KERAS_BACKENDS:
        if importlib.util.find_spec(backend):
            os.environ.setdefault("KERAS_BACKEND", backend)
    with terminable():
        status = _run(options)
    if status and is_one_of_several():
        # The connections to the others are still there, whose threads abort a process when its
        # interpreter ends beside them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(options: argparse.Namespace) -> int:
    try:
        status: int = options.run(options)
        return status
    except SystemExit as stop:  # another process says why
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        return interrupted(stop)
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

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is unknown here, where the options are known that it may have meant."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            close = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{close}")
        return namespace, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            close = did_you_mean(value, known)
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}{close}; known are {', '.join(known)}"
            )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kconv", description=__doc__)
    parser.add_argument("--version", action="version", version=f"kconv {kconv.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (_train, _serve, _export, _explain, _info):
        group.add(commands)
    return parser
