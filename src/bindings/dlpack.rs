//! DLPack: tensors of other libraries in capsules, a protocol that NumPy, PyTorch, JAX and
//! TensorFlow share (dmlc.github.io/dlpack). PyTorch reaches the kernels through it: a capsule
//! costs it a fraction of a NumPy array.

use std::ffi::{CStr, c_void};
use std::ptr;

use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

use super::arrays::{ArrayElement, Axes, Dtype, StridedView, no_memory};
use crate::memory::Memory;

/// A capsule's name until somebody takes its tensor over.
const UNUSED: &CStr = c"dltensor";
/// The device code of the CPU and the type codes of floating-point numbers.
const CPU: i32 = 1;
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;

/// `DLTensor` of dlpack.h; strides are in values, and null where the axes are in C order.
#[repr(C)]
pub struct Tensor {
    data: *mut c_void,
    device: [i32; 2],
    rank: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// `DLManagedTensor` of dlpack.h.
#[repr(C)]
struct Managed {
    tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

/// A tensor of kconv's, with all that it points to.
#[repr(C)]
struct Owned {
    managed: Managed,
    shape: Axes<i64>,
    strides: Axes<i64>,
    memory: Memory,
}

/// The tensor in a capsule, which nobody may take over while the borrow lasts; `None` for other
/// objects.
pub fn tensor<'a>(value: &'a Bound<'_, PyAny>) -> Option<&'a Tensor> {
    let capsule = value.cast::<PyCapsule>().ok()?.as_ptr();
    // SAFETY: a capsule; by its name, DLPack promises what its pointer refers to.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, UNUSED.as_ptr()) == 0 {
            return None;
        }
        ffi::PyCapsule_GetPointer(capsule, UNUSED.as_ptr()).cast::<Tensor>().as_ref()
    }
}

impl Tensor {
    /// The type of the values, or what they are instead.
    pub fn dtype(&self) -> Result<Dtype, String> {
        match (self.code, self.bits, self.lanes) {
            (FLOAT, 32, 1) => Ok(Dtype::F32),
            (FLOAT, 64, 1) => Ok(Dtype::F64),
            (FLOAT, bits, 1) => Err(format!("a tensor of float{bits}")),
            (BFLOAT, 16, 1) => Ok(Dtype::BF16),
            (code, bits, _) => Err(format!("a tensor of DLPack type {code} with {bits} bits")),
        }
    }

    /// The memory, where the values are of type `T`.
    pub fn view<T: ArrayElement>(&self, name: &str) -> PyResult<Option<StridedView<T>>> {
        let size = size_of::<T>();
        if self.dtype() != Ok(T::DTYPE) {
            return Ok(None);
        }
        if self.device[0] != CPU {
            let device = self.device[0];
            return Err(PyTypeError::new_err(format!("{name} is on DLPack device {device}, expected the CPU (1)")));
        }
        let rank = self.rank as usize;
        // SAFETY: DLPack's promise: as many sizes and strides as there are axes.
        let numbers = |start: *const i64| unsafe { (0..rank).map(move |axis| *start.add(axis)) };
        let shape: Axes<usize> = numbers(self.shape).map(|size| size as usize).collect();
        let strides = if self.strides.is_null() {
            (0..rank).map(|axis| (size * shape[axis + 1..].iter().product::<usize>()) as isize).collect()
        } else {
            numbers(self.strides).map(|stride| stride as isize * size as isize).collect()
        };
        let data = self.data.cast::<u8>().wrapping_add(self.byte_offset as usize).cast();
        Ok(Some(StridedView { data, shape, strides }))
    }
}

/// The capsule of a new tensor (strides in bytes), and its first value.
pub fn new_capsule<'py, T: ArrayElement>(
    py: Python<'py>,
    shape: &[usize],
    strides: &[isize],
) -> PyResult<(*mut T, Bound<'py, PyAny>)> {
    let len = shape.iter().product();
    let mut memory = Memory::try_new::<T>(len).ok_or_else(|| no_memory("the result", shape))?;
    let data = memory.as_mut::<T>(len).as_mut_ptr();
    let tensor = Tensor {
        data: data.cast(),
        device: [CPU, 0],
        rank: shape.len() as i32,
        code: if T::DTYPE == Dtype::BF16 { BFLOAT } else { FLOAT },
        bits: 8 * size_of::<T>() as u8,
        lanes: 1,
        shape: ptr::null(),
        strides: ptr::null(),
        byte_offset: 0,
    };
    let mut owned = Box::new(Owned {
        managed: Managed { tensor, context: ptr::null_mut(), deleter: Some(delete) },
        shape: shape.iter().map(|&size| size as i64).collect(),
        strides: strides.iter().map(|&stride| stride as i64 / size_of::<T>() as i64).collect(),
        memory,
    });
    // Only now, as small vectors lie inside and have moved with the rest.
    owned.managed.tensor.shape = owned.shape.as_ptr();
    owned.managed.tensor.strides = owned.strides.as_ptr();
    let owned = Box::into_raw(owned);
    // SAFETY: a capsule that owns the tensor until somebody takes it over. Without one, the tensor
    // is freed here.
    unsafe {
        let capsule = ffi::PyCapsule_New(owned.cast(), UNUSED.as_ptr(), Some(destroy));
        match Bound::from_owned_ptr_or_err(py, capsule) {
            Ok(capsule) => Ok((data.cast(), capsule)),
            Err(error) => {
                delete(owned.cast());
                Err(error)
            }
        }
    }
}

/// Frees a tensor of kconv's; on any thread.
unsafe extern "C" fn delete(tensor: *mut Managed) {
    // SAFETY: the pointer of `new_capsule`, called once.
    drop(unsafe { Box::from_raw(tensor.cast::<Owned>()) });
}

/// Frees the tensor of a capsule that is gone, unless somebody took it over.
unsafe extern "C" fn destroy(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls this with a capsule of `new_capsule`.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, UNUSED.as_ptr()) == 1 {
            delete(ffi::PyCapsule_GetPointer(capsule, UNUSED.as_ptr()).cast());
        }
    }
}
