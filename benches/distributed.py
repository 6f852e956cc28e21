"""Several processes beside one: images/s of a training step, and what the all-reduce takes.

    python benches/distributed.py [--model keffnet_b0] [--batch 64] [--processes 2] [--steps 12]

In turns it runs one process of as many threads as there are processes, and that many processes of
one thread, on the same batch; and prints the median step of each, their ratio, and the time of an
all-reduce of the gradients alone. `--scaling` models from the step what machines would reach that a
network connects: a ring passes 2 (n - 1) parts of 1 / n of the gradients, each of which also takes
0.1 ms to arrive. The backward pass, two thirds of a step, hides as much of that at best, and
nothing at worst. (`--scaling 530` models from a step of 530 ms, and measures nothing.)
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from kconv import models

ROUNDS = 3
LATENCY = 1e-4


def spec_of(options: argparse.Namespace) -> Any:
    """The network."""
    return models.create(
        options.model, ktype=options.ktype, classes=10, input_shape=(32, 32, 3), skip_stride_cnt=3
    )


def worker(options: argparse.Namespace) -> None:
    """Time the steps of this process; the first one prints them."""
    import torch

    from kconv.training import Config
    from kconv.training._torch import TorchTrainer
    from kconv.training.ranks import joined

    spec = spec_of(options)
    with joined("torch") as ranks:
        config = Config(framework="torch", model=options.model, batch_size=options.batch)
        ranks.threads = options.processes // ranks.size
        trainer = TorchTrainer(spec, config, ranks)
        rng = np.random.default_rng(ranks.rank)
        share = options.batch // ranks.size
        images = rng.standard_normal((share, 32, 32, 3)).astype(np.float32)
        targets = np.eye(10, dtype=np.float32)[rng.integers(0, 10, share)]
        times = []
        for _ in range(options.steps + 2):
            begin = time.perf_counter()
            trainer.train_step(images, targets, 1e-3, scale=1.0, update=True, seed=0)
            times.append(time.perf_counter() - begin)
        size = sum(p.numel() for p in trainer.model.parameters())
        reductions = []
        if ranks.size > 1:
            import torch.distributed as dist

            gradients = torch.zeros(size)
            for _ in range(options.steps):
                begin = time.perf_counter()
                dist.all_reduce(gradients)
                reductions.append(time.perf_counter() - begin)
        if not ranks.rank:
            print(json.dumps({"steps": times[2:], "reductions": reductions, "parameters": size}))


def measure(options: argparse.Namespace, processes: int) -> dict[str, Any]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = []
    for rank in range(processes):
        env = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LOCAL_WORLD_SIZE": str(processes),
        }
        command = [sys.executable, __file__, "--worker", *sys.argv[1:]]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("a process failed")
    found_times: dict[str, Any] = json.loads(outputs[0])
    return found_times


def scaling(step: float, parameters: int, batch: int) -> None:
    """What machines would reach, each of one step's images."""
    print(
        f"\nStep {1e3 * step:.0f} ms, {parameters:,} gradients: images/s, least and most of linear"
    )
    print("machines       10 Gbit/s              1 Gbit/s")
    for machines in (1, 2, 4, 8, 16, 32, 64):
        row = f"{machines:8}"
        for rate in (10e9, 1e9):
            part = 4 * parameters * 8 / machines / rate + LATENCY
            transfer = 2 * (machines - 1) * part
            total = step + max(0.0, transfer - 2 / 3 * step)
            least = step / (step + transfer)
            row += f"   {machines * batch / total:8.0f} {least:4.0%} {step / total:4.0%}"
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="keffnet_b0")
    parser.add_argument("--ktype", default="D6_16ch")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--scaling", type=float, nargs="?", const=0.0, metavar="MS")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    if options.scaling:
        scaling(options.scaling / 1e3, models.count(spec_of(options)).trainable, options.batch)
        return
    steps: dict[int, list[float]] = {1: [], options.processes: []}
    reductions: list[float] = []
    parameters = 0
    for _ in range(ROUNDS):
        for processes, times in steps.items():
            found = measure(options, processes)
            times += found["steps"]
            reductions += found["reductions"]
            parameters = found["parameters"]
    one, many = (statistics.median(times) for times in steps.values())
    for processes, median in ((1, one), (options.processes, many)):
        threads = options.processes // processes
        print(
            f"{processes} process(es) of {threads} thread(s): {1e3 * median:.1f} ms, "
            f"{options.batch / median:.1f} images/s"
        )
    print(f"ratio {one / many:.3f}")
    print(
        f"all-reduce of {parameters:,} float32 over {options.processes} processes: "
        f"{1e3 * statistics.median(reductions):.2f} ms"
    )
    if options.scaling is not None:
        scaling(one, parameters, options.batch)


if __name__ == "__main__":
    main()
