//! A·Bᵀ: the products of all rows of one set with all rows of another, summed over their pixels. It
//! is a group's weight gradient in NCHW.
//!
//! Rows go through [`DotNt`] as they are, which keeps a vector of sums for each pair of rows. Where
//! one set is much the larger one and the other fills vectors, the small one's rows are transposed
//! instead, and sums are [`OuterProducts`] of its pixels with the large one's values.

use std::marker::PhantomData;

use super::plan::{Algorithm, dot_nt_algorithm};
use crate::microkernels::dot_nt::{DotNt, DotTileOf, Rows};
use crate::microkernels::outer::{OuterProducts, PlaneTotals, Totals};
use crate::microkernels::reduce::SumSlots;
use crate::microkernels::row_copy::WidenRows;
use crate::microkernels::transpose::{BLOCK, Transpose};
use crate::plan::Caps;
use crate::pool::{chunks, part};
use crate::scratch::{self, cut};
use crate::simd::element::{Element, lanes, writable};
use crate::simd::mul_acc::MulAcc;
use crate::simd::{IsaKind, Promised, line};

/// Vectors of a panel of the small set's transposed rows: those of a register tile.
const PANEL_VECTORS: usize = 3;
/// Bytes of a panel: it stays in the L1 cache while all rows of the large set meet it.
const PANEL_BYTES: usize = 24 << 10;
/// Rows of the large set that are copied at a time, where sums need copies.
const COPIED_ROWS: usize = 16;

/// The products of `a` rows with `b` rows.
#[derive(Clone, Copy)]
pub(crate) struct MatmulNt<T, M> {
    isa: IsaKind,
    mul_acc: M,
    values: PhantomData<T>,
    /// How many rows the sets have.
    rows: [usize; 2],
    algorithm: Algorithm,
}

impl<T: Element, M: MulAcc<T>> MatmulNt<T, M> {
    /// For these numbers of `a` and `b` rows, at distances that are multiples of `pixels`, by the
    /// cheapest algorithm.
    pub fn new(isa: IsaKind, mul_acc: M, rows: [usize; 2], pixels: usize) -> Self {
        Self::with_algorithm(isa, mul_acc, rows, dot_nt_algorithm(&Caps::new::<T>(isa), rows, pixels))
    }

    /// By [`Algorithm::Dot`], [`Algorithm::OuterInput`] (the `b` rows transposed) or
    /// [`Algorithm::OuterGrad`] (the `a` rows transposed: sums are `[b][a]`).
    pub fn with_algorithm(isa: IsaKind, mul_acc: M, rows: [usize; 2], algorithm: Algorithm) -> Self {
        Self { isa, mul_acc, values: PhantomData, rows, algorithm }
    }

    /// Values of memory for sums, which are zero at the beginning.
    pub fn memory(&self) -> usize {
        let pairs = self.rows[0] * self.rows[1];
        if self.algorithm == Algorithm::Dot { pairs * line::<T::Wide>() } else { pairs }
    }

    /// Adds the products of all `a` rows with all `b` rows to the sums in `memory`; `size` is the
    /// number of images and of pixels.
    ///
    /// # Safety
    /// The rows of all images must be readable over these pixels, and what is between them.
    pub unsafe fn add(&self, a: Rows<'_, T>, b: Rows<'_, T>, size: [usize; 2], memory: &mut [T::Wide]) {
        assert_eq!([a.offsets.len(), b.offsets.len()], self.rows, "rows");
        assert_eq!(memory.len(), self.memory(), "memory");
        // SAFETY: the caller's promise.
        unsafe {
            match self.algorithm {
                Algorithm::Dot => self.dot(a, b, size, memory),
                Algorithm::OuterInput => self.outer(a, b, size, memory),
                _ => self.outer(b, a, size, memory),
            }
        }
    }

    /// Writes the sums to `[a][b]`, the rows `pitch` apart.
    pub fn finish(&self, memory: &[T::Wide], sums: &mut [T::Wide], pitch: usize) {
        let [a, b] = self.rows;
        assert!(b <= pitch && memory.len() == self.memory(), "sums");
        if self.algorithm == Algorithm::OuterGrad {
            assert!(sums.len() >= (a - 1) * pitch + b, "sums");
            // SAFETY: there is room for all of them.
            let sums = unsafe { Transpose::gather([b, a], memory.as_ptr(), a, sums.as_mut_ptr(), pitch).ahead(0) };
            return self.isa.run(sums);
        }
        for (sums, memory) in sums.chunks_mut(pitch).zip(memory.chunks_exact(memory.len() / a)) {
            match self.algorithm {
                Algorithm::Dot => self.isa.run(SumSlots(memory, &mut sums[..b])),
                _ => sums[..b].copy_from_slice(memory),
            }
        }
    }

    /// Adds to `[a][b]` slots.
    ///
    /// # Safety
    /// As for [`MatmulNt::add`].
    unsafe fn dot(&self, a: Rows<'_, T>, b: Rows<'_, T>, [images, pixels]: [usize; 2], slots: &mut [T::Wide]) {
        let (m, k) = (a.offsets.len(), b.offsets.len());
        let most = self.isa.constant(DotTileOf::<T>(PhantomData));
        let width = if m == 1 { most.single_b } else { most.b };
        let (a_tiles, b_tiles) = (m.div_ceil(most.a), k.div_ceil(width));
        for i in (0..a_tiles).map(|i| part(m, a_tiles, i)) {
            for j in (0..b_tiles).map(|j| part(k, b_tiles, j)) {
                // The first tile of each row prefetches: of the a rows what follows all of them, of
                // the b rows the next tile's.
                let b_next = b.offsets.get(j.end).copied().unwrap_or(b.offsets[0].wrapping_add(b.prefetch));
                let b_prefetch = b_next.wrapping_sub(b.offsets[j.start]);
                let kernel = DotNt {
                    mul_acc: self.mul_acc,
                    a: Rows {
                        offsets: &a.offsets[i.clone()],
                        prefetch: if j.start == 0 { a.prefetch } else { 0 },
                        ..a
                    },
                    b: Rows {
                        offsets: &b.offsets[j.clone()],
                        prefetch: if i.start == 0 && b.prefetch != 0 { b_prefetch } else { 0 },
                        ..b
                    },
                    images,
                    pixels,
                    sums: slots,
                    first_slot: i.start * k + j.start,
                    slot_stride: k,
                };
                // SAFETY: the caller's promise.
                self.isa.run(unsafe { Promised::new_unchecked(kernel) });
            }
        }
    }

    /// Adds to `[a][b]` sums.
    ///
    /// # Safety
    /// As for [`MatmulNt::add`].
    unsafe fn outer(&self, a: Rows<'_, T>, b: Rows<'_, T>, [images, pixels]: [usize; 2], sums: &mut [T::Wide]) {
        let (rows, columns) = (a.offsets.len(), b.offsets.len());
        // Vectors of a panel's columns are inside cache lines.
        let vector = lanes::<T>(self.isa).max(BLOCK);
        let panels = columns.div_ceil(PANEL_VECTORS * vector);
        let pitch = columns.div_ceil(panels * vector) * vector;
        let tile = (PANEL_BYTES / (pitch * size_of::<T::Wide>())).min(pixels).next_multiple_of(M::TERMS);
        // Rows that are copied go through the L1 cache, a line apart from multiples of its size.
        let (block, copied) = if M::COPIES { (COPIED_ROWS, tile + line::<T::Wide>()) } else { (rows, 0) };
        let copies: Vec<_> = (0..block * copied).step_by(copied.max(1)).collect();
        scratch::with(panels * tile * pitch, |transposed: &mut [T]| {
            scratch::with(panels * tile * pitch + block * copied, |memory: &mut [T::Wide]| {
                let [steps, copy] = cut(memory, [panels * tile * pitch, block * copied]);
                for (n, pixels) in (0..images).flat_map(|n| chunks(0..pixels, tile).map(move |pixels| (n, pixels))) {
                    let terms = pixels.len();
                    let len = terms.next_multiple_of(M::TERMS) * pitch;
                    for (to, columns) in transposed.chunks_mut(len).zip(chunks(0..columns, pitch)) {
                        to[terms * pitch..].fill(T::default());
                        // SAFETY: the caller's promise; the target has room for these pixels.
                        unsafe {
                            let rows = b.base.add(n * b.image_stride + pixels.start);
                            transpose(self.isa, rows, &b.offsets[columns], terms, (to, pitch), b.prefetch);
                        }
                    }
                    let packed = self.mul_acc.steps(self.isa, &transposed[..panels * len], pitch, &mut *steps);
                    let base = a.base.wrapping_add(n * a.image_stride + pixels.start);
                    for block in chunks(0..rows, block) {
                        let offsets = &a.offsets[block.clone()];
                        let (values, offsets) = if M::COPIES {
                            for (first, rows, stride) in equidistant(offsets) {
                                let len = (rows - 1) * stride + terms;
                                // SAFETY: the caller's promise.
                                let x = unsafe { std::slice::from_raw_parts(base.add(offsets[first]), len) };
                                let y = writable(&mut copy[first * copied..]);
                                let size = [rows, terms];
                                self.isa.run(WidenRows { x: (x, stride), y: (y, copied), size, ahead: 0 });
                            }
                            (copy.as_ptr().cast(), &copies[..offsets.len()])
                        } else {
                            (base.cast(), offsets)
                        };
                        for (panel, range) in chunks(0..columns, pitch).enumerate() {
                            // SAFETY: as above; there is a sum for each pair.
                            self.isa.run(unsafe {
                                let sums = sums.as_mut_ptr().add(block.start * columns + range.start);
                                Promised::new_unchecked(OuterProducts {
                                    mul_acc: self.mul_acc,
                                    a: values,
                                    a_stride: M::TERMS,
                                    a_rows: offsets,
                                    a_prefetch: if M::COPIES { 0 } else { a.prefetch },
                                    b: packed[panel * (packed.len() / panels)..].as_ptr(),
                                    b_stride: pitch,
                                    b_prefetch: 0,
                                    terms,
                                    columns: range.len(),
                                    out: PlaneTotals {
                                        mul_acc: self.mul_acc,
                                        totals: Totals::<T> { sums, row: columns },
                                    },
                                })
                            });
                        }
                    }
                }
            });
        });
    }
}

/// Writes `pixels` pixels of the rows to `[pixel][row]`, a pixel every `pitch`.
///
/// # Safety
/// The rows must be readable over these pixels.
unsafe fn transpose<T: Element>(
    isa: IsaKind,
    base: *const T,
    offsets: &[usize],
    pixels: usize,
    (to, pitch): (&mut [T], usize),
    ahead: usize,
) {
    assert!(offsets.len() <= pitch && to.len() >= pixels * pitch, "room");
    for (first, rows, stride) in equidistant(offsets) {
        // SAFETY: the caller's promise; there is room for all rows.
        isa.run(unsafe {
            let to = to.as_mut_ptr().add(first);
            Transpose::gather([rows, pixels], base.add(offsets[first]), stride, to, pitch).ahead(ahead)
        });
    }
}

/// Offsets at equal distances: the first one's index, how many there are, and the distance.
fn equidistant(offsets: &[usize]) -> impl Iterator<Item = (usize, usize, usize)> + use<'_> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let rest = offsets.get(first..).filter(|rest| !rest.is_empty())?;
        let stride = rest.get(1).and_then(|next| next.checked_sub(rest[0])).unwrap_or(0);
        let count = 1 + rest.windows(2).take_while(|pair| pair[0] + stride == pair[1]).count();
        let run = (first, count, stride);
        first += count;
        Some(run)
    })
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::simd::mul_acc::Fma;

    /// Two images of 40 rows, in no order and some twice, by each algorithm.
    fn check<T: Element, M: MulAcc<T>>(isa: IsaKind, mul_acc: M) {
        const PIXELS: usize = if cfg!(miri) { 37 } else { 389 };
        let values: Vec<T> = (0..2 * 40 * PIXELS).map(|i| T::from_f64((i * 7919 % 5) as f64 - 2.0)).collect();
        let offsets = |rows: usize, step: usize| (0..rows).map(|i| i * step % 40 * PIXELS).collect::<Vec<_>>();
        for (m, k) in [(1, 1), (3, 2), (13, 37), (25, 9), (8, 40), (40, 16), (1, 9), (3, 60), (60, 2)] {
            let (a_offsets, b_offsets) = (offsets(m, 3), offsets(k, 31));
            for algorithm in [Algorithm::Dot, Algorithm::OuterInput, Algorithm::OuterGrad] {
                let products = MatmulNt::with_algorithm(isa, mul_acc, [m, k], algorithm);
                let rows = |offsets| Rows { base: values.as_ptr(), offsets, image_stride: 40 * PIXELS, prefetch: 0 };
                let mut memory = vec![T::Wide::default(); products.memory()];
                let mut sums = vec![T::Wide::from_f64(f64::NAN); m * k];
                // SAFETY: the rows of both images are in `values`.
                unsafe { products.add(rows(&a_offsets), rows(&b_offsets), [2, PIXELS], &mut memory) };
                products.finish(&memory, &mut sums, k);
                for (i, j) in (0..m).flat_map(|i| (0..k).map(move |j| (i, j))) {
                    let pixels = (0..2).flat_map(|n| (0..PIXELS).map(move |p| n * 40 * PIXELS + p));
                    let product = |p: usize| values[a_offsets[i] + p].to_f64() * values[b_offsets[j] + p].to_f64();
                    let (sum, actual) = (pixels.map(product).sum::<f64>(), sums[i * k + j].to_f64());
                    assert_eq!(actual, sum, "{} {algorithm:?} {m} x {k}, {i} {j}", isa.name());
                }
            }
        }
    }

    #[test]
    fn rows_anywhere_give_the_sums_of_their_products() {
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
