//! Copies of rows of pixels that convert them: to what is computed with and back, and by the parity
//! of their columns.

use std::mem::MaybeUninit;

use super::rows::{Body, Lanes, load, load_wide, prefetch, run, store};
use crate::simd::element::Element;
use crate::simd::{Isa, Kernel};

/// Where the last of some rows ends.
fn end([rows, width]: [usize; 2], pitch: usize) -> usize {
    rows.max(1) * pitch - pitch + width
}

/// Copies rows of a plane, which are too short for `memcpy` to be worth its call, to be computed
/// with.
pub struct WidenRows<'a, T: Element> {
    /// The rows, and the distance of their beginnings.
    pub x: (&'a [T], usize),
    /// Where they go, likewise.
    pub y: (&'a mut [MaybeUninit<T::Wide>], usize),
    /// Number and length of the rows.
    pub size: [usize; 2],
    /// Prefetch distance, from what is read.
    pub ahead: usize,
}

impl<T: Element> Kernel for WidenRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { x: (x, x_pitch), y: (y, y_pitch), size, ahead } = self;
        assert!(x.len() >= end(size, x_pitch) && y.len() >= end(size, y_pitch));
        for row in 0..size[0] {
            // SAFETY: the rows end inside the slices.
            unsafe {
                let (x, y) = (x.as_ptr().add(row * x_pitch), y.as_mut_ptr().add(row * y_pitch).cast());
                run(isa, size[1], &mut Widen::<T> { x, y, ahead });
            }
        }
    }
}

struct Widen<T: Element> {
    x: *const T,
    y: *mut T::Wide,
    ahead: usize,
}

impl<T: Element, I: Isa> Body<T, I> for Widen<T> {
    #[inline(always)]
    unsafe fn block<const N: usize>(&mut self, isa: I, at: usize, lanes: Lanes<T::Mask<I>>) {
        prefetch::<T, I, N>(isa, self.x.wrapping_add(at), self.ahead);
        for i in 0..N {
            let at = at + i * T::lanes::<I>();
            // SAFETY: the caller's promise.
            unsafe {
                let [value] = load::<T, I, 1>(isa, self.x.add(at), lanes);
                match lanes {
                    Lanes::All => T::store_wide(isa, self.y.add(at), value),
                    Lanes::First(mask) => T::store_wide_masked(isa, mask, self.y.add(at), value),
                }
            }
        }
    }
}

/// Copies rows of results back, rounded to what they are stored as: what [`WidenRows`] undoes.
pub struct NarrowRows<'a, T: Element> {
    /// The rows, and the distance of their beginnings.
    pub x: (&'a [T::Wide], usize),
    /// Where they go, likewise.
    pub y: (&'a mut [MaybeUninit<T>], usize),
    /// Number and length of the rows.
    pub size: [usize; 2],
    /// Prefetch distance, from what is written.
    pub ahead: usize,
}

impl<T: Element> Kernel for NarrowRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { x: (x, x_pitch), y: (y, y_pitch), size, ahead } = self;
        assert!(x.len() >= end(size, x_pitch) && y.len() >= end(size, y_pitch));
        for row in 0..size[0] {
            // SAFETY: the rows end inside the slices.
            unsafe {
                let (x, y) = (x.as_ptr().add(row * x_pitch), y.as_mut_ptr().add(row * y_pitch).cast());
                run(isa, size[1], &mut Narrow::<T> { x, y, ahead });
            }
        }
    }
}

struct Narrow<T: Element> {
    x: *const T::Wide,
    y: *mut T,
    ahead: usize,
}

impl<T: Element, I: Isa> Body<T, I> for Narrow<T> {
    #[inline(always)]
    unsafe fn block<const N: usize>(&mut self, isa: I, at: usize, lanes: Lanes<T::Mask<I>>) {
        prefetch::<T, I, N>(isa, self.y.wrapping_add(at), self.ahead);
        // SAFETY: the caller's promise.
        unsafe {
            let values = load_wide::<T, I, N>(isa, self.x.add(at), lanes);
            store(isa, self.y.add(at), lanes, values);
        }
    }
}

/// [`WidenRows`] that splits the rows by the parity of their columns.
pub struct SplitRows<'a, T: Element> {
    /// The rows, and the distance of their beginnings.
    pub x: (&'a [T], usize),
    /// Where the values at even and those at odd indices go: rows with one distance.
    pub y: ([&'a mut [T::Wide]; 2], usize),
    /// Number and length of the rows.
    pub size: [usize; 2],
    /// Prefetch distance, from what is read.
    pub ahead: usize,
}

impl<T: Element> Kernel for SplitRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { x: (x, x_pitch), y: ([even, odd], y_pitch), size: [rows, width], ahead } = self;
        assert!(x.len() >= end([rows, width], x_pitch) && even.len() >= end([rows, width.div_ceil(2)], y_pitch));
        assert!(odd.len() >= end([rows, width / 2], y_pitch));
        let vector = T::lanes::<I>();
        let mask = |len: usize| T::mask(isa, len.min(vector));
        for at in (0..width).step_by(2 * vector) {
            let rest = width - at;
            let x_masks = [mask(rest), mask(rest.saturating_sub(vector))];
            let y_masks = [mask(rest.div_ceil(2)), mask(rest / 2)];
            for row in 0..rows {
                let start = row * y_pitch + at / 2;
                // SAFETY: the rows end inside the slices; the masks leave out what is beyond.
                unsafe {
                    let x = x.as_ptr().add(row * x_pitch + at);
                    prefetch::<T, I, 2>(isa, x, ahead);
                    let low = T::load_masked(isa, x_masks[0], x);
                    let high = T::load_masked(isa, x_masks[1], x.wrapping_add(vector));
                    let [low, high] = T::split(isa, low, high);
                    T::store_wide_masked(isa, y_masks[0], even.as_mut_ptr().add(start), low);
                    T::store_wide_masked(isa, y_masks[1], odd.as_mut_ptr().wrapping_add(start), high);
                }
            }
        }
    }
}

/// [`NarrowRows`] that puts rows together from their values at even and odd indices: what
/// [`SplitRows`] undoes.
pub struct ZipRows<'a, T: Element> {
    /// Rows of the values at even and at odd indices, with one distance.
    pub x: ([&'a [T::Wide]; 2], usize),
    /// The rows, and the distance of their beginnings.
    pub y: (&'a mut [MaybeUninit<T>], usize),
    /// Number and length of the rows.
    pub size: [usize; 2],
    /// Prefetch distance, from what is written.
    pub ahead: usize,
}

impl<T: Element> Kernel for ZipRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { x: ([even, odd], x_pitch), y: (y, y_pitch), size: [rows, width], ahead } = self;
        assert!(y.len() >= end([rows, width], y_pitch) && even.len() >= end([rows, width.div_ceil(2)], x_pitch));
        assert!(odd.len() >= end([rows, width / 2], x_pitch));
        let vector = T::lanes::<I>();
        let mask = |len: usize| T::mask(isa, len.min(vector));
        for at in (0..width).step_by(2 * vector) {
            let rest = width - at;
            let x_masks = [mask(rest.div_ceil(2)), mask(rest / 2)];
            let y_masks = [mask(rest), mask(rest.saturating_sub(vector))];
            for row in 0..rows {
                let start = row * x_pitch + at / 2;
                // SAFETY: the rows end inside the slices; the masks leave out what is beyond.
                unsafe {
                    let low = T::load_wide_masked(isa, x_masks[0], even.as_ptr().add(start));
                    let high = T::load_wide_masked(isa, x_masks[1], odd.as_ptr().wrapping_add(start));
                    let [low, high] = T::zip(isa, low, high);
                    let y = y.as_mut_ptr().cast::<T>().add(row * y_pitch + at);
                    prefetch::<T, I, 2>(isa, y, ahead);
                    T::store_masked(isa, y_masks[0], y, low);
                    T::store_masked(isa, y_masks[1], y.wrapping_add(vector), high);
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

    #[test]
    fn split_and_zipped_rows() {
        for isa in IsaKind::available() {
            let widths = (0..70usize).step_by(if cfg!(miri) { 23 } else { 1 });
            for (rows, width) in (1..4).flat_map(|rows| widths.clone().map(move |width| (rows, width))) {
                let x: Vec<f32> = (0..rows * width).map(|i| i as f32).collect();
                let half = width.div_ceil(2);
                let (mut even, mut odd) = (vec![-1f32; rows * half], vec![-1f32; rows * half]);
                isa.run(SplitRows::<f32> {
                    x: (&x, width),
                    y: ([&mut even, &mut odd], half),
                    size: [rows, width],
                    ahead: 0,
                });
                for (i, &x) in x.iter().enumerate() {
                    let (row, column) = (i / width, i % width);
                    assert_eq!([&even, &odd][column % 2][row * half + column / 2], x, "{}", isa.name());
                }
                let mut y = vec![-1f32; rows * width + 1];
                let memory = writable(&mut y);
                isa.run(ZipRows::<f32> { x: ([&even, &odd], half), y: (memory, width), size: [rows, width], ahead: 0 });
                assert_eq!(&y[..rows * width], &x, "{}", isa.name());
                assert_eq!(y[rows * width], -1.0);
            }
        }
    }

    /// Rows of all lengths, further apart in what is written than in what is read, and back.
    fn widened_and_narrowed_rows<T: Element>() {
        for isa in IsaKind::available() {
            for (rows, width) in (0..70usize).step_by(if cfg!(miri) { 23 } else { 1 }).map(|width| (3, width)) {
                let x: Vec<T> = (0..rows * width).map(|i| T::from_f64((i % 200) as f64)).collect();
                let (pitch, size) = (width + 2, [rows, width]);
                let mut wide = vec![T::from_f64(-1.0).widen(); rows * pitch];
                let y = (writable(&mut wide), pitch);
                isa.run(WidenRows { x: (&x[..], width), y, size, ahead: 0 });
                for (i, value) in wide.iter().enumerate() {
                    let (row, column) = (i / pitch, i % pitch);
                    let expected = if column < width { x[row * width + column].to_f64() } else { -1.0 };
                    assert_eq!(value.to_f64(), expected, "{}", isa.name());
                }
                let mut y = vec![T::from_f64(-1.0); rows * width + 1];
                let to = (writable(&mut y), width);
                isa.run(NarrowRows::<T> { x: (&wide[..], pitch), y: to, size, ahead: 0 });
                assert_eq!(&y[..rows * width], &x[..], "{}", isa.name());
                assert_eq!(y[rows * width].to_f64(), -1.0);
            }
        }
    }

    #[test]
    fn rows_are_widened_and_narrowed() {
        widened_and_narrowed_rows::<half::bf16>();
        widened_and_narrowed_rows::<f32>();
        widened_and_narrowed_rows::<f64>();
    }
}
