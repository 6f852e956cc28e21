"""OpenVINO's intermediate representation, by its own converter from ONNX."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kconv._files import replacing
from kconv._require import require
from kconv.export import Run, _onnx
from kconv.runtime import FrozenNetwork
from kconv.weights._entries import Array

__all__ = ["runner", "write"]


def write(net: FrozenNetwork, path: Path) -> list[Path]:
    """Write the ``.xml`` file, and the ``.bin`` file of its weights; return both."""
    openvino = require("openvino", "openvino", "exporting to OpenVINO")
    weights = path.with_suffix(".bin")
    with tempfile.TemporaryDirectory() as folder:
        _onnx.write(net, onnx := Path(folder) / "model.onnx")
        model = openvino.convert_model(onnx)
        openvino.save_model(model, whole := Path(folder) / "model.xml", compress_to_fp16=False)
        for source, target in ((whole.with_suffix(".bin"), weights), (whole, path)):
            with replacing(target) as temporary:
                temporary.write_bytes(source.read_bytes())
    return [path, weights]


def runner(net: FrozenNetwork, path: Path) -> tuple[Run, str]:
    """OpenVINO itself, in float32: it takes bfloat16 by itself where the processor has it."""
    openvino = require("openvino", "openvino", "running OpenVINO")
    core = openvino.Core()
    model = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(images: Array) -> Any:
        return model([np.ascontiguousarray(images.transpose(0, 3, 1, 2))])[0]

    return run, f"openvino {openvino.__version__.partition('-')[0]}"
