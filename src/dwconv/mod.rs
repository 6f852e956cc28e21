//! Depthwise convolution and its gradients.
//!
//! [`plan`] chooses the algorithm, [`nchw`] and [`nhwc`] divide the work over threads. Forward pass
//! and input gradient are one computation with different [`phases`](self::polyphase).

pub(crate) mod nchw;
mod nhwc;
pub(crate) mod padded_planes;
pub mod plan;
pub(crate) mod polyphase;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;

use self::plan::{Algorithm, Plan, Problem};
use self::polyphase::{Phase, sum_seen};
use crate::parallel::{Shared, estimate};
use crate::plan::{Caps, Direction};
use crate::pool::threads_for;
use crate::shape::{Depthwise, Order};
use crate::simd::IsaKind;
use crate::simd::element::Element;

/// Tasks for each thread, at least, so that none waits long for the last one.
const TASKS_PER_THREAD: usize = 16;

/// A convolution with one kernel for each channel: the forward pass or the input gradient.
struct Correlation<'a, T> {
    isa: IsaKind,
    algorithm: Algorithm,
    shape: &'a Depthwise,
    vertical: Vec<Phase>,
    horizontal: Vec<Phase>,
    /// Height and width of the output.
    output: [usize; 2],
    x: &'a [T],
    weight: &'a [T],
    bias: Option<&'a [T]>,
    y: Shared<T>,
    threads: usize,
}

impl<T: Element> Correlation<'_, T> {
    fn run(&self) {
        match self.shape.order {
            Order::Nchw => self.planes(),
            Order::Nhwc => self.pixels(),
        }
    }
}

/// Output = depthwise convolution of `x` + `bias`.
///
/// * `x`: `(N, C, H, W)` images in the order of `shape`; `y`: `(N, C, H', W')`.
/// * `weight`: in the layout of `shape`; `bias`: `C` values.
pub fn forward<T: Element>(
    isa: IsaKind,
    shape: &Depthwise,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    y: &mut [MaybeUninit<T>],
) {
    assert_eq!((x.len(), y.len(), weight.len()), (shape.input_len(), shape.output_len(), shape.weights()));
    assert!(bias.is_none_or(|bias| bias.len() == shape.channels));
    if y.is_empty() {
        return;
    }
    let algorithm = choose::<T>(isa, shape, Direction::Forward);
    let phases = |axis| Phase::forward(axis, shape.kernel, shape.stride);
    let (vertical, horizontal) = (phases(shape.vertical), phases(shape.horizontal));
    let (output, threads) = ([shape.vertical.output, shape.horizontal.output], threads(shape, x, y));
    let y = Shared::new(y);
    Correlation { isa, algorithm, shape, vertical, horizontal, output, x, weight, bias, y, threads }.run();
}

/// The gradient with respect to the input: `(N, C, H, W)` from `grad_output (N, C, H', W')`.
pub fn grad_input<T: Element>(
    isa: IsaKind,
    shape: &Depthwise,
    grad_output: &[T],
    weight: &[T],
    grad_x: &mut [MaybeUninit<T>],
) {
    let lengths = (grad_output.len(), grad_x.len(), weight.len());
    assert_eq!(lengths, (shape.output_len(), shape.input_len(), shape.weights()));
    if grad_x.is_empty() {
        return;
    }
    let algorithm = choose::<T>(isa, shape, Direction::GradInput);
    let phases = |axis| Phase::backward(axis, shape.kernel, shape.stride);
    let (vertical, horizontal) = (phases(shape.vertical), phases(shape.horizontal));
    let output = [shape.vertical.input, shape.horizontal.input];
    let threads = threads(shape, grad_output, grad_x);
    let (x, y) = (grad_output, Shared::new(grad_x));
    Correlation { isa, algorithm, shape, vertical, horizontal, output, x, weight, bias: None, y, threads }.run();
}

/// The gradient with respect to the weights, in the layout of `shape`, from `x (N, C, H, W)` and
/// `grad_output (N, C, H', W')`.
///
/// The result does not depend on the number of threads.
pub fn grad_weight<T: Element>(
    isa: IsaKind,
    shape: &Depthwise,
    x: &[T],
    grad_output: &[T],
    grad_weight: &mut [MaybeUninit<T>],
) {
    let lengths = (x.len(), grad_output.len(), grad_weight.len());
    assert_eq!(lengths, (shape.input_len(), shape.output_len(), shape.weights()));
    if grad_output.is_empty() {
        grad_weight.iter_mut().for_each(|sum| _ = sum.write(T::default()));
        return;
    }
    let algorithm = choose::<T>(isa, shape, Direction::GradWeight);
    let phase = |axis| Phase::forward(axis, shape.kernel, shape.stride).remove(0);
    let (vertical, horizontal) = (phase(shape.vertical), phase(shape.horizontal));
    let threads = threads(shape, x, grad_output);
    let grad = WeightGrad { isa, algorithm, shape, vertical, horizontal, x, grad_output, threads };
    match shape.order {
        Order::Nchw => grad.planes(grad_weight),
        Order::Nhwc => grad.pixels(grad_weight),
    }
}

/// The algorithm of a direction's plan.
fn choose<T: Element>(isa: IsaKind, shape: &Depthwise, direction: Direction) -> Algorithm {
    Plan::choose(&Problem { shape: *shape, direction }, &Caps::new::<T>(isa)).algorithm
}

/// How many threads a convolution is worth that reads and writes two sets of values.
fn threads<A, B>(shape: &Depthwise, a: &[A], b: &[B]) -> usize {
    let taps = shape.kernel * shape.kernel;
    threads_for(estimate(shape.output_len() * taps, size_of_val(a) + size_of_val(b)))
}

/// The weight gradient.
struct WeightGrad<'a, T> {
    isa: IsaKind,
    algorithm: Algorithm,
    shape: &'a Depthwise,
    vertical: Phase,
    horizontal: Phase,
    x: &'a [T],
    grad_output: &'a [T],
    threads: usize,
}

impl<T: Element> WeightGrad<'_, T> {
    /// A sum, computed anew where it is not finite: see [`sum_seen`].
    fn checked(&self, c: usize, tap: usize, sum: T::Wide) -> T::Wide {
        if sum.to_f64().is_finite() {
            return sum;
        }
        let Depthwise { count, channels, kernel, order, .. } = *self.shape;
        let index = |n: usize, [y, x]: [usize; 2], [height, width]: [usize; 2]| match order {
            Order::Nchw => ((n * channels + c) * height + y) * width + x,
            Order::Nhwc => ((n * height + y) * width + x) * channels + c,
        };
        let (phases, taps) = ([&self.vertical, &self.horizontal], [tap / kernel, tap % kernel]);
        let (size, out_size) = (phases.map(|phase| phase.input), phases.map(|phase| phase.count));
        let value = |values: &[T], n, pixel, size| values[index(n, pixel, size)].to_f64();
        let product = |n, result, pixel| value(self.grad_output, n, result, out_size) * value(self.x, n, pixel, size);
        let of_image = |n| sum_seen(phases, taps, |result, pixel| product(n, result, pixel));
        T::Wide::from_f64((0..count).map(of_image).sum())
    }
}
