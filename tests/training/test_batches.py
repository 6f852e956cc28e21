"""Batches by their numbers, and reading them ahead by the frameworks' loaders."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest

import kconv
from kconv.augment import PAPERS
from kconv.datasets import StreamedImages
from kconv.training._loop import _expect_images
from kconv.training.batches import Batches, check_loader, progress, read_ahead
from kconv.training.transforms import Change


class Numbers(StreamedImages):
    """Image n is of n (modulo 256) everywhere; some cannot be read."""

    def __init__(self, count: int, bad: frozenset[int] = frozenset()) -> None:
        self.shape, self.bad = (count, 2, 3, 1), bad

    def pixels(self, number: int) -> np.ndarray:
        if number in self.bad:
            raise ValueError(f"image {number} is bad")
        return np.full(self.shape[1:], number % 256, np.uint8)


ORDER = np.random.default_rng(0).permutation(50)[:23]


def numbers(batches: list) -> list[list[int]]:
    return [batch.images[:, 0, 0, 0].tolist() for batch in batches]


@pytest.mark.parametrize(
    ("framework", "workers"), [("torch", 2), ("torch", 0), ("keras", 2), ("keras", None)]
)
def test_loaders_give_the_same_from_any_batch_on(framework: str, workers: int | None) -> None:
    if framework == "keras":
        pytest.importorskip("grain")

    def change(number: int, images: np.ndarray) -> np.ndarray:
        return images + np.uint8(number)

    memory = np.stack([np.full((2, 3, 1), n, np.uint8) for n in range(50)])
    expected = [ORDER[i * 5 : i * 5 + 5] + i for i in range(5)]
    for images in (Numbers(50), memory):
        batches = Batches(images, ORDER, 5, change=change)
        assert [batches.count(n) for n in range(len(batches))] == [5, 5, 5, 5, 3]
        for start in (0, 3, 5):
            found = list(read_ahead(batches, start, workers=workers, framework=framework))
            assert numbers(found) == [part.tolist() for part in expected[start:]]
            for batch, part in zip(found, range(start, 5), strict=True):
                np.testing.assert_array_equal(batch.indices + part, expected[part])


def test_batches_go_to_workers_of_any_kind() -> None:
    """Which Python starts by fork, or from now on by a server."""
    batches = Batches(Numbers(50), ORDER, 5, change=Change(1, 2, 0, PAPERS))
    again = pickle.loads(pickle.dumps(batches))
    np.testing.assert_array_equal(again[1].images, batches[1].images)
    other = Batches(Numbers(50), ORDER, 5, change=Change(1, 3, 0, None))
    np.testing.assert_array_equal(other[1].images[:, 0, 0, 0], ORDER[5:10])


def test_missing_loader_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"streaming images into Keras needs grain.*pip install"):
        check_loader(Numbers(5), workers=None, framework="keras")
    check_loader(Numbers(5), workers=0, framework="keras")
    check_loader(np.zeros((1, 2, 3, 1), np.uint8), workers=2, framework="keras")


def test_shares_make_the_whole_batch() -> None:
    parts = [Batches(Numbers(50), ORDER, 5, rank, 2) for rank in range(2)]
    for number, whole in enumerate(Batches(Numbers(50), ORDER, 5)):
        found = [n for part in parts for n in numbers([part[number]])[0]]
        assert sorted(found) == sorted(numbers([whole])[0])


@pytest.mark.parametrize(("framework", "workers"), [("torch", 2), ("keras", 2), ("keras", 0)])
def test_bad_images(framework: str, workers: int) -> None:
    if framework == "keras" and workers:
        pytest.importorskip("grain")
    bad = int(ORDER[7])
    images = Numbers(50, frozenset([bad]))
    how = {"workers": workers, "framework": framework}
    with pytest.raises(ValueError, match=f"^image {bad} is bad$"):
        list(read_ahead(Batches(images, ORDER, 5), **how))
    found = list(read_ahead(Batches(images, ORDER, 5, skip_bad=True), **how))
    read = [n for part in numbers(found) for n in part]
    assert read == [number for number in ORDER if number != bad]
    assert [batch.unread for batch in found] == [{}, {bad: f"image {bad} is bad"}, {}, {}, {}]
    all_bad, change = Numbers(50, frozenset(range(50))), Change(0, 0, 0, PAPERS)
    for batch in read_ahead(Batches(all_bad, ORDER, 5, skip_bad=True, change=change), **how):
        assert batch.images.shape[0] == len(batch.indices) == 0
        assert len(batch.unread) in (5, 3)
        with pytest.raises(
            ValueError, match=r"a whole batch cannot be read, the first as image \d"
        ):
            _expect_images(batch)


def test_bar_of_another_process_is_hidden() -> None:
    assert progress(3, "x", hidden=True).disable
    assert progress(3, "x").disable is not sys.stderr.isatty()


def test_workers_start_without_the_memory_of_steps() -> None:
    """Which a fork would have made slow, as its large pages are copied in small ones."""
    x = np.zeros((1, 64, 128, 128), np.float32)
    kconv.pointwise_conv(x, np.zeros((64, 64), np.float32))
    assert kconv.memory_stats()["free"] > 0
    reader = iter(read_ahead(Batches(Numbers(4), np.arange(4), 2), workers=1, framework="torch"))
    next(reader)
    assert kconv.memory_stats()["free"] == 0
    assert len(list(reader)) == 1


def test_bad_image_after_ten_thousand_good_ones() -> None:
    images, order = Numbers(10_240, frozenset([10_050])), np.arange(10_240)
    how = {"workers": 2, "framework": "torch"}
    seen = 0
    with pytest.raises(ValueError, match=r"^image 10050 is bad$"):  # noqa: PT012
        for batch in read_ahead(Batches(images, order, 64), **how):
            seen += len(batch.indices)
    assert seen == 10_050 // 64 * 64
    unread, read = {}, 0
    for batch in read_ahead(Batches(images, order, 64, skip_bad=True), **how):
        unread |= batch.unread
        read += len(batch.indices)
    assert (read, list(unread)) == (10_239, [10_050])
