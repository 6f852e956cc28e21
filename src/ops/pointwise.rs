//! Grouped pointwise (1x1) convolution with interleaved output, and its gradients.
//!
//! Forward and input gradient are the same computation with the roles of the channels exchanged, so one driver,
//! [`Product`], serves both: it multiplies the rows of each group by a small matrix. An interleave is a table of
//! places for the output rows (forward) or the input rows (backward) and costs nothing.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::interleave::Permutation;
use super::row_products::RowProducts;
use super::side_by_side::SideBySide;
use super::{Shared, estimate};
use crate::isa::{Active, looks_ahead};
use crate::kernels::outer::{OuterProducts, Pixels, Totals};
use crate::kernels::pointwise::{ConvHeight, ConvRows, Rows, Start, SumColumns};
use crate::kernels::products::{Products, Single};
use crate::kernels::rows::Sum;
use crate::kernels::side_by_side::{Block, SideBySide as SideBySideRows, SideBySideSums, Source};
use crate::kernels::transpose::Transpose;
use crate::kernels::{Element, lanes, picks};
use crate::pool::{chunks, parallel_for, part, threads_for};
use crate::scratch::{self, cut};
use crate::shape::{Images, Order, Pointwise, interleave_places};

/// Values of a group's input rows that one pass in NCHW covers where the group needs several tiles of output rows, which
/// read them again: they stay in the L2 cache.
const PLANE_TILE: usize = 64 << 10;
/// Input rows of a group in NCHW that one pass takes, at most, where they are long: processors follow no more. (Input
/// gradients, 32 images, two threads of an Intel Xeon: 96 channels of 112 x 112 to 16 take 13.0 ms at once, 11.2 by 24, 144
/// of 56 x 56 to 24 3.8 and 3.2. 11 layers, 64 images, two threads of an AMD EPYC: 38.7 ms at once, 36.0 by 32, 38.2 by 24.
/// Groups of 32 rows by 16: a third slower.)
const PASS_ROWS: usize = 32;
/// Values of so many rows that one pass covers, and of a group's rows from which on they are long. (A half: 1 to 4 % slower;
/// 120 rows of 31 x 31, which are fewer, take 7 % more in passes.)
const PASS_TILE: usize = 128 << 10;
/// Bytes of a group's rows in NCHW, at most, for the next group's to be asked for meanwhile: both stay in the L2 cache. (With 369
/// KiB, 96 channels of 31 x 31, 1.04 ms become 0.92; with 461, 120 channels of them, 2.54 become 2.34 on an AMD EPYC, whose cache
/// has 1 MiB.)
const AHEAD_BYTES: usize = 480 << 10;
/// How many pixels ahead to ask for in longer rows. (The forward pass of 18 layers of kEffNet-B0 at 32x32 takes 23.5 ms
/// without asking ahead, 18.5 with; the input gradient 28 and 20.)
const AHEAD_PIXELS: usize = 1024;
/// Pixels of a task in NCHW, at least.
const PLANE_PART: usize = 256;
/// Pixels of a transposed tile in NHWC: two vectors of 16 (of 16, 32, 48 and 96 the fastest by 10 %).
const PIXEL_TILE: usize = 32;
/// Channels that are transposed together, at least: whole cache lines are read.
const CHANNEL_TILE: usize = 64;
/// Bytes of a tile of pixels that stays as it is in NHWC: the first cache, as every group returns to it.
const OUTER_BYTES: usize = 32 << 10;
/// Pixels of such a tile are a multiple of this, the rows of the kernel's tiles.
const OUTER_PIXELS: usize = 8;
/// Pixels of such a tile in the weight gradient, at least: its sums go through memory once a tile.
const OUTER_TERMS: usize = 48;
/// Multiply-adds of outer products that take as long as storing their sums. With [`SHORT_ROWS`] and [`TRANSPOSE`] it tells
/// the faster way in NHWC for all 122 forward passes and input gradients of kEffNet-B0 D6_16ch and D6v3_4ch at 32x32, within
/// 5 % (AVX-512; the slower way takes up to 2.5 times as long).
const STORE: usize = 2;
/// Multiply-adds of outer products that take as long as one over transposed rows of [`PIXEL_TILE`] pixels.
const SHORT_ROWS: f64 = 1.4;
/// Multiply-adds of outer products that take as long as transposing a value.
const TRANSPOSE: f64 = 0.35;
/// Multiply-adds of outer products that take as long as one of values picked for groups side by side.
const PICKED: f64 = 2.1;
/// Multiply-adds of outer products that take as long as permuting a vector from one window.
const PERMUTED: f64 = 2.0;
/// Pixels of a tile of a weight gradient in NCHW and of a part of it in NHWC, at least.
const DOT_TILE: usize = 96;
/// Bytes of a group's rows over which one tile of the weight gradient runs: they are read once for each tile of
/// weights, from the L2 cache (32 KiB: half as fast again), which also holds those to come.
const DOT_BYTES: usize = 256 << 10;
/// Bytes that the last cache holds, of which none need be asked for. (9 layers of 16 images: 0.63 ms without, 0.76 with.)
const CACHED_BYTES: usize = 16 << 20;
/// A group of this many weights or more is multiplied by GEMM, which also goes through the sums in blocks. (2048 channels of
/// 14 x 14 to 512 in one group, 16 images: 55 ms, 63 without; 1024 to 1024 of 7 x 7 16.8 and 16.1, 512 to 512 of 28 x 28 28 and
/// 28, 256 to 1024 of 14 x 14 10.4 and 7.1.)
const GEMM_WEIGHTS: usize = 1 << 20;
/// Work of one part of a weight gradient, at least.
const PART_NANOSECONDS: f64 = 100_000.0;
/// Parts of a weight gradient, at most.
const MAX_PARTS: usize = 64;
/// What starting and ending one partial sum costs beside the work itself is a fiftieth of this.
const NANOSECONDS_PER_SUM: f64 = 100.0;
/// Pixels that a bias gradient sums in the type that is computed with.
const BIAS_TILE: usize = 64;
/// Tasks for each thread: enough to even out threads of different speed.
const TASKS_PER_THREAD: usize = 4;

/// Output = interleave(grouped pointwise convolution of `x` + `bias`).
///
/// * `images`: the input's geometry; `x` holds `(N, C_in)` images in that order, `y` receives `(N, C_out)`.
/// * `weight`: in the layout that `shape` names; `bias`: `C_out` values.
pub fn forward<T: Element>(
    isa: Active,
    shape: &Pointwise,
    images: Images,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    y: &mut [MaybeUninit<T>],
) {
    assert_eq!(images.channels, shape.in_channels);
    assert_eq!(weight.len(), shape.weights());
    Product {
        isa,
        images,
        groups: shape.groups,
        group_in: shape.group_in(),
        group_out: shape.group_out(),
        in_places: None,
        out_places: shape.out_places(),
    }
    .run(x, (weight, shape.weight_steps()), bias, y);
}

/// The gradient by the input: `(N, C_in)` from `grad_output (N, C_out)`, the gradient of the interleaved output.
///
/// `images` is the geometry of `grad_output`.
pub fn grad_input<T: Element>(
    isa: Active,
    shape: &Pointwise,
    images: Images,
    grad_output: &[T],
    weight: &[T],
    grad_x: &mut [MaybeUninit<T>],
) {
    assert_eq!(images.channels, shape.out_channels);
    assert_eq!(weight.len(), shape.weights());
    let [group, out, input] = shape.weight_steps();
    Product {
        isa,
        images,
        groups: shape.groups,
        group_in: shape.group_out(),
        group_out: shape.group_in(),
        in_places: shape.out_places(),
        out_places: None,
    }
    .run(grad_output, (weight, [group, input, out]), None, grad_x);
}

/// Weights, and the distances of those of neighbouring groups, output channels and input channels.
type Weights<'a, T> = (&'a [T], [usize; 3]);

/// Rows of each group times that group's matrix.
struct Product {
    isa: Active,
    /// The input's geometry.
    images: Images,
    groups: usize,
    group_in: usize,
    group_out: usize,
    /// Where input channel `c` stands in memory, unless at `c`.
    in_places: Option<Vec<usize>>,
    /// Where output channel `c` stands in memory, unless at `c`.
    out_places: Option<Vec<usize>>,
}

/// How a [`Product`] goes through NHWC memory.
enum Way {
    /// Groups side by side in vectors.
    SideBySide(SideBySide),
    /// Pixels as they are, times matrices: where each group's first input channel stands, and the distance to the next one.
    Outer(Vec<[usize; 2]>),
    /// Transposed to rows and back.
    Transposed,
}

/// Weights in the order in which the kernels read them: for each group, for each block of output rows,
/// `[step][output row]`.
struct Packed<'a, T: Element, M> {
    products: M,
    weights: &'a [T::Wide],
    bias: Option<&'a [T]>,
    /// Ends of the blocks of output rows of a group.
    blocks: &'a [Range<usize>],
    /// Places of all output channels in the rows that the kernel writes.
    y_offsets: &'a [usize],
}

impl Product {
    fn run<T: Element>(&self, x: &[T], weight: Weights<'_, T>, bias: Option<&[T]>, y: &mut [MaybeUninit<T>]) {
        let out = self.images.with_channels(self.groups * self.group_out);
        assert_eq!(x.len(), self.images.len());
        assert_eq!(y.len(), out.len());
        assert!(bias.is_none_or(|bias| bias.len() == out.channels));
        if out.is_empty() {
            return;
        }
        let work = images_work::<T>(self.images, out, self.group_in);
        let threads = threads_for(work);
        let y = Shared::new(y);
        // One pixel an image (squeeze-excite, dense layers) is the same memory in both orders.
        let planes = self.images.order == Order::Nchw && self.images.pixels > 1;
        match T::pairs(self.isa) {
            Some(pairs) => self.products(pairs, threads, x, weight, bias, planes, y),
            None => self.products(Single, threads, x, weight, bias, planes, y),
        }
    }

    /// All of it, with products added up in a certain way.
    fn products<T: Element, M: Products<T>>(
        &self,
        products: M,
        threads: usize,
        x: &[T],
        weight: Weights<'_, T>,
        bias: Option<&[T]>,
        planes: bool,
        y: Shared<T>,
    ) {
        if !planes {
            let permutation = self.permutation::<T>();
            match self.way::<T, M>(permutation.as_ref()) {
                Way::SideBySide(groups) => {
                    return self.side_by_side(products, threads, x, weight, bias, &groups, permutation.as_ref(), y);
                }
                Way::Outer(places) => {
                    return self.outer(products, threads, x, weight, bias, &places, permutation.as_ref(), y);
                }
                Way::Transposed => {}
            }
        }
        let height = self.isa.run(ConvHeight);
        let count = self.group_out.div_ceil(height);
        let blocks: Vec<_> = (0..count).map(|i| part(self.group_out, count, i)).collect();
        let steps = self.group_in.div_ceil(M::TERMS);
        scratch::with(self.groups * self.group_out * steps, |packed: &mut [T::Wide]| {
            let mut rest = &mut *packed;
            for (g, block) in (0..self.groups).flat_map(|g| blocks.iter().map(move |block| (g, block))) {
                let (weights, others) = std::mem::take(&mut rest).split_at_mut(steps * block.len());
                self.pack(products, weight, g, block.clone(), weights);
                rest = others;
            }
            let packed = Packed { products, weights: packed, bias, blocks: &blocks, y_offsets: &[] };
            if planes {
                self.planes(threads, x, packed, y);
            } else {
                self.pixels(threads, x, packed, y);
            }
        });
    }

    /// The weights of a group for some of its output channels: `[step][output channel]`.
    fn pack<T: Element, M: Products<T>>(
        &self,
        products: M,
        (weights, [group, out, input]): Weights<'_, T>,
        g: usize,
        block: Range<usize>,
        packed: &mut [T::Wide],
    ) {
        for (step, packed) in packed.chunks_exact_mut(block.len()).enumerate() {
            let i = step * M::TERMS;
            let second = M::TERMS > 1 && i + 1 < self.group_in;
            for (o, packed) in block.clone().zip(packed) {
                let place = g * group + o * out + i * input;
                *packed = products.pack(weights[place], second.then(|| weights[place + input]));
            }
        }
    }

    /// NCHW: the rows are the image's own planes.
    fn planes<T: Element, M: Products<T>>(&self, threads: usize, x: &[T], packed: Packed<'_, T, M>, y: Shared<T>) {
        let Images { count, pixels, channels: c_in, .. } = self.images;
        let c_out = self.groups * self.group_out;
        let offsets = |channels: usize, places: &Option<Vec<usize>>| -> Vec<usize> {
            (0..channels).map(|c| places.as_ref().map_or(c, |places| places[c]) * pixels).collect()
        };
        let x_offsets = offsets(c_in, &self.in_places);
        let y_offsets = offsets(c_out, &self.out_places);
        let packed = Packed { y_offsets: &y_offsets, ..packed };
        // Tasks: images, then groups, then pixels, until there are enough.
        let wanted = if threads == 1 { 1 } else { threads * TASKS_PER_THREAD };
        let group_parts = wanted.div_ceil(count).min(self.groups);
        let pixel_parts = wanted.div_ceil(count * group_parts).min(pixels.div_ceil(PLANE_PART));
        // Sums wait in y for the next rows, where that rounds nothing.
        let exact = size_of::<T>() == size_of::<T::Wide>();
        let long = self.group_in * pixels >= PASS_TILE;
        let passes = if exact && long { self.group_in.div_ceil(PASS_ROWS) } else { 1 };
        let tile = if passes > 1 {
            PASS_TILE / PASS_ROWS
        } else if packed.blocks.len() > 1 {
            (PLANE_TILE / self.group_in).max(PLANE_PART)
        } else {
            usize::MAX
        };
        // The next group's rows; the next image's follow the last group's.
        let ahead = [(self.group_in, &x_offsets), (self.group_out, &y_offsets)].map(|(channels, offsets)| {
            let next = offsets.get(channels).and_then(|next| next.checked_sub(offsets[0])).unwrap_or(channels * pixels);
            if channels * pixels * size_of::<T>() <= AHEAD_BYTES { next } else { AHEAD_PIXELS.min(tile) }
        });
        parallel_for(threads, count * group_parts * pixel_parts, |task| {
            let (n, rest) = (task / (group_parts * pixel_parts), task % (group_parts * pixel_parts));
            let range = part(pixels, pixel_parts, rest % pixel_parts);
            for g in part(self.groups, group_parts, rest / pixel_parts) {
                let mut start = range.start;
                while start < range.end {
                    let length = tile.min(range.end - start);
                    // SAFETY: image n and pixels start..start + length exist in x and y; tasks differ in image,
                    // group or pixels, so no two write the same place.
                    unsafe {
                        let x = x.as_ptr().add(n * c_in * pixels + start);
                        let y = y.ptr().add(n * c_out * pixels + start);
                        for rows in (0..passes).map(|pass| part(self.group_in, passes, pass)) {
                            let offsets = &x_offsets[g * self.group_in..][rows.clone()];
                            self.group([g, rows.start], x, offsets, &packed, y, length, ahead);
                        }
                    }
                    start += length;
                }
            }
        });
    }

    /// The permutation of the output's channels, if there is one and it has instructions.
    fn permutation<T: Element>(&self) -> Option<Permutation> {
        let mut sources = vec![0; self.groups * self.group_out];
        self.out_places.as_ref()?.iter().enumerate().for_each(|(channel, &place)| sources[place] = channel);
        Permutation::new::<T>(self.isa, &sources, self.images.count * self.images.pixels)
    }

    /// The fastest way in NHWC, by what a pixel of one group costs in multiply-adds of outer products.
    fn way<T: Element, M: Products<T>>(&self, permutation: Option<&Permutation>) -> Way {
        let (k, m, lanes) = (self.group_in, self.group_out, lanes::<T>(self.isa));
        if self.out_places.is_some() && permutation.is_none() {
            return Way::Transposed;
        }
        let per_group = |cost: f64| cost / self.groups as f64;
        let permuted = permutation.map_or(0.0, |permutation| per_group(PERMUTED * permutation.windows() as f64));
        let steps = k.div_ceil(M::TERMS);
        let outer = ((steps + STORE) * m.div_ceil(lanes)) as f64 + permuted;
        let transposed = SHORT_ROWS * (steps * m) as f64 / lanes as f64 + TRANSPOSE * (k + m) as f64;
        let picks = self.in_places.is_none() && picks::<T>(self.isa);
        // (For few pixels the order of lanes takes longer than the products.)
        if picks && self.images.count * self.images.pixels >= OUTER_TERMS {
            let groups = SideBySide::new([self.groups, k, m], lanes, M::TERMS).filter(|groups| {
                PICKED * per_group((groups.vectors.len() * steps) as f64) + permuted < outer.min(transposed)
            });
            if let Some(groups) = groups {
                return Way::SideBySide(groups);
            }
        }
        if outer > transposed {
            return Way::Transposed;
        }
        self.outer_places(M::TERMS == 1).map_or(Way::Transposed, Way::Outer)
    }

    /// Where each group's first input channel stands in a pixel, and the distance to the next one, which is the same for all, and
    /// 1 unless they may be `apart`.
    fn outer_places(&self, apart: bool) -> Option<Vec<[usize; 2]>> {
        let k = self.group_in;
        let Some(places) = &self.in_places else { return Some((0..self.groups).map(|g| [g * k, 1]).collect()) };
        let place = |places: &[usize]| Some([places[0], constant_stride(places).filter(|&s| apart || s == 1)?]);
        places.chunks_exact(k).map(place).collect()
    }

    /// Calls `body` for tiles of at most `tile` of this part's pixels, with where to write the first one's channels and how far
    /// ahead to ask: the output itself or, with a permutation, memory from which they go there permuted.
    fn tiles<T: Element>(
        &self,
        range: Range<usize>,
        tile: usize,
        permutation: Option<&Permutation>,
        y: Shared<T>,
        body: impl Fn(Range<usize>, (*mut T, usize), usize),
    ) {
        let c_out = self.groups * self.group_out;
        let ahead = tile * c_out;
        let to = |pixels: &Range<usize>| y.ptr().wrapping_add(pixels.start * c_out);
        let Some(permutation) = permutation else {
            return chunks(range, tile).for_each(|pixels| body(pixels.clone(), (to(&pixels), c_out), ahead));
        };
        // Pixels in whole cache lines.
        let step = c_out.next_multiple_of(lanes::<T>(self.isa));
        scratch::with(tile.min(range.len()) * step, |memory: &mut [T]| {
            for pixels in chunks(range, tile) {
                body(pixels.clone(), (memory.as_mut_ptr(), step), 0);
                // SAFETY: memory holds these pixels; those of y are this task's own.
                unsafe { permutation.run((memory.as_ptr(), step), to(&pixels), pixels.len(), [0, ahead]) };
            }
        });
    }

    /// NHWC, groups of few output channels: pixels as they are, several groups in a vector.
    fn side_by_side<T: Element, M: Products<T>>(
        &self,
        products: M,
        threads: usize,
        x: &[T],
        (weights, [group, out, input]): Weights<'_, T>,
        bias: Option<&[T]>,
        groups: &SideBySide,
        permutation: Option<&Permutation>,
        y: Shared<T>,
    ) {
        let (c_in, c_out) = (self.images.channels, self.groups * self.group_out);
        let pixels = self.images.count * self.images.pixels;
        // Twice the first cache: vectors share no pixels' lines, but their indices and weights.
        let tile = 2 * outer_tile::<T>(c_in + c_out);
        let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(pixels.div_ceil(OUTER_PIXELS)) };
        scratch::with(groups.weights(), |packed: &mut [T::Wide]| {
            groups.pack(products, |g, o, i| weights[g * group + o * out + i * input], packed);
            let each = groups.weights() / groups.vectors.len();
            let packed = &*packed;
            parallel_for(threads, parts, |task| {
                self.tiles(part(pixels, parts, task), tile, permutation, y, |range, (y, y_step), ahead| {
                    for (vector, weights) in groups.vectors.iter().zip(packed.chunks_exact(each)) {
                        // SAFETY: the pixels exist in x, with all channels, and where they are written.
                        self.isa.run(unsafe {
                            SideBySideRows {
                                products,
                                x: x.as_ptr().add(range.start * c_in),
                                x_step: c_in,
                                y: y.add(vector.columns.start),
                                y_step,
                                pixels: range.len(),
                                columns: vector.columns.len(),
                                sources: &groups.sources[vector.sources.clone()],
                                index: groups.index(vector),
                                weights,
                                bias: bias.map(|bias| &bias[vector.columns.clone()]),
                                ahead: [tile * c_in, ahead],
                            }
                            .promise()
                        });
                    }
                });
            });
        });
    }

    /// NHWC, groups whose output channels fill vectors: pixels as they are, times matrices.
    fn outer<T: Element, M: Products<T>>(
        &self,
        products: M,
        threads: usize,
        x: &[T],
        weight: Weights<'_, T>,
        bias: Option<&[T]>,
        places: &[[usize; 2]],
        permutation: Option<&Permutation>,
        y: Shared<T>,
    ) {
        let (k, m) = (self.group_in, self.group_out);
        let (c_in, c_out) = (self.images.channels, self.groups * m);
        let pixels = self.images.count * self.images.pixels;
        let tile = outer_tile::<T>(c_in + c_out);
        let rows: Vec<_> = (0..tile).map(|pixel| pixel * c_in).collect();
        let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(pixels.div_ceil(OUTER_PIXELS)) };
        let steps = k.div_ceil(M::TERMS);
        scratch::with(c_out * steps, |packed: &mut [T::Wide]| {
            for (g, packed) in packed.chunks_exact_mut(steps * m).enumerate() {
                self.pack(products, weight, g, 0..m, packed);
            }
            let packed = &*packed;
            parallel_for(threads, parts, |task| {
                self.tiles(part(pixels, parts, task), tile, permutation, y, |range, (y, y_step), ahead| {
                    for (g, &[first, distance]) in places.iter().enumerate() {
                        // SAFETY: the pixels exist in x, with all of the group's channels, and where they are written.
                        self.isa.run(unsafe {
                            OuterProducts {
                                products,
                                a: x.as_ptr().add(range.start * c_in + first),
                                a_step: distance * M::TERMS,
                                a_rows: &rows[..range.len()],
                                // The next tile's pixels, a part of them for each group.
                                a_ahead: tile * c_in - first + g * k * tile,
                                b: packed.as_ptr().add(g * steps * m),
                                b_step: m,
                                b_ahead: 0,
                                terms: k,
                                columns: m,
                                out: Pixels {
                                    products,
                                    y: y.add(g * m),
                                    row: y_step,
                                    bias: bias.map(|bias| &bias[g * m..][..m]),
                                    ahead,
                                },
                            }
                            .promise()
                        });
                    }
                });
            });
        });
    }

    /// NHWC: tiles of pixels are transposed into rows and back.
    fn pixels<T: Element, M: Products<T>>(&self, threads: usize, x: &[T], packed: Packed<'_, T, M>, y: Shared<T>) {
        let (c_in, c_out) = (self.images.channels, self.groups * self.group_out);
        let pixels = self.images.count * self.images.pixels;
        let tile = PIXEL_TILE.min(pixels.next_multiple_of(8));
        // With permuted input rows a group's channels are anywhere, so all are transposed at once.
        let cluster = match self.in_places {
            Some(_) => self.groups,
            None => CHANNEL_TILE.div_ceil(self.group_in).min(self.groups),
        };
        let x_offsets: Vec<_> = (0..c_in)
            .map(|c| self.in_places.as_ref().map_or(c % (cluster * self.group_in), |places| places[c]) * tile)
            .collect();
        let y_offsets: Vec<_> =
            (0..c_out).map(|c| self.out_places.as_ref().map_or(c, |places| places[c]) * tile).collect();
        let packed = Packed { y_offsets: &y_offsets, ..packed };
        let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(pixels.div_ceil(tile)) };
        parallel_for(threads, parts, |task| {
            scratch::with((cluster * self.group_in + c_out) * tile, |rows: &mut [T]| {
                let (x_rows, y_rows) = rows.split_at_mut(cluster * self.group_in * tile);
                let range = part(pixels, parts, task);
                for start in range.clone().step_by(tile) {
                    let length = tile.min(range.end - start);
                    for first in (0..self.groups).step_by(cluster) {
                        let groups = first..(first + cluster).min(self.groups);
                        let channels = groups.len() * self.group_in;
                        // SAFETY: the source is pixels x channels of x, the destination channels x tile of x_rows.
                        self.isa.run(unsafe {
                            let src = x.as_ptr().add(start * c_in + first * self.group_in);
                            Transpose::gather([length, channels], src, c_in, x_rows.as_mut_ptr(), tile)
                        });
                        for g in groups {
                            let x_offsets = &x_offsets[g * self.group_in..][..self.group_in];
                            // SAFETY: offsets lie inside x_rows and y_rows, each row `tile` values long.
                            unsafe {
                                self.group(
                                    [g, 0],
                                    x_rows.as_ptr(),
                                    x_offsets,
                                    &packed,
                                    y_rows.as_mut_ptr(),
                                    length,
                                    [0, 0],
                                )
                            };
                        }
                    }
                    // SAFETY: the destination is this task's own pixels of y.
                    self.isa.run(unsafe {
                        Transpose::scatter([c_out, length], y_rows.as_ptr(), tile, y.ptr().add(start * c_out), c_out)
                    });
                }
            });
        });
    }

    /// Some input channels of a group, from its `first` one on, over `length` pixels: adds to what the channels before made.
    ///
    /// # Safety
    /// `x` and `y` must hold the group's rows at their offsets, `length` values each; rows of `y` are this caller's own.
    #[inline]
    unsafe fn group<T: Element, M: Products<T>>(
        &self,
        [g, first]: [usize; 2],
        x: *const T,
        x_offsets: &[usize],
        packed: &Packed<'_, T, M>,
        y: *mut T,
        length: usize,
        ahead: [usize; 2],
    ) {
        let steps = self.group_in.div_ceil(M::TERMS);
        let weights = &packed.weights[g * self.group_out * steps..][..self.group_out * steps];
        let taken = first / M::TERMS..(first + x_offsets.len()).div_ceil(M::TERMS);
        for block in packed.blocks {
            // The first block asks for what all read next. (All of them: 4 % slower.)
            let ahead = if block.start == 0 { ahead } else { [0, ahead[1]] };
            let channels = g * self.group_out + block.start..g * self.group_out + block.end;
            let bias = packed.bias.map(|bias| &bias[channels.clone()]);
            let weights = &weights[block.start * steps..][taken.start * block.len()..taken.end * block.len()];
            let kernel = ConvRows {
                products: packed.products,
                x,
                x_offsets,
                weights,
                start: if first > 0 { Start::Output } else { bias.into() },
                y,
                y_offsets: &packed.y_offsets[channels],
                pixels: length,
                ahead,
            };
            // SAFETY: the caller's promise.
            self.isa.run(unsafe { kernel.promise() });
        }
    }
}

/// Pixels of a tile in NHWC that stays as it is.
fn outer_tile<T>(channels: usize) -> usize {
    (OUTER_BYTES / (channels * size_of::<T>())).max(1).next_multiple_of(OUTER_PIXELS)
}

fn images_work<T>(a: Images, b: Images, inner: usize) -> f64 {
    estimate(b.len() * inner, (a.len() + b.len()) * size_of::<T>())
}

/// The gradient by the weight, in the layout that `shape` names, from `x (N, C_in)` and `grad_output (N, C_out)`, the
/// gradient of the interleaved output.
///
/// `images` is the geometry of `x`. The result does not depend on the number of threads.
pub fn grad_weight<T: Element>(
    isa: Active,
    shape: &Pointwise,
    images: Images,
    x: &[T],
    grad_output: &[T],
    grad_weight: &mut [MaybeUninit<T>],
) {
    match T::pairs(isa) {
        Some(pairs) => weight_grad(isa, pairs, shape, images, x, grad_output, grad_weight),
        None => weight_grad(isa, Single, shape, images, x, grad_output, grad_weight),
    }
}

/// [`grad_weight`], with products added up in a certain way.
fn weight_grad<T: Element, M: Products<T>>(
    isa: Active,
    products: M,
    shape: &Pointwise,
    images: Images,
    x: &[T],
    grad_output: &[T],
    grad_weight: &mut [MaybeUninit<T>],
) {
    let out = images.with_channels(shape.out_channels);
    assert_eq!(images.channels, shape.in_channels);
    assert_eq!(x.len(), images.len());
    assert_eq!(grad_output.len(), out.len());
    assert_eq!(grad_weight.len(), shape.weights());
    let planes = images.order == Order::Nchw && images.pixels > 1;
    let (k, m) = (shape.group_in(), shape.group_out());
    let work = images_work::<T>(images, out, k);
    let threads = threads_for(work);
    // The parts depend on the problem alone, so that the sums do too; the division into groups does not change them.
    let most = if planes { images.count } else { (images.count * images.pixels).div_ceil(DOT_TILE) };
    let worth = PART_NANOSECONDS.max(NANOSECONDS_PER_SUM * shape.weights() as f64);
    let parts = ((work / worth) as usize).min(most).clamp(1, MAX_PARTS);
    let wanted = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).div_ceil(parts) };
    let group_parts = wanted.min(shape.groups);
    let mut places = shape.out_places().unwrap_or_else(|| (0..shape.out_channels).collect());
    if planes {
        places.iter_mut().for_each(|place| *place *= images.pixels);
    }
    // Sums `[output channel][input channel]` of a group, or the other way round where that fills more of the vectors,
    // which interleaved output channels cannot.
    let lanes = lanes::<T>(isa);
    let contiguous = !planes && shape.out_places().is_none();
    let by_output = contiguous && (k * m.div_ceil(lanes), k) < (m * k.div_ceil(lanes), m);
    let inputs = (0..k).collect();
    let side_by_side = (contiguous && group_parts == 1 && picks::<T>(isa))
        .then(|| SideBySide::new([shape.groups, k.min(m), k.max(m)], lanes, 1))
        .flatten()
        .filter(SideBySide::windows);
    let by_output = by_output && side_by_side.is_none();
    let grad = WeightGrad { isa, products, shape, images, inputs, places, by_output, side_by_side, x, grad_output };
    // One set of partial sums for each part, added up in order at the end.
    let mut partial = vec![T::Wide::default(); parts * shape.weights()];
    let shared = Shared(partial.as_mut_ptr());
    parallel_for(threads, parts * group_parts, |task| {
        let (task, group_task) = (task / group_parts, task % group_parts);
        let groups = part(shape.groups, group_parts, group_task);
        let (first, len) = (task * shape.weights() + groups.start * m * k, groups.len() * m * k);
        // SAFETY: tasks differ in part or in groups: no two share sums.
        let sums = unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(first), len) };
        if planes {
            grad.planes(groups, part(images.count, parts, task), sums);
        } else if let Some(side_by_side) = &grad.side_by_side {
            grad.narrow(side_by_side, part(images.count * images.pixels, parts, task), sums);
        } else {
            grad.pixels(groups, part(images.count * images.pixels, parts, task), sums);
        }
    });
    let [group, out, input] = shape.weight_steps();
    let [o_step, i_step] = if by_output { [1, m] } else { [k, 1] };
    for (g, o) in (0..shape.groups).flat_map(|g| (0..m).map(move |o| (g, o))) {
        for i in 0..k {
            let sums = partial[g * m * k + o * o_step + i * i_step..].iter().step_by(shape.weights());
            let sum = sums.fold(T::Wide::default(), |sum, &part| sum + part);
            grad_weight[g * group + o * out + i * input].write(T::narrow(sum));
        }
    }
}

struct WeightGrad<'a, T, M> {
    isa: Active,
    products: M,
    shape: &'a Pointwise,
    images: Images,
    /// Where a group's input channels stand behind its first one in NHWC.
    inputs: Vec<usize>,
    /// Where output channel `c` stands in an image of `grad_output`.
    places: Vec<usize>,
    /// Whether sums are `[input channel][output channel]`.
    by_output: bool,
    /// How all groups stand side by side in vectors in NHWC, if they do.
    side_by_side: Option<SideBySide>,
    x: &'a [T],
    grad_output: &'a [T],
}

impl<T: Element, M: Products<T>> WeightGrad<'_, T, M> {
    /// NCHW: adds images `range` to the sums of `groups`.
    fn planes(&self, groups: Range<usize>, range: Range<usize>, sums: &mut [T::Wide]) {
        let (k, m) = (self.shape.group_in(), self.shape.group_out());
        let Images { pixels, channels: c_in, .. } = self.images;
        let c_out = self.shape.out_channels;
        let x_offsets: Vec<_> = (0..k).map(|i| i * pixels).collect();
        let tile = (DOT_BYTES / ((k + m) * size_of::<T>())).clamp(DOT_TILE, pixels.max(DOT_TILE)).min(pixels);
        let batch = (DOT_BYTES / ((k + m) * tile * size_of::<T>())).max(1);
        for (g, sums) in groups.zip(sums.chunks_exact_mut(m * k)) {
            let places = &self.places[g * m..][..m];
            if let (true, Some(stride)) = (m * k >= GEMM_WEIGHTS, constant_stride(places)) {
                for n in range.clone() {
                    // SAFETY: the group's rows of image n in grad_output and x; `sums` is m x k.
                    unsafe {
                        let a = self.grad_output.as_ptr().add(n * c_out * pixels + places[0]);
                        let b = self.x.as_ptr().add((n * c_in + g * k) * pixels);
                        T::gemm(self.isa, [m, pixels, k], (a, stride, 1), (b, 1, pixels), (sums.as_mut_ptr(), k, 1));
                    }
                }
                continue;
            }
            // What comes next: pixels, images, or the next group. (0: nothing is asked for.)
            let ahead = if looks_ahead() || size_of_val(self.x) + size_of_val(self.grad_output) <= CACHED_BYTES {
                [0, 0]
            } else if tile < pixels {
                [tile; 2]
            } else if batch < range.len() {
                [c_out, c_in].map(|channels| batch * channels * pixels)
            } else {
                let next = self.places.get((g + 1) * m).copied().unwrap_or(c_out * pixels + self.places[0]);
                [next.saturating_sub(places[0]), k * pixels]
            };
            let row_products = RowProducts::<T, _>::new(self.isa, self.products, [m, k], pixels);
            scratch::with(row_products.memory(), |memory: &mut [T::Wide]| {
                memory.fill(T::Wide::default());
                for n in range.clone().step_by(batch) {
                    for start in (0..pixels).step_by(tile) {
                        // SAFETY: images n.. and pixels start.. exist, `batch` and `tile` cut at their ends.
                        unsafe {
                            let a = self.grad_output.as_ptr().add(n * c_out * pixels + start);
                            let b = self.x.as_ptr().add((n * c_in + g * k) * pixels + start);
                            let [a_ahead, b_ahead] = ahead;
                            let a = Rows { base: a, offsets: places, image_stride: c_out * pixels, ahead: a_ahead };
                            let b = Rows { base: b, offsets: &x_offsets, image_stride: c_in * pixels, ahead: b_ahead };
                            let size = [batch.min(range.end - n), tile.min(pixels - start)];
                            row_products.add(a, b, size, memory);
                        }
                    }
                }
                row_products.finish(memory, sums);
            });
        }
    }

    /// NHWC: adds pixels `range` of all images to the sums of `groups`.
    fn pixels(&self, groups: Range<usize>, range: Range<usize>, sums: &mut [T::Wide]) {
        let (k, m) = (self.shape.group_in(), self.shape.group_out());
        let channels @ [c_in, c_out] = [self.shape.in_channels, self.shape.out_channels];
        let tile = outer_tile::<T::Wide>(c_in + c_out).max(OUTER_TERMS);
        let sizes = channels.map(|channels| tile / M::TERMS * channels);
        // Copies are in a cache.
        let copied = size_of::<T>() < size_of::<T::Wide>();
        let ahead = channels.map(|channels| if copied { 0 } else { tile * channels });
        for pixels in chunks(range, tile) {
            let [x, grad] = [(self.x, c_in), (self.grad_output, c_out)]
                .map(|(values, channels)| &values[pixels.start * channels..pixels.end * channels]);
            scratch::with(sizes.iter().sum(), |memory: &mut [T::Wide]| {
                let [x_memory, grad_memory] = cut(memory, sizes);
                let x = self.products.steps(self.isa, x, c_in, x_memory);
                let grad = self.products.steps(self.isa, grad, c_out, grad_memory);
                for (g, sums) in groups.clone().zip(sums.chunks_exact_mut(m * k)) {
                    let (x, grad) = ((&x[g * k..], c_in, ahead[0]), (grad, c_out, ahead[1]));
                    // SAFETY: the pixels exist in x and grad_output, with all of the group's channels, which follow each
                    // other where they are the columns.
                    unsafe { self.outer(x, grad, &self.places[g * m..][..m], pixels.len(), sums) };
                }
            });
        }
    }

    /// NHWC, several groups in a vector: adds pixels `range` of all images to the sums of all groups.
    fn narrow(&self, groups: &SideBySide, range: Range<usize>, sums: &mut [T::Wide]) {
        let channels @ [c_in, c_out] = [self.shape.in_channels, self.shape.out_channels];
        let tile = (2 * outer_tile::<T::Wide>(c_in + c_out)).max(OUTER_TERMS);
        let sizes = channels.map(|channels| tile / M::TERMS * channels);
        let copied = size_of::<T>() < size_of::<T::Wide>();
        let ahead = channels.map(|channels| if copied { 0 } else { tile * channels });
        // Vectors are of the side that has more channels.
        let by_input = self.shape.group_in() > self.shape.group_out();
        let each = groups.weights() / groups.vectors.len();
        scratch::with(groups.weights(), |totals: &mut [T::Wide]| {
            totals.fill(T::Wide::default());
            for pixels in chunks(range, tile) {
                let [x, grad] = [(self.x, c_in), (self.grad_output, c_out)]
                    .map(|(values, channels)| &values[pixels.start * channels..pixels.end * channels]);
                scratch::with(sizes.iter().sum(), |memory: &mut [T::Wide]| {
                    let [x_memory, grad_memory] = cut(memory, sizes);
                    let x = (self.products.steps(self.isa, x, c_in, x_memory), c_in, ahead[0]);
                    let grad = (self.products.steps(self.isa, grad, c_out, grad_memory), c_out, ahead[1]);
                    let ((a, a_step, a_ahead), (b, b_step, b_ahead)) = if by_input { (grad, x) } else { (x, grad) };
                    for (vector, sums) in groups.vectors.iter().zip(totals.chunks_exact_mut(each)) {
                        let Source { first, block, ask, .. } = groups.sources[vector.sources.start];
                        let Block::Window(len) = block else { unreachable!("chosen for windows only") };
                        // SAFETY: all pixels have the channels.
                        self.isa.run(unsafe {
                            SideBySideSums::<T, M> {
                                products: self.products,
                                a: (a.as_ptr().add(first), len),
                                a_step,
                                a_ahead: if ask { a_ahead } else { 0 },
                                b: (b.as_ptr().add(vector.columns.start), vector.columns.len()),
                                b_step,
                                b_ahead,
                                terms: pixels.len(),
                                index: groups.index(vector),
                                sums,
                            }
                            .promise()
                        });
                    }
                });
            }
            groups.unpack(totals, by_input, sums);
        });
    }

    /// Adds a group's products over `terms` pixels to its sums; of `x`, which starts with its channels, and `grad`, where
    /// they stand at `places`, come the values, the distance of pixels and how far ahead to ask.
    ///
    /// # Safety
    /// The pixels must have the group's channels, which must follow each other where they are the columns.
    // Not inlined, groups of four channels or less take 1.2 times as long.
    #[inline(always)]
    unsafe fn outer(
        &self,
        x: (&[T::Wide], usize, usize),
        grad: (&[T::Wide], usize, usize),
        places: &[usize],
        terms: usize,
        sums: &mut [T::Wide],
    ) {
        let (k, m) = (self.shape.group_in(), self.shape.group_out());
        // Vectors are of output channels or of input channels.
        let (a, a_rows, b, columns) =
            if self.by_output { (x, &self.inputs[..], grad, m) } else { (grad, places, x, k) };
        let first = if self.by_output { places[0] } else { 0 };
        assert_eq!(sums.len(), m * k);
        // SAFETY: the caller's promise; there are m x k sums.
        self.isa.run(unsafe {
            OuterProducts {
                products: self.products,
                a: a.0.as_ptr(),
                a_step: a.1,
                a_rows,
                a_ahead: a.2,
                b: b.0.as_ptr().add(first),
                b_step: b.1,
                b_ahead: b.2,
                terms,
                columns,
                out: Totals::<T> { sums: sums.as_mut_ptr(), row: columns },
            }
            .promise()
        });
    }
}

/// The distance between neighbours where it is the same for all (1 for a single place).
fn constant_stride(places: &[usize]) -> Option<usize> {
    let stride = if places.len() > 1 { places[1].checked_sub(places[0])? } else { 1 };
    places.windows(2).all(|pair| pair[0] + stride == pair[1]).then_some(stride)
}

/// The gradient by the bias: the sums over images and pixels of `grad_output (N, C_out)`, whose channels are
/// interleaved by `interleave`.
pub fn grad_bias<T: Element>(
    isa: Active,
    interleave: usize,
    images: Images,
    grad_output: &[T],
    grad_bias: &mut [MaybeUninit<T>],
) {
    assert_eq!(grad_output.len(), images.len());
    assert_eq!(grad_bias.len(), images.channels);
    let Images { count, pixels, channels, .. } = images;
    let places = interleave_places(channels, interleave);
    let threads = threads_for(estimate(0, size_of_val(grad_output)));
    let shared = Shared::new(grad_bias);
    // SAFETY: each channel is written by one task.
    let write = |c: usize, sum: f64| unsafe { shared.ptr().add(c).write(T::from_f64(sum)) };
    if images.order == Order::Nchw && pixels > 1 {
        parallel_for(threads, channels, |c| {
            let plane = |n: usize| &grad_output[(n * channels + places[c]) * pixels..][..pixels];
            write(c, (0..count).map(|n| isa.run(Sum(plane(n)))).sum());
        });
        return;
    }
    // NHWC: sums of short columns in the type that is computed with, these in float64.
    let parts = if threads == 1 { 1 } else { MAX_PARTS };
    let mut partial = vec![0f64; parts * channels];
    let sums = Shared(partial.as_mut_ptr());
    parallel_for(threads, parts, |task| {
        // SAFETY: each task has sums of its own.
        let sums = unsafe { std::slice::from_raw_parts_mut(sums.ptr().add(task * channels), channels) };
        let range = part(count * pixels, parts, task);
        scratch::with(channels, |columns: &mut [T::Wide]| {
            for rows in grad_output[range.start * channels..range.end * channels].chunks(BIAS_TILE * channels) {
                isa.run(SumColumns(rows, columns));
                sums.iter_mut().zip(&*columns).for_each(|(sum, value)| *sum += value.to_f64());
            }
        });
    });
    for c in 0..channels {
        write(c, (0..parts).map(|p| partial[p * channels + places[c]]).sum());
    }
}
