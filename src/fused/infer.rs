//! Inference: the forward pass with given statistics, of which nothing is kept.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use super::Arguments;
use super::pack::Packed;
use super::pass::{Pass, activate_in_place};
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

/// What inference makes of a program's parameters and statistics: weights as the kernels read
/// them, for one instruction set.
pub struct Prepared<T> {
    isa: IsaKind,
    weights: Vec<Option<Packed<T>>>,
    affine: Vec<(T, T)>,
}

/// The last call's parameters and statistics, and what was made of them.
struct Last<T> {
    parameters: Vec<T>,
    statistics: Vec<T>,
    prepared: Arc<Prepared<T>>,
}

impl<T: WideElement> Prepared<T> {
    /// That of all parameters and statistics.
    pub fn new(isa: IsaKind, program: &Program, parameters: &[T], statistics: &[T]) -> Self {
        let arguments = Arguments { isa, program, count: 1, order: Order::Nchw, parameters, masks: &[] };
        let mut pass = Pass::<T>::new(&arguments, Shared::new(&mut []), &program.reused, 1);
        pass.fix_statistics(statistics);
        Self { isa, weights: arguments.packed(Some(&pass.affine)), affine: pass.affine.into_owned() }
    }

    /// How many convolutions' products have vectors of channels.
    #[cfg(test)]
    pub(super) fn by_channels(&self) -> usize {
        self.weights.iter().flatten().filter(|packed| packed.by_channels).count()
    }
}

impl<T: WideElement> Inference<'_, T> {
    /// What is the same for all images, that of the last call where its parameters and statistics
    /// were the same: a comparison takes a tenth of the time of packing, which in inference of one
    /// image is a sixth of all.
    fn prepared(&self) -> Arc<Prepared<T>> {
        // Not under the lock: threads that come at once may all pack.
        let last = self.program.prepared.with(|last| last.clone());
        if let Some(last) = last.and_then(|last| last.downcast::<Last<T>>().ok())
            && last.prepared.isa.name() == self.isa.name()
            && same_bits(&last.parameters, self.parameters)
            && same_bits(&last.statistics, self.statistics)
        {
            return last.prepared.clone();
        }
        let (parameters, statistics) = (concat(self.parameters), concat(self.statistics));
        let prepared = Arc::new(Prepared::new(self.isa, self.program, &parameters, &statistics));
        let last = Arc::new(Last { parameters, statistics, prepared: prepared.clone() });
        let old = self.program.prepared.with(|before| before.replace(last));
        drop(old);
        prepared
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
pub fn infer<S: Element>(inference: &Inference<'_, S::Wide>, x: &[S], y: &mut [MaybeUninit<S>]) {
    let Inference { program, count, order, .. } = *inference;
    if count > 0 {
        infer_prepared(program, &inference.prepared(), (count, order), x, y);
    }
}

/// Forward in inference, with what was [`Prepared`] for the program.
///
/// Nothing is kept. Each thread takes a few images at a time through the whole program, in memory
/// that stays in its cache: so values are as they are computed with, whatever images are.
pub fn infer_prepared<S: Element>(
    program: &Program,
    prepared: &Prepared<S::Wide>,
    (count, order): (usize, Order),
    x: &[S],
    y: &mut [MaybeUninit<S>],
) {
    let [input, output] = program.sizes().map(|[channels, height, width]| channels * height * width);
    assert_eq!((x.len(), y.len()), (count * input, count * output));
    assert_eq!((prepared.weights.len(), prepared.affine.len()), (program.steps.len(), program.norm_channels()));
    assert!(program.workspace_len(count).is_ok());
    if count == 0 {
        return;
    }
    let threads = num_threads();
    let y = Shared::new(y);
    let run = |images: Range<usize>, threads: usize| {
        let count = images.len();
        memory::with(program.reused.len * count, |memory: &mut [MaybeUninit<S::Wide>]| {
            let pass = Pass::<S::Wide> {
                isa: prepared.isa,
                program,
                count,
                order,
                threads,
                parameters: &[],
                masks: &[],
                packed: &prepared.weights,
                start: Shared::new(memory),
                inner: Shared::new(&mut []),
                recomputed: &[],
                offsets: program.reused.offsets(count),
                affine: prepared.affine.as_slice().into(),
                moments: Vec::new(),
                stores_views: true,
                activate: activate_in_place::<S>,
            };
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
