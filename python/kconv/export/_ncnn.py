"""ncnn, by pnnx from PyTorch's traced programs, for one image of one size at a time."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kconv._files import replacing
from kconv._require import require
from kconv.export import Run, fixed_size
from kconv.runtime import FrozenNetwork
from kconv.weights._entries import Array

__all__ = ["opened", "runner", "write"]

_INPUT, _OUTPUT = "in0", "out0"
"""The names that pnnx gives."""
_HALF = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage")
"""What ncnn may do in half precision, and does by itself where the processor has it."""


def write(net: FrozenNetwork, path: Path) -> list[Path]:
    """Write the ``.ncnn.param`` file, and the ``.ncnn.bin`` file of its weights; return both."""
    pnnx = require("pnnx", "pnnx", "exporting to ncnn")
    require("ncnn", "ncnn", "exporting to ncnn")
    torch = require(
        "torch", "torch", "exporting to ncnn, whose converter reads PyTorch's programs,"
    )
    from kconv.export._torch import module_of

    example = torch.zeros(1, net.config.image.channels, *fixed_size(net, "ncnn"))
    targets = {"param": path, "bin": _weights(path)}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "model.pt"
        with torch.no_grad():
            torch.jit.trace(module_of(net, shuffle=True), example).save(str(script))
        shape = ",".join(map(str, example.shape))
        done = subprocess.run(
            [pnnx.EXEC_PATH, script.name, f"inputshape=[{shape}]", "fp16=0"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        found = {kind: Path(folder) / f"model.ncnn.{kind}" for kind in targets}
        if done.returncode or not all(one.exists() for one in found.values()):
            raise ValueError(f"pnnx cannot convert the network: {done.stderr.strip()[-200:]}")
        # Layers that ncnn lacks stay what they were, and pnnx's exit status is 0 all the same.
        kinds = {line.split()[0] for line in found["param"].read_text().splitlines()[2:]}
        if lacking := sorted(kind for kind in kinds if "." in kind):
            raise ValueError(f"ncnn has no layer for {', '.join(lacking)}")
        for kind, target in targets.items():
            with replacing(target) as temporary:
                temporary.write_bytes(found[kind].read_bytes())
    return list(targets.values())


def runner(net: FrozenNetwork, path: Path) -> tuple[Run, str]:
    """Ncnn itself, in float32."""
    ncnn = require("ncnn", "ncnn", "running ncnn")
    network = opened(path)

    def probabilities(image: Array) -> Array:
        extractor = network.create_extractor()
        # A Mat borrows an array's memory without a reference to it: the array needs a name.
        pixels = np.ascontiguousarray(image.transpose(2, 0, 1))
        extractor.input(_INPUT, ncnn.Mat(pixels).clone())
        status, y = extractor.extract(_OUTPUT)
        if status:
            raise ValueError(f"ncnn cannot run the network: it answers {status}")
        return np.array(y)

    def run(images: Array) -> Any:
        return np.stack([probabilities(image) for image in images])

    return run, f"ncnn {ncnn.__version__}"


def opened(path: Path, threads: int | None = None) -> Any:
    """The ``ncnn.Net`` of a file, in float32, on as many threads as one says or ncnn likes."""
    network = require("ncnn", "ncnn", "running ncnn").Net()
    for option in _HALF:
        setattr(network.opt, option, False)
    if threads is not None:
        network.opt.num_threads = threads
    if network.load_param(str(path)) or network.load_model(str(_weights(path))):
        raise ValueError(f"ncnn cannot load {path}")
    return network


def _weights(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".param") + ".bin")
