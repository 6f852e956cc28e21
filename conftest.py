"""What all tests and doctests share."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

# TensorFlow and PyTorch's compiler each bring an LLVM; the process aborts if TensorFlow's, which
# Keras imports whatever its backend, is there first.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

os.environ.setdefault("KERAS_BACKEND", "jax")
# Most of the time of tests under JAX goes into compiling the same programs again and again.
CACHE = Path(__file__).parent / ".pytest_cache/jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of the original implementation's outputs, or a skip."""
    folder = os.environ.get("KCONV_REFERENCE")
    if not folder:
        pytest.skip("KCONV_REFERENCE does not name the folder of reference outputs")
    return Path(folder)
