//! Maxima and means over windows of planes, and their gradients.
//!
//! Both are taken along columns first, a whole row at a time, and then along rows: loops that the
//! compiler makes vectors of.

use std::mem::MaybeUninit;

use crate::simd::element::WideElement;
use crate::simd::{Isa, Kernel};

/// What one pixel of a result sees along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first pixel.
    pub first: usize,
    /// How many pixels.
    pub taps: usize,
}

/// The windows of all pixels of a result along an axis.
#[derive(Clone, Debug)]
pub struct Spans<T> {
    /// What each sees.
    pub spans: Vec<Span>,
    /// Pixels from one tap to the next.
    pub dilation: usize,
    /// What a mean multiplies sums by, for each.
    pub factors: Vec<T>,
}

/// The maxima or means over windows of a plane.
pub struct PoolWindows<'a, T> {
    /// The plane.
    pub x: &'a [T],
    /// Its width.
    pub width: usize,
    /// The windows along columns and along rows.
    pub spans: [&'a Spans<T>; 2],
    /// Whether maxima are wanted.
    pub max: bool,
    /// As many values as the plane is wide.
    pub buffer: &'a mut [T],
    /// The result.
    pub y: &'a mut [MaybeUninit<T>],
}

/// The larger one, as PyTorch has it: NaN, once there is one.
#[inline(always)]
fn larger<T: PartialOrd + Copy>(a: T, b: T) -> T {
    #[expect(clippy::eq_op, reason = "NaN")]
    if b > a || b != b { b } else { a }
}

impl<T: WideElement> Kernel for PoolWindows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let Self { x, width, spans: [rows, columns], max, buffer, y } = self;
        let buffer = &mut buffer[..width];
        let start = if max { T::from_f64(f64::NEG_INFINITY) } else { T::default() };
        for (i, y) in y.chunks_exact_mut(columns.spans.len()).enumerate() {
            buffer.fill(start);
            let Span { first, taps } = rows.spans[i];
            for row in (0..taps).map(|tap| first + tap * rows.dilation) {
                let row = buffer.iter_mut().zip(&x[row * width..][..width]);
                if max {
                    row.for_each(|(y, &x)| *y = larger(*y, x));
                } else {
                    row.for_each(|(y, &x)| *y += x);
                }
            }
            for ((y, span), &factor) in y.iter_mut().zip(&columns.spans).zip(&columns.factors) {
                let pixels = (0..span.taps).map(|tap| buffer[span.first + tap * columns.dilation]);
                y.write(if max {
                    pixels.fold(start, larger)
                } else {
                    pixels.fold(start, |sum, x| sum + x) * factor * rows.factors[i]
                });
            }
        }
    }
}

/// The gradient of the means of [`PoolWindows`] by their plane.
pub struct MeanWindowsGrad<'a, T> {
    /// The gradient by the means.
    pub grad: &'a [T],
    /// The width of the plane.
    pub width: usize,
    /// As in [`PoolWindows`].
    pub spans: [&'a Spans<T>; 2],
    /// As many values as the plane is wide.
    pub buffer: &'a mut [T],
    /// The plane of the gradient.
    pub grad_x: &'a mut [T],
}

impl<T: WideElement> Kernel for MeanWindowsGrad<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let Self { grad, width, spans: [rows, columns], buffer, grad_x } = self;
        let buffer = &mut buffer[..width];
        grad_x.fill(T::default());
        for (i, grad) in grad.chunks_exact(columns.spans.len()).enumerate() {
            buffer.fill(T::default());
            for ((&grad, span), &factor) in grad.iter().zip(&columns.spans).zip(&columns.factors) {
                let share = grad * factor * rows.factors[i];
                for tap in 0..span.taps {
                    buffer[span.first + tap * columns.dilation] += share;
                }
            }
            let Span { first, taps } = rows.spans[i];
            for row in (0..taps).map(|tap| first + tap * rows.dilation) {
                grad_x[row * width..][..width].iter_mut().zip(&*buffer).for_each(|(sum, &share)| *sum += share);
            }
        }
    }
}

/// The gradient of the maxima of [`PoolWindows`] by their plane: that of the first largest pixel.
pub struct MaxWindowsGrad<'a, T> {
    /// The plane.
    pub x: &'a [T],
    /// The gradient by the maxima.
    pub grad: &'a [T],
    /// The width of the plane.
    pub width: usize,
    /// As in [`PoolWindows`].
    pub spans: [&'a Spans<T>; 2],
    /// The plane of the gradient.
    pub grad_x: &'a mut [T],
}

impl<T: WideElement> Kernel for MaxWindowsGrad<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let Self { x, grad, width, spans: [rows, columns], grad_x } = self;
        grad_x.fill(T::default());
        for (i, grad) in grad.chunks_exact(columns.spans.len()).enumerate() {
            let Span { first, taps } = rows.spans[i];
            for (&grad, span) in grad.iter().zip(&columns.spans) {
                let mut largest: Option<usize> = None;
                for row in (0..taps).map(|tap| first + tap * rows.dilation) {
                    for tap in 0..span.taps {
                        let pixel = row * width + span.first + tap * columns.dilation;
                        #[expect(clippy::eq_op, reason = "NaN")]
                        if largest.is_none_or(|largest| x[pixel] > x[largest] || x[pixel] != x[pixel]) {
                            largest = Some(pixel);
                        }
                    }
                }
                if let Some(pixel) = largest {
                    grad_x[pixel] += grad;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::IsaKind;
    use crate::simd::element::writable;

    /// A plane of 5 x 7 through windows of 3 x 2 at strides of 2 and 1, one row of zeros before.
    #[test]
    fn windows_are_what_their_definition_says() {
        let (height, width) = (5usize, 7usize);
        let x: Vec<f64> = (0..height * width).map(|i| ((i * 37) % 23) as f64 - 9.0).collect();
        let spans = |input: usize, kernel: usize, stride: usize, before: usize, dilation: usize, out: usize| {
            let seen = |o: usize| {
                let pixels = (0..kernel).filter_map(|tap| (o * stride + tap * dilation).checked_sub(before));
                pixels.filter(|&pixel| pixel < input).collect::<Vec<_>>()
            };
            let seen: Vec<_> = (0..out).map(seen).collect();
            let spans = seen.iter().map(|seen| Span { first: seen[0], taps: seen.len() }).collect();
            let factors = seen.iter().map(|seen| 1.0 / seen.len() as f64).collect();
            (seen, Spans { spans, dilation, factors })
        };
        for dilation in [1, 2] {
            let (rows, row_spans) = spans(height, 3, 2, 1, 1, 3);
            let (columns, column_spans) = spans(width, 2, 1, 0, dilation, width - dilation);
            let out = rows.len() * columns.len();
            let grad: Vec<f64> = (0..out).map(|i| (i * i % 11) as f64 - 4.0).collect();
            for (isa, max) in IsaKind::available().into_iter().flat_map(|isa| [(isa, false), (isa, true)]) {
                let (mut buffer, mut y) = (vec![f64::NAN; width], vec![f64::NAN; out]);
                let mut grad_x = vec![f64::NAN; x.len()];
                let spans = [&row_spans, &column_spans];
                isa.run(PoolWindows { x: &x, width, spans, max, buffer: &mut buffer, y: writable(&mut y) });
                if max {
                    isa.run(MaxWindowsGrad { x: &x, grad: &grad, width, spans, grad_x: &mut grad_x });
                } else {
                    let (buffer, grad_x) = (&mut buffer[..], &mut grad_x[..]);
                    isa.run(MeanWindowsGrad { grad: &grad, width, spans, buffer, grad_x });
                }
                let mut expected_grad = vec![0.0; x.len()];
                for (index, (rows, columns)) in
                    rows.iter().flat_map(|rows| columns.iter().map(move |columns| (rows, columns))).enumerate()
                {
                    let pixels: Vec<_> =
                        rows.iter().flat_map(|row| columns.iter().map(move |column| row * width + column)).collect();
                    let mean = pixels.iter().map(|&pixel| x[pixel]).sum::<f64>() / pixels.len() as f64;
                    let largest = pixels.iter().copied().rev().max_by(|&a, &b| x[a].total_cmp(&x[b])).unwrap();
                    assert!((y[index] - if max { x[largest] } else { mean }).abs() < 1e-12);
                    if max {
                        expected_grad[largest] += grad[index];
                    } else {
                        pixels.iter().for_each(|&pixel| expected_grad[pixel] += grad[index] / pixels.len() as f64);
                    }
                }
                for (found, expected) in grad_x.iter().zip(&expected_grad) {
                    assert!((found - expected).abs() < 1e-12, "{} {max} {dilation}", isa.name());
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_is_the_maximum() {
        let spans = Spans { spans: vec![Span { first: 0, taps: 3 }], dilation: 1, factors: vec![1.0f32] };
        let row = Spans { spans: vec![Span { first: 0, taps: 1 }], dilation: 1, factors: vec![1.0] };
        for isa in IsaKind::available() {
            for at in 0..3 {
                let mut x = [1.0f32, 2.0, 3.0];
                x[at] = f32::NAN;
                let (mut buffer, mut y, mut grad_x) = ([0.0; 3], [0.0; 1], [0.0; 3]);
                let y_memory = writable(&mut y);
                let spans = [&row, &spans];
                isa.run(PoolWindows { x: &x, width: 3, spans, max: true, buffer: &mut buffer, y: y_memory });
                assert!(y[0].is_nan(), "{}", isa.name());
                isa.run(MaxWindowsGrad { x: &x, grad: &[2.0], width: 3, spans, grad_x: &mut grad_x });
                assert_eq!(grad_x[at], 2.0);
            }
        }
    }
}
