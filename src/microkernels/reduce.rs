//! Sums and moments of rows of pixels.

use super::rows::{BLOCK, Body, Lanes, load, run, total};
use crate::simd::element::{Element, WideElement};
use crate::simd::{Isa, Kernel, line};

/// The sum of a row.
pub struct Sum<'a, T>(pub &'a [T]);

impl<T: Element> Kernel for Sum<'_, T> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> f64 {
        let mut body = Total { x: self.0.as_ptr(), sums: [T::splat(isa, T::default()); BLOCK] };
        // SAFETY: the row has this length.
        unsafe { run(isa, self.0.len(), &mut body) };
        total::<T, I>(isa, body.sums)
    }
}

struct Total<T, V> {
    x: *const T,
    sums: [V; BLOCK],
}

impl<T: Element, I: Isa> Body<T, I> for Total<T, T::Vector<I>> {
    #[inline(always)]
    unsafe fn block<const N: usize>(&mut self, isa: I, at: usize, lanes: Lanes<T::Mask<I>>) {
        // SAFETY: the caller's promise. What is beyond the row is zero.
        for (sum, x) in self.sums.iter_mut().zip(unsafe { load::<T, I, N>(isa, self.x.add(at), lanes) }) {
            *sum = T::add_vectors(isa, *sum, x);
        }
    }
}

/// Mean of a row, and the sum of the squares of the distances from it.
///
/// One pass over the row, with distances from one of its values: they are of the order of the
/// deviation, so nothing cancels however far from zero the mean is.
pub struct Moments<'a, T>(pub &'a [T]);

impl<T: Element> Kernel for Moments<'_, T> {
    type Output = (f64, f64);

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> (f64, f64) {
        let pivot = self.0.first().copied().unwrap_or_default();
        let zero = T::splat(isa, T::default());
        let mut body = Distances { x: self.0.as_ptr(), pivot: T::splat(isa, pivot), sums: [[zero; BLOCK]; 2] };
        // SAFETY: the row has this length.
        unsafe { run(isa, self.0.len(), &mut body) };
        let (sum, squares) = (total::<T, I>(isa, body.sums[0]), total::<T, I>(isa, body.sums[1]));
        let count = self.0.len() as f64;
        (pivot.to_f64() + sum / count, (squares - sum * sum / count).max(0.0))
    }
}

struct Distances<T, V> {
    x: *const T,
    pivot: V,
    /// Partial sums of the distances from the pivot and of their squares.
    sums: [[V; BLOCK]; 2],
}

impl<T: Element, I: Isa> Body<T, I> for Distances<T, T::Vector<I>> {
    #[inline(always)]
    unsafe fn block<const N: usize>(&mut self, isa: I, at: usize, lanes: Lanes<T::Mask<I>>) {
        // SAFETY: the caller's promise.
        let x = unsafe { load::<T, I, N>(isa, self.x.add(at), lanes) };
        let [sum, squares] = &mut self.sums;
        for i in 0..N {
            let mut distance = T::sub_vectors(isa, x[i], self.pivot);
            if let Lanes::First(mask) = lanes {
                distance = T::keep_masked(isa, mask, distance);
            }
            sum[i] = T::add_vectors(isa, sum[i], distance);
            squares[i] = T::mul_add(isa, distance, distance, squares[i]);
        }
    }
}

/// Sums each slot's first vector into one value: the end of a series of
/// [`DotNt`](super::dot_nt::DotNt).
pub struct SumSlots<'a, T>(pub &'a [T], pub &'a mut [T]);

impl<T: WideElement> Kernel for SumSlots<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        assert_eq!(self.0.len(), self.1.len() * line::<T>(), "slots");
        for (slot, sum) in self.0.chunks_exact(line::<T>()).zip(self.1) {
            // SAFETY: a slot is at least a vector long.
            *sum = T::sum(isa, unsafe { T::load(isa, slot.as_ptr()) });
        }
    }
}

/// The sums of the columns of a matrix whose rows are as long as the second slice: the bias
/// gradient in NHWC.
pub struct SumColumns<'a, T: Element>(pub &'a [T], pub &'a mut [T::Wide]);

impl<T: Element> Kernel for SumColumns<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self(rows, sums) = self;
        let lanes = T::lanes::<I>();
        let columns = sums.len();
        for (i, out) in sums.chunks_mut(lanes).enumerate() {
            let mask = T::mask(isa, out.len());
            let mut sum = T::splat(isa, T::default());
            for row in rows.chunks_exact(columns) {
                // SAFETY: the mask selects the columns that `out` stands for, which the row holds.
                sum = T::add_vectors(isa, sum, unsafe { T::load_masked(isa, mask, row.as_ptr().add(i * lanes)) });
            }
            // SAFETY: the mask selects the values of `out`.
            unsafe { T::store_wide_masked(isa, mask, out.as_mut_ptr(), sum) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::IsaKind;

    #[test]
    fn rows_of_all_lengths() {
        for isa in IsaKind::available() {
            for len in (0..150).step_by(if cfg!(miri) { 37 } else { 1 }) {
                let x: Vec<f64> = (0..len).map(|i| (i as f64 * 0.7).sin() + 1e3).collect();
                let count = len as f64;
                let sum: f64 = x.iter().sum();
                assert!((isa.run(Sum(&x)) - sum).abs() <= 1e-12 * sum);
                let (mean, squares) = isa.run(Moments(&x));
                let expected: f64 = x.iter().map(|x| (x - sum / count).powi(2)).sum();
                assert!(len == 0 || (mean - sum / count).abs() < 1e-10 && (squares - expected).abs() < 1e-9);
            }
        }
    }
}
