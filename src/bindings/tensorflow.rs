//! TensorFlow: the kernels as operations of its own, which graphs and SavedModels name.
//!
//! A gradient's last operand, `like`, tells the shape of the result and nothing else.

mod abi;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use self::abi::ResultShape::{Function, Input, Like};
use self::abi::{Opaque, Operation, create_kernel};
use super::arrays::{by_dtype, by_wide_dtype};
use super::call::Output;
use super::functions;
use crate::error::{Result, bail};

const POINTWISE: &[&str] = &["groups: int", "interleave: int", "layout: string", "weight_layout: string"];
const BIAS: &[&str] = &["interleave: int", "layout: string"];
const PERMUTATION: &[&str] = &["step: int", "layout: string"];
/// `padding` is empty for "same", or has the pixels at the top, bottom, left and right.
const DEPTHWISE: &[&str] = &["stride: int", "padding: list(int)", "layout: string", "weight_layout: string"];
const PROGRAM: &[&str] = &["program: list(int)", "layout: string"];

/// As many outputs as a function has.
fn all<const N: usize>(outputs: Vec<Output<'_>>) -> Result<[Output<'_>; N]> {
    let found = outputs.len();
    outputs.try_into().or_else(|_| bail!("got {found} outputs, expected {N}"))
}

/// Defines `register_all`, which registers the operations that call these [`functions`].
macro_rules! operations {
    ($($by_dtype:ident $function:ident: $name:literal,
       $inputs:expr, $attributes:expr, [$($output:ident),*], $result:expr;)*) => {
        /// Returns the operations' names.
        fn register_all() -> Result<Vec<&'static str>> {
            Ok(vec![$({
                static OPERATION: Operation = Operation {
                    name: $name,
                    inputs: &$inputs,
                    attributes: $attributes,
                    outputs: &[$(concat!(stringify!($output), ": T")),*],
                    result: $result,
                    body: |dtype, call, outputs| {
                        let [$($output),*] = all(outputs)?;
                        $by_dtype!(dtype, T => functions::$function::<T>(call, $($output),*))
                    },
                };
                unsafe extern "C" fn create(construction: Opaque) -> Opaque {
                    // SAFETY: TensorFlow calls this with a construction of its own.
                    unsafe { create_kernel(&OPERATION, construction) }
                }
                abi::register(&OPERATION, create)?;
                $name
            }),*])
        }
    };
}

operations! {
    by_dtype pointwise_conv: "KconvPointwiseConv",
        ["x: T", "weight: T", "bias: biases * T"], POINTWISE, [output], Function(functions::pointwise_conv_result);
    by_dtype pointwise_conv_grad_input: "KconvPointwiseConvGradInput",
        ["grad_output: T", "weight: T", "like: T"], POINTWISE, [output], Like;
    by_dtype pointwise_conv_grad_weight: "KconvPointwiseConvGradWeight",
        ["x: T", "grad_output: T", "like: T"], POINTWISE, [output], Like;
    by_dtype pointwise_conv_grad_bias: "KconvGradBias", ["grad_output: T", "like: T"], BIAS, [output], Like;
    by_dtype depthwise_conv: "KconvDepthwiseConv",
        ["x: T", "weight: T", "bias: biases * T"], DEPTHWISE, [output], Function(functions::depthwise_conv_result);
    by_dtype depthwise_conv_grad_input: "KconvDepthwiseConvGradInput",
        ["grad_output: T", "weight: T", "like: T"], DEPTHWISE, [output], Like;
    by_dtype depthwise_conv_grad_weight: "KconvDepthwiseConvGradWeight",
        ["x: T", "grad_output: T", "like: T"], DEPTHWISE, [output], Like;
    by_wide_dtype fused_forward: "KconvFusedForward", ["x: T", "parameters: T", "masks: T", "given: T"], PROGRAM,
        [output, statistics, workspace], Function(functions::fused_forward_results);
    by_wide_dtype fused_infer: "KconvFusedInfer", ["x: T", "parameters: T", "statistics: T"], PROGRAM,
        [output], Function(functions::fused_infer_result);
    by_wide_dtype fused_backward: "KconvFusedBackward",
        ["grad_output: T", "parameters: T", "masks: T", "statistics: T", "workspace: T"],
        &["program: list(int)", "layout: string", "frozen: int"],
        [grad_parameters, grad_x], Function(functions::fused_backward_results);
    by_dtype interleave: "KconvInterleave", ["x: T"], PERMUTATION, [output], Input;
    by_dtype deinterleave: "KconvDeinterleave", ["x: T"], PERMUTATION, [output], Input;
}

/// Registers the operations with the TensorFlow that is loaded from a path.
///
/// Args:
///     library: The path of TensorFlow's library of the C interface, ``libtensorflow_framework``.
///
/// Returns:
///     The names of the operations; none if they are registered already.
///
/// Raises:
///     RuntimeError: If there is no such TensorFlow in the process, or it refuses them.
#[pyfunction]
pub fn register_tensorflow_ops(library: &str) -> PyResult<Vec<&'static str>> {
    let register = || if abi::load(library)? { register_all() } else { Ok(Vec::new()) };
    register().map_err(|error| PyRuntimeError::new_err(error.to_string()))
}
