//! The numbers that arrays hold, and their vectors on any instruction set.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

use super::mul_acc::{Fma, MulAcc};
use crate::microkernels::row_copy::WidenRows;
use crate::simd::{Isa, IsaKind, Kernel, TransposeBlock};

/// A floating-point type that arrays hold, and how kernels compute with it: with its vectors on any
/// instruction set.
///
/// bfloat16 is storage only: its vectors are those of float32, into which loads widen and from
/// which stores round. So kernels know nothing of it but that sums which wait in memory, and
/// weights that are packed anyway, are of type [`Element::Wide`]. Only sums of products may take it
/// as it is: see [`products`].
pub trait Element:
    Copy
    + Send
    + Sync
    + Default
    + PartialOrd
    + AddAssign
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + std::fmt::Debug
    + 'static
{
    /// What is computed with: `Self`, or float32 for what is narrower.
    type Wide: WideElement;
    /// A vector of `Wide`.
    type Vector<I: Isa>: Copy;
    /// Some of a vector's values.
    type Mask<I: Isa>: Copy;
    /// What adds up two products at a time.
    type Bf16Dot: MulAcc<Self>;
    /// One.
    const ONE: Self;
    /// Whether [`Element::permute`] is there.
    const PERMUTES: bool;

    /// What adds up two products at a time, if this machine has instructions for it.
    fn bf16_dot(_isa: IsaKind) -> Option<Self::Bf16Dot> {
        None
    }

    /// The nearest value to `value`.
    fn from_f64(value: f64) -> Self;
    /// The value itself.
    fn to_f64(self) -> f64;
    /// The value itself.
    fn widen(self) -> Self::Wide;
    /// The nearest value to `value`; NaN stays NaN.
    fn narrow(value: Self::Wide) -> Self;
    /// The values themselves, if they are what is computed with.
    fn as_wide(values: &[Self]) -> Option<&[Self::Wide]>;
    /// The values themselves, widened into the start of `memory` where they have to be.
    fn widened<'a>(isa: IsaKind, values: &'a [Self], memory: &'a mut [Self::Wide]) -> &'a [Self::Wide] {
        if let Some(values) = Self::as_wide(values) {
            return values;
        }
        let len = values.len();
        // As far as the next call's values would follow these.
        isa.run(WidenRows { x: (values, len), y: (writable(memory), len), size: [1, len], ahead: len });
        &memory[..len]
    }
    /// `self * a + b`, in one step where there is an instruction for it.
    fn mul_add_scalar<I: Isa>(self, a: Self, b: Self) -> Self;

    /// A vector of equal values.
    #[inline(always)]
    fn splat<I: Isa>(isa: I, value: Self) -> Self::Vector<I> {
        Self::splat_wide(isa, value.widen())
    }
    /// A vector of equal values.
    fn splat_wide<I: Isa>(isa: I, value: Self::Wide) -> Self::Vector<I>;
    /// `a * b + c`, fused where the instruction set has it.
    fn mul_add<I: Isa>(isa: I, a: Self::Vector<I>, b: Self::Vector<I>, c: Self::Vector<I>) -> Self::Vector<I>;
    /// `a + b`.
    fn add_vectors<I: Isa>(isa: I, a: Self::Vector<I>, b: Self::Vector<I>) -> Self::Vector<I>;
    /// `a - b`.
    fn sub_vectors<I: Isa>(isa: I, a: Self::Vector<I>, b: Self::Vector<I>) -> Self::Vector<I>;
    /// `a * b`.
    fn mul_vectors<I: Isa>(isa: I, a: Self::Vector<I>, b: Self::Vector<I>) -> Self::Vector<I>;
    /// `a / b`.
    fn div_vectors<I: Isa>(isa: I, a: Self::Vector<I>, b: Self::Vector<I>) -> Self::Vector<I>;
    /// The larger of `x` and `low`; NaN stays NaN.
    fn at_least<I: Isa>(isa: I, x: Self::Vector<I>, low: Self::Vector<I>) -> Self::Vector<I>;
    /// The smaller of `x` and `high`; NaN stays NaN.
    fn at_most<I: Isa>(isa: I, x: Self::Vector<I>, high: Self::Vector<I>) -> Self::Vector<I>;
    /// `yes` where `a < b`, else `no`.
    fn select_less<I: Isa>(isa: I, a_b_yes_no: [Self::Vector<I>; 4]) -> Self::Vector<I>;
    /// `1 / (1 + exp(-x))` of vectors whose instructions may overlap, and 1 minus that (a little
    /// more than 0 where that is 1): as exact as what is stored.
    fn sigmoid<I: Isa, const N: usize>(isa: I, x: [Self::Vector<I>; N]) -> [[Self::Vector<I>; N]; 2];
    /// `exp(x)` for `x` up to 40.
    fn exp<I: Isa, const N: usize>(isa: I, x: [Self::Vector<I>; N]) -> [Self::Vector<I>; N];
    /// `exp(x) - 1` for `x <= 0`.
    fn exp_m1<I: Isa, const N: usize>(isa: I, x: [Self::Vector<I>; N]) -> [Self::Vector<I>; N];
    /// The normal distribution function and its density.
    fn normal<I: Isa, const N: usize>(isa: I, x: [Self::Vector<I>; N]) -> [[Self::Vector<I>; N]; 2];
    /// The values of `a` and `b` at even indices, and those at odd ones.
    fn split<I: Isa>(isa: I, a: Self::Vector<I>, b: Self::Vector<I>) -> [Self::Vector<I>; 2];
    /// The values of `a` and `b` in turns.
    fn zip<I: Isa>(isa: I, a: Self::Vector<I>, b: Self::Vector<I>) -> [Self::Vector<I>; 2];
    /// The value at `index`, below the number of lanes, for each lane: of numbers of 32 bits.
    fn permute<I: Isa>(isa: I, values: Self::Vector<I>, index: I::u32s) -> Self::Vector<I>;
    /// As [`Element::permute`], from two vectors, the second one's indices behind the first's.
    fn permute2<I: Isa>(isa: I, values: [Self::Vector<I>; 2], index: I::u32s) -> Self::Vector<I>;
    /// What `yes` holds in the lanes that a mask selects, what `no` holds in the others: of numbers
    /// of 32 bits.
    fn select<I: Isa>(isa: I, mask: I::m32s, yes: Self::Vector<I>, no: Self::Vector<I>) -> Self::Vector<I>;
    /// The sum of a vector's values.
    fn sum<I: Isa>(isa: I, a: Self::Vector<I>) -> Self::Wide;
    /// Selects the first `len` values.
    #[inline(always)]
    fn mask<I: Isa>(isa: I, len: usize) -> Self::Mask<I> {
        Self::mask_between(isa, 0, len)
    }
    /// Selects the values from `start` up to `end`.
    fn mask_between<I: Isa>(isa: I, start: usize, end: usize) -> Self::Mask<I>;
    /// Selects what either mask does.
    fn either_mask<I: Isa>(isa: I, a: Self::Mask<I>, b: Self::Mask<I>) -> Self::Mask<I>;
    /// The values that `mask` selects; the others are zero.
    fn keep_masked<I: Isa>(isa: I, mask: Self::Mask<I>, a: Self::Vector<I>) -> Self::Vector<I>;

    /// Loads a vector; no alignment is needed.
    ///
    /// # Safety
    /// All of the vector's values must be readable at `ptr`.
    unsafe fn load<I: Isa>(isa: I, ptr: *const Self) -> Self::Vector<I>;
    /// Stores a vector; no alignment is needed.
    ///
    /// # Safety
    /// All of the vector's values must be writable at `ptr`.
    unsafe fn store<I: Isa>(isa: I, ptr: *mut Self, value: Self::Vector<I>);
    /// Loads the values that `mask` selects; the others are zero.
    ///
    /// # Safety
    /// The selected values must be readable at `ptr`.
    unsafe fn load_masked<I: Isa>(isa: I, mask: Self::Mask<I>, ptr: *const Self) -> Self::Vector<I>;
    /// Stores the values that `mask` selects.
    ///
    /// # Safety
    /// The selected values must be writable at `ptr`.
    unsafe fn store_masked<I: Isa>(isa: I, mask: Self::Mask<I>, ptr: *mut Self, value: Self::Vector<I>);
    /// Loads four values from each of these pointers, as many as fill a vector: of types with
    /// [`Element::PERMUTES`].
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_quads<I: Isa>(isa: I, quads: [*const Self; 4]) -> Self::Vector<I>;
    /// Loads part 0 or 1 of the values of two vectors: one half of them, in the order that is the
    /// fastest.
    ///
    /// # Safety
    /// Two vectors' values must be readable at `ptr`.
    unsafe fn load_part<I: Isa>(isa: I, ptr: *const Self, part: usize) -> Self::Vector<I>;
    /// Stores the two parts that [`Element::load_part`] loads.
    ///
    /// # Safety
    /// Two vectors' values must be writable at `ptr`.
    unsafe fn store_parts<I: Isa>(isa: I, ptr: *mut Self, parts: [Self::Vector<I>; 2]);
    /// [`Element::load`] of wide values.
    ///
    /// # Safety
    /// As for that.
    unsafe fn load_wide<I: Isa>(isa: I, ptr: *const Self::Wide) -> Self::Vector<I>;
    /// [`Element::store`] of wide values.
    ///
    /// # Safety
    /// As for that.
    unsafe fn store_wide<I: Isa>(isa: I, ptr: *mut Self::Wide, value: Self::Vector<I>);
    /// [`Element::load_masked`] of wide values.
    ///
    /// # Safety
    /// As for that.
    unsafe fn load_wide_masked<I: Isa>(isa: I, mask: Self::Mask<I>, ptr: *const Self::Wide) -> Self::Vector<I>;
    /// [`Element::store_masked`] of wide values.
    ///
    /// # Safety
    /// As for that.
    unsafe fn store_wide_masked<I: Isa>(isa: I, mask: Self::Mask<I>, ptr: *mut Self::Wide, value: Self::Vector<I>);
    /// Transposes a block of `R` rows of `C` values, 4 or 8 each.
    ///
    /// # Safety
    /// As for [`Isa::transpose_u16`].
    unsafe fn transpose<I: Isa, const R: usize, const C: usize>(isa: I, block: TransposeBlock<Self>);
    /// `c += a * b` for matrices of `[m, k, n]` with strides `(row, column)`: matrixmultiply's
    /// GEMM, which chooses the instruction set itself; `isa` is for what is to be widened before.
    ///
    /// # Safety
    /// The three matrices must be in bounds, and `c` must overlap neither of the others.
    unsafe fn gemm(
        isa: IsaKind,
        size: [usize; 3],
        a: (*const Self, usize, usize),
        b: (*const Self, usize, usize),
        c: (*mut Self::Wide, usize, usize),
    );

    /// How many values a vector holds.
    #[inline(always)]
    fn lanes<I: Isa>() -> usize {
        size_of::<Self::Vector<I>>() / size_of::<Self::Wide>()
    }
}

/// An [`Element`] that is computed with as it is stored.
pub trait WideElement: Element<Wide = Self> {}
impl<T: Element<Wide = T>> WideElement for T {}

struct Lanes<T>(PhantomData<T>);

impl<T: Element> Kernel for Lanes<T> {
    type Output = usize;

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> usize {
        T::lanes::<I>()
    }
}

struct HasPermute<T>(PhantomData<T>);

impl<T: Element> Kernel for HasPermute<T> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> bool {
        T::PERMUTES && I::PERMUTES
    }
}

/// Whether [`Element::permute`] is there.
pub(crate) fn has_permute<T: Element>(isa: IsaKind) -> bool {
    isa.constant(HasPermute::<T>(PhantomData))
}

/// Whether an instruction set's vectors are single values.
pub(crate) const fn is_scalar<T: Element, I: Isa>() -> bool {
    size_of::<T::Vector<I>>() == size_of::<T::Wide>()
}

/// How many values an instruction set's vectors hold.
pub(crate) fn lanes<T: Element>(isa: IsaKind) -> usize {
    isa.constant(Lanes::<T>(PhantomData))
}

/// Whether a vector holds one value: portable code, of which there is less to be compiled.
pub(crate) const fn one_lane<T: Element, I: Isa>() -> bool {
    size_of::<T::Vector<I>>() == size_of::<T::Wide>()
}

/// Whether values are stored as they are computed with.
pub(crate) const fn is_wide<T: Element>() -> bool {
    size_of::<T>() == size_of::<T::Wide>()
}

/// Whether masked loads take as long as others, so that there need not be code for whole vectors:
/// not of bfloat16, where widening then takes an instruction more.
pub(crate) const fn masks_are_free<T: Element, I: Isa>() -> bool {
    I::MASK_REGISTERS && is_wide::<T>()
}

/// The values themselves, if they are what is computed with.
pub(crate) fn as_wide_mut<T: Element>(values: &mut [T]) -> Option<&mut [T::Wide]> {
    // SAFETY: what has the size of what it is computed with is of the same type.
    is_wide::<T>().then(|| unsafe { &mut *(values as *mut [T] as *mut [T::Wide]) })
}

/// Memory that holds values as memory to be written.
pub(crate) fn writable<T: Element>(values: &mut [T]) -> &mut [MaybeUninit<T>] {
    // SAFETY: the same layout; kernels write nothing but values.
    unsafe { &mut *(values as *mut [T] as *mut [MaybeUninit<T>]) }
}

/// The vectors of an [`Element`] and the arithmetic on them, by pulp's functions.
macro_rules! vectors {
    (
        wide: $wide:ident,
        vector: $vector:ident,
        mask: $mask:ident,
        len: $len:ident,
        splat: $splat:ident,
        mul_add: $mul_add:ident,
        add: $add:ident,
        sum: $sum:ident,
        sub: $sub:ident,
        mul: $mul:ident,
        div: $div:ident,
        at_least: $at_least:ident,
        at_most: $at_most:ident,
        less: $less:ident,
        select: $select:ident,
        between: $between:ident,
        or_masks: $or_masks:ident,
        load_masked: $load_masked:ident,
        store_masked: $store_masked:ident,
        split: $split:ident,
        zip: $zip:ident,
        sigmoid: $sigmoid:path,
        exp: $exp:path,
        exp_m1: $exp_m1:path,
        normal: $normal:path,
    ) => {
        type Wide = $wide;
        type Vector<I: Isa> = I::$vector;
        type Mask<I: Isa> = I::$mask;

        #[inline(always)]
        fn splat_wide<I: Isa>(isa: I, value: $wide) -> I::$vector {
            isa.$splat(value)
        }
        #[inline(always)]
        fn mul_add<I: Isa>(isa: I, a: I::$vector, b: I::$vector, c: I::$vector) -> I::$vector {
            isa.$mul_add(a, b, c)
        }
        #[inline(always)]
        fn add_vectors<I: Isa>(isa: I, a: I::$vector, b: I::$vector) -> I::$vector {
            isa.$add(a, b)
        }
        #[inline(always)]
        fn sub_vectors<I: Isa>(isa: I, a: I::$vector, b: I::$vector) -> I::$vector {
            isa.$sub(a, b)
        }
        #[inline(always)]
        fn mul_vectors<I: Isa>(isa: I, a: I::$vector, b: I::$vector) -> I::$vector {
            isa.$mul(a, b)
        }
        #[inline(always)]
        fn div_vectors<I: Isa>(isa: I, a: I::$vector, b: I::$vector) -> I::$vector {
            isa.$div(a, b)
        }
        #[inline(always)]
        fn at_least<I: Isa>(isa: I, x: I::$vector, low: I::$vector) -> I::$vector {
            isa.$at_least(x, low)
        }
        #[inline(always)]
        fn at_most<I: Isa>(isa: I, x: I::$vector, high: I::$vector) -> I::$vector {
            isa.$at_most(x, high)
        }
        #[inline(always)]
        fn select_less<I: Isa>(isa: I, [a, b, yes, no]: [I::$vector; 4]) -> I::$vector {
            isa.$select(isa.$less(a, b), yes, no)
        }
        #[inline(always)]
        fn sigmoid<I: Isa, const N: usize>(isa: I, x: [I::$vector; N]) -> [[I::$vector; N]; 2] {
            $sigmoid(isa, x)
        }
        #[inline(always)]
        fn exp<I: Isa, const N: usize>(isa: I, x: [I::$vector; N]) -> [I::$vector; N] {
            $exp(isa, x)
        }
        #[inline(always)]
        fn exp_m1<I: Isa, const N: usize>(isa: I, x: [I::$vector; N]) -> [I::$vector; N] {
            $exp_m1(isa, x)
        }
        #[inline(always)]
        fn normal<I: Isa, const N: usize>(isa: I, x: [I::$vector; N]) -> [[I::$vector; N]; 2] {
            $normal(isa, x)
        }
        #[inline(always)]
        fn split<I: Isa>(isa: I, a: I::$vector, b: I::$vector) -> [I::$vector; 2] {
            isa.$split(a, b)
        }
        #[inline(always)]
        fn zip<I: Isa>(isa: I, a: I::$vector, b: I::$vector) -> [I::$vector; 2] {
            isa.$zip(a, b)
        }
        #[inline(always)]
        fn sum<I: Isa>(isa: I, a: I::$vector) -> $wide {
            isa.$sum(a)
        }
        #[inline(always)]
        fn mask_between<I: Isa>(isa: I, start: usize, end: usize) -> Self::Mask<I> {
            isa.$between(start as $len, end as $len).mask()
        }
        #[inline(always)]
        fn either_mask<I: Isa>(isa: I, a: Self::Mask<I>, b: Self::Mask<I>) -> Self::Mask<I> {
            isa.$or_masks(a, b)
        }
        #[inline(always)]
        fn keep_masked<I: Isa>(isa: I, mask: Self::Mask<I>, a: I::$vector) -> I::$vector {
            isa.$select(mask, a, isa.$splat(0.0))
        }
        #[inline(always)]
        unsafe fn load_wide<I: Isa>(_isa: I, ptr: *const $wide) -> I::$vector {
            // SAFETY: the caller's promise; a vector is plain old data.
            unsafe { ptr.cast::<I::$vector>().read_unaligned() }
        }
        #[inline(always)]
        unsafe fn store_wide<I: Isa>(_isa: I, ptr: *mut $wide, value: I::$vector) {
            // SAFETY: the caller's promise.
            unsafe { ptr.cast::<I::$vector>().write_unaligned(value) }
        }
        #[inline(always)]
        unsafe fn load_wide_masked<I: Isa>(isa: I, mask: Self::Mask<I>, ptr: *const $wide) -> I::$vector {
            // SAFETY: the caller's promise. `new` goes without pulp's jump table: the plain masked
            // instructions are wanted.
            unsafe { isa.$load_masked(pulp::MemMask::new(mask), ptr) }
        }
        #[inline(always)]
        unsafe fn store_wide_masked<I: Isa>(isa: I, mask: Self::Mask<I>, ptr: *mut $wide, value: I::$vector) {
            // SAFETY: the caller's promise.
            unsafe { isa.$store_masked(pulp::MemMask::new(mask), ptr, value) }
        }
    };
}

macro_rules! f32_vectors {
    (sigmoid: $sigmoid:ident) => {
        vectors!(
            wide: f32,
            vector: f32s,
            mask: m32s,
            len: u32,
            splat: splat_f32s,
            mul_add: mul_add_e_f32s,
            add: add_f32s,
            sum: reduce_sum_f32s,
            sub: sub_f32s,
            mul: mul_f32s,
            div: div_f32s,
            at_least: at_least_f32s,
            at_most: at_most_f32s,
            less: less_than_f32s,
            select: select_f32s,
            between: mask_between_m32s,
            or_masks: or_m32s,
            load_masked: mask_load_ptr_f32s,
            store_masked: mask_store_ptr_f32s,
            split: split_f32s,
            zip: zip_f32s,
            sigmoid: $crate::microkernels::exponentials::$sigmoid,
            exp: $crate::microkernels::exponentials::exp_f32,
            exp_m1: $crate::microkernels::exponentials::exp_m1_f32,
            normal: $crate::microkernels::exponentials::normal_f32,
        );
        const PERMUTES: bool = true;

        #[inline(always)]
        fn permute<I: Isa>(isa: I, values: I::f32s, index: I::u32s) -> I::f32s {
            isa.permute_f32s(values, index)
        }
        #[inline(always)]
        fn permute2<I: Isa>(isa: I, values: [I::f32s; 2], index: I::u32s) -> I::f32s {
            isa.permute2_f32s(values, index)
        }
        #[inline(always)]
        fn select<I: Isa>(isa: I, mask: I::m32s, yes: I::f32s, no: I::f32s) -> I::f32s {
            isa.select_f32s(mask, yes, no)
        }
    };
}
pub(crate) use {f32_vectors, vectors};

/// The storage of an [`Element`] that is what it computes with.
macro_rules! wide_storage {
    (transpose: $transpose:ident, gemm: $gemm:path) => {
        type Bf16Dot = Fma;
        const ONE: Self = 1.0;

        #[inline(always)]
        fn from_f64(value: f64) -> Self {
            value as Self
        }
        #[inline(always)]
        fn to_f64(self) -> f64 {
            f64::from(self)
        }
        #[inline(always)]
        fn widen(self) -> Self {
            self
        }
        #[inline(always)]
        fn narrow(value: Self) -> Self {
            value
        }
        fn as_wide(values: &[Self]) -> Option<&[Self]> {
            Some(values)
        }
        #[inline(always)]
        fn mul_add_scalar<I: Isa>(self, a: Self, b: Self) -> Self {
            if I::FUSED_MULTIPLY_ADD { self.mul_add(a, b) } else { self * a + b }
        }
        #[inline(always)]
        unsafe fn load<I: Isa>(isa: I, ptr: *const Self) -> Self::Vector<I> {
            // SAFETY: the caller's promise.
            unsafe { Self::load_wide(isa, ptr) }
        }
        #[inline(always)]
        unsafe fn store<I: Isa>(isa: I, ptr: *mut Self, value: Self::Vector<I>) {
            // SAFETY: the caller's promise.
            unsafe { Self::store_wide(isa, ptr, value) }
        }
        #[inline(always)]
        unsafe fn load_masked<I: Isa>(isa: I, mask: Self::Mask<I>, ptr: *const Self) -> Self::Vector<I> {
            // SAFETY: the caller's promise.
            unsafe { Self::load_wide_masked(isa, mask, ptr) }
        }
        #[inline(always)]
        unsafe fn store_masked<I: Isa>(isa: I, mask: Self::Mask<I>, ptr: *mut Self, value: Self::Vector<I>) {
            // SAFETY: the caller's promise.
            unsafe { Self::store_wide_masked(isa, mask, ptr, value) }
        }
        #[inline(always)]
        unsafe fn load_part<I: Isa>(isa: I, ptr: *const Self, part: usize) -> Self::Vector<I> {
            // SAFETY: the caller's promise.
            unsafe { Self::load(isa, ptr.add(part * Self::lanes::<I>())) }
        }
        #[inline(always)]
        unsafe fn store_parts<I: Isa>(isa: I, ptr: *mut Self, [first, second]: [Self::Vector<I>; 2]) {
            // SAFETY: the caller's promise.
            unsafe {
                Self::store(isa, ptr, first);
                Self::store(isa, ptr.add(Self::lanes::<I>()), second);
            }
        }
        #[inline(always)]
        unsafe fn transpose<I: Isa, const R: usize, const C: usize>(isa: I, block: TransposeBlock<Self>) {
            // SAFETY: the caller's promise.
            unsafe { isa.$transpose::<R, C>(block) }
        }
        unsafe fn gemm(
            _isa: IsaKind,
            [m, k, n]: [usize; 3],
            a: (*const Self, usize, usize),
            b: (*const Self, usize, usize),
            c: (*mut Self, usize, usize),
        ) {
            // SAFETY: the caller's promise. Strides fit `isize` because the matrices fit memory.
            unsafe {
                $gemm(
                    m,
                    k,
                    n,
                    1.0,
                    a.0,
                    a.1 as isize,
                    a.2 as isize,
                    b.0,
                    b.1 as isize,
                    b.2 as isize,
                    1.0,
                    c.0,
                    c.1 as isize,
                    c.2 as isize,
                )
            }
        }
    };
}

impl Element for f32 {
    f32_vectors!(sigmoid: sigmoid_f32);
    wide_storage!(transpose: transpose_f32, gemm: matrixmultiply::sgemm);

    #[inline(always)]
    unsafe fn load_quads<I: Isa>(isa: I, quads: [*const Self; 4]) -> I::f32s {
        // SAFETY: the caller's promise.
        unsafe { isa.load_quads_f32s(quads) }
    }
}

impl Element for f64 {
    vectors!(
        wide: f64,
        vector: f64s,
        mask: m64s,
        len: u64,
        splat: splat_f64s,
        mul_add: mul_add_e_f64s,
        add: add_f64s,
        sum: reduce_sum_f64s,
        sub: sub_f64s,
        mul: mul_f64s,
        div: div_f64s,
        at_least: at_least_f64s,
        at_most: at_most_f64s,
        less: less_than_f64s,
        select: select_f64s,
        between: mask_between_m64s,
        or_masks: or_m64s,
        load_masked: mask_load_ptr_f64s,
        store_masked: mask_store_ptr_f64s,
        split: split_f64s,
        zip: zip_f64s,
        sigmoid: crate::microkernels::exponentials::sigmoid_f64,
        exp: crate::microkernels::exponentials::exp_f64,
        exp_m1: crate::microkernels::exponentials::exp_m1_f64,
        normal: crate::microkernels::exponentials::normal_f64,
    );
    wide_storage!(transpose: transpose_f64, gemm: matrixmultiply::dgemm);
    const PERMUTES: bool = false;

    fn permute<I: Isa>(_isa: I, _values: I::f64s, _index: I::u32s) -> I::f64s {
        unreachable!("no instruction")
    }
    fn permute2<I: Isa>(_isa: I, _values: [I::f64s; 2], _index: I::u32s) -> I::f64s {
        unreachable!("no instruction")
    }
    fn select<I: Isa>(_isa: I, _mask: I::m32s, _yes: I::f64s, _no: I::f64s) -> I::f64s {
        unreachable!("no instruction")
    }
    unsafe fn load_quads<I: Isa>(_isa: I, _pieces: [*const Self; 4]) -> I::f64s {
        unreachable!("no instruction")
    }
}
