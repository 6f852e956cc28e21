//! Tiles of NHWC memory to rows of pixels and back, through registers in blocks of 8 x 8.

use super::Element;
use crate::isa::{Isa, Kernel};

const BLOCK: usize = 8;

/// `dst[c * dst_stride + r] = src[r * src_stride + c]` for `r < rows`, `c < cols`.
pub struct Transpose<T> {
    rows: usize,
    cols: usize,
    src: *const T,
    src_stride: usize,
    dst: *mut T,
    dst_stride: usize,
}

impl<T: Element> Transpose<T> {
    /// The transpose of `rows x cols` values at `src` to `dst`; a stride is the distance from one row to the next.
    ///
    /// # Safety
    /// Until it has run, source and destination must be in bounds for the formula above and must not overlap.
    pub unsafe fn new(
        [rows, cols]: [usize; 2],
        src: *const T,
        src_stride: usize,
        dst: *mut T,
        dst_stride: usize,
    ) -> Self {
        Self { rows, cols, src, src_stride, dst, dst_stride }
    }
}

impl<T: Element> Kernel for Transpose<T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { rows, cols, src, src_stride, dst, dst_stride } = self;
        if rows < BLOCK || cols < BLOCK {
            for r in 0..rows {
                for c in 0..cols {
                    // SAFETY: in bounds, promised to `new`.
                    unsafe { *dst.add(c * dst_stride + r) = *src.add(r * src_stride + c) }
                }
            }
            return;
        }
        // Where a size is no multiple of 8 the last block overlaps the one before it: it writes the same values
        // again, which is cheaper than any special case. Column blocks go outermost: long runs of writes.
        let mut c = 0;
        while c < cols {
            let col = c.min(cols - BLOCK);
            let mut r = 0;
            while r < rows {
                let row = r.min(rows - BLOCK);
                // SAFETY: row + 8 <= rows and col + 8 <= cols.
                unsafe {
                    T::transpose(
                        isa,
                        src.add(row * src_stride + col),
                        src_stride,
                        dst.add(col * dst_stride + row),
                        dst_stride,
                    );
                }
                r += BLOCK;
            }
            c += BLOCK;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Active;

    #[test]
    fn every_size_around_the_block() {
        for isa in Active::available() {
            for (rows, cols) in (0..20).flat_map(|r| (0..20).map(move |c| (r, c))) {
                let src: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
                let mut dst = vec![f32::NAN; rows * cols];
                // SAFETY: both hold rows x cols values.
                isa.run(unsafe { Transpose::new([rows, cols], src.as_ptr(), cols, dst.as_mut_ptr(), rows) });
                for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                    assert_eq!(dst[c * rows + r], src[r * cols + c], "{} {rows}x{cols}", isa.name());
                }
            }
        }
    }
}
