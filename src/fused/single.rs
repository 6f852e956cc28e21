//! Inference of one image where values have one pixel, as in squeeze-excite: rows one value long,
//! which follow each other. So all channels of a value are one row, and they are what vectors are
//! made of. (Measured: docs/ALGORITHMS.md.)

use super::conv::multiply_rows;
use super::pass::Pass;
use super::program::{Conv, Row, Source, Step};
use crate::microkernels::activations::Activation;
use crate::microkernels::conv1x1_nchw::{Init, Output};
use crate::microkernels::norm_act::{Activate, Factors};
use crate::pool::parallel_for;
use crate::scratch;
use crate::simd::element::{Element, is_wide};
use crate::simd::mul_acc::Fma;

/// Weights of a convolution that are worth more than one thread. (Each is read once, about 0.2 ns;
/// entering the pool costs 12 to 16 us.)
const PARALLEL_WEIGHTS: usize = 128 << 10;

impl<S: Element> Pass<'_, S> {
    /// Whether all channels of a value are one row, which is used as it is.
    pub(super) fn is_single(&self, value: usize) -> bool {
        is_wide::<S>() && self.stores_views && self.row_len(value) == 1
    }

    /// All channels of a value that are a single row.
    fn single(&self, value: usize) -> *mut [S::Wide] {
        assert!(is_wide::<S>());
        std::ptr::slice_from_raw_parts_mut(self.rows(value).ptr().cast(), self.program.values[value].channels)
    }

    /// Reads all channels of a source.
    ///
    /// # Safety
    /// As for [`Pass::load`].
    unsafe fn gather(&self, source: &Source, y: &mut [S::Wide]) {
        for (channel, y) in y.iter_mut().enumerate() {
            let rows = source.channel(channel);
            // SAFETY: the caller's promise.
            unsafe {
                if rows.iter().all(|row| self.plain(row)) {
                    let value = |row: &Row| self.row(row.value, row.channel, 0..1)[0].widen();
                    *y = rows.iter().fold(S::Wide::default(), |sum, row| sum + value(row));
                } else {
                    self.fill(source, channel, 0..1, std::slice::from_mut(y), None);
                }
            }
        }
    }

    /// [`Pass::copy`] of single pixels.
    pub(super) fn copy_single(&self, step: &Step) {
        // SAFETY: sources are earlier values; this is the only task.
        unsafe {
            self.gather(&step.source, &mut *self.single(step.value));
            self.apply_view(step.value, 0..step.source.channels(), 1, self.results(step.value, 0, 0, &mut [], 0));
        }
    }

    /// [`Pass::pointwise`] of single pixels: with the weights in the role of the pixels, and the
    /// other way round.
    pub(super) fn pointwise_single(&self, step: &Step, conv: &Conv) {
        let (k, m, packed) = (conv.group_in, conv.group_out, self.weights(step));
        let starts: Vec<Vec<_>> = packed.blocks.iter().map(|block| (0..k).map(|i| i * block.len()).collect()).collect();
        let results = self.results::<S::Wide>(step.value, 0, 0, &mut [], 0);
        scratch::with(conv.groups * k, |x: &mut [S::Wide]| {
            // SAFETY: sources are earlier values.
            unsafe { self.gather(&step.source, x) };
            let threads = if conv.weights() < PARALLEL_WEIGHTS { 1 } else { self.threads };
            parallel_for(threads, conv.groups * starts.len(), |task| {
                let (g, b) = (task / starts.len(), task % starts.len());
                let block = &packed.blocks[b];
                // SAFETY: the rows of the block's weights, and channels of the value that are this
                // task's own.
                unsafe {
                    let (weights, x) = (packed.block(g, block), &x[g * k..][..k]);
                    let y = results.0.ptr().add(g * m + block.start);
                    multiply_rows(
                        (self.isa, Fma),
                        (weights.as_ptr(), &starts[b]),
                        x,
                        Init::Zero,
                        (Output::Stored(y), &[0]),
                        block.len(),
                        [0; 2],
                    );
                }
            });
        });
        // SAFETY: just written.
        unsafe {
            let y = &mut *self.single(step.value);
            if let Some(x) = packed.bias(0..y.len()) {
                let (activation, affine) = (Activation::Identity, (S::Wide::ONE, S::Wide::default()));
                let factors = Factors::ONE;
                self.isa.run(Activate::<S::Wide> { activation, x, affine, factors, add: true, y, slopes: None });
            }
            self.apply_view(step.value, 0..conv.groups * m, 1, results);
        }
    }
}
