"""Fine-tune a model of timm, its chains of layers fused.

By itself it trains on the images in the package; --data takes a folder train/<class>/*.jpg:

    python finetune_timm.py --pretrained --data photos/ --image-size 224
"""

from __future__ import annotations

import argparse

import timm
import torch
from torch.nn import functional

import kconv.torch
from kconv import datasets


def main() -> None:
    """Train, then print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights, downloaded")
    parser.add_argument("--data", default="fashion_mnist_mini")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()

    data = datasets.load(
        options.data, image_size=options.image_size, train_images=options.train_images
    )
    model = timm.create_model(
        options.model,
        pretrained=options.pretrained,
        num_classes=len(data.class_names),
        in_chans=data.image_shape[-1],
    )
    model = kconv.torch.fuse(model)  # the one line that is not timm's
    print(kconv.torch.report(model))

    def batch_of(images: object) -> torch.Tensor:
        return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255 - 0.5

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels, test_labels = torch.from_numpy(data.y_train), torch.from_numpy(data.y_test)
    for epoch in range(options.epochs):
        model.train()
        for part in torch.randperm(len(labels)).split(options.batch_size):
            loss = functional.cross_entropy(model(batch_of(data.x_train[part])), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            found = torch.cat([model(batch_of(x)) for x in torch.from_numpy(data.x_test).split(64)])
        accuracy = (found.argmax(1) == test_labels).float().mean()
        print(f"epoch {epoch + 1}: test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
