//! Depthwise convolution and its gradients.
//!
//! Forward and input gradient are one computation, [`Correlation`], with different [`phases`](super::phases).

use std::mem::MaybeUninit;
use std::ops::Range;

use super::phases::{Phase, Seen};
use super::planes::{PlaneConv, Taps};
use super::{Shared, estimate};
use crate::isa::Active;
use crate::kernels::depthwise::{MAX_TAPS, TapPixels, TapSums};
use crate::kernels::pointwise::{SumSlots, slot};
use crate::kernels::{Element, lanes};
use crate::pool::{parallel_for, part, threads_for};
use crate::scratch::{self, cut};
use crate::shape::{Depthwise, Order};

/// Tasks for each thread.
const TASKS_PER_THREAD: usize = 16;
/// Pixels of neighbouring channels' planes in NCHW that are read together, about.
const CHANNEL_PIXELS: usize = 512;
/// Channels whose sums of products are kept together, at most.
const MAX_CHANNELS: usize = 64;
/// Images whose planes of one channel go through a kernel together, at most.
const IMAGES: usize = 4;
/// Pixels of the output's rows whose products are summed together in NHWC, at least: sums are loaded and stored for each.
const ROW_PIXELS: usize = 32;
/// Pixels of NHWC memory whose distance in bytes is a multiple of this fall into few sets of the first cache and push each
/// other out: rows are copied then, with so many values more from pixel to pixel. (3x3 over 16 images of 7 x 7 pixels of
/// 1024 channels: 1.04 ms of a thread without, 0.36 with; 14 x 14 of 512: 0.82 and 0.60; 28 x 28 of 256 are slower with.)
const ALIASES: usize = 2048;
const ALIAS_GAP: usize = 16;
/// Images in one set of partial weight gradients, at least, and such sets at most.
const MAX_PARTS: usize = 64;

/// Convolution with one kernel for each channel.
struct Correlation<'a, T> {
    isa: Active,
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
    isa: Active,
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
    isa: Active,
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
    isa: Active,
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
        Order::Nhwc => scratch::with(shape.weights(), |weights: &mut [T::Wide]| {
            for (tap, c) in (0..taps).flat_map(|tap| (0..shape.channels).map(move |c| (tap, c))) {
                weights[tap * shape.channels + c] = weight[shape.weight_index(c, tap)].widen();
            }
            work.pixels(weights, threads);
        }),
    }
}

impl<T: Element> Correlation<'_, T> {
    /// NHWC: runs of pixels that see the same taps; weights are `[tap][channel]`.
    fn pixels(&self, weights: &[T::Wide], threads: usize) {
        let Depthwise { count, channels, kernel: kernel_size, .. } = *self.shape;
        let [height, width] = self.output;
        let input = [self.vertical[0].input, self.horizontal[0].input];
        // Runs of columns with their taps, from left to right, and how many of these see neighbours of each other.
        let column_runs: Vec<_> = self
            .horizontal
            .iter()
            .flat_map(|phase| phase.runs().into_iter().map(move |(run, taps)| (phase, run, taps)))
            .map(|(phase, run, mut taps)| {
                taps.sort_unstable_by_key(|tap| tap.1);
                let slides = phase.in_step == 1 && taps.windows(2).all(|taps| taps[0].1 + 1 == taps[1].1);
                let columns = if slides { taps.len().max(1) } else { 1 };
                (phase, run, taps, columns)
            })
            .collect();
        // Rows of the output, each with the vertical taps that it sees.
        let mut rows: Vec<(usize, Seen)> = Vec::with_capacity(height);
        for phase in &self.vertical {
            for (run, taps) in phase.runs() {
                for t in run.clone() {
                    let shift = |&(tap, row)| (tap, row + phase.in_step * (t - run.start));
                    rows.push((phase.first + phase.out_step * t, taps.iter().map(shift).collect()));
                }
            }
        }
        rows.sort_unstable();
        let step = self.vertical[0].in_step;
        let total = count * height;
        let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(total) };
        let row_len = input[1] * channels;
        let pitch = if (channels * size_of::<T>()).is_multiple_of(ALIASES) { channels + ALIAS_GAP } else { channels };
        let copies = pitch > channels;
        parallel_for(threads, parts, |task| {
            let mut taps = Vec::with_capacity(kernel_size * kernel_size);
            let mut ahead = Vec::with_capacity(4);
            // Which row of the input each row of copies is.
            let mut copied = vec![usize::MAX; kernel_size];
            scratch::with(if copies { kernel_size * input[1] * pitch } else { 0 }, |memory: &mut [T]| {
                for row in part(total, parts, task) {
                    let (n, (y, row_taps)) = (row / height, &rows[row % height]);
                    let image = &self.x[n * input[0] * row_len..][..input[0] * row_len];
                    for &(_, from) in row_taps.iter().filter(|_| copies) {
                        if std::mem::replace(&mut copied[from % kernel_size], n * input[0] + from)
                            != n * input[0] + from
                        {
                            let to = memory[from % kernel_size * input[1] * pitch..].chunks_exact_mut(pitch);
                            for (to, pixel) in to.zip(image[from * row_len..][..row_len].chunks_exact(channels)) {
                                to[..channels].copy_from_slice(pixel);
                            }
                        }
                    }
                    let x = if copies { memory.as_ptr() } else { image.as_ptr() };
                    let place = |y: usize, x: usize| (if copies { y % kernel_size } else { y } * input[1] + x) * pitch;
                    for (phase, run, column_taps, columns) in &column_runs {
                        taps.clear();
                        for &(tap_y, from_y) in row_taps {
                            taps.extend(column_taps.iter().map(|&(tap_x, from_x)| {
                                (place(from_y, from_x), (tap_y * kernel_size + tap_x) * channels)
                            }));
                        }
                        // The rows that the next row of the output sees first.
                        ahead.clear();
                        let last = row_taps.iter().map(|tap| tap.1).max();
                        if let (false, Some(y), Some(&(_, x))) = (copies, last, column_taps.first()) {
                            for (dy, dx) in (1..=step).flat_map(|dy| (0..phase.in_step).map(move |dx| (dy, dx))) {
                                ahead.push(place(y + dy, x + dx));
                            }
                        }
                        let first = (n * height + y) * width + phase.first + phase.out_step * run.start;
                        // SAFETY: the run's pixels see inside image n, or copies of its rows, through these taps; each
                        // row of the output is written by one task.
                        let kernel = unsafe {
                            TapPixels {
                                channels,
                                pixels: run.len(),
                                taps: &taps,
                                columns: *columns,
                                x,
                                x_stride: phase.in_step * pitch,
                                weights,
                                bias: self.bias,
                                y: self.y.ptr().add(first * channels),
                                y_stride: phase.out_step * channels,
                                ahead: (&ahead, width * channels),
                            }
                            .promise()
                        };
                        self.isa.run(kernel);
                    }
                }
            });
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
        let conv = PlaneConv::new::<T::Wide>(self.isa, self.vertical.clone(), self.horizontal.clone(), kernel);
        let weight = |c: usize| move |tap| self.weight[self.shape.weight_index(c, tap)].widen();
        let pack = |taps: &Taps| (0..channels).flat_map(|c| taps.pack(weight(c))).collect::<Vec<_>>();
        let weights: Vec<_> = conv.taps().iter().map(pack).collect();
        parallel_for(threads, parts * tiles, |task| {
            let (range, images) = (part(channels, tiles, task % tiles), part(count, parts, task / tiles));
            let most = channels_together(pixels, channels);
            scratch::with(conv.memory(IMAGES * most), |memory: &mut [T::Wide]| {
                with_wide(self.isa, self.x, [channels, pixels], range, images.clone(), |channel, x, step| {
                    let first = (images.start * channels + channel.start) * out_pixels;
                    let weights = |pair: usize| {
                        let len = conv.taps()[pair].len();
                        &weights[pair][channel.start * len..channel.end * len]
                    };
                    // SAFETY: planes of the output, which no other task writes.
                    unsafe {
                        conv.run(
                            self.isa,
                            x,
                            [(images.len(), step), (channel.len(), pixels)],
                            weights,
                            &bias[channel.clone()],
                            (self.y.at(first), [channels * out_pixels, out_pixels], size),
                            memory,
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
    isa: Active,
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
                let write = |c, tap, sum| unsafe { shared.ptr().add(shape.weight_index(c, tap)).write(T::narrow(sum)) };
                grad.planes(part(shape.channels, tiles, task), write);
            });
        }
        // Each part of the images has sums of its own, added up in order at the end.
        Order::Nhwc => {
            let parts = shape.count.clamp(1, MAX_PARTS);
            let mut partial = vec![T::Wide::default(); parts * shape.weights()];
            let shared = Shared(partial.as_mut_ptr());
            parallel_for(threads, parts, |task| {
                let len = shape.weights();
                // SAFETY: each task has sums of its own.
                let sums = unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(task * len), len) };
                part(shape.count, parts, task).for_each(|n| grad.pixels(n, sums));
            });
            for (c, tap) in (0..shape.channels).flat_map(|c| (0..taps).map(move |tap| (c, tap))) {
                let place = tap * shape.channels + c;
                let sum = (0..parts).fold(T::Wide::default(), |sum, p| sum + partial[p * shape.weights() + place]);
                grad_weight[shape.weight_index(c, tap)].write(T::narrow(sum));
            }
        }
    }
}

struct WeightGrad<'a, T> {
    isa: Active,
    shape: &'a Depthwise,
    vertical: &'a Phase,
    horizontal: &'a Phase,
    x: &'a [T],
    grad_output: &'a [T],
}

impl<T: Element> WeightGrad<'_, T> {
    /// NHWC: adds image `n` to `[tap][channel]` sums.
    fn pixels(&self, n: usize, sums: &mut [T::Wide]) {
        let Depthwise { channels, kernel, stride, .. } = *self.shape;
        let (input, output) = (self.shape.horizontal.input, self.shape.horizontal.output);
        let x = self.x[n * self.shape.vertical.input * input * channels..].as_ptr();
        let grad = self.grad_output[n * self.shape.vertical.output * output * channels..].as_ptr();
        let column_runs = self.horizontal.runs();
        // Some rows at a time, which the second cache holds while each row of the kernel sees them.
        let together = (ROW_PIXELS / output.max(1)).max(1);
        let blocks = self.vertical.runs().into_iter().flat_map(|(run, taps)| {
            let (first, end) = (run.start, run.end);
            run.step_by(together).map(move |start| (start..(start + together).min(end), first, taps.clone()))
        });
        for (rows, first, row_taps) in blocks {
            for (columns, column_taps) in &column_runs {
                for &(tap_y, from_y) in &row_taps {
                    let from_y = from_y + stride * (rows.start - first);
                    // The taps of one row of the kernel are neighbours, in the image and in `sums`.
                    let Some(&(tap_x, from_x)) = column_taps.first() else { continue };
                    let taps: Vec<_> = (0..column_taps.len()).map(|i| i * channels).collect();
                    assert!(taps.len() <= MAX_TAPS);
                    let first = (tap_y * kernel + tap_x) * channels;
                    // SAFETY: all pixels of the rectangle see inside image n through these taps.
                    let kernel = unsafe {
                        TapSums {
                            channels,
                            size: [rows.len(), columns.len()],
                            taps: &taps,
                            x: x.add((from_y * input + from_x) * channels),
                            x_strides: [stride * input * channels, stride * channels],
                            g: grad.add((rows.start * output + columns.start) * channels),
                            g_strides: [output * channels, channels],
                            sums: &mut sums[first..first + taps.len() * channels],
                        }
                        .promise()
                    };
                    self.isa.run(kernel);
                }
            }
        }
    }

    /// NCHW: the sums of some channels over all images.
    fn planes(&self, range: Range<usize>, mut write: impl FnMut(usize, usize, T::Wide)) {
        let Depthwise { count, channels, kernel, .. } = *self.shape;
        let taps = Taps::new(lanes::<T::Wide>(self.isa), self.vertical, self.horizontal, kernel, self.horizontal.count);
        let pixels = self.vertical.input * self.horizontal.input;
        let size = [self.vertical.count, self.horizontal.count];
        let out_pixels = size[0] * size[1];
        let slots_len = taps.len() * slot::<T::Wide>();
        let lens = [range.len() * slots_len, taps.len()];
        scratch::with(lens.iter().sum(), |memory: &mut [T::Wide]| {
            let [slots, sums] = cut(memory, lens);
            slots.fill(T::Wide::default());
            for images in (0..count).step_by(IMAGES).map(|first| first..count.min(first + IMAGES)) {
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

/// Calls `body` with some channels at a time, of `range`, of the planes of `[channels, pixels]` of some images: the channels,
/// their planes as what is computed with, and the distance from one image's to the next's.
fn with_wide<T: Element>(
    isa: Active,
    x: &[T],
    [channels, pixels]: [usize; 2],
    range: Range<usize>,
    images: Range<usize>,
    mut body: impl FnMut(Range<usize>, &[T::Wide], usize),
) {
    let most = channels_together(pixels, channels);
    let (first, end) = (range.start, range.end);
    let blocks = range.step_by(most).map(|first| first..(first + most).min(end));
    let start = |image: usize, channel: usize| (image * channels + channel) * pixels;
    if let Some(x) = T::as_wide(x) {
        return blocks.for_each(|block| body(block.clone(), &x[start(images.start, block.start)..], channels * pixels));
    }
    scratch::with(images.len() * most.min(end - first) * pixels, |memory: &mut [T::Wide]| {
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
