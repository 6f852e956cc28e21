//! Pointwise convolutions of a fused network.

use std::ops::Range;

use super::PARTS;
use super::backward::Tape;
use super::conv::{ParameterGrads, PartSums, multiply_rows};
use super::pack::Packed;
use super::pass::{Pass, Statistics};
use super::program::{Conv, Step};
use super::source::NormSums;
use crate::conv1x1::dot_nt::MatmulNt;
use crate::microkernels::conv1x1_nchw::{Init, MAX_ROWS};
use crate::microkernels::dot_nt::Rows;
use crate::microkernels::reduce::Sum;
use crate::pool::chunks;
use crate::pool::part;
use crate::scratch::{self, cut};
use crate::simd::element::{Element, WideElement};
use crate::simd::mul_acc::Fma;

/// Values of a group's rows in a tile, about: in float32 as much as the L2 cache holds, because
/// each call of a kernel costs tens of nanoseconds. (Measured: docs/ALGORITHMS.md.)
const TILE_VALUES: usize = 256 << 10;
/// Pixels of a tile: at least, at most.
const TILE_PIXELS: (usize, usize) = (64, 4096);
/// Pixels of a task of the backward pass, about, and the fewest tasks: each has to clear and to add
/// up a vector of sums for every weight of its group.
const TASK_PIXELS: usize = 2048;
const TASKS: usize = 64;
/// Tasks of the forward pass, at least, where there are pixels enough: one image has few.
const FORWARD_TASKS: usize = 8;

/// Pixels of a tile of `rows` rows: a multiple of all vectors' lengths.
fn tile_pixels(rows: usize) -> usize {
    (TILE_VALUES / rows / 64 * 64).clamp(TILE_PIXELS.0, TILE_PIXELS.1)
}

impl<S: Element> Pass<'_, S> {
    /// Makes the value of a pointwise convolution, and its statistics.
    pub(super) fn pointwise(&self, step: &Step, conv: &Conv) -> Vec<Statistics> {
        if self.is_single(step.value) {
            self.pointwise_single(step, conv);
            return Vec::new();
        }
        let (k, m) = (conv.group_in, conv.group_out);
        let scaled = self.gates(&step.source).map(|gates| self.weights(step).scaled(&gates));
        let packed = scaled.as_ref().unwrap_or_else(|| self.weights(step));
        let len = self.row_len(step.value);
        let tile = tile_pixels(k + m);
        let parts = len.div_ceil(tile).max(FORWARD_TASKS.div_ceil(conv.groups)).min(len.div_ceil(TILE_PIXELS.0));
        let parts = parts.clamp(1, PARTS);
        let sums = PartSums::statistics(parts, conv.groups * m);
        let highest = packed.blocks.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        let sizes = [k * tile, Self::tile_len(highest * tile)];
        self.for_tasks(conv.groups, parts, |g, p| {
            scratch::with(sizes.iter().sum(), |memory: &mut [S::Wide]| {
                let [buffer, results] = cut(memory, sizes);
                // SAFETY: statistics of this part and group alone.
                let statistics = unsafe { sums.of(p, g * m..(g + 1) * m) };
                let mut x_offsets = vec![0; k];
                for pixels in chunks(part(len, parts, p), tile) {
                    let x = if scaled.is_some() {
                        self.row_offsets(&step.source.rows[g * k..], pixels.start, &mut x_offsets)
                    } else {
                        // SAFETY: sources are values of earlier steps.
                        unsafe { self.load_rows(&step.source, g * k, &pixels, buffer, tile, &mut x_offsets, None) }
                    };
                    for block in &packed.blocks {
                        let channels = g * m + block.start..g * m + block.end;
                        let (weights, bias) = (packed.block(g, block), packed.bias(channels.clone()));
                        let (y, pitch) = self.results(step.value, channels.start, pixels.start, results, tile);
                        let offsets: [_; MAX_ROWS] = std::array::from_fn(|o| o * pitch);
                        // SAFETY: rows of the source, and of the results, which are this task's
                        // own.
                        unsafe {
                            let (rows, ahead) = ((y.ptr(), &offsets[..block.len()]), [0, pixels.len()]);
                            multiply_rows(self.isa, (x, &x_offsets), weights, bias.into(), rows, pixels.len(), ahead);
                            let statistics = &mut statistics[block.clone()];
                            self.apply_epilogue(step.value, channels, pixels.clone(), (y, pitch), statistics);
                        }
                    }
                }
            });
        });
        sums.merged()
    }
}

/// The way back through a pointwise convolution.
struct PointwiseGrad<'s, T> {
    step: &'s Step,
    conv: &'s Conv,
    /// The weights that bring the gradient back, if it is wanted.
    packed: Packed<T>,
    products: MatmulNt<T, Fma>,
    /// Pixels of a tile.
    tile: usize,
    grads: ParameterGrads<T>,
}

impl<S: Element> Tape<'_, '_, S> {
    /// Goes back through a pointwise convolution.
    pub(super) fn pointwise(&mut self, step: &Step, conv: &Conv) {
        let pass = self.pass;
        let (groups, k, m) = (conv.groups, conv.group_in, conv.group_out);
        let weights = pass.conv_weights(conv);
        let pixels = step.source.pixels();
        let tile = tile_pixels((2 + step.source.most_rows) * k + m);
        let parts = pass.parts(pixels).min((pass.count * pixels / TASK_PIXELS).max(TASKS.div_ceil(groups)));
        let back = PointwiseGrad {
            step,
            conv,
            packed: Packed::new(pass.isa, groups, k, m, |g, i, o| weights[conv.index(g, o, i, 0)]),
            products: MatmulNt::new(pass.isa, Fma, [m, k], tile),
            tile,
            grads: ParameterGrads::new(conv, parts),
        };
        self.backprop_source(&step.source, groups, parts, |this, g, images, p, sums| {
            back.task(this, g, images.start * pixels..images.end * pixels, p, sums);
        });
        back.grads.write(conv, self.grad_parameters);
    }
}

impl<T: WideElement> PointwiseGrad<'_, T> {
    /// A group's gradients over some pixels.
    fn task<S: Element<Wide = T>>(
        &self,
        tape: &Tape<'_, '_, S>,
        g: usize,
        pixels: Range<usize>,
        part: usize,
        sums: &mut [NormSums],
    ) {
        let (step, tile, pass) = (self.step, self.tile, tape.pass);
        let (k, m, most) = (self.conv.group_in, self.conv.group_out, step.source.most_rows);
        let sizes = [self.products.memory(), k * tile, m * tile, k * tile, k * most * tile];
        scratch::with(sizes.iter().sum(), |memory: &mut [T]| {
            let [weight_slots, x_rows, grad_rows, grad_x, slopes] = cut(memory, sizes);
            weight_slots.fill(T::default());
            // SAFETY: sums of this part and group alone.
            let (weight_sums, bias) = unsafe { self.grads.of(part, g) };
            let (mut a_offsets, mut b_offsets) = (vec![0; m], vec![0; k]);
            for pixels in chunks(pixels, tile) {
                // SAFETY: all that read the value come later in the program and have added their
                // gradients.
                let a = unsafe { tape.read_grad_rows(step.value, g * m, &pixels, grad_rows, tile, &mut a_offsets) };
                // SAFETY: the forward pass wrote the values.
                let b = unsafe {
                    let slopes = step.differentiate.then_some(&mut *slopes);
                    pass.load_rows(&step.source, g * k, &pixels, x_rows, tile, &mut b_offsets, slopes)
                };
                if self.conv.bias.is_some() {
                    for (sum, &offset) in bias.iter_mut().zip(&a_offsets) {
                        // SAFETY: one of the gradient's rows.
                        *sum += pass.isa.run(Sum(unsafe { std::slice::from_raw_parts(a.add(offset), pixels.len()) }));
                    }
                }
                let rows = |base, offsets| Rows { base, offsets, image_stride: 0, prefetch: 0 };
                // SAFETY: rows of these pixels.
                unsafe {
                    self.products.add(rows(a, &a_offsets), rows(b, &b_offsets), [1, pixels.len()], weight_slots);
                }
                if step.differentiate {
                    self.multiply(pass, g, (a, &a_offsets), grad_x, pixels.len());
                    let (values, channels) = (Some((&*x_rows, tile)), g * k..(g + 1) * k);
                    // SAFETY: the group's channels and these images are this task's own.
                    unsafe {
                        let (grads, slopes) = ((&*grad_x, tile), Some((&*slopes, most * tile)));
                        tape.accumulate_grads(&step.source, channels, &pixels, grads, slopes, values, &mut *sums);
                    }
                }
            }
            self.products.finish(weight_slots, weight_sums);
        });
    }

    /// The gradient by a group's input channels over some pixels.
    fn multiply<S: Element<Wide = T>>(
        &self,
        pass: &Pass<'_, S>,
        g: usize,
        (grad, offsets): (*const T, &[usize]),
        grad_x: &mut [T],
        pixels: usize,
    ) {
        let y_offsets: Vec<_> = (0..self.conv.group_in).map(|i| i * self.tile).collect();
        for block in &self.packed.blocks {
            let (weights, y) = (self.packed.block(g, block), (grad_x.as_mut_ptr(), &y_offsets[block.clone()]));
            // SAFETY: the gradient's rows, and rows of `grad_x`.
            unsafe { multiply_rows(pass.isa, (grad, offsets), weights, Init::Zero, y, pixels, [0; 2]) };
        }
    }
}
