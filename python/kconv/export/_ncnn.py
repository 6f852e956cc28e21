"""ncnn, by pnnx from ONNX, for one image at a time."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kconv._files import replacing
from kconv._require import require
from kconv.export import Run, usual_size
from kconv.runtime import FrozenNetwork
from kconv.weights._entries import Array

__all__ = ["runner", "write"]


def write(net: FrozenNetwork, path: Path) -> list[Path]:
    """Write the ``.ncnn.param`` file, and the ``.ncnn.bin`` file of its weights; return both."""
    pnnx = require("pnnx", "pnnx", "exporting to ncnn")
    require("ncnn", "ncnn", "exporting to ncnn")
    image = net.config.image
    if image.height is None or image.width is None:
        raise ValueError("ncnn needs a network of one image size")
    from kconv.export._torch import module_of

    torch = require(
        "torch", "torch", "exporting to ncnn, whose converter reads PyTorch's programs,"
    )
    weights = path.with_name(path.name.removesuffix(".param") + ".bin")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "model.pt"
        example = torch.zeros(1, image.channels, *usual_size(net))
        with torch.no_grad():
            torch.jit.trace(module_of(net, shuffle=True), example).save(str(script))
        shape = ",".join(map(str, example.shape))
        done = subprocess.run(
            [pnnx.EXEC_PATH, script.name, f"inputshape=[{shape}]", "fp16=0"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        names = {"param": path, "bin": weights}
        found = {kind: Path(folder) / f"model.ncnn.{kind}" for kind in names}
        if done.returncode or not all(one.exists() for one in found.values()):
            raise ValueError(f"pnnx cannot convert the network: {done.stderr.strip()[-200:]}")
        for kind, target in names.items():
            with replacing(target) as temporary:
                temporary.write_bytes(found[kind].read_bytes())
    return list(names.values())


def runner(net: FrozenNetwork, path: Path) -> tuple[Run, str]:
    """Ncnn itself."""
    ncnn = require("ncnn", "ncnn", "running ncnn")
    loaded = ncnn.Net()
    loaded.opt.use_fp16_packed = loaded.opt.use_fp16_storage = loaded.opt.use_fp16_arithmetic = (
        False
    )
    loaded.opt.use_bf16_storage = False
    weights = path.with_name(path.name.removesuffix(".param") + ".bin")
    if loaded.load_param(str(path)) or loaded.load_model(str(weights)):
        raise ValueError("ncnn lacks a layer that its converter has written")

    def run(images: Array) -> Any:
        (image,) = images
        extractor = loaded.create_extractor()
        extractor.input("in0", ncnn.Mat(np.ascontiguousarray(image.transpose(2, 0, 1))).clone())
        status, y = extractor.extract("out0")
        if status:
            raise ValueError(f"ncnn cannot run the network: it answers {status}")
        return np.array(y)

    return run, f"ncnn {ncnn.__version__}"
