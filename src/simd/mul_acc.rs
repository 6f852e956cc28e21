//! How sums of products take values from memory and add them up: one product at a time, or two
//! where there are instructions for it.

use super::element::{Element, is_wide};
use crate::simd::{Isa, IsaKind};

/// How products of values of type `T` are summed. To have one is to have its instructions.
///
/// A step of the conv1x1 microkernel multiplies [`MulAcc::TERMS`] rows by their weights, one of the
/// dot microkernel `TERMS` times a vector's values of two rows.
pub trait MulAcc<T: Element>: Copy + Send + Sync {
    /// How many products a step adds to each sum: 1 or 2.
    const TERMS: usize;
    /// What [`MulAcc::splat`] reads: values as they are, or as they are computed with.
    type Value: Copy;
    /// Whether [`MulAcc::splat`] reads copies of values, which
    /// [`crate::microkernels::row_copy::WidenRows`] makes.
    const COPIES: bool = size_of::<Self::Value>() > size_of::<T>();
    /// A mask over the first values of [`MulAcc::load_row`].
    type Mask<I: Isa>: Copy;

    /// The weights of one step, in the bits of one number.
    fn pack(self, weight: T, next: Option<T>) -> T::Wide;
    /// `c` plus the products of one step.
    fn mul_add<I: Isa>(self, isa: I, a: T::Vector<I>, b: T::Vector<I>, c: T::Vector<I>) -> T::Vector<I>;

    /// One step's values of a row and of the next, if a step takes two rows; zeros where it has
    /// none.
    ///
    /// # Safety
    /// A vector's values must be readable in the rows.
    unsafe fn load<I: Isa>(self, isa: I, row: *const T, next: Option<*const T>) -> T::Vector<I>;
    /// As [`MulAcc::load`], of the values that `mask` selects; the others are zero.
    ///
    /// # Safety
    /// The selected values must be readable in the rows.
    unsafe fn load_masked<I: Isa>(
        self,
        isa: I,
        mask: T::Mask<I>,
        row: *const T,
        next: Option<*const T>,
    ) -> T::Vector<I>;
    /// As [`MulAcc::load`], part 0 or 1 of the values of two vectors: one half of them, in the
    /// order that is the fastest.
    ///
    /// # Safety
    /// Two vectors' values must be readable in the rows.
    unsafe fn load_part<I: Isa>(self, isa: I, row: *const T, next: Option<*const T>, part: usize) -> T::Vector<I>;
    /// Stores a vector of sums, or those that `mask` selects.
    ///
    /// # Safety
    /// They must be writable at `ptr`.
    unsafe fn store<I: Isa>(self, isa: I, mask: Option<T::Mask<I>>, ptr: *mut T, value: T::Vector<I>);
    /// Stores the sums of the two parts that [`MulAcc::load_part`] loads.
    ///
    /// # Safety
    /// Two vectors' values must be writable at `ptr`.
    unsafe fn store_parts<I: Isa>(self, isa: I, ptr: *mut T, parts: [T::Vector<I>; 2]);
    /// As [`MulAcc::store_parts`], without rounding.
    ///
    /// # Safety
    /// Two vectors' values must be writable at `ptr`.
    unsafe fn store_wide_parts<I: Isa>(self, isa: I, ptr: *mut T::Wide, parts: [T::Vector<I>; 2]);

    /// One step's neighbouring values, of which there are `len` or more than a step takes, for
    /// every sum.
    ///
    /// # Safety
    /// They must be readable at `ptr`.
    unsafe fn splat<I: Isa>(self, isa: I, len: usize, ptr: *const Self::Value) -> T::Vector<I>;
    /// For each lane, the values that one step multiplies, from [`MulAcc::load_row`]'s or
    /// [`MulAcc::load_quads`]'s: indices modulo their number, the second one's in the upper half.
    /// For types with [`Element::PERMUTES`].
    fn permute<I: Isa>(self, isa: I, values: T::Vector<I>, index: I::u32s) -> T::Vector<I>;
    /// Four steps' neighbouring values from each of these pointers, as many as fill a vector: for
    /// types with [`Element::PERMUTES`].
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_quads<I: Isa>(self, isa: I, quads: [*const T; 4]) -> T::Vector<I>;
    /// Packs rows of `len` values, a step's rows into one as [`MulAcc::pack`] does: at the start
    /// of `memory`, or where they are if they need not be packed.
    fn steps<'a>(self, isa: IsaKind, rows: &'a [T], len: usize, memory: &'a mut [T::Wide]) -> &'a [T::Wide];
    /// Selects the first `len` values of [`MulAcc::load_row`].
    fn mask<I: Isa>(isa: I, len: usize) -> Self::Mask<I>;
    /// The values of a row that one step multiplies, in any order: [`MulAcc::TERMS`] vectors of
    /// sums need them.
    ///
    /// # Safety
    /// They must be readable at `ptr`.
    unsafe fn load_row<I: Isa>(self, isa: I, ptr: *const T) -> T::Vector<I>;
    /// As [`MulAcc::load_row`], of the values that `mask` selects; the others are zero.
    ///
    /// # Safety
    /// The selected values must be readable at `ptr`.
    unsafe fn load_row_masked<I: Isa>(self, isa: I, mask: Self::Mask<I>, ptr: *const T) -> T::Vector<I>;
    /// As [`MulAcc::load_row`], part 0 or 1 of two steps' values.
    ///
    /// # Safety
    /// Two steps' values must be readable at `ptr`.
    unsafe fn load_row_part<I: Isa>(self, isa: I, ptr: *const T, part: usize) -> T::Vector<I>;
}

/// Whether the instruction set has what sums of products need: kernels are compiled only then.
pub const fn has_code<T: Element, M: MulAcc<T>, I: Isa>() -> bool {
    M::TERMS == 1 || I::BF16_DOT
}

/// One product at a time, as an [`Element`] computes.
#[derive(Clone, Copy)]
pub struct Fma;

impl<T: Element> MulAcc<T> for Fma {
    const TERMS: usize = 1;
    type Value = T::Wide;
    type Mask<I: Isa> = T::Mask<I>;

    #[inline(always)]
    fn pack(self, weight: T, _next: Option<T>) -> T::Wide {
        weight.widen()
    }
    #[inline(always)]
    fn mul_add<I: Isa>(self, isa: I, a: T::Vector<I>, b: T::Vector<I>, c: T::Vector<I>) -> T::Vector<I> {
        T::mul_add(isa, a, b, c)
    }
    #[inline(always)]
    unsafe fn load<I: Isa>(self, isa: I, row: *const T, _next: Option<*const T>) -> T::Vector<I> {
        // SAFETY: the caller's promise, as for all that follows.
        unsafe { T::load(isa, row) }
    }
    #[inline(always)]
    unsafe fn load_masked<I: Isa>(
        self,
        isa: I,
        mask: T::Mask<I>,
        row: *const T,
        _next: Option<*const T>,
    ) -> T::Vector<I> {
        // SAFETY: as above.
        unsafe { T::load_masked(isa, mask, row) }
    }
    #[inline(always)]
    unsafe fn load_part<I: Isa>(self, isa: I, row: *const T, _next: Option<*const T>, part: usize) -> T::Vector<I> {
        // SAFETY: as above.
        unsafe { T::load_part(isa, row, part) }
    }
    #[inline(always)]
    unsafe fn store<I: Isa>(self, isa: I, mask: Option<T::Mask<I>>, ptr: *mut T, value: T::Vector<I>) {
        // SAFETY: as above.
        unsafe {
            match mask {
                Some(mask) => T::store_masked(isa, mask, ptr, value),
                None => T::store(isa, ptr, value),
            }
        }
    }
    #[inline(always)]
    unsafe fn splat<I: Isa>(self, isa: I, _len: usize, ptr: *const T::Wide) -> T::Vector<I> {
        // SAFETY: as above.
        T::splat_wide(isa, unsafe { *ptr })
    }
    #[inline(always)]
    fn permute<I: Isa>(self, isa: I, values: T::Vector<I>, index: I::u32s) -> T::Vector<I> {
        T::permute(isa, values, index)
    }
    #[inline(always)]
    unsafe fn load_quads<I: Isa>(self, isa: I, quads: [*const T; 4]) -> T::Vector<I> {
        // SAFETY: as above.
        unsafe { T::load_quads(isa, quads) }
    }
    fn steps<'a>(self, isa: IsaKind, rows: &'a [T], _len: usize, memory: &'a mut [T::Wide]) -> &'a [T::Wide] {
        T::widened(isa, rows, memory)
    }
    #[inline(always)]
    unsafe fn store_parts<I: Isa>(self, isa: I, ptr: *mut T, parts: [T::Vector<I>; 2]) {
        // SAFETY: as above.
        unsafe { T::store_parts(isa, ptr, parts) }
    }
    #[inline(always)]
    unsafe fn store_wide_parts<I: Isa>(self, isa: I, ptr: *mut T::Wide, parts: [T::Vector<I>; 2]) {
        // Those of what is widened are the values at even indices and at odd ones.
        let [first, second] = if is_wide::<T>() { parts } else { T::zip(isa, parts[0], parts[1]) };
        // SAFETY: as above.
        unsafe {
            T::store_wide(isa, ptr, first);
            T::store_wide(isa, ptr.add(T::lanes::<I>()), second);
        }
    }
    #[inline(always)]
    fn mask<I: Isa>(isa: I, len: usize) -> T::Mask<I> {
        T::mask(isa, len)
    }
    #[inline(always)]
    unsafe fn load_row<I: Isa>(self, isa: I, ptr: *const T) -> T::Vector<I> {
        // SAFETY: as above.
        unsafe { T::load(isa, ptr) }
    }
    #[inline(always)]
    unsafe fn load_row_masked<I: Isa>(self, isa: I, mask: T::Mask<I>, ptr: *const T) -> T::Vector<I> {
        // SAFETY: as above.
        unsafe { T::load_masked(isa, mask, ptr) }
    }
    #[inline(always)]
    unsafe fn load_row_part<I: Isa>(self, isa: I, ptr: *const T, part: usize) -> T::Vector<I> {
        // SAFETY: as above.
        unsafe { T::load_part(isa, ptr, part) }
    }
}
