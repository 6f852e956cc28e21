"""The wire format of fused programs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kconv._kconv import FusedProgram
from kconv.models import create
from kconv.models.fusion import Segment, partition
from kconv.models.wire import (
    FORMAT,
    Code,
    Convolution,
    Copy,
    Function,
    MaxPool,
    MeanPool,
    Norm,
    Step,
    Term,
    Window,
    weight_layout,
    with_input_grad,
)

TERMS = (
    Term(0, (3, 1, 2, 0), 0, norm=0, norm_offset=0, mask=1),
    Term(1, (5, 7, 9), 1, activation=Function(9, (0.1, -2.5)), gate=2, gate_offset=-5),
)
CODE = Code(
    "IO",
    False,
    2,
    ((4, 6, 5), (10, 6, 5), (5, 1, 1), (4, 6, 5), (4, 5, 2), (4, 6, 5)),
    (Norm(4, 1e-5, False),),
    (
        Step(Convolution(Window((3, 1), (2, 1), (1, 2), (1, 0)), 2, True), TERMS[:1]),
        Step(MeanPool(Window((2, 2), (2, 2)), (1, 0)), (TERMS[0], TERMS[1])),
        Step(MeanPool(Window((2, 2), (1, 3))), (TERMS[0],)),
        Step(MaxPool(Window((2, 2), (1, 3), (1, 2), (0, 1))), (TERMS[0],)),
        Step(Copy(), TERMS),
    ),
)


def test_what_is_written_is_read() -> None:
    assert Code.decode(CODE.encode()) == CODE
    for model in ("keffnet_b0", "kmobilenet_v3_large"):
        graph = create(model, classes=3, input_shape=(32, 32, 3)).graph()
        segment = next(part for part in partition(graph) if isinstance(part, Segment))
        integers = segment.program((32, 32), "OI").integers
        assert Code.decode(integers).encode() == integers


def test_the_extension_reads_it() -> None:
    graph = create("keffnet_b0", classes=3, input_shape=(32, 32, 3)).graph()
    segment = next(part for part in partition(graph) if isinstance(part, Segment))
    program = segment.program((32, 32), "IO")
    code = Code.decode(program.integers)
    compiled = FusedProgram(program.integers)
    assert compiled.norm_channels == sum(norm.channels for norm in code.norms)
    assert len(compiled.take_times()) == len(code.steps)


def test_header() -> None:
    integers = CODE.encode()
    assert (integers[0], weight_layout(integers)) == (FORMAT, "IO")
    assert Code.decode(with_input_grad(integers, True)).input_grad
    with pytest.raises(ValueError, match=f"has format 1, expected {FORMAT}"):
        Code.decode((1, *integers[1:]))


def test_zeros_after() -> None:
    assert Window((3, 3), (2, 2), before=(1, 0)).after((5, 6), (3, 3)) == (1, 1)
    assert Window((2, 1), dilation=(3, 1)).after((9, 4), (6, 4)) == (0, 0)


def test_an_extension_of_another_version_is_one_error() -> None:
    code = """
import kconv._kconv as extension
class FusedProgram:
    FORMAT = 1
extension.FusedProgram = FusedProgram
import kconv.models.fusion
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert last == (
        f"ImportError: kconv's extension reads programs of format 1, expected {FORMAT}: it is of "
        "another version than the Python part; install kconv again"
    )
