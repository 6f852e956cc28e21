//! Weights in the order in which the kernels of [`super::nchw`] and [`super::nhwc`] read them.

use std::marker::PhantomData;
use std::ops::Range;

use super::GroupedProduct;
use crate::microkernels::conv1x1_nchw::ConvHeight;
use crate::pool::part;
use crate::scratch;
use crate::shape::WeightStrides;
use crate::simd::element::Element;
use crate::simd::mul_acc::MulAcc;

/// Weights, and where they lie.
#[derive(Clone, Copy)]
pub(super) struct WeightView<'a, T> {
    pub values: &'a [T],
    pub strides: WeightStrides,
}

impl<T: Copy> WeightView<'_, T> {
    /// That of group `g`, output channel `o` and input channel `i`.
    pub fn get(&self, g: usize, o: usize, i: usize) -> T {
        let WeightStrides { group, output, input } = self.strides;
        self.values[g * group + o * output + i * input]
    }
}

/// Packed weights: for each group, for each block of output rows, `[step][output row]`.
#[derive(Clone, Copy)]
pub(super) struct Packed<'a, T: Element, M> {
    pub mul_acc: M,
    pub weights: &'a [T::Wide],
    pub bias: Option<&'a [T]>,
    /// The blocks of output rows of a group.
    pub blocks: &'a [Range<usize>],
    /// Where each output channel's row starts.
    pub y_offsets: &'a [usize],
}

impl GroupedProduct {
    /// Calls `body` with packed weights, in blocks of output rows of `pixels` pixels.
    pub(super) fn packed<T: Element, M: MulAcc<T>>(
        &self,
        mul_acc: M,
        weight: WeightView<'_, T>,
        bias: Option<&[T]>,
        pixels: usize,
        body: impl FnOnce(Packed<'_, T, M>),
    ) {
        let height = self.isa.constant(ConvHeight::<T> { pixels, values: PhantomData });
        let count = self.group_out.div_ceil(height);
        let blocks: Vec<_> = (0..count).map(|i| part(self.group_out, count, i)).collect();
        let steps = self.group_in.div_ceil(M::TERMS);
        scratch::with(self.groups * self.group_out * steps, |packed: &mut [T::Wide]| {
            let mut rest = &mut *packed;
            for (g, block) in (0..self.groups).flat_map(|g| blocks.iter().map(move |block| (g, block))) {
                let (weights, others) = std::mem::take(&mut rest).split_at_mut(steps * block.len());
                self.pack(mul_acc, weight, g, block.clone(), weights);
                rest = others;
            }
            body(Packed { mul_acc, weights: packed, bias, blocks: &blocks, y_offsets: &[] });
        });
    }

    /// The weights of a group for some of its output channels: `[step][output channel]`.
    pub(super) fn pack<T: Element, M: MulAcc<T>>(
        &self,
        mul_acc: M,
        weight: WeightView<'_, T>,
        g: usize,
        block: Range<usize>,
        packed: &mut [T::Wide],
    ) {
        for (step, packed) in packed.chunks_exact_mut(block.len()).enumerate() {
            let i = step * M::TERMS;
            let second = M::TERMS > 1 && i + 1 < self.group_in;
            for (o, packed) in block.clone().zip(packed) {
                *packed = mul_acc.pack(weight.get(g, o, i), second.then(|| weight.get(g, o, i + 1)));
            }
        }
    }
}
