//! NumPy arrays as the slices that operations take, without copies wherever their memory allows.

use std::mem::MaybeUninit;
use std::slice;

use numpy::{Element as NumpyElement, PyArrayDyn, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::{Error, Result, bail};
use crate::kernels::Element;
use crate::shape::{Images, Order, Padding, WeightLayout};

/// The dtypes of the arrays that a call may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F64,
}

/// An element type of NumPy arrays.
pub trait ArrayElement: Element + NumpyElement {}
impl ArrayElement for f32 {}
impl ArrayElement for f64 {}

/// The dtype of an argument, or a `TypeError` that names the argument.
pub fn dtype(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Dtype> {
    if value.cast::<PyArrayDyn<f32>>().is_ok() {
        return Ok(Dtype::F32);
    }
    if value.cast::<PyArrayDyn<f64>>().is_ok() {
        return Ok(Dtype::F64);
    }
    let what = match value.cast::<PyUntypedArray>() {
        Ok(array) => format!("an array of {}", array.dtype()),
        Err(_) => value.get_type().name()?.to_string(),
    };
    Err(PyTypeError::new_err(format!("{name} is {what}, expected a float32 or float64 NumPy array")))
}

/// Parses the logical order of an image's axes.
pub fn layout(value: &str) -> Result<Order> {
    match value {
        "NCHW" => Ok(Order::Nchw),
        "NHWC" => Ok(Order::Nhwc),
        _ => bail!("layout={value:?}, expected \"NCHW\" or \"NHWC\""),
    }
}

/// Parses the order of a weight's axes.
pub fn weight_layout(value: &str) -> Result<WeightLayout> {
    match value {
        "OI" => Ok(WeightLayout::Oi),
        "IO" => Ok(WeightLayout::Io),
        _ => bail!("weight_layout={value:?}, expected \"OI\" or \"IO\""),
    }
}

/// Parses `padding`: "same", "valid", an integer or ((top, bottom), (left, right)).
pub fn padding(value: &Bound<'_, PyAny>) -> PyResult<Padding> {
    let expected = "expected \"same\", \"valid\", an integer from 0 or ((top, bottom), (left, right))";
    if let Ok(name) = value.extract::<String>() {
        return match name.as_str() {
            "same" => Ok(Padding::Same),
            "valid" => Ok(Padding::Valid),
            _ => Err(PyValueError::new_err(format!("padding={name:?}, {expected}"))),
        };
    }
    if let Ok(all) = value.extract::<usize>() {
        return Ok(Padding::Explicit([all, all], [all, all]));
    }
    match value.extract::<((usize, usize), (usize, usize))>() {
        Ok(((top, bottom), (left, right))) => Ok(Padding::Explicit([top, bottom], [left, right])),
        Err(_) => Err(PyValueError::new_err(format!("padding={value}, {expected}"))),
    }
}

/// An array argument of element type `T`.
pub struct Input<'py, T: ArrayElement> {
    name: &'static str,
    array: Bound<'py, PyArrayDyn<T>>,
}

/// Values to compute with: the array's own memory, or a copy of it in the wanted order.
pub enum Values<T> {
    Borrowed(*const T, usize),
    Copied(Vec<T>),
}

// SAFETY: plain memory that nothing writes while the call holds a reference to the array. (As with every library that
// releases the GIL, another Python thread that writes to an argument meanwhile makes the result meaningless.)
unsafe impl<T: Send> Send for Values<T> {}
// SAFETY: as above; only read.
unsafe impl<T: Sync> Sync for Values<T> {}

impl<T> Values<T> {
    pub fn as_slice(&self) -> &[T] {
        match self {
            // SAFETY: made from an array that the call keeps alive.
            Self::Borrowed(ptr, len) => unsafe { slice::from_raw_parts(*ptr, *len) },
            Self::Copied(values) => values,
        }
    }
}

/// Strides, in values, of an array of this shape in C order.
fn contiguous_strides(shape: &[usize]) -> Vec<isize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis].max(1) as isize;
    }
    strides
}

/// Whether an array of `shape` with `strides` (in values) lies in memory in the order of `axes`.
fn is_contiguous(shape: &[usize], strides: &[isize], axes: &[usize]) -> bool {
    let sorted: Vec<_> = axes.iter().map(|&axis| shape[axis]).collect();
    let expected = contiguous_strides(&sorted);
    sorted.contains(&0) || axes.iter().zip(expected).all(|(&axis, stride)| shape[axis] <= 1 || strides[axis] == stride)
}

/// The logical axes of an image in the order `memory`, where its logical order is `logical`.
fn axes(logical: Order, memory: Order) -> [usize; 4] {
    match (logical, memory) {
        (Order::Nchw, Order::Nhwc) => [0, 2, 3, 1],
        (Order::Nhwc, Order::Nchw) => [0, 3, 1, 2],
        _ => [0, 1, 2, 3],
    }
}

/// Height, width and channels of images of logical order `layout`.
pub fn image_axes(shape: &[usize], layout: Order) -> [usize; 3] {
    match layout {
        Order::Nchw => [shape[2], shape[3], shape[1]],
        Order::Nhwc => [shape[1], shape[2], shape[3]],
    }
}

impl<'py, T: ArrayElement> Input<'py, T> {
    /// Takes an argument that must be an array of `T`, as the call's first array is.
    pub fn new(name: &'static str, value: &Bound<'py, PyAny>) -> PyResult<Self> {
        match value.cast::<PyArrayDyn<T>>() {
            Ok(array) => Ok(Self { name, array: array.clone() }),
            Err(_) => {
                dtype(name, value)?;
                let (is, expected) = if size_of::<T>() == 4 { ("float64", "float32") } else { ("float32", "float64") };
                Err(PyTypeError::new_err(format!("{name} is {is}, expected {expected} as the other arrays")))
            }
        }
    }

    pub fn shape(&self) -> &[usize] {
        self.array.shape()
    }

    /// Strides in values, or `None` where they are no multiple of a value or the memory is not aligned.
    fn strides(&self) -> Option<Vec<isize>> {
        let size = size_of::<T>() as isize;
        let aligned = (self.array.data() as usize).is_multiple_of(align_of::<T>());
        let strides = self.array.strides();
        (aligned && strides.iter().all(|stride| stride % size == 0)).then(|| strides.iter().map(|s| s / size).collect())
    }

    /// The order of these images in memory: their logical one, unless the memory is contiguous in the other.
    fn memory_order(&self, layout: Order) -> Order {
        let other = if layout == Order::Nchw { Order::Nhwc } else { Order::Nchw };
        let contiguous =
            |order| self.strides().is_some_and(|strides| is_contiguous(self.shape(), &strides, &axes(layout, order)));
        if !contiguous(layout) && contiguous(other) { other } else { layout }
    }

    /// The geometry of these images, in the order in which they lie in memory.
    pub fn images(&self, layout: Order) -> Result<Images> {
        let shape = self.shape();
        if shape.len() != 4 {
            let expected = if layout == Order::Nchw { "(N, C, H, W)" } else { "(N, H, W, C)" };
            bail!("{} has shape {shape:?}, expected {expected}", self.name);
        }
        let [height, width, channels] = image_axes(shape, layout);
        Ok(Images { count: shape[0], pixels: height * width, channels, order: self.memory_order(layout) })
    }

    /// The images in `order`; a copy where they do not lie so.
    pub fn image_values(&self, layout: Order, order: Order) -> Values<T> {
        self.values_in(&axes(layout, order))
    }

    /// The values in C order.
    pub fn values(&self) -> Values<T> {
        let axes: Vec<_> = (0..self.shape().len()).collect();
        self.values_in(&axes)
    }

    fn values_in(&self, axes: &[usize]) -> Values<T> {
        if let Some(strides) = self.strides()
            && is_contiguous(self.shape(), &strides, axes)
        {
            return Values::Borrowed(self.array.data(), self.array.len());
        }
        let shape: Vec<_> = axes.iter().map(|&axis| self.shape()[axis]).collect();
        let strides: Vec<_> = axes.iter().map(|&axis| self.array.strides()[axis]).collect();
        let len = shape.iter().product();
        let mut values = Vec::with_capacity(len);
        let mut index = vec![0; shape.len()];
        let base = self.array.data().cast::<u8>();
        for _ in 0..len {
            let offset: isize = index.iter().zip(&strides).map(|(&i, stride)| i as isize * stride).sum();
            // SAFETY: an index inside the array's shape; NumPy's strides keep it inside the array's memory, which may
            // be unaligned.
            values.push(unsafe { base.offset(offset).cast::<T>().read_unaligned() });
            for axis in (0..shape.len()).rev() {
                index[axis] += 1;
                if index[axis] < shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        Values::Copied(values)
    }
}

/// Where a result goes: `out`, or a new array.
pub struct Output<'py, T: ArrayElement> {
    /// The array to return.
    array: Bound<'py, PyArrayDyn<T>>,
    /// Axes of `array` in the order in which the operation writes its result.
    axes: Vec<usize>,
    /// A temporary result to be copied to `array` at the end, where `array` cannot be written directly.
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
        shape: [usize; 4],
        layout: Order,
        order: Order,
        out: Option<&Bound<'py, PyAny>>,
        inputs: &[&Input<'py, T>],
    ) -> PyResult<Self> {
        Self::new(py, &shape, &axes(layout, order), out, inputs)
    }

    /// An array of this shape in C order.
    pub fn array(
        py: Python<'py>,
        shape: &[usize],
        out: Option<&Bound<'py, PyAny>>,
        inputs: &[&Input<'py, T>],
    ) -> PyResult<Self> {
        let axes: Vec<_> = (0..shape.len()).collect();
        Self::new(py, shape, &axes, out, inputs)
    }

    fn new(
        py: Python<'py>,
        shape: &[usize],
        axes: &[usize],
        out: Option<&Bound<'py, PyAny>>,
        inputs: &[&Input<'py, T>],
    ) -> PyResult<Self> {
        let axes = axes.to_vec();
        let Some(out) = out else {
            let sorted: Vec<_> = axes.iter().map(|&axis| shape[axis]).collect();
            // SAFETY: the operation writes every value before anything reads it.
            let array = unsafe { PyArrayDyn::<T>::new(py, sorted, false) };
            let array = if axes.is_sorted() {
                array
            } else {
                // The inverse permutation gives the array its logical shape.
                let mut inverse = vec![0; axes.len()];
                axes.iter().enumerate().for_each(|(i, &axis)| inverse[axis] = i);
                array.permute(Some(inverse))?
            };
            return Ok(Self { array, axes, detour: None });
        };
        let out = Input::<T>::new("out", out)?;
        if out.shape() != shape {
            return Err(Error::new(format!("out has shape {:?}, expected {shape:?}", out.shape())).into());
        }
        if out.array.try_readwrite().is_err() {
            return Err(PyValueError::new_err("out is not writable, expected a writable array"));
        }
        let direct = out.strides().is_some_and(|strides| is_contiguous(shape, &strides, &axes));
        let overlaps = inputs.iter().any(|input| overlap(&input.array, &out.array));
        let detour = (!direct || overlaps).then(|| vec![T::default(); out.array.len()]);
        Ok(Self { array: out.array, axes, detour })
    }

    /// The memory to write; valid until `self` is finished.
    pub fn memory(&mut self) -> OutputMemory<T> {
        match &mut self.detour {
            Some(values) => OutputMemory(values.as_mut_ptr(), values.len()),
            None => OutputMemory(self.array.data(), self.array.len()),
        }
    }

    /// The array, once the operation has written its memory.
    pub fn finish(self) -> PyResult<Bound<'py, PyAny>> {
        if let Some(values) = self.detour {
            let shape: Vec<_> = self.axes.iter().map(|&axis| self.array.shape()[axis]).collect();
            let source = ndarray::ArrayD::from_shape_vec(shape, values).expect("as many values as the shape has");
            let mut target = self.array.try_readwrite().map_err(|error| PyValueError::new_err(error.to_string()))?;
            target.as_array_mut().permuted_axes(self.axes).assign(&source);
        }
        Ok(self.array.into_any())
    }
}

/// Whether two arrays may share memory: whether their address ranges meet.
fn overlap<T: NumpyElement>(a: &Bound<'_, PyArrayDyn<T>>, b: &Bound<'_, PyArrayDyn<T>>) -> bool {
    let range = |array: &Bound<'_, PyArrayDyn<T>>| {
        let start = array.data() as isize;
        let mut range = (start, start + size_of::<T>() as isize);
        for (&length, &stride) in array.shape().iter().zip(array.strides()) {
            if length == 0 {
                return (start, start);
            }
            let extent = (length as isize - 1) * stride;
            if extent < 0 { range.0 += extent } else { range.1 += extent }
        }
        range
    };
    let (a, b) = (range(a), range(b));
    a.0 < b.1 && b.0 < a.1
}
