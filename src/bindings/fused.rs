//! Fused networks for NumPy arrays (and so for PyTorch's tensors).

use std::mem::MaybeUninit;

use pyo3::prelude::*;
use pyo3::types::PyList;

use super::arrays::{ArrayElement, Input, Output, Values, by_dtype, dtype, memory_array};
use super::operation::{Batch, expect_images, expect_values, layout};
use super::{active, compute};
use crate::error::Result;
use crate::fused::{self, Arguments, Inference, Prepared, Program};
use crate::memory::{self, Memory};
use crate::shape::Order;

type Any<'py> = Bound<'py, PyAny>;

/// A chain of convolutions, batch norms, activations and sums that runs as one operation.
///
/// The front ends make it of a model's layers (see ``kconv.models.fusion``).
///
/// Images are of float32, float64 or bfloat16, all other arrays of what these are computed with:
/// float32 for bfloat16, which is what images and kept values are stored as.
///
/// Args:
///     integers: The program; ``Program::parse`` in the Rust sources describes it.
///
/// Raises:
///     ValueError: If the integers are no program.
#[pyclass(frozen, module = "kconv._kconv")]
pub struct FusedProgram(Program);

#[pymethods]
impl FusedProgram {
    /// The version of the programs that are read.
    #[classattr]
    const FORMAT: i64 = fused::FORMAT;

    #[new]
    fn new(integers: Vec<i64>) -> PyResult<Self> {
        Ok(Self(Program::parse(&integers)?))
    }

    /// The number of parameters.
    #[getter]
    fn parameters(&self) -> usize {
        self.0.parameters()
    }

    /// The number of channels of all batch norms.
    #[getter]
    fn norm_channels(&self) -> usize {
        self.0.norm_channels()
    }

    /// Values that :meth:`forward` keeps for :meth:`backward`, an image.
    #[getter]
    fn workspace(&self) -> PyResult<usize> {
        Ok(self.0.workspace_len(1)?)
    }

    /// What each step does and how long it has taken since the last call.
    ///
    /// Returns:
    ///     For each step its kind ("pointwise", "spatial", "copy", "mean"), the seconds in forward
    ///     passes and in backward passes (in inference with a thread an image, of all threads), and
    ///     for each image the forward pass's multiply-adds and the number of values that it reads
    ///     and writes.
    fn take_times(&self) -> Vec<(&'static str, f64, f64, usize, usize)> {
        let times = self.0.take_times().into_iter();
        times.map(|step| (step.kind, step.forward, step.backward, step.multiply_adds, step.values)).collect()
    }

    /// Forward in training.
    ///
    /// Args:
    ///     x: (N, C, H, W) or (N, H, W, C).
    ///     parameters: All parameters in a row.
    ///     masks: (masks, N) factors of images, or None for none.
    ///     statistics: (2, norm channels) means and variances to normalise with; by default the
    ///         batch's own.
    ///     layout: "NCHW" or "NHWC".
    ///
    /// Returns:
    ///     The output, the statistics (zeros where there are no images), and what :meth:`backward`
    ///     needs.
    ///
    /// Raises:
    ///     ValueError: If an array or the layout does not fit.
    ///     MemoryError: If there is not enough memory, even with what kconv recycles.
    #[pyo3(signature = (x, parameters, masks=None, statistics=None, layout="NCHW"))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        x: &Any<'py>,
        parameters: &Any<'py>,
        masks: Option<&Any<'py>>,
        statistics: Option<&Any<'py>>,
        layout: &str,
    ) -> PyResult<(Any<'py>, Any<'py>, Any<'py>)> {
        by_dtype!(dtype("x", x)?, S => self.train::<S>(py, x, parameters, masks, statistics, layout))
    }

    /// Forward in inference: the output, with the statistics that are given.
    ///
    /// Args:
    ///     x: (N, C, H, W) or (N, H, W, C).
    ///     parameters: All parameters in a row, or a list of arrays that hold them one after the
    ///         other.
    ///     statistics: (2, norm channels) means and variances to normalise with, or such a list.
    ///     layout: "NCHW" or "NHWC".
    #[pyo3(signature = (x, parameters, statistics, layout="NCHW"))]
    fn infer<'py>(
        &self,
        py: Python<'py>,
        x: &Any<'py>,
        parameters: &Any<'py>,
        statistics: &Any<'py>,
        layout: &str,
    ) -> PyResult<Any<'py>> {
        by_dtype!(dtype("x", x)?, S => self.run::<S>(py, x, parameters, statistics, layout))
    }

    /// Packs parameters and statistics for inference, once for all calls.
    ///
    /// Args:
    ///     parameters: All float32 parameters in a row, or a list of arrays that hold them one
    ///         after the other. Later changes of them have no effect.
    ///     statistics: (2, norm channels) means and variances to normalise with, or such a list.
    ///
    /// Returns:
    ///     The program with these.
    ///
    /// Raises:
    ///     ValueError: If an array does not fit.
    ///     MemoryError: If there is not enough memory.
    fn freeze(slf: &Bound<'_, Self>, parameters: &Any<'_>, statistics: &Any<'_>) -> PyResult<FrozenProgram> {
        let (py, program, isa) = (slf.py(), &slf.get().0, active()?);
        let parameters = Pieces::<f32>::new("parameters", parameters, program.parameters())?;
        let statistics = Pieces::<f32>::new("statistics", statistics, 2 * program.norm_channels())?;
        let (parameters, statistics) = (&parameters.slices().concat()[..], &statistics.slices().concat()[..]);
        let prepared = compute(py, || Prepared::new(isa, program, parameters, statistics))?;
        Ok(FrozenProgram { program: slf.clone().unbind(), prepared })
    }

    /// The gradients by the input (None if the program wants none) and by the parameters.
    ///
    /// Args:
    ///     grad_output: Like the output.
    ///     parameters: As in the forward call.
    ///     masks: As in the forward call.
    ///     statistics: What the forward call returned.
    ///     workspace: What the forward call returned.
    ///     frozen: Whether the statistics were given, so that they are constants.
    ///     layout: "NCHW" or "NHWC".
    #[pyo3(signature = (grad_output, parameters, masks, statistics, workspace, frozen=false, layout="NCHW"))]
    fn backward<'py>(
        &self,
        py: Python<'py>,
        grad_output: &Any<'py>,
        parameters: &Any<'py>,
        masks: Option<&Any<'py>>,
        statistics: &Any<'py>,
        workspace: &Any<'py>,
        frozen: bool,
        layout: &str,
    ) -> PyResult<(Option<Any<'py>>, Any<'py>)> {
        by_dtype!(
            dtype("grad_output", grad_output)?,
            S => self.back::<S>(py, grad_output, parameters, masks, statistics, workspace, frozen, layout)
        )
    }
}

/// A program with weights that stay what they are: nothing is packed or compared at a call.
///
/// :meth:`FusedProgram.freeze` makes it. Several threads may call it at once.
#[pyclass(frozen, module = "kconv._kconv")]
pub struct FrozenProgram {
    program: Py<FusedProgram>,
    prepared: Prepared<f32>,
}

#[pymethods]
impl FrozenProgram {
    /// The program.
    #[getter]
    fn program(&self, py: Python<'_>) -> Py<FusedProgram> {
        self.program.clone_ref(py)
    }

    /// Forward in inference.
    ///
    /// Args:
    ///     x: (N, C, H, W) or (N, H, W, C), float32.
    ///     layout: "NCHW" or "NHWC".
    ///
    /// Returns:
    ///     The output.
    ///
    /// Raises:
    ///     ValueError: If the array or the layout does not fit.
    ///     TypeError: If it is no array of float32.
    ///     MemoryError: If there is not enough memory.
    #[pyo3(signature = (x, layout="NCHW"))]
    fn infer<'py>(&self, py: Python<'py>, x: &Any<'py>, layout: &str) -> PyResult<Any<'py>> {
        let prepared = &self.prepared;
        infer_images::<f32>(py, &self.program.get().0, x, layout, |program, images, x, y| {
            fused::infer_prepared(program, prepared, images, x, y);
        })
    }
}

/// Checks images and a program's memory for them, and has `infer` write the output.
fn infer_images<'py, S: ArrayElement<Wide: ArrayElement>>(
    py: Python<'py>,
    program: &Program,
    x: &Any<'py>,
    layout_name: &str,
    infer: impl FnOnce(&Program, (usize, Order), &[S], &mut [MaybeUninit<S>]) + Send,
) -> PyResult<Any<'py>> {
    let layout = layout(layout_name)?;
    let [input, output] = program.sizes();
    let x = Input::<S>::new("x", x)?;
    let (count, order) = images("x", &x, input, layout)?;
    program.workspace_len(count)?;
    let mut y =
        Output::images(py, &Batch::of(count, output).shape(layout), layout, order, None, std::slice::from_ref(&x))?;
    let (x, mut memory) = (x.image_values(layout, order)?, y.memory());
    compute(py, || infer(program, (count, order), x.as_slice(), memory.as_mut_slice()))?;
    y.finish()
}

/// Checks the number of values that arrays have together.
fn expect_len<T: ArrayElement>(name: &str, arrays: &[Input<'_, T>], len: usize) -> Result<()> {
    let values = |array: &Input<'_, T>| array.shape().iter().product();
    expect_values(name, arrays.iter().map(values).fold(0, usize::saturating_add), len)
}

/// An array of a known number of values.
fn flat<'py, T: ArrayElement>(name: &'static str, value: &Any<'py>, len: usize) -> PyResult<Values<T>> {
    let input = Input::<T>::new(name, value)?;
    expect_len(name, std::slice::from_ref(&input), len)?;
    input.values()
}

/// Values of one array, or of a list of arrays one after the other.
struct Pieces<'py, T: ArrayElement> {
    values: Vec<Values<T>>,
    /// These keep the memory alive, whatever becomes of the list.
    _arrays: Vec<Input<'py, T>>,
}

impl<'py, T: ArrayElement> Pieces<'py, T> {
    /// Those of a known number of values.
    fn new(name: &'static str, value: &Any<'py>, len: usize) -> PyResult<Self> {
        let arrays = match value.cast::<PyList>() {
            Ok(list) => list.iter().map(|item| Input::new(name, &item)).collect::<PyResult<Vec<_>>>()?,
            Err(_) => vec![Input::new(name, value)?],
        };
        expect_len(name, &arrays, len)?;
        Ok(Self { values: arrays.iter().map(Input::values).collect::<PyResult<_>>()?, _arrays: arrays })
    }

    fn slices(&self) -> Vec<&[T]> {
        self.values.iter().map(Values::as_slice).collect()
    }
}

/// The number of images that must have a size, and their order in memory.
fn images<T: ArrayElement>(name: &str, x: &Input<'_, T>, size: [usize; 3], layout: Order) -> Result<(usize, Order)> {
    Ok((expect_images(name, x.shape(), layout, size)?, x.memory_order(layout)))
}

/// How many wide numbers have the bytes of that many stored ones, which are an even number: what is
/// kept goes to Python as an array of these, because not every NumPy knows bfloat16.
fn kept<S: ArrayElement>(len: usize) -> usize {
    len * size_of::<S>() / size_of::<S::Wide>()
}

/// The stored numbers in the memory of [`kept`] ones.
fn stored<S: ArrayElement>(values: &[S::Wide], len: usize) -> &[S] {
    assert!(size_of_val(values) == len * size_of::<S>());
    // SAFETY: as many bytes, of no stricter alignment; any bits are a number.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), len) }
}

impl FusedProgram {
    fn train<'py, S: ArrayElement<Wide: ArrayElement>>(
        &self,
        py: Python<'py>,
        x: &Any<'py>,
        parameters: &Any<'py>,
        masks: Option<&Any<'py>>,
        statistics: Option<&Any<'py>>,
        layout_name: &str,
    ) -> PyResult<(Any<'py>, Any<'py>, Any<'py>)> {
        let (program, layout, isa) = (&self.0, layout(layout_name)?, active()?);
        let [input, output] = program.sizes();
        let x = Input::<S>::new("x", x)?;
        let (count, order) = images("x", &x, input, layout)?;
        let len = program.workspace_len(count)?;
        let parameters = flat::<S::Wide>("parameters", parameters, program.parameters())?;
        let masks = masks.map(|masks| flat::<S::Wide>("masks", masks, program.masks() * count)).transpose()?;
        let given =
            statistics.map(|given| flat::<S::Wide>("statistics", given, 2 * program.norm_channels())).transpose()?;
        let mut y =
            Output::images(py, &Batch::of(count, output).shape(layout), layout, order, None, std::slice::from_ref(&x))?;
        let mut statistics = Output::<S::Wide>::array(py, &[2, program.norm_channels()], None, &[])?;
        let (x, mut y_memory, mut statistics_memory) =
            (x.image_values(layout, order)?, y.memory(), statistics.memory());
        let memory = compute(py, || {
            let mut memory = Memory::new::<S>(len);
            let masks = masks.as_ref().map_or(&[][..], Values::as_slice);
            let arguments = Arguments { isa, program, count, order, parameters: parameters.as_slice(), masks };
            fused::forward::<S>(
                &arguments,
                x.as_slice(),
                given.as_ref().map(Values::as_slice),
                y_memory.as_mut_slice(),
                statistics_memory.as_mut_slice(),
                memory.as_mut(len),
            );
            memory
        })?;
        Ok((y.finish()?, statistics.finish()?, memory_array::<S::Wide>(py, memory, &[kept::<S>(len)])?.into_any()))
    }

    fn run<'py, S: ArrayElement<Wide: ArrayElement>>(
        &self,
        py: Python<'py>,
        x: &Any<'py>,
        parameters: &Any<'py>,
        statistics: &Any<'py>,
        layout_name: &str,
    ) -> PyResult<Any<'py>> {
        let (program, isa) = (&self.0, active()?);
        let parameters = Pieces::<S::Wide>::new("parameters", parameters, program.parameters())?;
        let statistics = Pieces::<S::Wide>::new("statistics", statistics, 2 * program.norm_channels())?;
        let (parameters, statistics) = (&parameters.slices()[..], &statistics.slices()[..]);
        infer_images::<S>(py, program, x, layout_name, |program, (count, order), x, y| {
            let inference = Inference { isa, program, count, order, parameters, statistics };
            fused::infer::<S>(&inference, x, y);
        })
    }

    fn back<'py, S: ArrayElement<Wide: ArrayElement>>(
        &self,
        py: Python<'py>,
        grad_output: &Any<'py>,
        parameters: &Any<'py>,
        masks: Option<&Any<'py>>,
        statistics: &Any<'py>,
        workspace: &Any<'py>,
        frozen: bool,
        layout_name: &str,
    ) -> PyResult<(Option<Any<'py>>, Any<'py>)> {
        let (program, layout, isa) = (&self.0, layout(layout_name)?, active()?);
        let [input, output] = program.sizes();
        let grad_output = Input::<S>::new("grad_output", grad_output)?;
        let (count, order) = images("grad_output", &grad_output, output, layout)?;
        let parameters = flat::<S::Wide>("parameters", parameters, program.parameters())?;
        let masks = masks.map(|masks| flat::<S::Wide>("masks", masks, program.masks() * count)).transpose()?;
        let statistics = flat::<S::Wide>("statistics", statistics, 2 * program.norm_channels())?;
        let len = program.workspace_len(count)?;
        let workspace = flat::<S::Wide>("workspace", workspace, kept::<S>(len))?;
        let mut grad_x = match program.input_grad() {
            true => Some(Output::<S>::images(
                py,
                &Batch::of(count, input).shape(layout),
                layout,
                order,
                None,
                std::slice::from_ref(&grad_output),
            )?),
            false => None,
        };
        let mut grad_parameters = Output::<S::Wide>::array(py, &[program.parameters()], None, &[])?;
        let grad_output = grad_output.image_values(layout, order)?;
        let (mut x_memory, mut memory) = (grad_x.as_mut().map(Output::memory), grad_parameters.memory());
        compute(py, || {
            let masks = masks.as_ref().map_or(&[][..], Values::as_slice);
            let arguments = Arguments { isa, program, count, order, parameters: parameters.as_slice(), masks };
            fused::backward::<S>(
                &arguments,
                frozen,
                statistics.as_slice(),
                stored(workspace.as_slice(), len),
                grad_output.as_slice(),
                x_memory.as_mut().map_or(&mut [], |memory| memory.as_mut_slice()),
                memory.as_mut_slice(),
            );
        })?;
        Ok((grad_x.map(Output::finish).transpose()?, grad_parameters.finish()?))
    }
}

/// Bytes of the large temporary memory that kconv recycles.
///
/// Returns:
///     A dictionary: ``used`` (held by running operations and by results that wait for their
///     backward pass) and ``free`` (kept for later).
///
/// Example:
///     >>> sorted(kconv.memory_stats())
///     ['free', 'used']
#[pyfunction]
fn memory_stats(py: Python<'_>) -> PyResult<Bound<'_, pyo3::types::PyDict>> {
    let (used, free) = memory::memory_stats();
    let stats = pyo3::types::PyDict::new(py);
    stats.set_item("used", used)?;
    stats.set_item("free", free)?;
    Ok(stats)
}

/// Returns the recycled memory that is free to the system.
///
/// Returns:
///     The number of bytes.
///
/// Example:
///     >>> kconv.release_memory() >= 0
///     True
#[pyfunction]
fn release_memory() -> usize {
    memory::release_memory()
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<FusedProgram>()?;
    module.add_class::<FrozenProgram>()?;
    module.add_function(wrap_pyfunction!(memory_stats, module)?)?;
    module.add_function(wrap_pyfunction!(release_memory, module)?)
}
