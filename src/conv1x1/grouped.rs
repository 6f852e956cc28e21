//! How groups fill the vectors of [`crate::microkernels::grouped_nhwc`], and what each lane takes.

use std::ops::Range;

use super::plan::Groups;
use crate::microkernels::grouped_nhwc::{Block, MAX_QUADS, QUAD, Source};
use crate::simd::element::{Element, WideElement};
use crate::simd::mul_acc::MulAcc;

/// What the vectors of groups are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Count {
    /// How many there are.
    pub vectors: usize,
    /// Whether each takes its input channels from one window.
    pub windows_only: bool,
}

/// Counts the vectors of `lanes` lanes, a step taking `terms` input channels; nothing where groups
/// do not fit.
pub(super) fn count(groups: Groups, lanes: usize, terms: usize) -> Option<Count> {
    let mut count = Count { vectors: 0, windows_only: true };
    let mut start = 0;
    while start < groups.count * groups.outputs {
        let (end, window) = fill(groups, lanes, terms, start)?;
        count = Count { vectors: count.vectors + 1, windows_only: count.windows_only && window };
        start = end;
    }
    Some(count)
}

/// Where the vector that starts with output channel `start` ends, and whether its input channels
/// fit a window: as far as those of all its groups fit one vector, or whole groups with a quad or
/// more of each.
fn fill(groups: Groups, lanes: usize, terms: usize, start: usize) -> Option<(usize, bool)> {
    let Groups { count, inputs: k, outputs: m } = groups;
    // The second of a group's last step, if it has none, is a channel that is left out.
    let odd = !k.is_multiple_of(terms);
    let room = lanes * terms - usize::from(odd);
    let window = (start + lanes).min((start / m + room / k) * m);
    let whole = if k >= QUAD * terms && !odd && start.is_multiple_of(m) { start + side(lanes, m) * m } else { 0 };
    let end = window.max(whole).min(count * m);
    (end > start).then_some((end, window >= end))
}

/// Quads of a vector.
fn quads(lanes: usize) -> usize {
    (lanes / QUAD).min(MAX_QUADS)
}

/// Groups of `m` output channels in a vector that takes quads of each.
fn side(lanes: usize, m: usize) -> usize {
    (lanes / m).min(quads(lanes))
}

/// One vector of output channels.
#[derive(Debug)]
pub(super) struct Vector {
    /// The channels.
    pub columns: Range<usize>,
    /// Its sources, among those of all.
    pub sources: Range<usize>,
    /// Where its indices start among those of all.
    pub index: usize,
}

/// How `groups` groups of `k` input and `m` output channels fill vectors of output channels.
#[derive(Debug)]
pub(super) struct Grouped {
    k: usize,
    m: usize,
    lanes: usize,
    /// Input channels that a step takes: 1 or 2.
    terms: usize,
    pub vectors: Vec<Vector>,
    pub sources: Vec<Source>,
    index: Vec<u32>,
}

impl Grouped {
    /// Fills vectors of `lanes` lanes, a step taking `terms` input channels; nothing where groups
    /// do not fit. Output channels are contiguous, and so are input channels.
    pub fn new(size: Groups, lanes: usize, terms: usize) -> Option<Self> {
        let Groups { count, inputs: k, outputs: m } = size;
        let mut this = Self { k, m, lanes, terms, vectors: Vec::new(), sources: Vec::new(), index: Vec::new() };
        let mut start = 0;
        while start < count * m {
            let (end, window) = fill(size, lanes, terms, start)?;
            let first_source = this.sources.len();
            let groups = start / m..(end - 1) / m + 1;
            let index = if window { this.window(groups, start..end) } else { this.quads(groups) };
            let index = this.share(index);
            this.vectors.push(Vector { columns: start..end, sources: first_source..this.sources.len(), index });
            start = end;
        }
        Some(this)
    }

    /// A window of all input channels of some groups; gives the indices of the output channels.
    fn window(&mut self, groups: Range<usize>, columns: Range<usize>) -> Vec<u32> {
        let Self { k, m, lanes, terms, .. } = *self;
        let (first, line) = (groups.start * k, lanes * terms);
        // Neighbouring vectors may take channels from the same cache line.
        let prefetch = self.sources.last().is_none_or(|last| last.first / line != first / line);
        let steps = k.div_ceil(terms);
        self.sources.push(Source { first, block: Block::Window(groups.len() * k), steps, prefetch });
        let last = columns.end - 1;
        let lane_starts = (columns.start..columns.start + lanes).map(|c| (c.min(last) / m - groups.start) * k);
        let lane_starts: Vec<_> = lane_starts.collect();
        let mut index = Vec::with_capacity(steps * lanes);
        for step in 0..steps {
            index.extend(lane_starts.iter().map(|start| self.lane_index(start + step * terms, step)));
        }
        index
    }

    /// Quads of each of some groups, of which a vector's last ones may be absent; gives their
    /// indices.
    fn quads(&mut self, groups: Range<usize>) -> Vec<u32> {
        let Self { k, m, lanes, terms, .. } = *self;
        let side = side(lanes, m);
        let (per_group, quad_len) = (quads(lanes) / side, QUAD * terms);
        let taken = per_group * quad_len;
        let lane_starts: Vec<_> = (0..lanes).map(|lane| (lane / m).min(side - 1) * taken).collect();
        let mut index = Vec::with_capacity(k * lanes);
        for (line, start) in (0..k).step_by(taken).enumerate() {
            // The last quads end where the group ends.
            let quad_start = |quad: usize| (start + quad * quad_len).min(k - quad_len);
            let starts = std::array::from_fn(|i| {
                let group = (groups.start + i / per_group).min(groups.end - 1);
                group * k + quad_start(i % per_group)
            });
            let steps = taken.min(k - start) / terms;
            let first = groups.start * k + line * lanes * terms;
            self.sources.push(Source { first, block: Block::Quads(starts), steps, prefetch: true });
            for step in 0..steps {
                let quad = step / QUAD;
                let offset = quad * quad_len + start + step * terms - quad_start(quad);
                index.extend(lane_starts.iter().map(|lane| self.lane_index(lane + offset, step)));
            }
        }
        index
    }

    /// What one lane takes in a step, from channel `index` of the source on.
    fn lane_index(&self, index: usize, step: usize) -> u32 {
        match self.terms {
            1 => index as u32,
            // Beyond the window, where there are zeros.
            _ if (step + 1) * self.terms > self.k => index as u32 | (2 * self.lanes as u32 - 1) << 16,
            _ => index as u32 | (index as u32 + 1) << 16,
        }
    }

    /// Vectors of weights and of indices that a vector of output channels needs.
    fn steps(&self) -> usize {
        self.k.div_ceil(self.terms)
    }

    /// Where indices start, which the vector before may have too.
    fn share(&mut self, index: Vec<u32>) -> usize {
        if !self.index.ends_with(&index) {
            self.index.extend_from_slice(&index);
        }
        self.index.len() - index.len()
    }

    /// A vector's indices.
    pub fn index(&self, vector: &Vector) -> &[u32] {
        &self.index[vector.index..][..self.steps() * self.lanes]
    }

    /// How many weights [`Grouped::pack`] writes.
    pub fn weights(&self) -> usize {
        self.vectors.len() * self.steps() * self.lanes
    }

    /// Each vector's weights for each step; those of group `g`, output channel `o` and input
    /// channel `i` are `weight(g, o, i)`.
    pub fn pack<T: Element, M: MulAcc<T>>(
        &self,
        mul_acc: M,
        weight: impl Fn(usize, usize, usize) -> T,
        packed: &mut [T::Wide],
    ) {
        packed.fill(T::Wide::default());
        for (vector, packed) in self.vectors.iter().zip(packed.chunks_exact_mut(self.steps() * self.lanes)) {
            for (lane, [g, o]) in self.channels(vector).enumerate() {
                for (step, packed) in packed[lane..].iter_mut().step_by(self.lanes).enumerate() {
                    let i = step * M::TERMS;
                    let second = M::TERMS > 1 && i + 1 < self.k;
                    *packed = mul_acc.pack(weight(g, o, i), second.then(|| weight(g, o, i + 1)));
                }
            }
        }
    }

    /// The group of each of a vector's channels, and its number there.
    fn channels(&self, vector: &Vector) -> impl Iterator<Item = [usize; 2]> + use<> {
        let (m, start) = (self.m, vector.columns.start);
        (start / m..).flat_map(move |g| (0..m).map(move |o| [g, o])).skip(start % m).take(vector.columns.len())
    }

    /// Calls `write` with a vector's sums, of which there are as many as weights, and their
    /// indices: `[output channel][input channel]`, or the other way round within each group.
    pub fn unpack<T: WideElement>(&self, vector: &Vector, sums: &[T], by_input: bool, write: impl Fn(usize, T)) {
        let [input, output] = if by_input { [self.m, 1] } else { [1, self.k] };
        for (lane, [g, o]) in self.channels(vector).enumerate() {
            for (i, &sum) in sums[lane..].iter().step_by(self.lanes).enumerate() {
                write(g * self.m * self.k + i * input + o * output, sum);
            }
        }
    }
}
