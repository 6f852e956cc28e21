//! What the tasks of an operation share: memory to write into, and an estimate of the work.

use std::mem::MaybeUninit;

use crate::simd::element::WideElement;

/// A pointer that tasks share; each writes its own part.
pub(crate) struct Shared<T>(pub(crate) *mut T);

// Not derived: that would need `T: Copy`.
impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<T> {}

// SAFETY: users of `Shared` give every task a part of its own.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Shares memory that is yet to be written.
    pub(crate) fn new(memory: &mut [MaybeUninit<T>]) -> Self {
        Self(memory.as_mut_ptr().cast())
    }

    /// The memory from an index on.
    pub(crate) fn at(self, offset: usize) -> Self {
        Self(self.0.wrapping_add(offset))
    }

    /// The pointer (a method, so that closures capture the wrapper and not the bare pointer).
    pub(crate) fn ptr(self) -> *mut T {
        self.0
    }
}

/// Adds up sets of `len` partial sums, in their order, into the first set.
pub(crate) fn add_parts<T: WideElement>(partial: &mut [T], len: usize) -> &[T] {
    let (sums, rest) = partial.split_at_mut(len);
    for part in rest.chunks_exact(len.max(1)) {
        sums.iter_mut().zip(part).for_each(|(sum, &part)| *sum += part);
    }
    sums
}

/// The nanoseconds that one core needs for this many multiply-adds and bytes, roughly: what decides
/// whether threads are worth their start. 16 multiply-adds and 8 bytes a nanosecond are what one
/// core of a current server does.
pub(crate) fn estimate(multiply_adds: usize, bytes: usize) -> f64 {
    multiply_adds as f64 / 16.0 + bytes as f64 / 8.0
}
