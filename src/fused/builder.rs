//! Programs for tests, written as `kconv/models/wire.py` writes them.

use super::reader::FORMAT;

/// Some channels of a value as a step reads them; those of the result follow each other.
#[derive(Clone)]
pub struct Term {
    value: usize,
    norm: Option<usize>,
    norm_offset: i64,
    activation: (i64, Vec<f64>),
    gate: Option<usize>,
    gate_offset: i64,
    mask: Option<usize>,
    start: usize,
    channels: Vec<usize>,
}

/// Channels of a value as they are.
pub fn term(value: usize, channels: impl IntoIterator<Item = usize>) -> Term {
    Term {
        value,
        norm: None,
        norm_offset: 0,
        activation: (0, Vec::new()),
        gate: None,
        gate_offset: 0,
        mask: None,
        start: 0,
        channels: channels.into_iter().collect(),
    }
}

/// Codes of activations.
pub const RELU6: i64 = 2;
pub const SWISH: i64 = 3;
pub const SIGMOID: i64 = 4;
pub const HARD_SWISH: i64 = 6;
pub const CLIP: i64 = 7;
pub const LEAKY_RELU: i64 = 8;
pub const ELU: i64 = 9;
pub const GELU: i64 = 10;
pub const GELU_TANH: i64 = 11;
pub const MISH: i64 = 12;

impl Term {
    pub fn norm(self, norm: usize) -> Self {
        Self { norm: Some(norm), ..self }
    }

    pub fn activation(self, code: i64, parameters: &[f64]) -> Self {
        Self { activation: (code, parameters.to_vec()), ..self }
    }

    pub fn gate(self, value: usize) -> Self {
        Self { gate: Some(value), ..self }
    }

    /// What to add to a channel for the gate's.
    pub fn gate_offset(self, gate_offset: i64) -> Self {
        Self { gate_offset, ..self }
    }

    pub fn mask(self, mask: usize) -> Self {
        Self { mask: Some(mask), ..self }
    }

    /// The result's first channel.
    pub fn start(self, start: usize) -> Self {
        Self { start, ..self }
    }

    fn write(&self, integers: &mut Vec<i64>) {
        let index = |index: Option<usize>| index.map_or(-1, |index| index as i64);
        integers.extend([self.value as i64, index(self.norm), self.norm_offset, self.activation.0]);
        integers.push(self.activation.1.len() as i64);
        integers.extend(self.activation.1.iter().map(|parameter| parameter.to_bits() as i64));
        integers.extend([index(self.gate), self.gate_offset, index(self.mask), self.start as i64]);
        let channels = &self.channels;
        if channels.len() > 1 && channels.windows(2).all(|pair| pair[0] + 1 == pair[1]) {
            return integers.extend([1, channels.len() as i64, channels[0] as i64, 1]);
        }
        integers.push(channels.len() as i64);
        integers.extend(channels.iter().flat_map(|&channel| [1, channel as i64, 0]));
    }
}

/// Attributes of a convolution or a pool.
#[derive(Clone, Copy)]
pub struct Window {
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    pub dilation: [usize; 2],
    pub before: [usize; 2],
}

impl Window {
    /// A square kernel with as many zeros before.
    pub fn square(kernel: usize, stride: usize, before: usize) -> Self {
        Self { kernel: [kernel; 2], stride: [stride; 2], dilation: [1; 2], before: [before; 2] }
    }

    fn integers(self) -> Vec<i64> {
        [self.kernel, self.stride, self.dilation, self.before].concat().into_iter().map(|n| n as i64).collect()
    }
}

/// A program in the making. Methods that add a step return its value, of `[channels, height,
/// width]`.
pub struct Builder {
    masks: usize,
    values: Vec<[usize; 3]>,
    norms: Vec<(usize, f64, bool)>,
    steps: Vec<i64>,
}

impl Builder {
    pub fn new(input: [usize; 3]) -> Self {
        Self { masks: 0, values: vec![input], norms: Vec::new(), steps: Vec::new() }
    }

    /// Of that many masks.
    pub fn masks(self, masks: usize) -> Self {
        Self { masks, ..self }
    }

    /// A norm of that many channels, with or without a gamma.
    pub fn norm(&mut self, channels: usize, gamma: bool) -> usize {
        self.norms.push((channels, 1e-3, gamma));
        self.norms.len() - 1
    }

    fn step(&mut self, kind: i64, attributes: &[i64], terms: &[Term], value: [usize; 3]) -> usize {
        self.steps.extend([kind, attributes.len() as i64]);
        self.steps.extend(attributes);
        self.steps.push(terms.len() as i64);
        terms.iter().for_each(|term| term.write(&mut self.steps));
        self.values.push(value);
        self.values.len() - 1
    }

    pub fn conv(&mut self, window: Window, groups: usize, bias: bool, terms: &[Term], value: [usize; 3]) -> usize {
        let attributes = [window.integers(), vec![groups as i64, i64::from(bias)]].concat();
        self.step(0, &attributes, terms, value)
    }

    pub fn copy(&mut self, terms: &[Term], value: [usize; 3]) -> usize {
        self.step(1, &[], terms, value)
    }

    pub fn mean(&mut self, terms: &[Term], channels: usize) -> usize {
        self.step(2, &[], terms, [channels, 1, 1])
    }

    /// `counted`: zeros below and at the right that count, if zeros do.
    pub fn mean_pool(&mut self, window: Window, counted: Option<[i64; 2]>, terms: &[Term], value: [usize; 3]) -> usize {
        let [rows, columns] = counted.unwrap_or_default();
        let attributes = [window.integers(), vec![i64::from(counted.is_some()), rows, columns]].concat();
        self.step(3, &attributes, terms, value)
    }

    pub fn max_pool(&mut self, window: Window, terms: &[Term], value: [usize; 3]) -> usize {
        self.step(4, &window.integers(), terms, value)
    }

    /// The program, with the gradient by the input.
    pub fn integers(&self) -> Vec<i64> {
        let mut integers = vec![FORMAT, 0, 1, self.masks as i64, self.values.len() as i64];
        integers.extend(self.values.iter().flatten().map(|&size| size as i64));
        integers.push(self.norms.len() as i64);
        for &(channels, epsilon, gamma) in &self.norms {
            integers.extend([channels as i64, epsilon.to_bits() as i64, i64::from(gamma)]);
        }
        integers.extend(&self.steps);
        integers
    }
}
