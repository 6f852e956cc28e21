//! The functions on NumPy arrays. Their documentation is Python's: shapes, errors and examples.

use pyo3::prelude::*;

use super::arrays::{
    ArrayElement, Input, Output, Values, by_dtype, dtype, image_axes, input_size, integers, layout, padding,
    weight_layout,
};
use super::{active, compute};
use crate::error::{Error, Result, bail};
use crate::shape::{
    Depthwise, Images, Order, Padding, Pointwise, Size2, WeightLayout, check_kernel, check_step, interleave_dst_index,
    interleave_src_index,
};

type Any<'py> = Bound<'py, PyAny>;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    for function in [
        wrap_pyfunction!(pointwise_conv, module)?,
        wrap_pyfunction!(pointwise_conv_grad_input, module)?,
        wrap_pyfunction!(pointwise_conv_grad_weight, module)?,
        wrap_pyfunction!(pointwise_conv_grad_bias, module)?,
        wrap_pyfunction!(interleave, module)?,
        wrap_pyfunction!(deinterleave, module)?,
        wrap_pyfunction!(depthwise_conv, module)?,
        wrap_pyfunction!(depthwise_conv_grad_input, module)?,
        wrap_pyfunction!(depthwise_conv_grad_weight, module)?,
    ] {
        module.add_function(function)?;
    }
    Ok(())
}

/// The logical shape of images with other channels.
fn with_channels(shape: &[usize], layout: Order, channels: usize) -> [usize; 4] {
    match layout {
        Order::Nchw => [shape[0], channels, shape[2], shape[3]],
        Order::Nhwc => [shape[0], shape[1], shape[2], channels],
    }
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
fn depthwise_axes(weight: &[usize], layout: WeightLayout) -> Option<(usize, [usize; 2])> {
    match (layout, weight) {
        (WeightLayout::Oi, &[c, a, b] | &[c, 1, a, b]) => Some((c, [a, b])),
        (WeightLayout::Io, &[a, b, c] | &[a, b, c, 1]) => Some((c, [a, b])),
        _ => None,
    }
}

/// Checks a pointwise weight against the channels that are known.
fn pointwise_shape(
    weight: &[usize],
    channels: usize,
    channels_are_input: bool,
    groups: i64,
    interleave: i64,
    layout: WeightLayout,
) -> Result<Pointwise> {
    let expected = match layout {
        WeightLayout::Oi => "(C_out, C_in/groups) or (C_out, C_in/groups, 1, 1)",
        WeightLayout::Io => "(C_in/groups, C_out) or (1, 1, C_in/groups, C_out)",
    };
    let Some((c_out, group_in)) = pointwise_axes(weight, layout) else {
        bail!("weight has shape {weight:?}, expected {expected}")
    };
    let c_in =
        if channels_are_input { channels } else { group_in.saturating_mul(usize::try_from(groups).unwrap_or(0)) };
    if !channels_are_input && groups >= 1 && c_out != channels {
        bail!("grad_output has {channels} channels, expected {c_out} as weight {weight:?} has");
    }
    let shape = Pointwise::new(c_in, c_out, groups, interleave, layout)?;
    if shape.group_in() != group_in {
        bail!(
            "weight has shape {weight:?}, expected {expected} with C_in/groups={} for in_channels={c_in}, groups={groups}",
            shape.group_in()
        );
    }
    Ok(shape)
}

fn bias_values<T: ArrayElement>(bias: Option<&Input<'_, T>>, channels: usize) -> PyResult<Option<Values<T>>> {
    let Some(bias) = bias else { return Ok(None) };
    if bias.shape() != [channels] {
        return Err(Error::new(format!("bias has shape {:?}, expected [{channels}]", bias.shape())).into());
    }
    bias.values().map(Some)
}

/// Grouped pointwise (1x1) convolution, its output interleaved.
///
/// Output channel ``o`` of group ``g`` is ``bias[o] + sum over i of weight[o, i] * x[channel i of group g]``; then the
/// output's channels are interleaved by ``interleave`` at no cost (section 2 of "Grouped Pointwise Convolutions Reduce
/// Parameters in Convolutional Neural Networks", MENDEL 28(1), 2022).
///
/// Args:
///     x: (N, C_in, H, W), or (N, H, W, C_in) with ``layout="NHWC"``; float32, float64 or bfloat16 (ml_dtypes'; sums are of
///         float32, and rounded once). Used where it is when its memory is contiguous in either order of axes; the result's
///         memory then has the same order. Arrays may also be DLPack capsules of such tensors on the CPU; the result is a
///         capsule where ``x`` is one.
///     weight: (C_out, C_in/groups[, 1, 1]), or ([1, 1,] C_in/groups, C_out) with ``weight_layout="IO"``; dtype of ``x``.
///     bias: (C_out,) or None.
///     groups: Number of groups; divides C_in and C_out.
///     interleave: Step by which the output's channels are interleaved; 1 leaves them.
///     layout: "NCHW" or "NHWC".
///     weight_layout: "OI" (PyTorch's order) or "IO" (Keras's).
///     out: Array for the result, or None for a new one.
///
/// Returns:
///     (N, C_out, H, W) or (N, H, W, C_out).
///
/// Raises:
///     ValueError: If shapes, groups, step or a layout's name do not fit.
///     TypeError: If an array is not float32, float64 or bfloat16, or dtypes differ.
///
/// Example:
///     >>> x = np.ones((2, 6, 5, 5), np.float32)
///     >>> weight = np.ones((4, 3), np.float32)
///     >>> kconv.pointwise_conv(x, weight, groups=2, interleave=2).shape
///     (2, 4, 5, 5)
#[pyfunction]
#[pyo3(signature = (x, weight, bias=None, *, groups=1, interleave=1, layout="NCHW", weight_layout="OI", out=None))]
fn pointwise_conv<'py>(
    py: Python<'py>,
    x: &Any<'py>,
    weight: &Any<'py>,
    bias: Option<&Any<'py>>,
    #[pyo3(from_py_with = integers::groups)] groups: i64,
    #[pyo3(from_py_with = integers::interleave)] interleave: i64,
    layout: &str,
    weight_layout: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    by_dtype!(
        dtype("x", x)?,
        T => pointwise_forward::<T>(py, x, weight, bias, groups, interleave, layout, weight_layout, out)
    )
}

fn pointwise_forward<'py, T: ArrayElement>(
    py: Python<'py>,
    x: &Any<'py>,
    weight: &Any<'py>,
    bias: Option<&Any<'py>>,
    groups: i64,
    interleave: i64,
    layout_name: &str,
    weight_layout_name: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    let (x, weight) = (Input::<T>::new("x", x)?, Input::<T>::new("weight", weight)?);
    let bias = bias.map(|bias| Input::<T>::new("bias", bias)).transpose()?;
    let (layout, weight_layout) = (layout(layout_name)?, weight_layout(weight_layout_name)?);
    let images = x.images(layout)?;
    let shape = pointwise_shape(weight.shape(), images.channels, true, groups, interleave, weight_layout)?;
    let bias_values = bias_values(bias.as_ref(), shape.out_channels)?;
    let mut inputs = vec![&x, &weight];
    inputs.extend(&bias);
    let y_shape = with_channels(x.shape(), layout, shape.out_channels);
    let mut y = Output::images(py, y_shape, layout, images.order, out, &inputs)?;
    let (x, weight, mut memory) = (x.image_values(layout, images.order)?, weight.values()?, y.memory());
    let isa = active()?;
    compute(py, || {
        let bias = bias_values.as_ref().map(Values::as_slice);
        crate::conv1x1::forward(isa, &shape, images, x.as_slice(), weight.as_slice(), bias, memory.as_mut_slice());
    })?;
    y.finish()
}

/// Gradient of :func:`pointwise_conv` by its input.
///
/// Args:
///     grad_output: (N, C_out, H, W) or (N, H, W, C_out): the gradient by the (interleaved) output.
///     weight: As for :func:`pointwise_conv`.
///     groups: As in the forward call.
///     interleave: As in the forward call.
///     layout: "NCHW" or "NHWC".
///     weight_layout: "OI" or "IO".
///     out: Array for the result, or None for a new one.
///
/// Returns:
///     (N, C_in, H, W) or (N, H, W, C_in).
///
/// Raises:
///     ValueError: If shapes, groups, step or a layout's name do not fit.
///     TypeError: If an array is not float32, float64 or bfloat16, or dtypes differ.
///
/// Example:
///     >>> grad_output = np.ones((2, 4, 5, 5), np.float32)
///     >>> weight = np.ones((4, 3), np.float32)
///     >>> kconv.pointwise_conv_grad_input(grad_output, weight, groups=2).shape
///     (2, 6, 5, 5)
#[pyfunction]
#[pyo3(signature = (grad_output, weight, *, groups=1, interleave=1, layout="NCHW", weight_layout="OI", out=None))]
fn pointwise_conv_grad_input<'py>(
    py: Python<'py>,
    grad_output: &Any<'py>,
    weight: &Any<'py>,
    #[pyo3(from_py_with = integers::groups)] groups: i64,
    #[pyo3(from_py_with = integers::interleave)] interleave: i64,
    layout: &str,
    weight_layout: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    by_dtype!(
        dtype("grad_output", grad_output)?,
        T => pointwise_grad_input::<T>(py, grad_output, weight, groups, interleave, layout, weight_layout, out)
    )
}

fn pointwise_grad_input<'py, T: ArrayElement>(
    py: Python<'py>,
    grad_output: &Any<'py>,
    weight: &Any<'py>,
    groups: i64,
    interleave: i64,
    layout_name: &str,
    weight_layout_name: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    let (gy, weight) = (Input::<T>::new("grad_output", grad_output)?, Input::<T>::new("weight", weight)?);
    let (layout, weight_layout) = (layout(layout_name)?, weight_layout(weight_layout_name)?);
    let images = gy.images(layout)?;
    let shape = pointwise_shape(weight.shape(), images.channels, false, groups, interleave, weight_layout)?;
    let x_shape = with_channels(gy.shape(), layout, shape.in_channels);
    let mut gx = Output::images(py, x_shape, layout, images.order, out, &[&gy, &weight])?;
    let (gy, weight, mut memory) = (gy.image_values(layout, images.order)?, weight.values()?, gx.memory());
    let isa = active()?;
    compute(py, || {
        crate::conv1x1::grad_input(isa, &shape, images, gy.as_slice(), weight.as_slice(), memory.as_mut_slice());
    })?;
    gx.finish()
}

/// Gradient of :func:`pointwise_conv` by its weight.
///
/// Args:
///     x: As for :func:`pointwise_conv`.
///     grad_output: (N, C_out, H, W) or (N, H, W, C_out): the gradient by the (interleaved) output.
///     groups: As in the forward call.
///     interleave: As in the forward call.
///     layout: "NCHW" or "NHWC".
///     weight_layout: "OI" or "IO".
///     out: Array for the result, or None for a new one.
///
/// Returns:
///     (C_out, C_in/groups), or (C_in/groups, C_out) with ``weight_layout="IO"``. It does not depend on the number of
///     threads.
///
/// Raises:
///     ValueError: If shapes, groups, step or a layout's name do not fit.
///     TypeError: If an array is not float32, float64 or bfloat16, or dtypes differ.
///
/// Example:
///     >>> x, grad_output = np.ones((2, 6, 5, 5)), np.ones((2, 4, 5, 5))
///     >>> kconv.pointwise_conv_grad_weight(x, grad_output, groups=2).shape
///     (4, 3)
#[pyfunction]
#[pyo3(signature = (x, grad_output, *, groups=1, interleave=1, layout="NCHW", weight_layout="OI", out=None))]
fn pointwise_conv_grad_weight<'py>(
    py: Python<'py>,
    x: &Any<'py>,
    grad_output: &Any<'py>,
    #[pyo3(from_py_with = integers::groups)] groups: i64,
    #[pyo3(from_py_with = integers::interleave)] interleave: i64,
    layout: &str,
    weight_layout: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    by_dtype!(
        dtype("x", x)?,
        T => pointwise_grad_weight::<T>(py, x, grad_output, groups, interleave, layout, weight_layout, out)
    )
}

fn pointwise_grad_weight<'py, T: ArrayElement>(
    py: Python<'py>,
    x: &Any<'py>,
    grad_output: &Any<'py>,
    groups: i64,
    interleave: i64,
    layout_name: &str,
    weight_layout_name: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    let (x, gy) = (Input::<T>::new("x", x)?, Input::<T>::new("grad_output", grad_output)?);
    let (layout, weight_layout) = (layout(layout_name)?, weight_layout(weight_layout_name)?);
    let images = x.images(layout)?;
    let c_out = gy.images(layout)?.channels;
    check_images(&x, &gy, layout)?;
    let shape = Pointwise::new(images.channels, c_out, groups, interleave, weight_layout)?;
    let w_shape = match weight_layout {
        WeightLayout::Oi => [shape.out_channels, shape.group_in()],
        WeightLayout::Io => [shape.group_in(), shape.out_channels],
    };
    let mut gw = Output::array(py, &w_shape, out, &[&x, &gy])?;
    let (x, gy) = (x.image_values(layout, images.order)?, gy.image_values(layout, images.order)?);
    let mut memory = gw.memory();
    let isa = active()?;
    compute(py, || {
        crate::conv1x1::grad_weight(isa, &shape, images, x.as_slice(), gy.as_slice(), memory.as_mut_slice());
    })?;
    gw.finish()
}

/// Checks that two batches have the same images but for their channels.
fn check_images<T: ArrayElement>(x: &Input<'_, T>, gy: &Input<'_, T>, layout: Order) -> Result<()> {
    let ([h, w, _], [gh, gw, channels]) = (image_axes(x.shape(), layout), image_axes(gy.shape(), layout));
    if (x.shape()[0], h, w) != (gy.shape()[0], gh, gw) {
        let expected = with_channels(x.shape(), layout, channels);
        bail!("grad_output has shape {:?}, expected {expected:?} for x of shape {:?}", gy.shape(), x.shape());
    }
    Ok(())
}

/// Gradient of :func:`pointwise_conv` (and :func:`depthwise_conv`) by its bias.
///
/// Args:
///     grad_output: (N, C_out, H, W) or (N, H, W, C_out): the gradient by the (interleaved) output.
///     interleave: As in the forward call.
///     layout: "NCHW" or "NHWC".
///
/// Returns:
///     (C_out,).
///
/// Raises:
///     ValueError: If the shape, the step or the layout's name does not fit.
///     TypeError: If ``grad_output`` is not float32, float64 or bfloat16.
///
/// Example:
///     >>> kconv.pointwise_conv_grad_bias(np.ones((2, 4, 5, 5))).tolist()
///     [50.0, 50.0, 50.0, 50.0]
#[pyfunction]
#[pyo3(signature = (grad_output, *, interleave=1, layout="NCHW"))]
fn pointwise_conv_grad_bias<'py>(
    py: Python<'py>,
    grad_output: &Any<'py>,
    #[pyo3(from_py_with = integers::interleave)] interleave: i64,
    layout: &str,
) -> PyResult<Any<'py>> {
    by_dtype!(dtype("grad_output", grad_output)?, T => grad_bias::<T>(py, grad_output, interleave, layout))
}

fn grad_bias<'py, T: ArrayElement>(
    py: Python<'py>,
    grad_output: &Any<'py>,
    interleave: i64,
    layout_name: &str,
) -> PyResult<Any<'py>> {
    let gy = Input::<T>::new("grad_output", grad_output)?;
    let (layout, step) = (layout(layout_name)?, check_step("interleave", interleave)?);
    let images = gy.images(layout)?;
    let mut gb = Output::array(py, &[images.channels], None, &[&gy])?;
    let (gy, mut memory) = (gy.image_values(layout, images.order)?, gb.memory());
    let isa = active()?;
    compute(py, || crate::conv1x1::grad_bias(isa, step, images, gy.as_slice(), memory.as_mut_slice()))?;
    gb.finish()
}

/// Interleaves channels: concatenates, over ``s = 0 .. step-1``, the channels ``s, s + step, s + 2 * step, ...``.
///
/// A permutation for every number of channels and step (section 2 of MENDEL 28(1), 2022).
///
/// Args:
///     x: (N, C, H, W) or (N, H, W, C); float32, float64 or bfloat16.
///     step: At least 1; 1 leaves the channels where they are.
///     layout: "NCHW" or "NHWC".
///     out: Array for the result, or None for a new one.
///
/// Returns:
///     An array of the shape of ``x``.
///
/// Raises:
///     ValueError: If the shape, the step or the layout's name does not fit.
///     TypeError: If ``x`` is not float32, float64 or bfloat16.
///
/// Example:
///     >>> x = np.arange(6.0).reshape(1, 6, 1, 1)
///     >>> kconv.interleave(x, 3).ravel().tolist()
///     [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
#[pyfunction]
#[pyo3(signature = (x, step, *, layout="NCHW", out=None))]
fn interleave<'py>(
    py: Python<'py>,
    x: &Any<'py>,
    #[pyo3(from_py_with = integers::step)] step: i64,
    layout: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    by_dtype!(dtype("x", x)?, T => permute::<T>(py, x, step, layout, out, interleave_src_index))
}

/// Undoes :func:`interleave` (and is its gradient).
///
/// Args:
///     x: (N, C, H, W) or (N, H, W, C); float32, float64 or bfloat16.
///     step: At least 1.
///     layout: "NCHW" or "NHWC".
///     out: Array for the result, or None for a new one.
///
/// Returns:
///     An array of the shape of ``x``.
///
/// Raises:
///     ValueError: If the shape, the step or the layout's name does not fit.
///     TypeError: If ``x`` is not float32, float64 or bfloat16.
///
/// Example:
///     >>> x = np.arange(7.0).reshape(1, 7, 1, 1)
///     >>> kconv.deinterleave(kconv.interleave(x, 3), 3).ravel().tolist()
///     [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
#[pyfunction]
#[pyo3(signature = (x, step, *, layout="NCHW", out=None))]
fn deinterleave<'py>(
    py: Python<'py>,
    x: &Any<'py>,
    #[pyo3(from_py_with = integers::step)] step: i64,
    layout: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    by_dtype!(dtype("x", x)?, T => permute::<T>(py, x, step, layout, out, interleave_dst_index))
}

fn permute<'py, T: ArrayElement>(
    py: Python<'py>,
    x: &Any<'py>,
    step: i64,
    layout_name: &str,
    out: Option<&Any<'py>>,
    sources: fn(usize, usize) -> Vec<usize>,
) -> PyResult<Any<'py>> {
    let x = Input::<T>::new("x", x)?;
    let (layout, step) = (layout(layout_name)?, check_step("step", step)?);
    let images = x.images(layout)?;
    let shape = with_channels(x.shape(), layout, images.channels);
    let mut y = Output::images(py, shape, layout, images.order, out, &[&x])?;
    if images.is_empty() {
        return y.finish(); // of however many channels
    }
    let (x, mut memory) = (x.image_values(layout, images.order)?, y.memory());
    let isa = active()?;
    compute(py, || {
        crate::interleave::permute(isa, &sources(images.channels, step), images, x.as_slice(), memory.as_mut_slice());
    })?;
    y.finish()
}

/// The geometry of a depthwise convolution of images of this logical shape.
fn depthwise_shape(
    shape: &[usize],
    layout: Order,
    order: Order,
    kernel: usize,
    stride: i64,
    padding: Padding,
    weight_layout: WeightLayout,
) -> Result<Depthwise> {
    let [height, width, channels] = image_axes(shape, layout);
    Depthwise::new(shape[0], channels, Size2 { height, width }, kernel, stride, padding, order, weight_layout)
}

/// The kernel size of a depthwise weight for so many channels.
fn depthwise_kernel(weight: &[usize], channels: usize, layout: WeightLayout) -> Result<usize> {
    match depthwise_axes(weight, layout) {
        Some((c, [a, b])) if c == channels && a == b => Ok(a),
        _ => {
            let expected = match layout {
                WeightLayout::Oi => "(C, k, k) or (C, 1, k, k)",
                WeightLayout::Io => "(k, k, C) or (k, k, C, 1)",
            };
            bail!("weight has shape {weight:?}, expected {expected} with C={channels}")
        }
    }
}

fn output_shape(shape: &Depthwise, layout: Order) -> [usize; 4] {
    let (height, width) = (shape.vertical.output, shape.horizontal.output);
    match layout {
        Order::Nchw => [shape.count, shape.channels, height, width],
        Order::Nhwc => [shape.count, height, width, shape.channels],
    }
}

/// Checks the gradient by the output of a depthwise convolution.
fn check_depthwise_output(actual: &[usize], shape: &Depthwise, layout: Order) -> Result<()> {
    let expected = output_shape(shape, layout);
    if actual != expected {
        bail!("grad_output has shape {actual:?}, expected {expected:?}");
    }
    Ok(())
}

/// Depthwise convolution: each channel with a k x k kernel of its own.
///
/// Args:
///     x: (N, C, H, W), or (N, H, W, C) with ``layout="NHWC"``; float32, float64 or bfloat16.
///     weight: (C, k, k) or (C, 1, k, k), or (k, k, C[, 1]) with ``weight_layout="IO"``; k is 3, 5 or 7.
///     bias: (C,) or None.
///     stride: 1 or 2.
///     padding: "same" (TensorFlow's: ceil(size / stride) outputs, an odd pixel of padding at the bottom and right),
///         "valid" (none), an integer, or ((top, bottom), (left, right)); each less than k.
///     layout: "NCHW" or "NHWC".
///     weight_layout: "OI" or "IO".
///     out: Array for the result, or None for a new one.
///
/// Returns:
///     (N, C, H', W') or (N, H', W', C).
///
/// Raises:
///     ValueError: If shapes, stride, padding or a layout's name do not fit.
///     TypeError: If an array is not float32, float64 or bfloat16, or dtypes differ.
///
/// Example:
///     >>> x, weight = np.ones((2, 6, 8, 8), np.float32), np.ones((6, 3, 3), np.float32)
///     >>> kconv.depthwise_conv(x, weight, stride=2).shape
///     (2, 6, 4, 4)
#[pyfunction]
#[pyo3(
    signature = (x, weight, bias=None, *, stride=1, padding=Pad(Padding::Same), layout="NCHW", weight_layout="OI", out=None),
    text_signature = "(x, weight, bias=None, *, stride=1, padding='same', layout='NCHW', weight_layout='OI', out=None)"
)]
fn depthwise_conv<'py>(
    py: Python<'py>,
    x: &Any<'py>,
    weight: &Any<'py>,
    bias: Option<&Any<'py>>,
    #[pyo3(from_py_with = integers::stride)] stride: i64,
    padding: Pad,
    layout: &str,
    weight_layout: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    by_dtype!(
        dtype("x", x)?,
        T => depthwise_forward::<T>(py, x, weight, bias, stride, padding.0, layout, weight_layout, out)
    )
}

/// The argument `padding`.
struct Pad(Padding);

impl<'a, 'py> FromPyObject<'a, 'py> for Pad {
    type Error = PyErr;
    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        padding(&value).map(Self)
    }
}

fn depthwise_forward<'py, T: ArrayElement>(
    py: Python<'py>,
    x: &Any<'py>,
    weight: &Any<'py>,
    bias: Option<&Any<'py>>,
    stride: i64,
    padding: Padding,
    layout_name: &str,
    weight_layout_name: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    let (x, weight) = (Input::<T>::new("x", x)?, Input::<T>::new("weight", weight)?);
    let bias = bias.map(|bias| Input::<T>::new("bias", bias)).transpose()?;
    let (layout, weight_layout) = (layout(layout_name)?, weight_layout(weight_layout_name)?);
    let Images { channels, order, .. } = x.images(layout)?;
    let kernel = depthwise_kernel(weight.shape(), channels, weight_layout)?;
    let shape = depthwise_shape(x.shape(), layout, order, kernel, stride, padding, weight_layout)?;
    let bias_values = bias_values(bias.as_ref(), channels)?;
    let mut inputs = vec![&x, &weight];
    inputs.extend(&bias);
    let mut y = Output::images(py, output_shape(&shape, layout), layout, order, out, &inputs)?;
    let (x, weight, mut memory) = (x.image_values(layout, order)?, weight.values()?, y.memory());
    let isa = active()?;
    compute(py, || {
        let bias = bias_values.as_ref().map(Values::as_slice);
        crate::dwconv::forward(isa, &shape, x.as_slice(), weight.as_slice(), bias, memory.as_mut_slice());
    })?;
    y.finish()
}

/// Gradient of :func:`depthwise_conv` by its input.
///
/// Args:
///     grad_output: (N, C, H', W') or (N, H', W', C).
///     weight: As for :func:`depthwise_conv`.
///     input_size: (H, W) of the forward call's input.
///     stride: As in the forward call.
///     padding: As in the forward call.
///     layout: "NCHW" or "NHWC".
///     weight_layout: "OI" or "IO".
///     out: Array for the result, or None for a new one.
///
/// Returns:
///     (N, C, H, W) or (N, H, W, C).
///
/// Raises:
///     ValueError: If shapes, stride, padding or a layout's name do not fit.
///     TypeError: If an array is not float32, float64 or bfloat16, or dtypes differ.
///
/// Example:
///     >>> grad_output, weight = np.ones((2, 6, 4, 4)), np.ones((6, 3, 3))
///     >>> kconv.depthwise_conv_grad_input(grad_output, weight, (8, 8), stride=2).shape
///     (2, 6, 8, 8)
#[pyfunction]
#[pyo3(
    signature = (grad_output, weight, input_size, *, stride=1, padding=Pad(Padding::Same), layout="NCHW", weight_layout="OI", out=None),
    text_signature = "(grad_output, weight, input_size, *, stride=1, padding='same', layout='NCHW', weight_layout='OI', out=None)"
)]
fn depthwise_conv_grad_input<'py>(
    py: Python<'py>,
    grad_output: &Any<'py>,
    weight: &Any<'py>,
    #[pyo3(from_py_with = input_size)] input_size: (usize, usize),
    #[pyo3(from_py_with = integers::stride)] stride: i64,
    padding: Pad,
    layout: &str,
    weight_layout: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    by_dtype!(
        dtype("grad_output", grad_output)?,
        T => depthwise_grad_input::<T>(
            py, grad_output, weight, input_size, stride, padding.0, layout, weight_layout, out
        )
    )
}

fn depthwise_grad_input<'py, T: ArrayElement>(
    py: Python<'py>,
    grad_output: &Any<'py>,
    weight: &Any<'py>,
    (height, width): (usize, usize),
    stride: i64,
    padding: Padding,
    layout_name: &str,
    weight_layout_name: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    let (gy, weight) = (Input::<T>::new("grad_output", grad_output)?, Input::<T>::new("weight", weight)?);
    let (layout, weight_layout) = (layout(layout_name)?, weight_layout(weight_layout_name)?);
    let images = gy.images(layout)?;
    let order = images.order;
    let kernel = depthwise_kernel(weight.shape(), images.channels, weight_layout)?;
    let x_shape = match layout {
        Order::Nchw => [images.count, images.channels, height, width],
        Order::Nhwc => [images.count, height, width, images.channels],
    };
    let shape = depthwise_shape(&x_shape, layout, order, kernel, stride, padding, weight_layout)?;
    check_depthwise_output(gy.shape(), &shape, layout)?;
    let mut gx = Output::images(py, x_shape, layout, order, out, &[&gy, &weight])?;
    let (gy, weight, mut memory) = (gy.image_values(layout, order)?, weight.values()?, gx.memory());
    let isa = active()?;
    compute(py, || crate::dwconv::grad_input(isa, &shape, gy.as_slice(), weight.as_slice(), memory.as_mut_slice()))?;
    gx.finish()
}

/// Gradient of :func:`depthwise_conv` by its weight.
///
/// Args:
///     x: As for :func:`depthwise_conv`.
///     grad_output: (N, C, H', W') or (N, H', W', C).
///     kernel_size: k of the forward call's weight: 3, 5 or 7.
///     stride: As in the forward call.
///     padding: As in the forward call.
///     layout: "NCHW" or "NHWC".
///     weight_layout: "OI" or "IO".
///     out: Array for the result, or None for a new one.
///
/// Returns:
///     (C, k, k), or (k, k, C) with ``weight_layout="IO"``.
///
/// Raises:
///     ValueError: If shapes, stride, padding or a layout's name do not fit.
///     TypeError: If an array is not float32, float64 or bfloat16, or dtypes differ.
///
/// Example:
///     >>> x, grad_output = np.ones((2, 6, 8, 8)), np.ones((2, 6, 4, 4))
///     >>> kconv.depthwise_conv_grad_weight(x, grad_output, 3, stride=2).shape
///     (6, 3, 3)
#[pyfunction]
#[pyo3(
    signature = (x, grad_output, kernel_size, *, stride=1, padding=Pad(Padding::Same), layout="NCHW", weight_layout="OI", out=None),
    text_signature = "(x, grad_output, kernel_size, *, stride=1, padding='same', layout='NCHW', weight_layout='OI', out=None)"
)]
fn depthwise_conv_grad_weight<'py>(
    py: Python<'py>,
    x: &Any<'py>,
    grad_output: &Any<'py>,
    #[pyo3(from_py_with = integers::kernel_size)] kernel_size: i64,
    #[pyo3(from_py_with = integers::stride)] stride: i64,
    padding: Pad,
    layout: &str,
    weight_layout: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    by_dtype!(
        dtype("x", x)?,
        T => depthwise_grad_weight::<T>(py, x, grad_output, kernel_size, stride, padding.0, layout, weight_layout, out)
    )
}

fn depthwise_grad_weight<'py, T: ArrayElement>(
    py: Python<'py>,
    x: &Any<'py>,
    grad_output: &Any<'py>,
    kernel_size: i64,
    stride: i64,
    padding: Padding,
    layout_name: &str,
    weight_layout_name: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    let (x, gy) = (Input::<T>::new("x", x)?, Input::<T>::new("grad_output", grad_output)?);
    let (layout, weight_layout) = (layout(layout_name)?, weight_layout(weight_layout_name)?);
    let order = x.images(layout)?.order;
    let kernel = check_kernel(kernel_size)?;
    let shape = depthwise_shape(x.shape(), layout, order, kernel, stride, padding, weight_layout)?;
    check_depthwise_output(gy.shape(), &shape, layout)?;
    let w_shape = match weight_layout {
        WeightLayout::Oi => [shape.channels, kernel, kernel],
        WeightLayout::Io => [kernel, kernel, shape.channels],
    };
    let mut gw = Output::array(py, &w_shape, out, &[&x, &gy])?;
    let (x, gy, mut memory) = (x.image_values(layout, order)?, gy.image_values(layout, order)?, gw.memory());
    let isa = active()?;
    compute(py, || crate::dwconv::grad_weight(isa, &shape, x.as_slice(), gy.as_slice(), memory.as_mut_slice()))?;
    gw.finish()
}
