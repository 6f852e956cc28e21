"""kconv's own version, and the warning about frameworks of versions it was not made for."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import kconv
from kconv._versions import warn_of_version


@pytest.mark.parametrize(
    ("framework", "version", "warns"),
    [
        ("torch", "2.4.1", True),
        ("torch", "2.15.0+cu132", False),
        ("torch", "3.0.0a0", True),
        ("jax", "0.4.38", True),
        ("jax", "0.10.2", False),
        ("keras", "3.4.1", True),
        ("tensorflow", "2.22.0-rc1", True),
    ],
)
def test_warning(framework, version, warns, recwarn):
    warn_of_version(framework, version)
    assert [framework in str(w.message) and version in str(w.message) for w in recwarn] == (
        [True] if warns else []
    )


@pytest.mark.parametrize("name", ["torch", "jax", "jax.nnx", "keras", "tensorflow"])
def test_each_front_end_asks(name, monkeypatch):
    """A version of the future warns at import, and does not stop it."""
    module = importlib.import_module(f"kconv.{name}")
    framework = importlib.import_module({"jax.nnx": "flax"}.get(name, name.split(".")[0]))
    monkeypatch.setattr(framework, "__version__", "99.0.0")
    with pytest.warns(UserWarning, match=r"this is 99\.0\.0"):
        importlib.reload(module)


def test_one_version():
    root = Path(__file__).parents[1]
    patterns = {"Cargo.toml": r'^version = "(.+)"$', "CITATION.cff": r"^version: (.+)$"}
    for name, pattern in patterns.items():
        found = re.search(pattern, (root / name).read_text(), re.MULTILINE)
        assert found, name
        assert found[1] == kconv.__version__, name
