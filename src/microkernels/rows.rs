//! The frame of kernels that go through rows of pixels.
//!
//! A row is one channel's pixels, so everything but the pixels themselves is a constant of the
//! loop. [`run`] calls a [`Body`] for [`BLOCK`] vectors at a time, so that chains of dependent
//! instructions overlap, and for a masked vector at the end.

use std::ops::Range;

use crate::simd::Isa;
use crate::simd::element::{Element, one_lane};

/// Vectors that are worked on at a time: the sums' additions and the activations' chains overlap.
pub(super) const BLOCK: usize = 4;

/// A vector's values that belong to the row.
#[derive(Clone, Copy)]
pub(super) enum Lanes<M> {
    All,
    First(M),
}

/// What is done to the pixels of rows.
pub(super) trait Body<T: Element, I: Isa> {
    /// Works on `N` vectors from pixel `at`; of the last row's rest, the lanes that there are.
    ///
    /// # Safety
    /// These pixels must belong to the rows.
    unsafe fn block<const N: usize>(&mut self, isa: I, at: usize, lanes: Lanes<T::Mask<I>>);
}

/// Calls a body for all pixels of rows.
///
/// # Safety
/// The rows must have `len` pixels.
#[inline(always)]
pub(super) unsafe fn run<T: Element, I: Isa>(isa: I, len: usize, body: &mut impl Body<T, I>) {
    // SAFETY: the caller's promise.
    unsafe { run_range(isa, 0..len, body) }
}

/// Calls a body for a range of the pixels of rows.
///
/// # Safety
/// The rows must have them.
#[inline(always)]
pub(super) unsafe fn run_range<T: Element, I: Isa>(
    isa: I,
    Range { start, end }: Range<usize>,
    body: &mut impl Body<T, I>,
) {
    let vector = T::lanes::<I>();
    let mut at = start;
    // SAFETY: `at` and the lanes stay below `end`.
    unsafe {
        // Not of portable code, to be small.
        while const { !one_lane::<T, I>() } && at + BLOCK * vector <= end {
            body.block::<BLOCK>(isa, at, Lanes::All);
            at += BLOCK * vector;
        }
        // One piece of code for vectors and what is less than one.
        while at < end {
            let lanes = if at + vector <= end { Lanes::All } else { Lanes::First(T::mask(isa, end - at)) };
            body.block::<1>(isa, at, lanes);
            at += vector;
        }
    }
}

/// Loads `N` vectors; what is beyond the row is zero.
///
/// # Safety
/// The lanes' values must be readable from `x` on.
#[inline(always)]
pub(super) unsafe fn load<T: Element, I: Isa, const N: usize>(
    isa: I,
    x: *const T,
    lanes: Lanes<T::Mask<I>>,
) -> [T::Vector<I>; N] {
    let mut vectors = [T::splat(isa, T::default()); N];
    for (i, vector) in vectors.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *vector = unsafe {
            let x = x.add(i * T::lanes::<I>());
            match lanes {
                Lanes::All => T::load(isa, x),
                Lanes::First(mask) => T::load_masked(isa, mask, x),
            }
        };
    }
    vectors
}

/// [`load`] of wide values.
///
/// # Safety
/// As for that.
#[inline(always)]
pub(super) unsafe fn load_wide<T: Element, I: Isa, const N: usize>(
    isa: I,
    x: *const T::Wide,
    lanes: Lanes<T::Mask<I>>,
) -> [T::Vector<I>; N] {
    let mut vectors = [T::splat(isa, T::default()); N];
    for (i, vector) in vectors.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *vector = unsafe {
            let x = x.add(i * T::lanes::<I>());
            match lanes {
                Lanes::All => T::load_wide(isa, x),
                Lanes::First(mask) => T::load_wide_masked(isa, mask, x),
            }
        };
    }
    vectors
}

/// Prefetches the values as far behind a row's block as the row is long: who works on rows in
/// pieces comes to them next, and the processor's own prefetcher stops at the end of a page.
#[inline(always)]
pub(super) fn prefetch<T: Element, I: Isa, const N: usize>(isa: I, x: *const T, len: usize) {
    for i in 0..N {
        isa.prefetch_l2(x.wrapping_add(len + i * T::lanes::<I>()));
    }
}

/// Stores vectors.
///
/// # Safety
/// The lanes' values must be writable from `y` on.
#[inline(always)]
pub(super) unsafe fn store<T: Element, I: Isa, const N: usize>(
    isa: I,
    y: *mut T,
    lanes: Lanes<T::Mask<I>>,
    vectors: [T::Vector<I>; N],
) {
    for (i, vector) in vectors.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let y = y.add(i * T::lanes::<I>());
            match lanes {
                Lanes::All => T::store(isa, y, vector),
                Lanes::First(mask) => T::store_masked(isa, mask, y, vector),
            }
        }
    }
}

/// [`store`] of wide values.
///
/// # Safety
/// As for that.
#[inline(always)]
pub(super) unsafe fn store_wide<T: Element, I: Isa, const N: usize>(
    isa: I,
    y: *mut T::Wide,
    lanes: Lanes<T::Mask<I>>,
    vectors: [T::Vector<I>; N],
) {
    for (i, vector) in vectors.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let y = y.add(i * T::lanes::<I>());
            match lanes {
                Lanes::All => T::store_wide(isa, y, vector),
                Lanes::First(mask) => T::store_wide_masked(isa, mask, y, vector),
            }
        }
    }
}

/// The sum of a block's partial sums.
#[inline(always)]
pub(super) fn total<T: Element, I: Isa>(isa: I, sums: [T::Vector<I>; BLOCK]) -> f64 {
    let [a, b, c, d] = sums;
    T::sum(isa, T::add_vectors(isa, T::add_vectors(isa, a, b), T::add_vectors(isa, c, d))).to_f64()
}
