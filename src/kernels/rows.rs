//! What batch norm and activations do to rows of pixels: plain loops, which the compiler vectorises for the
//! instruction set that they are inlined into.
//!
//! A row is one channel's pixels, so everything but the pixels themselves is a constant of the loop. Sums are kept in
//! [`LANES`] independent partial sums, for a sum has one order only and the compiler may not choose another.

use super::Element;
use crate::isa::{Isa, Kernel};

/// Partial sums of a loop: enough of them to hide the latency of an addition.
const LANES: usize = 32;

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

/// An activation as a type, compiled into a loop.
trait Function<T> {
    /// The function.
    fn value<I: Isa>(x: T) -> T;
    /// The function and its derivative.
    fn both<I: Isa>(x: T) -> (T, T);
}

macro_rules! functions {
    ($($name:ident($x:ident) $both:expr;)*) => {
        $(
            struct $name;
            impl<T: Element> Function<T> for $name {
                #[inline(always)]
                fn value<I: Isa>(x: T) -> T {
                    <Self as Function<T>>::both::<I>(x).0
                }
                #[inline(always)]
                fn both<I: Isa>($x: T) -> (T, T) {
                    $both
                }
            }
        )*

        /// Evaluates an expression with the type of an activation.
        macro_rules! with_function {
            ($activation:expr, $F:ident => $body:expr) => {
                match $activation {
                    $(Activation::$name => {
                        type $F = $name;
                        $body
                    })*
                }
            };
        }
    };
}

functions! {
    Identity(x) (x, T::ONE);
    Relu(x) (select(x < T::default(), T::default(), x), step(x > T::default()));
    Relu6(x) {
        let six = T::from_f64(6.0);
        (clamp(x, T::default(), six), step::<T>(x > T::default()) * step(x < six))
    };
    Swish(x) {
        let x = floor(x);
        let s = sigmoid::<I, T>(x);
        (x * s, s * x.times_plus::<I>(T::ONE - s, T::ONE))
    };
    Sigmoid(x) {
        let s = sigmoid::<I, T>(x);
        (s, s * (T::ONE - s))
    };
    HardSigmoid(x) {
        let (three, sixth) = (T::from_f64(3.0), T::from_f64(1.0 / 6.0));
        (clamp(x * sixth + T::from_f64(0.5), T::default(), T::ONE), sixth * step::<T>(x > -three) * step(x < three))
    };
    HardSwish(x) {
        let (three, sixth) = (T::from_f64(3.0), T::from_f64(1.0 / 6.0));
        let x = floor(x);
        let s = clamp(x * sixth + T::from_f64(0.5), T::default(), T::ONE);
        (x * s, s + x * sixth * step::<T>(x > -three) * step(x < three))
    };
}

#[inline(always)]
fn select<T>(condition: bool, yes: T, no: T) -> T {
    if condition { yes } else { no }
}

#[inline(always)]
fn step<T: Element>(condition: bool) -> T {
    select(condition, T::ONE, T::default())
}

/// NaN stays NaN.
#[inline(always)]
fn clamp<T: Element>(x: T, low: T, high: T) -> T {
    let x = select(x < low, low, x);
    select(x > high, high, x)
}

/// Lifts minus infinity, whose product with 0 would not be a number, where the limit of the product is 0.
#[inline(always)]
fn floor<T: Element>(x: T) -> T {
    select(x < T::from_f64(-1e30), T::from_f64(-1e30), x)
}

#[inline(always)]
fn sigmoid<I: Isa, T: Element>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp::<I>())
}

/// `exp(x)` with a relative error below 1e-6 where the result is a normal number, an absolute one of 2^-148 below.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`; `exp(r)` by a polynomial; the factor `2^n` in two steps, because the
/// exponent of neither a subnormal result nor of infinity fits one.
#[inline(always)]
pub fn exp_f32<I: Isa>(x: f32) -> f32 {
    // Adding this rounds to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first with few enough bits that its product with `n` is exact.
    const LN2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    // Beyond these the result is 0 or infinity.
    let x = clamp(x, -110.0, 90.0);
    let shifted = x.times_plus::<I>(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.times_plus::<I>(-LN2.1, n.times_plus::<I>(-LN2.0, x));
    // Taylor's polynomial of degree 6: r^7 / 7! is at most 1.2e-7.
    let coefficients = [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let p = coefficients.into_iter().fold(1.0 / 720.0, |p: f32, c| p.times_plus::<I>(r, c));
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    p * power(half) * power(n.wrapping_sub(half))
}

/// `activation(scale * x + shift) * factor` of a row, written or (with `add`) added to `y`.
pub struct Activate<'a, T> {
    /// The function.
    pub activation: Activation,
    /// The row.
    pub x: &'a [T],
    /// Scale and shift before the function.
    pub affine: (T, T),
    /// Factor after it.
    pub factor: T,
    /// Whether to add to what is there.
    pub add: bool,
    /// The result.
    pub y: &'a mut [T],
}

impl<T: Element> Kernel for Activate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let Self { activation, x, affine: (scale, shift), factor, add, y } = self;
        with_function!(activation, F => {
            if add {
                y.iter_mut().zip(x).for_each(|(y, &x)| *y += F::value::<I>(x.times_plus::<I>(scale, shift)) * factor);
            } else {
                y.iter_mut().zip(x).for_each(|(y, &x)| *y = F::value::<I>(x.times_plus::<I>(scale, shift)) * factor);
            }
        });
    }
}

/// `activation(scale * x + shift)` of a row in its own place.
pub struct ActivateInPlace<'a, T> {
    /// The function.
    pub activation: Activation,
    /// The row.
    pub row: &'a mut [T],
    /// Scale and shift before the function.
    pub affine: (T, T),
}

impl<T: Element> Kernel for ActivateInPlace<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let (scale, shift) = self.affine;
        with_function!(self.activation, F => {
            self.row.iter_mut().for_each(|x| *x = F::value::<I>(x.times_plus::<I>(scale, shift)));
        });
    }
}

/// The way back through [`Activate`] of a row: from the gradient by its result to the gradient by `x`.
pub struct ActivateGrad<'a, T> {
    /// The function.
    pub activation: Activation,
    /// The row.
    pub x: &'a [T],
    /// Scale and shift before the function.
    pub affine: (T, T),
    /// Factor after it.
    pub factor: T,
    /// The gradient by the result.
    pub grad: &'a [T],
    /// Mean and inverse standard deviation that normalise `x` for [`RowSums::normalised`].
    pub moments: (T, T),
    /// Whether to add to what is there.
    pub add: bool,
    /// The gradient by `x`, taking the batch's statistics as constants.
    pub grad_x: &'a mut [T],
}

/// Sums over a row that [`ActivateGrad`] gathers on the way.
#[derive(Clone, Copy, Default)]
pub struct RowSums {
    /// Of the gradient by the function's argument.
    pub grad: f64,
    /// Of that gradient times the normalised `x`.
    pub normalised: f64,
    /// Of the gradient by the result times the function's value: the gradient by `factor`.
    pub value: f64,
}

impl<T: Element> Kernel for ActivateGrad<'_, T> {
    type Output = RowSums;

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> RowSums {
        with_function!(self.activation, F => if self.add { self.rows::<I, F, true>() } else { self.rows::<I, F, false>() })
    }
}

impl<T: Element> ActivateGrad<'_, T> {
    #[inline(always)]
    fn rows<I: Isa, F: Function<T>, const ADD: bool>(self) -> RowSums {
        let constants = [self.affine.0, self.affine.1, self.factor, self.moments.0, self.moments.1];
        let mut sums = [[T::default(); LANES]; 3];
        let whole = self.x.len() / LANES * LANES;
        let (x, x_rest) = self.x.split_at(whole);
        let (grad, grad_rest) = self.grad.split_at(whole);
        let (grad_x, grad_x_rest) = self.grad_x.split_at_mut(whole);
        let chunks = x.chunks_exact(LANES).zip(grad.chunks_exact(LANES)).zip(grad_x.chunks_exact_mut(LANES));
        for ((x, grad), grad_x) in chunks {
            // The fixed length lets the compiler vectorise.
            Self::chunk::<I, F, ADD>(&x[..LANES], &grad[..LANES], &mut grad_x[..LANES], constants, &mut sums);
        }
        Self::chunk::<I, F, ADD>(x_rest, grad_rest, grad_x_rest, constants, &mut sums);
        let [grad, normalised, value] = sums.map(|lanes| lanes.iter().map(|sum| sum.to_f64()).sum());
        RowSums { grad, normalised, value }
    }

    /// At most [`LANES`] values.
    #[inline(always)]
    fn chunk<I: Isa, F: Function<T>, const ADD: bool>(
        x: &[T],
        grad: &[T],
        grad_x: &mut [T],
        [scale, shift, factor, mean, inverse]: [T; 5],
        [sum, normalised, total]: &mut [[T; LANES]; 3],
    ) {
        for i in 0..x.len().min(LANES) {
            let (value, slope) = F::both::<I>(x[i].times_plus::<I>(scale, shift));
            let g = grad[i] * factor * slope;
            sum[i] += g;
            normalised[i] += g * ((x[i] - mean) * inverse);
            total[i] += grad[i] * value;
            grad_x[i] = if ADD { grad_x[i] + g * scale } else { g * scale };
        }
    }
}

/// `y = w + slope * (x - mean) + shift`: the gradient by the values before a batch norm whose statistics depend on them.
pub struct NormGrad<'a, T> {
    /// The gradient that takes the statistics as constants.
    pub w: &'a [T],
    /// The values before the norm.
    pub x: &'a [T],
    /// Slope, mean and shift.
    pub constants: [T; 3],
    /// The result.
    pub y: &'a mut [T],
}

impl<T: Element> Kernel for NormGrad<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let [slope, mean, shift] = self.constants;
        for ((y, &w), &x) in self.y.iter_mut().zip(self.w).zip(self.x) {
            *y = w + slope * (x - mean) + shift;
        }
    }
}

/// Mean of a row, and the sum of the squares of the distances from it.
///
/// One pass over the row, with distances from one of its values: they are of the order of the deviation, so nothing
/// cancels however far from zero the mean is.
pub struct Moments<'a, T>(pub &'a [T]);

impl<T: Element> Kernel for Moments<'_, T> {
    type Output = (f64, f64);

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> (f64, f64) {
        let pivot = self.0.first().copied().unwrap_or_default();
        let mut sums = [[T::default(); LANES]; 2];
        let chunks = self.0.chunks_exact(LANES);
        Self::chunk::<I>(chunks.remainder(), pivot, &mut sums);
        for row in chunks {
            Self::chunk::<I>(&row[..LANES], pivot, &mut sums);
        }
        let [sum, squares] = sums.map(|lanes| lanes.iter().map(|sum| sum.to_f64()).sum::<f64>());
        let count = self.0.len() as f64;
        (pivot.to_f64() + sum / count, (squares - sum * sum / count).max(0.0))
    }
}

impl<T: Element> Moments<'_, T> {
    /// At most [`LANES`] values.
    #[inline(always)]
    fn chunk<I: Isa>(row: &[T], pivot: T, [sum, squares]: &mut [[T; LANES]; 2]) {
        for i in 0..row.len().min(LANES) {
            let distance = row[i] - pivot;
            sum[i] += distance;
            squares[i] = distance.times_plus::<I>(distance, squares[i]);
        }
    }
}

/// The sum of a row.
pub struct Sum<'a, T>(pub &'a [T]);

impl<T: Element> Kernel for Sum<'_, T> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> f64 {
        let mut sums = [T::default(); LANES];
        let chunks = self.0.chunks_exact(LANES);
        sums.iter_mut().zip(chunks.remainder()).for_each(|(sum, &x)| *sum += x);
        for chunk in chunks {
            sums.iter_mut().zip(chunk).for_each(|(sum, &x)| *sum += x);
        }
        sums.iter().map(|sum| sum.to_f64()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_over_the_whole_range() {
        let mut bits = 0u32;
        while bits < u32::MAX - 997 {
            bits += 997;
            let x = f32::from_bits(bits);
            let (found, expected) = (exp_f32::<pulp::Scalar>(x), f64::from(x).exp());
            if x.is_nan() {
                assert!(found.is_nan());
            } else if expected > f64::from(f32::MAX) {
                assert!(found == f32::INFINITY || expected < 3.402_824e38, "{x} {found}");
            } else {
                let error = (f64::from(found) - expected).abs();
                let bound = if expected >= f64::from(f32::MIN_POSITIVE) { 1e-6 * expected } else { 2f64.powi(-148) };
                assert!(error <= bound, "exp({x}) = {found}, expected {expected}");
            }
        }
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
            with_function!(activation, F => {
                for x in [f32::NEG_INFINITY, -1e38, -100.0] {
                    assert!((F::value::<pulp::Scalar>(x) as f64 - low).abs() < 1e-30, "{activation:?}({x})");
                }
                assert_eq!(F::value::<pulp::Scalar>(f32::INFINITY) as f64, high, "{activation:?}");
                assert!(F::value::<pulp::Scalar>(f32::NAN).is_nan(), "{activation:?}");
                for i in -50..50 {
                    let (x, h) = (f64::from(i) * 0.173 + 0.01, 1e-6);
                    let slope = (F::value::<pulp::Scalar>(x + h) - F::value::<pulp::Scalar>(x - h)) / (2.0 * h);
                    assert!((F::both::<pulp::Scalar>(x).1 - slope).abs() < 1e-6, "{activation:?}'({x})");
                }
            });
        }
    }
}
