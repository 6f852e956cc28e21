"""What is said of packages that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from kconv._require import require


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"the test needs some_module, which is not installed: pip install a b\Z"),
        ("import no_such_backend.core", "needs no_such_backend, which is not .*install no_such_ba"),
        ("from math import nothing", "needs some_module, which cannot be imported: cannot import"),
    ],
)
def test_the_missing_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, message: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    if content is not None:
        (tmp_path / "some_module.py").write_text(content)
    with pytest.raises(ImportError, match=message):
        require("some_module", "a b", "the test")


def test_a_module_below_a_package() -> None:
    assert require("xml.dom.minidom", "x", "the test").__name__ == "xml.dom.minidom"
    with pytest.raises(ImportError, match="needs xml, which is not installed: pip install x"):
        require("xml.nothing", "x", "the test")
