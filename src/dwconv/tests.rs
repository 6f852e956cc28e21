//! Each plan for each shape, on each instruction set, against plain float64 loops.

use half::bf16;

use super::plan::{Algorithm, Plan, Problem, explain};
use super::{forward, grad_input, grad_weight};
use crate::plan::{Caps, Direction, with_algorithm};
use crate::shape::{Depthwise, Images, Order, Padding, Sides, Size2, WeightLayout};
use crate::simd::IsaKind;
use crate::simd::element::Element;
use crate::tests::{check, place, random, run};

/// A convolution's operands, and its results in float64.
struct Oracle<T> {
    x: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
    grad: Vec<T>,
    y: Vec<f64>,
    grad_x: Vec<f64>,
    grad_w: Vec<f64>,
}

impl<T: Element> Oracle<T> {
    fn new(shape: &Depthwise) -> Self {
        let (rows, columns, order) = (shape.vertical, shape.horizontal, shape.order);
        let image = |pixels| Images { count: shape.count, pixels, channels: shape.channels, order };
        let (input, output) = (image(rows.input * columns.input), image(rows.output * columns.output));
        let x = random::<T>(shape.input_len(), 1);
        let weight = random::<T>(shape.weights(), 2);
        let grad = random::<T>(shape.output_len(), 3);
        let bias = random::<T>(shape.channels, 4);
        let mut y = vec![0.0; shape.output_len()];
        let (mut grad_x, mut grad_w) = (vec![0.0; shape.input_len()], vec![0.0; shape.weights()]);
        for (n, c) in (0..shape.count).flat_map(|n| (0..shape.channels).map(move |c| (n, c))) {
            for p in 0..output.pixels {
                let to = place(output, n, p, c);
                y[to] += bias[c].to_f64();
                for tap in 0..shape.kernel * shape.kernel {
                    let row = (p / columns.output * shape.stride + tap / shape.kernel).wrapping_sub(rows.before);
                    let column = (p % columns.output * shape.stride + tap % shape.kernel).wrapping_sub(columns.before);
                    if row < rows.input && column < columns.input {
                        let (from, w) = (place(input, n, row * columns.input + column, c), shape.weight_index(c, tap));
                        y[to] += x[from].to_f64() * weight[w].to_f64();
                        grad_x[from] += grad[to].to_f64() * weight[w].to_f64();
                        grad_w[w] += grad[to].to_f64() * x[from].to_f64();
                    }
                }
            }
        }
        Self { x, weight, bias, grad, y, grad_x, grad_w }
    }

    /// Computes a direction and compares.
    fn check(&self, isa: IsaKind, shape: &Depthwise, direction: Direction, what: &dyn Fn() -> String) {
        let Self { x, weight, bias, grad, y, grad_x, grad_w } = self;
        match direction {
            Direction::Forward => check(&run(y.len(), |out| forward(isa, shape, x, weight, Some(bias), out)), y, what),
            Direction::GradInput => {
                check(&run(grad_x.len(), |out| grad_input(isa, shape, grad, weight, out)), grad_x, what)
            }
            Direction::GradWeight => {
                check(&run(grad_w.len(), |out| grad_weight(isa, shape, x, grad, out)), grad_w, what)
            }
        }
    }
}

const DIRECTIONS: [Direction; 3] = [Direction::Forward, Direction::GradInput, Direction::GradWeight];

/// All plans for a shape, or those of one algorithm; returns how many.
fn all_plans<T: Element>(isas: &[IsaKind], shape: &Depthwise, only: Option<Algorithm>) -> usize {
    let (oracle, mut ran) = (Oracle::<T>::new(shape), 0);
    for (&isa, direction) in isas.iter().flat_map(|isa| DIRECTIONS.map(|direction| (isa, direction))) {
        let problem = Problem { shape: *shape, direction };
        for Plan { algorithm, .. } in Plan::all(&problem, &Caps::new::<T>(isa)) {
            if only.is_none_or(|only| only == algorithm) {
                let what = || format!("{} {algorithm:?}: {problem:?}", isa.name());
                with_algorithm(algorithm, || oracle.check(isa, shape, direction, &what));
                ran += 1;
            }
        }
    }
    ran
}

fn shape(
    [count, channels]: [usize; 2],
    size: [usize; 2],
    kernel: usize,
    stride: i64,
    padding: Padding,
    order: Order,
) -> Depthwise {
    let size = Size2 { height: size[0], width: size[1] };
    Depthwise::new(count, channels, size, kernel, stride, padding, order, WeightLayout::Io).unwrap()
}

/// One algorithm, forced, for all kernels that it computes, on each instruction set.
fn by_force(algorithm: Algorithm, order: Order, strides: &[i64]) {
    let isas = if cfg!(miri) { vec![IsaKind::by_name("portable").unwrap()] } else { IsaKind::available() };
    for &stride in strides {
        for kernel in if cfg!(miri) { vec![3] } else { vec![3, 5, 7] } {
            // Narrower than half a vector; and wider than two, with a rest.
            for size in [[5, 2], [6, 4], [7, 7], [8, 39]] {
                if cfg!(miri) && size[1] > 4 {
                    continue;
                }
                let shape = shape([2, 5], size, kernel, stride, Padding::Same, order);
                let ran = all_plans::<bf16>(&isas, &shape, Some(algorithm))
                    + all_plans::<f32>(&isas, &shape, Some(algorithm))
                    + all_plans::<f64>(&isas, &shape, Some(algorithm));
                // Portable vectors are of one value.
                let pairs = size[1] < 5 && isas.iter().any(|isa| isa.name() != "portable");
                assert!(ran > 0 || algorithm == Algorithm::RowPairs && !pairs, "{algorithm:?} {shape:?}");
            }
        }
    }
}

#[test]
fn rows_by_force() {
    by_force(Algorithm::Rows, Order::Nchw, &[1, 2]);
}

#[test]
fn row_pairs_by_force() {
    by_force(Algorithm::RowPairs, Order::Nchw, &[1]);
}

#[test]
fn stride2_grad_by_force() {
    by_force(Algorithm::Stride2Grad, Order::Nchw, &[2]);
}

#[test]
fn strips_by_force() {
    by_force(Algorithm::Strips, Order::Nhwc, &[1, 2]);
}

/// Odd sizes, paddings, channels that are no multiple of a vector, nothing at all, one pixel.
#[test]
#[cfg_attr(miri, ignore = "hours; the tests by force are its small ones")]
fn all_plans_match_the_oracle() {
    let paddings = [Padding::Same, Padding::Valid, Padding::Explicit(Sides { top: 0, bottom: 2, left: 1, right: 1 })];
    let isas = IsaKind::available();
    let sizes = [
        ([0, 3], [7, 7]),
        ([2, 3], [0, 0]),
        ([1, 1], [7, 8]),
        ([2, 17], [9, 7]),
        ([1, 33], [8, 19]),
        ([1, 130], [7, 7]),
        ([5, 2], [113, 9]),
    ];
    for (images, size) in sizes {
        for (kernel, stride) in [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2)] {
            for (order, padding) in [Order::Nchw, Order::Nhwc].into_iter().flat_map(|o| paddings.map(|p| (o, p))) {
                let shape = shape(images, size, kernel, stride, padding, order);
                all_plans::<bf16>(&isas, &shape, None);
                all_plans::<f32>(&isas, &shape, None);
                all_plans::<f64>(&isas, &shape, None);
            }
        }
    }
    // A pixel of which the input gradient has one phase, though the stride is 2.
    for order in [Order::Nchw, Order::Nhwc] {
        let shape = shape([2, 3], [1, 1], 3, 2, Padding::Same, order);
        all_plans::<f32>(&isas, &shape, None);
    }
}

/// Layers of MobileNets and EfficientNets choose each algorithm in each direction that it computes.
#[test]
fn each_algorithm_is_chosen() {
    // Width of the planes and stride.
    let layers = [(112, 1), (112, 2), (56, 1), (28, 2), (14, 1), (7, 1), (4, 1), (2, 1)];
    for isa in IsaKind::available().into_iter().filter(|isa| isa.name() != "portable") {
        let mut chosen = Vec::new();
        for (order, (width, stride)) in [Order::Nchw, Order::Nhwc].into_iter().flat_map(|o| layers.map(|l| (o, l))) {
            let shape = shape([8, 96], [width, width], 3, stride, Padding::Same, order);
            for problem in DIRECTIONS.map(|direction| Problem { shape, direction }) {
                let plan = Plan::choose(&problem, &Caps::new::<f32>(isa));
                chosen.push((problem.direction, plan.algorithm));
            }
        }
        let all = [Algorithm::Rows, Algorithm::RowPairs, Algorithm::Strips];
        for expected in all.into_iter().flat_map(|a| DIRECTIONS.map(|direction| (direction, a))) {
            assert!(chosen.contains(&expected), "{expected:?} is never chosen on {}", isa.name());
        }
        assert!(chosen.contains(&(Direction::GradInput, Algorithm::Stride2Grad)), "{}", isa.name());
    }
}

#[test]
fn plans_explain_themselves() {
    let caps = Caps::new::<f32>(IsaKind::available()[0]);
    let shape = shape([1, 8], [9, 9], 3, 2, Padding::Same, Order::Nchw);
    let problem = Problem { shape, direction: Direction::GradInput };
    let candidates = explain(&problem, &caps);
    let found: Vec<_> = candidates.iter().map(|c| (c.algorithm.as_str(), c.applies, c.chosen)).collect();
    assert_eq!(found, [("Rows", false, false), ("RowPairs", false, false), ("Stride2Grad", true, true)]);
    assert!(candidates[2].detail.starts_with("dwconv_nchw_s2_grad.rs: 3 x 3 taps at a stride of 2"));
    // A quarter of the taps for each of 5 x 5 pixels of four parities.
    let cost = candidates[2].cost.unwrap();
    assert_eq!(cost, (8 * 9 * 5 * 5usize.div_ceil(caps.lanes)) as f64);
    assert!(Plan::choose(&problem, &caps).explain().starts_with("Stride2Grad (dwconv_nchw_s2_grad.rs), "));
}
