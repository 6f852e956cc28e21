//! Dot products of rows of pixels, A·Bᵀ: the weight gradient of the pointwise convolution in NCHW.
//!
//! [`DotNt`] keeps `A x B` vectors of partial sums, one for each pair of an `A` row and a `B` row.
//! The inner loop needs `A + B` loads for `A * B` multiply-adds, so from 2 x 2 on the arithmetic is
//! the limit, not the loads.

use std::marker::PhantomData;

use crate::simd::element::{Element, is_scalar};
use crate::simd::mul_acc::{MulAcc, has_code};
use crate::simd::{Isa, Kernel, RawKernel, line};

/// Rows of several images: row `i` of image `n` starts at `base + n * image_stride + offsets[i]`.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    /// The first image.
    pub base: *const T,
    /// One offset for each row.
    pub offsets: &'a [usize],
    /// Distance from one image to the next.
    pub image_stride: usize,
    /// Distance from what is read to what is prefetched meanwhile, which later calls will read; 0
    /// where that is in a cache. (It may be before what is read: distances wrap.)
    pub prefetch: usize,
}

impl<T> Rows<'_, T> {
    /// Where the first `N` rows of image `n` start.
    ///
    /// # Safety
    /// They must exist.
    #[inline(always)]
    unsafe fn starts<const N: usize>(&self, n: usize) -> [*const T; N] {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| unsafe { self.base.add(n * self.image_stride + *self.offsets.get_unchecked(i)) })
    }
}

/// `sums[i][j] += sum over images and pixels of a[i] * b[j]`, as vectors of partial sums.
///
/// # Safety
/// Until it has run, every row of every image must be readable over `pixels` values.
pub struct DotNt<'a, T: Element, M> {
    /// How products are summed.
    pub mul_acc: M,
    /// At most as many rows as [`DotTile`] says.
    pub a: Rows<'a, T>,
    /// As `a`.
    pub b: Rows<'a, T>,
    /// Number of images.
    pub images: usize,
    /// Length of a row.
    pub pixels: usize,
    /// Slots of one cache line each, of which the first vector is used.
    pub sums: &'a mut [T::Wide],
    /// The slot of the first pair of rows.
    pub first_slot: usize,
    /// Slots from one `a` row to the next.
    pub slot_stride: usize,
}

/// Which values of a row make a vector.
#[derive(Clone, Copy)]
enum Load<M> {
    /// A part of two vectors' values: sums do not depend on the order.
    Part(usize),
    All,
    First(M),
}

impl<'a, T: Element, M: MulAcc<T>> DotNt<'a, T, M> {
    /// What can be checked of a description.
    #[inline(always)]
    fn validate(&self) {
        let (a, b) = (self.a.offsets.len(), self.b.offsets.len());
        assert!(a > 0 && b > 0, "rows");
        assert!(self.sums.len() >= (self.first_slot + (a - 1) * self.slot_stride + b) * line::<T::Wide>(), "sums");
    }

    /// Adds the products of one vector of each row, which `load` tells to load from pixel `p` on.
    ///
    /// # Safety
    /// As for [`DotNt`]; the values must be inside the rows.
    #[inline(always)]
    unsafe fn step<I: Isa, const A: usize, const B: usize, const PREFETCH: bool>(
        &self,
        isa: I,
        (a, b): ([*const T; A], [*const T; B]),
        p: usize,
        load: Load<M::Mask<I>>,
        sums: &mut [[T::Vector<I>; B]; A],
    ) {
        if PREFETCH {
            let at = p + if let Load::Part(part) = load { part * T::lanes::<I>() * M::TERMS } else { 0 };
            b.iter().for_each(|row| isa.prefetch(row.wrapping_add(at.wrapping_add(self.b.prefetch))));
            a.iter().for_each(|row| isa.prefetch(row.wrapping_add(at.wrapping_add(self.a.prefetch))));
        }
        let mut bs = [T::splat(isa, T::default()); B];
        for (value, row) in bs.iter_mut().zip(b) {
            // SAFETY: the caller's promise.
            *value = unsafe { self.values(isa, row.add(p), load) };
        }
        for (sums, row) in sums.iter_mut().zip(a) {
            // SAFETY: as above.
            let value = unsafe { self.values(isa, row.add(p), load) };
            for (sum, b) in sums.iter_mut().zip(bs) {
                *sum = self.mul_acc.mul_add(isa, value, b, *sum);
            }
        }
    }

    /// A row's values from `ptr` on. (Not a closure: these are compiled without the instruction set
    /// when they are not inlined, which made bfloat16 weight gradients 12 to 16 times slower
    /// without AVX512-BF16.)
    ///
    /// # Safety
    /// They must be inside the row.
    #[inline(always)]
    unsafe fn values<I: Isa>(&self, isa: I, ptr: *const T, load: Load<M::Mask<I>>) -> T::Vector<I> {
        // SAFETY: the caller's promise.
        unsafe {
            match load {
                Load::Part(part) => self.mul_acc.load_row_part(isa, ptr, part),
                Load::All => self.mul_acc.load_row(isa, ptr),
                Load::First(mask) => self.mul_acc.load_row_masked(isa, mask, ptr),
            }
        }
    }

    /// Adds the products of all images' rows, with `PREFETCH` prefetching what comes.
    ///
    /// # Safety
    /// As for [`DotNt`]; `A` and `B` must be the numbers of rows.
    #[inline(always)]
    unsafe fn add<I: Isa, const A: usize, const B: usize, const PREFETCH: bool>(
        &self,
        isa: I,
        sums: &mut [[T::Vector<I>; B]; A],
    ) {
        let lanes = T::lanes::<I>() * M::TERMS;
        let full = self.pixels / lanes * lanes;
        let mask = M::mask(isa, self.pixels - full);
        for n in 0..self.images {
            // SAFETY: image n exists, and there are A and B rows.
            let rows = unsafe { (self.a.starts::<A>(n), self.b.starts::<B>(n)) };
            let mut p = 0;
            // SAFETY: inside the rows; the tail is masked.
            unsafe {
                while p + 2 * lanes <= self.pixels {
                    self.step::<I, A, B, PREFETCH>(isa, rows, p, Load::Part(0), sums);
                    self.step::<I, A, B, PREFETCH>(isa, rows, p, Load::Part(1), sums);
                    p += 2 * lanes;
                }
                while p < self.pixels {
                    let load = if p == full { Load::First(mask) } else { Load::All };
                    self.step::<I, A, B, PREFETCH>(isa, rows, p, load, sums);
                    p += lanes;
                }
            }
        }
    }

    /// # Safety
    /// As for [`DotNt`]; `A` and `B` must be the numbers of rows.
    #[inline(always)]
    unsafe fn tile<I: Isa, const A: usize, const B: usize>(&mut self, isa: I) {
        let zero = T::splat(isa, T::default());
        let (first, stride) = (self.first_slot, self.slot_stride);
        let slots = self.sums.as_mut_ptr();
        let mut sums = [[zero; B]; A];
        for (i, row) in sums.iter_mut().enumerate() {
            for (j, sum) in row.iter_mut().enumerate() {
                // SAFETY: the slots were asserted, each at least a vector long.
                *sum = unsafe { T::load_wide(isa, slots.add((first + i * stride + j) * line::<T::Wide>())) };
            }
        }
        // SAFETY: the caller's promise.
        unsafe {
            // Not decided inside the loop: there it made the compiler copy all sums at each step.
            if self.a.prefetch == 0 && self.b.prefetch == 0 {
                self.add::<I, A, B, false>(isa, &mut sums);
            } else {
                self.add::<I, A, B, true>(isa, &mut sums);
            }
        }
        for (i, row) in sums.into_iter().enumerate() {
            for (j, sum) in row.into_iter().enumerate() {
                // SAFETY: as for the loads above.
                unsafe { T::store_wide(isa, slots.add((first + i * stride + j) * line::<T::Wide>()), sum) };
            }
        }
    }
}

impl<T: Element, M: MulAcc<T>> RawKernel for DotNt<'_, T, M> {
    type Output = ();

    #[inline(always)]
    fn check(&self) {
        self.validate();
    }

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        if !const { has_code::<T, M, I>() } {
            unreachable!("no instruction for pairs");
        }
        let mut kernel = self;
        let size = (kernel.a.offsets.len(), kernel.b.offsets.len());
        let DotTile { a, b, single_b } = const { dot_tile::<T, I>() };
        assert!(size.0 <= a && size.1 <= if size.0 == 1 { single_b } else { b }, "rows");
        macro_rules! tiles {
            ($($a:literal x $($b:literal)*;)*) => {
                match size {
                    // SAFETY: promised.
                    $($(($a, $b) => unsafe { kernel.tile::<I, $a, $b>(isa) },)*)*
                    _ => unreachable!("checked above"),
                }
            };
        }
        // Constants: only what the tile has is compiled.
        if const { is_scalar::<T, I>() } {
            tiles! { 1 x 1 2; 2 x 1 2; }
        } else if size.0 == 1 {
            tiles! { 1 x 1 2 3 4 5 6 7 8 9; }
        } else if const { I::REGISTER_COUNT >= 32 } {
            tiles! { 2 x 1 2 3 4 5 6; 3 x 1 2 3 4 5 6; 4 x 1 2 3 4 5 6; }
        } else {
            tiles! { 2 x 1 2 3; 3 x 1 2 3; 4 x 1 2 3; }
        }
    }
}

/// The largest tiles of [`DotNt`] that the registers of an instruction set hold.
#[derive(Clone, Copy)]
pub struct DotTile {
    /// `A` rows.
    pub a: usize,
    /// `B` rows beside several `A` rows.
    pub b: usize,
    /// `B` rows beside a single `A` row: more pairs are needed to hide the latency of
    /// multiply-adds.
    pub single_b: usize,
}

const fn dot_tile<T: Element, I: Isa>() -> DotTile {
    match I::REGISTER_COUNT {
        _ if is_scalar::<T, I>() => DotTile { a: 2, b: 2, single_b: 2 },
        32.. => DotTile { a: 4, b: 6, single_b: 9 },
        _ => DotTile { a: 4, b: 3, single_b: 9 },
    }
}

/// Tells the [`DotTile`] of an instruction set.
pub struct DotTileOf<T>(pub PhantomData<T>);

impl<T: Element> Kernel for DotTileOf<T> {
    type Output = DotTile;

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> DotTile {
        dot_tile::<T, I>()
    }
}
