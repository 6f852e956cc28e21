//! NumPy arrays and DLPack tensors as the slices that operations take, without copies wherever
//! their memory allows.

use std::fmt;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::slice;
use std::str::FromStr;

use half::bf16;
use numpy::{
    Element as NumpyElement, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyMemoryError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use smallvec::SmallVec;

use super::call::Float;
use super::dlpack;
use super::operation::expect_shape;
use crate::error::{Error, Result, bail};
use crate::memory::{Memory, RECYCLED};
use crate::shape::Order;

/// The dtypes of the arrays that a call may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    BF16,
    F32,
    F64,
}

/// Evaluates an expression with the type that a [`Dtype`] stands for.
macro_rules! by_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::bindings::arrays::Dtype::BF16 => {
                type $T = half::bf16;
                $body
            }
            $crate::bindings::arrays::Dtype::F32 => {
                type $T = f32;
                $body
            }
            $crate::bindings::arrays::Dtype::F64 => {
                type $T = f64;
                $body
            }
        }
    };
}
pub(super) use by_dtype;

impl Dtype {
    /// What values are computed with.
    pub fn wide(self) -> Self {
        if self == Self::BF16 { Self::F32 } else { self }
    }

    /// Bytes of a value.
    pub fn size(self) -> usize {
        by_dtype!(self, T => size_of::<T>())
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BF16 => "bfloat16",
            Self::F32 => "float32",
            Self::F64 => "float64",
        })
    }
}

impl FromStr for Dtype {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        match [Self::BF16, Self::F32, Self::F64].into_iter().find(|dtype| dtype.to_string() == name) {
            Some(dtype) => Ok(dtype),
            None => bail!("dtype={name:?}, expected \"float32\", \"float64\" or \"bfloat16\""),
        }
    }
}

/// An element type of NumPy arrays.
pub trait ArrayElement: Float + NumpyElement {}
impl<T: Float + NumpyElement> ArrayElement for T {}

/// The array, where it is one of type `T`.
fn array<'a, 'py, T: ArrayElement>(value: &'a Bound<'py, PyAny>) -> Option<&'a Bound<'py, PyArrayDyn<T>>> {
    // NumPy knows bfloat16 from ml_dtypes, which need not be there unless arrays of it are; only
    // then can it tell.
    let known = T::DTYPE != Dtype::BF16
        || value
            .cast::<PyUntypedArray>()
            .is_ok_and(|array| array.dtype().typeobj().name().is_ok_and(|name| name == "bfloat16"));
    if known { value.cast().ok() } else { None }
}

/// The dtype of an argument, or a `TypeError` that names the argument.
pub fn dtype(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Dtype> {
    if array::<f32>(value).is_some() {
        return Ok(Dtype::F32);
    }
    if array::<f64>(value).is_some() {
        return Ok(Dtype::F64);
    }
    if array::<bf16>(value).is_some() {
        return Ok(Dtype::BF16);
    }
    let what = if let Ok(array) = value.cast::<PyUntypedArray>() {
        format!("an array of {}", array.dtype())
    } else if let Some(tensor) = dlpack::tensor(value) {
        match tensor.dtype() {
            Ok(dtype) => return Ok(dtype),
            Err(what) => what,
        }
    } else {
        type_name(value)
    };
    Err(PyTypeError::new_err(format!("{name} is {what}, expected a NumPy array of float32, float64 or bfloat16")))
}

/// The name of a value's type, for messages.
pub fn type_name(value: &Bound<'_, PyAny>) -> String {
    value.get_type().name().map_or_else(|_| "an object".into(), |name| name.to_string())
}

/// The most bytes that an array may have.
const MAX_BYTES: usize = isize::MAX as usize;

/// Numbers of an array's axes, few enough to need no allocation.
pub type Axes<N> = SmallVec<[N; 4]>;

/// An array's memory: its first value, sizes and strides in bytes.
pub struct StridedView<T> {
    pub data: *mut T,
    pub shape: Axes<usize>,
    pub strides: Axes<isize>,
}

/// An array argument of element type `T`: a NumPy array, or the capsule of a DLPack tensor.
pub struct Input<'py, T: ArrayElement> {
    name: &'static str,
    view: StridedView<T>,
    /// Keeps the memory alive.
    owner: Bound<'py, PyAny>,
}

/// Values to compute with: the array's own memory, or a copy of it in the wanted order.
pub enum Values<T> {
    Borrowed(*const T, usize),
    Copied(Vec<T>),
}

// SAFETY: plain memory that nothing writes while the call holds a reference to the array. (As with
// every library that releases the GIL, another Python thread that writes to an argument meanwhile
// makes the result meaningless.)
unsafe impl<T: Send> Send for Values<T> {}
// SAFETY: as above; only read.
unsafe impl<T: Sync> Sync for Values<T> {}

impl<T> Values<T> {
    pub fn as_slice(&self) -> &[T] {
        match self {
            // SAFETY: made from an array that the call keeps alive.
            Self::Borrowed(ptr, len @ 1..) => unsafe { slice::from_raw_parts(*ptr, *len) },
            Self::Borrowed(_, 0) => &[], // where the pointer may be null
            Self::Copied(values) => values,
        }
    }
}

/// The axes of an array in C order.
fn c_order(shape: &[usize]) -> Axes<usize> {
    let mut axes = Axes::from_slice(shape);
    axes.iter_mut().enumerate().for_each(|(i, axis)| *axis = i);
    axes
}

/// The logical axes of an image in the order `memory`, where its logical order is `logical`.
fn axes(logical: Order, memory: Order) -> [usize; 4] {
    match (logical, memory) {
        (Order::Nchw, Order::Nhwc) => [0, 2, 3, 1],
        (Order::Nhwc, Order::Nchw) => [0, 3, 1, 2],
        _ => [0, 1, 2, 3],
    }
}

impl<T: ArrayElement> StridedView<T> {
    fn of_array(array: &Bound<'_, PyArrayDyn<T>>) -> Self {
        Self { data: array.data(), shape: Axes::from_slice(array.shape()), strides: Axes::from_slice(array.strides()) }
    }

    /// The number of values.
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the values lie in memory in the order of `axes`, aligned.
    fn is_contiguous(&self, axes: &[usize]) -> bool {
        let mut expected = size_of::<T>() as isize;
        let dense = axes.iter().rev().all(|&axis| {
            let fits = self.shape[axis] <= 1 || self.strides[axis] == expected;
            expected *= self.shape[axis] as isize;
            fits
        });
        dense && self.data.is_aligned() || self.len() == 0
    }

    /// The address of each value in the order of `axes`; it may be unaligned.
    fn addresses(&self, axes: &[usize]) -> impl Iterator<Item = *mut T> {
        let shape: Axes<_> = axes.iter().map(|&axis| self.shape[axis]).collect();
        let strides: Axes<_> = axes.iter().map(|&axis| self.strides[axis]).collect();
        let mut index = Axes::from_elem(0, shape.len());
        let base = self.data;
        (0..self.len()).map(move |_| {
            let offset: isize = index.iter().zip(&strides).map(|(&i, stride)| i as isize * stride).sum();
            for axis in (0..shape.len()).rev() {
                index[axis] += 1;
                if index[axis] < shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
            base.wrapping_byte_offset(offset)
        })
    }

    /// The range of addresses that the values lie in.
    fn range(&self) -> Range<isize> {
        let start = self.data as isize;
        let mut range = start..start + size_of::<T>() as isize;
        for (&length, &stride) in self.shape.iter().zip(&self.strides) {
            if length == 0 {
                return start..start;
            }
            let extent = (length as isize - 1) * stride;
            if extent < 0 { range.start += extent } else { range.end += extent }
        }
        range
    }
}

impl<'py, T: ArrayElement> Input<'py, T> {
    /// Takes an argument that must be an array of `T`, as the call's first array is.
    pub fn new(name: &'static str, value: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Some(array) = array::<T>(value) {
            return Ok(Self { name, view: StridedView::of_array(array), owner: value.clone() });
        }
        if let Some(view) = dlpack::tensor(value).map(|tensor| tensor.view(name)).transpose()?.flatten() {
            return Ok(Self { name, view, owner: value.clone() });
        }
        let (is, expected) = (dtype(name, value)?, T::DTYPE);
        Err(PyTypeError::new_err(format!("{name} is {is}, expected {expected} as the other arrays")))
    }

    pub fn shape(&self) -> &[usize] {
        &self.view.shape
    }

    /// Whether it is a capsule, for which a result is one, too.
    pub fn is_capsule(&self) -> bool {
        self.owner.is_instance_of::<PyCapsule>()
    }

    /// The order of these images in memory: their logical one, unless the memory is contiguous in
    /// the other.
    pub fn memory_order(&self, layout: Order) -> Order {
        let other = if layout == Order::Nchw { Order::Nhwc } else { Order::Nchw };
        let contiguous = |order| self.view.is_contiguous(&axes(layout, order));
        let is_other = self.shape().len() == 4 && !contiguous(layout) && contiguous(other);
        if is_other { other } else { layout }
    }

    /// The images in `order`; a copy where they do not lie so.
    pub fn image_values(&self, layout: Order, order: Order) -> PyResult<Values<T>> {
        self.values_in(&axes(layout, order))
    }

    /// The values in C order.
    pub fn values(&self) -> PyResult<Values<T>> {
        self.values_in(&c_order(self.shape()))
    }

    fn values_in(&self, axes: &[usize]) -> PyResult<Values<T>> {
        if self.view.is_contiguous(axes) {
            return Ok(Values::Borrowed(self.view.data, self.view.len()));
        }
        let mut copy = room::<T>(self.name, self.shape())?;
        // SAFETY: addresses of the array's own values.
        copy.extend(self.view.addresses(axes).map(|address| unsafe { address.read_unaligned() }));
        Ok(Values::Copied(copy))
    }
}

/// An empty vector with room for as many values as an array of this shape has, or a `MemoryError`:
/// of an array with strides of 0 a copy may be too large.
fn room<T>(name: &str, shape: &[usize]) -> PyResult<Vec<T>> {
    let mut values = Vec::new();
    match values.try_reserve_exact(shape.iter().product()) {
        Ok(()) => Ok(values),
        Err(_) => Err(no_memory(&format!("a copy of {name}"), shape)),
    }
}

/// The error of an array that memory is too small for.
pub fn no_memory(what: &str, shape: &[usize]) -> PyErr {
    PyMemoryError::new_err(format!("no memory for {what} of shape {shape:?}"))
}

/// Checks that a result has a size at all; NumPy demands that of the axes that are not 0 even where
/// others are.
fn check_size<T>(shape: &[usize]) -> Result<()> {
    let bytes = shape.iter().filter(|&&size| size > 0).try_fold(size_of::<T>(), |all, &size| all.checked_mul(size));
    match bytes {
        Some(..=MAX_BYTES) => Ok(()),
        _ => bail!("the result has shape {shape:?}, expected at most {MAX_BYTES} bytes"),
    }
}

/// Where a result goes: `out`, or a new array.
pub struct Output<'py, T: ArrayElement> {
    /// What to return.
    result: Bound<'py, PyAny>,
    view: StridedView<T>,
    /// Axes of `view` in the order in which the operation writes its result.
    axes: Axes<usize>,
    /// A temporary result to be copied to `view` at the end, where that cannot be written directly.
    detour: Option<Vec<T>>,
}

/// The memory of an [`Output`] while the GIL is released.
pub struct OutputMemory<T>(*mut T, usize);

// SAFETY: memory of a new array or one that the caller passed as `out` to be written.
unsafe impl<T: Send> Send for OutputMemory<T> {}

impl<T> OutputMemory<T> {
    pub fn as_mut_slice(&mut self) -> &mut [MaybeUninit<T>] {
        // SAFETY: see `Output::memory`.
        unsafe { slice::from_raw_parts_mut(self.0.cast(), self.1) }
    }
}

impl<'py, T: ArrayElement> Output<'py, T> {
    /// Images of this logical shape, in memory in `order`.
    pub fn images(
        py: Python<'py>,
        shape: &[usize],
        layout: Order,
        order: Order,
        out: Option<&Bound<'py, PyAny>>,
        inputs: &[Input<'py, T>],
    ) -> PyResult<Self> {
        Self::new(py, shape, &axes(layout, order), out, inputs)
    }

    /// An array of this shape in C order.
    pub fn array(
        py: Python<'py>,
        shape: &[usize],
        out: Option<&Bound<'py, PyAny>>,
        inputs: &[Input<'py, T>],
    ) -> PyResult<Self> {
        Self::new(py, shape, &c_order(shape), out, inputs)
    }

    fn new(
        py: Python<'py>,
        shape: &[usize],
        axes: &[usize],
        out: Option<&Bound<'py, PyAny>>,
        inputs: &[Input<'py, T>],
    ) -> PyResult<Self> {
        let axes = Axes::from_slice(axes);
        let Some(out) = out else {
            check_size::<T>(shape)?;
            let mut sorted = Axes::from_slice(shape);
            sorted.iter_mut().zip(&axes).for_each(|(size, &axis)| *size = shape[axis]);
            let mut strides = Axes::from_slice(&[0; 4][..axes.len()]);
            let mut stride = size_of::<T>() as isize;
            for &axis in axes.iter().rev() {
                strides[axis] = stride;
                stride *= shape[axis].max(1) as isize;
            }
            let (data, result) = if inputs.first().is_some_and(|input| input.is_capsule()) {
                dlpack::new_capsule::<T>(py, shape, &strides)?
            } else {
                new_array::<T>(py, &sorted, &axes)?
            };
            return Ok(Self {
                result,
                view: StridedView { data, shape: Axes::from_slice(shape), strides },
                axes,
                detour: None,
            });
        };
        if array::<T>(out).is_some_and(|array| array.try_readwrite().is_err()) {
            return Err(PyValueError::new_err("out is not writable, expected a writable array"));
        }
        let out = Input::<T>::new("out", out)?;
        expect_shape("out", out.shape(), shape)?;
        let overlaps = inputs.iter().any(|input| overlap(&input.view, &out.view));
        let detour = if overlaps || !out.view.is_contiguous(&axes) {
            let mut values = room("out", shape)?;
            values.resize(out.view.len(), T::default());
            Some(values)
        } else {
            None
        };
        Ok(Self { result: out.owner, view: out.view, axes, detour })
    }

    /// The memory to write; valid until `self` is finished.
    pub fn memory(&mut self) -> OutputMemory<T> {
        match &mut self.detour {
            Some(values) => OutputMemory(values.as_mut_ptr(), values.len()),
            None => OutputMemory(self.view.data, self.view.len()),
        }
    }

    /// The array, once the operation has written its memory.
    pub fn finish(self) -> PyResult<Bound<'py, PyAny>> {
        if let Some(values) = self.detour {
            for (address, value) in self.view.addresses(&self.axes).zip(values) {
                // SAFETY: addresses of the array's own values.
                unsafe { address.write_unaligned(value) };
            }
        }
        Ok(self.result)
    }
}

/// Owns an array's memory and recycles it when the array is gone.
#[pyclass(frozen)]
struct Owner(#[expect(dead_code, reason = "held until dropped")] Memory);

/// An array whose axes lie in memory in the order of `axes` with the sizes `sorted`, and its first
/// value; large memory is recycled.
fn new_array<'py, T: ArrayElement>(
    py: Python<'py>,
    sorted: &[usize],
    axes: &[usize],
) -> PyResult<(*mut T, Bound<'py, PyAny>)> {
    let len = sorted.iter().product::<usize>();
    let array = if len * size_of::<T>() < RECYCLED {
        // SAFETY: the operation writes every value before anything reads it.
        unsafe { PyArrayDyn::<T>::new(py, sorted, false) }
    } else {
        let memory = Memory::try_new::<T>(len).ok_or_else(|| no_memory("the result", sorted))?;
        memory_array(py, memory, sorted)?
    };
    let data = array.data();
    if axes.is_sorted() {
        return Ok((data, array.into_any()));
    }
    // The inverse permutation gives the array its logical shape.
    let mut inverse = vec![0; axes.len()];
    axes.iter().enumerate().for_each(|(i, &axis)| inverse[axis] = i);
    Ok((data, array.permute(Some(inverse))?.into_any()))
}

/// An array in memory of kconv's own.
pub fn memory_array<'py, T: ArrayElement>(
    py: Python<'py>,
    mut memory: Memory,
    shape: &[usize],
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    let start = memory.as_mut::<T>(shape.iter().product()).as_ptr().cast::<T>();
    let owner = Bound::new(py, Owner(memory))?.into_any();
    // SAFETY: as many values as the shape has, which live as long as `owner`, which gives nobody
    // else access; the operation writes them before anything reads them.
    Ok(unsafe {
        let view = ndarray::ArrayViewD::from_shape_ptr(shape, start);
        PyArrayDyn::borrow_from_array(&view, owner)
    })
}

/// Whether two arrays may share memory: whether their address ranges meet.
fn overlap<T: ArrayElement>(a: &StridedView<T>, b: &StridedView<T>) -> bool {
    let (a, b) = (a.range(), b.range());
    a.start < b.end && b.start < a.end
}
