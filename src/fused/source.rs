//! Reading a step's source, and adding its gradient to those of the values it was read from: where
//! batch norms, activations, gates, masks, sums and permutations of channels are computed, a row at
//! a time.

use std::ops::Range;

use super::backward::Tape;
use super::pass::{Pass, is_stored};
use super::program::{Row, Source};
use crate::microkernels::activations::Activation;
use crate::microkernels::norm_act::{Activate, ActivateGrad, Factors, Kept, MeanGrad, NormGrad};
use crate::simd::element::{Element, is_wide};

/// Sums of one row of a source over some pixels: the gradients by its norm's beta and gamma.
pub(super) type NormSums = [f64; 2];

impl<S: Element> Pass<'_, S> {
    /// The source's channel over some pixels: the value's own memory where that is all it is and it
    /// is stored as it is computed with, else written to `buffer`; and to `slopes` the derivatives
    /// of each of its rows' activations, one row after the other.
    ///
    /// # Safety
    /// The values that the source reads must have been written, and not be written while the result
    /// is in use.
    pub(super) unsafe fn load<'b>(
        &'b self,
        source: &Source,
        channel: usize,
        pixels: Range<usize>,
        buffer: &'b mut [S::Wide],
        slopes: Option<&mut [S::Wide]>,
    ) -> &'b [S::Wide] {
        let rows = source.channel(channel);
        match rows {
            // SAFETY: the caller's promise.
            [row] if self.plain(row) => unsafe {
                S::widened(self.isa, self.row(row.value, row.channel, pixels), buffer)
            },
            _ => {
                let buffer = &mut buffer[..pixels.len()];
                // SAFETY: the caller's promise.
                unsafe { self.fill(source, channel, pixels, buffer, slopes) };
                buffer
            }
        }
    }

    /// Some of the source's channels over some pixels, as [`Pass::load`] gives one: from the first
    /// channel's on, and the distance from one channel to the next.
    ///
    /// # Safety
    /// As for [`Pass::load`].
    pub(super) unsafe fn load_channels<'b>(
        &'b self,
        source: &Source,
        channels: Range<usize>,
        pixels: &Range<usize>,
        buffer: &'b mut [S::Wide],
    ) -> (&'b [S::Wide], usize) {
        let rows = &source.rows[source.starts[channels.start]..source.starts[channels.end]];
        let (first, len) = (&rows[0], pixels.len());
        let step = rows.get(1).map_or(Some(0), |row| row.channel.checked_sub(first.channel));
        let regular = |(i, row): (usize, &Row)| {
            self.plain(row)
                && row.value == first.value
                && step.is_some_and(|step| row.channel == first.channel + i * step)
        };
        if rows.len() == channels.len() && rows.iter().enumerate().all(regular) {
            let step = step.unwrap_or(0) * self.row_len(first.value);
            let all = pixels.start..pixels.end + (channels.len() - 1) * step;
            // SAFETY: the caller's promise; the last row is inside the value.
            if let Some(own) = S::as_wide(unsafe { self.row(first.value, first.channel, all) }) {
                return (own, step);
            }
        }
        let buffer = &mut buffer[..channels.len() * len];
        for (channel, y) in channels.zip(buffer.chunks_exact_mut(len)) {
            // SAFETY: the caller's promise.
            unsafe { self.fill(source, channel, pixels.clone(), y, None) };
        }
        (buffer, len)
    }

    /// Whether the derivatives of a row's activation are worth keeping from when it is read to when
    /// its gradient is added.
    fn keeps(&self, row: &Row) -> bool {
        row.activation != Activation::Identity && !self.is_applied(row)
    }

    /// Rows of a source's channels over some pixels, `tile` apart in `buffer` unless they are all
    /// values' own memory: the start of what `offsets` count from. Derivatives go to `slopes`
    /// likewise; where rows in the buffer are rounded, they come from those of `wide`, as far
    /// apart as that says (0: all in turns from the same memory).
    ///
    /// # Safety
    /// As for [`Pass::load`].
    pub(super) unsafe fn load_rows<T: Element<Wide = S::Wide>>(
        &self,
        source: &Source,
        first: usize,
        pixels: &Range<usize>,
        (buffer, tile): (&mut [T], usize),
        (wide, pitch): (&mut [S::Wide], usize),
        offsets: &mut [usize],
        mut slopes: Option<&mut [S::Wide]>,
    ) -> *const T {
        let bounds = &source.starts[first..=first + offsets.len()];
        let rows = &source.rows[bounds[0]..bounds[offsets.len()]];
        let own = |row: &Row| self.plain(row) && self.is_recomputed(row.value) == self.is_recomputed(rows[0].value);
        if is_stored::<S, T>() && rows.len() == offsets.len() && rows.iter().all(own) {
            return self.row_offsets(rows, pixels.start, offsets);
        }
        for (i, (offset, y)) in offsets.iter_mut().zip(buffer.chunks_exact_mut(tile)).enumerate() {
            let slopes = slopes.as_deref_mut().map(|slopes| &mut slopes[i * source.most_rows * tile..]);
            self.rounded(&mut y[..pixels.len()], wide.get_mut(i * pitch..).unwrap_or_default(), |y| {
                // SAFETY: the caller's promise.
                unsafe { self.fill(source, first + i, pixels.clone(), y, slopes) }
            });
            *offset = i * tile;
        }
        buffer.as_ptr()
    }

    /// The rows' values from a pixel on, which must be stored as `T` and in one memory: the start
    /// of what `offsets` count from.
    pub(super) fn row_offsets<T: Element<Wide = S::Wide>>(
        &self,
        rows: &[Row],
        pixel: usize,
        offsets: &mut [usize],
    ) -> *const T {
        assert!(is_stored::<S, T>());
        for (offset, row) in offsets.iter_mut().zip(rows) {
            *offset = self.offsets[row.value] + row.channel * self.row_len(row.value) + pixel;
        }
        self.memory(rows[0].value).ptr().cast()
    }

    /// The gates of a source's channels, if the source is nothing but values of one image times
    /// these: then a convolution's weights can be scaled instead of its pixels. (Not where these
    /// have to be widened: then they are as well multiplied.)
    pub(super) fn gates(&self, source: &Source) -> Option<Vec<S::Wide>> {
        let simple = |row: &Row| self.pure(row) && !self.masked(row);
        let gated = is_wide::<S>()
            && self.stores_views
            && self.count == 1
            && source.rows.len() == source.channels()
            && source.rows.iter().any(|row| row.gate.is_some())
            && source.rows.iter().all(simple);
        // SAFETY: gates are values of earlier steps, of one pixel an image.
        let stored = |(value, channel)| unsafe { self.row(value, channel, 0..1)[0].widen() };
        let gate = |row: &Row| row.gate.map_or(S::Wide::ONE, stored);
        gated.then(|| source.rows.iter().map(gate).collect())
    }

    /// Writes the source's channel over some pixels to `y`, and to `slopes` as [`Pass::load`] does.
    ///
    /// # Safety
    /// As for [`Pass::load`].
    pub(super) unsafe fn fill(
        &self,
        source: &Source,
        channel: usize,
        pixels: Range<usize>,
        y: &mut [S::Wide],
        mut slopes: Option<&mut [S::Wide]>,
    ) {
        let rows = source.channel(channel);
        let len = pixels.len();
        for (index, row) in rows.iter().enumerate() {
            // SAFETY: the caller's promise.
            let (x, factors) =
                unsafe { (self.row(row.value, row.channel, pixels.clone()), self.factors(row, source, &pixels)) };
            let slopes = slopes.as_deref_mut().filter(|_| self.keeps(row));
            self.isa.run(Activate {
                activation: if self.is_applied(row) { Activation::Identity } else { row.activation },
                x,
                affine: self.affine(row),
                factors,
                add: index > 0,
                y: &mut *y,
                slopes: slopes.map(|slopes| &mut slopes[index * len..][..len]),
            });
        }
    }

    /// Whether a row's norm and activation have been applied to what is stored.
    fn is_applied(&self, row: &Row) -> bool {
        self.stores_views && self.program.values[row.value].view.is_some()
    }

    /// Whether a row is the value's own memory.
    pub(super) fn plain(&self, row: &Row) -> bool {
        self.pure(row) && row.gate.is_none() && !self.masked(row)
    }

    /// Whether a row is the value's own memory but for gate and mask.
    fn pure(&self, row: &Row) -> bool {
        row.norm.is_none() && row.activation == Activation::Identity || self.is_applied(row)
    }

    /// Whether a row has a mask in this pass.
    fn masked(&self, row: &Row) -> bool {
        row.mask.is_some() && !self.masks.is_empty()
    }

    /// Scale and shift of a row.
    pub(super) fn affine(&self, row: &Row) -> (S::Wide, S::Wide) {
        let norm = row.norm.filter(|_| !self.is_applied(row));
        norm.map_or((S::Wide::ONE, S::Wide::default()), |norm| self.affine[norm])
    }

    /// Mean and inverse standard deviation of a row's norm.
    pub(super) fn moments(&self, row: &Row) -> (S::Wide, S::Wide) {
        row.norm.map_or_else(Default::default, |norm| self.moments[norm])
    }

    /// Gates and masks of a row over some pixels of a source.
    ///
    /// # Safety
    /// Gates must have been written, and not be written while the result is in use.
    unsafe fn factors(&self, row: &Row, source: &Source, pixels: &Range<usize>) -> Factors<'_, S> {
        let mask = row.mask.filter(|_| !self.masks.is_empty());
        if row.gate.is_none() && mask.is_none() {
            return Factors::ONE;
        }
        let image = source.pixels();
        let images = pixels.start / image..pixels.end.div_ceil(image);
        // SAFETY: the caller's promise.
        let gates = row.gate.map(|(value, channel)| unsafe { self.row(value, channel, images.clone()) });
        let masks = mask.map(|mask| &self.masks[mask * self.count..][images]);
        let sets = (gates.unwrap_or_default(), masks.unwrap_or_default());
        Factors { pixels: image, skipped: pixels.start % image, sets }
    }
}

impl<S: Element> Tape<'_, '_, S> {
    /// Adds the gradient by a source's channel over some pixels to those of the values that it was
    /// read from. `slopes` and `values` are what [`Pass::load`] wrote of them, if they are still
    /// there.
    ///
    /// # Safety
    /// No other task may add to the gradients of the same values' channels over the same images.
    pub(super) unsafe fn accumulate_grad(
        &self,
        source: &Source,
        channel: usize,
        pixels: Range<usize>,
        grad: &[S::Wide],
        slopes: Option<&[S::Wide]>,
        values: Option<&[S::Wide]>,
        sums: &mut [NormSums],
    ) {
        let rows = source.channel(channel);
        let (values, len) = (values.filter(|_| rows.len() == 1), pixels.len());
        for (index, (row, sums)) in rows.iter().zip(sums).enumerate() {
            // SAFETY: values and gates were written in the forward pass; the gradients' rows and
            // images are this task's own.
            let (x, factors, grad_x, grad_factors) = unsafe {
                let images = pixels.start / source.pixels()..pixels.end.div_ceil(source.pixels());
                (
                    self.pass.row(row.value, row.channel, pixels.clone()),
                    self.pass.factors(row, source, &pixels),
                    self.grad(row.value, row.channel, pixels.clone()),
                    row.gate.map(|(value, channel)| self.grad(value, channel, images)),
                )
            };
            let kept = slopes.filter(|_| self.pass.keeps(row)).map(|slopes| Kept {
                slopes: &slopes[index * len..][..len],
                values: values.filter(|_| row.gate.is_some()),
            });
            let result = self.pass.isa.run(ActivateGrad {
                activation: row.activation,
                x,
                affine: self.pass.affine(row),
                factors,
                grad,
                kept,
                moments: self.pass.moments(row),
                add: !row.first,
                grad_x,
                grad_factors,
            });
            sums[0] += result.grad;
            sums[1] += result.normalised;
        }
    }

    /// Rows of the gradient by a value's channels over some pixels, as [`Pass::load_rows`] gives
    /// them.
    ///
    /// # Safety
    /// As for [`Tape::read_grad`].
    pub(super) unsafe fn read_grad_rows<T: Element<Wide = S::Wide>>(
        &self,
        value: usize,
        first: usize,
        pixels: &Range<usize>,
        (buffer, tile): (&mut [T], usize),
        wide: &mut [S::Wide],
        offsets: &mut [usize],
    ) -> *const T {
        let len = self.pass.row_len(value);
        if is_stored::<S, T>() && self.is_gradient() {
            for (i, offset) in offsets.iter_mut().enumerate() {
                *offset = self.grad_row(value, first + i) * len + pixels.start;
            }
            return self.rows(value).ptr().cast();
        }
        for (i, (offset, y)) in offsets.iter_mut().zip(buffer.chunks_exact_mut(tile)).enumerate() {
            self.pass.rounded(&mut y[..pixels.len()], wide, |y| {
                // SAFETY: the caller's promise.
                unsafe { self.read_grad(value, first + i, pixels.clone(), y) };
            });
            *offset = i * tile;
        }
        buffer.as_ptr()
    }

    /// Whether the gathered gradient of the value at hand is its gradient.
    pub(super) fn is_gradient(&self) -> bool {
        self.norm_grads.is_empty() && self.mean_grads.is_empty()
    }

    /// The gradient by a value's channel over some pixels, its batch norm's statistics and its mean
    /// taken into account: the gathered gradient's own memory where there are none and it is stored
    /// as it is computed with, else written to `buffer`.
    ///
    /// # Safety
    /// [`Tape::prepare_norm_grad`] must have been called for the value.
    pub(super) unsafe fn read_grad<'b>(
        &'b self,
        value: usize,
        channel: usize,
        pixels: Range<usize>,
        buffer: &'b mut [S::Wide],
    ) -> &'b [S::Wide] {
        // SAFETY: the caller's promise: nobody writes to it any more.
        let w: &[S] = unsafe { self.grad(value, channel, pixels.clone()) };
        if self.is_gradient() {
            return S::widened(self.pass.isa, w, buffer);
        }
        let y = &mut buffer[..w.len()];
        // SAFETY: the forward pass wrote the value.
        let x = unsafe { self.pass.row(value, channel, pixels.clone()) };
        let constants = self.norm_grads.get(channel).copied().unwrap_or_default();
        let mean = self.mean_grads.get(channel * self.pass.count..).filter(|grads| !grads.is_empty()).map(|grads| {
            let (row, image) = (self.mean_row(value, channel), self.pass.program.values[value].pixels());
            let images = pixels.start / image..pixels.end.div_ceil(image);
            let factors = Factors { pixels: image, skipped: pixels.start % image, sets: (&[][..], &grads[images]) };
            MeanGrad { activation: row.activation, affine: self.pass.affine(row), factors }
        });
        self.pass.isa.run(NormGrad { w, x, constants, mean, y: &mut *y });
        y
    }

    /// What the deferred mean of a value makes of a channel of it.
    fn mean_row(&self, value: usize, channel: usize) -> &Row {
        let step = self.pass.program.values[value].mean.expect("a deferred mean");
        &self.pass.program.steps[step - 1].source.rows[channel]
    }
}
