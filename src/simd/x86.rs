//! AVX2 and AVX-512: what pulp lacks, by intrinsics.

use std::arch::x86_64::*;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use pulp::cast;

use super::portable::{rounded, rounded_even_odd};
use super::{Isa, TransposeBlock};

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
unsafe fn transpose_32<const R: usize, const C: usize>(block: TransposeBlock<f32>) {
    let TransposeBlock { src, src_stride, dst, dst_stride } = block;
    // SAFETY: the caller promises AVX and that both blocks are in bounds.
    unsafe {
        if R == 8 {
            // Half rows are loaded straight into the two lanes of a register (`vinsertf128` from
            // memory), which leaves 16 instead of 24 shuffles for 8 x 8 values on the one shuffle
            // port.
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
unsafe fn transpose_64<const R: usize, const C: usize>(block: TransposeBlock<f64>) {
    let TransposeBlock { src, src_stride, dst, dst_stride } = block;
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

/// [`Isa::dot_bf16`]. (Not the compiler's own function, which code for AVX-512 alone would have to
/// call.)
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

/// What [`detect_bf16`] found.
static HAS_BF16: AtomicBool = AtomicBool::new(false);

/// Whether there is AVX512-BF16: to be asked before there are kernels that round, which else do so
/// by other instructions.
pub fn detect_bf16() -> bool {
    HAS_BF16.store(std::arch::is_x86_feature_detected!("avx512bf16"), Relaxed);
    has_bf16()
}

/// Whether AVX512-BF16 was found: the standard library's macro may call a function, and kernels
/// would keep no sums in registers around that.
#[inline(always)]
fn has_bf16() -> bool {
    HAS_BF16.load(Relaxed)
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
unsafe fn transpose_16<const R: usize, const C: usize>(block: TransposeBlock<u16>) {
    let TransposeBlock { src, src_stride, dst, dst_stride } = block;
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
            unsafe fn transpose_f32<const R: usize, const C: usize>(self, block: TransposeBlock<f32>) {
                // SAFETY: the token proves AVX; the rest is the caller's promise.
                unsafe { transpose_32::<R, C>(block) }
            }
            #[inline(always)]
            unsafe fn transpose_f64<const R: usize, const C: usize>(self, block: TransposeBlock<f64>) {
                // SAFETY: the token proves AVX; the rest is the caller's promise.
                unsafe { transpose_64::<R, C>(block) }
            }
            #[inline(always)]
            unsafe fn transpose_u16<const R: usize, const C: usize>(self, block: TransposeBlock<u16>) {
                // SAFETY: the caller's promise.
                unsafe { transpose_16::<R, C>(block) }
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
            // Pairs of values come out as a0 b0 a1 b1.
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
    const BF16_DOT: bool = true;
    const EXPONENTIALS: bool = true;
    const PERMUTES: bool = true;
    const MASK_REGISTERS: bool = true;

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
        const INDICES: [u16; 32] = in_turns(1);
        if !has_bf16() {
            return rounded_even_odd(self, [even, odd]);
        }
        // SAFETY: asked above; the token proves AVX-512.
        unsafe { cast(_mm512_permutexvar_epi16(cast(INDICES), round_512(cast(even), cast(odd)))) }
    }
    #[inline(always)]
    unsafe fn round_unpacked_bf16(self, [first, second]: [Self::f32s; 2]) -> Self::u32s {
        const INDICES: [u16; 32] = in_turns(4);
        // SAFETY: the caller's promise.
        unsafe { cast(_mm512_permutexvar_epi16(cast(INDICES), round_512(cast(first), cast(second)))) }
    }
    #[inline(always)]
    unsafe fn pack_f32s(self, [a, b]: [Self::f32s; 2]) -> [Self::f32s; 2] {
        // Fours of both in turns: the lower halves' and the upper halves'.
        // SAFETY: the token proves AVX-512.
        unsafe {
            let (a, b) = (cast(a), cast(b));
            let (low, high) = (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
            [low, high].map(|fours| cast(_mm512_shuffle_f32x4::<0xd8>(fours, fours)))
        }
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
    fn fraction_f32s(self, x: Self::f32s) -> Self::f32s {
        // SAFETY: the token proves AVX-512.
        cast(unsafe { _mm512_reduce_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(cast(x)) })
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
            [even, odd].map(|indices| cast(_mm512_permutex2var_ps(cast(a), indices, cast(b))))
        }
    }
    #[inline(always)]
    fn zip_f32s(self, a: Self::f32s, b: Self::f32s) -> [Self::f32s; 2] {
        const LOW: [i32; 16] = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23];
        // SAFETY: the token proves AVX-512.
        unsafe {
            let low: __m512i = cast(LOW);
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            [low, high].map(|indices| cast(_mm512_permutex2var_ps(cast(a), indices, cast(b))))
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

/// Indices of the values of two vectors of 16, one behind the other as [`round_512`] leaves them,
/// that take `run` values of each in turns.
const fn in_turns(run: u16) -> [u16; 32] {
    let (mut indices, mut i) = ([0; 32], 0);
    while i < 32 {
        let index = i as u16;
        indices[i] = index / (2 * run) * run + index % run + index / run % 2 * 16;
        i += 1;
    }
    indices
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
