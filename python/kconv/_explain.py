"""Which algorithm computes an operation, and why."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from kconv import _kconv
from kconv.models import graph

__all__ = ["DIRECTIONS", "DTYPES", "LAYOUTS", "Candidate", "Explanation", "explain", "layers"]

DIRECTIONS = ("forward", "grad_input", "grad_weight")
LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "float64", "bfloat16")


@dataclass(frozen=True)
class Candidate:
    """An algorithm that may compute an operation.

    Attributes:
        algorithm: its name in ``docs/ALGORITHMS.md``.
        applies: whether it can compute this one at all.
        cost: what it is expected to cost, in multiply-adds of vectors; None where it does not
            apply.
        chosen: whether it is the one that runs.
        detail: where its kernel stands, and the like.
    """

    algorithm: str
    applies: bool
    cost: float | None
    chosen: bool
    detail: str


@dataclass(frozen=True)
class Explanation:
    """The candidates for an operation; printed, a table of them.

    Attributes:
        operation: "pointwise_conv", "depthwise_conv" or "interleave".
        direction: "forward", "grad_input" or "grad_weight".
        problem: the geometry and the other arguments, as one line.
        candidates: in the order in which the first of equal costs is taken.
    """

    operation: str
    direction: str
    problem: str
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> str:
        """The name of the algorithm that runs."""
        return next(c.algorithm for c in self.candidates if c.chosen)

    def as_dict(self) -> dict[str, Any]:
        """The same as dictionaries and lists, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        width = max(len(c.algorithm) for c in self.candidates)
        lines = [f"{self.operation} {self.direction}: {self.problem}"]
        for c in self.candidates:
            cost = f"{c.cost:14,.1f}" if c.applies and c.cost is not None else f"{'-':>14}"
            mark = "*" if c.chosen else " "
            lines.append(f"{mark} {c.algorithm:{width}} {cost}  {c.detail}".rstrip())
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    operation: str,
    shape: Sequence[int],
    out_channels: int | None = None,
    *,
    direction: str = "forward",
    groups: int = 1,
    interleave: int = 1,
    step: int | None = None,
    kernel_size: int | None = None,
    stride: int = 1,
    layout: str = "NCHW",
    dtype: Any = "float32",
    threads: int | None = None,
) -> Explanation:
    """Which algorithms may compute an operation, what each is expected to cost, and the choice.

    The names are those of the operations' own arguments. Nothing is computed, and no memory of the
    images' size is needed.

    Example:
        >>> import kconv
        >>> found = kconv.explain(
        ...     "pointwise_conv", (32, 28, 28, 96), 24, groups=6, layout="NHWC",
        ...     direction="grad_weight",
        ... )
        >>> found.chosen in {candidate.algorithm for candidate in found.candidates}
        True

    Args:
        operation: "pointwise_conv", "depthwise_conv" or "interleave".
        shape: of the input's images: (N, C, H, W), or (N, H, W, C) with ``layout="NHWC"``.
        out_channels: C_out of a pointwise convolution.
        direction: "forward", "grad_input" or "grad_weight"; of an interleave "forward", and
            "grad_input", which is its inverse.
        groups: number of groups of a pointwise convolution; divides C_in and C_out.
        interleave: step by which a pointwise convolution's output is interleaved.
        step: that of an interleave.
        kernel_size: k of a depthwise convolution; 3, 5 or 7, padded to keep its size at stride 1.
        stride: of a depthwise convolution; 1 or 2.
        layout: "NCHW" or "NHWC".
        dtype: "float32", "float64" or "bfloat16", or NumPy's type of that name.
        threads: how many; by default as many as kconv uses.

    Raises:
        ValueError: If a name is unknown, the sizes do not fit, or an argument is missing or is
            none of the operation's.
        TypeError: If a size is not a whole number.
    """
    _check("operation", operation, tuple(_OWN))
    _check("direction", direction, DIRECTIONS)
    _check("layout", layout, LAYOUTS)
    if len(shape) != 4:
        raise ValueError(f"shape={tuple(shape)!r}, expected 4 axes, as in {layout}")
    if operation == "interleave" and direction == "grad_weight":
        raise ValueError("direction='grad_weight': an interleave has no weights")
    sizes = {axis: _whole(f"shape's {axis}", n) for axis, n in zip(layout, shape, strict=True)}
    given = _own_arguments(
        operation,
        out_channels=out_channels,
        groups=groups,
        interleave=interleave,
        step=step,
        kernel_size=kernel_size,
        stride=stride,
    )
    problem = _Problem(
        *(operation, direction, layout, _dtype_name(dtype)),
        *(sizes["N"], sizes["H"], sizes["W"], sizes["C"]),
        out_channels=given.get("out_channels", sizes["C"]),
        groups=given.get("groups", 1),
        interleave=given.get("interleave", given.get("step", 1)),
        kernel=given.get("kernel_size", 1),
        stride=given.get("stride", 1),
        threads=_kconv.get_num_threads() if threads is None else _whole("threads", threads),
    )
    native: Any = _kconv.explain  # whose types are those of the names that were checked
    candidates = tuple(Candidate(**found) for found in native(*problem))
    return Explanation(operation, direction, str(problem), candidates)


_OWN: dict[str, dict[str, int | None]] = {
    "pointwise_conv": {"out_channels": None, "groups": 1, "interleave": 1},
    "depthwise_conv": {"kernel_size": None, "stride": 1},
    "interleave": {"step": None},
}
"""Each operation's own arguments with their defaults, None for those that have to be given."""


def _own_arguments(operation: str, **given: int | None) -> dict[str, int]:
    """The operation's own arguments; raises for one that is missing or another's."""
    own = _OWN[operation]
    for name, value in given.items():
        if name in own and value is None:
            raise ValueError(f"{name}=None: {operation} needs it")
        if name not in own and value not in (None, 1):
            raise ValueError(f"{name}={value!r}: {operation} has no such argument")
    return {name: _whole(name, given[name]) for name in own}


class _Problem(NamedTuple):
    """What the extension is told, in its order."""

    operation: str
    direction: str
    layout: str
    dtype: str
    images: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    groups: int
    interleave: int
    kernel: int
    stride: int
    threads: int

    def __str__(self) -> str:
        size = f"{self.images} x {self.height} x {self.width}"
        parts = {
            "pointwise_conv": f"{self.in_channels}>{self.out_channels}/{self.groups}"
            + (f" by {self.interleave}" if self.interleave > 1 else ""),
            "depthwise_conv": f"{self.in_channels} {self.kernel}x{self.kernel}/{self.stride}",
            "interleave": f"{self.in_channels} by {self.interleave}",
        }
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{parts[self.operation]}, {size}, {self.layout}, {self.dtype}, {threads}"


def layers(network: graph.Graph, images: int, layout: str) -> list[tuple[str, dict[str, Any]]]:
    """The arguments of :func:`explain` for each distinct layer of a network that kconv computes.

    Example:
        >>> from kconv import models
        >>> spec = models.create("keffnet_b0", input_shape=(32, 32, 3), classes=10)
        >>> name, arguments = layers(spec.graph(), 8, "NHWC")[0]
        >>> name, arguments["operation"], arguments["shape"]
        ('k_block1a__0dwconv', 'depthwise_conv', (8, 16, 16, 32))

    Args:
        network: with images of a known size.
        images: how many at a time.
        layout: "NCHW" or "NHWC".

    Returns:
        Layers' names, those of the same problem as one with the number of the others, and the
        arguments.

    Raises:
        ValueError: if the images' size is unknown.
    """
    found: dict[tuple[tuple[str, Any], ...], str] = {}
    counts: Counter[tuple[tuple[str, Any], ...]] = Counter()
    for layer in network.layers:
        arguments = _arguments(layer)
        if arguments is None:
            continue
        height, width, channels = network[layer.inputs[0]].shape
        if height is None or width is None:
            raise ValueError(f"layer {layer.name!r}: the images' size is unknown")
        sizes = {"N": images, "H": height, "W": width, "C": channels}
        arguments = {**arguments, "shape": tuple(sizes[axis] for axis in layout), "layout": layout}
        key = tuple(arguments.items())
        found.setdefault(key, layer.name)
        counts[key] += 1
    others = {key: f" and {n - 1} more" if n > 1 else "" for key, n in counts.items()}
    return [(name + others[key], dict(key)) for key, name in found.items()]


def _arguments(layer: graph.Layer) -> dict[str, Any] | None:
    """What :func:`explain` is told of a layer but for its images."""
    match layer:
        case graph.Conv(is_pointwise=True):
            return {
                "operation": "pointwise_conv",
                "out_channels": layer.filters,
                "groups": layer.groups,
                "interleave": layer.interleave,
            }
        case graph.DepthwiseConv(depth_multiplier=1, kernel_size=3 | 5 | 7, strides=1 | 2):
            return {
                "operation": "depthwise_conv",
                "kernel_size": layer.kernel_size,
                "stride": layer.strides,
            }
        case graph.Interleave():
            return {"operation": "interleave", "step": layer.step}
    return None


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}, expected {' or '.join(map(repr, known))}")


def _whole(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r}, expected a whole number") from None
    if number < 1:
        raise ValueError(f"{name}={number}, expected at least 1")
    return number


def _dtype_name(dtype: Any) -> str:
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None)
    if name is None:
        name = getattr(dtype, "__name__", str(dtype))
    _check("dtype", str(name), DTYPES)
    return str(name)
