//! Convolutions' weights in the order in which the kernels read them.

use std::marker::PhantomData;
use std::ops::Range;

use super::Arguments;
use super::depthwise;
use super::program::{Conv, Kind, Step};
use crate::memory;
use crate::microkernels::conv1x1_nchw::ConvHeight;
use crate::microkernels::row_copy::NarrowRows;
use crate::microkernels::transpose::Transpose;
use crate::parallel::Shared;
use crate::pool::{chunks, parallel_for, part, threads_for};
use crate::scratch;
use crate::shape::WeightLayout;
use crate::simd::IsaKind;
use crate::simd::element::{Element, WideElement, writable};
use crate::simd::mul_acc::MulAcc;

/// What packing a weight takes, about.
const NANOSECONDS: f64 = 1.0;
/// Output rows of a block of [`Packed::by_channels`], at most: four of the longest vectors, or
/// eight, whose sums stay in registers beside as many pixels as these hold.
pub(super) const CHANNELS: usize = 64;
/// Images of fewer pixels leave much of the last vector of a row empty.
const FEW_PIXELS: usize = 64;
/// Channels from which on it pays to transpose the pixels.
const MANY_CHANNELS: usize = 32;

/// Packed weights: for each group, for each block of output rows, `[input row][output row]`.
pub(super) struct Packed<T> {
    weights: Vec<T>,
    /// One for each output row of all groups, or nothing.
    bias: Vec<T>,
    group: usize,
    inputs: usize,
    /// Output rows of a group in blocks.
    pub blocks: Vec<Range<usize>>,
    /// Whether vectors are made of output rows and not of pixels.
    pub by_channels: bool,
}

impl<T: WideElement> Packed<T> {
    /// Packs `weight(group, output row, input row)`.
    pub fn new(
        isa: IsaKind,
        groups: usize,
        outputs: usize,
        inputs: usize,
        weight: impl Fn(usize, usize, usize) -> T + Sync,
    ) -> Self {
        Self::of_taps(isa, groups, outputs, inputs, &[Some(0)], |g, o, i, _| weight(g, o, i))
    }

    /// Packs `weight(group, output row, input channel, tap)`, an input row being a channel seen
    /// through one of `taps`; a tap that is none weighs nothing.
    pub fn of_taps(
        isa: IsaKind,
        groups: usize,
        outputs: usize,
        channels: usize,
        taps: &[Option<usize>],
        weight: impl Fn(usize, usize, usize, usize) -> T + Sync,
    ) -> Self {
        Self::of_blocks(row_blocks::<T>(isa, outputs), [groups, outputs, channels * taps.len()], |g, block, rows| {
            let inputs = (0..channels).flat_map(|channel| taps.iter().map(move |&tap| (channel, tap)));
            for ((channel, tap), row) in inputs.zip(rows.chunks_exact_mut(block.len())) {
                let Some(tap) = tap else { continue };
                for (o, y) in block.clone().zip(row) {
                    *y = weight(g, o, channel, tap);
                }
            }
        })
    }

    /// Packs the weights at multiples of these strides for groups, output rows and input rows, of
    /// which one of the last two is 1. (Measured: docs/ALGORITHMS.md.)
    pub fn strided(isa: IsaKind, size: [usize; 3], weights: &[T], [group, output, input]: [usize; 3]) -> Self {
        let [groups, outputs, inputs] = size;
        let end = (groups - 1) * group + (outputs - 1) * output + (inputs - 1) * input;
        assert!(end < weights.len() && (output == 1 || input == 1), "strides");
        Self::of_blocks(row_blocks::<T>(isa, outputs), size, |g, block, rows| {
            let weights = &weights[g * group + block.start * output..];
            if output == 1 {
                for (i, row) in rows.chunks_exact_mut(block.len()).enumerate() {
                    row.copy_from_slice(&weights[i * input..][..block.len()]);
                }
                return;
            }
            let (size, len) = ([block.len(), inputs], block.len());
            // SAFETY: the last weight is inside, as was asserted, and the rows are as many.
            let block = unsafe { Transpose::gather(size, weights.as_ptr(), output, rows.as_mut_ptr(), len) };
            isa.run(block.ahead(0));
        })
    }

    /// Packs `weight(group, output row, input row)` for products whose vectors are made of output
    /// rows.
    pub fn by_channels(size: [usize; 3], weight: impl Fn(usize, usize, usize) -> T + Sync) -> Self {
        let blocks = chunks(0..size[1], CHANNELS).collect();
        let packed = Self::of_blocks(blocks, size, |g, block, rows| {
            for (i, row) in rows.chunks_exact_mut(block.len()).enumerate() {
                block.clone().zip(row).for_each(|(o, y)| *y = weight(g, o, i));
            }
        });
        Self { by_channels: true, ..packed }
    }

    /// Packs groups, output rows and input rows by `pack(group, output rows, weights)`, on all
    /// threads.
    fn of_blocks(
        blocks: Vec<Range<usize>>,
        [groups, outputs, inputs]: [usize; 3],
        pack: impl Fn(usize, &Range<usize>, &mut [T]) + Sync,
    ) -> Self {
        let count = blocks.len();
        let mut weights = memory::filled(T::default(), groups * outputs * inputs);
        let shared = Shared(weights.as_mut_ptr());
        parallel_for(threads_for(weights.len() as f64 * NANOSECONDS), groups * count, |task| {
            let (g, block) = (task / count, &blocks[task % count]);
            let start = (g * outputs + block.start) * inputs;
            // SAFETY: the block's own weights.
            let rows = unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(start), block.len() * inputs) };
            pack(g, block, rows);
        });
        Self { weights, bias: Vec::new(), group: outputs * inputs, inputs, blocks, by_channels: false }
    }

    /// These weights rounded to `S`, a step's rows packed into one as [`MulAcc::pack`] does.
    pub fn paired<S: Element<Wide = T>, M: MulAcc<S>>(self, isa: IsaKind, mul_acc: M) -> Self {
        let (outputs, steps, count) = (self.group / self.inputs, self.inputs.div_ceil(M::TERMS), self.blocks.len());
        let groups = self.weights.len() / self.group;
        let mut weights = memory::filled(T::default(), groups * outputs * steps);
        let shared = Shared(weights.as_mut_ptr());
        parallel_for(threads_for(self.weights.len() as f64 * NANOSECONDS), groups * count, |task| {
            let (g, block) = (task / count, &self.blocks[task % count]);
            let (rows, start) = (self.block(g, block), (g * outputs + block.start) * steps);
            // SAFETY: the block's own weights.
            let to = unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(start), block.len() * steps) };
            scratch::with(rows.len(), |rounded: &mut [S]| {
                let (x, y) = ((rows, rows.len()), (writable(rounded), rows.len()));
                isa.run(NarrowRows { x, y, size: [1, rows.len()], ahead: 0 });
                mul_acc.steps(isa, rounded, block.len(), to);
            });
        });
        Self { weights, group: outputs * steps, inputs: steps, ..self }
    }

    /// These weights and a bias.
    pub fn with_bias(self, bias: Vec<T>) -> Self {
        Self { bias, ..self }
    }

    /// Those of inputs that are multiplied by these factors before.
    pub fn scaled(&self, factors: &[T]) -> Self {
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

/// Output rows in blocks of nearly the same height, as many as a tile of the kernel has or fewer.
fn row_blocks<T: WideElement>(isa: IsaKind, outputs: usize) -> Vec<Range<usize>> {
    let count = outputs.div_ceil(isa.constant(ConvHeight::<T> { pixels: 0, values: PhantomData }));
    (0..count).map(|i| part(outputs, count, i)).collect()
}

/// Whether the vectors of a pointwise convolution's products are better made of its output
/// channels than of an image's pixels.
fn is_by_channels(conv: &Conv, pixels: usize) -> bool {
    let many = conv.group_in.min(conv.group_out) >= MANY_CHANNELS;
    conv.pointwise() && (pixels == 1 || pixels < FEW_PIXELS && many)
}

impl<T: WideElement> Arguments<'_, T> {
    /// Each step's weights for the forward pass, where it is a convolution. With scale and shift of
    /// all norms' channels, those of the norm that all readers of the result apply are part of its
    /// weights and bias.
    pub(super) fn packed(&self, affine: Option<&[(T, T)]>) -> Vec<Option<Packed<T>>> {
        let packed = |step: &Step| match &step.kind {
            Kind::Conv(conv) => Some(self.packed_conv(step, conv, affine)),
            Kind::Copy | Kind::Mean | Kind::Pool(_) => None,
        };
        self.program.steps.iter().map(packed).collect()
    }

    /// The same for values that are stored as `S`, with whose batch norms nothing is folded: what
    /// pointwise convolutions multiply in pairs, if they do so, is packed in pairs.
    pub(super) fn packed_for<S: Element<Wide = T>>(&self) -> Vec<Option<Packed<T>>> {
        let packed = self.packed(None);
        let Some(pairs) = S::bf16_dot(self.isa) else { return packed };
        let paired = |(step, packed): (&Step, Option<Packed<T>>)| match &step.kind {
            Kind::Conv(conv) if conv.pointwise() => packed.map(|packed| packed.paired::<S, _>(self.isa, pairs)),
            _ => packed,
        };
        self.program.steps.iter().zip(packed).map(paired).collect()
    }

    fn packed_conv(&self, step: &Step, conv: &Conv, affine: Option<&[(T, T)]>) -> Packed<T> {
        let weights = &self.parameters[conv.weight..][..conv.weights()];
        let value = &self.program.values[step.value];
        let taps = if conv.depthwise() {
            depthwise::forward::<T>(self.isa, step, conv, value.size()).order().to_vec()
        } else {
            (0..conv.taps()).map(Some).collect()
        };
        let (outputs, view) = (conv.group_out, value.view.as_ref());
        let norm = |channel: usize| Some(affine?[view?.norms[channel]?]);
        let scale: Vec<_> = (0..value.channels).map(|c| norm(c).map_or(T::ONE, |(scale, _)| scale)).collect();
        let weight = |g, o, i, tap| weights[conv.index(g, o, i, tap)] * scale[g * outputs + o];
        // A channel's taps follow each other, or there is one.
        let in_order = !conv.depthwise() && (conv.taps() == 1 || conv.layout == WeightLayout::Oi);
        let packed = if affine.is_some() && is_by_channels(conv, value.pixels()) {
            Packed::by_channels([conv.groups, outputs, conv.group_in], |g, o, i| weight(g, o, i, 0))
        } else if affine.is_none() && in_order {
            let size = [conv.groups, outputs, conv.group_in * conv.taps()];
            let input = if conv.taps() == 1 { conv.index(0, 0, 1, 0) } else { 1 };
            Packed::strided(self.isa, size, weights, [conv.index(1, 0, 0, 0), conv.index(0, 1, 0, 0), input])
        } else {
            Packed::of_taps(self.isa, conv.groups, outputs, conv.group_in, &taps, weight)
        };
        let bias = conv.bias.map(|start| &self.parameters[start..][..value.channels]);
        let own = |c: usize| bias.map_or(T::default(), |bias| bias[c] * scale[c]);
        let shift = |c: usize| own(c) + norm(c).map_or(T::default(), |(_, shift)| shift);
        let biased = bias.is_some() || (0..value.channels).any(|c| norm(c).is_some());
        packed.with_bias(if biased { (0..value.channels).map(shift).collect() } else { Vec::new() })
    }
}
