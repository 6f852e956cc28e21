//! Plans: how an operation is computed, as a value that can be printed, forced and tested.
//!
//! Each operation has one table of [`Candidate`]s for each layout and direction. The cheapest
//! candidate that applies is the plan ([`choose`]), unless one is forced: by [`with_algorithm`] in
//! Rust, by `kconv._kconv.force_algorithm` in Python. Tests run every candidate that applies.

use std::cell::RefCell;
use std::fmt::Debug;

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
    /// How many products one instruction adds to a sum: 2 with AVX512-BF16, else 1.
    pub terms: usize,
    /// Bytes of a value as it is stored.
    pub bytes: usize,
    /// Bytes of a value as it is computed with.
    pub wide_bytes: usize,
}

impl Caps {
    /// Those of an instruction set for values of type `T`.
    pub fn new<T: Element>(isa: IsaKind) -> Self {
        Self {
            isa,
            lanes: lanes::<T::Wide>(isa),
            permute: has_permute::<T>(isa),
            terms: if T::bf16_dot(isa).is_some() { 2 } else { 1 },
            bytes: size_of::<T>(),
            wide_bytes: size_of::<T::Wide>(),
        }
    }
}

/// An algorithm for problems of type `P`.
pub struct Candidate<P, A> {
    /// Which one.
    pub algorithm: A,
    /// Whether it can compute a problem at all.
    pub applies: fn(&P, &Caps) -> bool,
    /// What it costs, in multiply-adds of vectors.
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

thread_local! {
    static FORCED: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Makes this thread's calls take the algorithm of this name, or choose again with `None`; returns
/// the name that was forced before. Calls whose tables do not offer it panic, naming it.
pub fn force(algorithm: Option<String>) -> Option<String> {
    FORCED.replace(algorithm)
}

/// Calls `body` with an algorithm forced on this thread's calls.
pub fn with_algorithm<R>(algorithm: impl Debug, body: impl FnOnce() -> R) -> R {
    struct Restore(Option<String>);
    impl Drop for Restore {
        fn drop(&mut self) {
            force(self.0.take());
        }
    }
    let _restore = Restore(force(Some(format!("{algorithm:?}"))));
    body()
}

/// The forced candidate of a table, or else the cheapest that applies.
///
/// # Panics
/// If the forced one is none of the table's, or does not apply.
pub fn choose<P: Debug, A: Copy + Debug>(table: &[Candidate<P, A>], problem: &P, caps: &Caps) -> (A, f64) {
    let found = FORCED.with_borrow(|forced| match forced {
        None => cheapest(applicable(table, problem, caps)),
        Some(name) => {
            let found = applicable(table, problem, caps).find(|(algorithm, _)| format!("{algorithm:?}") == *name);
            Some(found.unwrap_or_else(|| panic!("algorithm={name:?} does not apply to {problem:?}")))
        }
    });
    found.unwrap_or_else(|| panic!("no algorithm for {problem:?}"))
}

/// One of the ways to compute an operation's problems.
pub trait Algorithm: Copy + Debug + PartialEq + 'static {
    /// What its costs are counted in.
    const UNIT: &'static str;

    /// The files of `src/microkernels` whose kernels it runs.
    fn kernel(self) -> &'static str;
}

/// A problem whose algorithms stand in a table.
pub trait Tabled: Debug + Sized + 'static {
    /// The operation's algorithms.
    type Algorithm: Algorithm;

    /// The table of its layout and direction.
    fn candidates(&self) -> &'static [Candidate<Self, Self::Algorithm>];
}

/// How a problem is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan<A> {
    /// The algorithm.
    pub algorithm: A,
    /// What it costs, in the algorithms' [unit](Algorithm::UNIT).
    pub cost: f64,
}

impl<A: Algorithm> Plan<A> {
    /// The cheapest of the algorithms that apply, unless one is [forced](with_algorithm).
    pub fn choose<P: Tabled<Algorithm = A>>(problem: &P, caps: &Caps) -> Self {
        let (algorithm, cost) = choose(problem.candidates(), problem, caps);
        Self { algorithm, cost }
    }

    /// Every algorithm that applies.
    pub fn all<P: Tabled<Algorithm = A>>(problem: &P, caps: &Caps) -> Vec<Self> {
        let applicable = applicable(problem.candidates(), problem, caps);
        applicable.map(|(algorithm, cost)| Self { algorithm, cost }).collect()
    }

    /// The choice in one line.
    pub fn explain(&self) -> String {
        let Self { algorithm, cost } = self;
        format!("{algorithm:?} ({}), {cost:.2} {}", algorithm.kernel(), A::UNIT)
    }
}

/// A candidate for a problem, as `kconv.explain` returns it.
#[derive(Clone, Debug, PartialEq)]
pub struct Explained {
    /// The algorithm's name.
    pub algorithm: String,
    /// Whether its kernel takes the problem.
    pub applies: bool,
    /// What it costs, in vectors of multiply-adds, where it applies.
    pub cost: Option<f64>,
    /// Whether it is what a call runs.
    pub chosen: bool,
    /// The files of its microkernels, and what they are given.
    pub detail: String,
}

/// All candidates of a table for a problem, in the table's order.
pub fn explained<P: Debug, A: Copy + PartialEq + Debug>(
    table: &[Candidate<P, A>],
    problem: &P,
    caps: &Caps,
    detail: impl Fn(A) -> String,
) -> Vec<Explained> {
    let (chosen, _) = choose(table, problem, caps);
    let explained = |candidate: &Candidate<P, A>| {
        let applies = (candidate.applies)(problem, caps);
        Explained {
            algorithm: format!("{:?}", candidate.algorithm),
            applies,
            cost: applies.then(|| (candidate.cost)(problem, caps)),
            chosen: candidate.algorithm == chosen,
            detail: detail(candidate.algorithm),
        }
    };
    table.iter().map(explained).collect()
}
