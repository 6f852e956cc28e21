//! Grouped pointwise convolution and its input gradient in NCHW: the rows are the images' planes.
//!
//! An interleave is a table of the rows' offsets, and costs nothing.

use std::ops::Range;

use super::pack::{Packed, WeightView};
use super::plan::{PASS_ROWS, PASS_TILE};
use super::{GroupedProduct, TASKS_PER_THREAD};
use crate::interleave::ChannelOrder;
use crate::microkernels::conv1x1_nchw::{Conv1x1Nchw, Init, Output};
use crate::parallel::Shared;
use crate::pool::{parallel_for, part};
use crate::shape::Images;
use crate::simd::Promised;
use crate::simd::element::Element;
use crate::simd::mul_acc::MulAcc;

/// Values of a group's input rows that one pass covers where the group needs several tiles of
/// output rows, which read them again: they stay in the L2 cache.
const PLANE_TILE: usize = 64 << 10;
/// Bytes of a group's rows, at most, for the next group's to be prefetched meanwhile: both stay in
/// the L2 cache.
const PREFETCH_BYTES: usize = 480 << 10;
/// The prefetch distance in longer rows, in pixels.
const PREFETCH_PIXELS: usize = 256;
/// Pixels of a task, at least.
const PLANE_PART: usize = 256;

/// Some input channels of a group over some pixels.
pub(super) struct GroupRows<'a, T> {
    pub group: usize,
    /// The first of the group's input channels: sums of those before wait in the output.
    pub first: usize,
    pub x: *const T,
    /// Where the input channels' rows start.
    pub x_offsets: &'a [usize],
    pub y: *mut T,
    /// Length of a row.
    pub pixels: usize,
    /// Prefetch distances of input and output.
    pub prefetch: [usize; 2],
}

impl GroupedProduct {
    /// All input rows of a group at once, or in passes.
    pub(super) fn rows<T: Element, M: MulAcc<T>>(
        &self,
        mul_acc: M,
        threads: usize,
        x: &[T],
        weight: WeightView<'_, T>,
        bias: Option<&[T]>,
        in_passes: bool,
        y: Shared<T>,
    ) {
        self.packed(mul_acc, weight, bias, self.images.pixels, |packed| {
            self.packed_rows(threads, x, packed, in_passes, y);
        });
    }

    fn packed_rows<T: Element, M: MulAcc<T>>(
        &self,
        threads: usize,
        x: &[T],
        packed: Packed<'_, T, M>,
        in_passes: bool,
        y: Shared<T>,
    ) {
        let Images { count, pixels, channels: c_in, .. } = self.images;
        let c_out = self.groups * self.group_out;
        let offsets = |channels: usize, order: Option<ChannelOrder>| -> Vec<usize> {
            (0..channels).map(|c| order.map_or(c, |order| order.dst_index(c)) * pixels).collect()
        };
        let x_offsets = offsets(c_in, self.in_order);
        let y_offsets = offsets(c_out, self.out_order);
        let packed = Packed { y_offsets: &y_offsets, ..packed };
        // Tasks: images, then groups, then pixels, until there are enough.
        let wanted = if threads == 1 { 1 } else { threads * TASKS_PER_THREAD };
        let group_parts = wanted.div_ceil(count).min(self.groups);
        let pixel_parts = wanted.div_ceil(count * group_parts).min(pixels.div_ceil(PLANE_PART));
        let passes = if in_passes { self.group_in.div_ceil(PASS_ROWS) } else { 1 };
        let tile = if passes > 1 {
            PASS_TILE / PASS_ROWS
        } else if packed.blocks.len() > 1 {
            (PLANE_TILE / self.group_in).max(PLANE_PART)
        } else {
            usize::MAX
        };
        // To the next group's rows; the next image's follow the last group's.
        let prefetch = |g: usize| {
            [(self.group_in, &x_offsets), (self.group_out, &y_offsets)].map(|(channels, offsets)| {
                if channels * pixels * size_of::<T>() > PREFETCH_BYTES {
                    return PREFETCH_PIXELS.min(tile);
                }
                let next = offsets.get((g + 1) * channels).copied();
                let next = next.unwrap_or(self.groups * channels * pixels + offsets[0]);
                next.checked_sub(offsets[g * channels]).unwrap_or(channels * pixels)
            })
        };
        parallel_for(threads, count * group_parts * pixel_parts, |task| {
            let (n, rest) = (task / (group_parts * pixel_parts), task % (group_parts * pixel_parts));
            let range = part(pixels, pixel_parts, rest % pixel_parts);
            for group in part(self.groups, group_parts, rest / pixel_parts) {
                let (mut start, prefetch) = (range.start, prefetch(group));
                while start < range.end {
                    let length = tile.min(range.end - start);
                    // SAFETY: image n and pixels start..start + length exist in x and y; tasks
                    // differ in image, group or pixels, so no two write the same value.
                    unsafe {
                        let x = x.as_ptr().add(n * c_in * pixels + start);
                        let y = y.ptr().add(n * c_out * pixels + start);
                        for Range { start: first, end } in (0..passes).map(|pass| part(self.group_in, passes, pass)) {
                            let x_offsets = &x_offsets[group * self.group_in..][first..end];
                            let rows = GroupRows { group, first, x, x_offsets, y, pixels: length, prefetch };
                            self.group(rows, &packed);
                        }
                    }
                    start += length;
                }
            }
        });
    }

    /// Adds some input channels of a group to what those before made.
    ///
    /// # Safety
    /// `x` and `y` must hold the group's rows at their offsets; rows of `y` are this caller's own.
    #[inline]
    pub(super) unsafe fn group<T: Element, M: MulAcc<T>>(&self, rows: GroupRows<'_, T>, packed: &Packed<'_, T, M>) {
        let GroupRows { group, first, x, x_offsets, y, pixels, prefetch } = rows;
        let steps = self.group_in.div_ceil(M::TERMS);
        let weights = &packed.weights[group * self.group_out * steps..][..self.group_out * steps];
        let taken = first / M::TERMS..(first + x_offsets.len()).div_ceil(M::TERMS);
        for block in packed.blocks {
            // The first block prefetches the input that all read next.
            let prefetch = if block.start == 0 { prefetch } else { [0, prefetch[1]] };
            let channels = group * self.group_out + block.start..group * self.group_out + block.end;
            let bias = packed.bias.map(|bias| &bias[channels.clone()]);
            let weights = &weights[block.start * steps..][taken.start * block.len()..taken.end * block.len()];
            let kernel = Conv1x1Nchw {
                mul_acc: packed.mul_acc,
                x,
                x_offsets,
                weights,
                init: if first > 0 { Init::Output } else { Init::bias(bias) },
                y: Output::Stored(y),
                y_offsets: &packed.y_offsets[channels],
                pixels,
                prefetch,
            };
            // SAFETY: the caller's promise.
            self.isa.run(unsafe { Promised::new_unchecked(kernel) });
        }
    }
}
