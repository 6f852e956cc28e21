//! Depthwise convolutions over NHWC images, in the strips of
//! [`dwconv_nhwc`](crate::microkernels::dwconv_nhwc).

use std::mem::MaybeUninit;
use std::ops::Range;
use std::slice;

use super::polyphase::{Phase, most_pixels};
use super::{Correlation, TASKS_PER_THREAD, WeightGrad};
use crate::microkernels::dwconv_nhwc::{DwConvNhwc, DwConvNhwcGradWeight, ROWS, Window};
use crate::microkernels::transpose::Transpose;
use crate::parallel::{Shared, add_parts};
use crate::pool::{chunks, parallel_for, part};
use crate::scratch::{self, cut};
use crate::shape::{Depthwise, WeightLayout};
use crate::simd::element::{Element, lanes};
use crate::simd::{IsaKind, Promised};

/// Sets of partial weight gradients: at most `MAX_PARTS`, and, down to `MIN_PARTS`, so few that
/// `READ_PER_SUM` values are read for each of the sums, which cost their writing and adding up.
const MAX_PARTS: usize = 32;
const MIN_PARTS: usize = 16;
const READ_PER_SUM: usize = 32;

impl<T: Element> Correlation<'_, T> {
    /// Bands of rows, divided over the threads.
    pub(super) fn pixels(&self) {
        let strips = Strips::new([&self.vertical, &self.horizontal], [self.output[1], self.shape.channels]);
        let (threads, all) = (self.threads, self.shape.count * strips.bands());
        let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(all) };
        with_vectors(self.isa, self.shape, self.weight, |weights| {
            parallel_for(threads, parts, |task| {
                for i in part(all, parts, task) {
                    self.band(&strips, weights, [i / strips.bands(), i % strips.bands()]);
                }
            });
        });
    }

    /// One band of an image, with weights as `[vector of channels][tap][lane]`.
    fn band(&self, strips: &Strips, weights: &[T::Wide], [n, band]: [usize; 2]) {
        let Depthwise { channels, kernel, .. } = *self.shape;
        let len = self.vertical[0].input * self.horizontal[0].input * channels;
        let out_len = self.output[0] * self.output[1] * channels;
        let (x, y) = (&self.x[n * len..][..len], self.y.at(n * out_len).ptr());
        let mut prefetch = strips.prefetch(band, [x.as_ptr(), y.cast_const()]);
        // The first pair of phases prefetches all that the next band's results see.
        let mut prefetches = self.vertical[0].in_step * self.vertical[0].in_step;
        for (vertical, horizontal) in strips.pairs() {
            let rows = strips.rows(band, vertical);
            let (first, strides) = strips.results((vertical, horizontal), rows.start);
            let ((tap_row, down), (tap_column, right)) = (vertical.first_tap(), horizontal.first_tap());
            // SAFETY: pixels of image n of the output, each of which one task writes.
            let kernel = unsafe {
                Promised::new_unchecked(DwConvNhwc {
                    window: strips.window(x, (vertical, horizontal), rows.start, prefetches),
                    weights,
                    kernel_taps: kernel * kernel,
                    first_tap: tap_row * kernel + tap_column,
                    tap_steps: [down * kernel as isize, right],
                    bias: self.bias,
                    y: y.wrapping_add(first),
                    strides,
                    size: [rows.len(), horizontal.count],
                    prefetch,
                })
            };
            prefetch = self.isa.run(kernel);
            prefetches = 0;
        }
    }
}

impl<T: Element> WeightGrad<'_, T> {
    /// Each part of the images has sums of its own, added up in order at the end.
    pub(super) fn pixels(&self, grad_weight: &mut [MaybeUninit<T>]) {
        let phases = [&self.vertical, &self.horizontal].map(slice::from_ref);
        let Depthwise { count, channels, kernel, .. } = *self.shape;
        let strips = Strips::new(phases, [self.horizontal.count, channels]);
        let (bands, lanes, taps) = (count * strips.bands(), lanes::<T::Wide>(self.isa), kernel * kernel);
        let len = channels.div_ceil(lanes) * taps * lanes;
        let most = (self.x.len() + self.grad_output.len()) / (READ_PER_SUM * len);
        let parts = bands.min(most.clamp(MIN_PARTS, MAX_PARTS));
        scratch::with(parts * len, |partial: &mut [T::Wide]| {
            let shared = Shared(partial.as_mut_ptr());
            parallel_for(self.threads, parts, |task| {
                // SAFETY: each task has sums of its own.
                let sums = unsafe { slice::from_raw_parts_mut(shared.ptr().add(task * len), len) };
                sums.fill(T::Wide::default());
                self.bands(&strips, part(bands, parts, task), sums);
            });
            for (vector, sums) in add_parts(partial, len).chunks_exact(taps * lanes).enumerate() {
                let first = vector * lanes;
                for (tap, sums) in sums.chunks_exact(lanes).enumerate() {
                    for (c, &sum) in (first..channels).zip(sums) {
                        grad_weight[self.shape.weight_index(c, tap)].write(T::narrow(self.checked(c, tap, sum)));
                    }
                }
            }
        });
    }

    /// Adds some bands of the images to `[vector of channels][tap][lane]` sums.
    fn bands(&self, strips: &Strips, bands: Range<usize>, sums: &mut [T::Wide]) {
        let (channels, phases) = (self.shape.channels, (&self.vertical, &self.horizontal));
        let len = self.vertical.input * self.horizontal.input * channels;
        let out_len = self.vertical.count * self.horizontal.count * channels;
        let prefetches = self.shape.stride * self.shape.stride;
        for (n, band) in bands.map(|band| (band / strips.bands(), band % strips.bands())) {
            let (x, g) = (&self.x[n * len..][..len], &self.grad_output[n * out_len..][..out_len]);
            let rows = strips.rows(band, &self.vertical);
            let (first, strides) = strips.results(phases, rows.start);
            // SAFETY: pixels of the gradient.
            let kernel = unsafe {
                Promised::new_unchecked(DwConvNhwcGradWeight {
                    window: strips.window(x, phases, rows.start, prefetches),
                    g: g.as_ptr().add(first),
                    strides,
                    size: [rows.len(), self.horizontal.count],
                    sums,
                    prefetch: strips.prefetch(band, [x.as_ptr(), g.as_ptr()]),
                })
            };
            self.isa.run(kernel);
        }
    }
}

/// Calls `body` with the weights of a kernel as `[vector of channels][tap][lane]`.
fn with_vectors<T: Element>(isa: IsaKind, shape: &Depthwise, weight: &[T], body: impl FnOnce(&[T::Wide])) {
    let (channels, taps, lanes) = (shape.channels, shape.kernel * shape.kernel, lanes::<T::Wide>(isa));
    let lens = [channels.div_ceil(lanes) * taps * lanes, weight.len()];
    scratch::with(lens.iter().sum(), |memory: &mut [T::Wide]| {
        let [packed, widened] = cut(memory, lens);
        let weight = T::widened(isa, weight, widened);
        for (channels, packed) in chunks(0..channels, lanes).zip(packed.chunks_exact_mut(taps * lanes)) {
            let (size, to) = ([channels.len(), taps], packed.as_mut_ptr());
            match shape.weight_layout {
                // SAFETY: these channels' weights, and as many vectors.
                WeightLayout::Oi => isa.run(unsafe {
                    Transpose::gather(size, weight[channels.start * taps..].as_ptr(), taps, to, lanes).ahead(0)
                }),
                WeightLayout::Io => {
                    for (packed, weight) in packed.chunks_exact_mut(lanes).zip(weight.chunks_exact(shape.channels)) {
                        packed[..channels.len()].copy_from_slice(&weight[channels.clone()]);
                    }
                }
            }
        }
        body(packed);
    })
}

/// The results of vertical and horizontal phases of an image, in bands: a strip of each pair of
/// phases.
#[derive(Clone, Copy)]
struct Strips<'a> {
    vertical: &'a [Phase],
    horizontal: &'a [Phase],
    /// Columns of the results of all phases, and channels.
    width: usize,
    channels: usize,
}

impl<'a> Strips<'a> {
    /// Those of results of `width` columns.
    fn new(phases: [&'a [Phase]; 2], [width, channels]: [usize; 2]) -> Self {
        Self { vertical: phases[0], horizontal: phases[1], width, channels }
    }

    /// The pairs of phases.
    fn pairs(self) -> impl Iterator<Item = (&'a Phase, &'a Phase)> {
        let of_row = move |vertical| self.horizontal.iter().map(move |horizontal| (vertical, horizontal));
        self.vertical.iter().flat_map(of_row)
    }

    /// Rows of a phase's results in a band: all phases' together are as many as a strip of one, as
    /// what was prefetched does not stay in L2 for longer.
    fn band_rows(self) -> usize {
        ROWS / self.vertical[0].out_step
    }

    /// How many bands an image has.
    fn bands(self) -> usize {
        most_pixels(self.vertical).div_ceil(self.band_rows())
    }

    /// The rows of a phase's results in a band.
    fn rows(self, band: usize, phase: &Phase) -> Range<usize> {
        let [start, end] = [band, band + 1].map(|band| (band * self.band_rows()).min(phase.count));
        start..end
    }

    /// What to prefetch during a band: where the next band's rows begin, in an image and in its
    /// results.
    fn prefetch<T>(self, band: usize, [x, y]: [*const T; 2]) -> [*const T; 2] {
        let (row, phase) = ((band + 1) * self.band_rows(), &self.vertical[0]);
        let x_row = self.horizontal[0].input * self.channels;
        [x.wrapping_add(phase.in_step * row * x_row), y.wrapping_add(phase.out_step * row * self.width * self.channels)]
    }

    /// What the results of a pair of phases see of an image, from a row of them on.
    fn window<'x, T>(self, x: &'x [T], pair: (&Phase, &Phase), row: usize, prefetches: usize) -> Window<'x, T> {
        let (vertical, horizontal) = pair;
        let step = vertical.in_step;
        Window {
            x,
            size: [vertical.input, horizontal.input],
            channels: self.channels,
            start: [vertical.span().0 + (step * row) as isize, horizontal.span().0],
            step,
            taps: [vertical.taps.len(), horizontal.taps.len()],
            prefetches,
        }
    }

    /// The index in an image's results of the first one of a pair of phases from a row of them on,
    /// and the distances of their rows and columns.
    fn results(self, (vertical, horizontal): (&Phase, &Phase), row: usize) -> (usize, [usize; 2]) {
        let [y, x] = [vertical.first + vertical.out_step * row, horizontal.first];
        let strides = [vertical.out_step * self.width, horizontal.out_step].map(|pixels| pixels * self.channels);
        ((y * self.width + x) * self.channels, strides)
    }
}
