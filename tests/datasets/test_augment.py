"""Augmentation against exact geometry, and its limits."""

from __future__ import annotations

import numpy as np
import pytest

from kconv.augment import FLIP_SHIFT, PAPERS, Recipe, augment, scale

STILL = Recipe(rotation=0, shift=0, shear=0, zoom=0, flip=False)


def images(n: int = 4, height: int = 9, width: int = 12, channels: int = 3) -> np.ndarray:
    shape = (n, height, width, channels)
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("shape", [(4, 9, 12, 3), (2, 1, 1, 1), (3, 1, 7, 2), (0, 8, 8, 3)])
def test_nothing_to_do_changes_nothing(shape: tuple[int, ...]) -> None:
    x = images(*shape)
    assert np.array_equal(augment(x, np.random.default_rng(0), STILL), x)
    assert augment(x, np.random.default_rng(0), PAPERS).shape == shape


def test_the_seed_decides() -> None:
    x = images()
    first, again, other = (augment(x, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_flip_mirrors_half_of_the_images() -> None:
    x = images(n=400)
    out = augment(x, np.random.default_rng(0), Recipe(rotation=0, shift=0, shear=0, zoom=0))
    mirrored = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(out, x, strict=True)])
    kept = np.array([np.array_equal(a, b) for a, b in zip(out, x, strict=True)])
    assert np.all(mirrored ^ kept)
    assert 0.4 < mirrored.mean() < 0.6


def test_rotation_by_right_angles() -> None:
    class Always:
        """A generator that always draws the upper end."""

        def uniform(self, low: float, high: float, size: tuple[int, ...]) -> np.ndarray:
            return np.full(size, high)

        def random(self, size: int) -> np.ndarray:
            return np.ones(size)

    x = images(height=7, width=7)
    for quarters in range(4):
        recipe = Recipe(rotation=90 * quarters, shift=0, shear=0, zoom=0, flip=False)
        out = augment(x, Always(), recipe)  # type: ignore[arg-type]
        turned = [np.rot90(x, k, axes=(1, 2)) for k in (quarters, -quarters)]
        assert any(np.array_equal(out, t) for t in turned)


def test_shifts_repeat_the_edge_and_stay_in_reach() -> None:
    ramp = np.broadcast_to(np.arange(0, 200, 2, dtype=np.uint8)[:, None], (300, 100, 40))[..., None]
    recipe = Recipe(rotation=0, shift=0.3, shear=0, zoom=0, flip=False)
    out = augment(np.ascontiguousarray(ramp), np.random.default_rng(0), recipe).astype(int)
    middle = out[:, 50, 20, 0] / 2  # the row that it came from
    assert np.all(np.abs(middle - 50) <= 30.5)
    assert middle.std() > 10
    assert out.min() == 0
    assert out.max() == 198


def test_flips_and_shifts_of_whole_pixels_blur_nothing() -> None:
    x = images(n=40, height=16, width=24)
    seen = set()
    for out, image in zip(augment(x, np.random.default_rng(0), FLIP_SHIFT), x, strict=True):
        padded = np.pad(image, ((2, 2), (3, 3), (0, 0)), mode="edge")
        found = [
            (flip, down, right)
            for flip in (1, -1)
            for down in range(5)
            for right in range(7)
            if np.array_equal(out, padded[down : down + 16, right : right + 24][:, ::flip])
        ]
        assert len(found) == 1
        seen |= set(found)
    assert len(seen) > 20


def test_zoom_stays_in_range() -> None:
    ramp = np.broadcast_to(np.arange(101, dtype=np.uint8)[:, None], (200, 101, 101))[..., None]
    recipe = Recipe(rotation=0, shift=0, shear=0, zoom=0.3, flip=False)
    out = augment(np.ascontiguousarray(ramp), np.random.default_rng(0), recipe).astype(int)
    slope = (out[:, 60, 50, 0] - out[:, 40, 50, 0]) / 20
    assert slope.min() >= 0.65
    assert slope.max() <= 1.35
    assert slope.std() > 0.1


def test_values_stay_between_their_neighbours() -> None:
    x = np.full((8, 16, 16, 3), 255, np.uint8)
    assert np.all(augment(x, np.random.default_rng(0)) == 255)


def test_scale_reaches_from_minus_two_to_below_two() -> None:
    out = scale(np.array([0, 64, 128, 255], np.uint8))
    assert out.dtype == np.float32
    assert out.tolist() == [-2, -1, 0, 255 / 64 - 2]
