//! Which algorithm a call runs and why, and how to force another.

use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use super::active;
use super::arrays::{Dtype, by_dtype};
use super::operation::{Arguments, Batch, Function, Job, layout};
use super::parse::integers;
use crate::error::{Error, Result, bail};
use crate::lock::Lock;
use crate::plan;
use crate::shape::{Order, Size2, WeightLayout};
use crate::simd::element::Element;
use crate::simd::{self, IsaKind};

/// The algorithm that all calls must take, if one is forced.
static FORCED: Lock<Option<String>> = Lock::new(None);
/// Whether there is one, for calls to learn without a lock.
static IS_FORCED: AtomicBool = AtomicBool::new(false);

/// Makes this thread's plans choose as they did before.
pub struct Restore(Option<String>);

impl Drop for Restore {
    fn drop(&mut self) {
        plan::force(self.0.take());
    }
}

/// Forces the algorithm that the process's calls must take, if there is one, for this thread's
/// plans while the result lives.
pub fn force<T: Element>(job: &Job, isa: IsaKind) -> Result<Option<Restore>> {
    if !IS_FORCED.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let Some(name) = FORCED.with(|forced| forced.clone()) else { return Ok(None) };
    let Some(candidates) = job.explain::<T>(isa) else { return Ok(None) };
    if candidates.iter().any(|candidate| candidate.applies && candidate.algorithm == name) {
        return Ok(Some(Restore(plan::force(Some(name)))));
    }
    let applicable: Vec<_> = candidates.iter().filter(|candidate| candidate.applies).collect();
    let names: Vec<_> = applicable.iter().map(|candidate| &candidate.algorithm[..]).collect();
    bail!("algorithm={name:?} does not apply to this call, expected {}", names.join(" or "))
}

/// What a call may leave out.
#[derive(Clone, Copy)]
struct Settings {
    groups: i64,
    step: i64,
    kernel: Option<i64>,
    stride: i64,
}

/// A call on images of as many input and output channels, by the names that Python uses.
fn job(
    operation: &str,
    direction: &str,
    layout: Order,
    images: usize,
    size: Size2,
    [in_channels, out_channels]: [usize; 2],
    Settings { groups, step, kernel, stride }: Settings,
) -> Result<Job> {
    let function = function(operation, direction)?;
    let (pointwise, depthwise) = (operation == "pointwise_conv", operation == "depthwise_conv");
    if !pointwise && in_channels != out_channels {
        bail!("out_channels={out_channels}, expected in_channels={in_channels} of a {operation}");
    }
    if !depthwise && (stride != 1 || kernel.is_some_and(|kernel| kernel != 1)) {
        bail!("kernel={}, stride={stride}, expected 1 and 1 of a {operation}", kernel.unwrap_or(1));
    }
    if !pointwise && groups != 1 || depthwise && step != 1 {
        bail!("groups={groups}, interleave={step}, expected 1 and 1 of a {operation}");
    }
    let group_in = in_channels / usize::try_from(groups).unwrap_or(1).max(1);
    for sizes in [[images, in_channels.max(out_channels), size.height, size.width], [1, 1, out_channels, group_in]] {
        let bytes = sizes.iter().try_fold(size_of::<f64>(), |bytes, &size| bytes.checked_mul(size));
        if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
            bail!("an array of the sizes {sizes:?}, expected fewer values");
        }
    }
    let out_size = match usize::try_from(stride) {
        Ok(stride @ 1..) => Size2 { height: size.height.div_ceil(stride), width: size.width.div_ceil(stride) },
        _ => bail!("stride={stride}, expected 1 or 2"),
    };
    let kernel_size = kernel.unwrap_or(3);
    let k = usize::try_from(kernel_size).unwrap_or(0);
    let x = Batch { count: images, channels: in_channels, size }.shape(layout);
    let grad_output = Batch { count: images, channels: out_channels, size: out_size }.shape(layout);
    let weight = if depthwise { vec![in_channels, k, k] } else { vec![out_channels, group_in] };
    let shape = |name: &&str| match *name {
        "x" => Some(&x[..]),
        "grad_output" => Some(&grad_output[..]),
        "weight" => Some(&weight[..]),
        _ => None, // without a bias
    };
    let shapes: Vec<_> = function.operands().iter().filter_map(shape).collect();
    let rest = Arguments::new(function, layout, WeightLayout::Oi);
    Arguments { groups, step, stride, input_size: size, kernel_size, ..rest }.job(&shapes, layout, true)
}

fn function(operation: &str, direction: &str) -> Result<Function> {
    Ok(match (operation, direction) {
        ("pointwise_conv", "forward") => Function::PointwiseConv,
        ("pointwise_conv", "grad_input") => Function::PointwiseConvGradInput,
        ("pointwise_conv", "grad_weight") => Function::PointwiseConvGradWeight,
        ("depthwise_conv", "forward") => Function::DepthwiseConv,
        ("depthwise_conv", "grad_input") => Function::DepthwiseConvGradInput,
        ("depthwise_conv", "grad_weight") => Function::DepthwiseConvGradWeight,
        ("interleave", "forward") => Function::Interleave,
        ("interleave", "grad_input") => Function::Deinterleave,
        ("pointwise_conv" | "depthwise_conv", other) => {
            bail!("direction={other:?}, expected \"forward\", \"grad_input\" or \"grad_weight\"")
        }
        ("interleave", other) => bail!("direction={other:?}, expected \"forward\" or \"grad_input\""),
        (other, _) => {
            bail!("operation={other:?}, expected \"pointwise_conv\", \"depthwise_conv\" or \"interleave\"")
        }
    })
}

/// Lists the algorithms for a call, what each is predicted to cost, and which is chosen.
///
/// Args:
///     operation: "pointwise_conv", "depthwise_conv" (padded "same") or "interleave".
///     direction: "forward", "grad_input" or "grad_weight".
///     layout: "NCHW" or "NHWC", as the images lie in memory.
///     dtype: "float32", "float64" or "bfloat16".
///     images: The number of images.
///     height: Rows of an input image.
///     width: Columns of an input image.
///     in_channels: Channels of the input.
///     out_channels: Channels of the output.
///     groups: Groups of a pointwise convolution.
///     interleave: Step by which channels are interleaved.
///     kernel: k of a depthwise convolution: 3, 5 or 7; 3 by default.
///     stride: Stride of a depthwise convolution.
///     threads: Threads of the call, 1 to 1024; the choice is the same for any number of them, so
///         that results are, too.
///
/// Returns:
///     A dictionary for each candidate, in the order of its table: ``algorithm``, ``applies``,
///     ``cost`` (in vectors of multiply-adds, to compare with the others'; None where it does not
///     apply), ``chosen`` and ``detail`` (kernels, and what they are given).
///
/// Raises:
///     ValueError: If the arguments make no such call.
///
/// Example:
///     >>> problem = ("interleave", "forward", "NHWC", "float32", 1, 8, 8, 24, 24)
///     >>> rows = kconv._kconv.explain(*problem, interleave=4)
///     >>> sum(row["chosen"] for row in rows)
///     1
#[pyfunction]
#[pyo3(signature = (
    operation, direction, layout, dtype, images, height, width, in_channels, out_channels,
    groups=1, interleave=1, kernel=None, stride=1, threads=None
))]
fn explain<'py>(
    py: Python<'py>,
    operation: &str,
    direction: &str,
    layout: &str,
    dtype: &str,
    #[pyo3(from_py_with = integers::images)] images: i64,
    #[pyo3(from_py_with = integers::height)] height: i64,
    #[pyo3(from_py_with = integers::width)] width: i64,
    #[pyo3(from_py_with = integers::in_channels)] in_channels: i64,
    #[pyo3(from_py_with = integers::out_channels)] out_channels: i64,
    #[pyo3(from_py_with = integers::groups)] groups: i64,
    #[pyo3(from_py_with = integers::interleave)] interleave: i64,
    kernel: Option<i64>,
    #[pyo3(from_py_with = integers::stride)] stride: i64,
    threads: Option<i64>,
) -> PyResult<Bound<'py, PyList>> {
    let size = |name: &str, value: i64| match usize::try_from(value) {
        Ok(size @ 1..) => Ok(size),
        _ => Err(Error::new(format!("{name}={value}, expected at least 1"))),
    };
    if let Some(threads) = threads.filter(|threads| !(1..=1024).contains(threads)) {
        return Err(PyValueError::new_err(format!("threads={threads}, expected 1 to 1024")));
    }
    let layout = self::layout(layout)?;
    let size2 = Size2 { height: size("height", height)?, width: size("width", width)? };
    let channels = [size("in_channels", in_channels)?, size("out_channels", out_channels)?];
    let settings = Settings { groups, step: interleave, kernel, stride };
    let job = job(operation, direction, layout, size("images", images)?, size2, channels, settings)?;
    let isa = active()?;
    let candidates = by_dtype!(dtype.parse::<Dtype>()?, T => job.explain::<T>(isa)).unwrap_or_default();
    let rows = candidates.into_iter().map(|candidate| {
        let row = PyDict::new(py);
        row.set_item("algorithm", candidate.algorithm)?;
        row.set_item("applies", candidate.applies)?;
        row.set_item("cost", candidate.cost)?;
        row.set_item("chosen", candidate.chosen)?;
        row.set_item("detail", candidate.detail)?;
        Ok(row)
    });
    PyList::new(py, rows.collect::<PyResult<Vec<_>>>()?)
}

/// The names of all algorithms of any operation.
fn names() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for operation in ["pointwise_conv", "depthwise_conv", "interleave"] {
        for direction in ["forward", "grad_input", "grad_weight"] {
            for layout in [Order::Nchw, Order::Nhwc] {
                let size = Size2::square(8);
                let (channels, defaults) = ([16, 16], Settings { groups: 1, step: 1, kernel: None, stride: 1 });
                // An interleave has no weight.
                if let Ok(job) = job(operation, direction, layout, 1, size, channels, defaults) {
                    let candidates = job.explain::<f32>(simd::active()?).unwrap_or_default();
                    names.extend(candidates.into_iter().map(|candidate| candidate.algorithm));
                }
            }
        }
    }
    names.sort();
    names.dedup();
    Ok(names)
}

/// Makes every call of the process take one algorithm, for tests and measurements.
///
/// Fused networks keep their own plans, and functions that have no choice are as always.
///
/// Args:
///     name: What :func:`explain` calls it, or None to choose by cost again. A call that it does
///         not apply to is a ``ValueError``.
///
/// Returns:
///     The name that was forced before, or None.
///
/// Raises:
///     ValueError: If there is no such algorithm.
///
/// Example:
///     >>> kconv._kconv.force_algorithm("Transposed")
///     >>> kconv._kconv.force_algorithm(None)
///     'Transposed'
#[pyfunction]
fn force_algorithm(name: Option<String>) -> PyResult<Option<String>> {
    if let Some(name) = &name {
        let known = names()?;
        if !known.contains(name) {
            return Err(PyValueError::new_err(format!("algorithm={name:?}, expected one of {}", known.join(", "))));
        }
    }
    Ok(FORCED.with(|forced| {
        IS_FORCED.store(name.is_some(), Ordering::Relaxed);
        std::mem::replace(forced, name)
    }))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(explain, module)?)?;
    module.add_function(wrap_pyfunction!(force_algorithm, module)?)
}
