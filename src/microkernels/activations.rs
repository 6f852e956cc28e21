//! Activation functions and their derivatives, a few vectors at a time.
//!
//! The exponential is a chain of dependent instructions, too long for the reorder buffer to overlap
//! several: with one vector's chain after the other's it mostly waits. So every step is done for
//! `N` vectors before the next one, and [`Isa::optimization_barrier_f32s`] keeps the compiler from
//! putting the chains one after the other again.

use crate::simd::Isa;
use crate::simd::element::Element;

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x`
    Identity,
    /// `min(max(x, low), high)`: ReLU, ReLU6, hard tanh
    Clip(Clip),
    /// `x`, below 0 times the slope
    LeakyRelu(LeakyRelu),
    /// `x * sigmoid(x)`, also called SiLU
    Swish,
    /// `1 / (1 + exp(-x))`
    Sigmoid,
    /// `relu6(x + 3) / 6`
    HardSigmoid,
    /// `x * hard_sigmoid(x)`
    HardSwish,
    /// `x`, below 0 `alpha * (exp(x) - 1)`
    Elu(Elu),
    /// `x` times the normal distribution function of it
    Gelu,
    /// `x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))`
    GeluTanh,
    /// `x * tanh(ln(1 + exp(x)))`
    Mish,
}

impl Activation {
    /// `max(x, 0)`
    pub const RELU: Self = Self::Clip(Clip { low: 0.0, high: f64::INFINITY });
    /// `min(max(x, 0), 6)`
    pub const RELU6: Self = Self::Clip(Clip { low: 0.0, high: 6.0 });
}

/// An activation as a type, compiled into a kernel.
pub(super) trait Function<T: Element>: Copy {
    /// The function and its derivative; NaN stays NaN.
    fn both<I: Isa, const N: usize>(self, isa: I, x: [T::Vector<I>; N]) -> [[T::Vector<I>; N]; 2];
}

/// Vector arithmetic in the order of formulas.
#[derive(Clone, Copy)]
struct Vectors<I>(I);

impl<I: Isa> Vectors<I> {
    #[inline(always)]
    fn of<T: Element>(self, value: f64) -> T::Vector<I> {
        T::splat_wide(self.0, T::Wide::from_f64(value))
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

/// Implements [`Function`] for types by a function and its derivative at a vector.
macro_rules! functions {
    ($($name:ident($this:ident, $v:ident, $x:ident) $both:expr;)*) => {
        $(
            impl<T: Element> Function<T> for $name {
                #[inline(always)]
                fn both<I: Isa, const N: usize>(self, isa: I, mut x: [T::Vector<I>; N]) -> [[T::Vector<I>; N]; 2] {
                    let mut slopes = x;
                    let ($v, $this) = (Vectors(isa), self);
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

#[derive(Clone, Copy)]
pub(super) struct Identity;

/// See [`Activation::Clip`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip {
    /// The least value.
    pub low: f64,
    /// The largest value.
    pub high: f64,
}

/// See [`Activation::LeakyRelu`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LeakyRelu {
    /// The derivative below 0.
    pub slope: f64,
}

#[derive(Clone, Copy)]
pub(super) struct HardSigmoid;

#[derive(Clone, Copy)]
pub(super) struct HardSwish;

functions! {
    Identity(_f, v, x) (x, v.of::<T>(1.0));
    Clip(f, v, x) (v.clamp::<T>(x, f.low, f.high), v.between::<T>(x, f.low, f.high, v.of::<T>(1.0)));
    LeakyRelu(f, v, x) {
        let slope = T::select_less(v.0, [v.of::<T>(0.0), x, v.of::<T>(1.0), v.of::<T>(f.slope)]);
        (T::mul_vectors(v.0, x, slope), slope)
    };
    HardSigmoid(_f, v, x) {
        let sixth = v.of::<T>(1.0 / 6.0);
        let s = v.clamp::<T>(T::mul_add(v.0, x, sixth, v.of::<T>(0.5)), 0.0, 1.0);
        (s, v.between::<T>(x, -3.0, 3.0, sixth))
    };
    HardSwish(_f, v, x) {
        let sixth = v.of::<T>(1.0 / 6.0);
        // Minus infinity times 0 would not be a number.
        let x = v.at_least::<T>(x, -4.0);
        let s = v.clamp::<T>(T::mul_add(v.0, x, sixth, v.of::<T>(0.5)), 0.0, 1.0);
        let slope = v.between::<T>(x, -3.0, 3.0, T::mul_vectors(v.0, x, sixth));
        (T::mul_vectors(v.0, x, s), T::add_vectors(v.0, slope, s))
    };
}

#[derive(Clone, Copy)]
pub(super) struct Sigmoid;
impl<T: Element> Function<T> for Sigmoid {
    #[inline(always)]
    fn both<I: Isa, const N: usize>(self, isa: I, x: [T::Vector<I>; N]) -> [[T::Vector<I>; N]; 2] {
        let s = T::sigmoid(isa, x);
        let one = T::splat(isa, T::ONE);
        let mut slopes = s;
        for slope in &mut slopes {
            *slope = T::mul_vectors(isa, *slope, T::sub_vectors(isa, one, *slope));
        }
        [s, slopes]
    }
}

#[derive(Clone, Copy)]
pub(super) struct Swish;
impl<T: Element> Function<T> for Swish {
    #[inline(always)]
    fn both<I: Isa, const N: usize>(self, isa: I, mut x: [T::Vector<I>; N]) -> [[T::Vector<I>; N]; 2] {
        let s = T::sigmoid(isa, x);
        let one = T::splat(isa, T::ONE);
        let mut slopes = x;
        for i in 0..N {
            // Minus infinity times the sigmoid's limit 0 would not be a number.
            let limited = Vectors(isa).at_least::<T>(x[i], -1e30);
            x[i] = T::mul_vectors(isa, limited, s[i]);
            // Nor would infinity times 0.
            let value = T::at_most(isa, x[i], Vectors(isa).of::<T>(1e30));
            slopes[i] = T::mul_add(isa, value, T::sub_vectors(isa, one, s[i]), s[i]);
        }
        [x, slopes]
    }
}

/// See [`Activation::Elu`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Elu {
    /// Minus the limit at minus infinity.
    pub alpha: f64,
}
impl<T: Element> Function<T> for Elu {
    #[inline(always)]
    fn both<I: Isa, const N: usize>(self, isa: I, mut x: [T::Vector<I>; N]) -> [[T::Vector<I>; N]; 2] {
        let v = Vectors(isa);
        let [zero, one, alpha] = [0.0, 1.0, self.alpha].map(|value| v.of::<T>(value));
        let below = T::exp_m1(isa, x.map(|x| T::at_most(isa, x, zero)));
        let mut slopes = below;
        for i in 0..N {
            let positive = |yes, no| T::select_less(isa, [zero, x[i], yes, no]);
            slopes[i] = positive(one, T::mul_add(isa, below[i], alpha, alpha));
            x[i] = positive(x[i], T::mul_vectors(isa, below[i], alpha));
        }
        [x, slopes]
    }
}

#[derive(Clone, Copy)]
pub(super) struct Gelu;
impl<T: Element> Function<T> for Gelu {
    #[inline(always)]
    fn both<I: Isa, const N: usize>(self, isa: I, mut x: [T::Vector<I>; N]) -> [[T::Vector<I>; N]; 2] {
        let [cumulative, density] = T::normal(isa, x);
        let mut slopes = x;
        for i in 0..N {
            // Infinity times 0 would not be a number, and what is left of the functions beyond 14
            // is not to be multiplied by large ones.
            let limited = Vectors(isa).clamp::<T>(x[i], -1e3, 1e3);
            slopes[i] = T::mul_add(isa, limited, density[i], cumulative[i]);
            x[i] = T::mul_vectors(isa, Vectors(isa).at_least::<T>(x[i], -1e3), cumulative[i]);
        }
        [x, slopes]
    }
}

#[derive(Clone, Copy)]
pub(super) struct GeluTanh;
impl<T: Element> Function<T> for GeluTanh {
    #[inline(always)]
    fn both<I: Isa, const N: usize>(self, isa: I, mut x: [T::Vector<I>; N]) -> [[T::Vector<I>; N]; 2] {
        const LINEAR: f64 = 1.595_769_121_605_730_7; // 2 sqrt(2 / pi)
        const CUBIC: f64 = LINEAR * 0.044_715;
        let v = Vectors(isa);
        // Beyond, the sigmoid is 0 or 1; cubes are numbers.
        let limited = x.map(|x| v.clamp::<T>(x, -1e12, 1e12));
        let square = limited.map(|x| T::mul_vectors(isa, x, x));
        let mut argument = limited;
        for (argument, square) in argument.iter_mut().zip(square) {
            let factor = T::mul_add(isa, square, v.of::<T>(CUBIC), v.of::<T>(LINEAR));
            *argument = T::mul_vectors(isa, *argument, factor);
        }
        let s = T::sigmoid(isa, argument);
        let mut slopes = s;
        for i in 0..N {
            let slope = T::mul_add(isa, square[i], v.of::<T>(3.0 * CUBIC), v.of::<T>(LINEAR));
            // x s (1 - s) is 0 before the square is large.
            let product = T::mul_vectors(isa, T::sub_vectors(isa, v.of::<T>(1.0), s[i]), s[i]);
            let product = T::mul_vectors(isa, product, limited[i]);
            slopes[i] = T::mul_add(isa, product, slope, s[i]);
            x[i] = T::mul_vectors(isa, v.at_least::<T>(x[i], -1e12), s[i]);
        }
        [x, slopes]
    }
}

#[derive(Clone, Copy)]
pub(super) struct Mish;
impl<T: Element> Function<T> for Mish {
    #[inline(always)]
    fn both<I: Isa, const N: usize>(self, isa: I, mut x: [T::Vector<I>; N]) -> [[T::Vector<I>; N]; 2] {
        let v = Vectors(isa);
        let [one, two] = [1.0, 2.0].map(|value| v.of::<T>(value));
        // Beyond 20 the hyperbolic tangent is 1.
        let limited = x.map(|x| v.clamp::<T>(x, -1e30, 20.0));
        let e = T::exp(isa, limited);
        let mut slopes = e;
        for i in 0..N {
            // tanh(ln(1 + e)) = n / (n + 2) with n = e^2 + 2 e; its derivative by x is 4 e (1 + e)
            // / (n + 2)^2.
            let n = T::mul_vectors(isa, e[i], T::add_vectors(isa, e[i], two));
            let inverse = T::div_vectors(isa, one, T::add_vectors(isa, n, two));
            let tanh = T::mul_vectors(isa, n, inverse);
            let product = T::mul_vectors(isa, T::mul_add(isa, e[i], e[i], e[i]), inverse);
            let product = T::mul_vectors(isa, T::mul_vectors(isa, product, inverse), v.of::<T>(4.0));
            slopes[i] = T::mul_add(isa, limited[i], product, tanh);
            x[i] = T::mul_vectors(isa, v.at_least::<T>(x[i], -1e30), tanh);
        }
        [x, slopes]
    }
}

/// Evaluates an expression with an activation as a value of its own type.
macro_rules! with_function {
    ($activation:expr, $function:ident => $body:expr) => {
        with_function!($activation, $function => $body, Identity Swish Sigmoid HardSigmoid HardSwish Gelu GeluTanh Mish)
    };
    ($activation:expr, $function:ident => $body:expr, $($name:ident)*) => {
        match $activation {
            $(Activation::$name => {
                let $function = $crate::microkernels::activations::$name;
                $body
            })*
            Activation::Clip($function) => $body,
            Activation::LeakyRelu($function) => $body,
            Activation::Elu($function) => $body,
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

/// `exp(x)` for `x` up to 40.
#[inline(always)]
pub(crate) fn exp_f32<I: Isa, const N: usize>(isa: I, x: [I::f32s; N]) -> [I::f32s; N] {
    minus_exp_f32(isa, x).map(|e| isa.neg_f32s(e))
}

/// `exp(x) - 1` for `x <= 0`, with a relative error below 1e-6.
#[inline(always)]
pub(crate) fn exp_m1_f32<I: Isa, const N: usize>(isa: I, x: [I::f32s; N]) -> [I::f32s; N] {
    // exp(x) - 1 = x (1 + x / 2 + ...): above -1/2 the difference would have few digits.
    const COEFFICIENTS: [f32; 6] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0];
    let mut y = minus_exp_f32(isa, x);
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
        let [[value], [slope]] =
            with_function!(activation, function => Function::<T>::both(function, pulp::Scalar::new(), [x]));
        (value.to_f64(), slope.to_f64())
    }

    type Formula = Box<dyn Fn(f64) -> f64>;

    /// All activations, each with its formula.
    fn formulas() -> Vec<(Activation, Formula)> {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let hard_sigmoid = |x: f64| ((x + 3.0) / 6.0).clamp(0.0, 1.0);
        let gelu_tanh =
            |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh());
        vec![
            (Activation::Identity, Box::new(|x| x)),
            (Activation::RELU, Box::new(|x| x.max(0.0))),
            (Activation::RELU6, Box::new(|x| x.clamp(0.0, 6.0))),
            (Activation::Clip(Clip { low: -1.0, high: 2.0 }), Box::new(|x| x.clamp(-1.0, 2.0))),
            (Activation::LeakyRelu(LeakyRelu { slope: 0.1 }), Box::new(|x| x.max(0.1 * x))),
            (Activation::Swish, Box::new(move |x| x * sigmoid(x))),
            (Activation::Sigmoid, Box::new(sigmoid)),
            (Activation::HardSigmoid, Box::new(hard_sigmoid)),
            (Activation::HardSwish, Box::new(move |x| x * hard_sigmoid(x))),
            (Activation::Elu(Elu { alpha: 0.7 }), Box::new(|x| if x > 0.0 { x } else { 0.7 * x.exp_m1() })),
            (Activation::Gelu, Box::new(|x| 0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt())))),
            (Activation::GeluTanh, Box::new(gelu_tanh)),
            (Activation::Mish, Box::new(|x| x * x.exp().ln_1p().tanh())),
        ]
    }

    #[test]
    fn activations_are_their_formulas() {
        for (activation, formula) in formulas() {
            for i in -1200..1200 {
                let (x, h) = (f64::from(i) * 0.01 + 0.003, 1e-6);
                let (value, slope) = both(activation, x);
                assert!((value - formula(x)).abs() < 1e-12, "{activation:?}({x})");
                let expected = (formula(x + h) - formula(x - h)) / (2.0 * h);
                assert!((slope - expected).abs() < 1e-7, "{activation:?}'({x})");
                let (found, found_slope) = both(activation, x as f32);
                let (value, slope) = both(activation, f64::from(x as f32));
                let near = |found: f64, expected: f64| (found - expected).abs() < 4e-6 * expected.abs().max(0.3);
                assert!(near(found, value), "{activation:?}({x}) of floats: {found}, expected {value}");
                // The argument's factor is the error's, too.
                let near = (found_slope - slope).abs() < 2e-5 * slope.abs().max(0.3);
                assert!(near, "{activation:?}'({x}) of floats: {found_slope}, expected {slope}");
            }
        }
    }

    #[test]
    fn small_values_keep_their_digits() {
        for x in [-1e-6f32, -1e-4, -0.01, -0.3, -0.49, -0.51] {
            let found = both(Activation::Elu(Elu { alpha: 1.0 }), x).0;
            assert!((found / f64::from(x).exp_m1() - 1.0).abs() < 1e-6, "{x}");
            let found = both(Activation::Gelu, x).0;
            let expected = 0.5 * f64::from(x) * libm::erfc(-f64::from(x) / 2f64.sqrt());
            assert!((found / expected - 1.0).abs() < 2e-6, "{x}");
        }
    }

    #[test]
    fn activations_have_their_limits() {
        let infinity = f64::INFINITY;
        for (activation, low, high) in [
            (Activation::RELU, 0.0, infinity),
            (Activation::RELU6, 0.0, 6.0),
            (Activation::LeakyRelu(LeakyRelu { slope: 0.1 }), -infinity, infinity),
            (Activation::Swish, 0.0, infinity),
            (Activation::Sigmoid, 0.0, 1.0),
            (Activation::HardSigmoid, 0.0, 1.0),
            (Activation::HardSwish, 0.0, infinity),
            (Activation::Elu(Elu { alpha: 0.7 }), f64::from(-0.7f32), infinity),
            (Activation::Gelu, 0.0, infinity),
            (Activation::GeluTanh, 0.0, infinity),
            (Activation::Mish, 0.0, infinity),
        ] {
            for x in [f32::NEG_INFINITY, -1e38, -120.0] {
                let found = both(activation, x).0;
                assert!((found - low).abs() < 1e-30 || low == -infinity && found < -11.9, "{activation:?}({x})");
            }
            let (value, slope) = both(activation, f32::INFINITY);
            assert!(value == high && !slope.is_nan(), "{activation:?}");
            assert!(!both(activation, f32::NEG_INFINITY).1.is_nan(), "{activation:?}");
            assert!(both(activation, f32::NAN).0.is_nan(), "{activation:?}");
        }
    }
}
