//! Which channels stand side by side in the vectors of [`crate::microkernels::side_by_side`], and what each lane picks.

use std::ops::Range;

use crate::microkernels::side_by_side::{Block, MAX_PIECES, PIECE, Source};
use crate::simd::element::{Element, WideElement};
use crate::simd::mul_acc::MulAcc;

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
    /// Input channels that a step takes: 1 or 2.
    terms: usize,
    pub vectors: Vec<Vector>,
    pub sources: Vec<Source>,
    index: Vec<u32>,
}

impl SideBySide {
    /// Fills vectors of `lanes` lanes, a step taking `terms` input channels; nothing where groups do not fit. Output channels
    /// are contiguous, and so are input channels.
    pub fn new([groups, k, m]: [usize; 3], lanes: usize, terms: usize) -> Option<Self> {
        let pieces = (lanes / PIECE).min(MAX_PIECES);
        let mut this = Self { k, m, lanes, terms, vectors: Vec::new(), sources: Vec::new(), index: Vec::new() };
        // Input channels of a vector. The second of a group's last step, if it has none, is one that is left out.
        let odd = !k.is_multiple_of(terms);
        let room = lanes * terms - usize::from(odd);
        let mut start = 0;
        while start < groups * m {
            let group = start / m;
            // As far as the groups' input channels fit one vector; or whole groups of which each has a piece or more.
            let window = (start + lanes).min((group + room / k) * m);
            let side = (lanes / m).min(pieces);
            let whole = if k >= PIECE * terms && !odd && start.is_multiple_of(m) { start + side * m } else { 0 };
            let end = window.max(whole).min(groups * m);
            if end <= start {
                return None;
            }
            let first_source = this.sources.len();
            let groups = group..(end - 1) / m + 1;
            let index = if window >= end {
                let (first, len) = (group * k, groups.len() * k);
                // Neighbouring vectors may pick from the same cache line.
                let ask =
                    this.sources.last().is_none_or(|last| last.first / (lanes * terms) != first / (lanes * terms));
                let steps = k.div_ceil(terms);
                this.sources.push(Source { first, block: Block::Window(len), steps, ask });
                let own: Vec<_> = (start..start + lanes).map(|c| (c.min(end - 1) / m - group) * k).collect();
                let (this, own) = (&this, &own);
                (0..steps).flat_map(|step| own.iter().map(move |own| this.places(own + step * terms, step))).collect()
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
        let Self { k, m, lanes, terms, .. } = *self;
        let piece_len = PIECE * terms;
        let taken = per_group * piece_len;
        let own: Vec<_> = (0..lanes).map(|lane| (lane / m).min(side - 1) * taken).collect();
        let mut index = Vec::with_capacity(k * lanes);
        for (line, start) in (0..k).step_by(taken).enumerate() {
            // The last pieces end where the group ends.
            let place = |piece: usize| (start + piece * piece_len).min(k - piece_len);
            let places = std::array::from_fn(|i| {
                let group = (groups.start + i / per_group).min(groups.end - 1);
                group * k + place(i % per_group)
            });
            let steps = taken.min(k - start) / terms;
            let first = groups.start * k + line * lanes * terms;
            self.sources.push(Source { first, block: Block::Pieces(places), steps, ask: true });
            for step in 0..steps {
                let piece = step / PIECE;
                let at = piece * piece_len + start + step * terms - place(piece);
                index.extend(own.iter().map(|own| self.places(own + at, step)));
            }
        }
        index
    }

    /// What one lane picks in a step, from `place` on.
    fn places(&self, place: usize, step: usize) -> u32 {
        match self.terms {
            1 => place as u32,
            // Beyond the window, where there are zeros.
            _ if (step + 1) * self.terms > self.k => place as u32 | (2 * self.lanes as u32 - 1) << 16,
            _ => place as u32 | (place as u32 + 1) << 16,
        }
    }

    /// Vectors of weights and of indices that a vector of output channels needs.
    fn steps(&self) -> usize {
        self.k.div_ceil(self.terms)
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
        &self.index[vector.index..][..self.steps() * self.lanes]
    }

    /// How many weights [`SideBySide::pack`] writes.
    pub fn weights(&self) -> usize {
        self.vectors.len() * self.steps() * self.lanes
    }

    /// Each vector's weights for each step; those of group `g`, output channel `o` and input channel `i` are
    /// `weight(g, o, i)`.
    pub fn pack<T: Element, M: MulAcc<T>>(
        &self,
        products: M,
        weight: impl Fn(usize, usize, usize) -> T,
        packed: &mut [T::Wide],
    ) {
        packed.fill(T::Wide::default());
        for (vector, packed) in self.vectors.iter().zip(packed.chunks_exact_mut(self.steps() * self.lanes)) {
            for (lane, [g, o]) in self.channels(vector).enumerate() {
                for (step, packed) in packed[lane..].iter_mut().step_by(self.lanes).enumerate() {
                    let i = step * M::TERMS;
                    let second = M::TERMS > 1 && i + 1 < self.k;
                    *packed = products.pack(weight(g, o, i), second.then(|| weight(g, o, i + 1)));
                }
            }
        }
    }

    /// The group of each of a vector's channels, and its place there.
    fn channels(&self, vector: &Vector) -> impl Iterator<Item = [usize; 2]> + use<> {
        let (m, start) = (self.m, vector.columns.start);
        (start / m..).flat_map(move |g| (0..m).map(move |o| [g, o])).skip(start % m).take(vector.columns.len())
    }

    /// Whether all sources are windows, as weight gradients need them, with few steps.
    pub fn windows(&self) -> bool {
        self.sources.iter().all(|source| matches!(source.block, Block::Window(_)))
    }

    /// Calls `write` with a vector's sums, of which there are as many as weights, and their places: `[output channel][input
    /// channel]`, or the other way round within each group.
    pub fn unpack<T: WideElement>(&self, vector: &Vector, sums: &[T], by_input: bool, write: impl Fn(usize, T)) {
        let [input, output] = if by_input { [self.m, 1] } else { [1, self.k] };
        for (lane, [g, o]) in self.channels(vector).enumerate() {
            for (i, &sum) in sums[lane..].iter().step_by(self.lanes).enumerate() {
                write(g * self.m * self.k + i * input + o * output, sum);
            }
        }
    }
}
