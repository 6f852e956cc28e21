//! Fused networks: chains of convolutions, batch norms, activations, squeeze-excite and sums as one operation.
//!
//! Batch norm, activation and the like cost a pass over memory each when they are operations of their own, more than the
//! convolutions themselves. Here a step (a convolution, a mean, a sum) writes its raw result once and gathers the batch
//! statistics while that is in the cache; who reads it normalises, activates, scales, permutes and adds on the way in
//! ([`source`]). The backward pass recomputes all this from the raw results instead of keeping it: only they are kept.
//!
//! Values are held as rows, one a channel, of all images' pixels: (C, N, H, W). So every channel's constants hold for a
//! whole row, any number of pixels runs at full vectors, and a permutation of channels costs nothing.
//!
//! The gradient by a value `v` that batch norms read, `y_k = act(gamma_k n_k(v) + beta_k)` with
//! `n_k(v) = (v - mean) * inverse_k`, is gathered as `w = sum over k of gamma_k inverse_k g_k`, where `g_k` is the
//! gradient by the norm's result, as if mean and deviation were constants; what they add is, with means over the batch
//! (Ioffe and Szegedy 2015, section 3),
//!
//! ```text
//! dv = w - sum over k of gamma_k inverse_k (mean(g_k) + n_k(v) mean(g_k n_k(v)))
//! ```
//!
//! a linear function of `w` and `v` that is applied when `dv` is read.

mod depthwise;
mod pointwise;
mod program;
mod single;
mod source;
mod spatial;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

pub use program::{Program, StepTimes};

use self::pointwise::Packed;
use self::program::{Kind, Slots, Source, Step, timed};
use crate::dwconv::nchw::planes_together;
use crate::error::{Result, bail};
use crate::memory;
use crate::microkernels::activations::Activation;
use crate::microkernels::norm_act::{ActivateInPlace, ActivateMeans};
use crate::microkernels::pool::{PoolPlane, PoolPlaneGrad};
use crate::microkernels::reduce::{Moments, Sum};
use crate::microkernels::transpose::Transpose;
use crate::parallel::Shared;
use crate::pool::{chunks, num_threads, parallel_for, part};
use crate::scratch;
use crate::shape::Order;
use crate::simd::IsaKind;
use crate::simd::element::{WideElement, writable};

/// Sets of partial sums (statistics, weight gradients), at most: a number that does not depend on the threads, so that
/// neither do the results.
const PARTS: usize = 16;
/// Pixels of a row in one such set, at least.
const PART_PIXELS: usize = 256;
/// Values of a row that a task works on at a time: a tile of all of a group's rows stays in the L1 or L2 cache.
const ROW_TILE: usize = 1024;

/// Images that a thread takes through the whole program together in inference, at most: their small planes are computed as
/// one, and their memory stays in the cache. (64 images of 32 x 32 through a kEffNet-B0 take 742, 610, 514, 475, 540 ms
/// with 1, 2, 4, 8, 16.)
const INFERENCE_IMAGES: usize = 8;

/// What a program computes with.
pub struct Arguments<'a, T> {
    /// The instruction set.
    pub isa: IsaKind,
    /// The program.
    pub program: &'a Program,
    /// Number of images.
    pub count: usize,
    /// The order of the input's and output's axes, and of their gradients'.
    pub order: Order,
    /// All parameters, as [`Program::parse`] orders them.
    pub parameters: &'a [T],
    /// Factors of images, a set for each mask; none in inference.
    pub masks: &'a [T],
}

/// A pass through a program.
#[derive(Clone)]
struct Pass<'a, T> {
    isa: IsaKind,
    program: &'a Program,
    count: usize,
    order: Order,
    threads: usize,
    parameters: &'a [T],
    masks: &'a [T],
    /// Each step's weights for the forward pass, where it is a convolution.
    packed: &'a [Option<Packed<T>>],
    /// All values' memory, and where in it each value's rows start.
    start: Shared<T>,
    places: Vec<usize>,
    /// Scale and shift of each channel of the norms.
    affine: Vec<(T, T)>,
    /// Mean and inverse standard deviation of each channel of the norms.
    moments: Vec<(T, T)>,
    /// Whether values are stored as their readers see them (where these agree), because nothing is kept for a backward
    /// pass and the statistics are known.
    finished: bool,
}

/// What inference computes with. Parameters and statistics may come in pieces, which follow each other.
pub struct Inference<'a, T> {
    /// The instruction set.
    pub isa: IsaKind,
    /// The program.
    pub program: &'a Program,
    /// Number of images.
    pub count: usize,
    /// The order of the input's and output's axes.
    pub order: Order,
    /// All parameters, as [`Program::parse`] orders them.
    pub parameters: &'a [&'a [T]],
    /// Means and variances to normalise with, of all norms' channels.
    pub statistics: &'a [&'a [T]],
}

/// What inference makes of parameters and statistics, and these.
struct Prepared<T> {
    parameters: Vec<T>,
    statistics: Vec<T>,
    weights: Vec<Option<Packed<T>>>,
    affine: Vec<(T, T)>,
}

impl<T: WideElement> Inference<'_, T> {
    /// What is the same for all images, that of the last call where its parameters and statistics were the same: a
    /// comparison takes a tenth of the time of packing, which in inference of one image is a sixth of all.
    fn prepared(&self) -> Arc<Prepared<T>> {
        // Not under the lock: threads that come at once may all pack.
        let last = self.program.prepared.with(|last| last.clone());
        if let Some(prepared) = last.and_then(|last| last.downcast::<Prepared<T>>().ok())
            && same_bits(&prepared.parameters, self.parameters)
            && same_bits(&prepared.statistics, self.statistics)
        {
            return prepared;
        }
        let (parameters, statistics) = (concat(self.parameters), concat(self.statistics));
        let arguments = self.arguments(&parameters);
        let mut pass = Pass::new(&arguments, Shared::new(&mut []), &self.program.reused, 1);
        pass.fix_statistics(&statistics);
        let (weights, affine) = (arguments.packed(Some(&pass.affine)), pass.affine);
        let prepared = Arc::new(Prepared { parameters, statistics, weights, affine });
        let old = self.program.prepared.with(|last| last.replace(prepared.clone()));
        drop(old);
        prepared
    }

    /// What a pass computes with.
    fn arguments<'a>(&'a self, parameters: &'a [T]) -> Arguments<'a, T> {
        let Inference { isa, program, count, order, .. } = *self;
        Arguments { isa, program, count, order, parameters, masks: &[] }
    }
}

impl<T: WideElement> Arguments<'_, T> {
    /// Each step's weights for the forward pass, where it is a convolution. With scale and shift of all norms' channels,
    /// those of the norm that all readers of the result apply are part of its weights and bias.
    fn packed(&self, affine: Option<&[(T, T)]>) -> Vec<Option<Packed<T>>> {
        let packed = |step: &Step| match &step.kind {
            Kind::Conv(conv) => {
                let weights = &self.parameters[conv.weight..][..conv.weights()];
                let value = &self.program.values[step.value];
                let taps = if conv.depthwise() {
                    let size = [value.height, value.width];
                    depthwise::forward::<T>(self.isa, step, conv, size).order().to_vec()
                } else {
                    (0..conv.taps()).map(Some).collect()
                };
                let (outputs, view) = (conv.group_out, value.view.as_ref());
                let norm = |channel: usize| Some(affine?[view?.norms[channel]?]);
                let scale: Vec<_> = (0..value.channels).map(|c| norm(c).map_or(T::ONE, |(scale, _)| scale)).collect();
                let weight = |g, o, i, tap| weights[conv.index(g, o, i, tap)] * scale[g * outputs + o];
                let packed = Packed::of_taps(self.isa, conv.groups, outputs, conv.group_in, &taps, weight);
                let bias = conv.bias.map(|start| &self.parameters[start..][..value.channels]);
                let own = |c: usize| bias.map_or(T::default(), |bias| bias[c] * scale[c]);
                let shift = |c: usize| own(c) + norm(c).map_or(T::default(), |(_, shift)| shift);
                let biased = bias.is_some() || (0..value.channels).any(|c| norm(c).is_some());
                Some(packed.with_bias(if biased { (0..value.channels).map(shift).collect() } else { Vec::new() }))
            }
            Kind::Copy | Kind::Mean | Kind::Pool => None,
        };
        self.program.steps.iter().map(packed).collect()
    }
}

/// All pieces' values.
fn concat<T: WideElement>(pieces: &[&[T]]) -> Vec<T> {
    let mut values = Vec::new();
    memory::reserve(&mut values, pieces.iter().map(|piece| piece.len()).sum());
    pieces.iter().for_each(|piece| values.extend_from_slice(piece));
    values
}

/// Whether values are those of the pieces, bit for bit.
fn same_bits<T: WideElement>(mut values: &[T], pieces: &[&[T]]) -> bool {
    // SAFETY: floating-point numbers are plain bytes.
    let bytes = |values: &[T]| unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
    let same = pieces.iter().all(|piece| {
        let Some((first, rest)) = values.split_at_checked(piece.len()) else { return false };
        values = rest;
        bytes(first) == bytes(piece)
    });
    same && values.is_empty()
}

/// A value's statistics: count, mean, and sum of the squares of the distances from the mean.
type Statistics = (f64, f64, f64);

/// The statistics of two samples together (Chan, Golub and LeVeque 1983, formula 1.5).
fn merge(a: Statistics, b: Statistics) -> Statistics {
    let count = a.0 + b.0;
    if b.0 == 0.0 {
        return a;
    }
    let distance = b.1 - a.1;
    (count, a.1 + distance * b.0 / count, a.2 + b.2 + distance * distance * a.0 * b.0 / count)
}

impl Program {
    /// Values that the forward pass keeps for the backward pass.
    ///
    /// # Errors
    /// If no memory can hold what the program needs for so many images.
    pub fn workspace_len(&self, count: usize) -> Result<usize> {
        let sizes = self.sizes().map(|size| size.iter().product());
        let most = sizes.into_iter().chain([self.kept.len, self.reused.len, self.gradients.len, self.masks]).max();
        match most.unwrap_or(0).checked_mul(count) {
            Some(values) if values <= memory::LARGEST / size_of::<f64>() => Ok(self.kept.len * count),
            _ => bail!("the program needs more memory for {count} images than there can be"),
        }
    }
}

/// Forward with all that [`backward`] needs: the output from the input `x`. Without images the batch's statistics are zeros.
///
/// * `given`: statistics to normalise with (means and variances of all norms' channels), else the batch's own.
/// * `statistics`: the statistics that were used, the batch's variances biased.
/// * `workspace`: receives what [`backward`] needs.
pub fn forward<T: WideElement>(
    arguments: &Arguments<'_, T>,
    x: &[T],
    given: Option<&[T]>,
    y: &mut [MaybeUninit<T>],
    statistics: &mut [MaybeUninit<T>],
    workspace: &mut [MaybeUninit<T>],
) {
    let program = arguments.program;
    let channels = program.norm_channels();
    assert_eq!(statistics.len(), 2 * channels);
    assert_eq!(Ok(workspace.len()), program.workspace_len(arguments.count));
    if arguments.count == 0 {
        for (i, to) in statistics.iter_mut().enumerate() {
            to.write(given.map_or(T::default(), |given| given[i]));
        }
        return;
    }
    let weights = arguments.packed(None);
    let mut pass = Pass::new(arguments, Shared::new(workspace), &program.kept, num_threads());
    pass.packed = &weights;
    pass.clear_gaps();
    pass.import(0, pass.rows(0), x);
    if let Some(given) = given {
        pass.fix_statistics(given);
        program.steps.iter().for_each(|step| _ = pass.step(step));
        statistics.iter_mut().zip(given).for_each(|(to, &from)| _ = to.write(from));
    } else {
        let mut found = vec![(0.0, 0.0, 0.0); channels];
        pass.normalise(0, None, &mut found);
        for step in &program.steps {
            let sums = pass.step(step);
            pass.normalise(step.value, sums, &mut found);
        }
        let (means, variances) = statistics.split_at_mut(channels);
        for ((mean, variance), (count, average, squares)) in means.iter_mut().zip(variances).zip(found) {
            mean.write(T::from_f64(average));
            variance.write(T::from_f64(squares / count));
        }
    }
    pass.export(program.output, pass.rows(program.output), y);
}

/// Forward in inference, with given statistics (means and variances of all norms' channels).
///
/// Nothing is kept. Each thread takes a few images at a time through the whole program, in memory that stays in its cache.
pub fn infer<T: WideElement>(inference: &Inference<'_, T>, x: &[T], y: &mut [MaybeUninit<T>]) {
    let Inference { program, count, .. } = *inference;
    let [input, output] = program.sizes().map(|[channels, height, width]| channels * height * width);
    assert_eq!((x.len(), y.len()), (count * input, count * output));
    assert!(program.workspace_len(count).is_ok());
    if count == 0 {
        return;
    }
    let threads = num_threads();
    let y = Shared::new(y);
    let prepared = inference.prepared();
    let arguments = inference.arguments(&prepared.parameters);
    // What is the same for all images, which only the memory is not.
    let mut first = Pass::new(&arguments, Shared::new(&mut []), &program.reused, 1);
    first.packed = &prepared.weights;
    first.affine.clone_from(&prepared.affine);
    first.finished = true;
    let run = |images: Range<usize>, threads: usize| {
        let count = images.len();
        memory::with(program.reused.len * count, |memory: &mut [MaybeUninit<T>]| {
            let (start, places) = (Shared::new(memory), program.reused.places(count));
            let pass = Pass { start, places, count, threads, ..first.clone() };
            pass.import(0, pass.rows(0), &x[images.start * input..images.end * input]);
            for step in &program.steps {
                pass.step(step);
            }
            // SAFETY: these images' own part of the output.
            let y =
                unsafe { std::slice::from_raw_parts_mut(y.ptr().add(images.start * output).cast(), count * output) };
            pass.export(program.output, pass.rows(program.output), y);
        });
    };
    // Fewer images than threads: the threads share each image's work.
    if count < threads {
        (0..count).for_each(|image| run(image..image + 1, threads));
    } else {
        let blocks = count.div_ceil(INFERENCE_IMAGES).next_multiple_of(threads).min(count);
        parallel_for(threads, blocks, |i| run(part(count, blocks, i), 1));
    }
}

/// The gradients by the input (where the program wants it) and by the parameters; without images those are zeros.
///
/// * `statistics`, `workspace`: what [`forward`] wrote; with `frozen`, statistics that were given.
/// * `grad_output`: like the output; `grad_x`: like the input, or empty.
pub fn backward<T: WideElement>(
    arguments: &Arguments<'_, T>,
    frozen: bool,
    statistics: &[T],
    workspace: &[T],
    grad_output: &[T],
    grad_x: &mut [MaybeUninit<T>],
    grad_parameters: &mut [MaybeUninit<T>],
) {
    let Arguments { program, count, .. } = *arguments;
    assert_eq!(statistics.len(), 2 * program.norm_channels());
    assert_eq!(Ok(workspace.len()), program.workspace_len(count));
    assert_eq!(grad_parameters.len(), program.parameters());
    grad_parameters.iter_mut().for_each(|value| _ = value.write(T::default()));
    if count == 0 {
        return;
    }
    let mut pass = Pass::new(arguments, Shared(workspace.as_ptr().cast_mut()), &program.kept, num_threads());
    pass.fix_statistics(statistics);
    memory::with(program.gradients.len * count, |memory: &mut [MaybeUninit<T>]| {
        let mut tape = Tape {
            pass: &pass,
            start: Shared::new(memory),
            places: program.gradients.places(count),
            frozen,
            norm_sums: vec![[0.0; 2]; program.norm_channels()],
            grad_parameters: Shared::new(grad_parameters),
            norm_grads: Vec::new(),
            mean_grads: Vec::new(),
            waiting: HashMap::new(),
        };
        for value in (0..program.values.len()).filter(|&value| program.values[value].zeroed) {
            tape.clear(value);
        }
        pass.import(program.output, tape.rows(program.output), grad_output);
        for step in program.steps.iter().rev() {
            tape.step(step);
        }
        if program.input_grad {
            tape.finish(0);
            pass.export(0, tape.rows(0), grad_x);
        }
        tape.norm_gradients();
    });
}

impl<'a, T: WideElement> Pass<'a, T> {
    fn new(arguments: &Arguments<'a, T>, start: Shared<T>, slots: &Slots, threads: usize) -> Self {
        let Arguments { isa, program, count, order, parameters, masks } = *arguments;
        assert_eq!(parameters.len(), program.parameters());
        assert!(masks.is_empty() || masks.len() == program.masks * count);
        let channels = program.norm_channels();
        let zero = (T::default(), T::default());
        Self {
            isa,
            program,
            count,
            order,
            threads,
            parameters,
            masks,
            packed: &[],
            start,
            places: slots.places(count),
            affine: vec![zero; channels],
            moments: vec![zero; channels],
            finished: false,
        }
    }

    /// Writes what lies between the values in the workspace, so that all of it may be handed on as values.
    fn clear_gaps(&self) {
        for (value, &place) in self.program.values.iter().zip(&self.places) {
            let image = value.kept();
            let len = self.count * image;
            // SAFETY: in the workspace, each value's place is a multiple of 16 long and its own.
            unsafe { self.start.ptr().add(place + len).write_bytes(0, self.count * image.next_multiple_of(16) - len) };
        }
    }

    /// A value's rows.
    fn rows(&self, value: usize) -> Shared<T> {
        self.start.at(self.places[value])
    }

    /// Pixels of a value's row.
    fn row_len(&self, value: usize) -> usize {
        self.count * self.program.values[value].pixels()
    }

    /// Part of a row.
    ///
    /// # Safety
    /// It must have been written, and not be written while the slice lives.
    unsafe fn row(&self, value: usize, channel: usize, pixels: Range<usize>) -> &[T] {
        let start = channel * self.row_len(value) + pixels.start;
        // SAFETY: the caller's promise; channels and pixels exist because the program was checked.
        unsafe { std::slice::from_raw_parts(self.rows(value).ptr().add(start), pixels.len()) }
    }

    /// Copies images in their order of axes to rows of a value's size.
    fn import(&self, value: usize, rows: Shared<T>, x: &[T]) {
        let (channels, pixels) = (self.program.values[value].channels, self.program.values[value].pixels());
        assert_eq!(x.len(), self.count * channels * pixels);
        let row_len = self.row_len(value);
        // A single pixel is the same memory in both orders.
        let planes = self.order == Order::Nchw && pixels > 1;
        parallel_for(self.threads, self.count, |n| {
            let x = &x[n * channels * pixels..][..channels * pixels];
            // SAFETY: image n of the value's rows, which no other task writes.
            unsafe {
                let target = rows.ptr().add(n * pixels);
                if planes {
                    for (c, plane) in x.chunks_exact(pixels).enumerate() {
                        target.add(c * row_len).copy_from_nonoverlapping(plane.as_ptr(), pixels);
                    }
                } else {
                    self.isa.run(Transpose::gather([pixels, channels], x.as_ptr(), channels, target, row_len));
                }
            }
        });
    }

    /// Copies rows of a value's size to images in their order of axes.
    fn export(&self, value: usize, rows: Shared<T>, y: &mut [MaybeUninit<T>]) {
        let (channels, pixels) = (self.program.values[value].channels, self.program.values[value].pixels());
        assert_eq!(y.len(), self.count * channels * pixels);
        let row_len = self.row_len(value);
        let planes = self.order == Order::Nchw && pixels > 1;
        let y = Shared::new(y);
        parallel_for(self.threads, self.count, |n| {
            // SAFETY: image n of y, which no other task writes.
            unsafe {
                let (source, target) = (rows.ptr().add(n * pixels), y.ptr().add(n * channels * pixels));
                if planes {
                    for c in 0..channels {
                        target.add(c * pixels).copy_from_nonoverlapping(source.add(c * row_len), pixels);
                    }
                } else {
                    self.isa.run(Transpose::scatter([channels, pixels], source, row_len, target, channels));
                }
            }
        });
    }

    /// The weights of a convolution.
    fn weights(&self, step: &Step) -> &Packed<T> {
        self.packed[step.value - 1].as_ref().expect("packed for every convolution")
    }

    /// Makes a step's value; with the statistics of its channels where they are wanted and come for free.
    fn step(&self, step: &Step) -> Option<Vec<Statistics>> {
        timed(&self.program.clocks[step.value - 1].forward, || match &step.kind {
            Kind::Conv(conv) if conv.pointwise() => Some(self.pointwise(step, conv)),
            Kind::Conv(conv) if conv.depthwise() => Some(self.depthwise(step, conv)),
            Kind::Conv(conv) => Some(self.spatial(step, conv)),
            Kind::Copy => {
                self.copy(step);
                None
            }
            Kind::Mean => {
                self.mean(step);
                None
            }
            Kind::Pool => {
                self.pool(step);
                None
            }
        })
    }

    fn copy(&self, step: &Step) {
        if self.is_single(step.value) {
            return self.copy_single(step);
        }
        let len = self.row_len(step.value);
        let (parts, size) = tiles(len);
        let rows = self.rows(step.value);
        self.for_tasks(step.source.channels(), parts, |c, p| {
            let pixels = p * size..((p + 1) * size).min(len);
            // SAFETY: these pixels of row c are this task's own; sources are earlier values.
            unsafe {
                let y = std::slice::from_raw_parts_mut(rows.ptr().add(c * len + pixels.start), pixels.len());
                self.fill(&step.source, c, pixels.clone(), y, None);
                self.finish(step.value, c..c + 1, pixels);
            }
        });
    }

    fn mean(&self, step: &Step) {
        let (pixels, channels) = (step.source.pixels(), step.source.channels());
        let rows = self.rows(step.value);
        let waits = !self.finished && self.program.values[step.value].kept_rows > 1;
        let mean = |c: usize| {
            // SAFETY: row c of the value and those of its slopes are this task's own.
            let own = |set: usize| unsafe {
                std::slice::from_raw_parts_mut(rows.ptr().add((set * channels + c) * self.count), self.count)
            };
            if waits {
                let row = &step.source.rows[c];
                // SAFETY: sources are earlier values.
                let x = unsafe { self.row(row.value, row.channel, 0..self.count * pixels) };
                let moments = row.norm.map_or((T::default(), T::default()), |norm| self.moments[norm]);
                let (means, slopes) = (own(0), [own(1), own(2)]);
                let (activation, affine) = (row.activation, self.affine(row));
                return self.isa.run(ActivateMeans { activation, x, affine, moments, means, slopes });
            }
            scratch::with(pixels, |buffer: &mut [T]| {
                for (n, mean) in own(0).iter_mut().enumerate() {
                    // SAFETY: sources are earlier values.
                    let row = unsafe { self.load(&step.source, c, n * pixels..(n + 1) * pixels, buffer, None) };
                    *mean = T::from_f64(self.isa.run(Sum(row)) / pixels as f64);
                }
            });
            // SAFETY: just written.
            unsafe { self.finish(step.value, c..c + 1, 0..self.count) };
        };
        let together = planes_together(self.count * pixels, channels.div_ceil(self.threads));
        let tasks = channels.div_ceil(together);
        self.for_tasks(tasks, 1, |task, _| part(channels, tasks, task).for_each(mean));
    }

    fn pool(&self, step: &Step) {
        let (size, pixels) = ([step.source.height, step.source.width], step.source.pixels());
        let out = self.program.values[step.value].pixels();
        let (parts, rows) = (self.parts(pixels), self.rows(step.value));
        self.for_tasks(step.source.channels(), parts, |c, p| {
            let images = part(self.count, parts, p);
            scratch::with(pixels, |buffer: &mut [T]| {
                for n in images.clone() {
                    // SAFETY: this image of row c is this task's own; sources are earlier values.
                    unsafe {
                        let x = self.load(&step.source, c, n * pixels..(n + 1) * pixels, buffer, None);
                        let y = rows.ptr().add((c * self.count + n) * out);
                        let y = writable(std::slice::from_raw_parts_mut(y, out));
                        self.isa.run(PoolPlane { x, size, y });
                    }
                }
            });
            // SAFETY: just written.
            unsafe { self.finish(step.value, c..c + 1, images.start * out..images.end * out) };
        });
    }

    /// Takes the statistics of a value's channels (measured here unless they are known) for the norms that read it.
    fn normalise(&mut self, value: usize, known: Option<Vec<Statistics>>, found: &mut [Statistics]) {
        let data = &self.program.values[value];
        if !data.normed {
            return;
        }
        let known = known.unwrap_or_else(|| {
            let len = self.row_len(value);
            let mut statistics = vec![(0.0, 0.0, 0.0); data.channels];
            let shared = Shared(statistics.as_mut_ptr());
            self.for_tasks(data.channels, 1, |c, _| {
                // SAFETY: the value has been written; each task writes its own statistics.
                unsafe {
                    let (mean, squares) = self.isa.run(Moments(self.row(value, c, 0..len)));
                    shared.ptr().add(c).write((len as f64, mean, squares));
                }
            });
            statistics
        });
        for &(channel, norm) in &data.norms {
            found[norm] = known[channel];
            let (count, mean, squares) = known[channel];
            self.set_norm(norm, mean, squares / count);
        }
    }

    /// Takes given statistics for all norms.
    fn fix_statistics(&mut self, statistics: &[T]) {
        let (means, variances) = statistics.split_at(self.program.norm_channels());
        for (channel, (mean, variance)) in means.iter().zip(variances).enumerate() {
            self.set_norm(channel, mean.to_f64(), variance.to_f64());
        }
    }

    fn set_norm(&mut self, channel: usize, mean: f64, variance: f64) {
        // Norms are sorted by their channels.
        let index = self.program.norms.partition_point(|norm| norm.channels.end <= channel);
        let norm = &self.program.norms[index];
        let own = channel - norm.channels.start;
        let gamma = norm.gamma.map_or(1.0, |gamma| self.parameters[gamma + own].to_f64());
        let inverse = 1.0 / (variance + norm.epsilon).sqrt();
        let shift = self.parameters[norm.beta + own].to_f64() - mean * gamma * inverse;
        self.affine[channel] = (T::from_f64(gamma * inverse), T::from_f64(shift));
        self.moments[channel] = (T::from_f64(mean), T::from_f64(inverse));
    }

    /// Into how many parts of whole images the work on images of so many pixels is divided.
    fn parts(&self, pixels: usize) -> usize {
        PARTS.min(self.count).min((self.count * pixels).div_ceil(PART_PIXELS)).max(1)
    }

    /// Completes new values of some channels: measures them, or makes of them what their readers will.
    ///
    /// # Safety
    /// The pixels must have been written by this task.
    unsafe fn complete(
        &self,
        value: usize,
        channels: Range<usize>,
        pixels: Range<usize>,
        statistics: &mut [Statistics],
    ) {
        if self.finished {
            // SAFETY: the caller's promise.
            unsafe { self.finish(value, channels, pixels) };
        } else if self.program.values[value].normed {
            for (channel, statistics) in channels.zip(statistics) {
                // SAFETY: the caller's promise.
                let row = unsafe { self.row(value, channel, pixels.clone()) };
                let (mean, squares) = self.isa.run(Moments(row));
                *statistics = merge(*statistics, (row.len() as f64, mean, squares));
            }
        }
    }

    /// Makes of new values of some channels what their readers will, if this pass does so.
    ///
    /// # Safety
    /// As for [`Pass::complete`].
    unsafe fn finish(&self, value: usize, channels: Range<usize>, pixels: Range<usize>) {
        let Some(view) = self.program.values[value].view.as_ref().filter(|_| self.finished) else { return };
        let (activation, len) = (view.activation, self.row_len(value));
        // The norms of a convolution's value are in its weights: see [`Arguments::packed`].
        let folded = matches!(self.program.steps[value - 1].kind, Kind::Conv(_));
        let norms = view.norms[channels.clone()].iter().map(|norm| norm.filter(|_| !folded));
        let plain = norms.clone().all(|norm| norm.is_none());
        if plain && activation == Activation::Identity {
            return;
        }
        let rows = self.rows(value);
        let run = |start: usize, len: usize, affine: (T, T)| {
            // SAFETY: the caller's promise.
            let row = unsafe { std::slice::from_raw_parts_mut(rows.ptr().add(start), len) };
            self.isa.run(ActivateInPlace { activation, row, affine });
        };
        let one = (T::ONE, T::default());
        if plain && pixels.len() == len {
            // Rows follow each other.
            return run(channels.start * len, channels.len() * len, one);
        }
        for (channel, norm) in channels.zip(norms) {
            run(channel * len + pixels.start, pixels.len(), norm.map_or(one, |norm| self.affine[norm]));
        }
    }

    /// Calls `task(i, j)` for all `i < rows` and `j < columns` on this pass's threads.
    fn for_tasks(&self, rows: usize, columns: usize, task: impl Fn(usize, usize) + Sync) {
        parallel_for(self.threads, rows * columns, |index| task(index / columns, index % columns));
    }
}

/// Rows of `len` values in tiles: their number and size.
fn tiles(len: usize) -> (usize, usize) {
    let parts = len.div_ceil(16 * ROW_TILE).max(1);
    (parts, len.div_ceil(parts))
}

/// The backward pass: gradients by values, and the sums that batch norms want.
struct Tape<'p, 'a, T> {
    pass: &'p Pass<'a, T>,
    /// All gathered gradients' memory, and where in it each value's rows start.
    start: Shared<T>,
    places: Vec<usize>,
    /// Whether the norms' statistics are constants.
    frozen: bool,
    /// Sums for all norms' channels: the gradients by beta and gamma.
    norm_sums: Vec<[f64; 2]>,
    grad_parameters: Shared<T>,
    /// See [`Tape::look_at`]; empty where nothing is lacking.
    norm_grads: Vec<[T; 3]>,
    /// What a mean has yet to add to the gradient at hand, the derivatives of its activation apart: `[channel][image]`.
    mean_grads: Vec<T>,
    /// The same of values that are yet to come.
    waiting: HashMap<usize, Vec<T>>,
}

impl<T: WideElement> Tape<'_, '_, T> {
    /// A value's gathered gradient.
    fn rows(&self, value: usize) -> Shared<T> {
        self.start.at(self.places[value])
    }

    /// Which row of a value's gathered gradient is a channel's.
    fn grad_row(&self, value: usize, channel: usize) -> usize {
        self.pass.program.values[value].grad_rows.get(channel).copied().unwrap_or(channel)
    }

    /// Part of a row of a value's gathered gradient.
    ///
    /// # Safety
    /// No other slice of it may live.
    #[expect(clippy::mut_from_ref, reason = "tasks write different rows of shared memory")]
    unsafe fn grad(&self, value: usize, channel: usize, pixels: Range<usize>) -> &mut [T] {
        let start = self.grad_row(value, channel) * self.pass.row_len(value) + pixels.start;
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.rows(value).ptr().add(start), pixels.len()) }
    }

    /// Sets a value's gradient to zeros.
    fn clear(&self, value: usize) {
        let len = self.pass.row_len(value);
        self.pass.for_tasks(self.pass.program.values[value].channels, 1, |c, _| {
            // SAFETY: no gradients have been given yet; each task clears one row.
            unsafe { self.grad(value, c, 0..len) }.fill(T::default());
        });
    }

    /// Finds what a value's gathered gradient lacks: slope, mean and shift of each channel that take the statistics of the
    /// norms that read it into account (see the module's page), and the gradient of a mean of it. All that read the value must
    /// have given their gradients.
    fn look_at(&mut self, value: usize) {
        let data = &self.pass.program.values[value];
        self.mean_grads = self.waiting.remove(&value).unwrap_or_default();
        self.norm_grads.clear();
        if self.frozen || !data.normed {
            return;
        }
        let count = self.pass.row_len(value) as f64;
        self.norm_grads.resize(data.channels, [T::default(); 3]);
        let mut exact = vec![[0.0; 2]; data.channels];
        for &(channel, norm) in &data.norms {
            let (scale, (mean, inverse)) = (self.pass.affine[norm].0.to_f64(), self.pass.moments[norm]);
            let [sum, normalised] = self.norm_sums[norm];
            let [slope, shift] = &mut exact[channel];
            *slope -= scale * inverse.to_f64() * normalised / count;
            *shift -= scale * sum / count;
            self.norm_grads[channel] = [T::from_f64(*slope), mean, T::from_f64(*shift)];
        }
    }

    /// Calls `task(channel range, images, sums)` for parts of a source and of the images, where `sums` holds the norm
    /// sums of all rows of the source; then adds these up.
    fn give_back(
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
            if let Some(norm) = row.norm {
                for p in 0..parts {
                    let [grad, normalised] = sums[p * source.rows.len() + index];
                    self.norm_sums[norm][0] += grad;
                    self.norm_sums[norm][1] += normalised;
                }
            }
        }
    }

    /// Goes back through a step: from the gradient by its value to those by its parameters and its source.
    fn step(&mut self, step: &Step) {
        self.look_at(step.value);
        let clocks = &self.pass.program.clocks;
        timed(&clocks[step.value - 1].backward, || match &step.kind {
            Kind::Conv(conv) if conv.pointwise() => self.pointwise(step, conv),
            Kind::Conv(conv) if conv.depthwise() => self.depthwise(step, conv),
            Kind::Conv(conv) => self.spatial(step, conv),
            Kind::Copy | Kind::Mean | Kind::Pool if !step.differentiate => {}
            Kind::Copy => self.copy(step),
            Kind::Mean => self.mean(step),
            Kind::Pool => self.pool(step),
        });
    }

    fn copy(&mut self, step: &Step) {
        let (pixels, parts) = (step.source.pixels(), self.pass.parts(step.source.pixels()));
        self.give_back(&step.source, step.source.channels(), parts, |this, c, images, _, sums| {
            scratch::with(ROW_TILE, |buffer: &mut [T]| {
                for range in chunks(images.start * pixels..images.end * pixels, ROW_TILE) {
                    // SAFETY: all readers of the value come later in the program; channels and images are this task's own.
                    unsafe {
                        let grad = this.take(step.value, c, range.clone(), buffer);
                        this.give(&step.source, c, range, grad, None, None, sums);
                    }
                }
            });
        });
    }

    fn mean(&mut self, step: &Step) {
        let (pixels, parts) = (step.source.pixels(), self.pass.parts(step.source.pixels()));
        if self.pass.program.values[step.value].kept_rows > 1 {
            return self.wait(step);
        }
        self.give_back(&step.source, step.source.channels(), parts, |this, c, images, _, sums| {
            scratch::with(pixels + 1, |buffer: &mut [T]| {
                let (one, row) = buffer.split_at_mut(1);
                for n in images {
                    // SAFETY: as in `copy`.
                    unsafe {
                        let grad = this.take(step.value, c, n..n + 1, one)[0];
                        row.fill(grad / T::from_f64(pixels as f64));
                        this.give(&step.source, c, n * pixels..(n + 1) * pixels, row, None, None, sums);
                    }
                }
            });
        });
    }

    fn pool(&mut self, step: &Step) {
        let (size, pixels) = ([step.source.height, step.source.width], step.source.pixels());
        let (out, parts) = (self.pass.program.values[step.value].pixels(), self.pass.parts(pixels));
        self.give_back(&step.source, step.source.channels(), parts, |this, c, images, _, sums| {
            scratch::with(pixels + out, |buffer: &mut [T]| {
                let (row, own) = buffer.split_at_mut(pixels);
                for n in images {
                    // SAFETY: as in `copy`.
                    unsafe {
                        let grad = this.take(step.value, c, n * out..(n + 1) * out, own);
                        this.pass.isa.run(PoolPlaneGrad { grad, size, grad_x: row });
                        this.give(&step.source, c, n * pixels..(n + 1) * pixels, row, None, None, sums);
                    }
                }
            });
        });
    }

    /// Leaves a mean's gradient to the step that makes what it reads (see `Program::wait`): only the sums that norms want are
    /// known at once, because the forward pass has kept the means of the slopes.
    fn wait(&mut self, step: &Step) {
        let (count, channels, pixels) = (self.pass.count, step.source.channels(), step.source.pixels());
        let mut grads = memory::filled(T::default(), channels * count);
        for (c, (row, grads)) in step.source.rows.iter().zip(grads.chunks_exact_mut(count)).enumerate() {
            // SAFETY: as in `copy`; the forward pass wrote the slopes.
            let [slopes, normalised] = unsafe {
                let mut own = vec![T::default(); count];
                grads.copy_from_slice(self.take(step.value, c, 0..count, &mut own));
                [1, 2].map(|set| self.pass.row(step.value, set * channels + c, 0..count))
            };
            if let Some(norm) = row.norm {
                for (sum, slopes) in self.norm_sums[norm].iter_mut().zip([slopes, normalised]) {
                    *sum += grads.iter().zip(slopes).map(|(grad, slope)| grad.to_f64() * slope.to_f64()).sum::<f64>();
                }
            }
            let scale = self.pass.affine(row).0 / T::from_f64(pixels as f64);
            grads.iter_mut().for_each(|grad| *grad = *grad * scale);
        }
        self.waiting.insert(step.source.rows[0].value, grads);
    }

    /// Replaces a value's gathered gradient by the gradient itself.
    fn finish(&mut self, value: usize) {
        self.look_at(value);
        if self.is_gradient() {
            return;
        }
        let this = &*self;
        let len = this.pass.row_len(value);
        this.pass.for_tasks(this.pass.program.values[value].channels, 1, |c, _| {
            scratch::with(ROW_TILE, |buffer: &mut [T]| {
                for range in chunks(0..len, ROW_TILE) {
                    // SAFETY: each task has a row of its own; what is copied stands in the buffer.
                    unsafe {
                        let grad = this.take(value, c, range.clone(), buffer);
                        this.grad(value, c, range).copy_from_slice(grad);
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
                // SAFETY: the places of this norm's parameters.
                unsafe {
                    self.grad_parameters.ptr().add(norm.beta + own).write(T::from_f64(grad));
                    if let Some(gamma) = norm.gamma {
                        self.grad_parameters.ptr().add(gamma + own).write(T::from_f64(normalised));
                    }
                }
            }
        }
    }
}
