//! The functions for frameworks that call the kernels on their own buffers.
//!
//! They take the arguments of the NumPy functions of the same name: arrays as operands, keyword
//! arguments as attributes (64-bit integers, or strings). An argument that only tells the shape of
//! the result is read from there.

mod fused;

use smallvec::SmallVec;

use self::fused::Pass;
use super::arrays::by_dtype;
use super::call::{Attribute, Call, Float, Output};
use super::operation::{
    Arguments, Batch, Dims, EXPECTED_PADDING, Function, MAX_OPERANDS, depthwise_axes, layout, named_padding,
    padding_of_sides, weight_layout,
};
use crate::error::{Error, Result, bail};
use crate::shape::{Padding, WeightLayout};
use crate::simd;

/// A function as frameworks see it.
pub struct Signature {
    /// The NumPy function's name.
    pub name: &'static str,
    /// The names of the operands; "bias" may be missing.
    pub operands: &'static [&'static str],
    /// The attributes with their types in TensorFlow.
    pub attributes: &'static [&'static str],
    /// The names of the results.
    pub results: &'static [&'static str],
    kernel: Kernel,
}

#[derive(Clone, Copy)]
enum Kernel {
    Single(Function),
    Fused(Pass),
}

const POINTWISE: &[&str] = &["groups: int", "interleave: int", "layout: string", "weight_layout: string"];
/// In TensorFlow `padding` is empty for "same", or has the pixels at the top, bottom, left and
/// right.
const DEPTHWISE: &[&str] = &["stride: int", "padding: list(int)", "layout: string", "weight_layout: string"];
const BIAS: &[&str] = &["interleave: int", "layout: string"];
const PERMUTATION: &[&str] = &["step: int", "layout: string"];

const fn single(name: &'static str, function: Function, attributes: &'static [&'static str]) -> Signature {
    let (operands, kernel) = (function.operands(), Kernel::Single(function));
    Signature { name, operands, attributes, results: &["output"], kernel }
}

const fn fused(name: &'static str, pass: Pass, attributes: &'static [&'static str]) -> Signature {
    Signature { name, operands: pass.operands(), attributes, results: pass.results(), kernel: Kernel::Fused(pass) }
}

/// All of them.
pub static SIGNATURES: [Signature; 12] = [
    single("pointwise_conv", Function::PointwiseConv, POINTWISE),
    single("pointwise_conv_grad_input", Function::PointwiseConvGradInput, POINTWISE),
    single("pointwise_conv_grad_weight", Function::PointwiseConvGradWeight, POINTWISE),
    single("pointwise_conv_grad_bias", Function::PointwiseConvGradBias, BIAS),
    single("depthwise_conv", Function::DepthwiseConv, DEPTHWISE),
    single("depthwise_conv_grad_input", Function::DepthwiseConvGradInput, DEPTHWISE),
    single("depthwise_conv_grad_weight", Function::DepthwiseConvGradWeight, DEPTHWISE),
    single("interleave", Function::Interleave, PERMUTATION),
    single("deinterleave", Function::Deinterleave, PERMUTATION),
    fused("fused_forward", Pass::Forward, &["program: list(int)", "layout: string"]),
    fused("fused_infer", Pass::Infer, &["program: list(int)", "layout: string"]),
    fused("fused_backward", Pass::Backward, &["program: list(int)", "layout: string", "frozen: int"]),
];

/// The instances for all [`SIGNATURES`] of a function that is generic over the index in that table.
macro_rules! for_each_signature {
    ($f:ident) => {{
        use $f as f;
        [f::<0>, f::<1>, f::<2>, f::<3>, f::<4>, f::<5>, f::<6>, f::<7>, f::<8>, f::<9>, f::<10>, f::<11>]
    }};
}
pub(super) use for_each_signature;

impl Signature {
    /// The name of TensorFlow's operation: the function's in CamelCase.
    pub fn operation(&self) -> String {
        // Saved models have this one by a shorter name.
        let name = if self.name == "pointwise_conv_grad_bias" { "grad_bias" } else { self.name };
        let capitalized = |word: &str| word[..1].to_uppercase() + &word[1..];
        format!("Kconv{}", name.split('_').map(capitalized).collect::<String>())
    }

    /// Where a framework learns the result's shape.
    pub fn result_like(&self) -> ResultLike {
        match self.kernel {
            Kernel::Single(Function::Interleave | Function::Deinterleave) => ResultLike::Operand,
            Kernel::Single(Function::PointwiseConv | Function::DepthwiseConv) | Kernel::Fused(_) => ResultLike::Nothing,
            Kernel::Single(_) => ResultLike::Unknown,
        }
    }

    /// The shapes of the results, which for gradients the caller knows.
    pub fn result_shapes(&self, call: &Call<'_>) -> Result<Vec<Dims>> {
        match self.kernel {
            Kernel::Single(function) => {
                let arguments = read(function, call, None)?;
                Ok(vec![arguments.job(&shapes(call), arguments.layout, false)?.result])
            }
            Kernel::Fused(pass) => fused::result_shapes(pass, call),
        }
    }

    /// Whether an operand or a result is of the first operand's dtype, or else of what that is
    /// computed with.
    pub fn is_stored(&self, name: &str) -> bool {
        matches!(self.kernel, Kernel::Single(_)) || fused::is_stored(name)
    }

    /// Computes the results.
    pub fn run(&self, call: &Call<'_>, outputs: Vec<Output<'_>>) -> Result<()> {
        if outputs.len() != self.results.len() {
            bail!("got {} results, expected {}", outputs.len(), self.results.join(", "));
        }
        match self.kernel {
            Kernel::Single(function) => by_dtype!(outputs[0].dtype(), T => run_single::<T>(function, call, outputs)),
            Kernel::Fused(pass) => by_dtype!(fused::dtype(pass, call)?, S => fused::run::<S>(pass, call, outputs)),
        }
    }
}

/// What has the shape of a function's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResultLike {
    /// The only operand.
    Operand,
    /// Nothing that the function reads: the caller must say.
    Unknown,
    /// Nothing; it follows from operands and attributes.
    Nothing,
}

fn shapes<'a>(call: &'a Call<'_>) -> SmallVec<[&'a [usize]; MAX_OPERANDS]> {
    call.operand_list().iter().map(|operand| &operand.shape()[..]).collect()
}

fn run_single<T: Float>(function: Function, call: &Call<'_>, outputs: Vec<Output<'_>>) -> Result<()> {
    let Ok([output]) = <[Output<'_>; 1]>::try_from(outputs) else { bail!("expected one result") };
    let arguments = read(function, call, Some(output.shape()))?;
    let job = arguments.job(&shapes(call), arguments.layout, false)?;
    arguments.expect_result(output.shape(), &job.result)?;
    let operands = call.operand_list().iter().map(|operand| operand.read::<T>());
    let operands = operands.collect::<Result<SmallVec<[_; MAX_OPERANDS]>>>()?;
    job.run(simd::active()?, &operands, output.write()?)
}

/// Reads a function's arguments from a call's attributes and the shape of its result.
fn read(function: Function, call: &Call<'_>, output: Option<&[usize]>) -> Result<Arguments> {
    let layout = layout(call.text("layout")?)?;
    let weight_layout = || weight_layout(call.text("weight_layout")?);
    let mut arguments = Arguments::new(function, layout, WeightLayout::Oi);
    match function {
        Function::PointwiseConv | Function::PointwiseConvGradInput | Function::PointwiseConvGradWeight => {
            arguments.weight_layout = weight_layout()?;
            arguments.groups = call.integer("groups")?;
            arguments.step = call.integer("interleave")?;
        }
        Function::PointwiseConvGradBias => arguments.step = call.integer("interleave")?,
        Function::Interleave | Function::Deinterleave => arguments.step = call.integer("step")?,
        Function::DepthwiseConv | Function::DepthwiseConvGradInput | Function::DepthwiseConvGradWeight => {
            arguments.weight_layout = weight_layout()?;
            arguments.stride = call.integer("stride")?;
            arguments.padding = padding(call)?;
        }
    }
    match (function, output) {
        (Function::DepthwiseConvGradInput, Some(shape)) => {
            arguments.input_size = Batch::new("output", shape, layout)?.size;
        }
        (Function::DepthwiseConvGradWeight, Some(shape)) => {
            let kernel = depthwise_axes(shape, arguments.weight_layout).map(|(_, rows, _)| rows);
            let unknown = || Error::new(format!("output has shape {shape:?}, expected that of a weight"));
            arguments.kernel_size = kernel.ok_or_else(unknown)? as i64;
        }
        _ => {}
    }
    Ok(arguments)
}

fn padding(call: &Call<'_>) -> Result<Padding> {
    let found = call.attribute("padding")?;
    let padding = match found {
        Attribute::Text(name) => named_padding(name),
        Attribute::Integer(all) => padding_of_sides([all; 4]),
        Attribute::Integers(&[]) => Some(Padding::Same),
        Attribute::Integers(&[top, bottom, left, right]) => padding_of_sides([top, bottom, left, right]),
        Attribute::Integers(_) => None,
    };
    match padding {
        Some(padding) => Ok(padding),
        None => bail!("padding={found}, {EXPECTED_PADDING}"),
    }
}
