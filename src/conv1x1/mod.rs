//! Grouped pointwise (1x1) convolution with interleaved output, and its gradients.
//!
//! Forward and input gradient are the same computation with the roles of the channels exchanged: a
//! [`GroupedProduct`] multiplies the rows of each group by a small matrix. [`plan`] chooses how,
//! for each layout and direction; the drivers take its [`Plan`] and divide the work over threads:
//!
//! | file | driver |
//! |---|---|
//! | `nchw.rs` | forward and input gradient over planes |
//! | `nhwc.rs` | forward and input gradient over pixels |
//! | `grad_weight_nchw.rs`, `dot_nt.rs` | weight gradient over planes: A·Bᵀ of their rows |
//! | `grad_weight_nhwc.rs` | weight gradient over pixels |
//! | `grad_bias.rs` | bias gradient |
//! | `pack.rs`, `grouped.rs` | weights as the kernels read them; groups in vectors |

pub(crate) mod dot_nt;
mod grad_bias;
mod grad_weight;
mod grad_weight_nchw;
mod grad_weight_nhwc;
mod grouped;
mod nchw;
mod nhwc;
mod pack;
pub mod plan;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;

pub use self::grad_bias::grad_bias;
use self::pack::WeightView;
pub use self::plan::explain;
use self::plan::{Algorithm, Plan, Problem};
use crate::interleave::ChannelOrder;
use crate::parallel::{Shared, estimate};
use crate::plan::{Caps, Direction};
use crate::pool::threads_for;
use crate::shape::{Images, Pointwise};
use crate::simd::IsaKind;
use crate::simd::element::Element;
use crate::simd::mul_acc::{Fma, MulAcc};

/// Tasks for each thread: enough to even out threads of different speed.
const TASKS_PER_THREAD: usize = 4;

/// Output = interleave(grouped pointwise convolution of `x` + `bias`).
///
/// * `images`: the input's geometry; `x` holds `(N, C_in)` images in that order, `y` receives
///   `(N, C_out)`.
/// * `weight`: in the layout that `shape` names; `bias`: `C_out` values.
pub fn forward<T: Element>(
    isa: IsaKind,
    shape: &Pointwise,
    images: Images,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    y: &mut [MaybeUninit<T>],
) {
    assert_eq!(images.channels, shape.in_channels);
    assert_eq!(weight.len(), shape.weights());
    let weight = WeightView { values: weight, strides: shape.weight_strides() };
    GroupedProduct::new::<T>(isa, Direction::Forward, shape, images).run(x, weight, bias, y);
}

/// The gradient by the input: `(N, C_in)` from `grad_output (N, C_out)`, the gradient of the
/// interleaved output.
///
/// `images` is the geometry of `grad_output`.
pub fn grad_input<T: Element>(
    isa: IsaKind,
    shape: &Pointwise,
    images: Images,
    grad_output: &[T],
    weight: &[T],
    grad_x: &mut [MaybeUninit<T>],
) {
    assert_eq!(images.channels, shape.out_channels);
    assert_eq!(weight.len(), shape.weights());
    let weight = WeightView { values: weight, strides: shape.weight_strides().transposed() };
    GroupedProduct::new::<T>(isa, Direction::GradInput, shape, images).run(grad_output, weight, None, grad_x);
}

/// The gradient by the weight, in the layout that `shape` names, from `x (N, C_in)` and
/// `grad_output (N, C_out)`, the gradient of the interleaved output.
///
/// `images` is the geometry of `x`. The result does not depend on the number of threads.
pub fn grad_weight<T: Element>(
    isa: IsaKind,
    shape: &Pointwise,
    images: Images,
    x: &[T],
    grad_output: &[T],
    grad_weight: &mut [MaybeUninit<T>],
) {
    assert_eq!(images.channels, shape.in_channels);
    assert_eq!(x.len(), images.len());
    assert_eq!(grad_output.len(), images.with_channels(shape.out_channels).len());
    assert_eq!(grad_weight.len(), shape.weights());
    match T::bf16_dot(isa) {
        Some(dot) => grad_weight::run(isa, dot, shape, images, x, grad_output, grad_weight),
        None => grad_weight::run(isa, Fma, shape, images, x, grad_output, grad_weight),
    }
}

/// Rows of each group times that group's matrix.
struct GroupedProduct {
    isa: IsaKind,
    caps: Caps,
    problem: Problem,
    /// The input's geometry.
    images: Images,
    groups: usize,
    group_in: usize,
    group_out: usize,
    /// The order of the input's channels, where it is not their own.
    in_order: Option<ChannelOrder>,
    /// The order of the output's channels, where it is not their own.
    out_order: Option<ChannelOrder>,
}

impl GroupedProduct {
    /// That of a direction; `images` is the geometry of its input.
    fn new<T: Element>(isa: IsaKind, direction: Direction, shape: &Pointwise, images: Images) -> Self {
        let caps = Caps::new::<T>(isa);
        let problem = Problem::new(&caps, direction, shape, images);
        let plan::Groups { count, inputs, outputs } = problem.groups();
        let order = problem.is_interleaved().then(|| problem.order());
        let (in_order, out_order) = if direction == Direction::Forward { (None, order) } else { (order, None) };
        Self { isa, caps, problem, images, groups: count, group_in: inputs, group_out: outputs, in_order, out_order }
    }

    fn run<T: Element>(&self, x: &[T], weight: WeightView<'_, T>, bias: Option<&[T]>, y: &mut [MaybeUninit<T>]) {
        let out = self.images.with_channels(self.groups * self.group_out);
        assert_eq!(x.len(), self.images.len());
        assert_eq!(y.len(), out.len());
        assert!(bias.is_none_or(|bias| bias.len() == out.channels));
        if out.is_empty() {
            return;
        }
        let threads = threads_for(images_work::<T>(self.images, out, self.group_in));
        let y = Shared::new(y);
        match T::bf16_dot(self.isa) {
            Some(dot) => self.run_with(dot, threads, x, weight, bias, y),
            None => self.run_with(Fma, threads, x, weight, bias, y),
        }
    }

    /// All of it, by the plan.
    fn run_with<T: Element, M: MulAcc<T>>(
        &self,
        mul_acc: M,
        threads: usize,
        x: &[T],
        weight: WeightView<'_, T>,
        bias: Option<&[T]>,
        y: Shared<T>,
    ) {
        match Plan::choose(&self.problem, &self.caps).algorithm {
            Algorithm::Rows => self.rows(mul_acc, threads, x, weight, bias, false, y),
            Algorithm::RowsInPasses => self.rows(mul_acc, threads, x, weight, bias, true, y),
            Algorithm::SegmentedSum => self.segmented_sum(threads, x, weight, bias, y),
            Algorithm::Outer => self.outer(mul_acc, threads, x, weight, bias, y),
            Algorithm::Grouped => self.grouped(mul_acc, threads, x, weight, bias, y),
            Algorithm::Transposed => self.transposed(mul_acc, threads, x, weight, bias, y),
            other => unreachable!("{other:?} is no algorithm of this direction"),
        }
    }
}

fn images_work<T>(a: Images, b: Images, inner: usize) -> f64 {
    estimate(b.len() * inner, (a.len() + b.len()) * size_of::<T>())
}
