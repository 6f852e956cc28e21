//! Permutation of each pixel's channels in NHWC memory: any one a vector at a time, transposition
//! in blocks.

use super::transpose::Transpose;
use crate::simd::element::Element;
use crate::simd::{Isa, Kernel, RawKernel, line};

/// Neighbouring channels of which some go to a vector.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// The first one.
    pub first: usize,
    /// How many there are.
    pub len: usize,
}

/// `y[p][lane] = x[p][windows[window[lane]].first + index[lane]]` for one vector of channels.
///
/// # Safety
/// Until it has run, every pixel's windows must be readable and the vector's channels writable.
pub struct PermuteChannels<'a, T> {
    /// The first pixel's channels.
    pub x: *const T,
    /// The vector's channels in the first pixel.
    pub y: *mut T,
    /// Distances of pixels in `x` and `y`.
    pub strides: [usize; 2],
    /// Number of pixels.
    pub pixels: usize,
    /// Number of channels.
    pub columns: usize,
    /// Where they come from.
    pub windows: &'a [Window],
    /// For each lane, which of these its channel is in, and its index there.
    pub index: [&'a [u32]; 2],
    /// Distances from what is read and written to what is prefetched meanwhile; 0 where that is in
    /// a cache.
    pub prefetch: [usize; 2],
}

impl<'a, T: Element> PermuteChannels<'a, T> {
    /// `R` pixels from those at `x` and `y` on.
    ///
    /// # Safety
    /// As for [`PermuteChannels`]; they must exist.
    #[inline(always)]
    unsafe fn tile<I: Isa, const R: usize>(&self, isa: I, x: *const T, y: *mut T) {
        let mut values = [T::splat(isa, T::default()); R];
        // SAFETY: the caller's promise; there is a vector of either index.
        unsafe {
            let [window, inside] = self.index.map(|index| index.as_ptr().cast::<I::u32s>().read_unaligned());
            for (number, &Window { first, len }) in self.windows.iter().enumerate() {
                let here = isa.equal_u32s(window, isa.splat_u32s(number as u32));
                let mask = (len < T::lanes::<I>()).then(|| T::mask(isa, len));
                let mut from = x.wrapping_add(first);
                for value in &mut values {
                    if self.prefetch[0] > 0 {
                        isa.prefetch_l2(from.wrapping_add(self.prefetch[0]));
                    }
                    let channels = match mask {
                        Some(mask) => T::load_masked(isa, mask, from),
                        None => T::load(isa, from),
                    };
                    *value = T::select(isa, here, T::permute(isa, channels, inside), *value);
                    from = from.wrapping_add(self.strides[0]);
                }
            }
            let (lanes, mut to) = (T::lanes::<I>(), y);
            for value in values {
                if self.prefetch[1] > 0 {
                    isa.prefetch_l2(to.wrapping_add(self.prefetch[1]));
                }
                if self.columns < lanes {
                    T::store_masked(isa, T::mask(isa, self.columns), to, value);
                } else {
                    T::store(isa, to, value);
                }
                to = to.wrapping_add(self.strides[1]);
            }
        }
    }
}

impl<T: Element> RawKernel for PermuteChannels<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        if !const { T::PERMUTES && I::PERMUTES } {
            unreachable!("no instruction permutes lanes");
        }
        let kernel = self;
        let lanes = T::lanes::<I>();
        assert!(kernel.columns <= lanes && kernel.index.iter().all(|index| index.len() == lanes), "indices");
        let (mut x, mut y, mut left) = (kernel.x, kernel.y, kernel.pixels);
        // SAFETY: promised; the pixels exist.
        unsafe {
            while left > 0 {
                let pixels = if left >= 8 {
                    kernel.tile::<I, 8>(isa, x, y);
                    8
                } else {
                    kernel.tile::<I, 1>(isa, x, y);
                    1
                };
                (x, y) = (x.wrapping_add(pixels * kernel.strides[0]), y.wrapping_add(pixels * kernel.strides[1]));
                left -= pixels;
            }
        }
    }
}

/// Each pixel's channels as a matrix, transposed: `y[p][c * rows + r] = x[p][r * columns + c]`,
/// which is what interleaving by a divisor of the channels does, and undoing that.
///
/// # Safety
/// Until it has run, every pixel's channels must be readable in `x` and writable in `y`, apart from
/// each other.
pub struct TransposeChannels<T> {
    /// The first pixel's channels.
    pub x: *const T,
    /// Where they go.
    pub y: *mut T,
    /// Distances of pixels in `x` and `y`.
    pub strides: [usize; 2],
    /// Number of pixels.
    pub pixels: usize,
    /// Rows and columns of the matrix.
    pub size: [usize; 2],
    /// Distances from what is read and written to what is prefetched meanwhile; 0 where that is in
    /// a cache.
    pub prefetch: [usize; 2],
}

impl<T: Element> RawKernel for TransposeChannels<T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        let TransposeChannels { mut x, mut y, strides, pixels, size, prefetch } = self;
        let [rows, columns] = size;
        for _ in 0..pixels {
            for channel in (0..rows * columns).step_by(line::<T>()) {
                if prefetch[0] > 0 {
                    isa.prefetch_l2(x.wrapping_add(channel + prefetch[0]));
                }
                if prefetch[1] > 0 {
                    isa.prefetch_l2(y.wrapping_add(channel + prefetch[1]));
                }
            }
            // Along the longer side.
            // SAFETY: promised; the pixels exist.
            unsafe {
                if rows < columns {
                    Transpose::scatter(size, x, columns, y, rows).ahead(0).run(isa);
                } else {
                    Transpose::gather(size, x, columns, y, rows).ahead(0).run(isa);
                }
            }
            (x, y) = (x.wrapping_add(strides[0]), y.wrapping_add(strides[1]));
        }
    }
}
