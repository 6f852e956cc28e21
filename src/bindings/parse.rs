//! Python's arguments as values of this crate, with errors that name the argument.

use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use super::arrays::type_name;
use super::operation::{EXPECTED_PADDING, named_padding, padding_of_sides};
use crate::shape::{Padding, Size2};

/// Parses the integer argument `name`.
fn integer(name: &str, value: &Bound<'_, PyAny>) -> PyResult<i64> {
    value.extract::<i64>().map_err(|error| {
        if error.is_instance_of::<PyOverflowError>(value.py()) {
            PyValueError::new_err(format!("{name}={value}, expected an integer of 64 bits"))
        } else {
            PyTypeError::new_err(format!("{name} is {}, expected an integer", type_name(value)))
        }
    })
}

/// [`integer`] for each argument that is one, as PyO3's own message names neither argument nor
/// value.
pub mod integers {
    use super::{Bound, PyAny, PyResult, integer};

    macro_rules! named {
        ($($name:ident)*) => {
            $(pub fn $name(value: &Bound<'_, PyAny>) -> PyResult<i64> {
                integer(stringify!($name), value)
            })*
        };
    }
    named!(images height width in_channels out_channels groups interleave kernel_size step stride threads);
}

/// Parses `input_size`: (height, width).
pub fn input_size(value: &Bound<'_, PyAny>) -> PyResult<Size2> {
    let (height, width) = value
        .extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()
        .map_err(|_| PyTypeError::new_err(format!("input_size is {}, expected (height, width)", type_name(value))))?;
    let side = |side| match integer("input_size", side)? {
        pixels @ 0.. => Ok(pixels as usize),
        pixels => Err(PyValueError::new_err(format!("input_size has {pixels}, expected sizes from 0"))),
    };
    Ok(Size2 { height: side(&height)?, width: side(&width)? })
}

/// The argument `padding`: "same", "valid", an integer or ((top, bottom), (left, right)).
pub struct Pad(pub Padding);

impl<'a, 'py> FromPyObject<'a, 'py> for Pad {
    type Error = PyErr;
    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let padding = if let Ok(name) = value.extract::<String>() {
            named_padding(&name)
        } else if let Ok(all) = value.extract::<i64>() {
            padding_of_sides([all; 4])
        } else if let Ok(((top, bottom), (left, right))) = value.extract::<((i64, i64), (i64, i64))>() {
            padding_of_sides([top, bottom, left, right])
        } else {
            None
        };
        padding.map(Self).ok_or_else(|| {
            let found = match value.extract::<String>() {
                Ok(name) => format!("{name:?}"),
                Err(_) => format!("{value:?}").replace('\n', ""),
            };
            PyValueError::new_err(format!("padding={found}, {EXPECTED_PADDING}"))
        })
    }
}
