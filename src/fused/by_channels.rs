//! Pointwise convolutions in inference whose images have few pixels, as the 7 x 7 at the end of a
//! network: rows of pixels leave a quarter of the vectors empty, or more. So vectors are made of
//! output channels here: the weights are in the role of the pixels and the pixels in that of the
//! weights, and what comes of it is transposed. The sums are the same.

use std::marker::PhantomData;
use std::ops::Range;

use super::conv::multiply_rows;
use super::pack::{CHANNELS, Packed};
use super::pass::Pass;
use super::program::{Conv, Step};
use crate::microkernels::conv1x1_nchw::{ConvHeight, Init, MAX_ROWS, Output};
use crate::microkernels::transpose::Transpose;
use crate::parallel::Shared;
use crate::pool::{parallel_for, part};
use crate::scratch;
use crate::simd::element::{Element, WideElement, is_wide};
use crate::simd::mul_acc::Fma;

/// Values that are worth a thread to gather them.
const GATHERED_VALUES: usize = 16 << 10;

/// A convolution whose vectors are made of output channels.
struct ByChannels<'s, T> {
    step: &'s Step,
    /// Input and output channels of a group.
    group: [usize; 2],
    packed: &'s Packed<T>,
    /// Pixels of all images, and tiles of them that registers hold beside a block of channels.
    len: usize,
    tiles: Vec<Range<usize>>,
    /// Where rows of weights start, in blocks of all widths but the last one's, and in that.
    starts: [Vec<usize>; 2],
}

impl<S: Element> Pass<'_, S> {
    /// Makes the value of a pointwise convolution whose weights are packed by channels.
    pub(super) fn pointwise_by_channels(&self, step: &Step, conv: &Conv) {
        assert!(is_wide::<S>() && self.stores_views, "training");
        let (group, len, packed) = ([conv.group_in, conv.group_out], self.row_len(step.value), self.weights(step));
        let count = len.div_ceil(self.isa.constant(ConvHeight::<S::Wide> { pixels: 0, values: PhantomData }));
        let last = packed.blocks[packed.blocks.len() - 1].len();
        let conv = ByChannels {
            step,
            group,
            packed,
            len,
            tiles: (0..count).map(|i| part(len, count, i)).collect(),
            starts: [CHANNELS, last].map(|width| (0..group[0]).map(|i| i * width).collect()),
        };
        let channels = step.source.channels();
        scratch::with(channels * len, |x: &mut [S::Wide]| {
            let shared = Shared(x.as_mut_ptr());
            let gates = self.gates(&step.source);
            let tasks = self.threads.min((channels * len).div_ceil(GATHERED_VALUES));
            parallel_for(self.threads, tasks, |i| {
                conv.gather(self, part(channels, tasks, i), gates.as_deref(), shared)
            });
            // Twice as many tasks as blocks: there are few.
            let halves = count.min(2);
            self.for_tasks(packed.blocks.len() * (channels / group[0]), halves, |task, half| {
                let (g, block) = (task / packed.blocks.len(), task % packed.blocks.len());
                conv.multiply(self, g, block, &conv.tiles[part(count, halves, half)], x);
            });
        });
    }
}

impl<T: WideElement> ByChannels<'_, T> {
    /// Where a tile's pixels of a group's input channels are: those of a channel together.
    fn tile(&self, g: usize, tile: &Range<usize>) -> Range<usize> {
        let k = self.group[0];
        g * k * self.len + k * tile.start..g * k * self.len + k * tile.end
    }

    /// Reads some channels of the source, times their gates.
    fn gather<S: Element<Wide = T>>(
        &self,
        pass: &Pass<'_, S>,
        channels: Range<usize>,
        gates: Option<&[T]>,
        x: Shared<T>,
    ) {
        let source = &self.step.source;
        scratch::with(self.len, |buffer: &mut [T]| {
            for channel in channels {
                let (g, j) = (channel / self.group[0], channel % self.group[0]);
                // SAFETY: sources are values of earlier steps.
                let row = unsafe {
                    match gates {
                        // Each channel is a row of a value, times its gate.
                        Some(_) => {
                            let row = &source.rows[channel];
                            S::widened(pass.isa, pass.row(row.value, row.channel, 0..self.len), buffer)
                        }
                        None => pass.load(source, channel, 0..self.len, buffer, None),
                    }
                };
                let gate = gates.map_or(T::ONE, |gates| gates[channel]);
                for tile in &self.tiles {
                    let start = self.tile(g, tile).start + j * tile.len();
                    // SAFETY: this channel's part of the tile, which is this task's own.
                    let to = unsafe { std::slice::from_raw_parts_mut(x.ptr().add(start), tile.len()) };
                    row[tile.clone()].iter().zip(to).for_each(|(&x, to)| *to = x * gate);
                }
            }
        });
    }

    /// Some tiles of a block of a group's output channels.
    fn multiply<S: Element<Wide = T>>(
        &self,
        pass: &Pass<'_, S>,
        g: usize,
        block: usize,
        tiles: &[Range<usize>],
        x: &[T],
    ) {
        let (blocks, pixels) = (&self.packed.blocks, tiles[0].start..tiles[tiles.len() - 1].end);
        let (starts, block) = (&self.starts[usize::from(block + 1 == blocks.len())], &blocks[block]);
        let (first, width) = (g * self.group[1] + block.start, block.len());
        scratch::with(pixels.len() * width, |y: &mut [T]| {
            let mut init = Init::Zero;
            if let Some(bias) = self.packed.bias(first..first + width) {
                y.chunks_exact_mut(width).for_each(|row| row.copy_from_slice(bias));
                init = Init::Output;
            }
            let (y, weights) = (y.as_mut_ptr(), self.packed.block(g, block).as_ptr());
            for tile in tiles {
                let rows: [_; MAX_ROWS] = std::array::from_fn(|r| (tile.start - pixels.start + r) * width);
                let y = (Output::Stored(y), &rows[..tile.len()]);
                // SAFETY: the rows of the block's weights, and the tile's rows of the results.
                unsafe {
                    multiply_rows((pass.isa, Fma), (weights, starts), &x[self.tile(g, tile)], init, y, width, [0; 2])
                };
            }
            let len = pixels.len() * width;
            let to = pass.results::<T>(self.step.value, first, pixels.start, &mut [], 0);
            // SAFETY: all results are one row here, as the readers do the same to all channels of a
            // convolution but for the norms, which are in its weights. These pixels of the value's
            // channels are this task's own.
            unsafe {
                pass.apply_view(self.step.value, first..first + 1, len, (Shared(y), len));
                pass.isa.run(Transpose::gather([pixels.len(), width], y, width, to.0.ptr(), to.1).ahead(0));
            }
        });
    }
}
