//! Grouped pointwise convolution of small groups, and its weight gradient, over NHWC memory as it
//! stands: several groups' channels share a vector (grouped lanes).
//!
//! Where a group has fewer output channels than a vector has lanes, a vector of [`super::outer`]
//! would be mostly empty. Here a vector takes as many neighbouring output channels as it can, of
//! any groups. A step multiplies each by the next input channel *of its group*, which an
//! instruction permutes from a vector of them; three output channels a group, for example:
//!
//! ```text
//!   lane        0   1   2 | 3   4   5 | 6   7  ...
//!   group       0   0   0 | 1   1   1 | 2   2
//!   y        += x0  x0  x0  xk  xk  xk  x2k x2k   * weights of step 0   permuted from vector x
//!   y        += x1  x1  x1  xk+1 ...              * weights of step 1
//! ```
//!
//! The permuted values come from a [`Block`]: neighbouring channels where those of all groups in
//! the vector fit one, else four at a time of each. The weight gradient is the same sum over pixels
//! instead of channels, one vector for each step.

use crate::simd::element::Element;
use crate::simd::mul_acc::{MulAcc, has_code};
use crate::simd::{Isa, RawKernel};

/// Steps' channels of a [`Block::Quads`]' quad.
pub const QUAD: usize = 4;
/// The most quads of a vector.
pub const MAX_QUADS: usize = 4;
/// The most steps of a weight gradient: their sums and indices stay in registers.
pub const MAX_STEPS: usize = 8;

/// Where a vector of input channels comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Block {
    /// So many neighbouring ones.
    Window(usize),
    /// [`QUAD`] steps' neighbouring ones from each of these channels of the pixel on; as many as
    /// fill a vector.
    Quads([usize; MAX_QUADS]),
}

/// Input channels and how many steps permute them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Source {
    /// The first channel, or that of a cache line to prefetch.
    pub first: usize,
    /// Which ones.
    pub block: Block,
    /// How many steps.
    pub steps: usize,
    /// Whether to prefetch the line of `first` in later pixels.
    pub prefetch: bool,
}

/// `y[p][lane] = bias[lane] + sum over steps of weights[step][lane] * x[p][index[step][lane]]` for
/// one vector of output channels.
///
/// # Safety
/// Until it has run, every pixel's sources must be readable and its output channels writable.
pub struct GroupedNhwc<'a, T: Element, M> {
    /// How products are summed.
    pub mul_acc: M,
    /// The first pixel's channels.
    pub x: *const T,
    /// Distance of pixels.
    pub x_stride: usize,
    /// The vector's channels in the first pixel.
    pub y: *mut T,
    /// Distance of pixels.
    pub y_stride: usize,
    /// Number of pixels.
    pub pixels: usize,
    /// Number of output channels.
    pub columns: usize,
    /// Input channels in the order of steps.
    pub sources: &'a [Source],
    /// For each step, for each lane, the indices in the source's vector, as [`MulAcc::permute`]
    /// takes them.
    pub index: &'a [u32],
    /// For each step, for each lane, the weights, packed by [`MulAcc::pack`].
    pub weights: &'a [T::Wide],
    /// A value for each output channel.
    pub bias: Option<&'a [T]>,
    /// Distances from what is read and written to what is prefetched meanwhile; 0 where that is in
    /// a cache.
    pub prefetch: [usize; 2],
}

impl<'a, T: Element, M: MulAcc<T>> GroupedNhwc<'a, T, M> {
    /// What can be checked of a description.
    #[inline(always)]
    fn validate(&self) {
        assert!(self.bias.is_none_or(|bias| bias.len() == self.columns), "bias");
    }

    /// `R` pixels from those at `x` and `y` on.
    ///
    /// # Safety
    /// As for [`GroupedNhwc`]; they must exist.
    #[inline(always)]
    unsafe fn tile<I: Isa, const R: usize>(&self, isa: I, x: *const T, y: *mut T) {
        let lanes = T::lanes::<I>();
        let mask = T::mask(isa, self.columns);
        // SAFETY: the caller's promise; indices and weights were counted. Pointers go from pixel to
        // pixel: to compute each from the first one's takes more registers than there are.
        unsafe {
            let start = match self.bias {
                Some(bias) => T::load_masked(isa, mask, bias.as_ptr()),
                None => T::splat(isa, T::default()),
            };
            let mut sums = [start; R];
            let (mut index, mut weights) = (self.index.as_ptr(), self.weights.as_ptr());
            for source in self.sources {
                if source.prefetch {
                    let mut ahead = x.wrapping_add(source.first + self.prefetch[0]);
                    for _ in 0..R {
                        isa.prefetch_l2(ahead);
                        ahead = ahead.wrapping_add(self.x_stride);
                    }
                }
                let mut values = [T::splat(isa, T::default()); R];
                match &source.block {
                    Block::Window(len) => {
                        let mask = M::mask(isa, *len);
                        let mut from = x.wrapping_add(source.first);
                        for value in &mut values {
                            *value = self.mul_acc.load_row_masked(isa, mask, from);
                            from = from.wrapping_add(self.x_stride);
                        }
                    }
                    Block::Quads(starts) => {
                        let mut from = x;
                        for value in &mut values {
                            *value = self.mul_acc.load_quads(isa, starts.map(|start| from.wrapping_add(start)));
                            from = from.wrapping_add(self.x_stride);
                        }
                    }
                }
                for _ in 0..source.steps {
                    let (lanes_index, weight) = (index.cast::<I::u32s>().read_unaligned(), T::load_wide(isa, weights));
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum = self.mul_acc.mul_add(isa, weight, self.mul_acc.permute(isa, value, lanes_index), *sum);
                    }
                    (index, weights) = (index.add(lanes), weights.add(lanes));
                }
            }
            let mask = (self.columns < lanes).then_some(mask);
            let mut to = y;
            for sum in sums {
                if self.prefetch[1] > 0 {
                    isa.prefetch_l2(to.wrapping_add(self.prefetch[1]));
                }
                self.mul_acc.store(isa, mask, to, sum);
                to = to.wrapping_add(self.y_stride);
            }
        }
    }
}

impl<T: Element, M: MulAcc<T>> RawKernel for GroupedNhwc<'_, T, M> {
    type Output = ();

    #[inline(always)]
    fn check(&self) {
        self.validate();
    }

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        if !const { T::PERMUTES && I::PERMUTES && has_code::<T, M, I>() } {
            unreachable!("no instruction permutes lanes");
        }
        let kernel = self;
        let lanes = T::lanes::<I>();
        let steps: usize = kernel.sources.iter().map(|source| source.steps).sum();
        assert!(kernel.columns <= lanes && kernel.index.len() == steps * lanes, "indices");
        assert_eq!(kernel.weights.len(), steps * lanes, "weights");
        let (mut x, mut y, mut left) = (kernel.x, kernel.y, kernel.pixels);
        // SAFETY: promised; the pixels exist.
        unsafe {
            while left > 0 {
                // With the values that they permute, sums of eight pixels take 16 registers.
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
                (x, y) = (x.wrapping_add(pixels * kernel.x_stride), y.wrapping_add(pixels * kernel.y_stride));
                left -= pixels;
            }
        }
    }
}

/// `sums[step][lane] += sum over pixels of b[p][lane] * a[p][index[step][lane]]` for one vector of
/// channels.
///
/// # Safety
/// Until it has run, `a` and `b` must be readable for all terms.
pub struct GroupedNhwcGradWeight<'a, T: Element, M> {
    /// How products are summed.
    pub mul_acc: M,
    /// The values that are permuted, packed by [`MulAcc::pack`], in the first step's pixels, and
    /// their number.
    pub a: (*const T::Wide, usize),
    /// Distance from step to step of `a`.
    pub a_stride: usize,
    /// Distance from what is read of `a` to what is prefetched meanwhile; 0 for nothing.
    pub a_prefetch: usize,
    /// The vector's values, packed, and their number.
    pub b: (*const T::Wide, usize),
    /// Distance from step to step of `b`.
    pub b_stride: usize,
    /// As `a_prefetch`.
    pub b_prefetch: usize,
    /// Number of pixels.
    pub terms: usize,
    /// For each step, for each lane, the index in `a`.
    pub index: &'a [u32],
    /// A vector for each step.
    pub sums: &'a mut [T::Wide],
}

impl<'a, T: Element, M: MulAcc<T>> GroupedNhwcGradWeight<'a, T, M> {
    /// What can be checked of a description.
    #[inline(always)]
    fn validate(&self) {
        assert_eq!(self.index.len(), self.sums.len(), "indices");
    }

    /// All terms with `S` steps, `U` terms at a time: their sums' additions overlap.
    ///
    /// # Safety
    /// As for [`GroupedNhwcGradWeight`]; there must be `S` vectors of indices and sums.
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
                    if self.a_prefetch > 0 {
                        isa.prefetch_l2(a.wrapping_add(self.a_prefetch));
                    }
                    if self.b_prefetch > 0 {
                        isa.prefetch_l2(b.wrapping_add(self.b_prefetch));
                    }
                    let x = T::load_wide_masked(isa, a_mask, a);
                    let y = T::load_wide_masked(isa, b_mask, b);
                    for (sum, &index) in sums.iter_mut().zip(&index) {
                        *sum = self.mul_acc.mul_add(isa, T::permute(isa, x, index), y, *sum);
                    }
                    (a, b) = (a.wrapping_add(self.a_stride), b.wrapping_add(self.b_stride));
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

impl<T: Element, M: MulAcc<T>> RawKernel for GroupedNhwcGradWeight<'_, T, M> {
    type Output = ();

    #[inline(always)]
    fn check(&self) {
        self.validate();
    }

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        if !const { T::PERMUTES && I::PERMUTES && has_code::<T, M, I>() } {
            unreachable!("no instruction permutes lanes");
        }
        let mut kernel = self;
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
