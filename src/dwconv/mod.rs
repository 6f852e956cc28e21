//! Depthwise convolution and its gradients.
//!
//! Forward and input gradient are one computation, [`Correlation`], with different [`phases`](self::polyphase).

pub(crate) mod nchw;
mod nhwc;
pub(crate) mod polyphase;

use std::mem::MaybeUninit;
use std::ops::Range;

use self::nchw::{PlaneConv, Taps};
use self::nhwc::Strips;
use self::polyphase::{Phase, sum_seen};
use crate::microkernels::conv1x1_nchw::SumSlots;
use crate::microkernels::dwconv_nhwc::{DwConvNhwc, DwConvNhwcGradWeight};
use crate::microkernels::transpose::Transpose;
use crate::parallel::{Shared, add_parts, estimate};
use crate::pool::{chunks, parallel_for, part, threads_for};
use crate::scratch::{self, cut};
use crate::shape::{Depthwise, Order, WeightLayout};
use crate::simd::element::{Element, lanes};
use crate::simd::{IsaKind, Promised, line};

/// Tasks for each thread, at least. (3x3 over 16 x 1024 planes of 7 x 7: 0.36 ms of two threads in 4 tasks of each, 0.28 in 32.)
const TASKS_PER_THREAD: usize = 16;
/// Pixels of neighbouring channels' planes in NCHW that are read together, about.
const CHANNEL_PIXELS: usize = 512;
/// Channels whose sums of products are kept together, at most. (From 4 to 64 the time is the same.)
const MAX_CHANNELS: usize = 64;
/// Images whose planes of one channel go through a kernel together, at most.
const IMAGES: usize = 4;
/// Sets of partial weight gradients in NHWC: at most so many, and, down to the other number, so few that this many values are
/// read for each of the sums. (5x5 over 32 x 1152 planes of 7 x 7: 0.66 ms of two threads with 32 sets, 0.55 with 16, 0.50
/// with 8, which is too few for more threads; 3x3 over 16 x 200 of 14 x 14 0.115, 0.096 and 0.095.)
const MAX_PARTS: usize = 32;
const MIN_PARTS: usize = 16;
const READ_PER_SUM: usize = 32;

/// Convolution with one kernel for each channel.
struct Correlation<'a, T> {
    isa: IsaKind,
    shape: &'a Depthwise,
    vertical: Vec<Phase>,
    horizontal: Vec<Phase>,
    /// Height and width of the output.
    output: [usize; 2],
    x: &'a [T],
    weight: &'a [T],
    bias: Option<&'a [T]>,
    y: Shared<T>,
}

/// Output = depthwise convolution of `x` + `bias`.
///
/// * `x`: `(N, C, H, W)` images in the order of `shape`; `y`: `(N, C, H', W')`.
/// * `weight`: in the layout of `shape`; `bias`: `C` values.
pub fn forward<T: Element>(
    isa: IsaKind,
    shape: &Depthwise,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    y: &mut [MaybeUninit<T>],
) {
    assert_eq!((x.len(), y.len(), weight.len()), (shape.input_len(), shape.output_len(), shape.weights()));
    assert!(bias.is_none_or(|bias| bias.len() == shape.channels));
    let phases = |axis| Phase::forward(axis, shape.kernel, shape.stride);
    let (vertical, horizontal) = (phases(shape.vertical), phases(shape.horizontal));
    correlate(isa, shape, vertical, horizontal, [shape.vertical.output, shape.horizontal.output], x, weight, bias, y);
}

/// The gradient by the input: `(N, C, H, W)` from `grad_output (N, C, H', W')`.
pub fn grad_input<T: Element>(
    isa: IsaKind,
    shape: &Depthwise,
    grad_output: &[T],
    weight: &[T],
    grad_x: &mut [MaybeUninit<T>],
) {
    let lengths = (grad_output.len(), grad_x.len(), weight.len());
    assert_eq!(lengths, (shape.output_len(), shape.input_len(), shape.weights()));
    let phases = |axis| Phase::backward(axis, shape.kernel, shape.stride);
    let (vertical, horizontal) = (phases(shape.vertical), phases(shape.horizontal));
    let output = [shape.vertical.input, shape.horizontal.input];
    correlate(isa, shape, vertical, horizontal, output, grad_output, weight, None, grad_x);
}

fn correlate<T: Element>(
    isa: IsaKind,
    shape: &Depthwise,
    vertical: Vec<Phase>,
    horizontal: Vec<Phase>,
    output: [usize; 2],
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    y: &mut [MaybeUninit<T>],
) {
    if y.is_empty() {
        return;
    }
    let taps = shape.kernel * shape.kernel;
    let threads = threads_for(estimate(shape.output_len() * taps, size_of_val(x) + size_of_val(y)));
    let work = Correlation { isa, shape, vertical, horizontal, output, x, weight, bias, y: Shared::new(y) };
    match shape.order {
        Order::Nchw => work.planes(threads),
        Order::Nhwc => {
            let strips = Strips::new([&work.vertical, &work.horizontal], [output[1], shape.channels]);
            with_vectors(isa, shape, weight, |weights| work.pixels(&strips, weights, threads));
        }
    }
}

impl<T: Element> Correlation<'_, T> {
    /// NHWC: bands of rows; weights are `[vector of channels][tap][lane]`.
    fn pixels(&self, strips: &Strips, weights: &[T::Wide], threads: usize) {
        let Depthwise { count, channels, kernel, .. } = *self.shape;
        let len = self.vertical[0].input * self.horizontal[0].input * channels;
        let out_len = self.output[0] * self.output[1] * channels;
        let bands = strips.bands();
        let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(count * bands) };
        parallel_for(threads, parts, |task| {
            for (n, band) in part(count * bands, parts, task).map(|i| (i / bands, i % bands)) {
                let (x, y) = (&self.x[n * len..][..len], self.y.at(n * out_len).ptr());
                let mut ahead = strips.ahead(band, [x.as_ptr(), y.cast_const()]);
                // The first pair of phases asks for all that the next band's results see.
                let mut asks = self.vertical[0].in_step * self.vertical[0].in_step;
                for (vertical, horizontal) in strips.pairs() {
                    let rows = strips.rows(band, vertical);
                    let (first, strides) = strips.results((vertical, horizontal), rows.start);
                    let ((tap_row, down), (tap_column, right)) = (vertical.first_tap(), horizontal.first_tap());
                    // SAFETY: pixels of image n of the output, each of which one task writes.
                    let kernel = unsafe {
                        Promised::new_unchecked(DwConvNhwc {
                            window: strips.window(x, (vertical, horizontal), rows.start, asks),
                            weights,
                            kernel_taps: kernel * kernel,
                            first_tap: tap_row * kernel + tap_column,
                            tap_steps: [down * kernel as isize, right],
                            bias: self.bias,
                            y: y.wrapping_add(first),
                            strides,
                            size: [rows.len(), horizontal.count],
                            ahead,
                        })
                    };
                    ahead = self.isa.run(kernel);
                    asks = 0;
                }
            }
        });
    }

    /// NCHW: the planes of some channels of some images at a time, those images' other channels after them, so that memory
    /// is read and written in its order. (All images of some channels first: 11.0 ms of two threads of an Intel Xeon for
    /// the layers of kMobileNet and 16 images, so 9.4.)
    fn planes(&self, threads: usize) {
        let Depthwise { count, channels, kernel, .. } = *self.shape;
        let (pixels, size) = (self.vertical[0].input * self.horizontal[0].input, self.output);
        let out_pixels = size[0] * size[1];
        let parts = count.div_ceil(IMAGES);
        let tiles = (threads * TASKS_PER_THREAD).div_ceil(parts).min(channels);
        let bias: Vec<_> =
            (0..channels).map(|c| self.bias.map_or(T::Wide::default(), |bias| bias[c].widen())).collect();
        let conv = PlaneConv::new::<T::Wide>(self.isa, &self.vertical, &self.horizontal, kernel);
        let taps = conv.order().len();
        scratch::with(channels * taps, |weights: &mut [T::Wide]| {
            for (c, weights) in weights.chunks_exact_mut(taps.max(1)).enumerate() {
                for (weight, tap) in weights.iter_mut().zip(conv.order()) {
                    *weight =
                        tap.map_or(T::Wide::default(), |tap| self.weight[self.shape.weight_index(c, tap)].widen());
                }
            }
            parallel_for(threads, parts * tiles, |task| {
                let (range, images) = (part(channels, tiles, task % tiles), part(count, parts, task / tiles));
                with_wide(self.isa, self.x, [channels, pixels], range, images.clone(), |channel, x, step| {
                    let first = (images.start * channels + channel.start) * out_pixels;
                    // SAFETY: planes of the output, which no other task writes.
                    unsafe {
                        conv.run(
                            self.isa,
                            x,
                            [(images.len(), step), (channel.len(), pixels)],
                            &weights[channel.start * taps..channel.end * taps],
                            &bias[channel],
                            (self.y.at(first), [channels * out_pixels, out_pixels], size),
                        );
                    }
                });
            });
        });
    }
}

/// The gradient by the weight, in the layout of `shape`, from `x (N, C, H, W)` and `grad_output (N, C, H', W')`.
///
/// The result does not depend on the number of threads.
pub fn grad_weight<T: Element>(
    isa: IsaKind,
    shape: &Depthwise,
    x: &[T],
    grad_output: &[T],
    grad_weight: &mut [MaybeUninit<T>],
) {
    let lengths = (x.len(), grad_output.len(), grad_weight.len());
    assert_eq!(lengths, (shape.input_len(), shape.output_len(), shape.weights()));
    if grad_output.is_empty() {
        grad_weight.iter_mut().for_each(|sum| _ = sum.write(T::default()));
        return;
    }
    let taps = shape.kernel * shape.kernel;
    let work = estimate(shape.output_len() * taps, size_of_val(x) + size_of_val(grad_output));
    let grad = WeightGrad {
        isa,
        shape,
        vertical: &Phase::forward(shape.vertical, shape.kernel, shape.stride)[0],
        horizontal: &Phase::forward(shape.horizontal, shape.kernel, shape.stride)[0],
        x,
        grad_output,
    };
    let threads = threads_for(work);
    match shape.order {
        // Channels are independent of each other.
        Order::Nchw => {
            let shared = Shared::new(grad_weight);
            let tiles = shape.channels.div_ceil(MAX_CHANNELS).max(threads * TASKS_PER_THREAD).min(shape.channels);
            parallel_for(threads, tiles, |task| {
                // SAFETY: each channel's weights are written by one task.
                let write = |c, tap, sum| unsafe {
                    shared.ptr().add(shape.weight_index(c, tap)).write(T::narrow(grad.checked(c, tap, sum)))
                };
                grad.planes(part(shape.channels, tiles, task), write);
            });
        }
        // Each part of the images has sums of its own, added up in order at the end.
        Order::Nhwc => {
            let phases = [grad.vertical, grad.horizontal].map(std::slice::from_ref);
            let strips = Strips::new(phases, [shape.horizontal.output, shape.channels]);
            let (bands, lanes) = (shape.count * strips.bands(), lanes::<T::Wide>(isa));
            let len = shape.channels.div_ceil(lanes) * taps * lanes;
            let most = (x.len() + grad_output.len()) / (READ_PER_SUM * len);
            let parts = bands.min(most.clamp(MIN_PARTS, MAX_PARTS));
            scratch::with(parts * len, |partial: &mut [T::Wide]| {
                let shared = Shared(partial.as_mut_ptr());
                parallel_for(threads, parts, |task| {
                    // SAFETY: each task has sums of its own.
                    let sums = unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(task * len), len) };
                    sums.fill(T::Wide::default());
                    grad.pixels(&strips, part(bands, parts, task), sums);
                });
                for (vector, sums) in add_parts(partial, len).chunks_exact(taps * lanes).enumerate() {
                    let first = vector * lanes;
                    for (tap, sums) in sums.chunks_exact(lanes).enumerate() {
                        for (c, &sum) in (first..shape.channels).zip(sums) {
                            grad_weight[shape.weight_index(c, tap)].write(T::narrow(grad.checked(c, tap, sum)));
                        }
                    }
                }
            });
        }
    }
}

struct WeightGrad<'a, T> {
    isa: IsaKind,
    shape: &'a Depthwise,
    vertical: &'a Phase,
    horizontal: &'a Phase,
    x: &'a [T],
    grad_output: &'a [T],
}

impl<T: Element> WeightGrad<'_, T> {
    /// A sum, computed anew where it is no number: see [`sum_seen`].
    fn checked(&self, c: usize, tap: usize, sum: T::Wide) -> T::Wide {
        if sum.to_f64().is_finite() {
            return sum;
        }
        let Depthwise { count, channels, kernel, order, .. } = *self.shape;
        let place = |n: usize, [y, x]: [usize; 2], [height, width]: [usize; 2]| match order {
            Order::Nchw => ((n * channels + c) * height + y) * width + x,
            Order::Nhwc => ((n * height + y) * width + x) * channels + c,
        };
        let (phases, taps) = ([self.vertical, self.horizontal], [tap / kernel, tap % kernel]);
        let (size, out_size) = (phases.map(|phase| phase.input), phases.map(|phase| phase.count));
        let value = |values: &[T], n, pixel, size| values[place(n, pixel, size)].to_f64();
        let product = |n, result, pixel| value(self.grad_output, n, result, out_size) * value(self.x, n, pixel, size);
        let of_image = |n| sum_seen(phases, taps, |result, pixel| product(n, result, pixel));
        T::Wide::from_f64((0..count).map(of_image).sum())
    }

    /// NHWC: adds some bands of the images to `[vector of channels][tap][lane]` sums.
    fn pixels(&self, strips: &Strips, bands: Range<usize>, sums: &mut [T::Wide]) {
        let (channels, phases) = (self.shape.channels, (self.vertical, self.horizontal));
        let len = self.vertical.input * self.horizontal.input * channels;
        let out_len = self.vertical.count * self.horizontal.count * channels;
        // (15 layers of 16 images, a thread of an Intel Xeon: 12.5 ms asking, 14.1 not.)
        let asks = self.shape.stride * self.shape.stride;
        for (n, band) in bands.map(|band| (band / strips.bands(), band % strips.bands())) {
            let (x, g) = (&self.x[n * len..][..len], &self.grad_output[n * out_len..][..out_len]);
            let rows = strips.rows(band, self.vertical);
            let (first, strides) = strips.results(phases, rows.start);
            // SAFETY: pixels of the gradient.
            let kernel = unsafe {
                Promised::new_unchecked(DwConvNhwcGradWeight {
                    window: strips.window(x, phases, rows.start, asks),
                    g: g.as_ptr().add(first),
                    strides,
                    size: [rows.len(), self.horizontal.count],
                    sums,
                    ahead: strips.ahead(band, [x.as_ptr(), g.as_ptr()]),
                })
            };
            self.isa.run(kernel);
        }
    }

    /// NCHW: the sums of some channels over all images.
    fn planes(&self, range: Range<usize>, mut write: impl FnMut(usize, usize, T::Wide)) {
        let Depthwise { count, channels, kernel, .. } = *self.shape;
        let taps = Taps::new(lanes::<T::Wide>(self.isa), self.vertical, self.horizontal, kernel);
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
                taps.places().for_each(|(tap, place)| write(c, tap, sums[place]));
            }
        });
    }
}

/// Calls `body` with the weights of a kernel as `[vector of channels][tap][lane]`.
fn with_vectors<T: Element>(isa: IsaKind, shape: &Depthwise, weight: &[T], body: impl FnOnce(&[T::Wide])) {
    let (channels, taps, lanes) = (shape.channels, shape.kernel * shape.kernel, lanes::<T::Wide>(isa));
    let lens = [channels.div_ceil(lanes) * taps * lanes, weight.len()];
    scratch::with(lens.iter().sum(), |memory: &mut [T::Wide]| {
        let [packed, widened] = cut(memory, lens);
        let weight = T::widened(isa, weight, widened);
        for (channels, packed) in chunks(0..channels, lanes).zip(packed.chunks_exact_mut(taps * lanes)) {
            let (size, to) = ([channels.len(), taps], packed.as_mut_ptr());
            match shape.weight_layout {
                // SAFETY: these channels' weights, and as many vectors.
                WeightLayout::Oi => isa.run(unsafe {
                    Transpose::gather(size, weight[channels.start * taps..].as_ptr(), taps, to, lanes).ahead(0)
                }),
                WeightLayout::Io => {
                    for (packed, weight) in packed.chunks_exact_mut(lanes).zip(weight.chunks_exact(shape.channels)) {
                        packed[..channels.len()].copy_from_slice(&weight[channels.clone()]);
                    }
                }
            }
        }
        body(packed);
    })
}

/// Calls `body` with some channels at a time, of `range`, of the planes of `[channels, pixels]` of some images: the channels,
/// their planes as what is computed with, and the distance from one image's to the next's.
fn with_wide<T: Element>(
    isa: IsaKind,
    x: &[T],
    [channels, pixels]: [usize; 2],
    range: Range<usize>,
    images: Range<usize>,
    mut body: impl FnMut(Range<usize>, &[T::Wide], usize),
) {
    let most = channels_together(pixels, channels);
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

/// How many channels' planes of so many pixels are read together: the processor fetches memory that follows ahead.
fn channels_together(pixels: usize, channels: usize) -> usize {
    (CHANNEL_PIXELS / pixels.max(1)).clamp(1, channels)
}
