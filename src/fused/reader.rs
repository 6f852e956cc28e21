//! The wire format of programs: the reader of what `kconv/models/wire.py` writes.
//!
//! A new kind of step or activation is an entry in [`Reader::kind`] or [`Reader::activation`] here
//! and in the tables of `wire.py`.

use crate::error::{Result, bail};
use crate::fused::program::{
    Conv, Kind, LARGEST_KERNEL, MOST_CHANNELS, MOST_NUMBERS, MOST_VALUES, Norm, Parts, Pool, Program, Row, Source,
    Step, Value, Window, limit,
};
use crate::microkernels::activations::{Activation, Clip, Elu, LeakyRelu};
use crate::shape::WeightLayout;

/// The version of the format that is read: the first integer of every program.
///
/// (Programs of the first version began with 0 or 1.)
pub const FORMAT: i64 = 2;

/// No size in a program is larger: products of three of them do not overflow.
const LARGEST: usize = 1 << 20;

/// Reads integers one after the other.
struct Reader<'a>(&'a [i64]);

impl<'a> Reader<'a> {
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

    /// As many sizes as the array has.
    fn sizes<const N: usize>(&mut self) -> Result<[usize; N]> {
        let mut sizes = [0; N];
        for size in &mut sizes {
            *size = self.size()?;
        }
        Ok(sizes)
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

    /// A real number, which is written as its bits.
    fn real(&mut self) -> Result<f64> {
        Ok(f64::from_bits(self.integer()? as u64))
    }

    /// The number of integers that follow, and these.
    fn list(&mut self) -> Result<Self> {
        let len = self.size()?;
        let Some((list, rest)) = self.0.split_at_checked(len) else { bail!("the program ends early") };
        self.0 = rest;
        Ok(Self(list))
    }

    /// That nothing is left.
    fn end(self, what: &str) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { bail!("{what} is followed by {} integers", self.0.len()) }
    }

    /// The values: their number, and for each channels, height and width.
    fn values(&mut self) -> Result<Vec<Value>> {
        let count = self.size()?;
        if !(2..=MOST_VALUES).contains(&count) {
            bail!(
                "the program has {count} values, expected the input and one for each of 1 to {} steps",
                MOST_VALUES - 1
            );
        }
        let (mut values, mut total) = (Vec::new(), 0);
        for _ in 0..count {
            let [channels, height, width] = self.sizes()?;
            if channels * height * width == 0 || channels * height * width > MOST_NUMBERS {
                bail!("the program has a value of {channels} channels, {height}x{width}");
            }
            total += channels;
            limit("channels", total, MOST_CHANNELS)?;
            values.push(Value::new(channels, height, width));
        }
        Ok(values)
    }

    /// The norms: their number, and for each channels, epsilon, and whether it has a gamma.
    fn norms(&mut self) -> Result<Vec<Norm>> {
        let (mut norms, mut total) = (Vec::new(), 0);
        for _ in 0..self.size()? {
            let (channels, epsilon) = (self.size()?, self.real()?);
            if !(0.0..f64::INFINITY).contains(&epsilon) || channels == 0 {
                bail!("the program has a norm of {channels} channels with epsilon {epsilon}");
            }
            // Their index among the parameters is known when all convolutions are.
            let gamma = self.flag()?.then_some(0);
            norms.push(Norm { channels: total..total + channels, epsilon, gamma, beta: 0 });
            total += channels;
            limit("channels of norms", total, MOST_CHANNELS)?;
        }
        Ok(norms)
    }

    /// What a step does: its code, and its attributes. What depends on its source follows later.
    fn kind(&mut self, layout: WeightLayout) -> Result<Kind> {
        let (code, mut attributes) = (self.integer()?, self.list()?);
        let kind = match code {
            0 => Kind::Conv(attributes.conv(layout)?),
            1 => Kind::Copy,
            2 => Kind::Mean,
            3 => Kind::Pool(attributes.mean_pool()?),
            4 => Kind::Pool(Pool { window: attributes.window()?, max: true, counted: None }),
            _ => bail!("the program has a step of kind {code}, expected 0 to 4"),
        };
        attributes.end("a step's last attribute")?;
        Ok(kind)
    }

    /// A window: height and width of kernel, stride and dilation, zeros above and at the left.
    fn window(&mut self) -> Result<Window> {
        let window =
            Window { kernel: self.sizes()?, stride: self.sizes()?, dilation: self.sizes()?, before: self.sizes()? };
        let Window { kernel, stride, dilation, before } = window;
        let fits = |axis: usize| {
            (1..=LARGEST_KERNEL).contains(&kernel[axis])
                && (1..=LARGEST_KERNEL).contains(&stride[axis])
                && (1..=LARGEST_KERNEL).contains(&dilation[axis])
                && before[axis] < window.span(axis)
        };
        if !(fits(0) && fits(1)) {
            let [height, width] = kernel;
            bail!(
                "the program has a {height}x{width} window of stride {stride:?}, dilation {dilation:?} with \
                 {before:?} zeros before"
            );
        }
        Ok(window)
    }

    /// A mean over windows: its window, whether zeros count, and how many then do below and at the
    /// right.
    fn mean_pool(&mut self) -> Result<Pool> {
        let (window, counts, after) = (self.window()?, self.flag()?, self.sizes()?);
        if window.dilation != [1, 1] {
            bail!("the program has means over windows of dilation {:?}", window.dilation);
        }
        Ok(Pool { window, max: false, counted: counts.then_some(after) })
    }

    /// A convolution: its window, groups, and whether there is a bias.
    fn conv(&mut self, layout: WeightLayout) -> Result<Conv> {
        let (window, groups, bias) = (self.window()?, self.size()?, self.flag()?);
        let bias = bias.then_some(0);
        Ok(Conv { window, groups, group_in: 0, group_out: 0, weight: 0, bias, layout })
    }

    /// A step's source; `total` counts the rows of all.
    ///
    /// The number of terms, and for each value, norm or -1, what to add to the value's channel for
    /// the norm's, activation and its parameters, gate's value or -1, what to add for its channel,
    /// mask or -1, the source's first channel, the number of runs, and for each count, first
    /// channel of the value and distance between channels.
    fn source(&mut self, values: &[Value], norms: &[Norm], masks: usize, total: &mut usize) -> Result<Source> {
        let mut rows = Vec::new();
        let mut size = None;
        for _ in 0..self.size()? {
            let term = self.term(values, norms.len(), masks)?;
            let value = &values[term.value];
            let pixels = [value.height, value.width];
            if *size.get_or_insert(pixels) != pixels || term.gate.is_some_and(|gate| values[gate].pixels() != 1) {
                bail!("the program adds or multiplies values of different sizes");
            }
            let mut at = self.size()?;
            for _ in 0..self.size()? {
                let [count, first, distance] = self.sizes()?;
                *total += count;
                limit("channels of sources", *total, MOST_CHANNELS)?;
                for i in 0..count {
                    let channel = first.saturating_add(i.saturating_mul(distance));
                    rows.push((at, term.row(channel, values, norms)?));
                    at += 1;
                }
            }
        }
        // A channel's rows are added up in the order in which they come.
        rows.sort_by_key(|&(at, _)| at);
        let mut starts = vec![0];
        starts.extend(rows.chunk_by(|a, b| a.0 == b.0).scan(0, |end, rows| {
            *end += rows.len();
            Some(*end)
        }));
        let channels = rows.last().map_or(0, |&(at, _)| at + 1);
        let Some([height, width]) = size.filter(|_| channels > 0 && starts.len() == channels + 1) else {
            bail!("the program has a source with an empty channel")
        };
        let most_rows = starts.windows(2).map(|bounds| bounds[1] - bounds[0]).max().unwrap_or(0);
        Ok(Source { height, width, rows: rows.into_iter().map(|(_, row)| row).collect(), starts, most_rows })
    }

    /// What the channels of a term have in common.
    fn term(&mut self, values: &[Value], norms: usize, masks: usize) -> Result<Term> {
        Ok(Term {
            value: self.required("value", values.len())?,
            norm: self.index("norm", norms)?,
            norm_offset: self.integer()?,
            activation: self.activation()?,
            gate: self.index("value", values.len())?,
            gate_offset: self.integer()?,
            mask: self.index("mask", masks)?,
        })
    }

    /// An activation: its code, and its parameters.
    fn activation(&mut self) -> Result<Activation> {
        let (code, mut list) = (self.integer()?, self.list()?);
        let mut parameters = Vec::new();
        while !list.0.is_empty() {
            parameters.push(list.real()?);
        }
        Ok(match (code, &parameters[..]) {
            (0, []) => Activation::Identity,
            (1, []) => Activation::RELU,
            (2, []) => Activation::RELU6,
            (3, []) => Activation::Swish,
            (4, []) => Activation::Sigmoid,
            (5, []) => Activation::HardSigmoid,
            (6, []) => Activation::HardSwish,
            (7, &[low, high]) if low <= high => Activation::Clip(Clip { low, high }),
            (8, &[slope]) if slope.is_finite() => Activation::LeakyRelu(LeakyRelu { slope }),
            (9, &[alpha]) if alpha.is_finite() => Activation::Elu(Elu { alpha }),
            (10, []) => Activation::Gelu,
            (11, []) => Activation::GeluTanh,
            (12, []) => Activation::Mish,
            (0..=12, _) => bail!("the program gives activation {code} the parameters {parameters:?}"),
            _ => bail!("the program names activation {code}, expected 0 to 12"),
        })
    }
}

/// What the channels of a term have in common: see [`Row`].
struct Term {
    value: usize,
    norm: Option<usize>,
    norm_offset: i64,
    activation: Activation,
    gate: Option<usize>,
    gate_offset: i64,
    mask: Option<usize>,
}

impl Term {
    /// One channel of the value.
    fn row(&self, channel: usize, values: &[Value], norms: &[Norm]) -> Result<Row> {
        let moved = |channel: usize, offset: i64, count: usize| -> Result<usize> {
            match channel.checked_add_signed(offset as isize) {
                Some(moved) if moved < count => Ok(moved),
                _ => bail!("the program reads channel {channel} + {offset} of {count}"),
            }
        };
        let Self { value, activation, mask, .. } = *self;
        let channel = moved(channel, 0, values[value].channels)?;
        let of_norm = |norm: usize| {
            let channels = &norms[norm].channels;
            Ok(channels.start + moved(channel, self.norm_offset, channels.len())?)
        };
        let of_gate = |gate: usize| Ok((gate, moved(channel, self.gate_offset, values[gate].channels)?));
        let norm = self.norm.map(of_norm).transpose()?;
        let gate = self.gate.map(of_gate).transpose()?;
        if gate == Some((value, channel)) {
            bail!("the program multiplies channel {channel} of value {value} by itself");
        }
        Ok(Row { value, channel, norm, activation, gate, mask, first: false })
    }
}

impl Program {
    /// Reads a program:
    ///
    /// * [`FORMAT`], weight layout (0 OI, 1 IO), flags (1: the gradient by the input is wanted, 2:
    ///   the backward pass computes values anew that need not be kept), number of masks;
    /// * the values: value 0 is the input, value `i` that of step `i`, the last one the output;
    /// * the norms;
    /// * for each step its kind, the number of its attributes, these, and its source. Kinds are 0
    ///   (a convolution), 1 (a copy), 2 (the mean over the pixels), 3 (the means over windows) and
    ///   4 (the maxima over windows).
    ///
    /// Real numbers are written as the bits of a double. Parameters follow each other in the order
    /// of the program: weights and bias of each convolution, then gamma and beta of each norm.
    ///
    /// # Errors
    /// If the integers are no program.
    pub fn parse(integers: &[i64]) -> Result<Self> {
        let mut reader = Reader(integers);
        let format = reader.integer()?;
        if format != FORMAT {
            bail!(
                "the program has format {format}, expected {FORMAT}: kconv's Python part and its extension are of \
                 different versions"
            );
        }
        let layout = if reader.flag()? { WeightLayout::Io } else { WeightLayout::Oi };
        let flags = reader.integer()?;
        if !(0..4).contains(&flags) {
            bail!("the program has flags of {flags}, expected 0 to 3");
        }
        let (input_grad, recompute, masks) = (flags & 1 != 0, flags & 2 != 0, reader.size()?);
        let (values, mut norms) = (reader.values()?, reader.norms()?);
        let (mut parameters, mut rows) = (0, 0);
        let mut steps = Vec::new();
        for value in 1..values.len() {
            let mut kind = reader.kind(layout)?;
            let source = reader.source(&values[..value], &norms, masks, &mut rows)?;
            kind.fit(value, &source, &values[value], &mut parameters)?;
            steps.push(Step { value, kind, source, differentiate: false });
        }
        reader.end("the program")?;
        for norm in &mut norms {
            if let Some(gamma) = &mut norm.gamma {
                *gamma = parameters;
                parameters += norm.channels.len();
            }
            norm.beta = parameters;
            parameters += norm.channels.len();
        }
        Program::new(Parts { values, norms, steps, input_grad, recompute, masks, parameters })
    }
}
