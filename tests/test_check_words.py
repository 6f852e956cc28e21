"""The check of words finds what it should, and lets ordinary English pass."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "check_words.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("check_words", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    for folder in module.FOLDERS:
        (tmp_path / folder).mkdir()
    return module


# With a bar in each, which is taken out, as this file is checked too.
REFUSED = """
    ask|s for the next line    so| many rows    the first| cache    let x = W|ay::Outer
    pi|cks a value    Dot|Rows { x }    side|_by_side::run    Checked|Rows    in|_places
"""


@pytest.mark.parametrize("words", [w.strip() for w in REFUSED.split("    ") if w.strip()])
def test_refused(words, script, capsys):
    path = script.ROOT / "python" / "a.py"
    path.write_text(f"x = 1\n# {words.replace('|', '')}\n")
    assert script.main() == 1
    assert capsys.readouterr().out.startswith("python/a.py:2: ")


def test_ordinary_english_passes(script, capsys):
    text = "By the way, put it in its place: side by side, in many ways, two folds, as planes are."
    (script.ROOT / "docs" / "a.md").write_text(text)
    assert script.main() == 0
    assert capsys.readouterr().out == ""


def test_lengths_and_private_names(script, capsys):
    package = script.ROOT / "python" / "kconv" / "torch"
    package.mkdir(parents=True)
    private = "from torch._C import _is_tracing\n"
    (package / "_private.py").write_text(private)
    (package / "ops.py").write_text(private)
    (package / "long.py").write_text("\n" * 701)
    (script.ROOT / "tests" / "wide.rs").write_text(f"    // {'x' * 95}\nlet a = {'1' * 110};\n")
    assert script.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "python/kconv/torch/long.py",
        "python/kconv/torch/ops.py:1",
        "tests/wide.rs:1",
    ]
