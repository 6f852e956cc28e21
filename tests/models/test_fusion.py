"""Which layers of a graph run as one operation."""

from __future__ import annotations

from kconv.models import graph
from kconv.models.fusion import Segment, partition

IMAGE = (8, 8, 4)


def conv(name, *inputs):
    common = {"name": name, "inputs": inputs, "shape": IMAGE}
    return graph.Conv(**common, filters=4, in_channels=4)


def add(name, *inputs):
    return graph.Add(name=name, inputs=inputs, shape=IMAGE)


def unknown(name, *inputs, shape=IMAGE):
    return graph.Layer(name=name, inputs=inputs, shape=shape)


def parts(*layers, output=None):
    """The names of the parts' layers, segments in tuples with their input first."""
    source = graph.Input(name="x", inputs=(), shape=IMAGE)
    whole = graph.Graph("test", (source, *layers), output or layers[-1].name)
    return [
        (part.input, *(layer.name for layer in part.layers))
        if isinstance(part, Segment)
        else part.name
        for part in partition(whole)
    ]


def test_a_residual_branch_is_inside():
    assert parts(conv("a", "x"), conv("b", "a"), add("c", "a", "b")) == [("x", "a", "b", "c")]


def test_a_tensor_for_later_ends_a_segment():
    """As in networks of the shape of a U: `a` is read again far behind."""
    layers = [conv("a", "x"), conv("b", "a"), conv("c", "b"), unknown("d", "c")]
    assert parts(*layers, unknown("e", "d", "a")) == [("x", "a"), ("a", "b", "c"), "d", "e"]


def test_branches_between_unknown_layers():
    """Beside a branch that cannot be fused, the others are."""
    layers = [conv("a", "x"), unknown("u", "a"), conv("b", "a"), conv("c", "b"), conv("v", "u")]
    found = parts(*layers, add("end", "c", "v"))
    assert found == [("x", "a"), "u", ("a", "b", "c"), ("u", "v"), "end"]


def test_an_output_is_never_inside():
    layers = [conv("a", "x"), conv("b", "a")]
    both = graph.Layer(name="", inputs=("a", "b"), shape=())
    assert parts(*layers, both, output="a") == [("x", "a"), ("a", "b"), ""]
    assert parts(*layers, output="a") == [("x", "a"), ("a", "b")]


def test_a_segment_reads_an_image():
    """Not the vector before it."""
    vector = unknown("vector", "x", shape=(4,))
    pixel = graph.Reshape(name="pixel", inputs=("vector",), shape=(1, 1, 4))
    assert parts(vector, pixel, conv("a", "pixel")) == ["vector", "pixel", ("pixel", "a")]


def test_a_padding_goes_with_its_convolution():
    pad = graph.ZeroPad(name="pad", inputs=("a",), shape=(10, 10, 4), padding=((1, 1), (1, 1)))
    valid = {"name": "b", "inputs": ("pad",), "shape": IMAGE, "padding": "valid"}
    wide = graph.Conv(**valid, filters=4, in_channels=4, kernel_size=(3, 3))
    assert parts(conv("a", "x"), pad, wide) == [("x", "a", "pad", "b")]
    assert parts(conv("a", "x"), pad, unknown("u", "pad")) == [("x", "a"), "pad", "u"]


def test_without_a_convolution_nothing_is_fused():
    norm = graph.BatchNorm(name="norm", inputs=("x",), shape=IMAGE)
    assert parts(norm, add("sum", "norm", "x")) == ["norm", "sum"]
