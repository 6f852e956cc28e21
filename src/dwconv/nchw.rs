//! Planes of one channel of some images: what convolutions of more than one pixel run over.
//!
//! Depthwise convolutions see them as they come ([`Taps`]). Others see them padded and side by side ([`Planes`]):
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

use super::polyphase::{Phase, most_pixels};
use crate::microkernels::dwconv_nchw::{DwConvNchw, DwConvNchwGradWeight, Results, tap_rows};
use crate::microkernels::dwconv_nchw_s2_grad::{Stride2Grad, row_pairs, stride2_taps};
use crate::microkernels::row_copy::{NarrowRows, SplitRows, WidenRows, ZipRows};
use crate::microkernels::tap_view::TapView;
use crate::parallel::Shared;
use crate::pool::chunks;
use crate::simd::element::{Element, lanes, writable};
use crate::simd::{IsaKind, line};

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
/// The fewest rows of a plane that are computed together: those above and below are read again.
const BAND_ROWS: usize = 8;

/// How many planes of so many pixels are computed together, of at most `most`.
pub(crate) fn planes_together(pixels: usize, most: usize) -> usize {
    (BLOCK_PIXELS / pixels.max(1)).clamp(1, most.max(1))
}

/// Rows of results that are computed together, of so many rows and columns: of large planes few enough that they and what they
/// see stay in the L1 cache while neighbouring columns are computed; of the larger of both there are `scale` times as many rows
/// and columns. (3x3 over 16 x 32 planes of 112 x 112: 1.46 ms of two threads all rows at once, 1.25 in bands; the gradient by
/// the weight 2.4 and 2.0.)
fn bands([rows, columns]: [usize; 2], scale: usize) -> impl Iterator<Item = Range<usize>> {
    let most = (BLOCK_PIXELS / (scale * columns).max(1)).max(BAND_ROWS);
    // Even ones, as a vector may hold two rows.
    let band = rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(2);
    chunks(0..rows, band.max(1))
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
    part: usize,
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

/// The taps of a depthwise kernel through which the pixels of a vertical and a horizontal phase see planes.
///
/// Nothing is padded before, nor put together after: 3x3 over 16 x 512 planes of 14 x 14 takes 0.56 ms of a thread, over
/// padded ones side by side 1.07; 28 x 28 2.4 and 5.1; 16 x 64 of 112 x 112 5.3 and 8.2; of 113 x 113 at stride 2 3.4 and 5.3.
pub(crate) struct Taps {
    /// Height and width of a plane.
    size: [usize; 2],
    /// See [`TapView`].
    step: usize,
    vector_rows: usize,
    top: isize,
    columns: Vec<isize>,
    /// Rows of taps.
    pub(crate) rows: usize,
    /// Taps of the kernel, `[column][row]`; none where there is code for more rows than the kernel has.
    taps: Vec<Option<usize>>,
}

impl Taps {
    /// The taps of a kernel of `width` columns, for vectors of so many values.
    pub(crate) fn new(lanes: usize, vertical: &Phase, horizontal: &Phase, width: usize) -> Self {
        let (size, step) = ([vertical.input, horizontal.input], horizontal.in_step);
        let alike = step == 1 && horizontal.count == size[1];
        let vector_rows = if alike { (lanes / size[1].max(1)).clamp(1, 2) } else { 1 };
        let (top, span) = vertical.span();
        let rows = tap_rows(span + 1, step * vector_rows);
        let row = |r: usize| vertical.taps.iter().find(|&&(_, offset)| offset == top + r as isize).map(|&(y, _)| y);
        // Without rows, columns see nothing either.
        let seen = if vertical.taps.is_empty() { &[] } else { &horizontal.taps[..] };
        let taps = seen.iter().flat_map(|&(x, _)| (0..rows).map(move |r| row(r).map(|y| y * width + x))).collect();
        Self { size, step, vector_rows, top, columns: seen.iter().map(|&(_, x)| x).collect(), rows, taps }
    }

    /// How many taps there are, those included that the kernel does not have.
    pub(crate) fn len(&self) -> usize {
        self.taps.len()
    }

    /// Tap of the kernel and its place among the taps.
    pub(crate) fn places(&self) -> impl Iterator<Item = (usize, usize)> {
        self.taps.iter().enumerate().filter_map(|(place, tap)| Some(((*tap)?, place)))
    }

    /// Planes as the taps see them, from some rows of results of `width` columns on.
    fn view<'a, T>(
        &'a self,
        x: &'a [T],
        [images, channels]: [(usize, usize); 2],
        rows: &Range<usize>,
        width: usize,
    ) -> TapView<'a, T> {
        TapView {
            x,
            size: self.size,
            images,
            channels,
            step: self.step,
            rows: self.vector_rows,
            top: self.top + (self.step * rows.start) as isize,
            columns: &self.columns,
            ahead: [self.step * rows.len() * self.size[1], rows.len() * width].map(ahead),
        }
    }

    /// Adds the gradient by the weight, from planes of some images and channels (how many, and how far apart) and gradients of
    /// `size` by what the taps make of them, `steps` apart, to a cache line for each of the channels' taps.
    pub(crate) fn sum<T: Element>(
        &self,
        isa: IsaKind,
        x: &[T::Wide],
        planes: [(usize, usize); 2],
        (g, steps, size): (&[T], [usize; 2], [usize; 2]),
        slots: &mut [T::Wide],
    ) {
        for rows in bands(size, self.step) {
            isa.run(DwConvNchwGradWeight::<T> {
                view: self.view(x, planes, &rows, size[1]),
                tap_rows: self.rows,
                g: &g[rows.start * size[1]..],
                g_steps: steps,
                size: [rows.len(), size[1]],
                slots: &mut *slots,
            });
        }
    }
}

/// A depthwise convolution of planes, or its gradient by the input.
pub(crate) enum PlaneConv {
    /// All results see through the same taps.
    Taps(Taps),
    /// The gradient at a stride of 2.
    Stride2Grad {
        /// See [`Stride2Grad::taps`](crate::microkernels::dwconv_nchw_s2_grad::Stride2Grad::taps).
        taps: usize,
        /// Taps of the kernel, `[row][column]`; none where there is code for more of them than the kernel has.
        order: Vec<Option<usize>>,
        /// Rows and columns of zeros before the convolution's input, and of the gradient by its output.
        before: [usize; 2],
        g_size: [usize; 2],
    },
}

impl PlaneConv {
    /// That of a kernel of `width` columns.
    pub(crate) fn new<T: Element>(isa: IsaKind, vertical: &[Phase], horizontal: &[Phase], width: usize) -> Self {
        if let ([vertical], [horizontal]) = (vertical, horizontal) {
            return Self::Taps(Taps::new(lanes::<T>(isa), vertical, horizontal, width));
        }
        let phases = [vertical, horizontal];
        let of_axis =
            |phases: &[Phase]| phases.iter().flat_map(|phase| &phase.taps).map(|tap| tap.0).collect::<Vec<_>>();
        let [rows, columns] = phases.map(of_axis);
        let taps = stride2_taps(rows.iter().chain(&columns).max().map_or(0, |tap| tap + 1));
        let tap = |i, j| (rows.contains(&i) && columns.contains(&j)).then_some(i * width + j);
        let order = (0..taps).flat_map(|i| (0..taps).map(move |j| (i, j))).map(|(i, j)| tap(i, j)).collect();
        Self::Stride2Grad {
            taps,
            order,
            before: phases.map(Phase::before),
            g_size: phases.map(|phases| phases[0].input),
        }
    }

    /// The taps of the kernel in the order of a channel's weights; none weighs nothing.
    pub(crate) fn order(&self) -> &[Option<usize>] {
        match self {
            Self::Taps(taps) => &taps.taps,
            Self::Stride2Grad { order, .. } => order,
        }
    }

    /// Computes planes of `size` from planes of some images and channels (how many, and how far apart); those of the result are
    /// `steps` apart. `weights` are the channels', in the [order](PlaneConv::order) of taps; `bias` is theirs too, which the gradient
    /// at a stride of 2 goes without.
    ///
    /// # Safety
    /// The planes must be writable, and nobody else's.
    pub(crate) unsafe fn run<T: Element>(
        &self,
        isa: IsaKind,
        x: &[T::Wide],
        planes: [(usize, usize); 2],
        weights: &[T::Wide],
        bias: &[T::Wide],
        (y, steps, size): (Shared<T>, [usize; 2], [usize; 2]),
    ) {
        let last = planes.iter().zip(steps).map(|(&(count, _), step)| (count.max(1) - 1) * step).sum::<usize>();
        match self {
            Self::Taps(taps) => {
                for band in bands(size, taps.step) {
                    // SAFETY: the caller's promise.
                    let y = unsafe { Results::new(y.ptr().add(band.start * size[1]), last + band.len() * size[1]) };
                    let (view, size) = (taps.view(x, planes, &band, size[1]), [band.len(), size[1]]);
                    isa.run(DwConvNchw::<T> { view, tap_rows: taps.rows, weights, bias, y, y_steps: steps, size });
                }
            }
            &Self::Stride2Grad { taps, before, g_size, .. } => {
                let [images, channels] = planes;
                for pairs in bands([row_pairs(size[0], before[0]), size[1].div_ceil(2)], 2) {
                    // SAFETY: the caller's promise.
                    let y = unsafe { Results::new(y.ptr(), last + size[0] * size[1]) };
                    let ahead = [pairs.len() * g_size[1], 2 * pairs.len() * size[1]].map(ahead);
                    isa.run(Stride2Grad::<T> {
                        g: x,
                        g_size,
                        images,
                        channels,
                        taps,
                        weights,
                        before,
                        y,
                        size,
                        y_steps: steps,
                        pairs,
                        ahead,
                    });
                }
            }
        }
    }
}

/// Writes some rows of a vertical phase, a set of them for each horizontal phase, to a plane of `width` columns.
///
/// The sets are `set` values apart, their rows `pitch`. Asks for what stands `ahead` of what is written.
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
