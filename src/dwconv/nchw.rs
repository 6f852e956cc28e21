//! Depthwise convolutions over NCHW planes: of some channels of some images at a time.

use std::mem::MaybeUninit;
use std::ops::Range;

pub(crate) use super::padded_planes::{Planes, merge};
use super::plan::{Algorithm, pairs_fit};
use super::polyphase::Phase;
use super::{Correlation, TASKS_PER_THREAD, WeightGrad};
use crate::microkernels::dwconv_nchw::{DwConvNchw, DwConvNchwGradWeight, Results};
use crate::microkernels::dwconv_nchw_s2_grad::{DwConvNchwS2Grad, row_pairs};
use crate::microkernels::reduce::SumSlots;
use crate::microkernels::tap_view::TapView;
use crate::parallel::Shared;
use crate::pool::{chunks, parallel_for, part};
use crate::scratch::{self, cut};
use crate::shape::Depthwise;
use crate::simd::element::{Element, lanes};
use crate::simd::{IsaKind, line};

/// Pixels of neighbouring channels' planes that are read together, about.
const CHANNEL_PIXELS: usize = 512;
/// Channels whose sums of products are kept together, at most.
const MAX_CHANNELS: usize = 64;
/// Images whose planes of one channel go through a kernel together, at most.
const IMAGES: usize = 4;
/// The shortest prefetch distance where planes follow each other, in values: planes are too short
/// for the processor's own prefetcher.
const PREFETCH_DISTANCE: usize = 1024;
/// Pixels that are computed together, about: all that is done to them stays in L1.
const BLOCK_PIXELS: usize = 1024;
/// The fewest rows of a plane that are computed together: those above and below are read again.
const BAND_ROWS: usize = 8;

/// The prefetch distance from a plane of `pixels` to those that follow it.
pub(crate) fn ahead(pixels: usize) -> usize {
    PREFETCH_DISTANCE.max(pixels)
}

/// How many planes of `pixels` are computed together, of at most `most`.
pub(crate) fn planes_together(pixels: usize, most: usize) -> usize {
    (BLOCK_PIXELS / pixels.max(1)).clamp(1, most.max(1))
}

/// Rows of results that are computed together: of large planes few enough that they and what they
/// see stay in L1 while neighbouring columns are computed. The larger of both has `scale` times as
/// many rows and columns.
fn bands([rows, columns]: [usize; 2], scale: usize) -> impl Iterator<Item = Range<usize>> {
    let most = (BLOCK_PIXELS / (scale * columns).max(1)).max(BAND_ROWS);
    // Even ones, as a vector may hold two rows.
    let band = rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(2);
    chunks(0..rows, band.max(1))
}

impl<T: Element> Correlation<'_, T> {
    /// The planes of some channels of some images at a time, those images' other channels after
    /// them, so that memory is read and written in its order.
    pub(super) fn planes(&self) {
        let Depthwise { count, channels, kernel, .. } = *self.shape;
        let (pixels, size) = (self.vertical[0].input * self.horizontal[0].input, self.output);
        let out_pixels = size[0] * size[1];
        let parts = count.div_ceil(IMAGES);
        let tiles = (self.threads * TASKS_PER_THREAD).div_ceil(parts).min(channels);
        let bias: Vec<_> =
            (0..channels).map(|c| self.bias.map_or(T::Wide::default(), |bias| bias[c].widen())).collect();
        let conv = PlaneConv::planned(self.algorithm, &self.vertical, &self.horizontal, kernel);
        let taps = kernel * kernel;
        parallel_for(self.threads, parts * tiles, |task| {
            let (range, images) = (part(channels, tiles, task % tiles), part(count, parts, task / tiles));
            scratch::with(range.len() * taps, |weights: &mut [T::Wide]| {
                for (c, weights) in range.clone().zip(weights.chunks_exact_mut(taps)) {
                    for (weight, tap) in weights.iter_mut().zip(conv.order().iter().flatten()) {
                        *weight = self.weight[self.shape.weight_index(c, *tap)].widen();
                    }
                }
                with_wide(self.isa, self.x, [channels, pixels], range.clone(), images.clone(), |channel, x, step| {
                    let first = (images.start * channels + channel.start) * out_pixels;
                    let own = (channel.start - range.start) * taps..(channel.end - range.start) * taps;
                    // SAFETY: planes of the output, which no other task writes.
                    unsafe {
                        conv.run(
                            self.isa,
                            x,
                            [(images.len(), step), (channel.len(), pixels)],
                            &weights[own],
                            &bias[channel],
                            (self.y.at(first), [channels * out_pixels, out_pixels], size),
                        );
                    }
                });
            });
        });
    }
}

impl<T: Element> WeightGrad<'_, T> {
    /// Channels are independent of each other.
    pub(super) fn planes(&self, grad_weight: &mut [MaybeUninit<T>]) {
        let shared = Shared::new(grad_weight);
        let channels = self.shape.channels;
        let tiles = channels.div_ceil(MAX_CHANNELS).max(self.threads * TASKS_PER_THREAD).min(channels);
        parallel_for(self.threads, tiles, |task| {
            // SAFETY: each channel's weights are written by one task.
            let write = |c, tap, sum| unsafe {
                shared.ptr().add(self.shape.weight_index(c, tap)).write(T::narrow(self.checked(c, tap, sum)))
            };
            self.channels(part(channels, tiles, task), write);
        });
    }

    /// The sums of some channels over all images.
    fn channels(&self, range: Range<usize>, mut write: impl FnMut(usize, usize, T::Wide)) {
        let Depthwise { count, channels, kernel, .. } = *self.shape;
        let taps = Taps::new(self.algorithm.vector_rows(), &self.vertical, &self.horizontal, kernel);
        let pixels = self.vertical.input * self.horizontal.input;
        let size = [self.vertical.count, self.horizontal.count];
        let out_pixels = size[0] * size[1];
        let slots_len = taps.len() * line::<T::Wide>();
        let lens = [range.len() * slots_len, taps.len()];
        scratch::with(lens.iter().sum(), |memory: &mut [T::Wide]| {
            let [slots, sums] = cut(memory, lens);
            slots.fill(T::Wide::default());
            for images in chunks(0..count, IMAGES) {
                with_wide(self.isa, self.x, [channels, pixels], range.clone(), images.clone(), |channel, x, step| {
                    let slots =
                        &mut slots[(channel.start - range.start) * slots_len..(channel.end - range.start) * slots_len];
                    let g = &self.grad_output[(images.start * channels + channel.start) * out_pixels..];
                    let planes = [(images.len(), step), (channel.len(), pixels)];
                    taps.sum(self.isa, x, planes, (g, [channels * out_pixels, out_pixels], size), slots);
                });
            }
            for (c, slots) in range.zip(slots.chunks_exact(slots_len)) {
                self.isa.run(SumSlots(slots, sums));
                taps.indices().for_each(|(tap, index)| write(c, tap, sums[index]));
            }
        });
    }
}

/// Calls `body` with some channels at a time, of `range`, of the planes of `[channels, pixels]` of
/// some images: the channels, their planes widened, and the distance from one image's to the
/// next's.
fn with_wide<T: Element>(
    isa: IsaKind,
    x: &[T],
    [channels, pixels]: [usize; 2],
    range: Range<usize>,
    images: Range<usize>,
    mut body: impl FnMut(Range<usize>, &[T::Wide], usize),
) {
    let most = (CHANNEL_PIXELS / pixels.max(1)).clamp(1, channels);
    let len = images.len() * most.min(range.len()) * pixels;
    let blocks = chunks(range, most);
    let start = |image: usize, channel: usize| (image * channels + channel) * pixels;
    if let Some(x) = T::as_wide(x) {
        return blocks.for_each(|block| body(block.clone(), &x[start(images.start, block.start)..], channels * pixels));
    }
    scratch::with(len, |memory: &mut [T::Wide]| {
        for block in blocks {
            let len = block.len() * pixels;
            for (image, memory) in images.clone().zip(memory.chunks_exact_mut(len)) {
                T::widened(isa, &x[start(image, block.start)..][..len], memory);
            }
            body(block, memory, len);
        }
    });
}

/// The taps of a depthwise kernel through which the pixels of a vertical and a horizontal phase see
/// planes. Planes are read as they come: nothing is padded before, nor put together after.
pub(crate) struct Taps {
    /// Height and width of a plane.
    size: [usize; 2],
    /// See [`TapView`].
    step: usize,
    vector_rows: usize,
    top: isize,
    columns: Vec<isize>,
    /// Rows of taps.
    rows: usize,
    /// Taps of the kernel, `[column][row]`.
    taps: Vec<Option<usize>>,
}

impl Taps {
    /// The taps of a kernel of `width` columns, with one or two rows of a plane in a vector.
    pub(crate) fn new(vector_rows: usize, vertical: &Phase, horizontal: &Phase, width: usize) -> Self {
        let row = |r: isize| vertical.taps.iter().find(|tap| tap.1 == vertical.span().0 + r).map(|tap| tap.0);
        let rows = vertical.taps.len();
        let of_column = |x: usize| (0..rows as isize).map(move |r| row(r).map(|y| y * width + x));
        Self {
            size: [vertical.input, horizontal.input],
            step: horizontal.in_step,
            vector_rows,
            top: vertical.span().0,
            columns: horizontal.taps.iter().map(|tap| tap.1).collect(),
            rows,
            taps: horizontal.taps.iter().flat_map(|tap| of_column(tap.0)).collect(),
        }
    }

    /// Those of as many rows in a vector as fit.
    pub(crate) fn fitting(lanes: usize, vertical: &Phase, horizontal: &Phase, width: usize) -> Self {
        let pairs = pairs_fit(lanes, horizontal.in_step, horizontal.input, horizontal.count);
        Self::new(if pairs { 2 } else { 1 }, vertical, horizontal, width)
    }

    /// How many taps there are.
    pub(crate) fn len(&self) -> usize {
        self.taps.len()
    }

    /// Each tap of the kernel and its index among the taps.
    pub(crate) fn indices(&self) -> impl Iterator<Item = (usize, usize)> {
        self.taps.iter().enumerate().filter_map(|(index, tap)| Some(((*tap)?, index)))
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
            prefetch: [self.step * rows.len() * self.size[1], rows.len() * width].map(ahead),
        }
    }

    /// Adds the weight gradient, from planes of some images and channels (how many, and how far
    /// apart) and gradients of `size` with respect to what the taps make of them, `steps` apart, to
    /// a cache line for each of the channels' taps.
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

/// A depthwise convolution of planes, or its gradient with respect to the input.
pub(crate) enum PlaneConv {
    /// All results see through the same taps.
    Taps(Taps),
    /// The input gradient at a stride of 2.
    Stride2Grad {
        /// Rows and columns of the kernel.
        kernel: usize,
        /// Taps of the kernel, `[row][column]`.
        order: Vec<Option<usize>>,
        /// Rows and columns of zeros before the convolution's input, and of the output's gradient.
        before: [usize; 2],
        g_size: [usize; 2],
    },
}

impl PlaneConv {
    /// That of a kernel of `width` columns, and as many rows at a stride of 2, as it is cheapest
    /// for values of type `T`.
    pub(crate) fn new<T: Element>(isa: IsaKind, vertical: &[Phase], horizontal: &[Phase], width: usize) -> Self {
        if vertical[0].out_step > 1 {
            return Self::stride2_grad([vertical, horizontal], width);
        }
        Self::Taps(Taps::fitting(lanes::<T>(isa), &vertical[0], &horizontal[0], width))
    }

    /// That of an algorithm.
    fn planned(algorithm: Algorithm, vertical: &[Phase], horizontal: &[Phase], kernel: usize) -> Self {
        match algorithm {
            Algorithm::Stride2Grad => Self::stride2_grad([vertical, horizontal], kernel),
            _ => Self::Taps(Taps::new(algorithm.vector_rows(), &vertical[0], &horizontal[0], kernel)),
        }
    }

    fn stride2_grad(phases: [&[Phase]; 2], kernel: usize) -> Self {
        let order = (0..kernel * kernel).map(Some).collect();
        let (before, g_size) = (phases.map(Phase::before), phases.map(|phases| phases[0].input));
        Self::Stride2Grad { kernel, order, before, g_size }
    }

    /// The taps of the kernel in the order of a channel's weights.
    pub(crate) fn order(&self) -> &[Option<usize>] {
        match self {
            Self::Taps(taps) => &taps.taps,
            Self::Stride2Grad { order, .. } => order,
        }
    }

    /// Computes planes of `size` from planes of some images and channels (how many, and how far
    /// apart); those of the result are `steps` apart. `weights` are the channels', in the
    /// [order](PlaneConv::order) of taps; `bias` is theirs too, which the input gradient at a
    /// stride of 2 goes without.
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
            &Self::Stride2Grad { kernel, before, g_size, .. } => {
                let [images, channels] = planes;
                for pairs in bands([row_pairs(size[0], before[0]), size[1].div_ceil(2)], 2) {
                    // SAFETY: the caller's promise.
                    let y = unsafe { Results::new(y.ptr(), last + size[0] * size[1]) };
                    let prefetch = [pairs.len() * g_size[1], 2 * pairs.len() * size[1]].map(ahead);
                    isa.run(DwConvNchwS2Grad::<T> {
                        g: x,
                        g_size,
                        images,
                        channels,
                        kernel,
                        weights,
                        before,
                        y,
                        size,
                        y_steps: steps,
                        pairs,
                        prefetch,
                    });
                }
            }
        }
    }
}
