"""``kconv export``: a trained network for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kconv import export
from kconv.cli._serve import add_network
from kconv.runtime import load


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("export", help="write a network for another program")
    parser.description = (
        "Write a network for another program, run it there on random images, and compare the "
        "outputs with kconv's."
    )
    parser.set_defaults(run=_export)
    add_network(parser)
    parser.add_argument("--format", required=True, choices=export.FORMATS, help="which")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="file to write (default: in the run's folder, or here for a name)",
    )


def _export(options: argparse.Namespace) -> int:
    net = load(options.network)
    run = Path(options.network)  # or a name, whose folder is the package's
    path = options.output or (run if run.is_dir() else Path()) / export.default_name(options.format)
    result = export.export(net, path, options.format)
    print(f"written      {result.path}")
    print(f"input        {result.inputs}")
    print(f"output       {result.outputs}")
    print(f"{'checked':12} {result.checked}")
    return 0
