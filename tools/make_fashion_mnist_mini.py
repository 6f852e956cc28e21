"""Make the embedded data set ``fashion_mnist_mini`` from the files of Fashion-MNIST.

Takes the first 600 training and the first 100 test images of each class, in their original order,
and writes them in the original format (gzipped IDX), the same bytes every time.

    apt-get install dataset-fashion-mnist
    python tools/make_fashion_mnist_mini.py /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import argparse
import gzip
import struct
from pathlib import Path

import numpy as np

from kconv.datasets import balanced_subset, read_idx

TARGET = Path(__file__).parents[1] / "python/kconv/data/fashion_mnist_mini"
IMAGES_PER_CLASS = {"train": 600, "t10k": 100}


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array as gzipped IDX, without name and time, so that it is reproducible."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 0x08, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0))


def main() -> None:
    """Write the four files and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with Fashion-MNIST's four .gz files")
    source = parser.parse_args().source
    for part, per_class in IMAGES_PER_CLASS.items():
        images = read_idx(source / f"{part}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{part}-labels-idx1-ubyte.gz")
        chosen = balanced_subset(labels, 10 * per_class)
        write_idx(TARGET / f"{part}-images-idx3-ubyte.gz", images[chosen])
        write_idx(TARGET / f"{part}-labels-idx1-ubyte.gz", labels[chosen])
    for path in sorted(TARGET.glob("*.gz")):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
