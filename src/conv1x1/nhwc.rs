//! Grouped pointwise convolution and its input gradient in NHWC, whose pixels have all channels side by side.
//!
//! Four ways lead through them ([`Way`]), of which each is the fastest for some groups. Where the output is permuted, pixels are
//! computed in a cache and permuted from there; transposed rows go to their places by themselves.

use std::ops::Range;

use super::side_by_side::SideBySide;
use super::{Packed, Product, TASKS_PER_THREAD, Weights, constant_stride, gcd, interleaved_by_group};
use crate::interleave::Permutation;
use crate::microkernels::folds::{Folds, Unfolds, folds, unfolds};
use crate::microkernels::outer::{OuterProducts, Pixels};
use crate::microkernels::row_copy::WidenRows;
use crate::microkernels::side_by_side::SideBySide as SideBySideRows;
use crate::microkernels::transpose::Transpose;
use crate::parallel::Shared;
use crate::pool::{chunks, parallel_for, part};
use crate::scratch::{self, cut};
use crate::shape::WeightStrides;
use crate::simd::Promised;
use crate::simd::element::{Element, has_permute, lanes, writable};
use crate::simd::mul_acc::MulAcc;

/// Pixels of a transposed tile: as many vectors of 16 as [`ConvRows`](crate::microkernels::conv1x1_nchw::ConvRows) takes at a time, where
/// a step takes one row and where it takes two. (Two threads of an Intel Xeon: the forward passes of kEffNet-B0 D6v3_4ch at 32x32
/// take 20.5 ms with 32, 19.7 with 48, 19.9 with 64; of bfloat16, 7 interleaved layers 7.1 with 32, 7.3 with 48.)
const PIXEL_TILES: [usize; 2] = [48, 32];
/// Channels that are transposed together, at least: whole cache lines are read.
const CHANNEL_TILE: usize = 64;
/// Bytes of a pixel that are transposed back together, at least. (24 channels of 31 x 31 to 144, 6 groups, interleaved, bfloat16,
/// two threads of an Intel Xeon: 1.12 ms with 96, 1.01 with 192.)
const CHUNK_BYTES: usize = 256;
/// Bytes of a tile of pixels that stays as it is: the first cache, as every group returns to it.
const OUTER_BYTES: usize = 32 << 10;
/// Pixels of such a tile are a multiple of this, the rows of the kernel's tiles.
const OUTER_PIXELS: usize = 8;
/// Multiply-adds of outer products that take as long as storing their sums. With [`SHORT_ROWS`] and [`TRANSPOSE`] it tells
/// the faster way in NHWC for all 122 forward passes and input gradients of kEffNet-B0 D6_16ch and D6v3_4ch at 32x32, within
/// 5 % (AVX-512; the slower way takes up to 2.5 times as long).
const STORE: usize = 2;
/// Multiply-adds of outer products that take as long as one over transposed rows.
const SHORT_ROWS: f64 = 1.3;
/// Multiply-adds of outer products that take as long as transposing a value.
const TRANSPOSE: f64 = 0.35;
/// Multiply-adds of outer products that take as long as one of values picked for groups side by side, or storing half of their
/// sums. (Two threads of an Intel Xeon, so and the next faster way: 480 channels of 16 x 16 to 112, 16 groups, 64 images, 0.91 and
/// 1.26 ms; 672 of 8 x 8 to 192, 32 groups, 0.38 and 0.50; 24 of 31 x 31 to 144, 6 groups, 1.43 and 1.17, which it leaves. Of an AMD
/// EPYC: 80 channels of 16 x 16 to 80, 20 groups, 0.08 and 0.17.)
const PICKED: f64 = 1.5;
/// Pixels, at least, for which it is worth while to make out the lanes. (192 channels in 32 groups, a thread: 64 pixels take 4 us
/// without, 6 with; 80 channels in 20 groups, 256 pixels: 6 and 3.)
const PICKED_PIXELS: usize = 128;
/// Pixels, at least, for which it is worth while to make out permutations that other ways do without. (Input gradients of one image
/// of 14 x 14 to 28 x 28, 40 to 112 interleaved channels: 1.2 to 1.4 times the time to try it in vain. 144 channels of 56 x 56 to 24, 8
/// groups, 0.64 times, as they are then side by side.)
const PERMUTED_PIXELS: usize = 1024;
/// Multiply-adds of outer products that take as long as a unit of [`Permutation::cost`]. (The forward passes of the 61 layers of
/// kEffNet-B0 D6_16ch and D6v3_4ch at 32x32, interleaved, take 46.5 ms with 0.8, 1.2 or 2, 47.1 all transposed; 80 channels of
/// 16 x 16 to 80, 20 groups, 0.23 permuted, 0.28 transposed, 24 of 31 x 31 to 24, 6 groups, 0.36 and 0.28: Intel Xeon.)
pub(super) const PERMUTED: f64 = 1.6;

/// How a [`Product`] goes through pixels.
enum Way {
    /// Groups of one output channel, whose output may be permuted, or of one input channel, whose input may be: vectors of whatever
    /// groups.
    Folded(Option<Permutation>),
    /// Groups side by side in vectors, of an input that may be permuted.
    SideBySide(SideBySide, Option<Permutation>),
    /// Pixels as they are, times matrices: where each group's first input channel stands, and the distance to the next one.
    Outer(Vec<[usize; 2]>),
    /// Transposed to rows and back.
    Transposed,
}

impl Product {
    /// NHWC, by the fastest way.
    pub(super) fn pixels<T: Element, M: MulAcc<T>>(
        &self,
        products: M,
        threads: usize,
        x: &[T],
        weight: Weights<'_, T>,
        bias: Option<&[T]>,
        y: Shared<T>,
    ) {
        let pixels = self.images.count * self.images.pixels;
        let permutation = self.permutation::<T>();
        let permutation = permutation.as_ref();
        match self.way::<T, M>(permutation) {
            Way::Folded(before) => self.folded(threads, x, weight, bias, before.as_ref().or(permutation), y),
            Way::SideBySide(groups, before) => {
                self.side_by_side(products, threads, x, weight, bias, &groups, [before.as_ref(), permutation], y);
            }
            Way::Outer(places) => self.outer(products, threads, x, weight, bias, &places, permutation, y),
            Way::Transposed => {
                let tile = PIXEL_TILES[M::TERMS - 1].min(pixels.next_multiple_of(8));
                self.packed(products, weight, bias, tile, |packed| self.transposed(threads, tile, x, packed, y));
            }
        }
    }

    /// The permutation of the output's channels, if there is one and it has instructions.
    fn permutation<T: Element>(&self) -> Option<Permutation> {
        let places = self.out_places.as_ref()?;
        let mut sources = vec![0; places.len()];
        places.iter().enumerate().for_each(|(channel, &place)| sources[place] = channel);
        Permutation::new::<T>(self.isa, &sources, self.images.count * self.images.pixels)
    }

    /// The fastest way, by what a pixel of one group costs in multiply-adds of outer products.
    fn way<T: Element, M: MulAcc<T>>(&self, permutation: Option<&Permutation>) -> Way {
        let (k, m, lanes) = (self.group_in, self.group_out, lanes::<T>(self.isa));
        if self.out_places.is_some() && permutation.is_none() {
            return Way::Transposed;
        }
        let picks = has_permute::<T>(self.isa);
        let pixels = self.images.count * self.images.pixels;
        if m == 1 && folds(k, picks) && self.in_places.is_none() {
            return Way::Folded(None);
        }
        if k == 1 && picks && unfolds(m) && permutation.is_none() {
            let Some(places) = &self.in_places else { return Way::Folded(None) };
            if let Some(before) = Permutation::new::<T>(self.isa, places, pixels) {
                return Way::Folded(Some(before));
            }
        }
        let per_group = |cost: f64| cost / self.groups as f64;
        let permuted = permutation.map_or(0.0, |permutation| per_group(PERMUTED * permutation.cost()));
        let steps = k.div_ceil(M::TERMS);
        let outer = ((steps + STORE) * m.div_ceil(lanes)) as f64 + permuted;
        let transposed = SHORT_ROWS * (steps * m) as f64 / lanes as f64 + TRANSPOSE * (k + m) as f64;
        let best = outer.min(transposed);
        if picks && pixels >= if self.in_places.is_some() { PERMUTED_PIXELS } else { PICKED_PIXELS } {
            let cost = |vectors: usize| PICKED * per_group((vectors * (steps + STORE)) as f64) + permuted;
            // So many vectors there are at least.
            let found = (cost((self.groups * m).div_ceil(lanes)) < best).then(|| {
                let before = match &self.in_places {
                    Some(places) => Some(Permutation::new::<T>(self.isa, places, pixels)?),
                    None => None,
                };
                let groups = SideBySide::new([self.groups, k, m], lanes, M::TERMS)?;
                let before_cost = before.as_ref().map_or(0.0, |before| per_group(PERMUTED * before.cost()));
                Some((cost(groups.vectors.len()) + before_cost, Way::SideBySide(groups, before)))
            });
            if let Some((_, found)) = found.flatten().filter(|(cost, _)| *cost < best) {
                return found;
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
        mut body: impl FnMut(Range<usize>, (*mut T, usize), usize),
    ) {
        let c_out = self.groups * self.group_out;
        let ahead = tile * c_out;
        let to = |pixels: &Range<usize>| y.ptr().wrapping_add(pixels.start * c_out);
        let Some(permutation) = permutation else {
            return chunks(range, tile).for_each(|pixels| body(pixels.clone(), (to(&pixels), c_out), ahead));
        };
        // Pixels in whole cache lines.
        let step = permutation.sources.next_multiple_of(lanes::<T>(self.isa));
        scratch::with(tile.min(range.len()) * step, |memory: &mut [T]| {
            for pixels in chunks(range, tile) {
                body(pixels.clone(), (memory.as_mut_ptr(), step), 0);
                // SAFETY: memory holds these pixels; those of y are this task's own.
                unsafe { permutation.run(memory.as_ptr(), to(&pixels), [step, c_out], pixels.len(), [0, ahead]) };
            }
        });
    }

    /// Pixels one after the other: products of groups of one output channel folded, or values of one input channel unfolded. With a
    /// permutation, the former's results or the latter's input are permuted in a cache, whichever channels are fewer.
    fn folded<T: Element>(
        &self,
        threads: usize,
        x: &[T],
        (weights, WeightStrides { group, output: out, input }): Weights<'_, T>,
        bias: Option<&[T]>,
        permutation: Option<&Permutation>,
        y: Shared<T>,
    ) {
        let (groups, lanes) = (self.groups, lanes::<T::Wide>(self.isa));
        let (c_in, c_out) = (groups * self.group_in, groups * self.group_out);
        let unfolded = self.group_in == 1;
        let (several, step) = if unfolded { (self.group_out, out) } else { (self.group_in, input) };
        // After so many pixels, pixels and vectors begin together.
        let unit = lanes / gcd(groups, lanes);
        let lens = [unit * groups * several, bias.map_or(0, |_| unit * c_out)];
        scratch::with(lens.iter().sum(), |memory: &mut [T::Wide]| {
            let [packed, wide_bias] = cut(memory, lens);
            for (i, weight) in packed.iter_mut().enumerate() {
                *weight = weights[i / several % groups * group + i % several * step].widen();
            }
            if let Some(bias) = bias {
                wide_bias.iter_mut().enumerate().for_each(|(i, value)| *value = bias[i % bias.len()].widen());
            }
            let (weights, bias) = (&*packed, bias.map(|_| &*wide_bias));
            let pixels = self.images.count * self.images.pixels;
            let units = pixels.div_ceil(unit);
            let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(units) };
            let tile = outer_tile::<T>(c_in + c_out).next_multiple_of(unit);
            parallel_for(threads, parts, |task| {
                let units = part(units, parts, task);
                let range = units.start * unit..pixels.min(units.end * unit);
                let (x, y) = (&x[..range.end * c_in], |start: usize| y.at(start * c_out).ptr());
                let Some(permutation) = permutation else {
                    // SAFETY: the results of these pixels are this task's own.
                    return unsafe { self.fold(&x[range.start * c_in..], weights, bias, y(range.start)) };
                };
                scratch::with(tile * groups, |memory: &mut [T]| {
                    for range in chunks(range, tile) {
                        let (x, y) = (&x[range.start * c_in..range.end * c_in], y(range.start));
                        let permuted = &mut memory[..range.len() * groups];
                        let steps = [groups; 2];
                        // SAFETY: memory and x hold these pixels; those of y are this task's own.
                        unsafe {
                            if unfolded {
                                let ahead = [tile * groups, 0];
                                permutation.run(x.as_ptr(), permuted.as_mut_ptr(), steps, range.len(), ahead);
                                self.fold(permuted, weights, bias, y);
                            } else {
                                self.fold(x, weights, bias, permuted.as_mut_ptr());
                                permutation.run(permuted.as_ptr(), y, steps, range.len(), [0, tile * groups]);
                            }
                        }
                    }
                });
            });
        });
    }

    /// The results of pixels that begin with the first weight.
    ///
    /// # Safety
    /// There must be room for them at `y`.
    unsafe fn fold<T: Element>(&self, x: &[T], weights: &[T::Wide], bias: Option<&[T::Wide]>, y: *mut T) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.group_in == 1 {
                self.isa.run(Unfolds { x, group_out: self.group_out, weights, bias, y }.promise());
            } else {
                let (group_in, len) = (self.group_in, x.len() / self.group_in);
                self.isa.run(Folds { x, group_in, weights, bias, y, len }.promise());
            }
        }
    }

    /// Pixels as they are, or permuted by the first of the permutations, several groups in a vector; the second permutes these.
    fn side_by_side<T: Element, M: MulAcc<T>>(
        &self,
        products: M,
        threads: usize,
        x: &[T],
        (weights, WeightStrides { group, output: out, input }): Weights<'_, T>,
        bias: Option<&[T]>,
        groups: &SideBySide,
        [before, permutation]: [Option<&Permutation>; 2],
        y: Shared<T>,
    ) {
        let (c_in, c_out) = (self.images.channels, self.groups * self.group_out);
        let pixels = self.images.count * self.images.pixels;
        // Twice the first cache: vectors share no pixels' lines, but their indices and weights.
        let tile = 2 * outer_tile::<T>(c_in + c_out);
        let permuted = before.map_or(0, |_| c_in.next_multiple_of(lanes::<T>(self.isa)));
        let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(pixels.div_ceil(OUTER_PIXELS)) };
        scratch::with(groups.weights(), |packed: &mut [T::Wide]| {
            groups.pack(products, |g, o, i| weights[g * group + o * out + i * input], packed);
            let each = groups.weights() / groups.vectors.len();
            let packed = &*packed;
            parallel_for(threads, parts, |task| {
                scratch::with(tile * permuted, |memory: &mut [T]| {
                    self.tiles(part(pixels, parts, task), tile, permutation, y, |range, (y, y_step), ahead| {
                        let x = x[range.start * c_in..range.end * c_in].as_ptr();
                        let (x, x_step, x_ahead) = match before {
                            Some(before) => {
                                let (to, steps) = (memory.as_mut_ptr(), [c_in, permuted]);
                                // SAFETY: the pixels exist in x, and memory has room for them.
                                unsafe { before.run(x, to, steps, range.len(), [tile * c_in, 0]) };
                                (to.cast_const(), permuted, 0)
                            }
                            None => (x, c_in, tile * c_in),
                        };
                        for (vector, weights) in groups.vectors.iter().zip(packed.chunks_exact(each)) {
                            // SAFETY: the pixels exist at x, with all channels, and where they are written.
                            self.isa.run(unsafe {
                                Promised::new_unchecked(SideBySideRows {
                                    products,
                                    x,
                                    x_step,
                                    y: y.add(vector.columns.start),
                                    y_step,
                                    pixels: range.len(),
                                    columns: vector.columns.len(),
                                    sources: &groups.sources[vector.sources.clone()],
                                    index: groups.index(vector),
                                    weights,
                                    bias: bias.map(|bias| &bias[vector.columns.clone()]),
                                    ahead: [x_ahead, ahead],
                                })
                            });
                        }
                    });
                });
            });
        });
    }

    /// Pixels as they are, times matrices: for groups whose output channels fill vectors.
    fn outer<T: Element, M: MulAcc<T>>(
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
        // Values that are copied to be computed with count, too.
        let tile = outer_tile::<T>(if M::COPIES { 3 } else { 1 } * c_in + c_out);
        let rows: Vec<_> = (0..tile).map(|pixel| pixel * c_in).collect();
        let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(pixels.div_ceil(OUTER_PIXELS)) };
        let steps = k.div_ceil(M::TERMS);
        scratch::with(c_out * steps, |packed: &mut [T::Wide]| {
            for (g, packed) in packed.chunks_exact_mut(steps * m).enumerate() {
                self.pack(products, weight, g, 0..m, packed);
            }
            let packed = &*packed;
            parallel_for(threads, parts, |task| {
                scratch::with(if M::COPIES { tile * c_in } else { 0 }, |memory: &mut [T::Wide]| {
                    self.tiles(part(pixels, parts, task), tile, permutation, y, |range, (y, y_step), ahead| {
                        let x = &x[range.start * c_in..range.end * c_in];
                        let next = x.as_ptr().wrapping_add(tile * c_in);
                        let a: *const M::Value = if M::COPIES {
                            let (len, y) = (x.len(), writable(memory));
                            // The kernel asks for what comes next, evenly.
                            self.isa.run(WidenRows { x: (x, len), y: (y, len), size: [1, len], ahead: 0 });
                            memory.as_ptr().cast()
                        } else {
                            x.as_ptr().cast()
                        };
                        for (g, &[first, distance]) in places.iter().enumerate() {
                            // SAFETY: the pixels exist in x, with all of the group's channels, and where they are written.
                            self.isa.run(unsafe {
                                Promised::new_unchecked(OuterProducts {
                                    products,
                                    a: a.add(first),
                                    a_step: distance * M::TERMS,
                                    a_rows: &rows[..range.len()],
                                    a_ahead: 0,
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
                                        // Those of the next tile, a part of them for each group.
                                        next: next.wrapping_add(g * k * tile),
                                        ahead,
                                    },
                                })
                            });
                        }
                    });
                });
            });
        });
    }

    /// Tiles of so many pixels are transposed into rows and back: the input by [`CHANNEL_TILE`], the output by [`Chunk`].
    fn transposed<T: Element, M: MulAcc<T>>(
        &self,
        threads: usize,
        tile: usize,
        x: &[T],
        packed: Packed<'_, T, M>,
        y: Shared<T>,
    ) {
        let (k, m) = (self.group_in, self.group_out);
        let (c_in, c_out) = (self.images.channels, self.groups * m);
        let pixels = self.images.count * self.images.pixels;
        let out_chunks = self.chunks::<T>(packed.blocks);
        // All at once where a group's channels are anywhere, or where chunks come back to it.
        let all = self.in_places.is_some() || out_chunks.len() > 1;
        let cluster = if all { self.groups } else { CHANNEL_TILE.div_ceil(k).min(self.groups) };
        let x_row = |c: usize| self.in_places.as_ref().map_or(c % (cluster * k), |places| places[c]);
        let x_offsets: Vec<_> = (0..c_in).map(|c| x_row(c) * tile).collect();
        let mut y_offsets = vec![0; c_out];
        for Chunk { rows, places, .. } in &out_chunks {
            for c in (0..self.groups).flat_map(|g| rows.clone().map(move |row| g * m + row)) {
                y_offsets[c] = (self.out_places.as_ref().map_or(c, |places| places[c]) - places.start) * tile;
            }
        }
        let most = out_chunks.iter().map(|chunk| chunk.places.len()).max().unwrap_or(0);
        let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(pixels.div_ceil(tile)) };
        parallel_for(threads, parts, |task| {
            let sizes = [cluster * k * tile, most * tile];
            scratch::with(sizes.iter().sum(), |memory: &mut [T]| {
                let [x_rows, y_rows] = cut(memory, sizes);
                for range in chunks(part(pixels, parts, task), tile) {
                    for Chunk { blocks, places, .. } in &out_chunks {
                        let packed = Packed { blocks: &packed.blocks[blocks.clone()], y_offsets: &y_offsets, ..packed };
                        for g in 0..self.groups {
                            if g % cluster == 0 && blocks.start == 0 {
                                let size = [range.len(), cluster.min(self.groups - g) * k];
                                // SAFETY: the source is pixels x channels of x, the destination channels x tile of x_rows.
                                self.isa.run(unsafe {
                                    let src = x.as_ptr().add(range.start * c_in + g * k);
                                    Transpose::gather(size, src, c_in, x_rows.as_mut_ptr(), tile)
                                });
                            }
                            let (x, y) = (x_rows.as_ptr(), y_rows.as_mut_ptr());
                            // SAFETY: offsets lie inside x_rows and y_rows, each row `tile` values long.
                            unsafe { self.group([g, 0], x, &x_offsets[g * k..][..k], &packed, y, range.len(), [0, 0]) };
                        }
                        // SAFETY: the destination is this task's own pixels of y.
                        self.isa.run(unsafe {
                            let dst = y.ptr().add(range.start * c_out + places.start);
                            Transpose::scatter([places.len(), range.len()], y_rows.as_ptr(), tile, dst, c_out)
                        });
                    }
                }
            });
        });
    }

    /// Chunks of output rows: blocks of rows of all groups, of [`CHUNK_BYTES`] a pixel or more, where they are interleaved by the
    /// channels of a group; else all. (Groups by chunks where they stay in their places: 1 % slower.)
    fn chunks<T>(&self, blocks: &[Range<usize>]) -> Vec<Chunk> {
        let (groups, m) = (self.groups, self.group_out);
        let chunk = |some: Range<usize>| {
            let rows = blocks[some.start].start..blocks[some.end - 1].end;
            Chunk { blocks: some, places: rows.start * groups..rows.end * groups, rows }
        };
        if !self.out_places.as_ref().is_some_and(|places| interleaved_by_group(places, m)) {
            return vec![chunk(0..blocks.len())];
        }
        let together = (CHUNK_BYTES / size_of::<T>()).div_ceil(blocks[0].len() * groups);
        chunks(0..blocks.len(), together).map(chunk).collect()
    }
}

/// Output rows of all groups that go to neighbouring places, few enough to stay in the first cache until they are transposed.
struct Chunk {
    /// Which blocks of each group's rows.
    blocks: Range<usize>,
    /// The rows.
    rows: Range<usize>,
    /// Where they go.
    places: Range<usize>,
}

/// Pixels of a tile in NHWC that stays as it is.
pub(super) fn outer_tile<T>(channels: usize) -> usize {
    (OUTER_BYTES / (channels * size_of::<T>())).max(1).next_multiple_of(OUTER_PIXELS)
}
