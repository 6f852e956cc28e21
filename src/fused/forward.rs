//! The forward pass in training, and the steps that are no convolutions.

use std::mem::MaybeUninit;

use super::Arguments;
use super::pass::{Pass, Statistics};
use super::program::{Kind, Step, timed};
use crate::dwconv::nchw::planes_together;
use crate::microkernels::norm_act::ActivateMeans;
use crate::microkernels::reduce::Sum;
use crate::parallel::Shared;
use crate::pool::{num_threads, part};
use crate::scratch;
use crate::simd::element::WideElement;

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
pub fn forward<T: WideElement>(
    arguments: &Arguments<'_, T>,
    x: &[T],
    given: Option<&[T]>,
    y: &mut [MaybeUninit<T>],
    statistics: &mut [MaybeUninit<T>],
    workspace: &mut [MaybeUninit<T>],
) {
    let program = arguments.program;
    let channels = program.norm_channels();
    assert_eq!(statistics.len(), 2 * channels);
    assert_eq!(Ok(workspace.len()), program.workspace_len(arguments.count));
    if arguments.count == 0 {
        for (i, to) in statistics.iter_mut().enumerate() {
            to.write(given.map_or(T::default(), |given| given[i]));
        }
        return;
    }
    let weights = arguments.packed(None);
    let mut pass = Pass::new(arguments, Shared::new(workspace), &program.kept, num_threads());
    pass.packed = &weights;
    pass.clear_gaps();
    pass.import(0, pass.rows(0), x);
    if let Some(given) = given {
        pass.fix_statistics(given);
        program.steps.iter().for_each(|step| _ = pass.step(step));
        statistics.iter_mut().zip(given).for_each(|(to, &from)| _ = to.write(from));
    } else {
        let mut found = vec![(0.0, 0.0, 0.0); channels];
        pass.normalise(0, None, &mut found);
        for step in &program.steps {
            let sums = pass.step(step);
            pass.normalise(step.value, sums, &mut found);
        }
        let (means, variances) = statistics.split_at_mut(channels);
        for ((mean, variance), (count, average, squares)) in means.iter_mut().zip(variances).zip(found) {
            mean.write(T::from_f64(average));
            variance.write(T::from_f64(squares / count));
        }
    }
    pass.export(program.output, pass.rows(program.output), y);
}

impl<T: WideElement> Pass<'_, T> {
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
            // SAFETY: these pixels of row c are this task's own; sources are earlier values.
            unsafe {
                self.fill(&step.source, c, pixels.clone(), self.row_mut(step.value, c, pixels.clone()), None);
                self.apply_view(step.value, c..c + 1, pixels);
            }
        });
    }

    fn mean(&self, step: &Step) {
        let (pixels, channels) = (step.source.pixels(), step.source.channels());
        let rows = self.rows(step.value);
        let deferred = !self.stores_views && self.program.values[step.value].kept_rows > 1;
        let mean = |c: usize| {
            // SAFETY: row c of the value and those of its slopes are this task's own.
            let own = |set: usize| unsafe {
                std::slice::from_raw_parts_mut(rows.ptr().add((set * channels + c) * self.count), self.count)
            };
            if deferred {
                let row = &step.source.rows[c];
                // SAFETY: sources are earlier values.
                let x = unsafe { self.row(row.value, row.channel, 0..self.count * pixels) };
                let moments = row.norm.map_or((T::default(), T::default()), |norm| self.moments[norm]);
                let (means, slopes) = (own(0), [own(1), own(2)]);
                let (activation, affine) = (row.activation, self.affine(row));
                return self.isa.run(ActivateMeans { activation, x, affine, moments, means, slopes });
            }
            scratch::with(pixels, |buffer: &mut [T]| {
                for (n, mean) in own(0).iter_mut().enumerate() {
                    // SAFETY: sources are earlier values.
                    let row = unsafe { self.load(&step.source, c, n * pixels..(n + 1) * pixels, buffer, None) };
                    *mean = T::from_f64(self.isa.run(Sum(row)) / pixels as f64);
                }
            });
            // SAFETY: just written.
            unsafe { self.apply_view(step.value, c..c + 1, 0..self.count) };
        };
        let together = planes_together(self.count * pixels, channels.div_ceil(self.threads));
        let tasks = channels.div_ceil(together);
        self.for_tasks(tasks, 1, |task, _| part(channels, tasks, task).for_each(mean));
    }
}

/// Rows of `len` values in tiles: their number and size.
fn tiles(len: usize) -> (usize, usize) {
    let parts = len.div_ceil(16 * ROW_TILE).max(1);
    (parts, len.div_ceil(parts))
}
