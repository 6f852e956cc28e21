"""What commands print for other programs."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["add_formats", "print_records"]


def add_formats(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` and ``--csv``, which set ``options.format``; it is None without them."""
    which = parser.add_mutually_exclusive_group()
    for name in ("json", "csv"):
        which.add_argument(
            f"--{name}",
            dest="format",
            action="store_const",
            const=name,
            help=f"print {name.upper()}, for other programs",
        )


def print_records(records: Sequence[dict[str, Any]], form: str) -> None:
    """Print records of the same keys as JSON or CSV."""
    if form == "json":
        print(json.dumps(records, indent=2))
        return
    writer = csv.DictWriter(sys.stdout, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
