//! Grouped pointwise convolution and its input gradient in NHWC, whose pixels have all channels side by side.
//!
//! Three ways lead through them ([`Way`]), of which each is the fastest for some groups. Where the output is permuted, pixels are
//! computed in a cache and permuted from there; transposed rows go to their places by themselves.

use std::ops::Range;

use super::side_by_side::SideBySide;
use super::{Packed, Product, TASKS_PER_THREAD, Weights, constant_stride};
use crate::kernels::outer::{OuterProducts, Pixels};
use crate::kernels::products::Products;
use crate::kernels::side_by_side::SideBySide as SideBySideRows;
use crate::kernels::transpose::Transpose;
use crate::kernels::{Element, lanes, picks};
use crate::ops::Shared;
use crate::ops::interleave::Permutation;
use crate::pool::{chunks, parallel_for, part};
use crate::scratch;

/// Pixels of a transposed tile: two vectors of 16 (of 16, 32, 48 and 96 the fastest by 10 %).
const PIXEL_TILE: usize = 32;
/// Channels that are transposed together, at least: whole cache lines are read.
const CHANNEL_TILE: usize = 64;
/// Bytes of a tile of pixels that stays as it is: the first cache, as every group returns to it.
const OUTER_BYTES: usize = 32 << 10;
/// Pixels of such a tile are a multiple of this, the rows of the kernel's tiles.
const OUTER_PIXELS: usize = 8;
/// Multiply-adds of outer products that take as long as storing their sums. With [`SHORT_ROWS`] and [`TRANSPOSE`] it tells
/// the faster way in NHWC for all 122 forward passes and input gradients of kEffNet-B0 D6_16ch and D6v3_4ch at 32x32, within
/// 5 % (AVX-512; the slower way takes up to 2.5 times as long).
const STORE: usize = 2;
/// Multiply-adds of outer products that take as long as one over transposed rows of [`PIXEL_TILE`] pixels.
const SHORT_ROWS: f64 = 1.4;
/// Multiply-adds of outer products that take as long as transposing a value.
const TRANSPOSE: f64 = 0.35;
/// Multiply-adds of outer products that take as long as one of values picked for groups side by side. (64 images, two threads of
/// an AMD EPYC: 80 channels of 16 x 16 to 80, 20 groups, take 0.08 ms so, 0.17 transposed; 480 to 80 0.38 and 0.55; 672 to 192, 32
/// groups, of 8 x 8, 0.23 both.)
const PICKED: f64 = 2.1;
/// Pixels, at least, for which it is worth while to make out the lanes. (192 channels in 32 groups, a thread: 64 pixels take 4 us
/// without, 6 with; 80 channels in 20 groups, 256 pixels: 6 and 3.)
const PICKED_PIXELS: usize = 128;
/// Multiply-adds of outer products that take as long as permuting a vector from one window. (The same layers, interleaved: 0.13
/// ms permuted, 0.17 transposed; 0.43 and 0.54; 80 to 480 of 16 x 16, 5 groups, 1.08 both.)
const PERMUTED: f64 = 2.0;

/// How a [`Product`] goes through pixels.
enum Way {
    /// Groups side by side in vectors.
    SideBySide(SideBySide),
    /// Pixels as they are, times matrices: where each group's first input channel stands, and the distance to the next one.
    Outer(Vec<[usize; 2]>),
    /// Transposed to rows and back.
    Transposed,
}

impl Product {
    /// NHWC, by the fastest way.
    pub(super) fn pixels<T: Element, M: Products<T>>(
        &self,
        products: M,
        threads: usize,
        x: &[T],
        weight: Weights<'_, T>,
        bias: Option<&[T]>,
        y: Shared<T>,
    ) {
        let permutation = self.permutation::<T>();
        let permutation = permutation.as_ref();
        match self.way::<T, M>(permutation) {
            Way::SideBySide(groups) => {
                self.side_by_side(products, threads, x, weight, bias, &groups, permutation, y);
            }
            Way::Outer(places) => self.outer(products, threads, x, weight, bias, &places, permutation, y),
            Way::Transposed => self.packed(products, weight, bias, |packed| self.transposed(threads, x, packed, y)),
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
        if picks && self.images.count * self.images.pixels >= PICKED_PIXELS {
            let faster =
                |vectors: usize| PICKED * per_group((vectors * steps) as f64) + permuted < outer.min(transposed);
            // So many vectors there are at least.
            let groups = faster((self.groups * m).div_ceil(lanes))
                .then(|| SideBySide::new([self.groups, k, m], lanes, M::TERMS))
                .flatten()
                .filter(|groups| faster(groups.vectors.len()));
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

    /// Pixels as they are, several groups in a vector.
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

    /// Pixels as they are, times matrices: for groups whose output channels fill vectors.
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

    /// Tiles of pixels are transposed into rows and back.
    fn transposed<T: Element, M: Products<T>>(&self, threads: usize, x: &[T], packed: Packed<'_, T, M>, y: Shared<T>) {
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
}

/// Pixels of a tile in NHWC that stays as it is.
pub(super) fn outer_tile<T>(channels: usize) -> usize {
    (OUTER_BYTES / (channels * size_of::<T>())).max(1).next_multiple_of(OUTER_PIXELS)
}
