//! Padded planes that stand side by side, over which a fused network's dense convolutions run as
//! pointwise ones.
//!
//! ```text
//!          step            step
//!   . a a a a a . b b b b b . c c c c c .     images a, b and c; dots are zeros
//!     y y y y y   y y y y y   y y y y y       the results; between them, nothing of use
//! ```
//!
//! So a call of a kernel has long rows to work on however small the planes are, and neighbours
//! share their zeros. At a stride of 2 the padded planes are split by the parity of their rows and
//! columns; every tap of a kernel is then a shifted view of one of the parts.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::nchw::ahead;
use super::polyphase::{Phase, most_pixels};
use crate::microkernels::row_copy::{NarrowRows, SplitRows, WidenRows, ZipRows};
use crate::simd::element::{Element, writable};
use crate::simd::{IsaKind, line};

/// The layout of padded planes.
pub(crate) struct Planes {
    /// Height and width of a plane.
    input: [usize; 2],
    stride: usize,
    /// Zeros above and at the left.
    before: [usize; 2],
    /// Columns from an image to the next.
    pub(crate) step: usize,
    /// Columns of a row, and values of a part.
    pub(crate) pitch: usize,
    part: usize,
}

impl Planes {
    /// Planes that the pixels of vertical and horizontal phases see, of `images` images.
    pub(crate) fn new(phases: [&[Phase]; 2], images: usize) -> Self {
        Self::at_least(phases, images, [0, 0])
    }

    /// Layouts for the planes that `x` sees and those that `g` sees which agree in their steps and
    /// pitches.
    pub(crate) fn pair(x: [&[Phase]; 2], g: [&[Phase]; 2], images: usize) -> [Self; 2] {
        let needs = [x, g].map(|phases| Self::new(phases, images)).map(|planes| [planes.step, planes.pitch]);
        let step = needs[0][0].max(needs[1][0]);
        let needs = [x, g].map(|phases| Self::at_least(phases, images, [step, 0]).pitch);
        [x, g].map(|phases| Self::at_least(phases, images, [step, needs[0].max(needs[1])]))
    }

    fn at_least(phases: [&[Phase]; 2], images: usize, [step, pitch]: [usize; 2]) -> Self {
        let stride = phases[0].first().map_or(1, |phase| phase.in_step);
        let input = phases.map(|phases| phases.first().map_or(0, |phase| phase.input));
        let before = phases.map(|phases| phases.iter().map(|phase| -phase.span().0).max().unwrap_or(0).max(0) as usize);
        // Padded pixels of one image, up to the last that a tap sees.
        let seen = [0, 1].map(|axis| {
            let end = |phase: &Phase| {
                let (low, span) = phase.span();
                // There are as many pixels before the plane as the lowest tap needs.
                let first = before[axis].saturating_add_signed(low);
                first + phase.in_step * (phase.count.max(1) - 1) + span + 1
            };
            phases[axis].iter().map(end).max().unwrap_or(0)
        });
        let count = most_pixels(phases[1]);
        let step = step
            .max(count)
            // The next image's pixels are not seen, nor do this one's reach the next one's zeros.
            .max(seen[1].saturating_sub(before[1]).div_ceil(stride))
            .max((before[1] + input[1]).min(seen[1]).div_ceil(stride));
        let pitch = pitch.max(images * step + seen[1].div_ceil(stride).saturating_sub(step));
        Self { input, stride, before, step, pitch, part: seen[0].div_ceil(stride) * pitch }
    }

    /// Rows of a part.
    fn rows(&self) -> usize {
        self.part / self.pitch.max(1)
    }

    /// Values of a channel's padded planes: behind the last row, whole vectors can be read.
    pub(crate) fn len<T>(&self) -> usize {
        self.stride * self.stride * self.part + line::<T>()
    }

    /// Where the view starts that sees input pixel `[y, x]` at output pixel 0.
    pub(crate) fn tap(&self, [y, x]: [isize; 2]) -> usize {
        let (y, x) = ((self.before[0] as isize + y) as usize, (self.before[1] as isize + x) as usize);
        let stride = self.stride;
        (y % stride * stride + x % stride) * self.part + y / stride * self.pitch + x / stride
    }

    /// Columns of some images' results of `width` pixels.
    pub(crate) fn columns(&self, images: usize, width: usize) -> usize {
        (images - 1) * self.step + width
    }

    /// Writes the planes of images that follow each other, the first one's first.
    pub(crate) fn write_all<T: Element>(&self, isa: IsaKind, planes: &[T], padded: &mut [T::Wide]) {
        for (image, plane) in planes.chunks_exact(self.input[0] * self.input[1]).enumerate() {
            self.write(isa, image, plane, padded);
        }
    }

    /// Writes an image's plane into the padded ones, which hold zeros where planes do not reach.
    fn write<T: Element>(&self, isa: IsaKind, image: usize, plane: &[T], padded: &mut [T::Wide]) {
        let (stride, [top, left], width) = (self.stride, self.before, self.input[1]);
        // What lies beyond the last tap of the last output pixel is not read.
        let rows = self.input[0].min((stride * self.rows()).saturating_sub(top));
        let columns = width.min((stride * self.step).saturating_sub(left));
        let (start, ahead) = (image * self.step, ahead(plane.len()));
        if stride == 1 {
            let y = (writable(&mut padded[start + top * self.pitch + left..]), self.pitch);
            isa.run(WidenRows { x: (plane, width), y, size: [rows, columns], ahead });
            return;
        }
        // Rows of one parity at a time; an odd border puts the first pixel into an odd column.
        for first in 0..rows.min(2) {
            let (x, y) = (&plane[first * width..], first + top);
            let line = &mut padded[start + y % 2 * 2 * self.part + y / 2 * self.pitch..];
            let (even, odd) = line.split_at_mut(self.part);
            let y = match left % 2 {
                0 => [&mut even[left / 2..], &mut odd[left / 2..]],
                _ => [&mut odd[left / 2..], &mut even[left / 2 + 1..]],
            };
            let size = [(rows - first).div_ceil(2), columns];
            isa.run(SplitRows { x: (x, 2 * width), y: (y, self.pitch), size, ahead });
        }
    }
}

/// Writes some rows of a vertical phase, a set of them for each horizontal phase, to a plane of
/// `width` columns.
///
/// The sets are `set` values apart, their rows `pitch`. Prefetches `ahead` of what is written.
pub(crate) fn merge<T: Element>(
    isa: IsaKind,
    (vertical, rows): (&Phase, Range<usize>),
    sets: usize,
    (results, set, pitch): (&[T::Wide], usize, usize),
    plane: &mut [MaybeUninit<T>],
    width: usize,
    ahead: usize,
) {
    let (start, step) = ((vertical.first + vertical.out_step * rows.start) * width, vertical.out_step * width);
    let size = [rows.len(), width];
    if rows.is_empty() {
        return;
    }
    if sets == 1 {
        isa.run(NarrowRows { x: (results, pitch), y: (&mut plane[start..], step), size, ahead });
        return;
    }
    let (even, odd) = results.split_at(set);
    isa.run(ZipRows { x: ([even, odd], pitch), y: (&mut plane[start..], step), size, ahead });
}
