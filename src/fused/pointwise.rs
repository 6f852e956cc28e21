//! Pointwise convolutions of a fused network.

use std::ops::Range;

use super::program::{Conv, Step};
use super::{PARTS, Pass, Statistics, Tape, merge};
use crate::conv1x1::dot_nt::RowProducts;
use crate::memory;
use crate::microkernels::conv1x1_nchw::{ConvHeight, ConvRows, Rows, Start};
use crate::microkernels::reduce::Sum;
use crate::parallel::{Shared, add_parts};
use crate::pool::{chunks, part};
use crate::scratch::{self, cut};
use crate::simd::element::WideElement;
use crate::simd::mul_acc::Fma;
use crate::simd::{IsaKind, Promised};

/// Values of a group's rows in a tile, about: in float32 as much as the L2 cache holds, because each call of a kernel costs
/// tens of nanoseconds. (The pointwise steps of a kEffNet-B0 at 32 x 32, 64 images, take 396, 311, 295, 285, 276 ms with 32,
/// 64, 128, 256, 512 Ki where the L2 cache has 1 MiB.)
const TILE_VALUES: usize = 256 << 10;
/// Pixels of a tile. (275 ms with at most 4,096, 285 with 1,024.)
const TILE_PIXELS: (usize, usize) = (64, 4096);
/// Pixels of a task of the backward pass, about, and the fewest tasks: each has to clear and to add up a vector of sums for
/// every weight of its group. (The way back through the pointwise convolutions of a kMobileNet D6_32ch takes 97 ms of 16
/// images of 224 x 224 in tasks of an image or two, and 86 in these.)
const TASK_PIXELS: usize = 2048;
const TASKS: usize = 64;
/// Tasks of the forward pass, at least, where there are pixels enough: one image has few. (24 to 144 channels in one group at
/// 56 x 56 take two threads 282 us in three tasks, 177 in eight.)
const FORWARD_TASKS: usize = 8;

/// Pixels of a tile of `rows` rows: a multiple of all vectors' lengths.
fn tile_pixels(rows: usize) -> usize {
    (TILE_VALUES / rows / 64 * 64).clamp(TILE_PIXELS.0, TILE_PIXELS.1)
}

/// Weights in the order in which the kernel reads them: for each group, for each block of output rows,
/// `[input row][output row]`.
pub(super) struct Packed<T> {
    weights: Vec<T>,
    /// One for each output row of all groups, or nothing.
    bias: Vec<T>,
    group: usize,
    inputs: usize,
    /// Output rows of a group in blocks.
    pub blocks: Vec<Range<usize>>,
}

impl<T: WideElement> Packed<T> {
    /// Packs `weight(group, output row, input row)`.
    pub fn new(
        isa: IsaKind,
        groups: usize,
        outputs: usize,
        inputs: usize,
        weight: impl Fn(usize, usize, usize) -> T,
    ) -> Self {
        Self::of_taps(isa, groups, outputs, inputs, &[Some(0)], |g, o, i, _| weight(g, o, i))
    }

    /// Packs `weight(group, output row, input channel, tap)`, an input row being a channel seen through one of `taps`; a
    /// tap that is none weighs nothing.
    pub fn of_taps(
        isa: IsaKind,
        groups: usize,
        outputs: usize,
        channels: usize,
        taps: &[Option<usize>],
        weight: impl Fn(usize, usize, usize, usize) -> T,
    ) -> Self {
        let count = outputs.div_ceil(isa.run(ConvHeight { four: false }));
        let blocks: Vec<_> = (0..count).map(|i| part(outputs, count, i)).collect();
        let inputs = channels * taps.len();
        let mut weights = Vec::new();
        memory::reserve(&mut weights, groups * outputs * inputs);
        for (g, block) in (0..groups).flat_map(|g| blocks.iter().map(move |block| (g, block))) {
            for (channel, tap) in (0..channels).flat_map(|channel| taps.iter().map(move |&tap| (channel, tap))) {
                let weight = |o| tap.map_or(T::default(), |tap| weight(g, o, channel, tap));
                weights.extend(block.clone().map(weight));
            }
        }
        Self { weights, bias: Vec::new(), group: outputs * inputs, inputs, blocks }
    }

    /// These weights and a bias.
    pub fn with_bias(self, bias: Vec<T>) -> Self {
        Self { bias, ..self }
    }

    /// Those of inputs that are multiplied by these factors before.
    fn scaled(&self, factors: &[T]) -> Self {
        let (mut weights, blocks) = (self.weights.clone(), self.blocks.clone());
        for (group, factors) in weights.chunks_exact_mut(self.group).zip(factors.chunks_exact(self.inputs)) {
            for block in &blocks {
                let rows = group[block.start * self.inputs..block.end * self.inputs].chunks_exact_mut(block.len());
                for (row, &factor) in rows.zip(factors) {
                    row.iter_mut().for_each(|weight| *weight = *weight * factor);
                }
            }
        }
        Self { weights, blocks, bias: self.bias.clone(), ..*self }
    }

    /// The weights of a block of a group.
    pub fn block(&self, group: usize, block: &Range<usize>) -> &[T] {
        &self.weights[group * self.group..][block.start * self.inputs..block.end * self.inputs]
    }

    /// The bias of these of all output rows, if there is one.
    pub fn bias(&self, outputs: Range<usize>) -> Option<&[T]> {
        (!self.bias.is_empty()).then(|| &self.bias[outputs])
    }

    /// The weights of groups of one block each.
    pub fn groups(&self, groups: &Range<usize>) -> &[T] {
        &self.weights[groups.start * self.group..groups.end * self.group]
    }
}

impl<T: WideElement> Pass<'_, T> {
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
        let mut partial = vec![(0.0, 0.0, 0.0); parts * conv.groups * m];
        let shared = Shared(partial.as_mut_ptr());
        let rows = self.rows(step.value);
        let offsets: Vec<_> = (0..m).map(|o| o * len).collect();
        self.for_tasks(conv.groups, parts, |g, p| {
            scratch::with(k * tile, |buffer: &mut [T]| {
                // SAFETY: statistics of this part and group alone.
                let statistics =
                    unsafe { std::slice::from_raw_parts_mut(shared.ptr().add((p * conv.groups + g) * m), m) };
                let mut x_offsets = vec![0; k];
                for pixels in chunks(part(len, parts, p), tile) {
                    let x = if scaled.is_some() {
                        self.row_places(&step.source.rows[g * k..], pixels.start, &mut x_offsets)
                    } else {
                        // SAFETY: sources are values of earlier steps.
                        unsafe { self.load_rows(&step.source, g * k, &pixels, buffer, tile, &mut x_offsets, None) }
                    };
                    for block in &packed.blocks {
                        // SAFETY: rows of the source, and these pixels of the value's rows, which are this task's own.
                        let kernel = unsafe {
                            Promised::new_unchecked(ConvRows {
                                products: Fma,
                                x,
                                x_offsets: &x_offsets,
                                weights: packed.block(g, block),
                                y: rows.ptr().add(g * m * len + pixels.start),
                                y_offsets: &offsets[block.clone()],
                                pixels: pixels.len(),
                                ahead: [0, pixels.len()],
                                start: packed.bias(g * m + block.start..g * m + block.end).into(),
                            })
                        };
                        self.isa.run(kernel);
                        let channels = g * m + block.start..g * m + block.end;
                        // SAFETY: just written.
                        unsafe { self.complete(step.value, channels, pixels.clone(), &mut statistics[block.clone()]) };
                    }
                }
            });
        });
        merge_parts(&partial, conv.groups * m)
    }
}

/// The statistics of each channel from those of its parts.
pub(super) fn merge_parts(partial: &[Statistics], channels: usize) -> Vec<Statistics> {
    let parts = || partial.chunks_exact(channels);
    (0..channels).map(|c| parts().map(|part| part[c]).fold((0.0, 0.0, 0.0), merge)).collect()
}

impl<T: WideElement> Tape<'_, '_, T> {
    /// Goes back through a pointwise convolution.
    pub(super) fn pointwise(&mut self, step: &Step, conv: &Conv) {
        let pass = self.pass;
        let (groups, k, m) = (conv.groups, conv.group_in, conv.group_out);
        let weights = &pass.parameters[conv.weight..][..conv.weights()];
        let packed = Packed::new(pass.isa, groups, k, m, |g, i, o| weights[conv.index(g, o, i, 0)]);
        let pixels = step.source.pixels();
        let most = step.source.most_rows;
        let tile = tile_pixels((2 + most) * k + m);
        let parts = pass.parts(pixels).min((pass.count * pixels / TASK_PIXELS).max(TASKS.div_ceil(groups)));
        let mut partial = memory::filled(T::default(), parts * groups * m * k);
        let mut bias = vec![0.0; parts * groups * m];
        let (shared, shared_bias) = (Shared(partial.as_mut_ptr()), Shared(bias.as_mut_ptr()));
        let products = RowProducts::<T, _>::new(pass.isa, Fma, [m, k], tile);
        let y_offsets: Vec<_> = (0..k).map(|i| i * tile).collect();
        self.give_back(&step.source, groups, parts, |this, g, images, p, sums| {
            let sizes = [products.memory(), k * tile, m * tile, k * tile, k * most * tile];
            scratch::with(sizes.iter().sum(), |memory: &mut [T]| {
                let [products_sums, x_rows, grad_rows, grad_x, slopes] = cut(memory, sizes);
                products_sums.fill(T::default());
                // SAFETY: sums of this part and group alone.
                let (weight_sums, bias) = unsafe {
                    let at = p * groups + g;
                    (
                        std::slice::from_raw_parts_mut(shared.ptr().add(at * m * k), m * k),
                        std::slice::from_raw_parts_mut(shared_bias.ptr().add(at * m), m),
                    )
                };
                let (mut a_offsets, mut b_offsets) = (vec![0; m], vec![0; k]);
                for pixels in chunks(images.start * pixels..images.end * pixels, tile) {
                    // SAFETY: all that read the value come later in the program and have given their gradients.
                    let a = unsafe { this.take_rows(step.value, g * m, &pixels, grad_rows, tile, &mut a_offsets) };
                    // SAFETY: the forward pass wrote the values.
                    let b = unsafe {
                        let slopes = step.differentiate.then_some(&mut *slopes);
                        pass.load_rows(&step.source, g * k, &pixels, x_rows, tile, &mut b_offsets, slopes)
                    };
                    if conv.bias.is_some() {
                        for (sum, &offset) in bias.iter_mut().zip(&a_offsets) {
                            // SAFETY: one of the gradient's rows.
                            *sum +=
                                pass.isa.run(Sum(unsafe { std::slice::from_raw_parts(a.add(offset), pixels.len()) }));
                        }
                    }
                    let (rows_a, rows_b) = (
                        Rows { base: a, offsets: &a_offsets, image_stride: 0, ahead: 0 },
                        Rows { base: b, offsets: &b_offsets, image_stride: 0, ahead: 0 },
                    );
                    // SAFETY: rows of these pixels.
                    unsafe { products.add(rows_a, rows_b, [1, pixels.len()], products_sums) };
                    if !step.differentiate {
                        continue;
                    }
                    for block in &packed.blocks {
                        // SAFETY: the gradient's rows, and rows of `grad_x`.
                        let kernel = unsafe {
                            Promised::new_unchecked(ConvRows {
                                products: Fma,
                                x: a,
                                x_offsets: &a_offsets,
                                weights: packed.block(g, block),
                                y: grad_x.as_mut_ptr(),
                                y_offsets: &y_offsets[block.clone()],
                                pixels: pixels.len(),
                                ahead: [0, 0],
                                start: Start::Zero,
                            })
                        };
                        pass.isa.run(kernel);
                    }
                    let mut sums = &mut *sums;
                    for (i, grad) in grad_x.chunks_exact(tile).enumerate() {
                        let rows = step.source.starts[g * k + i + 1] - step.source.starts[g * k + i];
                        let (own, rest) = sums.split_at_mut(rows);
                        sums = rest;
                        let row = i * tile..i * tile + pixels.len();
                        let (slopes, values) = (Some(&slopes[i * most * tile..]), Some(&x_rows[row]));
                        let grad = &grad[..pixels.len()];
                        // SAFETY: the group's channels and these images are this task's own.
                        unsafe { this.give(&step.source, g * k + i, pixels.clone(), grad, slopes, values, own) };
                    }
                }
                products.finish(products_sums, weight_sums);
            });
        });
        self.write_weights(conv, parts, &mut partial, &bias);
    }

    /// Adds up the parts of a convolution's gradients, `[part][group][output][input][tap]` and `[part][output channel]`.
    pub(super) fn write_weights(&self, conv: &Conv, parts: usize, partial: &mut [T], bias: &[f64]) {
        let Conv { groups, group_in, group_out, .. } = *conv;
        // SAFETY: the places of this convolution's parameters.
        let write = |place: usize, value: T| unsafe { self.grad_parameters.ptr().add(place).write(value) };
        let channels = (0..groups).flat_map(|g| (0..group_out).map(move |o| (g, o)));
        let inputs = (0..group_in).flat_map(|i| (0..conv.taps()).map(move |tap| (i, tap)));
        let places = channels.flat_map(|(g, o)| inputs.clone().map(move |(i, tap)| conv.index(g, o, i, tap)));
        for (place, &sum) in places.zip(add_parts(partial, conv.weights())) {
            write(conv.weight + place, sum);
        }
        if let Some(place) = conv.bias {
            for o in 0..groups * group_out {
                write(place + o, T::from_f64((0..parts).map(|p| bias[p * groups * group_out + o]).sum()));
            }
        }
    }
}
