"""Where arrays lie: the recycled memory of large results, and tensors in DLPack capsules."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

import kconv
from kconv import _kconv


@pytest.fixture(autouse=True)
def nothing_to_collect() -> None:
    """What other tests left must not be freed in the middle of one here."""
    gc.collect()


X = np.random.default_rng(0).normal(size=(2, 6, 200, 201)).astype(np.float32)  # 1.9 MB
W = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


def test_large_results_are_recycled() -> None:
    kconv.release_memory()
    used = kconv.memory_stats()["used"]
    y = kconv.pointwise_conv(X, W, groups=2)
    expected, address, row = y.copy(), y.ctypes.data, y[1, 2]
    assert kconv.memory_stats()["used"] >= used + y.nbytes
    del y
    gc.collect()
    assert kconv.memory_stats()["used"] > used  # the row needs it
    other = kconv.pointwise_conv(2 * X, W, groups=2)
    assert other.ctypes.data != address
    np.testing.assert_array_equal(row, expected[1, 2])
    del row
    gc.collect()
    again = kconv.pointwise_conv(X, W, groups=2)
    assert again.ctypes.data == address
    np.testing.assert_array_equal(again, expected)
    del other, again
    gc.collect()
    stats = kconv.memory_stats()
    assert stats["used"] == used
    assert kconv.release_memory() == stats["free"] > 0


def test_free_memory_is_bounded() -> None:
    kconv.release_memory()
    used = kconv.memory_stats()["used"]
    for size in range(300, 30, -30):
        kconv.interleave(np.zeros((1, 8, size, size)), 2)
    stats = kconv.memory_stats()
    assert stats["used"] == used
    assert 0 < stats["free"] <= 2 * (used + 8 * 8 * 300**2)
    kconv.release_memory()


@pytest.mark.parametrize("size", [(2, 6, 3, 5), (2, 6, 200, 201), (0, 6, 3, 5), (2, 6, 0, 5)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_capsules(size: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x = torch.randn(size).to(memory_format=memory_format)
    capsule = _kconv.pointwise_conv(
        to_dlpack(x), to_dlpack(torch.tensor(W)), groups=2, interleave=2
    )
    y = from_dlpack(capsule)
    assert x.numel() == 0 or y.is_contiguous(memory_format=memory_format)
    np.testing.assert_array_equal(y, kconv.pointwise_conv(x.numpy(), W, groups=2, interleave=2))
    with pytest.raises(TypeError, match="x is PyCapsule"):  # its tensor is y's now
        _kconv.interleave(capsule, 2)


def test_capsules_with_any_strides_and_none() -> None:
    x = torch.randn(4, 9, 6, 2).transpose(1, 2)[::2, :, 1:7]
    y = from_dlpack(_kconv.interleave(to_dlpack(x), 4))
    np.testing.assert_array_equal(y, kconv.interleave(x.numpy(), 4))
    capsule = np.arange(6.0).reshape(1, 6, 1, 1).__dlpack__()
    y = from_dlpack(_kconv.interleave(capsule, 2))
    assert y.flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_capsules_that_nobody_takes_are_freed() -> None:
    used = kconv.memory_stats()["used"]
    for _ in range(3):
        _kconv.interleave(to_dlpack(torch.zeros(2, 8, 200, 200)), 2)
    assert kconv.memory_stats()["used"] == used


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float16, "x is a tensor of float16, expected a NumPy array of float"),
        (torch.int32, "x is a tensor of DLPack type 0 with 32 bits, expected a NumPy array"),
    ],
)
def test_capsules_of_other_types(dtype: torch.dtype, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        _kconv.interleave(to_dlpack(torch.zeros(1, 2, 3, 4, dtype=dtype)), 2)
