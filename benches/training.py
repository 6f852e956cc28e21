"""Whether training on kconv's kernels goes as it does on PyTorch's own.

    python benches/training.py steps [--model keffnet32] [--batch 64] [--count 50]
    python benches/training.py runs --data cifar10-jpeg.tar.xz [--count 300] [--seeds 3]
    python benches/training.py stream [--data photos.tar] [--batch 16] [--count 10] [--workers 2]

``steps`` starts every step from the state of PyTorch's own layers and compares loss, gradients and
moving statistics. ``runs`` trains from the same weights on the same images with PyTorch's layers in
both of its memory layouts and with kconv's, and prints the mean loss of the last third of each run:
float32 rounding alone makes runs part, so the difference of PyTorch's two is the yardstick.
``stream`` takes turns of ``kconv train``'s steps at 224x224 on arrays in memory and on the same
JPEGs in a tar file, decoded by workers meanwhile, and prints the images/s of both.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import kconv.torch
from kconv import augment, datasets
from kconv._kconv import available_cpus
from kconv.training import Config
from kconv.training._torch import TorchTrainer
from kconv.training.batches import Batches, read_ahead
from kconv.training.ranks import Ranks

LEARNING_RATE = 0.01
ROUNDING = 1e-3
ROUNDS = 3


def build(network: str, kernels: str, seed: int) -> nn.Module:
    """The network on ``kernels``, with the weights of ``seed``."""
    torch.manual_seed(seed)
    return kconv.torch.build(networks.spec_of(network), kernels=kernels)


def backward(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The loss; leaves its gradients at the parameters."""
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.item()


def difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest difference of two tensors beside the second one's largest magnitude.

    Some are zero but for rounding, as is the gradient by a bias before a batch norm, the sum of
    many terms that cancel: magnitudes count as at least ``ROUNDING`` of the largest of all.
    """
    found = [(float((a - b).abs().max()), float(b.abs().max())) for a, b in pairs]
    floor = ROUNDING * max(magnitude for _, magnitude in found)
    return max(error / max(magnitude, floor) for error, magnitude in found)


def steps(network: str, images: int, count: int) -> None:
    """The largest differences over steps that start from the same state."""
    reference, ours = build(network, "torch", 0), build(network, "kconv", 0)
    optimizer = torch.optim.SGD(reference.parameters(), LEARNING_RATE)
    worst = {"loss": 0.0, "gradient": 0.0, "moving statistic": 0.0}
    generator = torch.Generator().manual_seed(0)
    size = networks.NETWORKS[network][2]
    for _ in range(count):
        ours.load_state_dict(reference.state_dict())
        y = torch.randint(10, (images,), generator=generator)
        x = torch.randn(images, 3, size, size, generator=generator) + y.view(-1, 1, 1, 1) / 5
        losses = [backward(model, x, y) for model in (ours, reference)]
        parameters = zip(ours.parameters(), reference.parameters(), strict=True)
        buffers = zip(ours.buffers(), reference.buffers(), strict=True)
        found = (
            abs(losses[0] / losses[1] - 1),
            difference((a.grad, b.grad) for a, b in parameters if a.grad is not None),
            difference((a, b) for a, b in buffers if a.dtype.is_floating_point),
        )
        worst = {what: max(worst[what], new) for what, new in zip(worst, found, strict=True)}
        optimizer.step()
    print(f"{count} steps of {network}, {images} images, the last loss {losses[1]:.4f}")
    for what, largest in worst.items():
        print(f"  largest relative difference of a {what}: {largest:.1e}")


def runs(network: str, images: int, count: int, seeds: int, data: str) -> None:
    """The losses at the end of runs with the same weights and images."""
    size = networks.NETWORKS[network][2]
    pictures = datasets.load(data, image_size=size, train_images=count * images, test_images=10)
    sides = {
        "torch": ("torch", torch.contiguous_format),
        "torch-nhwc": ("torch", torch.channels_last),
        "kconv": ("kconv", torch.contiguous_format),
    }
    ends: dict[str, list[float]] = {side: [] for side in sides}
    print(f"{count} steps of {network}, {images} images of {data}")
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(pictures.y_train))
        for side, (kernels, layout) in sides.items():
            model = build(network, kernels, seed).to(memory_format=layout)
            optimizer: Any = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
            losses = []
            start = time.perf_counter()
            for step in range(count):
                chosen = order[np.arange(step * images, (step + 1) * images) % len(order)]
                x = torch.from_numpy(pictures.x_train[chosen]).permute(0, 3, 1, 2)
                x = (x.float() / 127.5 - 1).contiguous(memory_format=layout)
                losses.append(backward(model, x, torch.from_numpy(pictures.y_train[chosen])))
                optimizer.step()
            rate = count * images / (time.perf_counter() - start)
            ends[side].append(float(np.mean(losses[-max(count // 3, 1) :])))
            end = ends[side][-1]
            print(f"  seed {seed} {side:10} loss {end:.4f} {rate:6.1f} images/s", flush=True)
    means = {side: float(np.mean(values)) for side, values in ends.items()}
    own = [abs(a - b) for a, b in zip(ends["torch"], ends["torch-nhwc"], strict=True)]
    ours = abs(means["kconv"] - (means["torch"] + means["torch-nhwc"]) / 2)
    print(
        f"  kconv's mean differs from PyTorch's by {ours:.4f}, PyTorch's layouts by {max(own):.4f}"
    )


def write_photos(path: Path, count: int) -> None:
    """A tar file of JPEGs of 256x256, as smooth as photographs are."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
            coarse.resize((256, 256), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "jpeg")
            member = tarfile.TarInfo(f"n{number % 10}/{number:06}.jpg")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)


def stream(network: str, images: int, count: int, workers: int | None, data: str | None) -> None:
    """Images/s from memory and from a tar file, each over ``count`` steps of a turn."""
    # Beside those of the steps: one batch before time counts, and those that are decoded ahead of
    # the last step, as as many were ahead of the first.
    wanted = (count + 1 + 2 * (workers or available_cpus())) * images
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            write_photos(Path(folder, "photos.tar"), round(1.3 * wanted))
            data = str(Path(folder, "photos.tar"))
        size = networks.NETWORKS[network][2]
        streamed = datasets.load(data, image_size=size, stream=True).x_train
        order = np.resize(np.arange(len(streamed)), wanted)
        sources = {"memory": streamed[:wanted], "tar": streamed}
        trainer = TorchTrainer(networks.spec_of(network), Config(framework="torch"), Ranks())
        targets = np.eye(10, dtype=np.float32)[np.arange(images) % 10]
        rates: dict[str, list[float]] = {source: [] for source in sources}
        for _ in range(ROUNDS):
            for source, pictures in sources.items():
                batches = Batches(pictures, order % len(pictures), images)
                reader = iter(read_ahead(batches, workers=workers, framework="torch"))
                for step in range(count + 1):
                    x = augment.scale(next(reader).images)
                    trainer.train_step(x, targets, 1e-4, scale=1, update=True, seed=0)
                    if not step:
                        begin = time.perf_counter()
                rates[source].append(count * images / (time.perf_counter() - begin))
                del reader
    print(f"{count} steps of {network}, {images} images, {ROUNDS} turns; images/s")
    for source, found in rates.items():
        print(f"  {source:8} {statistics.median(found):6.1f}  ({min(found):.1f}-{max(found):.1f})")
    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    print(f"  ratio    {statistics.median(ratios):6.3f}  ({min(ratios):.3f}-{max(ratios):.3f})")


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("steps", "runs", "stream"))
    parser.add_argument("--model", choices=networks.NETWORKS, help="default: keffnet32 or 224")
    parser.add_argument("--batch", type=int, help="images in a step (default: 64, streamed 16)")
    parser.add_argument(
        "--count", type=int, help="steps (default: 50, or 300 of a run, or 10 of a turn)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side")
    parser.add_argument("--workers", type=int, help="that decode (default: one for each CPU)")
    parser.add_argument("--data", help="a data set of three channels, by name, or its archive")
    arguments = parser.parse_args()
    streams = arguments.what == "stream"
    arguments.model = arguments.model or ("keffnet224" if streams else "keffnet32")
    arguments.batch = arguments.batch or (16 if streams else 64)
    if streams:
        count = arguments.count or 10
        stream(arguments.model, arguments.batch, count, arguments.workers, arguments.data)
    elif arguments.what == "steps":
        steps(arguments.model, arguments.batch, arguments.count or 50)
    elif arguments.data is None:
        parser.error("runs needs --data")
    else:
        count = arguments.count or 300
        runs(arguments.model, arguments.batch, count, arguments.seeds, arguments.data)


if __name__ == "__main__":
    main()
