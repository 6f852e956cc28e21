"""What is explained is what the extension says, for the arguments that the operations take."""

from __future__ import annotations

import numpy as np
import pytest

import kconv
from kconv import models
from kconv._explain import layers

CONV = ("pointwise_conv", (2, 24, 14, 14), 96)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight"])
def test_the_cheapest_that_applies_is_chosen(layout: str, direction: str) -> None:
    shapes = {"NCHW": (2, 96, 14, 14), "NHWC": (2, 14, 14, 96)}
    options = {"layout": layout, "direction": direction}
    found = [
        kconv.explain("pointwise_conv", shapes[layout], 24, groups=6, interleave=4, **options),
        kconv.explain("depthwise_conv", shapes[layout], kernel_size=5, stride=2, **options),
    ]
    if direction != "grad_weight":
        found.append(kconv.explain("interleave", shapes[layout], step=7, **options))
    for one in found:
        assert sum(candidate.chosen for candidate in one.candidates) == 1
        costs = {c.algorithm: c.cost for c in one.candidates if c.applies}
        assert None not in costs.values()
        assert costs[one.chosen] == min(costs.values())
        assert f"* {one.chosen}" in str(one)
        assert repr(one) == str(one)
        assert len(str(one).splitlines()) == 1 + len(one.candidates)
        assert one.as_dict()["candidates"][0]["algorithm"] == one.candidates[0].algorithm


def test_types_of_numbers() -> None:
    by_name = kconv.explain(*CONV, dtype="float64")
    assert str(kconv.explain(*CONV, dtype=np.float64)) == str(by_name)
    assert str(kconv.explain(*CONV, dtype=np.dtype(np.float64))) == str(by_name)
    assert "bfloat16" in str(kconv.explain(*CONV, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("conv", (1, 2, 3, 4)), {}, ValueError, "operation='conv', expected 'pointwise_conv'"),
        (("interleave", (1, 2, 3)), {"step": 2}, ValueError, "expected 4 axes"),
        (("interleave", (1, 2, 0, 3)), {"step": 2}, ValueError, "shape's H=0, expected at least 1"),
        (("interleave", (1, 2, 3.5, 3)), {"step": 2}, TypeError, "expected a whole number"),
        (("interleave", (1, 2, 3, 3)), {}, ValueError, "step=None: interleave needs it"),
        (CONV[:2], {}, ValueError, "out_channels=None: pointwise_conv needs it"),
        (CONV, {"groups": 5}, ValueError, "5"),
        (CONV, {"stride": 2}, ValueError, "stride=2: pointwise_conv has no such argument"),
        (CONV, {"layout": "CHWN"}, ValueError, "layout='CHWN', expected 'NCHW' or 'NHWC'"),
        (CONV, {"direction": "backward"}, ValueError, "direction='backward'"),
        (CONV, {"dtype": "float16"}, ValueError, "dtype='float16'"),
        (CONV, {"threads": 0}, ValueError, "threads=0"),
        (("depthwise_conv", (1, 2, 3, 3)), {"kernel_size": 4}, ValueError, "4"),
        (
            ("interleave", (1, 4, 3, 3)),
            {"step": 2, "direction": "grad_weight"},
            ValueError,
            "has no weights",
        ),
    ],
)
def test_bad_input(arguments, options, error, message) -> None:
    with pytest.raises(error, match=message):
        kconv.explain(*arguments, **options)


def test_each_layer_of_a_network_is_explained_once() -> None:
    graph = models.create("keffnet_b0", input_shape=(32, 32, 3), classes=10).graph()
    found = layers(graph, 4, "NHWC")
    texts = [str(kconv.explain(**arguments)) for _, arguments in found]
    assert len(set(texts)) == len(texts) > 60
    counted = sum(1 + int(name.split()[-2]) if " and " in name else 1 for name, _ in found)
    kinds = ("Conv", "DepthwiseConv", "Interleave")
    convolutions = [layer for layer in graph.layers if type(layer).__name__ in kinds]
    assert counted == len(convolutions) - 1  # the stem has another kernel
