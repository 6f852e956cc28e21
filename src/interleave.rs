//! Interleaving of channels: a permutation of planes (NCHW) or of each pixel's values (NHWC).
//!
//! [`CANDIDATES`] lists how, and [`explain`] says which is chosen.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::microkernels::permute::{PermuteChannels, TransposeChannels, Window};
use crate::microkernels::transpose::{self, BLOCK};
use crate::parallel::{Shared, estimate};
use crate::plan::{self, Candidate, Caps, Explained};
use crate::pool::{chunks, parallel_for, part, threads_for};
use crate::shape::{Images, Order};
use crate::simd::element::Element;
use crate::simd::{IsaKind, Promised};

/// Channels interleaved by a step: those `s, s + step, s + 2 * step ...` for each `s` below the
/// step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelOrder {
    /// How many there are.
    pub channels: usize,
    /// From 1 to `channels`.
    pub step: usize,
}

impl ChannelOrder {
    /// Which channel comes to `index`.
    pub fn src_index(self, index: usize) -> usize {
        let (len, longer) = (self.channels / self.step, self.channels % self.step);
        // The first series have one channel more than the others.
        let (series, i) = match index.checked_sub(longer * (len + 1)) {
            None => (index / (len + 1), index % (len + 1)),
            Some(rest) => (longer + rest / len, rest % len),
        };
        series + i * self.step
    }

    /// Where a channel goes: the inverse of [`ChannelOrder::src_index`].
    pub fn dst_index(self, channel: usize) -> usize {
        let (len, longer) = (self.channels / self.step, self.channels % self.step);
        let series = channel % self.step;
        series * len + series.min(longer) + channel / self.step
    }
}

/// How channels are permuted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// Planes are copied.
    Planes,
    /// A vector of a pixel's channels after the other, each from windows of them.
    Windows,
    /// Each pixel's channels as a matrix, transposed.
    Matrix,
    /// Value by value.
    Scalar,
}

/// What is permuted: a pixel's channels, or an image's planes.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    /// The layout.
    pub layout: Order,
    /// Pixels of all images.
    pub pixels: usize,
    /// How many channels there are.
    pub channels: usize,
    /// Windows that all vectors of channels come from.
    windows: usize,
    /// Rows and columns of the matrix of which this is the transposition, if there is one with
    /// blocks.
    matrix: Option<[usize; 2]>,
}

impl Problem {
    /// That of an interleave or, `inverse`, of undoing it.
    pub fn new(order: ChannelOrder, inverse: bool, layout: Order, pixels: usize, caps: &Caps) -> Self {
        if inverse {
            Self::of(|i| order.dst_index(i), order.channels, layout, pixels, caps)
        } else {
            Self::of(|i| order.src_index(i), order.channels, layout, pixels, caps)
        }
    }

    /// That of the permutation which takes the channel `src_index(i)` to each index.
    fn of(src_index: impl Fn(usize) -> usize, channels: usize, layout: Order, pixels: usize, caps: &Caps) -> Self {
        // A small call would feel it where no kernel takes the problem.
        let (mut matrix, mut windows) = (None, 0);
        if layout == Order::Nhwc && pixels >= caps.lanes {
            matrix = find_matrix(&src_index, channels);
            windows = if caps.permute { count_windows(&src_index, channels, caps.lanes) } else { 0 };
        }
        Self { layout, pixels, channels, windows, matrix }
    }

    /// What a pixel costs in windows by the cheapest kernel, if there is one.
    pub(crate) fn kernel_cost(&self, caps: &Caps) -> Option<f64> {
        plan::cheapest(plan::applicable(KERNELS, self, caps)).map(|(_, cost)| cost)
    }
}

type Entry = Candidate<Problem, Algorithm>;
const PLANES: Entry =
    Candidate { algorithm: Algorithm::Planes, applies: |problem, _| problem.layout == Order::Nchw, cost: |_, _| 0.0 };
const WINDOWS: Entry =
    Candidate { algorithm: Algorithm::Windows, applies: has_windows, cost: |problem, _| problem.windows as f64 };
const MATRIX: Entry = Candidate { algorithm: Algorithm::Matrix, applies: has_matrix, cost: matrix_cost };
const SCALAR: Entry = Candidate {
    algorithm: Algorithm::Scalar,
    applies: |problem, _| problem.layout == Order::Nhwc,
    cost: |problem, _| SCALAR_COST * problem.channels as f64,
};

/// All that the operation chooses from. A unit of cost is a window, which takes an instruction or
/// two.
pub const CANDIDATES: &[Entry] = &[PLANES, WINDOWS, MATRIX, SCALAR];
/// What a convolution chooses from, which permutes pixels in a cache.
const KERNELS: &[Entry] = &[WINDOWS, MATRIX];

fn has_windows(problem: &Problem, caps: &Caps) -> bool {
    problem.layout == Order::Nhwc && caps.permute && problem.pixels >= caps.lanes
}

fn has_matrix(problem: &Problem, _: &Caps) -> bool {
    problem.matrix.is_some()
}

/// All candidates for a problem.
pub fn explain(problem: &Problem, caps: &Caps) -> Vec<Explained> {
    plan::explained(CANDIDATES, problem, caps, |algorithm| match algorithm {
        Algorithm::Windows => format!("permute.rs: {} windows", problem.windows),
        Algorithm::Matrix => format!("permute.rs, transpose.rs: {:?} a pixel", problem.matrix.unwrap_or_default()),
        Algorithm::Planes | Algorithm::Scalar => "interleave.rs: plain copies".into(),
    })
}

/// Tasks for each thread.
const TASKS_PER_THREAD: usize = 4;
/// Bytes of pixels, about, of which one vector of channels after the other is permuted: the L1
/// cache.
const TILE_BYTES: usize = 32 << 10;
/// What transposing a pixel's channels costs beside its blocks, in windows.
const MATRIX_COST: f64 = 6.0;
/// What transposing a block of 8 x 8 channels costs, in windows.
const FULL_BLOCK_COST: f64 = 14.0;
/// What transposing half of one costs.
const HALF_BLOCK_COST: f64 = 8.0;
/// What copying one channel costs, in windows: never less than any kernel.
const SCALAR_COST: f64 = 2.0;

/// `y[i] = x[src_index[i]]` for the channels of every pixel.
///
/// With [`interleave_src_index`](crate::shape::interleave_src_index) this interleaves, with
/// [`interleave_dst_index`](crate::shape::interleave_dst_index) it undoes that (which is also the
/// gradient).
pub fn permute<T: Element>(isa: IsaKind, src_index: &[usize], images: Images, x: &[T], y: &mut [MaybeUninit<T>]) {
    permute_by(isa, plan::choose, src_index, images, x, y);
}

/// As [`permute`], as a part of another operation: what is forced on that is none of these
/// algorithms.
pub(crate) fn permute_cheapest<T: Element>(
    isa: IsaKind,
    src_index: &[usize],
    images: Images,
    x: &[T],
    y: &mut [MaybeUninit<T>],
) {
    let cheapest = |table: &[Entry], problem: &Problem, caps: &Caps| {
        plan::cheapest(plan::applicable(table, problem, caps)).unwrap_or((Algorithm::Scalar, 0.0))
    };
    permute_by(isa, cheapest, src_index, images, x, y);
}

fn permute_by<T: Element>(
    isa: IsaKind,
    choose: impl Fn(&[Entry], &Problem, &Caps) -> (Algorithm, f64),
    src_index: &[usize],
    images: Images,
    x: &[T],
    y: &mut [MaybeUninit<T>],
) {
    let Images { count, pixels, channels, order } = images;
    assert_eq!((src_index.len(), x.len(), y.len()), (channels, images.len(), images.len()));
    assert!(src_index.iter().all(|&source| source < channels));
    if images.is_empty() {
        return;
    }
    let caps = Caps::new::<T>(isa);
    let problem = Problem::of(|i| src_index[i], channels, order, count * pixels, &caps);
    let (algorithm, _) = choose(CANDIDATES, &problem, &caps);
    let threads = threads_for(estimate(0, 2 * size_of_val(x)));
    let y = Shared::new(y);
    let rows = if order == Order::Nchw { count * channels } else { count * pixels };
    let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(rows) };
    match algorithm {
        Algorithm::Planes => parallel_for(threads, parts, |task| {
            for row in part(rows, parts, task) {
                let (n, i) = (row / channels, row % channels);
                let source = &x[(n * channels + src_index[i]) * pixels..][..pixels];
                // SAFETY: each plane of y is written by one task.
                unsafe { y.ptr().add(row * pixels).copy_from_nonoverlapping(source.as_ptr(), pixels) };
            }
        }),
        Algorithm::Scalar => parallel_for(threads, parts, |task| {
            for row in part(rows, parts, task) {
                for (i, &from) in src_index.iter().enumerate() {
                    // SAFETY: sources are channels; each pixel of y is written by one task.
                    unsafe { *y.ptr().add(row * channels + i) = *x.as_ptr().add(row * channels + from) };
                }
            }
        }),
        Algorithm::Windows | Algorithm::Matrix => {
            let permutation = Permutation::new(isa, &caps, algorithm, &problem, src_index);
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
        }
    }
}

/// A permutation of each pixel's channels by a kernel.
pub(super) struct Permutation {
    isa: IsaKind,
    channels: usize,
    kernel: PermutationKernel,
}

enum PermutationKernel {
    /// Vector by vector, from windows.
    Windows(Windows),
    /// Each pixel as a matrix of these rows and columns, transposed.
    Matrix([usize; 2]),
}

impl Permutation {
    /// That of an interleave or, `inverse`, of undoing it, if there is a kernel for these pixels.
    pub fn interleave(isa: IsaKind, caps: &Caps, order: ChannelOrder, inverse: bool, pixels: usize) -> Option<Self> {
        let problem = Problem::new(order, inverse, Order::Nhwc, pixels, caps);
        let (algorithm, _) = plan::cheapest(plan::applicable(KERNELS, &problem, caps))?;
        let index = |i| if inverse { order.dst_index(i) } else { order.src_index(i) };
        let src_index: Vec<_> = (0..order.channels).map(index).collect();
        Some(Self::new(isa, caps, algorithm, &problem, &src_index))
    }

    /// That of a problem, by one of the [`KERNELS`].
    fn new(isa: IsaKind, caps: &Caps, algorithm: Algorithm, problem: &Problem, src_index: &[usize]) -> Self {
        let kernel = match (algorithm, problem.matrix) {
            (Algorithm::Matrix, Some(size)) => PermutationKernel::Matrix(size),
            _ => PermutationKernel::Windows(Windows::new(src_index, caps.lanes)),
        };
        Self { isa, channels: src_index.len(), kernel }
    }

    /// Permutes the channels of pixels; `prefetch` are the distances to what is prefetched
    /// meanwhile.
    ///
    /// # Safety
    /// So many pixels must be readable at `x`, one every `strides[0]` values, and writable at `y`,
    /// one every `strides[1]`, apart from each other.
    pub unsafe fn run<T: Element>(
        &self,
        x: *const T,
        y: *mut T,
        strides: [usize; 2],
        pixels: usize,
        prefetch: [usize; 2],
    ) {
        match &self.kernel {
            PermutationKernel::Matrix(size) => {
                // SAFETY: the caller's promise.
                self.isa.run(unsafe {
                    Promised::new_unchecked(TransposeChannels { x, y, strides, pixels, size: *size, prefetch })
                });
            }
            PermutationKernel::Windows(Windows { lanes, vectors, windows, index }) => {
                for (vector, range) in vectors.iter().enumerate() {
                    let first = vector * lanes;
                    // SAFETY: the caller's promise; windows and vectors end within a pixel.
                    self.isa.run(unsafe {
                        Promised::new_unchecked(PermuteChannels {
                            x,
                            y: y.add(first),
                            strides,
                            pixels,
                            columns: (*lanes).min(self.channels - first),
                            windows: &windows[range.clone()],
                            index: index.each_ref().map(|index| &index[first..first + lanes]),
                            prefetch,
                        })
                    });
                }
            }
        }
    }
}

/// The rows and columns of the matrix of channels whose transposition takes the channel at
/// `src_index(i)` to each index, if there is one with blocks.
fn find_matrix(src_index: &impl Fn(usize) -> usize, channels: usize) -> Option<[usize; 2]> {
    if channels < 2 {
        return None;
    }
    let columns = src_index(1);
    let rows = channels.checked_div(columns).filter(|rows| rows * columns == channels)?;
    let is_transposed = || (0..channels).all(|i| src_index(i) == i % rows * columns + i / rows);
    (rows.min(columns) >= transpose::HALF && is_transposed()).then_some([rows, columns])
}

/// What transposing a pixel's matrix costs, in windows.
fn matrix_cost(problem: &Problem, _: &Caps) -> f64 {
    let [rows, columns] = problem.matrix.unwrap_or_default();
    let blocks = |size: usize| transpose::blocks(size).map(|(_, len)| len);
    let cost =
        |(height, width): (usize, usize)| if height.min(width) == BLOCK { FULL_BLOCK_COST } else { HALF_BLOCK_COST };
    MATRIX_COST
        + blocks(rows).flat_map(|height| blocks(columns).map(move |width| (height, width))).map(cost).sum::<f64>()
}

/// The most lanes of a vector whose values are permuted.
const MAX_LANES: usize = 16;

/// How many windows, whole cache lines where pixels are, all vectors of `lanes` channels come from.
fn count_windows(src_index: &impl Fn(usize) -> usize, channels: usize, lanes: usize) -> usize {
    let mut total = 0;
    for vector in chunks(0..channels, lanes) {
        let (mut found, mut count) = ([usize::MAX; MAX_LANES], 0);
        for window in vector.map(|i| src_index(i) / lanes) {
            if !found[..count].contains(&window) {
                found[count] = window;
                count += 1;
            }
        }
        total += count;
    }
    total
}

/// Where the vectors of permuted channels come from.
struct Windows {
    lanes: usize,
    /// For each vector of channels, its windows of source channels.
    vectors: Vec<Range<usize>>,
    windows: Vec<Window>,
    /// For each vector, what [`PermuteChannels`] takes.
    index: [Vec<u32>; 2],
}

impl Windows {
    /// Those of vectors of `lanes` channels.
    fn new(src_index: &[usize], lanes: usize) -> Self {
        let channels = src_index.len();
        let mut this = Self { lanes, vectors: Vec::new(), windows: Vec::new(), index: [const { Vec::new() }; 2] };
        for sources in src_index.chunks(lanes) {
            let before = this.windows.len();
            for source in sources {
                let first = source / lanes * lanes;
                let found = this.windows[before..].iter().position(|window| window.first == first);
                let number = found.unwrap_or_else(|| {
                    this.windows.push(Window { first, len: lanes.min(channels - first) });
                    this.windows.len() - 1 - before
                });
                for (index, value) in this.index.iter_mut().zip([number, source - first]) {
                    index.push(value as u32);
                }
            }
            this.vectors.push(before..this.windows.len());
        }
        // Lanes without a channel, which are in no window.
        this.index.iter_mut().for_each(|index| index.resize(channels.next_multiple_of(lanes), u32::MAX));
        this
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::plan::with_algorithm;
    use crate::shape::{interleave_dst_index, interleave_src_index};
    use crate::tests::{place, random, run};

    #[test]
    fn the_order_is_that_of_the_shape() {
        for (channels, step) in (1..20).flat_map(|channels| (1..=channels).map(move |step| (channels, step))) {
            let order = ChannelOrder { channels, step };
            let src: Vec<_> = (0..channels).map(|i| order.src_index(i)).collect();
            let dst: Vec<_> = (0..channels).map(|c| order.dst_index(c)).collect();
            assert_eq!(src, interleave_src_index(channels, step), "{order:?}");
            assert_eq!(dst, interleave_dst_index(channels, step), "{order:?}");
        }
    }

    /// Forces an algorithm on an interleave and on what undoes it, where it applies to both; tells
    /// whether it does.
    fn force<T: Element>(
        isa: IsaKind,
        algorithm: Algorithm,
        layout: Order,
        pixels: usize,
        order: ChannelOrder,
    ) -> bool {
        let ChannelOrder { channels, step } = order;
        let (images, caps) = (Images { count: 2, pixels, channels, order: layout }, Caps::new::<T>(isa));
        let applies = |inverse| {
            let problem = Problem::new(order, inverse, layout, 2 * pixels, &caps);
            plan::applicable(CANDIDATES, &problem, &caps).any(|(found, _)| found == algorithm)
        };
        if !applies(false) || !applies(true) {
            return false;
        }
        let (x, src) = (random::<T>(images.len(), 1), interleave_src_index(channels, step));
        with_algorithm(algorithm, || {
            let y = run(x.len(), |out| permute(isa, &src, images, &x, out));
            for (n, p, c) in (0..2).flat_map(|n| (0..pixels).flat_map(move |p| (0..channels).map(move |c| (n, p, c)))) {
                let (to, from) = (place(images, n, p, c), place(images, n, p, src[c]));
                assert_eq!(y[to], x[from], "{} {algorithm:?} {images:?} {step}", isa.name());
            }
            let dst = interleave_dst_index(channels, step);
            assert_eq!(run(x.len(), |out| permute(isa, &dst, images, &y, out)), x, "{algorithm:?} {images:?} {step}");
        });
        true
    }

    #[test]
    fn each_algorithm_permutes_and_back() {
        for isa in IsaKind::available() {
            for algorithm in [Algorithm::Planes, Algorithm::Windows, Algorithm::Matrix, Algorithm::Scalar] {
                let mut count = 0;
                for (pixels, channels, step) in
                    [(5, 7, 3), (5, 24, 4), (12, 7, 3), (13, 80, 4), (9, 90, 18), (8, 33, 2), (9, 84, 7), (8, 60, 12)]
                {
                    let order = ChannelOrder { channels, step };
                    for layout in [Order::Nchw, Order::Nhwc] {
                        count += usize::from(force::<bf16>(isa, algorithm, layout, pixels, order));
                        count += usize::from(force::<f32>(isa, algorithm, layout, pixels, order));
                        count += usize::from(force::<f64>(isa, algorithm, layout, pixels, order));
                    }
                }
                let expected = algorithm != Algorithm::Windows || Caps::new::<f32>(isa).permute;
                assert_eq!(count > 0, expected, "{} {algorithm:?}", isa.name());
            }
        }
    }
}
