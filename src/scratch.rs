//! Temporary memory of a kernel: one buffer a thread and slot, reused from call to call.

use std::cell::RefCell;

use crate::memory;
use crate::simd::LINE_BYTES;
use crate::simd::element::Element;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE_BYTES]);
const _: () = assert!(align_of::<Line>() == LINE_BYTES);

thread_local! {
    static BUFFERS: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `body` with `len` values of temporary memory, aligned to a cache line and of unknown
/// content (old values, never uninitialised memory). Calls nest. Without enough memory,
/// [`memory::no_memory`] ends the operation.
pub fn with<T: Element, R>(len: usize, body: impl FnOnce(&mut [T]) -> R) -> R {
    let lines = len.saturating_mul(size_of::<T>()).div_ceil(LINE_BYTES);
    let mut buffer = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < lines {
        buffer.clear();
        memory::reserve(&mut buffer, lines);
        buffer.resize(lines, Line([0; LINE_BYTES]));
    }
    // SAFETY: the buffer holds at least `len` initialised values, is aligned beyond any element's
    // alignment, and every bit pattern is a value of a floating-point element.
    let slice = unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast::<T>(), len) };
    let result = body(slice);
    BUFFERS.with_borrow_mut(|buffers| buffers.push(buffer));
    result
}

/// Cuts memory into pieces of these sizes.
pub fn cut<T, const N: usize>(memory: &mut [T], sizes: [usize; N]) -> [&mut [T]; N] {
    let mut rest = memory;
    sizes.map(|size| {
        let (piece, others) = std::mem::take(&mut rest).split_at_mut(size);
        rest = others;
        piece
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn nested_buffers_are_distinct_and_aligned() {
        super::with(5, |a: &mut [f32]| {
            a.fill(1.0);
            super::with(9, |b: &mut [f64]| {
                b.fill(2.0);
                assert_eq!((a.as_ptr() as usize % 64, b.as_ptr() as usize % 64), (0, 0));
            });
            assert!(a.iter().all(|v| *v == 1.0));
        });
    }
}
