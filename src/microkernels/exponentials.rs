//! The exponential and what is made of it, for activations, a few vectors at a time.
//!
//! The exponential is a chain of dependent instructions, too long for the reorder buffer to overlap
//! several: with one vector's chain after the other's it mostly waits. So every step is done for
//! `N` vectors before the next one, and [`Isa::optimization_barrier_f32s`] keeps the compiler from
//! putting the chains one after the other again.

use crate::simd::Isa;

/// Where the functions of floats end: below, the exponential is 0; above, `1 + exp(x)` is its
/// argument's alone.
const ENDS: (f32, f32) = (-110.0, 40.0);

/// The sigmoid, and 1 minus that: with a relative error below 1e-6 where it is a normal number, an
/// absolute one of 2^-148 below.
#[inline(always)]
pub(crate) fn sigmoid_f32<I: Isa, const N: usize>(isa: I, x: [I::f32s; N]) -> [[I::f32s; N]; 2] {
    if const { I::EXPONENTIALS } { sigmoid_by_table(isa, x) } else { sigmoid_by_polynomial::<I, N, true>(isa, x) }
}

/// The same for values that are stored as bfloat16, which rounds by 2^-9: with a relative error
/// below 2^-11.
#[inline(always)]
pub(crate) fn sigmoid_bf16<I: Isa, const N: usize>(isa: I, x: [I::f32s; N]) -> [[I::f32s; N]; 2] {
    if const { I::EXPONENTIALS } { sigmoid_by_fraction(isa, x) } else { sigmoid_by_polynomial::<I, N, false>(isa, x) }
}

/// [`sigmoid_bf16`] with the instructions that [`Isa::EXPONENTIALS`] tells of.
#[inline(always)]
fn sigmoid_by_fraction<I: Isa, const N: usize>(isa: I, mut x: [I::f32s; N]) -> [[I::f32s; N]; 2] {
    // The nearest to 2^f for 0 <= f < 1: 7.5e-5 off, relatively. The reciprocal is 6.1e-5 off.
    const COEFFICIENTS: [f32; 4] = [0.078_024_52, 0.226_067_16, 0.695_833_5, 0.999_925_2];
    let mut rest = x;
    for (x, rest) in x.iter_mut().zip(&mut rest) {
        // Infinity times 0 would not be a number.
        let limited = isa.at_most_f32s(*x, isa.splat_f32s(ENDS.1));
        let n = isa.mul_f32s(limited, isa.splat_f32s(std::f32::consts::LOG2_E));
        let f = isa.fraction_f32s(n);
        let mut p = isa.splat_f32s(COEFFICIENTS[0]);
        for &coefficient in &COEFFICIENTS[1..] {
            p = isa.mul_add_e_f32s(p, f, isa.splat_f32s(coefficient));
        }
        let e = isa.scale_f32s(p, n);
        *rest = isa.estimate_reciprocal_f32s(isa.add_f32s(isa.splat_f32s(1.0), e));
        *x = isa.mul_f32s(e, *rest);
    }
    [x, rest]
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

/// [`sigmoid_f32`] with the instructions that [`Isa::EXPONENTIALS`] tells of: `x = n ln 2 + r` with
/// `n` a multiple of 1/32, so that two terms are enough for `exp(r)`.
#[inline(always)]
fn sigmoid_by_table<I: Isa, const N: usize>(isa: I, mut x: [I::f32s; N]) -> [[I::f32s; N]; 2] {
    // Adding this rounds to a multiple of 1/32; the lowest bits are then the index in the table.
    const ROUND: f32 = (3 << 17) as f32;
    // ln 2 in two parts.
    const LN2: (f32, f32) = (std::f32::consts::LN_2, -1.904_654_3e-9);
    // The nearest to (exp(r) - 1) / r for |r| <= ln 2 / 64: exp(r) is 5.3e-8 off.
    const COEFFICIENTS: [f32; 2] = [0.5, 1.000_014_7];
    let (one, mut rest) = (isa.splat_f32s(1.0), x);
    for (x, rest) in x.iter_mut().zip(&mut rest) {
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
        *rest = isa.mul_add_e_f32s(y, error, y);
        *x = isa.mul_f32s(e, *rest);
    }
    [x, rest]
}

/// [`sigmoid_f32`] or, if not `EXACT`, [`sigmoid_bf16`] with the instructions that all have.
#[inline(always)]
fn sigmoid_by_polynomial<I: Isa, const N: usize, const EXACT: bool>(isa: I, x: [I::f32s; N]) -> [[I::f32s; N]; 2] {
    // exp(x) / (1 + exp(x)): small results are as exact as the exponential. A division of vectors
    // would take as long as all the rest.
    let (one, e) = (isa.splat_f32s(1.0), minus_exp_f32::<I, N, EXACT>(isa, x));
    let (mut d, mut y, mut s) = (e, e, e);
    for i in 0..N {
        d[i] = isa.sub_f32s(one, e[i]);
        // -1 / d: the difference of the bits divides as logarithms do, 5 % off. The highest bit is
        // the sign.
        y[i] = pulp::cast(isa.sub_u32s(isa.splat_u32s(0xfef3_11c7), pulp::cast(d[i])));
        let error = isa.mul_add_e_f32s(d[i], y[i], one);
        // This leaves the error's cube, 1.3e-4.
        y[i] = isa.mul_add_e_f32s(y[i], isa.mul_add_e_f32s(error, error, error), y[i]);
    }
    y = isa.optimization_barrier_f32s(y);
    for i in 0..N {
        s[i] = isa.mul_f32s(e[i], y[i]);
        if EXACT {
            // And this the square of that, of the quotient.
            s[i] = isa.mul_add_e_f32s(y[i], isa.mul_add_e_f32s(d[i], s[i], e[i]), s[i]);
            d[i] = isa.sub_f32s(one, s[i]);
        } else {
            // The difference would have the error of s, which is large beside it.
            d[i] = isa.neg_f32s(y[i]);
        }
    }
    [s, d]
}

/// The sigmoid of doubles, one by one, and 1 minus that.
#[inline(always)]
pub(crate) fn sigmoid_f64<I: Isa, const N: usize>(isa: I, x: [I::f64s; N]) -> [[I::f64s; N]; 2] {
    let s = each_f64::<I, N>(x, |x| 1.0 / (1.0 + (-x).exp()));
    [s, s.map(|s| isa.sub_f64s(isa.splat_f64s(1.0), s))]
}

/// `-exp(x)` for `x` between the [`ENDS`], and constant beyond them: with a relative error below
/// 1e-6, or if not `EXACT` 1e-4, where the result is a normal number, an absolute one of 2^-148
/// below.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`; `exp(r)` by a polynomial; `2^n` by its bits.
#[inline(always)]
fn minus_exp_f32<I: Isa, const N: usize, const EXACT: bool>(isa: I, x: [I::f32s; N]) -> [I::f32s; N] {
    // For 2^n to be a normal number, this is added to n at first.
    const OFFSET: i32 = 64;
    // Adding this rounds to an integer; the lowest bits are then the exponent of the power of 2.
    const ROUND: f32 = (3 << 22) as f32 + (OFFSET + 127) as f32;
    // ln 2 in two parts, the first with few enough bits that its product with n is exact.
    const LN2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    // The polynomial of degree 5 through 1 at 0 that is nearest to exp(r): 9.3e-8 off, relatively.
    const COEFFICIENTS: [f32; 6] = [8.290_272e-3, 4.189_816e-2, 1.666_763_9e-1, 4.999_914_8e-1, 9.999_997e-1, 1.0];
    // The nearest of degree 3: 7.5e-5 off.
    const FEW_COEFFICIENTS: [f32; 4] = [0.165_668_42, 0.504_963_3, 1.000_164_2, 0.999_928_1];
    let coefficients: &[f32] = if EXACT { &COEFFICIENTS } else { &FEW_COEFFICIENTS };
    let (mut r, mut shifted) = (x, x);
    for i in 0..N {
        r[i] = isa.at_most_f32s(isa.at_least_f32s(x[i], isa.splat_f32s(ENDS.0)), isa.splat_f32s(ENDS.1));
        shifted[i] = isa.mul_add_e_f32s(r[i], isa.splat_f32s(std::f32::consts::LOG2_E), isa.splat_f32s(ROUND));
        let n = isa.sub_f32s(shifted[i], isa.splat_f32s(ROUND));
        r[i] = isa.mul_add_e_f32s(n, isa.splat_f32s(if EXACT { -LN2.0 } else { -std::f32::consts::LN_2 }), r[i]);
        if EXACT {
            r[i] = isa.mul_add_e_f32s(n, isa.splat_f32s(-LN2.1), r[i]);
        }
    }
    r = isa.optimization_barrier_f32s(r);
    let mut p = [isa.splat_f32s(-coefficients[0]); N];
    for coefficient in &coefficients[1..] {
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

/// `exp(x)` for `x` up to 40.
#[inline(always)]
pub(crate) fn exp_f32<I: Isa, const N: usize>(isa: I, x: [I::f32s; N]) -> [I::f32s; N] {
    minus_exp_f32::<I, N, true>(isa, x).map(|e| isa.neg_f32s(e))
}

/// `exp(x) - 1` for `x <= 0`, with a relative error below 1e-6.
#[inline(always)]
pub(crate) fn exp_m1_f32<I: Isa, const N: usize>(isa: I, x: [I::f32s; N]) -> [I::f32s; N] {
    // exp(x) - 1 = x (1 + x / 2 + ...): above -1/2 the difference would have few digits.
    const COEFFICIENTS: [f32; 6] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0];
    let mut y = minus_exp_f32::<I, N, true>(isa, x);
    for (y, x) in y.iter_mut().zip(x) {
        let mut p = isa.splat_f32s(1.0 / 5040.0);
        for coefficient in COEFFICIENTS {
            p = isa.mul_add_e_f32s(p, x, isa.splat_f32s(coefficient));
        }
        let far = isa.less_than_f32s(x, isa.splat_f32s(-0.5));
        *y = isa.select_f32s(far, isa.sub_f32s(isa.splat_f32s(-1.0), *y), isa.mul_f32s(x, p));
    }
    y
}

/// The normal distribution function and its density, with an absolute error below 3e-7 and a
/// relative one below 1e-5.
#[inline(always)]
pub(crate) fn normal_f32<I: Isa, const N: usize>(isa: I, x: [I::f32s; N]) -> [[I::f32s; N]; 2] {
    // The density's factor, and that of the scaled complementary error function's argument.
    const DENSITY: f32 = 0.398_942_3;
    const SCALE: f32 = 0.3 * std::f32::consts::FRAC_1_SQRT_2;
    // exp(z^2) erfc(z) = t p(t) with t = 1 / (1 + 0.3 z): the polynomial of degree 8 that is
    // nearest.
    const COEFFICIENTS: [f32; 8] =
        [0.485_730_83, -0.512_655_44, 0.548_195, -0.095_015_7, 0.215_101_12, 0.148_288_07, 0.170_723_51, 0.169_187_44];
    let half = isa.splat_f32s(0.5);
    let mut squares = x;
    for x in &mut squares {
        // Beyond 14 the density is no number of this type.
        let limited = isa.at_least_f32s(isa.at_most_f32s(*x, isa.splat_f32s(14.0)), isa.splat_f32s(-14.0));
        *x = isa.mul_f32s(isa.mul_f32s(limited, limited), isa.splat_f32s(-0.5));
    }
    let e = exp_f32(isa, squares);
    let (mut cumulative, mut density) = (e, e);
    for i in 0..N {
        let one = isa.splat_f32s(1.0);
        let limited = isa.at_most_f32s(isa.abs_f32s(x[i]), isa.splat_f32s(14.0));
        let t = isa.div_f32s(one, isa.mul_add_e_f32s(limited, isa.splat_f32s(SCALE), one));
        let mut p = isa.splat_f32s(-0.129_554_82);
        for coefficient in COEFFICIENTS {
            p = isa.mul_add_e_f32s(p, t, isa.splat_f32s(coefficient));
        }
        let tail = isa.mul_f32s(isa.mul_f32s(p, t), isa.mul_f32s(e[i], half));
        let positive = isa.less_than_f32s(isa.splat_f32s(0.0), x[i]);
        cumulative[i] = isa.select_f32s(positive, isa.sub_f32s(one, tail), tail);
        density[i] = isa.mul_f32s(e[i], isa.splat_f32s(DENSITY));
    }
    [cumulative, density]
}

/// A function of doubles, one by one.
#[inline(always)]
fn each_f64<I: Isa, const N: usize>(mut x: [I::f64s; N], function: impl Fn(f64) -> f64) -> [I::f64s; N] {
    for x in pulp::bytemuck::cast_slice_mut::<_, f64>(&mut x) {
        *x = function(*x);
    }
    x
}

/// `exp(x)`.
#[inline(always)]
pub(crate) fn exp_f64<I: Isa, const N: usize>(_isa: I, x: [I::f64s; N]) -> [I::f64s; N] {
    each_f64::<I, N>(x, f64::exp)
}

/// `exp(x) - 1`.
#[inline(always)]
pub(crate) fn exp_m1_f64<I: Isa, const N: usize>(_isa: I, x: [I::f64s; N]) -> [I::f64s; N] {
    each_f64::<I, N>(x, f64::exp_m1)
}

/// The normal distribution function and its density.
#[inline(always)]
pub(crate) fn normal_f64<I: Isa, const N: usize>(_isa: I, x: [I::f64s; N]) -> [[I::f64s; N]; 2] {
    const DENSITY: f64 = 0.398_942_280_401_432_7;
    let cumulative = |x: f64| 0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2);
    [each_f64::<I, N>(x, cumulative), each_f64::<I, N>(x, |x| DENSITY * (-0.5 * x * x).exp())]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::element::Element;
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
                    f32::store(isa, results[0].as_mut_ptr().add(start), minus_exp_f32::<I, 1, true>(isa, [x])[0]);
                    f32::store(isa, results[1].as_mut_ptr().add(start), sigmoid_f32(isa, [x])[0][0]);
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
}
