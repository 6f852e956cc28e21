//! How NHWC images are divided into the strips of [`kernels::strips`](crate::microkernels::dwconv_nhwc).

use std::ops::Range;

use super::polyphase::{Phase, most_pixels};
use crate::microkernels::dwconv_nhwc::{ROWS, Window};

/// The results of vertical and horizontal phases of an image, in bands: a strip of each pair of phases.
#[derive(Clone, Copy)]
pub(crate) struct Strips<'a> {
    vertical: &'a [Phase],
    horizontal: &'a [Phase],
    /// Columns of the results of all phases, and channels.
    width: usize,
    channels: usize,
}

impl<'a> Strips<'a> {
    /// Those of results of so many columns and channels.
    pub(crate) fn new(phases: [&'a [Phase]; 2], [width, channels]: [usize; 2]) -> Self {
        Self { vertical: phases[0], horizontal: phases[1], width, channels }
    }

    /// The pairs of phases.
    pub(crate) fn pairs(self) -> impl Iterator<Item = (&'a Phase, &'a Phase)> {
        self.vertical
            .iter()
            .flat_map(move |vertical| self.horizontal.iter().map(move |horizontal| (vertical, horizontal)))
    }

    /// Rows of a phase's results in a band: all phases' together are as many as a strip of one. (Two strips a band: 12.2 ms of a
    /// thread become 13.3, four 17.8: what was asked for does not wait in the L2 cache that long.)
    fn band_rows(self) -> usize {
        ROWS / self.vertical[0].out_step
    }

    /// How many bands an image has.
    pub(crate) fn bands(self) -> usize {
        most_pixels(self.vertical).div_ceil(self.band_rows())
    }

    /// The rows of a phase's results in a band.
    pub(crate) fn rows(self, band: usize, phase: &Phase) -> Range<usize> {
        let [start, end] = [band, band + 1].map(|band| (band * self.band_rows()).min(phase.count));
        start..end
    }

    /// What to ask for during a band: where the next band's rows begin in an image and in its results.
    pub(crate) fn ahead<T>(self, band: usize, [x, y]: [*const T; 2]) -> [*const T; 2] {
        let (row, phase) = ((band + 1) * self.band_rows(), &self.vertical[0]);
        let x_row = self.horizontal[0].input * self.channels;
        [x.wrapping_add(phase.in_step * row * x_row), y.wrapping_add(phase.out_step * row * self.width * self.channels)]
    }

    /// What the results of a pair of phases see of an image, from a row of them on.
    pub(crate) fn window<'x, T>(self, x: &'x [T], pair: (&Phase, &Phase), row: usize, asks: usize) -> Window<'x, T> {
        let (vertical, horizontal) = pair;
        let step = vertical.in_step;
        Window {
            x,
            size: [vertical.input, horizontal.input],
            channels: self.channels,
            start: [vertical.span().0 + (step * row) as isize, horizontal.span().0],
            step,
            taps: [vertical.taps.len(), horizontal.taps.len()],
            asks,
        }
    }

    /// Where the first of a pair of phases' results from a row of them on stands in an image's, and the distances of their rows
    /// and columns.
    pub(crate) fn results(self, (vertical, horizontal): (&Phase, &Phase), row: usize) -> (usize, [usize; 2]) {
        let [y, x] = [vertical.first + vertical.out_step * row, horizontal.first];
        let strides = [vertical.out_step * self.width, horizontal.out_step].map(|pixels| pixels * self.channels);
        ((y * self.width + x) * self.channels, strides)
    }
}
