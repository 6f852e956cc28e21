"""Padding beside TensorFlow's rule, and the order beside slices."""

import pytest

from kconv._geometry import interleave_order, same_padding


@pytest.mark.parametrize("channels", [1, 5, 12])
@pytest.mark.parametrize("step", [1, 2, 3, 7, 20])
def test_order(channels, step):
    rows = [list(range(channels))[start::step] for start in range(step)]
    assert interleave_order(channels, step) == [channel for row in rows for channel in row]


def test_a_step_below_1():
    with pytest.raises(ValueError, match="step=0, expected at least 1"):
        interleave_order(4, 0)


@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_is_the_least_for_each_pixel_of_the_output(kernel, stride):
    for size in range(1, 12):
        before, after = same_padding(size, kernel, stride)
        outputs = -(-size // stride)
        assert (size + before + after - kernel) // stride + 1 == outputs
        assert min(before, after) >= 0
        assert after - before in (0, 1)
        if before + after > 0:  # one less gives fewer outputs
            assert (size + before + after - 1 - kernel) // stride + 1 < outputs
