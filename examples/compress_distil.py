"""Compress a model's pointwise convolutions, and train it with the original as its teacher."""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn
from torch.nn import functional

import kconv.torch
from kconv import augment, datasets


def unit(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, activation: a part of the model that stands for yours."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, teacher=None) -> None:
    """On the labels; with a teacher half on what it finds, softened."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        model.train()
        for part in torch.randperm(len(x)).split(32):
            logits = model(x[part])
            loss = functional.cross_entropy(logits, y[part])
            if teacher is not None:
                with torch.inference_mode():
                    taught = (teacher(x[part]) / 2).softmax(1)
                loss = (loss + functional.cross_entropy(logits / 2, taught.clone())) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> None:
    """Print parameters and test accuracy of the original, and of the compressed model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    data = datasets.load("fashion_mnist_mini", train_images=options.train_images)
    x, x_test = (
        torch.from_numpy(augment.scale(images)).permute(0, 3, 1, 2)
        for images in (data.x_train, data.x_test)
    )
    y, y_test = torch.from_numpy(data.y_train), torch.from_numpy(data.y_test)
    large = nn.Sequential(unit(1, 64, 3, 2), unit(64, 64, 3, 2, groups=64), unit(64, 256, 1))
    large += nn.Sequential(unit(256, 256, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    large.append(nn.Linear(256, len(data.class_names)))
    train(large, x, y, options.epochs)
    small = kconv.torch.compress(copy.deepcopy(large), ktype="D6_16ch")
    print(kconv.torch.report(small))
    train(small, x, y, options.epochs, teacher=large.eval())
    for name, model in (("original", large), ("compressed, taught", small)):
        parameters = sum(p.numel() for p in model.parameters())
        with torch.inference_mode():
            accuracy = (model.eval()(x_test).argmax(1) == y_test).float().mean()
        print(f"{name:18}  {parameters:7,} parameters  test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
