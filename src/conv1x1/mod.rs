//! Grouped pointwise (1x1) convolution with interleaved output, and its gradients.
//!
//! Forward and input gradient are the same computation with the roles of the channels exchanged, so one driver,
//! [`Product`], serves both: it multiplies the rows of each group by a small matrix. An interleave is a table of
//! places for the output rows (forward) or the input rows (backward) and costs nothing in NCHW, whose planes are such rows
//! ([`Product::planes`]). NHWC has ways of its own ([`nhwc`]). Weight and bias gradients are in [`grad_weight`].

pub(crate) mod dot_nt;
mod grad_weight;
mod nhwc;
mod side_by_side;

use std::mem::MaybeUninit;
use std::ops::Range;

pub use self::grad_weight::{grad_bias, grad_weight};
use crate::microkernels::conv1x1_nchw::{ConvHeight, ConvRows, Start};
use crate::parallel::{Shared, estimate};
use crate::pool::{parallel_for, part, threads_for};
use crate::scratch;
use crate::shape::{Images, Order, Pointwise, WeightStrides};
use crate::simd::element::{Element, lanes};
use crate::simd::mul_acc::{Fma, MulAcc};
use crate::simd::{IsaKind, Promised};

/// Values of a group's input rows that one pass in NCHW covers where the group needs several tiles of output rows, which
/// read them again: they stay in the L2 cache.
const PLANE_TILE: usize = 64 << 10;
/// Input rows of a group in NCHW that one pass takes, at most, where they are long: processors follow no more. (Input
/// gradients, 32 images, two threads of an Intel Xeon: 96 channels of 112 x 112 to 16 take 13.0 ms at once, 11.2 by 24, 144
/// of 56 x 56 to 24 3.8 and 3.2. 11 layers, 64 images, two threads of an AMD EPYC: 38.7 ms at once, 36.0 by 32, 38.2 by 24.
/// Groups of 32 rows by 16: a third slower.)
const PASS_ROWS: usize = 32;
/// Values of so many rows that one pass covers, and of a group's rows from which on they are long. (A half: 1 to 4 % slower;
/// 120 rows of 31 x 31, which are fewer, take 7 % more in passes.)
const PASS_TILE: usize = 128 << 10;
/// Bytes of a group's rows in NCHW, at most, for the next group's to be asked for meanwhile: both stay in the L2 cache. (With 369
/// KiB, 96 channels of 31 x 31, 1.04 ms become 0.92; with 461, 120 channels of them, 2.54 become 2.34 on an AMD EPYC, whose cache
/// has 1 MiB.)
const AHEAD_BYTES: usize = 480 << 10;
/// How many pixels ahead to ask for in longer rows. (The forward pass of 18 layers of kEffNet-B0 at 32x32 takes 23.5 ms
/// without asking ahead, 18.5 with; the input gradient 28 and 20. Those of kEffNet-B0 D6_16ch and of kMobileNet V3 at 224x224, 43 and
/// 12.7 ms with 1024, 36.7 and 10.9 with 512, 36.8 and 10.8 with 256, 36.2 and 12.3 with 128: two threads of an Intel Xeon.)
const AHEAD_PIXELS: usize = 256;
/// Pixels of a task in NCHW, at least.
const PLANE_PART: usize = 256;
/// Tasks for each thread: enough to even out threads of different speed.
const TASKS_PER_THREAD: usize = 4;

/// Output = interleave(grouped pointwise convolution of `x` + `bias`).
///
/// * `images`: the input's geometry; `x` holds `(N, C_in)` images in that order, `y` receives `(N, C_out)`.
/// * `weight`: in the layout that `shape` names; `bias`: `C_out` values.
pub fn forward<T: Element>(
    isa: IsaKind,
    shape: &Pointwise,
    images: Images,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    y: &mut [MaybeUninit<T>],
) {
    assert_eq!(images.channels, shape.in_channels);
    assert_eq!(weight.len(), shape.weights());
    Product {
        isa,
        images,
        groups: shape.groups,
        group_in: shape.group_in(),
        group_out: shape.group_out(),
        in_places: None,
        out_places: shape.dst_index(),
    }
    .run(x, (weight, shape.weight_strides()), bias, y);
}

/// The gradient by the input: `(N, C_in)` from `grad_output (N, C_out)`, the gradient of the interleaved output.
///
/// `images` is the geometry of `grad_output`.
pub fn grad_input<T: Element>(
    isa: IsaKind,
    shape: &Pointwise,
    images: Images,
    grad_output: &[T],
    weight: &[T],
    grad_x: &mut [MaybeUninit<T>],
) {
    assert_eq!(images.channels, shape.out_channels);
    assert_eq!(weight.len(), shape.weights());
    Product {
        isa,
        images,
        groups: shape.groups,
        group_in: shape.group_out(),
        group_out: shape.group_in(),
        in_places: shape.dst_index(),
        out_places: None,
    }
    .run(grad_output, (weight, shape.weight_strides().transposed()), None, grad_x);
}

/// Weights, and where they lie.
type Weights<'a, T> = (&'a [T], WeightStrides);

/// Rows of each group times that group's matrix.
struct Product {
    isa: IsaKind,
    /// The input's geometry.
    images: Images,
    groups: usize,
    group_in: usize,
    group_out: usize,
    /// Where input channel `c` stands in memory, unless at `c`.
    in_places: Option<Vec<usize>>,
    /// Where output channel `c` stands in memory, unless at `c`.
    out_places: Option<Vec<usize>>,
}

/// Weights in the order in which the kernels read them: for each group, for each block of output rows,
/// `[step][output row]`.
#[derive(Clone, Copy)]
struct Packed<'a, T: Element, M> {
    products: M,
    weights: &'a [T::Wide],
    bias: Option<&'a [T]>,
    /// Ends of the blocks of output rows of a group.
    blocks: &'a [Range<usize>],
    /// Places of all output channels in the rows that the kernel writes.
    y_offsets: &'a [usize],
}

impl Product {
    fn run<T: Element>(&self, x: &[T], weight: Weights<'_, T>, bias: Option<&[T]>, y: &mut [MaybeUninit<T>]) {
        let out = self.images.with_channels(self.groups * self.group_out);
        assert_eq!(x.len(), self.images.len());
        assert_eq!(y.len(), out.len());
        assert!(bias.is_none_or(|bias| bias.len() == out.channels));
        if out.is_empty() {
            return;
        }
        let work = images_work::<T>(self.images, out, self.group_in);
        let threads = threads_for(work);
        let y = Shared::new(y);
        // One pixel an image (squeeze-excite, dense layers) is the same memory in both orders.
        let planes = self.images.order == Order::Nchw && self.images.pixels > 1;
        match T::bf16_dot(self.isa) {
            Some(pairs) => self.products(pairs, threads, x, weight, bias, planes, y),
            None => self.products(Fma, threads, x, weight, bias, planes, y),
        }
    }

    /// All of it, with products added up in a certain way.
    fn products<T: Element, M: MulAcc<T>>(
        &self,
        products: M,
        threads: usize,
        x: &[T],
        weight: Weights<'_, T>,
        bias: Option<&[T]>,
        planes: bool,
        y: Shared<T>,
    ) {
        if planes {
            self.packed(products, weight, bias, self.images.pixels, |packed| self.planes(threads, x, packed, y));
        } else {
            self.pixels(products, threads, x, weight, bias, y);
        }
    }

    /// Calls `body` with packed weights, in blocks of output rows, which are of so many pixels.
    fn packed<T: Element, M: MulAcc<T>>(
        &self,
        products: M,
        weight: Weights<'_, T>,
        bias: Option<&[T]>,
        pixels: usize,
        body: impl FnOnce(Packed<'_, T, M>),
    ) {
        let height = self.isa.run(ConvHeight { four: pixels == 4 * lanes::<T>(self.isa) });
        let count = self.group_out.div_ceil(height);
        let blocks: Vec<_> = (0..count).map(|i| part(self.group_out, count, i)).collect();
        let steps = self.group_in.div_ceil(M::TERMS);
        scratch::with(self.groups * self.group_out * steps, |packed: &mut [T::Wide]| {
            let mut rest = &mut *packed;
            for (g, block) in (0..self.groups).flat_map(|g| blocks.iter().map(move |block| (g, block))) {
                let (weights, others) = std::mem::take(&mut rest).split_at_mut(steps * block.len());
                self.pack(products, weight, g, block.clone(), weights);
                rest = others;
            }
            body(Packed { products, weights: packed, bias, blocks: &blocks, y_offsets: &[] });
        });
    }

    /// The weights of a group for some of its output channels: `[step][output channel]`.
    fn pack<T: Element, M: MulAcc<T>>(
        &self,
        products: M,
        (weights, WeightStrides { group, output: out, input }): Weights<'_, T>,
        g: usize,
        block: Range<usize>,
        packed: &mut [T::Wide],
    ) {
        for (step, packed) in packed.chunks_exact_mut(block.len()).enumerate() {
            let i = step * M::TERMS;
            let second = M::TERMS > 1 && i + 1 < self.group_in;
            for (o, packed) in block.clone().zip(packed) {
                let place = g * group + o * out + i * input;
                *packed = products.pack(weights[place], second.then(|| weights[place + input]));
            }
        }
    }

    /// NCHW: the rows are the image's own planes.
    fn planes<T: Element, M: MulAcc<T>>(&self, threads: usize, x: &[T], packed: Packed<'_, T, M>, y: Shared<T>) {
        let Images { count, pixels, channels: c_in, .. } = self.images;
        let c_out = self.groups * self.group_out;
        let offsets = |channels: usize, places: &Option<Vec<usize>>| -> Vec<usize> {
            (0..channels).map(|c| places.as_ref().map_or(c, |places| places[c]) * pixels).collect()
        };
        let x_offsets = offsets(c_in, &self.in_places);
        let y_offsets = offsets(c_out, &self.out_places);
        let packed = Packed { y_offsets: &y_offsets, ..packed };
        // Tasks: images, then groups, then pixels, until there are enough.
        let wanted = if threads == 1 { 1 } else { threads * TASKS_PER_THREAD };
        let group_parts = wanted.div_ceil(count).min(self.groups);
        let pixel_parts = wanted.div_ceil(count * group_parts).min(pixels.div_ceil(PLANE_PART));
        // Sums wait in y for the next rows, where that rounds nothing.
        let exact = size_of::<T>() == size_of::<T::Wide>();
        let long = self.group_in * pixels >= PASS_TILE;
        let passes = if exact && long { self.group_in.div_ceil(PASS_ROWS) } else { 1 };
        let tile = if passes > 1 {
            PASS_TILE / PASS_ROWS
        } else if packed.blocks.len() > 1 {
            (PLANE_TILE / self.group_in).max(PLANE_PART)
        } else {
            usize::MAX
        };
        // The next group's rows; the next image's follow the last group's. (40 channels of 31 x 31 to 240 in 2 groups, interleaved,
        // 64 images, two threads of an Intel Xeon: 3.5 ms with one distance for all groups, 2.8 so, and without the interleave.)
        let ahead = |g: usize| {
            [(self.group_in, &x_offsets), (self.group_out, &y_offsets)].map(|(channels, offsets)| {
                if channels * pixels * size_of::<T>() > AHEAD_BYTES {
                    return AHEAD_PIXELS.min(tile);
                }
                let next = offsets.get((g + 1) * channels).copied();
                let next = next.unwrap_or(self.groups * channels * pixels + offsets[0]);
                next.checked_sub(offsets[g * channels]).unwrap_or(channels * pixels)
            })
        };
        parallel_for(threads, count * group_parts * pixel_parts, |task| {
            let (n, rest) = (task / (group_parts * pixel_parts), task % (group_parts * pixel_parts));
            let range = part(pixels, pixel_parts, rest % pixel_parts);
            for g in part(self.groups, group_parts, rest / pixel_parts) {
                let (mut start, ahead) = (range.start, ahead(g));
                while start < range.end {
                    let length = tile.min(range.end - start);
                    // SAFETY: image n and pixels start..start + length exist in x and y; tasks differ in image,
                    // group or pixels, so no two write the same place.
                    unsafe {
                        let x = x.as_ptr().add(n * c_in * pixels + start);
                        let y = y.ptr().add(n * c_out * pixels + start);
                        for rows in (0..passes).map(|pass| part(self.group_in, passes, pass)) {
                            let offsets = &x_offsets[g * self.group_in..][rows.clone()];
                            self.group([g, rows.start], x, offsets, &packed, y, length, ahead);
                        }
                    }
                    start += length;
                }
            }
        });
    }

    /// Some input channels of a group, from its `first` one on, over `length` pixels: adds to what the channels before made.
    ///
    /// # Safety
    /// `x` and `y` must hold the group's rows at their offsets, `length` values each; rows of `y` are this caller's own.
    #[inline]
    unsafe fn group<T: Element, M: MulAcc<T>>(
        &self,
        [g, first]: [usize; 2],
        x: *const T,
        x_offsets: &[usize],
        packed: &Packed<'_, T, M>,
        y: *mut T,
        length: usize,
        ahead: [usize; 2],
    ) {
        let steps = self.group_in.div_ceil(M::TERMS);
        let weights = &packed.weights[g * self.group_out * steps..][..self.group_out * steps];
        let taken = first / M::TERMS..(first + x_offsets.len()).div_ceil(M::TERMS);
        for block in packed.blocks {
            // The first block asks for what all read next. (All of them: 4 % slower.)
            let ahead = if block.start == 0 { ahead } else { [0, ahead[1]] };
            let channels = g * self.group_out + block.start..g * self.group_out + block.end;
            let bias = packed.bias.map(|bias| &bias[channels.clone()]);
            let weights = &weights[block.start * steps..][taken.start * block.len()..taken.end * block.len()];
            let kernel = ConvRows {
                products: packed.products,
                x,
                x_offsets,
                weights,
                start: if first > 0 { Start::Output } else { bias.into() },
                y,
                y_offsets: &packed.y_offsets[channels],
                pixels: length,
                ahead,
            };
            // SAFETY: the caller's promise.
            self.isa.run(unsafe { Promised::new_unchecked(kernel) });
        }
    }
}

fn images_work<T>(a: Images, b: Images, inner: usize) -> f64 {
    estimate(b.len() * inner, (a.len() + b.len()) * size_of::<T>())
}

/// The distance between neighbours where it is the same for all (1 for a single place).
fn constant_stride(places: &[usize]) -> Option<usize> {
    let stride = if places.len() > 1 { places[1].checked_sub(places[0])? } else { 1 };
    places.windows(2).all(|pair| pair[0] + stride == pair[1]).then_some(stride)
}

/// Whether these places are those of channels interleaved by a group's, of which there are so many.
fn interleaved_by_group(places: &[usize], group_out: usize) -> bool {
    let groups = places.len() / group_out;
    places.iter().enumerate().all(|(c, &place)| place == c % group_out * groups + c / group_out)
}

/// The greatest common divisor.
fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
