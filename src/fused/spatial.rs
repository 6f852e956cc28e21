//! Convolutions of more than one pixel in a fused network that are not [depthwise](super::depthwise): the stem's.
//!
//! They run over [padded planes](crate::dwconv::padded_planes) that stand side by side. Each tap of each channel of a group is an input
//! row of a pointwise convolution: a shifted view of the planes, whose rows follow each other as one long row.
//!
//! The backward pass holds the gradient's planes likewise.

use std::slice;

use super::pointwise::{Packed, merge_parts};
use super::program::{Conv, Step};
use super::{PARTS, Pass, Statistics, Tape};
use crate::conv1x1::dot_nt::RowProducts;
use crate::dwconv::nchw::{Planes, ahead, merge, planes_together};
use crate::dwconv::polyphase::{Phase, most_pixels, sum_seen};
use crate::memory;
use crate::microkernels::conv1x1_nchw::{ConvRows, Rows, Start};
use crate::microkernels::reduce::Sum;
use crate::parallel::Shared;
use crate::pool::{chunks, part};
use crate::scratch::{self, cut};
use crate::shape::Axis;
use crate::simd::element::{WideElement, writable};
use crate::simd::mul_acc::Fma;
use crate::simd::{IsaKind, Promised};

/// The phases of a convolution's output and of its input's gradient, along both axes.
pub(super) struct Phases {
    pub forward: [Vec<Phase>; 2],
    pub backward: [Vec<Phase>; 2],
}

impl Phases {
    pub fn new(step: &Step, conv: &Conv, output: [usize; 2]) -> Self {
        let input = [step.source.height, step.source.width];
        let axes = [0, 1].map(|i| Axis { input: input[i], output: output[i], before: conv.before[i] });
        Self {
            forward: [0, 1].map(|i| Phase::forward(axes[i], conv.kernel[i], conv.stride)),
            backward: [0, 1].map(|i| Phase::backward(axes[i], conv.kernel[i], conv.stride)),
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

impl<T: WideElement> Pass<'_, T> {
    /// Makes the value of a convolution, and its statistics.
    pub(super) fn spatial(&self, step: &Step, conv: &Conv) -> Vec<Statistics> {
        let value = &self.program.values[step.value];
        let phases = Phases::new(step, conv, [value.height, value.width]).forward;
        let (pixels, out_pixels) = (step.source.pixels(), value.pixels());
        let (k, m) = (conv.group_in, conv.group_out);
        let parts = self.image_parts(conv.groups);
        let block = planes_together(pixels, self.count.div_ceil(parts));
        let [vertical, horizontal] = [&phases[0][0], &phases[1][0]];
        let planes = Planes::new(both(&phases), block);
        let (views, y_offsets) =
            (views::<T>(&planes, vertical, horizontal, k), rows_of(m, value.height * planes.pitch));
        let packed = self.weights(step);
        let sizes = [k * planes.len::<T>(), m * value.height * planes.pitch, block * pixels];
        let mut partial = vec![(0.0, 0.0, 0.0); parts * conv.groups * m];
        let shared = Shared(partial.as_mut_ptr());
        let rows = self.rows(step.value);
        // Fewer tasks than threads: some share a group's output channels, though each has to pad all planes. (The stem of a
        // kEffNet-B0 takes two threads 446 us of one image of 224 x 224 as one task, 265 as two.)
        let sets = self.threads.div_ceil(conv.groups * parts).min(packed.blocks.len());
        self.for_tasks(conv.groups * sets, parts, |task, p| {
            let g = task / sets;
            let blocks = &packed.blocks[part(packed.blocks.len(), sets, task % sets)];
            let outputs = blocks[0].start..blocks[blocks.len() - 1].end;
            scratch::with(sizes.iter().sum(), |memory: &mut [T]| {
                let [padded, results, buffer] = cut(memory, sizes);
                padded.fill(T::default());
                for images in chunks(part(self.count, parts, p), block) {
                    for (i, padded) in padded.chunks_exact_mut(planes.len::<T>()).enumerate() {
                        let range = images.start * pixels..images.end * pixels;
                        // SAFETY: sources are values of earlier steps.
                        let source = unsafe { self.load(&step.source, g * k + i, range, buffer, None) };
                        planes.write_all(self.isa, source, padded);
                    }
                    let columns = planes.columns(images.len(), value.width);
                    for block in blocks {
                        // SAFETY: views of `padded` end inside it, as the rows do inside `results`.
                        let kernel = unsafe {
                            Promised::new_unchecked(ConvRows {
                                products: Fma,
                                x: padded.as_ptr(),
                                x_offsets: &views,
                                weights: packed.block(g, block),
                                y: results.as_mut_ptr(),
                                y_offsets: &y_offsets[block.clone()],
                                pixels: (value.height - 1) * planes.pitch + columns,
                                ahead: [0, 0],
                                start: packed.bias(g * m + block.start..g * m + block.end).into(),
                            })
                        };
                        self.isa.run(kernel);
                    }
                    let results = results.chunks_exact(value.height * planes.pitch);
                    for (o, result) in results.enumerate().skip(outputs.start).take(outputs.len()) {
                        let range = images.start * out_pixels..images.end * out_pixels;
                        let start = (g * m + o) * self.count * out_pixels + range.start;
                        // SAFETY: these images of this group's rows, which are this task's own.
                        let y = unsafe { std::slice::from_raw_parts_mut(rows.ptr().add(start), range.len()) };
                        for (i, y) in y.chunks_exact_mut(out_pixels).enumerate() {
                            let result = (&result[i * planes.step..], 0, planes.pitch);
                            let rows = (vertical, 0..vertical.count);
                            merge(self.isa, rows, 1, result, writable(y), value.width, ahead(out_pixels));
                        }
                        // SAFETY: just written, and `y` is not used any more; statistics of this task alone.
                        unsafe {
                            let statistics = &mut *shared.ptr().add((p * conv.groups + g) * m + o);
                            self.complete(step.value, g * m + o..g * m + o + 1, range, slice::from_mut(statistics));
                        }
                    }
                }
            });
        });
        merge_parts(&partial, conv.groups * m)
    }

    /// Parts of the images, so that there are enough tasks.
    pub(super) fn image_parts(&self, groups: usize) -> usize {
        (2 * PARTS).div_ceil(groups).min(self.count).max(1)
    }
}

/// Where rows of this length start.
fn rows_of(count: usize, len: usize) -> Vec<usize> {
    (0..count).map(|i| i * len).collect()
}

/// Where the views start that a pair of phases has of the planes of `channels` channels, through each of its taps.
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
        let row = |&(y, _): &(usize, isize)| horizontal.taps.iter().map(move |&(x, _)| Some(y * conv.kernel[1] + x));
        let order: Vec<_> = vertical.taps.iter().flat_map(row).collect();
        let weight = |g, i, o, tap| weights[conv.index(g, o, i, tap)];
        let packed = Packed::of_taps(isa, conv.groups, conv.group_in, conv.group_out, &order, weight);
        Self { views: views::<T>(planes, vertical, horizontal, conv.group_out), weights: packed }
    }
}

impl<T: WideElement> Tape<'_, '_, T> {
    /// Goes back through a convolution.
    pub(super) fn spatial(&mut self, step: &Step, conv: &Conv) {
        let pass = self.pass;
        let value = &pass.program.values[step.value];
        let (pixels, out_pixels, size) = (step.source.pixels(), value.pixels(), [value.height, value.width]);
        let (groups, k, m) = (conv.groups, conv.group_in, conv.group_out);
        let parts = pass.image_parts(groups);
        let block = planes_together(pixels, pass.count.div_ceil(parts));
        let most = step.source.most_rows;
        let phases = Phases::new(step, conv, size);
        let [planes, grad_planes] = Planes::pair(both(&phases.forward), both(&phases.backward), block);
        let weights = &pass.parameters[conv.weight..][..conv.weights()];
        let kernel = |(v, h)| PhaseKernel::new(pass.isa, conv, &grad_planes, [v, h], weights);
        let kernels: Vec<_> = pairs(&phases.backward).filter(|_| step.differentiate).map(kernel).collect();
        let (vertical, horizontal) = (&phases.forward[0][0], &phases.forward[1][0]);
        let b_offsets = views::<T>(&planes, vertical, horizontal, k);
        let first = grad_planes.tap([0, 0]);
        let a_offsets: Vec<_> = (0..m).map(|o| o * grad_planes.len::<T>() + first).collect();
        let sets = phases.backward[1].len();
        let rows = most_pixels(&phases.backward[0]);
        let products = RowProducts::<T, _>::new(pass.isa, Fma, [m, b_offsets.len()], 1);
        let sizes = [
            products.memory(),
            k * planes.len::<T>(),
            m * grad_planes.len::<T>(),
            sets * k * rows * planes.pitch,
            block * pixels.max(out_pixels),
            k * most * block * pixels,
            k * block * pixels,
        ];
        let mut partial = memory::filled(T::default(), parts * conv.weights());
        let mut bias = vec![0.0; parts * groups * m];
        let (shared, shared_bias) = (Shared(partial.as_mut_ptr()), Shared(bias.as_mut_ptr()));
        self.give_back(&step.source, groups, parts, |this, g, images, p, sums| {
            scratch::with(sizes.iter().sum(), |memory: &mut [T]| {
                let [products_sums, padded, grads, results, buffer, slopes, grad_x] = cut(memory, sizes);
                products_sums.fill(T::default());
                padded.fill(T::default());
                grads.fill(T::default());
                let at = p * groups + g;
                // Sums of what is not a number, if there is such.
                let mut exact = Vec::new();
                // SAFETY: sums of this part and group alone.
                let (weight_sums, bias) = unsafe {
                    let len = conv.weights() / groups;
                    (
                        std::slice::from_raw_parts_mut(shared.ptr().add(at * len), len),
                        std::slice::from_raw_parts_mut(shared_bias.ptr().add(at * m), m),
                    )
                };
                for images in chunks(images, block) {
                    for (o, (bias, planes)) in
                        bias.iter_mut().zip(grads.chunks_exact_mut(grad_planes.len::<T>())).enumerate()
                    {
                        let range = images.start * out_pixels..images.end * out_pixels;
                        // SAFETY: all that read the value come later in the program and have given their gradients.
                        let grad = unsafe { this.take(step.value, g * m + o, range, buffer) };
                        grad_planes.write_all(pass.isa, grad, planes);
                        if conv.bias.is_some() {
                            *bias += pass.isa.run(Sum(grad));
                        }
                    }
                    let range = images.start * pixels..images.end * pixels;
                    for (i, padded) in padded.chunks_exact_mut(planes.len::<T>()).enumerate() {
                        let slopes = step.differentiate.then_some(&mut slopes[i * most * block * pixels..]);
                        // SAFETY: the forward pass wrote the values.
                        let source = unsafe { pass.load(&step.source, g * k + i, range.clone(), buffer, slopes) };
                        planes.write_all(pass.isa, source, padded);
                    }
                    let columns = planes.columns(images.len(), value.width);
                    // The gradient is zero between the images and between the rows.
                    let a = Rows { base: grads.as_ptr(), offsets: &a_offsets, image_stride: 0, ahead: 0 };
                    let b = Rows { base: padded.as_ptr(), offsets: &b_offsets, image_stride: 0, ahead: 0 };
                    let len = (value.height - 1) * planes.pitch + columns;
                    if pass.isa.run(Sum(grads)).is_finite() && pass.isa.run(Sum(padded)).is_finite() {
                        // SAFETY: views of the planes end inside them.
                        unsafe { products.add(a, b, [1, len], products_sums) };
                    } else {
                        // See `sum_seen`.
                        exact.resize(weight_sums.len(), T::default());
                        let mut sums = exact.iter_mut();
                        let mut grad_buffer = memory::filled(T::default(), block * out_pixels);
                        for (o, i) in (0..m).flat_map(|o| (0..k).map(move |i| (o, i))) {
                            let out = images.start * out_pixels..images.end * out_pixels;
                            // SAFETY: as above.
                            let (grad, source) = unsafe {
                                (
                                    this.take(step.value, g * m + o, out, &mut grad_buffer),
                                    pass.load(&step.source, g * k + i, range.clone(), buffer, None),
                                )
                            };
                            for (tap, sum) in sums.by_ref().take(conv.taps()).enumerate() {
                                let taps = [tap / conv.kernel[1], tap % conv.kernel[1]];
                                for (source, grad) in source.chunks_exact(pixels).zip(grad.chunks_exact(out_pixels)) {
                                    let product = |[t, u]: [usize; 2], [y, x]: [usize; 2]| {
                                        grad[t * size[1] + u].to_f64() * source[y * step.source.width + x].to_f64()
                                    };
                                    *sum += T::from_f64(sum_seen([vertical, horizontal], taps, product));
                                }
                            }
                        }
                    }
                    if !step.differentiate {
                        continue;
                    }
                    this.planes(
                        &kernels,
                        &phases.backward,
                        &grad_planes,
                        (g, k),
                        grads,
                        results,
                        &mut grad_x[..k * range.len()],
                        step,
                    );
                    let mut sums = &mut *sums;
                    for (i, grad) in grad_x.chunks_exact(range.len()).take(k).enumerate() {
                        let rows = step.source.starts[g * k + i + 1] - step.source.starts[g * k + i];
                        let (own, rest) = sums.split_at_mut(rows);
                        sums = rest;
                        let slopes = Some(&slopes[i * most * block * pixels..]);
                        // SAFETY: the group's channels and these images are this task's own.
                        unsafe { this.give(&step.source, g * k + i, range.clone(), grad, slopes, None, own) };
                    }
                }
                products.finish(products_sums, weight_sums);
                weight_sums.iter_mut().zip(exact).for_each(|(sum, exact)| *sum += exact);
            });
        });
        self.write_weights(conv, parts, &mut partial, &bias);
    }

    /// The gradient by the planes of some images of all of a group's input channels, from the group's planes of the
    /// gradient by the output.
    fn planes(
        &self,
        kernels: &[PhaseKernel<T>],
        phases: &[Vec<Phase>; 2],
        planes: &Planes,
        (group, channels): (usize, usize),
        grads: &[T],
        results: &mut [T],
        grad_x: &mut [T],
        step: &Step,
    ) {
        let (width, pixels, isa) = (step.source.width, step.source.pixels(), self.pass.isa);
        let [vertical, horizontal] = phases;
        let images = grad_x.len() / pixels / channels;
        let (set, rows) = (results.len() / horizontal.len(), results.len() / horizontal.len() / channels);
        let y_offsets = rows_of(channels, rows);
        for (vertical, kernels) in vertical.iter().zip(kernels.chunks_exact(horizontal.len())) {
            for ((phase, kernel), results) in horizontal.iter().zip(kernels).zip(results.chunks_exact_mut(set)) {
                let columns = planes.columns(images, phase.count);
                for block in &kernel.weights.blocks {
                    let weights = kernel.weights.block(group, block);
                    // SAFETY: views of the planes end inside them; `results` hold the phase's rows.
                    let kernel = unsafe {
                        Promised::new_unchecked(ConvRows {
                            products: Fma,
                            x: grads.as_ptr(),
                            x_offsets: &kernel.views,
                            weights,
                            y: results.as_mut_ptr(),
                            y_offsets: &y_offsets[block.clone()],
                            pixels: (vertical.count - 1) * planes.pitch + columns,
                            ahead: [0, 0],
                            start: Start::Zero,
                        })
                    };
                    isa.run(kernel);
                }
            }
            for (i, grad_x) in grad_x.chunks_exact_mut(images * pixels).enumerate() {
                for (image, plane) in grad_x.chunks_exact_mut(pixels).enumerate() {
                    let results = (&results[i * rows + image * planes.step..], set, planes.pitch);
                    merge(isa, (vertical, 0..vertical.count), horizontal.len(), results, writable(plane), width, 0);
                }
            }
        }
    }
}
