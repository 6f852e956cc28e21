//! Depthwise convolutions in a fused network.

use std::ops::Range;

use super::backward::Tape;
use super::conv::{ParameterGrads, PartSums};
use super::pack::Packed;
use super::pass::{Pass, Statistics};
use super::program::{Conv, Step};
use super::source::NormSums;
use super::spatial::Phases;
use crate::dwconv::nchw::{PlaneConv, Taps, planes_together};
use crate::dwconv::polyphase::sum_seen;
use crate::microkernels::reduce::{Sum, SumSlots};
use crate::parallel::Shared;
use crate::pool::{chunks, part};
use crate::scratch::{self, cut};
use crate::simd::element::{Element, WideElement, lanes, writable};
use crate::simd::{IsaKind, line};

/// What computes a depthwise convolution whose output has such a size.
pub(super) fn forward<T: WideElement>(isa: IsaKind, step: &Step, conv: &Conv, output: [usize; 2]) -> PlaneConv {
    let [vertical, horizontal] = Phases::new(step, conv, output).forward;
    PlaneConv::new::<T>(isa, &vertical, &horizontal, conv.window.kernel[1])
}

impl<S: Element> Pass<'_, S> {
    /// Makes the value of a depthwise convolution, and its statistics.
    pub(super) fn depthwise(&self, step: &Step, conv: &Conv) -> Vec<Statistics> {
        let value = &self.program.values[step.value];
        let (pixels, out_pixels, size) = (step.source.pixels(), value.pixels(), value.size());
        let kernels = forward::<S::Wide>(self.isa, step, conv, size);
        let parts = self.image_parts(conv.groups);
        let block = planes_together(pixels, self.count.div_ceil(parts));
        // Channels of so few images that they leave room for others.
        let together = planes_together(block * pixels, conv.groups.div_ceil(self.threads));
        let packed = self.weights(step);
        let none = vec![S::Wide::default(); together];
        let sums = PartSums::statistics(self, step.value, parts);
        let sizes = [together * block * pixels, Self::tile_len(together * block * out_pixels)];
        self.for_tasks(conv.groups.div_ceil(together), parts, |task, p| {
            let channels = task * together..conv.groups.min((task + 1) * together);
            scratch::with(sizes.iter().sum(), |memory: &mut [S::Wide]| {
                let [buffer, tile] = cut(memory, sizes);
                for images in chunks(part(self.count, parts, p), block) {
                    let range = images.start * pixels..images.end * pixels;
                    // SAFETY: sources are values of earlier steps.
                    let (source, step_in) =
                        unsafe { self.load_channels(&step.source, channels.clone(), &range, buffer) };
                    let range = images.start * out_pixels..images.end * out_pixels;
                    let (y, pitch) = self.results(step.value, channels.start, range.start, tile, range.len());
                    // SAFETY: these images of these channels, which are this task's own, as are
                    // their statistics.
                    unsafe {
                        kernels.run(
                            self.isa,
                            source,
                            [(images.len(), pixels), (channels.len(), step_in)],
                            packed.groups(&channels),
                            packed.bias(channels.clone()).unwrap_or(&none[..channels.len()]),
                            (y, [out_pixels, pitch], size),
                        );
                        let statistics = sums.of(p, channels.clone());
                        self.apply_epilogue(step.value, channels.clone(), range, (y, pitch), statistics);
                    }
                }
            });
        });
        sums.merged()
    }
}

/// The way back through a depthwise convolution.
struct DepthwiseGrad<'s, T> {
    step: &'s Step,
    conv: &'s Conv,
    phases: Phases,
    taps: Taps,
    back: PlaneConv,
    packed: Packed<T>,
    /// Images that are worked on together.
    block: usize,
    /// Height and width of the value.
    size: [usize; 2],
    grads: ParameterGrads<T>,
}

impl<S: Element> Tape<'_, '_, S> {
    /// Goes back through a depthwise convolution.
    pub(super) fn depthwise(&mut self, step: &Step, conv: &Conv) {
        let pass = self.pass;
        let size = pass.program.values[step.value].size();
        let parts = pass.image_parts(conv.groups);
        let weights = pass.conv_weights(conv);
        let phases = Phases::new(step, conv, size);
        let width = conv.window.kernel[1];
        let taps = Taps::fitting(lanes::<S::Wide>(pass.isa), &phases.forward[0][0], &phases.forward[1][0], width);
        let back = PlaneConv::new::<S::Wide>(pass.isa, &phases.backward[0], &phases.backward[1], width);
        let weight = |g, i, o, tap| weights[conv.index(g, o, i, tap)];
        let back = DepthwiseGrad {
            packed: Packed::of_taps(pass.isa, conv.groups, 1, 1, back.order(), weight),
            block: planes_together(step.source.pixels(), pass.count.div_ceil(parts)),
            grads: ParameterGrads::new(conv, parts),
            step,
            conv,
            phases,
            taps,
            back,
            size,
        };
        self.backprop_source(&step.source, conv.groups, parts, |this, g, images, p, sums| {
            back.task(this, g, images, p, sums);
        });
        back.grads.write(conv, self.grad_parameters);
    }
}

impl<T: WideElement> DepthwiseGrad<'_, T> {
    /// A channel's gradients over some images.
    fn task<S: Element<Wide = T>>(
        &self,
        tape: &Tape<'_, '_, S>,
        g: usize,
        images: Range<usize>,
        part: usize,
        sums: &mut [NormSums],
    ) {
        let (step, pass, block) = (self.step, tape.pass, self.block);
        let (pixels, out_pixels) = (step.source.pixels(), self.size[0] * self.size[1]);
        let sizes = [
            self.taps.len() * line::<T>(),
            self.taps.len() * line::<T>(),
            self.taps.len(),
            block * out_pixels,
            block * pixels,
            step.source.most_rows * block * pixels,
            block * pixels,
        ];
        scratch::with(sizes.iter().sum(), |memory: &mut [T]| {
            let [slots, before, tap_sums, grad_buffer, buffer, slopes, grad_x] = cut(memory, sizes);
            slots.fill(T::default());
            // SAFETY: sums of this part and channel alone.
            let (weight_sums, bias) = unsafe { self.grads.of(part, g) };
            for images in chunks(images, block) {
                let out = images.start * out_pixels..images.end * out_pixels;
                let range = images.start * pixels..images.end * pixels;
                // SAFETY: all that read the value come later in the program and have added their
                // gradients; the forward pass wrote the source's values.
                let (grad, source) = unsafe {
                    let slopes = step.differentiate.then_some(&mut *slopes);
                    (
                        tape.read_grad(step.value, g, out, grad_buffer),
                        pass.load(&step.source, g, range.clone(), buffer, slopes),
                    )
                };
                if self.conv.bias.is_some() {
                    bias[0] += pass.isa.run(Sum(grad));
                }
                let planes = [(images.len(), pixels), (1, 0)];
                before.copy_from_slice(slots);
                self.taps.sum(pass.isa, source, planes, (grad, [out_pixels, 0], self.size), slots);
                if !pass.isa.run(Sum(slots)).is_finite() {
                    slots.copy_from_slice(before);
                    self.sum_seen(source, grad, weight_sums);
                }
                if !step.differentiate {
                    continue;
                }
                let grad_x = &mut grad_x[..range.len()];
                let y = (Shared::new(writable(grad_x)), [pixels, 0], step.source.size());
                let planes = [(images.len(), out_pixels), (1, 0)];
                // SAFETY: the channel and these images are this task's own.
                unsafe {
                    self.back.run(pass.isa, grad, planes, self.packed.groups(&(g..g + 1)), &[T::default()], y);
                    tape.accumulate_grad(&step.source, g, range, grad_x, Some(slopes), None, sums);
                }
            }
            pass.isa.run(SumSlots(slots, tap_sums));
            self.taps.indices().for_each(|(tap, slot)| weight_sums[tap] += tap_sums[slot]);
        });
    }

    /// The gradient by the weights where something is not a number: see [`sum_seen`].
    fn sum_seen(&self, source: &[T], grad: &[T], weight_sums: &mut [T]) {
        let (width, [_, out_width]) = (self.step.source.width, self.size);
        let phases = [&self.phases.forward[0][0], &self.phases.forward[1][0]];
        for (tap, sum) in weight_sums.iter_mut().enumerate() {
            let taps = [tap / self.conv.window.kernel[1], tap % self.conv.window.kernel[1]];
            let planes = source.chunks_exact(self.step.source.pixels());
            for (source, grad) in planes.zip(grad.chunks_exact(self.size[0] * out_width)) {
                let product = |[t, u]: [usize; 2], [y, x]: [usize; 2]| {
                    grad[t * out_width + u].to_f64() * source[y * width + x].to_f64()
                };
                *sum += T::from_f64(sum_seen(phases, taps, product));
            }
        }
    }
}
