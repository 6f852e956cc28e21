//! Interleaving of channels: a permutation of planes (NCHW) or of each pixel's values (NHWC).

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::microkernels::permute::{PermuteChannels, TransposeChannels, Window};
use crate::microkernels::transpose::{self, BLOCK};
use crate::parallel::{Shared, estimate};
use crate::pool::{chunks, parallel_for, part, threads_for};
use crate::shape::{Images, Order};
use crate::simd::element::{Element, has_permute, lanes};
use crate::simd::{IsaKind, Promised};

/// Tasks for each thread.
const TASKS_PER_THREAD: usize = 4;
/// Bytes of pixels, about, of which one vector of channels after the other is permuted: the first cache.
const TILE_BYTES: usize = 32 << 10;

/// `y[place] = x[sources[place]]` for the channels of every pixel.
///
/// With [`interleave_src_index`](crate::shape::interleave_src_index) this interleaves, with
/// [`interleave_dst_index`](crate::shape::interleave_dst_index) it undoes that (which is also the gradient).
pub fn permute<T: Element>(isa: IsaKind, sources: &[usize], images: Images, x: &[T], y: &mut [MaybeUninit<T>]) {
    let Images { count, pixels, channels, order } = images;
    assert_eq!((sources.len(), x.len(), y.len()), (channels, images.len(), images.len()));
    assert!(sources.iter().all(|&source| source < channels));
    let threads = threads_for(estimate(0, 2 * size_of_val(x)));
    let y = Shared::new(y);
    let rows = if order == Order::Nchw { count * channels } else { count * pixels };
    let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(rows) };
    let permutation = (order == Order::Nhwc).then(|| Permutation::new::<T>(isa, sources, rows)).flatten();
    if let Some(permutation) = permutation {
        let tile = (TILE_BYTES / (2 * channels * size_of::<T>())).max(1).next_multiple_of(8);
        parallel_for(threads, parts, |task| {
            for pixels in chunks(part(rows, parts, task), tile) {
                // SAFETY: the pixels exist in x and y; those of y are this task's own.
                unsafe {
                    let start = pixels.start * channels;
                    let (x, y) = (x.as_ptr().add(start), y.ptr().add(start));
                    permutation.run(x, y, [channels; 2], pixels.len(), [tile * channels; 2]);
                }
            }
        });
        return;
    }
    parallel_for(threads, parts, |task| {
        for row in part(rows, parts, task) {
            // SAFETY: each row of y is written by one task; sources are channels.
            unsafe {
                if order == Order::Nchw {
                    let (n, place) = (row / channels, row % channels);
                    let source = &x[(n * channels + sources[place]) * pixels..][..pixels];
                    y.ptr().add(row * pixels).copy_from_nonoverlapping(source.as_ptr(), pixels);
                } else {
                    let source = x.as_ptr().add(row * channels);
                    let target = y.ptr().add(row * channels);
                    for (place, &from) in sources.iter().enumerate() {
                        *target.add(place) = *source.add(from);
                    }
                }
            }
        }
    });
}

/// What transposing a pixel's channels costs beside its blocks, in windows from which a vector of channels is picked. (A window
/// takes 0.6 to 0.9 ns on an Intel Xeon. Layers whose output is interleaved, a thread: 80 channels of 16 x 16 to 480, which come
/// from 25 windows, 2.33 ms so, 2.38 with a matrix of 5 x 16 transposed, 112 to 672 from 49 3.6 and 3.3, 112 to 112 to 49 0.95
/// and 0.70, 240 to 80 to 25 1.12 and 1.22.)
const MATRIX: f64 = 6.0;
/// What transposing a block of 8 x 8 channels costs, in windows.
const FULL_BLOCK: f64 = 14.0;
/// What transposing half of one costs.
const HALF_BLOCK: f64 = 8.0;

/// A permutation of each pixel's channels, by the faster way.
pub(super) struct Permutation {
    isa: IsaKind,
    channels: usize,
    /// Channels that it takes these from, some of them perhaps not at all.
    pub sources: usize,
    way: Way,
}

enum Way {
    /// Vector by vector, from windows.
    Windows(Windows),
    /// Each pixel as a matrix of so many rows and columns, transposed.
    Matrix([usize; 2]),
}

impl Permutation {
    /// That which takes the channel at `sources[place]` to each place, if it is a matrix's or there are instructions for any, and
    /// if pixels are enough to be worth the while.
    pub fn new<T: Element>(isa: IsaKind, sources: &[usize], pixels: usize) -> Option<Self> {
        let lanes = lanes::<T>(isa);
        if pixels < lanes {
            return None;
        }
        let matrix = matrix(sources);
        let most = matrix.map_or(f64::INFINITY, matrix_cost);
        let windows = if has_permute::<T>(isa) { Windows::new(sources, lanes, most) } else { None };
        let way = windows.map(Way::Windows).or(matrix.map(Way::Matrix))?;
        Some(Self { isa, channels: sources.len(), sources: end(sources), way })
    }

    /// What a pixel costs, in windows, each of which takes an instruction or two.
    pub fn cost(&self) -> f64 {
        match &self.way {
            Way::Windows(windows) => windows.windows.len() as f64,
            Way::Matrix(size) => matrix_cost(*size),
        }
    }

    /// Permutes the channels of pixels; `ahead` are the distances to what is asked for meanwhile.
    ///
    /// # Safety
    /// So many pixels must be readable at `x`, one every `steps[0]` values, and writable at `y`, one every `steps[1]`, apart from
    /// each other.
    pub unsafe fn run<T: Element>(&self, x: *const T, y: *mut T, steps: [usize; 2], pixels: usize, ahead: [usize; 2]) {
        match &self.way {
            Way::Matrix(size) => {
                // SAFETY: the caller's promise.
                self.isa.run(unsafe {
                    Promised::new_unchecked(TransposeChannels { x, y, steps, pixels, size: *size, ahead })
                });
            }
            Way::Windows(Windows { lanes, vectors, windows, index }) => {
                for (vector, range) in vectors.iter().enumerate() {
                    let first = vector * lanes;
                    // SAFETY: the caller's promise; windows and vectors end within a pixel.
                    self.isa.run(unsafe {
                        Promised::new_unchecked(PermuteChannels {
                            x,
                            y: y.add(first),
                            steps,
                            pixels,
                            columns: (*lanes).min(self.channels - first),
                            windows: &windows[range.clone()],
                            index: index.each_ref().map(|index| &index[first..first + lanes]),
                            ahead,
                        })
                    });
                }
            }
        }
    }
}

/// How many channels there must be for these to be among them.
fn end(sources: &[usize]) -> usize {
    sources.iter().max().map_or(0, |last| last + 1)
}

/// The rows and columns of the matrix of channels whose transposition takes the channel at `sources[place]` to each place, if
/// there is one with blocks.
fn matrix(sources: &[usize]) -> Option<[usize; 2]> {
    let columns = *sources.get(1)?;
    let rows = sources.len().checked_div(columns).filter(|rows| rows * columns == sources.len())?;
    let transposed = |(place, &source): (usize, &usize)| source == place % rows * columns + place / rows;
    (rows.min(columns) >= transpose::HALF && sources.iter().enumerate().all(transposed)).then_some([rows, columns])
}

/// What transposing a matrix costs, in windows.
fn matrix_cost([rows, columns]: [usize; 2]) -> f64 {
    let blocks = |size: usize| transpose::blocks(size).map(|(_, len)| len);
    let cost = |(height, width): (usize, usize)| if height.min(width) == BLOCK { FULL_BLOCK } else { HALF_BLOCK };
    MATRIX + blocks(rows).flat_map(|height| blocks(columns).map(move |width| (height, width))).map(cost).sum::<f64>()
}

/// Where the vectors of permuted channels come from.
struct Windows {
    lanes: usize,
    /// For each vector of places, its windows of source channels.
    vectors: Vec<Range<usize>>,
    windows: Vec<Window>,
    /// For each vector, what [`PermuteChannels`] takes.
    index: [Vec<u32>; 2],
}

impl Windows {
    /// Those of vectors of `lanes` places, unless they are more than `most`.
    fn new(sources: &[usize], lanes: usize, most: f64) -> Option<Self> {
        let (channels, end) = (sources.len(), end(sources));
        let mut this = Self { lanes, vectors: Vec::new(), windows: Vec::new(), index: [const { Vec::new() }; 2] };
        for sources in sources.chunks(lanes) {
            let before = this.windows.len();
            for source in sources {
                // Whole cache lines, where pixels are.
                let first = source / lanes * lanes;
                let found = this.windows[before..].iter().position(|window| window.first == first);
                let number = found.unwrap_or_else(|| {
                    this.windows.push(Window { first, len: lanes.min(end - first) });
                    this.windows.len() - 1 - before
                });
                for (index, value) in this.index.iter_mut().zip([number, source - first]) {
                    index.push(value as u32);
                }
            }
            this.vectors.push(before..this.windows.len());
            if this.windows.len() as f64 > most {
                return None;
            }
        }
        // Lanes without a channel, which are in no window.
        this.index.iter_mut().for_each(|index| index.resize(channels.next_multiple_of(lanes), u32::MAX));
        Some(this)
    }
}
