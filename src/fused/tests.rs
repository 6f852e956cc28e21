//! Fused programs: against finite differences, and the instruction sets and thread counts against
//! each other. (`tests/torch/test_fused.py` holds whole networks against layers one by one.)

use std::mem::MaybeUninit;

use half::bf16;

use super::builder::{
    Builder, CLIP, ELU, GELU, GELU_TANH, HARD_SWISH, LEAKY_RELU, MISH, RELU6, SIGMOID, SWISH, Term, Window, term,
};
use super::{Arguments, Inference, Prepared, Program, backward, forward, infer, infer_prepared};
use crate::shape::Order;
use crate::simd::IsaKind;
use crate::simd::element::Element;

/// Values 0 to 7: the input (4 channels), a grouped convolution, a strided depthwise one of what a
/// norm and swish make of it, the mean, a gate, a convolution of the gated with permuted channels,
/// another of the input to add, the sum.
fn gated() -> Vec<i64> {
    let mut program = Builder::new([4, 5, 5]).masks(1);
    let norms = [program.norm(6, true), program.norm(6, false)];
    let conv = program.conv(Window::square(1, 1, 0), 2, true, &[term(0, 0..4)], [6, 5, 5]);
    let swish = term(conv, 0..6).norm(norms[0]).activation(SWISH, &[]);
    let depthwise = program.conv(Window::square(3, 2, 1), 6, false, &[swish], [6, 3, 3]);
    let relu6 = |channels: Vec<usize>| term(depthwise, channels).norm(norms[1]).activation(RELU6, &[]);
    let mean = program.mean(&[relu6((0..6).collect())], 6);
    let gate = program.copy(&[term(mean, 0..6).activation(SIGMOID, &[])], [6, 1, 1]);
    let gated = relu6(vec![0, 3, 1, 4, 2, 5]).gate(gate);
    let permuted = program.conv(Window::square(1, 1, 0), 1, true, &[gated], [4, 3, 3]);
    let skip = program.conv(Window::square(1, 2, 0), 4, false, &[term(0, 0..4)], [4, 3, 3]);
    let masked = term(permuted, 0..4).activation(HARD_SWISH, &[]).mask(0);
    program.copy(&[masked, term(skip, 0..4)], [4, 3, 3]);
    program.integers()
}

/// A convolution, the means over 2 x 2 pixels of what a norm and swish make of it (an odd column is
/// left out), and a depthwise convolution of what another norm makes of them.
fn pooling() -> Vec<i64> {
    let mut program = Builder::new([4, 4, 7]);
    let norms = [program.norm(6, true), program.norm(6, true)];
    let conv = program.conv(Window::square(1, 1, 0), 2, false, &[term(0, 0..4)], [6, 4, 7]);
    let swish = term(conv, 0..6).norm(norms[0]).activation(SWISH, &[]);
    let pool = program.mean_pool(Window::square(2, 2, 0), None, &[swish], [6, 2, 3]);
    program.conv(Window::square(3, 1, 1), 6, false, &[term(pool, 0..6).norm(norms[1])], [6, 2, 3]);
    program.integers()
}

/// An unfolded convolution with strides and dilation that differ along the axes, the maxima over
/// windows of what a norm and GELU make of it, and means in which zeros count, of pixels alone and
/// of images.
fn windows() -> Vec<i64> {
    let mut program = Builder::new([2, 6, 5]);
    let norm = program.norm(4, true);
    let window = Window { kernel: [3, 3], stride: [2, 1], dilation: [1, 2], before: [1, 2] };
    let conv = program.conv(window, 2, true, &[term(0, 0..2)], [4, 3, 5]);
    let gelu = term(conv, 0..4).norm(norm).activation(GELU, &[]);
    let maxima = program.max_pool(Window::square(2, 1, 0), &[gelu], [4, 2, 4]);
    let means = program.mean_pool(Window::square(3, 1, 1), Some([1, 1]), &[term(maxima, 0..4)], [4, 2, 4]);
    let pixels = program.mean_pool(Window::square(3, 2, 1), None, &[term(means, 0..4)], [4, 1, 2]);
    let patches = Window { kernel: [1, 2], stride: [1, 3], dilation: [1, 1], before: [0, 0] };
    program.conv(patches, 1, false, &[term(pixels, 0..4)], [3, 1, 1]);
    program.integers()
}

/// Two convolutions of many channels with the same phases: one over padded planes, and, as its
/// result has few pixels, an unfolded one.
fn dense() -> Vec<i64> {
    let mut program = Builder::new([16, 9, 8]);
    let norm = program.norm(3, true);
    let planes = program.conv(Window::square(3, 1, 1), 1, false, &[term(0, 0..16)], [3, 9, 8]);
    let swish = term(planes, 0..3).norm(norm).activation(SWISH, &[]);
    let unfolded = program.conv(Window::square(3, 2, 1), 1, true, &[term(0, 0..16)], [3, 5, 4]);
    let pooled = program.mean_pool(Window::square(2, 2, 0), None, &[swish], [3, 4, 4]);
    let cut =
        program.max_pool(Window { kernel: [2, 1], ..Window::square(1, 1, 0) }, &[term(unfolded, 0..3)], [3, 4, 4]);
    program.copy(&[term(pooled, 0..3), term(cut, 0..3)], [3, 4, 4]);
    program.integers()
}

/// A pointwise convolution of many channels, each a sum of two: its gradients are computed a set of
/// channels at a time.
fn wide() -> Vec<i64> {
    let mut program = Builder::new([140, 2, 3]);
    let norm = program.norm(140, true);
    let copy = program.copy(&[term(0, 0..140)], [140, 2, 3]);
    let swish = term(0, 0..140).norm(norm).activation(SWISH, &[]);
    program.conv(Window::square(1, 1, 0), 1, true, &[swish, term(copy, 0..140)], [2, 2, 3]);
    program.integers()
}

/// A channel for each activation that has parameters or an exponential of its own.
fn activations() -> Vec<i64> {
    let mut program = Builder::new([6, 2, 3]);
    let norm = program.norm(6, true);
    let conv = program.conv(Window::square(1, 1, 0), 1, false, &[term(0, 0..6)], [6, 2, 3]);
    let functions: [(i64, &[f64]); 6] =
        [(CLIP, &[-0.3, 0.8]), (LEAKY_RELU, &[0.2]), (ELU, &[0.7]), (GELU, &[]), (GELU_TANH, &[]), (MISH, &[])];
    let activated = |(channel, (code, parameters)): (usize, (i64, &[f64]))| {
        term(conv, [channel]).norm(norm).activation(code, parameters).start(channel)
    };
    let terms: Vec<_> = functions.into_iter().enumerate().map(activated).collect();
    let copy = program.copy(&terms, [6, 2, 3]);
    program.conv(Window::square(1, 1, 0), 6, false, &[term(copy, 0..6)], [6, 2, 3]);
    program.integers()
}

/// Twelve convolutions of what norms and swish make of the one before, each third with a gate and
/// the sum with the one three before it.
fn chain() -> Vec<i64> {
    let mut program = Builder::new([4, 3, 5]);
    let mut last = program.conv(Window::square(3, 1, 1), 1, true, &[term(0, 0..4)], [4, 3, 5]);
    let mut before = last;
    for i in 0..12 {
        let norm = program.norm(4, true);
        let swish = term(last, 0..4).norm(norm).activation(SWISH, &[]);
        let mut terms = vec![swish.clone()];
        if i % 3 == 2 {
            let mean = program.mean(std::slice::from_ref(&swish), 4);
            let gate = program.copy(&[term(mean, 0..4).activation(SIGMOID, &[])], [4, 1, 1]);
            terms = vec![swish.gate(gate), term(before, 0..4)];
        }
        let window = [Window::square(1, 1, 0), Window::square(3, 1, 1)][i % 2];
        let groups = [2, 4][i % 2];
        last = program.conv(window, groups, false, &terms, [4, 3, 5]);
        if i % 3 == 2 {
            before = last;
        }
    }
    program.integers()
}

/// The program whose backward pass computes values anew.
fn recomputing(mut program: Vec<i64>) -> Vec<i64> {
    program[2] |= 2;
    program
}

/// Every program that is tested.
fn programs() -> [Vec<i64>; 6] {
    [gated(), pooling(), windows(), dense(), wide(), activations()]
}

/// Squeeze and excite on 3 x 3 pixels, whose convolutions are computed by channels in inference:
/// 40 to 72 of gated and permuted ones, 72 to 70 in two groups, both with a sum.
fn few_pixels() -> Vec<i64> {
    let mut program = Builder::new([40, 3, 3]);
    let norms = [program.norm(72, true), program.norm(70, true)];
    let mean = program.mean(&[term(0, 0..40)], 40);
    let squeezed = program.conv(Window::square(1, 1, 0), 1, true, &[term(mean, 0..40)], [5, 1, 1]);
    let expanded = term(squeezed, 0..5).activation(SWISH, &[]);
    let expanded = program.conv(Window::square(1, 1, 0), 1, true, &[expanded], [40, 1, 1]);
    let gate = program.copy(&[term(expanded, 0..40).activation(SIGMOID, &[])], [40, 1, 1]);
    let gated = term(0, (0..40).map(|c| c * 7 % 40)).gate(gate);
    let wide = program.conv(Window::square(1, 1, 0), 1, false, &[gated], [72, 3, 3]);
    let swish = term(wide, 0..72).norm(norms[0]).activation(SWISH, &[]);
    let groups = program.conv(Window::square(1, 1, 0), 2, true, std::slice::from_ref(&swish), [70, 3, 3]);
    let sum = [term(groups, 0..70).norm(norms[1]), swish];
    program.conv(Window::square(1, 1, 0), 1, true, &sum, [33, 3, 3]);
    program.integers()
}

fn values<T: Element>(len: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        T::from_f64((state >> 40) as f64 / f64::from(1 << 23) - 1.0)
    };
    (0..len).map(|_| next()).collect()
}

/// Calls `write` with memory that is full of NaN.
fn filled<T: Element>(len: usize, write: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut memory = vec![MaybeUninit::new(T::from_f64(f64::NAN)); len];
    write(&mut memory);
    // SAFETY: initialised above.
    memory.into_iter().map(|value| unsafe { value.assume_init() }).collect()
}

/// A call of a program whose values are stored as `S`.
struct Case<S: Element> {
    program: Program,
    count: usize,
    order: Order,
    x: Vec<S>,
    parameters: Vec<S::Wide>,
    masks: Vec<S::Wide>,
    weights: Vec<S>,
}

/// Images; few under Miri, which needs a minute for each.
const COUNT: usize = if cfg!(miri) { 1 } else { 3 };

impl<S: Element> Case<S> {
    fn new(program: Program, count: usize) -> Self {
        let parameters = values(program.parameters(), 2);
        let masks = (0..count * program.masks()).map(|i| S::Wide::from_f64([2.0, 0.0][i % 2])).collect();
        let [x, weights] = program.sizes().map(|size| count * size.iter().product::<usize>());
        Self { program, count, order: Order::Nchw, x: values(x, 1), parameters, masks, weights: values(weights, 3) }
    }

    /// Of each program.
    fn all() -> [Self; 6] {
        programs().map(|program| Self::new(Program::parse(&program).unwrap(), COUNT))
    }

    /// The same call of another type, but the program.
    fn to<R: Element>(&self, program: Program) -> Case<R> {
        let stored = |values: &[S]| values.iter().map(|value| R::from_f64(value.to_f64())).collect();
        let wide = |values: &[S::Wide]| values.iter().map(|value| R::Wide::from_f64(value.to_f64())).collect();
        Case {
            program,
            count: self.count,
            order: self.order,
            x: stored(&self.x),
            parameters: wide(&self.parameters),
            masks: wide(&self.masks),
            weights: stored(&self.weights),
        }
    }

    fn arguments(&self, isa: IsaKind) -> Arguments<'_, S::Wide> {
        Arguments {
            isa,
            program: &self.program,
            count: self.count,
            order: self.order,
            parameters: &self.parameters,
            masks: &self.masks,
        }
    }

    /// Output, statistics and workspace.
    fn forward(&self, isa: IsaKind) -> (Vec<S>, Vec<S::Wide>, Vec<S>) {
        let arguments = self.arguments(isa);
        let (mut statistics, mut workspace) = (Vec::new(), Vec::new());
        let y = filled(self.weights.len(), |y| {
            statistics = filled(2 * self.program.norm_channels(), |statistics| {
                workspace = filled(self.program.workspace_len(self.count).unwrap(), |workspace| {
                    forward(&arguments, &self.x, None, y, statistics, workspace);
                });
            });
        });
        (y, statistics, workspace)
    }

    /// The weighted sum of the output.
    fn loss(&self, isa: IsaKind) -> f64 {
        self.forward(isa).0.iter().zip(&self.weights).map(|(&y, &w)| y.to_f64() * w.to_f64()).sum()
    }

    /// Gradients by input and parameters.
    fn gradients(&self, isa: IsaKind) -> (Vec<S>, Vec<S::Wide>) {
        let (_, statistics, workspace) = self.forward(isa);
        let mut grad_parameters = Vec::new();
        let grad_x = filled(self.x.len(), |grad_x| {
            grad_parameters = filled(self.parameters.len(), |grad| {
                backward(&self.arguments(isa), false, &statistics, &workspace, &self.weights, grad_x, grad);
            });
        });
        (grad_x, grad_parameters)
    }

    /// Output and gradients by input and parameters.
    fn results(&self, isa: IsaKind) -> [Vec<f64>; 3] {
        let (grad_x, grad_parameters) = self.gradients(isa);
        let stored = |values: &[S]| values.iter().map(|value| value.to_f64()).collect();
        let grad_parameters = grad_parameters.iter().map(|value| value.to_f64()).collect();
        [stored(&self.forward(isa).0), stored(&grad_x), grad_parameters]
    }
}

#[test]
#[cfg_attr(miri, ignore = "hours; `every_instruction_set_agrees` runs the same code")]
fn gradients_are_finite_differences() {
    for case in Case::all() {
        finite_differences(case);
    }
}

fn finite_differences(mut case: Case<f64>) {
    let isa = IsaKind::available()[0];
    let (grad_x, grad_parameters) = case.gradients(isa);
    let h = 1e-6;
    for (i, grad) in grad_parameters.iter().enumerate() {
        let value = case.parameters[i];
        let [high, low] = [h, -h].map(|h| {
            case.parameters[i] = value + h;
            case.loss(isa)
        });
        case.parameters[i] = value;
        assert!((grad - (high - low) / (2.0 * h)).abs() < 1e-5, "parameter {i}");
    }
    for i in (0..case.x.len()).step_by(7) {
        let value = case.x[i];
        let [high, low] = [h, -h].map(|h| {
            case.x[i] = value + h;
            case.loss(isa)
        });
        case.x[i] = value;
        assert!((grad_x[i] - (high - low) / (2.0 * h)).abs() < 1e-5, "input {i}");
    }
}

#[test]
fn every_instruction_set_agrees() {
    let portable = IsaKind::by_name("portable").unwrap();
    let cases = || Case::<f64>::all().into_iter().zip(Case::<f32>::all());
    for (isa, (exact, case)) in IsaKind::available().into_iter().flat_map(|isa| cases().map(move |case| (isa, case))) {
        for (found, expected) in case.results(isa).into_iter().zip(exact.results(portable)) {
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-4 * expected.abs().max(1.0), "{}", isa.name());
            }
        }
    }
}

/// What is stored is rounded by up to 2^-9, the output, each value on the way there and each
/// gradient on the way back: of the largest number, up to 4 %.
#[test]
fn stored_as_bfloat16_it_is_nearly_the_same() {
    let first = IsaKind::available()[0];
    for (index, mut case) in Case::<bf16>::all().into_iter().enumerate() {
        for order in [Order::Nchw, Order::Nhwc] {
            case.order = order;
            let exact = case.to::<f64>(Program::parse(&programs()[index]).unwrap());
            let expected = exact.results(first);
            for isa in IsaKind::available() {
                for (found, expected) in case.results(isa).iter().zip(&expected) {
                    let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
                    for (found, expected) in found.iter().zip(expected) {
                        let error = (found - expected).abs() / largest;
                        assert!(error < 0.04, "program {index}, {}, {order:?}: {error}", isa.name());
                    }
                }
            }
        }
    }
}

/// Pointwise convolutions whose groups have odd numbers of channels and several blocks: of values
/// as they are stored, of gated ones and of sums, with and without a bias.
fn pointwise() -> Vec<i64> {
    let mut program = Builder::new([10, 5, 13]);
    let norms = [program.norm(22, true), program.norm(9, true)];
    let conv = program.conv(Window::square(1, 1, 0), 2, true, &[term(0, 0..10)], [22, 5, 13]);
    let swish = term(conv, 0..22).norm(norms[0]).activation(SWISH, &[]);
    let mean = program.mean(std::slice::from_ref(&swish), 22);
    let squeezed = program.conv(Window::square(1, 1, 0), 1, true, &[term(mean, 0..22)], [3, 1, 1]);
    let squeezed = term(squeezed, 0..3).activation(SWISH, &[]);
    let gate = program.conv(Window::square(1, 1, 0), 1, true, &[squeezed], [22, 1, 1]);
    let gate = program.copy(&[term(gate, 0..22).activation(SIGMOID, &[])], [22, 1, 1]);
    let gated = program.conv(Window::square(1, 1, 0), 1, false, &[swish.gate(gate)], [9, 5, 13]);
    let normed = term(gated, 0..9).norm(norms[1]);
    program.conv(Window::square(1, 1, 0), 1, true, &[normed, term(conv, 2..11)], [2, 5, 13]);
    program.integers()
}

/// Pairs of products of rounded values and weights: of a tensor's largest number, up to 3 % from
/// the same in doubles, as products of widened values are; and not the same as these.
#[test]
fn products_of_pairs_are_as_near_as_those_of_wide_values() {
    for count in [1, 9] {
        let case = Case::<bf16>::new(Program::parse(&pointwise()).unwrap(), count);
        let exact = case.to::<f64>(Program::parse(&pointwise()).unwrap()).results(IsaKind::available()[0]);
        let mut found = Vec::new();
        for isa in IsaKind::available() {
            let results = case.results(isa);
            for (results, exact) in results.iter().zip(&exact) {
                let largest = exact.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
                for (result, exact) in results.iter().zip(exact) {
                    let error = (result - exact).abs() / largest;
                    assert!(error < 0.03, "{} {count}: {error}", isa.name());
                }
            }
            found.push((isa.bf16(), results));
        }
        let of = |pairs: bool| found.iter().find(|(bf16, _)| *bf16 == pairs).map(|(_, results)| results);
        assert!(of(true).is_none() || of(false).is_none() || of(true) != of(false), "no pairs");
    }
}

/// Inference of bfloat16 has the sums of float32, whatever the number of images.
#[test]
fn inference_in_bfloat16_is_nearly_that_of_floats() {
    for (index, mut case) in Case::<bf16>::all().into_iter().enumerate() {
        case.masks.clear();
        let exact = case.to::<f32>(Program::parse(&programs()[index]).unwrap());
        for isa in IsaKind::available() {
            let (_, statistics, _) = exact.forward(isa);
            for count in [1, COUNT] {
                let [x, y] = [&case.x, &case.weights].map(|images| images.len() / COUNT * count);
                let (program, order) = (&exact.program, exact.order);
                let (parameters, statistics) = (&[&exact.parameters[..]], &[&statistics[..]]);
                let inference = Inference { isa, program, count, order, parameters, statistics };
                let found = filled(y, |y| infer(&inference, &case.x[..x], y));
                let expected = filled(y, |y| infer(&inference, &exact.x[..x], y));
                let largest = expected.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
                for (found, expected) in found.iter().zip(&expected) {
                    assert!((found.to_f32() - expected).abs() < 0.02 * largest, "program {index}, {}", isa.name());
                }
            }
        }
    }
}

/// The forward pass has vectors of pixels, for whose sums those of channels are exchanged here.
#[test]
fn inference_by_channels_is_the_forward_pass() {
    for isa in IsaKind::available() {
        for count in [1, COUNT] {
            let mut case = Case::<f64>::new(Program::parse(&few_pixels()).unwrap(), count);
            // As parts of sums that neither grow nor vanish.
            case.parameters.iter_mut().for_each(|value| *value *= 0.2);
            let (y, statistics, _) = case.forward(isa);
            let Arguments { program, order, parameters, .. } = case.arguments(isa);
            let prepared = Prepared::new(isa, program, parameters, &statistics);
            assert_eq!(prepared.by_channels(), 5, "convolutions");
            let found = filled(y.len(), |y| infer_prepared(program, &prepared, (count, order), &case.x, y));
            for (found, expected) in found.iter().zip(&y) {
                assert!((found - expected).abs() < 1e-12, "{} {count}: {found} {expected}", isa.name());
            }
        }
    }
}

#[test]
fn inference_is_the_forward_pass_with_given_statistics() {
    let cases = |isa| Case::<f64>::all().map(|case| (isa, case));
    for (isa, mut case) in IsaKind::available().into_iter().flat_map(cases) {
        case.masks.clear();
        let (y, statistics, _) = case.forward(isa);
        let Arguments { program, count, order, parameters, .. } = case.arguments(isa);
        let [parameters, statistics] = [parameters, &statistics].map(|values| values.chunks(7).collect::<Vec<_>>());
        // The second time with what is left of the first.
        for _ in 0..2 {
            let inference = Inference { isa, program, count, order, parameters: &parameters, statistics: &statistics };
            let found = filled(y.len(), |y| infer(&inference, &case.x, y));
            for (found, expected) in found.iter().zip(&y) {
                assert!((found - expected).abs() < 1e-12, "{}", isa.name());
            }
        }
    }
}

#[test]
fn what_is_computed_anew_is_the_same() {
    let isa = IsaKind::available()[0];
    for program in programs().into_iter().chain([chain()]) {
        let case = Case::<f64>::new(Program::parse(&program).unwrap(), COUNT);
        let anew = case.to::<f64>(Program::parse(&recomputing(program.clone())).unwrap());
        let expected = case.results(isa);
        // Twice: what is kept is not changed.
        let (_, statistics, workspace) = anew.forward(isa);
        for _ in 0..2 {
            let mut grad_parameters = Vec::new();
            let grad_x = filled(anew.x.len(), |grad_x| {
                grad_parameters = filled(anew.parameters.len(), |grad| {
                    let arguments = anew.arguments(isa);
                    backward::<f64>(&arguments, false, &statistics, &workspace, &anew.weights, grad_x, grad);
                });
            });
            let found = [anew.forward(isa).0, grad_x, grad_parameters];
            for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
                assert!((found - expected).abs() < 1e-12 * expected.abs().max(1.0), "{found} {expected}");
            }
        }
    }
    let kept = |program: &[i64]| Program::parse(program).unwrap().workspace_len(1).unwrap();
    assert!(10 * kept(&recomputing(chain())) < 6 * kept(&chain()));
}

#[test]
#[cfg_attr(miri, ignore = "safe code, more than a thousand parses")]
fn what_is_no_program_is_refused() {
    programs().into_iter().for_each(refuses_changes);
}

fn refuses_changes(program: Vec<i64>) {
    assert!(Program::parse(&program[..program.len() - 1]).unwrap_err().to_string().contains("ends early"));
    assert!(Program::parse(&[program.clone(), vec![0]].concat()).unwrap_err().to_string().contains("followed by 1"));
    // Each integer in turn replaced: an error or another program, never a panic.
    for i in 0..program.len() {
        for value in [-2, -1, 0, 1, 3, 1 << 20, i64::MAX, i64::MIN] {
            let mut changed = program.clone();
            changed[i] = value;
            let _ = Program::parse(&changed);
        }
    }
}

/// The error of what is no program.
fn error(integers: &[i64]) -> String {
    Program::parse(integers).unwrap_err().to_string()
}

#[test]
fn another_format_is_refused() {
    for format in [0, 1, 3, -1] {
        let mut program = pooling();
        program[0] = format;
        let error = error(&program);
        assert!(error.contains(&format!("has format {format}, expected 2: ")), "{error}");
    }
}

#[test]
fn sizes_are_checked() {
    let refused = |changes: &[(usize, i64)], words: &str| {
        let mut program = pooling();
        changes.iter().for_each(|&(index, value)| program[index] = value);
        let error = error(&program);
        assert!(error.contains(words), "{changes:?}: {error}");
    };
    refused(&[(1, 2)], "flag of 2");
    refused(&[(2, 4)], "flags of 4, expected 0 to 3");
    refused(&[(4, 1)], "has 1 values");
    refused(&[(4, 1 << 20)], "expected the input and one for each of 1 to");
    refused(&[(6, 0)], "4 channels, 0x7");
    refused(&[(5, 1 << 20), (6, 1 << 20), (7, 1 << 20)], "1048576x1048576");
    refused(&[(5, 1 << 20), (8, 1 << 20), (11, 1)], "channels, expected at most");
    refused(&[(18, 0)], "norm of 0 channels");
    refused(&[(19, (-1f64).to_bits() as i64)], "epsilon -1");
    refused(&[(19, f64::NAN.to_bits() as i64)], "epsilon NaN");
}

#[test]
fn steps_and_terms_are_checked() {
    let of = |terms: &[Term]| {
        let mut program = Builder::new([2, 1, 1]);
        program.copy(&[term(0, 0..2)], [2, 1, 1]);
        program.copy(terms, [2, 1, 1]);
        error(&program.integers())
    };
    // The same gate of two channels; a value that is multiplied by itself.
    let second = term(0, [1]).gate(1).gate_offset(-1).start(1);
    let error = of(&[term(0, [0]).gate(1), second]);
    assert!(error.contains("channels 0 and 1 of a step both read channel 0 of value 1"), "{error}");
    let error = of(&[term(1, 0..2).gate(1)]);
    assert!(error.contains("multiplies channel 0 of value 1 by itself"), "{error}");
    let error = of(&[term(0, 0..2).activation(99, &[])]);
    assert!(error.contains("names activation 99"), "{error}");
    let error = of(&[term(0, 0..2).activation(RELU6, &[1.5])]);
    assert!(error.contains("gives activation 2 the parameters [1.5]"), "{error}");
    let conv = |window: Window| {
        let mut program = Builder::new([1, 9, 9]);
        program.conv(window, 1, false, &[term(0, 0..1)], [1, 9, 9]);
        super::tests::error(&program.integers())
    };
    for window in [Window::square(0, 1, 0), Window::square(3, 0, 0), Window::square(3, 1, 3), Window::square(65, 1, 0)]
    {
        let error = conv(window);
        assert!(error.contains("window of stride"), "{error}");
    }
}

#[test]
fn more_images_than_memory_are_an_error() {
    let program = Program::parse(&gated()).unwrap();
    assert_eq!(program.workspace_len(2).unwrap(), 2 * program.workspace_len(1).unwrap());
    assert!(program.workspace_len(usize::MAX / 4).unwrap_err().to_string().contains("more memory"));
}

#[test]
fn without_images_there_are_zeros() {
    let isa = IsaKind::available()[0];
    for case in programs().map(|program| Case::<f32>::new(Program::parse(&program).unwrap(), 0)) {
        let (y, statistics, _) = case.forward(isa);
        assert!(y.is_empty() && statistics.iter().all(|&value| value == 0.0));
        let (grad_x, grad_parameters) = case.gradients(isa);
        assert!(grad_x.is_empty() && grad_parameters.iter().all(|&value| value == 0.0));
    }
}

#[test]
#[cfg_attr(miri, ignore = "hours")]
fn changed_programs_run_or_are_refused() {
    let isas = IsaKind::available();
    let mut state = 1u64;
    let mut random = |end: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % end
    };
    let (mut runs, programs) = (0, programs());
    for round in 0..6000 {
        let mut integers = programs[round % programs.len()].clone();
        integers[2] |= [0, 2][round / programs.len() % 2];
        for _ in 0..1 + random(4) {
            let (place, other) = (random(integers.len()), integers[random(integers.len())]);
            let old = integers[place];
            integers[place] = [
                old.wrapping_add(1),
                old.wrapping_sub(1),
                -1,
                0,
                1,
                2,
                3,
                5,
                7,
                64,
                1 << 20,
                i64::MAX,
                other,
                other,
                other,
            ][random(15)];
        }
        let Ok(program) = Program::parse(&integers) else { continue };
        let small = |len: usize| len < 1 << 14;
        if !small(program.parameters()) || !program.workspace_len(2).is_ok_and(small) {
            continue;
        }
        let isa = isas[runs % isas.len()];
        runs += 1;
        let mut case = Case::<f32>::new(program, random(3));
        case.gradients(isa);
        let Arguments { program, count, order, parameters, .. } = case.arguments(isa);
        let (parameters, statistics) = (&[parameters], vec![1.0; 2 * program.norm_channels()]);
        let inference = Inference { isa, program, count, order, parameters, statistics: &[&statistics] };
        filled(case.weights.len(), |y| infer(&inference, &case.x, y));
        case.masks.clear();
        case.gradients(isa);
    }
    assert!(runs > 500, "{runs}");
}

/// NaN at a pixel makes NaN of the weights' gradients that the pixel has a part in, and of no
/// others.
#[test]
fn what_is_no_number_reaches_no_other_weight() {
    let isa = IsaKind::available()[0];
    for (stride, groups) in [(1, 2), (2, 2), (1, 1), (2, 1)] {
        // A 3 x 3 convolution of 2 channels of 5 x 6 to 2, with zeros above and at the left.
        let size = |pixels: usize| (pixels - 1) / stride + 1;
        let mut program = Builder::new([2, 5, 6]);
        let value = [2, size(5), size(6)];
        program.conv(Window::square(3, stride, 1), groups, false, &[term(0, 0..2)], value);
        let program = program.integers();
        let mut case = Case::<f32>::new(Program::parse(&program).unwrap(), 2);
        for place in 0..case.x.len() {
            let gradient = |case: &Case<f32>| case.gradients(isa).1;
            let (x, weights) = (case.x.clone(), case.weights.clone());
            // Where a pixel that is 1 among zeros makes a gradient, NaN makes NaN.
            case.x.fill(0.0);
            case.weights.fill(1.0);
            case.x[place] = 1.0;
            let seen: Vec<_> = gradient(&case).iter().map(|&sum| sum != 0.0).collect();
            (case.x, case.weights) = (x.clone(), weights.clone());
            case.x[place] = f32::NAN;
            let found: Vec<_> = gradient(&case).iter().map(|sum| sum.is_nan()).collect();
            assert_eq!(found, seen, "stride {stride}, {groups} groups, {place}");
            case.x = x;
        }
    }
}
