//! Interleaving of channels: a permutation of planes (NCHW) or of each pixel's values (NHWC).

use std::mem::MaybeUninit;

use super::{Shared, estimate};
use crate::kernels::Element;
use crate::pool::{parallel_for, part, threads_for};
use crate::shape::{Images, Order};

/// Tasks for each thread.
const TASKS_PER_THREAD: usize = 4;

/// `y[place] = x[sources[place]]` for the channels of every pixel.
///
/// With [`interleave_sources`](crate::shape::interleave_sources) this interleaves, with
/// [`interleave_places`](crate::shape::interleave_places) it undoes that (which is also the gradient).
pub fn permute<T: Element>(sources: &[usize], images: Images, x: &[T], y: &mut [MaybeUninit<T>]) {
    let Images { count, pixels, channels, order } = images;
    assert_eq!((sources.len(), x.len(), y.len()), (channels, images.len(), images.len()));
    assert!(sources.iter().all(|&source| source < channels));
    let threads = threads_for(estimate(0, 2 * size_of_val(x)));
    let y = Shared::new(y);
    let rows = if order == Order::Nchw { count * channels } else { count * pixels };
    let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(rows) };
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
