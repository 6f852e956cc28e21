//! Convolutions of more than one pixel in a fused network that are not
//! [depthwise](super::depthwise), such as the stem's.
//!
//! They run over [padded planes](crate::dwconv::padded_planes) that stand side by side. Each tap of
//! each channel of a group is an input row of a pointwise convolution: a shifted view of the
//! planes, whose rows follow each other as one long row.
//!
//! The backward pass holds the gradient's planes likewise.

use std::ops::Range;

use super::PARTS;
use super::backward::Tape;
use super::conv::{ParameterGrads, PartSums, multiply_blocks};
use super::pack::Packed;
use super::pass::{Pass, Statistics};
use super::program::{Conv, Step};
use super::source::NormSums;
use super::unfold::PARTIAL_VALUES;
use crate::conv1x1::dot_nt::MatmulNt;
use crate::dwconv::nchw::{Planes, ahead, merge, planes_together};
use crate::dwconv::polyphase::{Phase, most_pixels, sum_seen};
use crate::memory;
use crate::microkernels::dot_nt::Rows;
use crate::microkernels::reduce::Sum;
use crate::pool::{chunks, part};
use crate::scratch::{self, cut};
use crate::shape::Axis;
use crate::simd::IsaKind;
use crate::simd::element::{Element, WideElement, writable};
use crate::simd::mul_acc::Fma;

/// The phases of a convolution's output and of its input's gradient, along both axes.
pub(super) struct Phases {
    pub forward: [Vec<Phase>; 2],
    pub backward: [Vec<Phase>; 2],
}

impl Phases {
    pub fn new(step: &Step, conv: &Conv, output: [usize; 2]) -> Self {
        let (input, window) = (step.source.size(), conv.window);
        let axes = [0, 1].map(|i| Axis { input: input[i], output: output[i], before: window.before[i] });
        Self {
            forward: [0, 1].map(|i| Phase::forward(axes[i], window.kernel[i], window.stride[i])),
            backward: [0, 1].map(|i| Phase::backward(axes[i], window.kernel[i], window.stride[i])),
        }
    }
}

fn both(phases: &[Vec<Phase>; 2]) -> [&[Phase]; 2] {
    [&phases[0], &phases[1]]
}

/// All pairs of a vertical and a horizontal phase.
fn pairs(phases: &[Vec<Phase>; 2]) -> impl Iterator<Item = (&Phase, &Phase)> {
    phases[0].iter().flat_map(|vertical| phases[1].iter().map(move |horizontal| (vertical, horizontal)))
}

/// The convolution of padded planes.
struct Spatial<'s, T> {
    step: &'s Step,
    conv: &'s Conv,
    packed: &'s Packed<T>,
    /// Images that are worked on together.
    block: usize,
    planes: Planes,
    views: Vec<usize>,
    phases: [&'s Phase; 2],
    sums: PartSums<Statistics>,
}

impl<S: Element> Pass<'_, S> {
    /// Makes the value of a convolution, and its statistics.
    pub(super) fn spatial(&self, step: &Step, conv: &Conv) -> Vec<Statistics> {
        let value = &self.program.values[step.value];
        let phases = Phases::new(step, conv, value.size()).forward;
        let parts = self.image_parts(conv.groups);
        let block = planes_together(step.source.pixels(), self.count.div_ceil(parts));
        let [vertical, horizontal] = [&phases[0][0], &phases[1][0]];
        let planes = Planes::new(both(&phases), block);
        let packed = self.weights(step);
        let forward = Spatial {
            step,
            conv,
            packed,
            block,
            views: views::<S::Wide>(&planes, vertical, horizontal, conv.group_in),
            planes,
            phases: [vertical, horizontal],
            sums: PartSums::statistics(self, step.value, parts),
        };
        // Fewer tasks than threads: some share a group's output channels, though each has to pad
        // all planes. (Measured: docs/ALGORITHMS.md.)
        let sets = self.threads.div_ceil(conv.groups * parts).min(packed.blocks.len());
        self.for_tasks(conv.groups * sets, parts, |task, p| {
            let blocks = &packed.blocks[part(packed.blocks.len(), sets, task % sets)];
            forward.task(self, task / sets, blocks, part(self.count, parts, p), p);
        });
        forward.sums.merged()
    }

    /// Parts of the images, so that there are enough tasks.
    pub(super) fn image_parts(&self, groups: usize) -> usize {
        (2 * PARTS).div_ceil(groups).min(self.count).max(1)
    }
}

impl<T: WideElement> Spatial<'_, T> {
    /// Some blocks of a group's output channels for some images.
    fn task<S: Element<Wide = T>>(
        &self,
        pass: &Pass<'_, S>,
        g: usize,
        blocks: &[Range<usize>],
        images: Range<usize>,
        part: usize,
    ) {
        let (step, planes) = (self.step, &self.planes);
        let (k, m, pixels) = (self.conv.group_in, self.conv.group_out, step.source.pixels());
        let value = &pass.program.values[step.value];
        let rows = value.height * planes.pitch;
        let y_offsets = rows_of(m, rows);
        let tile = Pass::<S>::tile_len(self.block * value.pixels());
        let sizes = [k * planes.len::<T>(), m * rows, self.block * pixels, tile];
        scratch::with(sizes.iter().sum(), |memory: &mut [T]| {
            let [padded, results, buffer, tile] = cut(memory, sizes);
            padded.fill(T::default());
            for images in chunks(images, self.block) {
                for (i, padded) in padded.chunks_exact_mut(planes.len::<T>()).enumerate() {
                    let range = images.start * pixels..images.end * pixels;
                    // SAFETY: sources are values of earlier steps.
                    let source = unsafe { pass.load(&step.source, g * k + i, range, buffer, None) };
                    planes.write_all(pass.isa, source, padded);
                }
                let columns = planes.columns(images.len(), value.width);
                let (x, y) = ((padded.as_ptr(), &self.views[..]), (results.as_mut_ptr(), &y_offsets[..]));
                let (bias, len) = (self.packed.bias(g * m..(g + 1) * m), (value.height - 1) * planes.pitch + columns);
                // SAFETY: views of `padded` end inside it, as the rows do inside `results`.
                unsafe { multiply_blocks((pass.isa, Fma), x, (self.packed, g), blocks, bias, y, len) };
                let outputs = blocks[0].start..blocks[blocks.len() - 1].end;
                let results = results.chunks_exact(rows).enumerate();
                for (o, result) in results.skip(outputs.start).take(outputs.len()) {
                    self.write(pass, g * m + o, &images, result, &mut *tile, part);
                }
            }
        });
    }

    /// Writes an output channel's results for some images.
    fn write<S: Element<Wide = T>>(
        &self,
        pass: &Pass<'_, S>,
        channel: usize,
        images: &Range<usize>,
        result: &[T],
        tile: &mut [T],
        part: usize,
    ) {
        let value = &pass.program.values[self.step.value];
        let ([vertical, _], planes, out_pixels) = (self.phases, &self.planes, value.pixels());
        let range = images.start * out_pixels..images.end * out_pixels;
        let results = pass.results(self.step.value, channel, range.start, tile, range.len());
        // SAFETY: these images of the channel's row, which are the task's own, or the tile.
        let y = unsafe { std::slice::from_raw_parts_mut(results.0.ptr(), range.len()) };
        for (i, y) in y.chunks_exact_mut(out_pixels).enumerate() {
            let result = (&result[i * planes.step..], 0, planes.pitch);
            let rows = (vertical, 0..vertical.count);
            merge(pass.isa, rows, 1, result, writable(y), value.width, ahead(out_pixels));
        }
        // SAFETY: just written, and `y` is not used any more; statistics of this task alone.
        unsafe {
            let channels = channel..channel + 1;
            pass.apply_epilogue(self.step.value, channels.clone(), range, results, self.sums.of(part, channels));
        }
    }
}

/// Where rows of this length start.
fn rows_of(count: usize, len: usize) -> Vec<usize> {
    (0..count).map(|i| i * len).collect()
}

/// Where the views start that a pair of phases has of the planes of `channels` channels, through
/// each of its taps.
fn views<T>(planes: &Planes, vertical: &Phase, horizontal: &Phase, channels: usize) -> Vec<usize> {
    let views = |c: usize| {
        let taps = vertical.taps.iter().flat_map(|&(_, y)| horizontal.taps.iter().map(move |&(_, x)| [y, x]));
        taps.map(move |tap| c * planes.len::<T>() + planes.tap(tap))
    };
    (0..channels).flat_map(views).collect()
}

/// What computes the gradient by the input for a vertical and a horizontal phase.
struct PhaseKernel<T> {
    views: Vec<usize>,
    /// For each of a group's input channels, the weights of each view.
    weights: Packed<T>,
}

impl<T: WideElement> PhaseKernel<T> {
    fn new(isa: IsaKind, conv: &Conv, planes: &Planes, [vertical, horizontal]: [&Phase; 2], weights: &[T]) -> Self {
        let width = conv.window.kernel[1];
        let row = |&(y, _): &(usize, isize)| horizontal.taps.iter().map(move |&(x, _)| Some(y * width + x));
        let order: Vec<_> = vertical.taps.iter().flat_map(row).collect();
        let weight = |g, i, o, tap| weights[conv.index(g, o, i, tap)];
        let packed = Packed::of_taps(isa, conv.groups, conv.group_in, conv.group_out, &order, weight);
        Self { views: views::<T>(planes, vertical, horizontal, conv.group_out), weights: packed }
    }
}

/// The way back through a convolution.
struct SpatialGrad<'s, T> {
    step: &'s Step,
    conv: &'s Conv,
    phases: Phases,
    /// Images that are worked on together.
    block: usize,
    planes: Planes,
    grad_planes: Planes,
    /// For each pair of phases of the source, if its gradient is wanted.
    kernels: Vec<PhaseKernel<T>>,
    products: MatmulNt<T, Fma>,
    /// Views of the planes of the gradient and of the source whose products are the weights'
    /// gradients.
    views: [Vec<usize>; 2],
    /// Height and width of the value.
    size: [usize; 2],
    grads: ParameterGrads<T>,
}

impl<S: Element> Tape<'_, '_, S> {
    /// Goes back through a convolution.
    pub(super) fn spatial(&mut self, step: &Step, conv: &Conv) {
        let pass = self.pass;
        let size = pass.program.values[step.value].size();
        let (groups, k, m) = (conv.groups, conv.group_in, conv.group_out);
        let parts = pass.image_parts(groups).min((PARTIAL_VALUES / conv.weights()).max(2));
        let block = planes_together(step.source.pixels(), pass.count.div_ceil(parts));
        let phases = Phases::new(step, conv, size);
        let [planes, grad_planes] = Planes::pair(both(&phases.forward), both(&phases.backward), block);
        let weights = pass.conv_weights(conv);
        let kernel = |(v, h)| PhaseKernel::new(pass.isa, conv, &grad_planes, [v, h], weights);
        let kernels: Vec<_> = pairs(&phases.backward).filter(|_| step.differentiate).map(kernel).collect();
        let first = grad_planes.tap([0, 0]);
        let a_offsets: Vec<_> = (0..m).map(|o| o * grad_planes.len::<S::Wide>() + first).collect();
        let b_offsets = views::<S::Wide>(&planes, &phases.forward[0][0], &phases.forward[1][0], k);
        let back = SpatialGrad {
            products: MatmulNt::new(pass.isa, Fma, [m, b_offsets.len()], 1),
            views: [a_offsets, b_offsets],
            grads: ParameterGrads::new(conv, parts),
            step,
            conv,
            phases,
            block,
            planes,
            grad_planes,
            kernels,
            size,
        };
        self.backprop_source(&step.source, groups, parts, |this, g, images, p, sums| {
            back.task(this, g, images, p, sums);
        });
        back.grads.write(conv, self.grad_parameters);
    }
}

impl<T: WideElement> SpatialGrad<'_, T> {
    fn pixels(&self) -> usize {
        self.step.source.pixels()
    }

    fn out_pixels(&self) -> usize {
        self.size[0] * self.size[1]
    }

    /// Values from a channel's slopes to the next one's.
    fn slope_pitch(&self) -> usize {
        self.step.source.most_rows * self.block * self.pixels()
    }

    /// A group's gradients over some images.
    fn task<S: Element<Wide = T>>(
        &self,
        tape: &Tape<'_, '_, S>,
        g: usize,
        images: Range<usize>,
        part: usize,
        sums: &mut [NormSums],
    ) {
        let (step, pass, block, pixels) = (self.step, tape.pass, self.block, self.pixels());
        let (k, m) = (self.conv.group_in, self.conv.group_out);
        let sets = self.phases.backward[1].len() * most_pixels(&self.phases.backward[0]);
        let sizes = [
            self.products.memory(),
            k * self.planes.len::<T>(),
            m * self.grad_planes.len::<T>(),
            sets * k * self.planes.pitch,
            block * pixels.max(self.out_pixels()),
            k * self.slope_pitch(),
            k * block * pixels,
        ];
        scratch::with(sizes.iter().sum(), |memory: &mut [T]| {
            let [weight_slots, padded, grads, results, buffer, slopes, grad_x] = cut(memory, sizes);
            for zeroed in [&mut *weight_slots, padded, grads] {
                zeroed.fill(T::default());
            }
            // SAFETY: sums of this part and group alone.
            let (weight_sums, bias) = unsafe { self.grads.of(part, g) };
            // Sums of what is not a number, if there is such.
            let mut exact = Vec::new();
            for images in chunks(images, block) {
                self.pad(tape, g, &images, [&mut *grads, padded, buffer, slopes], bias);
                self.add_weights(tape, g, &images, [grads, padded], weight_slots, &mut exact);
                if !step.differentiate {
                    continue;
                }
                let range = images.start * pixels..images.end * pixels;
                self.multiply(pass, g, grads, results, &mut grad_x[..k * range.len()]);
                let (grads, slopes) = ((&*grad_x, range.len()), Some((&*slopes, self.slope_pitch())));
                // SAFETY: the group's channels and these images are this task's own.
                unsafe {
                    tape.accumulate_grads(&step.source, g * k..(g + 1) * k, &range, grads, slopes, None, &mut *sums);
                }
            }
            self.products.finish(weight_slots, weight_sums, self.views[1].len());
            weight_sums.iter_mut().zip(exact).for_each(|(sum, exact)| *sum += exact);
        });
    }

    /// Pads the planes of a group's gradient and of what it was made of, whose slopes it keeps; and
    /// adds to the gradient by the bias.
    fn pad<S: Element<Wide = T>>(
        &self,
        tape: &Tape<'_, '_, S>,
        g: usize,
        images: &Range<usize>,
        [grads, padded, buffer, slopes]: [&mut [T]; 4],
        bias: &mut [f64],
    ) {
        let (step, pass) = (self.step, tape.pass);
        let (k, m) = (self.conv.group_in, self.conv.group_out);
        let range = |pixels: usize| images.start * pixels..images.end * pixels;
        let planes = grads.chunks_exact_mut(self.grad_planes.len::<T>());
        for (o, (bias, planes)) in bias.iter_mut().zip(planes).enumerate() {
            // SAFETY: all that read the value come later in the program and have added their
            // gradients.
            let grad = unsafe { tape.read_grad(step.value, g * m + o, range(self.out_pixels()), buffer) };
            self.grad_planes.write_all(pass.isa, grad, planes);
            if self.conv.bias.is_some() {
                *bias += pass.isa.run(Sum(grad));
            }
        }
        for (i, padded) in padded.chunks_exact_mut(self.planes.len::<T>()).enumerate() {
            let slopes = step.differentiate.then_some(&mut slopes[i * self.slope_pitch()..]);
            // SAFETY: the forward pass wrote the values.
            let source = unsafe { pass.load(&step.source, g * k + i, range(self.pixels()), buffer, slopes) };
            self.planes.write_all(pass.isa, source, padded);
        }
    }

    /// Adds to the gradient by a group's weights.
    fn add_weights<S: Element<Wide = T>>(
        &self,
        tape: &Tape<'_, '_, S>,
        g: usize,
        images: &Range<usize>,
        [grads, padded]: [&[T]; 2],
        weight_slots: &mut [T],
        exact: &mut Vec<T>,
    ) {
        let isa = tape.pass.isa;
        // The gradient is zero between the images and between the rows.
        let rows = |base: &[T], offsets| Rows { base: base.as_ptr(), offsets, image_stride: 0, prefetch: 0 };
        let (a, b) = (rows(grads, &self.views[0]), rows(padded, &self.views[1]));
        let columns = self.planes.columns(images.len(), self.size[1]);
        let len = (self.size[0] - 1) * self.planes.pitch + columns;
        if isa.run(Sum(grads)).is_finite() && isa.run(Sum(padded)).is_finite() {
            // SAFETY: views of the planes end inside them.
            unsafe { self.products.add(a, b, [1, len], weight_slots) };
        } else {
            exact.resize(self.conv.weights() / self.conv.groups, T::default());
            self.sum_seen(tape, g, images, exact);
        }
    }

    /// The gradient by a group's weights where something is not a number: see [`sum_seen`].
    fn sum_seen<S: Element<Wide = T>>(&self, tape: &Tape<'_, '_, S>, g: usize, images: &Range<usize>, exact: &mut [T]) {
        let (step, pixels, out_pixels) = (self.step, self.pixels(), self.out_pixels());
        let (k, m, width) = (self.conv.group_in, self.conv.group_out, self.conv.window.kernel[1]);
        let phases = [&self.phases.forward[0][0], &self.phases.forward[1][0]];
        let mut grad_buffer = memory::filled(T::default(), self.block * out_pixels);
        let mut buffer = memory::filled(T::default(), self.block * pixels);
        let mut sums = exact.iter_mut();
        for (o, i) in (0..m).flat_map(|o| (0..k).map(move |i| (o, i))) {
            let out = images.start * out_pixels..images.end * out_pixels;
            let range = images.start * pixels..images.end * pixels;
            // SAFETY: as in `pad`.
            let (grad, source) = unsafe {
                (
                    tape.read_grad(step.value, g * m + o, out, &mut grad_buffer),
                    tape.pass.load(&step.source, g * k + i, range, &mut buffer, None),
                )
            };
            for (tap, sum) in sums.by_ref().take(self.conv.taps()).enumerate() {
                for (source, grad) in source.chunks_exact(pixels).zip(grad.chunks_exact(out_pixels)) {
                    let product = |[t, u]: [usize; 2], [y, x]: [usize; 2]| {
                        grad[t * self.size[1] + u].to_f64() * source[y * step.source.width + x].to_f64()
                    };
                    *sum += T::from_f64(sum_seen(phases, [tap / width, tap % width], product));
                }
            }
        }
    }

    /// The gradient by the planes of some images of all of a group's input channels, from the
    /// group's planes of the gradient by the output.
    fn multiply<S: Element<Wide = T>>(
        &self,
        pass: &Pass<'_, S>,
        g: usize,
        grads: &[T],
        results: &mut [T],
        grad_x: &mut [T],
    ) {
        let (planes, channels, pixels) = (&self.grad_planes, self.conv.group_in, self.pixels());
        let [vertical, horizontal] = &self.phases.backward;
        let images = grad_x.len() / pixels / channels;
        let (set, rows) = (results.len() / horizontal.len(), results.len() / horizontal.len() / channels);
        let y_offsets = rows_of(channels, rows);
        for (vertical, kernels) in vertical.iter().zip(self.kernels.chunks_exact(horizontal.len())) {
            for ((phase, kernel), results) in horizontal.iter().zip(kernels).zip(results.chunks_exact_mut(set)) {
                let len = (vertical.count - 1) * planes.pitch + planes.columns(images, phase.count);
                let (x, y) = ((grads.as_ptr(), &kernel.views[..]), (results.as_mut_ptr(), &y_offsets[..]));
                // SAFETY: views of the planes end inside them; `results` hold the phase's rows.
                unsafe {
                    multiply_blocks((pass.isa, Fma), x, (&kernel.weights, g), &kernel.weights.blocks, None, y, len)
                };
            }
            for (i, grad_x) in grad_x.chunks_exact_mut(images * pixels).enumerate() {
                for (image, plane) in grad_x.chunks_exact_mut(pixels).enumerate() {
                    let results = (&results[i * rows + image * planes.step..], set, planes.pitch);
                    let rows = (vertical, 0..vertical.count);
                    merge(pass.isa, rows, horizontal.len(), results, writable(plane), self.step.source.width, 0);
                }
            }
        }
    }
}
