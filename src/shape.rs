//! Validated geometry: made once at the edge of the crate, trusted below.

use crate::error::{Result, bail};

/// The order of an image's axes in memory, the last one contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Images, channels, rows, columns: a channel's pixels are contiguous.
    Nchw,
    /// Images, rows, columns, channels: a pixel's channels are contiguous.
    Nhwc,
}

/// The order of the axes of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightLayout {
    /// PyTorch's: (C_out, C_in / groups) for a pointwise, (C, k, k) for a depthwise convolution.
    Oi,
    /// Keras's: (C_in / groups, C_out) for a pointwise, (k, k, C) for a depthwise convolution.
    Io,
}

/// A batch of images in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Images {
    /// Number of images.
    pub count: usize,
    /// Pixels in an image.
    pub pixels: usize,
    /// Channels of a pixel.
    pub channels: usize,
    /// The order in memory.
    pub order: Order,
}

impl Images {
    /// How many values there are.
    pub fn len(&self) -> usize {
        self.count * self.pixels * self.channels
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same images with another number of channels.
    pub fn with_channels(self, channels: usize) -> Self {
        Self { channels, ..self }
    }
}

/// Height and width, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size2 {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Size2 {
    /// As many rows as columns.
    pub const fn square(side: usize) -> Self {
        Self { height: side, width: side }
    }

    /// How many pixels there are.
    pub fn pixels(self) -> usize {
        self.height * self.width
    }
}

/// Checks a step; on success it is at least 1.
pub fn check_step(name: &str, step: i64) -> Result<usize> {
    match usize::try_from(step) {
        Ok(step) if step >= 1 => Ok(step),
        _ => bail!("{name}={step}, expected at least 1"),
    }
}

/// Checks the size of a depthwise kernel.
pub fn check_kernel(kernel: i64) -> Result<usize> {
    match kernel {
        3 | 5 | 7 => Ok(kernel as usize),
        _ => bail!("kernel_size={kernel}, expected 3, 5 or 7"),
    }
}

/// Where each channel goes when channels are interleaved by `step`: channel `c` to `dst_index[c]`.
///
/// Interleaving concatenates, over `s = 0..step`, the channels `s, s + step, s + 2 * step, ...`.
pub fn interleave_dst_index(channels: usize, step: usize) -> Vec<usize> {
    let mut dst_index = vec![0; channels];
    for (dst, src) in interleave_src_index(channels, step).into_iter().enumerate() {
        dst_index[src] = dst;
    }
    dst_index
}

/// Where each channel comes from when channels are interleaved by `step`: the inverse of
/// [`interleave_dst_index`].
pub fn interleave_src_index(channels: usize, step: usize) -> Vec<usize> {
    (0..step.min(channels)).flat_map(|s| (s..channels).step_by(step)).collect()
}

/// A grouped pointwise convolution, its output interleaved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pointwise {
    /// Input channels; a multiple of `groups`.
    pub in_channels: usize,
    /// Output channels; a multiple of `groups`.
    pub out_channels: usize,
    /// Number of groups, at least 1.
    pub groups: usize,
    /// Step by which the output's channels are interleaved after the convolution; 1 is none.
    pub interleave: usize,
    /// The layout of the weights.
    pub weight_layout: WeightLayout,
}

impl Pointwise {
    /// Checks that `groups` divides the channels.
    pub fn new(
        in_channels: usize,
        out_channels: usize,
        groups: i64,
        interleave: i64,
        weight_layout: WeightLayout,
    ) -> Result<Self> {
        let interleave = check_step("interleave", interleave)?;
        if in_channels == 0 || out_channels == 0 {
            bail!("in_channels={in_channels}, out_channels={out_channels}, expected at least 1 of each");
        }
        let groups = match usize::try_from(groups) {
            Ok(groups) if groups >= 1 => groups,
            _ => bail!("groups={groups}, expected at least 1"),
        };
        for (name, channels) in [("in_channels", in_channels), ("out_channels", out_channels)] {
            if channels % groups != 0 {
                bail!("{name}={channels} is not divisible by groups={groups}");
            }
        }
        Ok(Self { in_channels, out_channels, groups, interleave, weight_layout })
    }

    /// Input channels of a group.
    pub fn group_in(&self) -> usize {
        self.in_channels / self.groups
    }

    /// Output channels of a group.
    pub fn group_out(&self) -> usize {
        self.out_channels / self.groups
    }

    /// How many weights there are.
    pub fn weights(&self) -> usize {
        self.out_channels * self.group_in()
    }

    /// Where the weights lie in memory.
    pub fn weight_strides(&self) -> WeightStrides {
        let (group_in, group_out) = (self.group_in(), self.group_out());
        match self.weight_layout {
            WeightLayout::Oi => WeightStrides { group: group_out * group_in, output: group_in, input: 1 },
            WeightLayout::Io => WeightStrides { group: group_out, output: 1, input: self.out_channels },
        }
    }

    /// Where each output channel is stored; `None` where that is its own index.
    pub fn dst_index(&self) -> Option<Vec<usize>> {
        // A step of 1 and one of all channels or more leave every channel where it is.
        (self.interleave > 1 && self.interleave < self.out_channels)
            .then(|| interleave_dst_index(self.out_channels, self.interleave))
    }
}

/// Distances in memory of the weights of a grouped pointwise convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightStrides {
    /// Between the first weights of neighbouring groups.
    pub group: usize,
    /// Between a group's neighbouring output channels.
    pub output: usize,
    /// Between a group's neighbouring input channels.
    pub input: usize,
}

impl WeightStrides {
    /// Those of the input gradient, where output and input channels change roles.
    pub fn transposed(self) -> Self {
        Self { output: self.input, input: self.output, ..self }
    }
}

/// Pixels at the sides of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sides {
    /// Above the first row.
    pub top: usize,
    /// Below the last row.
    pub bottom: usize,
    /// Before the first column.
    pub left: usize,
    /// After the last column.
    pub right: usize,
}

impl Sides {
    /// The same number at each side.
    pub const fn all(pixels: usize) -> Self {
        Self { top: pixels, bottom: pixels, left: pixels, right: pixels }
    }
}

/// Zero padding of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// TensorFlow's: the output has `ceil(size / stride)` pixels, an odd pixel of padding goes to
    /// the bottom and right.
    Same,
    /// None.
    Valid,
    /// As many pixels.
    Explicit(Sides),
}

impl Padding {
    /// The padding of an image of `size` pixels.
    fn resolve(self, size: Size2, kernel: usize, stride: usize) -> Sides {
        match self {
            Self::Valid => Sides::all(0),
            Self::Explicit(sides) => sides,
            Self::Same => {
                let total =
                    |size: usize| (size.div_ceil(stride).saturating_sub(1) * stride + kernel).saturating_sub(size);
                let (rows, columns) = (total(size.height), total(size.width));
                let (top, left) = (rows / 2, columns / 2);
                Sides { top, bottom: rows - top, left, right: columns - left }
            }
        }
    }
}

/// One axis of a depthwise convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    /// Input pixels.
    pub input: usize,
    /// Output pixels.
    pub output: usize,
    /// Zeros before the input.
    pub before: usize,
}

impl Axis {
    /// An axis of `input` pixels with zeros `before` and `after` it.
    fn new(name: &str, input: usize, before: usize, after: usize, kernel: usize, stride: usize) -> Result<Self> {
        // Padding a whole kernel or more makes outputs that see no pixel at all: a mistake.
        if before >= kernel || after >= kernel {
            bail!("padding={:?} of the {name}, expected less than kernel_size={kernel}", [before, after]);
        }
        if input > 0 && input + before + after < kernel {
            let padding = [before, after];
            bail!("{name}={input} with padding {padding:?} is smaller than kernel_size={kernel}");
        }
        let output = if input == 0 { 0 } else { (input + before + after - kernel) / stride + 1 };
        Ok(Self { input, output, before })
    }
}

/// A depthwise convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depthwise {
    /// Number of images.
    pub count: usize,
    /// Channels of input and output.
    pub channels: usize,
    /// Vertical geometry.
    pub vertical: Axis,
    /// Horizontal geometry.
    pub horizontal: Axis,
    /// 3, 5 or 7.
    pub kernel: usize,
    /// 1 or 2.
    pub stride: usize,
    /// The order of the images in memory.
    pub order: Order,
    /// The layout of the weights.
    pub weight_layout: WeightLayout,
}

impl Depthwise {
    /// Checks kernel size, stride and that the padded image holds a kernel.
    pub fn new(
        count: usize,
        channels: usize,
        size: Size2,
        kernel: usize,
        stride: i64,
        padding: Padding,
        order: Order,
        weight_layout: WeightLayout,
    ) -> Result<Self> {
        check_kernel(kernel as i64)?;
        let stride = match stride {
            1 | 2 => stride as usize,
            _ => bail!("stride={stride}, expected 1 or 2"),
        };
        if channels == 0 {
            bail!("channels=0, expected at least 1");
        }
        let sides = padding.resolve(size, kernel, stride);
        let vertical = Axis::new("height", size.height, sides.top, sides.bottom, kernel, stride)?;
        let horizontal = Axis::new("width", size.width, sides.left, sides.right, kernel, stride)?;
        Ok(Self { count, channels, vertical, horizontal, kernel, stride, order, weight_layout })
    }

    /// Height and width of the input.
    pub fn input_size(&self) -> Size2 {
        Size2 { height: self.vertical.input, width: self.horizontal.input }
    }

    /// Height and width of the output.
    pub fn output_size(&self) -> Size2 {
        Size2 { height: self.vertical.output, width: self.horizontal.output }
    }

    /// How many values the input holds.
    pub fn input_len(&self) -> usize {
        self.count * self.channels * self.vertical.input * self.horizontal.input
    }

    /// How many values the output holds.
    pub fn output_len(&self) -> usize {
        self.count * self.channels * self.vertical.output * self.horizontal.output
    }

    /// How many weights there are.
    pub fn weights(&self) -> usize {
        self.channels * self.kernel * self.kernel
    }

    /// Where the weight of channel `c` at `tap = row * kernel + column` stands.
    pub fn weight_index(&self, c: usize, tap: usize) -> usize {
        match self.weight_layout {
            WeightLayout::Oi => c * self.kernel * self.kernel + tap,
            WeightLayout::Io => tap * self.channels + c,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleave_is_a_permutation() {
        assert_eq!(interleave_src_index(7, 3), [0, 3, 6, 1, 4, 2, 5]);
        for (channels, step) in (0..12).flat_map(|c| (1..15).map(move |s| (c, s))) {
            let (dst, src) = (interleave_dst_index(channels, step), interleave_src_index(channels, step));
            assert!((0..channels).all(|c| src[dst[c]] == c), "{channels} by {step}");
        }
    }

    #[test]
    fn same_padding_is_tensorflows() {
        let axis = |size, kernel, stride| {
            let (size, layout) = (Size2::square(size), WeightLayout::Oi);
            let shape = Depthwise::new(1, 1, size, kernel, stride, Padding::Same, Order::Nchw, layout);
            shape.unwrap().vertical
        };
        assert_eq!(axis(8, 3, 2), Axis { input: 8, output: 4, before: 0 });
        assert_eq!(axis(7, 3, 2), Axis { input: 7, output: 4, before: 1 });
        assert_eq!(axis(8, 5, 2), Axis { input: 8, output: 4, before: 1 });
        assert_eq!(axis(5, 5, 1), Axis { input: 5, output: 5, before: 2 });
        assert_eq!(axis(1, 7, 2), Axis { input: 1, output: 1, before: 3 });
    }

    #[test]
    fn errors_carry_the_numbers() {
        let error = |i, o, g, s| Pointwise::new(i, o, g, s, WeightLayout::Oi).unwrap_err().to_string();
        assert_eq!(error(30, 8, 4, 1), "in_channels=30 is not divisible by groups=4");
        assert_eq!(error(8, 6, 4, 1), "out_channels=6 is not divisible by groups=4");
        assert_eq!(error(8, 8, 0, 1), "groups=0, expected at least 1");
        assert_eq!(error(8, 8, 1, 0), "interleave=0, expected at least 1");
    }
}
