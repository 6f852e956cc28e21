"""LiteRT (TensorFlow Lite), by litert-torch from PyTorch's layers, for one image at a time.

Its converter takes no batch that varies, and writes reshapes to the example's, so that the
interpreter cannot resize the input afterwards.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from kconv._files import replacing
from kconv._require import require
from kconv.export import Run, fixed_size
from kconv.export._torch import module_of
from kconv.runtime import FrozenNetwork
from kconv.weights._entries import Array

__all__ = ["runner", "write"]


def write(net: FrozenNetwork, path: Path) -> list[Path]:
    """Write the file; return it."""
    torch = require("torch", "torch", "exporting to LiteRT")
    converter = require("litert_torch", "litert-torch", "exporting to LiteRT")
    example = torch.zeros(1, net.config.image.channels, *fixed_size(net, "LiteRT"))
    model = converter.convert(module_of(net), (example,))
    with replacing(path) as temporary:
        model.export(str(temporary))
    return [path]


def runner(net: FrozenNetwork, path: Path) -> tuple[Run, str]:
    """LiteRT's interpreter."""
    module = require("ai_edge_litert.interpreter", "ai-edge-litert", "running LiteRT")
    interpreter = module.Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()

    def probabilities(image: Array) -> Array:
        interpreter.set_tensor(
            source["index"], np.ascontiguousarray(image.transpose(2, 0, 1)[None])
        )
        interpreter.invoke()
        y: Array = interpreter.get_tensor(target["index"])[0]
        return y

    def run(images: Array) -> Any:
        return np.stack([probabilities(image) for image in images])

    return run, f"ai-edge-litert {version('ai-edge-litert')}"
