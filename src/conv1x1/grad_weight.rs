//! The gradients of the grouped pointwise convolution by its weight and its bias.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::nhwc::{PERMUTED, outer_tile};
use super::side_by_side::SideBySide;
use super::{TASKS_PER_THREAD, constant_stride, images_work};
use crate::conv1x1::dot_nt::RowProducts;
use crate::interleave::{Permutation, permute};
use crate::memory;
use crate::microkernels::conv1x1_nchw::{Rows, SumColumns};
use crate::microkernels::outer::{OuterProducts, Totals};
use crate::microkernels::reduce::Sum;
use crate::microkernels::side_by_side::{Block, MAX_STEPS, SideBySideSums, Source};
use crate::parallel::{Shared, add_parts, estimate};
use crate::pool::{chunks, is_worth_threads, parallel_for, part, threads_for};
use crate::scratch::{self, cut};
use crate::shape::{Images, Order, Pointwise, WeightStrides, interleave_dst_index};
use crate::simd::element::{Element, has_permute, lanes};
use crate::simd::mul_acc::{Fma, MulAcc};
use crate::simd::{IsaKind, Promised, has_stream_prefetcher};

/// Pixels of a tile of a weight gradient in NHWC, at least: its sums go through memory once a tile.
const OUTER_TERMS: usize = 48;
/// Multiply-adds of outer products that take as long as one of values picked for groups side by side. (64 images, two threads of
/// an AMD EPYC: 24 channels of 31 x 31 to 24 in 8 groups take 0.10 ms so, 0.28 otherwise; 144 to 24 0.50 and 0.56; 480 to 112 of 16
/// x 16 in 16 groups 0.53 and 0.51.)
const PICKED: f64 = 1.4;
/// Bytes of a tile of `grad_output` that stay in the first cache.
const CACHE_BYTES: usize = 40 << 10;
/// Multiply-adds of outer products that take as long as reading a cache line once more for each group, where there are others'
/// channels in it and the first cache does not hold it.
const LINE: f64 = 1.2;
/// Pixels of a tile of a weight gradient in NCHW and of a part of it in NHWC, at least.
const DOT_TILE: usize = 96;
/// Bytes of a group's rows over which one tile of the weight gradient runs: they are read once for each tile of
/// weights, from the L2 cache (32 KiB: half as fast again), which also holds those to come.
const DOT_BYTES: usize = 256 << 10;
/// Bytes that the last cache holds, of which none need be asked for. (9 layers of 16 images: 0.63 ms without, 0.76 with.)
const CACHED_BYTES: usize = 16 << 20;
/// A group of this many weights or more is multiplied by GEMM, which also goes through the sums in blocks. (2048 channels of
/// 14 x 14 to 512 in one group, 16 images: 55 ms, 63 without; 1024 to 1024 of 7 x 7 16.8 and 16.1, 512 to 512 of 28 x 28 28 and
/// 28, 256 to 1024 of 14 x 14 10.4 and 7.1.)
const GEMM_WEIGHTS: usize = 1 << 20;
/// Work of one part of a weight gradient, at least.
const PART_NANOSECONDS: f64 = 100_000.0;
/// Parts of a weight gradient, at most.
const MAX_PARTS: usize = 64;
/// Parts of one for which channels are put back to their groups, at least: that is not divided into groups.
const PERMUTED_PARTS: usize = 8;
/// What starting and ending one partial sum costs beside the work itself is a fiftieth of this.
const NANOSECONDS_PER_SUM: f64 = 100.0;
/// Pixels that a bias gradient sums in the type that is computed with.
const BIAS_TILE: usize = 64;

/// The gradient by the weight, in the layout that `shape` names, from `x (N, C_in)` and `grad_output (N, C_out)`, the
/// gradient of the interleaved output.
///
/// `images` is the geometry of `x`. The result does not depend on the number of threads.
pub fn grad_weight<T: Element>(
    isa: IsaKind,
    shape: &Pointwise,
    images: Images,
    x: &[T],
    grad_output: &[T],
    grad_weight: &mut [MaybeUninit<T>],
) {
    match T::bf16_dot(isa) {
        Some(pairs) => weight_grad(isa, pairs, shape, images, x, grad_output, grad_weight),
        None => weight_grad(isa, Fma, shape, images, x, grad_output, grad_weight),
    }
}

/// [`grad_weight`], with products added up in a certain way.
fn weight_grad<T: Element, M: MulAcc<T>>(
    isa: IsaKind,
    products: M,
    shape: &Pointwise,
    images: Images,
    x: &[T],
    grad_output: &[T],
    grad_weight: &mut [MaybeUninit<T>],
) {
    let out = images.with_channels(shape.out_channels);
    assert_eq!(images.channels, shape.in_channels);
    assert_eq!(x.len(), images.len());
    assert_eq!(grad_output.len(), out.len());
    assert_eq!(grad_weight.len(), shape.weights());
    let planes = images.order == Order::Nchw && images.pixels > 1;
    let pixels = images.count * images.pixels;
    let work = images_work::<T>(images, out, shape.group_in());
    let threads = threads_for(work);
    let interleaved = shape.dst_index();
    let mut way = if planes { Way::default() } else { Way::new::<T>(isa, shape, interleaved.as_deref(), pixels) };
    // The parts depend on the problem alone, so that the sums do too; the division into groups does not change them.
    let most = if planes { images.count } else { pixels.div_ceil(DOT_TILE) };
    let least = if way.permutation.is_some() { PERMUTED_PARTS } else { 1 };
    let worth = PART_NANOSECONDS.max(NANOSECONDS_PER_SUM * shape.weights() as f64);
    let parts = ((work / worth) as usize).max(least).min(most).clamp(1, MAX_PARTS);
    let wanted = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).div_ceil(parts) };
    let group_parts = wanted.min(way.side_by_side.as_ref().map_or(shape.groups, |groups| groups.vectors.len()));
    let (mut places, sources) = match interleaved {
        Some(places) if way.permutation.is_none() => (places, None),
        sources => ((0..shape.out_channels).collect(), sources),
    };
    if planes {
        places.iter_mut().for_each(|place| *place *= images.pixels);
    }
    // All at once where each part of the groups would do it once more.
    let permutation = way.permutation.take_if(|_| group_parts > 1).and(sources);
    let permuted = if permutation.is_some() { grad_output.len() } else { 0 };
    memory::with(permuted, |permuted: &mut [MaybeUninit<T>]| {
        let mut grad_output = grad_output;
        if let Some(sources) = permutation {
            permute(isa, &sources, out, grad_output, permuted);
            // SAFETY: all of it has been written.
            grad_output = unsafe { std::slice::from_raw_parts(permuted.as_ptr().cast(), permuted.len()) };
        }
        let inputs = (0..shape.group_in()).collect();
        let grad = WeightGrad { isa, products, shape, images, inputs, places, way, x, grad_output };
        grad.run(threads, planes, [parts, group_parts], grad_weight);
    });
}

/// How the sums are added up in NHWC.
#[derive(Default)]
struct Way {
    /// What puts the channels of a pixel of `grad_output` into their groups first.
    permutation: Option<Permutation>,
    /// Several groups in a vector.
    side_by_side: Option<SideBySide>,
    /// Whether sums of a group are `[input channel][output channel]`.
    by_output: bool,
}

impl Way {
    /// The fastest one, by what a pixel of one group costs in multiply-adds of outer products; output channels may be `interleaved`
    /// to these places.
    fn new<T: Element>(isa: IsaKind, shape: &Pointwise, interleaved: Option<&[usize]>, pixels: usize) -> Self {
        let (k, m, lanes) = (shape.group_in(), shape.group_out(), lanes::<T>(isa));
        let per_group = |cost: f64| cost / shape.groups as f64;
        // Which of a group's channels fill more of the vectors.
        let [by_input, by_output] = [m * k.div_ceil(lanes), k * m.div_ceil(lanes)];
        let mut way = Self { by_output: (by_output, k) < (by_input, m), ..Self::default() };
        let mut cost = by_input.min(by_output) as f64;
        if k.min(m) <= MAX_STEPS && pixels >= DOT_TILE && has_permute::<T>(isa) {
            let picked = |groups: &SideBySide| PICKED * per_group((groups.vectors.len() * k.min(m)) as f64);
            way.side_by_side = SideBySide::new([shape.groups, k.min(m), k.max(m)], lanes, 1)
                .filter(|groups| groups.windows() && picked(groups) < cost);
            cost = way.side_by_side.as_ref().map_or(cost, picked);
        }
        let Some(sources) = interleaved else { return way };
        // Interleaved as they are, output channels are rows.
        let cached = OUTER_TERMS * shape.out_channels * size_of::<T::Wide>() <= CACHE_BYTES;
        let lines = if cached { 0 } else { m.min(shape.out_channels.div_ceil(lanes)) };
        let scattered = by_input as f64 + LINE * lines as f64;
        way.permutation = Permutation::new::<T>(isa, sources, pixels)
            .filter(|permutation| cost + per_group(PERMUTED * permutation.cost()) < scattered);
        if way.permutation.is_some() { way } else { Self::default() }
    }
}

/// Pixels' values, packed as steps, the distance of steps and how far ahead to ask.
type Values<'a, T> = (&'a [<T as Element>::Wide], usize, usize);

struct WeightGrad<'a, T, M> {
    isa: IsaKind,
    products: M,
    shape: &'a Pointwise,
    images: Images,
    /// Where a group's input channels stand behind its first one in NHWC.
    inputs: Vec<usize>,
    /// Where output channel `c` stands in an image of `grad_output`.
    places: Vec<usize>,
    way: Way,
    x: &'a [T],
    grad_output: &'a [T],
}

impl<T: Element, M: MulAcc<T>> WeightGrad<'_, T, M> {
    /// All of it, as `parts` of the images or pixels times `group_parts` of the groups.
    fn run(&self, threads: usize, planes: bool, [parts, group_parts]: [usize; 2], grad_weight: &mut [MaybeUninit<T>]) {
        let Self { shape, images, way, .. } = self;
        let (k, m, pixels) = (shape.group_in(), shape.group_out(), images.count * images.pixels);
        // One set of partial sums for each part, added up in order at the end.
        let mut partial = memory::filled(T::Wide::default(), parts * shape.weights());
        let shared = Shared(partial.as_mut_ptr());
        parallel_for(threads, parts * group_parts, |task| {
            let (task, group_task) = (task / group_parts, task % group_parts);
            if let Some(groups) = &way.side_by_side {
                let vectors = part(groups.vectors.len(), group_parts, group_task);
                self.side_by_side(groups, vectors, part(pixels, parts, task), |place, sum| {
                    // SAFETY: tasks differ in part or in vectors: no two write the same place.
                    unsafe { shared.ptr().add(task * shape.weights() + place).write(sum) }
                });
                return;
            }
            let groups = part(shape.groups, group_parts, group_task);
            let (first, len) = (task * shape.weights() + groups.start * m * k, groups.len() * m * k);
            // SAFETY: tasks differ in part or in groups: no two share sums.
            let sums = unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(first), len) };
            if planes {
                self.planes(groups, part(images.count, parts, task), sums);
            } else {
                self.pixels(groups, part(pixels, parts, task), sums);
            }
        });
        let sums = add_parts(&mut partial, shape.weights());
        let WeightStrides { group, output: out, input } = shape.weight_strides();
        // Those side by side are put in the places that the others have.
        let transposed = way.by_output && way.side_by_side.is_none();
        let [o_step, i_step] = if transposed { [1, m] } else { [k, 1] };
        for (g, sums) in sums.chunks_exact(m * k).enumerate() {
            for o in 0..m {
                for i in 0..k {
                    grad_weight[g * group + o * out + i * input].write(T::narrow(sums[o * o_step + i * i_step]));
                }
            }
        }
    }

    /// NCHW: adds images `range` to the sums of `groups`.
    fn planes(&self, groups: Range<usize>, range: Range<usize>, sums: &mut [T::Wide]) {
        let (k, m) = (self.shape.group_in(), self.shape.group_out());
        let Images { pixels, channels: c_in, .. } = self.images;
        let c_out = self.shape.out_channels;
        let x_offsets: Vec<_> = (0..k).map(|i| i * pixels).collect();
        let tile = (DOT_BYTES / ((k + m) * size_of::<T>())).clamp(DOT_TILE, pixels.max(DOT_TILE)).min(pixels);
        let batch = (DOT_BYTES / ((k + m) * tile * size_of::<T>())).max(1);
        for (g, sums) in groups.zip(sums.chunks_exact_mut(m * k)) {
            let places = &self.places[g * m..][..m];
            if let (true, Some(stride)) = (m * k >= GEMM_WEIGHTS, constant_stride(places)) {
                for n in range.clone() {
                    // SAFETY: the group's rows of image n in grad_output and x; `sums` is m x k.
                    unsafe {
                        let a = self.grad_output.as_ptr().add(n * c_out * pixels + places[0]);
                        let b = self.x.as_ptr().add((n * c_in + g * k) * pixels);
                        T::gemm(self.isa, [m, pixels, k], (a, stride, 1), (b, 1, pixels), (sums.as_mut_ptr(), k, 1));
                    }
                }
                continue;
            }
            // What comes next: pixels, images, or the next group. (0: nothing is asked for.)
            let ahead =
                if has_stream_prefetcher() || size_of_val(self.x) + size_of_val(self.grad_output) <= CACHED_BYTES {
                    [0, 0]
                } else if tile < pixels {
                    [tile; 2]
                } else if batch < range.len() {
                    [c_out, c_in].map(|channels| batch * channels * pixels)
                } else {
                    let next = self.places.get((g + 1) * m).copied().unwrap_or(c_out * pixels + self.places[0]);
                    [next.saturating_sub(places[0]), k * pixels]
                };
            let row_products = RowProducts::<T, _>::new(self.isa, self.products, [m, k], pixels);
            scratch::with(row_products.memory(), |memory: &mut [T::Wide]| {
                memory.fill(T::Wide::default());
                for n in range.clone().step_by(batch) {
                    for start in (0..pixels).step_by(tile) {
                        // SAFETY: images n.. and pixels start.. exist, `batch` and `tile` cut at their ends.
                        unsafe {
                            let a = self.grad_output.as_ptr().add(n * c_out * pixels + start);
                            let b = self.x.as_ptr().add((n * c_in + g * k) * pixels + start);
                            let [a_ahead, b_ahead] = ahead;
                            let a = Rows { base: a, offsets: places, image_stride: c_out * pixels, ahead: a_ahead };
                            let b = Rows { base: b, offsets: &x_offsets, image_stride: c_in * pixels, ahead: b_ahead };
                            let size = [batch.min(range.end - n), tile.min(pixels - start)];
                            row_products.add(a, b, size, memory);
                        }
                    }
                }
                row_products.finish(memory, sums);
            });
        }
    }

    /// NHWC: adds pixels `range` of all images to the sums of `groups`.
    fn pixels(&self, groups: Range<usize>, range: Range<usize>, sums: &mut [T::Wide]) {
        let (k, m) = (self.shape.group_in(), self.shape.group_out());
        let tile = outer_tile::<T::Wide>(self.shape.in_channels + self.shape.out_channels).max(OUTER_TERMS);
        self.tiles(range, tile, |(x, x_step, x_ahead), grad, terms| {
            for (g, sums) in groups.clone().zip(sums.chunks_exact_mut(m * k)) {
                let x = (&x[g * k..], x_step, x_ahead);
                // SAFETY: the pixels exist in x and grad_output, with all of the group's channels, which follow each other
                // where they are the columns.
                unsafe { self.outer(x, grad, &self.places[g * m..][..m], terms, sums) };
            }
        });
    }

    /// Calls `body` for tiles of pixels `range`, with the values of `x` and of `grad_output` there and the number of pixels.
    fn tiles(&self, range: Range<usize>, tile: usize, mut body: impl FnMut(Values<'_, T>, Values<'_, T>, usize)) {
        let channels @ [c_in, c_out] = [self.shape.in_channels, self.shape.out_channels];
        let sizes = channels.map(|channels| tile / M::TERMS * channels);
        let permuted = if self.way.permutation.is_some() { tile * c_out } else { 0 };
        // Copies are in a cache.
        let copied = size_of::<T>() < size_of::<T::Wide>();
        let ahead = channels.map(|channels| if copied { 0 } else { tile * channels });
        scratch::with(permuted, |permuted: &mut [T]| {
            for pixels in chunks(range, tile) {
                let [x, mut grad] = [(self.x, c_in), (self.grad_output, c_out)]
                    .map(|(values, channels)| &values[pixels.start * channels..pixels.end * channels]);
                let mut ahead = ahead;
                if let Some(permutation) = &self.way.permutation {
                    let to = &mut permuted[..grad.len()];
                    // SAFETY: both are these pixels, of all channels.
                    unsafe {
                        permutation.run(grad.as_ptr(), to.as_mut_ptr(), [c_out; 2], pixels.len(), [tile * c_out, 0]);
                    }
                    (grad, ahead[1]) = (to, 0);
                }
                scratch::with(sizes.iter().sum(), |memory: &mut [T::Wide]| {
                    let [x_memory, grad_memory] = cut(memory, sizes);
                    let x = self.products.steps(self.isa, x, c_in, x_memory);
                    let grad = self.products.steps(self.isa, grad, c_out, grad_memory);
                    body((x, c_in, ahead[0]), (grad, c_out, ahead[1]), pixels.len());
                });
            }
        });
    }

    /// NHWC, several groups in a vector: calls `write` with the places and sums of some vectors' weights over pixels `range` of
    /// all images.
    fn side_by_side(
        &self,
        groups: &SideBySide,
        vectors: Range<usize>,
        range: Range<usize>,
        write: impl Fn(usize, T::Wide),
    ) {
        let tile = 2 * outer_tile::<T::Wide>(self.shape.in_channels + self.shape.out_channels);
        let tile = tile.max(OUTER_TERMS);
        // Vectors are of the side that has more channels.
        let by_input = self.shape.group_in() > self.shape.group_out();
        let each = groups.weights() / groups.vectors.len();
        let vectors = &groups.vectors[vectors];
        scratch::with(vectors.len() * each, |totals: &mut [T::Wide]| {
            totals.fill(T::Wide::default());
            self.tiles(range, tile, |x, grad, terms| {
                let ((a, a_step, a_ahead), (b, b_step, b_ahead)) = if by_input { (grad, x) } else { (x, grad) };
                for (vector, sums) in vectors.iter().zip(totals.chunks_exact_mut(each)) {
                    let Source { first, block, ask, .. } = groups.sources[vector.sources.start];
                    let Block::Window(len) = block else { unreachable!("chosen for windows only") };
                    // SAFETY: all pixels have the channels.
                    self.isa.run(unsafe {
                        Promised::new_unchecked(SideBySideSums::<T, M> {
                            products: self.products,
                            a: (a.as_ptr().add(first), len),
                            a_step,
                            a_ahead: if ask { a_ahead } else { 0 },
                            b: (b.as_ptr().add(vector.columns.start), vector.columns.len()),
                            b_step,
                            b_ahead,
                            terms,
                            index: groups.index(vector),
                            sums,
                        })
                    });
                }
            });
            for (vector, sums) in vectors.iter().zip(totals.chunks_exact(each)) {
                groups.unpack(vector, sums, by_input, &write);
            }
        });
    }

    /// Adds a group's products over `terms` pixels to its sums, of `x`, which starts with its channels, and `grad`, where they
    /// stand at `places`.
    ///
    /// # Safety
    /// The pixels must have the group's channels, which must follow each other where they are the columns.
    // Not inlined, groups of four channels or less take 1.2 times as long.
    #[inline(always)]
    unsafe fn outer(
        &self,
        x: Values<'_, T>,
        grad: Values<'_, T>,
        places: &[usize],
        terms: usize,
        sums: &mut [T::Wide],
    ) {
        let (k, m) = (self.shape.group_in(), self.shape.group_out());
        // Vectors are of output channels or of input channels.
        let (a, a_rows, b, columns) =
            if self.way.by_output { (x, &self.inputs[..], grad, m) } else { (grad, places, x, k) };
        let first = if self.way.by_output { places[0] } else { 0 };
        assert_eq!(sums.len(), m * k);
        // SAFETY: the caller's promise; there are m x k sums.
        self.isa.run(unsafe {
            Promised::new_unchecked(OuterProducts {
                products: self.products,
                a: a.0.as_ptr(),
                a_step: a.1,
                a_rows,
                a_ahead: a.2,
                b: b.0.as_ptr().add(first),
                b_step: b.1,
                b_ahead: b.2,
                terms,
                columns,
                out: Totals::<T> { sums: sums.as_mut_ptr(), row: columns },
            })
        });
    }
}

/// The gradient by the bias: the sums over images and pixels of `grad_output (N, C_out)`, whose channels are
/// interleaved by `interleave`.
pub fn grad_bias<T: Element>(
    isa: IsaKind,
    interleave: usize,
    images: Images,
    grad_output: &[T],
    grad_bias: &mut [MaybeUninit<T>],
) {
    assert_eq!(grad_output.len(), images.len());
    assert_eq!(grad_bias.len(), images.channels);
    let Images { count, pixels, channels, .. } = images;
    let places = interleave_dst_index(channels, interleave);
    let work = estimate(0, size_of_val(grad_output));
    let threads = threads_for(work);
    let shared = Shared::new(grad_bias);
    // SAFETY: each channel is written by one task.
    let write = |c: usize, sum: f64| unsafe { shared.ptr().add(c).write(T::from_f64(sum)) };
    if images.order == Order::Nchw && pixels > 1 {
        parallel_for(threads, channels, |c| {
            let plane = |n: usize| &grad_output[(n * channels + places[c]) * pixels..][..pixels];
            write(c, (0..count).map(|n| isa.run(Sum(plane(n)))).sum());
        });
        return;
    }
    // NHWC: sums of short columns in the type that is computed with, these in float64. How many depends on the work alone, so that
    // neither do the results depend on the threads.
    let parts = if is_worth_threads(work) { MAX_PARTS } else { 1 };
    let mut partial = vec![0f64; parts * channels];
    let sums = Shared(partial.as_mut_ptr());
    parallel_for(threads, parts, |task| {
        // SAFETY: each task has sums of its own.
        let sums = unsafe { std::slice::from_raw_parts_mut(sums.ptr().add(task * channels), channels) };
        let range = part(count * pixels, parts, task);
        scratch::with(channels, |columns: &mut [T::Wide]| {
            for rows in grad_output[range.start * channels..range.end * channels].chunks(BIAS_TILE * channels) {
                isa.run(SumColumns(rows, columns));
                sums.iter_mut().zip(&*columns).for_each(|(sum, value)| *sum += value.to_f64());
            }
        });
    });
    for c in 0..channels {
        write(c, (0..parts).map(|p| partial[p * channels + places[c]]).sum());
    }
}
