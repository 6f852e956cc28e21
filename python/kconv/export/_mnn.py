"""MNN, by its own converter from ONNX."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kconv._files import replacing
from kconv._require import require
from kconv.export import INPUT, Run, _onnx, output_name
from kconv.runtime import FrozenNetwork
from kconv.weights._entries import Array

__all__ = ["runner", "write"]

# Called from Python: the command that MNN installs would install further packages by itself.
_CONVERT = "from MNN.tools import mnnconvert; mnnconvert.main()"


def write(net: FrozenNetwork, path: Path) -> list[Path]:
    """Write the file; return it."""
    require("MNN", "MNN", "exporting to MNN")
    with tempfile.TemporaryDirectory() as folder:
        _onnx.write(net, source := Path(folder) / "model.onnx")
        target = Path(folder) / "model.mnn"
        arguments = ["-f", "ONNX", "--modelFile", source, "--MNNModel", target, "--bizCode", "MNN"]
        done = subprocess.run(
            [sys.executable, "-c", _CONVERT, *map(str, arguments)], capture_output=True, text=True
        )
        if not target.exists():
            raise ValueError(f"MNN cannot convert the network: {done.stderr.strip()[-200:]}")
        with replacing(path) as temporary:
            temporary.write_bytes(target.read_bytes())
    return [path]


def runner(net: FrozenNetwork, path: Path) -> tuple[Run, str]:
    """MNN itself."""
    mnn = require("MNN", "MNN", "running MNN")
    network = mnn.nn.load_module_from_file(str(path), [INPUT], [output_name(net)])
    convert = mnn.expr

    def run(images: Array) -> Any:
        values = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        x = convert.const(values, list(values.shape), convert.NCHW)
        (y,) = network.onForward([x])
        return np.array(y.read())

    return run, f"MNN {mnn.version()}"
