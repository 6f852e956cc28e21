//! Grouped pointwise convolution of small groups, and its weight gradient, over NHWC memory as it stands: several groups'
//! channels stand side by side in a vector.
//!
//! Where a group has fewer output channels than a vector has lanes, a vector of [`super::outer`] would be mostly empty. Here a
//! vector takes as many neighbouring output channels as it can, of any groups. A step multiplies each by the next input
//! channel *of its group*, which an instruction picks from a vector of them; three output channels a group, for example:
//!
//! ```text
//!   lane        0   1   2 | 3   4   5 | 6   7  ...
//!   group       0   0   0 | 1   1   1 | 2   2
//!   y        += x0  x0  x0  xk  xk  xk  x2k x2k   * weights of step 0       picked from the vector x
//!   y        += x1  x1  x1  xk+1 ...              * weights of step 1
//! ```
//!
//! The picked values come from a [`Block`]: neighbouring channels where those of all groups in the vector fit one, else four
//! at a time of each. The weight gradient is the same sum over pixels instead of channels, one vector for each step.

use crate::simd::element::Element;
use crate::simd::mul_acc::MulAcc;
use crate::simd::{Isa, RawKernel};

/// Steps' channels of a [`Block::Pieces`]' piece.
pub const PIECE: usize = 4;
/// The most pieces of a vector.
pub const MAX_PIECES: usize = 4;
/// The most steps of a weight gradient: their sums and indices stay in registers.
pub const MAX_STEPS: usize = 8;

/// Where a vector of input channels comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Block {
    /// So many neighbouring ones.
    Window(usize),
    /// [`PIECE`] steps' neighbouring ones from each of these places on, which count from the pixel's first channel; as many as
    /// fill a vector.
    Pieces([usize; MAX_PIECES]),
}

/// Input channels and how many steps pick from them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Source {
    /// The first channel, or that of a cache line to ask for.
    pub first: usize,
    /// Which ones.
    pub block: Block,
    /// How many steps.
    pub steps: usize,
    /// Whether to ask for the line of `first` in later pixels.
    pub ask: bool,
}

/// `y[p][lane] = bias[lane] + sum over steps of weights[step][lane] * x[p][index[step][lane]]` for one vector of output
/// channels.
///
/// # Safety
/// Until it has run, every pixel's sources must be readable and its output channels writable.
pub struct SideBySide<'a, T: Element, M> {
    /// How products are added up.
    pub products: M,
    /// The first pixel's channels.
    pub x: *const T,
    /// Distance of pixels.
    pub x_step: usize,
    /// The vector's channels in the first pixel.
    pub y: *mut T,
    /// Distance of pixels.
    pub y_step: usize,
    /// Number of pixels.
    pub pixels: usize,
    /// Number of output channels.
    pub columns: usize,
    /// Input channels in the order of steps.
    pub sources: &'a [Source],
    /// For each step, for each lane, the places in the source's vector, as [`MulAcc::permute`] takes them.
    pub index: &'a [u32],
    /// For each step, for each lane, the weights, packed by [`MulAcc::pack`].
    pub weights: &'a [T::Wide],
    /// A value for each output channel.
    pub bias: Option<&'a [T]>,
    /// Distances from what is read and written to what is asked for meanwhile; 0 where that is in a cache.
    pub ahead: [usize; 2],
}

impl<'a, T: Element, M: MulAcc<T>> SideBySide<'a, T, M> {
    /// What can be checked of a description.
    #[inline(always)]
    fn check(&self) {
        assert!(self.bias.is_none_or(|bias| bias.len() == self.columns), "bias");
    }

    /// `R` pixels from those at `x` and `y` on.
    ///
    /// # Safety
    /// As for [`SideBySide`]; they must exist.
    #[inline(always)]
    unsafe fn tile<I: Isa, const R: usize>(&self, isa: I, x: *const T, y: *mut T) {
        let lanes = T::lanes::<I>();
        let mask = T::mask(isa, self.columns);
        // SAFETY: the caller's promise; indices and weights were counted. Pointers go from pixel to pixel: to compute each
        // from the first one's takes more registers than there are.
        unsafe {
            let start = match self.bias {
                Some(bias) => T::load_masked(isa, mask, bias.as_ptr()),
                None => T::splat(isa, T::default()),
            };
            let mut sums = [start; R];
            let (mut index, mut weights) = (self.index.as_ptr(), self.weights.as_ptr());
            for source in self.sources {
                if source.ask {
                    let mut ahead = x.wrapping_add(source.first + self.ahead[0]);
                    for _ in 0..R {
                        isa.prefetch_l2(ahead);
                        ahead = ahead.wrapping_add(self.x_step);
                    }
                }
                let mut values = [T::splat(isa, T::default()); R];
                match &source.block {
                    Block::Window(len) => {
                        let mask = M::mask(isa, *len);
                        let mut from = x.wrapping_add(source.first);
                        for value in &mut values {
                            *value = self.products.load_row_masked(isa, mask, from);
                            from = from.wrapping_add(self.x_step);
                        }
                    }
                    Block::Pieces(places) => {
                        let mut from = x;
                        for value in &mut values {
                            *value = self.products.load_quads(isa, places.map(|place| from.wrapping_add(place)));
                            from = from.wrapping_add(self.x_step);
                        }
                    }
                }
                for _ in 0..source.steps {
                    let (places, weight) = (index.cast::<I::u32s>().read_unaligned(), T::load_wide(isa, weights));
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum = self.products.mul_add(isa, weight, self.products.permute(isa, value, places), *sum);
                    }
                    (index, weights) = (index.add(lanes), weights.add(lanes));
                }
            }
            let mask = (self.columns < lanes).then_some(mask);
            let mut to = y;
            for sum in sums {
                if self.ahead[1] > 0 {
                    isa.prefetch_l2(to.wrapping_add(self.ahead[1]));
                }
                self.products.store(isa, mask, to, sum);
                to = to.wrapping_add(self.y_step);
            }
        }
    }
}

impl<T: Element, M: MulAcc<T>> RawKernel for SideBySide<'_, T, M> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        if !const { T::PERMUTES && I::PERMUTES } {
            unreachable!("no instruction picks lanes");
        }
        let kernel = self;
        kernel.check();
        let lanes = T::lanes::<I>();
        let steps: usize = kernel.sources.iter().map(|source| source.steps).sum();
        assert!(kernel.columns <= lanes && kernel.index.len() == steps * lanes, "indices");
        assert_eq!(kernel.weights.len(), steps * lanes, "weights");
        let (mut x, mut y, mut left) = (kernel.x, kernel.y, kernel.pixels);
        // SAFETY: promised; the pixels exist.
        unsafe {
            while left > 0 {
                // With the values that they pick from, sums of eight pixels take 16 registers.
                let pixels = if I::REGISTER_COUNT > 16 && left >= 8 {
                    kernel.tile::<I, 8>(isa, x, y);
                    8
                } else if left >= 4 {
                    kernel.tile::<I, 4>(isa, x, y);
                    4
                } else {
                    kernel.tile::<I, 1>(isa, x, y);
                    1
                };
                (x, y) = (x.wrapping_add(pixels * kernel.x_step), y.wrapping_add(pixels * kernel.y_step));
                left -= pixels;
            }
        }
    }
}

/// `sums[step][lane] += sum over pixels of b[p][lane] * a[p][index[step][lane]]` for one vector of channels.
///
/// # Safety
/// Until it has run, `a` and `b` must be readable for all terms.
pub struct SideBySideSums<'a, T: Element, M> {
    /// How products are added up.
    pub products: M,
    /// The values that are picked from, packed by [`MulAcc::pack`], in the first step's pixels, and their number.
    pub a: (*const T::Wide, usize),
    /// Distance from step to step of `a`.
    pub a_step: usize,
    /// Distance from what is read of `a` to what is asked for meanwhile; 0 for nothing.
    pub a_ahead: usize,
    /// The vector's values, packed, and their number.
    pub b: (*const T::Wide, usize),
    /// Distance from step to step of `b`.
    pub b_step: usize,
    /// As `a_ahead`.
    pub b_ahead: usize,
    /// Number of pixels.
    pub terms: usize,
    /// For each step, for each lane, the place in `a`.
    pub index: &'a [u32],
    /// A vector for each step.
    pub sums: &'a mut [T::Wide],
}

impl<'a, T: Element, M: MulAcc<T>> SideBySideSums<'a, T, M> {
    /// What can be checked of a description.
    #[inline(always)]
    fn check(&self) {
        assert_eq!(self.index.len(), self.sums.len(), "indices");
    }

    /// All terms with `S` steps, `U` terms at a time: their sums' additions overlap.
    ///
    /// # Safety
    /// As for [`SideBySideSums`]; there must be `S` vectors of indices and sums.
    #[inline(always)]
    unsafe fn steps<I: Isa, const S: usize, const U: usize>(&mut self, isa: I) {
        let lanes = T::lanes::<I>();
        let zero = T::splat(isa, T::default());
        let (a_mask, b_mask) = (T::mask(isa, self.a.1), T::mask(isa, self.b.1));
        let mut sums = [[zero; S]; U];
        // SAFETY: the caller's promise; as far as there are terms.
        unsafe {
            let index: [I::u32s; S] =
                std::array::from_fn(|s| self.index.as_ptr().add(s * lanes).cast::<I::u32s>().read_unaligned());
            let (mut a, mut b) = (self.a.0, self.b.0);
            let mut left = self.terms.div_ceil(M::TERMS);
            while left > 0 {
                // The last ones go to the first sums.
                let terms = if left >= U { U } else { 1 };
                for sums in sums.iter_mut().take(terms) {
                    if self.a_ahead > 0 {
                        isa.prefetch_l2(a.wrapping_add(self.a_ahead));
                    }
                    if self.b_ahead > 0 {
                        isa.prefetch_l2(b.wrapping_add(self.b_ahead));
                    }
                    let x = T::load_wide_masked(isa, a_mask, a);
                    let y = T::load_wide_masked(isa, b_mask, b);
                    for (sum, &index) in sums.iter_mut().zip(&index) {
                        *sum = self.products.mul_add(isa, T::permute(isa, x, index), y, *sum);
                    }
                    (a, b) = (a.wrapping_add(self.a_step), b.wrapping_add(self.b_step));
                }
                left -= terms;
            }
            for s in 0..S {
                let total = self.sums.as_mut_ptr().add(s * lanes);
                let sum = sums.iter().fold(T::load_wide(isa, total), |sum, sums| T::add_vectors(isa, sum, sums[s]));
                T::store_wide(isa, total, sum);
            }
        }
    }
}

impl<T: Element, M: MulAcc<T>> RawKernel for SideBySideSums<'_, T, M> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        if !const { T::PERMUTES && I::PERMUTES } {
            unreachable!("no instruction picks lanes");
        }
        let mut kernel = self;
        kernel.check();
        let lanes = T::lanes::<I>();
        assert!(kernel.sums.len().is_multiple_of(lanes) && kernel.a.1.max(kernel.b.1) <= lanes, "sums");
        // SAFETY: promised; the number of vectors is known.
        unsafe {
            match kernel.sums.len() / lanes {
                1 => kernel.steps::<I, 1, 8>(isa),
                2 => kernel.steps::<I, 2, 4>(isa),
                3 => kernel.steps::<I, 3, 4>(isa),
                4 => kernel.steps::<I, 4, 2>(isa),
                5 => kernel.steps::<I, 5, 2>(isa),
                6 => kernel.steps::<I, 6, 2>(isa),
                7 => kernel.steps::<I, 7, 1>(isa),
                8 => kernel.steps::<I, 8, 1>(isa),
                steps => panic!("{steps} steps, expected 1 to {MAX_STEPS}"),
            }
        }
    }
}
