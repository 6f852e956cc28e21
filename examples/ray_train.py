"""Data-parallel training on a Ray cluster, which this machine is where none is named.

Ray Train starts the processes and connects them; `kconv.training.train` finds itself one of them
and trains as it does under torchrun. Where a process is lost, Ray starts all of them again, and
they go on from the run's checkpoint; so on several machines the run's folder has to be on a disk
that all of them see.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from kconv import training


def train(options: dict) -> None:
    """What each of the processes does."""
    output = Path(options.pop("output"))
    config = training.Config(framework="torch", **options)
    training.train(config, output, resume=(output / "last.npz").exists())


def main() -> None:
    """Start the processes, and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default="keffnet_s")
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    output = options.output.resolve()
    ray.init()
    trainer = TorchTrainer(
        train,
        train_loop_config={
            "output": str(output),
            "model": options.model,
            "train_images": options.train_images,
            "image_size": options.image_size,
            "epochs": options.epochs,
            "lr_schedule": "one-cycle",
            "batch_size": 20,
        },
        scaling_config=ScalingConfig(num_workers=options.processes),
        run_config=RunConfig(
            storage_path=str(output.parent / "ray"), failure_config=FailureConfig(max_failures=1)
        ),
    )
    trainer.fit()
    accuracy, *_ = (output / "report.txt").read_text().splitlines()
    print(f"{options.processes} processes, {accuracy}")


if __name__ == "__main__":
    main()
