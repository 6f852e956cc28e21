//! Means of 2 x 2 pixels, and their gradient.

use std::mem::MaybeUninit;

use crate::simd::element::WideElement;
use crate::simd::{Isa, Kernel};

/// The means of each 2 x 2 pixels of a plane; a last odd row or column is left out.
pub struct PoolPlane<'a, T> {
    /// The plane.
    pub x: &'a [T],
    /// Its height and width.
    pub size: [usize; 2],
    /// A plane of half of these.
    pub y: &'a mut [MaybeUninit<T>],
}

impl<T: WideElement> Kernel for PoolPlane<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { x, size: [height, width], y } = self;
        let half = width / 2;
        assert!(x.len() == height * width && y.len() == height / 2 * half);
        let vector = T::lanes::<I>();
        let mask = |len: usize| T::mask(isa, len.min(vector));
        let quarter = T::splat(isa, T::from_f64(0.25));
        for at in (0..half).step_by(vector) {
            let rest = half - at;
            let masks = [mask(2 * rest), mask((2 * rest).saturating_sub(vector))];
            for row in 0..height / 2 {
                // SAFETY: both rows are inside the plane; the masks leave out what is beyond.
                unsafe {
                    let x = x.as_ptr().add(2 * row * width + 2 * at);
                    let sum = |part: usize| {
                        let x = x.wrapping_add(part * vector);
                        let rows = [x, x.wrapping_add(width)].map(|x| T::load_masked(isa, masks[part], x));
                        T::add_vectors(isa, rows[0], rows[1])
                    };
                    let [even, odd] = T::split(isa, sum(0), sum(1));
                    let mean = T::mul_vectors(isa, T::add_vectors(isa, even, odd), quarter);
                    T::store_masked(isa, mask(rest), y.as_mut_ptr().add(row * half + at).cast(), mean);
                }
            }
        }
    }
}

/// The gradient of [`PoolPlane`] by its plane.
pub struct PoolPlaneGrad<'a, T> {
    /// The gradient by the means.
    pub grad: &'a [T],
    /// Height and width of the plane.
    pub size: [usize; 2],
    /// The plane of the gradient.
    pub grad_x: &'a mut [T],
}

impl<T: WideElement> Kernel for PoolPlaneGrad<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { grad, size: [height, width], grad_x } = self;
        let half = width / 2;
        assert!(grad_x.len() == height * width && grad.len() == height / 2 * half);
        if height % 2 + width % 2 > 0 {
            grad_x.fill(T::default());
        }
        let vector = T::lanes::<I>();
        let mask = |len: usize| T::mask(isa, len.min(vector));
        let quarter = T::splat(isa, T::from_f64(0.25));
        for at in (0..half).step_by(vector) {
            let rest = half - at;
            let masks = [mask(2 * rest), mask((2 * rest).saturating_sub(vector))];
            for row in 0..height / 2 {
                // SAFETY: both rows are inside the plane; the masks leave out what is beyond.
                unsafe {
                    let grad = T::load_masked(isa, mask(rest), grad.as_ptr().add(row * half + at));
                    let share = T::mul_vectors(isa, grad, quarter);
                    let x = grad_x.as_mut_ptr().add(2 * row * width + 2 * at);
                    for (part, share) in T::zip(isa, share, share).into_iter().enumerate() {
                        let x = x.wrapping_add(part * vector);
                        T::store_masked(isa, masks[part], x, share);
                        T::store_masked(isa, masks[part], x.wrapping_add(width), share);
                    }
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

    /// Of odd and even sizes, of less than a vector and more than two.
    #[test]
    fn means_and_their_gradient() {
        let sizes = [[1, 1], [2, 2], [3, 5], [4, 7], [5, 16], [2, 33], [4, 71]];
        for (isa, [height, width]) in IsaKind::available().into_iter().flat_map(|isa| sizes.map(|size| (isa, size))) {
            let x: Vec<f32> = (0..height * width).map(|i| (i as f32 * 0.7).sin()).collect();
            let half = width / 2;
            let mut y = vec![f32::NAN; height / 2 * half];
            isa.run(PoolPlane { x: &x, size: [height, width], y: writable(&mut y) });
            let mut grad_x = vec![f32::NAN; x.len()];
            isa.run(PoolPlaneGrad { grad: &y, size: [height, width], grad_x: &mut grad_x });
            for (i, grad) in grad_x.into_iter().enumerate() {
                let (row, column) = (i / width, i % width);
                let inside = row / 2 < height / 2 && column / 2 < half;
                let mean = if inside { y[row / 2 * half + column / 2] } else { 0.0 };
                assert_eq!(grad, mean / 4.0, "{} {height} x {width}", isa.name());
                if inside {
                    let corner = row / 2 * 2 * width + column / 2 * 2;
                    let four = [0, 1, width, width + 1].map(|next| f64::from(x[corner + next]));
                    assert!((f64::from(mean) - four.iter().sum::<f64>() / 4.0).abs() < 1e-6);
                }
            }
        }
    }
}
