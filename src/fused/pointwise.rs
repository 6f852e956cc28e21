//! Pointwise convolutions of a fused network.

use std::ops::Range;

use super::PARTS;
use super::backward::Tape;
use super::conv::{ParameterGrads, PartSums, multiply_blocks, multiply_rows};
use super::pack::Packed;
use super::pass::{Pass, Statistics, is_stored};
use super::program::{Conv, Step};
use super::source::NormSums;
use crate::conv1x1::dot_nt::MatmulNt;
use crate::microkernels::conv1x1_nchw::{Init, MAX_ROWS, Output};
use crate::microkernels::dot_nt::Rows;
use crate::microkernels::reduce::Sum;
use crate::pool::chunks;
use crate::pool::part;
use crate::scratch::{self, cut};
use crate::simd::element::{Element, is_wide};
use crate::simd::mul_acc::{Fma, MulAcc};
use crate::simd::{IsaKind, line};

/// Values of a group's rows in a tile, about: in float32 as much as the L2 cache holds, because
/// each call of a kernel costs tens of nanoseconds. (Measured: docs/ALGORITHMS.md.)
const TILE_VALUES: usize = 256 << 10;
/// Pixels of a tile: at least, at most.
const TILE_PIXELS: (usize, usize) = (64, 4096);
/// Input channels that a tile of the backward pass takes together, about: more pixels then fit into
/// the cache, so that weight gradients go through it less often.
const TOGETHER: usize = 128;
/// Pixels of a task of the backward pass, about, and the fewest tasks: each has to clear and to add
/// up a vector of sums for every weight of its group.
const TASK_PIXELS: usize = 2048;
const TASKS: usize = 64;
/// The same where a group has many weights, which are more than all else that a task has to do.
const WIDE_TASK_PIXELS: usize = 512;
const WIDE_TASKS: usize = 4;
/// Tasks of the forward pass, at least, where each has that many pixels: one image has few.
const FORWARD_TASKS: usize = 8;
const FORWARD_PIXELS: usize = 192;

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
        if self.weights(step).by_channels {
            self.pointwise_by_channels(step, conv);
            return Vec::new();
        }
        match S::bf16_dot(self.isa) {
            Some(pairs) => self.pointwise_with::<S, _>(pairs, step, conv),
            None => self.pointwise_with::<S::Wide, _>(Fma, step, conv),
        }
    }

    /// The same with rows of `T`: those of the values as they are stored, or what they are computed
    /// with.
    fn pointwise_with<T: Element<Wide = S::Wide>, M: MulAcc<T>>(
        &self,
        mul_acc: M,
        step: &Step,
        conv: &Conv,
    ) -> Vec<Statistics> {
        let (k, m) = (conv.group_in, conv.group_out);
        let len = self.row_len(step.value);
        // Either the weights are scaled or the pixels, whichever are fewer.
        let gates = if len < m { None } else { self.gates(&step.source) };
        let scaled = gates.map(|gates| self.weights(step).scaled(&gates));
        let packed = scaled.as_ref().unwrap_or_else(|| self.weights(step));
        let tile = tile_pixels(k + m);
        let parts = len.div_ceil(tile).max(FORWARD_TASKS.div_ceil(conv.groups).min(len / FORWARD_PIXELS));
        let parts = parts.clamp(1, PARTS);
        // Fewer tasks than threads: some share a group's output channels.
        let sets = self.threads.div_ceil(conv.groups * parts).min(packed.blocks.len());
        let sums = PartSums::statistics(self, step.value, parts);
        let pitch = tile + line::<T>();
        let highest = packed.blocks.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        let sizes = [k * pitch, if is_stored::<S, T>() { 0 } else { highest * tile }];
        let wide = if is_wide::<T>() { 0 } else { tile };
        self.for_tasks(conv.groups * sets, parts, |task, p| {
            let (g, blocks) = (task / sets, &packed.blocks[part(packed.blocks.len(), sets, task % sets)]);
            let multiply = |memory: &mut [T], wide: &mut [S::Wide]| {
                let [buffer, results] = cut(memory, sizes);
                let mut x_offsets = vec![0; k];
                for pixels in chunks(part(len, parts, p), tile) {
                    let (source, offsets) = (&step.source, &mut x_offsets[..]);
                    let x = if scaled.is_some() {
                        self.row_offsets(&source.rows[g * k..], pixels.start, offsets)
                    } else {
                        let (buffer, wide) = ((&mut *buffer, pitch), (&mut *wide, 0));
                        // SAFETY: sources are values of earlier steps.
                        unsafe { self.load_rows(source, g * k, &pixels, buffer, wide, offsets, None) }
                    };
                    for block in blocks {
                        let channels = g * m + block.start..g * m + block.end;
                        let (weights, bias) = (packed.block(g, block), packed.bias(channels.clone()));
                        let (y, pitch) = self.results(step.value, channels.start, pixels.start, results, tile);
                        let offsets: [_; MAX_ROWS] = std::array::from_fn(|o| o * pitch);
                        let (kernel, init) = ((self.isa, mul_acc), Init::wide_bias(bias));
                        // SAFETY: rows of the source, and of the results, which are this task's
                        // own, as are the statistics.
                        unsafe {
                            let (rows, ahead) = ((Output::Stored(y.ptr()), &offsets[..block.len()]), [0, pixels.len()]);
                            multiply_rows(kernel, (x, &x_offsets), weights, init, rows, pixels.len(), ahead);
                            let statistics = sums.of(p, channels.clone());
                            self.apply_epilogue(step.value, channels, pixels.clone(), (y, pitch), statistics);
                        }
                    }
                }
            };
            scratch::with(wide, |wide: &mut [S::Wide]| {
                scratch::with(sizes.iter().sum(), |memory: &mut [T]| multiply(memory, wide));
            });
        });
        sums.merged()
    }
}

/// The way back through a pointwise convolution, by products of rows of `T`.
struct PointwiseGrad<'s, T: Element, M> {
    step: &'s Step,
    conv: &'s Conv,
    mul_acc: M,
    /// The weights that bring the gradient back, if it is wanted.
    packed: Packed<T::Wide>,
    /// Blocks of these whose channels are taken together.
    sets: Vec<Range<usize>>,
    /// Pixels of a tile.
    tile: usize,
    grads: ParameterGrads<T::Wide>,
}

impl<S: Element> Tape<'_, '_, S> {
    /// Goes back through a pointwise convolution.
    pub(super) fn pointwise(&mut self, step: &Step, conv: &Conv) {
        match S::bf16_dot(self.pass.isa) {
            Some(pairs) => self.pointwise_with::<S, _>(pairs, step, conv),
            None => self.pointwise_with::<S::Wide, _>(Fma, step, conv),
        }
    }

    /// The same with rows of `T`: see the forward pass.
    fn pointwise_with<T: Element<Wide = S::Wide>, M: MulAcc<T>>(&mut self, mul_acc: M, step: &Step, conv: &Conv) {
        let pass = self.pass;
        let (groups, k, m) = (conv.groups, conv.group_in, conv.group_out);
        let weights = pass.conv_weights(conv);
        let (pixels, all) = (step.source.pixels(), pass.count * step.source.pixels());
        let strides = [conv.index(1, 0, 0, 0), conv.index(0, 0, 1, 0), conv.index(0, 1, 0, 0)];
        let packed = Packed::strided(pass.isa, [groups, k, m], weights, strides);
        let packed = if M::TERMS > 1 { packed.paired::<T, M>(pass.isa, mul_acc) } else { packed };
        let (blocks, count) = (packed.blocks.len(), k.div_ceil(TOGETHER).min(packed.blocks.len()));
        let tile = tile_pixels((2 + step.source.most_rows) * k.div_ceil(count) + m);
        let tasks = TASKS.div_ceil(groups).min((all / WIDE_TASK_PIXELS).max(WIDE_TASKS));
        let parts = pass.parts(pixels).min((all / TASK_PIXELS).max(tasks));
        let back = PointwiseGrad {
            step,
            conv,
            mul_acc,
            sets: (0..count).map(|set| part(blocks, count, set)).collect(),
            packed,
            tile,
            grads: ParameterGrads::new(conv, parts),
        };
        self.backprop_source(&step.source, groups, parts, |this, g, images, p, sums| {
            back.task(this, g, images.start * pixels..images.end * pixels, p, sums);
        });
        back.grads.write(conv, self.grad_parameters);
    }
}

impl<T: Element, M: MulAcc<T>> PointwiseGrad<'_, T, M> {
    /// A group's input channels of a set, and what sums their products with its gradient.
    fn set(&self, isa: IsaKind, blocks: &Range<usize>) -> (Range<usize>, MatmulNt<T, M>) {
        let blocks = &self.packed.blocks[blocks.clone()];
        let channels = blocks[0].start..blocks[blocks.len() - 1].end;
        let size = [self.conv.group_out, channels.len()];
        (channels, MatmulNt::new(isa, self.mul_acc, size, self.tile))
    }

    /// A group's gradients over some pixels.
    fn task<S: Element<Wide = T::Wide>>(
        &self,
        tape: &Tape<'_, '_, S>,
        g: usize,
        pixels: Range<usize>,
        part: usize,
        sums: &mut [NormSums],
    ) {
        let (step, pass, pitch) = (self.step, tape.pass, self.tile + line::<T>());
        let (k, m, most) = (self.conv.group_in, self.conv.group_out, step.source.most_rows);
        let sets: Vec<_> = self.sets.iter().map(|blocks| self.set(pass.isa, blocks)).collect();
        let together = sets.iter().map(|(channels, _)| channels.len()).max().unwrap_or(0);
        let slots = sets.iter().map(|(_, products)| products.memory()).sum();
        // Rounded rows come from wide ones; the gradients by gates want those of all channels.
        let gated = step.differentiate && step.source.rows.iter().any(|row| row.gate.is_some());
        let (wide_rows, wide_pitch) = if gated { (together, pitch) } else { (1, 0) };
        let wide = if is_wide::<T>() { 0 } else { wide_rows * pitch };
        let sizes = [slots, wide, together * pitch, together * most * pitch];
        let row_sizes = [together * pitch, m * pitch];
        let add = |memory: &mut [T::Wide], rows: &mut [T]| {
            let [weight_slots, wide, grad_x, slopes] = cut(memory, sizes);
            let [x_rows, grad_rows] = cut(rows, row_sizes);
            weight_slots.fill(T::Wide::default());
            // SAFETY: sums of this part and group alone.
            let (weight_sums, bias) = unsafe { self.grads.of(part, g) };
            let (mut a_offsets, mut b_offsets) = (vec![0; m], vec![0; k]);
            for pixels in chunks(pixels, self.tile) {
                // SAFETY: all that read the value come later in the program and have added their
                // gradients.
                let a = unsafe {
                    let grad_rows = (&mut *grad_rows, pitch);
                    tape.read_grad_rows(step.value, g * m, &pixels, grad_rows, wide, &mut a_offsets)
                };
                if self.conv.bias.is_some() {
                    for (sum, &offset) in bias.iter_mut().zip(&a_offsets) {
                        // SAFETY: one of the gradient's rows.
                        *sum += pass.isa.run(Sum(unsafe { std::slice::from_raw_parts(a.add(offset), pixels.len()) }));
                    }
                }
                let mut slots = &mut *weight_slots;
                for ((set, products), blocks) in sets.iter().zip(&self.sets) {
                    let (own, rest) = slots.split_at_mut(products.memory());
                    slots = rest;
                    let (channels, b_offsets) = (g * k + set.start..g * k + set.end, &mut b_offsets[..set.len()]);
                    // SAFETY: the forward pass wrote the values; rows of these pixels.
                    unsafe {
                        let slopes = step.differentiate.then_some(&mut *slopes);
                        let (x_rows, wide) = ((&mut *x_rows, pitch), (&mut *wide, wide_pitch));
                        let b = pass.load_rows(&step.source, channels.start, &pixels, x_rows, wide, b_offsets, slopes);
                        let rows = |base, offsets| Rows { base, offsets, image_stride: 0, prefetch: 0 };
                        products.add(rows(a, &a_offsets), rows(b, b_offsets), [1, pixels.len()], own);
                    }
                    if step.differentiate {
                        self.multiply(pass, (g, blocks.clone()), (a, &a_offsets), (&mut *grad_x, pitch), pixels.len());
                        let rows = &step.source.starts[g * k..];
                        let sums = &mut sums[rows[set.start] - rows[0]..rows[set.end] - rows[0]];
                        let (grads, slopes) = ((&*grad_x, pitch), Some((&*slopes, most * pitch)));
                        let values = T::as_wide(x_rows).or(gated.then_some(&*wide)).map(|values| (values, pitch));
                        // SAFETY: the group's channels and these images are this task's own.
                        unsafe { tape.accumulate_grads(&step.source, channels, &pixels, grads, slopes, values, sums) };
                    }
                }
            }
            let mut slots = &*weight_slots;
            for (set, products) in &sets {
                let (own, rest) = slots.split_at(products.memory());
                slots = rest;
                products.finish(own, &mut weight_sums[set.start..], k);
            }
        };
        scratch::with(sizes.iter().sum(), |memory: &mut [T::Wide]| {
            scratch::with(row_sizes.iter().sum(), |rows: &mut [T]| add(memory, rows));
        });
    }

    /// The gradient by the input channels of some of a group's blocks over some pixels.
    fn multiply<S: Element<Wide = T::Wide>>(
        &self,
        pass: &Pass<'_, S>,
        (g, blocks): (usize, Range<usize>),
        grad: (*const T, &[usize]),
        (grad_x, pitch): (&mut [T::Wide], usize),
        pixels: usize,
    ) {
        let blocks = &self.packed.blocks[blocks];
        let channels = 0..self.conv.group_in;
        let y_offsets: Vec<_> = channels.map(|i| i.saturating_sub(blocks[0].start) * pitch).collect();
        let y = (grad_x.as_mut_ptr(), &y_offsets[..]);
        // SAFETY: the gradient's rows, and rows of `grad_x`.
        unsafe { multiply_blocks((pass.isa, self.mul_acc), grad, (&self.packed, g), blocks, None, y, pixels) };
    }
}
