//! Plans: how an operation is computed, as a value that can be printed, forced and tested.
//!
//! Each operation has one table of [`Candidate`]s for each layout and direction. The cheapest
//! candidate that applies is the plan; tests run every candidate that applies.

use std::fmt::{Debug, Display, Write};

use crate::simd::IsaKind;
use crate::simd::element::{Element, has_permute, lanes};

/// What an operation computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The output.
    Forward,
    /// The gradient with respect to the input.
    GradInput,
    /// The gradient with respect to the weights.
    GradWeight,
}

/// What the processor can do with a type of numbers.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    /// The instruction set.
    pub isa: IsaKind,
    /// Values of a vector.
    pub lanes: usize,
    /// Whether there is an instruction that permutes a vector's values.
    pub permute: bool,
}

impl Caps {
    /// Those of an instruction set for values of type `T`.
    pub fn new<T: Element>(isa: IsaKind) -> Self {
        Self { isa, lanes: lanes::<T::Wide>(isa), permute: has_permute::<T>(isa) }
    }
}

/// One way to compute problems of type `P`.
pub struct Candidate<P, A> {
    /// Which one.
    pub algorithm: A,
    /// Whether it can compute a problem at all.
    pub applies: fn(&P, &Caps) -> bool,
    /// What it costs: the time of so many multiply-adds of vectors.
    pub cost: fn(&P, &Caps) -> f64,
}

/// The candidates that apply to a problem, with their costs, in the table's order.
pub fn applicable<P, A: Copy>(table: &[Candidate<P, A>], problem: &P, caps: &Caps) -> impl Iterator<Item = (A, f64)> {
    let applies = |candidate: &&Candidate<P, A>| (candidate.applies)(problem, caps);
    table.iter().filter(applies).map(|candidate| (candidate.algorithm, (candidate.cost)(problem, caps)))
}

/// The cheapest of some candidates, the first of those that cost the same.
pub fn cheapest<A>(candidates: impl Iterator<Item = (A, f64)>) -> Option<(A, f64)> {
    candidates.reduce(|best, next| if next.1 < best.1 { next } else { best })
}

/// A table of all candidates for a problem, the chosen one marked: what `kconv.explain` prints.
pub fn explain<P: Display, A: Copy + PartialEq + Debug>(
    table: &[Candidate<P, A>],
    problem: &P,
    caps: &Caps,
    chosen: A,
) -> String {
    let mut text = format!("{problem} ({}, vectors of {})\n", caps.isa.name(), caps.lanes);
    for candidate in table {
        let mark = if candidate.algorithm == chosen { '*' } else { ' ' };
        let cost = if (candidate.applies)(problem, caps) {
            format!("{:.0} vector multiply-adds", (candidate.cost)(problem, caps))
        } else {
            "does not apply".into()
        };
        let name = format!("{:?}", candidate.algorithm);
        // Writing to a string does not fail.
        _ = writeln!(text, "{mark} {name:<12} {cost}");
    }
    text
}
