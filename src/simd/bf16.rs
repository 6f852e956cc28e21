//! bfloat16, the upper half of a float32: storage of half the bytes, for kernels that compute in
//! float32.

use half::bf16;
use pulp::Scalar;

use super::element::{Element, f32_vectors, vectors};
use super::mul_acc::{Fma, MulAcc};
use crate::scratch;
use crate::simd::{Isa, IsaKind, Kernel, TransposeBlock};

/// Length of the matrices' common axis over which [`Element::gemm`] widens at once: a group's rows
/// stay in the L2 cache.
const WIDENED: usize = 256;

/// Floats from the bits of bfloat16 values.
#[inline(always)]
fn widened<I: Isa>(isa: I, bits: I::u32s) -> I::f32s {
    isa.transmute_f32s_u32s(isa.wrapping_dyn_shl_u32s(bits, isa.splat_u32s(16)))
}

/// Two products at a time.
#[derive(Clone, Copy)]
pub struct Bf16Dot(());

impl Bf16Dot {
    fn try_new(isa: IsaKind) -> Option<Self> {
        isa.bf16().then_some(Self(()))
    }
}

impl MulAcc<bf16> for Bf16Dot {
    const TERMS: usize = 2;
    type Value = bf16;
    type Mask<I: Isa> = usize;

    #[inline(always)]
    fn pack(self, weight: bf16, next: Option<bf16>) -> f32 {
        f32::from_bits(u32::from(weight.to_bits()) | u32::from(next.unwrap_or_default().to_bits()) << 16)
    }
    #[inline(always)]
    fn mul_add<I: Isa>(self, isa: I, a: I::f32s, b: I::f32s, c: I::f32s) -> I::f32s {
        // SAFETY: to have `self` is to have the instructions.
        unsafe { isa.dot_bf16(isa.transmute_u32s_f32s(a), isa.transmute_u32s_f32s(b), c) }
    }
    #[inline(always)]
    unsafe fn load<I: Isa>(self, isa: I, row: *const bf16, next: Option<*const bf16>) -> I::f32s {
        // SAFETY: the caller's promise, as for all that follows.
        let load = |row: *const bf16| unsafe { isa.load_u16s(row.cast()) };
        paired(isa, load(row), next.map(load))
    }
    #[inline(always)]
    unsafe fn load_masked<I: Isa>(
        self,
        isa: I,
        mask: <bf16 as Element>::Mask<I>,
        row: *const bf16,
        next: Option<*const bf16>,
    ) -> I::f32s {
        // SAFETY: as above.
        let load = |row: *const bf16| unsafe { isa.load_masked_u16s(mask, row.cast()) };
        paired(isa, load(row), next.map(load))
    }
    #[inline(always)]
    unsafe fn load_part<I: Isa>(self, isa: I, row: *const bf16, next: Option<*const bf16>, part: usize) -> I::f32s {
        // SAFETY: as above.
        let load = |row: *const bf16| unsafe { row.cast::<I::u32s>().read_unaligned() };
        let next = next.map_or(isa.splat_u32s(0), load);
        // SAFETY: to have `self` is to have the instructions.
        isa.transmute_f32s_u32s(unsafe { isa.unpack_u16s(load(row), next) }[part])
    }
    #[inline(always)]
    unsafe fn store<I: Isa>(self, isa: I, mask: Option<<bf16 as Element>::Mask<I>>, ptr: *mut bf16, value: I::f32s) {
        // SAFETY: as above.
        unsafe { Fma.store(isa, mask, ptr, value) }
    }
    #[inline(always)]
    unsafe fn splat<I: Isa>(self, isa: I, len: usize, ptr: *const bf16) -> I::f32s {
        // SAFETY: as above.
        let bits = unsafe { if len > 1 { ptr.cast::<u32>().read_unaligned() } else { u32::from((*ptr).to_bits()) } };
        isa.transmute_f32s_u32s(isa.splat_u32s(bits))
    }
    fn steps<'a>(self, isa: IsaKind, rows: &'a [bf16], len: usize, memory: &'a mut [f32]) -> &'a [f32] {
        let memory = &mut memory[..rows.len().div_ceil(2 * len) * len];
        isa.run(PackRows { pairs: self, rows, len, to: memory });
        memory
    }
    #[inline(always)]
    fn permute<I: Isa>(self, isa: I, values: I::f32s, index: I::u32s) -> I::f32s {
        // SAFETY: to have `self` is to have the instructions.
        isa.transmute_f32s_u32s(unsafe { isa.permute_u16s(isa.transmute_u32s_f32s(values), index) })
    }
    #[inline(always)]
    unsafe fn load_quads<I: Isa>(self, isa: I, quads: [*const bf16; 4]) -> I::f32s {
        // SAFETY: the caller's promise: as many bytes.
        unsafe { isa.load_quads_f32s(quads.map(<*const bf16>::cast)) }
    }
    #[inline(always)]
    unsafe fn store_parts<I: Isa>(self, isa: I, ptr: *mut bf16, parts: [I::f32s; 2]) {
        // SAFETY: as above; to have `self` is to have the instructions.
        unsafe { ptr.cast::<I::u32s>().write_unaligned(isa.round_unpacked_bf16(parts)) };
    }
    #[inline(always)]
    unsafe fn store_wide_parts<I: Isa>(self, isa: I, ptr: *mut f32, parts: [I::f32s; 2]) {
        // SAFETY: as above; to have `self` is to have the instructions.
        unsafe { ptr.cast::<[I::f32s; 2]>().write_unaligned(isa.pack_f32s(parts)) };
    }
    #[inline(always)]
    fn mask<I: Isa>(_isa: I, len: usize) -> usize {
        len
    }
    #[inline(always)]
    unsafe fn load_row<I: Isa>(self, _isa: I, ptr: *const bf16) -> I::f32s {
        // SAFETY: as above.
        unsafe { ptr.cast::<I::f32s>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_row_masked<I: Isa>(self, isa: I, len: usize, ptr: *const bf16) -> I::f32s {
        // SAFETY: as above.
        isa.transmute_f32s_u32s(unsafe { isa.load_first_u16s(len, ptr.cast()) })
    }
    #[inline(always)]
    unsafe fn load_row_part<I: Isa>(self, isa: I, ptr: *const bf16, part: usize) -> I::f32s {
        // SAFETY: as above.
        unsafe { self.load_row(isa, ptr.add(part * 2 * bf16::lanes::<I>())) }
    }
}

/// Packs pairs of rows of `len` values, the last row alone if they are odd.
struct PackRows<'a> {
    pairs: Bf16Dot,
    rows: &'a [bf16],
    len: usize,
    to: &'a mut [f32],
}

impl Kernel for PackRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { pairs, rows, len, to } = self;
        let lanes = bf16::lanes::<I>();
        // As far as the next call's rows would follow these.
        let ahead = rows.len();
        for (rows, to) in rows.chunks(2 * len).zip(to.chunks_exact_mut(len)) {
            let next = (rows.len() > len).then_some(len);
            for at in (0..len).step_by(lanes) {
                // SAFETY: inside the rows, both of `len` values if there are two, and inside `to`.
                unsafe {
                    let row = rows.as_ptr().add(at);
                    let (next, to) = (next.map(|next| row.add(next)), to.as_mut_ptr().add(at));
                    isa.prefetch_l2(row.wrapping_add(ahead));
                    isa.prefetch_l2(row.wrapping_add(ahead + len));
                    if at + lanes <= len {
                        bf16::store_wide(isa, to, pairs.load(isa, row, next));
                    } else {
                        let mask = bf16::mask(isa, len - at);
                        bf16::store_wide_masked(isa, mask, to, pairs.load_masked(isa, mask, row, next));
                    }
                }
            }
        }
    }
}

/// Pairs of numbers of 16 bits, each in the lower half of 32.
#[inline(always)]
fn paired<I: Isa>(isa: I, row: I::u32s, next: Option<I::u32s>) -> I::f32s {
    let upper = next.map_or(isa.splat_u32s(0), |next| isa.wrapping_dyn_shl_u32s(next, isa.splat_u32s(16)));
    isa.transmute_f32s_u32s(isa.or_u32s(row, upper))
}

impl Element for bf16 {
    f32_vectors!(sigmoid: sigmoid_bf16);
    type Bf16Dot = Bf16Dot;

    fn bf16_dot(isa: IsaKind) -> Option<Bf16Dot> {
        Bf16Dot::try_new(isa)
    }
    const ONE: Self = Self::ONE;

    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        Self::from_f64(value)
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.widen().into()
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        widened(Scalar::new(), self.to_bits().into())
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_bits(Scalar::new().round_bf16(value) as u16)
    }
    fn as_wide(_values: &[Self]) -> Option<&[f32]> {
        None
    }
    #[inline(always)]
    fn mul_add_scalar<I: Isa>(self, a: Self, b: Self) -> Self {
        Self::narrow(self.widen().mul_add_scalar::<I>(a.widen(), b.widen()))
    }
    #[inline(always)]
    unsafe fn load<I: Isa>(isa: I, ptr: *const Self) -> I::f32s {
        // SAFETY: the caller's promise.
        widened(isa, unsafe { isa.load_u16s(ptr.cast()) })
    }
    #[inline(always)]
    unsafe fn store<I: Isa>(isa: I, ptr: *mut Self, value: I::f32s) {
        // SAFETY: the caller's promise.
        unsafe { isa.store_u16s(ptr.cast(), isa.round_bf16(value)) }
    }
    #[inline(always)]
    unsafe fn load_masked<I: Isa>(isa: I, mask: Self::Mask<I>, ptr: *const Self) -> I::f32s {
        // SAFETY: the caller's promise.
        widened(isa, unsafe { isa.load_masked_u16s(mask, ptr.cast()) })
    }
    #[inline(always)]
    unsafe fn store_masked<I: Isa>(isa: I, mask: Self::Mask<I>, ptr: *mut Self, value: I::f32s) {
        // SAFETY: the caller's promise.
        unsafe { isa.store_masked_u16s(mask, ptr.cast(), isa.round_bf16(value)) }
    }
    // The values at even indices are the lower halves of 32 bits, those at odd ones the upper
    // halves: either is one instruction away, where loading them in order takes two and one of them
    // a shuffle.
    #[inline(always)]
    unsafe fn load_part<I: Isa>(isa: I, ptr: *const Self, part: usize) -> I::f32s {
        // SAFETY: the caller's promise; as many bytes.
        let pairs = unsafe { ptr.cast::<I::u32s>().read_unaligned() };
        match part {
            0 => widened(isa, pairs),
            _ => isa.transmute_f32s_u32s(isa.and_u32s(pairs, isa.splat_u32s(0xffff_0000))),
        }
    }
    #[inline(always)]
    unsafe fn store_parts<I: Isa>(isa: I, ptr: *mut Self, parts: [I::f32s; 2]) {
        // SAFETY: the caller's promise; as many bytes.
        unsafe { ptr.cast::<I::u32s>().write_unaligned(isa.round_even_odd_bf16(parts)) };
    }
    #[inline(always)]
    unsafe fn load_quads<I: Isa>(isa: I, quads: [*const Self; 4]) -> I::f32s {
        let mut values = [[Self::ZERO; 4]; 4];
        for (to, piece) in values.iter_mut().zip(quads).take(Self::lanes::<I>() / 4) {
            // SAFETY: the caller's promise.
            *to = unsafe { piece.cast::<[Self; 4]>().read_unaligned() };
        }
        // SAFETY: a vector's values at most.
        unsafe { Self::load(isa, values.as_ptr().cast()) }
    }
    #[inline(always)]
    unsafe fn transpose<I: Isa, const R: usize, const C: usize>(isa: I, block: TransposeBlock<Self>) {
        let TransposeBlock { src, src_stride, dst, dst_stride } = block;
        let block = TransposeBlock { src: src.cast(), src_stride, dst: dst.cast(), dst_stride };
        // SAFETY: the caller's promise.
        unsafe { isa.transpose_u16::<R, C>(block) }
    }
    unsafe fn gemm(
        isa: IsaKind,
        [m, k, n]: [usize; 3],
        a: (*const Self, usize, usize),
        b: (*const Self, usize, usize),
        c: (*mut f32, usize, usize),
    ) {
        scratch::with((m + n) * WIDENED.min(k), |memory: &mut [f32]| {
            for start in (0..k).step_by(WIDENED) {
                let len = WIDENED.min(k - start);
                let (wide_a, rest) = memory.split_at_mut(m * len);
                let wide_b = &mut rest[..n * len];
                // SAFETY: the caller's promise: columns `start..` of a, rows `start..` of b, and
                // all of c.
                unsafe {
                    let a = isa.run(Widen { size: [m, len], from: (a.0.add(start * a.2), a.1, a.2), to: wide_a });
                    let b = isa.run(Widen { size: [len, n], from: (b.0.add(start * b.1), b.1, b.2), to: wide_b });
                    f32::gemm(isa, [m, len, n], a, b, c);
                }
            }
        });
    }
}

/// Copies a matrix of `size`, readable as [`Element::gemm`] promises, into a dense one of float32,
/// in the order of axes in which it lies in memory; returns its pointer and strides.
struct Widen<'a> {
    size: [usize; 2],
    from: (*const bf16, usize, usize),
    to: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    type Output = (*const f32, usize, usize);

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Self::Output {
        let Self { size: [rows, columns], from: (from, row, column), to } = self;
        let by_rows = column <= row;
        let ((outer, outer_stride), (inner, inner_stride)) =
            if by_rows { ((rows, row), (columns, column)) } else { ((columns, column), (rows, row)) };
        let lanes = bf16::lanes::<I>();
        for (i, to) in to.chunks_exact_mut(inner.max(1)).take(outer).enumerate() {
            // SAFETY: inside the matrix, by the promise of `gemm`.
            unsafe {
                let from = from.add(i * outer_stride);
                if inner_stride > 1 {
                    to.iter_mut().enumerate().for_each(|(j, to)| *to = (*from.add(j * inner_stride)).widen());
                    continue;
                }
                for (j, to) in to.chunks_mut(lanes).enumerate() {
                    let mask = bf16::mask(isa, to.len());
                    let values = bf16::load_masked(isa, mask, from.add(j * lanes));
                    bf16::store_wide_masked(isa, mask, to.as_mut_ptr(), values);
                }
            }
        }
        if by_rows { (to.as_ptr(), columns, 1) } else { (to.as_ptr(), 1, rows) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds 16 floats, and widens the results.
    struct There([f32; 16]);

    impl Kernel for There {
        type Output = ([bf16; 16], [f32; 16]);

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> ([bf16; 16], [f32; 16]) {
            let (mut narrow, mut wide) = ([bf16::ZERO; 16], [0.0; 16]);
            for start in (0..16).step_by(bf16::lanes::<I>()) {
                // SAFETY: a vector's values, which are divisors of 16, inside the arrays.
                unsafe {
                    bf16::store(isa, narrow.as_mut_ptr().add(start), bf16::load_wide(isa, self.0.as_ptr().add(start)));
                    bf16::store_wide(isa, wide.as_mut_ptr().add(start), bf16::load(isa, narrow.as_ptr().add(start)));
                }
            }
            (narrow, wide)
        }
    }

    #[test]
    fn every_instruction_set_rounds_to_the_nearest() {
        let step = if cfg!(miri) { 4_000_037 } else { 997 };
        // Between two values, by a little less and more than half; the largest and the smallest;
        // infinities and NaN.
        #[rustfmt::skip]
        let edges = [
            0x3f80_7fff, 0x3f80_8000, 0x3f80_8001, 0x3f81_7fff, 0x3f81_8000, 0x3f81_8001, 0x7f7f_7fff, 0x7f7f_8000, 1,
            0x8000, 0x8000_0000, 0x7f80_0000, 0xff80_0000, 0x7f80_0001, 0xffff_ffff, 0x7fc0_0000,
        ];
        let numbers = (0..u32::MAX - 16 * step).step_by(16 * step as usize);
        let vectors = numbers.map(|first| std::array::from_fn(|i| first + i as u32 * step)).chain([edges]);
        let all = IsaKind::available();
        for x in vectors.map(|bits: [u32; 16]| bits.map(f32::from_bits)) {
            for isa in &all {
                let (narrow, wide) = isa.run(There(x));
                for ((x, narrow), wide) in x.into_iter().zip(narrow).zip(wide) {
                    let nearest = bf16::from_f32(x).to_bits();
                    // The instruction takes what is too small to be normal as zero.
                    let zero = x.is_subnormal() && narrow.to_bits() == nearest & 0x8000;
                    assert!(zero || narrow.to_bits() == nearest, "{} {x:?} {narrow:?}", isa.name());
                    assert_eq!(wide.to_bits(), u32::from(narrow.to_bits()) << 16, "{} {x:?}", isa.name());
                    assert_eq!(<bf16 as Element>::narrow(x).to_bits(), nearest);
                }
            }
        }
    }
}
