//! The instruction set, chosen once at run time.
//!
//! Kernels are generic over [`Isa`]; holding a value of such a type proves that the instructions
//! exist, because the tokens come only from pulp's fallible constructors. [`Active::run`] is the one
//! place where a [`Kernel`] is compiled for, and entered with, a particular instruction set.
//!
//! `KCONV_ISA` (`avx512`, `avx2`, `neon` or `portable`) forces one. A name that this machine lacks is an
//! error, never a silent fallback: a test that forces an instruction set must run it.

use std::sync::OnceLock;

use pulp::bytemuck::{Pod, cast_slice, cast_slice_mut};

use crate::error::{Result, bail};

/// A set of vector instructions: pulp's vectors plus the few operations that pulp lacks.
pub trait Isa: pulp::Simd {
    /// Whether there is an instruction for `a * b + c`; without one the compiler calls a function for it.
    const FUSED_MULTIPLY_ADD: bool;

    /// Asks for the cache line at `ptr`, which need not be readable; nothing where there is no such instruction.
    #[inline(always)]
    fn prefetch<T>(self, ptr: *const T) {
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
    fn hold_f32s<const N: usize>(self, vectors: [Self::f32s; N]) -> [Self::f32s; N] {
        if N > 1 { std::hint::black_box(vectors) } else { vectors }
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
    /// Transposes a block of 8 x 8 values.
    ///
    /// # Safety
    /// `src` must be readable, and `dst` writable, at `i * stride + j` for all `i, j` below 8,
    /// and they must not overlap.
    unsafe fn transpose_f32(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: the caller's promise.
        unsafe { transpose_block(src, src_stride, dst, dst_stride) }
    }
    /// Transposes a block of 8 x 8 values.
    ///
    /// # Safety
    /// As for [`Isa::transpose_f32`].
    unsafe fn transpose_f64(self, src: *const f64, src_stride: usize, dst: *mut f64, dst_stride: usize) {
        // SAFETY: the caller's promise.
        unsafe { transpose_block(src, src_stride, dst, dst_stride) }
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

/// Transposes one 8 x 8 block; with the bound known the compiler unrolls it.
///
/// # Safety
/// As for [`Isa::transpose_f32`].
#[inline(always)]
unsafe fn transpose_block<T: Copy>(src: *const T, src_stride: usize, dst: *mut T, dst_stride: usize) {
    for i in 0..8 {
        for j in 0..8 {
            // SAFETY: inside the block, by the caller's promise.
            unsafe { *dst.add(j * dst_stride + i) = *src.add(i * src_stride + j) }
        }
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
    use super::Isa;
    use pulp::cast;
    use std::arch::x86_64::*;

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

    /// 8 x 8 floats through registers: 16 half loads, 16 shuffles, 8 stores.
    ///
    /// # Safety
    /// AVX must be there; otherwise as for [`Isa::transpose_f32`].
    #[inline(always)]
    unsafe fn transpose_8x8(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // Half rows are loaded straight into the two lanes of a register (`vinsertf128` from
        // memory), which leaves 16 instead of 24 shuffles on the one shuffle port.
        //
        //   r0 = a0 a1 a2 a3 | e0 e1 e2 e3      (rows a..h, columns 0..7)
        //   unpack a,b: a0 b0 a1 b1 | e0 f0 e1 f1; shuffle with c,d: a0 b0 c0 d0 | e0 f0 g0 h0
        // SAFETY: the caller promises AVX and that both blocks are in bounds.
        unsafe {
            for half in 0..2 {
                let rows = src.add(4 * half);
                let r0 = two_halves(rows, src_stride);
                let r1 = two_halves(rows.add(src_stride), src_stride);
                let r2 = two_halves(rows.add(2 * src_stride), src_stride);
                let r3 = two_halves(rows.add(3 * src_stride), src_stride);
                let (t0, t1) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
                let (t2, t3) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
                let out = dst.add(4 * half * dst_stride);
                _mm256_storeu_ps(out, _mm256_shuffle_ps::<0x44>(t0, t2));
                _mm256_storeu_ps(out.add(dst_stride), _mm256_shuffle_ps::<0xee>(t0, t2));
                _mm256_storeu_ps(out.add(2 * dst_stride), _mm256_shuffle_ps::<0x44>(t1, t3));
                _mm256_storeu_ps(out.add(3 * dst_stride), _mm256_shuffle_ps::<0xee>(t1, t3));
            }
        }
    }

    /// 8 x 8 doubles as four 4 x 4 blocks through registers.
    ///
    /// # Safety
    /// AVX must be there; otherwise as for [`Isa::transpose_f64`].
    #[inline(always)]
    unsafe fn transpose_8x8_f64(src: *const f64, src_stride: usize, dst: *mut f64, dst_stride: usize) {
        // SAFETY: the caller promises AVX and that both blocks are in bounds.
        unsafe {
            for i in [0, 4] {
                for j in [0, 4] {
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

    /// [`Isa::hold_f32s`] without leaving the registers.
    ///
    /// # Safety
    /// AVX-512 must be there.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn hold_512([mut a, mut b, mut c, mut d]: [__m512; 4]) -> [__m512; 4] {
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
                unsafe fn transpose_f32(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
                    // SAFETY: the token proves AVX; the rest is the caller's promise.
                    unsafe { transpose_8x8(src, src_stride, dst, dst_stride) }
                }
                #[inline(always)]
                unsafe fn transpose_f64(self, src: *const f64, src_stride: usize, dst: *mut f64, dst_stride: usize) {
                    // SAFETY: the token proves AVX; the rest is the caller's promise.
                    unsafe { transpose_8x8_f64(src, src_stride, dst, dst_stride) }
                }
            }
        };
    }
    avx!(pulp::x86::V3 {
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
    });
    avx!(pulp::x86::V4 {
        #[inline(always)]
        fn hold_f32s<const N: usize>(self, mut vectors: [Self::f32s; N]) -> [Self::f32s; N] {
            // `black_box` goes through memory: 10 instead of 8 ns for a vector's swish.
            if let Some(four) = vectors.first_chunk_mut::<4>() {
                // SAFETY: the token proves AVX-512.
                *four = unsafe { hold_512(four.map(cast)) }.map(cast);
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
    });
}

/// Work written once for every instruction set. Implementations mark `run` `#[inline(always)]`, so that
/// the body is compiled inside the function that enables the instructions.
pub trait Kernel {
    /// What the kernel returns.
    type Output;
    /// Runs on the instruction set that `isa` stands for.
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// The instruction sets that this build knows, each with the proof that it exists.
#[derive(Clone, Copy, Debug)]
pub enum Active {
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

impl Active {
    /// Compiles and runs `kernel` for this instruction set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(isa) => isa.vectorize(Call(isa, kernel)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(isa) => isa.vectorize(Call(isa, kernel)),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(isa) => isa.vectorize(Call(isa, kernel)),
            Self::Portable(isa) => kernel.run(isa),
        }
    }

    /// The name that `KCONV_ISA` knows it by.
    pub fn name(self) -> &'static str {
        match self {
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
        [
            #[cfg(target_arch = "x86_64")]
            pulp::x86::V4::try_new().map(Self::Avx512),
            #[cfg(target_arch = "x86_64")]
            pulp::x86::V3::try_new().map(Self::Avx2),
            #[cfg(target_arch = "aarch64")]
            pulp::aarch64::Neon::try_new().map(Self::Neon),
            Some(Self::Portable(pulp::Scalar::new())),
        ]
        .into_iter()
        .flatten()
        .collect()
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
pub fn active() -> Result<Active> {
    static ACTIVE: OnceLock<Result<Active>> = OnceLock::new();
    ACTIVE
        .get_or_init(|| match std::env::var("KCONV_ISA") {
            Ok(name) if !name.is_empty() => Active::by_name(&name),
            _ => Ok(Active::available()[0]),
        })
        .clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Transpose<'a>(&'a [f32], &'a mut [f32], &'a [f64], &'a mut [f64]);
    impl Kernel for Transpose<'_> {
        type Output = ();
        #[inline(always)]
        fn run<I: Isa>(self, isa: I) {
            // SAFETY: all slices are 8 rows of 9.
            unsafe {
                isa.transpose_f32(self.0.as_ptr(), 9, self.1.as_mut_ptr(), 9);
                isa.transpose_f64(self.2.as_ptr(), 9, self.3.as_mut_ptr(), 9);
            }
        }
    }

    #[test]
    fn transposes() {
        let (a, b): (Vec<f32>, Vec<f64>) = ((0..72).map(|i| i as f32).collect(), (0..72).map(f64::from).collect());
        for isa in Active::available() {
            let (mut c, mut d) = (vec![f32::NAN; 72], vec![f64::NAN; 72]);
            isa.run(Transpose(&a, &mut c, &b, &mut d));
            for (i, j) in (0..8).flat_map(|i| (0..8).map(move |j| (i, j))) {
                assert_eq!((c[j * 9 + i], d[j * 9 + i]), (a[i * 9 + j], b[i * 9 + j]), "{}", isa.name());
            }
        }
    }

    #[test]
    fn unknown_names_are_refused() {
        assert!(Active::by_name("mmx").unwrap_err().to_string().contains("portable"));
    }
}
