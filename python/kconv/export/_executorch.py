"""ExecuTorch's programs, of PyTorch's exported ones, with XNNPACK where that has the layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kconv._files import replacing
from kconv._require import require
from kconv.export import MOST_IMAGES, Run
from kconv.export._torch import exported_program
from kconv.runtime import FrozenNetwork
from kconv.weights._entries import Array

__all__ = ["runner", "write"]

_PARTITIONER = "executorch.backends.xnnpack.partition.xnnpack_partitioner"


def write(net: FrozenNetwork, path: Path) -> list[Path]:
    """Write the file; return it."""
    exir = require("executorch.exir", "executorch", "exporting to ExecuTorch")
    xnnpack = require(_PARTITIONER, "executorch", "exporting to ExecuTorch")
    # Its memory is planned for the most images that there may be.
    program = exported_program(net, most=MOST_IMAGES["executorch"])
    lowered = exir.to_edge_transform_and_lower(
        program, partitioner=[xnnpack.XnnpackPartitioner()]
    ).to_executorch()
    with replacing(path) as temporary:
        temporary.write_bytes(lowered.buffer)
    return [path]


def runner(net: FrozenNetwork, path: Path) -> tuple[Run, str]:
    """ExecuTorch's runtime."""
    torch = require("torch", "torch", "running ExecuTorch")
    runtime = require("executorch.runtime", "executorch", "running ExecuTorch").Runtime.get()
    program = runtime.load_program(path)
    method = program.load_method("forward")
    version = require("executorch.version", "executorch", "running ExecuTorch").__version__

    def run(images: Array) -> Any:
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return method.execute([x])[0].numpy().copy()

    return run, f"executorch {version.partition('+')[0]}"
