"""Fused programs from outside: an error or a program that runs, never the end of the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kconv import _kconv
from kconv.models.wire import Code, Convolution, Function, Mean, Norm, Step, Term, Window

ALL = tuple(range(4))
SWISH = Function(3)
# A 3 x 3 convolution of 2 channels to 4, depthwise 3 x 3 of what a norm and swish make of it, the
# mean, and a pointwise convolution of the gated.
CODE = Code(
    "OI",
    True,
    1,
    ((2, 6, 5), (4, 6, 5), (4, 3, 3), (4, 1, 1), (3, 3, 3)),
    (Norm(4, 1e-3, True),),
    (
        Step(Convolution(Window((3, 3), before=(1, 1)), 1, True), (Term(0, (0, 1), 0),)),
        Step(
            Convolution(Window((3, 3), (2, 2), before=(1, 1)), 4, False),
            (Term(0, ALL, 1, norm=0, activation=SWISH),),
        ),
        Step(Mean(), (Term(0, ALL, 2),)),
        Step(Convolution(Window((1, 1)), 1, True), (Term(0, ALL, 2, gate=3, mask=0),)),
    ),
)
PROGRAM = list(CODE.encode())
STEPS = PROGRAM.index(4, 5 + 3 * len(CODE.values)) + 3  # after the one norm of 4 channels
FIRST = STEPS + 2  # the first convolution's window


def changed(index: int, *numbers: int) -> list[int]:
    """The program with other numbers from an index on."""
    return [*PROGRAM[:index], *numbers, *PROGRAM[index + len(numbers) :]]


def run(integers: list[int], count: int) -> bool:
    """Whether these are a program; if so it has run."""
    try:
        program = _kconv.FusedProgram(integers)
        if max(program.workspace, program.parameters) > 1 << 14:
            return False
    except ValueError:
        return False
    # Its sizes are not told: they stand where the values do.
    image, output = integers[5:8], integers[5 + 3 * (integers[4] - 1) :][:3]
    x, parameters = np.ones((count, *image), np.float32), np.ones(program.parameters, np.float32)
    given = np.ones((2, program.norm_channels), np.float32)
    masks = np.ones((integers[3], count), np.float32)
    for statistics in (None, given):
        y, used, workspace = program.forward(x, parameters, masks, statistics)
        assert y.shape == (count, *output)
        assert count or not np.isnan(used).any()
        grads = program.backward(y, parameters, masks, used, workspace, statistics is not None)
        assert (grads[0] is not None) == bool(integers[2] & 1)
        assert count or not grads[1].any()
    assert program.infer(x, parameters, given).shape == y.shape
    return True


def test_the_program_itself() -> None:
    for count in (0, 1, 3):
        assert run(PROGRAM, count)


def test_a_frozen_program_keeps_its_weights() -> None:
    rng = np.random.default_rng(1)
    program = _kconv.FusedProgram(PROGRAM)
    parameters = rng.normal(size=program.parameters).astype(np.float32)
    statistics = rng.uniform(1, 2, size=(2, program.norm_channels)).astype(np.float32)
    for pieces in ([parameters], [parameters[:5], parameters[5:]]):
        frozen = program.freeze(pieces, [statistics[0], statistics[1]])
        for count in (0, 1, 3):
            x = rng.normal(size=(count, 2, 6, 5)).astype(np.float32)
            expected = program.infer(x, parameters, statistics)
            np.testing.assert_array_equal(frozen.infer(x), expected)
            nhwc = frozen.infer(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), "NHWC")
            np.testing.assert_allclose(nhwc.transpose(0, 3, 1, 2), expected, rtol=1e-6)
    parameters += 1
    np.testing.assert_array_equal(frozen.infer(x), expected)
    assert not np.array_equal(program.infer(x, parameters, statistics), expected)
    assert sum(forward for _, forward, *_ in frozen.program.take_times()) > 0


@pytest.mark.parametrize("lengths", [(1, 0), (-1, 0), (0, 1), (0, -1)])
def test_a_program_is_frozen_with_all_that_it_needs(lengths: tuple[int, int]) -> None:
    program = _kconv.FusedProgram(PROGRAM)
    sizes = (program.parameters + lengths[0], 2 * program.norm_channels + lengths[1])
    with pytest.raises(ValueError, match=r"values, expected"):
        program.freeze(*(np.ones(size, np.float32) for size in sizes))


def test_a_frozen_program_refuses_other_images() -> None:
    program = _kconv.FusedProgram(PROGRAM)
    sizes = (program.parameters, 2 * program.norm_channels)
    frozen = program.freeze(*(np.ones(size, np.float32) for size in sizes))
    with pytest.raises(TypeError, match="float64"):
        frozen.infer(np.ones((1, 2, 6, 5)))  # type: ignore[arg-type]
    for shape in ((1, 6, 5, 2), (2, 6, 5)):
        with pytest.raises(ValueError, match="x has shape"):
            frozen.infer(np.ones(shape, np.float32))
    with pytest.raises(ValueError, match='layout="HWC"'):
        frozen.infer(np.ones((1, 2, 6, 5), np.float32), "HWC")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        program.freeze(np.ones(sizes[0]), np.ones(sizes[1]))  # type: ignore[arg-type]


def test_changed_programs() -> None:
    rng = np.random.default_rng(0)
    values = [-1, 0, 1, 2, 3, 4, 5, 7, 1 << 20, 1 << 40, (1 << 63) - 1, -(1 << 63)]
    ran = 0
    for _ in range(1500):
        integers = list(PROGRAM)
        for place in rng.integers(0, len(integers), rng.integers(1, 4)):
            others = [integers[place] + 1, integers[place] - 1, *values]
            integers[place] = int(rng.choice(np.clip(others, -(1 << 63), (1 << 63) - 1)))
        ran += run(
            integers[: rng.choice([len(integers)] * 9 + [rng.integers(len(integers))])], ran % 3
        )
    assert ran > 50


BAD = {
    "ends early": PROGRAM[:-1],
    "followed by 1 integers": [*PROGRAM, 0],
    "the program has format 1, expected 2": changed(0, 1),
    "the program has format 3, expected 2": changed(0, 3),
    "groups=0": changed(FIRST + 8, 0),
    r"of stride \[0, 1\]": changed(FIRST + 2, 0),
    "a 0x3 window": changed(FIRST, 0),
    "a value of 0 channels": changed(8, 0),
    "a step of kind 99": changed(STEPS, 99),
    "channels, expected at most": changed(5, *[1 << 20, 1, 1] * 5),
    "more memory for": changed(6, 1 << 20, 1 << 20, 1, 1 << 20, 1 << 20),
}


def raises(call: Callable[[list[int]], Any], *kinds: type[Exception]) -> None:
    for words, integers in BAD.items():
        with pytest.raises(kinds) as error:
            call(integers)
        told = str(error.value)
        assert "the program" in told or "groups=" in told, (words, told)
        assert "panicked" not in told


def test_bad_programs() -> None:
    for words, integers in BAD.items():
        if words != "more memory for":
            with pytest.raises(ValueError, match=words):
                _kconv.FusedProgram(integers)


def test_bad_programs_in_xla() -> None:
    jax = pytest.importorskip("jax")
    from kconv.jax._kernels import ffi_available

    if not ffi_available():
        pytest.skip("this jaxlib refuses the handlers")

    def call(integers: list[int]) -> Any:
        result = jax.ShapeDtypeStruct((1, 3, 3, 3), np.float32)
        run = jax.ffi.ffi_call("kconv_fused_infer", result)
        arrays = [np.ones(shape, np.float32) for shape in [(1, 2, 6, 5), (99,), (2, 4)]]
        return run(*arrays, program=np.array(integers, np.int64), layout="NCHW").block_until_ready()

    raises(call, RuntimeError, ValueError)


def test_bad_programs_in_tensorflow() -> None:
    tf = pytest.importorskip("tensorflow")
    from kconv.tensorflow._library import kernels

    def call(integers: list[int]) -> Any:
        arrays = [np.ones(shape, np.float32) for shape in [(1, 2, 6, 5), (99,), (1, 1), (2, 4)]]
        return kernels.kconv_fused_forward(*arrays, program=integers, layout="NCHW")

    raises(call, tf.errors.OpError)
