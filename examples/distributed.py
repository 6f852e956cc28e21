"""Data-parallel training in several processes, each with its share of the cores.

Plain PyTorch, as kconv's networks are modules like others:

    torchrun --nproc-per-node 2 distributed.py
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, it would keep the process group for good
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import kconv
import kconv.torch
from kconv import augment, datasets


def main() -> None:
    """Train in this process, one of several."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="keffnet_s")
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    train(options)  # where what holds the process group ends
    dist.destroy_process_group()


def train(options: argparse.Namespace) -> None:
    """Train; the first process prints."""
    threads = max(1, len(os.sched_getaffinity(0)) // dist.get_world_size())
    torch.set_num_threads(threads)
    kconv.set_num_threads(threads)
    torch.manual_seed(0)
    data = datasets.load(
        "fashion_mnist_mini", image_size=options.image_size, train_images=options.train_images
    )
    x = torch.from_numpy(augment.scale(data.x_train)).permute(0, 3, 1, 2)
    images = TensorDataset(x, torch.from_numpy(data.y_train))
    sampler = DistributedSampler(images)
    model = kconv.torch.create_model(
        options.model, num_classes=10, in_chans=1, image_size=options.image_size
    )
    model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for part, labels in DataLoader(images, 20, sampler=sampler):
            loss = functional.cross_entropy(model(part), labels)
            optimizer.zero_grad()
            loss.backward()  # here the processes' gradients become their mean
            optimizer.step()
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: {dist.get_world_size()} processes, loss {loss:.3f}")


if __name__ == "__main__":
    main()
