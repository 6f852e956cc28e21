//! The weight gradient in NHWC: sums of outer products of pixels.
//!
//! An interleaved `grad_output` is read where its channels are stored ([`OuterByInput`]), or
//! permuted in a cache first ([`OuterByOutput`], [`Grouped`](super::plan::Algorithm::Grouped)).
//!
//! [`OuterByInput`]: super::plan::Algorithm::OuterByInput
//! [`OuterByOutput`]: super::plan::Algorithm::OuterByOutput

use std::ops::Range;

use super::grad_weight::GradWeight;
use super::grouped::Grouped;
use super::nhwc::outer_tile;
use super::plan::OUTER_TERMS;
use crate::microkernels::grouped_nhwc::{Block, GroupedNhwcGradWeight, Source};
use crate::microkernels::outer::{OuterProducts, Totals};
use crate::pool::chunks;
use crate::scratch::{self, cut};
use crate::simd::Promised;
use crate::simd::element::Element;
use crate::simd::mul_acc::MulAcc;

/// Values of pixels, packed as steps.
#[derive(Clone, Copy)]
struct Values<'a, T: Element> {
    values: &'a [T::Wide],
    /// Distance of steps.
    stride: usize,
    /// Prefetch distance.
    prefetch: usize,
}

impl<T: Element, M: MulAcc<T>> GradWeight<'_, T, M> {
    /// Adds pixels `range` of all images to the sums of `groups`.
    pub(super) fn pixel_sums(&self, groups: Range<usize>, range: Range<usize>, sums: &mut [T::Wide]) {
        let [k, m] = self.size();
        let inputs: Vec<_> = (0..k).collect();
        let tile = outer_tile::<T::Wide>(self.shape.in_channels + self.shape.out_channels).max(OUTER_TERMS);
        self.tiles(range, tile, |x, grad, terms| {
            for (g, sums) in self.each_group(groups.clone(), sums) {
                let x = Values { values: &x.values[g * k..], ..x };
                // SAFETY: the pixels exist in x and grad_output, with all of the group's channels,
                // which follow each other where they are the columns.
                unsafe { self.outer(x, grad, &inputs, &self.dst_index[g * m..][..m], terms, sums) };
            }
        });
    }

    /// Calls `body` for tiles of pixels `range`, with the values of `x` and of `grad_output` there
    /// and the number of pixels.
    fn tiles(&self, range: Range<usize>, tile: usize, mut body: impl FnMut(Values<'_, T>, Values<'_, T>, usize)) {
        let channels @ [c_in, c_out] = [self.shape.in_channels, self.shape.out_channels];
        let sizes = channels.map(|channels| tile / M::TERMS * channels);
        let permuted = if self.permutation.is_some() { tile * c_out } else { 0 };
        // Copies are in a cache.
        let copied = size_of::<T>() < size_of::<T::Wide>();
        let prefetch = channels.map(|channels| if copied { 0 } else { tile * channels });
        scratch::with(permuted, |permuted: &mut [T]| {
            for pixels in chunks(range, tile) {
                let [x, mut grad] = [(self.x, c_in), (self.grad_output, c_out)]
                    .map(|(values, channels)| &values[pixels.start * channels..pixels.end * channels]);
                let mut prefetch = prefetch;
                if let Some(permutation) = &self.permutation {
                    let to = &mut permuted[..grad.len()];
                    // SAFETY: both are these pixels, of all channels.
                    unsafe {
                        permutation.run(grad.as_ptr(), to.as_mut_ptr(), [c_out; 2], pixels.len(), [tile * c_out, 0]);
                    }
                    (grad, prefetch[1]) = (to, 0);
                }
                scratch::with(sizes.iter().sum(), |memory: &mut [T::Wide]| {
                    let [x_memory, grad_memory] = cut(memory, sizes);
                    let x = self.mul_acc.steps(self.isa, x, c_in, x_memory);
                    let grad = self.mul_acc.steps(self.isa, grad, c_out, grad_memory);
                    let x = Values { values: x, stride: c_in, prefetch: prefetch[0] };
                    body(x, Values { values: grad, stride: c_out, prefetch: prefetch[1] }, pixels.len());
                });
            }
        });
    }

    /// Several groups in a vector: calls `write` with the indices and sums of some vectors' weights
    /// over pixels `range` of all images.
    pub(super) fn grouped_sums(
        &self,
        groups: &Grouped,
        vectors: Range<usize>,
        range: Range<usize>,
        write: impl Fn(usize, T::Wide),
    ) {
        let tile = 2 * outer_tile::<T::Wide>(self.shape.in_channels + self.shape.out_channels);
        let tile = tile.max(OUTER_TERMS);
        // Vectors are of the side that has more channels.
        let [k, m] = self.size();
        let by_input = k > m;
        let each = groups.weights() / groups.vectors.len();
        let vectors = &groups.vectors[vectors];
        scratch::with(vectors.len() * each, |totals: &mut [T::Wide]| {
            totals.fill(T::Wide::default());
            self.tiles(range, tile, |x, grad, terms| {
                let (a, b) = if by_input { (grad, x) } else { (x, grad) };
                for (vector, sums) in vectors.iter().zip(totals.chunks_exact_mut(each)) {
                    let Source { first, block, prefetch, .. } = groups.sources[vector.sources.start];
                    let Block::Window(len) = block else { unreachable!("chosen for windows only") };
                    // SAFETY: all pixels have the channels.
                    self.isa.run(unsafe {
                        Promised::new_unchecked(GroupedNhwcGradWeight::<T, M> {
                            mul_acc: self.mul_acc,
                            a: (a.values.as_ptr().add(first), len),
                            a_stride: a.stride,
                            a_prefetch: if prefetch { a.prefetch } else { 0 },
                            b: (b.values.as_ptr().add(vector.columns.start), vector.columns.len()),
                            b_stride: b.stride,
                            b_prefetch: b.prefetch,
                            terms,
                            index: groups.index(vector),
                            sums,
                        })
                    });
                }
            });
            for (vector, sums) in vectors.iter().zip(totals.chunks_exact(each)) {
                groups.unpack(vector, sums, by_input, &write);
            }
        });
    }

    /// Adds a group's products over `terms` pixels to its sums, of `x`, which starts with its
    /// channels, and `grad`, where they stand at `outputs`.
    ///
    /// # Safety
    /// The pixels must have the group's channels, which must follow each other where they are
    /// columns.
    // Inlined, as groups of four channels or less feel a call.
    #[inline(always)]
    unsafe fn outer(
        &self,
        x: Values<'_, T>,
        grad: Values<'_, T>,
        inputs: &[usize],
        outputs: &[usize],
        terms: usize,
        sums: &mut [T::Wide],
    ) {
        let [k, m] = self.size();
        // Vectors are of output channels or of input channels.
        let (a, a_rows, b, columns) = if self.by_output() { (x, inputs, grad, m) } else { (grad, outputs, x, k) };
        let first = if self.by_output() { outputs[0] } else { 0 };
        assert_eq!(sums.len(), m * k);
        // SAFETY: the caller's promise; there are m x k sums.
        self.isa.run(unsafe {
            Promised::new_unchecked(OuterProducts {
                mul_acc: self.mul_acc,
                a: a.values.as_ptr(),
                a_stride: a.stride,
                a_rows,
                a_prefetch: a.prefetch,
                b: b.values.as_ptr().add(first),
                b_stride: b.stride,
                b_prefetch: b.prefetch,
                terms,
                columns,
                out: Totals::<T> { sums: sums.as_mut_ptr(), row: columns },
            })
        });
    }
}
