//! Which channels stand side by side in the vectors of [`crate::kernels::side_by_side`], and what each lane picks.

use std::ops::Range;

use crate::kernels::side_by_side::{Block, MAX_PIECES, MAX_STEPS, PIECE, Source};
use crate::kernels::{Element, WideElement};

/// One vector of output channels.
#[derive(Debug)]
pub(super) struct Vector {
    /// The channels.
    pub columns: Range<usize>,
    /// Its sources, in [`SideBySide::sources`].
    pub sources: Range<usize>,
    /// The place of its indices in [`SideBySide::index`].
    pub index: usize,
}

/// How `groups` groups of `k` input and `m` output channels fill vectors of output channels.
#[derive(Debug)]
pub(super) struct SideBySide {
    k: usize,
    m: usize,
    lanes: usize,
    pub vectors: Vec<Vector>,
    pub sources: Vec<Source>,
    index: Vec<u32>,
}

impl SideBySide {
    /// Fills vectors of `lanes` lanes; nothing where groups do not fit. Output channels are contiguous, and so are input
    /// channels.
    pub fn new([groups, k, m]: [usize; 3], lanes: usize) -> Option<Self> {
        let pieces = (lanes / PIECE).min(MAX_PIECES);
        let mut this = Self { k, m, lanes, vectors: Vec::new(), sources: Vec::new(), index: Vec::new() };
        let mut start = 0;
        while start < groups * m {
            let group = start / m;
            // As far as the groups' input channels fit one vector; or whole groups of which each has a piece or more.
            let window = (start + lanes).min((group + lanes / k) * m);
            let side = (lanes / m).min(pieces);
            let whole = if k >= PIECE && start.is_multiple_of(m) { start + side * m } else { 0 };
            let end = window.max(whole).min(groups * m);
            if end <= start {
                return None;
            }
            let first_source = this.sources.len();
            let groups = group..(end - 1) / m + 1;
            let index = if window >= end {
                let (first, len) = (group * k, groups.len() * k);
                // Neighbouring vectors may pick from the same cache line.
                let ask = this.sources.last().is_none_or(|last| last.first / lanes != first / lanes);
                this.sources.push(Source { first, block: Block::Window(len), steps: k, ask });
                let first: Vec<_> = (start..start + lanes).map(|c| ((c.min(end - 1) / m - group) * k) as u32).collect();
                (0..k as u32).flat_map(|step| first.iter().map(move |first| first + step)).collect()
            } else {
                this.pieces(groups, pieces / side, side)
            };
            let index = this.share(index);
            this.vectors.push(Vector { columns: start..end, sources: first_source..this.sources.len(), index });
            start = end;
        }
        Some(this)
    }

    /// Sources of `per_group` pieces from each of `side` groups, the last of them absent where `groups` are less; gives their
    /// indices.
    fn pieces(&mut self, groups: Range<usize>, per_group: usize, side: usize) -> Vec<u32> {
        let Self { k, m, lanes, .. } = *self;
        let taken = per_group * PIECE;
        let own: Vec<_> = (0..lanes).map(|lane| (lane / m).min(side - 1) * taken).collect();
        let mut index = Vec::with_capacity(k * lanes);
        for (line, start) in (0..k).step_by(taken).enumerate() {
            // The last pieces end where the group ends.
            let place = |piece: usize| (start + piece * PIECE).min(k - PIECE);
            let places = std::array::from_fn(|i| {
                let group = (groups.start + i / per_group).min(groups.end - 1);
                group * k + place(i % per_group)
            });
            let steps = taken.min(k - start);
            let first = groups.start * k + line * lanes;
            self.sources.push(Source { first, block: Block::Pieces(places), steps, ask: true });
            for step in 0..steps {
                let piece = step / PIECE;
                let at = piece * PIECE + start + step - place(piece);
                index.extend(own.iter().map(|own| (own + at) as u32));
            }
        }
        index
    }

    /// The place of indices, which the vector before may have too.
    fn share(&mut self, index: Vec<u32>) -> usize {
        if !self.index.ends_with(&index) {
            self.index.extend_from_slice(&index);
        }
        self.index.len() - index.len()
    }

    /// A vector's indices.
    pub fn index(&self, vector: &Vector) -> &[u32] {
        &self.index[vector.index..][..self.k * self.lanes]
    }

    /// How many weights [`SideBySide::pack`] writes.
    pub fn weights(&self) -> usize {
        self.vectors.len() * self.k * self.lanes
    }

    /// Each vector's weights for each step; those of group `g`, output channel `o` and input channel `i` are
    /// `weight(g, o, i)`.
    pub fn pack<T: Element>(&self, weight: impl Fn(usize, usize, usize) -> T, packed: &mut [T::Wide]) {
        packed.fill(T::Wide::default());
        for (vector, packed) in self.vectors.iter().zip(packed.chunks_exact_mut(self.k * self.lanes)) {
            for (lane, [g, o]) in self.channels(vector).enumerate() {
                for (i, packed) in packed[lane..].iter_mut().step_by(self.lanes).enumerate() {
                    *packed = weight(g, o, i).widen();
                }
            }
        }
    }

    /// The group of each of a vector's channels, and its place there.
    fn channels(&self, vector: &Vector) -> impl Iterator<Item = [usize; 2]> + use<> {
        let (m, start) = (self.m, vector.columns.start);
        (start / m..).flat_map(move |g| (0..m).map(move |o| [g, o])).skip(start % m).take(vector.columns.len())
    }

    /// Whether weight gradients can be computed so: all sources are windows.
    pub fn windows(&self) -> bool {
        self.k <= MAX_STEPS && self.sources.iter().all(|source| matches!(source.block, Block::Window(_)))
    }

    /// Writes sums, a vector for each vector's steps, to `[output channel][input channel]`, or the other way round within
    /// each group.
    pub fn unpack<T: WideElement>(&self, sums: &[T], by_input: bool, to: &mut [T]) {
        let [input, output] = if by_input { [self.m, 1] } else { [1, self.k] };
        for (vector, sums) in self.vectors.iter().zip(sums.chunks_exact(self.k * self.lanes)) {
            for (lane, [g, o]) in self.channels(vector).enumerate() {
                for (i, &sum) in sums[lane..].iter().step_by(self.lanes).enumerate() {
                    to[g * self.m * self.k + i * input + o * output] = sum;
                }
            }
        }
    }
}
