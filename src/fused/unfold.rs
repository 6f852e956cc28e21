//! Dense convolutions of a fused network, with any window: as pointwise convolutions of what each
//! tap sees (im2col), a tile of pixels at a time.
//!
//! ```text
//!   source rows of a tile  --unfold-->  a row for each channel and tap  --conv1x1-->  output rows
//! ```
//!
//! A tile is some rows of an image's result, or whole images where these are small. Of a tile, some
//! channels are unfolded at a time, so that what is unfolded stays in the L2 cache. The way back
//! multiplies the gradient by the transposed weights and adds what comes out to the pixels that the
//! taps saw (col2im).

use std::ops::Range;

use super::PARTS;
use super::backward::Tape;
use super::conv::{ParameterGrads, PartSums, multiply_blocks, multiply_rows};
use super::pack::Packed;
use super::pass::{Pass, Statistics};
use super::program::{Conv, Step};
use super::source::NormSums;
use crate::conv1x1::dot_nt::MatmulNt;
use crate::microkernels::conv1x1_nchw::{Init, MAX_ROWS, Output};
use crate::microkernels::dot_nt::Rows;
use crate::microkernels::reduce::Sum;
use crate::microkernels::window_pool::Span;
use crate::pool::{chunks, part};
use crate::scratch::{self, cut};
use crate::simd::element::{Element, WideElement};
use crate::simd::mul_acc::Fma;

/// Rows that are unfolded at a time, at most, but for those of one channel.
const UNFOLDED_ROWS: usize = 576;
/// Values of these rows in a tile, about: they stay in the L2 cache.
const TILE_VALUES: usize = 128 << 10;
/// Pixels of a tile, at least and at most.
const TILE_PIXELS: (usize, usize) = (64, 1024);
/// Values of all partial weight gradients together, about: more parts than this allows would take
/// longer to add up than they save.
pub(super) const PARTIAL_VALUES: usize = 8 << 20;

/// A tile: some rows of the result of some images, which follow each other in memory.
#[derive(Clone)]
struct Tile {
    images: Range<usize>,
    /// Rows of each image's result; all of them where there are several images.
    rows: Range<usize>,
}

/// A convolution's geometry.
struct Unfold<'s> {
    step: &'s Step,
    conv: &'s Conv,
    /// Height and width of the result.
    size: [usize; 2],
    /// What each pixel of the result sees along columns and rows.
    spans: [Vec<Span>; 2],
    /// Images and rows of a tile.
    tile: [usize; 2],
    /// Channels of a group that are unfolded at a time: a divisor of their number.
    together: usize,
}

impl<'s> Unfold<'s> {
    fn new(step: &'s Step, conv: &'s Conv, size: [usize; 2]) -> Self {
        let source = step.source.size();
        let fits =
            |&channels: &usize| channels * conv.taps() <= UNFOLDED_ROWS && conv.group_in.is_multiple_of(channels);
        let together = (1..=conv.group_in).rev().find(fits).unwrap_or(1);
        let pixels = (TILE_VALUES / (together * conv.taps())).clamp(TILE_PIXELS.0, TILE_PIXELS.1);
        let tile = match pixels / (size[0] * size[1]) {
            0 => [1, (pixels / size[1]).max(1)],
            images => [images, size[0]],
        };
        Self { step, conv, size, spans: [0, 1].map(|i| conv.window.spans(i, source[i], size[i])), tile, together }
    }

    /// Rows that are unfolded at a time.
    fn unfolded(&self) -> usize {
        self.together * self.conv.taps()
    }

    /// A group's channels in the sets that are unfolded at a time.
    fn sets(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        chunks(0..self.conv.group_in, self.together)
    }

    /// Parts of the images, at most `most`: whole tiles, and an even number for the threads.
    fn parts(&self, count: usize, most: usize) -> usize {
        match (count / self.tile[0]).min(most) {
            0 | 1 => 1,
            parts => parts / 2 * 2,
        }
    }

    /// Pixels of the result in the largest tile.
    fn tile_pixels(&self) -> usize {
        self.tile[0] * self.tile[1] * self.size[1]
    }

    /// The tiles of some images.
    fn tiles(&self, images: Range<usize>) -> impl Iterator<Item = Tile> {
        let (height, rows) = (self.size[0], self.tile[1]);
        chunks(images, self.tile[0])
            .flat_map(move |images| chunks(0..height, rows).map(move |rows| Tile { images: images.clone(), rows }))
    }

    /// The pixels of a tile in a row of the result.
    fn pixels(&self, tile: &Tile) -> Range<usize> {
        let [height, width] = self.size;
        let start = (tile.images.start * height + tile.rows.start) * width;
        start..start + tile.images.len() * tile.rows.len() * width
    }

    /// Rows of the source that a tile sees of each image; all of them where there are several
    /// images.
    fn source_rows(&self, tile: &Tile) -> Range<usize> {
        if tile.images.len() > 1 {
            return 0..self.step.source.height;
        }
        let spans = self.spans[0][tile.rows.clone()].iter().filter(|span| span.taps > 0);
        let start = spans.clone().map(|span| span.first).min().unwrap_or(0);
        let end = spans.map(|span| span.first + (span.taps - 1) * self.conv.window.dilation[0] + 1).max();
        start..end.unwrap_or(start)
    }

    /// Calls `body` for each run of pixels of a tile that see pixels of the source through a tap:
    /// the first pixel in the tile, the first in the source's rows of it, how many, and their
    /// distance in the source.
    fn runs(&self, tile: &Tile, [ty, tx]: [usize; 2], mut body: impl FnMut(usize, usize, usize, usize)) {
        let (window, width) = (&self.conv.window, self.size[1]);
        let [(stride, dilation), (column_stride, column_dilation)] =
            [0, 1].map(|i| (window.stride[i], window.dilation[i]));
        let (source, seen) = (self.step.source.size(), self.source_rows(tile));
        // Columns of the result whose tap is inside of the source.
        let offset = tx * column_dilation;
        let first = window.before[1].saturating_sub(offset).div_ceil(column_stride);
        let end = (source[1] + window.before[1]).saturating_sub(offset).div_ceil(column_stride).min(width);
        if first >= end {
            return;
        }
        let column = first * column_stride + offset - window.before[1];
        for (i, row) in tile.rows.clone().enumerate() {
            let Some(y) = (row * stride + ty * dilation).checked_sub(window.before[0]).filter(|&y| y < source[0])
            else {
                continue;
            };
            for image in 0..tile.images.len() {
                let to = (image * tile.rows.len() + i) * width + first;
                let from = (image * seen.len() + y - seen.start) * source[1] + column;
                body(to, from, end - first, column_stride);
            }
        }
    }

    /// Writes what each tap of some channels sees to `rows`, `pitch` apart.
    ///
    /// # Safety
    /// The values that the source reads must have been written.
    unsafe fn unfold<S: Element>(
        &self,
        pass: &Pass<'_, S>,
        channels: Range<usize>,
        tile: &Tile,
        buffer: &mut [S::Wide],
        (rows, pitch): (&mut [S::Wide], usize),
    ) {
        let source = &self.step.source;
        let (seen, len) = (self.source_rows(tile), self.pixels(tile).len());
        let start = (tile.images.start * source.height + seen.start) * source.width;
        let pixels = start..start + tile.images.len() * seen.len() * source.width;
        let mut rows = rows.chunks_exact_mut(pitch);
        for channel in channels {
            // SAFETY: the caller's promise.
            let x = unsafe { pass.load(source, channel, pixels.clone(), buffer, None) };
            for tap in self.taps() {
                let row = &mut rows.next().expect("one for each channel and tap")[..len];
                row.fill(S::Wide::default());
                self.runs(tile, tap, |to, from, count, stride| {
                    let row = &mut row[to..to + count];
                    if stride == 1 {
                        row.copy_from_slice(&x[from..from + count]);
                    } else {
                        row.iter_mut().zip(x[from..].iter().step_by(stride)).for_each(|(y, &x)| *y = x);
                    }
                });
            }
        }
    }

    /// Adds what each tap of some channels gives back to the pixels that it saw: to their planes of
    /// some images, `plane` values each, of which `first` is the first image.
    fn fold<T: WideElement>(
        &self,
        tile: &Tile,
        first: usize,
        (rows, pitch): (&[T], usize),
        (grad_x, plane): (&mut [T], usize),
    ) {
        let source = &self.step.source;
        let start = ((tile.images.start - first) * source.height + self.source_rows(tile).start) * source.width;
        let mut rows = rows.chunks_exact(pitch);
        for grad_x in grad_x.chunks_exact_mut(plane) {
            let grad_x = &mut grad_x[start..];
            for tap in self.taps() {
                let row = rows.next().expect("one for each channel and tap");
                self.runs(tile, tap, |to, from, count, stride| {
                    let row = &row[to..to + count];
                    if stride == 1 {
                        grad_x[from..from + count].iter_mut().zip(row).for_each(|(sum, &x)| *sum += x);
                    } else {
                        grad_x[from..].iter_mut().step_by(stride).zip(row).for_each(|(sum, &x)| *sum += x);
                    }
                });
            }
        }
    }

    /// The taps: row and column of each.
    fn taps(&self) -> impl Iterator<Item = [usize; 2]> + use<> {
        let [height, width] = self.conv.window.kernel;
        (0..height).flat_map(move |y| (0..width).map(move |x| [y, x]))
    }
}

/// An unfolded convolution in the forward pass.
struct Unfolded<'s, T> {
    unfold: Unfold<'s>,
    packed: &'s Packed<T>,
    /// Where unfolded rows start.
    x_offsets: Vec<usize>,
    sums: PartSums<Statistics>,
}

impl<S: Element> Pass<'_, S> {
    /// Makes the value of a convolution by unfolding, and its statistics.
    pub(super) fn unfolded(&self, step: &Step, conv: &Conv) -> Vec<Statistics> {
        let unfold = Unfold::new(step, conv, self.program.values[step.value].size());
        let (packed, pitch) = (self.weights(step), unfold.tile_pixels());
        let parts = unfold.parts(self.count, PARTS);
        let forward = Unfolded {
            packed,
            x_offsets: (0..unfold.unfolded()).map(|i| i * pitch).collect(),
            sums: PartSums::statistics(self, step.value, parts),
            unfold,
        };
        // Fewer tasks than threads: some share a group's output channels, though each has to
        // unfold.
        let sets = self.threads.div_ceil(conv.groups * parts).min(packed.blocks.len());
        self.for_tasks(conv.groups * sets, parts, |task, p| {
            let blocks = &packed.blocks[part(packed.blocks.len(), sets, task % sets)];
            forward.task(self, task / sets, blocks, part(self.count, parts, p), p);
        });
        forward.sums.merged()
    }
}

impl<T: WideElement> Unfolded<'_, T> {
    /// Some blocks of a group's output channels for some images.
    fn task<S: Element<Wide = T>>(
        &self,
        pass: &Pass<'_, S>,
        g: usize,
        blocks: &[Range<usize>],
        images: Range<usize>,
        part: usize,
    ) {
        let (unfold, group_in) = (&self.unfold, self.unfold.conv.group_in);
        let pitch = unfold.tile_pixels();
        let tile = Pass::<S>::tile_len(unfold.conv.group_out * pitch);
        let sizes = [unfold.unfolded() * pitch, unfold.step.source.pixels() * unfold.tile[0], tile];
        scratch::with(sizes.iter().sum(), |memory: &mut [T]| {
            let [x, buffer, results] = cut(memory, sizes);
            for tile in unfold.tiles(images) {
                for set in unfold.sets() {
                    let channels = g * group_in + set.start..g * group_in + set.end;
                    // SAFETY: sources are values of earlier steps.
                    unsafe { unfold.unfold(pass, channels, &tile, buffer, (&mut *x, pitch)) };
                    for block in blocks {
                        self.multiply(pass, g, block, (x, &set), &mut *results, unfold.pixels(&tile), part);
                    }
                }
            }
        });
    }

    /// Adds to a block of a group's output channels what a set of its channels makes, over the
    /// pixels of a tile.
    fn multiply<S: Element<Wide = T>>(
        &self,
        pass: &Pass<'_, S>,
        g: usize,
        block: &Range<usize>,
        (x, set): (&[T], &Range<usize>),
        tile: &mut [T],
        pixels: Range<usize>,
        part: usize,
    ) {
        let (value, conv, pitch) = (self.unfold.step.value, self.unfold.conv, self.unfold.tile_pixels());
        let (taps, first) = (conv.taps() * block.len(), g * conv.group_out);
        let channels = first + block.start..first + block.end;
        let weights = &self.packed.block(g, block)[set.start * taps..set.end * taps];
        let bias = self.packed.bias(channels.clone());
        let init = if set.start == 0 { Init::wide_bias(bias) } else { Init::Output };
        // Sums of several sets wait where they are.
        let own = tile.get_mut(block.start * pitch..).unwrap_or_default();
        let (y, pitch) = pass.results(value, channels.start, pixels.start, own, pitch);
        let y_offsets: [_; MAX_ROWS] = std::array::from_fn(|o| o * pitch);
        // SAFETY: the unfolded rows, and these pixels of the value's rows, which are the task's
        // own, as are their statistics.
        unsafe {
            let rows = (Output::Wide(y.ptr()), &y_offsets[..block.len()]);
            multiply_rows((pass.isa, Fma), (x.as_ptr(), &self.x_offsets), weights, init, rows, pixels.len(), [0; 2]);
            if set.end == conv.group_in {
                pass.apply_epilogue(value, channels.clone(), pixels, (y, pitch), self.sums.of(part, channels));
            }
        }
    }
}

/// The way back through an unfolded convolution.
struct UnfoldGrad<'s, T> {
    unfold: Unfold<'s>,
    /// The weights that bring the gradient back, for each set of channels of each group.
    packed: Packed<T>,
    /// Those of the gradient with a set's unfolded rows.
    products: MatmulNt<T, Fma>,
    grads: ParameterGrads<T>,
}

impl<S: Element> Tape<'_, '_, S> {
    /// Goes back through an unfolded convolution.
    pub(super) fn unfolded(&mut self, step: &Step, conv: &Conv) {
        let pass = self.pass;
        let unfold = Unfold::new(step, conv, pass.program.values[step.value].size());
        let (k, m, sets) = (unfold.unfolded(), conv.group_out, conv.group_in / unfold.together);
        let (weights, taps) = (pass.conv_weights(conv), conv.taps());
        let parts = unfold.parts(pass.count, PARTS.min(PARTIAL_VALUES / conv.weights()).max(2));
        let inner: Vec<_> = (0..sets * k).map(|row| conv.index(0, 0, row / taps, row % taps)).collect();
        let weight = |set, row, o| weights[conv.index(set / sets, o, 0, 0) + inner[set % sets * k + row]];
        let back = UnfoldGrad {
            packed: Packed::new(pass.isa, conv.groups * sets, k, m, weight),
            products: MatmulNt::new(pass.isa, Fma, [m, k], unfold.tile_pixels()),
            grads: ParameterGrads::new(conv, parts),
            unfold,
        };
        self.backprop_source(&step.source, conv.groups, parts, |this, g, images, p, sums| {
            back.task(this, g, images, p, sums);
        });
        back.grads.write(conv, self.grad_parameters);
    }
}

impl<T: WideElement> UnfoldGrad<'_, T> {
    /// A group's gradients over some images.
    fn task<S: Element<Wide = T>>(
        &self,
        tape: &Tape<'_, '_, S>,
        g: usize,
        images: Range<usize>,
        part: usize,
        sums: &mut [NormSums],
    ) {
        let (unfold, pass) = (&self.unfold, tape.pass);
        let (step, conv) = (unfold.step, unfold.conv);
        let (k, m, pitch) = (unfold.unfolded(), conv.group_out, unfold.tile_pixels());
        let (pixels, together) = (step.source.pixels(), unfold.tile[0]);
        let sets = conv.group_in / unfold.together;
        let sizes = [
            sets * self.products.memory(),
            k * pitch,
            m * pitch,
            if step.differentiate { k * pitch } else { 0 },
            pixels * together,
            if step.differentiate { conv.group_in * pixels * together } else { 0 },
        ];
        scratch::with(sizes.iter().sum(), |memory: &mut [T]| {
            let [weight_slots, x, grad_rows, back, buffer, grad_x] = cut(memory, sizes);
            weight_slots.fill(T::default());
            // SAFETY: sums of this part and group alone.
            let (weight_sums, bias) = unsafe { self.grads.of(part, g) };
            let mut offsets = vec![0; m];
            for images in chunks(images, together) {
                let range = images.start * pixels..images.end * pixels;
                let grad_x = &mut grad_x[..if step.differentiate { conv.group_in * range.len() } else { 0 }];
                grad_x.fill(T::default());
                for tile in unfold.tiles(images.clone()) {
                    let out = unfold.pixels(&tile);
                    // SAFETY: all that read the value come later in the program and have added
                    // their gradients.
                    let grad = unsafe {
                        tape.read_grad_rows(step.value, g * m, &out, (&mut *grad_rows, pitch), &mut [], &mut offsets)
                    };
                    if conv.bias.is_some() {
                        self.add_bias(pass, (grad, &offsets), out.len(), bias);
                    }
                    let memory = [&mut *weight_slots, x, back, buffer, grad_x];
                    self.tile(pass, g, (&tile, images.start), (grad, &offsets), memory);
                }
                if step.differentiate {
                    let (channels, grads) = (g * conv.group_in..(g + 1) * conv.group_in, (&*grad_x, range.len()));
                    // SAFETY: the group's channels and these images are this task's own.
                    unsafe { tape.accumulate_grads(&step.source, channels, &range, grads, None, None, &mut *sums) };
                }
            }
            for (index, slots) in weight_slots.chunks_exact(self.products.memory()).enumerate() {
                self.products.finish(slots, &mut weight_sums[index * k..], sets * k);
            }
        });
    }

    /// A group's gradients over a tile of images of which `first` is the first.
    fn tile<S: Element<Wide = T>>(
        &self,
        pass: &Pass<'_, S>,
        g: usize,
        (tile, first): (&Tile, usize),
        (grad, offsets): (*const T, &[usize]),
        [weight_slots, x, back, buffer, grad_x]: [&mut [T]; 5],
    ) {
        let (unfold, conv) = (&self.unfold, self.unfold.conv);
        let (pitch, len, sets) = (unfold.tile_pixels(), unfold.pixels(tile).len(), conv.group_in / unfold.together);
        let (x_offsets, plane): (Vec<_>, _) =
            ((0..unfold.unfolded()).map(|i| i * pitch).collect(), grad_x.len() / conv.group_in);
        let rows = |base, offsets| Rows { base, offsets, image_stride: 0, prefetch: 0 };
        let slots = weight_slots.chunks_exact_mut(self.products.memory());
        for ((index, set), slots) in unfold.sets().enumerate().zip(slots) {
            let channels = g * conv.group_in + set.start..g * conv.group_in + set.end;
            // SAFETY: the forward pass wrote the source's values; rows of these pixels.
            unsafe {
                unfold.unfold(pass, channels, tile, buffer, (&mut *x, pitch));
                self.products.add(rows(grad, offsets), rows(x.as_ptr(), &x_offsets[..]), [1, len], slots);
            }
            if unfold.step.differentiate {
                self.multiply(pass, g * sets + index, (grad, offsets), (&mut *back, &x_offsets), len);
                let planes = &mut grad_x[set.start * plane..set.end * plane];
                unfold.fold(tile, first, (&*back, pitch), (planes, plane));
            }
        }
    }

    /// The gradient by the bias: the sums of the gradient's rows.
    fn add_bias<S: Element<Wide = T>>(
        &self,
        pass: &Pass<'_, S>,
        (grad, offsets): (*const T, &[usize]),
        pixels: usize,
        bias: &mut [f64],
    ) {
        for (sum, &offset) in bias.iter_mut().zip(offsets) {
            // SAFETY: one of the gradient's rows.
            *sum += pass.isa.run(Sum(unsafe { std::slice::from_raw_parts(grad.add(offset), pixels) }));
        }
    }

    /// The gradient by the unfolded rows of a set of channels over the pixels of a tile.
    fn multiply<S: Element<Wide = T>>(
        &self,
        pass: &Pass<'_, S>,
        set: usize,
        grad: (*const T, &[usize]),
        (back, back_offsets): (&mut [T], &[usize]),
        pixels: usize,
    ) {
        let y = (back.as_mut_ptr(), back_offsets);
        // SAFETY: the gradient's rows, and rows of `back`.
        unsafe { multiply_blocks((pass.isa, Fma), grad, (&self.packed, set), &self.packed.blocks, None, y, pixels) };
    }
}
