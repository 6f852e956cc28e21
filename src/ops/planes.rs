//! Planes of one channel of some images: what convolutions of more than one pixel run over.
//!
//! A depthwise convolution sees them as they come ([`Taps::bare`]). Others see them padded and side by side:
//!
//! ```text
//!          step            step
//!   . a a a a a . b b b b b . c c c c c .     a row of the planes of images a, b and c; dots are zeros
//!     y y y y y   y y y y y   y y y y y       what a convolution makes of it; between the images, nothing of use
//! ```
//!
//! So a call of a kernel has long rows to work on however small the planes are, and neighbours share their zeros. At a
//! stride of 2 the padded planes are split by the parity of their rows and columns; every tap of a kernel is then a shifted
//! view of one of the parts.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::phases::Phase;
use crate::isa::Active;
use crate::kernels::planes::{Bare, MAX_COLUMNS, View, tap_rows};
use crate::kernels::pointwise::slot;
use crate::kernels::rows::{NarrowRows, SplitRows, WidenRows, ZipRows};
use crate::kernels::{Element, writable};

/// How many values ahead of a plane to ask for others, at least, where planes follow each other, each too short for the
/// processor to look ahead by itself. (A 5x5 depthwise convolution of 64 x 672 planes of 19 x 19 at stride 2 takes 15.7 ms of
/// a thread without, 11.4 with the next plane asked for, 11.1 with this. A 3x3 one of 16 x 512 planes of 28 x 28 at stride 1
/// takes 3.3 ms without, 2.6 with this, its gradient by the weight 5.8 and 3.6.)
const AHEAD: usize = 1024;

/// How far ahead of a plane of so many pixels to ask for others that follow it.
pub(crate) fn ahead(pixels: usize) -> usize {
    AHEAD.max(pixels)
}

/// Pixels that are computed together, about: all that is done to them stays in the L1 cache.
const BLOCK_PIXELS: usize = 1024;

/// How many planes of so many pixels are computed together, of at most `most`.
pub(crate) fn planes_together(pixels: usize, most: usize) -> usize {
    (BLOCK_PIXELS / pixels.max(1)).clamp(1, most.max(1))
}

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
    pub(crate) part: usize,
}

impl Planes {
    /// Planes that the pixels of vertical and horizontal phases see, of so many images.
    pub(crate) fn new(phases: [&[Phase]; 2], images: usize) -> Self {
        Self::at_least(phases, images, [0, 0])
    }

    /// Layouts for the planes that `x` sees and those that `g` sees which agree in their steps and pitches.
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
                (phase.in_step * phase.count.max(1)).wrapping_add_signed(low) + span + 1 + before[axis] - phase.in_step
            };
            phases[axis].iter().map(end).max().unwrap_or(0)
        });
        let count = phases[1].iter().map(|phase| phase.count).max().unwrap_or(0);
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
        self.stride * self.stride * self.part + slot::<T>()
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
    pub(crate) fn write_all<T: Element>(&self, isa: Active, planes: &[T], padded: &mut [T::Wide]) {
        for (image, plane) in planes.chunks_exact(self.input[0] * self.input[1]).enumerate() {
            self.write(isa, image, plane, padded, ahead(plane.len()));
        }
    }

    /// Writes an image's plane into the padded ones, which hold zeros where planes do not reach, and asks for the one
    /// that stands `ahead` of it.
    pub(crate) fn write<T: Element>(
        &self,
        isa: Active,
        image: usize,
        plane: &[T],
        padded: &mut [T::Wide],
        ahead: usize,
    ) {
        let (stride, [top, left], width) = (self.stride, self.before, self.input[1]);
        // What lies beyond the last tap of the last output pixel is not read.
        let rows = self.input[0].min((stride * self.rows()).saturating_sub(top));
        let columns = width.min((stride * self.step).saturating_sub(left));
        let start = image * self.step;
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

/// The order in which depthwise kernels read taps, `[column][row]`: the kernel's columns that are seen, and for each of
/// `rows` rows the kernel's, or none where there is code for more of them.
fn tap_order(
    columns: impl Iterator<Item = usize>,
    rows: usize,
    row: impl Fn(usize) -> Option<usize>,
    width: usize,
) -> Vec<Option<usize>> {
    let row = &row;
    columns.flat_map(|x| (0..rows).map(move |r| row(r).map(|y| y * width + x))).collect()
}

/// The order of a depthwise convolution's own taps: that of the [`Taps`] of its only phases.
pub(crate) fn forward_order([height, width]: [usize; 2], stride: usize) -> Vec<Option<usize>> {
    tap_order(0..width, tap_rows(height, stride), |r| (r < height).then_some(r), width)
}

/// The taps of a depthwise kernel through which the pixels of a vertical and a horizontal phase see planes.
pub(crate) struct Taps {
    /// The first row that is seen.
    first: isize,
    stride: usize,
    part: usize,
    pitch: usize,
    /// The rows, from the first one on, that are not zero.
    real: Range<usize>,
    /// Where each column of taps sees a row.
    columns: Vec<isize>,
    /// Height and width of planes that are not padded.
    bare: Option<[usize; 2]>,
    /// Columns of these from what one result sees to what the next does.
    step: usize,
    /// Rows of taps.
    pub(crate) rows: usize,
    /// Taps of the kernel, `[column][row]`; none where there is code for more rows than the kernel has.
    taps: Vec<Option<usize>>,
}

impl Taps {
    /// The taps of a kernel of `width` columns, through which padded planes are seen.
    pub(crate) fn new(planes: &Planes, vertical: &Phase, horizontal: &Phase, width: usize) -> Self {
        let (top, _) = vertical.span();
        let first = planes.tap([top, -(planes.before[1] as isize)]);
        let below = (planes.stride * planes.rows()).saturating_add_signed(-top).saturating_sub(planes.before[0]);
        let place = |pixel: usize| (pixel as isize - top).clamp(0, below as isize) as usize;
        Self {
            first: first as isize,
            part: planes.stride * planes.part,
            pitch: planes.pitch,
            real: if vertical.taps.is_empty() { 0..0 } else { place(0)..place(planes.input[0]) },
            columns: horizontal.taps.iter().map(|&(_, x)| (planes.tap([top, x]) - first) as isize).collect(),
            bare: None,
            ..Self::at_stride(planes.stride, vertical, horizontal, width)
        }
    }

    /// The taps of a kernel of `width` columns, through which planes are seen as they come, in vectors of so many values:
    /// if the results are all of the output's. (Nothing has to be padded before, nor put together after: 3x3 over 16 x 512
    /// planes of 14 x 14 takes 0.56 ms of a thread, padded 1.07; 28 x 28 2.4 and 5.1; 16 x 64 of 112 x 112 5.3 and 8.2.)
    pub(crate) fn bare(lanes: usize, vertical: &Phase, horizontal: &Phase, width: usize) -> Option<Self> {
        let [height, columns] = [vertical.input, horizontal.input];
        let step = horizontal.in_step;
        let parts = vertical.in_step != step || vertical.out_step != 1 || horizontal.out_step != 1;
        if parts || height == 0 || columns == 0 || horizontal.taps.len() > MAX_COLUMNS {
            return None;
        }
        // Rows of a vector.
        let rows = if step == 1 && columns == horizontal.count { (lanes / columns).clamp(1, 2) } else { 1 };
        let (stride, (top, _)) = (rows * step, vertical.span());
        let start = (1 - rows as isize - top).max(0) as usize;
        Some(Self {
            first: top * columns as isize,
            part: columns,
            pitch: stride * columns,
            real: start..height.saturating_add_signed(-top).max(start),
            columns: horizontal.taps.iter().map(|&(_, x)| x).collect(),
            bare: Some([height, columns]),
            step,
            ..Self::at_stride(stride, vertical, horizontal, width)
        })
    }

    /// The taps alone.
    fn at_stride(stride: usize, vertical: &Phase, horizontal: &Phase, width: usize) -> Self {
        let (top, span) = vertical.span();
        let rows = tap_rows(span + 1, stride);
        let row = |r: usize| vertical.taps.iter().find(|&&(_, offset)| offset == top + r as isize).map(|&(y, _)| y);
        let taps = tap_order(horizontal.taps.iter().map(|&(x, _)| x), rows, row, width);
        Self { first: 0, stride, part: 0, pitch: 0, real: 0..0, columns: Vec::new(), bare: None, step: 1, rows, taps }
    }

    /// Puts a channel's kernel into the order of the taps.
    pub(crate) fn pack<T: Element>(&self, kernel: impl Fn(usize) -> T) -> impl Iterator<Item = T> {
        self.taps.iter().map(move |tap| tap.map_or(T::default(), &kernel))
    }

    /// Taps of the kernel, `[column][row]`; none where there is code for more rows than the kernel has.
    pub(crate) fn order(&self) -> &[Option<usize>] {
        &self.taps
    }

    /// How many weights [`Taps::pack`] gives.
    pub(crate) fn len(&self) -> usize {
        self.taps.len()
    }

    /// Tap of the kernel and its place among the taps.
    pub(crate) fn places(&self) -> impl Iterator<Item = (usize, usize)> {
        self.taps.iter().enumerate().filter_map(|(place, tap)| Some(((*tap)?, place)))
    }

    /// From one row of sums to the next where results of bare planes have so many columns.
    pub(crate) fn result_pitch(&self, columns: usize) -> usize {
        self.stride / self.step * columns
    }

    /// Padded planes as the taps see them.
    pub(crate) fn view<'a, T>(&'a self, x: &'a [T]) -> View<'a, T> {
        View {
            x,
            first: self.first,
            stride: self.stride,
            part: self.part,
            pitch: self.pitch,
            real: self.real.clone(),
            columns: &self.columns,
            bare: None,
        }
    }

    /// Bare planes as the taps see them: see [`Bare`].
    pub(crate) fn bare_view<'a, T>(
        &'a self,
        x: &'a [T],
        images: (usize, usize),
        channels: (usize, usize),
    ) -> View<'a, T> {
        View {
            bare: self.bare.map(|size| Bare {
                size,
                images,
                channels,
                step: self.step,
                ahead: ahead(size[0] * size[1]),
            }),
            ..self.view(x)
        }
    }
}

/// Writes rows that belong to a vertical phase, a set of them for each horizontal phase, to a plane of `width` columns.
///
/// The sets are `set` values apart, their rows `pitch`. Asks for the plane that stands `ahead` of this one.
pub(crate) fn merge<T: Element>(
    isa: Active,
    vertical: &Phase,
    sets: usize,
    (results, set, pitch): (&[T::Wide], usize, usize),
    plane: &mut [MaybeUninit<T>],
    width: usize,
    ahead: usize,
) {
    let (start, step) = (vertical.first * width, vertical.out_step * width);
    if sets == 1 {
        let size = [vertical.count, width];
        isa.run(NarrowRows { x: (results, pitch), y: (&mut plane[start..], step), size, ahead });
        return;
    }
    let (even, odd) = results.split_at(set);
    let (y, size) = ((&mut plane[start..], step), [vertical.count, width]);
    isa.run(ZipRows { x: ([even, odd], pitch), y, size, ahead });
}
