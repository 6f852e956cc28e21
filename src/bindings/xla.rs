//! XLA: the kernels as FFI handlers, which compiled JAX programs call on their own buffers.

mod abi;

use std::ffi::c_void;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use self::abi::{CallFrame, Handler};
use super::functions::{SIGNATURES, for_each_signature};

/// The handler of a function.
unsafe extern "C" fn handler<const FUNCTION: usize>(frame: *mut CallFrame) -> *mut c_void {
    // SAFETY: XLA calls this with a frame of its own.
    unsafe { abi::serve(frame, &SIGNATURES[FUNCTION]) }
}

/// The handlers by the names of the NumPy functions, for `jax.ffi.register_ffi_target`.
#[pyfunction]
pub fn xla_handlers(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    const HANDLERS: [Handler; SIGNATURES.len()] = for_each_signature!(handler);
    let handlers = PyDict::new(py);
    for (signature, handler) in SIGNATURES.iter().zip(HANDLERS) {
        handlers.set_item(signature.name, capsule(py, handler)?)?;
    }
    Ok(handlers)
}

/// A capsule without a name, as `jax.ffi.pycapsule` makes them.
fn capsule(py: Python<'_>, handler: Handler) -> PyResult<Bound<'_, PyAny>> {
    // SAFETY: the pointer is that of a static function; a new capsule is an owned reference.
    unsafe {
        let capsule = pyo3::ffi::PyCapsule_New(handler as *mut _, std::ptr::null(), None);
        Bound::from_owned_ptr_or_err(py, capsule)
    }
}
