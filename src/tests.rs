//! Helpers of the tests of operations against plain float64 loops.

use std::mem::MaybeUninit;

use crate::shape::{Images, Order};
use crate::simd::element::Element;

/// Uniform values in -1..1 (xorshift).
pub(crate) fn random<T: Element>(len: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            T::from_f64((state >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
        })
        .collect()
}

/// Runs an operation on an output full of NaN, so that a value it leaves out shows.
pub(crate) fn run<T: Element>(len: usize, operation: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut out = vec![MaybeUninit::new(T::from_f64(f64::NAN)); len];
    operation(&mut out);
    // SAFETY: initialised above.
    out.into_iter().map(|value| unsafe { value.assume_init() }).collect()
}

/// That values are those expected, up to the rounding of their type.
pub(crate) fn check<T: Element>(actual: &[T], expected: &[f64], what: &dyn Fn() -> String) {
    // Of the largest value, for sums in another order; and of each value, where it is rounded to 8
    // bits at the end.
    let (tolerance, rounding) = match size_of::<T>() {
        2 => (2e-5, 1.0 / 256.0),
        4 => (2e-5, 0.0),
        _ => (1e-13, 0.0),
    };
    let scale = expected.iter().fold(1f64, |max, value| max.max(value.abs()));
    assert_eq!(actual.len(), expected.len());
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let error = (actual.to_f64() - expected).abs();
        assert!(
            error <= tolerance * scale + rounding * expected.abs(),
            "{}: value {i} is {actual:?}, expected {expected}",
            what()
        );
    }
}

/// Where channel `c` of pixel `p` of image `n` stands.
pub(crate) fn place(images: Images, n: usize, p: usize, c: usize) -> usize {
    match images.order {
        Order::Nchw => (n * images.channels + c) * images.pixels + p,
        Order::Nhwc => (n * images.pixels + p) * images.channels + c,
    }
}
