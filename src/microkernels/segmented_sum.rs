//! Grouped pointwise convolution over NHWC pixels for groups with one output channel: pixel after
//! pixel, whatever groups fall into a vector.
//!
//! Each result is the sum of the next few products of a value and its weight, so as many vectors of
//! products as a group has input channels make one vector of results:
//!
//! ```text
//!   a0 a1 a2 a3 b0 b1 b2 b3    c0 c1 c2 c3 d0 d1 d2 d3     products of groups a, b, c and d
//!   a0+a1 a2+a3 b0+b1 b2+b3 c0+c1 c2+c3 d0+d1 d2+d3        even lanes plus odd lanes
//! ```

use crate::simd::element::Element;
use crate::simd::{Isa, RawKernel};

/// Whether there is code for groups of `group_in` input channels, where an instruction permutes
/// vectors or on any machine.
pub fn has_segments(group_in: usize, permute: bool) -> bool {
    group_in == 4 || permute && matches!(group_in, 5 | 6)
}

/// Prefetch distance in bytes, of input and output; any from 64 to 16384 is as good.
const PREFETCH_BYTES: usize = 4096;

/// `y[i] = bias[i] + sum over j < group_in of weights[i * group_in + j] * x[i * group_in + j]`.
///
/// # Safety
/// Until it has run, `len` values must be writable at `y`.
pub struct SegmentedSum<'a, T: Element> {
    /// The input: `group_in` values for each result.
    pub x: &'a [T],
    /// Input channels of a group, of which [`has_segments`].
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

impl<T: Element> SegmentedSum<'_, T> {
    /// All results, of `K` input channels each.
    ///
    /// # Safety
    /// As for the type.
    #[inline(always)]
    unsafe fn all<I: Isa, const K: usize>(&self, isa: I) {
        let lanes = T::lanes::<I>();
        let period = self.weights.len() / (K * lanes);
        assert!(period > 0 && self.weights.len() == period * K * lanes, "weights");
        assert!(self.bias.is_none_or(|bias| bias.len() == period * lanes), "bias");
        let (mut at, mut vector) = (0, 0);
        while at < self.len {
            // SAFETY: the caller's promise; these results exist, and there are weights for a vector
            // of them.
            unsafe {
                if self.len - at >= lanes {
                    self.vector::<I, K, false>(isa, at, vector);
                } else {
                    self.vector::<I, K, true>(isa, at, vector);
                }
            }
            at += lanes;
            vector = if vector + 1 == period { 0 } else { vector + 1 };
        }
    }

    /// A vector of results from `at`, or what is left of them.
    ///
    /// # Safety
    /// As for [`SegmentedSum::all`]; there must be weights for vector number `vector`.
    #[inline(always)]
    unsafe fn vector<I: Isa, const K: usize, const TAIL: bool>(&self, isa: I, at: usize, vector: usize) {
        let (lanes, zero) = (T::lanes::<I>(), T::splat(isa, T::default()));
        let (x, y) = (self.x.as_ptr().wrapping_add(at * K), self.y.wrapping_add(at));
        let weights = self.weights.as_ptr().wrapping_add(vector * K * lanes);
        let mut products = [zero; K];
        isa.prefetch_l2(y.wrapping_byte_add(PREFETCH_BYTES));
        for (i, product) in products.iter_mut().enumerate() {
            let x = x.wrapping_add(i * lanes);
            isa.prefetch_l2(x.wrapping_byte_add(PREFETCH_BYTES));
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
        let mut sum = sum_segments::<T, I, K>(isa, products);
        if let Some(bias) = self.bias {
            // SAFETY: as many vectors as of weights.
            sum = T::add_vectors(isa, sum, unsafe { T::load_wide(isa, bias.as_ptr().wrapping_add(vector * lanes)) });
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
fn sum_segments<T: Element, I: Isa, const K: usize>(isa: I, mut values: [T::Vector<I>; K]) -> T::Vector<I> {
    let mut len = K;
    while len.is_multiple_of(2) {
        len /= 2;
        for i in 0..len {
            let [even, odd] = T::split(isa, values[2 * i], values[2 * i + 1]);
            values[i] = T::add_vectors(isa, even, odd);
        }
    }
    match len {
        3 => sum_odd::<T, I, 3>(isa, &values),
        5 => sum_odd::<T, I, 5>(isa, &values),
        _ => values[0],
    }
}

/// The sums of each `L` neighbouring values of the first `L` vectors: of types with permutations.
#[inline(always)]
fn sum_odd<T: Element, I: Isa, const L: usize>(isa: I, values: &[T::Vector<I>]) -> T::Vector<I> {
    let (lanes, values) = (T::lanes::<I>(), &values[..L]);
    assert!(lanes <= MAX_LANES && size_of::<I::u32s>() == 4 * lanes);
    let mut sum = T::splat(isa, T::default());
    for start in &SegmentIndex::<L>::OF_LANES {
        // SAFETY: a vector of numbers, of which there are enough.
        let index = unsafe { start.as_ptr().cast::<I::u32s>().read_unaligned() };
        // What the last vector holds, and then, where it is theirs, each two before it.
        let mut taken = T::permute(isa, values[L - 1], index);
        for (i, pair) in values.as_chunks::<2>().0.iter().enumerate().rev() {
            let inside = isa.sub_u32s(index, isa.splat_u32s((2 * i * lanes) as u32));
            let here = isa.less_than_u32s(inside, isa.splat_u32s(2 * lanes as u32));
            taken = T::select(isa, here, T::permute2(isa, *pair, inside), taken);
        }
        sum = T::add_vectors(isa, sum, taken);
    }
    sum
}

/// The most lanes of a vector whose values are taken.
const MAX_LANES: usize = 16;

/// The indices of values of which each lane adds up `L` neighbours.
struct SegmentIndex<const L: usize>;

impl<const L: usize> SegmentIndex<L> {
    /// The first one of each lane, the second ...
    const OF_LANES: [[u32; MAX_LANES]; L] = {
        let mut index = [[0; MAX_LANES]; L];
        let mut i = 0;
        while i < L * MAX_LANES {
            index[i % L][i / L] = i as u32;
            i += 1;
        }
        index
    };
}

impl<T: Element> RawKernel for SegmentedSum<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<I: Isa>(self, isa: I) {
        let kernel = self;
        assert_eq!(kernel.x.len(), kernel.len * kernel.group_in, "x");
        // SAFETY: promised.
        unsafe {
            match kernel.group_in {
                4 => kernel.all::<I, 4>(isa),
                5 if const { T::PERMUTES && I::PERMUTES } => kernel.all::<I, 5>(isa),
                6 if const { T::PERMUTES && I::PERMUTES } => kernel.all::<I, 6>(isa),
                group_in => unreachable!("groups of {group_in} input channels"),
            }
        }
    }
}
