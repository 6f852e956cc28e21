//! The depthwise convolution over NHWC pixels, channels being the vector dimension. (For NCHW: [`planes`](super::planes).)
//!
//! Both kernels take a *run*: neighbouring output pixels that see the same taps, so that nothing is padded and inner
//! loops have no bounds to check.

use super::Element;
use crate::isa::{Isa, Kernel};

/// Output pixels that share each loaded weight.
const PIXELS: usize = 4;

/// `y[p][c] = bias[c] + sum over taps t of w[t][c] * x[p][t][c]` for a run of pixels `p` and all channels `c`.
pub struct TapPixels<'a, T: Element> {
    /// Number of channels.
    pub channels: usize,
    /// Number of output pixels.
    pub pixels: usize,
    /// For each tap, where its input for pixel 0 stands after `x` and where its weights stand after `weights`.
    pub taps: &'a [(usize, usize)],
    /// Taps come in rows of so many, the input of each of which is the next pixel's of the one before; 1 where they do not.
    pub columns: usize,
    /// The input.
    pub x: *const T,
    /// Values from one pixel's input to the next one's.
    pub x_stride: usize,
    /// The weights, `channels` for each tap.
    pub weights: &'a [T::Wide],
    /// `channels` values.
    pub bias: Option<&'a [T]>,
    /// The output.
    pub y: *mut T,
    /// Values from one output pixel to the next.
    pub y_stride: usize,
    /// What is asked for meanwhile: places after `x` for pixel 0, and the distance from what is written.
    pub ahead: (&'a [usize], usize),
}

/// A [`TapPixels`] that may run: see [`TapPixels::promise`].
pub struct CheckedTapPixels<'a, T: Element>(TapPixels<'a, T>);

impl<'a, T: Element> TapPixels<'a, T> {
    /// Turns the description into a kernel.
    ///
    /// # Safety
    /// Until it has run, `channels` values must be readable at every tap of every pixel and writable at every output
    /// pixel, and input and output must not overlap.
    pub unsafe fn promise(self) -> CheckedTapPixels<'a, T> {
        assert!(self.taps.iter().all(|&(_, w)| w + self.channels <= self.weights.len()), "weights");
        assert!(self.bias.is_none_or(|bias| bias.len() == self.channels), "bias");
        assert!(self.taps.len().is_multiple_of(self.columns), "columns");
        CheckedTapPixels(self)
    }

    /// All pixels, `V` vectors of channels from `c`: what neighbouring pixels see both stays in the first cache.
    ///
    /// # Safety
    /// As for [`TapPixels::promise`]; the channels must exist, but for what `mask` leaves out.
    #[inline(always)]
    unsafe fn run<I: Isa, const V: usize, const TAIL: bool>(&self, isa: I, c: usize, mask: T::Mask<I>) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.columns {
                3 => self.pixels::<I, V, TAIL, 3, 6>(isa, c, mask),
                5 => self.pixels::<I, V, TAIL, 5, 8>(isa, c, mask),
                7 => self.pixels::<I, V, TAIL, 7, 10>(isa, c, mask),
                _ => self.pixels::<I, V, TAIL, 1, 4>(isa, c, mask),
            }
        }
    }

    /// # Safety
    /// As for [`TapPixels::run`]; `K` must divide `columns`, and `SEEN` be what [`PIXELS`] pixels see through `K` taps.
    #[inline(always)]
    unsafe fn pixels<I: Isa, const V: usize, const TAIL: bool, const K: usize, const SEEN: usize>(
        &self,
        isa: I,
        c: usize,
        mask: T::Mask<I>,
    ) {
        let mut p = 0;
        // SAFETY: the pixels stay below `pixels`.
        unsafe {
            while p + PIXELS <= self.pixels {
                self.vectors::<I, PIXELS, V, TAIL, K, SEEN>(isa, p, c, mask);
                p += PIXELS;
            }
            while p < self.pixels {
                self.vectors::<I, 1, V, TAIL, K, K>(isa, p, c, mask);
                p += 1;
            }
        }
    }

    /// `P` pixels x `V` vectors of channels from `c`.
    ///
    /// # Safety
    /// As for [`TapPixels::pixels`]; `p + P <= pixels`.
    #[inline(always)]
    unsafe fn vectors<I: Isa, const P: usize, const V: usize, const TAIL: bool, const K: usize, const SEEN: usize>(
        &self,
        isa: I,
        p: usize,
        c: usize,
        mask: T::Mask<I>,
    ) {
        let lanes = T::lanes::<I>();
        // SAFETY: the caller's promise, for each pointer below.
        let load = |ptr: *const T| unsafe { if TAIL { T::load_masked(isa, mask, ptr) } else { T::load(isa, ptr) } };
        let mut start = [T::splat(isa, T::default()); V];
        if let Some(bias) = self.bias {
            for (v, start) in start.iter_mut().enumerate() {
                *start = load(bias.as_ptr().wrapping_add(c + v * lanes));
            }
        }
        let mut sums = [start; P];
        for (&ahead, i) in self.ahead.0.iter().flat_map(|ahead| (0..P).map(move |i| (ahead, i))) {
            for v in 0..V {
                isa.prefetch_far(self.x.wrapping_add(ahead + (p + i) * self.x_stride + c + v * lanes));
            }
        }
        for taps in self.taps.as_chunks::<K>().0 {
            let x = self.x.wrapping_add(taps[0].0 + p * self.x_stride + c);
            for v in 0..V {
                // What the row's taps see of these pixels, each value loaded once.
                let mut seen = [T::splat(isa, T::default()); SEEN];
                for (i, value) in seen.iter_mut().enumerate() {
                    *value = load(x.wrapping_add(i * self.x_stride + v * lanes));
                }
                for (j, &(_, w)) in taps.iter().enumerate() {
                    let w = self.weights.as_ptr().wrapping_add(w + c + v * lanes);
                    // SAFETY: inside the weights, whose number was asserted.
                    let weight = unsafe { if TAIL { T::load_wide_masked(isa, mask, w) } else { T::load_wide(isa, w) } };
                    for (i, sums) in sums.iter_mut().enumerate() {
                        sums[v] = T::mul_add(isa, weight, seen[i + j], sums[v]);
                    }
                }
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe {
                    let ptr = self.y.add((p + i) * self.y_stride + c + v * lanes);
                    isa.prefetch_far(ptr.wrapping_add(self.ahead.1));
                    if TAIL { T::store_masked(isa, mask, ptr, sum) } else { T::store(isa, ptr, sum) }
                }
            }
        }
    }
}

impl<T: Element> Kernel for CheckedTapPixels<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (lanes, channels) = (T::lanes::<I>(), self.0.channels);
        let mut c = 0;
        // SAFETY: promised to `promise`; the two-vector tiles and the last, masked ones stay below `channels`.
        unsafe {
            while c + 2 * lanes <= channels {
                self.0.run::<I, 2, false>(isa, c, T::mask(isa, lanes));
                c += 2 * lanes;
            }
            while c < channels {
                self.0.run::<I, 1, true>(isa, c, T::mask(isa, (channels - c).min(lanes)));
                c += lanes;
            }
        }
    }
}

/// Rows from what a [`TapSums`] reads to what it asks for meanwhile.
const AHEAD: usize = 4;
/// The most taps of one [`TapSums`].
pub const MAX_TAPS: usize = 7;

/// `sums[t][c] += sum over rows and pixels of g[c] * x[t][c]` for a rectangle of output pixels that see the same taps.
pub struct TapSums<'a, T: Element> {
    /// Number of channels.
    pub channels: usize,
    /// Rows and pixels in a row of the rectangle.
    pub size: [usize; 2],
    /// For each tap, at most [`MAX_TAPS`], where its input for the first pixel stands after `x`.
    pub taps: &'a [usize],
    /// The input.
    pub x: *const T,
    /// Values from one row's, and from one pixel's, input to the next one's.
    pub x_strides: [usize; 2],
    /// The gradient by the output.
    pub g: *const T,
    /// Values from one row, and from one pixel, to the next.
    pub g_strides: [usize; 2],
    /// `channels` sums for each tap.
    pub sums: &'a mut [T::Wide],
}

/// A [`TapSums`] that may run: see [`TapSums::promise`].
pub struct CheckedTapSums<'a, T: Element>(TapSums<'a, T>);

impl<'a, T: Element> TapSums<'a, T> {
    /// Turns the description into a kernel.
    ///
    /// # Safety
    /// Until it has run, `channels` values must be readable at every pixel of `g` and at every tap of every pixel of `x`.
    pub unsafe fn promise(self) -> CheckedTapSums<'a, T> {
        assert!((1..=MAX_TAPS).contains(&self.taps.len()), "taps");
        assert_eq!(self.sums.len(), self.taps.len() * self.channels, "sums");
        CheckedTapSums(self)
    }

    /// # Safety
    /// As for [`TapSums::promise`]; `K` must be the number of taps.
    #[inline(always)]
    unsafe fn taps<I: Isa, const K: usize>(&mut self, isa: I) {
        let lanes = T::lanes::<I>();
        let mut c = 0;
        // SAFETY: the two-vector tiles and the last, masked ones stay below `channels`.
        unsafe {
            while const { 2 * K + 3 <= I::REGISTER_COUNT } && c + 2 * lanes <= self.channels {
                self.vectors::<I, K, 2, false>(isa, c, T::mask(isa, lanes));
                c += 2 * lanes;
            }
            while c < self.channels {
                let mask = T::mask(isa, (self.channels - c).min(lanes));
                self.vectors::<I, K, 1, true>(isa, c, mask);
                c += lanes;
            }
        }
    }

    /// `V` vectors of channels from `c`.
    ///
    /// # Safety
    /// As for [`TapSums::taps`]; the channels must exist, but for what `mask` leaves out.
    #[inline(always)]
    unsafe fn vectors<I: Isa, const K: usize, const V: usize, const TAIL: bool>(
        &mut self,
        isa: I,
        c: usize,
        mask: T::Mask<I>,
    ) {
        let lanes = T::lanes::<I>();
        // SAFETY: the caller's promise, for each pointer below.
        let load = |ptr: *const T| unsafe { if TAIL { T::load_masked(isa, mask, ptr) } else { T::load(isa, ptr) } };
        let sums_ptr = self.sums.as_mut_ptr();
        let mut sums = [[T::splat(isa, T::default()); V]; K];
        for (k, row) in sums.iter_mut().enumerate() {
            for (v, sum) in row.iter_mut().enumerate() {
                let ptr = sums_ptr.wrapping_add(k * self.channels + c + v * lanes);
                // SAFETY: inside `sums`, whose length was asserted.
                *sum = unsafe { if TAIL { T::load_wide_masked(isa, mask, ptr) } else { T::load_wide(isa, ptr) } };
            }
        }
        for row in 0..self.size[0] {
            for p in 0..self.size[1] {
                let g = self.g.wrapping_add(row * self.g_strides[0] + p * self.g_strides[1] + c);
                let x = self.x.wrapping_add(row * self.x_strides[0] + p * self.x_strides[1] + c);
                for v in 0..V {
                    isa.prefetch_far(g.wrapping_add(AHEAD * self.g_strides[0] + v * lanes));
                    isa.prefetch_far(x.wrapping_add(AHEAD * self.x_strides[0] + v * lanes));
                    let gradient = load(g.wrapping_add(v * lanes));
                    for (sums, &tap) in sums.iter_mut().zip(self.taps) {
                        let value = load(x.wrapping_add(tap + v * lanes));
                        sums[v] = T::mul_add(isa, gradient, value, sums[v]);
                    }
                }
            }
        }
        for (k, row) in sums.into_iter().enumerate() {
            for (v, sum) in row.into_iter().enumerate() {
                let ptr = sums_ptr.wrapping_add(k * self.channels + c + v * lanes);
                // SAFETY: inside `sums`, whose length was asserted.
                unsafe { if TAIL { T::store_wide_masked(isa, mask, ptr, sum) } else { T::store_wide(isa, ptr, sum) } }
            }
        }
    }
}

impl<T: Element> Kernel for CheckedTapSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        // SAFETY: promised to `promise`, which also checked the number of taps.
        unsafe {
            match self.0.taps.len() {
                1 => self.0.taps::<I, 1>(isa),
                2 => self.0.taps::<I, 2>(isa),
                3 => self.0.taps::<I, 3>(isa),
                4 => self.0.taps::<I, 4>(isa),
                5 => self.0.taps::<I, 5>(isa),
                6 => self.0.taps::<I, 6>(isa),
                _ => self.0.taps::<I, 7>(isa),
            }
        }
    }
}
