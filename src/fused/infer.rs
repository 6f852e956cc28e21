//! Inference: the forward pass with given statistics, of which nothing is kept.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use super::Arguments;
use super::pack::Packed;
use super::pass::Pass;
use super::program::Program;
use crate::memory;
use crate::microkernels::row_copy::NarrowRows;
use crate::parallel::Shared;
use crate::pool::{num_threads, parallel_for, part};
use crate::scratch;
use crate::shape::Order;
use crate::simd::IsaKind;
use crate::simd::element::{Element, WideElement, is_wide, writable};

/// Images that a thread takes through the whole program together in inference, at most: their small
/// planes are computed as one, and their memory stays in the cache. (Measured: docs/ALGORITHMS.md.)
const INFERENCE_IMAGES: usize = 8;

/// What inference computes with. Parameters and statistics may come in pieces, which follow each
/// other.
pub struct Inference<'a, T> {
    /// The instruction set.
    pub isa: IsaKind,
    /// The program.
    pub program: &'a Program,
    /// Number of images.
    pub count: usize,
    /// The order of the input's and output's axes.
    pub order: Order,
    /// All parameters, as [`Program::parse`] orders them.
    pub parameters: &'a [&'a [T]],
    /// Means and variances to normalise with, of all norms' channels.
    pub statistics: &'a [&'a [T]],
}

/// What inference makes of parameters and statistics, and these.
struct Prepared<T> {
    parameters: Vec<T>,
    statistics: Vec<T>,
    weights: Vec<Option<Packed<T>>>,
    affine: Vec<(T, T)>,
}

impl<T: WideElement> Inference<'_, T> {
    /// What is the same for all images, that of the last call where its parameters and statistics
    /// were the same: a comparison takes a tenth of the time of packing, which in inference of one
    /// image is a sixth of all.
    fn prepared(&self) -> Arc<Prepared<T>> {
        // Not under the lock: threads that come at once may all pack.
        let last = self.program.prepared.with(|last| last.clone());
        if let Some(prepared) = last.and_then(|last| last.downcast::<Prepared<T>>().ok())
            && same_bits(&prepared.parameters, self.parameters)
            && same_bits(&prepared.statistics, self.statistics)
        {
            return prepared;
        }
        let (parameters, statistics) = (concat(self.parameters), concat(self.statistics));
        let arguments = self.arguments(&parameters);
        let mut pass = Pass::<T>::new(&arguments, Shared::new(&mut []), &self.program.reused, 1);
        pass.fix_statistics(&statistics);
        let (weights, affine) = (arguments.packed(Some(&pass.affine)), pass.affine);
        let prepared = Arc::new(Prepared { parameters, statistics, weights, affine });
        let old = self.program.prepared.with(|last| last.replace(prepared.clone()));
        drop(old);
        prepared
    }

    /// What a pass computes with.
    fn arguments<'a>(&'a self, parameters: &'a [T]) -> Arguments<'a, T> {
        let Inference { isa, program, count, order, .. } = *self;
        Arguments { isa, program, count, order, parameters, masks: &[] }
    }
}

/// All pieces' values.
fn concat<T: WideElement>(pieces: &[&[T]]) -> Vec<T> {
    let mut values = Vec::new();
    memory::reserve(&mut values, pieces.iter().map(|piece| piece.len()).sum());
    pieces.iter().for_each(|piece| values.extend_from_slice(piece));
    values
}

/// Whether values are those of the pieces, bit for bit.
fn same_bits<T: WideElement>(mut values: &[T], pieces: &[&[T]]) -> bool {
    // SAFETY: floating-point numbers are plain bytes.
    let bytes = |values: &[T]| unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
    let same = pieces.iter().all(|piece| {
        let Some((first, rest)) = values.split_at_checked(piece.len()) else { return false };
        values = rest;
        bytes(first) == bytes(piece)
    });
    same && values.is_empty()
}

/// Copies a program's output to images, which may be stored as something else.
fn export<S: Element>(pass: &Pass<'_, S::Wide>, y: &mut [MaybeUninit<S>]) {
    let (output, len) = (pass.program.output, y.len());
    let rows = pass.rows(output);
    if is_wide::<S>() {
        // SAFETY: the same type.
        let y = unsafe { std::slice::from_raw_parts_mut(y.as_mut_ptr().cast(), len) };
        return pass.export(output, rows, y);
    }
    scratch::with(len, |images: &mut [S::Wide]| {
        pass.export(output, rows, writable(images));
        pass.isa.run(NarrowRows { x: (images, len), y: (y, len), size: [1, len], ahead: len });
    });
}

/// Forward in inference, with given statistics (means and variances of all norms' channels).
///
/// Nothing is kept. Each thread takes a few images at a time through the whole program, in memory
/// that stays in its cache: so values are as they are computed with, whatever images are.
pub fn infer<S: Element>(inference: &Inference<'_, S::Wide>, x: &[S], y: &mut [MaybeUninit<S>]) {
    let Inference { program, count, .. } = *inference;
    let [input, output] = program.sizes().map(|[channels, height, width]| channels * height * width);
    assert_eq!((x.len(), y.len()), (count * input, count * output));
    assert!(program.workspace_len(count).is_ok());
    if count == 0 {
        return;
    }
    let threads = num_threads();
    let y = Shared::new(y);
    let prepared = inference.prepared();
    let arguments = inference.arguments(&prepared.parameters);
    // What is the same for all images, which only the memory is not.
    let mut first = Pass::<S::Wide>::new(&arguments, Shared::new(&mut []), &program.reused, 1);
    first.packed = &prepared.weights;
    first.affine.clone_from(&prepared.affine);
    first.stores_views = true;
    let run = |images: Range<usize>, threads: usize| {
        let count = images.len();
        memory::with(program.reused.len * count, |memory: &mut [MaybeUninit<S::Wide>]| {
            let (start, offsets) = (Shared::new(memory), program.reused.offsets(count));
            let pass = Pass { start, offsets, count, threads, ..first.clone() };
            let x = &x[images.start * input..images.end * input];
            let len = if is_wide::<S>() { 0 } else { x.len() };
            scratch::with(len, |memory: &mut [S::Wide]| pass.import(0, pass.rows(0), S::widened(pass.isa, x, memory)));
            for step in &program.steps {
                pass.step(step);
            }
            // SAFETY: these images' own part of the output.
            let y =
                unsafe { std::slice::from_raw_parts_mut(y.ptr().add(images.start * output).cast(), count * output) };
            export::<S>(&pass, y);
        });
    };
    // Fewer images than threads: the threads share each image's work.
    if count < threads {
        (0..count).for_each(|image| run(image..image + 1, threads));
    } else {
        let blocks = count.div_ceil(INFERENCE_IMAGES).next_multiple_of(threads).min(count);
        parallel_for(threads, blocks, |i| run(part(count, blocks, i), 1));
    }
}
