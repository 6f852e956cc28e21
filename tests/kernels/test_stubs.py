"""The stub of the extension module tells what the module itself tells."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import kconv
from kconv import _kconv

STUB = Path(kconv.__file__).with_name("_kconv.pyi")


def test_docstrings_are_the_modules_or_their_first_paragraphs() -> None:
    """Those of public functions are whole: see tests/test_docstrings.py."""
    found = 0
    for node in ast.walk(ast.parse(STUB.read_text())):
        for child in getattr(node, "body", []):
            if not isinstance(child, ast.FunctionDef | ast.ClassDef) or child.name[0] == "_":
                continue
            owner = getattr(_kconv, node.name) if isinstance(node, ast.ClassDef) else _kconv
            if not hasattr(owner, child.name):  # a type that only the stub has
                continue
            told, shown = inspect.getdoc(getattr(owner, child.name)), ast.get_docstring(child)
            assert told is not None, child.name
            assert shown is not None, child.name
            first, whole = (" ".join(text.split()) for text in (told.split("\n\n")[0], told))
            assert " ".join(shown.split()) in (first, whole), child.name
            found += 1
    assert found >= 25
