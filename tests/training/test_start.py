"""What a run starts from: the caller's data, and what each image counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from kconv import datasets
from kconv.training import Config, _start
from kconv.training.ranks import Ranks

PAIRS = {
    part: [(np.full((8, 8), n, np.uint8), n % 2) for n in range(9)] for part in ("train", "test")
}
STREAMED = datasets.from_objects(PAIRS, image_size=6, interpolation="nearest")
ARRAYS = dataclasses.replace(
    STREAMED, x_train=STREAMED.x_train[np.arange(9)], x_test=STREAMED.x_test[np.arange(9)]
)


def load(data: Any, **options: Any) -> datasets.Dataset:
    return _start.load_data(Config(**options), data, Ranks(), print)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (PAIRS, {"train_images": 4}, "train_images=4 is of no use beside data="),
        (ARRAYS, {"test_images": 4}, "test_images=4 is of no use beside data="),
        (ARRAYS, {"data_dir": "x"}, "data_dir='x' is of no use beside data="),
        (ARRAYS, {"dataset": "cifar10"}, "dataset='cifar10' is of no use beside data="),
        (
            dataclasses.replace(STREAMED, x_train=datasets.from_objects(PAIRS).x_train),
            {"interpolation": "nearest"},
            "interpolation='nearest': the data's images are resized by 'bilinear'",
        ),
        (ARRAYS, {"image_size": 8}, "image_size=8: the data's images are 6x6x1"),
        (ARRAYS, {"stream": True}, "stream=True: the data's images are arrays in memory"),
        (STREAMED, {"stream": False}, "stream=False: the data's images are read as"),
        (PAIRS, {"stream": False}, "stream=False: the data's images are read as"),
    ],
)
def test_option_without_effect_on_given_data_is_refused(
    data: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(data, **options)


def test_pytorch_loads_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, expected in (("torch", "torch"), ("jax", "keras")):
        monkeypatch.setattr("keras.backend.backend", lambda backend=backend: backend)
        assert _start.loads(Config(framework="keras")) == expected
    assert _start.loads(Config(framework="torch")) == "torch"


def test_given_data_are_as_told() -> None:
    assert load(ARRAYS, image_size=6, stream=False) is ARRAYS
    assert load(STREAMED, stream=True) is STREAMED
    assert load(PAIRS, image_size=5, stream=True).image_shape == (5, 5, 1)
    nearest: Any = load(PAIRS, image_size=5, interpolation="nearest").x_train
    assert nearest.interpolation == "nearest"


def test_processes_see_that_their_data_differ() -> None:
    same = _start.described(load(PAIRS, image_size=6))
    assert same == _start.described(ARRAYS)
    y = 1 - ARRAYS.y_train
    for other in (
        {"y_train": y},
        {"class_names": ("a", "b")},
        {"y_val": y, "x_val": ARRAYS.x_test},
    ):
        assert _start.described(dataclasses.replace(ARRAYS, **other)) != same


def test_weights_are_those_of_each_class_that_is_mixed() -> None:
    """A mixture's loss is that of the images it is of, as MixUp has it, with their weights."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((4, 3)).astype(np.float32))
    first, second, share = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 0, 1]), 0.3
    weights = torch.tensor([1.0, 2.5, 0.0])

    def loss(labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        losses = functional.cross_entropy(
            logits, labels, reduction="none", label_smoothing=smoothing
        )
        return losses * weights[labels]

    mixed = (
        share * functional.one_hot(first, 3) + (1 - share) * functional.one_hot(second, 3)
    ).numpy()
    loud = _start.class_weights(Config(class_weights=(1, 2.5, 0)), np.arange(3), 3)
    for smoothing in (0.0, 0.2):
        found = _start.targets_of(mixed.astype(np.float32), loud, smoothing, None, 0.5)
        ours = functional.cross_entropy(logits, torch.from_numpy(found), reduction="none")
        expected = share * loss(first, smoothing) + (1 - share) * loss(second, smoothing)
        torch.testing.assert_close(ours, expected)
    # What counts nothing still tells its class.
    one = _start.targets_of(np.eye(3, dtype=np.float32), loud, 0.1, None, 0.5)
    assert one.argmax(axis=1).tolist() == [0, 1, 2]


def test_teacher_has_its_share_of_what_an_image_counts() -> None:
    truth = np.array([[1, 0], [0, 1]], np.float32)
    taught = np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)
    weights = np.array([2, 4], np.float32)
    found = _start.targets_of(truth, weights, 0.0, taught, 0.5)
    np.testing.assert_allclose(found, [[1.25, 0.75], [1, 3]])
    np.testing.assert_allclose(_start.targets_of(truth, None, 0.0, taught, 1.0), taught)
