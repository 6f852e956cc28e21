//! The gradient of the grouped pointwise convolution by its weight: what both layouts share.
//!
//! Parts of the images or pixels, and of the groups, are tasks with partial sums of their own,
//! which are added up in order at the end.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::grouped::Grouped;
use super::plan::{Algorithm, GRAD_TILE, Plan, Problem, grad_weight_groups};
use super::{TASKS_PER_THREAD, images_work};
use crate::interleave::{Permutation, permute_cheapest};
use crate::memory;
use crate::parallel::{Shared, add_parts};
use crate::plan::{Caps, Direction};
use crate::pool::{parallel_for, part, threads_for};
use crate::shape::{Images, Pointwise, WeightStrides, interleave_dst_index};
use crate::simd::IsaKind;
use crate::simd::element::Element;
use crate::simd::mul_acc::MulAcc;

/// Work of one part of a weight gradient, at least.
const PART_NANOSECONDS: f64 = 100_000.0;
/// Parts of a weight gradient, at most.
pub(super) const MAX_PARTS: usize = 64;
/// Parts of one whose channels are permuted, at least: that is not divided into groups.
const PERMUTED_PARTS: usize = 8;
/// What starting and ending one partial sum costs beside the work itself is a fiftieth of this.
const NANOSECONDS_PER_SUM: f64 = 100.0;

/// A weight gradient and how it is computed.
pub(super) struct GradWeight<'a, T, M> {
    pub isa: IsaKind,
    pub mul_acc: M,
    pub algorithm: Algorithm,
    pub shape: &'a Pointwise,
    pub images: Images,
    /// The groups in vectors, of [`Algorithm::Grouped`].
    pub grouped: Option<Grouped>,
    /// What undoes the interleave of pixels in a cache.
    pub permutation: Option<Permutation>,
    /// Where output channel `c` stands in an image of `grad_output`.
    pub dst_index: Vec<usize>,
    pub x: &'a [T],
    pub grad_output: &'a [T],
}

/// See [`super::grad_weight`]; with products added up in a certain way.
pub(super) fn run<T: Element, M: MulAcc<T>>(
    isa: IsaKind,
    mul_acc: M,
    shape: &Pointwise,
    images: Images,
    x: &[T],
    grad_output: &[T],
    grad_weight: &mut [MaybeUninit<T>],
) {
    let caps = Caps::new::<T>(isa);
    let problem = Problem::new(&caps, Direction::GradWeight, shape, images);
    let algorithm = Plan::choose(&problem, &caps).algorithm;
    let out = images.with_channels(shape.out_channels);
    let work = images_work::<T>(images, out, shape.group_in());
    let threads = threads_for(work);
    let (groups, _) = grad_weight_groups(&problem);
    let grouped = (algorithm == Algorithm::Grouped).then(|| Grouped::new(groups, caps.lanes, 1)).flatten();
    let as_stored = problem.is_rows() || algorithm == Algorithm::OuterByInput || !problem.is_interleaved();
    let mut permutation =
        if as_stored { None } else { Permutation::interleave(isa, &caps, problem.order(), true, problem.pixels()) };
    // The parts depend on the problem alone, so that the sums do too; groups do not change them.
    let most = if problem.is_rows() { images.count } else { problem.pixels().div_ceil(GRAD_TILE) };
    let least = if permutation.is_some() { PERMUTED_PARTS } else { 1 };
    let worth = PART_NANOSECONDS.max(NANOSECONDS_PER_SUM * shape.weights() as f64);
    let parts = ((work / worth) as usize).max(least).min(most).clamp(1, MAX_PARTS);
    let wanted = if threads == 1 { 1 } else { (threads * TASKS_PER_THREAD).div_ceil(parts) };
    let group_parts = wanted.min(grouped.as_ref().map_or(shape.groups, |groups| groups.vectors.len()));
    let mut dst_index = if as_stored && problem.is_interleaved() {
        interleave_dst_index(shape.out_channels, shape.interleave)
    } else {
        (0..shape.out_channels).collect()
    };
    if problem.is_rows() {
        dst_index.iter_mut().for_each(|index| *index *= images.pixels);
    }
    // All at once where each part of the groups would do it once more.
    let whole = permutation.take_if(|_| group_parts > 1).is_some();
    memory::with(if whole { grad_output.len() } else { 0 }, |permuted: &mut [MaybeUninit<T>]| {
        let mut grad_output = grad_output;
        if whole {
            let src_index = interleave_dst_index(shape.out_channels, shape.interleave);
            permute_cheapest(isa, &src_index, out, grad_output, permuted);
            // SAFETY: all of it has been written.
            grad_output = unsafe { std::slice::from_raw_parts(permuted.as_ptr().cast(), permuted.len()) };
        }
        let grad =
            GradWeight { isa, mul_acc, algorithm, shape, images, grouped, permutation, dst_index, x, grad_output };
        grad.run(threads, problem.is_rows(), [parts, group_parts], grad_weight);
    });
}

impl<T: Element, M: MulAcc<T>> GradWeight<'_, T, M> {
    /// All of it, as `parts` of the images or pixels times `group_parts` of the groups.
    fn run(&self, threads: usize, rows: bool, [parts, group_parts]: [usize; 2], grad_weight: &mut [MaybeUninit<T>]) {
        let Self { shape, images, .. } = self;
        let (k, m, pixels) = (shape.group_in(), shape.group_out(), images.count * images.pixels);
        // One set of partial sums for each part, added up in order at the end.
        let mut partial = memory::filled(T::Wide::default(), parts * shape.weights());
        let shared = Shared(partial.as_mut_ptr());
        parallel_for(threads, parts * group_parts, |task| {
            let (task, group_task) = (task / group_parts, task % group_parts);
            if let Some(groups) = &self.grouped {
                let vectors = part(groups.vectors.len(), group_parts, group_task);
                self.grouped_sums(groups, vectors, part(pixels, parts, task), |index, sum| {
                    // SAFETY: tasks differ in part or in vectors: no two write the same sum.
                    unsafe { shared.ptr().add(task * shape.weights() + index).write(sum) }
                });
                return;
            }
            let groups = part(shape.groups, group_parts, group_task);
            let (first, len) = (task * shape.weights() + groups.start * m * k, groups.len() * m * k);
            // SAFETY: tasks differ in part or in groups: no two share sums.
            let sums = unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(first), len) };
            if rows {
                self.row_sums(groups, part(images.count, parts, task), sums);
            } else {
                self.pixel_sums(groups, part(pixels, parts, task), sums);
            }
        });
        let sums = add_parts(&mut partial, shape.weights());
        let WeightStrides { group, output, input } = shape.weight_strides();
        let [o_stride, i_stride] = if self.by_output() { [1, m] } else { [k, 1] };
        for (g, sums) in sums.chunks_exact(m * k).enumerate() {
            for o in 0..m {
                for i in 0..k {
                    grad_weight[g * group + o * output + i * input].write(T::narrow(sums[o * o_stride + i * i_stride]));
                }
            }
        }
    }

    /// Whether sums of a group are `[input channel][output channel]`.
    pub(super) fn by_output(&self) -> bool {
        self.algorithm == Algorithm::OuterByOutput
    }

    /// The groups' sizes: input and output channels.
    pub(super) fn size(&self) -> [usize; 2] {
        [self.shape.group_in(), self.shape.group_out()]
    }

    /// All groups' sums, one behind the other.
    pub(super) fn each_group<'b>(
        &self,
        groups: Range<usize>,
        sums: &'b mut [T::Wide],
    ) -> impl Iterator<Item = (usize, &'b mut [T::Wide])> {
        let [k, m] = self.size();
        groups.zip(sums.chunks_exact_mut(m * k))
    }
}
