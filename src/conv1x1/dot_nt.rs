//! The products of all rows of one set with all rows of another, summed over their pixels: a group's weight gradient in NCHW.
//!
//! Rows go through [`DotRows`] as they are, which keeps a vector of sums for each pair of rows. Where one set is much the
//! larger one and the other fills vectors, the small one's rows are transposed instead, and sums are
//! [`OuterProducts`] of its pixels with the large one's values, which then are read as they are too.

use std::marker::PhantomData;

use crate::microkernels::conv1x1_nchw::{DotRows, DotWidth, MAX_DOT_A, MAX_SINGLE_B, Rows, SumSlots};
use crate::microkernels::outer::{OuterProducts, PlaneTotals, Totals};
use crate::microkernels::row_copy::WidenRows;
use crate::microkernels::transpose::Transpose;
use crate::pool::{chunks, part};
use crate::scratch::{self, cut};
use crate::simd::element::{Element, lanes, writable};
use crate::simd::mul_acc::MulAcc;
use crate::simd::{IsaKind, Promised, line};

/// Multiply-adds of outer products that take as long as one of [`DotRows`] over rows whose vectors are cache lines, and over
/// others. (Fitted to 31 layers on AVX-512 of an Intel Xeon and to 22 of an AMD EPYC: the faster way is found where it is
/// faster by a tenth. 16 of 31 x 31 to 96, 64 images: 1.3 and 1.0 ms; 32 of 14 x 14 to 32, 16 groups, 16 images: 1.4 and
/// 0.9; of 28 x 28 both take as long. AVX2: 15 of these take 19.8 ms by dots, 15.6 otherwise, 15.0 as chosen.)
const DOT: [f64; 2] = [1.75, 2.2];
/// Multiply-adds of outer products that take as long as transposing a value.
const TRANSPOSE: f64 = 1.5;
/// Pixels of the small set that are transposed at once, at most.
const TILE_PIXELS: usize = 512;
/// Values of these, about: they stay in the L2 cache. (512 channels of 14 x 14 to 512, 2 groups, 16 images: 13.8 ms, 16.9 with
/// half as many, 14.9 with twice.)
const TILE_VALUES: usize = 256 << 10;
/// Rows of the large set that are copied at a time, where sums need copies. (16 layers of kEffNet-B0 at 32x32, 32 images, bfloat16, a
/// thread of an Intel Xeon: 14.1 ms without copies, 11.8 with, and so with 8, 32 and 64 rows.)
const COPIED_ROWS: usize = 16;

/// The products of `a` rows with `b` rows.
#[derive(Clone, Copy)]
pub(crate) struct RowProducts<T, M> {
    isa: IsaKind,
    products: M,
    values: PhantomData<T>,
    /// How many rows the sets have.
    rows: [usize; 2],
    way: Way,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Dot,
    /// With the `b` rows transposed.
    Outer,
    /// With the `a` rows transposed: sums are `[b][a]`.
    Swapped,
}

impl<T: Element, M: MulAcc<T>> RowProducts<T, M> {
    /// For so many `a` and `b` rows, at distances that are multiples of `pixels`.
    pub fn new(isa: IsaKind, products: M, rows: [usize; 2], pixels: usize) -> Self {
        let [a, b] = rows;
        let lanes = lanes::<T>(isa);
        let outer = |wide: usize, rows: usize| TRANSPOSE * wide as f64 + (rows * wide.div_ceil(lanes)) as f64;
        let dot = DOT[usize::from(!pixels.is_multiple_of(lanes))] * (a * b) as f64 / lanes as f64;
        let way = if dot <= outer(a, b).min(outer(b, a)) {
            Way::Dot
        } else if outer(b, a) <= outer(a, b) {
            Way::Outer
        } else {
            Way::Swapped
        };
        Self { isa, products, values: PhantomData, rows, way }
    }

    /// Values of memory for sums, which are zero at the beginning.
    pub fn memory(&self) -> usize {
        let pairs = self.rows[0] * self.rows[1];
        if self.way == Way::Dot { pairs * line::<T::Wide>() } else { pairs }
    }

    /// Adds the products of all `a` rows with all `b` rows to the sums in `memory`; `size` is the number of images and of
    /// pixels.
    ///
    /// # Safety
    /// The rows of all images must be readable over so many pixels, and what is between them.
    pub unsafe fn add(&self, a: Rows<'_, T>, b: Rows<'_, T>, size: [usize; 2], memory: &mut [T::Wide]) {
        assert_eq!([a.offsets.len(), b.offsets.len()], self.rows, "rows");
        assert_eq!(memory.len(), self.memory(), "memory");
        // SAFETY: the caller's promise.
        unsafe {
            match self.way {
                Way::Dot => self.dot(a, b, size, memory),
                Way::Outer => self.outer(a, b, size, memory),
                Way::Swapped => self.outer(b, a, size, memory),
            }
        }
    }

    /// Writes the sums to `[a][b]`.
    pub fn finish(&self, memory: &[T::Wide], sums: &mut [T::Wide]) {
        let [a, b] = self.rows;
        assert_eq!(sums.len(), a * b, "sums");
        match self.way {
            Way::Dot => self.isa.run(SumSlots(memory, sums)),
            Way::Outer => sums.copy_from_slice(memory),
            Way::Swapped => {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = memory[i % b * a + i / b];
                }
            }
        }
    }

    /// Adds to `[a][b]` slots.
    ///
    /// # Safety
    /// As for [`RowProducts::add`].
    unsafe fn dot(&self, a: Rows<'_, T>, b: Rows<'_, T>, [images, pixels]: [usize; 2], slots: &mut [T::Wide]) {
        let (m, k) = (a.offsets.len(), b.offsets.len());
        let width = if m == 1 { MAX_SINGLE_B } else { self.isa.run(DotWidth) };
        let (a_tiles, b_tiles) = (m.div_ceil(MAX_DOT_A), k.div_ceil(width));
        for i in (0..a_tiles).map(|i| part(m, a_tiles, i)) {
            for j in (0..b_tiles).map(|j| part(k, b_tiles, j)) {
                // The first tile of each row asks: of the a rows for what follows all of them, of the b rows for the next
                // tile's. (480 channels of 16 x 16 to 80, 20 groups, 128 images: 2.0 ms of two threads of an AMD EPYC
                // without asking, 1.5 with all that follows, 1.2 so.)
                let b_next = b.offsets.get(j.end).copied().unwrap_or(b.offsets[0].wrapping_add(b.ahead));
                let b_ahead = b_next.wrapping_sub(b.offsets[j.start]);
                let kernel = DotRows {
                    products: self.products,
                    a: Rows { offsets: &a.offsets[i.clone()], ahead: if j.start == 0 { a.ahead } else { 0 }, ..a },
                    b: Rows {
                        offsets: &b.offsets[j.clone()],
                        ahead: if i.start == 0 && b.ahead != 0 { b_ahead } else { 0 },
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
    /// As for [`RowProducts::add`].
    unsafe fn outer(&self, a: Rows<'_, T>, b: Rows<'_, T>, [images, pixels]: [usize; 2], sums: &mut [T::Wide]) {
        let (rows, columns) = (a.offsets.len(), b.offsets.len());
        // Vectors of all columns are inside cache lines.
        let pitch = columns.next_multiple_of(lanes::<T>(self.isa));
        let tile = (TILE_VALUES / pitch).clamp(1, TILE_PIXELS).min(pixels);
        // Rows that are copied go through the first cache, a line apart from multiples of its size.
        let (block, copied) = if M::COPIES { (COPIED_ROWS, tile + line::<T::Wide>()) } else { (rows, 0) };
        let copies: Vec<_> = (0..block * copied).step_by(copied.max(1)).collect();
        scratch::with(tile * pitch, |transposed: &mut [T]| {
            scratch::with(tile * pitch + block * copied, |memory: &mut [T::Wide]| {
                let [steps, copy] = cut(memory, [tile * pitch, block * copied]);
                for (n, pixels) in (0..images).flat_map(|n| chunks(0..pixels, tile).map(move |pixels| (n, pixels))) {
                    let terms = pixels.len();
                    // SAFETY: the caller's promise; the target has room for so many pixels.
                    unsafe {
                        let rows = b.base.add(n * b.image_stride + pixels.start);
                        transpose(self.isa, rows, b.offsets, terms, (&mut *transposed, pitch), b.ahead);
                    }
                    let packed = self.products.steps(self.isa, &transposed[..terms * pitch], pitch, &mut *steps);
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
                        // SAFETY: as above; there is a sum for each pair.
                        self.isa.run(unsafe {
                            let sums = sums.as_mut_ptr().add(block.start * columns);
                            Promised::new_unchecked(OuterProducts {
                                products: self.products,
                                a: values,
                                a_step: M::TERMS,
                                a_rows: offsets,
                                a_ahead: if M::COPIES { 0 } else { a.ahead },
                                b: packed.as_ptr(),
                                b_step: pitch,
                                b_ahead: 0,
                                terms,
                                columns,
                                out: PlaneTotals {
                                    products: self.products,
                                    totals: Totals::<T> { sums, row: columns },
                                },
                            })
                        });
                    }
                }
            });
        });
    }
}

/// Writes `pixels` pixels of the rows to `[pixel][row]`, a pixel every `pitch`.
///
/// # Safety
/// The rows must be readable over so many pixels.
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

/// Places that are at equal distances: the first one's index, how many there are, and the distance.
fn equidistant(places: &[usize]) -> impl Iterator<Item = (usize, usize, usize)> + use<'_> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let rest = places.get(first..).filter(|rest| !rest.is_empty())?;
        let stride = rest.get(1).and_then(|next| next.checked_sub(rest[0])).unwrap_or(0);
        let count = 1 + rest.windows(2).take_while(|pair| pair[0] + stride == pair[1]).count();
        let run = (first, count, stride);
        first += count;
        Some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::mul_acc::Fma;

    #[test]
    fn rows_anywhere_give_the_sums_of_their_products() {
        const PIXELS: usize = 37;
        // Two images of 40 rows, in no order and some twice.
        let values: Vec<f64> = (0..2 * 40 * PIXELS).map(|i| (i * 7919 % 13) as f64 - 6.0).collect();
        let offsets = |rows: usize, step: usize| (0..rows).map(|i| i * step % 40 * PIXELS).collect::<Vec<_>>();
        for isa in IsaKind::available() {
            for (m, k) in [(1, 1), (3, 2), (13, 37), (25, 9), (8, 40), (40, 16)] {
                let (a_offsets, b_offsets) = (offsets(m, 3), offsets(k, 31));
                for way in [Way::Dot, Way::Outer, Way::Swapped] {
                    let row_products = RowProducts { way, ..RowProducts::new(isa, Fma, [m, k], PIXELS) };
                    let rows = |offsets| Rows { base: values.as_ptr(), offsets, image_stride: 40 * PIXELS, ahead: 0 };
                    let mut memory = vec![0.0; row_products.memory()];
                    let mut sums = vec![f64::NAN; m * k];
                    // SAFETY: the rows of both images are in `values`.
                    unsafe { row_products.add(rows(&a_offsets), rows(&b_offsets), [2, PIXELS], &mut memory) };
                    row_products.finish(&memory, &mut sums);
                    for (i, j) in (0..m).flat_map(|i| (0..k).map(move |j| (i, j))) {
                        let places = (0..2).flat_map(|n| (0..PIXELS).map(move |p| n * 40 * PIXELS + p));
                        let sum: f64 = places.map(|p| values[a_offsets[i] + p] * values[b_offsets[j] + p]).sum();
                        assert_eq!(sums[i * k + j], sum, "{} {way:?} {m} x {k}, {i} {j}", isa.name());
                    }
                }
            }
        }
    }
}
