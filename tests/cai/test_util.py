"""Pictures of filters, and small helpers."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import kconv.cai as cai

RNG = np.random.default_rng(0)


def test_tiles() -> None:
    """Cells go down the picture first, as the original's "rows" stand upright."""
    image = RNG.random((2, 3, 5))
    tiled = cai.util.slice_3d_into_2d(image, 2, 3)
    assert (tiled.shape, tiled.dtype) == ((6, 6), np.float64)
    np.testing.assert_array_equal(tiled[2:4, :3], image[:, :, 1])
    np.testing.assert_array_equal(tiled[:2, 3:], image[:, :, 3])
    np.testing.assert_array_equal(tiled[4:, 3:], 0)
    scaled = cai.util.slice_3d_into_2d(image, 1, 5, ForceCellMax=True).reshape(5, 2, 3)
    np.testing.assert_allclose(scaled.min((1, 2)), 0)
    np.testing.assert_allclose(scaled.max((1, 2)), 1)
    assert not cai.util.slice_3d_into_2d(np.ones((2, 2, 3)), 1, 3, ForceCellMax=True).any()
    with pytest.raises(ValueError, match=r"expected \(H, W, C\)"):
        cai.util.slice_3d_into_2d(image[0], 1, 1)


def test_patterns_have_gaps() -> None:
    filters = RNG.normal(size=(3, 3, 3, 7))
    patterns = cai.util.show_neuronal_patterns(filters, 4, 2)
    assert patterns.shape == (7, 15, 3)
    np.testing.assert_array_equal(patterns[4:, 8:11], filters[..., 5])
    assert not patterns[3].any()
    assert not patterns[:, 3::4].any()
    with pytest.raises(ValueError, match="NumRows=0"):
        cai.util.slice_4d_into_3d(filters, 0, 1)
    with pytest.raises(ValueError, match=r"expected \(H, W, C, N\)"):
        cai.util.show_neuronal_patterns(filters[0], 1, 1)


@pytest.mark.parametrize(
    ("force", "axes"),
    [
        ({}, None),
        ({"ForceColMax": True}, 0),
        ({"ForceRowMax": True}, 1),
        ({"ForceCellMax": True}, 2),
    ],
)
def test_every_channel_of_every_filter(force, axes) -> None:
    kernel = RNG.normal(size=(2, 3, 4, 5))
    picture = cai.util.slice_4d_into_2d(kernel, **force)
    assert picture.shape == (5 * 2, 4 * 3)
    cells = picture.reshape(5, 2, 4, 3)
    if axes is None:
        np.testing.assert_array_equal(cells[1, :, 2], kernel[:, :, 2, 1])
        return
    over = {0: (0, 1, 3), 1: (1, 2, 3), 2: (1, 3)}[axes]
    np.testing.assert_allclose(cells.min(over), 0, atol=1e-12)
    np.testing.assert_allclose(cells.max(over), 1)


def test_small_helpers(tmp_path, capsys) -> None:
    util = cai.util
    for _ in range(2):
        util.create_folder_if_required(str(tmp_path / "a/b"))
    assert (tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        util.create_folder_if_required(tmp_path / "file")
    np.testing.assert_array_equal(util.relu(np.array([-1, 0, 2])), [0, 0, 2])
    np.testing.assert_array_equal(util.reverse_sort([1, 3, 2]), [3, 2, 1])
    predictions = np.array([0.1, 0.4, 0.2, 0.3])
    assert [util.get_class_position(k, predictions) for k in range(4)] == [3, 0, 2, 1]
    with pytest.raises(ValueError, match="pclass=4"):
        util.get_class_position(4, predictions)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Softmax()])
    model.compile(loss="categorical_crossentropy", metrics=["accuracy"])
    util.evaluate_model_print(model, np.eye(2) * 50, np.eye(2)[[0, 0]])
    loss, accuracy = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert (loss, accuracy) == (pytest.approx(8.06, abs=0.01), 0.5)  # of 1e-7, where Keras clips
    without = keras.Sequential([keras.Input((2,)), keras.layers.Softmax()])
    without.compile(loss="categorical_crossentropy")
    with pytest.raises(ValueError, match="compiled without metrics"):
        util.evaluate_model_print(without, np.eye(2), np.eye(2))
