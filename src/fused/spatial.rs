//! Convolutions of more than one pixel in a fused network: depthwise ones, and the stem's.
//!
//! The planes of a group's channels are padded with zeros and, for a stride of 2, split by the parity of their rows and
//! columns. All parts have the same pitch, so that each tap is a shifted view of a part, the output's rows follow each
//! other as one long row, and the kernels of pointwise convolutions compute it: each channel's tap is an input row.
//!
//! ```text
//!   pitch  = output width + span        columns beyond the output's width are computed and thrown away
//!   part   = (output height + span) x pitch
//! ```
//!
//! Small planes of several images stand one after the other and are computed as one, too: a call of a kernel takes longer
//! than a plane of 8 x 8 pixels.
//!
//! The backward pass holds the gradient's planes likewise, with a border as wide as the taps reach.

use std::mem::MaybeUninit;

use super::pointwise::merge_parts;
use super::program::{Conv, Step};
use super::{PARTS, Pass, Statistics, Tape, chunks};
use crate::isa::Active;
use crate::kernels::Element;
use crate::kernels::pointwise::{AddBias, ConvRows, Identity, Rows, SumSlots, slot};
use crate::kernels::rows::{CopyRows, Sum};
use crate::ops::Shared;
use crate::ops::depthwise::merge_row;
use crate::ops::pointwise::products;
use crate::pool::part;
use crate::scratch;

/// Values of a row that are computed together, about: all that is done to them stays in the L1 cache.
const BLOCK_PIXELS: usize = 1024;

/// The geometry of a convolution's padded planes: those of one channel of some images.
struct Planes {
    /// Images.
    images: usize,
    /// Height and width of the input.
    input: [usize; 2],
    stride: usize,
    before: [usize; 2],
    pitch: usize,
    /// Rows and values of an image's part.
    rows: usize,
    part: usize,
    /// Pixels of an image's output rows as one.
    long: usize,
}

impl Planes {
    /// The planes of a step's source; `pitch` may be more than is needed.
    fn new(step: &Step, conv: &Conv, output: [usize; 2], pitch: usize, images: usize) -> Self {
        let span = conv.kernel.map(|kernel| (kernel - 1) / conv.stride);
        let pitch = pitch.max(output[1] + span[1]);
        let rows = output[0] + span[0];
        Self {
            images,
            input: [step.source.height, step.source.width],
            stride: conv.stride,
            before: conv.before,
            pitch,
            rows,
            // The last row's view runs over the end by up to the span.
            part: rows * pitch + span[1],
            long: (output[0] - 1) * pitch + output[1],
        }
    }

    /// Values of a channel's padded planes.
    fn padded(&self) -> usize {
        self.stride * self.stride * self.images * self.part
    }

    /// Where a tap's view of a channel's padded planes starts.
    fn tap(&self, y: usize, x: usize) -> usize {
        let step = self.stride;
        (y % step * step + x % step) * self.images * self.part + y / step * self.pitch + x / step
    }

    /// Pixels of the output's rows of some images as one.
    fn long(&self, images: usize) -> usize {
        (images - 1) * self.part + self.long
    }

    /// Writes a channel's planes, one for an image, into the padded ones, which hold zeros where the planes do not reach.
    fn write<T: Element>(&self, isa: Active, planes: &[T], padded: &mut [T]) {
        let ([height, width], [top, left]) = (self.input, self.before);
        // What lies beyond the last tap of the last output pixel is not read.
        let rows = height.min(self.stride * self.rows - top);
        let columns = width.min(self.stride * self.pitch - left);
        for (image, plane) in planes.chunks_exact(height * width).enumerate() {
            let padded = &mut padded[image * self.part..];
            if self.stride == 1 {
                let y = (&mut padded[top * self.pitch + left..], self.pitch);
                isa.run(CopyRows { x: (plane, width), y, size: [rows, columns] });
                continue;
            }
            for (y, row) in plane.chunks_exact(width).take(rows).enumerate() {
                let (y, row) = (y + top, &row[..columns]);
                let line = &mut padded[y % 2 * 2 * self.images * self.part + y / 2 * self.pitch..];
                let (even, odd) = line.split_at_mut(self.images * self.part);
                // An odd border puts the first pixel into an odd column.
                let (first, pairs) = row.split_at((left % 2).min(columns));
                odd[left / 2..].iter_mut().zip(first).for_each(|(to, &from)| *to = from);
                let (even, odd) = (&mut even[left.div_ceil(2)..], &mut odd[left.div_ceil(2)..]);
                let whole = pairs.chunks_exact(2);
                whole.remainder().iter().for_each(|&from| even[pairs.len() / 2] = from);
                for ((pair, even), odd) in whole.zip(even).zip(odd) {
                    (*even, *odd) = (pair[0], pair[1]);
                }
            }
        }
    }
}

impl<T: Element> Pass<'_, T> {
    /// Makes the value of a convolution, and its statistics.
    pub(super) fn spatial(&self, step: &Step, conv: &Conv) -> Vec<Statistics> {
        let value = &self.program.values[step.value];
        let (pixels, out_pixels) = (step.source.pixels(), value.pixels());
        let parts = self.image_parts(conv.groups);
        let block = self.image_block(pixels, parts);
        let planes = Planes::new(step, conv, [value.height, value.width], 0, block);
        let bias = conv.bias.map(|bias| &self.parameters[bias..][..conv.groups * conv.group_out]);
        let (k, m, packed) = (conv.group_in, conv.group_out, self.weights(step));
        let offsets = self.taps(conv, &planes);
        let long = planes.long(block).next_multiple_of(16);
        let y_offsets: Vec<_> = (0..m).map(|o| o * long).collect();
        let mut partial = vec![(0.0, 0.0, 0.0); parts * conv.groups * m];
        let shared = Shared(partial.as_mut_ptr());
        let rows = self.rows(step.value);
        self.for_tasks(conv.groups, parts, |g, p| {
            scratch::with(k * planes.padded() + m * long + block * pixels, |memory: &mut [T]| {
                let (padded, memory) = memory.split_at_mut(k * planes.padded());
                let (results, buffer) = memory.split_at_mut(m * long);
                padded.fill(T::default());
                // SAFETY: statistics of this part and group alone.
                let statistics =
                    unsafe { std::slice::from_raw_parts_mut(shared.ptr().add((p * conv.groups + g) * m), m) };
                for images in chunks(part(self.count, parts, p), block) {
                    for (i, padded) in padded.chunks_exact_mut(planes.padded()).enumerate() {
                        let range = images.start * pixels..images.end * pixels;
                        // SAFETY: sources are values of earlier steps.
                        planes.write(self.isa, unsafe { self.load(&step.source, g * k + i, range, buffer) }, padded);
                    }
                    for block in &packed.blocks {
                        // SAFETY: views of `padded` end inside it; rows of `results` are `long` values.
                        let kernel = unsafe {
                            ConvRows {
                                x: padded.as_ptr(),
                                x_offsets: &offsets,
                                weights: packed.block(g, block),
                                y: results.as_mut_ptr(),
                                y_offsets: &y_offsets[block.clone()],
                                pixels: planes.long(images.len()),
                                prologue: Identity,
                                epilogue: AddBias(bias.map(|bias| &bias[g * m + block.start..g * m + block.end])),
                            }
                            .promise()
                        };
                        self.isa.run(kernel);
                    }
                    for (o, result) in results.chunks_exact(long).enumerate() {
                        let range = images.start * out_pixels..images.end * out_pixels;
                        let start = (g * m + o) * self.count * out_pixels + range.start;
                        // SAFETY: these images of this group's rows, which are this task's own.
                        let y = unsafe { std::slice::from_raw_parts_mut(rows.ptr().add(start), range.len()) };
                        for (y, result) in y.chunks_exact_mut(out_pixels).zip(result.chunks(planes.part)) {
                            let size = [value.height, value.width];
                            self.isa.run(CopyRows { x: (result, planes.pitch), y: (y, value.width), size });
                        }
                        // SAFETY: just written; `y` is not used any more.
                        unsafe { self.complete(step.value, g * m + o, range, &mut statistics[o]) };
                    }
                }
            });
        });
        merge_parts(&partial, conv.groups * m)
    }

    /// Images that are computed together, at most.
    fn image_block(&self, pixels: usize, parts: usize) -> usize {
        (BLOCK_PIXELS / pixels).clamp(1, self.count.div_ceil(parts).max(1))
    }

    /// Where the views of a group's channels and taps start in its padded planes.
    fn taps(&self, conv: &Conv, planes: &Planes) -> Vec<usize> {
        let taps = (0..conv.group_in * conv.taps()).map(|i| (i / conv.taps(), i % conv.taps()));
        taps.map(|(i, tap)| i * planes.padded() + planes.tap(tap / conv.kernel[1], tap % conv.kernel[1])).collect()
    }

    /// Parts of the images, so that there are enough tasks.
    fn image_parts(&self, groups: usize) -> usize {
        (2 * PARTS).div_ceil(groups).min(self.count).max(1)
    }
}

/// Input pixels of one parity along an axis: which taps of which output pixels saw them.
struct Phase {
    first: usize,
    count: usize,
    /// Tap, and the distance of the output pixel that saw input pixel `first` through it.
    taps: Vec<(usize, isize)>,
}

fn phases(input: usize, kernel: usize, stride: usize, before: usize) -> Vec<Phase> {
    (0..stride.min(input))
        .map(|first| {
            let distance = |tap: usize| (first + before) as isize - tap as isize;
            let seen = (0..kernel).filter(|&tap| distance(tap).rem_euclid(stride as isize) == 0);
            let taps = seen.map(|tap| (tap, distance(tap).div_euclid(stride as isize))).collect();
            Phase { first, count: (input - first).div_ceil(stride), taps }
        })
        .collect()
}

/// A border around the gradient's planes, wide enough for every phase to see zeros beyond the edges.
struct Border {
    /// Zeros above and at the left.
    before: [usize; 2],
    pitch: usize,
    /// Values of an image's plane.
    len: usize,
    phases: [Vec<Phase>; 2],
}

impl Border {
    fn new(step: &Step, conv: &Conv, output: [usize; 2]) -> Self {
        let input = [step.source.height, step.source.width];
        let phases = [0, 1].map(|axis| phases(input[axis], conv.kernel[axis], conv.stride, conv.before[axis]));
        let reach = |axis: usize| {
            let seen = || phases[axis].iter().flat_map(|phase| phase.taps.iter().map(move |&(_, d)| (d, phase.count)));
            let low = seen().map(|(distance, _)| -distance).max().unwrap_or(0).max(0) as usize;
            let high = seen().map(|(distance, count)| distance + count as isize).max().unwrap_or(0).max(0) as usize;
            (low, high.max(output[axis]))
        };
        let ((top, bottom), (left, right)) = (reach(0), reach(1));
        // The same pitch as that of the source's planes, so that the weight gradient is a product of long rows.
        let pitch = (left + right).max(output[1] + (conv.kernel[1] - 1) / conv.stride);
        // A phase's rows are written like the gradient's own.
        let rows = phases[0].iter().map(|phase| phase.count).max().unwrap_or(0).max(top + bottom);
        Self { before: [top, left], pitch, len: rows * pitch, phases }
    }

    /// Where the first pixel stands in a plane.
    fn first(&self) -> usize {
        self.before[0] * self.pitch + self.before[1]
    }
}

impl<T: Element> Tape<'_, '_, T> {
    /// Goes back through a convolution.
    pub(super) fn spatial(&mut self, step: &Step, conv: &Conv) {
        let pass = self.pass;
        let value = &pass.program.values[step.value];
        let (pixels, out_pixels) = (step.source.pixels(), value.pixels());
        let (groups, k, m, taps) = (conv.groups, conv.group_in, conv.group_out, conv.taps());
        let parts = pass.image_parts(groups);
        let block = pass.image_block(pixels, parts);
        let border = Border::new(step, conv, [value.height, value.width]);
        let planes = Planes::new(step, conv, [value.height, value.width], border.pitch, block);
        let weights = &pass.parameters[conv.weight..][..conv.weights()];
        let kernels = if step.differentiate { self.phase_kernels(conv, &border, block, weights) } else { Vec::new() };
        let b_offsets = pass.taps(conv, &planes);
        let a_offsets: Vec<_> = (0..m).map(|o| o * block * border.len + border.first()).collect();
        let sizes = [m * k * taps * slot::<T>(), k * planes.padded(), m * block * border.len, 2 * block * border.len];
        let mut partial = vec![T::default(); parts * conv.weights()];
        let mut bias = vec![0.0; parts * groups * m];
        let (shared, shared_bias) = (Shared(partial.as_mut_ptr()), Shared(bias.as_mut_ptr()));
        self.give_back(&step.source, groups, parts, |this, g, images, p, sums| {
            scratch::with(sizes.iter().sum::<usize>() + block * pixels.max(out_pixels), |memory: &mut [T]| {
                let [slots, padded, bordered, results, buffer] = split(memory, sizes);
                slots.fill(T::default());
                padded.fill(T::default());
                bordered.fill(T::default());
                let at = p * groups + g;
                // SAFETY: sums of this part and group alone.
                let (weight_sums, bias) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(shared.ptr().add(at * m * k * taps), m * k * taps),
                        std::slice::from_raw_parts_mut(shared_bias.ptr().add(at * m), m),
                    )
                };
                for images in chunks(images, block) {
                    for (o, (bias, planes)) in
                        bias.iter_mut().zip(bordered.chunks_exact_mut(block * border.len)).enumerate()
                    {
                        let range = images.start * out_pixels..images.end * out_pixels;
                        // SAFETY: all that read the value come later in the program and have given their gradients.
                        let grad = unsafe { this.take(step.value, g * m + o, range, buffer) };
                        for (grad, plane) in grad.chunks_exact(out_pixels).zip(planes.chunks_exact_mut(border.len)) {
                            let (y, size) = (&mut plane[border.first()..], [value.height, value.width]);
                            pass.isa.run(CopyRows { x: (grad, value.width), y: (y, border.pitch), size });
                        }
                        if conv.bias.is_some() {
                            *bias += pass.isa.run(Sum(grad));
                        }
                    }
                    let range = images.start * pixels..images.end * pixels;
                    for (i, padded) in padded.chunks_exact_mut(planes.padded()).enumerate() {
                        // SAFETY: the forward pass wrote the values.
                        let source = unsafe { pass.load(&step.source, g * k + i, range.clone(), buffer) };
                        planes.write(pass.isa, source, padded);
                    }
                    let a = Rows { base: bordered.as_ptr(), offsets: &a_offsets, image_stride: border.len };
                    let b = Rows { base: padded.as_ptr(), offsets: &b_offsets, image_stride: planes.part };
                    // SAFETY: views of `padded` end inside it. Between the gradient's rows there are zeros.
                    unsafe { products(pass.isa, a, b, [images.len(), planes.long], slots) };
                    if !step.differentiate {
                        continue;
                    }
                    let mut sums = &mut *sums;
                    for i in 0..k {
                        let grad = &mut buffer[..range.len()];
                        this.planes(&kernels, &border, g * k + i, bordered, results, grad, step);
                        let rows = step.source.starts[g * k + i + 1] - step.source.starts[g * k + i];
                        let (own, rest) = sums.split_at_mut(rows);
                        sums = rest;
                        // SAFETY: the group's channels and these images are this task's own.
                        unsafe { this.give(&step.source, g * k + i, range.clone(), grad, own) };
                    }
                }
                pass.isa.run(SumSlots(slots, weight_sums));
            });
        });
        self.write_weights(conv, parts, &partial, &bias);
    }

    /// For each vertical and each horizontal phase: offsets in a group's bordered planes, and for each input channel the
    /// weights that go with them.
    fn phase_kernels(&self, conv: &Conv, border: &Border, block: usize, weights: &[T]) -> Vec<(Vec<usize>, Vec<T>)> {
        let (k, m) = (conv.group_in, conv.group_out);
        let mut kernels = Vec::new();
        for (vertical, horizontal) in border.phases[0].iter().flat_map(|v| border.phases[1].iter().map(move |h| (v, h)))
        {
            let taps: Vec<_> =
                vertical.taps.iter().flat_map(|&v| horizontal.taps.iter().map(move |&h| (v, h))).collect();
            let mut offsets = Vec::new();
            for (o, ((_, y), (_, x))) in (0..m).flat_map(|o| taps.iter().map(move |&tap| (o, tap))) {
                let row = (border.before[0] as isize + y) as usize;
                let column = (border.before[1] as isize + x) as usize;
                offsets.push(o * block * border.len + row * border.pitch + column);
            }
            let mut packed = Vec::with_capacity(conv.weights());
            for channel in 0..conv.groups * k {
                let (g, i) = (channel / k, channel % k);
                for (o, ((y, _), (x, _))) in (0..m).flat_map(|o| taps.iter().map(move |&tap| (o, tap))) {
                    packed.push(weights[conv.index(g, o, i, y * conv.kernel[1] + x)]);
                }
            }
            kernels.push((offsets, packed));
        }
        kernels
    }

    /// The gradient by one channel's planes of some images, from the group's bordered planes.
    fn planes(
        &self,
        kernels: &[(Vec<usize>, Vec<T>)],
        border: &Border,
        channel: usize,
        bordered: &[T],
        results: &mut [T],
        grad: &mut [T],
        step: &Step,
    ) {
        let (width, pixels) = (step.source.width, step.source.pixels());
        let images = grad.len() / pixels;
        let [vertical, horizontal] = &border.phases;
        let stride = vertical.len();
        let phase_len = results.len() / 2;
        for (v, vertical) in vertical.iter().enumerate() {
            for (h, phase) in horizontal.iter().enumerate() {
                let (offsets, weights) = &kernels[v * horizontal.len() + h];
                let result = &mut results[h * phase_len..][..phase_len];
                if offsets.is_empty() {
                    result.fill(T::default());
                    continue;
                }
                let long = (vertical.count.max(1) - 1) * border.pitch + phase.count;
                // SAFETY: views of the bordered planes end inside them; `result` holds the phase's rows.
                let kernel = unsafe {
                    ConvRows {
                        x: bordered.as_ptr(),
                        x_offsets: offsets,
                        weights: &weights[channel * offsets.len()..][..offsets.len()],
                        y: result.as_mut_ptr(),
                        y_offsets: &[0],
                        pixels: (images - 1) * border.len + long,
                        prologue: Identity,
                        epilogue: AddBias(None),
                    }
                    .promise()
                };
                self.pass.isa.run(kernel);
            }
            for (image, plane) in grad.chunks_exact_mut(pixels).enumerate() {
                let rows = &results[image * border.len..];
                if horizontal.len() == 1 {
                    let y = (&mut plane[vertical.first * width..], stride * width);
                    self.pass.isa.run(CopyRows { x: (rows, border.pitch), y, size: [vertical.count, width] });
                    continue;
                }
                for row in 0..vertical.count {
                    let target = &raw mut plane[(vertical.first + stride * row) * width..][..width];
                    // SAFETY: the same values, of which only whole ones are written.
                    let target = unsafe { &mut *(target as *mut [MaybeUninit<T>]) };
                    merge_row(&rows[row * border.pitch..], phase_len, horizontal.len(), target);
                }
            }
        }
    }
}

/// Cuts memory into pieces of these sizes and a rest.
fn split<T>(memory: &mut [T], sizes: [usize; 4]) -> [&mut [T]; 5] {
    let mut rest = memory;
    let [a, b, c, d] = sizes.map(|size| {
        let (piece, others) = std::mem::take(&mut rest).split_at_mut(size);
        rest = others;
        piece
    });
    [a, b, c, d, rest]
}
