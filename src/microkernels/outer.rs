//! Sums of outer products: the grouped pointwise convolution and its weight gradient over NHWC
//! memory as it stands, and the weight gradient over NCHW planes of which one side's are
//! transposed.
//!
//! Where a pixel's channels are contiguous, a group's channels can be the vector dimension, and
//! nothing is transposed:
//!
//! ```text
//!   y[p][o]  = sum over i of x[p][i] * w[i][o]      forward; input gradient: roles exchanged
//!   gw[o][i] = sum over p of g[p][o] * x[p][i]      weight gradient
//! ```
//!
//! Both are `out[r][c] = sum over t of a[t][r] * b[t][c]`: `a` is read value by value, `b` vector
//! by vector, and a tile of `R` rows x `V` vectors of sums stays in registers. It is
//! [`crate::microkernels::conv1x1_nchw::Conv1x1Nchw`] with pixels and channels exchanged; vectors
//! are filled as far as a group's channels fill them.

use crate::pool::part;
use crate::simd::element::{Element, is_scalar};
use crate::simd::mul_acc::{MulAcc, has_code};
use crate::simd::{Isa, RawKernel, line};

/// The most rows of a tile.
const MAX_ROWS: usize = 8;
/// The same without vectors.
const MAX_SCALAR_ROWS: usize = 4;
/// The most vectors of a tile.
const MAX_VECTORS: usize = 3;
/// Steps that are taken at a time: the rows' offsets, which are more than registers, are read once
/// for all.
const STEPS: usize = 4;

/// What the rows and terms of `a` are.
#[derive(Clone, Copy, PartialEq)]
pub enum Values {
    /// Rows are pixels, terms their channels.
    Pixels,
    /// Rows are channels, terms the pixels that have them.
    Channels,
    /// Rows are planes, terms their pixels.
    Planes,
}

/// Rows of a tile beside `vectors` vectors: as many as the registers hold with a vector each of `b`
/// and a value of `a`.
const fn tile_rows<T: Element, I: Isa>(vectors: usize) -> usize {
    let rows = (I::REGISTER_COUNT - 1 - vectors) / vectors;
    let most = if is_scalar::<T, I>() { MAX_SCALAR_ROWS } else { MAX_ROWS };
    if rows > most { most } else { rows }
}

/// Where sums start and where they go.
pub trait Sums<T: Element> {
    /// What `a` stands for.
    const VALUES: Values;
    /// What `a` holds.
    type Value: Copy;
    /// See [`Pixels::next`].
    fn next(&self) -> *const T {
        std::ptr::null()
    }
    /// The values at `ptr` of one step, for every column; of `terms` that are still to come, if it
    /// takes several.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn splat<I: Isa>(&self, isa: I, terms: usize, ptr: *const Self::Value) -> T::Vector<I>;
    /// What the sums of each row start from, at `column`; `mask` selects the columns there are.
    ///
    /// # Safety
    /// The selected columns must exist.
    unsafe fn start<I: Isa>(&self, isa: I, column: usize, mask: T::Mask<I>) -> T::Vector<I>;
    /// Takes a row's finished sums from `column` on: all of a vector, or the columns that a mask
    /// selects.
    ///
    /// # Safety
    /// The row and the columns must exist.
    unsafe fn finish<I: Isa>(&self, isa: I, row: usize, column: usize, mask: Option<T::Mask<I>>, value: T::Vector<I>);
}

/// The pixels of a convolution's result: sums start from the bias and are stored.
pub struct Pixels<'a, T, M> {
    /// How they are added up.
    pub mul_acc: M,
    /// Row `r` starts at `y + r * row`.
    pub y: *mut T,
    /// Distance from row to row.
    pub row: usize,
    /// One value for each column.
    pub bias: Option<&'a [T]>,
    /// As many values as the pixels have are prefetched from here on, line after line, at even
    /// intervals: all lines at once would exceed the line-fill buffers.
    pub next: *const T,
    /// Distance from what is written to what is prefetched meanwhile; 0 where that is in a cache.
    pub prefetch: usize,
}

/// Sums that are added to what is there.
pub struct Totals<T: Element> {
    /// Row `r` starts at `sums + r * row`.
    pub sums: *mut T::Wide,
    /// Distance from row to row.
    pub row: usize,
}

impl<T: Element, M: MulAcc<T>> Sums<T> for Pixels<'_, T, M> {
    const VALUES: Values = Values::Pixels;
    type Value = M::Value;

    #[inline(always)]
    fn next(&self) -> *const T {
        self.next
    }
    #[inline(always)]
    unsafe fn splat<I: Isa>(&self, isa: I, terms: usize, ptr: *const M::Value) -> T::Vector<I> {
        // SAFETY: the caller's promise.
        unsafe { self.mul_acc.splat(isa, terms, ptr) }
    }

    #[inline(always)]
    unsafe fn start<I: Isa>(&self, isa: I, column: usize, mask: T::Mask<I>) -> T::Vector<I> {
        match self.bias {
            // SAFETY: the selected columns have a bias each.
            Some(bias) => unsafe { T::load_masked(isa, mask, bias.as_ptr().add(column)) },
            None => T::splat(isa, T::default()),
        }
    }
    #[inline(always)]
    unsafe fn finish<I: Isa>(&self, isa: I, row: usize, column: usize, mask: Option<T::Mask<I>>, value: T::Vector<I>) {
        // SAFETY: the caller's promise.
        unsafe {
            let ptr = self.y.add(row * self.row + column);
            if self.prefetch > 0 {
                isa.prefetch_l2(ptr.wrapping_add(self.prefetch));
            }
            self.mul_acc.store(isa, mask, ptr, value);
        }
    }
}

impl<T: Element> Sums<T> for Totals<T> {
    const VALUES: Values = Values::Channels;
    type Value = T::Wide;

    #[inline(always)]
    unsafe fn splat<I: Isa>(&self, isa: I, _terms: usize, ptr: *const T::Wide) -> T::Vector<I> {
        // SAFETY: the caller's promise.
        T::splat_wide(isa, unsafe { *ptr })
    }

    #[inline(always)]
    unsafe fn start<I: Isa>(&self, isa: I, _column: usize, _mask: T::Mask<I>) -> T::Vector<I> {
        // What is there is added at the end: sums of sums lose less than one long sum.
        T::splat(isa, T::default())
    }
    #[inline(always)]
    unsafe fn finish<I: Isa>(&self, isa: I, row: usize, column: usize, mask: Option<T::Mask<I>>, value: T::Vector<I>) {
        // SAFETY: the caller's promise.
        unsafe {
            let ptr = self.sums.add(row * self.row + column);
            match mask {
                Some(mask) => {
                    let sum = T::add_vectors(isa, T::load_wide_masked(isa, mask, ptr), value);
                    T::store_wide_masked(isa, mask, ptr, sum);
                }
                None => T::store_wide(isa, ptr, T::add_vectors(isa, T::load_wide(isa, ptr), value)),
            }
        }
    }
}

/// [`Totals`] of products with planes as they are.
pub struct PlaneTotals<T: Element, M> {
    /// How products are summed.
    pub mul_acc: M,
    /// The sums.
    pub totals: Totals<T>,
}

impl<T: Element, M: MulAcc<T>> Sums<T> for PlaneTotals<T, M> {
    const VALUES: Values = Values::Planes;
    type Value = M::Value;

    #[inline(always)]
    unsafe fn splat<I: Isa>(&self, isa: I, terms: usize, ptr: *const M::Value) -> T::Vector<I> {
        // SAFETY: the caller's promise, as for the others.
        unsafe { self.mul_acc.splat(isa, terms, ptr) }
    }
    #[inline(always)]
    unsafe fn start<I: Isa>(&self, isa: I, column: usize, mask: T::Mask<I>) -> T::Vector<I> {
        // SAFETY: as above.
        unsafe { self.totals.start(isa, column, mask) }
    }
    #[inline(always)]
    unsafe fn finish<I: Isa>(&self, isa: I, row: usize, column: usize, mask: Option<T::Mask<I>>, value: T::Vector<I>) {
        // SAFETY: as above.
        unsafe { self.totals.finish(isa, row, column, mask, value) }
    }
}

/// `out[r][c] = start + sum over t of a[t][r] * b[t][c]`.
///
/// # Safety
/// Until it has run, `a` and `b` must be readable for all terms, rows and columns, and all sums
/// there and nobody else's.
pub struct OuterProducts<'a, T: Element, M, S: Sums<T>> {
    /// How products are summed.
    pub mul_acc: M,
    /// The values of step `s` for row `r` stand at `a + s * a_stride + a_rows[r]`: those of pixels
    /// and planes as [`MulAcc::Value`], others packed by [`MulAcc::pack`].
    pub a: *const S::Value,
    /// Distance from step to step of `a`.
    pub a_stride: usize,
    /// One offset for each row.
    pub a_rows: &'a [usize],
    /// Distance from what is read of `a` to what is prefetched meanwhile, where rows are no pixels;
    /// of planes from the last tile's.
    pub a_prefetch: usize,
    /// Those of step `s` for column `c`, packed by [`MulAcc::pack`], stand at `b + s * b_stride +
    /// c`.
    pub b: *const T::Wide,
    /// Distance from step to step of `b`.
    pub b_stride: usize,
    /// As `a_prefetch`, where terms are pixels.
    pub b_prefetch: usize,
    /// Number of terms.
    pub terms: usize,
    /// Number of columns.
    pub columns: usize,
    /// What sums start from and where they go.
    pub out: S,
}

impl<'a, T: Element, M: MulAcc<T>, S: Sums<T>> OuterProducts<'a, T, M, S> {
    /// All rows of `V` vectors of columns from `column` on.
    ///
    /// # Safety
    /// As for [`OuterProducts`]; the columns must exist.
    #[inline(always)]
    unsafe fn rows<I: Isa, const V: usize>(&self, isa: I, column: usize) {
        let most = const { tile_rows::<T, I>(V) };
        // Pixels come in full tiles but for the last ones: few sizes will do, each of which is code
        // of its own.
        let few = S::VALUES == Values::Pixels;
        let mut row = 0;
        while row < self.a_rows.len() {
            let rest = (self.a_rows.len() - row).min(most);
            // SAFETY: tiles of the rows and columns there are.
            unsafe {
                row += match rest {
                    1 => self.tile::<I, 1, V>(isa, row, column),
                    2 => self.tile::<I, 2, V>(isa, row, column),
                    3 if few => self.tile::<I, 2, V>(isa, row, column),
                    3 => self.tile::<I, 3, V>(isa, row, column),
                    4 => self.tile::<I, 4, V>(isa, row, column),
                    5..=7 if few && const { tile_rows::<T, I>(V) > 6 } => self.tile::<I, 4, V>(isa, row, column),
                    5 => self.tile::<I, 5, V>(isa, row, column),
                    6 => self.tile::<I, 6, V>(isa, row, column),
                    7 => self.tile::<I, 7, V>(isa, row, column),
                    _ => self.tile::<I, MAX_ROWS, V>(isa, row, column),
                };
            }
        }
    }

    /// Adds the products of one step, of which `terms` are still to come.
    ///
    /// # Safety
    /// As for [`OuterProducts`]; the rows must exist, and so must the columns at `b`, of the last
    /// vector those that `mask` selects.
    #[inline(always)]
    unsafe fn step<I: Isa, const R: usize, const V: usize>(
        &self,
        isa: I,
        terms: usize,
        a: *const S::Value,
        b: *const T::Wide,
        mask: T::Mask<I>,
        rows: &[usize; R],
        sums: &mut [[T::Vector<I>; V]; R],
    ) {
        let lanes = T::lanes::<I>();
        let mut bs = [T::splat(isa, T::default()); V];
        // SAFETY: the caller's promise.
        unsafe {
            for (v, value) in bs.iter_mut().enumerate() {
                let ptr = b.add(v * lanes);
                if S::VALUES == Values::Channels {
                    isa.prefetch_l2(ptr.wrapping_add(self.b_prefetch));
                }
                *value = if v == V - 1 { T::load_wide_masked(isa, mask, ptr) } else { T::load_wide(isa, ptr) };
            }
            for (sums, &offset) in sums.iter_mut().zip(rows) {
                let value = self.out.splat(isa, terms, a.add(offset));
                for (sum, b) in sums.iter_mut().zip(bs) {
                    *sum = self.mul_acc.mul_add(isa, value, b, *sum);
                }
            }
        }
    }

    /// `R` rows of `V` vectors, the last one masked; returns `R`.
    ///
    /// # Safety
    /// As for [`OuterProducts`]; the rows and columns must exist.
    #[inline(always)]
    unsafe fn tile<I: Isa, const R: usize, const V: usize>(&self, isa: I, row: usize, column: usize) -> usize {
        // Nothing is compiled for more rows than there are registers for.
        if const { R > tile_rows::<T, I>(V) } {
            unreachable!("more rows than a tile has");
        }
        let lanes = T::lanes::<I>();
        let last = (self.columns - column - (V - 1) * lanes).min(lanes);
        let (all, mask) = (T::mask(isa, lanes), T::mask(isa, last));
        let mask_of = |v: usize| if v == V - 1 { mask } else { all };
        let mut sums = [[T::splat(isa, T::default()); V]; R];
        // SAFETY: rows and columns exist, for every term.
        unsafe {
            let rows: [usize; R] = std::array::from_fn(|r| *self.a_rows.get_unchecked(row + r));
            for sums in &mut sums {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = self.out.start(isa, column + v * lanes, mask_of(v));
                }
            }
            let line = line::<T>();
            let mut wanted = row * self.terms;
            let mut ahead = wanted;
            // Planes of the next tile.
            let next = self.a_rows.get(row + R).map_or(self.a_prefetch, |next| next.wrapping_sub(rows[0]));
            let (mut a, mut b, mut t) = (self.a, self.b.add(column), 0);
            // Pixels beside several vectors gain nothing.
            let several = S::VALUES == Values::Planes || S::VALUES == Values::Pixels && V == 1;
            while t < self.terms {
                let unrolled = several && t + STEPS * M::TERMS <= self.terms;
                match S::VALUES {
                    Values::Channels => isa.prefetch_l2(a.wrapping_add(rows[0] + self.a_prefetch)),
                    Values::Pixels if column == 0 => {
                        // As many values as all rows hold for these steps.
                        wanted += if unrolled { STEPS } else { 1 } * M::TERMS * R;
                        while ahead < wanted {
                            isa.prefetch_l2(self.out.next().wrapping_add(ahead));
                            ahead += line;
                        }
                    }
                    Values::Planes if column == 0 && t % line == 0 => {
                        for row in rows {
                            isa.prefetch_l2(a.wrapping_add(row).wrapping_add(next));
                        }
                    }
                    _ => {}
                }
                if unrolled {
                    for _ in 0..STEPS {
                        self.step(isa, self.terms - t, a, b, mask, &rows, &mut sums);
                        (a, b, t) = (a.wrapping_add(self.a_stride), b.wrapping_add(self.b_stride), t + M::TERMS);
                    }
                } else {
                    self.step(isa, self.terms - t, a, b, mask, &rows, &mut sums);
                    (a, b, t) = (a.wrapping_add(self.a_stride), b.wrapping_add(self.b_stride), t + M::TERMS);
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    let mask = (v == V - 1 && last < lanes).then_some(mask);
                    self.out.finish(isa, row + r, column + v * lanes, mask, sum);
                }
            }
        }
        R
    }
}

impl<T: Element, M: MulAcc<T>, S: Sums<T>> RawKernel for OuterProducts<'_, T, M, S> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        if !const { has_code::<T, M, I>() } {
            unreachable!("no instruction for pairs");
        }
        let (kernel, lanes) = (self, T::lanes::<I>());
        let vectors = kernel.columns.div_ceil(lanes);
        // A constant: only what is taken is compiled.
        let chunks = if const { is_scalar::<T, I>() } { vectors } else { vectors.div_ceil(MAX_VECTORS) };
        for chunk in 0..chunks {
            let range = part(vectors, chunks, chunk);
            // SAFETY: promised; the columns exist.
            unsafe {
                match range.len() {
                    1 => kernel.rows::<I, 1>(isa, range.start * lanes),
                    _ if const { is_scalar::<T, I>() } => unreachable!("single vectors"),
                    2 => kernel.rows::<I, 2>(isa, range.start * lanes),
                    _ => kernel.rows::<I, MAX_VECTORS>(isa, range.start * lanes),
                }
            }
        }
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

    /// Sums added to what is there, for every number of rows and vectors, whole and masked.
    fn check<T: Element>(isa: IsaKind) {
        let lanes = lanes::<T>(isa);
        for (rows, columns) in (1..=9).flat_map(|r| [1, lanes, 2 * lanes - 1, 3 * lanes, 3 * lanes + 1].map(|c| (r, c)))
        {
            for terms in [1, 4, 9] {
                let a: Vec<T::Wide> = (0..terms * rows).map(|i| number::<T>(i).widen()).collect();
                let b: Vec<T::Wide> = (0..terms * columns).map(|i| number::<T>(i + 2).widen()).collect();
                let mut sums = vec![T::ONE.widen(); rows * columns];
                let a_rows: Vec<_> = (0..rows).collect();
                let kernel = OuterProducts {
                    mul_acc: Fma,
                    a: a.as_ptr(),
                    a_stride: rows,
                    a_rows: &a_rows,
                    a_prefetch: 0,
                    b: b.as_ptr(),
                    b_stride: columns,
                    b_prefetch: 0,
                    terms,
                    columns,
                    out: Totals::<T> { sums: sums.as_mut_ptr(), row: columns },
                };
                // SAFETY: all terms, rows and columns are there, and a sum for each pair.
                isa.run(unsafe { Promised::new_unchecked(kernel) });
                for (r, c) in (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))) {
                    let products = (0..terms).map(|t| a[t * rows + r].to_f64() * b[t * columns + c].to_f64());
                    let (expected, actual) = (1.0 + products.sum::<f64>(), sums[r * columns + c].to_f64());
                    assert_eq!(actual, expected, "{} {rows} x {columns}, {terms} terms: {r}, {c}", isa.name());
                }
            }
        }
    }

    #[test]
    fn every_tile_sums_the_products() {
        for isa in IsaKind::available() {
            check::<f32>(isa);
            check::<f64>(isa);
            check::<bf16>(isa);
        }
    }
}
