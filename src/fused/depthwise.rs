//! Depthwise convolutions in a fused network.

use std::slice;

use super::pointwise::{Packed, merge_parts};
use super::program::{Conv, Step};
use super::spatial::Phases;
use super::{Pass, Statistics, Tape};
use crate::dwconv::nchw::{PlaneConv, Taps, planes_together};
use crate::dwconv::polyphase::sum_seen;
use crate::memory;
use crate::microkernels::conv1x1_nchw::SumSlots;
use crate::microkernels::reduce::Sum;
use crate::parallel::Shared;
use crate::pool::{chunks, part};
use crate::scratch::{self, cut};
use crate::simd::element::{WideElement, lanes, writable};
use crate::simd::{IsaKind, line};

/// What computes a depthwise convolution whose output has such a size.
pub(super) fn forward<T: WideElement>(isa: IsaKind, step: &Step, conv: &Conv, output: [usize; 2]) -> PlaneConv {
    let [vertical, horizontal] = Phases::new(step, conv, output).forward;
    PlaneConv::new::<T>(isa, &vertical, &horizontal, conv.kernel[1])
}

impl<T: WideElement> Pass<'_, T> {
    /// Makes the value of a depthwise convolution, and its statistics.
    pub(super) fn depthwise(&self, step: &Step, conv: &Conv) -> Vec<Statistics> {
        let value = &self.program.values[step.value];
        let (pixels, out_pixels, size) = (step.source.pixels(), value.pixels(), [value.height, value.width]);
        let kernels = forward::<T>(self.isa, step, conv, size);
        let parts = self.image_parts(conv.groups);
        let block = planes_together(pixels, self.count.div_ceil(parts));
        // Channels of so few images that they leave room for others.
        let together = planes_together(block * pixels, conv.groups.div_ceil(self.threads));
        let packed = self.weights(step);
        let none = vec![T::default(); together];
        let mut partial = vec![(0.0, 0.0, 0.0); parts * conv.groups];
        let shared = Shared(partial.as_mut_ptr());
        let (rows, row_len) = (self.rows(step.value), self.row_len(step.value));
        self.for_tasks(conv.groups.div_ceil(together), parts, |task, p| {
            let channels = task * together..conv.groups.min((task + 1) * together);
            scratch::with(together * block * pixels, |buffer: &mut [T]| {
                for images in chunks(part(self.count, parts, p), block) {
                    let range = images.start * pixels..images.end * pixels;
                    // SAFETY: sources are values of earlier steps.
                    let (source, step_in) =
                        unsafe { self.load_channels(&step.source, channels.clone(), &range, buffer) };
                    let range = images.start * out_pixels..images.end * out_pixels;
                    // SAFETY: these images of these channels, which are this task's own, as are their statistics.
                    unsafe {
                        kernels.run(
                            self.isa,
                            source,
                            [(images.len(), pixels), (channels.len(), step_in)],
                            packed.groups(&channels),
                            packed.bias(channels.clone()).unwrap_or(&none[..channels.len()]),
                            (rows.at(channels.start * row_len + range.start), [out_pixels, row_len], size),
                        );
                        let statistics = shared.ptr().add(p * conv.groups + channels.start);
                        let statistics = slice::from_raw_parts_mut(statistics, channels.len());
                        self.complete(step.value, channels.clone(), range, statistics);
                    }
                }
            });
        });
        merge_parts(&partial, conv.groups)
    }
}

impl<T: WideElement> Tape<'_, '_, T> {
    /// Goes back through a depthwise convolution.
    pub(super) fn depthwise(&mut self, step: &Step, conv: &Conv) {
        let pass = self.pass;
        let value = &pass.program.values[step.value];
        let (pixels, out_pixels, size) = (step.source.pixels(), value.pixels(), [value.height, value.width]);
        let parts = pass.image_parts(conv.groups);
        let block = planes_together(pixels, pass.count.div_ceil(parts));
        let most = step.source.most_rows;
        let weights = &pass.parameters[conv.weight..][..conv.weights()];
        let Phases { forward: [vertical, horizontal], backward } = Phases::new(step, conv, size);
        let width = conv.kernel[1];
        let taps = Taps::fitting(lanes::<T>(pass.isa), &vertical[0], &horizontal[0], width);
        let back = PlaneConv::new::<T>(pass.isa, &backward[0], &backward[1], width);
        let weight = |g, i, o, tap| weights[conv.index(g, o, i, tap)];
        let packed = Packed::of_taps(pass.isa, conv.groups, 1, 1, back.order(), weight);
        let sizes = [
            taps.len() * line::<T>(),
            taps.len() * line::<T>(),
            taps.len(),
            block * out_pixels,
            block * pixels,
            most * block * pixels,
            block * pixels,
        ];
        let mut partial = memory::filled(T::default(), parts * conv.weights());
        let mut bias = vec![0.0; parts * conv.groups];
        let (shared, shared_bias) = (Shared(partial.as_mut_ptr()), Shared(bias.as_mut_ptr()));
        self.give_back(&step.source, conv.groups, parts, |this, g, images, p, sums| {
            scratch::with(sizes.iter().sum(), |memory: &mut [T]| {
                let [slots, before, tap_sums, grad_buffer, buffer, slopes, grad_x] = cut(memory, sizes);
                slots.fill(T::default());
                let (at, len) = (p * conv.groups + g, conv.taps());
                // SAFETY: sums of this part and channel alone.
                let (weight_sums, bias) = unsafe {
                    (slice::from_raw_parts_mut(shared.ptr().add(at * len), len), &mut *shared_bias.ptr().add(at))
                };
                for images in chunks(images, block) {
                    let out = images.start * out_pixels..images.end * out_pixels;
                    let range = images.start * pixels..images.end * pixels;
                    // SAFETY: all that read the value come later in the program and have given their gradients; the
                    // forward pass wrote the source's values.
                    let (grad, source) = unsafe {
                        let slopes = step.differentiate.then_some(&mut *slopes);
                        (
                            this.take(step.value, g, out, grad_buffer),
                            pass.load(&step.source, g, range.clone(), buffer, slopes),
                        )
                    };
                    if conv.bias.is_some() {
                        *bias += pass.isa.run(Sum(grad));
                    }
                    let planes = [(images.len(), pixels), (1, 0)];
                    before.copy_from_slice(slots);
                    taps.sum(pass.isa, source, planes, (grad, [out_pixels, 0], size), slots);
                    if !pass.isa.run(Sum(slots)).is_finite() {
                        // See `sum_seen`.
                        slots.copy_from_slice(before);
                        for (tap, sum) in weight_sums.iter_mut().enumerate() {
                            for (source, grad) in source.chunks_exact(pixels).zip(grad.chunks_exact(out_pixels)) {
                                let product = |[t, u]: [usize; 2], [y, x]: [usize; 2]| {
                                    grad[t * size[1] + u].to_f64() * source[y * step.source.width + x].to_f64()
                                };
                                let taps = [tap / width, tap % width];
                                *sum += T::from_f64(sum_seen([&vertical[0], &horizontal[0]], taps, product));
                            }
                        }
                    }
                    if !step.differentiate {
                        continue;
                    }
                    let grad_x = &mut grad_x[..range.len()];
                    let y = (Shared::new(writable(grad_x)), [pixels, 0], [step.source.height, step.source.width]);
                    // SAFETY: the channel and these images are this task's own.
                    unsafe {
                        back.run(
                            pass.isa,
                            grad,
                            [(images.len(), out_pixels), (1, 0)],
                            packed.groups(&(g..g + 1)),
                            &[T::default()],
                            y,
                        );
                        this.give(&step.source, g, range, grad_x, Some(slopes), None, sums);
                    }
                }
                pass.isa.run(SumSlots(slots, tap_sums));
                taps.indices().for_each(|(tap, index)| weight_sums[tap] += tap_sums[index]);
            });
        });
        self.write_weights(conv, parts, &mut partial, &bias);
    }
}
