//! Activation functions and their derivatives, a few vectors at a time.
//!
//! The exponential is a chain of dependent instructions, too long for the reorder buffer to overlap
//! several: with one vector's chain after the other's it mostly waits. So every step is done for
//! `N` vectors before the next one, and [`Isa::optimization_barrier_f32s`] keeps the compiler from
//! putting the chains one after the other again.

use crate::simd::Isa;
use crate::simd::element::Element;

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x`
    Identity,
    /// `max(x, 0)`
    Relu,
    /// `min(max(x, 0), 6)`
    Relu6,
    /// `x * sigmoid(x)`, also called SiLU
    Swish,
    /// `1 / (1 + exp(-x))`
    Sigmoid,
    /// `relu6(x + 3) / 6`
    HardSigmoid,
    /// `x * hard_sigmoid(x)`
    HardSwish,
}

/// An activation as a type, compiled into a kernel.
pub(super) trait Function<T: Element> {
    /// The function and its derivative; NaN stays NaN.
    fn both<I: Isa, const N: usize>(isa: I, x: [T::Vector<I>; N]) -> [[T::Vector<I>; N]; 2];
}

/// Vector arithmetic in the order of formulas.
#[derive(Clone, Copy)]
struct Vectors<I>(I);

impl<I: Isa> Vectors<I> {
    #[inline(always)]
    fn of<T: Element>(self, value: f64) -> T::Vector<I> {
        T::splat(self.0, T::from_f64(value))
    }

    /// `x`, but `low` below that and `high` above.
    #[inline(always)]
    fn clamp<T: Element>(self, x: T::Vector<I>, low: f64, high: f64) -> T::Vector<I> {
        T::at_most(self.0, self.at_least::<T>(x, low), self.of::<T>(high))
    }

    /// `x`, but `low` below that.
    #[inline(always)]
    fn at_least<T: Element>(self, x: T::Vector<I>, low: f64) -> T::Vector<I> {
        T::at_least(self.0, x, self.of::<T>(low))
    }

    /// `value` where `low < x < high`, else 0.
    #[inline(always)]
    fn between<T: Element>(self, x: T::Vector<I>, low: f64, high: f64, value: T::Vector<I>) -> T::Vector<I> {
        let zero = self.of::<T>(0.0);
        let value = T::select_less(self.0, [x, self.of::<T>(high), value, zero]);
        T::select_less(self.0, [self.of::<T>(low), x, value, zero])
    }
}

macro_rules! functions {
    ($($name:ident($v:ident, $x:ident) $both:expr;)*) => {
        $(
            pub(super) struct $name;
            impl<T: Element> Function<T> for $name {
                #[inline(always)]
                fn both<I: Isa, const N: usize>(isa: I, mut x: [T::Vector<I>; N]) -> [[T::Vector<I>; N]; 2] {
                    let mut slopes = x;
                    let $v = Vectors(isa);
                    for i in 0..N {
                        let $x = x[i];
                        (x[i], slopes[i]) = $both;
                    }
                    [x, slopes]
                }
            }
        )*
    };
}

functions! {
    Identity(v, x) (x, v.of::<T>(1.0));
    Relu(v, x) (v.at_least::<T>(x, 0.0), v.between::<T>(x, 0.0, f64::INFINITY, v.of::<T>(1.0)));
    Relu6(v, x) (v.clamp::<T>(x, 0.0, 6.0), v.between::<T>(x, 0.0, 6.0, v.of::<T>(1.0)));
    HardSigmoid(v, x) {
        let sixth = v.of::<T>(1.0 / 6.0);
        let s = v.clamp::<T>(T::mul_add(v.0, x, sixth, v.of::<T>(0.5)), 0.0, 1.0);
        (s, v.between::<T>(x, -3.0, 3.0, sixth))
    };
    HardSwish(v, x) {
        let sixth = v.of::<T>(1.0 / 6.0);
        // Minus infinity times 0 would not be a number.
        let x = v.at_least::<T>(x, -4.0);
        let s = v.clamp::<T>(T::mul_add(v.0, x, sixth, v.of::<T>(0.5)), 0.0, 1.0);
        (T::mul_vectors(v.0, x, s), T::mul_add(v.0, x, v.between::<T>(x, -3.0, 3.0, sixth), s))
    };
}

pub(super) struct Sigmoid;
impl<T: Element> Function<T> for Sigmoid {
    #[inline(always)]
    fn both<I: Isa, const N: usize>(isa: I, x: [T::Vector<I>; N]) -> [[T::Vector<I>; N]; 2] {
        let s = T::sigmoid(isa, x);
        let one = T::splat(isa, T::ONE);
        let mut slopes = s;
        for slope in &mut slopes {
            *slope = T::mul_vectors(isa, *slope, T::sub_vectors(isa, one, *slope));
        }
        [s, slopes]
    }
}

pub(super) struct Swish;
impl<T: Element> Function<T> for Swish {
    #[inline(always)]
    fn both<I: Isa, const N: usize>(isa: I, mut x: [T::Vector<I>; N]) -> [[T::Vector<I>; N]; 2] {
        let s = T::sigmoid(isa, x);
        let one = T::splat(isa, T::ONE);
        let mut slopes = x;
        for i in 0..N {
            // Minus infinity times the sigmoid's limit 0 would not be a number.
            let limited = Vectors(isa).at_least::<T>(x[i], -1e30);
            x[i] = T::mul_vectors(isa, limited, s[i]);
            slopes[i] = T::mul_add(isa, x[i], T::sub_vectors(isa, one, s[i]), s[i]);
        }
        [x, slopes]
    }
}

/// Evaluates an expression with the type of an activation.
macro_rules! with_function {
    ($activation:expr, $F:ident => $body:expr) => {
        with_function!($activation, $F => $body, Identity Relu Relu6 Swish Sigmoid HardSigmoid HardSwish)
    };
    ($activation:expr, $F:ident => $body:expr, $($name:ident)*) => {
        match $activation {
            $(Activation::$name => {
                type $F = $crate::microkernels::activations::$name;
                $body
            })*
        }
    };
}
pub(super) use with_function;

/// Where the functions of floats end: below, the exponential is 0; above, `1 + exp(x)` is its
/// argument's alone.
const ENDS: (f32, f32) = (-110.0, 40.0);

/// The sigmoid, with a relative error below 1e-6 where it is a normal number, an absolute one of
/// 2^-148 below.
#[inline(always)]
pub(crate) fn sigmoid_f32<I: Isa, const N: usize>(isa: I, x: [I::f32s; N]) -> [I::f32s; N] {
    if const { I::EXPONENTIALS } { sigmoid_by_table(isa, x) } else { sigmoid_by_polynomial(isa, x) }
}

/// `2^(i / 32)`
const POWERS: [f32; 32] = {
    // 2^(1/32)
    const ROOT: f64 = 1.021_897_148_654_116_6;
    let (mut powers, mut power, mut i) = ([0.0; 32], 1.0, 0);
    while i < 32 {
        powers[i] = power as f32;
        power *= ROOT;
        i += 1;
    }
    powers
};

/// The sigmoid with the instructions that [`Isa::EXPONENTIALS`] tells of: `x = n ln 2 + r` with `n`
/// a multiple of 1/32, so that two terms are enough for `exp(r)`.
#[inline(always)]
fn sigmoid_by_table<I: Isa, const N: usize>(isa: I, mut x: [I::f32s; N]) -> [I::f32s; N] {
    // Adding this rounds to a multiple of 1/32; the lowest bits are then the index in the table.
    const ROUND: f32 = (3 << 17) as f32;
    // ln 2 in two parts.
    const LN2: (f32, f32) = (std::f32::consts::LN_2, -1.904_654_3e-9);
    // The nearest to (exp(r) - 1) / r for |r| <= ln 2 / 64: exp(r) is 5.3e-8 off.
    const COEFFICIENTS: [f32; 2] = [0.5, 1.000_014_7];
    let one = isa.splat_f32s(1.0);
    for x in &mut x {
        let mut r = isa.at_most_f32s(isa.at_least_f32s(*x, isa.splat_f32s(ENDS.0)), isa.splat_f32s(ENDS.1));
        let shifted = isa.mul_add_e_f32s(r, isa.splat_f32s(std::f32::consts::LOG2_E), isa.splat_f32s(ROUND));
        let n = isa.sub_f32s(shifted, isa.splat_f32s(ROUND));
        r = isa.mul_add_e_f32s(n, isa.splat_f32s(-LN2.0), r);
        r = isa.mul_add_e_f32s(n, isa.splat_f32s(-LN2.1), r);
        let p = isa.mul_add_e_f32s(r, isa.splat_f32s(COEFFICIENTS[0]), isa.splat_f32s(COEFFICIENTS[1]));
        let p = isa.mul_add_e_f32s(p, r, one);
        let e = isa.scale_f32s(isa.mul_f32s(p, isa.lookup_f32s(&POWERS, pulp::cast(shifted))), n);
        // As below: exp(x) / (1 + exp(x)).
        let d = isa.add_f32s(one, e);
        let y = isa.estimate_reciprocal_f32s(d);
        let error = isa.negate_mul_add_e_f32s(d, y, one);
        *x = isa.mul_f32s(e, isa.mul_add_e_f32s(y, error, y));
    }
    x
}

/// The sigmoid with the instructions that all have.
#[inline(always)]
fn sigmoid_by_polynomial<I: Isa, const N: usize>(isa: I, x: [I::f32s; N]) -> [I::f32s; N] {
    // exp(x) / (1 + exp(x)): small results are as exact as the exponential. A division of vectors
    // would take as long as all the rest.
    let (one, e) = (isa.splat_f32s(1.0), minus_exp_f32(isa, x));
    let (mut d, mut y, mut s) = (e, e, e);
    for i in 0..N {
        d[i] = isa.sub_f32s(one, e[i]);
        // -1 / d: the difference of the bits divides as logarithms do, 5 % off. The highest bit is
        // the sign.
        y[i] = pulp::cast(isa.sub_u32s(isa.splat_u32s(0xfef3_11c7), pulp::cast(d[i])));
        let error = isa.mul_add_e_f32s(d[i], y[i], one);
        // This leaves the error's cube.
        y[i] = isa.mul_add_e_f32s(y[i], isa.mul_add_e_f32s(error, error, error), y[i]);
    }
    y = isa.optimization_barrier_f32s(y);
    for i in 0..N {
        // And this the square of that, of the quotient.
        s[i] = isa.mul_f32s(e[i], y[i]);
        s[i] = isa.mul_add_e_f32s(y[i], isa.mul_add_e_f32s(d[i], s[i], e[i]), s[i]);
    }
    s
}

/// The sigmoid of doubles, one by one.
#[inline(always)]
pub(crate) fn sigmoid_f64<I: Isa, const N: usize>(_isa: I, mut x: [I::f64s; N]) -> [I::f64s; N] {
    for vector in &mut x {
        for x in pulp::bytemuck::cast_slice_mut::<_, f64>(std::slice::from_mut(vector)) {
            *x = 1.0 / (1.0 + (-*x).exp());
        }
    }
    x
}

/// `-exp(x)` for `x` between the [`ENDS`], and constant beyond them, with a relative error below
/// 1e-6 where the result is a normal number, an absolute one of 2^-148 below.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`; `exp(r)` by a polynomial; `2^n` by its bits.
#[inline(always)]
fn minus_exp_f32<I: Isa, const N: usize>(isa: I, x: [I::f32s; N]) -> [I::f32s; N] {
    // For 2^n to be a normal number, this is added to n at first.
    const OFFSET: i32 = 64;
    // Adding this rounds to an integer; the lowest bits are then the exponent of the power of 2.
    const ROUND: f32 = (3 << 22) as f32 + (OFFSET + 127) as f32;
    // ln 2 in two parts, the first with few enough bits that its product with n is exact.
    const LN2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    // The polynomial of degree 5 through 1 at 0 that is nearest to exp(r): 9.3e-8 off, relatively.
    const COEFFICIENTS: [f32; 6] = [8.290_272e-3, 4.189_816e-2, 1.666_763_9e-1, 4.999_914_8e-1, 9.999_997e-1, 1.0];
    let (mut r, mut shifted) = (x, x);
    for i in 0..N {
        r[i] = isa.at_most_f32s(isa.at_least_f32s(x[i], isa.splat_f32s(ENDS.0)), isa.splat_f32s(ENDS.1));
        shifted[i] = isa.mul_add_e_f32s(r[i], isa.splat_f32s(std::f32::consts::LOG2_E), isa.splat_f32s(ROUND));
        let n = isa.sub_f32s(shifted[i], isa.splat_f32s(ROUND));
        r[i] = isa.mul_add_e_f32s(n, isa.splat_f32s(-LN2.0), r[i]);
        r[i] = isa.mul_add_e_f32s(n, isa.splat_f32s(-LN2.1), r[i]);
    }
    r = isa.optimization_barrier_f32s(r);
    let mut p = [isa.splat_f32s(-COEFFICIENTS[0]); N];
    for coefficient in &COEFFICIENTS[1..] {
        for i in 0..N {
            p[i] = isa.mul_add_e_f32s(p[i], r[i], isa.splat_f32s(-coefficient));
        }
    }
    p = isa.optimization_barrier_f32s(p);
    for i in 0..N {
        let power = pulp::cast(isa.wrapping_dyn_shl_u32s(pulp::cast(shifted[i]), isa.splat_u32s(23)));
        p[i] = isa.mul_f32s(isa.mul_f32s(p[i], power), isa.splat_f32s(2f32.powi(-OFFSET)));
    }
    p
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{IsaKind, Kernel};

    /// Exponential and sigmoid of 16 values.
    struct Both([f32; 16]);

    impl Kernel for Both {
        type Output = [[f32; 16]; 2];

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> [[f32; 16]; 2] {
            let mut results = [self.0; 2];
            for start in (0..16).step_by(f32::lanes::<I>()) {
                // SAFETY: a vector's values, which are divisors of 16, inside the arrays.
                unsafe {
                    let x = f32::load(isa, self.0.as_ptr().add(start));
                    f32::store(isa, results[0].as_mut_ptr().add(start), minus_exp_f32(isa, [x])[0]);
                    f32::store(isa, results[1].as_mut_ptr().add(start), sigmoid_f32(isa, [x])[0]);
                }
            }
            results
        }
    }

    #[test]
    fn exponential_and_sigmoid_over_the_whole_range() {
        let step = if cfg!(miri) { 4_000_037 } else { 997 };
        for isa in IsaKind::available() {
            for first in (0..u32::MAX - 16 * step).step_by(16 * step as usize) {
                let x: [f32; 16] = std::array::from_fn(|i| f32::from_bits(first + i as u32 * step));
                let [exponentials, sigmoids] = isa.run(Both(x));
                for ((x, exp), sigmoid) in x.into_iter().zip(exponentials).zip(sigmoids) {
                    check(x, exp, sigmoid);
                }
            }
        }
    }

    fn check(x: f32, minus_exp: f32, sigmoid: f32) {
        if x.is_nan() {
            assert!(minus_exp.is_nan() && sigmoid.is_nan());
            return;
        }
        let near = |found: f32, expected: f64| {
            let bound = if expected >= f64::from(f32::MIN_POSITIVE) { 1e-6 * expected } else { 2f64.powi(-148) };
            (f64::from(found) - expected).abs() <= bound
        };
        let expected = f64::from(x.min(ENDS.1)).exp();
        assert!(near(-minus_exp, expected), "-exp({x}) = {minus_exp}, expected -{expected}");
        let expected = 1.0 / (1.0 + (-f64::from(x)).exp());
        assert!(near(sigmoid, expected), "sigmoid({x}) = {sigmoid}, expected {expected}");
    }

    /// A function and its derivative at a point.
    fn both<T: Element<Vector<pulp::Scalar> = T>>(activation: Activation, x: T) -> (f64, f64) {
        let [[value], [slope]] = with_function!(activation, F => <F as Function<T>>::both(pulp::Scalar::new(), [x]));
        (value.to_f64(), slope.to_f64())
    }

    #[test]
    fn activations_have_their_limits_and_derivatives() {
        for (activation, low, high) in [
            (Activation::Relu, 0.0, f64::INFINITY),
            (Activation::Relu6, 0.0, 6.0),
            (Activation::Swish, 0.0, f64::INFINITY),
            (Activation::Sigmoid, 0.0, 1.0),
            (Activation::HardSigmoid, 0.0, 1.0),
            (Activation::HardSwish, 0.0, f64::INFINITY),
        ] {
            for x in [f32::NEG_INFINITY, -1e38, -100.0] {
                assert!((both(activation, x).0 - low).abs() < 1e-30, "{activation:?}({x})");
            }
            assert_eq!(both(activation, f32::INFINITY).0, high, "{activation:?}");
            assert!(both(activation, f32::NAN).0.is_nan(), "{activation:?}");
            for i in -50..50 {
                let (x, h) = (f64::from(i) * 0.173 + 0.01, 1e-6);
                let slope = (both(activation, x + h).0 - both(activation, x - h).0) / (2.0 * h);
                assert!((both(activation, x).1 - slope).abs() < 1e-6, "{activation:?}'({x})");
            }
        }
    }
}
