//! The forward pass in training, and the steps that are no convolutions.

use std::mem::MaybeUninit;

use super::Arguments;
use super::pass::{Pass, Statistics};
use super::program::{Kind, Step, timed};
use crate::dwconv::nchw::planes_together;
use crate::memory;
use crate::microkernels::norm_act::ActivateMeans;
use crate::microkernels::reduce::Sum;
use crate::parallel::Shared;
use crate::pool::{num_threads, part};
use crate::scratch::{self, cut};
use crate::simd::element::Element;

/// Values of a row that a task works on at a time: a tile of all of a group's rows stays in the L1
/// or L2 cache.
pub(super) const ROW_TILE: usize = 1024;

/// Forward with all that [`backward`](super::backward) needs: the output from the input `x`.
/// Without images the batch's statistics are zeros.
///
/// * `given`: statistics to normalise with (means and variances of all norms' channels), else the
///   batch's own.
/// * `statistics`: the statistics that were used, the batch's variances biased.
/// * `workspace`: receives what [`backward`](super::backward) needs.
pub fn forward<S: Element>(
    arguments: &Arguments<'_, S::Wide>,
    x: &[S],
    given: Option<&[S::Wide]>,
    y: &mut [MaybeUninit<S>],
    statistics: &mut [MaybeUninit<S::Wide>],
    workspace: &mut [MaybeUninit<S>],
) {
    let program = arguments.program;
    let channels = program.norm_channels();
    assert_eq!(statistics.len(), 2 * channels);
    assert_eq!(Ok(workspace.len()), program.workspace_len(arguments.count));
    if arguments.count == 0 {
        for (i, to) in statistics.iter_mut().enumerate() {
            to.write(given.map_or(S::Wide::default(), |given| given[i]));
        }
        return;
    }
    let weights = arguments.packed_for::<S>();
    let mut pass = Pass::new(arguments, Shared::new(workspace), &program.kept, num_threads());
    (pass.packed, pass.recomputed) = (&weights, &program.recomputed);
    pass.clear_gaps();
    memory::with(program.inner.len * arguments.count, |inner| {
        pass.inner = Shared::new(inner);
        pass.import(0, pass.rows(0), x);
        if let Some(given) = given {
            pass.fix_statistics(given);
            program.steps.iter().for_each(|step| _ = pass.step(step));
            statistics.iter_mut().zip(given).for_each(|(to, &from)| _ = to.write(from));
        } else {
            pass.steps_and_statistics(statistics);
        }
        pass.export(program.output, pass.rows(program.output), y);
    });
}

impl<S: Element> Pass<'_, S> {
    /// Makes all values, with the batch's statistics.
    fn steps_and_statistics(&mut self, statistics: &mut [MaybeUninit<S::Wide>]) {
        let channels = self.program.norm_channels();
        let mut found = vec![(0.0, 0.0, 0.0); channels];
        self.normalise(0, None, &mut found);
        for step in &self.program.steps {
            let sums = self.step(step);
            self.normalise(step.value, sums, &mut found);
        }
        let (means, variances) = statistics.split_at_mut(channels);
        for ((mean, variance), (count, average, squares)) in means.iter_mut().zip(variances).zip(found) {
            mean.write(S::Wide::from_f64(average));
            variance.write(S::Wide::from_f64(squares / count));
        }
    }

    /// Makes a step's value; with the statistics of its channels where they are wanted and come for
    /// free.
    pub(super) fn step(&self, step: &Step) -> Option<Vec<Statistics>> {
        let pixels = self.program.values[step.value].pixels();
        timed(&self.program.clocks[step.value - 1].forward, || {
            match &step.kind {
                Kind::Conv(conv) if conv.pointwise() => return Some(self.pointwise(step, conv)),
                Kind::Conv(conv) if conv.depthwise() => return Some(self.depthwise(step, conv)),
                Kind::Conv(conv) if conv.is_unfolded(pixels) => return Some(self.unfolded(step, conv)),
                Kind::Conv(conv) => return Some(self.spatial(step, conv)),
                Kind::Copy => self.copy(step),
                Kind::Mean => self.mean(step),
                Kind::Pool(pool) => self.pool(step, pool),
            }
            None
        })
    }

    fn copy(&self, step: &Step) {
        if self.is_single(step.value) {
            return self.copy_single(step);
        }
        let len = self.row_len(step.value);
        let (parts, size) = tiles(len);
        self.for_tasks(step.source.channels(), parts, |c, p| {
            let pixels = p * size..((p + 1) * size).min(len);
            scratch::with(Self::tile_len(size), |tile: &mut [S::Wide]| {
                let results = self.results(step.value, c, pixels.start, tile, size);
                // SAFETY: these pixels of row c are this task's own; sources are earlier values.
                unsafe {
                    let y = std::slice::from_raw_parts_mut(results.0.ptr(), pixels.len());
                    self.fill(&step.source, c, pixels.clone(), y, None);
                    self.store(step.value, c..c + 1, pixels, results);
                }
            });
        });
    }

    fn mean(&self, step: &Step) {
        let (pixels, channels, count) = (step.source.pixels(), step.source.channels(), self.count);
        let deferred = !self.stores_views && self.program.values[step.value].kept_rows > 1;
        let mean = |c: usize, means: &mut [S::Wide], buffer: &mut [S::Wide]| {
            for (n, mean) in means.iter_mut().enumerate() {
                // SAFETY: sources are earlier values.
                let row = unsafe { self.load(&step.source, c, n * pixels..(n + 1) * pixels, buffer, None) };
                *mean = S::Wide::from_f64(self.isa.run(Sum(row)) / pixels as f64);
            }
        };
        let means_and_slopes = |c: usize, means: &mut [S::Wide], slopes: &mut [S::Wide]| {
            let (row, (slopes, normalised)) = (&step.source.rows[c], slopes.split_at_mut(count));
            // SAFETY: sources are earlier values.
            let x = unsafe { self.row(row.value, row.channel, 0..count * pixels) };
            let (activation, affine, moments) = (row.activation, self.affine(row), self.moments(row));
            self.isa.run(ActivateMeans { activation, x, affine, moments, means, slopes: [slopes, normalised] });
        };
        let channel = |c: usize| {
            scratch::with(3 * count + pixels, |memory: &mut [S::Wide]| {
                let [means, slopes, buffer] = cut(memory, [count, 2 * count, pixels]);
                if deferred {
                    means_and_slopes(c, means, slopes)
                } else {
                    mean(c, means, buffer)
                }
                // SAFETY: row c of the value and those of its slopes are this task's own.
                unsafe {
                    for (set, slopes) in slopes.chunks_exact(count).enumerate().filter(|_| deferred) {
                        self.narrow(slopes, self.row_mut(step.value, (set + 1) * channels + c, 0..count));
                    }
                    self.apply_view(step.value, c..c + 1, count, (Shared(means.as_mut_ptr()), count));
                    self.narrow(means, self.row_mut(step.value, c, 0..count));
                }
            });
        };
        let together = planes_together(self.count * pixels, channels.div_ceil(self.threads));
        let tasks = channels.div_ceil(together);
        self.for_tasks(tasks, 1, |task, _| part(channels, tasks, task).for_each(channel));
    }
}

/// Rows of `len` values in tiles: their number and size.
fn tiles(len: usize) -> (usize, usize) {
    let parts = len.div_ceil(16 * ROW_TILE).max(1);
    (parts, len.div_ceil(parts))
}
