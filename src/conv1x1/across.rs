//! Interleaved channels in vectors that lie across groups: how [`crate::microkernels::across`] goes through pixels.
//!
//! Where the output is interleaved, the input's channels are permuted first; where the input is (the input gradient), it is read
//! as it is, and the results are permuted.

use std::ops::Range;

use super::nhwc::{PERMUTED, PERMUTED_PIXELS, outer_tile};
use super::{Product, TASKS_PER_THREAD, Weights, gcd, interleaved_by_group};
use crate::interleave::Permutation;
use crate::microkernels::across::{Across as AcrossRows, AcrossSums, VECTORS, fits, has_mode, needs_pick};
use crate::parallel::Shared;
use crate::pool::{chunks, parallel_for, part};
use crate::scratch::{self, cut};
use crate::shape::interleave_sources;
use crate::simd::element::{Element, lanes};
use crate::simd::{IsaKind, LINE_BYTES};

/// Bytes of pixels' input channels that are transposed together. (From 8 to 32 KiB the time is the same.)
const TILE_BYTES: usize = 16 << 10;
/// Bytes of pixels of a tile of a weight gradient, whose sums go through memory once a tile. (80 channels to 480 in 5 groups, two
/// threads of an Intel Xeon: 0.90 ms with 24 KiB, 0.82 with 48, 0.79 with 96; 80 to 80 in 10 0.18, 0.18 and 0.22.)
const SUMS_TILE_BYTES: usize = 48 << 10;
/// Bytes of a pixel's input channels, read as they are, beyond which the next tile's are asked for. (Input gradients, 64 images, two
/// threads of an Intel Xeon: 40 channels of 31 x 31 to 240 in 2 groups take 9.7 ms without, 5.8 with, 16 to 96 in 4 2.35 and 1.12,
/// 24 to 24 in 8 0.55 and 0.45; 16 to 16 in 2, which is a cache line, 0.27 and 0.32.)
const ASKED_BYTES: usize = LINE_BYTES;

/// Multiply-adds of outer products that take as long as one of a vector across groups, or picking one from a row. (80 channels to
/// 480 in 5 groups, a thread of an Intel Xeon: 111 ns a pixel so, 81 by outer products without the interleave, 152 with it.)
const ACROSS: f64 = 1.08;

/// Vectors of interleaved channels across groups.
pub(super) struct Across {
    isa: IsaKind,
    lanes: usize,
    /// Groups, input and output channels of each.
    size: [usize; 3],
    /// Whether the input is interleaved, not the output.
    backwards: bool,
    /// What makes rows of the input's channels, each of one for every group; backwards, where it is such rows, what puts the
    /// output's channels into their groups.
    permutation: Permutation,
    sets: Vec<Set>,
}

/// Vectors that start with the same group.
struct Set {
    /// The first of the groups that its rows have, and how many they are.
    groups: [usize; 2],
    /// Which of the rows' results, one row after the other, is the first vector's first, and the distance to the next vector's.
    starts: [usize; 2],
    /// How many lanes of a vector hold results: all, or those of whole rows.
    used: usize,
    /// The vectors' numbers.
    vectors: Range<usize>,
    /// Where in a pixel the first vector is written, and the distance to the next one.
    places: [usize; 2],
    /// The group of each lane, counted from the first one.
    index: Vec<u32>,
}

impl Across {
    /// That of groups of so many input and output channels, of which either are interleaved to these places, if there is code for
    /// so many groups and pixels, and a group costs less than `most` multiply-adds of outer products a pixel.
    pub(super) fn new<T: Element>(
        isa: IsaKind,
        size @ [groups, k, m]: [usize; 3],
        places: [Option<&[usize]>; 2],
        pixels: usize,
        most: f64,
    ) -> Option<Self> {
        let (lanes, most) = (lanes::<T>(isa), most * groups as f64);
        if !fits::<T>(isa) || ACROSS * ((groups * m).div_ceil(lanes) * (k + 1)) as f64 >= most {
            return None;
        }
        let backwards = match places {
            // Vectors of the output, which are full.
            [None, Some(places)] if (groups * m).is_multiple_of(lanes) && interleaved_by_group(places, m) => false,
            [Some(places), None] if interleaved_by_group(places, k) => true,
            _ => return None,
        };
        let of = |sets: Vec<Set>| {
            let sources = if backwards {
                let mut sources = vec![0; groups * m];
                for set in &sets {
                    set.results(m).for_each(|lane| sources[lane.group * m + lane.channel] = lane.place);
                }
                sources
            } else {
                interleave_sources(groups * k, k)
            };
            let permutation = Permutation::new::<T>(isa, &sources, pixels)?;
            let this = Self { isa, lanes, size, backwards, permutation, sets };
            (this.cost() < most).then_some(this)
        };
        // Results that are permuted need not fill vectors: those of whole rows, or of as many groups as have room, share what is
        // picked for them. (Input gradients, 16 images, a thread of an Intel Xeon: 24 channels of 31 x 31 to 144, 6 groups, 0.46 ms
        // so, 0.71 with full ones; 80 of 16 x 16 to 480, 20 groups, 0.43 and 0.72.)
        let differ = backwards && pixels >= PERMUTED_PIXELS && !lanes.is_multiple_of(groups);
        let full = has_mode(groups, lanes).then(|| full(groups, m, lanes));
        let whole = differ.then(|| whole(groups, m, lanes));
        let ways = [full, whole].into_iter().flatten().filter_map(of);
        ways.min_by(|one, other| one.cost().total_cmp(&other.cost()))
    }

    /// What a pixel costs in multiply-adds of outer products.
    fn cost(&self) -> f64 {
        let k = self.size[1];
        // So many times are rows picked from for the vectors that start with the same group.
        let times = |set: &Set| {
            let needed = needs_pick(set.groups[1], self.lanes, set.index[0] as usize);
            if needed { set.vectors.len().div_ceil(VECTORS) } else { 0 }
        };
        let picked: usize = self.sets.iter().map(times).sum();
        // Storing a sum takes about as long as adding to it.
        ACROSS * (self.vectors() * (k + 1) + picked * k) as f64 + PERMUTED * self.permutation.cost()
    }

    /// How many vectors there are.
    fn vectors(&self) -> usize {
        self.sets.last().map_or(0, |set| set.vectors.end)
    }

    /// Calls `write` with the places of weights among those of all vectors, and their groups, output and input channels.
    pub(super) fn weights(&self, mut write: impl FnMut(usize, [usize; 3])) {
        let [_, k, m] = self.size;
        for Lane { vector, lane, group, channel, .. } in self.sets.iter().flat_map(|set| set.results(m)) {
            (0..k).for_each(|i| write((vector * k + i) * self.lanes + lane, [group, channel, i]));
        }
    }

    /// From one pixel's rows to the next one's: two vectors may be read from the last row on.
    fn step(&self) -> usize {
        let channels = self.size[0] * self.size[1];
        if self.backwards { channels } else { channels.next_multiple_of(self.lanes) + 2 * self.lanes }
    }

    /// The memory that [`Across::rows`] of at most so many pixels take.
    fn memory(&self, tile: usize) -> usize {
        if self.backwards { self.step() + 4 * self.lanes } else { tile * self.step() }
    }

    /// Calls `body` for these pixels, or some after the others, with their rows.
    fn rows<T: Element>(
        &self,
        x: &[T],
        range: Range<usize>,
        memory: &mut [T],
        mut body: impl FnMut(Range<usize>, *const T),
    ) {
        let (c_in, step) = (self.size[0] * self.size[1], self.step());
        if !self.backwards {
            assert!(memory.len() >= range.len() * step, "memory");
            let x = &x[range.start * c_in..range.end * c_in];
            // SAFETY: these pixels, for which there is room.
            unsafe {
                self.permutation.run(x.as_ptr(), memory.as_mut_ptr(), [c_in, step], range.len(), [x.len(), 0]);
            }
            return body(range, memory.as_ptr());
        }
        // After the last pixels there are no two vectors to be read.
        let end = (x.len().saturating_sub(2 * self.lanes) / c_in).clamp(range.start, range.end);
        let last = &x[end * c_in..range.end * c_in];
        memory[..last.len()].copy_from_slice(last);
        for (range, x) in [(range.start..end, x[range.start * c_in..].as_ptr()), (end..range.end, memory.as_ptr())] {
            if !range.is_empty() {
                body(range, x);
            }
        }
    }

    /// Adds the weight gradient of pixels `range` to sums in the order of [`Across::weights`].
    pub(super) fn sums<T: Element>(&self, x: &[T], grad_output: &[T], range: Range<usize>, sums: &mut [T::Wide]) {
        let ([groups, k, m], lanes) = (self.size, self.lanes);
        let c_out = groups * m;
        let tile = (SUMS_TILE_BYTES / ((self.step() + c_out) * size_of::<T>())).max(8);
        let mut each = |range: Range<usize>, rows: *const T| {
            for set in &self.sets {
                // SAFETY: rows hold these pixels and more; the vectors exist in grad_output.
                self.isa.run(unsafe {
                    AcrossSums {
                        x: rows,
                        x_step: self.step(),
                        groups,
                        terms: k,
                        index: &set.index,
                        g: grad_output[range.start * c_out + set.places[0]..].as_ptr(),
                        g_steps: [c_out, set.places[1]],
                        sums: &mut sums[set.vectors.start * k * lanes..set.vectors.end * k * lanes],
                        pixels: range.len(),
                        ahead: tile * c_out,
                    }
                    .promise()
                });
            }
        };
        scratch::with(self.memory(tile), |memory: &mut [T]| {
            chunks(range, tile).for_each(|range| self.rows(x, range, memory, &mut each));
        });
    }
}

/// A lane that holds a result.
struct Lane {
    /// The vector's number.
    vector: usize,
    /// The lane's number.
    lane: usize,
    /// Where in a pixel it is written.
    place: usize,
    /// The group.
    group: usize,
    /// The output channel of the group.
    channel: usize,
}

impl Set {
    /// The lanes that hold results, of which each group has `m`.
    fn results(&self, m: usize) -> impl Iterator<Item = Lane> {
        let Self { groups: [first, count], starts, used, places, .. } = *self;
        self.vectors.clone().enumerate().flat_map(move |(number, vector)| {
            let begin = starts[0] + number * starts[1];
            // The last vector may have more lanes than there are channels.
            let lanes = used.min(count * m - begin);
            (0..lanes).map(move |lane| {
                let (group, channel) = (first + (begin + lane) % count, (begin + lane) / count);
                Lane { vector, lane, place: places[0] + number * places[1] + lane, group, channel }
            })
        })
    }
}

/// Full vectors of `m` rows of so many groups.
fn full(groups: usize, m: usize, lanes: usize) -> Vec<Set> {
    let (all, sets) = ((groups * m).div_ceil(lanes), groups / gcd(groups, lanes));
    let mut vectors = 0;
    let set = |set: usize| {
        let (start, step, first) = (set * lanes, sets * lanes, vectors);
        vectors += (all - set).div_ceil(sets);
        let index = (start..start + lanes).map(|place| (place % groups) as u32).collect();
        let starts = [start, step];
        Set { groups: [0, groups], starts, used: lanes, vectors: first..vectors, places: starts, index }
    };
    (0..sets.min(all)).map(set).collect()
}

/// Vectors of whole rows of `m`, of as many of the groups at a time as have room.
fn whole(groups: usize, m: usize, lanes: usize) -> Vec<Set> {
    let mut vectors = 0;
    let set = |range: Range<usize>| {
        let (count, first) = (range.len(), vectors);
        let used = lanes / count * count;
        vectors += (count * m).div_ceil(used);
        let index = (0..lanes).map(|lane| (lane % count) as u32).collect();
        let (vectors, places) = (first..vectors, [first * lanes, lanes]);
        Set { groups: [range.start, count], starts: [0, used], used, vectors, places, index }
    };
    chunks(0..groups, lanes).map(set).collect()
}

impl Product {
    /// Pixels' input channels as rows times vectors of weights across groups.
    pub(super) fn across<T: Element>(
        &self,
        threads: usize,
        x: &[T],
        (weights, [group, out, input]): Weights<'_, T>,
        bias: Option<&[T]>,
        across: &Across,
        y: Shared<T>,
    ) {
        let ([groups, k, m], lanes) = (across.size, across.lanes);
        let c_in = groups * k;
        let pixels = self.images.count * self.images.pixels;
        let tile = if across.backwards {
            outer_tile::<T>(c_in + groups * m)
        } else {
            (TILE_BYTES / (across.step() * size_of::<T>())).max(1).next_multiple_of(4)
        };
        let asked = if across.backwards && c_in * size_of::<T>() > ASKED_BYTES { tile * c_in } else { 0 };
        let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(pixels.div_ceil(4)) };
        let after = across.backwards.then_some(&across.permutation);
        let columns = across.vectors() * lanes;
        let lens = [columns * k, if bias.is_some() { columns } else { 0 }];
        scratch::with(lens.iter().sum(), |memory: &mut [T::Wide]| {
            // Lanes without a channel, whose sums nobody reads.
            if columns > groups * m {
                memory.fill(T::Wide::default());
            }
            let [packed, wide_bias] = cut(memory, lens);
            across.weights(|place, [g, o, i]| packed[place] = weights[g * group + o * out + i * input].widen());
            if let Some(bias) = bias {
                for Lane { vector, lane, group, channel, .. } in across.sets.iter().flat_map(|set| set.results(m)) {
                    wide_bias[vector * lanes + lane] = bias[group * m + channel].widen();
                }
            }
            let (packed, bias) = (&*packed, bias.map(|_| &*wide_bias));
            parallel_for(threads, parts, |task| {
                scratch::with(across.memory(tile), |memory: &mut [T]| {
                    let range = part(pixels, parts, task);
                    self.tiles(range, tile, after, y, |all, (y, y_step), ahead| {
                        across.rows(x, all.clone(), memory, |range, rows| {
                            for (number, set) in across.sets.iter().enumerate() {
                                let Range { start, end } = set.vectors;
                                // SAFETY: rows hold these pixels and more; y has room for their vectors.
                                self.isa.run(unsafe {
                                    AcrossRows {
                                        x: rows.wrapping_add(set.groups[0]),
                                        x_steps: [across.step(), groups],
                                        groups: set.groups[1],
                                        terms: k,
                                        index: &set.index,
                                        weights: &packed[start * k * lanes..end * k * lanes],
                                        bias: bias.map(|bias| &bias[start * lanes..end * lanes]),
                                        y: y.wrapping_add((range.start - all.start) * y_step + set.places[0]),
                                        y_steps: [y_step, set.places[1]],
                                        pixels: range.len(),
                                        ahead: [if number == 0 { asked } else { 0 }, ahead],
                                    }
                                    .promise()
                                });
                            }
                        });
                    });
                });
            });
        });
    }
}
