from collections.abc import Sequence
from typing import Literal, TypedDict, TypeVar, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FusedProgram",
    "build_info",
    "deinterleave",
    "depthwise_conv",
    "depthwise_conv_grad_input",
    "depthwise_conv_grad_weight",
    "fma_peak",
    "get_num_threads",
    "interleave",
    "memory_stats",
    "pointwise_conv",
    "pointwise_conv_grad_bias",
    "pointwise_conv_grad_input",
    "pointwise_conv_grad_weight",
    "register_tensorflow_ops",
    "release_memory",
    "set_num_threads",
    "xla_handlers",
]

_Float = TypeVar("_Float", np.float32, np.float64)
_Layout = Literal["NCHW", "NHWC"]
_WeightLayout = Literal["OI", "IO"]
_Padding = Literal["same", "valid"] | int | tuple[tuple[int, int], tuple[int, int]]

class _MemoryStats(TypedDict):
    used: int
    free: int

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
def register_tensorflow_ops(library: str) -> list[str]: ...
def xla_handlers() -> dict[str, object]: ...
def memory_stats() -> _MemoryStats: ...
def release_memory() -> int: ...

@final
class FusedProgram:
    def __new__(cls, /, integers: Sequence[int]) -> FusedProgram: ...
    @property
    def parameters(self) -> int: ...
    @property
    def norm_channels(self) -> int: ...
    @property
    def workspace(self) -> int: ...
    def take_times(self) -> list[tuple[str, float, float, int, int]]: ...
    def forward(
        self,
        x: NDArray[_Float],
        parameters: NDArray[_Float],
        masks: NDArray[_Float] | None = None,
        statistics: NDArray[_Float] | None = None,
        layout: _Layout = "NCHW",
    ) -> tuple[NDArray[_Float], NDArray[_Float], NDArray[_Float]]: ...
    def infer(
        self,
        x: NDArray[_Float],
        parameters: NDArray[_Float] | list[NDArray[_Float]],
        statistics: NDArray[_Float] | list[NDArray[_Float]],
        layout: _Layout = "NCHW",
    ) -> NDArray[_Float]: ...
    def backward(
        self,
        grad_output: NDArray[_Float],
        parameters: NDArray[_Float],
        masks: NDArray[_Float] | None,
        statistics: NDArray[_Float],
        workspace: NDArray[_Float],
        frozen: bool = False,
        layout: _Layout = "NCHW",
    ) -> tuple[NDArray[_Float] | None, NDArray[_Float]]: ...
