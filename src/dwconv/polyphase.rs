//! What the pixels of one axis see through the taps of a kernel.
//!
//! Output pixels fall into *phases* in which pixel `t` sees input pixels `step * t + offset` for a
//! fixed list of taps. A convolution has one phase; its input gradient at stride 2 has two, each
//! with the taps of one parity. So forward and input gradient are one computation.

use crate::shape::Axis;

/// Output pixels `first, first + out_step, ...` of one axis, `count` of them.
#[derive(Clone, Debug)]
pub(crate) struct Phase {
    pub(crate) first: usize,
    pub(crate) out_step: usize,
    pub(crate) count: usize,
    /// Output pixel `t` of the phase sees input pixels `in_step * t + offset`.
    pub(crate) in_step: usize,
    /// Tap of the kernel and offset of its input.
    pub(crate) taps: Vec<(usize, isize)>,
    /// Number of input pixels.
    pub(crate) input: usize,
}

/// The most output pixels of a phase.
pub(crate) fn most_pixels(phases: &[Phase]) -> usize {
    phases.iter().map(|phase| phase.count).max().unwrap_or(0)
}

impl Phase {
    /// The convolution along an axis.
    pub(crate) fn forward(axis: Axis, kernel: usize, stride: usize) -> Vec<Self> {
        let taps = (0..kernel).map(|tap| (tap, tap as isize - axis.before as isize)).collect();
        vec![Self { first: 0, out_step: 1, count: axis.output, in_step: stride, taps, input: axis.input }]
    }

    /// The input gradient: input pixel `stride * t + phase` was seen by tap `tap` of output pixel
    /// `t + (phase + before - tap) / stride` where that is a whole number.
    pub(crate) fn backward(axis: Axis, kernel: usize, stride: usize) -> Vec<Self> {
        (0..stride.min(axis.input))
            .map(|first| {
                let distance = |tap: usize| (first + axis.before) as isize - tap as isize;
                let seen = (0..kernel).filter(|&tap| distance(tap).rem_euclid(stride as isize) == 0);
                let taps = seen.map(|tap| (tap, distance(tap).div_euclid(stride as isize))).collect();
                let count = (axis.input - first).div_ceil(stride);
                Self { first, out_step: stride, count, in_step: 1, taps, input: axis.output }
            })
            .collect()
    }

    /// The zeros before the input of the convolution whose [input gradient](Phase::backward) has
    /// these phases.
    pub(crate) fn before(phases: &[Self]) -> usize {
        let tap = |phase: &Self| {
            let &(tap, offset) = phase.taps.first()?;
            (phase.out_step as isize * offset + tap as isize).checked_sub_unsigned(phase.first)
        };
        // Without a tap, nothing is seen.
        phases.iter().find_map(tap).unwrap_or(0) as usize
    }

    /// The tap of the lowest offset, and how many taps further the next offset's is.
    pub(crate) fn first_tap(&self) -> (usize, isize) {
        let low = self.span().0;
        let tap = |offset| self.taps.iter().find(|tap| tap.1 == offset).map(|tap| tap.0);
        let first = tap(low).unwrap_or(0);
        (first, tap(low + 1).map_or(0, |next| next as isize - first as isize))
    }

    /// The lowest offset, and how many pixels the offsets span.
    pub(crate) fn span(&self) -> (isize, usize) {
        let offsets = self.taps.iter().map(|&(_, offset)| offset);
        let low = offsets.clone().min().unwrap_or(0);
        (low, (offsets.max().unwrap_or(0) - low) as usize)
    }
}

/// The sum over all results of what they and the pixels that they see through a tap, numbered in
/// the lists of the phases, make: `product(result, pixel)`.
///
/// Kernels multiply by zeros for what lies outside of images, and of what is not a number that
/// makes no number. Where their sums are none, this tells what they should be.
pub(crate) fn sum_seen(
    [vertical, horizontal]: [&Phase; 2],
    [i, j]: [usize; 2],
    product: impl Fn([usize; 2], [usize; 2]) -> f64,
) -> f64 {
    let seen = |phase: &Phase, tap: usize| -> Vec<[usize; 2]> {
        let (offset, step, input) = (phase.taps[tap].1, phase.in_step, phase.input);
        let pixel = |t: usize| (step * t).checked_add_signed(offset).filter(|&pixel| pixel < input);
        (0..phase.count).filter_map(|t| Some([t, pixel(t)?])).collect()
    };
    let columns = seen(horizontal, j);
    let row = |[t, y]: [usize; 2]| columns.iter().map(|&[u, x]| product([t, u], [y, x])).sum::<f64>();
    seen(vertical, i).into_iter().map(row).sum()
}
