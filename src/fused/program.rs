//! What a fused network computes, as data: values, and steps that make one value each.
//!
//! A front end sends a program as a list of 64-bit integers, in the order in which [`Program::parse`] reads them.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use crate::error::{Result, bail};
use crate::lock::Lock;
use crate::microkernels::activations::Activation;
use crate::shape::WeightLayout;

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
    pub view: Option<View>,
    /// The batch norms' channels that read it: (own channel, channel of all norms).
    pub norms: Vec<(usize, usize)>,
    /// The mean whose gradient waits until this value's own is read, which saves a pass over both: see [`Program::wait`].
    pub mean: Option<usize>,
    /// Where its channels' gradients stand among the rows of another value's, whose memory it takes over; empty where it has
    /// memory of its own, in the order of its channels: see [`Program::take_over`].
    pub grad_rows: Vec<usize>,
    /// Rows that are kept for each channel: those of a mean that waits are followed by the ones of its slopes.
    pub kept_rows: usize,
}

impl Value {
    /// Pixels of an image.
    pub fn pixels(&self) -> usize {
        self.height * self.width
    }

    /// Values of an image that are kept.
    pub fn kept(&self) -> usize {
        self.kept_rows * self.channels * self.pixels()
    }
}

/// What readers make of a value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    pub activation: Activation,
    /// For each channel, that of all norms.
    pub norms: Vec<Option<usize>>,
}

/// A batch norm; its channels are counted through all norms of the program.
#[derive(Clone, Debug)]
pub(super) struct Norm {
    pub channels: Range<usize>,
    pub epsilon: f64,
    /// Where gamma (unless it is 1 throughout) and beta stand in the parameters.
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
}

/// A convolution's geometry and parameters.
#[derive(Clone, Debug)]
pub(super) struct Conv {
    pub kernel: [usize; 2],
    pub stride: usize,
    /// Zeros above and at the left; what is missing below and at the right follows from the output's size.
    pub before: [usize; 2],
    pub groups: usize,
    pub group_in: usize,
    pub group_out: usize,
    /// Where weights and bias stand in the parameters.
    pub weight: usize,
    pub bias: Option<usize>,
    /// A depthwise kernel in Keras's layout is (k, k, C, 1), not (k, k, 1, C): the same memory.
    pub layout: WeightLayout,
}

impl Conv {
    pub fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    pub fn weights(&self) -> usize {
        self.groups * self.group_out * self.group_in * self.taps()
    }

    /// Where the weight of a group's output and input channel and a tap stands among the convolution's weights:
    /// (C_out, C_in / groups, k, k) or (k, k, C_in / groups, C_out).
    pub fn index(&self, group: usize, out: usize, input: usize, tap: usize) -> usize {
        let out = group * self.group_out + out;
        match self.layout {
            WeightLayout::Oi => (out * self.group_in + input) * self.taps() + tap,
            WeightLayout::Io => (tap * self.group_in + input) * self.groups * self.group_out + out,
        }
    }

    pub fn pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == 1 && self.before == [0, 0]
    }

    /// Whether there are kernels for this convolution alone.
    pub fn depthwise(&self) -> bool {
        let fits = self.kernel[0] == self.kernel[1] && matches!(self.kernel[0], 3 | 5 | 7);
        self.group_in == 1 && self.group_out == 1 && fits
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
    /// The means over each 2 x 2 pixels.
    Pool,
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
    /// Where values stand in memory: all kept for the backward pass, each only as long as it is read, and their gradients.
    pub(super) kept: Slots,
    pub(super) reused: Slots,
    pub(super) gradients: Slots,
    /// The time that each step has taken.
    pub(super) clocks: Vec<Clock>,
    /// What the last inference packed, of either type of values.
    pub(super) prepared: Lock<Option<Arc<dyn Any + Send + Sync>>>,
}

/// A step's kind, the seconds that it has taken, and for each image its multiply-adds and the values that it reads and
/// writes in the forward pass.
#[derive(Clone, Debug)]
pub struct StepTimes {
    /// "pointwise", "spatial" (another convolution), "copy" or "mean" (of all pixels or of some).
    pub kind: &'static str,
    /// Seconds in forward passes and inference, of all threads where they take images by themselves.
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

/// Places in memory for one image; those for more are multiples.
#[derive(Clone, Debug, Default)]
pub(super) struct Slots {
    offsets: Vec<usize>,
    pub len: usize,
}

impl Slots {
    /// Places things of these sizes and lifetimes (first and last moment) so that none that live together overlap: the
    /// largest first, each at the lowest place that is free all its life.
    fn new(things: &[(usize, Range<usize>)]) -> Self {
        let mut order: Vec<_> = (0..things.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(things[i].0));
        let mut placed: Vec<(Range<usize>, &Range<usize>)> = Vec::new();
        let mut slots = Self { offsets: vec![0; things.len()], len: 0 };
        for i in order {
            let (size, life) = &things[i];
            if *size == 0 {
                continue;
            }
            let size = size.next_multiple_of(16);
            let together = |other: &Range<usize>| other.start <= life.end && life.start <= other.end;
            let mut taken: Vec<_> =
                placed.iter().filter(|(_, other)| together(other)).map(|(at, _)| at.clone()).collect();
            taken.sort_by_key(|at| at.start);
            let mut start = 0;
            for at in taken {
                if start + size <= at.start {
                    break;
                }
                start = start.max(at.end);
            }
            placed.push((start..start + size, life));
            slots.offsets[i] = start;
            slots.len = slots.len.max(start + size);
        }
        slots
    }

    /// The places for so many images.
    pub fn places(&self, count: usize) -> Vec<usize> {
        self.offsets.iter().map(|offset| offset * count).collect()
    }
}

/// No size in a program is larger: products of three of them do not overflow.
const LARGEST: usize = 1 << 20;
/// Values of a program, at most. (A NASNet-A Large has some 2,000 layers.)
const MOST_VALUES: usize = 1 << 13;
/// Channels of all values, of all norms and of all sources, at most: a program that is short to write takes no more memory than
/// hundreds of megabytes. (An EfficientNet-B7 has 0.6, 0.2 and 0.6 million of them.)
const MOST_CHANNELS: usize = 1 << 21;
/// Numbers for an image, and parameters, at most: more than any memory holds. Sums of as many of them as there are values do not
/// overflow.
const MOST_NUMBERS: usize = 1 << 42;

/// Reads integers one after the other.
struct Reader<'a>(&'a [i64]);

impl Reader<'_> {
    fn integer(&mut self) -> Result<i64> {
        let Some((&first, rest)) = self.0.split_first() else { bail!("the program ends early") };
        self.0 = rest;
        Ok(first)
    }

    fn size(&mut self) -> Result<usize> {
        let value = self.integer()?;
        match usize::try_from(value) {
            Ok(size) if size <= LARGEST => Ok(size),
            _ => bail!("the program has a size of {value}"),
        }
    }

    /// A number below `end`, or nothing for -1.
    fn index(&mut self, what: &str, end: usize) -> Result<Option<usize>> {
        match self.integer()? {
            -1 => Ok(None),
            index if (0..end as i64).contains(&index) => Ok(Some(index as usize)),
            index => bail!("the program names {what} {index}, expected one below {end}"),
        }
    }

    fn required(&mut self, what: &str, end: usize) -> Result<usize> {
        self.index(what, end)?.map_or_else(|| bail!("the program names no {what}"), Ok)
    }

    fn flag(&mut self) -> Result<bool> {
        match self.integer()? {
            0 => Ok(false),
            1 => Ok(true),
            value => bail!("the program has a flag of {value}, expected 0 or 1"),
        }
    }
}

impl Program {
    /// Reads a program:
    ///
    /// * weight layout (0 OI, 1 IO), whether the gradient by the input is wanted, number of masks;
    /// * the number of values, and for each channels, height and width: value 0 is the input, value `i` that of step `i`,
    ///   the last one the output;
    /// * the number of norms, and for each channels, the bits of epsilon, whether it has a gamma;
    /// * for each step: 0 and kernel height and width, stride, zeros above and at the left, groups, whether there is a bias
    ///   (a convolution), 1 (a copy), 2 (the mean over the pixels) or 3 (the means over each 2 x 2); then its source:
    /// * the number of blocks, and for each value, norm or -1, what to add to the value's channel for the norm's,
    ///   activation, gate's value or -1, what to add for its channel, mask or -1, the source's first channel, the number
    ///   of runs, and for each count, first channel of the value and distance between channels.
    ///
    /// Parameters follow each other in the order of the program: weights and bias of each convolution, then gamma and beta
    /// of each norm.
    ///
    /// # Errors
    /// If the integers are no program.
    pub fn parse(integers: &[i64]) -> Result<Self> {
        let mut reader = Reader(integers);
        let layout = if reader.flag()? { WeightLayout::Io } else { WeightLayout::Oi };
        let input_grad = reader.flag()?;
        let masks = reader.size()?;
        let count = reader.size()?;
        if !(2..=MOST_VALUES).contains(&count) {
            bail!(
                "the program has {count} values, expected the input and one for each of 1 to {} steps",
                MOST_VALUES - 1
            );
        }
        let mut values = Vec::new();
        let mut channels = 0;
        for _ in 0..count {
            let (own, height, width) = (reader.size()?, reader.size()?, reader.size()?);
            if own * height * width == 0 || own * height * width > MOST_NUMBERS {
                bail!("the program has a value of {own} channels, {height}x{width}");
            }
            channels += own;
            Self::limit("channels", channels, MOST_CHANNELS)?;
            let channels = own;
            values.push(Value {
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
            });
        }
        let mut norms = Vec::new();
        let mut channels = 0;
        for _ in 0..reader.size()? {
            let own = reader.size()?;
            let epsilon = f64::from_bits(reader.integer()? as u64);
            if !(0.0..f64::INFINITY).contains(&epsilon) || own == 0 {
                bail!("the program has a norm of {own} channels with epsilon {epsilon}");
            }
            // Places among the parameters follow when those of the convolutions are known.
            let gamma = reader.flag()?.then_some(0);
            norms.push(Norm { channels: channels..channels + own, epsilon, gamma, beta: 0 });
            channels += own;
            Self::limit("channels of norms", channels, MOST_CHANNELS)?;
        }
        let (mut parameters, mut rows) = (0, 0);
        let mut steps = Vec::new();
        for value in 1..count {
            let geometry = match reader.integer()? {
                0 => Some([
                    reader.size()?,
                    reader.size()?,
                    reader.size()?,
                    reader.size()?,
                    reader.size()?,
                    reader.size()?,
                    usize::from(reader.flag()?),
                ]),
                kind @ 1..=3 => {
                    let source = Self::source(&mut reader, &values[..value], &norms, masks, &mut rows)?;
                    let (kind, expected) = match kind {
                        1 => (Kind::Copy, [source.height, source.width]),
                        2 => (Kind::Mean, [1, 1]),
                        _ => (Kind::Pool, [source.height / 2, source.width / 2]),
                    };
                    if source.channels() != values[value].channels
                        || expected != [values[value].height, values[value].width]
                    {
                        let Value { channels, height, width, .. } = values[value];
                        bail!("step {value} of the program makes {channels} channels, {height}x{width}, of others");
                    }
                    steps.push(Step { value, kind, source, differentiate: false });
                    None
                }
                kind => bail!("the program has a step of kind {kind}, expected 0 to 3"),
            };
            let Some([height, width, stride, top, left, groups, bias]) = geometry else { continue };
            let source = Self::source(&mut reader, &values[..value], &norms, masks, &mut rows)?;
            let out = &values[value];
            let (c_in, c_out) = (source.channels(), out.channels);
            if groups == 0 || c_in % groups != 0 || c_out % groups != 0 {
                bail!("in_channels={c_in} and out_channels={c_out} are not divisible by groups={groups}");
            }
            let kernel = 1..=64;
            if !(1..=2).contains(&stride)
                || !kernel.contains(&height)
                || !kernel.contains(&width)
                || top >= height
                || left >= width
            {
                bail!("the program has a {height}x{width} convolution of stride {stride} with padding {top}, {left}");
            }
            let mut conv = Conv {
                kernel: [height, width],
                stride,
                before: [top, left],
                groups,
                group_in: c_in / groups,
                group_out: c_out / groups,
                weight: parameters,
                bias: None,
                layout,
            };
            let sizes = [source.height, source.width, out.height, out.width];
            if conv.pointwise() && sizes[..2] != sizes[2..] {
                bail!("the program convolves {}x{} pixels to {}x{}", sizes[0], sizes[1], sizes[2], sizes[3]);
            }
            parameters += conv.weights();
            Self::limit("parameters", parameters, MOST_NUMBERS)?;
            if bias != 0 {
                conv.bias = Some(parameters);
                parameters += c_out;
            }
            steps.push(Step { value, kind: Kind::Conv(conv), source, differentiate: false });
        }
        if !reader.0.is_empty() {
            bail!("the program is followed by {} integers", reader.0.len());
        }
        for norm in &mut norms {
            if let Some(gamma) = &mut norm.gamma {
                *gamma = parameters;
                parameters += norm.channels.len();
            }
            norm.beta = parameters;
            parameters += norm.channels.len();
        }
        let clocks = steps.iter().map(|_| Clock::default()).collect();
        let mut program = Self {
            values,
            norms,
            steps,
            output: count - 1,
            input_grad,
            masks,
            parameters,
            kept: Slots::default(),
            reused: Slots::default(),
            gradients: Slots::default(),
            clocks,
            prepared: Lock::new(None),
        };
        program.connect(channels)?;
        let numbers = [&program.kept, &program.reused, &program.gradients].map(|slots| slots.len);
        Self::limit("numbers for an image", numbers.into_iter().max().unwrap_or(0), MOST_NUMBERS)?;
        Ok(program)
    }

    /// That the program has no more of something than it may.
    fn limit(what: &str, count: usize, most: usize) -> Result<()> {
        if count > most { bail!("the program has {count} {what}, expected at most {most}") } else { Ok(()) }
    }

    /// Reads a step's source; `total` counts the rows of all.
    fn source(
        reader: &mut Reader<'_>,
        values: &[Value],
        norms: &[Norm],
        masks: usize,
        total: &mut usize,
    ) -> Result<Source> {
        // Rows and their channels.
        let mut places: Vec<(usize, Row)> = Vec::new();
        let mut size = None;
        for _ in 0..reader.size()? {
            let value = reader.required("value", values.len())?;
            let norm = reader.index("norm", norms.len())?;
            let norm_offset = reader.integer()?;
            let activation = match reader.integer()? {
                0 => Activation::Identity,
                1 => Activation::Relu,
                2 => Activation::Relu6,
                3 => Activation::Swish,
                4 => Activation::Sigmoid,
                5 => Activation::HardSigmoid,
                6 => Activation::HardSwish,
                code => bail!("the program names activation {code}, expected 0 to 6"),
            };
            let gate = reader.index("value", values.len())?;
            let gate_offset = reader.integer()?;
            let mask = reader.index("mask", masks)?;
            let mut place = reader.size()?;
            let pixels = [values[value].height, values[value].width];
            if *size.get_or_insert(pixels) != pixels || gate.is_some_and(|gate| values[gate].pixels() != 1) {
                bail!("the program adds or multiplies values of different sizes");
            }
            let moved = |channel: usize, offset: i64, count: usize| -> Result<usize> {
                match channel.checked_add_signed(offset as isize) {
                    Some(moved) if moved < count => Ok(moved),
                    _ => bail!("the program reads channel {channel} + {offset} of {count}"),
                }
            };
            for _ in 0..reader.size()? {
                let (count, first, distance) = (reader.size()?, reader.size()?, reader.size()?);
                *total += count;
                Self::limit("channels of sources", *total, MOST_CHANNELS)?;
                for i in 0..count {
                    let channel = moved(first.saturating_add(i.saturating_mul(distance)), 0, values[value].channels)?;
                    let norm = match norm {
                        Some(norm) => {
                            let channels = &norms[norm].channels;
                            Some(channels.start + moved(channel, norm_offset, channels.len())?)
                        }
                        None => None,
                    };
                    let gate = match gate {
                        Some(gate) => Some((gate, moved(channel, gate_offset, values[gate].channels)?)),
                        None => None,
                    };
                    if gate == Some((value, channel)) {
                        bail!("the program multiplies channel {channel} of value {value} by itself");
                    }
                    places.push((place, Row { value, channel, norm, activation, gate, mask, first: false }));
                    place += 1;
                }
            }
        }
        // A channel's rows are added up in the order in which they come.
        places.sort_by_key(|&(place, _)| place);
        let mut starts = vec![0];
        starts.extend(places.chunk_by(|a, b| a.0 == b.0).scan(0, |end, rows| {
            *end += rows.len();
            Some(*end)
        }));
        let channels = places.last().map_or(0, |&(place, _)| place + 1);
        let Some([height, width]) = size.filter(|_| channels > 0 && starts.len() == channels + 1) else {
            bail!("the program has a source with an empty channel")
        };
        let most_rows = starts.windows(2).map(|bounds| bounds[1] - bounds[0]).max().unwrap_or(0);
        Ok(Source { height, width, rows: places.into_iter().map(|(_, row)| row).collect(), starts, most_rows })
    }

    /// What follows from who reads what.
    fn connect(&mut self, norm_channels: usize) -> Result<()> {
        // Which value's channel each norm's channel normalises.
        let mut normed = vec![None; norm_channels];
        for row in self.steps.iter().flat_map(|step| &step.source.rows) {
            let Some(norm) = row.norm else { continue };
            match normed[norm] {
                None => {
                    normed[norm] = Some((row.value, row.channel));
                    self.values[row.value].norms.push((row.channel, norm));
                    self.values[row.value].normed = true;
                }
                Some(found) if found == (row.value, row.channel) => {}
                Some(found) => bail!("channel {norm} of the norms reads {found:?} and {:?}", (row.value, row.channel)),
            }
        }
        if let Some(channel) = normed.iter().position(Option::is_none) {
            bail!("channel {channel} of the norms reads nothing");
        }
        // The gradient is wanted of all that depends on the input (if its gradient is) or on a parameter.
        let mut wanted = vec![self.input_grad; 1];
        for step in &mut self.steps {
            let rows = &step.source.rows;
            step.differentiate = rows.iter().any(|row| wanted[row.value] || row.norm.is_some());
            wanted.push(step.differentiate || matches!(step.kind, Kind::Conv(_)));
        }
        // The backward pass goes through the steps from the last to the first. The output's gradient is there already.
        // Tasks of a step differ in channels, so no two of its channels may add to the same gradient, be it that of a gate.
        let mut met: Vec<Vec<Option<(usize, usize)>>> =
            self.values.iter().map(|value| vec![None; value.channels]).collect();
        for step in &self.steps {
            for (channel, bounds) in step.source.starts.windows(2).enumerate() {
                let rows = &step.source.rows[bounds[0]..bounds[1]];
                for (value, own) in rows.iter().flat_map(|row| [Some((row.value, row.channel)), row.gate]).flatten() {
                    match met[value][own].replace((step.value, channel)) {
                        Some((step_of, other)) if step_of == step.value && other != channel => {
                            bail!("channels {other} and {channel} of a step both read channel {own} of value {value}")
                        }
                        _ => {}
                    }
                }
            }
        }
        for row in self.steps.iter().flat_map(|step| &step.source.rows) {
            if let Some((gate, _)) = row.gate {
                self.values[gate].zeroed = true;
            }
        }
        for (index, (value, met)) in self.values.iter_mut().zip(&met).enumerate() {
            value.zeroed |= index != self.output && met.contains(&None);
        }
        let mut seen: Vec<Vec<bool>> = self.values.iter().map(|v| vec![v.zeroed; v.channels]).collect();
        seen[self.output].fill(true);
        self.wait();
        let waits: Vec<_> = self.values.iter().filter_map(|value| value.mean).collect();
        for step in self.steps.iter_mut().rev().filter(|step| step.differentiate && !waits.contains(&step.value)) {
            for row in &mut step.source.rows {
                row.first = !std::mem::replace(&mut seen[row.value][row.channel], true);
            }
        }
        self.view();
        self.place();
        Ok(())
    }

    /// Finds the means that leave their gradient to the step that makes what they read: it is the same for all pixels of an
    /// image but for the activation's derivative. Others must read all of that too, so that there is a gradient to add to.
    fn wait(&mut self) {
        // Which step reads each channel of each value first, and whether others do.
        let mut readers: Vec<Vec<(usize, bool)>> =
            self.values.iter().map(|value| vec![(0, false); value.channels]).collect();
        for step in &self.steps {
            for row in &step.source.rows {
                let (first, others) = &mut readers[row.value][row.channel];
                if *first == 0 {
                    *first = step.value;
                }
                *others |= *first != step.value;
            }
        }
        for step in self.steps.iter().filter(|step| matches!(step.kind, Kind::Mean)) {
            let rows = &step.source.rows;
            let Row { value, activation, .. } = rows[0];
            let channels = self.values[value].channels;
            let alike = |(channel, row): (usize, &Row)| {
                (row.value, row.channel, row.activation) == (value, channel, activation)
                    && row.gate.is_none()
                    && row.mask.is_none()
            };
            let whole = [rows.len(), step.source.channels()] == [channels; 2] && rows.iter().enumerate().all(alike);
            // Whether gradients are wanted does not matter: the size of what is kept must not depend on it.
            let others = readers[value].iter().all(|&(first, others)| others || first != 0 && first != step.value);
            if whole && self.values[value].mean.is_none() && others {
                self.values[value].mean = Some(step.value);
                self.values[step.value].kept_rows = 3;
            }
        }
    }

    /// Finds the values that all readers read alike.
    fn view(&mut self) {
        // For each channel of each value what its first reader makes of it.
        type Reading = (Activation, Option<usize>);
        let mut first: Vec<Vec<Option<Reading>>> = self.values.iter().map(|value| vec![None; value.channels]).collect();
        let mut same: Vec<bool> = (0..self.values.len()).map(|value| value != 0 && value != self.output).collect();
        for row in self.steps.iter().flat_map(|step| &step.source.rows) {
            let reading = (row.activation, row.norm);
            same[row.value] &= *first[row.value][row.channel].get_or_insert(reading) == reading;
            if let Some((gate, _)) = row.gate {
                same[gate] = false;
            }
        }
        for ((value, first), same) in self.values.iter_mut().zip(first).zip(same) {
            let Some(Some((activation, _))) = first.first().copied() else { continue };
            if same && first.iter().all(|reading| reading.is_some_and(|(other, _)| other == activation)) {
                let norms = first.iter().map(|reading| reading.and_then(|(_, norm)| norm)).collect();
                value.view = Some(View { activation, norms });
            }
        }
    }

    /// Lets the gradient of a depthwise convolution's source have the memory of that of its result, each channel's row the
    /// row of the channel that it becomes: these are the largest pairs of gradients. Returns the source.
    fn take_over(&mut self, step: usize) -> Option<usize> {
        let Step { value, kind: Kind::Conv(conv), source, differentiate: true } = &self.steps[step] else {
            return None;
        };
        let (rows, from) = (&source.rows, source.rows[0].value);
        let channels = self.values[from].channels;
        let alone = |row: &Row| row.value == from && row.first && row.gate.is_none();
        let planes = (conv.group_in, conv.group_out, source.pixels()) == (1, 1, self.values[*value].pixels());
        // Tasks read a channel's planes of some images before they write the same planes.
        let fits = [rows.len(), source.channels(), self.values[*value].channels] == [channels; 3];
        if conv.pointwise() || !planes || !fits || !rows.iter().all(alone) || from == 0 || self.values[from].zeroed {
            return None;
        }
        let mut places = vec![0; channels];
        rows.iter().enumerate().for_each(|(place, row)| places[row.channel] = place);
        let of = &self.values[*value].grad_rows;
        self.values[from].grad_rows = places.into_iter().map(|row| of.get(row).copied().unwrap_or(row)).collect();
        Some(from)
    }

    /// Finds places for values and gradients.
    fn place(&mut self) {
        let steps = self.values.len();
        // The first and last reader of each value, and whether one wants its gradient.
        let mut last: Vec<usize> = (0..steps).collect();
        let mut wanted = vec![false; steps];
        wanted[self.output] = true;
        wanted[0] = self.input_grad;
        for step in &self.steps {
            for row in &step.source.rows {
                for value in std::iter::once(row.value).chain(row.gate.map(|gate| gate.0)) {
                    last[value] = step.value;
                    wanted[value] |= step.differentiate;
                }
            }
        }
        last[self.output] = steps;
        let mut lives: Vec<_> =
            (0..steps).map(|value| value..if self.values[value].zeroed { steps } else { last[value] }).collect();
        let mut places: Vec<_> = (0..steps).collect();
        for step in (0..self.steps.len()).rev() {
            if let Some(from) = self.take_over(step) {
                let place = places[self.steps[step].value];
                places[from] = place;
                lives[place].start = from;
            }
        }
        let size = |value: usize| self.values[value].channels * self.values[value].pixels();
        let own = |value: usize| wanted[value] && places[value] == value;
        let gradients: Vec<_> =
            (0..steps).map(|value| if own(value) { (size(value), lives[value].clone()) } else { (0, 0..0) }).collect();
        let mut gradients = Slots::new(&gradients);
        gradients.offsets = places.iter().map(|&place| gradients.offsets[place]).collect();
        let kept: Vec<_> = self.values.iter().map(|value| (value.kept(), 0..steps)).collect();
        let reused: Vec<_> = (0..steps).map(|value| (size(value), value..last[value])).collect();
        let (kept, reused) = (Slots::new(&kept), Slots::new(&reused));
        (self.kept, self.reused, self.gradients) = (kept, reused, gradients);
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
                Kind::Mean | Kind::Pool => ("mean", 0),
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

    /// Factors of images in training: so many sets of one an image.
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
