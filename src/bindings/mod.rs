//! The Python extension module `kconv._kconv`: conversion and error mapping, nothing else.

mod arrays;
mod call;
mod dlpack;
mod functions;
mod fused;
mod numpy;
mod tensorflow;
mod xla;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;
use crate::isa::{self, Active};
use crate::kernels::probe::Multiply;
use crate::pool;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// The instruction set of this process.
fn active() -> PyResult<Active> {
    isa::active().map_err(|error| PyRuntimeError::new_err(error.to_string()))
}

/// Sets how many threads the kernels use.
///
/// The default is one thread for each CPU that the process may run on, or the environment variable
/// ``KCONV_NUM_THREADS``. Small work always stays on the calling thread.
///
/// Args:
///     threads: Number of threads, at least 1.
///
/// Raises:
///     ValueError: If ``threads`` is less than 1 or more than 1024.
///
/// Example:
///     >>> kconv.set_num_threads(2)
///     >>> kconv.get_num_threads()
///     2
#[pyfunction]
fn set_num_threads(#[pyo3(from_py_with = arrays::integers::threads)] threads: i64) -> PyResult<()> {
    // Negative numbers become 0, which is refused by its own name.
    usize::try_from(threads)
        .map_err(|_| PyValueError::new_err(format!("num_threads={threads}, expected 1 to 1024")))
        .and_then(|threads| Ok(pool::set_num_threads(threads)?))
}

/// Returns how many threads the kernels use.
///
/// Example:
///     >>> kconv.get_num_threads() >= 1
///     True
#[pyfunction]
fn get_num_threads() -> usize {
    pool::num_threads()
}

/// Describes this build of kconv.
///
/// Returns:
///     A dictionary: ``version``, ``isa`` (the instruction set in use), ``isas`` (all that this machine has,
///     any of which the environment variable ``KCONV_ISA`` forces) and ``threads``.
///
/// Example:
///     >>> info = kconv.build_info()
///     >>> info["isa"] in info["isas"]
///     True
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, pyo3::types::PyDict>> {
    let info = pyo3::types::PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("isa", active()?.name())?;
    info.set_item("isas", Active::available().iter().map(|isa| isa.name()).collect::<Vec<_>>())?;
    info.set_item("threads", pool::num_threads())?;
    Ok(info)
}

/// Measures how many float32 operations a second all threads can do on registers alone.
///
/// Returns:
///     GFLOP/s; a multiply-add counts as two. Takes about a tenth of a second.
///
/// Example:
///     >>> kconv._kconv.fma_peak() > 0
///     True
#[pyfunction]
fn fma_peak(py: Python<'_>) -> PyResult<f64> {
    const ROUNDS: usize = 2_000_000;
    let isa = active()?;
    Ok(py.detach(|| {
        let threads = pool::num_threads();
        let run = || {
            let start = std::time::Instant::now();
            let operations = std::sync::Mutex::new(0.0);
            pool::parallel_for(threads, threads, |_| {
                *operations.lock().expect("no panic") += isa.run(Multiply { rounds: ROUNDS });
            });
            *operations.lock().expect("no panic") / start.elapsed().as_nanos() as f64
        };
        // The first run wakes the threads; the best of the others counts.
        run();
        (0..3).map(|_| run()).fold(0.0, f64::max)
    }))
}

/// kconv's kernels.
#[pymodule]
fn _kconv(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // A wrong KCONV_ISA is reported at import.
    active()?;
    for function in [
        wrap_pyfunction!(set_num_threads, module)?,
        wrap_pyfunction!(get_num_threads, module)?,
        wrap_pyfunction!(build_info, module)?,
        wrap_pyfunction!(fma_peak, module)?,
        wrap_pyfunction!(xla::xla_handlers, module)?,
        wrap_pyfunction!(tensorflow::register_tensorflow_ops, module)?,
    ] {
        module.add_function(function)?;
    }
    fused::register(module)?;
    numpy::register(module)
}
