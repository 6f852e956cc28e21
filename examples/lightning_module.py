"""Train with Lightning: a LightningModule around a network of kconv, nothing else special."""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import kconv.torch
from kconv import augment, datasets

try:
    import lightning
except ImportError:  # the same under its older name
    import pytorch_lightning as lightning


class Classifier(lightning.LightningModule):
    """A network by name, and how it is trained."""

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = kconv.torch.create_model(name, **options)

    def training_step(self, batch, index):
        """The loss of a batch."""
        images, labels = batch
        loss = functional.cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        """The accuracy of a batch."""
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        """Adam."""
        return torch.optim.Adam(self.parameters(), 2e-3)


def main() -> None:
    """Train, then print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="keffnet_s")
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    data = datasets.load("fashion_mnist_mini", image_size=32, train_images=options.train_images)

    def loader(images, labels, shuffle):
        x = torch.from_numpy(augment.scale(images)).permute(0, 3, 1, 2)
        return DataLoader(TensorDataset(x, torch.from_numpy(labels)), 32, shuffle)

    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=options.epochs, logger=False, enable_checkpointing=False
    )
    module = Classifier(options.model, num_classes=10, in_chans=1, image_size=32)
    trainer.fit(module, loader(data.x_train, data.y_train, True))
    print(trainer.validate(module, loader(data.x_test, data.y_test, False)))


if __name__ == "__main__":
    main()
