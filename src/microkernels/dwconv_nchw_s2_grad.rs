//! The gradient by the input of a depthwise convolution at a stride of 2, over NCHW planes. (At a
//! stride of 1 it is a convolution itself: [`dwconv_nchw`](super::dwconv_nchw).)
//!
//! Counted from where the first tap of the first result stands, every second row and column of the
//! input meets the kernel's taps 0, 2, 4 ..., the others meet 1, 3 ... All four parities see the
//! same few vectors of the gradient:
//!
//! ```text
//!   y[2r  ][2p  ] = w00 g[r][p] + w02 g[r][p-1] + w20 g[r-1][p] + w22 g[r-1][p-1]    3 x 3 taps
//!   y[2r  ][2p+1] = w01 g[r][p]                 + w21 g[r-1][p]
//!   y[2r+1][2p  ] = w10 g[r][p] + w12 g[r][p-1]
//!   y[2r+1][2p+1] = w11 g[r][p]
//! ```
//!
//! So these are loaded once, and the columns are put together in registers.

use std::ops::Range;

use super::dwconv_nchw::Results;
use super::tap_view::{MAX_COLUMNS, seen};
use crate::simd::element::Element;
use crate::simd::{Isa, Kernel};

/// The most vectors of the gradient's columns that an input's pixel sees.
const MAX_SEEN: usize = MAX_COLUMNS.div_ceil(2);
/// Pairs of the input's rows that share what is loaded.
const PAIRS: usize = 2;

/// `y[r][p] = sum over taps of weights[i][j] * g[(r + before - i) / 2][(p + before - j) / 2]`,
/// where these are whole numbers, for planes of some channels of some images.
pub struct DwConvNchwS2Grad<'a, T: Element> {
    /// The gradient by the output.
    pub g: &'a [T::Wide],
    /// Height and width of its planes.
    pub g_size: [usize; 2],
    /// How many images there are, and from one to the next of the gradient.
    pub images: (usize, usize),
    /// Likewise channels.
    pub channels: (usize, usize),
    /// Rows and columns of a kernel: 3, 5 or 7.
    pub kernel: usize,
    /// The channels' kernels.
    pub weights: &'a [T::Wide],
    /// Rows and columns of zeros before the input.
    pub before: [usize; 2],
    /// The gradient by the input.
    pub y: Results<'a, T>,
    /// Height and width of its planes.
    pub size: [usize; 2],
    /// From one image and from one channel of it to the next.
    pub y_steps: [usize; 2],
    /// Which [pairs](row_pairs) of its rows to write.
    pub pairs: Range<usize>,
    /// Prefetch distances, from what is read and from what is written.
    pub prefetch: [usize; 2],
}

/// How many pairs of an input's rows there are: the first one of a pair meets the first tap. Where
/// an odd number of zeros stands before the rows, the first pair has only a second one.
pub fn row_pairs(rows: usize, before: usize) -> usize {
    (rows + before % 2).div_ceil(2)
}

/// What is needed of columns at the edges of planes.
#[derive(Clone, Copy)]
struct Edges<M> {
    /// For each vector of the gradient that an input's pixels see, what is inside the plane.
    seen: [M; MAX_SEEN],
    /// The input's columns, of the two vectors that they are.
    results: [M; 2],
}

impl<T: Element> DwConvNchwS2Grad<'_, T> {
    /// That all planes can be read, and that the memory at `y` holds as many planes of results.
    fn check(&self) {
        let len = |[image, channel]: [usize; 2], [height, width]: [usize; 2]| {
            (self.images.0 - 1) * image + (self.channels.0 - 1) * channel + height * width
        };
        assert!(self.g.len() >= len([self.images.1, self.channels.1], self.g_size), "g");
        assert!(self.y.len >= len(self.y_steps, self.size), "y");
        assert!(self.pairs.end <= row_pairs(self.size[0], self.before[0]), "pairs");
        assert_eq!(self.weights.len(), self.channels.0 * self.kernel * self.kernel, "weights");
    }

    /// All columns, by a kernel of `K` rows and columns, of which one parity sees `J` columns of
    /// the gradient. Column `p` meets the first tap where `p + ODD` is even.
    #[inline(always)]
    fn columns<I: Isa, const K: usize, const J: usize, const ODD: usize>(&self, isa: I) {
        let (lanes, g_width) = (T::lanes::<I>(), self.g_size[1]);
        let weights = self.weights.as_chunks::<K>().0.as_chunks::<K>().0;
        for at in (0..self.size[1].div_ceil(2)).step_by(lanes) {
            let first = at + self.before[1].div_ceil(2);
            let inside = |start: isize, width: usize| {
                let [first, end] = seen(start, lanes, width);
                T::mask_between(isa, first, end)
            };
            let edges = Edges {
                seen: std::array::from_fn(|j| inside(first as isize - j as isize, g_width)),
                results: [0, lanes].map(|more| inside((2 * at + more) as isize, self.size[1])),
            };
            let whole = first + 1 >= J && first + lanes <= g_width && 2 * (at + lanes) <= self.size[1];
            for (channel, weights) in weights.iter().enumerate() {
                for image in 0..self.images.0 {
                    let g = self.g.as_ptr().wrapping_add(image * self.images.1 + channel * self.channels.1 + first);
                    let y = image * self.y_steps[0] + channel * self.y_steps[1] + 2 * at;
                    let y = self.y.start.wrapping_add(y);
                    // SAFETY: `run` has checked the slices; what of these columns is outside the
                    // planes is masked.
                    unsafe {
                        if const { !I::MASK_REGISTERS } && whole {
                            self.rows::<I, K, J, ODD, false>(isa, &edges, g, y, weights);
                        } else {
                            self.rows::<I, K, J, ODD, true>(isa, &edges, g, y, weights);
                        }
                    }
                }
            }
        }
    }

    /// The pairs of rows of a plane's vector of pairs of columns; its first pixels are at `g` and
    /// `y` in the planes' first rows.
    ///
    /// # Safety
    /// The slices must have been checked; without `EDGE`, the columns must be inside the planes.
    #[inline(always)]
    unsafe fn rows<I: Isa, const K: usize, const J: usize, const ODD: usize, const EDGE: bool>(
        &self,
        isa: I,
        edges: &Edges<T::Mask<I>>,
        g: *const T::Wide,
        y: *mut T,
        weights: &[[T::Wide; K]; K],
    ) {
        // A last pair alone is computed with the next one, which this plane has too, or has not.
        for pair in self.pairs.clone().step_by(PAIRS) {
            // SAFETY: the caller's promise.
            unsafe { self.pairs::<I, K, J, ODD, EDGE>(isa, edges, g, y, weights, pair) }
        }
    }

    /// [`PAIRS`] pairs of rows from `pair` on.
    ///
    /// # Safety
    /// As for [`DwConvNchwS2Grad::rows`].
    #[inline(always)]
    unsafe fn pairs<I: Isa, const K: usize, const J: usize, const ODD: usize, const EDGE: bool>(
        &self,
        isa: I,
        edges: &Edges<T::Mask<I>>,
        g: *const T::Wide,
        y: *mut T,
        weights: &[[T::Wide; K]; K],
        pair: usize,
    ) {
        let (lanes, first) = (T::lanes::<I>(), pair + self.before[0] / 2);
        let [height, g_width] = self.g_size;
        // Sums of a pair's rows, of the even and of the odd columns.
        let mut sums = [[[T::splat(isa, T::default()); 2]; 2]; PAIRS];
        for seen in 0..J + PAIRS - 1 {
            // The last pair's first tap sees the first of these rows.
            let Some(row) = (first + PAIRS - 1).checked_sub(seen).filter(|&row| row < height) else { continue };
            let g = g.wrapping_add(row * g_width);
            isa.prefetch_l2(g.wrapping_add(self.prefetch[0]));
            for j in 0..J {
                let ptr = g.wrapping_sub(j);
                // SAFETY: a row of the gradient; the mask leaves out what is beside it.
                let value =
                    unsafe { if EDGE { T::load_wide_masked(isa, edges.seen[j], ptr) } else { T::load_wide(isa, ptr) } };
                for (p, sums) in sums.iter_mut().enumerate() {
                    let Some(i) = (seen + p).checked_sub(PAIRS - 1).filter(|&i| i < J) else { continue };
                    for (parity, sums) in sums.iter_mut().enumerate().filter(|(parity, _)| 2 * i + parity < K) {
                        for (side, sum) in sums.iter_mut().enumerate() {
                            let Some(tap) = (2 * j + side).checked_sub(ODD).filter(|&tap| tap < K) else { continue };
                            let weight = T::splat_wide(isa, weights[2 * i + parity][tap]);
                            *sum = T::mul_add(isa, weight, value, *sum);
                        }
                    }
                }
            }
        }
        for (p, sums) in sums.into_iter().enumerate() {
            for (parity, [even, odd]) in sums.into_iter().enumerate() {
                let row = (2 * (pair + p) + parity).checked_sub(self.before[0] % 2);
                let Some(row) = row.filter(|&row| row < self.size[0]) else { continue };
                let y = y.wrapping_add(row * self.size[1]);
                for (half, value) in T::zip(isa, even, odd).into_iter().enumerate() {
                    let y = y.wrapping_add(half * lanes);
                    isa.prefetch_l2(y.wrapping_add(self.prefetch[1]));
                    // SAFETY: a row of the result; the mask leaves out what is beside it.
                    unsafe {
                        if EDGE {
                            T::store_masked(isa, edges.results[half], y, value);
                        } else {
                            T::store(isa, y, value);
                        }
                    }
                }
            }
        }
    }
}

impl<T: Element> Kernel for DwConvNchwS2Grad<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        if self.images.0 * self.channels.0 * self.size[0] * self.size[1] == 0 {
            return;
        }
        self.check();
        match (self.kernel, self.before[1] % 2) {
            (3, 0) => self.columns::<I, 3, 2, 0>(isa),
            (3, _) => self.columns::<I, 3, 2, 1>(isa),
            (5, 0) => self.columns::<I, 5, 3, 0>(isa),
            (5, _) => self.columns::<I, 5, 3, 1>(isa),
            (7, 0) => self.columns::<I, 7, 4, 0>(isa),
            (7, _) => self.columns::<I, 7, 4, 1>(isa),
            (kernel, _) => unreachable!("a kernel of {kernel} rows"),
        }
    }
}
