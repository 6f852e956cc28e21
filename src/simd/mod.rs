//! The instruction set, chosen once at run time.
//!
//! Kernels are generic over [`Isa`]; holding a value of such a type proves that the instructions
//! exist, because the tokens come only from pulp's fallible constructors. [`IsaKind::run`] is the one
//! place where a [`Kernel`] is compiled for, and entered with, a particular instruction set.
//!
//! `KCONV_ISA` (`avx512_bf16`, `avx512`, `avx2`, `neon` or `portable`) forces one. A name that this machine lacks is an
//! error, never a silent fallback: a test that forces an instruction set must run it.

mod bf16;
pub mod element;
pub mod mul_acc;

use std::sync::OnceLock;

use pulp::bytemuck::{Pod, cast_slice, cast_slice_mut};

use crate::error::{Result, bail};

/// Bytes of a cache line, and of the widest vector.
pub const LINE_BYTES: usize = 64;

/// Values of a cache line.
pub const fn line<T>() -> usize {
    LINE_BYTES / size_of::<T>()
}

/// A set of vector instructions: pulp's vectors plus the few operations that pulp lacks.
pub trait Isa: pulp::Simd {
    /// Whether there is an instruction for `a * b + c`; without one the compiler calls a function for it.
    const FUSED_MULTIPLY_ADD: bool;
    /// Whether there are instructions for [`Isa::lookup_f32s`], [`Isa::scale_f32s`] and
    /// [`Isa::estimate_reciprocal_f32s`].
    const EXPONENTIALS: bool = false;
    /// Whether there are instructions for [`Isa::permute_f32s`], [`Isa::permute2_f32s`] and [`Isa::load_quads_f32s`].
    const PERMUTES: bool = false;

    /// Asks for the cache line at `ptr`, which need not be readable; nothing where there is no such instruction.
    #[inline(always)]
    fn prefetch<T>(self, ptr: *const T) {
        let _ = ptr;
    }
    /// [`Isa::prefetch`] into the second cache only, for what is thousands of cycles ahead: it waits for none of the few
    /// places where the first cache takes note of what it lacks (pixels of 144 channels transposed from memory: 170
    /// cycles each with [`Isa::prefetch`], 75 with this, 230 without either).
    #[inline(always)]
    fn prefetch_l2<T>(self, ptr: *const T) {
        let _ = ptr;
    }
    /// The larger of `x` and `low`; NaN stays NaN, as x86's and ARM's instructions keep a second operand that is none.
    #[inline(always)]
    fn at_least_f32s(self, x: Self::f32s, low: Self::f32s) -> Self::f32s {
        self.max_f32s(low, x)
    }
    /// The smaller of `x` and `high`; NaN stays NaN.
    #[inline(always)]
    fn at_most_f32s(self, x: Self::f32s, high: Self::f32s) -> Self::f32s {
        self.min_f32s(high, x)
    }
    /// As [`Isa::at_least_f32s`].
    #[inline(always)]
    fn at_least_f64s(self, x: Self::f64s, low: Self::f64s) -> Self::f64s {
        self.max_f64s(low, x)
    }
    /// As [`Isa::at_most_f32s`].
    #[inline(always)]
    fn at_most_f64s(self, x: Self::f64s, high: Self::f64s) -> Self::f64s {
        self.min_f64s(high, x)
    }
    /// The vectors, with which the compiler may go on only when it has all of them.
    #[inline(always)]
    fn optimization_barrier_f32s<const N: usize>(self, vectors: [Self::f32s; N]) -> [Self::f32s; N] {
        if N > 1 { std::hint::black_box(vectors) } else { vectors }
    }
    /// `table[index % 32]` of each lane.
    #[inline(always)]
    fn lookup_f32s(self, table: &[f32; 32], index: Self::u32s) -> Self::f32s {
        let mut values = self.splat_f32s(0.0);
        let indices = cast_slice::<_, u32>(std::slice::from_ref(&index));
        for (value, index) in cast_slice_mut::<_, f32>(std::slice::from_mut(&mut values)).iter_mut().zip(indices) {
            *value = table[*index as usize % 32];
        }
        values
    }
    /// `a * 2^floor(n)` for normal numbers `a` and `n` from -160 to 60, rounded once where it is below all normal numbers.
    #[inline(always)]
    fn scale_f32s(self, a: Self::f32s, n: Self::f32s) -> Self::f32s {
        let (mut values, powers) = (a, cast_slice::<_, f32>(std::slice::from_ref(&n)));
        for (value, power) in cast_slice_mut::<_, f32>(std::slice::from_mut(&mut values)).iter_mut().zip(powers) {
            // In doubles nothing of this is too small.
            *value = (f64::from(*value) * f64::from_bits(((power.floor() as i64 + 1023) as u64) << 52)) as f32;
        }
        values
    }
    /// `1 / x` for normal numbers `x`, at most 2^-14 off, relatively.
    #[inline(always)]
    fn estimate_reciprocal_f32s(self, x: Self::f32s) -> Self::f32s {
        self.div_f32s(self.splat_f32s(1.0), x)
    }
    /// The value of `values` at place `index`, modulo the number of lanes, for each lane.
    #[inline(always)]
    fn permute_f32s(self, values: Self::f32s, index: Self::u32s) -> Self::f32s {
        let mut chosen = values;
        let (values, indices) = (cast_slice::<_, f32>(std::slice::from_ref(&values)), [index]);
        let chosen_values = cast_slice_mut::<_, f32>(std::slice::from_mut(&mut chosen));
        for (value, &index) in chosen_values.iter_mut().zip(cast_slice::<_, u32>(&indices)) {
            *value = values[index as usize % values.len()];
        }
        chosen
    }
    /// As [`Isa::permute_f32s`], from two vectors, whose places follow each other.
    #[inline(always)]
    fn permute2_f32s(self, values: [Self::f32s; 2], index: Self::u32s) -> Self::f32s {
        let mut chosen = values[0];
        let (values, indices) = (cast_slice::<_, f32>(&values), [index]);
        let chosen_values = cast_slice_mut::<_, f32>(std::slice::from_mut(&mut chosen));
        for (value, &index) in chosen_values.iter_mut().zip(cast_slice::<_, u32>(&indices)) {
            *value = values[index as usize % values.len()];
        }
        chosen
    }
    /// `N` values again and again, as many as fill a vector, where there is an instruction; `N` is 2, 4 or 8.
    ///
    /// # Safety
    /// They must be readable.
    #[inline(always)]
    unsafe fn load_repeated_f32s<const N: usize>(self, _ptr: *const f32) -> Self::f32s {
        unreachable!("no instruction")
    }
    /// Four values from each of these places on, as many as fill a vector.
    ///
    /// # Safety
    /// They must be readable.
    #[inline(always)]
    unsafe fn load_quads_f32s(self, pieces: [*const f32; 4]) -> Self::f32s {
        let mut values = self.splat_f32s(0.0);
        for (i, value) in cast_slice_mut::<_, f32>(std::slice::from_mut(&mut values)).iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *value = unsafe { pieces[i / 4].add(i % 4).read_unaligned() };
        }
        values
    }
    /// The values of `a` and `b` at even places, and those at odd ones.
    #[inline(always)]
    fn split_f32s(self, a: Self::f32s, b: Self::f32s) -> [Self::f32s; 2] {
        split::<f32, _>(a, b)
    }
    /// The values of `a` and `b` in turns: what [`Isa::split_f32s`] undoes.
    #[inline(always)]
    fn zip_f32s(self, a: Self::f32s, b: Self::f32s) -> [Self::f32s; 2] {
        zip::<f32, _>(a, b)
    }
    /// As [`Isa::split_f32s`].
    #[inline(always)]
    fn split_f64s(self, a: Self::f64s, b: Self::f64s) -> [Self::f64s; 2] {
        split::<f64, _>(a, b)
    }
    /// As [`Isa::zip_f32s`].
    #[inline(always)]
    fn zip_f64s(self, a: Self::f64s, b: Self::f64s) -> [Self::f64s; 2] {
        zip::<f64, _>(a, b)
    }
    /// Loads a vector of 32-bit numbers from 16 bits each.
    ///
    /// # Safety
    /// As many values as the vector has must be readable at `ptr`.
    #[inline(always)]
    unsafe fn load_u16s(self, ptr: *const u16) -> Self::u32s {
        // SAFETY: the caller's promise.
        unsafe { load_lanes(self, size_of::<Self::u32s>() / 4, ptr) }
    }
    /// Stores the lower 16 bits of 32-bit numbers, of which the upper ones are zero.
    ///
    /// # Safety
    /// As many values as the vector has must be writable at `ptr`.
    #[inline(always)]
    unsafe fn store_u16s(self, ptr: *mut u16, value: Self::u32s) {
        // SAFETY: the caller's promise.
        unsafe { store_lanes(self, size_of::<Self::u32s>() / 4, ptr, value) }
    }
    /// As [`Isa::load_u16s`], of the values that `mask` selects, which are a vector's first; the others are zero.
    ///
    /// # Safety
    /// The selected values must be readable at `ptr`.
    #[inline(always)]
    unsafe fn load_masked_u16s(self, mask: Self::m32s, ptr: *const u16) -> Self::u32s {
        // SAFETY: the caller's promise.
        unsafe { load_lanes(self, selected(self, mask), ptr) }
    }
    /// As [`Isa::store_u16s`], of the values that `mask` selects, which are a vector's first.
    ///
    /// # Safety
    /// The selected values must be writable at `ptr`.
    #[inline(always)]
    unsafe fn store_masked_u16s(self, mask: Self::m32s, ptr: *mut u16, value: Self::u32s) {
        // SAFETY: the caller's promise.
        unsafe { store_lanes(self, selected(self, mask), ptr, value) }
    }
    /// Loads `len` numbers of 16 bits, at most twice as many as the vector has of 32; the others are zero.
    ///
    /// # Safety
    /// [`IsaKind::bf16`] must be true, and so many values readable at `ptr`.
    #[inline(always)]
    unsafe fn load_first_u16s(self, len: usize, ptr: *const u16) -> Self::u32s {
        unreachable!("no instruction for {len} at {ptr:?}")
    }
    /// Bf16Dot of the 16-bit numbers of `a`, in the lower halves, and those of `b` at the same places: one half of the
    /// places and the other.
    ///
    /// # Safety
    /// [`IsaKind::bf16`] must be true.
    #[inline(always)]
    unsafe fn unpack_u16s(self, a: Self::u32s, b: Self::u32s) -> [Self::u32s; 2] {
        unreachable!("no instruction for {a:?} and {b:?}")
    }
    /// The 16-bit number of `values` at place `index`, modulo their number, for each 16 bits.
    ///
    /// # Safety
    /// [`IsaKind::bf16`] must be true.
    #[inline(always)]
    unsafe fn permute_u16s(self, values: Self::u32s, index: Self::u32s) -> Self::u32s {
        unreachable!("no instruction for {values:?} and {index:?}")
    }
    /// `c` plus the products of the bfloat16 numbers in the lower halves of `a` and `b`, and in the upper ones; numbers too
    /// small to be normal are zero.
    ///
    /// # Safety
    /// [`IsaKind::bf16`] must be true.
    #[inline(always)]
    unsafe fn dot_bf16(self, a: Self::u32s, b: Self::u32s, c: Self::f32s) -> Self::f32s {
        unreachable!("no instruction for {a:?}, {b:?} and {c:?}")
    }
    /// The nearest bfloat16 numbers, those with an even last bit between two, in the lower halves; NaN stays NaN, and where there
    /// is an instruction for it, numbers too small to be normal are zero.
    #[inline(always)]
    fn round_bf16(self, value: Self::f32s) -> Self::u32s {
        rounded(self, value)
    }
    /// As [`Isa::round_bf16`], of values at even places, in the lower halves, and at odd ones, in the upper halves.
    #[inline(always)]
    fn round_even_odd_bf16(self, places: [Self::f32s; 2]) -> Self::u32s {
        rounded_even_odd(self, places)
    }
    /// As [`Isa::round_bf16`], of the values at the places of [`Isa::unpack_u16s`], each to its own place.
    ///
    /// # Safety
    /// [`IsaKind::bf16`] must be true.
    #[inline(always)]
    unsafe fn round_unpacked_bf16(self, parts: [Self::f32s; 2]) -> Self::u32s {
        unreachable!("no instruction for {parts:?}")
    }
    /// Transposes a block of `R` rows of `C` values, 4 or 8 each.
    ///
    /// # Safety
    /// As for [`Isa::transpose_f32`].
    unsafe fn transpose_u16<const R: usize, const C: usize>(
        self,
        src: *const u16,
        src_stride: usize,
        dst: *mut u16,
        dst_stride: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { transpose_block::<_, R, C>(src, src_stride, dst, dst_stride) }
    }
    /// Transposes a block of `R` rows of `C` values, 4 or 8 each.
    ///
    /// # Safety
    /// `src` must be readable at `r * src_stride + c` for all `r` below `R` and `c` below `C`, `dst` writable at
    /// `c * dst_stride + r`, and they must not overlap.
    unsafe fn transpose_f32<const R: usize, const C: usize>(
        self,
        src: *const f32,
        src_stride: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { transpose_block::<_, R, C>(src, src_stride, dst, dst_stride) }
    }
    /// Transposes a block of `R` rows of `C` values, 4 or 8 each.
    ///
    /// # Safety
    /// As for [`Isa::transpose_f32`].
    unsafe fn transpose_f64<const R: usize, const C: usize>(
        self,
        src: *const f64,
        src_stride: usize,
        dst: *mut f64,
        dst_stride: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { transpose_block::<_, R, C>(src, src_stride, dst, dst_stride) }
    }
}

/// Splits any two vectors by their places; with the length known the compiler makes shuffles of it.
#[inline(always)]
fn split<T: Pod, V: Pod>(a: V, b: V) -> [V; 2] {
    let (pair, mut parts) = ([a, b], [a, b]);
    let values: &[T] = cast_slice(&pair);
    let len = values.len() / 2;
    let (even, odd) = cast_slice_mut::<V, T>(&mut parts).split_at_mut(len);
    for i in 0..len {
        (even[i], odd[i]) = (values[2 * i], values[2 * i + 1]);
    }
    parts
}

/// Takes the values of any two vectors in turns.
#[inline(always)]
fn zip<T: Pod, V: Pod>(a: V, b: V) -> [V; 2] {
    let (parts, mut pair) = ([a, b], [a, b]);
    let (even, odd) = cast_slice::<V, T>(&parts).split_at(size_of::<V>() / size_of::<T>());
    for (pair, (&even, &odd)) in cast_slice_mut::<V, T>(&mut pair).chunks_exact_mut(2).zip(even.iter().zip(odd)) {
        (pair[0], pair[1]) = (even, odd);
    }
    pair
}

/// Transposes one block; with the bounds known the compiler unrolls it.
///
/// # Safety
/// As for [`Isa::transpose_f32`].
#[inline(always)]
unsafe fn transpose_block<T: Copy, const R: usize, const C: usize>(
    src: *const T,
    src_stride: usize,
    dst: *mut T,
    dst_stride: usize,
) {
    for r in 0..R {
        for c in 0..C {
            // SAFETY: inside the block, by the caller's promise.
            unsafe { *dst.add(c * dst_stride + r) = *src.add(r * src_stride + c) }
        }
    }
}

/// The bits of the nearest bfloat16 numbers, in the upper halves: [`Isa::round_bf16`] without an instruction for it.
#[inline(always)]
fn rounded_upper<I: Isa>(isa: I, x: I::f32s) -> I::u32s {
    let bits = isa.transmute_u32s_f32s(x);
    // Adding half of the last bit that stays, or just less where that bit is even, carries where there is more.
    let last = isa.and_u32s(isa.wrapping_dyn_shr_u32s(bits, isa.splat_u32s(16)), isa.splat_u32s(1));
    let nearest = isa.add_u32s(bits, isa.add_u32s(isa.splat_u32s(0x7fff), last));
    // What makes a number NaN may all be in the half that goes: this bit stays.
    let nan = isa.or_u32s(bits, isa.splat_u32s(0x40_0000));
    isa.select_u32s(isa.equal_f32s(x, x), nearest, nan)
}

/// As [`rounded_upper`], in the lower halves, the upper ones being zero.
#[inline(always)]
fn rounded<I: Isa>(isa: I, x: I::f32s) -> I::u32s {
    isa.wrapping_dyn_shr_u32s(rounded_upper(isa, x), isa.splat_u32s(16))
}

/// [`Isa::round_even_odd_bf16`] without an instruction for it.
#[inline(always)]
fn rounded_even_odd<I: Isa>(isa: I, [even, odd]: [I::f32s; 2]) -> I::u32s {
    let odd = isa.and_u32s(rounded_upper(isa, odd), isa.splat_u32s(0xffff_0000));
    isa.or_u32s(rounded(isa, even), odd)
}

/// How many of a vector's first values a mask selects.
#[inline(always)]
fn selected<I: Isa>(isa: I, mask: I::m32s) -> usize {
    isa.first_true_m32s(isa.not_m32s(mask))
}

/// Loads the first `len` values of a vector one by one; the others are zero. Where `len` is known and there are
/// instructions for it, the compiler uses these.
///
/// # Safety
/// They must be readable at `ptr`.
#[inline(always)]
unsafe fn load_lanes<I: Isa>(isa: I, len: usize, ptr: *const u16) -> I::u32s {
    let mut value = isa.splat_u32s(0);
    let lanes = cast_slice_mut::<_, u32>(std::slice::from_mut(&mut value));
    for (i, lane) in lanes[..len].iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *lane = u32::from(unsafe { *ptr.add(i) });
    }
    value
}

/// Stores the first `len` values of a vector one by one, as [`load_lanes`] loads them.
///
/// # Safety
/// They must be writable at `ptr`.
#[inline(always)]
unsafe fn store_lanes<I: Isa>(_isa: I, len: usize, ptr: *mut u16, value: I::u32s) {
    let lanes = cast_slice::<_, u32>(std::slice::from_ref(&value));
    for (i, &lane) in lanes[..len].iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { *ptr.add(i) = lane as u16 };
    }
}

// Rust's `max` and `min` would drop NaN.
impl Isa for pulp::Scalar {
    const FUSED_MULTIPLY_ADD: bool = false;

    #[inline(always)]
    fn at_least_f32s(self, x: f32, low: f32) -> f32 {
        if x < low { low } else { x }
    }
    #[inline(always)]
    fn at_most_f32s(self, x: f32, high: f32) -> f32 {
        if x > high { high } else { x }
    }
    #[inline(always)]
    fn at_least_f64s(self, x: f64, low: f64) -> f64 {
        if x < low { low } else { x }
    }
    #[inline(always)]
    fn at_most_f64s(self, x: f64, high: f64) -> f64 {
        if x > high { high } else { x }
    }
}

#[cfg(target_arch = "aarch64")]
impl Isa for pulp::aarch64::Neon {
    const FUSED_MULTIPLY_ADD: bool = true;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use pulp::cast;

    use super::{Isa, rounded, rounded_even_odd};

    /// Four values at `row` and the four that stand four rows below.
    ///
    /// # Safety
    /// AVX must be there and both quadruples readable.
    #[inline(always)]
    unsafe fn two_halves(row: *const f32, stride: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe {
            let (low, high) = (_mm_loadu_ps(row), _mm_loadu_ps(row.add(4 * stride)));
            _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(low), high)
        }
    }

    /// The columns of four rows, in each half.
    ///
    /// # Safety
    /// AVX must be there.
    #[inline(always)]
    unsafe fn columns([r0, r1, r2, r3]: [__m256; 4]) -> [__m256; 4] {
        //   r0 = a0 a1 a2 a3 | e0 e1 e2 e3      (rows a..h, columns 0..3)
        //   unpack a,b: a0 b0 a1 b1 | e0 f0 e1 f1; shuffle with c,d: a0 b0 c0 d0 | e0 f0 g0 h0
        // SAFETY: the caller's promise.
        unsafe {
            let (t0, t1) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
            let (t2, t3) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
            [
                _mm256_shuffle_ps::<0x44>(t0, t2),
                _mm256_shuffle_ps::<0xee>(t0, t2),
                _mm256_shuffle_ps::<0x44>(t1, t3),
                _mm256_shuffle_ps::<0xee>(t1, t3),
            ]
        }
    }

    /// [`Isa::transpose_f32`] through registers.
    ///
    /// # Safety
    /// AVX must be there; otherwise as for [`Isa::transpose_f32`].
    #[inline(always)]
    unsafe fn transpose_32<const R: usize, const C: usize>(
        src: *const f32,
        src_stride: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        // SAFETY: the caller promises AVX and that both blocks are in bounds.
        unsafe {
            if R == 8 {
                // Half rows are loaded straight into the two lanes of a register (`vinsertf128` from memory), which leaves
                // 16 instead of 24 shuffles for 8 x 8 values on the one shuffle port.
                for half in 0..C / 4 {
                    let (from, to) = (src.add(4 * half), dst.add(4 * half * dst_stride));
                    let r0 = two_halves(from, src_stride);
                    let r1 = two_halves(from.add(src_stride), src_stride);
                    let r2 = two_halves(from.add(2 * src_stride), src_stride);
                    let r3 = two_halves(from.add(3 * src_stride), src_stride);
                    let [c0, c1, c2, c3] = columns([r0, r1, r2, r3]);
                    _mm256_storeu_ps(to, c0);
                    _mm256_storeu_ps(to.add(dst_stride), c1);
                    _mm256_storeu_ps(to.add(2 * dst_stride), c2);
                    _mm256_storeu_ps(to.add(3 * dst_stride), c3);
                }
            } else {
                // The lanes are columns 0..3 and 4..7, if there are any.
                let mut rows = [_mm256_setzero_ps(); 4];
                for (i, row) in rows.iter_mut().enumerate() {
                    let from = src.add(i * src_stride);
                    *row = if C == 8 { _mm256_loadu_ps(from) } else { _mm256_castps128_ps256(_mm_loadu_ps(from)) };
                }
                for (i, column) in columns(rows).into_iter().enumerate() {
                    let to = dst.add(i * dst_stride);
                    _mm_storeu_ps(to, _mm256_castps256_ps128(column));
                    if C == 8 {
                        _mm_storeu_ps(to.add(4 * dst_stride), _mm256_extractf128_ps::<1>(column));
                    }
                }
            }
        }
    }

    /// [`Isa::transpose_f64`] as 4 x 4 blocks through registers.
    ///
    /// # Safety
    /// AVX must be there; otherwise as for [`Isa::transpose_f64`].
    #[inline(always)]
    unsafe fn transpose_64<const R: usize, const C: usize>(
        src: *const f64,
        src_stride: usize,
        dst: *mut f64,
        dst_stride: usize,
    ) {
        // SAFETY: the caller promises AVX and that both blocks are in bounds.
        unsafe {
            for i in (0..R).step_by(4) {
                for j in (0..C).step_by(4) {
                    let s = src.add(i * src_stride + j);
                    let d = dst.add(j * dst_stride + i);
                    let r0 = _mm256_loadu_pd(s);
                    let r1 = _mm256_loadu_pd(s.add(src_stride));
                    let r2 = _mm256_loadu_pd(s.add(2 * src_stride));
                    let r3 = _mm256_loadu_pd(s.add(3 * src_stride));
                    let (t0, t1) = (_mm256_unpacklo_pd(r0, r1), _mm256_unpackhi_pd(r0, r1));
                    let (t2, t3) = (_mm256_unpacklo_pd(r2, r3), _mm256_unpackhi_pd(r2, r3));
                    _mm256_storeu_pd(d, _mm256_permute2f128_pd::<0x20>(t0, t2));
                    _mm256_storeu_pd(d.add(dst_stride), _mm256_permute2f128_pd::<0x20>(t1, t3));
                    _mm256_storeu_pd(d.add(2 * dst_stride), _mm256_permute2f128_pd::<0x31>(t0, t2));
                    _mm256_storeu_pd(d.add(3 * dst_stride), _mm256_permute2f128_pd::<0x31>(t1, t3));
                }
            }
        }
    }

    /// [`Isa::optimization_barrier_f32s`] without leaving the registers.
    ///
    /// # Safety
    /// AVX-512 must be there.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn barrier_512([mut a, mut b, mut c, mut d]: [__m512; 4]) -> [__m512; 4] {
        // SAFETY: no instruction at all.
        unsafe {
            std::arch::asm!(
                "/* {} {} {} {} */",
                inout(zmm_reg) a,
                inout(zmm_reg) b,
                inout(zmm_reg) c,
                inout(zmm_reg) d,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        [a, b, c, d]
    }

    /// [`Isa::dot_bf16`]. (Not the compiler's own function, which code for AVX-512 alone would have to call.)
    ///
    /// # Safety
    /// AVX512-BF16 must be there.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn dot_512(a: __m512i, b: __m512i, mut c: __m512) -> __m512 {
        // SAFETY: registers alone.
        unsafe {
            std::arch::asm!(
                "vdpbf16ps {}, {}, {}",
                inout(zmm_reg) c,
                in(zmm_reg) a,
                in(zmm_reg) b,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        c
    }

    /// Whether there is AVX512-BF16.
    #[inline(always)]
    pub fn has_bf16() -> bool {
        std::arch::is_x86_feature_detected!("avx512bf16")
    }

    /// The nearest bfloat16 numbers to those of `low`, in the lower half, and of `high`.
    ///
    /// # Safety
    /// AVX512-BF16 must be there.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn round_512(low: __m512, high: __m512) -> __m512i {
        let rounded;
        // SAFETY: registers alone.
        unsafe {
            std::arch::asm!(
                "vcvtne2ps2bf16 {}, {}, {}",
                out(zmm_reg) rounded,
                in(zmm_reg) high,
                in(zmm_reg) low,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        rounded
    }

    /// [`Isa::transpose_u16`] through registers.
    ///
    /// # Safety
    /// As for [`Isa::transpose_u16`].
    #[inline(always)]
    unsafe fn transpose_16<const R: usize, const C: usize>(
        src: *const u16,
        src_stride: usize,
        dst: *mut u16,
        dst_stride: usize,
    ) {
        // SAFETY: SSE2 is part of x86-64; the caller promises that both blocks are in bounds.
        unsafe {
            let row = |i: usize| {
                let from = src.add(i * src_stride).cast();
                if C == 8 { _mm_loadu_si128(from) } else { _mm_loadl_epi64(from) }
            };
            // Of rows a and b: a0 b0 a1 b1 ...; of four rows: a0 b0 c0 d0 a1 ...
            let pairs = |i: usize| {
                let (a, b) = (row(i), row(i + 1));
                (_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b))
            };
            let fours = |i: usize| {
                let ((a, b), (c, d)) = (pairs(i), pairs(i + 2));
                [_mm_unpacklo_epi32(a, c), _mm_unpackhi_epi32(a, c), _mm_unpacklo_epi32(b, d), _mm_unpackhi_epi32(b, d)]
            };
            let (upper, lower) = (fours(0), if R == 8 { fours(4) } else { [_mm_setzero_si128(); 4] });
            for i in 0..C / 2 {
                let to = dst.add(2 * i * dst_stride);
                let even = _mm_unpacklo_epi64(upper[i], lower[i]);
                let odd = _mm_unpackhi_epi64(upper[i], lower[i]);
                if R == 8 {
                    _mm_storeu_si128(to.cast(), even);
                    _mm_storeu_si128(to.add(dst_stride).cast(), odd);
                } else {
                    _mm_storel_epi64(to.cast(), even);
                    _mm_storel_epi64(to.add(dst_stride).cast(), odd);
                }
            }
        }
    }

    macro_rules! avx {
        ($isa:ty { $($own:item)* }) => {
            impl Isa for $isa {
                const FUSED_MULTIPLY_ADD: bool = true;
                $($own)*

                #[inline(always)]
                fn prefetch<T>(self, ptr: *const T) {
                    // SAFETY: a hint that never faults.
                    unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr.cast()) }
                }
                #[inline(always)]
                fn prefetch_l2<T>(self, ptr: *const T) {
                    // SAFETY: as above.
                    unsafe { _mm_prefetch::<_MM_HINT_T1>(ptr.cast()) }
                }
                #[inline(always)]
                unsafe fn transpose_f32<const R: usize, const C: usize>(
                    self,
                    src: *const f32,
                    src_stride: usize,
                    dst: *mut f32,
                    dst_stride: usize,
                ) {
                    // SAFETY: the token proves AVX; the rest is the caller's promise.
                    unsafe { transpose_32::<R, C>(src, src_stride, dst, dst_stride) }
                }
                #[inline(always)]
                unsafe fn transpose_f64<const R: usize, const C: usize>(
                    self,
                    src: *const f64,
                    src_stride: usize,
                    dst: *mut f64,
                    dst_stride: usize,
                ) {
                    // SAFETY: the token proves AVX; the rest is the caller's promise.
                    unsafe { transpose_64::<R, C>(src, src_stride, dst, dst_stride) }
                }
                #[inline(always)]
                unsafe fn transpose_u16<const R: usize, const C: usize>(
                    self,
                    src: *const u16,
                    src_stride: usize,
                    dst: *mut u16,
                    dst_stride: usize,
                ) {
                    // SAFETY: the caller's promise.
                    unsafe { transpose_16::<R, C>(src, src_stride, dst, dst_stride) }
                }
            }
        };
    }
    avx!(pulp::x86::V3 {
        const PERMUTES: bool = true;

        #[inline(always)]
        fn permute_f32s(self, values: Self::f32s, index: Self::u32s) -> Self::f32s {
            // SAFETY: the token proves AVX2.
            cast(unsafe { _mm256_permutevar8x32_ps(cast(values), cast(index)) })
        }
        #[inline(always)]
        fn permute2_f32s(self, values: [Self::f32s; 2], index: Self::u32s) -> Self::f32s {
            let (first, second) = (cast(self.permute_f32s(values[0], index)), cast(self.permute_f32s(values[1], index)));
            // SAFETY: the token proves AVX2.
            unsafe {
                // Places from 8 on: that bit becomes the sign, which selects.
                let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(cast(index)));
                cast(_mm256_blendv_ps(first, second, upper))
            }
        }
        #[inline(always)]
        unsafe fn load_quads_f32s(self, [a, b, ..]: [*const f32; 4]) -> Self::f32s {
            // SAFETY: the token proves AVX2; the values are readable, by the caller's promise.
            unsafe {
                let low = _mm256_castps128_ps256(_mm_loadu_ps(a));
                cast(_mm256_insertf128_ps::<1>(low, _mm_loadu_ps(b)))
            }
        }
        #[inline(always)]
        fn split_f32s(self, a: Self::f32s, b: Self::f32s) -> [Self::f32s; 2] {
            // SAFETY: the token proves AVX2.
            unsafe {
                let (a, b) = (cast(a), cast(b));
                // Bf16Dot of values come out as a0 b0 a1 b1.
                let pairs = [_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xdd>(a, b)];
                pairs.map(|v| cast(_mm256_permute4x64_epi64::<0xd8>(_mm256_castps_si256(v))))
            }
        }
        #[inline(always)]
        fn zip_f32s(self, a: Self::f32s, b: Self::f32s) -> [Self::f32s; 2] {
            // SAFETY: the token proves AVX2.
            unsafe {
                let (a, b) = (cast(a), cast(b));
                let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                [cast(_mm256_permute2f128_ps::<0x20>(low, high)), cast(_mm256_permute2f128_ps::<0x31>(low, high))]
            }
        }
        #[inline(always)]
        unsafe fn load_u16s(self, ptr: *const u16) -> Self::u32s {
            // SAFETY: the token proves AVX2; the rest is the caller's promise.
            cast(unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(ptr.cast())) })
        }
        #[inline(always)]
        unsafe fn store_u16s(self, ptr: *mut u16, value: Self::u32s) {
            // SAFETY: the token proves AVX2; the rest is the caller's promise.
            unsafe { _mm_storeu_si128(ptr.cast(), packed(cast(value))) }
        }
        #[inline(always)]
        unsafe fn load_masked_u16s(self, mask: Self::m32s, ptr: *const u16) -> Self::u32s {
            let mut values = [0u16; 8];
            // SAFETY: the token proves AVX2; the rest is the caller's promise.
            unsafe {
                copy_up_to_8(ptr, values.as_mut_ptr(), selected(cast(mask)));
                self.load_u16s(values.as_ptr())
            }
        }
        #[inline(always)]
        unsafe fn store_masked_u16s(self, mask: Self::m32s, ptr: *mut u16, value: Self::u32s) {
            let mut values = [0u16; 8];
            // SAFETY: the token proves AVX2; the rest is the caller's promise.
            unsafe {
                self.store_u16s(values.as_mut_ptr(), value);
                copy_up_to_8(values.as_ptr(), ptr, selected(cast(mask)));
            }
        }
    });
    avx!(pulp::x86::V4 {
        const EXPONENTIALS: bool = true;
        const PERMUTES: bool = true;

        #[inline(always)]
        unsafe fn load_first_u16s(self, len: usize, ptr: *const u16) -> Self::u32s {
            let mask = u32::MAX.checked_shr(32 - len as u32).unwrap_or(0);
            // SAFETY: the token proves AVX-512; the rest is the caller's promise.
            cast(unsafe { _mm512_maskz_loadu_epi16(mask, ptr.cast()) })
        }
        #[inline(always)]
        unsafe fn unpack_u16s(self, a: Self::u32s, b: Self::u32s) -> [Self::u32s; 2] {
            // Places 0 to 3 of each eight, and 4 to 7.
            // SAFETY: the token proves AVX-512.
            unsafe {
                let (a, b) = (cast(a), cast(b));
                [cast(_mm512_unpacklo_epi16(a, b)), cast(_mm512_unpackhi_epi16(a, b))]
            }
        }
        #[inline(always)]
        unsafe fn dot_bf16(self, a: Self::u32s, b: Self::u32s, c: Self::f32s) -> Self::f32s {
            // SAFETY: the caller's promise.
            cast(unsafe { dot_512(cast(a), cast(b), cast(c)) })
        }
        #[inline(always)]
        fn round_bf16(self, value: Self::f32s) -> Self::u32s {
            if !has_bf16() {
                return rounded(self, value);
            }
            // SAFETY: asked above; the token proves AVX-512.
            unsafe {
                let (value, zero) = (cast(value), _mm512_setzero_ps());
                cast(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(round_512(value, zero))))
            }
        }
        #[inline(always)]
        fn round_even_odd_bf16(self, [even, odd]: [Self::f32s; 2]) -> Self::u32s {
            const PLACES: [u16; 32] = in_turns(1);
            if !has_bf16() {
                return rounded_even_odd(self, [even, odd]);
            }
            // SAFETY: asked above; the token proves AVX-512.
            unsafe { cast(_mm512_permutexvar_epi16(cast(PLACES), round_512(cast(even), cast(odd)))) }
        }
        #[inline(always)]
        unsafe fn round_unpacked_bf16(self, [first, second]: [Self::f32s; 2]) -> Self::u32s {
            const PLACES: [u16; 32] = in_turns(4);
            // SAFETY: the caller's promise.
            unsafe { cast(_mm512_permutexvar_epi16(cast(PLACES), round_512(cast(first), cast(second)))) }
        }

        #[inline(always)]
        fn lookup_f32s(self, table: &[f32; 32], index: Self::u32s) -> Self::f32s {
            // SAFETY: the token proves AVX-512; the table has two vectors' values.
            unsafe {
                let (low, high) = (_mm512_loadu_ps(table.as_ptr()), _mm512_loadu_ps(table.as_ptr().add(16)));
                cast(_mm512_permutex2var_ps(low, cast(index), high))
            }
        }
        #[inline(always)]
        fn permute_f32s(self, values: Self::f32s, index: Self::u32s) -> Self::f32s {
            // SAFETY: the token proves AVX-512.
            cast(unsafe { _mm512_permutexvar_ps(cast(index), cast(values)) })
        }
        #[inline(always)]
        fn permute2_f32s(self, [a, b]: [Self::f32s; 2], index: Self::u32s) -> Self::f32s {
            // SAFETY: the token proves AVX-512.
            cast(unsafe { _mm512_permutex2var_ps(cast(a), cast(index), cast(b)) })
        }
        #[inline(always)]
        unsafe fn load_repeated_f32s<const N: usize>(self, ptr: *const f32) -> Self::f32s {
            // SAFETY: the token proves AVX-512; the values are readable, by the caller's promise.
            cast(unsafe {
                match const { N } {
                    2 => _mm512_castpd_ps(_mm512_set1_pd(ptr.cast::<f64>().read_unaligned())),
                    4 => _mm512_broadcast_f32x4(_mm_loadu_ps(ptr)),
                    8 => _mm512_broadcast_f32x8(_mm256_loadu_ps(ptr)),
                    _ => unreachable!("no instruction"),
                }
            })
        }
        #[inline(always)]
        unsafe fn load_quads_f32s(self, [a, b, c, d]: [*const f32; 4]) -> Self::f32s {
            // SAFETY: the token proves AVX-512; the values are readable, by the caller's promise.
            unsafe {
                let low = _mm512_castps128_ps512(_mm_loadu_ps(a));
                let two = _mm512_insertf32x4::<1>(low, _mm_loadu_ps(b));
                let three = _mm512_insertf32x4::<2>(two, _mm_loadu_ps(c));
                cast(_mm512_insertf32x4::<3>(three, _mm_loadu_ps(d)))
            }
        }
        #[inline(always)]
        unsafe fn permute_u16s(self, values: Self::u32s, index: Self::u32s) -> Self::u32s {
            // SAFETY: the token proves AVX-512.
            cast(unsafe { _mm512_permutexvar_epi16(cast(index), cast(values)) })
        }
        #[inline(always)]
        fn scale_f32s(self, a: Self::f32s, n: Self::f32s) -> Self::f32s {
            // SAFETY: the token proves AVX-512.
            cast(unsafe { _mm512_scalef_ps(cast(a), cast(n)) })
        }
        #[inline(always)]
        fn estimate_reciprocal_f32s(self, x: Self::f32s) -> Self::f32s {
            // SAFETY: the token proves AVX-512.
            cast(unsafe { _mm512_rcp14_ps(cast(x)) })
        }
        #[inline(always)]
        fn optimization_barrier_f32s<const N: usize>(self, mut vectors: [Self::f32s; N]) -> [Self::f32s; N] {
            // `black_box` goes through memory: 10 instead of 8 ns for a vector's swish.
            if let Some(four) = vectors.first_chunk_mut::<4>() {
                // SAFETY: the token proves AVX-512.
                *four = unsafe { barrier_512(four.map(cast)) }.map(cast);
            }
            vectors
        }
        #[inline(always)]
        fn split_f32s(self, a: Self::f32s, b: Self::f32s) -> [Self::f32s; 2] {
            const EVEN: [i32; 16] = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30];
            // SAFETY: the token proves AVX-512.
            unsafe {
                let even: __m512i = cast(EVEN);
                let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
                [even, odd].map(|places| cast(_mm512_permutex2var_ps(cast(a), places, cast(b))))
            }
        }
        #[inline(always)]
        fn zip_f32s(self, a: Self::f32s, b: Self::f32s) -> [Self::f32s; 2] {
            const LOW: [i32; 16] = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23];
            // SAFETY: the token proves AVX-512.
            unsafe {
                let low: __m512i = cast(LOW);
                let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
                [low, high].map(|places| cast(_mm512_permutex2var_ps(cast(a), places, cast(b))))
            }
        }
        #[inline(always)]
        unsafe fn load_u16s(self, ptr: *const u16) -> Self::u32s {
            // SAFETY: the token proves AVX-512; the rest is the caller's promise.
            cast(unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(ptr.cast())) })
        }
        #[inline(always)]
        unsafe fn store_u16s(self, ptr: *mut u16, value: Self::u32s) {
            // SAFETY: the token proves AVX-512; the rest is the caller's promise.
            unsafe { _mm256_storeu_si256(ptr.cast(), _mm512_cvtepi32_epi16(cast(value))) }
        }
        #[inline(always)]
        unsafe fn load_masked_u16s(self, mask: Self::m32s, ptr: *const u16) -> Self::u32s {
            // SAFETY: the token proves AVX-512; the rest is the caller's promise.
            cast(unsafe { _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask.0, ptr.cast())) })
        }
        #[inline(always)]
        unsafe fn store_masked_u16s(self, mask: Self::m32s, ptr: *mut u16, value: Self::u32s) {
            // SAFETY: the token proves AVX-512; the rest is the caller's promise.
            unsafe { _mm256_mask_storeu_epi16(ptr.cast(), mask.0, _mm512_cvtepi32_epi16(cast(value))) }
        }
    });

    /// Places of the values of two vectors of 16, one behind the other as [`round_512`] leaves them, that take `run` values of
    /// each in turns.
    const fn in_turns(run: u16) -> [u16; 32] {
        let (mut places, mut i) = ([0; 32], 0);
        while i < 32 {
            let place = i as u16;
            places[i] = place / (2 * run) * run + place % run + place / run % 2 * 16;
            i += 1;
        }
        places
    }

    /// The lower halves of eight numbers whose upper ones are zero.
    ///
    /// # Safety
    /// AVX2 must be there.
    #[inline(always)]
    unsafe fn packed(value: __m256i) -> __m128i {
        // SAFETY: the caller's promise.
        unsafe { _mm_packus_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256::<1>(value)) }
    }

    /// How many of eight values a mask selects.
    ///
    /// # Safety
    /// AVX2 must be there.
    #[inline(always)]
    unsafe fn selected(mask: __m256i) -> usize {
        // SAFETY: the caller's promise.
        unsafe { _mm256_movemask_ps(_mm256_castsi256_ps(mask)).count_ones() as usize }
    }

    /// Copies 0 to 8 values in at most four steps, none of them a call.
    ///
    /// # Safety
    /// So many values must be readable at `from` and writable at `to`.
    #[inline(always)]
    unsafe fn copy_up_to_8(from: *const u16, to: *mut u16, len: usize) {
        let mut at = 0;
        for size in [8, 4, 2, 1] {
            if len & size != 0 {
                // SAFETY: the sizes add up to `len`.
                unsafe { to.add(at).copy_from_nonoverlapping(from.add(at), size) };
                at += size;
            }
        }
    }
}

/// Work written once for every instruction set. Implementations mark `run` `#[inline(always)]`, so that
/// the body is compiled inside the function that enables the instructions.
pub trait Kernel {
    /// What the kernel returns.
    type Output;
    /// Runs on the instruction set that `isa` stands for.
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// A [`Kernel`] over raw pointers, of which its caller has promised what its type's *Safety* section demands.
pub struct Promised<K>(K);

impl<K> Promised<K> {
    /// The kernel, ready to run.
    ///
    /// # Safety
    /// Until it has run, what the type's *Safety* section demands must be true.
    #[inline(always)]
    pub unsafe fn new_unchecked(kernel: K) -> Self {
        Self(kernel)
    }

    /// The kernel, for its own `run`.
    #[inline(always)]
    pub(crate) fn into_inner(self) -> K {
        self.0
    }
}

/// The instruction sets that this build knows, each with the proof that it exists.
#[derive(Clone, Copy, Debug)]
pub enum IsaKind {
    /// The next, and products of pairs of bfloat16 numbers (AVX512-BF16), of which pulp knows nothing.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(pulp::x86::V4),
    /// AVX-512 (F, BW, CD, DQ, VL).
    #[cfg(target_arch = "x86_64")]
    Avx512(pulp::x86::V4),
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2(pulp::x86::V3),
    /// NEON.
    #[cfg(target_arch = "aarch64")]
    Neon(pulp::aarch64::Neon),
    /// No vector instructions of its own: correct everywhere.
    Portable(pulp::Scalar),
}

struct Call<I, K>(I, K);

impl<I: Isa, K: Kernel> pulp::NullaryFnOnce for Call<I, K> {
    type Output = K::Output;
    #[inline(always)]
    fn call(self) -> K::Output {
        self.1.run(self.0)
    }
}

impl IsaKind {
    /// Compiles and runs `kernel` for this instruction set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(all(target_arch = "x86_64", not(any(kconv_only = "avx2", kconv_only = "portable"))))]
            Self::Avx512Bf16(isa) | Self::Avx512(isa) => isa.vectorize(Call(isa, kernel)),
            #[cfg(all(target_arch = "x86_64", not(any(kconv_only = "avx512", kconv_only = "portable"))))]
            Self::Avx2(isa) => isa.vectorize(Call(isa, kernel)),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(isa) => isa.vectorize(Call(isa, kernel)),
            #[cfg(not(any(kconv_only = "avx512", kconv_only = "avx2")))]
            Self::Portable(isa) => kernel.run(isa),
            #[cfg(any(kconv_only = "avx512", kconv_only = "avx2", kconv_only = "portable"))]
            _ => unreachable!("compiled for one instruction set only"),
        }
    }

    /// Whether bfloat16 numbers are multiplied in pairs.
    pub fn bf16(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => true,
            _ => false,
        }
    }

    /// The name that `KCONV_ISA` knows it by.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => "avx512_bf16",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => "neon",
            Self::Portable(_) => "portable",
        }
    }

    /// Every instruction set of this machine, the best first.
    pub fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = pulp::x86::V4::try_new();
            all.extend(avx512.filter(|_| x86::has_bf16()).map(Self::Avx512Bf16));
            all.extend(avx512.map(Self::Avx512));
            // Intel's processors take four times as long for products of pairs as for those of float32 numbers. (16 layers of
            // kEffNet-B0 at 32x32 in NCHW, 32 images, a thread of an Intel Xeon: 12.5 ms by pairs forward, 12.6 by input and 13.4
            // by weight; 8.4, 8.7 and 12.9 without.)
            if is_intel() {
                all.reverse();
            }
            all.extend(pulp::x86::V3::try_new().map(Self::Avx2));
        }
        #[cfg(target_arch = "aarch64")]
        all.extend(pulp::aarch64::Neon::try_new().map(Self::Neon));
        all.push(Self::Portable(pulp::Scalar::new()));
        // A build for one instruction set, for quick turns while a kernel is written: see CONTRIBUTING.md.
        #[cfg(any(kconv_only = "avx512", kconv_only = "avx2", kconv_only = "portable"))]
        all.retain(|isa| {
            let only = if cfg!(kconv_only = "avx512") {
                "avx512"
            } else if cfg!(kconv_only = "avx2") {
                "avx2"
            } else {
                "portable"
            };
            isa.name().starts_with(only)
        });
        all
    }

    /// The instruction set called `name`.
    pub fn by_name(name: &str) -> Result<Self> {
        let all = Self::available();
        match all.iter().find(|isa| isa.name() == name) {
            Some(isa) => Ok(*isa),
            None => {
                let names: Vec<_> = all.iter().map(|isa| isa.name()).collect();
                bail!("KCONV_ISA={name:?} is not available on this machine; expected one of {}", names.join(", "))
            }
        }
    }
}

/// The instruction set of this process: `KCONV_ISA` where it is set, else the best there is.
pub fn active() -> Result<IsaKind> {
    static ACTIVE: OnceLock<Result<IsaKind>> = OnceLock::new();
    ACTIVE
        .get_or_init(|| match std::env::var("KCONV_ISA") {
            Ok(name) if !name.is_empty() => IsaKind::by_name(&name),
            _ => Ok(IsaKind::available()[0]),
        })
        .clone()
}

/// Whether the processor looks ahead by itself where rows and pixels are read in order, as Intel's do.
///
/// Then asking takes only what it could use itself: the few places where the L1 cache takes note of what it lacks, in which
/// [`Isa::prefetch_l2`] waits there too. (Two threads of an Intel Xeon: the weight gradients of the pointwise layers of
/// kEffNet-B0 at 32x32 take 37 ms asking, 30 without. On an AMD EPYC asking pays: see there.)
pub fn has_stream_prefetcher() -> bool {
    is_intel()
}

/// Whether Intel made the processor.
fn is_intel() -> bool {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        static INTEL: OnceLock<bool> = OnceLock::new();
        *INTEL.get_or_init(|| {
            // SAFETY: every x86-64 processor has the instruction. (From Rust 1.94 on, calling it is safe.)
            #[allow(unused_unsafe)]
            let name = unsafe { std::arch::x86_64::__cpuid(0) };
            [name.ebx, name.edx, name.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
        })
    }
    #[cfg(any(not(target_arch = "x86_64"), miri))]
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Transpose<'a, const R: usize, const C: usize>([&'a mut [u16]; 2], [&'a mut [f32]; 2], [&'a mut [f64]; 2]);
    impl<const R: usize, const C: usize> Kernel for Transpose<'_, R, C> {
        type Output = ();
        #[inline(always)]
        fn run<I: Isa>(self, isa: I) {
            // SAFETY: all slices are 8 rows of 9.
            unsafe {
                isa.transpose_u16::<R, C>(self.0[0].as_ptr(), 9, self.0[1].as_mut_ptr(), 9);
                isa.transpose_f32::<R, C>(self.1[0].as_ptr(), 9, self.1[1].as_mut_ptr(), 9);
                isa.transpose_f64::<R, C>(self.2[0].as_ptr(), 9, self.2[1].as_mut_ptr(), 9);
            }
        }
    }

    fn transposes<const R: usize, const C: usize>() {
        let (mut a, mut b, mut c): (Vec<u16>, Vec<f32>, Vec<f64>) =
            (0..72).map(|i| (i, f32::from(i), f64::from(i))).collect();
        for isa in IsaKind::available() {
            let (mut d, mut e, mut f) = (vec![99; 72], vec![99.0; 72], vec![99.0; 72]);
            isa.run(Transpose::<R, C>([&mut a, &mut d], [&mut b, &mut e], [&mut c, &mut f]));
            for (column, row) in (0..8).flat_map(|i| (0..8).map(move |j| (i, j))) {
                let (from, to) = (row * 9 + column, column * 9 + row);
                let expected = if row < R && column < C { a[from] } else { 99 };
                let result = (d[to], e[to], f[to]);
                assert_eq!(result, (expected, expected.into(), expected.into()), "{} {R} x {C}", isa.name());
            }
        }
    }

    #[test]
    fn transposes_all_blocks() {
        transposes::<8, 8>();
        transposes::<8, 4>();
        transposes::<4, 8>();
        transposes::<4, 4>();
    }

    /// Copies `len` of the values at hand, through vectors of 32 bits, by masks; what fits, also without.
    struct Copy<'a>(&'a [u16], &'a mut [u16], usize);
    impl Kernel for Copy<'_> {
        type Output = ();
        #[inline(always)]
        fn run<I: Isa>(self, isa: I) {
            let lanes = size_of::<I::u32s>() / 4;
            for at in (0..self.2).step_by(lanes) {
                let mask = isa.mask_between_m32s(0, (self.2 - at).min(lanes) as u32).mask();
                // SAFETY: both slices hold `len` values.
                unsafe {
                    let (from, to) = (self.0.as_ptr().add(at), self.1.as_mut_ptr().add(at));
                    isa.store_masked_u16s(mask, to, isa.load_masked_u16s(mask, from));
                    if at + lanes <= self.2 {
                        isa.store_u16s(to, isa.add_u32s(isa.load_masked_u16s(mask, from), isa.load_u16s(from)));
                    }
                }
            }
        }
    }

    #[test]
    fn halves_of_any_number() {
        let from: Vec<u16> = (0..40).map(|i| 1000 + i).collect();
        for (isa, len) in IsaKind::available().into_iter().flat_map(|isa| (0..40).map(move |len| (isa, len))) {
            let mut to = vec![7; 40];
            isa.run(Copy(&from, &mut to, len));
            let (copied, rest) = to.split_at(len);
            assert!(copied.iter().zip(&from).all(|(to, from)| to == from || *to == 2 * from), "{} {len}", isa.name());
            assert!(rest.iter().all(|value| *value == 7), "{} {len}", isa.name());
        }
    }

    /// A table's values, their multiples by powers of two, and reciprocals: of each place's number.
    struct Exponentials<'a>(&'a [f32; 32], [&'a mut [f32]; 3]);
    impl Kernel for Exponentials<'_> {
        type Output = ();
        #[inline(always)]
        fn run<I: Isa>(self, isa: I) {
            let Self(table, [found, scaled, reciprocals]) = self;
            for at in (0..found.len()).step_by(size_of::<I::f32s>() / 4) {
                let numbers: [f32; 16] = std::array::from_fn(|i| (at + i) as f32);
                let bits: [u32; 16] = std::array::from_fn(|i| (at + i) as u32);
                let numbers: I::f32s = cast_slice(&numbers)[0];
                let value = isa.lookup_f32s(table, cast_slice(&bits)[0]);
                let powers = isa.sub_f32s(numbers, isa.splat_f32s(150.5));
                let results = [value, isa.scale_f32s(value, powers), isa.estimate_reciprocal_f32s(numbers)];
                for (to, result) in [&mut *found, &mut *scaled, &mut *reciprocals].into_iter().zip(results) {
                    let result = cast_slice::<_, f32>(std::slice::from_ref(&result));
                    to[at..at + result.len()].copy_from_slice(result);
                }
            }
        }
    }

    #[test]
    fn tables_powers_and_reciprocals() {
        let table: [f32; 32] = std::array::from_fn(|i| 1.0 + i as f32 / 32.0);
        for isa in IsaKind::available() {
            let (mut found, mut scaled, mut reciprocals) = ([0.0; 192], [0.0; 192], [0.0; 192]);
            isa.run(Exponentials(&table, [&mut found, &mut scaled, &mut reciprocals]));
            for i in 0..192 {
                assert_eq!(found[i], table[i % 32], "{}", isa.name());
                // i - 150.5 rounded down.
                let power = f64::from(table[i % 32]) * 2f64.powi(i as i32 - 151);
                assert_eq!(scaled[i], power as f32, "{} {i}", isa.name());
                assert!(i == 0 || (reciprocals[i] * i as f32 - 1.0).abs() <= 2f32.powi(-14), "{} {i}", isa.name());
            }
        }
    }

    #[test]
    fn unknown_names_are_refused() {
        assert!(IsaKind::by_name("mmx").unwrap_err().to_string().contains("portable"));
    }
}
