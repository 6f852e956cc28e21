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
    """Grouped pointwise (1x1) convolution, its output interleaved.

    Output channel ``o`` of group ``g`` is the sum of ``bias[o]`` and, over ``i``, ``weight[o, i]``
    times input channel ``i`` of group ``g``; then the output's channels are interleaved by
    ``interleave`` at no cost (section 2 of "Grouped Pointwise Convolutions Reduce Parameters in
    Convolutional Neural Networks", MENDEL 28(1), 2022).

    Args:
        x: (N, C_in, H, W), or (N, H, W, C_in) with ``layout="NHWC"``; float32, float64 or bfloat16
            (ml_dtypes'; sums are of float32, and rounded once). Used where it is when its memory is
            contiguous in either order of axes; the result's memory then has the same order. Arrays
            may also be DLPack capsules of such tensors on the CPU; the result is a capsule where
            ``x`` is one.
        weight: (C_out, C_in/groups[, 1, 1]), or ([1, 1,] C_in/groups, C_out) with
            ``weight_layout="IO"``; dtype of ``x``.
        bias: (C_out,) or None.
        groups: Number of groups; divides C_in and C_out.
        interleave: Step by which the output's channels are interleaved; 1 leaves them.
        layout: "NCHW" or "NHWC".
        weight_layout: "OI" (PyTorch's order) or "IO" (Keras's).
        out: Array for the result, or None for a new one.

    Returns:
        (N, C_out, H, W) or (N, H, W, C_out).

    Raises:
        ValueError: If shapes, groups, step or a layout's name do not fit.
        TypeError: If an array is not float32, float64 or bfloat16, or dtypes differ.

    Example:
        >>> x = np.ones((2, 6, 5, 5), np.float32)
        >>> weight = np.ones((4, 3), np.float32)
        >>> kconv.pointwise_conv(x, weight, groups=2, interleave=2).shape
        (2, 4, 5, 5)
    """

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
    """Gradient of :func:`pointwise_conv` by its input.

    Args:
        grad_output: (N, C_out, H, W) or (N, H, W, C_out): the gradient by the (interleaved) output.
        weight: As for :func:`pointwise_conv`.
        groups: As in the forward call.
        interleave: As in the forward call.
        layout: "NCHW" or "NHWC".
        weight_layout: "OI" or "IO".
        out: Array for the result, or None for a new one.

    Returns:
        (N, C_in, H, W) or (N, H, W, C_in).

    Raises:
        ValueError: If shapes, groups, step or a layout's name do not fit.
        TypeError: If an array is not float32, float64 or bfloat16, or dtypes differ.

    Example:
        >>> grad_output = np.ones((2, 4, 5, 5), np.float32)
        >>> weight = np.ones((4, 3), np.float32)
        >>> kconv.pointwise_conv_grad_input(grad_output, weight, groups=2).shape
        (2, 6, 5, 5)
    """

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
    """Gradient of :func:`pointwise_conv` by its weight.

    Args:
        x: As for :func:`pointwise_conv`.
        grad_output: (N, C_out, H, W) or (N, H, W, C_out): the gradient by the (interleaved) output.
        groups: As in the forward call.
        interleave: As in the forward call.
        layout: "NCHW" or "NHWC".
        weight_layout: "OI" or "IO".
        out: Array for the result, or None for a new one.

    Returns:
        (C_out, C_in/groups), or (C_in/groups, C_out) with ``weight_layout="IO"``. It does not
        depend on the number of threads.

    Raises:
        ValueError: If shapes, groups, step or a layout's name do not fit.
        TypeError: If an array is not float32, float64 or bfloat16, or dtypes differ.

    Example:
        >>> x, grad_output = np.ones((2, 6, 5, 5)), np.ones((2, 4, 5, 5))
        >>> kconv.pointwise_conv_grad_weight(x, grad_output, groups=2).shape
        (4, 3)
    """

def pointwise_conv_grad_bias(
    grad_output: NDArray[_Float], *, interleave: int = 1, layout: _Layout = "NCHW"
) -> NDArray[_Float]:
    """Gradient of :func:`pointwise_conv` (and :func:`depthwise_conv`) by its bias.

    Args:
        grad_output: (N, C_out, H, W) or (N, H, W, C_out): the gradient by the (interleaved) output.
        interleave: As in the forward call.
        layout: "NCHW" or "NHWC".

    Returns:
        (C_out,).

    Raises:
        ValueError: If the shape, the step or the layout's name does not fit.
        TypeError: If ``grad_output`` is not float32, float64 or bfloat16.

    Example:
        >>> kconv.pointwise_conv_grad_bias(np.ones((2, 4, 5, 5))).tolist()
        [50.0, 50.0, 50.0, 50.0]
    """

def interleave(
    x: NDArray[_Float], step: int, *, layout: _Layout = "NCHW", out: NDArray[_Float] | None = None
) -> NDArray[_Float]:
    """Interleaves channels: those ``s, s + step, ...`` for each ``s < step`` in turn.

    A permutation for every number of channels and step (section 2 of MENDEL 28(1), 2022).

    Args:
        x: (N, C, H, W) or (N, H, W, C); float32, float64 or bfloat16.
        step: At least 1; 1 leaves the channels where they are.
        layout: "NCHW" or "NHWC".
        out: Array for the result, or None for a new one.

    Returns:
        An array of the shape of ``x``.

    Raises:
        ValueError: If the shape, the step or the layout's name does not fit.
        TypeError: If ``x`` is not float32, float64 or bfloat16.

    Example:
        >>> x = np.arange(6.0).reshape(1, 6, 1, 1)
        >>> kconv.interleave(x, 3).ravel().tolist()
        [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    """

def deinterleave(
    x: NDArray[_Float], step: int, *, layout: _Layout = "NCHW", out: NDArray[_Float] | None = None
) -> NDArray[_Float]:
    """Undoes :func:`interleave` (and is its gradient).

    Args:
        x: (N, C, H, W) or (N, H, W, C); float32, float64 or bfloat16.
        step: At least 1.
        layout: "NCHW" or "NHWC".
        out: Array for the result, or None for a new one.

    Returns:
        An array of the shape of ``x``.

    Raises:
        ValueError: If the shape, the step or the layout's name does not fit.
        TypeError: If ``x`` is not float32, float64 or bfloat16.

    Example:
        >>> x = np.arange(7.0).reshape(1, 7, 1, 1)
        >>> kconv.deinterleave(kconv.interleave(x, 3), 3).ravel().tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    """

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
    """Depthwise convolution: each channel with a k x k kernel of its own.

    Args:
        x: (N, C, H, W), or (N, H, W, C) with ``layout="NHWC"``; float32, float64 or bfloat16.
        weight: (C, k, k) or (C, 1, k, k), or (k, k, C[, 1]) with ``weight_layout="IO"``; k is 3, 5
            or 7.
        bias: (C,) or None.
        stride: 1 or 2.
        padding: "same" (TensorFlow's: ceil(size / stride) outputs, an odd pixel of padding at the
            bottom and right), "valid" (none), an integer, or ((top, bottom), (left, right)); each
            less than k.
        layout: "NCHW" or "NHWC".
        weight_layout: "OI" or "IO".
        out: Array for the result, or None for a new one.

    Returns:
        (N, C, H', W') or (N, H', W', C).

    Raises:
        ValueError: If shapes, stride, padding or a layout's name do not fit.
        TypeError: If an array is not float32, float64 or bfloat16, or dtypes differ.

    Example:
        >>> x, weight = np.ones((2, 6, 8, 8), np.float32), np.ones((6, 3, 3), np.float32)
        >>> kconv.depthwise_conv(x, weight, stride=2).shape
        (2, 6, 4, 4)
    """

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
    """Gradient of :func:`depthwise_conv` by its input.

    Args:
        grad_output: (N, C, H', W') or (N, H', W', C).
        weight: As for :func:`depthwise_conv`.
        input_size: (H, W) of the forward call's input.
        stride: As in the forward call.
        padding: As in the forward call.
        layout: "NCHW" or "NHWC".
        weight_layout: "OI" or "IO".
        out: Array for the result, or None for a new one.

    Returns:
        (N, C, H, W) or (N, H, W, C).

    Raises:
        ValueError: If shapes, stride, padding or a layout's name do not fit.
        TypeError: If an array is not float32, float64 or bfloat16, or dtypes differ.

    Example:
        >>> grad_output, weight = np.ones((2, 6, 4, 4)), np.ones((6, 3, 3))
        >>> kconv.depthwise_conv_grad_input(grad_output, weight, (8, 8), stride=2).shape
        (2, 6, 8, 8)
    """

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
    """Gradient of :func:`depthwise_conv` by its weight.

    Args:
        x: As for :func:`depthwise_conv`.
        grad_output: (N, C, H', W') or (N, H', W', C).
        kernel_size: k of the forward call's weight: 3, 5 or 7.
        stride: As in the forward call.
        padding: As in the forward call.
        layout: "NCHW" or "NHWC".
        weight_layout: "OI" or "IO".
        out: Array for the result, or None for a new one.

    Returns:
        (C, k, k), or (k, k, C) with ``weight_layout="IO"``.

    Raises:
        ValueError: If shapes, stride, padding or a layout's name do not fit.
        TypeError: If an array is not float32, float64 or bfloat16, or dtypes differ.

    Example:
        >>> x, grad_output = np.ones((2, 6, 8, 8)), np.ones((2, 6, 4, 4))
        >>> kconv.depthwise_conv_grad_weight(x, grad_output, 3, stride=2).shape
        (6, 3, 3)
    """

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
    """Sets how many threads the kernels use.

    Until then it is what the environment variable ``KCONV_NUM_THREADS`` says; without that, as many
    as PyTorch uses (``torch.set_num_threads``, and one in a worker of a ``DataLoader``) where it is
    imported; else what ``OMP_NUM_THREADS`` says, or one thread for each CPU that the process may
    run on. Small work always stays on the calling thread.

    Args:
        threads: Number of threads, at least 1.

    Raises:
        ValueError: If ``threads`` is less than 1 or more than 1024.

    Example:
        >>> kconv.set_num_threads(2)
        >>> kconv.get_num_threads()
        2
    """

def get_num_threads() -> int:
    """Returns how many threads the kernels use.

    Example:
        >>> kconv.get_num_threads() >= 1
        True
    """

def available_cpus(root: str | PathLike[str] = ...) -> int:
    """Returns how many CPUs the process may run on, up to its container's quota, rounded up."""

def build_info() -> _BuildInfo:
    """Describes this build of kconv.

    Returns:
        A dictionary: ``version``, ``isa`` (the instruction set in use), ``isas`` (all that this
        machine has, any of which the environment variable ``KCONV_ISA`` forces) and ``threads``.

    Example:
        >>> info = kconv.build_info()
        >>> info["isa"] in info["isas"]
        True
    """

def fma_peak() -> float:
    """Measures how many float32 operations a second all threads can do on registers alone."""

def register_tensorflow_ops(library: str) -> list[str]:
    """Registers the operations with the TensorFlow that is loaded from a path."""

def xla_handlers() -> dict[str, object]:
    """The handlers by the names of the NumPy functions, for `jax.ffi.register_ffi_target`."""

def memory_stats() -> _MemoryStats:
    """Bytes of the large temporary memory that kconv recycles.

    Returns:
        A dictionary: ``used`` (held by running operations and by results that wait for their
        backward pass) and ``free`` (kept for later).

    Example:
        >>> sorted(kconv.memory_stats())
        ['free', 'used']
    """

def release_memory() -> int:
    """Returns the recycled memory that is free to the system.

    Returns:
        The number of bytes.

    Example:
        >>> kconv.release_memory() >= 0
        True
    """

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
