"""What all tests and doctests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of the original implementation's outputs, or a skip."""
    folder = os.environ.get("KCONV_REFERENCE")
    if not folder:
        pytest.skip("KCONV_REFERENCE does not name the folder of reference outputs")
    return Path(folder)
