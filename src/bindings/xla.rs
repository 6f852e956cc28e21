//! XLA: the kernels as FFI handlers, which compiled JAX programs call on their own buffers.
//!
//! Handlers take the arguments of the NumPy functions of the same name: arrays as operands, keyword
//! arguments as attributes (64-bit integers, or strings). Buffers are dense and row-major, so here
//! the logical order of axes is the order in memory.

mod abi;
mod fused;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use self::abi::{Attribute, Buffer, Call, CallFrame, Handler, Output, XlaType};
use self::fused::{fused_backward, fused_forward, fused_infer};
use super::arrays::{layout, weight_layout};
use crate::error::{Result, bail};
use crate::isa;
use crate::kernels::Element;
use crate::ops::{depthwise, interleave, pointwise};
use crate::shape::{
    Depthwise, Images, Order, Padding, Pointwise, WeightLayout, check_step, interleave_places, interleave_sources,
};

/// A type that both XLA and the kernels know.
trait Float: XlaType + Element {}
impl<T: XlaType + Element> Float for T {}

/// Defines, for each function below, the handler that calls it for the type of its first result, and
/// `xla_handlers`, which hands them to Python.
macro_rules! handlers {
    ($($name:ident [$($output:ident),*]),* $(,)?) => {
        /// The handlers by the names of the NumPy functions, for `jax.ffi.register_ffi_target`.
        #[pyfunction]
        pub fn xla_handlers(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
            let handlers = PyDict::new(py);
            $({
                unsafe extern "C" fn handler(frame: *mut CallFrame) -> *mut std::ffi::c_void {
                    // SAFETY: XLA calls this with a frame of its own.
                    unsafe {
                        abi::serve(frame, |call, outputs| {
                            let [$($output),*] = outputs;
                            match first(&[$(&$output),*]).type_code() {
                                <f32 as XlaType>::CODE => $name::<f32>(call, $($output),*),
                                <f64 as XlaType>::CODE => $name::<f64>(call, $($output),*),
                                code => bail!("expected float32 or float64, got XLA's type {code}"),
                            }
                        })
                    }
                }
                handlers.set_item(stringify!($name), capsule(py, handler)?)?;
            })*
            Ok(handlers)
        }
    };
}

handlers! {
    pointwise_conv [output],
    pointwise_conv_grad_input [output],
    pointwise_conv_grad_weight [output],
    pointwise_conv_grad_bias [output],
    depthwise_conv [output],
    depthwise_conv_grad_input [output],
    depthwise_conv_grad_weight [output],
    interleave [output],
    deinterleave [output],
    fused_forward [output, statistics, workspace],
    fused_infer [output],
    fused_backward [grad_parameters, grad_input],
}

fn first<'a, 'b>(outputs: &[&'b Output<'a>]) -> &'b Output<'a> {
    outputs[0]
}

/// A capsule without a name, as `jax.ffi.pycapsule` makes them.
fn capsule(py: Python<'_>, handler: Handler) -> PyResult<Bound<'_, PyAny>> {
    // SAFETY: the pointer is that of a static function; a new capsule is an owned reference.
    unsafe {
        let capsule = pyo3::ffi::PyCapsule_New(handler as *mut _, std::ptr::null(), None);
        Bound::from_owned_ptr_or_err(py, capsule)
    }
}

fn pointwise_conv<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let (x, weight, bias) = weighted(call)?;
    let (images, out) = (images(call, &x)?, images(call, &output)?);
    let shape = pointwise_shape(call, images.channels, out.channels)?;
    bias.map_or(Ok(()), |bias| expect("bias", bias.dims()?, [out.channels]))?;
    expect("weight", weight.dims()?, weight_dims(&shape))?;
    expect("output", [out.count, out.pixels], [images.count, images.pixels])?;
    let bias = bias.map(|bias| bias.read()).transpose()?;
    pointwise::forward::<T>(isa::active()?, &shape, images, x.read()?, weight.read()?, bias, output.write()?);
    Ok(())
}

fn pointwise_conv_grad_input<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let [grad, weight] = call.operands()?;
    let (images, input) = (images(call, &grad)?, images(call, &output)?);
    let shape = pointwise_shape(call, input.channels, images.channels)?;
    expect("weight", weight.dims()?, weight_dims(&shape))?;
    expect("output", [input.count, input.pixels], [images.count, images.pixels])?;
    pointwise::grad_input::<T>(isa::active()?, &shape, images, grad.read()?, weight.read()?, output.write()?);
    Ok(())
}

fn pointwise_conv_grad_weight<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let [x, grad] = call.operands()?;
    let (images, out) = (images(call, &x)?, images(call, &grad)?);
    let shape = pointwise_shape(call, images.channels, out.channels)?;
    expect("weight", output.dims()?, weight_dims(&shape))?;
    expect("grad_output", [out.count, out.pixels], [images.count, images.pixels])?;
    pointwise::grad_weight::<T>(isa::active()?, &shape, images, x.read()?, grad.read()?, output.write()?);
    Ok(())
}

fn pointwise_conv_grad_bias<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let [grad] = call.operands()?;
    let images = images(call, &grad)?;
    expect("bias", output.dims()?, [images.channels])?;
    let step = check_step("interleave", call.integer("interleave")?)?;
    pointwise::grad_bias::<T>(isa::active()?, step, images, grad.read()?, output.write()?);
    Ok(())
}

fn depthwise_conv<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let (x, weight, bias) = weighted(call)?;
    let shape = depthwise_shape(call, &x, &weight)?;
    bias.map_or(Ok(()), |bias| expect("bias", bias.dims()?, [shape.channels]))?;
    expect("output", nchw(call, &output)?, output_dims(&shape))?;
    let bias = bias.map(|bias| bias.read()).transpose()?;
    depthwise::forward::<T>(isa::active()?, &shape, x.read()?, weight.read()?, bias, output.write()?);
    Ok(())
}

fn depthwise_conv_grad_input<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let [grad, weight] = call.operands()?;
    let shape = depthwise_shape(call, &output, &weight)?;
    expect("grad_output", nchw(call, &grad)?, output_dims(&shape))?;
    depthwise::grad_input::<T>(isa::active()?, &shape, grad.read()?, weight.read()?, output.write()?);
    Ok(())
}

fn depthwise_conv_grad_weight<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let [x, grad] = call.operands()?;
    let shape = depthwise_shape(call, &x, &output)?;
    expect("grad_output", nchw(call, &grad)?, output_dims(&shape))?;
    depthwise::grad_weight::<T>(isa::active()?, &shape, x.read()?, grad.read()?, output.write()?);
    Ok(())
}

fn interleave<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    permute::<T>(call, output, interleave_sources)
}

fn deinterleave<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    permute::<T>(call, output, interleave_places)
}

fn permute<T: Float>(call: &Call<'_>, output: Output<'_>, sources: fn(usize, usize) -> Vec<usize>) -> Result<()> {
    let [x] = call.operands()?;
    let images = images(call, &x)?;
    expect("output", output.dims()?, x.dims::<4>()?)?;
    let step = check_step("step", call.integer("step")?)?;
    interleave::permute::<T>(&sources(images.channels, step), images, x.read()?, output.write()?);
    Ok(())
}

/// Image, weight and, if there is a third operand, bias.
fn weighted<'a>(call: &Call<'a>) -> Result<(Buffer<'a>, Buffer<'a>, Option<Buffer<'a>>)> {
    if call.operand_count() == 2 {
        call.operands().map(|[x, weight]| (x, weight, None))
    } else {
        call.operands().map(|[x, weight, bias]| (x, weight, Some(bias)))
    }
}

fn expect<const N: usize>(what: &str, found: [usize; N], expected: [usize; N]) -> Result<()> {
    if found == expected { Ok(()) } else { bail!("{what} has the sizes {found:?}, expected {expected:?}") }
}

/// The order of an image's axes.
fn order(call: &Call<'_>) -> Result<Order> {
    layout(call.text("layout")?)
}

/// Number, channels, height and width of a batch of images.
fn nchw(call: &Call<'_>, buffer: &Buffer<'_>) -> Result<[usize; 4]> {
    let [a, b, c, d] = buffer.dims()?;
    Ok(match order(call)? {
        Order::Nchw => [a, b, c, d],
        Order::Nhwc => [a, d, b, c],
    })
}

fn images(call: &Call<'_>, buffer: &Buffer<'_>) -> Result<Images> {
    let [count, channels, height, width] = nchw(call, buffer)?;
    Ok(Images { count, pixels: height * width, channels, order: order(call)? })
}

fn pointwise_shape(call: &Call<'_>, in_channels: usize, out_channels: usize) -> Result<Pointwise> {
    let (groups, step) = (call.integer("groups")?, call.integer("interleave")?);
    Pointwise::new(in_channels, out_channels, groups, step, weight_layout(call.text("weight_layout")?)?)
}

fn weight_dims(shape: &Pointwise) -> [usize; 2] {
    match shape.weight_layout {
        WeightLayout::Oi => [shape.out_channels, shape.group_in()],
        WeightLayout::Io => [shape.group_in(), shape.out_channels],
    }
}

fn depthwise_shape(call: &Call<'_>, x: &Buffer<'_>, weight: &Buffer<'_>) -> Result<Depthwise> {
    let padding = match call.attribute("padding")? {
        Attribute::Text("same") => Padding::Same,
        Attribute::Text("valid") => Padding::Valid,
        Attribute::Integer(side @ 0..) => Padding::Explicit([side as usize; 2], [side as usize; 2]),
        Attribute::Integers(&[top, bottom, left, right]) if top.min(bottom).min(left).min(right) >= 0 => {
            Padding::Explicit([top as usize, bottom as usize], [left as usize, right as usize])
        }
        other => bail!("padding={other:?}, expected \"same\", \"valid\" or the pixels of each side"),
    };
    let [count, channels, height, width] = nchw(call, x)?;
    let [a, b, c] = weight.dims()?;
    let layout = weight_layout(call.text("weight_layout")?)?;
    let (kernel, weight_dims) = match layout {
        WeightLayout::Oi => (b, [channels, b, b]),
        WeightLayout::Io => (a, [a, a, channels]),
    };
    expect("weight", [a, b, c], weight_dims)?;
    let stride = call.integer("stride")?;
    Depthwise::new([count, channels], [height, width], kernel, stride, padding, order(call)?, layout)
}

fn output_dims(shape: &Depthwise) -> [usize; 4] {
    [shape.count, shape.channels, shape.vertical.output, shape.horizontal.output]
}
