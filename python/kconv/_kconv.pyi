from collections.abc import Sequence
from os import PathLike
from typing import Final, Literal, TypedDict, TypeVar, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FrozenProgram",
    "FusedProgram",
    "available_cpus",
    "build_info",
    "deinterleave",
    "depthwise_conv",
    "depthwise_conv_grad_input",
    "depthwise_conv_grad_weight",
    "explain",
    "fma_peak",
    "force_algorithm",
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

# ml_dtypes' bfloat16 is np.generic for type checkers.
_Float = TypeVar("_Float", np.float32, np.float64, np.generic)
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
) -> NDArray[_Float]:
    """Grouped pointwise (1x1) convolution, its output interleaved."""

def pointwise_conv_grad_input(
    grad_output: NDArray[_Float],
    weight: NDArray[_Float],
    *,
    groups: int = 1,
    interleave: int = 1,
    layout: _Layout = "NCHW",
    weight_layout: _WeightLayout = "OI",
    out: NDArray[_Float] | None = None,
) -> NDArray[_Float]:
    """Gradient of :func:`pointwise_conv` by its input."""

def pointwise_conv_grad_weight(
    x: NDArray[_Float],
    grad_output: NDArray[_Float],
    *,
    groups: int = 1,
    interleave: int = 1,
    layout: _Layout = "NCHW",
    weight_layout: _WeightLayout = "OI",
    out: NDArray[_Float] | None = None,
) -> NDArray[_Float]:
    """Gradient of :func:`pointwise_conv` by its weight."""

def pointwise_conv_grad_bias(
    grad_output: NDArray[_Float], *, interleave: int = 1, layout: _Layout = "NCHW"
) -> NDArray[_Float]:
    """Gradient of :func:`pointwise_conv` (and :func:`depthwise_conv`) by its bias."""

def interleave(
    x: NDArray[_Float], step: int, *, layout: _Layout = "NCHW", out: NDArray[_Float] | None = None
) -> NDArray[_Float]:
    """Interleaves channels: those ``s, s + step, ...`` for each ``s < step`` in turn."""

def deinterleave(
    x: NDArray[_Float], step: int, *, layout: _Layout = "NCHW", out: NDArray[_Float] | None = None
) -> NDArray[_Float]:
    """Undoes :func:`interleave` (and is its gradient)."""

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
) -> NDArray[_Float]:
    """Depthwise convolution: each channel with a k x k kernel of its own."""

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
) -> NDArray[_Float]:
    """Gradient of :func:`depthwise_conv` by its input."""

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
) -> NDArray[_Float]:
    """Gradient of :func:`depthwise_conv` by its weight."""

class _Candidate(TypedDict):
    algorithm: str
    applies: bool
    cost: float | None
    chosen: bool
    detail: str

def explain(
    operation: Literal["pointwise_conv", "depthwise_conv", "interleave"],
    direction: Literal["forward", "grad_input", "grad_weight"],
    layout: _Layout,
    dtype: Literal["float32", "float64", "bfloat16"],
    images: int,
    height: int,
    width: int,
    in_channels: int,
    out_channels: int,
    groups: int = 1,
    interleave: int = 1,
    kernel: int | None = None,
    stride: int = 1,
    threads: int | None = None,
) -> list[_Candidate]:
    """Lists the algorithms for a call, what each is predicted to cost, and which is chosen."""

def force_algorithm(name: str | None) -> str | None:
    """Makes every call of the process take one algorithm, for tests and measurements."""

def set_num_threads(threads: int) -> None:
    """Sets how many threads the kernels use."""

def get_num_threads() -> int:
    """Returns how many threads the kernels use."""

def available_cpus(root: str | PathLike[str] = ...) -> int:
    """Returns how many CPUs the process may run on, up to its container's quota, rounded up."""

def build_info() -> _BuildInfo:
    """Describes this build of kconv."""

def fma_peak() -> float:
    """Measures how many float32 operations a second all threads can do on registers alone."""

def register_tensorflow_ops(library: str) -> list[str]:
    """Registers the operations with the TensorFlow that is loaded from a path."""

def xla_handlers() -> dict[str, object]:
    """The handlers by the names of the NumPy functions, for `jax.ffi.register_ffi_target`."""

def memory_stats() -> _MemoryStats:
    """Bytes of the large temporary memory that kconv recycles."""

def release_memory() -> int:
    """Returns the recycled memory that is free to the system."""

@final
class FusedProgram:
    """A chain of convolutions, batch norms, activations and sums that runs as one operation."""

    FORMAT: Final = 2
    def __new__(cls, /, integers: Sequence[int]) -> FusedProgram: ...
    @property
    def parameters(self) -> int:
        """The number of parameters."""
    @property
    def norm_channels(self) -> int:
        """The number of channels of all batch norms."""
    @property
    def workspace(self) -> int:
        """Values that :meth:`forward` keeps for :meth:`backward`, an image."""
    def take_times(self) -> list[tuple[str, float, float, int, int]]:
        """What each step does and how long it has taken since the last call."""
    def forward(
        self,
        x: NDArray[_Float],
        parameters: NDArray[_Float],
        masks: NDArray[_Float] | None = None,
        statistics: NDArray[_Float] | None = None,
        layout: _Layout = "NCHW",
    ) -> tuple[NDArray[_Float], NDArray[_Float], NDArray[_Float]]:
        """Forward in training."""
    def infer(
        self,
        x: NDArray[_Float],
        parameters: NDArray[_Float] | list[NDArray[_Float]],
        statistics: NDArray[_Float] | list[NDArray[_Float]],
        layout: _Layout = "NCHW",
    ) -> NDArray[_Float]:
        """Forward in inference: the output, with the statistics that are given."""
    def freeze(
        self,
        parameters: NDArray[np.float32] | list[NDArray[np.float32]],
        statistics: NDArray[np.float32] | list[NDArray[np.float32]],
    ) -> FrozenProgram:
        """Packs parameters and statistics for inference, once for all calls."""
    def backward(
        self,
        grad_output: NDArray[_Float],
        parameters: NDArray[_Float],
        masks: NDArray[_Float] | None,
        statistics: NDArray[_Float],
        workspace: NDArray[_Float],
        frozen: bool = False,
        layout: _Layout = "NCHW",
    ) -> tuple[NDArray[_Float] | None, NDArray[_Float]]:
        """The gradients by the input (None if the program wants none) and by the parameters."""

@final
class FrozenProgram:
    """A program with weights that stay what they are: nothing is packed or compared at a call."""

    @property
    def program(self) -> FusedProgram:
        """The program."""
    def infer(self, x: NDArray[np.float32], layout: _Layout = "NCHW") -> NDArray[np.float32]:
        """Forward in inference."""
