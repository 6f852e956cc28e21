#!/usr/bin/env bash
# pnnx 20261020 and ncnn 1.0.20261020 (torch 2.15.0): a convolution with padding_mode="circular" is
# converted to one that pads by zeros. pnnx ends with status 0, ncnn loads and runs it, and the pixels
# at the borders are other ones. "reflect" and "replicate" are converted to layers that pad so.
# Seen: the largest difference is 1.0 for "circular", in the outermost rows and columns alone, and 5e-07
# for the others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pnnx==20261020 ncnn==1.0.20261020 torch==2.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import subprocess
import sys
import warnings

import ncnn
import numpy as np
import pnnx
import torch

warnings.simplefilter("ignore")
pixels = np.random.default_rng(0).normal(size=(8, 11, 12)).astype("float32")
x = torch.from_numpy(pixels)[None]
seen = {}
for mode in ("circular", "reflect", "replicate", "zeros"):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode).eval()
    torch.jit.trace(conv, x).save("conv.pt")
    command = [pnnx.EXEC_PATH, "conv.pt", "inputshape=[1,8,11,12]", "fp16=0"]
    status = subprocess.run(command, capture_output=True).returncode
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    loaded = net.load_param("conv.ncnn.param"), net.load_model("conv.ncnn.bin")
    extractor = net.create_extractor()
    extractor.input("in0", ncnn.Mat(pixels).clone())
    ran, y = extractor.extract("out0")
    off = abs(np.array(y) - conv(x)[0].detach().numpy())
    seen[mode] = status, *loaded, ran, float(off.max()), float(off[:, 1:-1, 1:-1].max())
    print(f"{mode}: pnnx {status}, ncnn {(*loaded, ran)}, off by {seen[mode][4]:.1e}", end="")
    print(f", inside by {seen[mode][5]:.1e}")
as_seen = all(values[:4] == (0, 0, 0, 0) and values[5] < 1e-4 for values in seen.values())
wrong = [mode for mode, values in seen.items() if values[4] > 0.1]
sys.exit(not (as_seen and wrong == ["circular"]))
PYTHON
