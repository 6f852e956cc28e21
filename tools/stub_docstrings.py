"""Write the docstrings of the extension's public functions into its stubs, which editors show.

They are written once, in the Rust sources; after a change there, run it on the built extension:

    python tools/stub_docstrings.py

tests/test_docstrings.py fails where that would change something.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

import kconv
from kconv import _kconv

STUBS = Path(__file__).resolve().parents[1] / "python/kconv/_kconv.pyi"


def with_docstrings(stubs: str) -> str:
    """Put the docstrings of the built extension in the place of those of its stubs.

    Args:
        stubs: The text of the stubs.

    Returns:
        Their text, with the whole docstring of each function that kconv shows as its own.
    """
    lines = stubs.splitlines()
    for node in reversed(ast.parse(stubs).body):
        if not isinstance(node, ast.FunctionDef) or node.name not in kconv.__all__:
            continue
        function, old = getattr(_kconv, node.name), node.body[0]
        if getattr(kconv, node.name) is function:
            text = inspect.getdoc(function) or ""
            new = f'"""{text}\n"""' if "\n" in text else f'"""{text}"""'
            lines[old.lineno - 1 : old.end_lineno] = textwrap.indent(new, "    ").splitlines()
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    STUBS.write_text(with_docstrings(STUBS.read_text()))
