"""The tests of this folder once more, on Keras's other backends, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import keras
import pytest

OTHERS = sorted({"jax", "tensorflow", "torch"} - {keras.backend.backend()})


@pytest.mark.skipif("KCONV_NESTED" in os.environ, reason="already such a process")
@pytest.mark.parametrize("backend", OTHERS)
def test_backend(backend):
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    folder = Path(__file__).parent
    options = ["-q", "-p", "no:cacheprovider", "--durations=3", str(folder)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        env={**os.environ, "KERAS_BACKEND": backend, "KCONV_NESTED": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:]
