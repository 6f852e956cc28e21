//! Grouped pointwise convolution and its input gradient in NHWC, whose pixels have all channels
//! side by side.
//!
//! Where an interleaved output is not computed in its own order, pixels are computed in a cache and
//! permuted from there; transposed rows go to their channels by themselves.

use std::ops::Range;

use super::grouped::Grouped;
use super::nchw::GroupRows;
use super::pack::{Packed, WeightView};
use super::{GroupedProduct, TASKS_PER_THREAD};
use crate::interleave::{ChannelOrder, Permutation};
use crate::microkernels::grouped_nhwc::GroupedNhwc;
use crate::microkernels::outer::{OuterProducts, Pixels};
use crate::microkernels::row_copy::WidenRows;
use crate::microkernels::segmented_sum::SegmentedSum;
use crate::microkernels::transpose::Transpose;
use crate::parallel::Shared;
use crate::pool::{chunks, parallel_for, part};
use crate::scratch::{self, cut};
use crate::simd::Promised;
use crate::simd::element::{Element, writable};
use crate::simd::mul_acc::MulAcc;

/// Pixels of a transposed tile, where a step takes one row and where it takes two: as many vectors
/// of 16 as [`Conv1x1Nchw`](crate::microkernels::conv1x1_nchw::Conv1x1Nchw) takes at a time.
const PIXEL_TILES: [usize; 2] = [48, 32];
/// Channels that are transposed together, at least: whole cache lines are read.
const CHANNEL_TILE: usize = 64;
/// Bytes of a pixel that are transposed back together, at least.
const CHUNK_BYTES: usize = 256;
/// Bytes of a tile of pixels that stays as it is: the L1 cache, as every group returns to it.
const OUTER_BYTES: usize = 32 << 10;
/// Pixels of such a tile are a multiple of this, the rows of the kernel's tiles.
const OUTER_PIXELS: usize = 8;

/// Where tiles of results go.
struct Tile<T> {
    /// Its pixels.
    pixels: Range<usize>,
    /// The first one's channels.
    y: *mut T,
    /// Distance of pixels.
    y_stride: usize,
    /// Prefetch distance; 0 where results are in a cache.
    prefetch: usize,
}

impl GroupedProduct {
    /// Pixels of all images.
    fn pixels(&self) -> usize {
        self.images.count * self.images.pixels
    }

    /// Parts of the work for threads, each of whole units of `unit` pixels.
    fn parts(&self, threads: usize, unit: usize) -> usize {
        if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(self.pixels().div_ceil(unit)) }
    }

    /// What interleaves the output, or undoes that of the input; nothing where channels are in
    /// their own order.
    fn permutation(&self, order: Option<ChannelOrder>, inverse: bool) -> Option<Permutation> {
        Permutation::interleave(self.isa, &self.caps, order?, inverse, self.pixels())
    }

    /// Calls `body` for tiles of at most `tile` of this part's pixels, whose results go to the
    /// output itself or, with a permutation, to memory from which they go there permuted.
    fn tiles<T: Element>(
        &self,
        range: Range<usize>,
        tile: usize,
        permutation: Option<&Permutation>,
        y: Shared<T>,
        mut body: impl FnMut(Tile<T>),
    ) {
        let c_out = self.groups * self.group_out;
        let prefetch = tile * c_out;
        let output = |pixels: &Range<usize>| y.ptr().wrapping_add(pixels.start * c_out);
        let Some(permutation) = permutation else {
            return chunks(range, tile)
                .for_each(|pixels| body(Tile { y: output(&pixels), pixels, y_stride: c_out, prefetch }));
        };
        // Pixels in whole cache lines.
        let stride = c_out.next_multiple_of(self.caps.lanes);
        scratch::with(tile.min(range.len()) * stride, |memory: &mut [T]| {
            for pixels in chunks(range, tile) {
                body(Tile { pixels: pixels.clone(), y: memory.as_mut_ptr(), y_stride: stride, prefetch: 0 });
                let (x, strides) = (memory.as_ptr(), [stride, c_out]);
                // SAFETY: memory holds these pixels; those of y are this task's own.
                unsafe { permutation.run(x, output(&pixels), strides, pixels.len(), [0, prefetch]) };
            }
        });
    }

    /// Groups of one output channel, pixel after pixel: sums of neighbouring products.
    pub(super) fn segmented_sum<T: Element>(
        &self,
        threads: usize,
        x: &[T],
        weight: WeightView<'_, T>,
        bias: Option<&[T]>,
        y: Shared<T>,
    ) {
        let (groups, group_in, lanes) = (self.groups, self.group_in, self.caps.lanes);
        let c_in = groups * group_in;
        let permutation = self.permutation(self.out_order, false);
        // After `unit` pixels, pixels and vectors begin together.
        let unit = lanes / gcd(groups, lanes);
        let lens = [unit * c_in, bias.map_or(0, |_| unit * groups)];
        scratch::with(lens.iter().sum(), |memory: &mut [T::Wide]| {
            let [packed, wide_bias] = cut(memory, lens);
            for (i, packed) in packed.iter_mut().enumerate() {
                *packed = weight.get(i / group_in % groups, 0, i % group_in).widen();
            }
            if let Some(bias) = bias {
                wide_bias.iter_mut().enumerate().for_each(|(i, value)| *value = bias[i % bias.len()].widen());
            }
            let (weights, bias) = (&*packed, bias.map(|_| &*wide_bias));
            let (parts, units) = (self.parts(threads, unit), self.pixels().div_ceil(unit));
            // Without a permutation, results follow each other in memory, and all are one tile.
            let tile = if permutation.is_some() {
                outer_tile::<T>(c_in + groups).next_multiple_of(unit)
            } else {
                self.pixels().next_multiple_of(unit)
            };
            parallel_for(threads, parts, |task| {
                let units = part(units, parts, task);
                let range = units.start * unit..self.pixels().min(units.end * unit);
                scratch::with(if permutation.is_some() { tile * groups } else { 0 }, |memory: &mut [T]| {
                    for pixels in chunks(range, tile) {
                        let x = &x[pixels.start * c_in..pixels.end * c_in];
                        let (output, len) = (y.at(pixels.start * groups).ptr(), pixels.len() * groups);
                        let sums = if permutation.is_some() { memory.as_mut_ptr() } else { output };
                        // SAFETY: memory holds the pixels; those of y are this task's own.
                        unsafe {
                            let kernel = SegmentedSum { x, group_in, weights, bias, y: sums, len };
                            self.isa.run(Promised::new_unchecked(kernel));
                            if let Some(permutation) = &permutation {
                                permutation.run(sums, output, [groups; 2], pixels.len(), [0, tile * groups]);
                            }
                        }
                    }
                });
            });
        });
    }

    /// Several groups in a vector; an interleaved input is permuted first, an interleaved output
    /// last.
    pub(super) fn grouped<T: Element, M: MulAcc<T>>(
        &self,
        mul_acc: M,
        threads: usize,
        x: &[T],
        weight: WeightView<'_, T>,
        bias: Option<&[T]>,
        y: Shared<T>,
    ) {
        let groups = Grouped::new(self.problem.groups(), self.caps.lanes, M::TERMS);
        let groups = groups.unwrap_or_else(|| unreachable!("chosen where groups fit"));
        let (before, after) = (self.permutation(self.in_order, true), self.permutation(self.out_order, false));
        let (c_in, c_out) = (self.images.channels, self.groups * self.group_out);
        // Twice the L1 cache: vectors share no pixels' lines, but their indices and weights.
        let tile = 2 * outer_tile::<T>(c_in + c_out);
        let permuted = before.as_ref().map_or(0, |_| c_in.next_multiple_of(self.caps.lanes));
        let parts = self.parts(threads, OUTER_PIXELS);
        scratch::with(groups.weights(), |packed: &mut [T::Wide]| {
            groups.pack(mul_acc, |g, o, i| weight.get(g, o, i), packed);
            let each = groups.weights() / groups.vectors.len();
            let packed = &*packed;
            parallel_for(threads, parts, |task| {
                scratch::with(tile * permuted, |memory: &mut [T]| {
                    self.tiles(part(self.pixels(), parts, task), tile, after.as_ref(), y, |tile_of| {
                        let Tile { pixels, y, y_stride, prefetch } = tile_of;
                        let x = x[pixels.start * c_in..pixels.end * c_in].as_ptr();
                        let (x, x_stride, x_prefetch) = match &before {
                            Some(before) => {
                                let (to, strides) = (memory.as_mut_ptr(), [c_in, permuted]);
                                // SAFETY: the pixels exist in x, and memory has room for them.
                                unsafe { before.run(x, to, strides, pixels.len(), [tile * c_in, 0]) };
                                (to.cast_const(), permuted, 0)
                            }
                            None => (x, c_in, tile * c_in),
                        };
                        for (vector, weights) in groups.vectors.iter().zip(packed.chunks_exact(each)) {
                            // SAFETY: the pixels exist at x, with all channels, and at y.
                            self.isa.run(unsafe {
                                Promised::new_unchecked(GroupedNhwc {
                                    mul_acc,
                                    x,
                                    x_stride,
                                    y: y.add(vector.columns.start),
                                    y_stride,
                                    pixels: pixels.len(),
                                    columns: vector.columns.len(),
                                    sources: &groups.sources[vector.sources.clone()],
                                    index: groups.index(vector),
                                    weights,
                                    bias: bias.map(|bias| &bias[vector.columns.clone()]),
                                    prefetch: [x_prefetch, prefetch],
                                })
                            });
                        }
                    });
                });
            });
        });
    }

    /// Where each group's first input channel stands in a pixel, and the distance to the next one.
    fn group_starts(&self) -> Vec<[usize; 2]> {
        let start = |g: usize| {
            let index = |i: usize| self.in_order.map_or(i, |order| order.dst_index(i));
            let first = index(g * self.group_in);
            [first, if self.group_in > 1 { index(g * self.group_in + 1) - first } else { 1 }]
        };
        (0..self.groups).map(start).collect()
    }

    /// Pixels as they are, times matrices: for groups whose output channels fill vectors.
    pub(super) fn outer<T: Element, M: MulAcc<T>>(
        &self,
        mul_acc: M,
        threads: usize,
        x: &[T],
        weight: WeightView<'_, T>,
        bias: Option<&[T]>,
        y: Shared<T>,
    ) {
        let (k, m) = (self.group_in, self.group_out);
        let (c_in, c_out) = (self.images.channels, self.groups * m);
        let (permutation, starts) = (self.permutation(self.out_order, false), self.group_starts());
        // Values that are copied to be computed with count, too.
        let tile = outer_tile::<T>(if M::COPIES { 3 } else { 1 } * c_in + c_out);
        let rows: Vec<_> = (0..tile).map(|pixel| pixel * c_in).collect();
        let parts = self.parts(threads, OUTER_PIXELS);
        let steps = k.div_ceil(M::TERMS);
        scratch::with(c_out * steps, |packed: &mut [T::Wide]| {
            for (g, packed) in packed.chunks_exact_mut(steps * m).enumerate() {
                self.pack(mul_acc, weight, g, 0..m, packed);
            }
            let packed = &*packed;
            parallel_for(threads, parts, |task| {
                scratch::with(if M::COPIES { tile * c_in } else { 0 }, |memory: &mut [T::Wide]| {
                    self.tiles(part(self.pixels(), parts, task), tile, permutation.as_ref(), y, |tile_of| {
                        let Tile { pixels, y, y_stride, prefetch } = tile_of;
                        let x = &x[pixels.start * c_in..pixels.end * c_in];
                        let next = x.as_ptr().wrapping_add(tile * c_in);
                        let a: *const M::Value = if M::COPIES {
                            let (len, y) = (x.len(), writable(memory));
                            // The outer products prefetch what comes next, evenly.
                            self.isa.run(WidenRows { x: (x, len), y: (y, len), size: [1, len], ahead: 0 });
                            memory.as_ptr().cast()
                        } else {
                            x.as_ptr().cast()
                        };
                        for (g, &[first, stride]) in starts.iter().enumerate() {
                            // SAFETY: the pixels exist in x, with all of the group's channels, and
                            // at y.
                            self.isa.run(unsafe {
                                Promised::new_unchecked(OuterProducts {
                                    mul_acc,
                                    a: a.add(first),
                                    a_stride: stride * M::TERMS,
                                    a_rows: &rows[..pixels.len()],
                                    a_prefetch: 0,
                                    b: packed.as_ptr().add(g * steps * m),
                                    b_stride: m,
                                    b_prefetch: 0,
                                    terms: k,
                                    columns: m,
                                    out: Pixels {
                                        mul_acc,
                                        y: y.add(g * m),
                                        row: y_stride,
                                        bias: bias.map(|bias| &bias[g * m..][..m]),
                                        // Those of the next tile, a part of them for each group.
                                        next: next.wrapping_add(g * k * tile),
                                        prefetch,
                                    },
                                })
                            });
                        }
                    });
                });
            });
        });
    }

    /// Tiles of pixels are transposed into rows and back: the input by [`CHANNEL_TILE`], the output
    /// by [`Chunk`].
    pub(super) fn transposed<T: Element, M: MulAcc<T>>(
        &self,
        mul_acc: M,
        threads: usize,
        x: &[T],
        weight: WeightView<'_, T>,
        bias: Option<&[T]>,
        y: Shared<T>,
    ) {
        let tile = PIXEL_TILES[M::TERMS - 1].min(self.pixels().next_multiple_of(8));
        self.packed(mul_acc, weight, bias, tile, |packed| self.packed_transposed(threads, tile, x, packed, y));
    }

    fn packed_transposed<T: Element, M: MulAcc<T>>(
        &self,
        threads: usize,
        tile: usize,
        x: &[T],
        packed: Packed<'_, T, M>,
        y: Shared<T>,
    ) {
        let (k, m) = (self.group_in, self.group_out);
        let (c_in, c_out) = (self.images.channels, self.groups * m);
        let out_chunks = self.chunks::<T>(packed.blocks);
        // All at once where a group's channels are anywhere, or where chunks come back to it.
        let all = self.in_order.is_some() || out_chunks.len() > 1;
        let cluster = if all { self.groups } else { CHANNEL_TILE.div_ceil(k).min(self.groups) };
        let x_row = |c: usize| self.in_order.map_or(c % (cluster * k), |order| order.dst_index(c));
        let x_offsets: Vec<_> = (0..c_in).map(|c| x_row(c) * tile).collect();
        let mut y_offsets = vec![0; c_out];
        for Chunk { rows, columns, .. } in &out_chunks {
            for c in (0..self.groups).flat_map(|g| rows.clone().map(move |row| g * m + row)) {
                y_offsets[c] = (self.out_order.map_or(c, |order| order.dst_index(c)) - columns.start) * tile;
            }
        }
        let most = out_chunks.iter().map(|chunk| chunk.columns.len()).max().unwrap_or(0);
        let parts = self.parts(threads, tile);
        parallel_for(threads, parts, |task| {
            let sizes = [cluster * k * tile, most * tile];
            scratch::with(sizes.iter().sum(), |memory: &mut [T]| {
                let [x_rows, y_rows] = cut(memory, sizes);
                for range in chunks(part(self.pixels(), parts, task), tile) {
                    for Chunk { blocks, columns, .. } in &out_chunks {
                        let packed = Packed { blocks: &packed.blocks[blocks.clone()], y_offsets: &y_offsets, ..packed };
                        for group in 0..self.groups {
                            if group % cluster == 0 && blocks.start == 0 {
                                let size = [range.len(), cluster.min(self.groups - group) * k];
                                // SAFETY: pixels x channels of x go to channels x tile of x_rows.
                                self.isa.run(unsafe {
                                    let src = x.as_ptr().add(range.start * c_in + group * k);
                                    Transpose::gather(size, src, c_in, x_rows.as_mut_ptr(), tile)
                                });
                            }
                            let rows = GroupRows {
                                group,
                                first: 0,
                                x: x_rows.as_ptr(),
                                x_offsets: &x_offsets[group * k..][..k],
                                y: y_rows.as_mut_ptr(),
                                pixels: range.len(),
                                prefetch: [0, 0],
                            };
                            // SAFETY: offsets lie inside x_rows and y_rows, rows `tile` values
                            // long.
                            unsafe { self.group(rows, &packed) };
                        }
                        // SAFETY: the destination is this task's own pixels of y.
                        self.isa.run(unsafe {
                            let dst = y.ptr().add(range.start * c_out + columns.start);
                            Transpose::scatter([columns.len(), range.len()], y_rows.as_ptr(), tile, dst, c_out)
                        });
                    }
                }
            });
        });
    }

    /// Chunks of output rows: blocks of rows of all groups, of [`CHUNK_BYTES`] a pixel or more,
    /// where they are interleaved by the channels of a group; else all.
    fn chunks<T>(&self, blocks: &[Range<usize>]) -> Vec<Chunk> {
        let (groups, m) = (self.groups, self.group_out);
        let chunk = |some: Range<usize>| {
            let rows = blocks[some.start].start..blocks[some.end - 1].end;
            Chunk { blocks: some, columns: rows.start * groups..rows.end * groups, rows }
        };
        // Channel i of each group goes to the i-th `groups` channels.
        if self.out_order.is_none_or(|order| order.step != m) {
            return vec![chunk(0..blocks.len())];
        }
        let together = (CHUNK_BYTES / size_of::<T>()).div_ceil(blocks[0].len() * groups);
        chunks(0..blocks.len(), together).map(chunk).collect()
    }
}

/// Output rows of all groups that go to neighbouring channels, few enough to stay in the L1 cache
/// until they are transposed.
struct Chunk {
    /// Which blocks of each group's rows.
    blocks: Range<usize>,
    /// The rows.
    rows: Range<usize>,
    /// The output's channels that they are.
    columns: Range<usize>,
}

/// Pixels of a tile in NHWC that stays as it is.
pub(super) fn outer_tile<T>(channels: usize) -> usize {
    (OUTER_BYTES / (channels * size_of::<T>())).max(1).next_multiple_of(OUTER_PIXELS)
}

/// The greatest common divisor.
fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
