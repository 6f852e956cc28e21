//! The backward pass: gradients by values, and the sums that batch norms want.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::Arguments;
use super::forward::ROW_TILE;
use super::pass::Pass;
use super::program::{Kind, Program, Source, Step, timed};
use crate::memory;
use crate::parallel::Shared;
use crate::pool::{chunks, num_threads, part};
use crate::scratch;
use crate::simd::element::Element;

/// The gradients by the input (where the program wants it) and by the parameters; without images
/// those are zeros.
///
/// * `statistics`, `workspace`: what [`forward`](super::forward) wrote; with `frozen`, statistics
///   that were given.
/// * `grad_output`: like the output; `grad_x`: like the input, or empty.
pub fn backward<S: Element>(
    arguments: &Arguments<'_, S::Wide>,
    frozen: bool,
    statistics: &[S::Wide],
    workspace: &[S],
    grad_output: &[S],
    grad_x: &mut [MaybeUninit<S>],
    grad_parameters: &mut [MaybeUninit<S::Wide>],
) {
    let Arguments { program, count, .. } = *arguments;
    assert_eq!(statistics.len(), 2 * program.norm_channels());
    assert_eq!(Ok(workspace.len()), program.workspace_len(count));
    assert_eq!(grad_parameters.len(), program.parameters());
    grad_parameters.iter_mut().for_each(|value| _ = value.write(S::Wide::default()));
    if count == 0 {
        return;
    }
    let mut pass = Pass::new(arguments, Shared(workspace.as_ptr().cast_mut()), &program.kept, num_threads());
    pass.fix_statistics(statistics);
    let weights = if program.recomputed.is_empty() { Vec::new() } else { arguments.packed_for::<S>() };
    (pass.packed, pass.recomputed) = (&weights, &program.recomputed);
    let gradients = program.gradients.len * count;
    memory::with(gradients + program.inner.len * count, |memory: &mut [MaybeUninit<S>]| {
        let (memory, inner) = memory.split_at_mut(gradients);
        pass.inner = Shared::new(inner);
        let mut tape = Tape {
            pass: &pass,
            start: Shared::new(memory),
            offsets: program.gradients.offsets(count),
            frozen,
            norm_sums: vec![[0.0; 2]; program.norm_channels()],
            grad_parameters: Shared::new(grad_parameters),
            norm_grads: Vec::new(),
            mean_grads: Vec::new(),
            deferred: HashMap::new(),
        };
        for value in (0..program.values.len()).filter(|&value| program.values[value].zeroed) {
            tape.clear(value);
        }
        pass.import(program.output, tape.rows(program.output), grad_output);
        for segment in program.segments.iter().rev() {
            let steps = &program.steps[segment.clone()];
            // Nobody reads the output.
            let anew = |step: &&Step| pass.is_recomputed(step.value) && step.value != program.output;
            steps.iter().filter(anew).for_each(|step| _ = pass.step(step));
            steps.iter().rev().for_each(|step| tape.step(step));
        }
        if program.input_grad {
            tape.resolve_grad(0);
            pass.export(0, tape.rows(0), grad_x);
        }
        tape.norm_gradients();
    });
}

/// The backward pass.
pub(super) struct Tape<'p, 'a, S: Element> {
    pub pass: &'p Pass<'a, S>,
    /// All gathered gradients' memory, and where in it each value's rows start.
    start: Shared<S>,
    offsets: Vec<usize>,
    /// Whether the norms' statistics are constants.
    frozen: bool,
    /// Sums for all norms' channels: the gradients by beta and gamma.
    norm_sums: Vec<[f64; 2]>,
    pub grad_parameters: Shared<S::Wide>,
    /// See [`Tape::prepare_norm_grad`]; empty where nothing is lacking.
    pub norm_grads: Vec<[S::Wide; 3]>,
    /// What a mean has yet to add to the gradient at hand, the derivatives of its activation apart:
    /// `[channel][image]`.
    pub mean_grads: Vec<S::Wide>,
    /// The same of values that are yet to come.
    deferred: HashMap<usize, Vec<S::Wide>>,
}

impl<S: Element> Tape<'_, '_, S> {
    /// A value's gathered gradient.
    pub fn rows(&self, value: usize) -> Shared<S> {
        self.start.at(self.offsets[value])
    }

    /// Which row of a value's gathered gradient is a channel's.
    pub fn grad_row(&self, value: usize, channel: usize) -> usize {
        self.pass.program.values[value].grad_rows.get(channel).copied().unwrap_or(channel)
    }

    /// Part of a row of a value's gathered gradient.
    ///
    /// # Safety
    /// No other slice of it may live.
    #[expect(clippy::mut_from_ref, reason = "tasks write different rows of shared memory")]
    pub unsafe fn grad(&self, value: usize, channel: usize, pixels: Range<usize>) -> &mut [S] {
        let start = self.grad_row(value, channel) * self.pass.row_len(value) + pixels.start;
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.rows(value).ptr().add(start), pixels.len()) }
    }

    /// Sets a value's gradient to zeros.
    fn clear(&self, value: usize) {
        let len = self.pass.row_len(value);
        self.pass.for_tasks(self.pass.program.values[value].channels, 1, |c, _| {
            // SAFETY: no gradients have been added yet; each task clears one row.
            unsafe { self.grad(value, c, 0..len) }.fill(S::default());
        });
    }

    /// Finds what a value's gathered gradient lacks: slope, mean and shift of each channel that
    /// take the statistics of the norms that read it into account (see the module's page), and the
    /// gradient of a mean of it. All that read the value must have added their gradients.
    fn prepare_norm_grad(&mut self, value: usize) {
        let data = &self.pass.program.values[value];
        self.mean_grads = self.deferred.remove(&value).unwrap_or_default();
        self.norm_grads.clear();
        if self.frozen || !data.normed {
            return;
        }
        let count = self.pass.row_len(value) as f64;
        self.norm_grads.resize(data.channels, [S::Wide::default(); 3]);
        let mut exact = vec![[0.0; 2]; data.channels];
        for &(channel, norm) in &data.norms {
            let (scale, (mean, inverse)) = (self.pass.affine[norm].0.to_f64(), self.pass.moments[norm]);
            let [sum, normalised] = self.norm_sums[norm];
            let [slope, shift] = &mut exact[channel];
            *slope -= scale * inverse.to_f64() * normalised / count;
            *shift -= scale * sum / count;
            self.norm_grads[channel] = [S::Wide::from_f64(*slope), mean, S::Wide::from_f64(*shift)];
        }
    }

    /// Calls `task(channel range, images, part, sums)` for parts of a source and of the images,
    /// where `sums` holds the norm sums of all rows of the source; then adds these up.
    pub fn backprop_source(
        &mut self,
        source: &Source,
        groups: usize,
        parts: usize,
        task: impl Fn(&Self, usize, Range<usize>, usize, &mut [[f64; 2]]) + Sync,
    ) {
        let mut sums = vec![[0.0; 2]; parts * source.rows.len()];
        let shared = Shared(sums.as_mut_ptr());
        let this: &Self = self;
        this.pass.for_tasks(groups, parts, |group, p| {
            let channels = source.channels() / groups;
            let rows = source.starts[group * channels]..source.starts[(group + 1) * channels];
            // SAFETY: sums of this part and group alone.
            let sums = unsafe {
                std::slice::from_raw_parts_mut(shared.ptr().add(p * source.rows.len() + rows.start), rows.len())
            };
            task(this, group, part(this.pass.count, parts, p), p, sums);
        });
        for (index, row) in source.rows.iter().enumerate() {
            let Some(norm) = row.norm else { continue };
            for p in 0..parts {
                let [grad, normalised] = sums[p * source.rows.len() + index];
                self.norm_sums[norm][0] += grad;
                self.norm_sums[norm][1] += normalised;
            }
        }
    }

    /// Goes back through a step: from the gradient by its value to those by its parameters and its
    /// source.
    fn step(&mut self, step: &Step) {
        self.prepare_norm_grad(step.value);
        let Program { clocks, values, .. } = self.pass.program;
        let pixels = values[step.value].pixels();
        timed(&clocks[step.value - 1].backward, || match &step.kind {
            Kind::Conv(conv) if conv.pointwise() => self.pointwise(step, conv),
            Kind::Conv(conv) if conv.depthwise() => self.depthwise(step, conv),
            Kind::Conv(conv) if conv.is_unfolded(pixels) => self.unfolded(step, conv),
            Kind::Conv(conv) => self.spatial(step, conv),
            Kind::Copy | Kind::Mean | Kind::Pool(_) if !step.differentiate => {}
            Kind::Copy => self.copy(step),
            Kind::Mean if values[step.value].kept_rows > 1 => self.defer_mean(step),
            Kind::Mean => self.mean(step),
            Kind::Pool(pool) => self.pool(step, pool),
        });
    }

    fn copy(&mut self, step: &Step) {
        let (pixels, parts) = (step.source.pixels(), self.pass.parts(step.source.pixels()));
        self.backprop_source(&step.source, step.source.channels(), parts, |this, c, images, _, sums| {
            scratch::with(ROW_TILE, |buffer: &mut [S::Wide]| {
                for range in chunks(images.start * pixels..images.end * pixels, ROW_TILE) {
                    // SAFETY: all readers of the value come later in the program; channels and
                    // images are this task's own.
                    unsafe {
                        let grad = this.read_grad(step.value, c, range.clone(), buffer);
                        this.accumulate_grad(&step.source, c, range, grad, None, None, sums);
                    }
                }
            });
        });
    }

    fn mean(&mut self, step: &Step) {
        let (pixels, parts) = (step.source.pixels(), self.pass.parts(step.source.pixels()));
        self.backprop_source(&step.source, step.source.channels(), parts, |this, c, images, _, sums| {
            scratch::with(pixels + 1, |buffer: &mut [S::Wide]| {
                let (one, row) = buffer.split_at_mut(1);
                for n in images {
                    // SAFETY: as in `copy`.
                    unsafe {
                        let grad = this.read_grad(step.value, c, n..n + 1, one)[0];
                        row.fill(grad / S::Wide::from_f64(pixels as f64));
                        this.accumulate_grad(&step.source, c, n * pixels..(n + 1) * pixels, row, None, None, sums);
                    }
                }
            });
        });
    }

    /// Leaves a mean's gradient to the step that makes what it reads (see `Program::defer_means`):
    /// only the sums that norms want are known at once, because the forward pass has kept the means
    /// of the slopes.
    fn defer_mean(&mut self, step: &Step) {
        let (count, channels, pixels) = (self.pass.count, step.source.channels(), step.source.pixels());
        let mut grads = memory::filled(S::Wide::default(), channels * count);
        for (c, (row, grads)) in step.source.rows.iter().zip(grads.chunks_exact_mut(count)).enumerate() {
            // SAFETY: as in `copy`; the forward pass wrote the slopes.
            let [slopes, normalised] = unsafe {
                let mut own = vec![S::Wide::default(); count];
                grads.copy_from_slice(self.read_grad(step.value, c, 0..count, &mut own));
                [1, 2].map(|set| self.pass.row(step.value, set * channels + c, 0..count))
            };
            if let Some(norm) = row.norm {
                for (sum, slopes) in self.norm_sums[norm].iter_mut().zip([slopes, normalised]) {
                    *sum += grads.iter().zip(slopes).map(|(grad, slope)| grad.to_f64() * slope.to_f64()).sum::<f64>();
                }
            }
            let scale = self.pass.affine(row).0 / S::Wide::from_f64(pixels as f64);
            grads.iter_mut().for_each(|grad| *grad = *grad * scale);
        }
        self.deferred.insert(step.source.rows[0].value, grads);
    }

    /// Replaces a value's gathered gradient by the gradient itself.
    fn resolve_grad(&mut self, value: usize) {
        self.prepare_norm_grad(value);
        if self.is_gradient() {
            return;
        }
        let this = &*self;
        let len = this.pass.row_len(value);
        this.pass.for_tasks(this.pass.program.values[value].channels, 1, |c, _| {
            scratch::with(ROW_TILE, |buffer: &mut [S::Wide]| {
                for range in chunks(0..len, ROW_TILE) {
                    // SAFETY: each task has a row of its own; what is copied stands in the buffer.
                    unsafe {
                        let grad = this.read_grad(value, c, range.clone(), buffer);
                        this.pass.narrow(grad, this.grad(value, c, range));
                    }
                }
            });
        });
    }

    /// The gradients by the norms' parameters.
    fn norm_gradients(&self) {
        for norm in &self.pass.program.norms {
            for (own, channel) in norm.channels.clone().enumerate() {
                let [grad, normalised] = self.norm_sums[channel];
                // SAFETY: this norm's parameters.
                unsafe {
                    self.grad_parameters.ptr().add(norm.beta + own).write(S::Wide::from_f64(grad));
                    if let Some(gamma) = norm.gamma {
                        self.grad_parameters.ptr().add(gamma + own).write(S::Wide::from_f64(normalised));
                    }
                }
            }
        }
    }
}
