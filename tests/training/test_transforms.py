"""Users' transforms, of each library's kind."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from kconv.training.transforms import changed_batch, changed_images

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), np.uint8)


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_torchvision_is_applied_and_repeatable() -> None:
    flipped = changed_images(v2.RandomHorizontalFlip(p=1), IMAGES, rng())
    np.testing.assert_array_equal(flipped, IMAGES[:, :, ::-1])
    chance = v2.Compose([v2.TrivialAugmentWide(), v2.RandomErasing(p=1)])
    first, again = (changed_images(chance, IMAGES, rng()) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first != IMAGES).any(axis=(1, 2, 3)).all()


def test_keras_and_functions() -> None:
    flipped = changed_images(keras.layers.RandomFlip("vertical"), IMAGES, rng())
    for image, before in zip(flipped, IMAGES, strict=True):
        assert (image == before).all() or (image == before[::-1]).all()
    np.testing.assert_array_equal(changed_images(lambda x: 255 - x, IMAGES, rng()), 255 - IMAGES)


def by_chance(image: np.ndarray) -> np.ndarray:
    """Draws from all that functions draw from."""
    torch.manual_seed(torch.initial_seed())  # in no way bound to what is drawn elsewhere
    drawn = random.randrange(64) + np.random.randint(64) + int(torch.randint(64, ()))  # noqa: NPY002
    return np.full_like(image, drawn)


@pytest.mark.parametrize(
    "transform",
    [
        by_chance,
        keras.Sequential([keras.layers.RandomFlip(), keras.layers.RandomContrast(0.9)]),
        keras.layers.RandAugment((0, 255)),
    ],
)
def test_chance_is_that_of_the_batch(transform: Any) -> None:
    """Also for several threads, and what others draw is as if there were no transform."""
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    untouched = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = changed_images(transform, IMAGES, rng())
    assert random.getstate() == untouched[0]
    np.testing.assert_array_equal(np.random.get_state()[1], untouched[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), untouched[2])
    other = changed_images(transform, IMAGES, np.random.default_rng(6))
    assert (other != first).any()
    with ThreadPoolExecutor(4) as pool:
        for again in pool.map(lambda _: changed_images(transform, IMAGES, rng()), range(8)):
            np.testing.assert_array_equal(again, first)


def test_albumentations_protocol() -> None:
    """Of a class that says it is theirs, as the package need not be installed."""

    def call(self: Any, image: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": np.full_like(image, self.seed % 256)}

    def set_random_seed(self: Any, seed: int) -> None:
        self.seed = seed

    kind = type("Compose", (), {"__call__": call, "set_random_seed": set_random_seed})
    kind.__module__ = "albumentations.core.composition"
    first, again = (changed_images(kind(), IMAGES, rng()) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_albumentations_is_applied_and_repeatable() -> None:
    library = pytest.importorskip("albumentations")
    flipped = changed_images(library.Compose([library.HorizontalFlip(p=1)]), IMAGES, rng())
    np.testing.assert_array_equal(flipped, IMAGES[:, :, ::-1])
    chance = library.Compose([library.HorizontalFlip(), library.GaussNoise(p=1)])
    first, again = (changed_images(chance, IMAGES, rng()) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first != IMAGES).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: image / 255, "gives float64, expected bytes"),
        (lambda image: image[:4], r"makes images of \(4, 6, 3\), expected \(8, 6, 3\)"),
        (lambda image: None, "gives NoneType"),
        (v2.ToDtype(torch.float32), "gives float32"),
        (v2.Resize(4), r"makes images of \("),
    ],
)
def test_transform_that_gives_something_else(transform: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        changed_images(transform, IMAGES, rng())


@pytest.mark.parametrize("kind", ["torchvision", "keras", "function"])
def test_mixtures_share_out_the_classes(kind: str) -> None:
    transforms: dict[str, Any] = {
        "torchvision": v2.MixUp(num_classes=4),
        "keras": keras.layers.MixUp(),
        "function": lambda images, targets: (images, (targets + targets[::-1]) / 2),
    }
    labels = np.array([0, 1, 3])
    targets = np.eye(4, dtype=np.float32)[labels]
    images = np.eye(3, dtype=np.float32)[:, :, None, None] * np.ones((1, 1, 2, 3), np.float32)
    found, shares = changed_batch(transforms[kind], images, targets, labels, 3)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    assert found.dtype == shares.dtype == np.float32
    if kind != "function":  # the images are mixed as the classes are
        np.testing.assert_allclose(found[:, :, 0, 0], shares[:, labels], atol=1e-5)
    again = changed_batch(transforms[kind], images, targets, labels, 3)
    np.testing.assert_array_equal(again[1], shares)
    with pytest.raises(ValueError, match="gives images"):
        changed_batch(lambda x, y: (x[:1], y), images, targets, labels, 3)
    with pytest.raises(TypeError, match="batches gives a ndarray, expected images and labels"):
        changed_batch(lambda x, y: x, images, targets, labels, 3)
