//! The instruction set, chosen once at run time.
//!
//! Kernels are generic over [`Isa`]; holding a value of such a type proves that the instructions
//! exist, because the tokens come only from pulp's fallible constructors. [`IsaKind::run`] is the
//! one place where a [`Kernel`] is compiled for, and entered with, a particular instruction set.
//!
//! | file | what it holds |
//! |---|---|
//! | `mod.rs` | [`Isa`], [`Kernel`], [`IsaKind`]: which instructions there are, and the dispatch |
//! | `x86.rs` | the operations that pulp lacks, by intrinsics of AVX2 and AVX-512 |
//! | `portable.rs` | the same operations lane by lane, which every other set takes |
//! | [`element`], `bf16.rs` | the types of numbers, and their vectors |
//! | [`mul_acc`] | how sums of products take values from memory: one by one, or bfloat16 in pairs |
//!
//! `KCONV_ISA` (`avx512_bf16`, `avx512`, `avx2`, `neon` or `portable`) forces one. A name that this
//! machine lacks is an error, never a silent fallback: a test that forces an instruction set must
//! run it.

mod bf16;
pub mod element;
pub mod mul_acc;
mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

use crate::error::{Result, bail};

/// Bytes of a cache line, and of the widest vector.
pub const LINE_BYTES: usize = 64;

/// Values of a cache line.
pub const fn line<T>() -> usize {
    LINE_BYTES / size_of::<T>()
}

/// A block of a matrix to transpose: `dst[c * dst_stride + r] = src[r * src_stride + c]`.
#[derive(Clone, Copy)]
pub struct TransposeBlock<T> {
    /// The block's first value.
    pub src: *const T,
    /// Values from one row of the source to the next.
    pub src_stride: usize,
    /// The transposed block's first value.
    pub dst: *mut T,
    /// Values from one row of the destination to the next.
    pub dst_stride: usize,
}

/// A set of vector instructions: pulp's vectors plus the few operations that pulp lacks.
pub trait Isa: pulp::Simd {
    /// Whether there is an instruction for `a * b + c`; else the compiler calls a function for it.
    const FUSED_MULTIPLY_ADD: bool;
    /// Whether there are instructions for [`Isa::lookup_f32s`], [`Isa::scale_f32s`],
    /// [`Isa::fraction_f32s`] and [`Isa::estimate_reciprocal_f32s`].
    const EXPONENTIALS: bool = false;
    /// Whether there are instructions for [`Isa::permute_f32s`], [`Isa::permute2_f32s`] and
    /// [`Isa::load_quads_f32s`].
    const PERMUTES: bool = false;
    /// Whether a processor with these instructions may have [`Isa::dot_bf16`].
    const BF16_DOT: bool = false;
    /// Whether masks are registers of their own, so that masked loads and stores take as long as
    /// others: then kernels are not compiled for whole vectors too.
    const MASK_REGISTERS: bool = false;

    /// Prefetches the cache line at `ptr`, which need not be readable, into L1; does nothing where
    /// there is no such instruction.
    #[inline(always)]
    fn prefetch<T>(self, _ptr: *const T) {}
    /// [`Isa::prefetch`] into L2 only, for what is thousands of cycles ahead: it does not occupy
    /// the few line-fill buffers of L1.
    #[inline(always)]
    fn prefetch_l2<T>(self, _ptr: *const T) {}
    /// The larger of `x` and `low`; NaN stays NaN, as the instructions of x86 and ARM return their
    /// second operand where one is NaN.
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
    /// The vectors, behind a barrier: no instruction that needs them is moved before it, so that
    /// chains of dependent instructions overlap instead of being computed one after the other.
    #[inline(always)]
    fn optimization_barrier_f32s<const N: usize>(self, vectors: [Self::f32s; N]) -> [Self::f32s; N] {
        if N > 1 { std::hint::black_box(vectors) } else { vectors }
    }
    /// `table[index % 32]` of each lane.
    #[inline(always)]
    fn lookup_f32s(self, table: &[f32; 32], index: Self::u32s) -> Self::f32s {
        portable::gather(self, table, index)
    }
    /// `a * 2^floor(n)` for normal numbers `a` and `n` up to 60, rounded once where the
    /// result is subnormal.
    #[inline(always)]
    fn scale_f32s(self, a: Self::f32s, n: Self::f32s) -> Self::f32s {
        portable::scale(self, a, n)
    }
    /// `x - floor(x)`; of infinities 0.
    #[inline(always)]
    fn fraction_f32s(self, x: Self::f32s) -> Self::f32s {
        portable::fraction(self, x)
    }
    /// `1 / x` for normal numbers `x`, with a relative error of at most 2^-14.
    #[inline(always)]
    fn estimate_reciprocal_f32s(self, x: Self::f32s) -> Self::f32s {
        self.div_f32s(self.splat_f32s(1.0), x)
    }
    /// For each lane, the value of `values` at `index`, modulo the number of lanes.
    #[inline(always)]
    fn permute_f32s(self, values: Self::f32s, index: Self::u32s) -> Self::f32s {
        portable::gather(self, pulp::bytemuck::cast_slice(&[values]), index)
    }
    /// As [`Isa::permute_f32s`], from two vectors, the second one's indices behind the first's.
    #[inline(always)]
    fn permute2_f32s(self, values: [Self::f32s; 2], index: Self::u32s) -> Self::f32s {
        portable::gather(self, pulp::bytemuck::cast_slice(&values), index)
    }
    /// Four values from each of these pointers, as many as fill a vector.
    ///
    /// # Safety
    /// They must be readable.
    #[inline(always)]
    unsafe fn load_quads_f32s(self, quads: [*const f32; 4]) -> Self::f32s {
        // SAFETY: the caller's promise.
        unsafe { portable::load_quads(self, quads) }
    }
    /// The values of `a` and `b` at even indices, and those at odd ones.
    #[inline(always)]
    fn split_f32s(self, a: Self::f32s, b: Self::f32s) -> [Self::f32s; 2] {
        portable::split::<f32, _>(a, b)
    }
    /// The values of `a` and `b` in turns: what [`Isa::split_f32s`] undoes.
    #[inline(always)]
    fn zip_f32s(self, a: Self::f32s, b: Self::f32s) -> [Self::f32s; 2] {
        portable::zip::<f32, _>(a, b)
    }
    /// As [`Isa::split_f32s`].
    #[inline(always)]
    fn split_f64s(self, a: Self::f64s, b: Self::f64s) -> [Self::f64s; 2] {
        portable::split::<f64, _>(a, b)
    }
    /// As [`Isa::zip_f32s`].
    #[inline(always)]
    fn zip_f64s(self, a: Self::f64s, b: Self::f64s) -> [Self::f64s; 2] {
        portable::zip::<f64, _>(a, b)
    }
    /// Loads a vector of 32-bit numbers from 16 bits each.
    ///
    /// # Safety
    /// As many values as the vector has must be readable at `ptr`.
    #[inline(always)]
    unsafe fn load_u16s(self, ptr: *const u16) -> Self::u32s {
        // SAFETY: the caller's promise.
        unsafe { portable::load_lanes(self, size_of::<Self::u32s>() / 4, ptr) }
    }
    /// Stores the lower 16 bits of 32-bit numbers, of which the upper ones are zero.
    ///
    /// # Safety
    /// As many values as the vector has must be writable at `ptr`.
    #[inline(always)]
    unsafe fn store_u16s(self, ptr: *mut u16, value: Self::u32s) {
        // SAFETY: the caller's promise.
        unsafe { portable::store_lanes(self, size_of::<Self::u32s>() / 4, ptr, value) }
    }
    /// As [`Isa::load_u16s`], of the values that `mask` selects, which are a vector's first; the
    /// others are zero.
    ///
    /// # Safety
    /// The selected values must be readable at `ptr`.
    #[inline(always)]
    unsafe fn load_masked_u16s(self, mask: Self::m32s, ptr: *const u16) -> Self::u32s {
        // SAFETY: the caller's promise.
        unsafe { portable::load_lanes(self, portable::selected(self, mask), ptr) }
    }
    /// As [`Isa::store_u16s`], of the values that `mask` selects, which are a vector's first.
    ///
    /// # Safety
    /// The selected values must be writable at `ptr`.
    #[inline(always)]
    unsafe fn store_masked_u16s(self, mask: Self::m32s, ptr: *mut u16, value: Self::u32s) {
        // SAFETY: the caller's promise.
        unsafe { portable::store_lanes(self, portable::selected(self, mask), ptr, value) }
    }
    /// Loads `len` numbers of 16 bits, at most twice as many as the vector has of 32; the others
    /// are zero.
    ///
    /// # Safety
    /// [`IsaKind::bf16`] must be true, and `len` values readable at `ptr`.
    #[inline(always)]
    unsafe fn load_first_u16s(self, len: usize, ptr: *const u16) -> Self::u32s {
        unreachable!("no instruction for {len} at {ptr:?}")
    }
    /// Pairs of the 16-bit numbers of `a`, in the lower halves, and those of `b` at the same
    /// indices: one half of them and the other, as `vpunpcklwd` and `vpunpckhwd` divide them.
    ///
    /// # Safety
    /// [`IsaKind::bf16`] must be true.
    #[inline(always)]
    unsafe fn unpack_u16s(self, a: Self::u32s, b: Self::u32s) -> [Self::u32s; 2] {
        unreachable!("no instruction for {a:?} and {b:?}")
    }
    /// For each 16 bits, the 16-bit number of `values` at `index`, modulo their number.
    ///
    /// # Safety
    /// [`IsaKind::bf16`] must be true.
    #[inline(always)]
    unsafe fn permute_u16s(self, values: Self::u32s, index: Self::u32s) -> Self::u32s {
        unreachable!("no instruction for {values:?} and {index:?}")
    }
    /// `c` plus the products of the bfloat16 numbers in the lower halves of `a` and `b`, and in the
    /// upper ones; subnormal numbers are taken as zero.
    ///
    /// # Safety
    /// [`IsaKind::bf16`] must be true.
    #[inline(always)]
    unsafe fn dot_bf16(self, a: Self::u32s, b: Self::u32s, c: Self::f32s) -> Self::f32s {
        unreachable!("no instruction for {a:?}, {b:?} and {c:?}")
    }
    /// The nearest bfloat16 numbers, ties to even, in the lower halves; NaN stays NaN, and where
    /// there is an instruction for it, subnormal numbers become zero.
    #[inline(always)]
    fn round_bf16(self, value: Self::f32s) -> Self::u32s {
        portable::rounded(self, value)
    }
    /// As [`Isa::round_bf16`], of the values at even indices, in the lower halves, and of those at
    /// odd ones, in the upper halves.
    #[inline(always)]
    fn round_even_odd_bf16(self, even_odd: [Self::f32s; 2]) -> Self::u32s {
        portable::rounded_even_odd(self, even_odd)
    }
    /// As [`Isa::round_bf16`], of two vectors as [`Isa::unpack_u16s`] divides values, in order.
    ///
    /// # Safety
    /// [`IsaKind::bf16`] must be true.
    #[inline(always)]
    unsafe fn round_unpacked_bf16(self, parts: [Self::f32s; 2]) -> Self::u32s {
        unreachable!("no instruction for {parts:?}")
    }
    /// The values of two vectors as [`Isa::unpack_u16s`] divides them, in order.
    ///
    /// # Safety
    /// [`IsaKind::bf16`] must be true.
    #[inline(always)]
    unsafe fn pack_f32s(self, parts: [Self::f32s; 2]) -> [Self::f32s; 2] {
        unreachable!("no instruction for {parts:?}")
    }
    /// Transposes a block of `R` rows of `C` values, 4 or 8 each.
    ///
    /// # Safety
    /// The block must be readable and writable, and its two sides must not overlap.
    #[inline(always)]
    unsafe fn transpose_u16<const R: usize, const C: usize>(self, block: TransposeBlock<u16>) {
        // SAFETY: the caller's promise.
        unsafe { portable::transpose::<_, R, C>(block) }
    }
    /// As [`Isa::transpose_u16`].
    ///
    /// # Safety
    /// As for that.
    #[inline(always)]
    unsafe fn transpose_f32<const R: usize, const C: usize>(self, block: TransposeBlock<f32>) {
        // SAFETY: the caller's promise.
        unsafe { portable::transpose::<_, R, C>(block) }
    }
    /// As [`Isa::transpose_u16`].
    ///
    /// # Safety
    /// As for that.
    #[inline(always)]
    unsafe fn transpose_f64<const R: usize, const C: usize>(self, block: TransposeBlock<f64>) {
        // SAFETY: the caller's promise.
        unsafe { portable::transpose::<_, R, C>(block) }
    }
}

/// The functions in which a kernel is compiled, one for each instruction set.
///
/// They are methods of the kernel's own trait so that they belong to the kernel's module: an edit
/// of one microkernel compiles that module alone again, and modules are compiled in parallel.
macro_rules! entries {
    ($run:path) => {
        /// Runs with AVX-512.
        ///
        /// # Safety
        /// The token proves the instructions; otherwise as for the kernel.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,bmi1,bmi2,fma,lzcnt,popcnt")]
        unsafe fn enter_avx512(self, isa: pulp::x86::V4) -> Self::Output {
            // SAFETY: the caller's promise, if there is one to make.
            #[allow(unused_unsafe)]
            unsafe {
                $run(self, isa)
            }
        }
        /// Runs with AVX2.
        ///
        /// # Safety
        /// The token proves the instructions; otherwise as for the kernel.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,bmi1,bmi2,fma,lzcnt,popcnt")]
        unsafe fn enter_avx2(self, isa: pulp::x86::V3) -> Self::Output {
            // SAFETY: the caller's promise, if there is one to make.
            #[allow(unused_unsafe)]
            unsafe {
                $run(self, isa)
            }
        }
        /// Runs with what every target of this architecture has.
        ///
        /// # Safety
        /// As for the kernel.
        #[inline(never)]
        unsafe fn enter_baseline<I: Isa>(self, isa: I) -> Self::Output {
            // SAFETY: the caller's promise, if there is one to make.
            #[allow(unused_unsafe)]
            unsafe {
                $run(self, isa)
            }
        }
    };
}

/// Work written once for every instruction set. Implementations mark `run` `#[inline(always)]`, so
/// that the body is compiled inside the function that enables the instructions.
pub trait Kernel: Sized {
    /// What the kernel returns.
    type Output;
    /// Panics where the kernel is not what it should be. [`IsaKind::run`] calls it outside of the
    /// kernel's code, in which a compiler that knows of checks may let sums leave the registers.
    #[inline(always)]
    fn check(&self) {}
    /// Runs on the instruction set that `isa` stands for.
    fn run<I: Isa>(self, isa: I) -> Self::Output;

    entries!(Self::run);
}

/// A [`Kernel`] over raw pointers, whose caller promises what the *Safety* section of its type
/// demands: see [`Promised`].
pub trait RawKernel: Sized {
    /// What the kernel returns.
    type Output;
    /// As [`Kernel::check`].
    #[inline(always)]
    fn check(&self) {}
    /// Runs on the instruction set that `isa` stands for.
    ///
    /// # Safety
    /// That of the type.
    unsafe fn run<I: Isa>(self, isa: I) -> Self::Output;

    entries!(Self::run);
}

/// A [`RawKernel`] of which everything has been promised.
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
}

/// Makes a kernel one without code of its own, whose entries are those of a [`RawKernel`] that
/// `$raw` makes of it.
macro_rules! run_by_raw_kernel {
    ($raw:expr) => {
        #[inline(always)]
        fn run<I: $crate::simd::Isa>(self, isa: I) -> Self::Output {
            // SAFETY: promised, or the kernel's own fields are what its raw kernel demands.
            unsafe { $raw(self).run(isa) }
        }
        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        unsafe fn enter_avx512(self, isa: pulp::x86::V4) -> Self::Output {
            // SAFETY: as above.
            unsafe { $raw(self).enter_avx512(isa) }
        }
        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        unsafe fn enter_avx2(self, isa: pulp::x86::V3) -> Self::Output {
            // SAFETY: as above.
            unsafe { $raw(self).enter_avx2(isa) }
        }
        #[inline(always)]
        unsafe fn enter_baseline<I: $crate::simd::Isa>(self, isa: I) -> Self::Output {
            // SAFETY: as above.
            unsafe { $raw(self).enter_baseline(isa) }
        }
    };
}
pub(crate) use run_by_raw_kernel;

impl<K: RawKernel> Kernel for Promised<K> {
    type Output = K::Output;

    #[inline(always)]
    fn check(&self) {
        self.0.check();
    }
    run_by_raw_kernel!(|promised: Self| promised.0);
}

/// The instruction sets that this build knows, each with the proof that it exists.
#[derive(Clone, Copy, Debug)]
pub enum IsaKind {
    /// AVX-512 and AVX512-BF16 (dot products of bfloat16 pairs), of which pulp knows nothing.
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

impl IsaKind {
    /// Runs `kernel` with this instruction set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.check();
        // SAFETY: to have a token is to have the instructions, and a `Kernel` is safe to run.
        unsafe {
            match self {
                #[cfg(all(target_arch = "x86_64", not(any(kconv_only = "avx2", kconv_only = "portable"))))]
                Self::Avx512Bf16(isa) | Self::Avx512(isa) => kernel.enter_avx512(isa),
                #[cfg(all(target_arch = "x86_64", not(any(kconv_only = "avx512", kconv_only = "portable"))))]
                Self::Avx2(isa) => kernel.enter_avx2(isa),
                #[cfg(target_arch = "aarch64")]
                Self::Neon(isa) => kernel.enter_baseline(isa),
                #[cfg(not(any(kconv_only = "avx512", kconv_only = "avx2")))]
                Self::Portable(isa) => kernel.enter_baseline(isa),
                #[cfg(any(kconv_only = "avx512", kconv_only = "avx2", kconv_only = "portable"))]
                _ => unreachable!("compiled for one instruction set only"),
            }
        }
    }

    /// What a kernel answers that is a constant of each instruction set: as [`IsaKind::run`], but
    /// without a call of code for it, of which a small convolution would feel a few.
    #[inline]
    pub fn constant<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(isa) | Self::Avx512(isa) => kernel.run(isa),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(isa) => kernel.run(isa),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(isa) => kernel.run(isa),
            Self::Portable(isa) => kernel.run(isa),
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
            all.extend(avx512.filter(|_| x86::detect_bf16()).map(Self::Avx512Bf16));
            all.extend(avx512.map(Self::Avx512));
            // On Intel's processors vdpbf16ps takes four times as long as an FMA of float32.
            if is_intel() {
                all.reverse();
            }
            all.extend(pulp::x86::V3::try_new().map(Self::Avx2));
        }
        #[cfg(target_arch = "aarch64")]
        all.extend(pulp::aarch64::Neon::try_new().map(Self::Neon));
        all.push(Self::Portable(pulp::Scalar::new()));
        // A build for one instruction set, while a kernel is written: see CONTRIBUTING.md.
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

/// Whether the processor prefetches streams by itself where rows and pixels are read in order, as
/// Intel's do. Software prefetches then only occupy line-fill buffers.
pub fn has_stream_prefetcher() -> bool {
    is_intel()
}

/// Whether Intel made the processor.
fn is_intel() -> bool {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        static INTEL: OnceLock<bool> = OnceLock::new();
        *INTEL.get_or_init(|| {
            // SAFETY: every x86-64 processor has the instruction. (From Rust 1.94 on, calling it is
            // safe.)
            #[allow(unused_unsafe)]
            let name = unsafe { std::arch::x86_64::__cpuid(0) };
            [name.ebx, name.edx, name.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
        })
    }
    #[cfg(any(not(target_arch = "x86_64"), miri))]
    false
}
