"""Whole training steps and inference of a network, kconv's front ends beside plain layers.

Every side has the same weights, images and number of threads, and runs in a process of its own, so
that the peak of its resident memory is its own too. Sides take turns; before a time counts, the
first loss (or the probabilities) must agree with that of the first side. A peer that is not
installed, or cannot run, is reported as missing. Of the side "kconv-torch" a second table tells
where the time goes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import breakdown
import numpy as np
from numpy.typing import NDArray

from kconv.models import create

Array = NDArray[Any]

NETWORKS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "keffnet32": ("keffnet_b0", {"ktype": "D6_16ch", "skip_stride_cnt": 3}, 32, 64),
    "keffnet224": ("keffnet_b0", {"ktype": "D6_16ch"}, 224, 16),
    "efficientnet224": ("efficientnet_b0", {}, 224, 16),
    "mobilenet_v3": ("mobilenet_v3_large", {}, 224, 16),
    "kmobilenet": ("kmobilenet", {"ktype": "D6_32ch"}, 224, 16),
    "kmobilenet_v3": ("kmobilenet_v3_large", {"ktype": "D6_16ch"}, 224, 16),
    "kdensenet": ("kdensenet_bc_l100", {"ktype": "D6_12ch"}, 32, 64),
}
SIDES: dict[str, dict[str, str]] = {  # with the variables of their environment
    "torch": {},
    "torch-nhwc": {},
    "torch-kept": {  # glibc told to keep freed memory
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
        "MALLOC_TOP_PAD_": "268435456",
    },
    "torch-compile": {},
    "onnxruntime": {},
    "openvino": {},
    "ncnn": {},
    "mnn": {},
    "litert": {},
    "kconv-torch-plain": {},
    "kconv-torch": {},
    "kconv-load": {},
    "kconv-keras-jax": {"KERAS_BACKEND": "jax"},
}
OURS = ("kconv-torch", "kconv-keras-jax")
DEFAULT_SIDES = {
    "step": ("torch", "torch-nhwc", "torch-kept", "torch-compile", *OURS),
    "inference": (
        *("torch", "torch-nhwc", "torch-compile", "onnxruntime", "openvino", "ncnn", "mnn"),
        *("litert", "kconv-load", *OURS),
    ),
}
RUNTIMES = {
    "onnxruntime": "onnx",
    "openvino": "onnx",
    "ncnn": "ncnn",
    "mnn": "mnn",
    "litert": "litert",
    "kconv-load": None,
}
"""They run the frozen network, as ``kconv.export`` writes it in these formats; none trains."""
WARM_UP = 2
"""Calls that compile, and touch memory for the first time."""
REPEATS = {"step": (3, 0.0), "inference": (3, 1.0)}
"""The least calls, and seconds, that a process times: one image takes milliseconds."""


def spec_of(network: str) -> Any:
    """The spec, without what is random in training."""
    name, options, size, _ = NETWORKS[network]
    steady = {"dropout": 0.0, "drop_connect": 0.0} if "effnet" in name else {"dropout": 0.0}
    return create(name, classes=10, input_shape=(size, size, 3), **steady, **options)


def batch(network: str, images: int) -> tuple[Array, Array]:
    """(N, 3, H, W) images and their classes."""
    rng = np.random.default_rng(0)
    size = NETWORKS[network][2]
    x = rng.normal(size=(images, 3, size, size)).astype(np.float32)
    return x, np.arange(images) % 10


def run(options: Any) -> dict[str, Any]:
    """Times all sides in turns; prints a table of them, and one of where kconv's time goes."""
    operation, network = options.operation, options.model
    sides = list(options.sides or DEFAULT_SIDES[operation])
    if operation == "step" and not set(sides).isdisjoint(RUNTIMES):
        raise SystemExit(f"{' and '.join(RUNTIMES)} do not train")
    images = options.batch or NETWORKS[network][3]
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _save(network, Path(folder), [side for side in sides if side in RUNTIMES])
        for _ in range(options.turns):
            for side in list(sides):
                call = [operation, network, side, str(images), str(options.threads), folder]
                try:
                    results.setdefault(side, []).append(_in_a_process(side, call, options.threads))
                except MissingError as error:
                    print(f"side {side}: missing ({error})", flush=True)
                    sides.remove(side)
    if not sides:
        raise SystemExit("no side could run")
    reference = results[sides[0]][0]["check"]
    rows = []
    for side in sides:
        for result in results[side]:
            # Probabilities, or a loss of about one.
            if not np.allclose(result["check"], reference, rtol=0, atol=1e-3):
                raise SystemExit(f"{side} computes {result['check']}, expected {reference}")
        times = [t for result in results[side] for t in result["times"]]
        peak = max(result["peak"] for result in results[side])
        row = {"side": side, "best": min(times), "median": median(times), "peak": peak}
        rows.append(row | {"p99": float(np.quantile(times, 0.99)), "calls": len(times)})
    print(f"{operation} of {network}, {images} images, {options.threads} threads")
    print_table(rows, images)
    result = {"what": f"{operation} {network} {images}", "rows": rows}
    if "kconv-torch" not in results:
        return result
    parts = min((r["parts"] for r in results["kconv-torch"]), key=lambda parts: parts["ms"])
    breakdown.print_table(parts)
    return {**result, "parts": parts}


def print_table(rows: list[dict[str, Any]], images: int) -> None:
    """A line for each side."""
    ours = next((row for row in rows if row["side"] == "kconv-torch"), rows[-1])
    titles = f"{'best ms':>9} {'median':>9} {'p99':>9} {'images/s':>9} {'peak MB':>8} {'ratio':>6}"
    print(f"{'':20} {titles} {'calls':>6}")
    for row in rows:
        print(
            f"{row['side']:20} {row['best'] * 1e3:9.2f} {row['median'] * 1e3:9.2f}"
            f" {row['p99'] * 1e3:9.2f} {images / row['best']:9.1f} {row['peak'] / 1e6:8.0f}"
            f" {row['best'] / ours['best']:6.2f} {row['calls']:6}"
        )
    print(f"ratio: the best time beside that of {ours['side']}")


def _save(network: str, folder: Path, runtimes: list[str]) -> None:
    """What the sides read: the weights, the frozen network, and what it is exported to.

    The moving statistics are those of a batch, or the outputs would not depend on the images.
    """
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"PyTorch, which makes the weights, is missing: {error}") from None

    import kconv
    import kconv.torch
    from kconv import export

    torch.manual_seed(0)
    model = kconv.torch.build(spec_of(network), kernels="torch")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches, of which there is one
    with torch.no_grad():
        model(torch.from_numpy(batch(network, 16)[0]))
    kconv.save_weights(model, folder / "weights.safetensors")
    if not runtimes:
        return
    net = kconv.torch.freeze(model, image_size=NETWORKS[network][2])
    net.save(folder / "frozen")
    for form in sorted({form for side in runtimes if (form := RUNTIMES[side])}):
        try:
            export.export(net, folder / export.default_name(form), form)
        except (ImportError, ValueError) as error:
            print(f"no export to {form}: {error}", flush=True)


class MissingError(Exception):
    """A peer cannot run here; says why."""


def _in_a_process(side: str, call: list[str], threads: int) -> dict[str, Any]:
    # XLA reads the number of its threads from NPROC.
    environment = os.environ | SIDES[side] | dict.fromkeys(("OMP_NUM_THREADS", "NPROC"), threads)
    result = subprocess.run(
        [sys.executable, __file__, *call],
        env={name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        why = reason(result.stderr)
        if result.returncode < 0:
            why = f"it was ended by {signal.Signals(-result.returncode).name}"
        if side.startswith("kconv") and not why.startswith(("ModuleNotFoundError", "ImportError")):
            raise SystemExit(f"{side} failed:\n{result.stderr[-2000:]}")
        raise MissingError(why)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def reason(errors: str) -> str:
    """The last line that names an error, or else the last line, of what a process wrote."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["no reason given"]
    named = [line for line in lines if re.match(r"[\w.]+: \S", line)]
    return (named or lines)[-1]


def _torch_side(
    side: str, operation: str, network: str, images: int, threads: int, folder: Path
) -> Callable[[], Any]:
    import torch
    from torch import nn

    import kconv
    import kconv.torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    own = not side.startswith("kconv")
    model = kconv.torch.build(
        spec_of(network), kernels="torch" if own else "kconv", fused=side == "kconv-torch"
    )
    kconv.load_weights(model, folder / "weights.safetensors")
    x, y = map(torch.from_numpy, batch(network, images))
    if side in ("torch-nhwc", "torch-compile"):
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    call = torch.compile(model) if side == "torch-compile" else model
    if operation == "inference":
        model.eval()

        def infer() -> Array:
            with torch.no_grad():
                return call(x).softmax(1).numpy()

        return infer
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-3, alpha=0.9)

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(call(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _keras_side(operation: str, network: str, images: int, folder: Path) -> Callable[[], Any]:
    import keras

    import kconv
    import kconv.keras

    model = kconv.keras.build(spec_of(network))
    kconv.load_weights(model, folder / "weights.safetensors")
    x, y = batch(network, images)
    x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    model.compile(keras.optimizers.RMSprop(1e-3), "sparse_categorical_crossentropy")
    if operation == "inference":
        return lambda: model.predict_on_batch(x)
    return lambda: float(model.train_on_batch(x, y))


def _runtime_side(
    side: str, network: str, images: int, threads: int, folder: Path
) -> Callable[[], Any]:
    """A call of one runtime, which gives (N, classes) probabilities."""
    import kconv
    import kconv.export

    x = batch(network, images)[0]
    if side == "kconv-load":
        net, pixels = kconv.load(folder / "frozen"), np.ascontiguousarray(x.transpose(0, 2, 3, 1))
        return lambda: net(pixels)
    file = folder / kconv.export.default_name(str(RUNTIMES[side]))
    return _PEERS[side](file, x, threads)


def _onnxruntime(file: Path, x: Array, threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": x})[0]


def _openvino(file: Path, x: Array, threads: int) -> Callable[[], Any]:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_HYPER_THREADING": True,  # else one thread a core
        "PERFORMANCE_HINT": "LATENCY",  # all threads for one batch
    }
    model = openvino.Core().compile_model(file, "CPU", settings)
    request = model.create_infer_request()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)[0]


def _ncnn(file: Path, x: Array, threads: int) -> Callable[[], Any]:
    import ncnn

    from kconv.export._ncnn import opened

    network = opened(file, threads)
    inputs = [ncnn.Mat(image).clone() for image in x]  # a Mat borrows memory without a reference

    def infer() -> Array:
        outputs = []
        for image in inputs:
            extractor = network.create_extractor()
            extractor.input("in0", image)
            outputs.append(np.array(extractor.extract("out0")[1]))
        return np.stack(outputs)

    return infer


def _mnn(file: Path, x: Array, threads: int) -> Callable[[], Any]:
    import MNN

    manager = MNN.nn.create_runtime_manager(({"backend": 0, "numThread": threads},))
    network = MNN.nn.load_module_from_file(
        str(file), ["images"], ["probabilities"], runtime_manager=manager
    )
    inputs = [MNN.expr.const(x, list(x.shape), MNN.expr.NCHW)]
    return lambda: np.array(network.onForward(inputs)[0].read())


def _litert(file: Path, x: Array, threads: int) -> Callable[[], Any]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(file), num_threads=threads)
    interpreter.allocate_tensors()
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()

    def infer() -> Array:
        outputs = []
        for i in range(len(x)):
            interpreter.set_tensor(source["index"], x[i : i + 1])
            interpreter.invoke()
            outputs.append(interpreter.get_tensor(target["index"]))
        return np.concatenate(outputs)

    return infer


_PEERS = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "ncnn": _ncnn,
    "mnn": _mnn,
    "litert": _litert,
}


def _one_side(
    operation: str, network: str, side: str, images: str, threads: str, folder: str
) -> None:
    """What a process does: prints the first result, the times, the peak memory, and the parts."""
    import kconv

    kconv.set_num_threads(int(threads))
    size, files = int(images), Path(folder)
    if side == "kconv-keras-jax":
        call = _keras_side(operation, network, size, files)
    elif side in RUNTIMES:
        call = _runtime_side(side, network, size, int(threads), files)
    else:
        call = _torch_side(side, operation, network, size, int(threads), files)
    with breakdown.recorded() if side == "kconv-torch" else nullcontext([]) as programs:
        check = np.asarray(call()).tolist()
        for _ in range(WARM_UP - 1):
            call()
    for program in programs:
        program.take_times()  # those of the calls until now
    times: list[float] = []
    calls, seconds = REPEATS[operation]
    while len(times) < calls or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    result: dict[str, Any] = {"check": check, "times": times, "peak": _peak_memory()}
    if programs:
        shared = operation == "step" or size < int(threads)
        result["parts"] = breakdown.parts(programs, times, size, 1 if shared else int(threads))
    print(json.dumps(result))


def _peak_memory() -> int:
    """Bytes resident at most; getrusage would count the process that started this one too."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


if __name__ == "__main__":
    _one_side(*sys.argv[1:])
