//! Grouped pointwise convolution over NHWC pixels for groups with one output channel, and with one input channel: pixel after
//! pixel, whatever groups fall into a vector.
//!
//! With one output channel, each result is the sum of the next few products of a value and its weight: what fills a vector of
//! results are as many vectors of products as a group has input channels, folded:
//!
//! ```text
//!   a0 a1 a2 a3 b0 b1 b2 b3    c0 c1 c2 c3 d0 d1 d2 d3        products of groups a, b, c and d
//!   a0+a1 a2+a3 b0+b1 b2+b3 c0+c1 c2+c3 d0+d1 d2+d3           places of one parity plus those of the other
//! ```
//!
//! With one input channel, each value is unfolded to the next few results ([`Unfolds`]).

use crate::simd::element::Element;
use crate::simd::{Isa, Kernel};

/// Whether there is code for groups of so many input channels: on machines with [picks](crate::simd::element::picks), or on all.
pub fn folds(group_in: usize, picks: bool) -> bool {
    matches!(group_in, 2 | 4 | 8) || picks && matches!(group_in, 3 | 5 | 6 | 7)
}

/// Whether there is code for groups of one input and so many output channels, on machines with [picks](crate::simd::element::picks).
pub fn unfolds(group_out: usize) -> bool {
    (2..=8).contains(&group_out)
}

/// Bytes from what is read and written to what is asked for. (From 64 to 16384, an Intel Xeon takes the same time.)
const AHEAD: usize = 4096;

/// `y[i] = bias[i] + sum over j < group_in of weights[i * group_in + j] * x[i * group_in + j]`.
pub struct Folds<'a, T: Element> {
    /// The input: `group_in` values for each result.
    pub x: &'a [T],
    /// Input channels of a group, of which [`folds`].
    pub group_in: usize,
    /// The weights of some whole vectors of results, after which they come again.
    pub weights: &'a [T::Wide],
    /// The bias of as many vectors of results as there are weights for.
    pub bias: Option<&'a [T::Wide]>,
    /// The output.
    pub y: *mut T,
    /// How many results.
    pub len: usize,
}

/// A [`Folds`] that may run: see [`Folds::promise`].
pub struct CheckedFolds<'a, T: Element>(Folds<'a, T>);

impl<'a, T: Element> Folds<'a, T> {
    /// Turns the description into a kernel.
    ///
    /// # Safety
    /// Until it has run, `len` values must be writable at `y`.
    #[inline]
    pub unsafe fn promise(self) -> CheckedFolds<'a, T> {
        assert_eq!(self.x.len(), self.len * self.group_in, "x");
        CheckedFolds(self)
    }

    /// All results, of `K` input channels each.
    ///
    /// # Safety
    /// As for [`Folds::promise`].
    #[inline(always)]
    unsafe fn all<I: Isa, const K: usize>(&self, isa: I) {
        let lanes = T::lanes::<I>();
        let period = self.weights.len() / (K * lanes);
        assert!(period > 0 && self.weights.len() == period * K * lanes, "weights");
        assert!(self.bias.is_none_or(|bias| bias.len() == period * lanes), "bias");
        let (mut at, mut place) = (0, 0);
        while at < self.len {
            // SAFETY: the caller's promise; these results exist, and there are weights for a vector of them.
            unsafe {
                if self.len - at >= lanes {
                    self.vector::<I, K, false>(isa, at, place);
                } else {
                    self.vector::<I, K, true>(isa, at, place);
                }
            }
            at += lanes;
            place = if place + 1 == period { 0 } else { place + 1 };
        }
    }

    /// A vector of results from `at`, or what is left of them.
    ///
    /// # Safety
    /// As for [`Folds::all`]; there must be weights for vector `place`.
    #[inline(always)]
    unsafe fn vector<I: Isa, const K: usize, const TAIL: bool>(&self, isa: I, at: usize, place: usize) {
        let (lanes, zero) = (T::lanes::<I>(), T::splat(isa, T::default()));
        let (x, y) = (self.x.as_ptr().wrapping_add(at * K), self.y.wrapping_add(at));
        let weights = self.weights.as_ptr().wrapping_add(place * K * lanes);
        let mut products = [zero; K];
        isa.prefetch_l2(y.wrapping_byte_add(AHEAD));
        for (i, product) in products.iter_mut().enumerate() {
            let x = x.wrapping_add(i * lanes);
            isa.prefetch_l2(x.wrapping_byte_add(AHEAD));
            // SAFETY: the caller's promise; the mask leaves out what is behind the last value.
            unsafe {
                let values = if TAIL {
                    let left = ((self.len - at) * K).saturating_sub(i * lanes);
                    T::load_masked(isa, T::mask(isa, left.min(lanes)), x)
                } else {
                    T::load(isa, x)
                };
                *product = T::mul_vectors(isa, values, T::load_wide(isa, weights.wrapping_add(i * lanes)));
            }
        }
        let mut sum = fold::<T, I, K>(isa, products);
        if let Some(bias) = self.bias {
            // SAFETY: as many vectors as of weights.
            sum = T::add_vectors(isa, sum, unsafe { T::load_wide(isa, bias.as_ptr().wrapping_add(place * lanes)) });
        }
        // SAFETY: the caller's promise.
        unsafe {
            if TAIL {
                T::store_masked(isa, T::mask(isa, self.len - at), y, sum);
            } else {
                T::store(isa, y, sum);
            }
        }
    }
}

/// The sums of each `K` neighbouring values.
#[inline(always)]
fn fold<T: Element, I: Isa, const K: usize>(isa: I, mut values: [T::Vector<I>; K]) -> T::Vector<I> {
    let mut len = K;
    while len.is_multiple_of(2) {
        len /= 2;
        for i in 0..len {
            let [even, odd] = T::split(isa, values[2 * i], values[2 * i + 1]);
            values[i] = T::add_vectors(isa, even, odd);
        }
    }
    match len {
        3 => fold_odd::<T, I, 3>(isa, &values),
        5 => fold_odd::<T, I, 5>(isa, &values),
        7 => fold_odd::<T, I, 7>(isa, &values),
        _ => values[0],
    }
}

/// The sums of each `L` neighbouring values of the first `L` vectors: of types with picks.
#[inline(always)]
fn fold_odd<T: Element, I: Isa, const L: usize>(isa: I, values: &[T::Vector<I>]) -> T::Vector<I> {
    let (lanes, values) = (T::lanes::<I>(), &values[..L]);
    assert!(lanes <= MAX_LANES && size_of::<I::u32s>() == 4 * lanes);
    let mut sum = T::splat(isa, T::default());
    for places in &Places::<L>::OF_LANES {
        // SAFETY: a vector of numbers, of which there are enough.
        let index = unsafe { places.as_ptr().cast::<I::u32s>().read_unaligned() };
        // What the last vector holds, and then, where they have the place, each two before it.
        let mut picked = T::permute(isa, values[L - 1], index);
        for (i, pair) in values.as_chunks::<2>().0.iter().enumerate().rev() {
            let places = isa.sub_u32s(index, isa.splat_u32s((2 * i * lanes) as u32));
            let here = isa.less_than_u32s(places, isa.splat_u32s(2 * lanes as u32));
            picked = T::select(isa, here, T::permute2(isa, *pair, places), picked);
        }
        sum = T::add_vectors(isa, sum, picked);
    }
    sum
}

/// The most lanes of a vector whose values are picked.
const MAX_LANES: usize = 16;

/// The places of values of which each lane adds up `L` neighbours.
struct Places<const L: usize>;

impl<const L: usize> Places<L> {
    /// The first one of each lane, the second ...
    const OF_LANES: [[u32; MAX_LANES]; L] = {
        let mut places = [[0; MAX_LANES]; L];
        let mut i = 0;
        while i < L * MAX_LANES {
            places[i % L][i / L] = i as u32;
            i += 1;
        }
        places
    };
}

impl<T: Element> Kernel for CheckedFolds<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        // SAFETY: promised.
        unsafe {
            match self.0.group_in {
                2 => self.0.all::<I, 2>(isa),
                4 => self.0.all::<I, 4>(isa),
                8 => self.0.all::<I, 8>(isa),
                3 if const { T::PERMUTES && I::PERMUTES } => self.0.all::<I, 3>(isa),
                5 if const { T::PERMUTES && I::PERMUTES } => self.0.all::<I, 5>(isa),
                6 if const { T::PERMUTES && I::PERMUTES } => self.0.all::<I, 6>(isa),
                7 if const { T::PERMUTES && I::PERMUTES } => self.0.all::<I, 7>(isa),
                group_in => unreachable!("groups of {group_in} input channels"),
            }
        }
    }
}

/// `y[i * group_out + j] = bias[i * group_out + j] + weights[i * group_out + j] * x[i]` for `j < group_out`.
pub struct Unfolds<'a, T: Element> {
    /// The input.
    pub x: &'a [T],
    /// Output channels of a group, of which [`unfolds`].
    pub group_out: usize,
    /// The weights of some whole vectors of the input, after which they come again.
    pub weights: &'a [T::Wide],
    /// As many values.
    pub bias: Option<&'a [T::Wide]>,
    /// The output: `group_out` values for each of the input.
    pub y: *mut T,
}

/// An [`Unfolds`] that may run: see [`Unfolds::promise`].
pub struct CheckedUnfolds<'a, T: Element>(Unfolds<'a, T>);

impl<'a, T: Element> Unfolds<'a, T> {
    /// Turns the description into a kernel.
    ///
    /// # Safety
    /// Until it has run, the output must be writable.
    #[inline]
    pub unsafe fn promise(self) -> CheckedUnfolds<'a, T> {
        CheckedUnfolds(self)
    }

    /// All values, `K` results of each.
    ///
    /// # Safety
    /// As for [`Unfolds::promise`].
    #[inline(always)]
    unsafe fn all<I: Isa, const K: usize>(&self, isa: I) {
        let lanes = T::lanes::<I>();
        let period = self.weights.len() / (K * lanes);
        assert!(period > 0 && self.weights.len() == period * K * lanes, "weights");
        assert!(self.bias.is_none_or(|bias| bias.len() == self.weights.len()), "bias");
        assert!(lanes <= MAX_LANES && size_of::<I::u32s>() == 4 * lanes);
        let (mut at, mut place) = (0, 0);
        while at < self.x.len() {
            // SAFETY: the caller's promise; these values exist, and there are weights for a vector of them.
            unsafe {
                if self.x.len() - at >= lanes {
                    self.vector::<I, K, false>(isa, at, place);
                } else {
                    self.vector::<I, K, true>(isa, at, place);
                }
            }
            at += lanes;
            place = if place + 1 == period { 0 } else { place + 1 };
        }
    }

    /// The results of a vector of values from `at`, or of what is left of them.
    ///
    /// # Safety
    /// As for [`Unfolds::all`]; there must be weights for vector `place`.
    #[inline(always)]
    unsafe fn vector<I: Isa, const K: usize, const TAIL: bool>(&self, isa: I, at: usize, place: usize) {
        let (lanes, left) = (T::lanes::<I>(), self.x.len() - at);
        let (x, y) = (self.x.as_ptr().wrapping_add(at), self.y.wrapping_add(at * K));
        isa.prefetch_l2(x.wrapping_byte_add(AHEAD));
        // SAFETY: the values exist.
        let values = unsafe { if TAIL { T::load_masked(isa, T::mask(isa, left), x) } else { T::load(isa, x) } };
        for i in 0..K {
            let (y, first) = (y.wrapping_add(i * lanes), (place * K + i) * lanes);
            isa.prefetch_l2(y.wrapping_byte_add(AHEAD));
            // SAFETY: a vector of the places, the weights and the bias; the caller's promise for the results.
            unsafe {
                let index = Sources::<K>::OF_RESULTS.as_flattened().as_ptr().add(i * lanes);
                let value = T::permute(isa, values, index.cast::<I::u32s>().read_unaligned());
                let mut result = T::mul_vectors(isa, value, T::load_wide(isa, self.weights.as_ptr().add(first)));
                if let Some(bias) = self.bias {
                    result = T::add_vectors(isa, result, T::load_wide(isa, bias.as_ptr().add(first)));
                }
                if TAIL {
                    let left = (left * K).saturating_sub(i * lanes).min(lanes);
                    T::store_masked(isa, T::mask(isa, left), y, result);
                } else {
                    T::store(isa, y, result);
                }
            }
        }
    }
}

/// The values that results are of, `K` of each.
struct Sources<const K: usize>;

impl<const K: usize> Sources<K> {
    /// The first [`MAX_LANES`] values' one after the other.
    const OF_RESULTS: [[u32; K]; MAX_LANES] = {
        let mut sources = [[0; K]; MAX_LANES];
        let mut i = 0;
        while i < K * MAX_LANES {
            sources[i / K][i % K] = (i / K) as u32;
            i += 1;
        }
        sources
    };
}

impl<T: Element> Kernel for CheckedUnfolds<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        if !const { T::PERMUTES && I::PERMUTES } {
            unreachable!("no instruction picks lanes");
        }
        // SAFETY: promised.
        unsafe {
            match self.0.group_out {
                2 => self.0.all::<I, 2>(isa),
                3 => self.0.all::<I, 3>(isa),
                4 => self.0.all::<I, 4>(isa),
                5 => self.0.all::<I, 5>(isa),
                6 => self.0.all::<I, 6>(isa),
                7 => self.0.all::<I, 7>(isa),
                8 => self.0.all::<I, 8>(isa),
                group_out => unreachable!("groups of {group_out} output channels"),
            }
        }
    }
}
