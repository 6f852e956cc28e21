//! Each operation of [`Isa`] on each instruction set of this machine, against plain arithmetic.

use pulp::bytemuck::cast_slice;

use super::*;

fn block<T>([src, dst]: &mut [&mut [T]; 2]) -> TransposeBlock<T> {
    TransposeBlock { src: src.as_ptr(), src_stride: 9, dst: dst.as_mut_ptr(), dst_stride: 9 }
}

struct Transpose<'a, const R: usize, const C: usize>([&'a mut [u16]; 2], [&'a mut [f32]; 2], [&'a mut [f64]; 2]);
impl<const R: usize, const C: usize> Kernel for Transpose<'_, R, C> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        // SAFETY: all slices are 8 rows of 9.
        unsafe {
            isa.transpose_u16::<R, C>(block(&mut self.0));
            isa.transpose_f32::<R, C>(block(&mut self.1));
            isa.transpose_f64::<R, C>(block(&mut self.2));
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

/// Copies `len` of the values at hand, through vectors of 32 bits, by masks; what fits, also
/// without.
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

/// A table's values, their multiples by powers of two, fractions, and reciprocals: of each index.
struct Exponentials<'a>(&'a [f32; 32], [&'a mut [f32]; 4]);
impl Kernel for Exponentials<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self(table, mut rows) = self;
        for at in (0..rows[0].len()).step_by(size_of::<I::f32s>() / 4) {
            let numbers: [f32; 16] = std::array::from_fn(|i| (at + i) as f32);
            let bits: [u32; 16] = std::array::from_fn(|i| (at + i) as u32);
            let numbers: I::f32s = cast_slice(&numbers)[0];
            let value = isa.lookup_f32s(table, cast_slice(&bits)[0]);
            let powers = isa.sub_f32s(numbers, isa.splat_f32s(150.5));
            let fraction = isa.fraction_f32s(isa.mul_f32s(powers, isa.splat_f32s(0.25)));
            let results = [value, isa.scale_f32s(value, powers), fraction, isa.estimate_reciprocal_f32s(numbers)];
            for (to, result) in rows.iter_mut().zip(results) {
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
        let (mut found, mut scaled, mut fractions, mut reciprocals) = ([0.0; 192], [0.0; 192], [0.0; 192], [0.0; 192]);
        isa.run(Exponentials(&table, [&mut found, &mut scaled, &mut fractions, &mut reciprocals]));
        for i in 0..192 {
            assert_eq!(found[i], table[i % 32], "{}", isa.name());
            // i - 150.5 rounded down.
            let power = f64::from(table[i % 32]) * 2f64.powi(i as i32 - 151);
            assert_eq!(scaled[i], power as f32, "{} {i}", isa.name());
            assert_eq!(fractions[i], (i as f32 * 0.25 - 37.625).rem_euclid(1.0), "{} {i}", isa.name());
            assert!(i == 0 || (reciprocals[i] * i as f32 - 1.0).abs() <= 2f32.powi(-14), "{} {i}", isa.name());
        }
    }
}

#[test]
fn unknown_names_are_refused() {
    assert!(IsaKind::by_name("mmx").unwrap_err().to_string().contains(IsaKind::available()[0].name()));
}
