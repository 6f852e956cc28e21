//! A call of an operation by a framework that hands over its own buffers: XLA or TensorFlow.
//!
//! Buffers are dense and row-major, so the logical order of axes is the order in memory.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;

use half::bf16;

use super::arrays::Dtype;
use super::operation::Dims;
use crate::error::{Result, bail};
use crate::memory;
use crate::simd::element::Element;

/// An element type of the kernels.
pub trait Float: Element {
    /// Its dtype.
    const DTYPE: Dtype;
}
impl Float for bf16 {
    const DTYPE: Dtype = Dtype::BF16;
}
impl Float for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl Float for f64 {
    const DTYPE: Dtype = Dtype::F64;
}

/// The dtype and the axes of an array.
#[derive(Clone, Copy)]
pub struct Array {
    dtype: Dtype,
    shape: Dims,
}

/// An operand: a dense row-major array.
#[derive(Clone, Copy)]
pub struct Buffer<'a> {
    array: Array,
    data: *const c_void,
    lifetime: PhantomData<&'a [u8]>,
}

/// The array that a call computes.
pub struct Output<'a> {
    array: Array,
    data: *mut c_void,
    lifetime: PhantomData<&'a mut [u8]>,
}

/// A value that the program's author chose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Attribute<'a> {
    /// A number.
    Integer(i64),
    /// An array of numbers.
    Integers(&'a [i64]),
    /// A string.
    Text(&'a str),
}

impl fmt::Display for Attribute<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(value) => write!(f, "{value}"),
            Self::Integers(values) => write!(f, "{values:?}"),
            Self::Text(text) => write!(f, "{text:?}"),
        }
    }
}

/// The attributes of a call.
pub trait Attributes {
    /// The attribute of that name.
    fn attribute(&self, name: &str) -> Result<Attribute<'_>>;
}

/// What an operation sees of the call in progress: operands and attributes.
pub struct Call<'a> {
    operands: &'a [Buffer<'a>],
    attributes: &'a dyn Attributes,
}

impl<'a> Call<'a> {
    /// A call with these operands and attributes.
    pub fn new(operands: &'a [Buffer<'a>], attributes: &'a dyn Attributes) -> Self {
        Self { operands, attributes }
    }

    /// The operands, of which there must be as many as `N`.
    pub fn operands<const N: usize>(&self) -> Result<[Buffer<'a>; N]> {
        match self.operands.try_into() {
            Ok(operands) => Ok(operands),
            Err(_) => bail!("got {} operands, expected {N}", self.operands.len()),
        }
    }

    /// All operands.
    pub fn operand_list(&self) -> &'a [Buffer<'a>] {
        self.operands
    }

    /// The attribute of that name.
    pub fn attribute(&self, name: &str) -> Result<Attribute<'a>> {
        self.attributes.attribute(name)
    }

    /// An integer attribute.
    pub fn integer(&self, name: &str) -> Result<i64> {
        match self.attribute(name)? {
            Attribute::Integer(value) => Ok(value),
            other => bail!("attribute {name}={other}, expected an integer"),
        }
    }

    /// An attribute of several integers.
    pub fn integers(&self, name: &str) -> Result<&'a [i64]> {
        match self.attribute(name)? {
            Attribute::Integers(values) => Ok(values),
            other => bail!("attribute {name}={other}, expected integers"),
        }
    }

    /// A string attribute.
    pub fn text(&self, name: &str) -> Result<&'a str> {
        match self.attribute(name)? {
            Attribute::Text(value) => Ok(value),
            other => bail!("attribute {name}={other}, expected a string"),
        }
    }
}

/// The codes of errors that XLA and TensorFlow share.
pub const INVALID_ARGUMENT: c_int = 3;
const RESOURCE_EXHAUSTED: c_int = 8;
pub const INTERNAL: c_int = 13;

/// Runs a call; errors and panics with the code and the message that the framework gets.
pub fn guarded(run: impl FnOnce() -> Result<()>) -> std::result::Result<(), (c_int, String)> {
    match catch_unwind(AssertUnwindSafe(|| memory::catch(run))) {
        Ok(Ok(Ok(()))) => Ok(()),
        Ok(Ok(Err(error))) => Err((INVALID_ARGUMENT, error.to_string())),
        Ok(Err(no_memory)) => Err((RESOURCE_EXHAUSTED, format!("kconv: {no_memory}"))),
        Err(_) => Err((INTERNAL, "kconv: a kernel panicked".into())),
    }
}

impl Array {
    /// An array of at most four axes.
    pub fn new(dtype: Dtype, shape: &[usize]) -> Result<Self> {
        Ok(Self { dtype, shape: Dims::new(shape)? })
    }

    /// The dtype.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The sizes of the axes.
    pub fn shape(&self) -> &Dims {
        &self.shape
    }

    /// The number of values, all of type `T`.
    fn len<T: Float>(&self) -> Result<usize> {
        if self.dtype != T::DTYPE {
            bail!("the arrays of a call differ in type: {} and {}", self.dtype, T::DTYPE);
        }
        Ok(self.shape.iter().product())
    }
}

impl<'a> Buffer<'a> {
    /// The values at `data`.
    ///
    /// # Safety
    /// `data` must point to as many aligned, initialised values as `array` says (or anywhere if
    /// these are none), which nobody writes for `'a`.
    pub unsafe fn new(array: Array, data: *const c_void) -> Self {
        Self { array, data, lifetime: PhantomData }
    }

    /// The values.
    pub fn read<T: Float>(&self) -> Result<&'a [T]> {
        let len = self.len::<T>()?;
        if len == 0 {
            return Ok(&[]); // where the pointer may be null
        }
        // SAFETY: the promise of `new`.
        Ok(unsafe { slice::from_raw_parts(self.data.cast(), len) })
    }
}

impl<'a> Output<'a> {
    /// The memory at `data`.
    ///
    /// # Safety
    /// `data` must point to aligned memory for as many values as `array` says (or anywhere if these
    /// are none), which nobody else touches for `'a`.
    pub unsafe fn new(array: Array, data: *mut c_void) -> Self {
        Self { array, data, lifetime: PhantomData }
    }

    /// The memory, yet to be written.
    pub fn write<T: Float>(self) -> Result<&'a mut [MaybeUninit<T>]> {
        let len = self.len::<T>()?;
        if len == 0 {
            return Ok(&mut []); // where the pointer may be null
        }
        // SAFETY: the promise of `new`; consuming `self` keeps the slice unique.
        let values = unsafe { slice::from_raw_parts_mut(self.data.cast(), len) };
        // Frameworks allocate results anew for each call, with small pages.
        memory::prepare(values);
        Ok(values)
    }
}

impl Deref for Buffer<'_> {
    type Target = Array;

    fn deref(&self) -> &Array {
        &self.array
    }
}

impl Deref for Output<'_> {
    type Target = Array;

    fn deref(&self) -> &Array {
        &self.array
    }
}
