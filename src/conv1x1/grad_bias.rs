//! The gradient of the pointwise convolution by its bias.

use std::mem::MaybeUninit;

use super::grad_weight::MAX_PARTS;
use crate::microkernels::reduce::{Sum, SumColumns};
use crate::parallel::{Shared, estimate};
use crate::pool::{is_worth_threads, parallel_for, part, threads_for};
use crate::scratch;
use crate::shape::{Images, Order, interleave_dst_index};
use crate::simd::IsaKind;
use crate::simd::element::Element;

/// Pixels that are summed in the type that is computed with.
const TILE: usize = 64;

/// The gradient by the bias: the sums over images and pixels of `grad_output (N, C_out)`, whose
/// channels are interleaved by `interleave`.
pub fn grad_bias<T: Element>(
    isa: IsaKind,
    interleave: usize,
    images: Images,
    grad_output: &[T],
    grad_bias: &mut [MaybeUninit<T>],
) {
    assert_eq!(grad_output.len(), images.len());
    assert_eq!(grad_bias.len(), images.channels);
    let Images { count, pixels, channels, .. } = images;
    let dst_index = interleave_dst_index(channels, interleave);
    let work = estimate(0, size_of_val(grad_output));
    let threads = threads_for(work);
    let shared = Shared::new(grad_bias);
    // SAFETY: each channel is written by one task.
    let write = |c: usize, sum: f64| unsafe { shared.ptr().add(c).write(T::from_f64(sum)) };
    if images.order == Order::Nchw && pixels > 1 {
        parallel_for(threads, channels, |c| {
            let plane = |n: usize| &grad_output[(n * channels + dst_index[c]) * pixels..][..pixels];
            write(c, (0..count).map(|n| isa.run(Sum(plane(n)))).sum());
        });
        return;
    }
    // NHWC: sums of short columns in the type that is computed with, these in float64. How many
    // depends on the work alone, so that the results do not depend on the threads.
    let parts = if is_worth_threads(work) { MAX_PARTS } else { 1 };
    let mut partial = vec![0f64; parts * channels];
    let sums = Shared(partial.as_mut_ptr());
    parallel_for(threads, parts, |task| {
        // SAFETY: each task has sums of its own.
        let sums = unsafe { std::slice::from_raw_parts_mut(sums.ptr().add(task * channels), channels) };
        let range = part(count * pixels, parts, task);
        scratch::with(channels, |columns: &mut [T::Wide]| {
            for rows in grad_output[range.start * channels..range.end * channels].chunks(TILE * channels) {
                isa.run(SumColumns(rows, columns));
                sums.iter_mut().zip(&*columns).for_each(|(sum, value)| *sum += value.to_f64());
            }
        });
    });
    for c in 0..channels {
        write(c, (0..parts).map(|p| partial[p * channels + dst_index[c]]).sum());
    }
}
