//! What a fused network computes, as data: values, and steps that make one value each.
//!
//! Front ends send it as integers: see [`Program::parse`].

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::slots::Slots;
use crate::error::{Result, bail};
use crate::lock::Lock;
use crate::microkernels::activations::Activation;
use crate::shape::WeightLayout;

/// Values of a program, at most. (A NASNet-A Large has some 2,000 layers.)
pub(super) const MOST_VALUES: usize = 1 << 13;
/// Channels of all values, of all norms and of all sources, at most: a program that is short to
/// write takes no more memory than hundreds of megabytes. (An EfficientNet-B7 has 0.6, 0.2 and 0.6
/// million.)
pub(super) const MOST_CHANNELS: usize = 1 << 21;
/// Numbers for an image, and parameters, at most: more than any memory holds. Sums of as many of
/// them as there are values do not overflow.
pub(super) const MOST_NUMBERS: usize = 1 << 42;
/// Rows or columns of a kernel, stride and dilation, at most.
pub(super) const LARGEST_KERNEL: usize = 64;

/// A convolution whose phases are known is unfolded if a group has at least that many input
/// channels, and the result fewer pixels than that: what tasks of padded planes need besides then
/// outweighs the copies. (Measured: docs/ALGORITHMS.md.)
const UNFOLDED: (usize, usize) = (16, 64);

/// That the program has no more of something than it may.
pub(super) fn limit(what: &str, count: usize, most: usize) -> Result<()> {
    if count > most { bail!("the program has {count} {what}, expected at most {most}") } else { Ok(()) }
}

/// A tensor of `channels` planes an image.
#[derive(Clone, Debug)]
pub(super) struct Value {
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    /// Whether a batch norm reads it, so that its statistics are wanted.
    pub normed: bool,
    /// Whether its gradient starts from zeros, because no step writes all of it first.
    pub zeroed: bool,
    /// What all readers make of it, where that is the same: inference stores that at once.
    pub view: Option<ReaderView>,
    /// The batch norms' channels that read it: (own channel, channel of all norms).
    pub norms: Vec<(usize, usize)>,
    /// The mean whose gradient waits until this value's own is read, which saves a pass over both:
    /// see `Program::defer_means`.
    pub mean: Option<usize>,
    /// Where its channels' gradients stand among the rows of another value's, whose memory it takes
    /// over; empty where it has memory of its own, in the order of its channels: see
    /// `Program::take_over`.
    pub grad_rows: Vec<usize>,
    /// Rows that are kept for each channel: those of a deferred mean are followed by the ones of
    /// its slopes.
    pub kept_rows: usize,
}

impl Value {
    pub fn new(channels: usize, height: usize, width: usize) -> Self {
        Self {
            channels,
            height,
            width,
            normed: false,
            zeroed: false,
            view: None,
            norms: Vec::new(),
            mean: None,
            grad_rows: Vec::new(),
            kept_rows: 1,
        }
    }

    /// Pixels of an image.
    pub fn pixels(&self) -> usize {
        self.height * self.width
    }

    /// Height and width.
    pub fn size(&self) -> [usize; 2] {
        [self.height, self.width]
    }

    /// Values of an image that are kept.
    pub fn kept(&self) -> usize {
        self.kept_rows * self.channels * self.pixels()
    }
}

/// What readers make of a value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ReaderView {
    pub activation: Activation,
    /// For each channel, that of all norms.
    pub norms: Vec<Option<usize>>,
}

/// A batch norm; its channels are counted through all norms of the program.
#[derive(Clone, Debug)]
pub(super) struct Norm {
    pub channels: Range<usize>,
    pub epsilon: f64,
    /// Index of gamma (unless it is 1 throughout) and beta in the parameters.
    pub gamma: Option<usize>,
    pub beta: usize,
}

/// One channel of a value as a step sees it: `activation(norm(value)) * gate * mask`.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub value: usize,
    pub channel: usize,
    /// Channel of all norms.
    pub norm: Option<usize>,
    pub activation: Activation,
    /// Value of one pixel an image, and its channel.
    pub gate: Option<(usize, usize)>,
    /// Factor of each image.
    pub mask: Option<usize>,
    /// Whether the backward pass meets this row's channel for the first time here.
    pub first: bool,
}

/// What a step reads: for each channel the sum of some rows.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub height: usize,
    pub width: usize,
    pub rows: Vec<Row>,
    /// Rows of channel `c`: `starts[c]..starts[c + 1]`.
    pub starts: Vec<usize>,
    /// The most rows of a channel.
    pub most_rows: usize,
}

impl Source {
    pub fn channels(&self) -> usize {
        self.starts.len() - 1
    }

    pub fn pixels(&self) -> usize {
        self.height * self.width
    }

    /// Height and width.
    pub fn size(&self) -> [usize; 2] {
        [self.height, self.width]
    }

    /// The rows of a channel.
    pub fn channel(&self, channel: usize) -> &[Row] {
        &self.rows[self.starts[channel]..self.starts[channel + 1]]
    }
}

/// The pixels that one pixel of a convolution's or pool's result sees, along both axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    pub dilation: [usize; 2],
    /// Zeros above and at the left; what is missing below and at the right follows from the
    /// result's size.
    pub before: [usize; 2],
}

impl Window {
    /// Pixels from the first to the last tap along an axis.
    pub fn span(&self, axis: usize) -> usize {
        (self.kernel[axis] - 1) * self.dilation[axis] + 1
    }

    pub fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// Whether each pixel of the result sees the one pixel in its place.
    pub fn pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == [1, 1] && self.before == [0, 0]
    }
}

/// A convolution's geometry and parameters.
#[derive(Clone, Debug)]
pub(super) struct Conv {
    pub window: Window,
    pub groups: usize,
    pub group_in: usize,
    pub group_out: usize,
    /// Index of weights and bias in the parameters.
    pub weight: usize,
    pub bias: Option<usize>,
    /// A depthwise kernel in Keras's layout is (k, k, C, 1), not (k, k, 1, C): the same memory.
    pub layout: WeightLayout,
}

impl Conv {
    pub fn taps(&self) -> usize {
        self.window.taps()
    }

    pub fn weights(&self) -> usize {
        self.groups * self.group_out * self.group_in * self.taps()
    }

    /// Index of the weight of a group's output and input channel and a tap among the convolution's
    /// weights: (C_out, C_in / groups, k, k) or (k, k, C_in / groups, C_out).
    pub fn index(&self, group: usize, out: usize, input: usize, tap: usize) -> usize {
        let out = group * self.group_out + out;
        match self.layout {
            WeightLayout::Oi => (out * self.group_in + input) * self.taps() + tap,
            WeightLayout::Io => (tap * self.group_in + input) * self.groups * self.group_out + out,
        }
    }

    pub fn pointwise(&self) -> bool {
        self.window.pointwise()
    }

    /// Whether there are kernels for this convolution alone.
    pub fn depthwise(&self) -> bool {
        let [rows, columns] = self.window.kernel;
        let fits = rows == columns && matches!(rows, 3 | 5 | 7) && self.window.phased();
        self.group_in == 1 && self.group_out == 1 && fits
    }

    /// Whether the convolution to a result of that many pixels is computed by
    /// [unfolding](super::unfold): where it has no phases, or where that is faster.
    pub fn is_unfolded(&self, pixels: usize) -> bool {
        !self.window.phased() || self.group_in >= UNFOLDED.0 && pixels < UNFOLDED.1
    }

    /// Takes groups and parameters that follow from source and value.
    fn fit(&mut self, source: &Source, out: &Value, parameters: &mut usize) -> Result<()> {
        let (c_in, c_out, groups) = (source.channels(), out.channels, self.groups);
        if groups == 0 || !c_in.is_multiple_of(groups) || !c_out.is_multiple_of(groups) {
            bail!("in_channels={c_in} and out_channels={c_out} are not divisible by groups={groups}");
        }
        if self.pointwise() && source.size() != out.size() {
            let [[h, w], [oh, ow]] = [source.size(), out.size()];
            bail!("the program convolves {h}x{w} pixels to {oh}x{ow}");
        }
        (self.group_in, self.group_out, self.weight) = (c_in / groups, c_out / groups, *parameters);
        *parameters += self.weights();
        limit("parameters", *parameters, MOST_NUMBERS)?;
        if let Some(bias) = &mut self.bias {
            *bias = *parameters;
            *parameters += c_out;
        }
        Ok(())
    }
}

impl Window {
    /// Whether the [phases](crate::dwconv::polyphase) of this window are those that kernels know.
    pub fn phased(&self) -> bool {
        self.dilation == [1, 1] && matches!(self.stride, [1, 1] | [2, 2])
    }
}

/// A pool's geometry.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    pub window: Window,
    /// Whether maxima are wanted, else means.
    pub max: bool,
    /// Zeros below and at the right that count in a mean, as all before then do; else only pixels
    /// count.
    pub counted: Option<[usize; 2]>,
}

impl Pool {
    /// Whether this is the mean of each 2 x 2 pixels, for which there is a kernel.
    pub fn halves(&self, source: [usize; 2], out: [usize; 2]) -> bool {
        let Window { kernel, stride, before, .. } = self.window;
        !self.max && (kernel, stride, before, out) == ([2, 2], [2, 2], [0, 0], source.map(|size| size / 2))
    }
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// A convolution.
    Conv(Conv),
    /// The source as it is.
    Copy,
    /// The mean over the pixels.
    Mean,
    /// The means or maxima over windows.
    Pool(Pool),
}

impl Kind {
    /// Checks that the kind makes the step's value of its source, and takes the next parameters.
    pub fn fit(&mut self, step: usize, source: &Source, out: &Value, parameters: &mut usize) -> Result<()> {
        let expected = match self {
            Self::Conv(conv) => return conv.fit(source, out, parameters),
            Self::Copy => source.size(),
            Self::Mean => [1, 1],
            Self::Pool(_) => out.size(),
        };
        if source.channels() != out.channels || expected != out.size() {
            let Value { channels, height, width, .. } = out;
            bail!("step {step} of the program makes {channels} channels, {height}x{width}, of others");
        }
        Ok(())
    }
}

/// Makes `value` of `source`.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub value: usize,
    pub kind: Kind,
    pub source: Source,
    /// Whether the gradient by the source is wanted.
    pub differentiate: bool,
}

/// A chain of convolutions, batch norms, activations and sums that runs as one operation.
#[derive(Debug)]
pub struct Program {
    pub(super) values: Vec<Value>,
    pub(super) norms: Vec<Norm>,
    pub(super) steps: Vec<Step>,
    pub(super) output: usize,
    /// Whether the gradient by the input is wanted.
    pub(super) input_grad: bool,
    pub(super) masks: usize,
    pub(super) parameters: usize,
    /// Whether the backward pass computes values anew that are not kept.
    pub(super) recompute: bool,
    /// The steps in segments, of which only what later ones read is kept: a single one where all
    /// is.
    pub(super) segments: Vec<Range<usize>>,
    /// Which values are computed anew; empty where none are.
    pub(super) recomputed: Vec<bool>,
    /// Where values stand in memory: those kept for the backward pass, those that are computed anew
    /// (their offsets among the kept ones'), each only as long as it is read, and their gradients.
    pub(super) kept: Slots,
    pub(super) inner: Slots,
    pub(super) reused: Slots,
    pub(super) gradients: Slots,
    /// The time that each step has taken.
    pub(super) clocks: Vec<Clock>,
    /// What the last inference packed, of either type of values.
    pub(super) prepared: Lock<Option<Arc<dyn Any + Send + Sync>>>,
}

/// A program as it is read.
pub(super) struct Parts {
    pub values: Vec<Value>,
    pub norms: Vec<Norm>,
    pub steps: Vec<Step>,
    pub input_grad: bool,
    pub recompute: bool,
    pub masks: usize,
    pub parameters: usize,
}

/// A step's kind, the seconds that it has taken, and for each image its multiply-adds and the
/// values that it reads and writes in the forward pass.
#[derive(Clone, Debug)]
pub struct StepTimes {
    /// "pointwise", "spatial" (another convolution), "copy" or "mean" (of all pixels or of some).
    pub kind: &'static str,
    /// Seconds in forward passes and inference, of all threads where they take images by
    /// themselves.
    pub forward: f64,
    /// Seconds in backward passes.
    pub backward: f64,
    /// Multiply-adds in the forward pass.
    pub multiply_adds: usize,
    /// Values read and written in the forward pass.
    pub values: usize,
}

/// Nanoseconds of all threads that take a step by themselves.
#[derive(Debug, Default)]
pub(super) struct Clock {
    pub forward: AtomicU64,
    pub backward: AtomicU64,
}

/// Calls `work` and adds its time to a clock: 50 ns more.
pub(super) fn timed<R>(clock: &AtomicU64, work: impl FnOnce() -> R) -> R {
    let start = Instant::now();
    let result = work();
    clock.fetch_add(start.elapsed().as_nanos() as u64, Relaxed);
    result
}

impl Program {
    /// A program that is ready to run, if it is one.
    pub(super) fn new(parts: Parts) -> Result<Self> {
        let Parts { values, norms, steps, input_grad, recompute, masks, parameters } = parts;
        let mut program = Self {
            output: values.len() - 1,
            clocks: steps.iter().map(|_| Clock::default()).collect(),
            values,
            norms,
            steps,
            input_grad,
            recompute,
            segments: Vec::new(),
            recomputed: Vec::new(),
            masks,
            parameters,
            kept: Slots::default(),
            inner: Slots::default(),
            reused: Slots::default(),
            gradients: Slots::default(),
            prepared: Lock::new(None),
        };
        program.connect()?;
        let slots = [&program.kept, &program.inner, &program.reused, &program.gradients];
        let numbers = slots.map(|slots| slots.len);
        limit("numbers for an image", numbers.into_iter().max().unwrap_or(0), MOST_NUMBERS)?;
        Ok(program)
    }

    /// What each step does and how long it has taken since the last call.
    pub fn take_times(&self) -> Vec<StepTimes> {
        let seconds = |clock: &AtomicU64| clock.swap(0, Relaxed) as f64 / 1e9;
        let times = self.steps.iter().zip(&self.clocks).map(|(step, clock)| {
            let value = &self.values[step.value];
            let (kind, multiply_adds) = match &step.kind {
                Kind::Conv(conv) => {
                    let kind = if conv.pointwise() { "pointwise" } else { "spatial" };
                    (kind, value.channels * conv.group_in * conv.taps() * value.pixels())
                }
                Kind::Copy => ("copy", 0),
                Kind::Mean | Kind::Pool(_) => ("mean", 0),
            };
            let values = value.channels * value.pixels() + step.source.rows.len() * step.source.pixels();
            let (forward, backward) = (seconds(&clock.forward), seconds(&clock.backward));
            StepTimes { kind, forward, backward, multiply_adds, values }
        });
        times.collect()
    }

    /// The number of parameters.
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// Channels of all norms.
    pub fn norm_channels(&self) -> usize {
        self.norms.last().map_or(0, |norm| norm.channels.end)
    }

    /// Factors of images in training: that many sets of one an image.
    pub fn masks(&self) -> usize {
        self.masks
    }

    /// Channels, height and width of the input and of the output.
    pub fn sizes(&self) -> [[usize; 3]; 2] {
        [0, self.output].map(|value| {
            let Value { channels, height, width, .. } = self.values[value];
            [channels, height, width]
        })
    }

    /// Whether the backward pass computes the gradient by the input.
    pub fn input_grad(&self) -> bool {
        self.input_grad
    }
}
