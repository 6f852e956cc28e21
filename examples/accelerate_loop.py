"""Train with Hugging Face's Accelerate; `accelerate launch --cpu` runs it in several processes."""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import kconv.torch
from kconv import augment, datasets


def main() -> None:
    """Train, then print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="keffnet_s")
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    data = datasets.load(
        "fashion_mnist_mini", image_size=options.image_size, train_images=options.train_images
    )

    def loader(images, labels, shuffle):
        x = torch.from_numpy(augment.scale(images)).permute(0, 3, 1, 2)
        return DataLoader(TensorDataset(x, torch.from_numpy(labels)), 20, shuffle)

    accelerator = Accelerator(cpu=True)
    model = kconv.torch.create_model(
        options.model, num_classes=10, in_chans=1, image_size=options.image_size
    )
    model, optimizer, train_loader, test_loader = accelerator.prepare(
        model,
        torch.optim.Adam(model.parameters(), 2e-3),
        loader(data.x_train, data.y_train, True),
        loader(data.x_test, data.y_test, False),
    )
    for epoch in range(options.epochs):
        model.train()
        for images, labels in train_loader:
            loss = functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        right = []
        for images, labels in test_loader:
            with torch.inference_mode():
                found = model(images).argmax(1)
            right.append(accelerator.gather_for_metrics(found == labels))
        accelerator.print(f"epoch {epoch + 1}: accuracy {torch.cat(right).float().mean():.3f}")


if __name__ == "__main__":
    main()
