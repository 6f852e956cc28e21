"""A kType that the papers do not have: at least 20 channels a group, in blocks and in a model."""

from __future__ import annotations

import torch
from torch import nn

import kconv.torch
from kconv import ktypes

# The number is the original's for a kType; -1 is none of them.
D6_20CH = ktypes.KType("D6_20ch", number=-1, scheme="D6", channels=20)


def main() -> None:
    """Show its steps, a block with it, and a model compressed by it, trained for a step."""
    for step in ktypes.plan(D6_20CH, 240, 40, name="project"):
        groups = f", {step.groups} groups" if isinstance(step, ktypes.Unit) else ""
        print(f"{type(step).__name__:10} {step.name}: {step.channels} channels{groups}")
    block = kconv.torch.MBConv(40, 40, kernel_size=5, ktype=D6_20CH, drop_connect=0.1)
    plain = kconv.torch.MBConv(40, 40, kernel_size=5, ktype=None, drop_connect=0.1)
    for one in (block, plain):
        print(f"{sum(p.numel() for p in one.parameters()):6,} parameters: {one}")
    model = nn.Sequential(
        nn.Conv2d(3, 40, 3, 2, 1),
        nn.Conv2d(40, 240, 1),
        nn.BatchNorm2d(240),
        nn.ReLU(),
        nn.Conv2d(240, 240, 3, 1, 1, groups=240),
        nn.Conv2d(240, 40, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 10),
    )
    model = kconv.torch.compress(model, ktype=D6_20CH)
    print(kconv.torch.report(model))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    print(f"loss before the step {loss:.3f}")


if __name__ == "__main__":
    main()
