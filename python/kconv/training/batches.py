"""The batches of an epoch, each by its number; and reading them ahead of the step.

A batch depends on the seed, the epoch and its number alone. So whatever loads them in advance, with
however many workers, a run goes on at any batch by beginning with that number.

Images in memory are sliced as they are needed. Streamed ones are decoded by the framework's own
loader: PyTorch's ``DataLoader``, also where Keras computes on it, whose processes leave the GIL and
the chance of the training alone, or else Grain, JAX's loader, whose threads suffice as Pillow
decodes without the GIL, and which needs no fork of a process in which XLA's threads run. (Keras's
``PyDataset`` loads ahead only within ``fit``, and ``tf.data`` would bring TensorFlow into runs on
JAX.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kconv._kconv import available_cpus, release_memory
from kconv._require import require
from kconv.datasets import Images, StreamedImages

__all__ = ["Batch", "Batches", "check_loader", "progress", "read_ahead"]

_MOST_WORKERS = 8


class Batch(NamedTuple):
    """Some images.

    Attributes:
        indices: (N,) which of the data set's they are.
        images: (N, H, W, C) uint8.
        unread: what is wrong with those that cannot be read, which are left out: all, maybe.
    """

    indices: NDArray[np.intp]
    images: Images
    unread: dict[int, str]


class Batches(Sequence[Batch]):
    """Batches of images in an order, or one process's share of each.

    Args:
        images: all images.
        order: (M,) which of them to take, one after the other.
        batch_size: of a batch of all processes together; the last one may be smaller.
        rank: which process's share.
        size: of how many processes.
        change: from the number of the batch and its images to what is trained on.
        skip_bad: whether images that cannot be read are left out.
    """

    def __init__(
        self,
        images: Images | StreamedImages,
        order: NDArray[np.intp],
        batch_size: int,
        rank: int = 0,
        size: int = 1,
        *,
        change: Callable[[int, Images], Images] | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.images, self.order, self.batch_size = images, order, batch_size
        self.rank, self.size = rank, size
        self.change, self.skip_bad = change, skip_bad

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def count(self, number: int) -> int:
        """How many images a batch has, of all processes together."""
        return min(self.batch_size, len(self.order) - number * self.batch_size)

    def __getitem__(self, number: Any) -> Any:
        """A batch.

        Raises:
            ValueError: an image cannot be read.
            IndexError: there is no such batch.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        start = number * self.batch_size
        index = self.order[start : start + self.count(number)][self.rank :: self.size]
        unread: dict[int, str] = {}
        if isinstance(self.images, np.ndarray):
            images = self.images[index]
        else:
            images, failed = self.images.read(index)
            if failed and not self.skip_bad:
                raise ValueError(next(iter(failed.values())))
            if failed:
                unread = {int(index[place]): message for place, message in failed.items()}
                good = np.setdiff1d(np.arange(len(index)), list(failed))
                index, images = index[good], images[good]
        if self.change is not None and len(images):
            images = self.change(number, images)
        return Batch(index, images, unread)


def read_ahead(
    batches: Batches, start: int = 0, *, workers: int | None = None, framework: str = "keras"
) -> Iterator[Batch]:
    """All batches from one on, in their order; streamed ones are decoded ahead.

    Args:
        batches: them.
        start: the first one's number.
        workers: how many decode; None is one for each CPU, and 0 decodes when one is wanted.
        framework: whose loader reads.

    Yields:
        The batches.

    Raises:
        ValueError: an image cannot be read.
        ImportError: the loader is not installed.
    """
    if workers is None:
        workers = min(available_cpus(), _MOST_WORKERS)
    if isinstance(batches.images, np.ndarray) or not workers:
        for number in range(start, len(batches)):
            yield batches[number]
    elif framework == "torch":
        yield from _torch_loader(batches, start, workers)
    else:
        yield from _grain_loader(batches, start, workers)


def check_loader(images: Images | StreamedImages, *, workers: int | None, framework: str) -> None:
    """See that what :func:`read_ahead` will need is installed.

    Raises:
        ImportError: it is not.
    """
    if isinstance(images, StreamedImages) and workers != 0 and framework != "torch":
        require("grain", "grain", "streaming images into Keras")


def _torch_loader(batches: Batches, start: int, workers: int) -> Iterable[Batch]:
    import torch
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        _Caught(batches),  # type: ignore[arg-type]  # has a length and items
        batch_size=None,  # an item is a batch
        sampler=range(start, len(batches)),
        num_workers=workers,
        prefetch_factor=2,
        # As they are: tensors would be in shared memory, of which containers have little.
        collate_fn=_same,
    )
    # What a process writes after a fork is copied, in small pages in the place of large ones: the
    # memory of steps, which is free now, would have slowed down all that follow.
    release_memory()
    # The seed of the workers is drawn from PyTorch's chance, of which steps are to have the same
    # whether images are streamed or not.
    with torch.random.fork_rng(devices=[]):
        reader = iter(loader)
    for batch in reader:
        if isinstance(batch, _TOLD):
            raise batch
        yield batch


def _same(item: Any) -> Any:
    return item


_TOLD = (ValueError, TypeError)
"""What reading and transforms raise, in one sentence."""


class _Caught:
    """Batches whose errors are items: a loader would wrap them into a page of its own."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch | ValueError | TypeError:
        try:
            batch: Batch = self.batches[number]
        except _TOLD as error:
            return error
        return batch


def _grain_loader(batches: Batches, start: int, workers: int) -> Iterable[Batch]:
    grain = require("grain", "grain", "streaming images into Keras")
    data = grain.MapDataset.source(_Caught(batches))[start:]
    for batch in data.to_iter_dataset(
        grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    ):
        if isinstance(batch, _TOLD):
            raise batch
        yield batch


def progress(total: int, what: str, *, hidden: bool = False) -> Any:
    """A progress bar of images, shown on a terminal only, of several processes by the first."""
    from tqdm import tqdm

    disable = True if hidden else None
    return tqdm(total=total, desc=what, unit=" images", leave=False, disable=disable)
