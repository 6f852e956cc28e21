//! A pass through a program: its values in memory, and the statistics of its norms.

use std::borrow::Cow;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::pack::Packed;
use super::program::{Kind, Program, Step};
use super::slots::Slots;
use super::{Arguments, PARTS};
use crate::error::{Result, bail};
use crate::memory;
use crate::microkernels::activations::Activation;
use crate::microkernels::norm_act::ActivateInPlace;
use crate::microkernels::reduce::Moments;
use crate::microkernels::row_copy::NarrowRows;
use crate::microkernels::transpose::Transpose;
use crate::parallel::Shared;
use crate::pool::{parallel_for, part};
use crate::shape::Order;
use crate::simd::IsaKind;
use crate::simd::element::{Element, as_wide_mut, is_wide, writable};

/// Pixels of a row in one set of partial sums, at least.
const PART_PIXELS: usize = 256;
/// Pixels of an image that are worth a thread to copy them.
const IMPORT_PIXELS: usize = 16 << 10;

/// A pass through a program, whose values are stored as `S` and computed with as `S::Wide`.
#[derive(Clone)]
pub(super) struct Pass<'a, S: Element> {
    pub isa: IsaKind,
    pub program: &'a Program,
    pub count: usize,
    pub order: Order,
    pub threads: usize,
    pub parameters: &'a [S::Wide],
    pub masks: &'a [S::Wide],
    /// Each step's weights for the forward pass, where it is a convolution.
    pub packed: &'a [Option<Packed<S::Wide>>],
    /// All values' memory, that of the ones that the backward pass computes anew, and where in it
    /// each value's rows start.
    pub start: Shared<S>,
    pub inner: Shared<S>,
    /// Which values are in the second one; empty where none are.
    pub recomputed: &'a [bool],
    pub offsets: Vec<usize>,
    /// Scale and shift of each channel of the norms.
    pub affine: Cow<'a, [(S::Wide, S::Wide)]>,
    /// Mean and inverse standard deviation of each channel of the norms; none in inference.
    pub moments: Vec<(S::Wide, S::Wide)>,
    /// Whether values are stored as their readers see them (where these agree), because nothing is
    /// kept for a backward pass and the statistics are known.
    pub stores_views: bool,
    /// What makes of a row of values what their readers see, given scale and shift of their norm.
    pub activate: Activate<S::Wide>,
}

/// See [`activate_in_place`].
type Activate<T> = fn(IsaKind, Activation, (T, T), &mut [T]);

/// An activation after scale and shift, in place, as exact as the images are, which are of `S`.
pub(super) fn activate_in_place<S: Element>(
    isa: IsaKind,
    activation: Activation,
    affine: (S::Wide, S::Wide),
    row: &mut [S::Wide],
) {
    isa.run(ActivateInPlace::<S> { activation, row, affine });
}

/// Whether `T` is what values are stored as, where that is `S`: else it is what they are computed
/// with.
pub(super) const fn is_stored<S: Element, T: Element<Wide = S::Wide>>() -> bool {
    size_of::<T>() == size_of::<S>()
}

/// Rows of results that are yet to be stored: the first one's start, and the distance from one to
/// the next.
pub(super) type Results<T> = (Shared<T>, usize);

/// A value's statistics: count, mean, and sum of the squares of the distances from the mean.
pub(super) type Statistics = (f64, f64, f64);

/// The statistics of two samples together (Chan, Golub and LeVeque 1983, formula 1.5).
pub(super) fn merge_statistics(a: Statistics, b: Statistics) -> Statistics {
    let count = a.0 + b.0;
    if b.0 == 0.0 {
        return a;
    }
    let distance = b.1 - a.1;
    (count, a.1 + distance * b.0 / count, a.2 + b.2 + distance * distance * a.0 * b.0 / count)
}

impl Program {
    /// Values that the forward pass keeps for the backward pass.
    ///
    /// # Errors
    /// If no memory can hold what the program needs for that many images.
    pub fn workspace_len(&self, count: usize) -> Result<usize> {
        let sizes = self.sizes().map(|size| size.iter().product());
        let most = sizes
            .into_iter()
            .chain([self.kept.len, self.inner.len, self.reused.len, self.gradients.len, self.masks])
            .max();
        match most.unwrap_or(0).checked_mul(count) {
            Some(values) if values <= memory::LARGEST / size_of::<f64>() => Ok(self.kept.len * count),
            _ => bail!("the program needs more memory for {count} images than there can be"),
        }
    }
}

impl<'a, S: Element> Pass<'a, S> {
    pub fn new(arguments: &Arguments<'a, S::Wide>, start: Shared<S>, slots: &Slots, threads: usize) -> Self {
        let Arguments { isa, program, count, order, parameters, masks } = *arguments;
        assert_eq!(parameters.len(), program.parameters());
        assert!(masks.is_empty() || masks.len() == program.masks * count);
        let channels = program.norm_channels();
        let zero = (S::Wide::default(), S::Wide::default());
        Self {
            isa,
            program,
            count,
            order,
            threads,
            parameters,
            masks,
            packed: &[],
            start,
            inner: Shared::new(&mut []),
            recomputed: &[],
            offsets: slots.offsets(count),
            affine: vec![zero; channels].into(),
            moments: vec![zero; channels],
            stores_views: false,
            activate: activate_in_place::<S>,
        }
    }

    /// Writes what lies between the values in the workspace, so that all of it may be handed on as
    /// values.
    pub fn clear_gaps(&self) {
        for (index, (value, &offset)) in self.program.values.iter().zip(&self.offsets).enumerate() {
            if self.is_recomputed(index) {
                continue;
            }
            let image = value.kept();
            let len = self.count * image;
            // SAFETY: in the workspace, each value's slot is a multiple of 16 long and its own.
            unsafe { self.start.ptr().add(offset + len).write_bytes(0, self.count * image.next_multiple_of(16) - len) };
        }
    }

    /// A value's rows.
    pub fn rows(&self, value: usize) -> Shared<S> {
        self.memory(value).at(self.offsets[value])
    }

    /// The memory that a value's rows are in.
    pub fn memory(&self, value: usize) -> Shared<S> {
        if self.is_recomputed(value) { self.inner } else { self.start }
    }

    /// Whether the backward pass computes a value anew.
    pub fn is_recomputed(&self, value: usize) -> bool {
        self.recomputed.get(value).is_some_and(|&recomputed| recomputed)
    }

    /// Pixels of a value's row.
    pub fn row_len(&self, value: usize) -> usize {
        self.count * self.program.values[value].pixels()
    }

    /// Part of a row.
    ///
    /// # Safety
    /// It must have been written, and not be written while the slice lives.
    pub unsafe fn row(&self, value: usize, channel: usize, pixels: Range<usize>) -> &[S] {
        let start = channel * self.row_len(value) + pixels.start;
        // SAFETY: the caller's promise; channels and pixels exist because the program was checked.
        unsafe { std::slice::from_raw_parts(self.rows(value).ptr().add(start), pixels.len()) }
    }

    /// Part of a row, to be written.
    ///
    /// # Safety
    /// It must be the calling task's own while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "tasks write different rows of shared memory")]
    pub unsafe fn row_mut(&self, value: usize, channel: usize, pixels: Range<usize>) -> &mut [S] {
        let start = channel * self.row_len(value) + pixels.start;
        // SAFETY: the caller's promise; channels and pixels exist because the program was checked.
        unsafe { std::slice::from_raw_parts_mut(self.rows(value).ptr().add(start), pixels.len()) }
    }

    /// Copies images in their order of axes to rows of a value's size.
    pub fn import(&self, value: usize, rows: Shared<S>, x: &[S]) {
        let (channels, pixels) = (self.program.values[value].channels, self.program.values[value].pixels());
        assert_eq!(x.len(), self.count * channels * pixels);
        let row_len = self.row_len(value);
        // A single pixel is the same memory in both orders.
        let planes = self.order == Order::Nchw && pixels > 1;
        // Fewer images than threads: these share an image.
        let parts = self.threads.div_ceil(self.count).min(pixels.div_ceil(IMPORT_PIXELS));
        parallel_for(self.threads, self.count * parts, |task| {
            let (n, pixel) = (task / parts, part(pixels, parts, task % parts));
            let x = &x[n * channels * pixels..][..channels * pixels];
            // SAFETY: pixels of image n of the value's rows, which no other task writes.
            unsafe {
                let target = rows.ptr().add(n * pixels + pixel.start);
                if planes {
                    for (c, plane) in x.chunks_exact(pixels).enumerate() {
                        let plane = &plane[pixel.clone()];
                        target.add(c * row_len).copy_from_nonoverlapping(plane.as_ptr(), plane.len());
                    }
                } else {
                    let x = x[pixel.start * channels..].as_ptr();
                    self.isa.run(Transpose::gather([pixel.len(), channels], x, channels, target, row_len));
                }
            }
        });
    }

    /// Copies rows of a value's size to images in their order of axes.
    pub fn export(&self, value: usize, rows: Shared<S>, y: &mut [MaybeUninit<S>]) {
        let (channels, pixels) = (self.program.values[value].channels, self.program.values[value].pixels());
        assert_eq!(y.len(), self.count * channels * pixels);
        let row_len = self.row_len(value);
        let planes = self.order == Order::Nchw && pixels > 1;
        let y = Shared::new(y);
        parallel_for(self.threads, self.count, |n| {
            // SAFETY: image n of y, which no other task writes.
            unsafe {
                let (source, target) = (rows.ptr().add(n * pixels), y.ptr().add(n * channels * pixels));
                if planes {
                    for c in 0..channels {
                        target.add(c * pixels).copy_from_nonoverlapping(source.add(c * row_len), pixels);
                    }
                } else {
                    self.isa.run(Transpose::scatter([channels, pixels], source, row_len, target, channels));
                }
            }
        });
    }

    /// The weights of a convolution.
    pub fn weights(&self, step: &Step) -> &Packed<S::Wide> {
        self.packed[step.value - 1].as_ref().expect("packed for every convolution")
    }

    /// Takes the statistics of a value's channels (measured here unless they are known) for the
    /// norms that read it.
    pub fn normalise(&mut self, value: usize, known: Option<Vec<Statistics>>, found: &mut [Statistics]) {
        let data = &self.program.values[value];
        if !data.normed {
            return;
        }
        let known = known.unwrap_or_else(|| {
            let len = self.row_len(value);
            let mut statistics = vec![(0.0, 0.0, 0.0); data.channels];
            let shared = Shared(statistics.as_mut_ptr());
            self.for_tasks(data.channels, 1, |c, _| {
                // SAFETY: the value has been written; each task writes its own statistics.
                unsafe {
                    let (mean, squares) = self.isa.run(Moments(self.row(value, c, 0..len)));
                    shared.ptr().add(c).write((len as f64, mean, squares));
                }
            });
            statistics
        });
        for &(channel, norm) in &data.norms {
            found[norm] = known[channel];
            let (count, mean, squares) = known[channel];
            self.set_norm(norm, mean, squares / count);
        }
    }

    /// Takes given statistics for all norms.
    pub fn fix_statistics(&mut self, statistics: &[S::Wide]) {
        let (means, variances) = statistics.split_at(self.program.norm_channels());
        for (channel, (mean, variance)) in means.iter().zip(variances).enumerate() {
            self.set_norm(channel, mean.to_f64(), variance.to_f64());
        }
    }

    fn set_norm(&mut self, channel: usize, mean: f64, variance: f64) {
        // Norms are sorted by their channels.
        let index = self.program.norms.partition_point(|norm| norm.channels.end <= channel);
        let norm = &self.program.norms[index];
        let own = channel - norm.channels.start;
        let gamma = norm.gamma.map_or(1.0, |gamma| self.parameters[gamma + own].to_f64());
        let inverse = 1.0 / (variance + norm.epsilon).sqrt();
        let shift = self.parameters[norm.beta + own].to_f64() - mean * gamma * inverse;
        self.affine.to_mut()[channel] = (S::Wide::from_f64(gamma * inverse), S::Wide::from_f64(shift));
        self.moments[channel] = (S::Wide::from_f64(mean), S::Wide::from_f64(inverse));
    }

    /// Into how many parts of whole images the work on images of that many pixels is divided.
    pub fn parts(&self, pixels: usize) -> usize {
        PARTS.min(self.count).min((self.count * pixels).div_ceil(PART_PIXELS)).max(1)
    }

    /// Where to write a value's channels from `channel` on and pixels from `pixel` on: its own
    /// rows, or where they are stored as something else, those of `tile`, `pitch` apart.
    pub fn results<T: Element<Wide = S::Wide>>(
        &self,
        value: usize,
        channel: usize,
        pixel: usize,
        tile: &mut [T],
        pitch: usize,
    ) -> Results<T> {
        if is_stored::<S, T>() {
            let row_len = self.row_len(value);
            (Shared(self.rows(value).at(channel * row_len + pixel).ptr().cast()), row_len)
        } else {
            (Shared(tile.as_mut_ptr()), pitch)
        }
    }

    /// Values of memory for a tile of [`Pass::results`] of that many.
    pub fn tile_len(len: usize) -> usize {
        if is_wide::<S>() { 0 } else { len }
    }

    /// Whether a value's statistics are gathered: norms read it, and they are not given.
    pub fn gathers(&self, value: usize) -> bool {
        !self.stores_views && self.program.values[value].normed
    }

    /// What follows a convolution while its results are in the cache: the statistics of new values
    /// of some channels, or what their readers make of them; and where they are not the value's own
    /// rows, they are stored there.
    ///
    /// # Safety
    /// The results and these pixels of the value's rows must be this task's own, the results
    /// written.
    pub unsafe fn apply_epilogue<T: Element<Wide = S::Wide>>(
        &self,
        value: usize,
        channels: Range<usize>,
        pixels: Range<usize>,
        (rows, pitch): Results<T>,
        statistics: &mut [Statistics],
    ) {
        if self.gathers(value) {
            for (i, statistics) in statistics.iter_mut().enumerate().take(channels.len()) {
                // SAFETY: the caller's promise.
                let row: &[T] = unsafe { std::slice::from_raw_parts(rows.at(i * pitch).ptr(), pixels.len()) };
                let (mean, squares) = self.isa.run(Moments(row));
                *statistics = merge_statistics(*statistics, (row.len() as f64, mean, squares));
            }
        }
        // SAFETY: the caller's promise.
        unsafe { self.store(value, channels, pixels, (rows, pitch)) };
    }

    /// Makes of new values of some channels what their readers will, if this pass does so, and
    /// stores them where they are not the value's own rows.
    ///
    /// # Safety
    /// As for [`Pass::apply_epilogue`].
    pub unsafe fn store<T: Element<Wide = S::Wide>>(
        &self,
        value: usize,
        channels: Range<usize>,
        pixels: Range<usize>,
        results: Results<T>,
    ) {
        assert!(is_wide::<T>() || !self.stores_views, "views of what is rounded");
        let results = (Shared(results.0.ptr().cast()), results.1);
        // SAFETY: the caller's promise.
        unsafe { self.apply_view(value, channels.clone(), pixels.len(), results) };
        if is_stored::<S, T>() {
            return;
        }
        for (i, channel) in channels.enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let row = std::slice::from_raw_parts(results.0.at(i * results.1).ptr(), pixels.len());
                self.narrow(row, self.row_mut(value, channel, pixels.clone()));
            }
        }
    }

    /// Rounds a row to what is stored.
    pub fn narrow<T: Element<Wide = S::Wide>>(&self, row: &[S::Wide], to: &mut [T]) {
        let len = row.len();
        self.isa.run(NarrowRows { x: (row, len), y: (writable(to), len), size: [1, len], ahead: len });
    }

    /// Has `write` write a row that is computed with: `y` itself, or else `wide`, which is then
    /// rounded.
    pub fn rounded<T: Element<Wide = S::Wide>>(
        &self,
        y: &mut [T],
        wide: &mut [S::Wide],
        write: impl FnOnce(&mut [S::Wide]),
    ) {
        if let Some(y) = as_wide_mut(y) {
            return write(y);
        }
        let wide = &mut wide[..y.len()];
        write(wide);
        self.narrow(wide, y);
    }

    /// Makes of results of some channels what their readers will, if this pass does so.
    ///
    /// # Safety
    /// As for [`Pass::apply_epilogue`].
    pub unsafe fn apply_view(&self, value: usize, channels: Range<usize>, len: usize, (rows, pitch): Results<S::Wide>) {
        let Some(view) = self.program.values[value].view.as_ref().filter(|_| self.stores_views) else { return };
        let activation = view.activation;
        // The norms of a convolution's value are in its weights: see [`Arguments::packed`].
        let folded = matches!(self.program.steps[value - 1].kind, Kind::Conv(_));
        let norms = view.norms[channels.clone()].iter().map(|norm| norm.filter(|_| !folded));
        let plain = norms.clone().all(|norm| norm.is_none());
        if plain && activation == Activation::Identity {
            return;
        }
        let run = |start: usize, len: usize, affine: (S::Wide, S::Wide)| {
            // SAFETY: the caller's promise.
            let row = unsafe { std::slice::from_raw_parts_mut(rows.at(start).ptr(), len) };
            (self.activate)(self.isa, activation, affine, row);
        };
        let one = (S::Wide::ONE, S::Wide::default());
        if plain && len == pitch {
            // Rows follow each other.
            return run(0, channels.len() * len, one);
        }
        for (i, norm) in norms.enumerate() {
            run(i * pitch, len, norm.map_or(one, |norm| self.affine[norm]));
        }
    }

    /// Calls `task(i, j)` for all `i < rows` and `j < columns` on this pass's threads.
    pub fn for_tasks(&self, rows: usize, columns: usize, task: impl Fn(usize, usize) + Sync) {
        parallel_for(self.threads, rows * columns, |index| task(index / columns, index % columns));
    }
}
