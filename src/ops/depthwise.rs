//! Depthwise convolution and its gradients.
//!
//! Along each axis, output pixels fall into *phases* in which pixel `t` sees input pixels `step * t + offset` for a fixed
//! list of taps. A convolution has one phase; its input gradient at stride 2 has two, each with the taps of one parity.
//! So forward and input gradient are one computation, [`Correlation`].

use std::mem::MaybeUninit;
use std::ops::Range;

use super::{Shared, estimate};
use crate::isa::Active;
use crate::kernels::Element;
use crate::kernels::depthwise::{MAX_TAPS, TapPixels, TapSums};
use crate::kernels::pointwise::{AddBias, ConvRows, DotRows, Identity, MAX_SINGLE_B, Rows, SumSlots, slot};
use crate::pool::{parallel_for, part, threads_for};
use crate::scratch;
use crate::shape::{Axis, Depthwise, Order};

/// Tasks for each thread.
const TASKS_PER_THREAD: usize = 4;
/// Values of a padded band of a plane in NCHW, about: the band stays in the L1 cache while all taps read it.
const BAND: usize = 6 << 10;
/// Images in one set of partial weight gradients, at least, and such sets at most.
const MAX_PARTS: usize = 64;

/// Output pixels `first, first + out_step, ...` of one axis, `count` of them.
#[derive(Clone, Debug)]
struct Phase {
    first: usize,
    out_step: usize,
    count: usize,
    /// Output pixel `t` of the phase sees input pixels `in_step * t + offset`.
    in_step: usize,
    /// Tap of the kernel and offset of its input.
    taps: Vec<(usize, isize)>,
    /// Number of input pixels.
    input: usize,
}

/// Taps along an axis, each with the input pixel that an output pixel sees through it.
type Seen = Vec<(usize, usize)>;

impl Phase {
    /// The convolution along an axis.
    fn forward(axis: Axis, kernel: usize, stride: usize) -> Vec<Self> {
        let taps = (0..kernel).map(|tap| (tap, tap as isize - axis.before as isize)).collect();
        vec![Self { first: 0, out_step: 1, count: axis.output, in_step: stride, taps, input: axis.input }]
    }

    /// The input gradient: input pixel `stride * t + phase` was seen by tap `tap` of output pixel
    /// `t + (phase + before - tap) / stride` where that is a whole number.
    fn backward(axis: Axis, kernel: usize, stride: usize) -> Vec<Self> {
        (0..stride.min(axis.input))
            .map(|first| {
                let distance = |tap: usize| (first + axis.before) as isize - tap as isize;
                let seen = (0..kernel).filter(|&tap| distance(tap).rem_euclid(stride as isize) == 0);
                let taps = seen.map(|tap| (tap, distance(tap).div_euclid(stride as isize))).collect();
                let count = (axis.input - first).div_ceil(stride);
                Self { first, out_step: stride, count, in_step: 1, taps, input: axis.output }
            })
            .collect()
    }

    /// Whether output pixel `t` sees an input pixel through a tap at `offset`.
    fn sees(&self, t: usize, offset: isize) -> bool {
        let pixel = (self.in_step * t) as isize + offset;
        0 <= pixel && pixel < self.input as isize
    }

    /// Maximal runs of output pixels that see the same taps, with these taps and the input pixel that the first pixel
    /// of the run sees through each.
    fn runs(&self) -> Vec<(Range<usize>, Seen)> {
        let seen = |t: usize| -> Vec<bool> { self.taps.iter().map(|&(_, offset)| self.sees(t, offset)).collect() };
        let pixels: Vec<_> = (0..self.count).collect();
        pixels
            .chunk_by(|&a, &b| seen(a) == seen(b))
            .map(|run| {
                let visible = self.taps.iter().filter(|&&(_, offset)| self.sees(run[0], offset));
                let taps = visible.map(|&(tap, offset)| (tap, (self.in_step * run[0]).wrapping_add_signed(offset)));
                (run[0]..run[0] + run.len(), taps.collect())
            })
            .collect()
    }

    /// The lowest offset, and how many pixels the offsets span.
    fn span(&self) -> (isize, usize) {
        let offsets = self.taps.iter().map(|&(_, offset)| offset);
        let low = offsets.clone().min().unwrap_or(0);
        (low, (offsets.max().unwrap_or(0) - low) as usize)
    }
}

/// Convolution with one kernel for each channel.
struct Correlation<'a, T> {
    isa: Active,
    count: usize,
    channels: usize,
    kernel: usize,
    vertical: Vec<Phase>,
    horizontal: Vec<Phase>,
    /// Height and width of the output.
    output: [usize; 2],
    x: &'a [T],
    /// `[channel][tap]` in NCHW, `[tap][channel]` in NHWC.
    weights: &'a [T],
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
    scratch::with(shape.weights(), |weights: &mut [T]| {
        for (c, tap) in (0..shape.channels).flat_map(|c| (0..taps).map(move |tap| (c, tap))) {
            let place = if shape.order == Order::Nchw { c * taps + tap } else { tap * shape.channels + c };
            weights[place] = weight[shape.weight_index(c, tap)];
        }
        let y = Shared::new(y);
        let Depthwise { count, channels, kernel, .. } = *shape;
        let work = Correlation { isa, count, channels, kernel, vertical, horizontal, output, x, weights, bias, y };
        match shape.order {
            Order::Nchw => work.planes(threads),
            Order::Nhwc => work.pixels(threads),
        }
    });
}

impl<T: Element> Correlation<'_, T> {
    /// NHWC: runs of pixels that see the same taps.
    fn pixels(&self, threads: usize) {
        let [height, width] = self.output;
        let input = [self.vertical[0].input, self.horizontal[0].input];
        let column_runs: Vec<_> =
            self.horizontal.iter().flat_map(|phase| phase.runs().into_iter().map(move |run| (phase, run))).collect();
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
        let total = self.count * height;
        let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(total) };
        parallel_for(threads, parts, |task| {
            let mut taps = Vec::with_capacity(self.kernel * self.kernel);
            for row in part(total, parts, task) {
                let (n, (y, row_taps)) = (row / height, &rows[row % height]);
                let x = self.x[n * input[0] * input[1] * self.channels..].as_ptr();
                for (phase, (run, column_taps)) in &column_runs {
                    taps.clear();
                    for &(tap_y, from_y) in row_taps {
                        taps.extend(column_taps.iter().map(|&(tap_x, from_x)| {
                            (
                                (from_y * input[1] + from_x) * self.channels,
                                (tap_y * self.kernel + tap_x) * self.channels,
                            )
                        }));
                    }
                    let first = (n * height + y) * width + phase.first + phase.out_step * run.start;
                    // SAFETY: the run's pixels see inside image n through these taps; each row of the output is
                    // written by one task.
                    let kernel = unsafe {
                        TapPixels {
                            channels: self.channels,
                            pixels: run.len(),
                            taps: &taps,
                            x,
                            x_stride: phase.in_step * self.channels,
                            weights: self.weights,
                            bias: self.bias,
                            y: self.y.ptr().add(first * self.channels),
                            y_stride: phase.out_step * self.channels,
                        }
                        .promise()
                    };
                    self.isa.run(kernel);
                }
            }
        });
    }

    /// NCHW: each plane is padded and, for a step of 2, split by the parity of its rows and columns, so that every tap is
    /// a shifted view of it; a band of rows is convolved at once, its rows following each other as one.
    fn planes(&self, threads: usize) {
        let planes = self.count * self.channels;
        let parts = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).min(planes) };
        parallel_for(threads, parts, |task| {
            for plane in part(planes, parts, task) {
                for vertical in &self.vertical {
                    self.plane(plane, vertical);
                }
            }
        });
    }

    fn plane(&self, plane: usize, vertical: &Phase) {
        let [height, width] = self.output;
        let input = [vertical.input, self.horizontal[0].input];
        let x = &self.x[plane * input[0] * input[1]..][..input[0] * input[1]];
        let weights = &self.weights[plane % self.channels * self.kernel * self.kernel..];
        let bias = self.bias.map(|bias| &bias[plane % self.channels..][..1]);
        let step = vertical.in_step;
        // One geometry serves all horizontal phases: the widest.
        let low = self.horizontal.iter().map(|phase| phase.span().0).min().unwrap_or(0);
        let count = self.horizontal.iter().map(|phase| phase.count).max().unwrap_or(0);
        let high = self.horizontal.iter().map(|phase| phase.span().0 + phase.span().1 as isize).max().unwrap_or(0);
        let pitch = count + (high - low) as usize / step;
        let (low_y, span_y) = vertical.span();
        let band = (BAND / pitch / (step * step)).saturating_sub(span_y / step).clamp(1, vertical.count.max(1));
        let rows = band + span_y / step;
        let size = [rows * pitch, band * pitch * self.horizontal.len()];
        scratch::with(step * step * size[0] + size[1], |memory: &mut [T]| {
            let (padded, results) = memory.split_at_mut(step * step * size[0]);
            for start in (0..vertical.count).step_by(band) {
                let band = band.min(vertical.count - start);
                for row in 0..step * (band + span_y / step) {
                    let from = (start * step + row) as isize + low_y;
                    let source =
                        (0 <= from && from < input[0] as isize).then(|| &x[from as usize * input[1]..][..input[1]]);
                    let target = &mut padded[row % step * step * size[0]..];
                    split_row(source, low, step, pitch, size[0], row / step * pitch, target);
                }
                for (phase, result) in self.horizontal.iter().zip(results.chunks_mut(size[1] / self.horizontal.len())) {
                    let mut offsets = Vec::with_capacity(self.kernel * self.kernel);
                    let mut tap_weights = Vec::with_capacity(self.kernel * self.kernel);
                    for &(tap_y, offset_y) in &vertical.taps {
                        for &(tap_x, offset_x) in &phase.taps {
                            let (y, x) = ((offset_y - low_y) as usize, (offset_x - low) as usize);
                            offsets.push((y % step * step + x % step) * size[0] + y / step * pitch + x / step);
                            tap_weights.push(weights[tap_y * self.kernel + tap_x]);
                        }
                    }
                    // SAFETY: the last tap of the last pixel is the last pixel of its part of `padded`; `result` holds
                    // `band` rows of `pitch`.
                    let kernel = unsafe {
                        ConvRows {
                            x: padded.as_ptr(),
                            x_offsets: &offsets,
                            weights: &tap_weights,
                            y: result.as_mut_ptr(),
                            y_offsets: &[0],
                            pixels: (band - 1) * pitch + phase.count,
                            prologue: Identity,
                            epilogue: AddBias(bias),
                        }
                        .promise()
                    };
                    self.isa.run(kernel);
                }
                for row in 0..band {
                    let y = vertical.first + vertical.out_step * (start + row);
                    // SAFETY: row y of this plane of the output, which no other task writes.
                    let target = unsafe {
                        std::slice::from_raw_parts_mut(self.y.ptr().add((plane * height + y) * width).cast(), width)
                    };
                    merge_row(&results[row * pitch..], size[1] / self.horizontal.len(), self.horizontal.len(), target);
                }
            }
        });
    }
}

/// Writes a row, padded with zeros to `step * pitch` pixels from pixel `low` on, to `target`: pixel `p` to place
/// `p / step` of part `p % step`; parts are `part_len` apart.
fn split_row<T: Element>(
    source: Option<&[T]>,
    low: isize,
    step: usize,
    pitch: usize,
    part_len: usize,
    at: usize,
    target: &mut [T],
) {
    for parity in 0..step {
        let target = &mut target[parity * part_len + at..][..pitch];
        let Some(source) = source else {
            target.fill(T::default());
            continue;
        };
        // Places whose pixel `step * place + parity + low` lies inside the source.
        let offset = parity as isize + low;
        let first = ((-offset).max(0) as usize).div_ceil(step).min(pitch);
        let end = ((source.len() as isize - offset).max(0) as usize).div_ceil(step).clamp(first, pitch);
        target[..first].fill(T::default());
        target[end..].fill(T::default());
        let source = source.get((step * first).wrapping_add_signed(offset)..).unwrap_or_default();
        match step {
            1 => target[first..end].copy_from_slice(&source[..end - first]),
            _ => target[first..end].iter_mut().zip(source.chunks(2)).for_each(|(target, pair)| *target = pair[0]),
        }
    }
}

/// Writes rows of one or two phases to a row of the output: pixel `p` from place `p / phases` of phase `p % phases`.
pub(crate) fn merge_row<T: Element>(rows: &[T], phase_len: usize, phases: usize, target: &mut [MaybeUninit<T>]) {
    if phases == 1 {
        target.iter_mut().zip(rows).for_each(|(target, &value)| _ = target.write(value));
        return;
    }
    let (even, odd) = rows.split_at(phase_len);
    let whole = target.len() / 2;
    let mut pairs = target.chunks_exact_mut(2);
    for ((pair, &even), &odd) in (&mut pairs).zip(even).zip(odd) {
        pair[0].write(even);
        pair[1].write(odd);
    }
    if let [last] = pairs.into_remainder() {
        last.write(even[whole]);
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
            parallel_for(threads, shape.channels, |c| {
                // SAFETY: each channel's weights are written by one task.
                grad.planes(c, |tap, sum| unsafe { shared.ptr().add(shape.weight_index(c, tap)).write(sum) });
            });
        }
        // Each part of the images has sums of its own, added up in order at the end.
        Order::Nhwc => {
            let parts = shape.count.clamp(1, MAX_PARTS);
            let mut partial = vec![T::default(); parts * shape.weights()];
            let shared = Shared(partial.as_mut_ptr());
            parallel_for(threads, parts, |task| {
                let len = shape.weights();
                // SAFETY: each task has sums of its own.
                let sums = unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(task * len), len) };
                part(shape.count, parts, task).for_each(|n| grad.pixels(n, sums));
            });
            for (c, tap) in (0..shape.channels).flat_map(|c| (0..taps).map(move |tap| (c, tap))) {
                let place = tap * shape.channels + c;
                let sum = (0..parts).fold(T::default(), |sum, p| sum + partial[p * shape.weights() + place]);
                grad_weight[shape.weight_index(c, tap)].write(sum);
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
    fn pixels(&self, n: usize, sums: &mut [T]) {
        let Depthwise { channels, kernel, stride, .. } = *self.shape;
        let (input, output) = (self.shape.horizontal.input, self.shape.horizontal.output);
        let x = self.x[n * self.shape.vertical.input * input * channels..].as_ptr();
        let grad = self.grad_output[n * self.shape.vertical.output * output * channels..].as_ptr();
        let column_runs = self.horizontal.runs();
        for (rows, row_taps) in self.vertical.runs() {
            for (columns, column_taps) in &column_runs {
                for &(tap_y, from_y) in &row_taps {
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

    /// NCHW: the sums of channel `c` over all images.
    fn planes(&self, c: usize, mut write: impl FnMut(usize, T)) {
        let Depthwise { count, channels, kernel, stride, .. } = *self.shape;
        let (input, output) = (self.shape.horizontal.input, self.shape.horizontal.output);
        let (height, out_height) = (self.shape.vertical.input, self.shape.vertical.output);
        let (low_y, span_y) = self.vertical.span();
        let (low_x, span_x) = self.horizontal.span();
        let pitch = output + span_x / stride;
        let band =
            (BAND / pitch.max(1) / (stride * stride)).saturating_sub(span_y / stride).clamp(1, out_height.max(1));
        let part_len = (band + span_y / stride) * pitch;
        let taps = kernel * kernel;
        let offsets: Vec<_> = (0..taps)
            .map(|tap| {
                let (y, x) = (tap / kernel, tap % kernel);
                (y % stride * stride + x % stride) * part_len + y / stride * pitch + x / stride
            })
            .collect();
        scratch::with((stride * stride * part_len).max(taps) + taps * slot::<T>(), |memory: &mut [T]| {
            let (slots, padded) = memory.split_at_mut(taps * slot::<T>());
            slots.fill(T::default());
            for n in 0..count {
                let x = &self.x[(n * channels + c) * height * input..][..height * input];
                for start in (0..out_height).step_by(band) {
                    let band = band.min(out_height - start);
                    for row in 0..stride * (band + span_y / stride) {
                        let from = (start * stride + row) as isize + low_y;
                        let source =
                            (0 <= from && from < height as isize).then(|| &x[from as usize * input..][..input]);
                        let target = &mut padded[row % stride * stride * part_len..];
                        split_row(source, low_x, stride, pitch, part_len, row / stride * pitch, target);
                    }
                    let tiles = taps.div_ceil(MAX_SINGLE_B);
                    for tile in (0..tiles).map(|i| part(taps, tiles, i)) {
                        // SAFETY: rows start.. of this plane of grad_output, and the taps' views of them in `padded`.
                        let kernel = unsafe {
                            let grad = self.grad_output[((n * channels + c) * out_height + start) * output..].as_ptr();
                            DotRows {
                                a: Rows { base: grad, offsets: &[0], image_stride: output },
                                b: Rows { base: padded.as_ptr(), offsets: &offsets[tile.clone()], image_stride: pitch },
                                images: band,
                                pixels: output,
                                sums: &mut slots[tile.start * slot::<T>()..tile.end * slot::<T>()],
                                first_slot: 0,
                                slot_stride: tile.len(),
                            }
                            .promise()
                        };
                        self.isa.run(kernel);
                    }
                }
            }
            let sums = &mut padded[..taps];
            self.isa.run(SumSlots(slots, sums));
            sums.iter().enumerate().for_each(|(tap, &sum)| write(tap, sum));
        });
    }
}
