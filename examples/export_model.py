"""Freeze a PyTorch model, serve it on NumPy alone, and export it.

python export_model.py out/
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import kconv
import kconv.torch
from kconv import datasets, export


def main() -> None:
    """Write a folder for kconv.load and a file for each format, each checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--weights", help="a name of `kconv models`, a run's folder or a file")
    parser.add_argument("--model", default="keffnet_s")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--formats", nargs="*", default=["onnx"], choices=export.FORMATS)
    options = parser.parse_args()
    class_names = datasets.load("fashion_mnist_mini", train_images=10).class_names
    model = kconv.torch.create_model(  # trained by your own loop, or by `kconv train`
        options.model,
        num_classes=len(class_names),
        in_chans=1,
        image_size=options.image_size,
        weights=options.weights,
    )
    net = kconv.torch.freeze(model, class_names=class_names, image_size=options.image_size)
    net.save(options.output)
    served = kconv.load(options.output)  # where neither PyTorch nor anything but NumPy is needed
    images = np.zeros((2, options.image_size, options.image_size, 1), np.uint8)
    print(served, served(images).shape)
    for form in options.formats:
        done = export.export(net, options.output / export.default_name(form), form)
        print(f"{done.path}: {done.inputs} -> {done.outputs}; {done.checked}")


if __name__ == "__main__":
    main()
