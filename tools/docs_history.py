"""Draws the runs of benches/history.jsonl on the site's page of benchmarks, once there are some."""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

BENCHES = Path(__file__).parents[1] / "benches"
PICTURE = "history.png"
SECTION = f"""
## Over time

How many times as fast as the fastest of its peers a network of `kconv.torch` has been, in each run
that `--history` kept:

![Ratios of the runs that were kept, by date and commit]({PICTURE})
"""


def on_files(files: Any, config: Any) -> Any:
    """Adds the picture to what the site has."""
    sys.path.insert(0, str(BENCHES))
    history = import_module("history")
    if history.FILE.is_file():
        with tempfile.TemporaryDirectory() as folder:
            history.plot(history.read(), Path(folder, PICTURE))
            drawn = Path(folder, PICTURE).read_bytes()
        files.append(File.generated(config, PICTURE, content=drawn))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Adds the section that shows it."""
    shown = page.file.src_uri == "benchmarks.md" and files.get_file_from_path(PICTURE)
    return markdown + SECTION if shown else markdown
