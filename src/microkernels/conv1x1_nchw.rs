//! The grouped pointwise convolution over rows of pixels, and the products of rows that give its weight gradient.
//!
//! Both kernels hold a tile of results in registers. [`ConvRows`] keeps `R` output rows x `V` vectors of pixels:
//!
//! ```text
//!              V vectors of pixels
//!   x row j   [ x0 ][ x1 ]            loaded once, used R times
//!   y row 0 += w[j][0] * ...          R x V accumulators
//!   y row 1 += w[j][1] * ...
//! ```
//!
//! [`DotRows`] keeps `A x B` vectors of partial sums, one for each pair of an `A` row and a `B` row. The number of
//! registers of the instruction set bounds both tiles; inner loops need `V + R` (or `A + B`) loads for `V * R` (`A * B`)
//! multiply-adds, so from 2 x 2 on the arithmetic is the limit, not the loads.

use crate::simd::element::{Element, WideElement};
use crate::simd::mul_acc::MulAcc;
use crate::simd::{Isa, Kernel, RawKernel, line};

/// The most output rows of one [`ConvRows`] tile.
pub const MAX_ROWS: usize = 8;
/// Steps that the largest tiles of [`ConvRows`] take at a time in long rows. (Three expansions of 112 x 112 pixels, 16 images, one and
/// two threads of an Intel Xeon: 0.7 to 0.9 times the time forward and by input, of 56 x 56 1.0; with code for both ways in one
/// function, whose sums leave the registers, images of 8 x 8 take 1.7 times theirs.)
const STEPS: usize = 4;
/// Pixels of a row that is long.
const LONG_ROW: usize = 1024;
/// The most `A` rows of one [`DotRows`] tile.
pub const MAX_DOT_A: usize = 4;
/// The most `B` rows of one [`DotRows`] tile beside several `A` rows.
const MAX_DOT_B: usize = 6;
/// The most `B` rows of one [`DotRows`] tile beside a single `A` row.
pub const MAX_SINGLE_B: usize = 9;

/// What the sums of [`ConvRows`] start from.
#[derive(Clone, Copy)]
pub enum Start<'a, T> {
    /// Zero.
    Zero,
    /// A value for each output row.
    Bias(&'a [T]),
    /// What is in the output: for types that are stored as they are computed with.
    Output,
}

impl<'a, T> From<Option<&'a [T]>> for Start<'a, T> {
    /// The bias, where there is one.
    fn from(bias: Option<&'a [T]>) -> Self {
        bias.map_or(Self::Zero, Self::Bias)
    }
}

/// `y[r] = start[r] + sum over j of weights[j][r] * x[j]` for `R` output rows over `pixels` pixels.
///
/// # Safety
/// Until it has run, every input row must be readable and every output row writable over `pixels` values (readable too
/// for [`Start::Output`]), and outputs must overlap neither inputs nor each other.
pub struct ConvRows<'a, T: Element, M> {
    /// How products are added up.
    pub products: M,
    /// Input row `j` starts at `x + x_offsets[j]`.
    pub x: *const T,
    /// One offset for each input row.
    pub x_offsets: &'a [usize],
    /// Weights `[step][output row]`, packed by [`MulAcc::pack`]: a step takes one input row or two.
    pub weights: &'a [T::Wide],
    /// What sums start from.
    pub start: Start<'a, T>,
    /// Output row `r` starts at `y + y_offsets[r]`.
    pub y: *mut T,
    /// One offset for each output row, at most [`MAX_ROWS`].
    pub y_offsets: &'a [usize],
    /// Length of a row.
    pub pixels: usize,
    /// Distances from what is read and written to what is asked for meanwhile, which later calls will read and write; 0
    /// where that is in a cache.
    pub ahead: [usize; 2],
}

/// Vectors of pixels beside `rows` output rows: as many as the registers hold, three of them kept for a vector of x, a
/// weight and a spare. An even number where a step takes two rows, whose values come in parts of two vectors.
const fn tile_vectors(registers: usize, rows: usize, terms: usize) -> usize {
    let vectors = (registers - 3) / rows;
    match vectors {
        3 if terms > 1 => 2,
        // A single row needs eight independent sums to hide the latency of the multiply-adds.
        8.. if rows == 1 => 8,
        4.. => 4,
        _ => vectors,
    }
}

/// How many of a tile's vectors come in pairs: the whole ones, as far as there are two.
const fn paired(vectors: usize, tail: bool) -> usize {
    (vectors - tail as usize) / 2 * 2
}

impl<'a, T: Element, M: MulAcc<T>> ConvRows<'a, T, M> {
    /// What can be checked of a description.
    #[inline(always)]
    fn check(&self) {
        let rows = self.y_offsets.len();
        assert!((1..=MAX_ROWS).contains(&rows), "output rows");
        assert_eq!(self.weights.len(), self.x_offsets.len().div_ceil(M::TERMS) * rows, "weights");
        match self.start {
            Start::Zero => {}
            Start::Bias(bias) => assert_eq!(bias.len(), rows, "bias"),
            Start::Output => assert_eq!(size_of::<T>(), size_of::<T::Wide>(), "sums are stored with rounding"),
        }
    }

    /// All pixels, with `R` rows, `S` steps at a time.
    ///
    /// # Safety
    /// As for [`ConvRows`]; `R` must be the number of output rows.
    #[inline(always)]
    unsafe fn rows<I: Isa, const R: usize, const S: usize>(&self, isa: I) {
        // A constant: only one arm is compiled.
        match const { tile_vectors(I::REGISTER_COUNT, R, M::TERMS) } {
            // SAFETY: the caller's promise.
            8 => unsafe { self.tiles::<I, R, 8, S>(isa) },
            // SAFETY: the caller's promise.
            4 => unsafe { self.tiles::<I, R, 4, S>(isa) },
            // SAFETY: the caller's promise.
            3 => unsafe { self.tiles::<I, R, 3, S>(isa) },
            // SAFETY: the caller's promise.
            2 => unsafe { self.tiles::<I, R, 2, S>(isa) },
            // SAFETY: the caller's promise.
            _ => unsafe { self.tiles::<I, R, 1, S>(isa) },
        }
    }

    /// # Safety
    /// As for [`ConvRows::rows`].
    #[inline(always)]
    unsafe fn tiles<I: Isa, const R: usize, const V: usize, const S: usize>(&self, isa: I) {
        let lanes = T::lanes::<I>();
        let mut p = 0;
        // SAFETY: every tile ends at or before `pixels`; the last one masks what lies beyond.
        unsafe {
            while p + V * lanes <= self.pixels {
                self.tile::<I, R, V, false, S>(isa, p, T::mask(isa, lanes));
                p += V * lanes;
            }
            // What is left is less than V vectors, or nothing: up to four of them at a time.
            while p < self.pixels {
                let rest = self.pixels - p;
                let vectors = rest.div_ceil(lanes).min(4);
                let mask = T::mask(isa, (rest - (vectors - 1) * lanes).min(lanes));
                if vectors == 1 {
                    self.tile::<I, R, 1, true, 1>(isa, p, mask);
                } else if const { V >= 3 } && vectors == 2 {
                    self.tile::<I, R, 2, true, 1>(isa, p, mask);
                } else if const { V >= 4 } && vectors == 3 {
                    self.tile::<I, R, 3, true, 1>(isa, p, mask);
                } else if const { V >= 4 } {
                    self.tile::<I, R, 4, true, 1>(isa, p, mask);
                } else {
                    self.tile::<I, R, V, true, 1>(isa, p, mask);
                }
                p += vectors * lanes;
            }
        }
    }

    /// Adds the products of one step, of the input row at an offset and the next one.
    ///
    /// # Safety
    /// As for [`ConvRows::tile`]; there must be `R` weights.
    #[inline(always)]
    unsafe fn step<I: Isa, const R: usize, const V: usize, const TAIL: bool>(
        &self,
        isa: I,
        [p, row]: [usize; 2],
        next: Option<usize>,
        mask: T::Mask<I>,
        weights: *const T::Wide,
        sums: &mut [[T::Vector<I>; V]; R],
    ) {
        let lanes = T::lanes::<I>();
        let paired = const { paired(V, TAIL) };
        if self.ahead[0] > 0 {
            for v in 0..V {
                let ahead = p + v * lanes + self.ahead[0];
                isa.prefetch_l2(self.x.wrapping_add(row + ahead));
                if let Some(next) = next {
                    isa.prefetch_l2(self.x.wrapping_add(next + ahead));
                }
            }
        }
        let mut x = [T::splat(isa, T::default()); V];
        for (v, x) in x.iter_mut().enumerate() {
            // The next tile's values: planes are often a page apart and read for a few cache lines only, which hardware
            // prefetchers do not follow (96 planes of 112 x 112: 15 ms without, 11 with).
            let ahead = p + (v + V) * lanes;
            isa.prefetch(self.x.wrapping_add(row + ahead));
            if let Some(next) = next {
                isa.prefetch(self.x.wrapping_add(next + ahead));
            }
            // SAFETY: inside the input rows.
            *x = unsafe {
                let part = if v < paired { v % 2 } else { 0 };
                let x = self.x.add(p + (v - part) * lanes);
                let (row, next) = (x.add(row), next.map(|next| x.add(next)));
                if v < paired {
                    self.products.load_part(isa, row, next, part)
                } else if TAIL && v == V - 1 {
                    self.products.load_masked(isa, mask, row, next)
                } else {
                    self.products.load(isa, row, next)
                }
            };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: there are R weights.
            let w = T::splat_wide(isa, unsafe { *weights.add(r) });
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = self.products.mul_add(isa, w, x, *sum);
            }
        }
    }

    /// `R` rows x `V` vectors from pixel `p`, `S` steps at a time; with `TAIL` the last vector is masked.
    ///
    /// # Safety
    /// As for [`ConvRows::rows`]; the tile must end inside the row, but for what `mask` leaves out.
    #[inline(always)]
    unsafe fn tile<I: Isa, const R: usize, const V: usize, const TAIL: bool, const S: usize>(
        &self,
        isa: I,
        p: usize,
        mask: T::Mask<I>,
    ) {
        let lanes = T::lanes::<I>();
        let zero = T::splat(isa, T::default());
        let paired = const { paired(V, TAIL) };
        let mut sums = [[zero; V]; R];
        match self.start {
            Start::Zero => {}
            Start::Bias(bias) => {
                for (row, &bias) in sums.iter_mut().zip(bias) {
                    *row = [T::splat(isa, bias); V];
                }
            }
            Start::Output => {
                for (row, &offset) in sums.iter_mut().zip(self.y_offsets) {
                    for (v, sum) in row.iter_mut().enumerate() {
                        // SAFETY: inside the output row.
                        *sum = unsafe {
                            let y = self.y.add(offset + p + v * lanes);
                            if TAIL && v == V - 1 { T::load_masked(isa, mask, y) } else { T::load(isa, y) }
                        };
                    }
                }
            }
        }
        let mut weights = self.weights.as_ptr();
        // SAFETY: the caller's promise; the weights hold R values for each step.
        unsafe {
            if const { M::TERMS == 1 } {
                let (several, rest) = self.x_offsets.as_chunks::<S>();
                for rows in several {
                    for &row in rows {
                        self.step::<I, R, V, TAIL>(isa, [p, row], None, mask, weights, &mut sums);
                        weights = weights.add(R);
                    }
                }
                for &row in rest {
                    self.step::<I, R, V, TAIL>(isa, [p, row], None, mask, weights, &mut sums);
                    weights = weights.add(R);
                }
            } else {
                let (pairs, rest) = self.x_offsets.as_chunks::<2>();
                for &[row, next] in pairs {
                    self.step::<I, R, V, TAIL>(isa, [p, row], Some(next), mask, weights, &mut sums);
                    weights = weights.add(R);
                }
                if let [row] = *rest {
                    self.step::<I, R, V, TAIL>(isa, [p, row], None, mask, weights, &mut sums);
                }
            }
        }
        for (r, row) in sums.into_iter().enumerate() {
            for (v, &value) in row.iter().enumerate() {
                // SAFETY: inside output row r; R offsets were asserted.
                unsafe {
                    let ptr = self.y.add(*self.y_offsets.get_unchecked(r) + p + v * lanes);
                    if self.ahead[1] > 0 {
                        isa.prefetch_l2(ptr.wrapping_add(self.ahead[1]));
                    }
                    if v < paired {
                        if v % 2 == 0 {
                            self.products.store_parts(isa, ptr, [value, row[v + 1]]);
                        }
                    } else {
                        self.products.store(isa, (TAIL && v == V - 1).then_some(mask), ptr, value);
                    }
                }
            }
        }
    }
}

impl<T: Element, M: MulAcc<T>> RawKernel for ConvRows<'_, T, M> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        let kernel = self;
        kernel.check();
        // SAFETY: promised; the number of rows was checked.
        unsafe {
            match kernel.y_offsets.len() {
                1 => kernel.rows::<I, 1, 1>(isa),
                2 => kernel.rows::<I, 2, 1>(isa),
                3 => kernel.rows::<I, 3, 1>(isa),
                4 => kernel.rows::<I, 4, 1>(isa),
                5 => kernel.rows::<I, 5, 1>(isa),
                6 => kernel.rows::<I, 6, 1>(isa),
                7 => kernel.rows::<I, 7, 1>(isa),
                _ if M::TERMS == 1 && kernel.pixels >= LONG_ROW => kernel.rows::<I, 8, STEPS>(isa),
                _ => kernel.rows::<I, 8, 1>(isa),
            }
        }
    }
}

/// Rows of several images: row `i` of image `n` starts at `base + n * image_stride + offsets[i]`.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    /// The first image.
    pub base: *const T,
    /// One offset for each row.
    pub offsets: &'a [usize],
    /// Distance from one image to the next.
    pub image_stride: usize,
    /// Distance from what is read to what is asked for meanwhile, which later calls will read; 0 where that is in a cache.
    /// (It may be before what is read: distances wrap.)
    pub ahead: usize,
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
pub struct DotRows<'a, T: Element, M> {
    /// How products are added up.
    pub products: M,
    /// At most [`MAX_DOT_A`] rows.
    pub a: Rows<'a, T>,
    /// At most [`MAX_SINGLE_B`] rows beside a single `a` row, else at most what [`DotWidth`] says.
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

impl<'a, T: Element, M: MulAcc<T>> DotRows<'a, T, M> {
    /// What can be checked of a description.
    #[inline(always)]
    fn check(&self) {
        let (a, b) = (self.a.offsets.len(), self.b.offsets.len());
        assert!((1..=MAX_DOT_A).contains(&a) && (1..=MAX_SINGLE_B).contains(&b), "rows");
        assert!(self.sums.len() >= (self.first_slot + (a - 1) * self.slot_stride + b) * line::<T::Wide>(), "sums");
    }

    /// Adds the products of one vector of each row, which `load` tells to load from the rows' places on.
    ///
    /// # Safety
    /// As for [`DotRows`]; the values must be inside the rows.
    #[inline(always)]
    unsafe fn step<I: Isa, const A: usize, const B: usize, const ASK: bool>(
        &self,
        isa: I,
        (a, b): ([*const T; A], [*const T; B]),
        p: usize,
        load: Load<M::Mask<I>>,
        sums: &mut [[T::Vector<I>; B]; A],
    ) {
        if ASK {
            let at = p + if let Load::Part(part) = load { part * T::lanes::<I>() * M::TERMS } else { 0 };
            b.iter().for_each(|row| isa.prefetch(row.wrapping_add(at.wrapping_add(self.b.ahead))));
            a.iter().for_each(|row| isa.prefetch(row.wrapping_add(at.wrapping_add(self.a.ahead))));
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
                *sum = self.products.mul_add(isa, value, b, *sum);
            }
        }
    }

    /// A row's values from `ptr` on. (Not a closure: these are compiled without the instruction set when they are not inlined,
    /// which made bfloat16 weight gradients 12 to 16 times slower without AVX512-BF16.)
    ///
    /// # Safety
    /// They must be inside the row.
    #[inline(always)]
    unsafe fn values<I: Isa>(&self, isa: I, ptr: *const T, load: Load<M::Mask<I>>) -> T::Vector<I> {
        // SAFETY: the caller's promise.
        unsafe {
            match load {
                Load::Part(part) => self.products.load_row_part(isa, ptr, part),
                Load::All => self.products.load_row(isa, ptr),
                Load::First(mask) => self.products.load_row_masked(isa, mask, ptr),
            }
        }
    }

    /// Adds the products of all images' rows, with `ASK` asking for what is ahead.
    ///
    /// # Safety
    /// As for [`DotRows`]; `A` and `B` must be the numbers of rows.
    #[inline(always)]
    unsafe fn add<I: Isa, const A: usize, const B: usize, const ASK: bool>(
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
                    self.step::<I, A, B, ASK>(isa, rows, p, Load::Part(0), sums);
                    self.step::<I, A, B, ASK>(isa, rows, p, Load::Part(1), sums);
                    p += 2 * lanes;
                }
                while p < self.pixels {
                    let load = if p == full { Load::First(mask) } else { Load::All };
                    self.step::<I, A, B, ASK>(isa, rows, p, load, sums);
                    p += lanes;
                }
            }
        }
    }

    /// # Safety
    /// As for [`DotRows`]; `A` and `B` must be the numbers of rows.
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
            // Not asked inside the loop: there it made the compiler copy all sums at each step.
            if self.a.ahead == 0 && self.b.ahead == 0 {
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

impl<T: Element, M: MulAcc<T>> RawKernel for DotRows<'_, T, M> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        let mut kernel = self;
        kernel.check();
        let size = (kernel.a.offsets.len(), kernel.b.offsets.len());
        assert!(size.0 == 1 || size.1 <= DotWidth.run(isa), "rows");
        macro_rules! tiles {
            ($($a:literal x $($b:literal)*;)*) => {
                match size {
                    // SAFETY: promised.
                    $($(($a, $b) => unsafe { kernel.tile::<I, $a, $b>(isa) },)*)*
                    _ => unreachable!("checked above"),
                }
            };
        }
        if size.0 == 1 {
            // A single row: more pairs are needed to hide the latency of the multiply-adds.
            tiles! { 1 x 1 2 3 4 5 6 7 8 9; }
        // A constant: only one arm is compiled.
        } else if const { dot_width(I::REGISTER_COUNT) > 3 } {
            tiles! { 2 x 1 2 3 4 5 6; 3 x 1 2 3 4 5 6; 4 x 1 2 3 4 5 6; }
        } else {
            tiles! { 2 x 1 2 3; 3 x 1 2 3; 4 x 1 2 3; }
        }
    }
}

/// Sums each slot's first vector into one value: the end of a series of [`DotRows`].
pub struct SumSlots<'a, T>(pub &'a [T], pub &'a mut [T]);

impl<T: WideElement> Kernel for SumSlots<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        assert_eq!(self.0.len(), self.1.len() * line::<T>(), "slots");
        for (slot, sum) in self.0.chunks_exact(line::<T>()).zip(self.1) {
            // SAFETY: a slot is at least a vector long.
            *sum = T::sum(isa, unsafe { T::load(isa, slot.as_ptr()) });
        }
    }
}

const fn dot_width(registers: usize) -> usize {
    if registers >= 32 { MAX_DOT_B } else { 3 }
}

/// The largest tile `B` of [`DotRows`] that the registers of an instruction set hold beside [`MAX_DOT_A`] rows.
pub struct DotWidth;

impl Kernel for DotWidth {
    type Output = usize;

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> usize {
        dot_width(I::REGISTER_COUNT)
    }
}

/// The most output rows of [`ConvRows`] that leave room for two vectors of pixels or, where a row is of four whole ones, for these.
/// (One thread of an Intel Xeon, 64 images of 8 x 8: 320 channels to 1280, 20 groups, 1.28 ms with 8 rows, 1.17 with 6; the input
/// gradient of 672 to 192, 32 groups, 0.64 and 0.48. Of 7 x 7, both the same.)
pub struct ConvHeight {
    /// Whether a row is of four whole vectors.
    pub four: bool,
}

impl Kernel for ConvHeight {
    type Output = usize;

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> usize {
        if I::REGISTER_COUNT >= 32 && !self.four { MAX_ROWS } else { 6 }
    }
}

/// The sums of the columns of a matrix whose rows are as long as the second slice: the bias gradient in NHWC.
pub struct SumColumns<'a, T: Element>(pub &'a [T], pub &'a mut [T::Wide]);

impl<T: Element> Kernel for SumColumns<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self(rows, sums) = self;
        let lanes = T::lanes::<I>();
        let columns = sums.len();
        for (i, out) in sums.chunks_mut(lanes).enumerate() {
            let mask = T::mask(isa, out.len());
            let mut sum = T::splat(isa, T::default());
            for row in rows.chunks_exact(columns) {
                // SAFETY: the mask selects the columns that `out` stands for, which the row holds.
                sum = T::add_vectors(isa, sum, unsafe { T::load_masked(isa, mask, row.as_ptr().add(i * lanes)) });
            }
            // SAFETY: the mask selects the values of `out`.
            unsafe { T::store_wide_masked(isa, mask, out.as_mut_ptr(), sum) };
        }
    }
}
