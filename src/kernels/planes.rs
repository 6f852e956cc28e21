//! The depthwise convolution over padded NCHW planes, pixels being the vector dimension.
//!
//! Both kernels go down a plane row by row and keep all results that a row of the input takes part in: [`Correlate`] the
//! output rows that are not complete yet, [`CorrelateSums`] the rows of the gradient that it still meets.
//!
//! ```text
//!                    y[t-2]  y[t-1]  y[t]        a kernel of 3 rows, stride 1
//!   x[t] * w[2][.]     +=
//!   x[t] * w[1][.]             +=
//!   x[t] * w[0][.]                     +=        then y[t-2] is complete
//! ```
//!
//! So a value is loaded once for each column of the kernel, not once for each of its taps, and rows of zeros above and
//! below the plane cost nothing. At stride 2 the planes are split by the parity of their rows and columns, and two rows of
//! the input come at each step.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::Element;
use super::pointwise::slot;
use crate::isa::{Isa, Kernel};

/// The most rows of a kernel.
pub const MAX_TAP_ROWS: usize = 7;
/// The most columns of a kernel in one [`CorrelateSums`].
const MAX_TAP_COLUMNS: usize = 5;

/// How many rows of taps there is code for that `kernel` rows fit into; those beyond are zero.
pub const fn tap_rows(kernel: usize, stride: usize) -> usize {
    match (stride, kernel) {
        (1, 0..=2) => 2,
        (2, 0..=3) => 3,
        (1, 4) => 4,
        (_, 4..=5) => 5,
        (_, 6..=7) => 7,
        _ => kernel,
    }
}

/// Evaluates an expression with the constants that stand for a stride and what [`tap_rows`] gives: rows of taps, rows of
/// the output that a row of the input takes part in, and the stride.
macro_rules! with_rows {
    ($stride:expr, $rows:expr, $K:ident $J:ident $S:ident => $body:expr) => {
        with_rows!($stride, $rows, $K $J $S => $body, 2 2 1, 3 3 1, 4 4 1, 5 5 1, 7 7 1, 3 2 2, 5 3 2, 7 4 2)
    };
    ($stride:expr, $rows:expr, $K:ident $J:ident $S:ident => $body:expr, $($k:literal $j:literal $s:literal),*) => {
        match ($stride, $rows) {
            $(($s, $k) => {
                const $K: usize = $k;
                const $J: usize = $j;
                const $S: usize = $s;
                $body
            })*
            (stride, rows) => unreachable!("{rows} rows of taps at stride {stride}: see tap_rows"),
        }
    };
}

/// Padded planes as a kernel's taps see them. Row `i` starts at `i % stride * part + i / stride * pitch`.
#[derive(Clone)]
pub struct View<'a, T> {
    /// The first tap of the first output pixel, and what follows.
    pub x: &'a [T],
    /// 1 or 2.
    pub stride: usize,
    /// From the part of the even rows to that of the odd ones.
    pub part: usize,
    /// From one row of a part to the next.
    pub pitch: usize,
    /// The rows that are not zero.
    pub real: Range<usize>,
    /// Where the view of each column of the kernel starts in a row.
    pub columns: &'a [usize],
}

impl<T: Element> View<'_, T> {
    /// That whole vectors of so many columns can be read in all rows.
    fn check<I: Isa>(&self, columns: usize) {
        assert!((1..=2).contains(&self.stride), "stride");
        let Some(last) = self.real.end.checked_sub(1) else { return };
        let row = (self.stride - 1) * self.part + last / self.stride * self.pitch;
        let column = self.columns.iter().max().copied().unwrap_or(0);
        assert!(self.x.len() >= row + column + columns.next_multiple_of(T::lanes::<I>()), "x");
    }

    /// Row `i`, from a column on.
    #[inline(always)]
    fn row(&self, i: usize, column: usize) -> *const T {
        self.x.as_ptr().wrapping_add(i % self.stride * self.part + i / self.stride * self.pitch + column)
    }
}

/// `y[t][p] = start + sum over taps of weights[tap] * x[stride * t + tap row][p + its column's view]`.
pub struct Correlate<'a, T> {
    /// The input.
    pub view: View<'a, T>,
    /// Rows of the kernel: what [`tap_rows`] says.
    pub tap_rows: usize,
    /// The kernel, `[column][row]`.
    pub weights: &'a [T],
    /// The bias.
    pub start: T,
    /// The output.
    pub y: &'a mut [MaybeUninit<T>],
    /// From one row of the output to the next.
    pub y_pitch: usize,
    /// Rows of the output, and their length.
    pub size: [usize; 2],
}

/// Vectors of pixels beside so many rows of sums.
const fn tile_vectors(registers: usize, rows: usize) -> usize {
    match (registers - 2) / (rows + 1) {
        4.. => 4,
        vectors => vectors,
    }
}

impl<T: Element> Correlate<'_, T> {
    /// `K` rows of taps at stride `S`: `J` rows of sums.
    #[inline(always)]
    fn rows<I: Isa, const K: usize, const J: usize, const S: usize>(&mut self, isa: I) {
        let lanes = T::lanes::<I>();
        let (mut at, end) = (0, self.size[1]);
        while at < end {
            let vectors = (end - at).div_ceil(lanes);
            // SAFETY: the tiles' columns are below `end`, but for the last vector's, which is masked.
            unsafe {
                // Constants: tiles that the registers do not hold are not compiled.
                if const { tile_vectors(I::REGISTER_COUNT, J) >= 4 } && vectors >= 4 {
                    at += self.tile::<I, K, J, S, 4>(isa, at);
                } else if const { tile_vectors(I::REGISTER_COUNT, J) >= 3 } && vectors >= 3 {
                    at += self.tile::<I, K, J, S, 3>(isa, at);
                } else if const { tile_vectors(I::REGISTER_COUNT, J) >= 2 } && vectors >= 2 {
                    at += self.tile::<I, K, J, S, 2>(isa, at);
                } else {
                    at += self.tile::<I, K, J, S, 1>(isa, at);
                }
            }
        }
    }

    /// `V` vectors of columns from `at`, all rows; returns how many columns these are.
    ///
    /// # Safety
    /// `run` must have checked the slices, and all vectors but the last one must end inside the rows.
    #[inline(always)]
    unsafe fn tile<I: Isa, const K: usize, const J: usize, const S: usize, const V: usize>(
        &mut self,
        isa: I,
        at: usize,
    ) -> usize {
        let lanes = T::lanes::<I>();
        let mask = T::mask(isa, (self.size[1] - at - (V - 1) * lanes).min(lanes));
        let start = T::splat(isa, self.start);
        let y = self.y.as_mut_ptr().cast::<T>();
        // Sums of output rows t, t - 1 ...
        let mut sums = [[start; V]; J];
        for t in 0..self.size[0] + J - 1 {
            for s in 0..S {
                let i = S * t + s;
                if !self.view.real.contains(&i) {
                    continue;
                }
                let row = self.view.row(i, at);
                for (column, weights) in self.view.columns.iter().zip(self.weights.chunks_exact(K)) {
                    let mut x = [start; V];
                    for (v, x) in x.iter_mut().enumerate() {
                        // SAFETY: `check` saw that whole vectors can be read.
                        *x = unsafe { T::load(isa, row.add(column + v * lanes)) };
                    }
                    for (j, sums) in sums.iter_mut().enumerate() {
                        if s + S * j < K {
                            let weight = T::splat(isa, weights[s + S * j]);
                            for (sum, x) in sums.iter_mut().zip(x) {
                                *sum = T::mul_add(isa, weight, x, *sum);
                            }
                        }
                    }
                }
            }
            if t + 1 >= J {
                for (v, &sum) in sums[J - 1].iter().enumerate() {
                    // SAFETY: a row of the output; the mask keeps the last vector inside it.
                    unsafe {
                        let ptr = y.add((t + 1 - J) * self.y_pitch + at + v * lanes);
                        if v == V - 1 { T::store_masked(isa, mask, ptr, sum) } else { T::store(isa, ptr, sum) }
                    }
                }
            }
            for j in (1..J).rev() {
                sums[j] = sums[j - 1];
            }
            sums[0] = [start; V];
        }
        V * lanes
    }
}

impl<T: Element> Kernel for Correlate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let [rows, columns] = self.size;
        if rows == 0 || columns == 0 {
            return;
        }
        self.view.check::<I>(columns);
        assert_eq!(self.weights.len(), self.view.columns.len() * self.tap_rows, "weights");
        assert!(self.y.len() >= (rows - 1) * self.y_pitch + columns, "y");
        with_rows!(self.view.stride, self.tap_rows, K J S => self.rows::<I, K, J, S>(isa));
    }
}

/// `sums[tap] += sum over t and p of g[t][p] * x[stride * t + tap row][p + its column's view]`: the weight gradient.
pub struct CorrelateSums<'a, T> {
    /// The input.
    pub view: View<'a, T>,
    /// Rows of the kernel: what [`tap_rows`] says.
    pub tap_rows: usize,
    /// The gradient by the output; zero where a column is none of the output's.
    pub g: &'a [T],
    /// From one row of the gradient to the next.
    pub g_pitch: usize,
    /// Rows of the gradient, and their length.
    pub size: [usize; 2],
    /// A slot (see [`slot`]) for each tap, `[column][row]`.
    pub slots: &'a mut [T],
}

/// Columns of taps beside so many rows of them and rows of the gradient.
const fn tile_columns(registers: usize, tap_rows: usize, rows: usize) -> usize {
    match (registers - 1 - rows) / tap_rows {
        0 => 1,
        columns @ 1..=MAX_TAP_COLUMNS => columns,
        _ => MAX_TAP_COLUMNS,
    }
}

impl<T: Element> CorrelateSums<'_, T> {
    /// `K` rows of taps at stride `S`: `J` rows of the gradient.
    #[inline(always)]
    fn rows<I: Isa, const K: usize, const J: usize, const S: usize>(&mut self, isa: I) {
        let (mut at, end) = (0, self.view.columns.len());
        while at < end {
            let columns = end - at;
            // SAFETY: the columns are below `end`.
            unsafe {
                if const { tile_columns(I::REGISTER_COUNT, K, J) >= 5 } && columns >= 5 {
                    at += self.tile::<I, K, J, S, 5>(isa, at);
                } else if const { tile_columns(I::REGISTER_COUNT, K, J) >= 3 } && columns >= 3 {
                    at += self.tile::<I, K, J, S, 3>(isa, at);
                } else if const { tile_columns(I::REGISTER_COUNT, K, J) >= 2 } && columns >= 2 {
                    at += self.tile::<I, K, J, S, 2>(isa, at);
                } else {
                    at += self.tile::<I, K, J, S, 1>(isa, at);
                }
            }
        }
    }

    /// `C` columns of taps from `at`, all pixels; returns how many columns these are.
    ///
    /// # Safety
    /// `run` must have checked the slices, and these columns must exist.
    #[inline(always)]
    unsafe fn tile<I: Isa, const K: usize, const J: usize, const S: usize, const C: usize>(
        &mut self,
        isa: I,
        at: usize,
    ) -> usize {
        let lanes = T::lanes::<I>();
        let zero = T::splat(isa, T::default());
        let slots = self.slots[at * K * slot::<T>()..(at + C) * K * slot::<T>()].as_mut_ptr();
        let columns: [usize; C] = std::array::from_fn(|c| self.view.columns[at + c]);
        let mut sums = [[zero; K]; C];
        for (i, sum) in sums.as_flattened_mut().iter_mut().enumerate() {
            // SAFETY: a slot is at least a vector long.
            *sum = unsafe { T::load(isa, slots.add(i * slot::<T>())) };
        }
        let [rows, len] = self.size;
        for p in (0..len).step_by(lanes) {
            let mask = T::mask(isa, (len - p).min(lanes));
            // Rows t, t - 1 ... of the gradient.
            let mut g = [zero; J];
            for t in 0..rows + J - 1 {
                for j in (1..J).rev() {
                    g[j] = g[j - 1];
                }
                g[0] = zero;
                if t < rows {
                    // SAFETY: row t of the gradient; the mask keeps the last vector inside it.
                    g[0] = unsafe { T::load_masked(isa, mask, self.g.as_ptr().add(t * self.g_pitch + p)) };
                }
                for s in 0..S {
                    let i = S * t + s;
                    if !self.view.real.contains(&i) {
                        continue;
                    }
                    let row = self.view.row(i, p);
                    for (column, sums) in columns.into_iter().zip(&mut sums) {
                        // SAFETY: `check` saw that whole vectors can be read.
                        let x = unsafe { T::load(isa, row.add(column)) };
                        for (j, &g) in g.iter().enumerate() {
                            if s + S * j < K {
                                sums[s + S * j] = T::mul_add(isa, g, x, sums[s + S * j]);
                            }
                        }
                    }
                }
            }
        }
        for (i, &sum) in sums.as_flattened().iter().enumerate() {
            // SAFETY: as for the loads.
            unsafe { T::store(isa, slots.add(i * slot::<T>()), sum) };
        }
        C
    }
}

impl<T: Element> Kernel for CorrelateSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let [rows, columns] = self.size;
        if rows == 0 || columns == 0 {
            return;
        }
        self.view.check::<I>(columns);
        assert_eq!(self.slots.len(), self.view.columns.len() * self.tap_rows * slot::<T>(), "slots");
        assert!(self.g.len() >= (rows - 1) * self.g_pitch + columns, "g");
        with_rows!(self.view.stride, self.tap_rows, K J S => self.rows::<I, K, J, S>(isa));
    }
}
