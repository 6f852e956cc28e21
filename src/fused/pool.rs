//! Means and maxima over windows in a fused network.

use super::backward::Tape;
use super::pass::Pass;
use super::program::{Pool, Step, Window};
use crate::microkernels::pool::{PoolPlane, PoolPlaneGrad};
use crate::microkernels::window_pool::{MaxWindowsGrad, MeanWindowsGrad, PoolWindows, Span, Spans};
use crate::pool::part;
use crate::scratch::{self, cut};
use crate::simd::element::{Element, WideElement, writable};

impl Window {
    /// What each pixel of a result sees along an axis.
    pub(super) fn spans(&self, axis: usize, input: usize, output: usize) -> Vec<Span> {
        let (kernel, stride, dilation) = (self.kernel[axis], self.stride[axis], self.dilation[axis]);
        let seen = |o: usize| {
            // The first tap that is not above the first pixel, and how many are not below the last.
            let first = self.before[axis].saturating_sub(o * stride).div_ceil(dilation);
            let end = (input + self.before[axis]).saturating_sub(o * stride).div_ceil(dilation).min(kernel);
            let pixel = (o * stride + first * dilation).saturating_sub(self.before[axis]);
            Span { first: pixel, taps: end.saturating_sub(first) }
        };
        (0..output).map(seen).collect()
    }
}

/// The windows along columns and rows; for means, `counted` says how many zeros after the last
/// pixel count, with all before the first, or that none do.
fn spans<T: WideElement>(pool: &Pool, input: [usize; 2], output: [usize; 2]) -> [Spans<T>; 2] {
    [0, 1].map(|axis| {
        let window = &pool.window;
        let spans = window.spans(axis, input[axis], output[axis]);
        let count = |(o, span): (usize, &Span)| match pool.counted {
            None => span.taps,
            Some(after) => {
                let end = input[axis] + window.before[axis] + after[axis];
                end.saturating_sub(o * window.stride[axis]).min(window.kernel[axis])
            }
        };
        let factors = spans.iter().enumerate().map(|span| T::from_f64(1.0 / count(span).max(1) as f64)).collect();
        Spans { spans, dilation: window.dilation[axis], factors }
    })
}

impl<S: Element> Pass<'_, S> {
    /// Makes the value of a pool.
    pub(super) fn pool(&self, step: &Step, pool: &Pool) {
        let (size, pixels) = (step.source.size(), step.source.pixels());
        let value = &self.program.values[step.value];
        let (out, halves, max) = (value.pixels(), pool.halves(size, value.size()), pool.max);
        let [rows, columns] = &spans::<S::Wide>(pool, size, value.size());
        let parts = self.parts(pixels);
        self.for_tasks(step.source.channels(), parts, |c, p| {
            let images = part(self.count, parts, p);
            let sizes = [pixels, size[1], Self::tile_len(out)];
            scratch::with(sizes.iter().sum(), |memory: &mut [S::Wide]| {
                let [plane, buffer, tile] = cut(memory, sizes);
                for n in images {
                    let range = n * out..(n + 1) * out;
                    let results = self.results(step.value, c, range.start, tile, out);
                    // SAFETY: this image of row c is this task's own; sources are earlier values.
                    unsafe {
                        let x = self.load(&step.source, c, n * pixels..(n + 1) * pixels, plane, None);
                        let y = writable(std::slice::from_raw_parts_mut(results.0.ptr(), out));
                        if halves {
                            self.isa.run(PoolPlane { x, size, y });
                        } else {
                            let spans = [rows, columns];
                            self.isa.run(PoolWindows { x, width: size[1], spans, max, buffer: &mut *buffer, y });
                        }
                        self.store(step.value, c..c + 1, range, results);
                    }
                }
            });
        });
    }
}

impl<S: Element> Tape<'_, '_, S> {
    /// Goes back through a pool.
    pub(super) fn pool(&mut self, step: &Step, pool: &Pool) {
        let (size, pixels, pass) = (step.source.size(), step.source.pixels(), self.pass);
        let value = &pass.program.values[step.value];
        let (out, halves, width) = (value.pixels(), pool.halves(size, value.size()), size[1]);
        let [rows, columns] = &spans::<S::Wide>(pool, size, value.size());
        let (spans, parts) = ([rows, columns], pass.parts(pixels));
        self.backprop_source(&step.source, step.source.channels(), parts, |this, c, images, _, sums| {
            let sizes = [pixels, pixels, out, width];
            scratch::with(sizes.iter().sum(), |memory: &mut [S::Wide]| {
                let [plane, grad_x, own, buffer] = cut(memory, sizes);
                for n in images {
                    let range = n * pixels..(n + 1) * pixels;
                    // SAFETY: all readers of the value come later in the program; the channel and
                    // this image are this task's own. The forward pass wrote the source's values.
                    unsafe {
                        let grad = this.read_grad(step.value, c, n * out..(n + 1) * out, own);
                        if halves {
                            pass.isa.run(PoolPlaneGrad { grad, size, grad_x });
                        } else if pool.max {
                            let x = pass.load(&step.source, c, range.clone(), plane, None);
                            pass.isa.run(MaxWindowsGrad { x, grad, width, spans, grad_x });
                        } else {
                            pass.isa.run(MeanWindowsGrad { grad, width, spans, buffer: &mut *buffer, grad_x });
                        }
                        this.accumulate_grad(&step.source, c, range, grad_x, None, None, sums);
                    }
                }
            });
        });
    }
}
