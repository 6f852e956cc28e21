//! The operations of [`Isa`] lane by lane: what instruction sets without an instruction take.
//!
//! With the numbers of lanes known at compile time, the compiler unrolls all of it.

use pulp::bytemuck::{Pod, cast_slice, cast_slice_mut};

use super::{Isa, TransposeBlock};

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

/// For each lane, the value of `table` at `index`, modulo its length.
#[inline(always)]
pub(super) fn gather<I: Isa>(isa: I, table: &[f32], index: I::u32s) -> I::f32s {
    let (mut values, indices) = (isa.splat_f32s(0.0), [index]);
    let lanes = cast_slice_mut::<_, f32>(std::slice::from_mut(&mut values));
    for (value, &index) in lanes.iter_mut().zip(cast_slice::<_, u32>(&indices)) {
        *value = table[index as usize % table.len()];
    }
    values
}

/// [`Isa::scale_f32s`]: in doubles, of which none of the results is subnormal.
#[inline(always)]
pub(super) fn scale<I: Isa>(_isa: I, a: I::f32s, n: I::f32s) -> I::f32s {
    let (mut values, powers) = (a, [n]);
    let lanes = cast_slice_mut::<_, f32>(std::slice::from_mut(&mut values));
    for (value, power) in lanes.iter_mut().zip(cast_slice::<_, f32>(&powers)) {
        // Below, the result is 0.
        let power = f64::from_bits(((power.floor().max(-300.0) as i64 + 1023) as u64) << 52);
        *value = (f64::from(*value) * power) as f32;
    }
    values
}

/// [`Isa::fraction_f32s`].
#[inline(always)]
pub(super) fn fraction<I: Isa>(_isa: I, x: I::f32s) -> I::f32s {
    let mut values = x;
    for value in cast_slice_mut::<_, f32>(std::slice::from_mut(&mut values)) {
        *value = if value.is_infinite() { 0.0 } else { *value - value.floor() };
    }
    values
}

/// [`Isa::load_quads_f32s`].
///
/// # Safety
/// As for that.
#[inline(always)]
pub(super) unsafe fn load_quads<I: Isa>(isa: I, quads: [*const f32; 4]) -> I::f32s {
    let mut values = isa.splat_f32s(0.0);
    let lanes = cast_slice_mut::<_, f32>(std::slice::from_mut(&mut values));
    for (i, value) in lanes.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *value = unsafe { quads[i / 4].add(i % 4).read_unaligned() };
    }
    values
}

/// The values of any two vectors at even indices, and those at odd ones.
#[inline(always)]
pub(super) fn split<T: Pod, V: Pod>(a: V, b: V) -> [V; 2] {
    let (pair, mut parts) = ([a, b], [a, b]);
    let values: &[T] = cast_slice(&pair);
    let len = values.len() / 2;
    let (even, odd) = cast_slice_mut::<V, T>(&mut parts).split_at_mut(len);
    for i in 0..len {
        (even[i], odd[i]) = (values[2 * i], values[2 * i + 1]);
    }
    parts
}

/// The values of any two vectors in turns.
#[inline(always)]
pub(super) fn zip<T: Pod, V: Pod>(a: V, b: V) -> [V; 2] {
    let (parts, mut pair) = ([a, b], [a, b]);
    let (even, odd) = cast_slice::<V, T>(&parts).split_at(size_of::<V>() / size_of::<T>());
    let pairs = cast_slice_mut::<V, T>(&mut pair).chunks_exact_mut(2);
    for (pair, (&even, &odd)) in pairs.zip(even.iter().zip(odd)) {
        (pair[0], pair[1]) = (even, odd);
    }
    pair
}

/// Transposes a block of `R` rows of `C` values.
///
/// # Safety
/// As for [`Isa::transpose_u16`].
#[inline(always)]
pub(super) unsafe fn transpose<T: Copy, const R: usize, const C: usize>(block: TransposeBlock<T>) {
    let TransposeBlock { src, src_stride, dst, dst_stride } = block;
    for r in 0..R {
        for c in 0..C {
            // SAFETY: inside the block, by the caller's promise.
            unsafe { *dst.add(c * dst_stride + r) = *src.add(r * src_stride + c) }
        }
    }
}

/// The bits of the nearest bfloat16 numbers, in the upper halves.
#[inline(always)]
fn rounded_upper<I: Isa>(isa: I, x: I::f32s) -> I::u32s {
    let bits = isa.transmute_u32s_f32s(x);
    // Adding half of the last bit that stays, or just less where that bit is even, carries where
    // there is more.
    let last = isa.and_u32s(isa.wrapping_dyn_shr_u32s(bits, isa.splat_u32s(16)), isa.splat_u32s(1));
    let nearest = isa.add_u32s(bits, isa.add_u32s(isa.splat_u32s(0x7fff), last));
    // What makes a number NaN may all be in the half that goes: this bit stays.
    let nan = isa.or_u32s(bits, isa.splat_u32s(0x40_0000));
    isa.select_u32s(isa.equal_f32s(x, x), nearest, nan)
}

/// [`Isa::round_bf16`].
#[inline(always)]
pub(super) fn rounded<I: Isa>(isa: I, x: I::f32s) -> I::u32s {
    isa.wrapping_dyn_shr_u32s(rounded_upper(isa, x), isa.splat_u32s(16))
}

/// [`Isa::round_even_odd_bf16`].
#[inline(always)]
pub(super) fn rounded_even_odd<I: Isa>(isa: I, [even, odd]: [I::f32s; 2]) -> I::u32s {
    let odd = isa.and_u32s(rounded_upper(isa, odd), isa.splat_u32s(0xffff_0000));
    isa.or_u32s(rounded(isa, even), odd)
}

/// How many of a vector's first values a mask selects.
#[inline(always)]
pub(super) fn selected<I: Isa>(isa: I, mask: I::m32s) -> usize {
    isa.first_true_m32s(isa.not_m32s(mask))
}

/// Loads the first `len` values of a vector one by one; the others are zero. Where `len` is known
/// and there are instructions for it, the compiler uses these.
///
/// # Safety
/// They must be readable at `ptr`.
#[inline(always)]
pub(super) unsafe fn load_lanes<I: Isa>(isa: I, len: usize, ptr: *const u16) -> I::u32s {
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
pub(super) unsafe fn store_lanes<I: Isa>(_isa: I, len: usize, ptr: *mut u16, value: I::u32s) {
    let lanes = cast_slice::<_, u32>(std::slice::from_ref(&value));
    for (i, &lane) in lanes[..len].iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { *ptr.add(i) = lane as u16 };
    }
}
