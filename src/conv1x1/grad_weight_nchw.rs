//! The weight gradient in NCHW: products of the planes of `grad_output` and of `x`.

use std::ops::Range;

use super::dot_nt::MatmulNt;
use super::grad_weight::GradWeight;
use super::plan::{Algorithm, GRAD_TILE};
use crate::microkernels::dot_nt::Rows;
use crate::scratch;
use crate::shape::Images;
use crate::simd::element::Element;
use crate::simd::has_stream_prefetcher;
use crate::simd::mul_acc::MulAcc;

/// Bytes of a group's rows over which one tile of the weight gradient runs: they are read once for
/// each tile of weights, from the L2 cache, which also holds those to come.
const TILE_BYTES: usize = 256 << 10;
/// Bytes that the LLC holds, which need no prefetch.
const CACHED_BYTES: usize = 16 << 20;

impl<T: Element, M: MulAcc<T>> GradWeight<'_, T, M> {
    /// Adds images `range` to the sums of `groups`.
    pub(super) fn row_sums(&self, groups: Range<usize>, range: Range<usize>, sums: &mut [T::Wide]) {
        let [k, m] = self.size();
        let Images { pixels, channels: c_in, .. } = self.images;
        let c_out = self.shape.out_channels;
        let x_offsets: Vec<_> = (0..k).map(|i| i * pixels).collect();
        let tile = (TILE_BYTES / ((k + m) * size_of::<T>())).clamp(GRAD_TILE, pixels.max(GRAD_TILE)).min(pixels);
        let batch = (TILE_BYTES / ((k + m) * tile * size_of::<T>())).max(1);
        for (g, sums) in self.each_group(groups, sums) {
            let offsets = &self.dst_index[g * m..][..m];
            if self.algorithm == Algorithm::Gemm {
                for n in range.clone() {
                    // SAFETY: the group's rows of image n in grad_output and x; `sums` is m x k.
                    unsafe {
                        let a = self.grad_output.as_ptr().add(n * c_out * pixels + offsets[0]);
                        let b = self.x.as_ptr().add((n * c_in + g * k) * pixels);
                        T::gemm(self.isa, [m, pixels, k], (a, pixels, 1), (b, 1, pixels), (sums.as_mut_ptr(), k, 1));
                    }
                }
                continue;
            }
            let prefetch = self.prefetch(g, tile, batch < range.len(), batch);
            let products = MatmulNt::<T, _>::with_algorithm(self.isa, self.mul_acc, [m, k], self.algorithm);
            scratch::with(products.memory(), |memory: &mut [T::Wide]| {
                memory.fill(T::Wide::default());
                for n in range.clone().step_by(batch) {
                    for start in (0..pixels).step_by(tile) {
                        // SAFETY: images n.. and pixels start.. exist, `batch` and `tile` cut at
                        // their ends.
                        unsafe {
                            let a = self.grad_output.as_ptr().add(n * c_out * pixels + start);
                            let b = self.x.as_ptr().add((n * c_in + g * k) * pixels + start);
                            let [a_prefetch, b_prefetch] = prefetch;
                            let a = Rows { base: a, offsets, image_stride: c_out * pixels, prefetch: a_prefetch };
                            let b = Rows {
                                base: b,
                                offsets: &x_offsets,
                                image_stride: c_in * pixels,
                                prefetch: b_prefetch,
                            };
                            let size = [batch.min(range.end - n), tile.min(pixels - start)];
                            products.add(a, b, size, memory);
                        }
                    }
                }
                products.finish(memory, sums, k);
            });
        }
    }

    /// Distances to what comes next in `grad_output` and `x`: pixels, images, or the next group; 0
    /// where nothing is prefetched.
    fn prefetch(&self, g: usize, tile: usize, has_next_batch: bool, batch: usize) -> [usize; 2] {
        let ([k, m], Images { pixels, channels: c_in, .. }) = (self.size(), self.images);
        let c_out = self.shape.out_channels;
        if has_stream_prefetcher() || size_of_val(self.x) + size_of_val(self.grad_output) <= CACHED_BYTES {
            [0, 0]
        } else if tile < pixels {
            [tile; 2]
        } else if has_next_batch {
            [c_out, c_in].map(|channels| batch * channels * pixels)
        } else {
            let next = self.dst_index.get((g + 1) * m).copied().unwrap_or(c_out * pixels + self.dst_index[0]);
            [next.saturating_sub(self.dst_index[g * m]), k * pixels]
        }
    }
}
