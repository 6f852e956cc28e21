//! TensorFlow: the kernels as operations of its own, which graphs and SavedModels name.
//!
//! A gradient's last operand, `like`, tells the shape of the result and nothing else.

mod abi;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use self::abi::{Create, Opaque, create_kernel};
use super::functions::{SIGNATURES, for_each_signature};
use crate::error::Result;

/// Makes a function's kernel for a node of a graph.
unsafe extern "C" fn create<const FUNCTION: usize>(construction: Opaque) -> Opaque {
    // SAFETY: TensorFlow calls this with a construction of its own.
    unsafe { create_kernel(&SIGNATURES[FUNCTION], construction) }
}

/// Returns the operations' names.
fn register_all() -> Result<Vec<String>> {
    const CREATE: [Create; SIGNATURES.len()] = for_each_signature!(create);
    let register = |(signature, create)| abi::register(signature, create);
    SIGNATURES.iter().zip(CREATE).map(register).collect()
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
pub fn register_tensorflow_ops(library: &str) -> PyResult<Vec<String>> {
    let register = || if abi::load(library)? { register_all() } else { Ok(Vec::new()) };
    register().map_err(|error| PyRuntimeError::new_err(error.to_string()))
}
