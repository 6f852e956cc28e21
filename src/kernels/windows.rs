//! The depthwise convolution over NHWC pixels, channels being the vector dimension. (For NCHW: [`planes`](super::planes).)
//!
//! Both kernels take one or two vectors of channels at a time and copy what they see of a [`Window`]'s pixels to memory that
//! stays in the L1 cache, with zeros where there is no image:
//!
//! ```text
//!   0 0 0 0 0 0
//!   0 a b c d e    a window of 3 rows for a row of 4 results through a 3 x 3 kernel, at an image's upper left corner
//!   0 f g h i j
//! ```
//!
//! So all results see through all taps, pixels are next to each other however many channels an image has, and values are
//! widened once.

use super::Element;
use crate::isa::{Isa, Kernel};

/// Results that share each loaded weight.
const PIXELS: usize = 4;
/// Vectors of channels that are computed together, at most.
pub const VECTORS: usize = 2;

/// The pixels of an NHWC image that a rectangle of results sees, and memory for a copy of some of their channels.
pub struct Window<'a, T: Element> {
    /// The image.
    pub x: &'a [T],
    /// Its height and width.
    pub size: [usize; 2],
    /// Channels of a pixel.
    pub channels: usize,
    /// The row and column of the first pixel, which may be outside the image.
    pub start: [isize; 2],
    /// Rows and columns.
    pub extent: [usize; 2],
    /// Memory for [`VECTORS`] vectors of each pixel.
    pub copy: &'a mut [T::Wide],
}

impl<T: Element> Window<'_, T> {
    fn check<I: Isa>(&self) {
        let pixels = self.extent[0] * self.extent[1];
        assert!(self.x.len() >= self.size[0] * self.size[1] * self.channels, "x");
        assert!(self.copy.len() >= pixels * VECTORS * T::lanes::<I>(), "copy");
    }

    /// Copies `V` vectors of channels from `c`.
    ///
    /// # Safety
    /// The window must have been checked; the channels must exist, but for what `mask` leaves out.
    #[inline(always)]
    unsafe fn copy<I: Isa, const V: usize, const TAIL: bool>(&mut self, isa: I, c: usize, mask: T::Mask<I>) {
        let (lanes, [rows, columns], zero) = (T::lanes::<I>(), self.extent, T::splat_wide(isa, T::Wide::default()));
        let inside = |axis: usize| {
            let [first, end] = [0, self.size[axis] as isize].map(|pixel| pixel - self.start[axis]);
            let clamp = |pixel: isize| pixel.clamp(0, self.extent[axis] as isize) as usize;
            clamp(first)..clamp(end)
        };
        let (real_rows, real) = (inside(0), inside(1));
        let first = |axis: usize, place: usize| self.start[axis].saturating_add_unsigned(place).max(0) as usize;
        for row in 0..rows {
            let real = if real_rows.contains(&row) { real.clone() } else { 0..0 };
            let to = self.copy.as_mut_ptr().wrapping_add(row * columns * V * lanes);
            for i in (0..real.start).chain(real.end..columns).flat_map(|i| i * V..(i + 1) * V) {
                // SAFETY: `copy` has room for all pixels.
                unsafe { T::store_wide(isa, to.add(i * lanes), zero) };
            }
            let pixel = first(0, row) * self.size[1] + first(1, real.start);
            let from = self.x.as_ptr().wrapping_add(pixel * self.channels + c);
            for i in 0..real.len() {
                for v in 0..V {
                    // SAFETY: a pixel of the image and its copy; the channels exist.
                    unsafe {
                        let ptr = from.wrapping_add(i * self.channels + v * lanes);
                        let value = if TAIL { T::load_masked(isa, mask, ptr) } else { T::load(isa, ptr) };
                        T::store_wide(isa, to.wrapping_add(((real.start + i) * V + v) * lanes), value);
                    }
                }
            }
        }
    }
}

/// Asks for so many vectors of memory from `ptr` on, which it moves behind them.
#[inline(always)]
fn ask<T: Element, I: Isa>(isa: I, ptr: &mut *const T, vectors: usize) {
    for _ in 0..vectors {
        isa.prefetch_far(*ptr);
        *ptr = ptr.wrapping_add(T::lanes::<I>());
    }
}

/// The channels in order: the first one of [`VECTORS`] whole vectors (true), and then those of single vectors, which may have
/// fewer channels.
fn vectors(channels: usize, lanes: usize) -> impl Iterator<Item = (usize, bool)> {
    let whole = channels / (VECTORS * lanes) * (VECTORS * lanes);
    let several = (0..whole).step_by(VECTORS * lanes).map(|c| (c, true));
    several.chain((whole..channels).step_by(lanes).map(|c| (c, false)))
}

/// Results that see through the same taps.
pub struct Results<'a> {
    /// Their rows and columns.
    pub size: [usize; 2],
    /// Where the first one stands, and the distances of rows and of columns: values of the output.
    pub first: usize,
    /// See `first`.
    pub strides: [usize; 2],
    /// Pixels of the window from one's to the next one's.
    pub step: usize,
    /// For each tap, the window's pixel that the first result sees, and where its weights stand.
    pub taps: &'a [(usize, usize)],
    /// Taps come in rows of so many, each of which sees the next pixel of the window; 1 where they do not.
    pub columns: usize,
    /// How many vectors of the input to ask for with one of these results.
    pub asks: usize,
}

/// `y[p][c] = bias[c] + sum over taps t of w[t][c] * x[p][t][c]` for results `p` that see a window, and all channels `c`.
pub struct WindowConv<'a, T: Element> {
    /// What they see.
    pub window: Window<'a, T>,
    /// The results.
    pub results: &'a [Results<'a>],
    /// The weights, `channels` for each tap.
    pub weights: &'a [T::Wide],
    /// `channels` values.
    pub bias: Option<&'a [T]>,
    /// The output.
    pub y: *mut T,
    /// Where the memory begins of which some is asked for meanwhile, line after line: the input's and the output's.
    pub ahead: [*const T; 2],
}

/// A [`WindowConv`] that may run: see [`WindowConv::promise`].
pub struct CheckedWindowConv<'a, T: Element>(WindowConv<'a, T>);

impl<'a, T: Element> WindowConv<'a, T> {
    /// Turns the description into a kernel.
    ///
    /// # Safety
    /// Until it has run, `channels` values must be writable at every result.
    #[inline]
    pub unsafe fn promise(self) -> CheckedWindowConv<'a, T> {
        let Window { channels, extent, .. } = self.window;
        for Results { size, step, taps, columns, .. } in self.results {
            assert!(taps.iter().all(|&(_, w)| w + channels <= self.weights.len()), "weights");
            let neighbours = |row: &[(usize, usize)]| row.windows(2).all(|taps| taps[0].0 + 1 == taps[1].0);
            assert!(taps.len().is_multiple_of(*columns) && (*columns == 1 || *step == 1), "columns");
            assert!(taps.chunks_exact(*columns).all(neighbours), "columns");
            let [last_row, last] = size.map(|len| len.saturating_sub(1) * step);
            let last = last_row * extent[1] + last;
            assert!(taps.iter().all(|&(pixel, _)| pixel + last < extent[0] * extent[1]), "taps");
        }
        assert!(self.bias.is_none_or(|bias| bias.len() == channels), "bias");
        CheckedWindowConv(self)
    }

    /// `V` vectors of channels from `c`.
    ///
    /// # Safety
    /// As for [`WindowConv::promise`]; the channels must exist, but for what `mask` leaves out.
    #[inline(always)]
    unsafe fn channels<I: Isa, const V: usize, const TAIL: bool>(&mut self, isa: I, c: usize, mask: T::Mask<I>) {
        // SAFETY: the caller's promise.
        unsafe {
            self.window.copy::<I, V, TAIL>(isa, c, mask);
            for results in self.results {
                match results.columns {
                    2 => self.rows::<I, V, TAIL, 2, 5>(isa, results, c, mask),
                    3 => self.rows::<I, V, TAIL, 3, 6>(isa, results, c, mask),
                    5 => self.rows::<I, V, TAIL, 5, 8>(isa, results, c, mask),
                    7 => self.rows::<I, V, TAIL, 7, 10>(isa, results, c, mask),
                    _ => self.rows::<I, V, TAIL, 1, 4>(isa, results, c, mask),
                }
            }
        }
    }

    /// All of some results.
    ///
    /// # Safety
    /// As for [`WindowConv::channels`]; `K` must divide `columns`, and `SEEN` be what [`PIXELS`] results see through `K` taps.
    #[inline(always)]
    unsafe fn rows<I: Isa, const V: usize, const TAIL: bool, const K: usize, const SEEN: usize>(
        &mut self,
        isa: I,
        results: &Results,
        c: usize,
        mask: T::Mask<I>,
    ) {
        let [rows, columns] = results.size;
        for row in 0..rows {
            let mut p = 0;
            // SAFETY: the results exist; some of a row's last ones may be computed twice.
            unsafe {
                while p < columns && columns >= PIXELS {
                    let start = p.min(columns - PIXELS);
                    self.vectors::<I, PIXELS, V, TAIL, K, SEEN>(isa, results, [row, start], c, mask);
                    p += PIXELS;
                }
                while p < columns {
                    self.vectors::<I, 1, V, TAIL, K, K>(isa, results, [row, p], c, mask);
                    p += 1;
                }
            }
        }
    }

    /// `P` results from `[row, p]` x `V` vectors of channels from `c`.
    ///
    /// # Safety
    /// As for [`WindowConv::rows`]; the results must exist.
    #[inline(always)]
    unsafe fn vectors<I: Isa, const P: usize, const V: usize, const TAIL: bool, const K: usize, const SEEN: usize>(
        &mut self,
        isa: I,
        results: &Results,
        [row, p]: [usize; 2],
        c: usize,
        mask: T::Mask<I>,
    ) {
        let lanes = T::lanes::<I>();
        let mut start = [T::splat(isa, T::default()); V];
        if let Some(bias) = self.bias {
            for (v, start) in start.iter_mut().enumerate() {
                let ptr = bias.as_ptr().wrapping_add(c + v * lanes);
                // SAFETY: the channels exist.
                *start = unsafe { if TAIL { T::load_masked(isa, mask, ptr) } else { T::load(isa, ptr) } };
            }
        }
        let mut sums = [start; P];
        ask::<T, I>(isa, &mut self.ahead[0], P * V * results.asks);
        ask::<T, I>(isa, &mut self.ahead[1], P * V);
        let first = (row * self.window.extent[1] + p) * results.step;
        for taps in results.taps.as_chunks::<K>().0 {
            let x = self.window.copy.as_ptr().wrapping_add((taps[0].0 + first) * V * lanes);
            for v in 0..V {
                // What the row's taps see of these pixels, each value loaded once.
                let mut seen = [T::splat(isa, T::default()); SEEN];
                for (i, value) in seen.iter_mut().enumerate() {
                    // SAFETY: a pixel of the window, as was asserted.
                    *value = unsafe { T::load_wide(isa, x.wrapping_add((i * results.step * V + v) * lanes)) };
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
        let y = self.y.wrapping_add(results.first + row * results.strides[0] + p * results.strides[1] + c);
        for (i, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe {
                    let ptr = y.add(i * results.strides[1] + v * lanes);
                    if TAIL { T::store_masked(isa, mask, ptr, sum) } else { T::store(isa, ptr, sum) }
                }
            }
        }
    }
}

impl<T: Element> Kernel for CheckedWindowConv<'_, T> {
    /// Where [`WindowConv::ahead`] would go on.
    type Output = [*const T; 2];

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) -> [*const T; 2] {
        let Self(conv) = &mut self;
        conv.window.check::<I>();
        let (lanes, channels) = (T::lanes::<I>(), conv.window.channels);
        for (c, several) in vectors(channels, lanes) {
            // SAFETY: promised to `promise`; all these channels exist, but for those that the mask leaves out.
            unsafe {
                if several {
                    conv.channels::<I, VECTORS, false>(isa, c, T::mask(isa, lanes));
                } else {
                    conv.channels::<I, 1, true>(isa, c, T::mask(isa, (channels - c).min(lanes)));
                }
            }
        }
        conv.ahead
    }
}

/// `sums[t][c] += sum over pixels p of g[p][c] * x[p][t][c]` for a rectangle of gradients and all taps `t` of a kernel.
pub struct WindowSums<'a, T: Element> {
    /// What the gradients' results see.
    pub window: Window<'a, T>,
    /// Rows and columns of taps.
    pub kernel: usize,
    /// Pixels of the window from one result's to the next one's.
    pub step: usize,
    /// The gradient by the output.
    pub g: *const T,
    /// Its rows and columns.
    pub size: [usize; 2],
    /// Values from one row, and from one pixel, to the next.
    pub g_strides: [usize; 2],
    /// `channels` sums for each tap.
    pub sums: &'a mut [T::Wide],
    /// How many vectors of the input to ask for with each of the gradient.
    pub asks: usize,
    /// See [`WindowConv::ahead`].
    pub ahead: [*const T; 2],
}

/// A [`WindowSums`] that may run: see [`WindowSums::promise`].
pub struct CheckedWindowSums<'a, T: Element>(WindowSums<'a, T>);

/// Rows of a kernel whose sums registers hold, beside a gradient and a value.
const fn sum_rows(registers: usize, kernel: usize) -> usize {
    match (registers - 2) / kernel {
        0 => 1,
        rows if rows < kernel => rows,
        _ => kernel,
    }
}

impl<'a, T: Element> WindowSums<'a, T> {
    /// Turns the description into a kernel.
    ///
    /// # Safety
    /// Until it has run, `channels` values must be readable at every pixel of `g`.
    #[inline]
    pub unsafe fn promise(self) -> CheckedWindowSums<'a, T> {
        let seen = self.size.map(|len| len.saturating_sub(1) * self.step + self.kernel);
        assert!(seen[0] <= self.window.extent[0] && seen[1] <= self.window.extent[1], "window");
        assert_eq!(self.sums.len(), self.kernel * self.kernel * self.window.channels, "sums");
        CheckedWindowSums(self)
    }

    /// All channels, for a kernel of `K` rows and columns.
    ///
    /// # Safety
    /// As for [`WindowSums::promise`]; the window must have been checked.
    #[inline(always)]
    unsafe fn all<I: Isa, const K: usize>(&mut self, isa: I) {
        let (lanes, channels) = (T::lanes::<I>(), self.window.channels);
        for (c, several) in vectors(channels, lanes) {
            // SAFETY: the caller's promise; all these channels exist, but for those that the mask leaves out.
            unsafe {
                if several {
                    self.channels::<I, VECTORS, false, K>(isa, c, T::mask(isa, lanes));
                } else {
                    self.channels::<I, 1, true, K>(isa, c, T::mask(isa, (channels - c).min(lanes)));
                }
            }
        }
    }

    /// `V` vectors of channels from `c`, for a kernel of `K` rows and columns.
    ///
    /// # Safety
    /// As for [`WindowSums::promise`]; the channels must exist, but for what `mask` leaves out.
    #[inline(always)]
    unsafe fn channels<I: Isa, const V: usize, const TAIL: bool, const K: usize>(
        &mut self,
        isa: I,
        c: usize,
        mask: T::Mask<I>,
    ) {
        // SAFETY: the caller's promise; the rows are the kernel's.
        unsafe {
            self.window.copy::<I, V, TAIL>(isa, c, mask);
            for v in 0..V {
                let mut row = 0;
                while row < K {
                    // Constants: what registers do not hold is not compiled.
                    row += if const { sum_rows(I::REGISTER_COUNT, K) == K } {
                        self.rows::<I, V, TAIL, K, K>(isa, c, v, mask, row)
                    } else if const { sum_rows(I::REGISTER_COUNT, K) >= 4 } && row + 4 <= K {
                        self.rows::<I, V, TAIL, K, 4>(isa, c, v, mask, row)
                    } else if const { sum_rows(I::REGISTER_COUNT, K) >= 2 } && row + 2 <= K {
                        self.rows::<I, V, TAIL, K, 2>(isa, c, v, mask, row)
                    } else {
                        self.rows::<I, V, TAIL, K, 1>(isa, c, v, mask, row)
                    };
                }
            }
        }
    }

    /// `R` rows of taps from `first`, for vector `v` of those from `c`; returns how many rows these are.
    ///
    /// # Safety
    /// As for [`WindowSums::channels`].
    #[inline(always)]
    unsafe fn rows<I: Isa, const V: usize, const TAIL: bool, const K: usize, const R: usize>(
        &mut self,
        isa: I,
        c: usize,
        v: usize,
        mask: T::Mask<I>,
        first: usize,
    ) -> usize {
        let (lanes, [rows, columns], width) = (T::lanes::<I>(), self.size, self.window.extent[1]);
        // The first rows ask for all.
        let (c, asks) = (c + v * lanes, if first == 0 { [self.asks, 1] } else { [0, 0] });
        let mut sums = [[T::splat(isa, T::default()); K]; R];
        for row in 0..rows {
            let mut g = self.g.wrapping_add(row * self.g_strides[0] + c);
            let mut x = self.window.copy.as_ptr().wrapping_add(((row * self.step + first) * width * V + v) * lanes);
            for _ in 0..columns {
                ask::<T, I>(isa, &mut self.ahead[0], asks[0]);
                ask::<T, I>(isa, &mut self.ahead[1], asks[1]);
                // SAFETY: the caller's promise.
                let gradient = unsafe { if TAIL { T::load_masked(isa, mask, g) } else { T::load(isa, g) } };
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (k, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: a pixel of the window, as was asserted.
                        let value = unsafe { T::load_wide(isa, x.wrapping_add((r * width + k) * V * lanes)) };
                        *sum = T::mul_add(isa, gradient, value, *sum);
                    }
                }
                g = g.wrapping_add(self.g_strides[1]);
                x = x.wrapping_add(self.step * V * lanes);
            }
        }
        for (tap, &sum) in sums.as_flattened().iter().enumerate() {
            let ptr = self.sums.as_mut_ptr().wrapping_add((first * K + tap) * self.window.channels + c);
            // SAFETY: inside `sums`, whose length was asserted.
            unsafe {
                if TAIL {
                    T::store_wide_masked(isa, mask, ptr, T::add_vectors(isa, T::load_wide_masked(isa, mask, ptr), sum));
                } else {
                    T::store_wide(isa, ptr, T::add_vectors(isa, T::load_wide(isa, ptr), sum));
                }
            }
        }
        R
    }
}

impl<T: Element> Kernel for CheckedWindowSums<'_, T> {
    /// See [`WindowConv`].
    type Output = [*const T; 2];

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) -> [*const T; 2] {
        self.0.window.check::<I>();
        // SAFETY: promised to `promise`; the window has just been checked.
        unsafe {
            match self.0.kernel {
                3 => self.0.all::<I, 3>(isa),
                5 => self.0.all::<I, 5>(isa),
                7 => self.0.all::<I, 7>(isa),
                kernel => unreachable!("{kernel} columns of taps"),
            }
        }
        self.0.ahead
    }
}
