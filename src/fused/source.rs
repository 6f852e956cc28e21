//! Reading a step's source, and giving its gradient back: where batch norms, activations, gates, masks, sums and
//! permutations of channels are computed, a row at a time.

use std::ops::Range;

use super::program::{Row, Source};
use super::{Pass, Tape};
use crate::kernels::WideElement;
use crate::kernels::activations::Activation;
use crate::kernels::rows::{Activate, ActivateGrad, Kept, NormGrad};

/// Sums of one row of a source over some pixels: the gradients by its norm's beta and gamma.
pub(super) type NormSums = [f64; 2];

impl<T: WideElement> Pass<'_, T> {
    /// The source's channel over some pixels: the value's own memory where that is all it is, else written to `buffer`;
    /// and to `slopes` the derivatives of each of its rows' activations, one row after the other.
    ///
    /// # Safety
    /// The values that the source reads must have been written, and not be written while the result is in use.
    pub(super) unsafe fn load<'b>(
        &'b self,
        source: &Source,
        channel: usize,
        pixels: Range<usize>,
        buffer: &'b mut [T],
        slopes: Option<&mut [T]>,
    ) -> &'b [T] {
        let rows = &source.rows[source.starts[channel]..source.starts[channel + 1]];
        match rows {
            // SAFETY: the caller's promise.
            [row] if self.plain(row) => unsafe { self.row(row.value, row.channel, pixels) },
            _ => {
                let buffer = &mut buffer[..pixels.len()];
                // SAFETY: the caller's promise.
                unsafe { self.fill(source, channel, pixels, buffer, slopes) };
                buffer
            }
        }
    }

    /// Whether the derivatives of a row's activation are worth keeping from when it is read to when its gradient is given
    /// back.
    fn keeps(&self, row: &Row) -> bool {
        row.activation != Activation::Identity && !self.is_finished(row)
    }

    /// Rows of a source's channels over some pixels, `tile` apart in `buffer` unless they are all values' own memory: the
    /// start of what `offsets` count from. Derivatives go to `slopes` likewise.
    ///
    /// # Safety
    /// As for [`Pass::load`].
    pub(super) unsafe fn load_rows(
        &self,
        source: &Source,
        first: usize,
        pixels: &Range<usize>,
        buffer: &mut [T],
        tile: usize,
        offsets: &mut [usize],
        mut slopes: Option<&mut [T]>,
    ) -> *const T {
        let bounds = &source.starts[first..=first + offsets.len()];
        let rows = &source.rows[bounds[0]..bounds[offsets.len()]];
        if rows.len() == offsets.len() && rows.iter().all(|row| self.plain(row)) {
            for (offset, row) in offsets.iter_mut().zip(rows) {
                *offset = self.places[row.value] + row.channel * self.row_len(row.value) + pixels.start;
            }
            return self.start.ptr();
        }
        for (i, (offset, y)) in offsets.iter_mut().zip(buffer.chunks_exact_mut(tile)).enumerate() {
            let slopes = slopes.as_deref_mut().map(|slopes| &mut slopes[i * source.most_rows * tile..]);
            // SAFETY: the caller's promise.
            unsafe { self.fill(source, first + i, pixels.clone(), &mut y[..pixels.len()], slopes) };
            *offset = i * tile;
        }
        buffer.as_ptr()
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
        y: &mut [T],
        mut slopes: Option<&mut [T]>,
    ) {
        let rows = &source.rows[source.starts[channel]..source.starts[channel + 1]];
        let len = pixels.len();
        for (index, row) in rows.iter().enumerate() {
            for (pixels, place) in self.segments(row, source.pixels(), &pixels) {
                // SAFETY: the caller's promise.
                let x = unsafe { self.row(row.value, row.channel, pixels.clone()) };
                let slopes = slopes.as_deref_mut().filter(|_| self.keeps(row));
                self.isa.run(Activate {
                    activation: if self.is_finished(row) { Activation::Identity } else { row.activation },
                    x,
                    affine: self.affine(row),
                    factor: self.factor(row, pixels.start / source.pixels()),
                    add: index > 0,
                    y: &mut y[place..][..x.len()],
                    slopes: slopes.map(|slopes| &mut slopes[index * len + place..][..x.len()]),
                });
            }
        }
    }

    /// Pixels in parts that have one factor each, and where each part begins.
    fn segments(
        &self,
        row: &Row,
        image: usize,
        pixels: &Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, usize)> + use<T> {
        let step = if row.gate.is_some() || row.mask.is_some() { image } else { usize::MAX };
        let Range { start, end } = *pixels;
        let mut next = start;
        std::iter::from_fn(move || {
            let from = next;
            next = if step == usize::MAX { end } else { (from / step + 1) * step }.min(end);
            (from < end).then_some((from..next, from - start))
        })
    }

    /// Whether a row's norm and activation have been applied to what is stored.
    fn is_finished(&self, row: &Row) -> bool {
        self.finished && self.program.values[row.value].view.is_some()
    }

    /// Whether a row is the value's own memory.
    fn plain(&self, row: &Row) -> bool {
        let pure = row.norm.is_none() && row.activation == Activation::Identity || self.is_finished(row);
        pure && row.gate.is_none() && row.mask.is_none()
    }

    /// Scale and shift of a row.
    fn affine(&self, row: &Row) -> (T, T) {
        row.norm.filter(|_| !self.is_finished(row)).map_or((T::ONE, T::default()), |norm| self.affine[norm])
    }

    /// Gate times mask of a row in an image.
    fn factor(&self, row: &Row, image: usize) -> T {
        self.gate(row, image) * self.mask(row, image)
    }

    fn gate(&self, row: &Row, image: usize) -> T {
        match row.gate {
            // SAFETY: gates are values of earlier steps, of one pixel an image.
            Some((value, channel)) => unsafe { self.row(value, channel, image..image + 1)[0] },
            None => T::ONE,
        }
    }

    fn mask(&self, row: &Row, image: usize) -> T {
        row.mask.map_or(T::ONE, |mask| self.masks.get(mask * self.count + image).copied().unwrap_or(T::ONE))
    }
}

impl<T: WideElement> Tape<'_, '_, T> {
    /// Gives the gradient by a source's channel over some pixels to the values that it was read from. `slopes` and `values`
    /// are what [`Pass::load`] wrote of them, if they are still there.
    ///
    /// # Safety
    /// No other task may give gradients to the same values' channels over the same images.
    pub(super) unsafe fn give(
        &self,
        source: &Source,
        channel: usize,
        pixels: Range<usize>,
        grad: &[T],
        slopes: Option<&[T]>,
        values: Option<&[T]>,
        sums: &mut [NormSums],
    ) {
        let rows = &source.rows[source.starts[channel]..source.starts[channel + 1]];
        let (values, len) = (values.filter(|_| rows.len() == 1), pixels.len());
        for (index, (row, sums)) in rows.iter().zip(sums).enumerate() {
            for (pixels, place) in self.pass.segments(row, source.pixels(), &pixels) {
                let image = pixels.start / source.pixels();
                // SAFETY: the value was written in the forward pass; its gradient's row is this task's own.
                let (x, grad_x) = unsafe {
                    (
                        self.pass.row(row.value, row.channel, pixels.clone()),
                        self.grad(row.value, row.channel, pixels.clone()),
                    )
                };
                let factor = self.pass.factor(row, image);
                let usable = factor != T::default() && (row.gate.is_none() || values.is_some()) && self.pass.keeps(row);
                let kept = slopes.filter(|_| usable).map(|slopes| Kept {
                    slopes: &slopes[index * len + place..][..x.len()],
                    values: values.filter(|_| row.gate.is_some()).map(|values| &values[place..][..x.len()]),
                });
                let result = self.pass.isa.run(ActivateGrad {
                    activation: row.activation,
                    x,
                    affine: self.pass.affine(row),
                    factor,
                    grad: &grad[place..][..x.len()],
                    kept,
                    moments: row.norm.map_or((T::default(), T::default()), |norm| self.pass.moments[norm]),
                    add: !row.first,
                    grad_x,
                });
                sums[0] += result.grad;
                sums[1] += result.normalised;
                if let Some((value, channel)) = row.gate {
                    // SAFETY: one pixel of the gate's gradient; the images are this task's own.
                    let gate = unsafe { self.grad(value, channel, image..image + 1) };
                    gate[0] += T::from_f64(result.value) * self.pass.mask(row, image);
                }
            }
        }
    }

    /// Rows of the gradient by a value's channels over some pixels, as [`Pass::load_rows`] gives them.
    ///
    /// # Safety
    /// As for [`Tape::take`].
    pub(super) unsafe fn take_rows(
        &self,
        value: usize,
        first: usize,
        pixels: &Range<usize>,
        buffer: &mut [T],
        tile: usize,
        offsets: &mut [usize],
    ) -> *const T {
        let len = self.pass.row_len(value);
        if self.norm_grads.is_empty() {
            for (i, offset) in offsets.iter_mut().enumerate() {
                *offset = (first + i) * len + pixels.start;
            }
            return self.rows(value).ptr();
        }
        for (i, (offset, y)) in offsets.iter_mut().zip(buffer.chunks_exact_mut(tile)).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { self.take(value, first + i, pixels.clone(), y) };
            *offset = i * tile;
        }
        buffer.as_ptr()
    }

    /// The gradient by a value's channel over some pixels, its batch norm's statistics taken into account: the gathered
    /// gradient's own memory where there are none, else written to `buffer`.
    ///
    /// # Safety
    /// The tape must have looked at the value.
    pub(super) unsafe fn take<'b>(
        &'b self,
        value: usize,
        channel: usize,
        pixels: Range<usize>,
        buffer: &'b mut [T],
    ) -> &'b [T] {
        // SAFETY: the caller's promise: nobody writes to it any more.
        let w: &[T] = unsafe { self.grad(value, channel, pixels.clone()) };
        let Some(&constants) = self.norm_grads.get(channel) else { return w };
        let y = &mut buffer[..w.len()];
        // SAFETY: the forward pass wrote the value.
        let x = unsafe { self.pass.row(value, channel, pixels) };
        self.pass.isa.run(NormGrad { w, x, constants, y: &mut *y });
        y
    }
}
