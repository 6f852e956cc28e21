from typing import Literal, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "build_info",
    "deinterleave",
    "depthwise_conv",
    "depthwise_conv_grad_input",
    "depthwise_conv_grad_weight",
    "fma_peak",
    "get_num_threads",
    "interleave",
    "pointwise_conv",
    "pointwise_conv_grad_bias",
    "pointwise_conv_grad_input",
    "pointwise_conv_grad_weight",
    "set_num_threads",
    "xla_handlers",
]

_Float = TypeVar("_Float", np.float32, np.float64)
_Layout = Literal["NCHW", "NHWC"]
_WeightLayout = Literal["OI", "IO"]
_Padding = Literal["same", "valid"] | int | tuple[tuple[int, int], tuple[int, int]]

class _BuildInfo(TypedDict):
    version: str
    isa: str
    isas: list[str]
    threads: int

def pointwise_conv(
    x: NDArray[_Float],
    weight: NDArray[_Float],
    bias: NDArray[_Float] | None = None,
    *,
    groups: int = 1,
    interleave: int = 1,
    layout: _Layout = "NCHW",
    weight_layout: _WeightLayout = "OI",
    out: NDArray[_Float] | None = None,
) -> NDArray[_Float]: ...
def pointwise_conv_grad_input(
    grad_output: NDArray[_Float],
    weight: NDArray[_Float],
    *,
    groups: int = 1,
    interleave: int = 1,
    layout: _Layout = "NCHW",
    weight_layout: _WeightLayout = "OI",
    out: NDArray[_Float] | None = None,
) -> NDArray[_Float]: ...
def pointwise_conv_grad_weight(
    x: NDArray[_Float],
    grad_output: NDArray[_Float],
    *,
    groups: int = 1,
    interleave: int = 1,
    layout: _Layout = "NCHW",
    weight_layout: _WeightLayout = "OI",
    out: NDArray[_Float] | None = None,
) -> NDArray[_Float]: ...
def pointwise_conv_grad_bias(
    grad_output: NDArray[_Float], *, interleave: int = 1, layout: _Layout = "NCHW"
) -> NDArray[_Float]: ...
def interleave(
    x: NDArray[_Float], step: int, *, layout: _Layout = "NCHW", out: NDArray[_Float] | None = None
) -> NDArray[_Float]: ...
def deinterleave(
    x: NDArray[_Float], step: int, *, layout: _Layout = "NCHW", out: NDArray[_Float] | None = None
) -> NDArray[_Float]: ...
def depthwise_conv(
    x: NDArray[_Float],
    weight: NDArray[_Float],
    bias: NDArray[_Float] | None = None,
    *,
    stride: int = 1,
    padding: _Padding = "same",
    layout: _Layout = "NCHW",
    weight_layout: _WeightLayout = "OI",
    out: NDArray[_Float] | None = None,
) -> NDArray[_Float]: ...
def depthwise_conv_grad_input(
    grad_output: NDArray[_Float],
    weight: NDArray[_Float],
    input_size: tuple[int, int],
    *,
    stride: int = 1,
    padding: _Padding = "same",
    layout: _Layout = "NCHW",
    weight_layout: _WeightLayout = "OI",
    out: NDArray[_Float] | None = None,
) -> NDArray[_Float]: ...
def depthwise_conv_grad_weight(
    x: NDArray[_Float],
    grad_output: NDArray[_Float],
    kernel_size: int,
    *,
    stride: int = 1,
    padding: _Padding = "same",
    layout: _Layout = "NCHW",
    weight_layout: _WeightLayout = "OI",
    out: NDArray[_Float] | None = None,
) -> NDArray[_Float]: ...
def set_num_threads(threads: int) -> None: ...
def get_num_threads() -> int: ...
def build_info() -> _BuildInfo: ...
def fma_peak() -> float: ...
def xla_handlers() -> dict[str, object]: ...
