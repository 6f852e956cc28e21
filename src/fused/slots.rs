//! Where the values of a program and their gradients stand in memory.

use std::ops::Range;

use super::program::{Kind, Program, Row, Step};

/// Offsets in memory for one image; those for more are multiples.
#[derive(Clone, Debug, Default)]
pub(super) struct Slots {
    offsets: Vec<usize>,
    pub len: usize,
}

impl Slots {
    /// Places things of these sizes and lifetimes (first and last moment) so that none that live
    /// together overlap: the largest first, each at the lowest offset that is free all its life.
    fn new(things: &[(usize, Range<usize>)]) -> Self {
        let mut order: Vec<_> = (0..things.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(things[i].0));
        let mut placed: Vec<(Range<usize>, &Range<usize>)> = Vec::new();
        let mut slots = Self { offsets: vec![0; things.len()], len: 0 };
        for i in order {
            let (size, life) = &things[i];
            if *size == 0 {
                continue;
            }
            let size = size.next_multiple_of(16);
            let together = |other: &Range<usize>| other.start <= life.end && life.start <= other.end;
            let mut taken: Vec<_> =
                placed.iter().filter(|(_, other)| together(other)).map(|(at, _)| at.clone()).collect();
            taken.sort_by_key(|at| at.start);
            let mut start = 0;
            for at in taken {
                if start + size <= at.start {
                    break;
                }
                start = start.max(at.end);
            }
            placed.push((start..start + size, life));
            slots.offsets[i] = start;
            slots.len = slots.len.max(start + size);
        }
        slots
    }

    /// The offsets for that many images.
    pub fn offsets(&self, count: usize) -> Vec<usize> {
        self.offsets.iter().map(|offset| offset * count).collect()
    }
}

impl Program {
    /// Lets the gradient of a depthwise convolution's source have the memory of that of its result,
    /// each channel's row the row of the channel that it becomes: these are the largest pairs of
    /// gradients. Returns the source.
    fn take_over(&mut self, step: usize) -> Option<usize> {
        let Step { value, kind: Kind::Conv(conv), source, differentiate: true } = &self.steps[step] else {
            return None;
        };
        let (rows, from) = (&source.rows, source.rows[0].value);
        let channels = self.values[from].channels;
        let alone = |row: &Row| row.value == from && row.first && row.gate.is_none();
        let planes = (conv.group_in, conv.group_out, source.pixels()) == (1, 1, self.values[*value].pixels());
        // Tasks read a channel's planes of some images before they write the same planes.
        let fits = [rows.len(), source.channels(), self.values[*value].channels] == [channels; 3];
        if conv.pointwise() || !planes || !fits || !rows.iter().all(alone) || from == 0 || self.values[from].zeroed {
            return None;
        }
        let mut grad_rows = vec![0; channels];
        rows.iter().enumerate().for_each(|(index, row)| grad_rows[row.channel] = index);
        let of = &self.values[*value].grad_rows;
        self.values[from].grad_rows = grad_rows.into_iter().map(|row| of.get(row).copied().unwrap_or(row)).collect();
        Some(from)
    }

    /// Finds offsets for values and gradients.
    pub(super) fn place(&mut self) {
        let count = self.values.len();
        // The last reader of each value, and whether one wants its gradient.
        let mut last: Vec<usize> = (0..count).collect();
        let mut wanted = vec![false; count];
        wanted[self.output] = true;
        wanted[0] = self.input_grad;
        for step in &self.steps {
            for row in &step.source.rows {
                for value in std::iter::once(row.value).chain(row.gate.map(|gate| gate.0)) {
                    last[value] = step.value;
                    wanted[value] |= step.differentiate;
                }
            }
        }
        last[self.output] = count;
        let mut lives: Vec<_> =
            (0..count).map(|value| value..if self.values[value].zeroed { count } else { last[value] }).collect();
        // Whose memory each value's gradient has.
        let mut owners: Vec<_> = (0..count).collect();
        for step in (0..self.steps.len()).rev() {
            if let Some(from) = self.take_over(step) {
                let owner = owners[self.steps[step].value];
                owners[from] = owner;
                lives[owner].start = from;
            }
        }
        let size = |value: usize| self.values[value].channels * self.values[value].pixels();
        let own = |value: usize| wanted[value] && owners[value] == value;
        let gradients: Vec<_> =
            (0..count).map(|value| if own(value) { (size(value), lives[value].clone()) } else { (0, 0..0) }).collect();
        let mut gradients = Slots::new(&gradients);
        gradients.offsets = owners.iter().map(|&owner| gradients.offsets[owner]).collect();
        let reused: Vec<_> = (0..count).map(|value| (size(value), value..last[value])).collect();
        (self.reused, self.gradients) = (Slots::new(&reused), gradients);
        self.place_kept(&last);
    }

    /// Places what is kept for the backward pass, and what that computes anew, a segment at a time.
    fn place_kept(&mut self, last: &[usize]) {
        let count = self.values.len();
        let all = 0..self.steps.len();
        self.segments = if self.recompute { self.best_segments(last) } else { vec![all] };
        let mut lives = vec![0..count; count];
        let mut inner = vec![false; count];
        for segment in self.segments.iter().filter(|_| self.segments.len() > 1) {
            for value in segment.start + 1..=segment.end {
                inner[value] = last[value] <= segment.end || value == self.output;
                if inner[value] {
                    lives[value] = segment.start + 1..segment.end;
                }
            }
        }
        let place = |wanted: bool| {
            let size = |value: usize| if inner[value] == wanted { self.values[value].kept() } else { 0 };
            let things: Vec<_> = (0..count).map(|value| (size(value), lives[value].clone())).collect();
            Slots::new(&things)
        };
        let (mut kept, anew) = (place(false), place(true));
        for value in (0..count).filter(|&value| inner[value]) {
            kept.offsets[value] = anew.offsets[value];
        }
        self.recomputed = if inner.contains(&true) { inner } else { Vec::new() };
        (self.kept, self.inner) = (kept, anew);
    }

    /// The segments of the steps that need the least memory: for what later ones read, and for all
    /// values of the largest.
    fn best_segments(&self, last: &[usize]) -> Vec<Range<usize>> {
        let (count, size) = (self.steps.len(), |value: usize| self.values[value].kept());
        // Values of all steps before one, and of those before that are read from there on.
        let (mut before, mut read) = (vec![0; count + 1], vec![0; count + 1]);
        for value in 1..=count {
            before[value] = before[value - 1] + size(value);
            let crossed = if value == self.output { value } else { last[value] };
            (value..crossed).for_each(|cut| read[cut] += size(value));
        }
        let needed = |parts: usize| {
            let most = before[count] / parts;
            // The least that is kept, with a cut after this many steps, and where the cut before
            // is.
            let mut kept = vec![(0, 0); count + 1];
            for cut in 1..=count {
                let starts =
                    (0..cut).rev().take_while(|&start| start + 1 == cut || before[cut] - before[start] <= most);
                let best = starts.map(|start| (kept[start].0, start)).min().unwrap_or((0, 0));
                kept[cut] = (best.0 + read[cut], best.1);
            }
            let mut cuts = vec![count];
            while let Some(&cut) = cuts.last().filter(|&&cut| cut > 0) {
                cuts.push(kept[cut].1);
            }
            let segments: Vec<_> = cuts.windows(2).rev().map(|cuts| cuts[1]..cuts[0]).collect();
            let largest = segments.iter().map(|segment| before[segment.end] - before[segment.start]).max();
            (kept[count].0 + largest.unwrap_or(0), segments)
        };
        let ways = [1, 2, 3, 4, 6, 8, 12, 16, 24].map(needed);
        ways.into_iter().min_by_key(|(memory, _)| *memory).expect("at least one").1
    }
}
