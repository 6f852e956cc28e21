//! The functions on NumPy arrays. Their documentation is Python's: shapes, errors and examples.

use pyo3::prelude::*;
use smallvec::SmallVec;

use super::arrays::{ArrayElement, Input, Output, Values, by_dtype, dtype};
use super::operation::{Arguments, Function, MAX_OPERANDS, layout, weight_layout};
use super::parse::{Pad, input_size, integers};
use super::{active, compute};
use crate::error::Result;
use crate::shape::{Padding, Size2};

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

/// The arguments of a function with weights.
fn arguments(function: Function, layout_name: &str, weight_layout_name: &str) -> Result<Arguments> {
    Ok(Arguments::new(function, layout(layout_name)?, weight_layout(weight_layout_name)?))
}

/// Calls a function on its arrays.
fn call<'py>(
    py: Python<'py>,
    arguments: &Arguments,
    arrays: &[&Any<'py>],
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    by_dtype!(dtype(arguments.function.operands()[0], arrays[0])?, T => run::<T>(py, arguments, arrays, out))
}

/// As [`call`], where there may be a bias.
fn call_with_bias<'py>(
    py: Python<'py>,
    arguments: &Arguments,
    [x, weight]: [&Any<'py>; 2],
    bias: Option<&Any<'py>>,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    match bias {
        Some(bias) => call(py, arguments, &[x, weight, bias], out),
        None => call(py, arguments, &[x, weight], out),
    }
}

/// The call on arrays of `T`. (Loops that push, as collecting into small vectors costs a tiny call
/// a tenth of its time.)
fn run<'py, T: ArrayElement>(
    py: Python<'py>,
    arguments: &Arguments,
    arrays: &[&Any<'py>],
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    let mut inputs = SmallVec::<[Input<'py, T>; MAX_OPERANDS]>::new();
    for (name, array) in arguments.function.operands().iter().zip(arrays) {
        inputs.push(Input::new(name, array)?);
    }
    let layout = arguments.layout;
    let order = inputs[0].memory_order(layout);
    let mut shapes = [&[][..]; MAX_OPERANDS];
    shapes.iter_mut().zip(&inputs).for_each(|(shape, input)| *shape = input.shape());
    // Capsules are PyTorch's tensors, whose functions have no layouts to choose.
    let job = arguments.job(&shapes[..inputs.len()], order, inputs[0].is_capsule())?;
    let mut result = if job.makes_images() {
        Output::images(py, &job.result, layout, order, out, &inputs)?
    } else {
        Output::array(py, &job.result, out, &inputs)?
    };
    let mut values = SmallVec::<[Values<T>; MAX_OPERANDS]>::new();
    for (i, input) in inputs.iter().enumerate() {
        values.push(if job.is_images(i) { input.image_values(layout, order)? } else { input.values()? });
    }
    let mut memory = result.memory();
    let isa = active()?;
    compute(py, || {
        let mut operands = [&[][..]; MAX_OPERANDS];
        operands.iter_mut().zip(&values).for_each(|(operand, values)| *operand = values.as_slice());
        job.run(isa, &operands[..values.len()], memory.as_mut_slice())
    })??;
    result.finish()
}

/// Grouped pointwise (1x1) convolution, its output interleaved.
///
/// Output channel ``o`` of group ``g`` is the sum of ``bias[o]`` and, over ``i``, ``weight[o, i]``
/// times input channel ``i`` of group ``g``; then the output's channels are interleaved by
/// ``interleave`` at no cost (section 2 of "Grouped Pointwise Convolutions Reduce Parameters in
/// Convolutional Neural Networks", MENDEL 28(1), 2022).
///
/// Args:
///     x: (N, C_in, H, W), or (N, H, W, C_in) with ``layout="NHWC"``; float32, float64 or bfloat16
///         (ml_dtypes'; sums are of float32, and rounded once). Used where it is when its memory is
///         contiguous in either order of axes; the result's memory then has the same order. Arrays
///         may also be DLPack capsules of such tensors on the CPU; the result is a capsule where
///         ``x`` is one.
///     weight: (C_out, C_in/groups[, 1, 1]), or ([1, 1,] C_in/groups, C_out) with
///         ``weight_layout="IO"``; dtype of ``x``.
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
    let arguments = arguments(Function::PointwiseConv, layout, weight_layout)?;
    let arguments = Arguments { groups, step: interleave, ..arguments };
    call_with_bias(py, &arguments, [x, weight], bias, out)
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
    let arguments = arguments(Function::PointwiseConvGradInput, layout, weight_layout)?;
    let arguments = Arguments { groups, step: interleave, ..arguments };
    call(py, &arguments, &[grad_output, weight], out)
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
///     (C_out, C_in/groups), or (C_in/groups, C_out) with ``weight_layout="IO"``. It does not
///     depend on the number of threads.
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
    let arguments = arguments(Function::PointwiseConvGradWeight, layout, weight_layout)?;
    let arguments = Arguments { groups, step: interleave, ..arguments };
    call(py, &arguments, &[x, grad_output], out)
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
    let arguments = arguments(Function::PointwiseConvGradBias, layout, "OI")?;
    call(py, &Arguments { step: interleave, ..arguments }, &[grad_output], None)
}

/// Interleaves channels: those ``s, s + step, ...`` for each ``s < step`` in turn.
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
    let arguments = arguments(Function::Interleave, layout, "OI")?;
    call(py, &Arguments { step, ..arguments }, &[x], out)
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
    let arguments = arguments(Function::Deinterleave, layout, "OI")?;
    call(py, &Arguments { step, ..arguments }, &[x], out)
}

/// Depthwise convolution: each channel with a k x k kernel of its own.
///
/// Args:
///     x: (N, C, H, W), or (N, H, W, C) with ``layout="NHWC"``; float32, float64 or bfloat16.
///     weight: (C, k, k) or (C, 1, k, k), or (k, k, C[, 1]) with ``weight_layout="IO"``; k is 3, 5
///         or 7.
///     bias: (C,) or None.
///     stride: 1 or 2.
///     padding: "same" (TensorFlow's: ceil(size / stride) outputs, an odd pixel of padding at the
///         bottom and right), "valid" (none), an integer, or ((top, bottom), (left, right)); each
///         less than k.
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
    let arguments = arguments(Function::DepthwiseConv, layout, weight_layout)?;
    let arguments = Arguments { stride, padding: padding.0, ..arguments };
    call_with_bias(py, &arguments, [x, weight], bias, out)
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
    #[pyo3(from_py_with = input_size)] input_size: Size2,
    #[pyo3(from_py_with = integers::stride)] stride: i64,
    padding: Pad,
    layout: &str,
    weight_layout: &str,
    out: Option<&Any<'py>>,
) -> PyResult<Any<'py>> {
    let arguments = arguments(Function::DepthwiseConvGradInput, layout, weight_layout)?;
    let arguments = Arguments { stride, padding: padding.0, input_size, ..arguments };
    call(py, &arguments, &[grad_output, weight], out)
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
    let arguments = arguments(Function::DepthwiseConvGradWeight, layout, weight_layout)?;
    let arguments = Arguments { stride, padding: padding.0, kernel_size, ..arguments };
    call(py, &arguments, &[x, grad_output], out)
}
