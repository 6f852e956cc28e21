"""A program of :mod:`kconv.models.fusion` in a framework's own operations, step by step.

What the native operation does not give, these have: derivatives of every order, forward mode,
batching. The fused operations' own derivatives come from here where gradients of gradients are
wanted.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kconv.models.activations import ACTIVATIONS
from kconv.models.wire import (
    IDENTITY,
    Code,
    Convolution,
    MaxPool,
    Mean,
    MeanPool,
    Step,
    Term,
    Window,
)

__all__ = ["interpret"]

Tensor = Any


_ACTIVATIONS = {row.code: row for row in ACTIVATIONS.values()}


def interpret(
    ops: Any,
    program: tuple[int, ...],
    layout: str,
    x: Tensor,
    parameters: Tensor,
    masks: Tensor | None,
    statistics: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Runs a program of weight layout "IO".

    Args:
        ops: ``keras.ops``.
        program: the integers of a :class:`kconv.models.fusion.Program`.
        layout: "NCHW" or "NHWC".
        x: (N, C, H, W) or (N, H, W, C).
        parameters: all of them in a row.
        masks: (masks, N) factors of images, or None for none.
        statistics: (2, channels of all norms) means and variances to normalise with, or None for
            the batch's own.

    Returns:
        The output, like ``x``, and the statistics that were used, variances biased.
    """
    return _Run(ops, program, parameters, masks, statistics).all(layout, x)


class _Run:
    def __init__(
        self,
        ops: Any,
        program: tuple[int, ...],
        parameters: Tensor,
        masks: Tensor | None,
        statistics: Tensor | None,
    ) -> None:
        self.ops, self.code = ops, Code.decode(program)
        assert self.code.weight_layout == "IO", "weights must come as inputs x outputs"
        self.parameters, self.masks, self.statistics = parameters, masks, statistics
        self.next_parameter = 0
        self.values: list[Tensor] = []
        starts = [0]
        for norm in self.code.norms:
            starts.append(starts[-1] + norm.channels)
        self.norm_starts = starts
        # Means and variances of single channels of the norms, by their places among all.
        self.used: dict[int, tuple[Tensor, Tensor]] = {}
        self.moments: dict[int, tuple[Tensor, Tensor]] = {}

    def all(self, layout: str, x: Tensor) -> tuple[Tensor, Tensor]:
        ops = self.ops
        # Norms' parameters follow those of all convolutions.
        weights = [self._weights(number) for number in range(len(self.code.steps))]
        self.affine = [self._affine(norm.channels, norm.scale) for norm in self.code.norms]
        self.values.append(ops.transpose(x, (0, 2, 3, 1)) if layout == "NCHW" else x)
        sizes = self.code.values[1:]
        for step, own, size in zip(self.code.steps, weights, sizes, strict=True):
            source = self._source(step)
            match step.kind:
                case Convolution():
                    source = self._conv(step, step.kind, source, *own)
                case Mean():
                    source = ops.mean(source, axis=(1, 2), keepdims=True)
                case MeanPool():
                    source = self._mean_pool(step.kind, source)
                case MaxPool():
                    source = self._max_pool(step.kind.window, source)
            # TensorFlow's compiled operations forget shapes.
            self.values.append(ops.reshape(source, (-1, *size[1:], size[0])))
        y = self.values[-1]
        return ops.transpose(y, (0, 3, 1, 2)) if layout == "NCHW" else y, self._statistics()

    def _take(self, *shape: int) -> Tensor:
        """The next parameters."""
        start = self.next_parameter
        for size in (count := [1, *shape]):
            count[0] *= size
        self.next_parameter += count[0]
        return self.ops.reshape(self.parameters[start : self.next_parameter], shape)

    def _weights(self, number: int) -> list[Tensor]:
        """Kernel and bias of a step that is a convolution."""
        step = self.code.steps[number]
        if not isinstance(kind := step.kind, Convolution):
            return []
        inputs, outputs = step.channels, self.code.values[number + 1][0]
        kernel = self._take(*kind.window.kernel, inputs // kind.groups, outputs)
        return [kernel, self._take(outputs)] if kind.use_bias else [kernel]

    def _affine(self, channels: int, scale: bool) -> tuple[Tensor | None, Tensor]:
        gamma = self._take(channels) if scale else None
        return gamma, self._take(channels)

    def _source(self, step: Step) -> Tensor:
        """The sum of a step's terms."""
        ops, count = self.ops, step.channels
        total = None
        for term in step.terms:
            y = self._term(term)
            after = count - term.start - len(term.channels)
            if term.start or after:
                y = ops.pad(y, ((0, 0), (0, 0), (0, 0), (term.start, after)))
            total = y if total is None else total + y
        return total

    def _term(self, term: Term) -> Tensor:
        ops = self.ops
        y = self._some(self.values[term.value], term.channels)
        if term.norm != -1:
            y = self._normalised(term, y)
        if term.activation != IDENTITY:
            function = term.activation
            y = _ACTIVATIONS[function.code].call_keras(ops, y, function.parameters)
        if term.gate != -1:
            channels = tuple(channel + term.gate_offset for channel in term.channels)
            y = y * self._some(self.values[term.gate], channels)
        if term.mask != -1 and self.masks is not None:
            y = y * ops.reshape(self.masks[term.mask], (-1, 1, 1, 1))
        return y

    def _normalised(self, term: Term, y: Tensor) -> Tensor:
        ops = self.ops
        channels = tuple(channel + term.norm_offset for channel in term.channels)
        everywhere = tuple(self.norm_starts[term.norm] + channel for channel in channels)
        if self.statistics is not None:
            mean, variance = (self._some(row, everywhere) for row in self.statistics_rows)
        else:
            if term.value not in self.moments:
                # As Keras's batch norm has them, so that derivatives of every order are its own.
                self.moments[term.value] = ops.moments(self.values[term.value], axes=(0, 1, 2))
            mean, variance = (self._some(m, term.channels) for m in self.moments[term.value])
            for index, place in enumerate(everywhere):
                if place not in self.used:
                    self.used[place] = (mean[index], variance[index])
        gamma, beta = self.affine[term.norm]
        factor = ops.rsqrt(variance + self.code.norms[term.norm].epsilon)
        if gamma is not None:
            factor = factor * self._some(gamma, channels)
        return (y - mean) * factor + self._some(beta, channels)

    @property
    def statistics_rows(self) -> list[Tensor]:
        assert self.statistics is not None
        return [self.statistics[0], self.statistics[1]]

    def _statistics(self) -> Tensor:
        ops, count = self.ops, self.norm_starts[-1]
        if self.statistics is not None or not count:
            empty = ops.zeros((2, count), self.parameters.dtype)
            return empty if self.statistics is None else self.statistics
        zero = ops.zeros((), self.parameters.dtype)
        pairs = [self.used.get(place, (zero, zero)) for place in range(count)]
        return ops.stack([ops.stack([pair[row] for pair in pairs]) for row in (0, 1)])

    def _some(self, x: Tensor, channels: tuple[int, ...]) -> Tensor:
        """Some of the last axis."""
        start, stop = channels[0], channels[0] + len(channels)
        if channels == tuple(range(start, stop)):
            return x if stop - start == x.shape[-1] else x[..., start:stop]
        return self.ops.take(x, channels, axis=-1)

    def _conv(
        self, step: Step, kind: Convolution, x: Tensor, kernel: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        ops, window = self.ops, kind.window
        x = self._padded(window, x, 0.0)
        kernel = self._dilated(window, kernel)
        options = {"strides": window.stride, "padding": "valid", "data_format": "channels_last"}
        if kind.groups == step.channels > 1:
            kernel = ops.reshape(kernel, (*kernel.shape[:2], step.channels, -1))
            y = ops.depthwise_conv(x, kernel, **options)
        else:
            y = ops.conv(x, kernel, **options)
        return y if bias is None else y + bias

    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of the source and of the value of the step at hand."""
        number = len(self.values)
        source = self.code.steps[number - 1].terms[0].value
        (_, *before), (_, *after) = self.code.values[source], self.code.values[number]
        return (before[0], before[1]), (after[0], after[1])

    def _padded(self, window: Window, x: Tensor, value: float) -> Tensor:
        """What the windows see: the source with borders, up to the last tap."""
        (height, width), size = self._sizes()
        rows, columns = zip(window.before, window.after((height, width), size), strict=True)
        if any((*rows, *columns)):
            borders = ((0, 0), rows, columns, (0, 0))
            x = self.ops.pad(x, borders, constant_values=value)
        bottom, right = (
            (out - 1) * stride + (k - 1) * dilation + 1
            for out, stride, k, dilation in zip(
                size, window.stride, window.kernel, window.dilation, strict=True
            )
        )
        return x[:, :bottom, :right]

    def _dilated(self, window: Window, kernel: Tensor) -> Tensor:
        """The kernel with zeros between its taps: not all backends dilate and stride."""
        if window.dilation == (1, 1):
            return kernel
        ops, (height, width), (rows, columns) = self.ops, window.kernel, window.dilation
        kernel = ops.reshape(kernel, (height, 1, width, 1, *kernel.shape[2:]))
        zeros = ((0, 0), (0, rows - 1), (0, 0), (0, columns - 1), (0, 0), (0, 0))
        kernel = ops.pad(kernel, zeros)
        kernel = ops.reshape(kernel, (height * rows, width * columns, *kernel.shape[4:]))
        return kernel[: (height - 1) * rows + 1, : (width - 1) * columns + 1]

    def _mean_pool(self, kind: MeanPool, x: Tensor) -> Tensor:
        ops, window = self.ops, kind.window
        x = self._padded(window, x, 0.0)
        options = {"padding": "valid", "data_format": "channels_last"}
        y = ops.average_pool(x, window.kernel, window.stride, **options)
        rows, columns = (np.array(self._shares(kind, axis)) for axis in (0, 1))
        factors = np.outer(rows, columns)[None, :, :, None]
        return y * ops.convert_to_tensor(factors, self.parameters.dtype)

    def _shares(self, kind: MeanPool, axis: int) -> list[float]:
        """Taps of each window beside those that count, along an axis."""
        window, (source, size) = kind.window, self._sizes()
        before, k, n = window.before[axis], window.kernel[axis], source[axis]
        shares = []
        for index in range(size[axis]):
            start = index * window.stride[axis]
            if kind.counted is None:
                count = min(start + k, before + n) - max(start, before)
            else:
                count = min(start + k, before + n + kind.counted[axis]) - start
            shares.append(k / max(count, 1))
        return shares

    def _max_pool(self, window: Window, x: Tensor) -> Tensor:
        ops = self.ops
        x = self._padded(window, x, -math.inf)
        if window.dilation == (1, 1):
            options = {"padding": "valid", "data_format": "channels_last"}
            return ops.max_pool(x, window.kernel, window.stride, **options)
        _, (height, width) = self._sizes()
        taps = []
        for i, j in np.ndindex(*window.kernel):
            y0, x0 = i * window.dilation[0], j * window.dilation[1]
            rows = slice(y0, y0 + (height - 1) * window.stride[0] + 1, window.stride[0])
            columns = slice(x0, x0 + (width - 1) * window.stride[1] + 1, window.stride[1])
            taps.append(x[:, rows, columns])
        return ops.max(ops.stack(taps), axis=0)
