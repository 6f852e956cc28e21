//! The depthwise convolution over NHWC pixels, channels being the vector dimension. (For NCHW:
//! [`dwconv_nchw`](super::dwconv_nchw).)
//!
//! A strip is a few rows of results. It goes over the image column by column, and what is loaded of
//! a column is added to all results that see it, whose sums stay in registers:
//!
//! ```text
//!   columns of the image         a   b   c   d   e
//!   results of column 0        w0 a  w1 b  w2 c              complete with c
//!   1                               w0 b  w1 c  w2 d         complete with d
//!   2                                    w0 c  w1 d  w2 e
//! ```
//!
//! So nothing is copied, no zeros are multiplied at the left and right, and what is read again are
//! only the rows of taps, from the L1 cache.

use crate::simd::element::{Element, masks_are_free, one_lane};
use crate::simd::{Isa, RawKernel};

/// Rows of results of a strip, at most.
pub const ROWS: usize = 4;

/// Rows of results of a strip: those whose sums registers hold, of `columns` each, beside a value
/// for each row, a weight and a start. Portable code has strips of one, to be small.
const fn strip_rows<T: Element, I: Isa>(columns: usize) -> usize {
    match (I::REGISTER_COUNT - 2) / (columns + 1) {
        _ if one_lane::<T, I>() => 1,
        ROWS.. => ROWS,
        2 | 3 => 2,
        _ => 1,
    }
}

/// An NHWC image, and what some results see of it.
#[derive(Clone, Copy)]
pub struct Window<'a, T> {
    /// The image.
    pub x: &'a [T],
    /// Its height and width.
    pub size: [usize; 2],
    /// Channels of a pixel.
    pub channels: usize,
    /// The row and column that the first result sees through the first tap; both may be outside the
    /// image.
    pub start: [isize; 2],
    /// Pixels from what one result sees to what the next does: 1 or 2.
    pub step: usize,
    /// Rows and columns of taps.
    pub taps: [usize; 2],
    /// How many vectors of the image to prefetch with one of results.
    pub prefetches: usize,
}

impl<T: Element> Window<'_, T> {
    fn check(&self) {
        assert!(self.x.len() >= self.size[0] * self.size[1] * self.channels, "x");
        assert!(self.channels > 0 && (1..=2).contains(&self.step), "step");
    }

    /// The image's column `i` columns behind the first one that is seen, if there is one.
    #[inline(always)]
    fn column(&self, i: usize) -> Option<usize> {
        let column = self.start[1].wrapping_add_unsigned(i) as usize;
        (column < self.size[1]).then_some(column)
    }

    /// Whether there is the row `i` rows behind the first one.
    #[inline(always)]
    fn has_row(&self, i: usize) -> bool {
        (self.start[0].wrapping_add_unsigned(i) as usize) < self.size[0]
    }

    /// Channel `c` of a row's first pixel, of the row `i` rows behind the first one.
    #[inline(always)]
    fn row(&self, i: usize, c: usize) -> *const T {
        let row = self.start[0].wrapping_add_unsigned(i).wrapping_mul((self.size[1] * self.channels) as isize);
        self.x.as_ptr().wrapping_offset(row).wrapping_add(c)
    }
}

/// Prefetches vectors of memory from `ptr` on, which it moves behind them.
#[inline(always)]
fn prefetch<T: Element, I: Isa>(isa: I, ptr: &mut *const T, vectors: usize) {
    for _ in 0..vectors {
        isa.prefetch_l2(*ptr);
        *ptr = ptr.wrapping_add(T::lanes::<I>());
    }
}

/// `y[p][c] = bias[c] + sum over taps t of w[t][c] * x[p][t][c]` for results `p` and all channels
/// `c`.
///
/// # Safety
/// Until it has run, `channels` values must be writable at every result.
pub struct DwConvNhwc<'a, T: Element> {
    /// What the results see.
    pub window: Window<'a, T>,
    /// The weights of a kernel, `[vector of channels][tap][lane]`.
    pub weights: &'a [T::Wide],
    /// How many taps that kernel has.
    pub kernel_taps: usize,
    /// The kernel's tap that is the first one here.
    pub first_tap: usize,
    /// From one row, and from one column, of taps to the next.
    pub tap_steps: [isize; 2],
    /// `channels` values.
    pub bias: Option<&'a [T]>,
    /// The first result.
    pub y: *mut T,
    /// From one row, and from one column, of results to the next.
    pub strides: [usize; 2],
    /// Rows and columns of results.
    pub size: [usize; 2],
    /// Where to prefetch from, line after line: of the input and of the output.
    pub prefetch: [*const T; 2],
}

impl<'a, T: Element> DwConvNhwc<'a, T> {
    /// What can be checked of a description.
    #[inline(always)]
    fn validate(&self) {
        self.window.check();
        assert!(self.bias.is_none_or(|bias| bias.len() == self.window.channels), "bias");
    }

    /// All results, through `K` columns of taps, of which one column of the image meets `F` at a
    /// step of `S`.
    ///
    /// # Safety
    /// As for [`DwConvNhwc`]; the weights must have been checked.
    #[inline(always)]
    unsafe fn all<I: Isa, const K: usize, const S: usize, const F: usize>(&mut self, isa: I) {
        let (lanes, channels) = (T::lanes::<I>(), self.window.channels);
        for c in (0..channels).step_by(lanes) {
            let mask = T::mask(isa, (channels - c).min(lanes));
            // SAFETY: the caller's promise; all these channels exist, but for those that the mask
            // leaves out.
            unsafe {
                if const { !masks_are_free::<T, I>() } && (const { one_lane::<T, I>() } || channels - c >= lanes) {
                    self.channels::<I, false, K, S, F>(isa, c, mask);
                } else {
                    self.channels::<I, true, K, S, F>(isa, c, mask);
                }
            }
        }
    }

    /// A vector of channels from `c`.
    ///
    /// # Safety
    /// As for [`DwConvNhwc::all`]; the channels must exist, but for what `mask` leaves out.
    #[inline(always)]
    unsafe fn channels<I: Isa, const TAIL: bool, const K: usize, const S: usize, const F: usize>(
        &mut self,
        isa: I,
        c: usize,
        mask: T::Mask<I>,
    ) {
        let (rows, mut row) = (self.size[0], 0);
        // SAFETY: the caller's promise; some of the last rows may be computed twice.
        unsafe {
            // A constant: what registers do not hold is not compiled.
            if const { strip_rows::<T, I>(F) == ROWS } {
                while row < rows && rows >= ROWS {
                    self.strip::<I, TAIL, K, S, F, ROWS>(isa, c, mask, row.min(rows - ROWS));
                    row += ROWS;
                }
            }
            if const { strip_rows::<T, I>(F) >= 2 } {
                while row < rows && rows >= 2 {
                    self.strip::<I, TAIL, K, S, F, 2>(isa, c, mask, row.min(rows - 2));
                    row += 2;
                }
            }
            while row < rows {
                self.strip::<I, TAIL, K, S, F, 1>(isa, c, mask, row);
                row += 1;
            }
        }
    }

    /// `J` rows of results from `row`.
    ///
    /// # Safety
    /// As for [`DwConvNhwc::channels`]; the rows must exist.
    #[inline(always)]
    unsafe fn strip<I: Isa, const TAIL: bool, const K: usize, const S: usize, const F: usize, const J: usize>(
        &mut self,
        isa: I,
        c: usize,
        mask: T::Mask<I>,
        row: usize,
    ) {
        let (window, [_, columns]) = (self.window, self.size);
        let start = match self.bias {
            // SAFETY: the channels exist.
            Some(bias) => unsafe { load::<T, I, TAIL>(isa, mask, bias.as_ptr().wrapping_add(c)) },
            None => T::splat(isa, T::default()),
        };
        let mut y = self.y.wrapping_add(row * self.strides[0] + c);
        // Sums of the columns of results that see a column of the image, the first one's first.
        let mut sums = [[start; J]; F];
        for t in 0..columns + F - 1 {
            // SAFETY: the caller's promise.
            unsafe {
                self.column::<I, TAIL, K, S, F, J, 0>(isa, c, mask, row, t, &mut sums);
                if S > 1 {
                    self.column::<I, TAIL, K, S, F, J, 1>(isa, c, mask, row, t, &mut sums);
                }
            }
            if t + 1 >= F {
                prefetch::<T, I>(isa, &mut self.prefetch[0], J * window.prefetches);
                prefetch::<T, I>(isa, &mut self.prefetch[1], J);
                for (j, &sum) in sums[0].iter().enumerate() {
                    let y = y.wrapping_add(j * self.strides[0]);
                    // SAFETY: the caller's promise.
                    unsafe { if TAIL { T::store_masked(isa, mask, y, sum) } else { T::store(isa, y, sum) } }
                }
                y = y.wrapping_add(self.strides[1]);
            }
            for f in 1..F {
                sums[f - 1] = sums[f];
            }
            sums[F - 1] = [start; J];
        }
    }

    /// Adds column `S * t + A` of the image to the sums of the results that see it.
    ///
    /// # Safety
    /// As for [`DwConvNhwc::strip`].
    #[inline(always)]
    unsafe fn column<
        I: Isa,
        const TAIL: bool,
        const K: usize,
        const S: usize,
        const F: usize,
        const J: usize,
        const A: usize,
    >(
        &self,
        isa: I,
        c: usize,
        mask: T::Mask<I>,
        row: usize,
        t: usize,
        sums: &mut [[T::Vector<I>; J]; F],
    ) {
        let (lanes, window) = (T::lanes::<I>(), self.window);
        let Some(column) = window.column(S * t + A) else { return };
        let [tap_row, tap_column] = self.tap_steps.map(|step| step * lanes as isize);
        let weights = self.weights.as_ptr().wrapping_add((c / lanes * self.kernel_taps + self.first_tap) * lanes);
        let inside = window.has_row(S * row) && window.has_row(S * (row + J - 1) + window.taps[0] - 1);
        let x = window.row(S * row, c).wrapping_add(column * window.channels);
        let row_len = window.size[1] * window.channels;
        for tap in 0..window.taps[0] {
            // Rows outside the image are zeros.
            let mut values = [T::splat(isa, T::default()); J];
            for (j, value) in values.iter_mut().enumerate() {
                if inside || window.has_row(S * (row + j) + tap) {
                    let x = x.wrapping_add((S * j + tap) * row_len);
                    // SAFETY: a pixel of the image; the channels exist.
                    *value = unsafe { load::<T, I, TAIL>(isa, mask, x) };
                }
            }
            for (f, sums) in sums.iter_mut().rev().enumerate() {
                if S * f + A < K {
                    let index = tap as isize * tap_row + (S * f + A) as isize * tap_column;
                    // SAFETY: inside the weights, as was asserted.
                    let weight = unsafe { T::load_wide(isa, weights.wrapping_offset(index)) };
                    for (sum, &value) in sums.iter_mut().zip(&values) {
                        *sum = T::mul_add(isa, weight, value, *sum);
                    }
                }
            }
        }
    }
}

/// A vector, or what `mask` selects of it.
///
/// # Safety
/// That must be readable at `ptr`.
#[inline(always)]
unsafe fn load<T: Element, I: Isa, const TAIL: bool>(isa: I, mask: T::Mask<I>, ptr: *const T) -> T::Vector<I> {
    // SAFETY: the caller's promise.
    unsafe { if TAIL { T::load_masked(isa, mask, ptr) } else { T::load(isa, ptr) } }
}

impl<T: Element> RawKernel for DwConvNhwc<'_, T> {
    /// Where [`DwConvNhwc::prefetch`] would go on.
    type Output = [*const T; 2];

    #[inline(always)]
    fn check(&self) {
        self.validate();
    }

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) -> [*const T; 2] {
        let mut conv = self;
        let (Window { taps: [rows, columns], step, channels, .. }, lanes) = (conv.window, T::lanes::<I>());
        assert!(conv.weights.len() >= channels.div_ceil(lanes) * conv.kernel_taps * lanes, "weights");
        let [down, right] = [(rows, 0), (columns, 1)].map(|(taps, axis)| (taps as isize - 1) * conv.tap_steps[axis]);
        let corners = [0, down, right, down + right].map(|taps| conv.first_tap.wrapping_add_signed(taps));
        assert!(corners.iter().all(|&tap| tap < conv.kernel_taps), "taps");
        // SAFETY: promised; the weights have just been checked.
        unsafe {
            match (columns, step) {
                (1, 1) => conv.all::<I, 1, 1, 1>(isa),
                (2, 1) => conv.all::<I, 2, 1, 2>(isa),
                (3, 1) => conv.all::<I, 3, 1, 3>(isa),
                (4, 1) => conv.all::<I, 4, 1, 4>(isa),
                (5, 1) => conv.all::<I, 5, 1, 5>(isa),
                (7, 1) => conv.all::<I, 7, 1, 7>(isa),
                (3, 2) => conv.all::<I, 3, 2, 2>(isa),
                (5, 2) => conv.all::<I, 5, 2, 3>(isa),
                (7, 2) => conv.all::<I, 7, 2, 4>(isa),
                (columns, step) => unreachable!("{columns} columns of taps at a step of {step}"),
            }
        }
        conv.prefetch
    }
}

/// `sums[t][c] += sum over pixels p of g[p][c] * x[p][t][c]` for a strip of gradients and all taps
/// `t` of a kernel.
///
/// # Safety
/// Until it has run, `channels` values must be readable at every pixel of `g`.
pub struct DwConvNhwcGradWeight<'a, T: Element> {
    /// What the gradients' results see.
    pub window: Window<'a, T>,
    /// The gradient by the output.
    pub g: *const T,
    /// From one row, and from one column, of it to the next.
    pub strides: [usize; 2],
    /// Its rows and columns.
    pub size: [usize; 2],
    /// The sums, `[vector of channels][row of taps][column][lane]`.
    pub sums: &'a mut [T::Wide],
    /// See [`DwConvNhwc::prefetch`].
    pub prefetch: [*const T; 2],
}

/// Rows of a kernel whose sums registers hold, beside a value for each of them, a gradient, and
/// what products need.
const fn sum_rows(registers: usize, kernel: usize) -> usize {
    match (registers - 1) / (kernel + 1) {
        0 => 1,
        rows if rows < kernel => rows,
        _ => kernel,
    }
}

impl<'a, T: Element> DwConvNhwcGradWeight<'a, T> {
    /// What can be checked of a description.
    #[inline(always)]
    fn validate(&self) {
        self.window.check();
        assert_eq!(self.window.taps[0], self.window.taps[1], "taps");
    }

    /// All channels, for a kernel of `K` rows and columns, of which one column of the image meets
    /// `F` at a step of `S`.
    ///
    /// # Safety
    /// As for [`DwConvNhwcGradWeight`]; the number of sums must have been checked.
    #[inline(always)]
    unsafe fn all<I: Isa, const K: usize, const S: usize, const F: usize>(&mut self, isa: I) {
        let (lanes, channels) = (T::lanes::<I>(), self.window.channels);
        for c in (0..channels).step_by(lanes) {
            let mask = T::mask(isa, (channels - c).min(lanes));
            // SAFETY: the caller's promise; all these channels exist, but for those that the mask
            // leaves out.
            unsafe {
                if const { !masks_are_free::<T, I>() } && (const { one_lane::<T, I>() } || channels - c >= lanes) {
                    self.channels::<I, false, K, S, F>(isa, c, mask);
                } else {
                    self.channels::<I, true, K, S, F>(isa, c, mask);
                }
            }
        }
    }

    /// A vector of channels from `c`.
    ///
    /// # Safety
    /// As for [`DwConvNhwcGradWeight::all`]; the channels must exist, but for what `mask` leaves
    /// out.
    #[inline(always)]
    unsafe fn channels<I: Isa, const TAIL: bool, const K: usize, const S: usize, const F: usize>(
        &mut self,
        isa: I,
        c: usize,
        mask: T::Mask<I>,
    ) {
        let mut tap = 0;
        while tap < K {
            // SAFETY: the caller's promise; the rows are the kernel's.
            unsafe {
                // Constants: what registers do not hold is not compiled.
                tap += if const { sum_rows(I::REGISTER_COUNT, K) == K } {
                    self.rows::<I, TAIL, K, S, F, K>(isa, c, mask, tap)
                } else if const { sum_rows(I::REGISTER_COUNT, K) >= 3 } && tap + 3 <= K {
                    self.rows::<I, TAIL, K, S, F, 3>(isa, c, mask, tap)
                } else if const { sum_rows(I::REGISTER_COUNT, K) >= 2 } && tap + 2 <= K {
                    self.rows::<I, TAIL, K, S, F, 2>(isa, c, mask, tap)
                } else {
                    self.rows::<I, TAIL, K, S, F, 1>(isa, c, mask, tap)
                };
            }
        }
    }

    /// `R` rows of taps from `tap`; returns how many these are.
    ///
    /// # Safety
    /// As for [`DwConvNhwcGradWeight::channels`].
    #[inline(always)]
    unsafe fn rows<I: Isa, const TAIL: bool, const K: usize, const S: usize, const F: usize, const R: usize>(
        &mut self,
        isa: I,
        c: usize,
        mask: T::Mask<I>,
        tap: usize,
    ) -> usize {
        let (lanes, [rows, columns]) = (T::lanes::<I>(), self.size);
        // The first rows prefetch for all.
        let prefetches = if tap == 0 { [self.window.prefetches, 1] } else { [0, 0] };
        let mut sums = [[T::splat(isa, T::default()); K]; R];
        for row in 0..rows {
            for t in 0..columns + F - 1 {
                if t < columns {
                    prefetch::<T, I>(isa, &mut self.prefetch[0], prefetches[0]);
                    prefetch::<T, I>(isa, &mut self.prefetch[1], prefetches[1]);
                }
                // SAFETY: the caller's promise.
                unsafe {
                    self.column::<I, TAIL, K, S, F, R, 0>(isa, c, mask, [row, tap], t, &mut sums);
                    if S > 1 {
                        self.column::<I, TAIL, K, S, F, R, 1>(isa, c, mask, [row, tap], t, &mut sums);
                    }
                }
            }
        }
        let first = (c / lanes * K + tap) * K * lanes;
        for (i, &sum) in sums.as_flattened().iter().enumerate() {
            let ptr = self.sums.as_mut_ptr().wrapping_add(first + i * lanes);
            // SAFETY: inside `sums`, whose length was asserted.
            unsafe { T::store_wide(isa, ptr, T::add_vectors(isa, T::load_wide(isa, ptr), sum)) }
        }
        R
    }

    /// Adds the products of column `S * t + A` of the image and the gradients of a row that see it.
    ///
    /// # Safety
    /// As for [`DwConvNhwcGradWeight::rows`].
    #[inline(always)]
    unsafe fn column<
        I: Isa,
        const TAIL: bool,
        const K: usize,
        const S: usize,
        const F: usize,
        const R: usize,
        const A: usize,
    >(
        &self,
        isa: I,
        c: usize,
        mask: T::Mask<I>,
        [row, tap]: [usize; 2],
        t: usize,
        sums: &mut [[T::Vector<I>; K]; R],
    ) {
        let window = self.window;
        let Some(column) = window.column(S * t + A) else { return };
        let first = S * row + tap;
        let x = window.row(first, c).wrapping_add(column * window.channels);
        let mut values = [T::splat(isa, T::default()); R];
        for (r, value) in values.iter_mut().enumerate() {
            if window.has_row(first + r) {
                // SAFETY: a pixel of the image; the channels exist.
                *value = unsafe { load::<T, I, TAIL>(isa, mask, x.wrapping_add(r * window.size[1] * window.channels)) };
            }
        }
        let g = self.g.wrapping_add(row * self.strides[0] + c);
        for f in 0..F {
            if S * f + A < K && t.wrapping_sub(f) < self.size[1] {
                // SAFETY: one of the gradients, by the caller's promise.
                let gradient = unsafe { load::<T, I, TAIL>(isa, mask, g.wrapping_add((t - f) * self.strides[1])) };
                for (sums, &value) in sums.iter_mut().zip(&values) {
                    sums[S * f + A] = T::mul_add(isa, gradient, value, sums[S * f + A]);
                }
            }
        }
    }
}

impl<T: Element> RawKernel for DwConvNhwcGradWeight<'_, T> {
    type Output = ();

    #[inline(always)]
    fn check(&self) {
        self.validate();
    }

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        let mut grad = self;
        let Window { taps: [kernel, _], step, channels, .. } = grad.window;
        let lanes = T::lanes::<I>();
        assert_eq!(grad.sums.len(), channels.div_ceil(lanes) * kernel * kernel * lanes, "sums");
        // SAFETY: promised; the number of sums has just been checked.
        unsafe {
            match (kernel, step) {
                (3, 1) => grad.all::<I, 3, 1, 3>(isa),
                (5, 1) => grad.all::<I, 5, 1, 5>(isa),
                (7, 1) => grad.all::<I, 7, 1, 7>(isa),
                (3, 2) => grad.all::<I, 3, 2, 2>(isa),
                (5, 2) => grad.all::<I, 5, 2, 3>(isa),
                (7, 2) => grad.all::<I, 7, 2, 4>(isa),
                (kernel, step) => unreachable!("a kernel of {kernel} columns at a step of {step}"),
            }
        }
    }
}
