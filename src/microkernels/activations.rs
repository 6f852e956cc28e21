//! Activation functions and their derivatives, a few vectors at a time.

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
        let [s, mut slopes] = T::sigmoid(isa, x);
        for (slope, s) in slopes.iter_mut().zip(s) {
            *slope = T::mul_vectors(isa, *slope, s);
        }
        [s, slopes]
    }
}

#[derive(Clone, Copy)]
pub(super) struct Swish;
impl<T: Element> Function<T> for Swish {
    #[inline(always)]
    fn both<I: Isa, const N: usize>(self, isa: I, mut x: [T::Vector<I>; N]) -> [[T::Vector<I>; N]; 2] {
        let [s, mut slopes] = T::sigmoid(isa, x);
        for i in 0..N {
            // Minus infinity times the sigmoid's limit 0 would not be a number.
            let limited = Vectors(isa).at_least::<T>(x[i], -1e30);
            x[i] = T::mul_vectors(isa, limited, s[i]);
            // Nor would infinity times 0; and what is left of 1 - s is not to be multiplied by
            // large ones.
            let value = T::at_most(isa, x[i], Vectors(isa).of::<T>(100.0));
            slopes[i] = T::mul_add(isa, value, slopes[i], s[i]);
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
        // Beyond, the sigmoid is 0 or 1.
        let limited = x.map(|x| v.clamp::<T>(x, -30.0, 30.0));
        let square = limited.map(|x| T::mul_vectors(isa, x, x));
        let mut argument = limited;
        for (argument, square) in argument.iter_mut().zip(square) {
            let factor = T::mul_add(isa, square, v.of::<T>(CUBIC), v.of::<T>(LINEAR));
            *argument = T::mul_vectors(isa, *argument, factor);
        }
        let [s, mut slopes] = T::sigmoid(isa, argument);
        for i in 0..N {
            let slope = T::mul_add(isa, square[i], v.of::<T>(3.0 * CUBIC), v.of::<T>(LINEAR));
            let product = T::mul_vectors(isa, T::mul_vectors(isa, slopes[i], s[i]), limited[i]);
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

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::simd::{IsaKind, Kernel};

    /// A function and its derivative at a point.
    fn both<T: Element<Vector<pulp::Scalar> = T>>(activation: Activation, x: T) -> (f64, f64) {
        let [[value], [slope]] =
            with_function!(activation, function => Function::<T>::both(function, pulp::Scalar::new(), [x]));
        (value.to_f64(), slope.to_f64())
    }

    /// A function and its derivative at the bfloat16 numbers of these bits, as they are computed.
    struct OfBf16(Activation, [u16; 16]);

    impl Kernel for OfBf16 {
        type Output = [[f32; 16]; 2];

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> [[f32; 16]; 2] {
            let (x, mut results) = (self.1.map(bf16::from_bits), [[0.0; 16]; 2]);
            for start in (0..16).step_by(bf16::lanes::<I>()) {
                // SAFETY: a vector's values, which are divisors of 16, inside the array.
                let x = unsafe { bf16::load(isa, x.as_ptr().add(start)) };
                let found = with_function!(self.0, function => Function::<bf16>::both(function, isa, [x]));
                for (result, [found]) in results.iter_mut().zip(found) {
                    // SAFETY: as above.
                    unsafe { bf16::store_wide(isa, result.as_mut_ptr().add(start), found) };
                }
            }
            results
        }
    }

    /// All bfloat16 numbers: values with a relative error of at most 2^-11 (an absolute one of
    /// 2^-120 where it is tiny), derivatives with one of the larger of themselves and 0.3.
    #[test]
    fn sigmoids_of_all_bfloat16_numbers() {
        let step = if cfg!(miri) { 4096 } else { 16 };
        for isa in IsaKind::available() {
            for activation in [Activation::Sigmoid, Activation::Swish, Activation::GeluTanh] {
                for first in (0..=u16::MAX - 15).step_by(step) {
                    let bits = std::array::from_fn(|i| first + i as u16);
                    let [values, slopes] = isa.run(OfBf16(activation, bits));
                    for ((bits, found), found_slope) in bits.into_iter().zip(values).zip(slopes) {
                        let x = bf16::from_bits(bits).to_f64();
                        let (value, slope) = both(activation, x);
                        let near = |found: f32, expected: f64, least: f64| {
                            let found = f64::from(found);
                            (found - expected).abs() <= 2f64.powi(-11) * expected.abs().max(least)
                                || found == expected
                                || found.is_nan() && expected.is_nan()
                        };
                        let name = isa.name();
                        assert!(
                            near(found, value, 2f64.powi(-109)),
                            "{name} {activation:?}({x}): {found}, not {value}"
                        );
                        let right = near(found_slope, slope, 0.3);
                        assert!(right, "{name} {activation:?}'({x}): {found_slope}, not {slope}");
                    }
                }
            }
        }
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
