//! The machine's limit for multiply-adds, to compare kernels with.

use crate::simd::element::Element;
use crate::simd::{Isa, Kernel};

/// Multiply-adds on registers alone; returns how many floating-point operations that were.
pub struct Multiply {
    /// Rounds of the loop.
    pub rounds: usize,
}

/// Independent sums: more than latency x throughput of any current core, less than the registers of
/// AVX2.
const SUMS: usize = 12;

impl Kernel for Multiply {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> f64 {
        // `black_box` keeps the compiler from computing the loop itself.
        let factor = f32::splat(isa, std::hint::black_box(0.5));
        let mut sums = [f32::splat(isa, std::hint::black_box(1.0)); SUMS];
        for _ in 0..self.rounds {
            for sum in &mut sums {
                *sum = <f32 as Element>::mul_add(isa, *sum, factor, factor);
            }
        }
        let total = sums.into_iter().fold(f32::splat(isa, 0.0), |total, sum| f32::add_vectors(isa, total, sum));
        std::hint::black_box(f32::sum(isa, total));
        (2 * SUMS * self.rounds * f32::lanes::<I>()) as f64
    }
}
