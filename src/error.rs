//! What can be wrong with a call. Every message names the offending value and what was expected.

use std::fmt;

/// An invalid argument. Bindings map it to the framework's own exception
/// (`ValueError` in Python, `INVALID_ARGUMENT` in XLA).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(String);

impl Error {
    /// An error with this message.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// The result of a fallible operation of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Returns an [`Error`] with a formatted message.
macro_rules! bail {
    ($($arg:tt)*) => { return Err($crate::error::Error::new(format!($($arg)*))) };
}
pub(crate) use bail;
