//! Interleaving of channels: a permutation of planes (NCHW) or of each pixel's values (NHWC).

use std::mem::MaybeUninit;
use std::ops::Range;

use super::{Shared, estimate};
use crate::isa::Active;
use crate::kernels::permute::{PermuteChannels, Window};
use crate::kernels::{Element, lanes, picks};
use crate::pool::{chunks, parallel_for, part, threads_for};
use crate::shape::{Images, Order};

/// Tasks for each thread.
const TASKS_PER_THREAD: usize = 4;
/// Bytes of pixels, about, of which one vector of channels after the other is permuted: the first cache.
const TILE_BYTES: usize = 32 << 10;

/// `y[place] = x[sources[place]]` for the channels of every pixel.
///
/// With [`interleave_sources`](crate::shape::interleave_sources) this interleaves, with
/// [`interleave_places`](crate::shape::interleave_places) it undoes that (which is also the gradient).
pub fn permute<T: Element>(isa: Active, sources: &[usize], images: Images, x: &[T], y: &mut [MaybeUninit<T>]) {
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
                    let x = (x.as_ptr().add(start), channels);
                    permutation.run(x, y.ptr().add(start), pixels.len(), [tile * channels; 2]);
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

/// A permutation of channels in vectors.
pub(super) struct Permutation {
    isa: Active,
    channels: usize,
    lanes: usize,
    /// For each vector of places, its windows of source channels.
    vectors: Vec<Range<usize>>,
    windows: Vec<Window>,
    index: Vec<u32>,
}

impl Permutation {
    /// That which takes the channel at `sources[place]` to each place, if there are instructions for it and pixels enough to
    /// be worth the while.
    pub fn new<T: Element>(isa: Active, sources: &[usize], pixels: usize) -> Option<Self> {
        let (channels, lanes) = (sources.len(), lanes::<T>(isa));
        if !picks::<T>(isa) || pixels < lanes {
            return None;
        }
        let mut this = Self { isa, channels, lanes, vectors: Vec::new(), windows: Vec::new(), index: Vec::new() };
        for sources in sources.chunks(lanes) {
            let before = this.windows.len();
            let mut left: Vec<_> = (0..sources.len()).collect();
            while let Some(first) = left.iter().map(|&lane| sources[lane]).min() {
                // Whole cache lines, where pixels are.
                let first = first / lanes * lanes;
                let window = Window { first, len: lanes.min(channels - first) };
                let mut index = vec![PermuteChannels::<T>::NOWHERE; lanes];
                left.retain(|&lane| {
                    let taken = sources[lane] < first + window.len;
                    if taken {
                        index[lane] = (sources[lane] - first) as u32;
                    }
                    !taken
                });
                this.windows.push(window);
                this.index.extend(index);
            }
            this.vectors.push(before..this.windows.len());
        }
        Some(this)
    }

    /// How many windows there are, each of which costs an instruction or two a pixel.
    pub fn windows(&self) -> usize {
        self.windows.len()
    }

    /// Permutes the channels of pixels; `ahead` are the distances to what is asked for meanwhile.
    ///
    /// # Safety
    /// So many pixels must be readable at `x`, one every `x_step` values, and writable at `y`, apart from each other.
    pub unsafe fn run<T: Element>(&self, (x, x_step): (*const T, usize), y: *mut T, pixels: usize, ahead: [usize; 2]) {
        for (vector, windows) in self.vectors.iter().enumerate() {
            let first = vector * self.lanes;
            // SAFETY: the caller's promise; windows and vectors end within a pixel.
            self.isa.run(unsafe {
                PermuteChannels {
                    x,
                    y: y.add(first),
                    steps: [x_step, self.channels],
                    pixels,
                    columns: self.lanes.min(self.channels - first),
                    windows: &self.windows[windows.clone()],
                    index: &self.index[windows.start * self.lanes..windows.end * self.lanes],
                    ahead,
                }
                .promise()
            });
        }
    }
}
