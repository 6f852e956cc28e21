//! Every operation, element type, order of memory and instruction set against plain float64 loops.

use std::mem::MaybeUninit;

use half::bf16;

use crate::shape::{Images, Order, Pointwise, WeightLayout, WeightStrides, interleave_dst_index, interleave_src_index};
use crate::simd::IsaKind;
use crate::simd::element::Element;
use crate::{conv1x1, interleave};

/// Uniform values in -1..1 (xorshift).
pub(crate) fn random<T: Element>(len: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            T::from_f64((state >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
        })
        .collect()
}

/// Runs an operation on an output full of NaN, so that a value it leaves out shows.
pub(crate) fn run<T: Element>(len: usize, operation: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut out = vec![MaybeUninit::new(T::from_f64(f64::NAN)); len];
    operation(&mut out);
    // SAFETY: initialised above.
    out.into_iter().map(|value| unsafe { value.assume_init() }).collect()
}

/// That values are those expected, up to the rounding of their type.
pub(crate) fn check<T: Element>(actual: &[T], expected: &[f64], what: &dyn Fn() -> String) {
    // Of the largest value, for sums in another order; and of each value, where it is rounded to 8 bits at the end.
    let (tolerance, rounding) = match size_of::<T>() {
        2 => (2e-5, 1.0 / 256.0),
        4 => (2e-5, 0.0),
        _ => (1e-13, 0.0),
    };
    let scale = expected.iter().fold(1f64, |max, value| max.max(value.abs()));
    assert_eq!(actual.len(), expected.len());
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let error = (actual.to_f64() - expected).abs();
        assert!(
            error <= tolerance * scale + rounding * expected.abs(),
            "{}: value {i} is {actual:?}, expected {expected}",
            what()
        );
    }
}

/// Where channel `c` of pixel `p` of image `n` stands.
pub(crate) fn place(images: Images, n: usize, p: usize, c: usize) -> usize {
    match images.order {
        Order::Nchw => (n * images.channels + c) * images.pixels + p,
        Order::Nhwc => (n * images.pixels + p) * images.channels + c,
    }
}

fn pointwise_case<T: Element>(isa: IsaKind, shape: &Pointwise, images: Images) {
    let out = images.with_channels(shape.out_channels);
    let x = random::<T>(images.len(), 1);
    let weight = random::<T>(shape.weights(), 2);
    let bias = random::<T>(shape.out_channels, 3);
    let grad = random::<T>(out.len(), 4);
    let places = interleave_dst_index(shape.out_channels, shape.interleave);
    let mut y = vec![0.0; out.len()];
    let (mut grad_x, mut grad_w) = (vec![0.0; images.len()], vec![0.0; shape.weights()]);
    let mut grad_b = vec![0.0; shape.out_channels];
    let WeightStrides { group, output: out_step, input: in_step } = shape.weight_strides();
    for (n, p) in (0..images.count).flat_map(|n| (0..images.pixels).map(move |p| (n, p))) {
        for (g, o) in (0..shape.groups).flat_map(|g| (0..shape.group_out()).map(move |o| (g, o))) {
            let c_out = g * shape.group_out() + o;
            let to = place(out, n, p, places[c_out]);
            y[to] += bias[c_out].to_f64();
            grad_b[c_out] += grad[to].to_f64();
            for i in 0..shape.group_in() {
                let from = place(images, n, p, g * shape.group_in() + i);
                let w = g * group + o * out_step + i * in_step;
                y[to] += weight[w].to_f64() * x[from].to_f64();
                grad_x[from] += weight[w].to_f64() * grad[to].to_f64();
                grad_w[w] += x[from].to_f64() * grad[to].to_f64();
            }
        }
    }
    let what = || format!("{} {shape:?} {images:?}", isa.name());
    let actual = run(out.len(), |out| conv1x1::forward(isa, shape, images, &x, &weight, Some(&bias), out));
    check(&actual, &y, &what);
    let actual = run(images.len(), |out_x| conv1x1::grad_input(isa, shape, out, &grad, &weight, out_x));
    check(&actual, &grad_x, &what);
    let actual = run(shape.weights(), |out| conv1x1::grad_weight(isa, shape, images, &x, &grad, out));
    check(&actual, &grad_w, &what);
    let actual = run(shape.out_channels, |b| conv1x1::grad_bias(isa, shape.interleave, out, &grad, b));
    check(&actual, &grad_b, &what);
}

#[test]
fn pointwise_matches_the_reference() {
    // (images, pixels, in_channels, out_channels, groups, interleave)
    let shapes = [
        (0, 5, 4, 4, 2, 2),
        (2, 0, 4, 4, 2, 2),
        (1, 1, 1, 1, 1, 1),
        (3, 1, 10, 15, 5, 3),
        (2, 9, 6, 6, 3, 2),
        (2, 49, 18, 27, 3, 9),
        (1, 47, 9, 8, 1, 1),
        (1, 97, 16, 17, 1, 5),
        (3, 20, 30, 14, 2, 7),
        (1, 12, 72, 70, 1, 1),
        (1, 70, 12, 72, 4, 1),
        (2, 35, 40, 106, 2, 1),
        (2, 35, 80, 20, 4, 5),
        (11, 49, 32, 32, 2, 16),
        (2, 523, 72, 12, 1, 1),
        (1, 523, 34, 102, 2, 3),
        // Rows of four vectors.
        (3, 64, 20, 46, 2, 23),
        // Groups side by side in vectors: all that fit one, or pieces of each.
        (1, 133, 24, 24, 8, 1),
        (1, 130, 35, 35, 7, 1),
        (1, 129, 108, 18, 6, 1),
        (1, 129, 108, 18, 6, 3),
        (1, 131, 63, 18, 3, 1),
        (2, 70, 48, 16, 2, 8),
        (1, 128, 96, 28, 4, 1),
        (1, 135, 10, 90, 5, 1),
        // Groups of one output channel, whose products are folded: 2 to 8 of them.
        (2, 9, 10, 5, 5, 1),
        (1, 21, 9, 3, 3, 1),
        (1, 35, 96, 24, 24, 1),
        (3, 7, 35, 7, 7, 1),
        (2, 33, 60, 10, 10, 1),
        (1, 33, 21, 3, 3, 1),
        (1, 19, 40, 5, 5, 1),
        // The same, interleaved: permuted in a cache, and the gradient's input before it is unfolded; several tiles of pixels.
        (1, 35, 96, 24, 24, 6),
        (2, 43, 50, 10, 10, 4),
        (1, 700, 36, 12, 12, 3),
        // Groups of one input channel.
        (1, 37, 5, 15, 5, 1),
        (2, 9, 3, 24, 3, 1),
        // Interleaved by the channels of a group: permuted in a cache, or by chunks of transposed rows.
        (1, 130, 24, 24, 6, 4),
        (1, 133, 28, 168, 7, 24),
        (2, 50, 48, 288, 3, 96),
        (1, 101, 112, 336, 7, 48),
        // Interleaved vectors across groups, which fill one or more, or not.
        (1, 70, 64, 256, 16, 16),
        (2, 37, 40, 240, 2, 120),
        (1, 65, 20, 80, 5, 16),
        (1, 39, 16, 96, 4, 24),
        (1, 67, 32, 16, 8, 2),
        (2, 35, 80, 80, 8, 10),
        (1, 43, 56, 336, 28, 12),
        (1, 41, 96, 192, 48, 4),
        (1, 70, 6, 12, 3, 4),
        // Many pixels of them: input gradients in vectors of whole rows, or permuted before they are side by side.
        (1, 1030, 24, 144, 6, 24),
        (1, 1027, 20, 60, 5, 12),
        (1, 1029, 144, 24, 8, 3),
        (1, 1025, 22, 44, 22, 2),
        (1, 1024, 80, 160, 20, 8),
        // Weight gradients whose channels are put back to their groups all at once, by two threads.
        (1, 400, 96, 576, 24, 24),
    ];
    for isa in IsaKind::available() {
        for (count, pixels, c_in, c_out, groups, step) in shapes {
            // Miri has no time for the larger ones.
            if cfg!(miri) && count * pixels * c_in * c_out > 1000 {
                continue;
            }
            for order in [Order::Nchw, Order::Nhwc] {
                for layout in [WeightLayout::Oi, WeightLayout::Io] {
                    let shape = Pointwise::new(c_in, c_out, groups, step, layout).unwrap();
                    let images = Images { count, pixels, channels: c_in, order };
                    pointwise_case::<bf16>(isa, &shape, images);
                    pointwise_case::<f32>(isa, &shape, images);
                    pointwise_case::<f64>(isa, &shape, images);
                }
            }
        }
    }
}

/// Those whose weight gradients are left to GEMM, and those whose long rows are gone through in passes, or several at a time.
#[test]
#[cfg_attr(miri, ignore = "too large")]
fn the_largest_groups_match_the_reference() {
    for (pixels, c_in, c_out, step) in [(2, 1024, 1024, 1), (4100, 33, 36, 5), (1100, 42, 16, 1)] {
        let shape = Pointwise::new(c_in, c_out, 1, step, WeightLayout::Oi).unwrap();
        let images = Images { count: 1, pixels, channels: c_in, order: Order::Nchw };
        for isa in IsaKind::available() {
            pointwise_case::<bf16>(isa, &shape, images);
            pointwise_case::<f32>(isa, &shape, images);
            pointwise_case::<f64>(isa, &shape, images);
        }
    }
}

#[test]
fn permuting_back_gives_the_input() {
    fn check<T: Element>(isa: IsaKind, order: Order, pixels: usize, channels: usize, step: usize) {
        let images = Images { count: 2, pixels, channels, order };
        let x = random::<T>(images.len(), 1);
        let sources = interleave_src_index(channels, step);
        let y = run(x.len(), |out| interleave::permute(isa, &sources, images, &x, out));
        for (n, p, c) in (0..2).flat_map(|n| (0..pixels).flat_map(move |p| (0..channels).map(move |c| (n, p, c)))) {
            assert_eq!(y[place(images, n, p, c)], x[place(images, n, p, sources[c])], "{} {images:?}", isa.name());
        }
        let places = interleave_dst_index(channels, step);
        assert_eq!(run(x.len(), |out| interleave::permute(isa, &places, images, &y, out)), x);
    }
    for isa in IsaKind::available() {
        for (pixels, channels, step) in [
            (5, 7, 3),
            (5, 24, 4),
            (12, 7, 3),
            (13, 80, 4),
            (9, 90, 18),
            (8, 33, 2),
            (9, 84, 7),
            (8, 160, 20),
            (8, 60, 12),
        ] {
            for order in [Order::Nchw, Order::Nhwc] {
                check::<bf16>(isa, order, pixels, channels, step);
                check::<f32>(isa, order, pixels, channels, step);
                check::<f64>(isa, order, pixels, channels, step);
            }
        }
    }
}
