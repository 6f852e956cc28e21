//! Grouped pointwise convolution over NHWC pixels whose output is interleaved: neighbouring channels are of different groups,
//! and a vector lies across these.
//!
//! With the input as a matrix of a row for each of a group's channels, a column for each group, a step multiplies a vector of one
//! of its rows by as many weights; three groups of two input and four output channels, for example:
//!
//! ```text
//!   place        0   1   2   3   4   5   6   7        a vector of interleaved output channels
//!   group        0   1   2   0   1   2   0   1
//!   channel      0   0   0   1   1   1   2   2
//!   y        += x00 x01 x02 x00 x01 x02 x00 x01    * weights of step 0       row 0 of the input, again and again
//!   y        += x10 x11 x12 x10 x11 x12 x10 x11    * weights of step 1
//! ```
//!
//! Vectors that start with the same group share what is picked from a row. The other way round, the input gradient of such a layer
//! finds these rows in memory, and its vectors are permuted afterwards.

use std::marker::PhantomData;

use crate::simd::element::Element;
use crate::simd::{Isa, IsaKind, Kernel, line};

/// Pixels that are computed together; of one or two vectors twice as many, whose sums else wait for each other. (Input gradients
/// of 320 channels of 8 x 8 to 1280, 80 groups: 0.64 and 0.63 ms, of 80 of 16 x 16 to 184, 4 groups, 0.115 and 0.104.)
const PIXELS: usize = 4;
/// Vectors that are computed together, at most.
pub const VECTORS: usize = 6;

/// Whether there is code for an instruction set: where a vector is picked from two by one instruction, and registers hold the
/// sums of a tile. (With AVX2, 192 channels to 1152 in 12 groups take a thread 1.33 ms so, 0.78 permuted.)
const fn has_code<T: Element, I: Isa>() -> bool {
    T::PERMUTES && I::PERMUTES && I::REGISTER_COUNT > PIXELS * VECTORS + PIXELS + 2
}

struct HasCode<T>(PhantomData<T>);

impl<T: Element> Kernel for HasCode<T> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> bool {
        const { has_code::<T, I>() }
    }
}

/// Whether a vector comes from a row of so many groups in one of the ways that there is code for: see [`row`].
pub(crate) fn has_mode(groups: usize, lanes: usize) -> bool {
    groups.is_multiple_of(lanes) || groups <= 2 * lanes
}

/// How a vector that starts with group `start` comes from a row of so many groups.
fn mode(groups: usize, lanes: usize, start: usize) -> usize {
    match groups {
        _ if start + lanes <= groups => NEIGHBOURS,
        2 | 4 | 8 => groups,
        _ if groups < lanes => ONE,
        _ => TWO,
    }
}

/// Whether it takes an instruction to pick a vector that starts with group `start` from a row of so many groups.
pub(crate) fn needs_pick(groups: usize, lanes: usize, start: usize) -> bool {
    matches!(mode(groups, lanes, start), ONE | TWO)
}

/// Whether there is code for an instruction set.
pub(crate) fn fits<T: Element>(isa: IsaKind) -> bool {
    isa.run(HasCode::<T>(PhantomData))
}

/// `y[p][v][lane] = bias[v][lane] + sum over rows i of weights[v][i][lane] * x[p][i][index[lane]]` for vectors `v` that start
/// with the same group.
pub struct Across<'a, T: Element> {
    /// The first pixel's rows of input channels, each of one for every group; of some of the groups only, the first one's.
    pub x: *const T,
    /// From one pixel, and from one row, to the next.
    pub x_steps: [usize; 2],
    /// Groups.
    pub groups: usize,
    /// Rows.
    pub terms: usize,
    /// What each lane takes from a row: see [`Across::promise`].
    pub index: &'a [u32],
    /// The weights of each vector, `[row][lane]`.
    pub weights: &'a [T::Wide],
    /// The bias of each vector.
    pub bias: Option<&'a [T::Wide]>,
    /// The first pixel's first vector of results.
    pub y: *mut T,
    /// From one pixel, and from one vector, to the next.
    pub y_steps: [usize; 2],
    /// Number of pixels.
    pub pixels: usize,
    /// Distances from what is read, unless 0, and from what is written to what is asked for meanwhile.
    pub ahead: [usize; 2],
}

/// An [`Across`] that may run: see [`Across::promise`].
pub struct CheckedAcross<'a, T: Element>(Across<'a, T>);

/// How a vector comes from a row: as it is; picked from one vector, or from two. 2, 4 and 8: so many values are loaded again and
/// again, which takes no instruction to pick them. (40 channels of 31 x 31 to 240, 2 groups, 64 images, two threads of an Intel
/// Xeon: 2.5 ms, picked 3.0, without the interleave 2.6.)
const NEIGHBOURS: usize = 0;
const ONE: usize = 1;
const TWO: usize = 16;

/// What a vector takes from a row.
///
/// # Safety
/// Two vectors must be readable from its start on, or one from `first` there if groups fill vectors.
#[inline(always)]
unsafe fn row<T: Element, I: Isa, const MODE: usize>(
    isa: I,
    row: *const T,
    index: I::u32s,
    first: u32,
) -> T::Vector<I> {
    // SAFETY: the caller's promise.
    unsafe {
        match MODE {
            NEIGHBOURS => T::load(isa, row.wrapping_add(first as usize)),
            2 | 4 | 8 => T::load_repeated::<I, MODE>(isa, row, index),
            ONE => T::permute(isa, T::load(isa, row), index),
            _ => {
                let pair = [T::load(isa, row), T::load(isa, row.wrapping_add(T::lanes::<I>()))];
                T::permute2(isa, pair, index)
            }
        }
    }
}

/// Checks indices of rows of so many groups, of which there must be code.
fn check<T: Element, I: Isa>(index: &[u32], groups: usize) {
    let lanes = T::lanes::<I>();
    assert!(index.len() == lanes && size_of::<I::u32s>() == 4 * lanes, "index");
    let follows = |pair: &[u32]| pair[1] == pair[0] + 1 || pair[1] == 0 && pair[0] as usize + 1 == groups;
    assert!(index.windows(2).all(follows) && index.iter().all(|&index| (index as usize) < groups), "index");
    assert!(has_mode(groups, lanes), "groups");
}

/// Evaluates an expression with the constant that says how a vector that takes what `index` says comes from a row of so many
/// groups.
macro_rules! with_mode {
    ($groups:expr, $lanes:expr, $index:expr, $MODE:ident => $body:expr) => {
        match mode($groups, $lanes, $index[0] as usize) {
            NEIGHBOURS => {
                const $MODE: usize = NEIGHBOURS;
                $body
            }
            2 => {
                const $MODE: usize = 2;
                $body
            }
            4 => {
                const $MODE: usize = 4;
                $body
            }
            8 => {
                const $MODE: usize = 8;
                $body
            }
            ONE => {
                const $MODE: usize = ONE;
                $body
            }
            _ => {
                const $MODE: usize = TWO;
                $body
            }
        }
    };
}

impl<'a, T: Element> Across<'a, T> {
    /// Turns the description into a kernel.
    ///
    /// # Safety
    /// Until it has run, every pixel's rows must be readable, unless groups fill vectors two vectors from the start of each on, and
    /// the vectors of results be writable.
    #[inline]
    pub unsafe fn promise(self) -> CheckedAcross<'a, T> {
        CheckedAcross(self)
    }

    /// All vectors and pixels, rows being taken as `MODE` says.
    ///
    /// # Safety
    /// As for [`Across::promise`]; weights, bias and indices must have been checked.
    #[inline(always)]
    unsafe fn all<I: Isa, const MODE: usize>(&self, isa: I, vectors: usize) {
        let mut vector = 0;
        while vector < vectors {
            let rest = vectors - vector;
            // SAFETY: the caller's promise; there are so many vectors.
            unsafe {
                vector += match rest {
                    VECTORS.. => self.vectors::<I, MODE, VECTORS, PIXELS>(isa, vector),
                    4.. => self.vectors::<I, MODE, 4, PIXELS>(isa, vector),
                    3.. => self.vectors::<I, MODE, 3, PIXELS>(isa, vector),
                    2.. => self.vectors::<I, MODE, 2, { 2 * PIXELS }>(isa, vector),
                    _ => self.vectors::<I, MODE, 1, { 2 * PIXELS }>(isa, vector),
                };
            }
        }
    }

    /// `V` vectors of all pixels, of which `P` are computed together; returns how many vectors these are.
    ///
    /// # Safety
    /// As for [`Across::all`]; the vectors must exist.
    #[inline(always)]
    unsafe fn vectors<I: Isa, const MODE: usize, const V: usize, const P: usize>(
        &self,
        isa: I,
        vector: usize,
    ) -> usize {
        let mut pixel = 0;
        while pixel < self.pixels {
            // SAFETY: the caller's promise; the pixels exist.
            unsafe {
                if self.pixels - pixel >= P {
                    self.tile::<I, MODE, V, P>(isa, vector, pixel);
                    pixel += P;
                } else {
                    self.tile::<I, MODE, V, 1>(isa, vector, pixel);
                    pixel += 1;
                }
            }
        }
        V
    }

    /// `V` vectors of `P` pixels.
    ///
    /// # Safety
    /// As for [`Across::vectors`]; the pixels must exist.
    #[inline(always)]
    unsafe fn tile<I: Isa, const MODE: usize, const V: usize, const P: usize>(
        &self,
        isa: I,
        vector: usize,
        pixel: usize,
    ) {
        let lanes = T::lanes::<I>();
        // SAFETY: as many indices as lanes.
        let index = unsafe { self.index.as_ptr().cast::<I::u32s>().read_unaligned() };
        let mut sums = [[T::splat(isa, T::default()); P]; V];
        if let Some(bias) = self.bias {
            for (v, sums) in sums.iter_mut().enumerate() {
                // SAFETY: a vector of the bias.
                *sums = [unsafe { T::load_wide(isa, bias.as_ptr().add((vector + v) * lanes)) }; P];
            }
        }
        let mut x = self.x.wrapping_add(pixel * self.x_steps[0]);
        let mut weights = self.weights.as_ptr().wrapping_add(vector * self.terms * lanes);
        // The first vectors ask for all, each cache line once.
        let mut asked = if vector == 0 && self.ahead[0] > 0 { 0 } else { usize::MAX };
        let ahead = x.wrapping_add(self.ahead[0]);
        for term in 1..=self.terms {
            while asked < term * self.x_steps[1] {
                (0..P).for_each(|p| isa.prefetch_l2(ahead.wrapping_add(p * self.x_steps[0] + asked)));
                asked += line::<T>();
            }
            let mut rows = [T::splat(isa, T::default()); P];
            for (p, values) in rows.iter_mut().enumerate() {
                let x = x.wrapping_add(p * self.x_steps[0]);
                // SAFETY: the caller's promise.
                *values = unsafe { row::<T, I, MODE>(isa, x, index, self.index[0]) };
            }
            for (v, sums) in sums.iter_mut().enumerate() {
                // SAFETY: inside the weights, whose number was checked.
                let weight = unsafe { T::load_wide(isa, weights.wrapping_add(v * self.terms * lanes)) };
                for (sum, &row) in sums.iter_mut().zip(&rows) {
                    *sum = T::mul_add(isa, weight, row, *sum);
                }
            }
            (x, weights) = (x.wrapping_add(self.x_steps[1]), weights.wrapping_add(lanes));
        }
        for (v, sums) in sums.into_iter().enumerate() {
            for (p, sum) in sums.into_iter().enumerate() {
                let y = self.y.wrapping_add((pixel + p) * self.y_steps[0] + (vector + v) * self.y_steps[1]);
                isa.prefetch_l2(y.wrapping_add(self.ahead[1]));
                // SAFETY: the caller's promise.
                unsafe { T::store(isa, y, sum) };
            }
        }
    }
}

impl<T: Element> Kernel for CheckedAcross<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        if !const { has_code::<T, I>() } {
            unreachable!("no code for these instructions");
        }
        let (Self(kernel), lanes) = (self, T::lanes::<I>());
        check::<T, I>(kernel.index, kernel.groups);
        let vectors = kernel.weights.len() / (kernel.terms * lanes);
        assert_eq!(kernel.weights.len(), vectors * kernel.terms * lanes, "weights");
        assert!(kernel.bias.is_none_or(|bias| bias.len() == vectors * lanes), "bias");
        // SAFETY: promised; the slices have just been checked.
        unsafe { with_mode!(kernel.groups, lanes, kernel.index, MODE => kernel.all::<I, MODE>(isa, vectors)) }
    }
}

/// `sums[v][i][lane] += sum over pixels p of g[p][v][lane] * x[p][i][index[lane]]` for vectors `v` that start with the same
/// group and all rows `i`: the weight gradient.
pub struct AcrossSums<'a, T: Element> {
    /// See [`Across::x`].
    pub x: *const T,
    /// From one pixel to the next.
    pub x_step: usize,
    /// Groups: values of a row.
    pub groups: usize,
    /// Rows.
    pub terms: usize,
    /// See [`Across::index`].
    pub index: &'a [u32],
    /// The first pixel's first vector of the gradient.
    pub g: *const T,
    /// From one pixel, and from one vector, to the next.
    pub g_steps: [usize; 2],
    /// The sums of each vector, `[row][lane]`.
    pub sums: &'a mut [T::Wide],
    /// Number of pixels.
    pub pixels: usize,
    /// Distance from what is read of the gradient to what is asked for meanwhile.
    pub ahead: usize,
}

/// An [`AcrossSums`] that may run: see [`AcrossSums::promise`].
pub struct CheckedAcrossSums<'a, T: Element>(AcrossSums<'a, T>);

impl<'a, T: Element> AcrossSums<'a, T> {
    /// Turns the description into a kernel.
    ///
    /// # Safety
    /// As for [`Across::promise`], but that the vectors of the gradient must be readable.
    #[inline]
    pub unsafe fn promise(self) -> CheckedAcrossSums<'a, T> {
        CheckedAcrossSums(self)
    }

    /// All vectors and rows, which are taken as `MODE` says.
    ///
    /// # Safety
    /// As for [`AcrossSums::promise`]; the number of sums and the indices must have been checked.
    #[inline(always)]
    unsafe fn all<I: Isa, const MODE: usize>(&mut self, isa: I, vectors: usize) {
        let mut vector = 0;
        while vector < vectors {
            let rest = vectors - vector;
            // SAFETY: the caller's promise; there are so many vectors.
            unsafe {
                vector += match rest {
                    VECTORS.. => self.vectors::<I, MODE, VECTORS>(isa, vector),
                    2.. => self.vectors::<I, MODE, 2>(isa, vector),
                    _ => self.vectors::<I, MODE, 1>(isa, vector),
                };
            }
        }
    }

    /// All rows of `V` vectors; returns how many these are.
    ///
    /// # Safety
    /// As for [`AcrossSums::all`]; the vectors must exist.
    #[inline(always)]
    unsafe fn vectors<I: Isa, const MODE: usize, const V: usize>(&mut self, isa: I, vector: usize) -> usize {
        let mut term = 0;
        while term < self.terms {
            // SAFETY: the caller's promise; the rows exist.
            unsafe {
                if self.terms - term >= PIXELS {
                    self.tile::<I, MODE, V, PIXELS>(isa, vector, term);
                    term += PIXELS;
                } else {
                    self.tile::<I, MODE, V, 1>(isa, vector, term);
                    term += 1;
                }
            }
        }
        V
    }

    /// `R` rows of `V` vectors.
    ///
    /// # Safety
    /// As for [`AcrossSums::vectors`]; the rows must exist.
    #[inline(always)]
    unsafe fn tile<I: Isa, const MODE: usize, const V: usize, const R: usize>(
        &mut self,
        isa: I,
        vector: usize,
        term: usize,
    ) {
        let lanes = T::lanes::<I>();
        // SAFETY: as many indices as lanes.
        let index = unsafe { self.index.as_ptr().cast::<I::u32s>().read_unaligned() };
        let place = |v: usize, r: usize| ((vector + v) * self.terms + term + r) * lanes;
        let mut sums = [[T::splat(isa, T::default()); R]; V];
        for (v, sums) in sums.iter_mut().enumerate() {
            for (r, sum) in sums.iter_mut().enumerate() {
                // SAFETY: inside the sums, whose number was checked.
                *sum = unsafe { T::load_wide(isa, self.sums.as_ptr().wrapping_add(place(v, r))) };
            }
        }
        let mut x = self.x.wrapping_add(term * self.groups);
        let mut g = self.g.wrapping_add(vector * self.g_steps[1]);
        for _ in 0..self.pixels {
            let mut rows = [T::splat(isa, T::default()); R];
            for (r, values) in rows.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *values = unsafe { row::<T, I, MODE>(isa, x.wrapping_add(r * self.groups), index, self.index[0]) };
            }
            for (v, sums) in sums.iter_mut().enumerate() {
                let g = g.wrapping_add(v * self.g_steps[1]);
                // The first rows ask for all. (All at once before them: 40 % slower.)
                if term == 0 {
                    isa.prefetch_l2(g.wrapping_add(self.ahead));
                }
                // SAFETY: the caller's promise.
                let gradient = unsafe { T::load(isa, g) };
                for (sum, &values) in sums.iter_mut().zip(&rows) {
                    *sum = T::mul_add(isa, gradient, values, *sum);
                }
            }
            (x, g) = (x.wrapping_add(self.x_step), g.wrapping_add(self.g_steps[0]));
        }
        for (v, sums) in sums.into_iter().enumerate() {
            for (r, sum) in sums.into_iter().enumerate() {
                // SAFETY: as for the loads.
                unsafe { T::store_wide(isa, self.sums.as_mut_ptr().wrapping_add(place(v, r)), sum) };
            }
        }
    }
}

impl<T: Element> Kernel for CheckedAcrossSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        if !const { has_code::<T, I>() } {
            unreachable!("no code for these instructions");
        }
        let (Self(mut kernel), lanes) = (self, T::lanes::<I>());
        check::<T, I>(kernel.index, kernel.groups);
        let vectors = kernel.sums.len() / (kernel.terms * lanes);
        assert_eq!(kernel.sums.len(), vectors * kernel.terms * lanes, "sums");
        // SAFETY: promised; the slices have just been checked.
        unsafe { with_mode!(kernel.groups, lanes, kernel.index, MODE => kernel.all::<I, MODE>(isa, vectors)) }
    }
}
