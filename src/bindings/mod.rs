//! The Python extension module `kconv._kconv`: conversion and error mapping, nothing else.

mod arrays;
mod call;
mod dlpack;
mod explain;
mod functions;
mod fused;
mod numpy;
mod operation;
mod parse;
mod tensorflow;
mod xla;

use std::path::PathBuf;

use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

use crate::cpus;
use crate::error::Error;
use crate::memory::{self, NoMemory};
use crate::microkernels::probe::Multiply;
use crate::simd::{self, IsaKind};
use crate::team::Team;
use crate::{lock, pool};

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

impl From<NoMemory> for PyErr {
    fn from(error: NoMemory) -> Self {
        PyMemoryError::new_err(error.to_string())
    }
}

/// Runs an operation without the GIL, on as many threads as PyTorch uses where kconv's own settings
/// do not say how many; on PyTorch's own threads, if there are as many.
fn compute<R: Send>(py: Python<'_>, operation: impl FnOnce() -> R + Send) -> PyResult<R> {
    let team = follow_torch(py);
    let run = || match team {
        Some((team, threads)) => team.lend(threads, || memory::catch(operation)),
        None => memory::catch(operation),
    };
    Ok(py.detach(run)?)
}

/// PyTorch, in this process.
struct Torch {
    get_num_threads: Py<PyAny>,
    team: Option<Team>,
}

impl Torch {
    /// PyTorch, if the process has imported it.
    fn find(py: Python<'_>) -> Option<Self> {
        // SAFETY: a borrowed reference to `sys.modules`; the GIL is held.
        let modules = unsafe { Bound::from_borrowed_ptr_or_opt(py, pyo3::ffi::PyImport_GetModuleDict()) }?;
        let torch = modules.cast::<PyDict>().ok()?.get_item(intern!(py, "torch")).ok()??;
        let get_num_threads = torch.getattr(intern!(py, "get_num_threads")).ok()?.unbind();
        let library = || {
            let file: PathBuf = torch.getattr(intern!(py, "__file__")).ok()?.extract().ok()?;
            Some(file.parent()?.join("lib").join("libtorch_cpu.so"))
        };
        Some(Self { get_num_threads, team: library().and_then(|library| Team::of(&library)) })
    }
}

/// Uses as many threads as PyTorch, if the process has it: `torch.set_num_threads` and the one
/// thread of a `DataLoader`'s worker hold here too. (PyTorch's answer takes 50 ns.) Returns these
/// threads, where they are of a kind that kconv can use, and their number.
fn follow_torch(py: Python<'_>) -> Option<(Team, usize)> {
    static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
    // It may be imported later.
    let find = || Torch::find(py).map(|found| TORCH.get_or_init(py, || found));
    let torch = TORCH.get(py).or_else(find)?;
    let threads = torch.get_num_threads.call0(py).ok()?.extract(py).ok()?;
    pool::follow(threads);
    torch.team.map(|team| (team, threads))
}

/// The instruction set of this process.
fn active() -> PyResult<IsaKind> {
    simd::active().map_err(|error| PyRuntimeError::new_err(error.to_string()))
}

/// Sets how many threads the kernels use.
///
/// Until then it is what the environment variable ``KCONV_NUM_THREADS`` says; without that, as many
/// as PyTorch uses (``torch.set_num_threads``, and one in a worker of a ``DataLoader``) where it is
/// imported; else what ``OMP_NUM_THREADS`` says, or one thread for each CPU that the process may
/// run on. Small work always stays on the calling thread.
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
fn set_num_threads(#[pyo3(from_py_with = parse::integers::threads)] threads: i64) -> PyResult<()> {
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
fn get_num_threads(py: Python<'_>) -> usize {
    follow_torch(py);
    pool::num_threads()
}

/// Returns how many CPUs the process may run on, up to its container's quota, rounded up.
///
/// A quota of 1.5 CPUs is worth two threads: ``cpu.max`` of cgroup v2, the least of the group's own
/// and of those above.
///
/// Args:
///     root: What stands for "/" where the quota is looked for, for tests.
///
/// Example:
///     >>> kconv._kconv.available_cpus() >= 1
///     True
#[pyfunction]
#[pyo3(signature = (root = PathBuf::from("/")))]
fn available_cpus(root: PathBuf) -> usize {
    cpus::available_cpus(&root)
}

/// Describes this build of kconv.
///
/// Returns:
///     A dictionary: ``version``, ``isa`` (the instruction set in use), ``isas`` (all that this
///     machine has, any of which the environment variable ``KCONV_ISA`` forces) and ``threads``.
///
/// Example:
///     >>> info = kconv.build_info()
///     >>> info["isa"] in info["isas"]
///     True
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("isa", active()?.name())?;
    info.set_item("isas", IsaKind::available().iter().map(|isa| isa.name()).collect::<Vec<_>>())?;
    info.set_item("threads", get_num_threads(py))?;
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
    compute(py, || {
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
    })
}

/// kconv's kernels.
// PyO3 would say that no global lock is needed, which no test under a free-threaded Python shows.
#[pymodule(gil_used = true)]
fn _kconv(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // Wrong settings are reported at import. What is found out once, and the fork handler, come
    // while no other thread may fork.
    active()?;
    pool::check_environment()?;
    simd::has_stream_prefetcher();
    lock::generation();
    for function in [
        wrap_pyfunction!(set_num_threads, module)?,
        wrap_pyfunction!(get_num_threads, module)?,
        wrap_pyfunction!(available_cpus, module)?,
        wrap_pyfunction!(build_info, module)?,
        wrap_pyfunction!(fma_peak, module)?,
        wrap_pyfunction!(xla::xla_handlers, module)?,
        wrap_pyfunction!(tensorflow::register_tensorflow_ops, module)?,
    ] {
        module.add_function(function)?;
    }
    explain::register(module)?;
    fused::register(module)?;
    numpy::register(module)
}
