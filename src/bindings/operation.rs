//! One parser for what a call may be, whether NumPy, XLA or TensorFlow makes it: shapes and
//! arguments in, validated geometry and the shape of the result out; and one set of error texts.

use std::mem::MaybeUninit;
use std::ops::Deref;

use super::explain;
use crate::error::{Result, bail};
use crate::interleave::ChannelOrder;
use crate::plan::{Caps, Direction, Explained};
use crate::shape::{
    Depthwise, Images, Order, Padding, Pointwise, Sides, Size2, WeightLayout, check_kernel, check_step,
    interleave_dst_index, interleave_src_index,
};
use crate::simd::IsaKind;
use crate::simd::element::Element;
use crate::{conv1x1, dwconv, interleave};

/// The functions that a framework or NumPy may call, fused networks apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    PointwiseConv,
    PointwiseConvGradInput,
    PointwiseConvGradWeight,
    PointwiseConvGradBias,
    DepthwiseConv,
    DepthwiseConvGradInput,
    DepthwiseConvGradWeight,
    Interleave,
    Deinterleave,
}

/// The most arrays that a function has.
pub const MAX_OPERANDS: usize = 3;

impl Function {
    /// The names of its arrays; a bias may be left out.
    pub const fn operands(self) -> &'static [&'static str] {
        match self {
            Self::PointwiseConv | Self::DepthwiseConv => &["x", "weight", "bias"],
            Self::PointwiseConvGradInput | Self::DepthwiseConvGradInput => &["grad_output", "weight"],
            Self::PointwiseConvGradWeight | Self::DepthwiseConvGradWeight => &["x", "grad_output"],
            Self::PointwiseConvGradBias => &["grad_output"],
            Self::Interleave | Self::Deinterleave => &["x"],
        }
    }

    /// Whether its result is a weight.
    fn makes_weight(self) -> bool {
        matches!(self, Self::PointwiseConvGradWeight | Self::DepthwiseConvGradWeight)
    }
}

/// The arguments of a call beside its arrays; those that its function does not have are not read.
#[derive(Clone, Copy, Debug)]
pub struct Arguments {
    pub function: Function,
    pub layout: Order,
    pub weight_layout: WeightLayout,
    pub groups: i64,
    /// The step by which channels are interleaved.
    pub step: i64,
    pub stride: i64,
    pub padding: Padding,
    /// The size of the images that a depthwise input gradient is of.
    pub input_size: Size2,
    /// The size of the kernel that a depthwise weight gradient is of.
    pub kernel_size: i64,
}

/// Parses the logical order of an image's axes.
pub fn layout(value: &str) -> Result<Order> {
    match value {
        "NCHW" => Ok(Order::Nchw),
        "NHWC" => Ok(Order::Nhwc),
        _ => bail!("layout={value:?}, expected \"NCHW\" or \"NHWC\""),
    }
}

/// The axes of an image in an order.
fn axes(layout: Order) -> &'static str {
    if layout == Order::Nchw { "(N, C, H, W)" } else { "(N, H, W, C)" }
}

/// Parses the order of a weight's axes.
pub fn weight_layout(value: &str) -> Result<WeightLayout> {
    match value {
        "OI" => Ok(WeightLayout::Oi),
        "IO" => Ok(WeightLayout::Io),
        _ => bail!("weight_layout={value:?}, expected \"OI\" or \"IO\""),
    }
}

/// The paddings that have names.
pub fn named_padding(name: &str) -> Option<Padding> {
    match name {
        "same" => Some(Padding::Same),
        "valid" => Some(Padding::Valid),
        _ => None,
    }
}

/// The padding of the sides top, bottom, left and right, none of them negative.
pub fn padding_of_sides(sides: [i64; 4]) -> Option<Padding> {
    let side = |i: usize| usize::try_from(sides[i]).ok();
    Some(Padding::Explicit(Sides { top: side(0)?, bottom: side(1)?, left: side(2)?, right: side(3)? }))
}

/// What a padding that is none of those is told.
pub const EXPECTED_PADDING: &str = "expected \"same\", \"valid\", an integer from 0 or ((top, bottom), (left, right))";

/// A batch of images by its logical shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    pub count: usize,
    pub channels: usize,
    pub size: Size2,
}

impl Batch {
    /// Reads the shape of the array `name`.
    pub fn new(name: &str, shape: &[usize], layout: Order) -> Result<Self> {
        let &[count, a, b, c] = shape else {
            bail!("{name} has shape {shape:?}, expected {}", axes(layout));
        };
        let (channels, height, width) = if layout == Order::Nchw { (a, b, c) } else { (c, a, b) };
        if height.checked_mul(width).is_none() {
            bail!("{name} has shape {shape:?}, expected fewer pixels");
        }
        Ok(Self { count, channels, size: Size2 { height, width } })
    }

    /// Images of these channels, this height and this width.
    pub fn of(count: usize, [channels, height, width]: [usize; 3]) -> Self {
        Self { count, channels, size: Size2 { height, width } }
    }

    /// The logical shape.
    pub fn shape(self, layout: Order) -> [usize; 4] {
        let Self { count, channels, size: Size2 { height, width } } = self;
        match layout {
            Order::Nchw => [count, channels, height, width],
            Order::Nhwc => [count, height, width, channels],
        }
    }

    /// The same images with another number of channels.
    pub fn with_channels(self, channels: usize) -> Self {
        Self { channels, ..self }
    }

    fn images(self, order: Order) -> Images {
        Images { count: self.count, pixels: self.size.pixels(), channels: self.channels, order }
    }
}

/// The sizes of at most four axes.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    sizes: [usize; MAX_AXES],
    rank: usize,
}

/// The most axes that an array of a call has.
pub const MAX_AXES: usize = 4;

impl Dims {
    /// These sizes; an error if there are more than four.
    pub fn new(sizes: &[usize]) -> Result<Self> {
        let mut all = [1; MAX_AXES];
        match all.get_mut(..sizes.len()) {
            Some(first) => first.copy_from_slice(sizes),
            None => bail!("got an array of {} axes, expected at most {MAX_AXES}", sizes.len()),
        }
        Ok(Self { sizes: all, rank: sizes.len() })
    }
}

impl Deref for Dims {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.sizes[..self.rank]
    }
}

impl<const N: usize> From<[usize; N]> for Dims {
    fn from(sizes: [usize; N]) -> Self {
        const { assert!(N <= MAX_AXES) };
        let mut all = [1; MAX_AXES];
        all[..N].copy_from_slice(&sizes);
        Self { sizes: all, rank: N }
    }
}

/// A call that can be run.
pub struct Job {
    function: Function,
    geometry: Geometry,
    /// The shape of the result.
    pub result: Dims,
}

enum Geometry {
    Pointwise(Pointwise, Images),
    Depthwise(Depthwise),
    Channels(usize, Images),
}

impl Arguments {
    /// Arguments of a function with defaults for the rest.
    pub fn new(function: Function, layout: Order, weight_layout: WeightLayout) -> Self {
        Self {
            function,
            layout,
            weight_layout,
            groups: 1,
            step: 1,
            stride: 1,
            padding: Padding::Same,
            input_size: Size2::square(0),
            kernel_size: 0,
        }
    }

    /// Checks the call on arrays of these shapes, whose images lie in memory in `order`. Where they
    /// would fit other layouts, the error says so; `fixed` are those of a caller that has no such
    /// arguments.
    pub fn job(&self, shapes: &[&[usize]], order: Order, fixed: bool) -> Result<Job> {
        self.check(shapes, order).or_else(|error| match self.remedy(shapes, order, fixed) {
            Some(remedy) => bail!("{error}, or {remedy}"),
            None => Err(error),
        })
    }

    /// What would make a call right that is wrong.
    fn remedy(&self, shapes: &[&[usize]], order: Order, fixed: bool) -> Option<String> {
        let (layout, images) = match self.layout {
            Order::Nchw => (Order::Nhwc, r#"layout="NHWC""#),
            Order::Nhwc => (Order::Nchw, r#"layout="NCHW""#),
        };
        let (weight_layout, weights) = match self.weight_layout {
            WeightLayout::Oi => (WeightLayout::Io, r#"weight_layout="IO""#),
            WeightLayout::Io => (WeightLayout::Oi, r#"weight_layout="OI""#),
        };
        let fits = |other: Self| other.check(shapes, order).is_ok();
        if fits(Self { layout, ..*self }) {
            let permute = || format!("permute {} to {}", self.function.operands()[0], axes(self.layout));
            Some(if fixed { permute() } else { format!("pass {images}") })
        } else if fixed {
            None
        } else if fits(Self { weight_layout, ..*self }) {
            Some(format!("pass {weights}"))
        } else {
            fits(Self { layout, weight_layout, ..*self }).then(|| format!("pass {images}, {weights}"))
        }
    }

    fn check(&self, shapes: &[&[usize]], order: Order) -> Result<Job> {
        let names = self.function.operands();
        let optional = usize::from(names.len() == MAX_OPERANDS); // the bias
        if !(names.len() - optional..=names.len()).contains(&shapes.len()) {
            bail!("got {} operands, expected {}", shapes.len(), names.join(", "));
        }
        let batch = Batch::new(names[0], shapes[0], self.layout)?;
        let (geometry, result) = match self.function {
            Function::PointwiseConvGradBias => {
                let step = check_step("interleave", self.step)?;
                (Geometry::Channels(step, batch.images(order)), Dims::from([batch.channels]))
            }
            Function::Interleave | Function::Deinterleave => {
                let step = check_step("step", self.step)?;
                (Geometry::Channels(step, batch.images(order)), Dims::from(batch.shape(self.layout)))
            }
            Function::PointwiseConv | Function::PointwiseConvGradInput | Function::PointwiseConvGradWeight => {
                let (shape, result) = self.pointwise(batch, shapes)?;
                (Geometry::Pointwise(shape, batch.images(order)), result)
            }
            _ => {
                let (shape, result) = self.depthwise(batch, shapes, order)?;
                (Geometry::Depthwise(shape), result)
            }
        };
        Ok(Job { function: self.function, geometry, result })
    }

    fn pointwise(&self, batch: Batch, shapes: &[&[usize]]) -> Result<(Pointwise, Dims)> {
        let new = |c_in, c_out| Pointwise::new(c_in, c_out, self.groups, self.step, self.weight_layout);
        if self.function == Function::PointwiseConvGradWeight {
            let grad = Batch::new("grad_output", shapes[1], self.layout)?;
            self.expect_output(shapes[1], batch.with_channels(grad.channels))?;
            let shape = new(batch.channels, grad.channels)?;
            let (c_out, group_in) = (shape.out_channels, shape.group_in());
            let result = if self.weight_layout == WeightLayout::Oi { [c_out, group_in] } else { [group_in, c_out] };
            return Ok((shape, Dims::from(result)));
        }
        let weight = shapes[1];
        let expected = match self.weight_layout {
            WeightLayout::Oi => "(C_out, C_in/groups) or (C_out, C_in/groups, 1, 1)",
            WeightLayout::Io => "(C_in/groups, C_out) or (1, 1, C_in/groups, C_out)",
        };
        let Some((c_out, group_in)) = pointwise_axes(weight, self.weight_layout) else {
            bail!("weight has shape {weight:?}, expected {expected}")
        };
        let (c_in, result) = if self.function == Function::PointwiseConv {
            (batch.channels, c_out)
        } else {
            let channels = batch.channels;
            if self.groups >= 1 && c_out != channels {
                bail!("grad_output has {channels} channels, expected {c_out} as weight {weight:?} has");
            }
            let c_in = group_in.saturating_mul(usize::try_from(self.groups).unwrap_or(0));
            (c_in, c_in)
        };
        let shape = new(c_in, c_out)?;
        if shape.group_in() != group_in {
            bail!(
                "weight has shape {weight:?}, expected {expected} with C_in/groups={} for in_channels={c_in}, groups={}",
                shape.group_in(),
                shape.groups
            );
        }
        expect_bias(shapes.get(2), c_out)?;
        Ok((shape, Dims::from(batch.with_channels(result).shape(self.layout))))
    }

    fn depthwise(&self, batch: Batch, shapes: &[&[usize]], order: Order) -> Result<(Depthwise, Dims)> {
        let layout = self.weight_layout;
        let new = |size, kernel| {
            let Batch { count, channels, .. } = batch;
            Depthwise::new(count, channels, size, kernel, self.stride, self.padding, order, layout)
        };
        if self.function == Function::DepthwiseConvGradWeight {
            let shape = new(batch.size, check_kernel(self.kernel_size)?)?;
            self.expect_output(shapes[1], Batch { size: shape.output_size(), ..batch })?;
            let (c, k) = (shape.channels, shape.kernel);
            let result = if layout == WeightLayout::Oi { [c, k, k] } else { [k, k, c] };
            return Ok((shape, Dims::from(result)));
        }
        let kernel = match depthwise_axes(shapes[1], layout) {
            Some((channels, a, b)) if channels == batch.channels && a == b => a,
            _ => {
                let expected = match layout {
                    WeightLayout::Oi => "(C, k, k) or (C, 1, k, k)",
                    WeightLayout::Io => "(k, k, C) or (k, k, C, 1)",
                };
                bail!("weight has shape {:?}, expected {expected} with C={}", shapes[1], batch.channels)
            }
        };
        let forward = self.function == Function::DepthwiseConv;
        let shape = new(if forward { batch.size } else { self.input_size }, kernel)?;
        expect_bias(shapes.get(2), batch.channels)?;
        let output = Batch { size: shape.output_size(), ..batch };
        if forward {
            return Ok((shape, Dims::from(output.shape(self.layout))));
        }
        self.expect_output(shapes[0], output)?;
        Ok((shape, Dims::from(Batch { size: self.input_size, ..batch }.shape(self.layout))))
    }

    /// Checks the shape of a gradient by the output.
    fn expect_output(&self, found: &[usize], expected: Batch) -> Result<()> {
        expect_shape("grad_output", found, &expected.shape(self.layout))
    }

    /// Checks the shape of the array that a framework has for the result.
    pub fn expect_result(&self, found: &[usize], expected: &[usize]) -> Result<()> {
        // Weights may have axes of 1 more.
        let axes = |shape: &[usize]| match self.function {
            Function::PointwiseConvGradWeight => pointwise_axes(shape, self.weight_layout).map(|(c, i)| (c, i, 0)),
            _ => depthwise_axes(shape, self.weight_layout),
        };
        if self.function.makes_weight() && axes(found).is_some() && axes(found) == axes(expected) {
            return Ok(());
        }
        expect_shape("output", found, expected)
    }
}

/// Checks the shape of an array.
pub fn expect_shape(name: &str, found: &[usize], expected: &[usize]) -> Result<()> {
    if found == expected { Ok(()) } else { bail!("{name} has shape {found:?}, expected {expected:?}") }
}

/// Checks the number of values in one or more arrays.
pub fn expect_values(name: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { bail!("{name} has {found} values, expected {expected}") }
}

/// Checks that an array is a batch of images of these channels, height and width; how many there
/// are.
pub fn expect_images(name: &str, found: &[usize], layout: Order, size: [usize; 3]) -> Result<usize> {
    let count = Batch::new(name, found, layout)?.count;
    expect_shape(name, found, &Batch::of(count, size).shape(layout))?;
    Ok(count)
}

fn expect_bias(bias: Option<&&[usize]>, channels: usize) -> Result<()> {
    bias.map_or(Ok(()), |shape| expect_shape("bias", shape, &[channels]))
}

/// Output channels and a group's input channels of a pointwise weight.
fn pointwise_axes(weight: &[usize], layout: WeightLayout) -> Option<(usize, usize)> {
    match (layout, weight) {
        (WeightLayout::Oi, &[o, i] | &[o, i, 1, 1]) => Some((o, i)),
        (WeightLayout::Io, &[i, o] | &[1, 1, i, o]) => Some((o, i)),
        _ => None,
    }
}

/// Channels and the two sizes of the kernel of a depthwise weight.
pub fn depthwise_axes(weight: &[usize], layout: WeightLayout) -> Option<(usize, usize, usize)> {
    match (layout, weight) {
        (WeightLayout::Oi, &[c, a, b] | &[c, 1, a, b]) => Some((c, a, b)),
        (WeightLayout::Io, &[a, b, c] | &[a, b, c, 1]) => Some((c, a, b)),
        _ => None,
    }
}

impl Job {
    /// Whether an operand is a batch of images, which lie in memory in the job's order.
    pub fn is_images(&self, operand: usize) -> bool {
        operand == 0 || self.function.makes_weight()
    }

    /// Whether the result is a batch of images.
    pub fn makes_images(&self) -> bool {
        self.result.len() == 4
    }

    /// The algorithms for the call on values of type `T`, where there is a choice.
    pub fn explain<T: Element>(&self, isa: IsaKind) -> Option<Vec<Explained>> {
        let caps = Caps::new::<T>(isa);
        let direction = match self.function {
            Function::PointwiseConvGradInput | Function::DepthwiseConvGradInput => Direction::GradInput,
            Function::PointwiseConvGradWeight | Function::DepthwiseConvGradWeight => Direction::GradWeight,
            _ => Direction::Forward,
        };
        match self.geometry {
            Geometry::Pointwise(shape, images) if !images.is_empty() => {
                Some(conv1x1::explain(&conv1x1::plan::Problem::new(&caps, direction, &shape, images), &caps))
            }
            Geometry::Depthwise(shape) if shape.input_len().min(shape.output_len()) > 0 => {
                Some(dwconv::plan::explain(&dwconv::plan::Problem { shape, direction }, &caps))
            }
            Geometry::Channels(step, images) if self.function != Function::PointwiseConvGradBias => {
                if images.is_empty() {
                    return None;
                }
                let order = ChannelOrder { channels: images.channels, step: step.min(images.channels) };
                let (inverse, pixels) = (self.function == Function::Deinterleave, images.count * images.pixels);
                let problem = interleave::Problem::new(order, inverse, images.order, pixels, &caps);
                Some(interleave::explain(&problem, &caps))
            }
            _ => None,
        }
    }

    /// Computes the result from the operands' values.
    ///
    /// An error only where an algorithm is [forced](explain::force) that does not apply.
    pub fn run<T: Element>(&self, isa: IsaKind, operands: &[&[T]], result: &mut [MaybeUninit<T>]) -> Result<()> {
        let _forced = explain::force::<T>(self, isa)?;
        let (first, second) = (operands[0], operands.get(1).copied().unwrap_or_default());
        let bias = operands.get(2).copied();
        match (&self.geometry, self.function) {
            (Geometry::Pointwise(shape, images), Function::PointwiseConv) => {
                conv1x1::forward(isa, shape, *images, first, second, bias, result);
            }
            (Geometry::Pointwise(shape, images), Function::PointwiseConvGradInput) => {
                conv1x1::grad_input(isa, shape, *images, first, second, result);
            }
            (Geometry::Pointwise(shape, images), _) => {
                conv1x1::grad_weight(isa, shape, *images, first, second, result);
            }
            (Geometry::Depthwise(shape), Function::DepthwiseConv) => {
                dwconv::forward(isa, shape, first, second, bias, result);
            }
            (Geometry::Depthwise(shape), Function::DepthwiseConvGradInput) => {
                dwconv::grad_input(isa, shape, first, second, result);
            }
            (Geometry::Depthwise(shape), _) => dwconv::grad_weight(isa, shape, first, second, result),
            (&Geometry::Channels(step, images), Function::PointwiseConvGradBias) => {
                conv1x1::grad_bias(isa, step, images, first, result);
            }
            (Geometry::Channels(_, images), _) if images.is_empty() => {} // of however many channels
            (&Geometry::Channels(step, images), function) => {
                let inverse = function == Function::Deinterleave;
                let index = if inverse { interleave_dst_index } else { interleave_src_index };
                interleave::permute(isa, &index(images.channels, step), images, first, result);
            }
        }
        Ok(())
    }
}
