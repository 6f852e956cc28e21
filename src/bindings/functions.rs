//! The operations for frameworks that call the kernels on their own buffers.
//!
//! They take the arguments of the NumPy functions of the same name: arrays as operands, keyword
//! arguments as attributes (64-bit integers, or strings).

mod fused;

pub use self::fused::{
    fused_backward, fused_backward_results, fused_forward, fused_forward_results, fused_infer, fused_infer_result,
};
use super::arrays::{layout, weight_layout};
use super::call::{Array, Attribute, Buffer, Call, Float, Output};
use crate::error::{Result, bail};
use crate::shape::{
    Depthwise, Images, Order, Padding, Pointwise, Sides, Size2, WeightLayout, check_step, interleave_dst_index,
    interleave_src_index,
};
use crate::simd;
use crate::{conv1x1, dwconv, interleave};

pub fn pointwise_conv<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let (x, weight, bias) = weighted(call)?;
    let (images, out) = (images(call, &x)?, images(call, &output)?);
    let shape = pointwise_shape(call, images.channels, out.channels)?;
    bias.map_or(Ok(()), |bias| expect("bias", bias.dims()?, [out.channels]))?;
    expect("weight", pointwise_weight(call, &weight)?, weight_dims(&shape))?;
    expect("output", [out.count, out.pixels], [images.count, images.pixels])?;
    let bias = bias.map(|bias| bias.read()).transpose()?;
    conv1x1::forward::<T>(simd::active()?, &shape, images, x.read()?, weight.read()?, bias, output.write()?);
    Ok(())
}

pub fn pointwise_conv_grad_input<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let [grad, weight] = call.operands()?;
    let (images, input) = (images(call, &grad)?, images(call, &output)?);
    let shape = pointwise_shape(call, input.channels, images.channels)?;
    expect("weight", pointwise_weight(call, &weight)?, weight_dims(&shape))?;
    expect("output", [input.count, input.pixels], [images.count, images.pixels])?;
    conv1x1::grad_input::<T>(simd::active()?, &shape, images, grad.read()?, weight.read()?, output.write()?);
    Ok(())
}

pub fn pointwise_conv_grad_weight<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let [x, grad] = call.operands()?;
    let (images, out) = (images(call, &x)?, images(call, &grad)?);
    let shape = pointwise_shape(call, images.channels, out.channels)?;
    expect("weight", pointwise_weight(call, &output)?, weight_dims(&shape))?;
    expect("grad_output", [out.count, out.pixels], [images.count, images.pixels])?;
    conv1x1::grad_weight::<T>(simd::active()?, &shape, images, x.read()?, grad.read()?, output.write()?);
    Ok(())
}

pub fn pointwise_conv_grad_bias<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let [grad] = call.operands()?;
    let images = images(call, &grad)?;
    expect("bias", output.dims()?, [images.channels])?;
    let step = check_step("interleave", call.integer("interleave")?)?;
    conv1x1::grad_bias::<T>(simd::active()?, step, images, grad.read()?, output.write()?);
    Ok(())
}

pub fn depthwise_conv<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let (x, weight, bias) = weighted(call)?;
    let shape = depthwise_shape(call, &x, &weight)?;
    bias.map_or(Ok(()), |bias| expect("bias", bias.dims()?, [shape.channels]))?;
    expect("output", nchw(call, &output)?, output_dims(&shape))?;
    let bias = bias.map(|bias| bias.read()).transpose()?;
    dwconv::forward::<T>(simd::active()?, &shape, x.read()?, weight.read()?, bias, output.write()?);
    Ok(())
}

pub fn depthwise_conv_grad_input<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let [grad, weight] = call.operands()?;
    let shape = depthwise_shape(call, &output, &weight)?;
    expect("grad_output", nchw(call, &grad)?, output_dims(&shape))?;
    dwconv::grad_input::<T>(simd::active()?, &shape, grad.read()?, weight.read()?, output.write()?);
    Ok(())
}

pub fn depthwise_conv_grad_weight<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let [x, grad] = call.operands()?;
    let shape = depthwise_shape(call, &x, &output)?;
    expect("grad_output", nchw(call, &grad)?, output_dims(&shape))?;
    dwconv::grad_weight::<T>(simd::active()?, &shape, x.read()?, grad.read()?, output.write()?);
    Ok(())
}

pub fn interleave<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    permute::<T>(call, output, interleave_src_index)
}

pub fn deinterleave<T: Float>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    permute::<T>(call, output, interleave_dst_index)
}

fn permute<T: Float>(call: &Call<'_>, output: Output<'_>, sources: fn(usize, usize) -> Vec<usize>) -> Result<()> {
    let [x] = call.operands()?;
    let images = images(call, &x)?;
    expect("output", output.dims()?, x.dims::<4>()?)?;
    let step = check_step("step", call.integer("step")?)?;
    interleave::permute::<T>(simd::active()?, &sources(images.channels, step), images, x.read()?, output.write()?);
    Ok(())
}

/// The sizes of the result of [`pointwise_conv`].
pub fn pointwise_conv_result(call: &Call<'_>) -> Result<Vec<Vec<usize>>> {
    let (x, weight, _) = weighted(call)?;
    let [a, b] = pointwise_weight(call, &weight)?;
    let channels = if weight_layout(call.text("weight_layout")?)? == WeightLayout::Oi { a } else { b };
    let [count, _, height, width] = nchw(call, &x)?;
    Ok(vec![in_order(order(call)?, [count, channels, height, width]).to_vec()])
}

/// The sizes of the result of [`depthwise_conv`].
pub fn depthwise_conv_result(call: &Call<'_>) -> Result<Vec<Vec<usize>>> {
    let (x, weight, _) = weighted(call)?;
    let shape = depthwise_shape(call, &x, &weight)?;
    Ok(vec![in_order(shape.order, output_dims(&shape)).to_vec()])
}

fn in_order(order: Order, [count, channels, height, width]: [usize; 4]) -> [usize; 4] {
    match order {
        Order::Nchw => [count, channels, height, width],
        Order::Nhwc => [count, height, width, channels],
    }
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
fn nchw(call: &Call<'_>, array: &Array) -> Result<[usize; 4]> {
    let [a, b, c, d] = array.dims()?;
    Ok(match order(call)? {
        Order::Nchw => [a, b, c, d],
        Order::Nhwc => [a, d, b, c],
    })
}

fn images(call: &Call<'_>, array: &Array) -> Result<Images> {
    let [count, channels, height, width] = nchw(call, array)?;
    Ok(Images { count, pixels: height * width, channels, order: order(call)? })
}

fn pointwise_shape(call: &Call<'_>, in_channels: usize, out_channels: usize) -> Result<Pointwise> {
    let (groups, step) = (call.integer("groups")?, call.integer("interleave")?);
    Pointwise::new(in_channels, out_channels, groups, step, weight_layout(call.text("weight_layout")?)?)
}

/// A pointwise weight's axes without those of its one pixel.
fn pointwise_weight(call: &Call<'_>, weight: &Array) -> Result<[usize; 2]> {
    match (weight_layout(call.text("weight_layout")?)?, weight.all_dims()) {
        (WeightLayout::Oi, &[a, b, 1, 1]) | (WeightLayout::Io, &[1, 1, a, b]) => Ok([a, b]),
        _ => weight.dims(),
    }
}

fn weight_dims(shape: &Pointwise) -> [usize; 2] {
    match shape.weight_layout {
        WeightLayout::Oi => [shape.out_channels, shape.group_in()],
        WeightLayout::Io => [shape.group_in(), shape.out_channels],
    }
}

fn depthwise_shape(call: &Call<'_>, x: &Array, weight: &Array) -> Result<Depthwise> {
    let padding = match call.attribute("padding")? {
        Attribute::Text("same") | Attribute::Integers(&[]) => Padding::Same,
        Attribute::Text("valid") => Padding::Valid,
        Attribute::Integer(side @ 0..) => Padding::Explicit(Sides::all(side as usize)),
        Attribute::Integers(&[top, bottom, left, right]) if top.min(bottom).min(left).min(right) >= 0 => {
            let [top, bottom, left, right] = [top, bottom, left, right].map(|side| side as usize);
            Padding::Explicit(Sides { top, bottom, left, right })
        }
        other => bail!("padding={other:?}, expected \"same\", \"valid\" or the pixels of each side"),
    };
    let [count, channels, height, width] = nchw(call, x)?;
    let layout = weight_layout(call.text("weight_layout")?)?;
    let [a, b, c] = match (layout, weight.all_dims()) {
        (WeightLayout::Oi, &[a, 1, b, c]) | (WeightLayout::Io, &[a, b, c, 1]) => [a, b, c],
        _ => weight.dims()?,
    };
    let (kernel, weight_dims) = match layout {
        WeightLayout::Oi => (b, [channels, b, b]),
        WeightLayout::Io => (a, [a, a, channels]),
    };
    expect("weight", [a, b, c], weight_dims)?;
    let stride = call.integer("stride")?;
    Depthwise::new(count, channels, Size2 { height, width }, kernel, stride, padding, order(call)?, layout)
}

fn output_dims(shape: &Depthwise) -> [usize; 4] {
    [shape.count, shape.channels, shape.vertical.output, shape.horizontal.output]
}
