//! Large temporary memory, recycled: its first touch (a page fault for every 4 KiB) costs more than the arithmetic.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use crate::kernels::Element;

/// The size of a huge page; smaller memory is aligned to a cache line.
const HUGE_PAGE: usize = 2 << 20;
const LINE: usize = 64;
/// Blocks that are kept for later, at most; the smallest are given up first.
const KEPT: usize = 16;

struct Block {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a block owns its memory.
unsafe impl Send for Block {}

/// Free blocks, and the bytes of those in use.
static FREE: Mutex<(Vec<Block>, usize)> = Mutex::new((Vec::new(), 0));

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// Memory of unknown content that returns to the free blocks when it is dropped.
pub struct Memory(Option<Block>);

// SAFETY: shared references give access to nothing but the address.
unsafe impl Sync for Memory {}

fn free_blocks<R>(change: impl FnOnce(&mut Vec<Block>, &mut usize) -> R) -> R {
    // Each change leaves the list whole, so a panic elsewhere does no harm.
    let mut guard = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    let (blocks, used) = &mut *guard;
    change(blocks, used)
}

impl Memory {
    /// Memory for `len` values: a free block that is not over twice too large, else a new one.
    pub fn new<T: Element>(len: usize) -> Self {
        let bytes = (len * size_of::<T>()).max(LINE);
        let recycled = free_blocks(|blocks, used| {
            let fitting = blocks.iter().enumerate().filter(|(_, b)| (bytes..=2 * bytes).contains(&b.layout.size()));
            let block = fitting.min_by_key(|(_, b)| b.layout.size()).map(|(index, _)| index).map(|i| blocks.remove(i));
            *used += block.as_ref().map_or(0, |block| block.layout.size());
            block
        });
        Self(Some(recycled.unwrap_or_else(|| {
            let align = if bytes >= 2 * HUGE_PAGE { HUGE_PAGE } else { LINE };
            let layout = Layout::from_size_align(bytes.next_multiple_of(align), align).expect("sizes fit memory");
            // Zeroed, so that the memory may be handled as values; large memory comes zeroed anyway.
            // SAFETY: the size is not zero.
            let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
            #[cfg(target_os = "linux")]
            if align == HUGE_PAGE {
                // SAFETY: advice on memory of our own. Where it is not taken, pages are small.
                unsafe { libc::madvise(start.as_ptr().cast(), layout.size(), libc::MADV_HUGEPAGE) };
            }
            free_blocks(|_, used| *used += layout.size());
            Block { start, layout }
        })))
    }

    /// The memory as values that are yet to be written (zeros or values of an earlier use).
    pub fn as_mut<T: Element>(&mut self, len: usize) -> &mut [MaybeUninit<T>] {
        let block = self.0.as_ref().expect("there until dropped");
        assert!(len * size_of::<T>() <= block.layout.size());
        // SAFETY: the block is long enough and aligned beyond any element; `MaybeUninit` asks for no content.
        unsafe { std::slice::from_raw_parts_mut(block.start.as_ptr().cast(), len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let Some(block) = self.0.take() else { return };
        let surplus = free_blocks(|blocks, used| {
            *used -= block.layout.size();
            blocks.push(block);
            let smallest = blocks.iter().enumerate().min_by_key(|(_, block)| block.layout.size()).map(|(i, _)| i);
            smallest.filter(|_| blocks.len() > KEPT).map(|i| blocks.swap_remove(i))
        });
        drop(surplus);
    }
}

/// Calls `body` with `len` values of recycled memory, of unknown content.
pub(super) fn with<T: Element, R>(len: usize, body: impl FnOnce(&mut [MaybeUninit<T>]) -> R) -> R {
    body(Memory::new::<T>(len).as_mut(len))
}

/// Bytes of recycled memory: in use, and free.
pub fn memory_stats() -> (usize, usize) {
    free_blocks(|blocks, used| (*used, blocks.iter().map(|block| block.layout.size()).sum()))
}

/// Returns free memory to the system; gives the number of bytes.
pub fn release_memory() -> usize {
    free_blocks(|blocks, _| blocks.drain(..).map(|block| block.layout.size()).sum())
}
