//! Large memory, recycled: its first touch (a page fault for every 4 KiB) costs more than the
//! arithmetic on it.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;

use crate::lock::Lock;
use crate::simd::LINE_BYTES;
use crate::simd::element::Element;

/// Memory from this size on is recycled; the system's allocator keeps smaller blocks itself.
pub const RECYCLED: usize = 256 << 10;
/// Recycled and free memory together is at most this many times what was in use at once.
const SURPLUS: usize = 2;
/// A free block is at most this many times larger than what it is taken for: so the last, smaller
/// batch of an epoch finds what the others left.
const LARGEST_FIT: usize = 4;
/// More bytes than any machine has; sums of sizes up to this stay numbers.
pub const LARGEST: usize = isize::MAX as usize / 8;
/// The size of a huge page.
const HUGE_PAGE: usize = 2 << 20;

struct Block {
    /// What the allocator gave.
    base: NonNull<u8>,
    layout: Layout,
    /// The first address in it that is aligned, and the bytes from there on.
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: a block owns its memory.
unsafe impl Send for Block {}

impl Block {
    /// A block of this size, `None` where there is no memory for it.
    fn new(size: usize) -> Option<Self> {
        let recycled = size >= RECYCLED;
        let align = if size >= 2 * HUGE_PAGE { HUGE_PAGE } else { LINE_BYTES };
        // Large memory is aligned here and not by the allocator: it comes zeroed from the system,
        // untouched, but an allocator that aligns it clears it once more, on one thread and before
        // pages can be huge.
        let layout =
            if recycled { Layout::array::<u8>(size + align) } else { Layout::from_size_align(size, LINE_BYTES) };
        let layout = layout.ok()?;
        // SAFETY: the size is not zero.
        let base = unsafe { if recycled { alloc_zeroed(layout) } else { alloc(layout) } };
        let base = NonNull::new(base)?;
        let skipped = base.as_ptr().addr().next_multiple_of(align) - base.as_ptr().addr();
        // SAFETY: the layout has room for it; small memory is aligned and skips nothing.
        let start = unsafe { base.add(skipped) };
        if align == HUGE_PAGE {
            // SAFETY: memory of our own.
            unsafe { advise_huge_pages(start.as_ptr(), size) };
        }
        Some(Self { base, layout, start, size })
    }
}

/// Asks for huge pages for memory that is about to be written for the first time; where the system
/// does not give them, pages are small.
///
/// # Safety
/// The memory must be allocated.
unsafe fn advise_huge_pages(start: *mut u8, size: usize) {
    // Miri has no `madvise`.
    #[cfg(all(target_os = "linux", not(miri)))]
    // SAFETY: advice on whole pages of memory that exists; it does not change what the memory
    // holds.
    unsafe {
        libc::madvise(start.cast(), size, libc::MADV_HUGEPAGE);
    }
    #[cfg(any(not(target_os = "linux"), miri))]
    let _ = (start, size);
}

/// Asks for huge pages for large memory that others allocated and that is about to be written.
pub fn prepare<T>(memory: &mut [MaybeUninit<T>]) {
    let size = size_of_val(memory);
    if size < 2 * HUGE_PAGE {
        return;
    }
    let start = memory.as_mut_ptr().cast::<u8>();
    let skipped = start.addr().next_multiple_of(HUGE_PAGE) - start.addr();
    // SAFETY: the memory from the first address that a huge page can begin at, to the last.
    unsafe { advise_huge_pages(start.add(skipped), (size - skipped) / HUGE_PAGE * HUGE_PAGE) };
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// Free blocks, the least recently used first, and the sizes of all.
#[derive(Default)]
struct Blocks {
    free: Vec<Block>,
    free_bytes: usize,
    used_bytes: usize,
    /// The most bytes that were in use at once.
    peak: usize,
}

static BLOCKS: Lock<Blocks> = Lock::new(Blocks { free: Vec::new(), free_bytes: 0, used_bytes: 0, peak: 0 });

fn blocks<R>(change: impl FnOnce(&mut Blocks) -> R) -> R {
    BLOCKS.with(change)
}

/// There is not enough memory: what [`no_memory`] unwinds with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory {
    /// How many bytes were requested.
    pub bytes: usize,
}

impl std::fmt::Display for NoMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "there is no memory for {} bytes", self.bytes)
    }
}

/// Ends an operation for which there is not enough memory: [`catch`] tells its caller.
pub fn no_memory(bytes: usize) -> ! {
    resume_unwind(Box::new(NoMemory { bytes }))
}

/// The result of an operation, unless there was not enough memory.
pub fn catch<R>(operation: impl FnOnce() -> R) -> Result<R, NoMemory> {
    catch_unwind(AssertUnwindSafe(operation)).map_err(|panic| match panic.downcast::<NoMemory>() {
        Ok(no_memory) => *no_memory,
        Err(panic) => resume_unwind(panic),
    })
}

/// `vec![value; len]`, but where there is not enough memory [`no_memory`] ends the operation and
/// not the process.
pub fn filled<T: Clone>(value: T, len: usize) -> Vec<T> {
    let mut values = Vec::new();
    reserve(&mut values, len);
    values.resize(len, value);
    values
}

/// Makes room for `len` values in an empty vector; as for [`filled`].
pub fn reserve<T>(values: &mut Vec<T>, len: usize) {
    // What is recycled and free may be what is lacking.
    let mut reserve = || values.try_reserve_exact(len).is_ok();
    let reserved = reserve() || release_memory() > 0 && reserve();
    if !reserved {
        no_memory(len.saturating_mul(size_of::<T>()));
    }
}

impl Blocks {
    /// The smallest free block that is large enough, and not far too large.
    fn take(&mut self, size: usize) -> Option<Block> {
        let fitting =
            self.free.iter().enumerate().filter(|(_, block)| (size..=LARGEST_FIT * size).contains(&block.size));
        let (index, _) = fitting.min_by_key(|(_, block)| block.size)?;
        let block = self.free.remove(index);
        self.free_bytes -= block.size;
        self.count(block.size);
        Some(block)
    }

    fn count(&mut self, size: usize) {
        self.used_bytes += size;
        self.peak = self.peak.max(self.used_bytes);
    }

    /// Takes free blocks out until the rest is within bounds.
    fn surplus(&mut self) -> Vec<Block> {
        let mut gone = 0;
        for block in &self.free {
            if self.used_bytes + self.free_bytes <= SURPLUS * self.peak {
                break;
            }
            self.free_bytes -= block.size;
            gone += 1;
        }
        self.free.drain(..gone).collect()
    }
}

/// Memory of unknown content; large memory returns to the free blocks when it is dropped.
pub struct Memory(Option<Block>);

// SAFETY: shared references give access to nothing but the address.
unsafe impl Sync for Memory {}

impl Memory {
    /// Memory for `len` values, aligned to a cache line; as for [`filled`].
    pub fn new<T: Element>(len: usize) -> Self {
        Self::try_new::<T>(len).unwrap_or_else(|| no_memory(len.saturating_mul(size_of::<T>())))
    }

    /// Memory for `len` values, aligned to a cache line, `None` where there is not enough.
    pub fn try_new<T: Element>(len: usize) -> Option<Self> {
        let size = len
            .checked_mul(size_of::<T>())
            .filter(|&size| size <= LARGEST)?
            .next_multiple_of(LINE_BYTES)
            .max(LINE_BYTES);
        let block = if size < RECYCLED { Block::new(size) } else { Self::recycled(size) }?;
        if cfg!(debug_assertions) && !cfg!(miri) {
            // NaN shows where something is read that nobody has written. Miri sees that by itself.
            // SAFETY: the block's own memory.
            unsafe { block.start.write_bytes(0xff, block.size) };
        }
        Some(Self(Some(block)))
    }

    fn recycled(size: usize) -> Option<Block> {
        blocks(|blocks| blocks.take(size)).or_else(|| {
            let surplus = blocks(|blocks| {
                blocks.count(size);
                blocks.surplus()
            });
            drop(surplus);
            // Free blocks that do not fit may be what is lacking.
            let block = Block::new(size).or_else(|| (release_memory() > 0).then(|| Block::new(size)).flatten());
            if block.is_none() {
                blocks(|blocks| {
                    blocks.used_bytes = blocks.used_bytes.saturating_sub(size);
                    blocks.peak = blocks.used_bytes;
                });
            }
            block
        })
    }

    /// The memory as values that are yet to be written.
    pub fn as_mut<T: Element>(&mut self, len: usize) -> &mut [MaybeUninit<T>] {
        let block = self.0.as_ref().expect("there until dropped");
        assert!(len * size_of::<T>() <= block.size);
        // SAFETY: the block is long enough and aligned beyond any element; `MaybeUninit` needs
        // no content.
        unsafe { std::slice::from_raw_parts_mut(block.start.as_ptr().cast(), len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(block) = self.0.take_if(|block| block.size >= RECYCLED) {
            blocks(|blocks| {
                // Not counted where a fork made the numbers start anew.
                blocks.used_bytes = blocks.used_bytes.saturating_sub(block.size);
                blocks.free_bytes += block.size;
                blocks.free.push(block);
            });
        }
    }
}

/// Calls `body` with `len` values of recycled memory, of unknown content.
pub fn with<T: Element, R>(len: usize, body: impl FnOnce(&mut [MaybeUninit<T>]) -> R) -> R {
    body(Memory::new::<T>(len).as_mut(len))
}

/// Bytes of recycled memory: in use, and free.
pub fn memory_stats() -> (usize, usize) {
    blocks(|blocks| (blocks.used_bytes, blocks.free_bytes))
}

/// Returns free memory to the system; gives the number of bytes.
pub fn release_memory() -> usize {
    let (free, bytes) = blocks(|blocks| {
        blocks.peak = blocks.used_bytes;
        (std::mem::take(&mut blocks.free), std::mem::take(&mut blocks.free_bytes))
    });
    drop(free);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test, as the blocks are the process's: no other test of this crate needs sizes like
    // these.
    #[test]
    fn large_memory_is_recycled_and_bounded() {
        const LEN: usize = if cfg!(miri) { 4 << 20 } else { 64 << 20 };
        let address = |memory: &mut Memory| memory.as_mut::<f32>(LEN).as_ptr().addr();
        let mut first = Memory::new::<f32>(LEN);
        let start = address(&mut first);
        assert_eq!(start % HUGE_PAGE, 0);
        drop(first);
        let mut second = Memory::new::<f32>(LEN - 1000);
        assert_eq!(address(&mut second), start);
        let (used, _) = memory_stats();
        assert!(used >= 4 * (LEN - 1000));
        drop(second);
        // Too small to have the free block, and too many sizes for all to be kept.
        for fraction in [5, 7, 15, 31, 63] {
            drop(Memory::new::<f32>(LEN / fraction));
            let (used, free) = memory_stats();
            assert!(used + free <= SURPLUS * 4 * LEN + (64 << 20), "{used} {free}");
        }
        assert!(release_memory() > 0);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri does not fail to allocate")]
    fn no_memory_ends_the_operation_only() {
        const LEN: usize = 1 << 58;
        assert_eq!(catch(|| _ = Memory::new::<f64>(LEN)), Err(NoMemory { bytes: 8 * LEN }));
        assert_eq!(catch(|| _ = filled(0f32, LEN)), Err(NoMemory { bytes: 4 * LEN }));
        assert_eq!(catch(|| filled(1u8, 3)), Ok(vec![1, 1, 1]));
        let run = || crate::pool::parallel_for(2, 8, |_| _ = Memory::new::<f64>(LEN));
        assert_eq!(catch(run), Err(NoMemory { bytes: 8 * LEN }));
        assert!(catch_unwind(|| catch(|| panic!("another"))).is_err());
    }

    #[test]
    fn small_memory_is_aligned_and_not_counted() {
        let mut memory = Memory::new::<f64>(3);
        assert_eq!(memory.as_mut::<f64>(3).as_ptr().addr() % LINE_BYTES, 0);
    }
}
