//! Rectangles of results of an NHWC image, and the [windows](Window) that they see.

use std::ops::Range;

use super::phases::{Phase, most_pixels};
use crate::isa::{Active, looks_ahead};
use crate::kernels::windows::{Results, VECTORS, Window};
use crate::kernels::{Element, lanes};
use crate::pool::chunks;

/// Bytes of a window's copy, about: with the memory that is copied and the results it is to stay in the L1 cache. (3x3 over
/// 128 channels of 28 x 28 takes 46 us with 8 KiB, 34 with 24; 5x5 at stride 2 needs as many for several rows of results.)
const COPY_SIZE: usize = 24 << 10;
/// Columns of a window, at most. (3x3 over 32 channels of 112 x 112: 0.23 ms with 60, 0.19 with 18.)
const COLUMNS: usize = 18;

/// How images are divided into rectangles of results, the same in all pairs of phases.
pub(crate) struct Windows {
    vertical: Vec<Phase>,
    horizontal: Vec<Phase>,
    /// [`Results::taps`] and [`Results::columns`] of each pair of phases.
    taps: Vec<(Vec<(usize, usize)>, usize)>,
    /// The lowest offset through which a phase sees the image, and how many pixels all offsets span.
    low: [isize; 2],
    span: [usize; 2],
    /// Pixels from what one result sees to what the next does.
    step: usize,
    /// Rows and columns of a phase's results, at most, and those of a rectangle.
    most: [usize; 2],
    size: [usize; 2],
    /// Pixels of a window's row.
    columns: usize,
    /// Values of a pixel's copy.
    copied: usize,
}

impl Windows {
    /// Those that the pixels of vertical and horizontal phases see through a kernel of `width` columns, whose taps have
    /// `channels` weights each.
    pub(crate) fn new<T: Element>(
        isa: Active,
        vertical: Vec<Phase>,
        horizontal: Vec<Phase>,
        [width, channels]: [usize; 2],
    ) -> Self {
        let phases = [&vertical, &horizontal];
        let (step, copied) = (vertical[0].in_step, VECTORS * lanes::<T::Wide>(isa));
        let offsets = phases.map(|phases| {
            let spans = phases.iter().filter(|phase| !phase.taps.is_empty()).map(Phase::span);
            let low = spans.clone().map(|(low, _)| low).min().unwrap_or(0);
            (low, spans.map(|(first, span)| (first - low) as usize + span).max().unwrap_or(0))
        });
        let (low, span) = (offsets.map(|(low, _)| low), offsets.map(|(_, span)| span));
        let most = phases.map(|phases| most_pixels(phases));
        // As many results as see so many pixels, or fewer, so that all rectangles are of about the same size.
        let evenly = |axis: usize, pixels: usize| {
            let fit = pixels.saturating_sub(span[axis] + 1) / step + 1;
            most[axis].div_ceil(most[axis].div_ceil(fit).max(1)).max(1)
        };
        let results = evenly(1, COLUMNS);
        let columns = step * (results - 1) + span[1] + 1;
        let rows = evenly(0, COPY_SIZE / (columns * copied * size_of::<T::Wide>()));
        let place = |y: isize, x: isize| (y - low[0]) as usize * columns + (x - low[1]) as usize;
        let taps = |(vertical, horizontal): (&Phase, &Phase)| {
            let mut seen = horizontal.taps.clone();
            seen.sort_unstable_by_key(|tap| tap.1);
            let neighbours = step == 1 && seen.windows(2).all(|taps| taps[0].1 + 1 == taps[1].1);
            let pairs = vertical.taps.iter().flat_map(|&y| seen.iter().map(move |&x| (y, x)));
            let taps = pairs.map(|((v, y), (h, x))| (place(y, x), (v * width + h) * channels)).collect();
            (taps, if neighbours { seen.len().max(1) } else { 1 })
        };
        let taps = vertical.iter().flat_map(|v| horizontal.iter().map(move |h| (v, h))).map(taps).collect();
        let size = [rows, results];
        Self { vertical, horizontal, taps, low, span, step, most, size, columns, copied }
    }

    /// How many rows of rectangles an image has.
    pub(crate) fn bands(&self) -> usize {
        self.most[0].div_ceil(self.size[0])
    }

    /// The rectangles of a band: rows and columns of a phase's results.
    pub(crate) fn rectangles(&self, band: usize) -> impl Iterator<Item = [Range<usize>; 2]> + use<> {
        let ([height, width], [rows, columns]) = (self.size, self.most);
        let rows = band * height..rows.min((band + 1) * height);
        chunks(0..columns, width).map(move |columns| [rows.clone(), columns])
    }

    /// What to ask for during a band: where the next band's rows begin in an image and in its results, rows being so long.
    pub(crate) fn ahead<T>(&self, band: usize, [x, y]: [*const T; 2], lens: [usize; 2]) -> [*const T; 2] {
        let rows = [self.step, self.vertical[0].out_step].map(|step| (band + 1) * step * self.size[0]);
        [x.wrapping_add(rows[0] * lens[0]), y.wrapping_add(rows[1] * lens[1])]
    }

    /// Values of temporary memory.
    pub(crate) fn memory(&self) -> usize {
        (self.step * (self.size[0] - 1) + self.span[0] + 1) * self.columns * self.copied
    }

    /// How many vectors of an image to ask for with one of results.
    pub(crate) fn asks(&self) -> usize {
        if looks_ahead() { 0 } else { self.step * self.step }
    }

    /// What a rectangle sees of an image.
    pub(crate) fn window<'a, T: Element>(
        &self,
        x: &'a [T],
        channels: usize,
        rectangle: &[Range<usize>; 2],
        copy: &'a mut [T::Wide],
    ) -> Window<'a, T> {
        let start = [0, 1].map(|axis| (self.step * rectangle[axis].start) as isize + self.low[axis]);
        let extent = [self.step * (rectangle[0].len() - 1) + self.span[0] + 1, self.columns];
        Window { x, size: [self.vertical[0].input, self.horizontal[0].input], channels, start, extent, copy }
    }

    /// A rectangle's results in each pair of phases, in images of so many columns and channels.
    pub(crate) fn results(
        &self,
        rectangle: &[Range<usize>; 2],
        width: usize,
        channels: usize,
    ) -> impl Iterator<Item = Results<'_>> {
        let sets = self.horizontal.len();
        let rectangle = rectangle.clone();
        self.taps.iter().enumerate().map(move |(i, &(ref taps, columns))| {
            let phases = [&self.vertical[i / sets], &self.horizontal[i % sets]];
            let results = [0, 1].map(|axis| {
                let [start, end] = [rectangle[axis].start, rectangle[axis].end].map(|t| t.min(phases[axis].count));
                (phases[axis].first + phases[axis].out_step * start, end - start)
            });
            Results {
                size: results.map(|(_, len)| len),
                first: (results[0].0 * width + results[1].0) * channels,
                strides: [phases[0].out_step * width * channels, phases[1].out_step * channels],
                step: self.step,
                taps,
                columns,
                // One pair of phases asks for all that the next band's results see.
                asks: if i == 0 { self.asks() } else { 0 },
            }
        })
    }
}
