"""An extension of griffe, which reads the docstrings for the site: what it expects otherwise."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Names sections of one example as griffe does, and leaves out the roles of references."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r":(attr|class|exc|func|meth|mod):(?=`)", "", text)
