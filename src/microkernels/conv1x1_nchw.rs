//! The grouped pointwise convolution over rows of pixels.
//!
//! [`Conv1x1Nchw`] keeps a tile of `R` output rows x `V` vectors of pixels in registers:
//!
//! ```text
//!              V vectors of pixels
//!   x row j   [ x0 ][ x1 ]            loaded once, used R times
//!   y row 0 += w[j][0] * ...          R x V accumulators
//!   y row 1 += w[j][1] * ...
//! ```
//!
//! The number of registers of the instruction set bounds the tile; the inner loop needs `V + R`
//! loads for `V * R` multiply-adds, so from 2 x 2 on the arithmetic is the limit, not the loads.

use std::marker::PhantomData;

use crate::simd::element::{Element, is_scalar, is_wide};
use crate::simd::mul_acc::{MulAcc, has_code};
use crate::simd::{Isa, Kernel, RawKernel};

/// The most output rows of one [`Conv1x1Nchw`] tile.
pub const MAX_ROWS: usize = 8;
/// Steps that the largest tiles of [`Conv1x1Nchw`] take at a time in long rows, whose offsets are
/// read less often so; with one for short rows in one function, sums would leave the registers.
const STEPS: usize = 4;
/// Pixels of a row that is long.
const LONG_ROW: usize = 1024;
/// What the sums of [`Conv1x1Nchw`] start from.
#[derive(Clone, Copy)]
pub enum Init<'a, T: Element> {
    /// Zero.
    Zero,
    /// A value for each output row.
    Bias(&'a [T]),
    /// The same, as it is computed with.
    WideBias(&'a [T::Wide]),
    /// What is in the output: for types that are stored as they are computed with.
    Output,
}

impl<'a, T: Element> Init<'a, T> {
    /// The bias, where there is one.
    pub fn bias(bias: Option<&'a [T]>) -> Self {
        bias.map_or(Self::Zero, Self::Bias)
    }

    /// The same of a bias as it is computed with.
    pub fn wide_bias(bias: Option<&'a [T::Wide]>) -> Self {
        bias.map_or(Self::Zero, Self::WideBias)
    }
}

/// Where the first output row of [`Conv1x1Nchw`] would start at offset 0.
#[derive(Clone, Copy)]
pub enum Output<T: Element> {
    /// Rows as values are stored.
    Stored(*mut T),
    /// Rows of the sums themselves.
    Wide(*mut T::Wide),
}

/// `y[r] = init[r] + sum over j of weights[j][r] * x[j]` for `R` output rows over `pixels` pixels.
///
/// # Safety
/// Until it has run, every input row must be readable and every output row writable over `pixels`
/// values (readable too for [`Init::Output`]), and outputs must overlap neither inputs nor each
/// other.
pub struct Conv1x1Nchw<'a, T: Element, M> {
    /// How products are summed.
    pub mul_acc: M,
    /// Input row `j` starts at `x + x_offsets[j]`.
    pub x: *const T,
    /// One offset for each input row.
    pub x_offsets: &'a [usize],
    /// Weights `[step][output row]`, packed by [`MulAcc::pack`]: a step takes one input row or two.
    pub weights: &'a [T::Wide],
    /// What sums start from.
    pub init: Init<'a, T>,
    /// Output row `r` starts at `y + y_offsets[r]`.
    pub y: Output<T>,
    /// One offset for each output row, at most [`MAX_ROWS`].
    pub y_offsets: &'a [usize],
    /// Length of a row.
    pub pixels: usize,
    /// Distances from what is read and written to what is prefetched meanwhile, which later calls
    /// will read and write; 0 where that is in a cache.
    pub prefetch: [usize; 2],
}

/// Vectors of pixels beside `rows` output rows: as many as the registers hold, three of them kept
/// for a vector of x, a weight and a spare. An even number where a step takes two rows, whose
/// values come in parts of two vectors.
const fn tile_vectors(registers: usize, rows: usize, terms: usize) -> usize {
    let vectors = (registers - 3) / rows;
    match vectors {
        3 if terms > 1 => 2,
        // A single row needs eight independent sums to hide the latency of the multiply-adds.
        8.. if rows == 1 => 8,
        4.. => 4,
        _ => vectors,
    }
}

/// How many of a tile's vectors come in pairs: the whole ones, as far as there are two.
const fn paired(vectors: usize, tail: bool) -> usize {
    (vectors - tail as usize) / 2 * 2
}

impl<'a, T: Element, M: MulAcc<T>> Conv1x1Nchw<'a, T, M> {
    /// What can be checked of a description.
    #[inline(always)]
    fn validate(&self) {
        let rows = self.y_offsets.len();
        assert!((1..=MAX_ROWS).contains(&rows), "output rows");
        assert_eq!(self.weights.len(), self.x_offsets.len().div_ceil(M::TERMS) * rows, "weights");
        match self.init {
            Init::Zero => {}
            Init::Bias(bias) => assert_eq!(bias.len(), rows, "bias"),
            Init::WideBias(bias) => assert_eq!(bias.len(), rows, "bias"),
            Init::Output => assert!(is_wide::<T>(), "sums are stored with rounding"),
        }
    }

    /// All pixels, with `R` rows, `S` steps at a time.
    ///
    /// # Safety
    /// As for [`Conv1x1Nchw`]; `R` must be the number of output rows.
    #[inline(always)]
    unsafe fn rows<I: Isa, const R: usize, const S: usize>(&self, isa: I) {
        // Nothing is compiled for more rows than a tile has.
        if const { R > max_rows::<T, I>() } {
            unreachable!("more rows than a tile has");
        }
        // A constant: only one arm is compiled.
        match const { tile_vectors(I::REGISTER_COUNT, R, M::TERMS) } {
            // SAFETY: the caller's promise.
            8 => unsafe { self.tiles::<I, R, 8, S>(isa) },
            // SAFETY: the caller's promise.
            4 => unsafe { self.tiles::<I, R, 4, S>(isa) },
            // SAFETY: the caller's promise.
            3 => unsafe { self.tiles::<I, R, 3, S>(isa) },
            // SAFETY: the caller's promise.
            2 => unsafe { self.tiles::<I, R, 2, S>(isa) },
            // SAFETY: the caller's promise.
            _ => unsafe { self.tiles::<I, R, 1, S>(isa) },
        }
    }

    /// # Safety
    /// As for [`Conv1x1Nchw::rows`].
    #[inline(always)]
    unsafe fn tiles<I: Isa, const R: usize, const V: usize, const S: usize>(&self, isa: I) {
        let lanes = T::lanes::<I>();
        let mut p = 0;
        // SAFETY: every tile ends at or before `pixels`; the last one masks what lies beyond.
        unsafe {
            while p + V * lanes <= self.pixels {
                self.tile::<I, R, V, false, S>(isa, p, T::mask(isa, lanes));
                p += V * lanes;
            }
            // What is left is less than V vectors, or nothing: up to four of them at a time.
            while p < self.pixels {
                let rest = self.pixels - p;
                let vectors = rest.div_ceil(lanes).min(4);
                let mask = T::mask(isa, (rest - (vectors - 1) * lanes).min(lanes));
                if vectors == 1 {
                    self.tile::<I, R, 1, true, 1>(isa, p, mask);
                } else if const { V >= 3 } && vectors == 2 {
                    self.tile::<I, R, 2, true, 1>(isa, p, mask);
                } else if const { V >= 4 } && vectors == 3 {
                    self.tile::<I, R, 3, true, 1>(isa, p, mask);
                } else if const { V >= 4 } {
                    self.tile::<I, R, 4, true, 1>(isa, p, mask);
                } else {
                    self.tile::<I, R, V, true, 1>(isa, p, mask);
                }
                p += vectors * lanes;
            }
        }
    }

    /// Adds the products of one step, of the input row at an offset and the next one.
    ///
    /// # Safety
    /// As for [`Conv1x1Nchw::tile`]; there must be `R` weights.
    #[inline(always)]
    unsafe fn step<I: Isa, const R: usize, const V: usize, const TAIL: bool>(
        &self,
        isa: I,
        [p, row]: [usize; 2],
        next: Option<usize>,
        mask: T::Mask<I>,
        weights: *const T::Wide,
        sums: &mut [[T::Vector<I>; V]; R],
    ) {
        let lanes = T::lanes::<I>();
        let paired = const { paired(V, TAIL) };
        if self.prefetch[0] > 0 {
            for v in 0..V {
                let ahead = p + v * lanes + self.prefetch[0];
                isa.prefetch_l2(self.x.wrapping_add(row + ahead));
                if let Some(next) = next {
                    isa.prefetch_l2(self.x.wrapping_add(next + ahead));
                }
            }
        }
        let mut x = [T::splat(isa, T::default()); V];
        for (v, x) in x.iter_mut().enumerate() {
            // The next tile's values: planes are often a page apart and read for a few cache lines
            // only, which hardware prefetchers do not follow.
            let ahead = p + (v + V) * lanes;
            isa.prefetch(self.x.wrapping_add(row + ahead));
            if let Some(next) = next {
                isa.prefetch(self.x.wrapping_add(next + ahead));
            }
            // SAFETY: inside the input rows.
            *x = unsafe {
                let part = if v < paired { v % 2 } else { 0 };
                let x = self.x.add(p + (v - part) * lanes);
                let (row, next) = (x.add(row), next.map(|next| x.add(next)));
                if v < paired {
                    self.mul_acc.load_part(isa, row, next, part)
                } else if TAIL && v == V - 1 {
                    self.mul_acc.load_masked(isa, mask, row, next)
                } else {
                    self.mul_acc.load(isa, row, next)
                }
            };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: there are R weights.
            let w = T::splat_wide(isa, unsafe { *weights.add(r) });
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = self.mul_acc.mul_add(isa, w, x, *sum);
            }
        }
    }

    /// `R` rows x `V` vectors from pixel `p`, `S` steps at a time; with `TAIL` the last vector is
    /// masked.
    ///
    /// # Safety
    /// As for [`Conv1x1Nchw::rows`]; the tile must end inside the row, but for what `mask` leaves
    /// out.
    #[inline(always)]
    unsafe fn tile<I: Isa, const R: usize, const V: usize, const TAIL: bool, const S: usize>(
        &self,
        isa: I,
        p: usize,
        mask: T::Mask<I>,
    ) {
        let lanes = T::lanes::<I>();
        let zero = T::splat(isa, T::default());
        let paired = const { paired(V, TAIL) };
        let mut sums = [[zero; V]; R];
        match self.init {
            Init::Zero => {}
            Init::Bias(bias) => {
                for (row, &bias) in sums.iter_mut().zip(bias) {
                    *row = [T::splat(isa, bias); V];
                }
            }
            Init::WideBias(bias) => {
                for (row, &bias) in sums.iter_mut().zip(bias) {
                    *row = [T::splat_wide(isa, bias); V];
                }
            }
            Init::Output => {
                let y = self.stored();
                for (row, &offset) in sums.iter_mut().zip(self.y_offsets) {
                    for (v, sum) in row.iter_mut().enumerate() {
                        // SAFETY: inside the output row.
                        *sum = unsafe {
                            let y = y.add(offset + p + v * lanes);
                            if TAIL && v == V - 1 { T::load_masked(isa, mask, y) } else { T::load(isa, y) }
                        };
                    }
                }
            }
        }
        let mut weights = self.weights.as_ptr();
        // SAFETY: the caller's promise; the weights hold R values for each step.
        unsafe {
            if const { M::TERMS == 1 } {
                let (several, rest) = self.x_offsets.as_chunks::<S>();
                for rows in several {
                    for &row in rows {
                        self.step::<I, R, V, TAIL>(isa, [p, row], None, mask, weights, &mut sums);
                        weights = weights.add(R);
                    }
                }
                for &row in rest {
                    self.step::<I, R, V, TAIL>(isa, [p, row], None, mask, weights, &mut sums);
                    weights = weights.add(R);
                }
            } else {
                let (pairs, rest) = self.x_offsets.as_chunks::<2>();
                for &[row, next] in pairs {
                    self.step::<I, R, V, TAIL>(isa, [p, row], Some(next), mask, weights, &mut sums);
                    weights = weights.add(R);
                }
                if let [row] = *rest {
                    self.step::<I, R, V, TAIL>(isa, [p, row], None, mask, weights, &mut sums);
                }
            }
        }
        if let (false, Output::Wide(y)) = (const { is_wide::<T>() }, self.y) {
            // SAFETY: the caller's promise.
            return unsafe { self.store_wide::<I, R, V, TAIL>(isa, y, p, mask, sums) };
        }
        let y = self.stored();
        for (r, row) in sums.into_iter().enumerate() {
            for (v, &value) in row.iter().enumerate() {
                // SAFETY: inside output row r; R offsets were asserted.
                unsafe {
                    let ptr = y.add(*self.y_offsets.get_unchecked(r) + p + v * lanes);
                    if self.prefetch[1] > 0 {
                        isa.prefetch_l2(ptr.wrapping_add(self.prefetch[1]));
                    }
                    if v < paired {
                        if v % 2 == 0 {
                            self.mul_acc.store_parts(isa, ptr, [value, row[v + 1]]);
                        }
                    } else {
                        self.mul_acc.store(isa, (TAIL && v == V - 1).then_some(mask), ptr, value);
                    }
                }
            }
        }
    }
}

/// What the tiles end with.
impl<T: Element, M: MulAcc<T>> Conv1x1Nchw<'_, T, M> {
    /// Where rows of stored values start.
    #[inline(always)]
    fn stored(&self) -> *mut T {
        match self.y {
            Output::Stored(y) => y,
            // Of what is stored as it is computed with.
            Output::Wide(y) => y.cast(),
        }
    }

    /// Stores a tile's sums themselves.
    ///
    /// # Safety
    /// As for [`Conv1x1Nchw::tile`].
    #[inline(always)]
    unsafe fn store_wide<I: Isa, const R: usize, const V: usize, const TAIL: bool>(
        &self,
        isa: I,
        y: *mut T::Wide,
        p: usize,
        mask: T::Mask<I>,
        sums: [[T::Vector<I>; V]; R],
    ) {
        let paired = const { paired(V, TAIL) };
        for (r, row) in sums.into_iter().enumerate() {
            for (v, &value) in row.iter().enumerate() {
                // SAFETY: inside output row r; R offsets were asserted.
                unsafe {
                    let ptr = y.add(*self.y_offsets.get_unchecked(r) + p + v * T::lanes::<I>());
                    if v < paired {
                        if v % 2 == 0 {
                            self.mul_acc.store_wide_parts(isa, ptr, [value, row[v + 1]]);
                        }
                    } else if TAIL && v == V - 1 {
                        T::store_wide_masked(isa, mask, ptr, value);
                    } else {
                        T::store_wide(isa, ptr, value);
                    }
                }
            }
        }
    }
}

impl<T: Element, M: MulAcc<T>> RawKernel for Conv1x1Nchw<'_, T, M> {
    type Output = ();

    #[inline(always)]
    fn check(&self) {
        self.validate();
    }

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        if !const { has_code::<T, M, I>() } {
            unreachable!("no instruction for pairs");
        }
        let kernel = self;
        // SAFETY: promised; the number of rows was checked.
        unsafe {
            match kernel.y_offsets.len() {
                1 => kernel.rows::<I, 1, 1>(isa),
                2 => kernel.rows::<I, 2, 1>(isa),
                3 => kernel.rows::<I, 3, 1>(isa),
                4 => kernel.rows::<I, 4, 1>(isa),
                5 => kernel.rows::<I, 5, 1>(isa),
                6 => kernel.rows::<I, 6, 1>(isa),
                7 => kernel.rows::<I, 7, 1>(isa),
                _ if M::TERMS == 1 && kernel.pixels >= LONG_ROW => kernel.rows::<I, 8, STEPS>(isa),
                _ => kernel.rows::<I, 8, 1>(isa),
            }
        }
    }
}

/// The most output rows of a tile: as many as leave room for two vectors of pixels; without
/// vectors, few, as each number of rows is code of its own.
const fn max_rows<T: Element, I: Isa>() -> usize {
    match I::REGISTER_COUNT {
        _ if is_scalar::<T, I>() => 4,
        32.. => MAX_ROWS,
        _ => 6,
    }
}

/// Output rows of a tile for rows of `pixels` pixels: where these are four whole vectors, as many
/// as leave room for all of them.
pub struct ConvHeight<T> {
    /// Pixels of a row.
    pub pixels: usize,
    /// The type of the values.
    pub values: PhantomData<T>,
}

impl<T: Element> Kernel for ConvHeight<T> {
    type Output = usize;

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> usize {
        let most = max_rows::<T, I>();
        if self.pixels == 4 * T::lanes::<I>() { most.min(6) } else { most }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::simd::element::lanes;
    use crate::simd::mul_acc::Fma;
    use crate::simd::{IsaKind, Promised};

    /// Small whole numbers, whose sums are exact in every type.
    fn number<T: Element>(i: usize) -> T {
        T::from_f64((i * 7919 % 7) as f64 - 3.0)
    }

    /// Every number of rows, with whole and masked vectors, short and long rows.
    fn check<T: Element, M: MulAcc<T>>(isa: IsaKind, mul_acc: M) {
        let (lanes, most) = (lanes::<T>(isa), isa.constant(ConvHeight::<T> { pixels: 0, values: PhantomData }));
        let exact = size_of::<T>() == size_of::<T::Wide>();
        let sizes = [1, lanes, 2 * lanes + 1, 4 * lanes, 9 * lanes - 1, LONG_ROW + 5];
        for (rows, pixels) in (1..=most).flat_map(|rows| sizes.map(|pixels| (rows, pixels))) {
            for (inputs, init) in [(1, 0), (2, 1), (5, 2)] {
                if cfg!(miri) && pixels > 64 || init == 2 && !exact {
                    continue;
                }
                let x: Vec<T> = (0..inputs * pixels).map(number).collect();
                let bias: Vec<T> = (0..rows).map(|r| number(r + 3)).collect();
                let weight = |j: usize, r: usize| number::<T>(j * 5 + r);
                let mut weights = Vec::new();
                for (j, r) in (0..inputs).step_by(M::TERMS).flat_map(|j| (0..rows).map(move |r| (j, r))) {
                    let second = M::TERMS > 1 && j + 1 < inputs;
                    weights.push(mul_acc.pack(weight(j, r), second.then(|| weight(j + 1, r))));
                }
                let before: Vec<T> = (0..rows * pixels).map(|i| number(i + 1)).collect();
                let (mut y, mut wide) = (before.clone(), vec![T::Wide::default(); rows * pixels]);
                let wide_bias: Vec<_> = bias.iter().map(|bias| bias.widen()).collect();
                let offsets = |rows: usize| (0..rows).map(|r| r * pixels).collect::<Vec<_>>();
                let kernel = |init, y| {
                    let (x_offsets, y_offsets) = (&offsets(inputs)[..], &offsets(rows)[..]);
                    let (x, weights, prefetch) = (x.as_ptr(), &weights[..], [0, 0]);
                    let kernel = Conv1x1Nchw { mul_acc, x, x_offsets, weights, init, y, y_offsets, pixels, prefetch };
                    // SAFETY: all rows are there, `pixels` long.
                    isa.run(unsafe { Promised::new_unchecked(kernel) });
                };
                kernel([Init::Zero, Init::Bias(&bias), Init::Output][init], Output::Stored(y.as_mut_ptr()));
                if init < 2 {
                    kernel([Init::Zero, Init::WideBias(&wide_bias)][init], Output::Wide(wide.as_mut_ptr()));
                    assert!(
                        y.iter().zip(&wide).all(|(y, wide)| y.widen() == *wide),
                        "{} {rows} x {pixels}",
                        isa.name()
                    );
                }
                for (r, p) in (0..rows).flat_map(|r| (0..pixels).map(move |p| (r, p))) {
                    let start = [0.0, bias[r].to_f64(), before[r * pixels + p].to_f64()][init];
                    let terms = (0..inputs).map(|j| weight(j, r).to_f64() * x[j * pixels + p].to_f64());
                    let (expected, actual) = (start + terms.sum::<f64>(), y[r * pixels + p].to_f64());
                    assert_eq!(actual, expected, "{} {rows} x {pixels}, {inputs} inputs: {r}, {p}", isa.name());
                }
            }
        }
    }

    #[test]
    fn every_tile_sums_the_products() {
        for isa in IsaKind::available() {
            check::<f32, _>(isa, Fma);
            check::<f64, _>(isa, Fma);
            check::<bf16, _>(isa, Fma);
            if let Some(dot) = bf16::bf16_dot(isa) {
                check::<bf16, _>(isa, dot);
            }
        }
    }
}
