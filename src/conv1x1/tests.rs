//! Every algorithm on every instruction set, forced, against plain float64 loops; and that each is
//! chosen by a layer of `kconv.models`.

use half::bf16;

use super::plan::{Algorithm, Plan, Problem};
use super::{forward, grad_bias, grad_input, grad_weight};
use crate::plan::{Caps, Direction, with_algorithm};
use crate::shape::{Images, Order, Pointwise, WeightLayout, WeightStrides, interleave_dst_index};
use crate::simd::IsaKind;
use crate::simd::element::Element;
use crate::tests::{check, place, random, run};

/// A layer, its output interleaved by `step`.
#[derive(Clone, Copy, Debug)]
struct Case {
    images: usize,
    pixels: usize,
    in_channels: usize,
    out_channels: usize,
    groups: i64,
    step: i64,
}

const fn case(images: usize, pixels: usize, in_channels: usize, out_channels: usize, groups: i64, step: i64) -> Case {
    Case { images, pixels, in_channels, out_channels, groups, step }
}

impl Case {
    fn shape(&self, layout: WeightLayout) -> Pointwise {
        Pointwise::new(self.in_channels, self.out_channels, self.groups, self.step, layout).unwrap()
    }

    fn images(&self, order: Order) -> Images {
        Images { count: self.images, pixels: self.pixels, channels: self.in_channels, order }
    }

    /// Whether Miri has no time for it.
    fn is_too_large(&self) -> bool {
        cfg!(miri) && self.images * self.pixels * self.in_channels * self.out_channels > 1000
    }
}

/// Sizes around vectors, tiles, parts and groups.
#[rustfmt::skip]
const CASES: &[Case] = &[
    case(0, 5, 4, 4, 2, 2),
    case(2, 0, 4, 4, 2, 2),
    case(1, 1, 1, 1, 1, 1),
    case(3, 1, 10, 15, 5, 3),
    case(2, 9, 6, 6, 3, 2),
    case(2, 49, 18, 27, 3, 9),
    case(1, 47, 9, 8, 1, 1),
    case(1, 97, 16, 17, 1, 5),
    case(3, 20, 30, 14, 2, 7),
    case(1, 12, 72, 70, 1, 1),
    case(1, 70, 12, 72, 4, 1),
    case(2, 35, 40, 106, 2, 1),
    case(2, 35, 80, 20, 4, 5),
    case(11, 49, 32, 32, 2, 16),
    case(2, 523, 72, 12, 1, 1),
    case(1, 523, 34, 102, 2, 3),
    // Rows of four vectors.
    case(3, 64, 20, 46, 2, 23),
    // Grouped lanes: all groups that fit a vector, or quads of each.
    case(1, 133, 24, 24, 8, 1),
    case(1, 130, 35, 35, 7, 1),
    case(1, 129, 108, 18, 6, 1),
    case(1, 129, 108, 18, 6, 3),
    case(1, 131, 63, 18, 3, 1),
    case(2, 70, 48, 16, 2, 8),
    case(1, 128, 96, 28, 4, 1),
    case(1, 135, 10, 90, 5, 1),
    // Groups of one output channel, whose products are added up: 2 to 8 of them.
    case(2, 9, 10, 5, 5, 1),
    case(1, 21, 9, 3, 3, 1),
    case(1, 35, 96, 24, 24, 1),
    case(3, 7, 35, 7, 7, 1),
    case(2, 33, 60, 10, 10, 1),
    case(1, 33, 21, 3, 3, 1),
    case(1, 19, 40, 5, 5, 1),
    // The same, interleaved: permuted in a cache; several tiles of pixels.
    case(1, 35, 96, 24, 24, 6),
    case(2, 43, 50, 10, 10, 4),
    case(1, 700, 36, 12, 12, 3),
    // Groups of one input channel.
    case(1, 37, 5, 15, 5, 1),
    case(2, 9, 3, 24, 3, 1),
    // Interleaved by the channels of a group: permuted in a cache, or by chunks of transposed rows.
    case(1, 130, 24, 24, 6, 4),
    case(1, 133, 28, 168, 7, 24),
    case(2, 50, 48, 288, 3, 96),
    case(1, 101, 112, 336, 7, 48),
    // Interleaved vectors across groups, which fill one or more, or not.
    case(1, 70, 64, 256, 16, 16),
    case(2, 37, 40, 240, 2, 120),
    case(1, 65, 20, 80, 5, 16),
    case(1, 39, 16, 96, 4, 24),
    case(1, 67, 32, 16, 8, 2),
    case(2, 35, 80, 80, 8, 10),
    case(1, 43, 56, 336, 28, 12),
    case(1, 41, 96, 192, 48, 4),
    case(1, 70, 6, 12, 3, 4),
    // Many pixels of them: input gradients in vectors of whole rows, or permuted before they are
    // grouped.
    case(1, 1030, 24, 144, 6, 24),
    case(1, 1027, 20, 60, 5, 12),
    case(1, 1029, 144, 24, 8, 3),
    case(1, 1025, 22, 44, 22, 2),
    case(1, 1024, 80, 160, 20, 8),
    // Weight gradients whose channels are permuted back all at once, by two threads.
    case(1, 400, 96, 576, 24, 24),
    // Long rows, which are taken in passes.
    case(1, 4100, 33, 36, 1, 5), case(1, 1100, 42, 16, 1, 1),
];

/// The groups that are left to matrixmultiply, which no other algorithm needs to take.
const LARGE: &[Case] = &[case(1, 2, 1024, 1024, 1, 1)];

/// A problem's operands, and what plain loops make of them.
struct Oracle<T> {
    x: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
    grad: Vec<T>,
    y: Vec<f64>,
    grad_x: Vec<f64>,
    grad_w: Vec<f64>,
    grad_b: Vec<f64>,
}

impl<T: Element> Oracle<T> {
    fn new(shape: &Pointwise, images: Images) -> Self {
        let out = images.with_channels(shape.out_channels);
        let (x, weight) = (random::<T>(images.len(), 1), random::<T>(shape.weights(), 2));
        let (bias, grad) = (random::<T>(shape.out_channels, 3), random::<T>(out.len(), 4));
        let dst_index = interleave_dst_index(shape.out_channels, shape.interleave);
        let (mut y, mut grad_x) = (vec![0.0; out.len()], vec![0.0; images.len()]);
        let (mut grad_w, mut grad_b) = (vec![0.0; shape.weights()], vec![0.0; shape.out_channels]);
        let WeightStrides { group, output, input } = shape.weight_strides();
        for (n, p) in (0..images.count).flat_map(|n| (0..images.pixels).map(move |p| (n, p))) {
            for (g, o) in (0..shape.groups).flat_map(|g| (0..shape.group_out()).map(move |o| (g, o))) {
                let c_out = g * shape.group_out() + o;
                let to = place(out, n, p, dst_index[c_out]);
                y[to] += bias[c_out].to_f64();
                grad_b[c_out] += grad[to].to_f64();
                for i in 0..shape.group_in() {
                    let from = place(images, n, p, g * shape.group_in() + i);
                    let w = g * group + o * output + i * input;
                    y[to] += weight[w].to_f64() * x[from].to_f64();
                    grad_x[from] += weight[w].to_f64() * grad[to].to_f64();
                    grad_w[w] += x[from].to_f64() * grad[to].to_f64();
                }
            }
        }
        Self { x, weight, bias, grad, y, grad_x, grad_w, grad_b }
    }

    /// Compares a direction's result.
    fn check(&self, isa: IsaKind, direction: Direction, shape: &Pointwise, images: Images, what: &dyn Fn() -> String) {
        let out = images.with_channels(shape.out_channels);
        let Self { x, weight, bias, grad, .. } = self;
        let (actual, expected) = match direction {
            Direction::Forward => (run(out.len(), |y| forward(isa, shape, images, x, weight, Some(bias), y)), &self.y),
            Direction::GradInput => {
                (run(images.len(), |grad_x| grad_input(isa, shape, out, grad, weight, grad_x)), &self.grad_x)
            }
            Direction::GradWeight => {
                (run(shape.weights(), |grad_w| grad_weight(isa, shape, images, x, grad, grad_w)), &self.grad_w)
            }
        };
        check(&actual, expected, what);
    }
}

const DIRECTIONS: [Direction; 3] = [Direction::Forward, Direction::GradInput, Direction::GradWeight];

/// Forces an algorithm on every case, layout, direction and instruction set that it applies to;
/// counts them for each instruction set.
fn force<T: Element>(algorithm: Algorithm, cases: &[Case], counts: &mut [usize]) {
    for (number, case) in cases.iter().enumerate().filter(|(_, case)| !case.is_too_large()) {
        let layout = [WeightLayout::Oi, WeightLayout::Io][number % 2];
        for order in [Order::Nchw, Order::Nhwc] {
            let (shape, images) = (case.shape(layout), case.images(order));
            let mut oracle = None;
            for (isa, count) in IsaKind::available().into_iter().zip(&mut *counts) {
                for direction in DIRECTIONS {
                    let caps = Caps::new::<T>(isa);
                    let problem = Problem::new(&caps, direction, &shape, images);
                    if Plan::all(&problem, &caps).iter().all(|plan| plan.algorithm != algorithm) {
                        continue;
                    }
                    let oracle = oracle.get_or_insert_with(|| Oracle::<T>::new(&shape, images));
                    let what = || format!("{} {algorithm:?} {direction:?} {layout:?} {case:?} {order:?}", isa.name());
                    with_algorithm(algorithm, || oracle.check(isa, direction, &shape, images, &what));
                    *count += 1;
                }
            }
        }
    }
}

/// Forces an algorithm with every type; each instruction set must run it, unless it needs vectors
/// that are permuted and there are none.
fn force_all_types(algorithm: Algorithm, cases: &[Case], needs_permute: bool) {
    let all = IsaKind::available();
    let mut counts = vec![0; all.len()];
    force::<bf16>(algorithm, cases, &mut counts);
    force::<f32>(algorithm, cases, &mut counts);
    force::<f64>(algorithm, cases, &mut counts);
    for (isa, count) in all.into_iter().zip(counts) {
        let expected = !needs_permute || Caps::new::<f32>(isa).permute;
        assert!(cfg!(miri) || (count > 0) == expected, "{} ran {algorithm:?} {count} times", isa.name());
    }
}

macro_rules! forced {
    ($($name:ident: $algorithm:ident, $cases:expr, $permutes:expr;)*) => {
        $(#[test]
        fn $name() {
            force_all_types(Algorithm::$algorithm, $cases, $permutes);
        })*
    };
}

forced! {
    rows_match_the_reference: Rows, CASES, false;
    rows_in_passes_match_the_reference: RowsInPasses, CASES, false;
    transposed_matches_the_reference: Transposed, CASES, false;
    outer_matches_the_reference: Outer, CASES, false;
    grouped_matches_the_reference: Grouped, CASES, true;
    segmented_sum_matches_the_reference: SegmentedSum, CASES, false;
    dot_matches_the_reference: Dot, CASES, false;
    outer_input_matches_the_reference: OuterInput, CASES, false;
    outer_grad_matches_the_reference: OuterGrad, CASES, false;
    gemm_matches_the_reference: Gemm, LARGE, false;
    outer_by_input_matches_the_reference: OuterByInput, CASES, false;
    outer_by_output_matches_the_reference: OuterByOutput, CASES, false;
}

#[test]
fn the_chosen_plan_matches_the_reference() {
    fn check_all<T: Element>(shape: &Pointwise, images: Images) {
        let (oracle, out) = (Oracle::<T>::new(shape, images), images.with_channels(shape.out_channels));
        for isa in IsaKind::available() {
            let what = || format!("{} {shape:?} {images:?}", isa.name());
            for direction in DIRECTIONS {
                oracle.check(isa, direction, shape, images, &what);
            }
            let actual = run(shape.out_channels, |b| grad_bias(isa, shape.interleave, out, &oracle.grad, b));
            check(&actual, &oracle.grad_b, &what);
        }
    }
    for (number, case) in CASES.iter().enumerate().filter(|(_, case)| !case.is_too_large()) {
        for order in [Order::Nchw, Order::Nhwc] {
            let shape = case.shape([WeightLayout::Io, WeightLayout::Oi][number % 2]);
            check_all::<bf16>(&shape, case.images(order));
            check_all::<f32>(&shape, case.images(order));
            check_all::<f64>(&shape, case.images(order));
        }
    }
}

#[test]
fn what_does_not_apply_is_refused() {
    let isa = IsaKind::by_name("portable").unwrap_or(IsaKind::available()[0]);
    let (shape, images) = (CASES[2].shape(WeightLayout::Oi), CASES[2].images(Order::Nhwc));
    let (caps, oracle) = (Caps::new::<f32>(isa), Oracle::<f32>::new(&shape, images));
    let problem = Problem::new(&caps, Direction::Forward, &shape, images);
    assert!(Plan::all(&problem, &caps).iter().all(|plan| plan.algorithm != Algorithm::Gemm));
    let refused = std::panic::catch_unwind(|| {
        with_algorithm(Algorithm::Gemm, || oracle.check(isa, Direction::Forward, &shape, images, &String::new));
    });
    let message = *refused.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains("algorithm=\"Gemm\" does not apply"), "{message}");
    // What was forced is forgotten.
    oracle.check(isa, Direction::Forward, &shape, images, &String::new);
}

/// Layers of `kconv.models`, from `python benches/compare.py plans --layers`: (network, layer).
#[rustfmt::skip]
const LAYERS: &[(&str, Case)] = &[
    ("keffnet_b0 D6_16ch 32x32", case(64, 961, 24, 144, 1, 1)),
    ("keffnet_b0 D6_16ch 32x32", case(64, 961, 96, 24, 6, 1)),
    ("keffnet_b0 D6_16ch 32x32", case(64, 961, 96, 24, 6, 4)),
    ("keffnet_b0 D6_16ch 32x32", case(64, 961, 40, 240, 2, 120)),
    ("keffnet_b0 D6_16ch 32x32", case(64, 256, 80, 480, 5, 1)),
    ("keffnet_b0 D6_16ch 32x32", case(64, 256, 480, 80, 20, 1)),
    ("keffnet_b0 D6_16ch 32x32", case(64, 256, 480, 112, 16, 7)),
    ("keffnet_b0 D6_16ch 32x32", case(64, 64, 320, 1280, 20, 1)),
    ("keffnet_b0 D6v3_4ch 32x32", case(64, 961, 96, 24, 24, 1)),
    ("keffnet_b0 D6v3_4ch 32x32", case(64, 961, 16, 96, 4, 1)),
    ("keffnet_b0 D6v3_4ch 32x32", case(64, 256, 560, 112, 112, 1)),
    ("kmobilenet D6_32ch 224x224", case(16, 3136, 64, 128, 2, 1)),
    ("kmobilenet_v3_large D6_16ch 224x224", case(16, 12544, 16, 64, 1, 1)),
    ("kmobilenet conv 224x224", case(16, 49, 1024, 1024, 1, 1)),
    ("keffnet_b0 conv 224x224", case(32, 3136, 144, 24, 1, 1)),
    ("keffnet_b0 D6_16ch 224x224, one image", case(1, 49, 1152, 320, 64, 1)),
    ("keffnet_b0 D6v3_4ch 32x32, one image", case(1, 64, 96, 24, 24, 1)),
];

/// An algorithm that no layer chooses is to be deleted.
#[test]
fn each_algorithm_is_chosen_by_a_layer_of_a_network() {
    let all = [
        Algorithm::Rows,
        Algorithm::RowsInPasses,
        Algorithm::Transposed,
        Algorithm::Outer,
        Algorithm::Grouped,
        Algorithm::SegmentedSum,
        Algorithm::Dot,
        Algorithm::OuterInput,
        Algorithm::OuterGrad,
        Algorithm::Gemm,
        Algorithm::OuterByInput,
        Algorithm::OuterByOutput,
    ];
    let Some(isa) = IsaKind::available().into_iter().find(|isa| Caps::new::<f32>(*isa).permute) else { return };
    let caps = Caps::new::<f32>(isa);
    let mut chosen = Vec::new();
    for (_, layer) in LAYERS {
        for order in [Order::Nchw, Order::Nhwc] {
            for direction in DIRECTIONS {
                let problem = Problem::new(&caps, direction, &layer.shape(WeightLayout::Oi), layer.images(order));
                chosen.push(Plan::choose(&problem, &caps).algorithm);
            }
        }
    }
    let missing: Vec<_> = all.into_iter().filter(|algorithm| !chosen.contains(algorithm)).collect();
    assert!(missing.is_empty(), "chosen by no layer: {missing:?}");
}
