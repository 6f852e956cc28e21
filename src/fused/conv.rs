//! The frame of the convolutions: products of rows, sums by parts of the pixels, and gradients that
//! go back to the source's channels.

use std::ops::Range;

use super::backward::Tape;
use super::pack::Packed;
use super::pass::{Pass, Statistics, merge_statistics};
use super::program::{Conv, Source};
use super::source::NormSums;
use crate::memory;
use crate::microkernels::conv1x1_nchw::{Conv1x1Nchw, Init, Output};
use crate::parallel::Shared;
use crate::pool::{parallel_for, threads_for};
use crate::shape::WeightLayout;
use crate::simd::element::{Element, WideElement};
use crate::simd::mul_acc::MulAcc;
use crate::simd::{IsaKind, Promised};

/// Rows of values: the first one's start, and the offsets of all from there.
pub(super) type RowPointers<'a, P> = (P, &'a [usize]);

/// The products of input rows with a block of [packed weights](super::pack::Packed), over some
/// pixels: see [`Conv1x1Nchw`].
///
/// # Safety
/// As for [`Conv1x1Nchw`].
pub(super) unsafe fn multiply_rows<T: Element, M: MulAcc<T>>(
    (isa, mul_acc): (IsaKind, M),
    (x, x_offsets): RowPointers<'_, *const T>,
    weights: &[T::Wide],
    init: Init<'_, T>,
    (y, y_offsets): RowPointers<'_, Output<T>>,
    pixels: usize,
    prefetch: [usize; 2],
) {
    let rows = Conv1x1Nchw { mul_acc, x, x_offsets, weights, init, y, y_offsets, pixels, prefetch };
    // SAFETY: the caller's promise.
    isa.run(unsafe { Promised::new_unchecked(rows) });
}

/// [`multiply_rows`] with some blocks of a group's packed weights; bias and `y_offsets` are those
/// of all output rows of the group.
///
/// # Safety
/// As for [`Conv1x1Nchw`].
pub(super) unsafe fn multiply_blocks<T: Element, M: MulAcc<T>>(
    kernel: (IsaKind, M),
    x: RowPointers<'_, *const T>,
    (packed, group): (&Packed<T::Wide>, usize),
    blocks: &[Range<usize>],
    bias: Option<&[T::Wide]>,
    (y, y_offsets): RowPointers<'_, *mut T::Wide>,
    pixels: usize,
) {
    for block in blocks {
        let (weights, init) = (packed.block(group, block), Init::wide_bias(bias.map(|bias| &bias[block.clone()])));
        let y = (Output::Wide(y), &y_offsets[block.clone()]);
        // SAFETY: the caller's promise.
        unsafe { multiply_rows(kernel, x, weights, init, y, pixels, [0; 2]) };
    }
}

/// What adding a part's sum to the others takes, about.
const NANOSECONDS: f64 = 0.3;

/// Sums that tasks gather for parts of the pixels, each its own: `[part][index]`.
pub(super) struct PartSums<S> {
    sums: Vec<S>,
    shared: Shared<S>,
    /// How many a part has.
    len: usize,
}

impl<S: Clone> PartSums<S> {
    pub fn new(zero: S, parts: usize, len: usize) -> Self {
        let mut sums = memory::filled(zero, parts * len);
        Self { shared: Shared(sums.as_mut_ptr()), sums, len }
    }

    /// Some of a part.
    ///
    /// # Safety
    /// They must be the calling task's own.
    #[expect(clippy::mut_from_ref, reason = "tasks write different parts of shared memory")]
    pub unsafe fn of(&self, part: usize, range: Range<usize>) -> &mut [S] {
        if self.len == 0 {
            return &mut [];
        }
        assert!(range.end <= self.len && (part + 1) * self.len <= self.sums.len());
        // SAFETY: inside the sums; the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.shared.ptr().add(part * self.len + range.start), range.len()) }
    }
}

impl PartSums<Statistics> {
    /// Statistics of a value's channels, of none where nobody wants them.
    pub fn statistics<E: Element>(pass: &Pass<'_, E>, value: usize, parts: usize) -> Self {
        let channels = if pass.gathers(value) { pass.program.values[value].channels } else { 0 };
        Self::new((0.0, 0.0, 0.0), parts, channels)
    }

    /// The statistics of each channel from those of its parts.
    pub fn merged(&self) -> Vec<Statistics> {
        let parts = || self.sums.chunks_exact(self.len.max(1));
        (0..self.len).map(|c| parts().map(|part| part[c]).fold((0.0, 0.0, 0.0), merge_statistics)).collect()
    }
}

/// The gradients by a convolution's weights and bias, by parts of the pixels:
/// `[group][output][input][tap]` and `[output channel]`.
pub(super) struct ParameterGrads<T> {
    weights: PartSums<T>,
    bias: PartSums<f64>,
    /// How many weights and output channels a group has.
    group: [usize; 2],
    parts: usize,
}

impl<T: WideElement> ParameterGrads<T> {
    pub fn new(conv: &Conv, parts: usize) -> Self {
        Self {
            weights: PartSums::new(T::default(), parts, conv.weights()),
            bias: PartSums::new(0.0, parts, conv.groups * conv.group_out),
            group: [conv.weights() / conv.groups, conv.group_out],
            parts,
        }
    }

    /// The sums of a part and a group.
    ///
    /// # Safety
    /// They must be the calling task's own.
    #[expect(clippy::mut_from_ref, reason = "tasks write different parts of shared memory")]
    pub unsafe fn of(&self, part: usize, group: usize) -> (&mut [T], &mut [f64]) {
        let [weights, bias] = self.group.map(|len| group * len..(group + 1) * len);
        // SAFETY: the caller's promise.
        unsafe { (self.weights.of(part, weights), self.bias.of(part, bias)) }
    }

    /// Writes the gradients of all parts together.
    pub fn write(self, conv: &Conv, grad_parameters: Shared<T>) {
        let (channels, len) = (conv.groups * conv.group_out, conv.group_in * conv.taps());
        let sums = self.weights.shared;
        let values = (self.parts * conv.weights()) as f64;
        parallel_for(threads_for(values * NANOSECONDS), channels, |channel| {
            let (g, o) = (channel / conv.group_out, channel % conv.group_out);
            // SAFETY: all parts' sums of an output channel, which are this task's own.
            let row = |p: usize| unsafe {
                std::slice::from_raw_parts_mut(sums.ptr().add(p * conv.weights() + channel * len), len)
            };
            let total = row(0);
            for p in 1..self.parts {
                total.iter_mut().zip(row(p)).for_each(|(sum, &mut part)| *sum += part);
            }
            // SAFETY: this convolution's parameters.
            let write = |index: usize, sums: &[T]| unsafe {
                let target = grad_parameters.ptr().add(conv.weight + index);
                target.copy_from_nonoverlapping(sums.as_ptr(), sums.len());
            };
            if conv.layout == WeightLayout::Oi {
                return write(conv.index(g, o, 0, 0), total);
            }
            for (i, sums) in total.chunks_exact(conv.taps()).enumerate() {
                sums.iter()
                    .enumerate()
                    .for_each(|(tap, sum)| write(conv.index(g, o, i, tap), std::slice::from_ref(sum)));
            }
        });
        let Some(start) = conv.bias else { return };
        for o in 0..channels {
            let parts = (0..self.parts).map(|p| self.bias.sums[p * channels + o]);
            // SAFETY: as above.
            unsafe { grad_parameters.ptr().add(start + o).write(T::from_f64(parts.sum())) };
        }
    }
}

/// Rows of a tile: the values, and the distance from one row to the next.
pub(super) type Tile<'a, T> = (&'a [T], usize);

impl<S: Element> Pass<'_, S> {
    /// A convolution's weights.
    pub(super) fn conv_weights(&self, conv: &Conv) -> &[S::Wide] {
        &self.parameters[conv.weight..][..conv.weights()]
    }
}

impl<S: Element> Tape<'_, '_, S> {
    /// Adds the gradients by some of a source's channels over some pixels to those of the values
    /// that they were read from, as [`Tape::accumulate_grad`] does for one channel.
    ///
    /// # Safety
    /// As for [`Tape::accumulate_grad`].
    pub(super) unsafe fn accumulate_grads(
        &self,
        source: &Source,
        channels: Range<usize>,
        pixels: &Range<usize>,
        (grads, grad_pitch): Tile<'_, S::Wide>,
        slopes: Option<Tile<'_, S::Wide>>,
        values: Option<Tile<'_, S::Wide>>,
        mut sums: &mut [NormSums],
    ) {
        for (i, channel) in channels.enumerate() {
            let (own, rest) = sums.split_at_mut(source.channel(channel).len());
            sums = rest;
            let grad = &grads[i * grad_pitch..][..pixels.len()];
            let values = values.map(|(values, pitch)| &values[i * pitch..][..pixels.len()]);
            let slopes = slopes.map(|(slopes, pitch)| &slopes[i * pitch..]);
            // SAFETY: the caller's promise.
            unsafe { self.accumulate_grad(source, channel, pixels.clone(), grad, slopes, values, own) };
        }
    }
}
