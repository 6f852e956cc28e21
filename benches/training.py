"""Whether training on kconv's kernels goes as it does on PyTorch's own.

    python benches/training.py steps [--model keffnet32] [--batch 64] [--count 50]
    python benches/training.py runs --data cifar10-jpeg.tar.xz [--count 300] [--seeds 3]

``steps`` starts every step from the state of PyTorch's own layers and compares loss, gradients and
moving statistics. ``runs`` trains from the same weights on the same images with PyTorch's layers in
both of its memory layouts and with kconv's, and prints the mean loss of the last third of each run:
float32 rounding alone makes runs part, so the difference of PyTorch's two is the yardstick.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from typing import Any

import networks
import numpy as np
import torch
from torch import Tensor, nn

import kconv.torch
from kconv import datasets

LEARNING_RATE = 0.01
ROUNDING = 1e-3


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


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("steps", "runs"))
    parser.add_argument("--model", choices=networks.NETWORKS, default="keffnet32")
    parser.add_argument("--batch", type=int, default=64, help="images in a step")
    parser.add_argument("--count", type=int, help="steps (default: 50, or 300 of a run)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side")
    parser.add_argument("--data", help="a data set of three channels, by name, or its archive")
    arguments = parser.parse_args()
    if arguments.what == "steps":
        steps(arguments.model, arguments.batch, arguments.count or 50)
    elif arguments.data is None:
        parser.error("runs needs --data")
    else:
        count = arguments.count or 300
        runs(arguments.model, arguments.batch, count, arguments.seeds, arguments.data)


if __name__ == "__main__":
    main()
