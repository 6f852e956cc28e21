"""The four faces of the kernels describe the same arguments in the same words."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest

FACES = ("kconv", "kconv.torch", "kconv.jax", "kconv.tensorflow")
FUNCTIONS = ("pointwise_conv", "depthwise_conv", "interleave", "deinterleave")
# Where a face differs in what it takes: PyTorch's tensors know their memory format, and may lack
# the batch; NumPy's permutations take DLPack capsules and name the types of numbers.
OWN = {("kconv.torch", "x"), ("kconv.torch", "weight"), ("kconv", "x")}


def documented(face: str, function: str) -> tuple[str, dict[str, str], list[str]]:
    """The summary, the arguments' first clauses, and the names of the signature's parameters."""
    module = importlib.import_module(face)
    called = getattr(module, function)
    text = inspect.getdoc(called)
    assert text is not None
    arguments: dict[str, str] = {}
    section = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    assert section is not None
    for line in section[1].splitlines():
        if started := re.match(r"    (\w+): (.*)", line):
            name = started[1]
            arguments[name] = started[2]
        else:
            arguments[name] += " " + line.strip()
    return text.partition("\n")[0], arguments, list(inspect.signature(called).parameters)


def clause(text: str) -> str:
    """What comes first, in the one spelling: faces may add their own after a semicolon."""
    return re.split(r"; |\. |\.$", text)[0].lower()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_arguments_read_alike(function: str) -> None:
    found = {face: documented(face, function) for face in FACES}
    names = {name for _, arguments, _ in found.values() for name in arguments}
    for name in names:
        clauses = {
            face: clause(arguments[name])
            for face, (_, arguments, _) in found.items()
            if name in arguments and (face, name) not in OWN
        }
        assert len(set(clauses.values())) <= 1, (name, clauses)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_argument_is_described(face: str, function: str) -> None:
    _, arguments, parameters = documented(face, function)
    assert list(arguments) == parameters


@pytest.mark.parametrize("function", FUNCTIONS)
def test_summaries_are_the_same(function: str) -> None:
    faces = FACES if function != "interleave" else FACES[1:]
    assert len({documented(face, function)[0] for face in faces}) == 1


@pytest.mark.parametrize("face", FACES)
def test_only_what_is_public_is_listed(face: str) -> None:
    module = importlib.import_module(face)
    assert set(module.__all__) <= set(dir(module))
    assert "annotations" not in dir(module)
    assert "warn_of_version" not in dir(module)


def test_stubs_have_the_extension_s_docstrings() -> None:
    tool = runpy.run_path(str(Path(__file__).parents[1] / "tools/stub_docstrings.py"))
    stubs = tool["STUBS"].read_text()
    assert tool["with_docstrings"](stubs) == stubs, "run python tools/stub_docstrings.py"
    assert tool["with_docstrings"](stubs.replace("divides C_in", "divides C_out")) == stubs
