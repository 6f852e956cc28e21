//! Tiles of NHWC memory to rows of pixels and back, through registers in blocks of 8 x 8, or halves
//! of them.

use crate::simd::element::Element;
use crate::simd::{Isa, Kernel, TransposeBlock};

/// Rows and columns of a block.
pub const BLOCK: usize = 8;
/// Rows or columns of half a block: where these cover what is left, or there are fewer than a
/// block's.
pub const HALF: usize = 4;

/// `dst[c * dst_stride + r] = src[r * src_stride + c]` for `r < rows`, `c < cols`.
pub struct Transpose<T> {
    rows: usize,
    cols: usize,
    src: *const T,
    src_stride: usize,
    dst: *mut T,
    dst_stride: usize,
    by_rows: bool,
    ahead: usize,
}

impl<T: Element> Transpose<T> {
    /// Pixels of NHWC memory (`rows` pixels of `cols` channels) to rows of pixels in a cache.
    ///
    /// Runs along the source's rows: memory is read in order.
    ///
    /// # Safety
    /// Until it has run, source and destination must be in bounds for the formula above and must
    /// not overlap.
    pub unsafe fn gather(size: [usize; 2], src: *const T, src_stride: usize, dst: *mut T, dst_stride: usize) -> Self {
        let [rows, cols] = size;
        Self { rows, cols, src, src_stride, dst, dst_stride, by_rows: true, ahead: rows * src_stride }
    }

    /// The same, but with another prefetch distance than to what follows the last
    /// row.
    pub fn ahead(self, ahead: usize) -> Self {
        Self { ahead, ..self }
    }

    /// Rows of pixels in a cache (`rows` channels of `cols` pixels) to pixels of NHWC memory.
    ///
    /// Runs along the destination's rows: memory is written in order.
    ///
    /// # Safety
    /// As for [`Transpose::gather`].
    pub unsafe fn scatter(size: [usize; 2], src: *const T, src_stride: usize, dst: *mut T, dst_stride: usize) -> Self {
        let [rows, cols] = size;
        Self { rows, cols, src, src_stride, dst, dst_stride, by_rows: false, ahead: cols * dst_stride }
    }
}

impl<T: Element> Kernel for Transpose<T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { rows, cols, src, src_stride, dst, dst_stride, ahead, .. } = self;
        if rows < HALF || cols < HALF {
            for r in 0..rows {
                for c in 0..cols {
                    // SAFETY: in bounds, promised to `new`.
                    unsafe { *dst.add(c * dst_stride + r) = *src.add(r * src_stride + c) }
                }
            }
            return;
        }
        let (outer, inner) = if self.by_rows { (rows, cols) } else { (cols, rows) };
        for (i, i_len) in blocks(outer) {
            for (j, j_len) in blocks(inner) {
                let [(row, height), (col, width)] =
                    if self.by_rows { [(i, i_len), (j, j_len)] } else { [(j, j_len), (i, i_len)] };
                // SAFETY: blocks end within the matrix.
                unsafe {
                    let (src, dst) = (src.add(row * src_stride + col), dst.add(col * dst_stride + row));
                    // A block's rows are half a cache line.
                    if ahead > 0 && j % (2 * BLOCK) == 0 {
                        for line in 0..i_len {
                            if self.by_rows {
                                isa.prefetch_l2(src.wrapping_add(line * src_stride + ahead));
                            } else {
                                isa.prefetch_l2(dst.wrapping_add(line * dst_stride + ahead));
                            }
                        }
                    }
                    let block = TransposeBlock { src, src_stride, dst, dst_stride };
                    match (height, width) {
                        (BLOCK, BLOCK) => T::transpose::<I, BLOCK, BLOCK>(isa, block),
                        (BLOCK, _) => T::transpose::<I, BLOCK, HALF>(isa, block),
                        (_, BLOCK) => T::transpose::<I, HALF, BLOCK>(isa, block),
                        _ => T::transpose::<I, HALF, HALF>(isa, block),
                    }
                }
            }
        }
    }
}

/// Starts and lengths of blocks that cover `size` rows or columns, of which there are [`HALF`] or
/// more.
///
/// Where the last block would end beyond them it overlaps the one before: it writes the same values
/// again, which is cheaper than any special case.
#[inline(always)]
pub fn blocks(size: usize) -> impl Iterator<Item = (usize, usize)> {
    let most = if size < BLOCK { HALF } else { BLOCK };
    (0..size).step_by(most).map(move |start| {
        let len = if size - start <= HALF { HALF } else { most };
        (start.min(size - len), len)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::IsaKind;

    #[test]
    fn every_size_around_the_block() {
        for isa in IsaKind::available() {
            // Few under Miri, which needs a millisecond for each value.
            let sizes = (0..20).filter(|size| !cfg!(miri) || [0, 1, 5, 8, 12, 17].contains(size));
            for (rows, cols) in sizes.clone().flat_map(|r| sizes.clone().map(move |c| (r, c))) {
                let src: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
                for make in [Transpose::gather, Transpose::scatter] {
                    let mut dst = vec![f32::NAN; rows * cols];
                    // SAFETY: both hold rows x cols values.
                    isa.run(unsafe { make([rows, cols], src.as_ptr(), cols, dst.as_mut_ptr(), rows) });
                    for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                        assert_eq!(dst[c * rows + r], src[r * cols + c], "{} {rows}x{cols}", isa.name());
                    }
                }
            }
        }
    }
}
