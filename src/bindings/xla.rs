//! XLA: the kernels as FFI handlers, which compiled JAX programs call on their own buffers.

mod abi;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use self::abi::{CallFrame, Handler};
use super::arrays::{by_dtype, by_wide_dtype};
use super::call::Output;
use super::functions;

/// Defines, for each of the [`functions`], the handler that calls it for the type of its first result, and
/// `xla_handlers`, which hands them to Python.
macro_rules! handlers {
    ($($by_dtype:ident { $($name:ident [$($output:ident),*]),* $(,)? })*) => {
        /// The handlers by the names of the NumPy functions, for `jax.ffi.register_ffi_target`.
        #[pyfunction]
        pub fn xla_handlers(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
            let handlers = PyDict::new(py);
            $($({
                unsafe extern "C" fn handler(frame: *mut CallFrame) -> *mut std::ffi::c_void {
                    // SAFETY: XLA calls this with a frame of its own.
                    unsafe {
                        abi::serve(frame, |call, outputs| {
                            let [$($output),*] = outputs;
                            let dtype = first(&[$(&$output),*]).dtype();
                            $by_dtype!(dtype, T => functions::$name::<T>(call, $($output),*))
                        })
                    }
                }
                handlers.set_item(stringify!($name), capsule(py, handler)?)?;
            })*)*
            Ok(handlers)
        }
    };
}

handlers! {
    by_dtype {
        pointwise_conv [output],
        pointwise_conv_grad_input [output],
        pointwise_conv_grad_weight [output],
        pointwise_conv_grad_bias [output],
        depthwise_conv [output],
        depthwise_conv_grad_input [output],
        depthwise_conv_grad_weight [output],
        interleave [output],
        deinterleave [output],
    }
    by_wide_dtype {
        fused_forward [output, statistics, workspace],
        fused_infer [output],
        fused_backward [grad_parameters, grad_input],
    }
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
