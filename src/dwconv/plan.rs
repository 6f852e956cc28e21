//! Which kernel computes a depthwise convolution or one of its gradients.
//!
//! [`Plan::choose`] takes the cheapest candidate that applies, and nothing else chooses;
//! [`explain`] lists all, and [`crate::plan::with_algorithm`] forces one. `docs/ALGORITHMS.md` says
//! what was measured.
//!
//! | algorithm | microkernel | vectors hold |
//! |---|---|---|
//! | [`Algorithm::Rows`] | `dwconv_nchw.rs` | pixels of a row |
//! | [`Algorithm::RowPairs`] | the same | two rows of a narrow plane |
//! | [`Algorithm::Stride2Grad`] | `dwconv_nchw_s2_grad.rs` | pixels of one parity |
//! | [`Algorithm::Strips`] | `dwconv_nhwc.rs` | channels of a pixel |

use crate::plan::{self, Algorithm as _, Candidate, Caps, Direction, Explained, Tabled};
use crate::shape::{Axis, Depthwise, Order};

/// A way to compute a depthwise convolution or a gradient of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// NCHW planes, row by row.
    Rows,
    /// NCHW planes of which two rows fit into a vector, two rows at a time.
    RowPairs,
    /// NCHW input gradients at a stride of 2: the four parities of rows and columns together.
    Stride2Grad,
    /// NHWC images in strips of a few rows.
    Strips,
}

/// What is to be computed.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    /// The convolution.
    pub shape: Depthwise,
    /// Which result of it.
    pub direction: Direction,
}

impl plan::Algorithm for Algorithm {
    const UNIT: &'static str = "vectors of multiply-adds";

    fn kernel(self) -> &'static str {
        match self {
            Self::Rows | Self::RowPairs => "dwconv_nchw.rs",
            Self::Stride2Grad => "dwconv_nchw_s2_grad.rs",
            Self::Strips => "dwconv_nhwc.rs",
        }
    }
}

impl Algorithm {
    /// Rows of an image in a vector.
    pub(crate) fn vector_rows(self) -> usize {
        if self == Self::RowPairs { 2 } else { 1 }
    }
}

impl Tabled for Problem {
    type Algorithm = Algorithm;

    fn candidates(&self) -> &'static [Candidate<Self, Algorithm>] {
        match (self.shape.order, self.direction) {
            (Order::Nchw, Direction::Forward) => NCHW_FORWARD,
            (Order::Nchw, Direction::GradInput) => NCHW_GRAD_INPUT,
            (Order::Nchw, Direction::GradWeight) => NCHW_GRAD_WEIGHT,
            (Order::Nhwc, _) => NHWC,
        }
    }
}

impl Problem {
    /// The axes of what vectors of results run over.
    fn axes(&self) -> [Axis; 2] {
        [self.shape.vertical, self.shape.horizontal]
    }

    /// Multiply-adds of vectors where each holds `lanes` of `width` results of `rows` rows.
    fn vectors(&self, rows: usize, width: usize, lanes: usize) -> f64 {
        let Depthwise { count, channels, kernel, .. } = self.shape;
        (count * channels * kernel * kernel * rows * width.div_ceil(lanes)) as f64
    }

    /// Rows and columns of the results whose sums vectors hold: of the input, or of the output.
    fn results(&self) -> [usize; 2] {
        self.axes().map(|axis| if self.direction == Direction::GradInput { axis.input } else { axis.output })
    }
}

/// Whether `vector_rows` rows of results that see rows of the same width fit into a vector.
pub(crate) fn pairs_fit(lanes: usize, step: usize, seen: usize, results: usize) -> bool {
    step == 1 && seen == results && 2 * results <= lanes
}

const ROWS: Candidate<Problem, Algorithm> = Candidate {
    algorithm: Algorithm::Rows,
    applies: |_, _| true,
    cost: |problem, caps| {
        let [rows, columns] = problem.results();
        problem.vectors(rows, columns, caps.lanes)
    },
};
const ROW_PAIRS: Candidate<Problem, Algorithm> = Candidate {
    algorithm: Algorithm::RowPairs,
    applies: |problem, caps| {
        let Axis { input, output, .. } = problem.shape.horizontal;
        pairs_fit(caps.lanes, problem.shape.stride, input, output)
    },
    cost: |problem, caps| {
        let [rows, columns] = problem.results();
        problem.vectors(rows.div_ceil(2), 2 * columns, caps.lanes)
    },
};
const STRIPS: Candidate<Problem, Algorithm> = Candidate {
    algorithm: Algorithm::Strips,
    applies: |_, _| true,
    cost: |problem, caps| {
        let [rows, columns] = problem.results();
        let Depthwise { count, channels, kernel, stride, .. } = problem.shape;
        // An input's pixel sees every other tap at a stride of 2, in rows and in columns.
        let parities = if problem.direction == Direction::GradInput { stride * stride } else { 1 };
        let taps = (kernel * kernel) as f64 / parities as f64;
        (count * rows * columns * channels.div_ceil(caps.lanes)) as f64 * taps
    },
};

/// NCHW: the output.
const NCHW_FORWARD: &[Candidate<Problem, Algorithm>] = &[ROWS, ROW_PAIRS];
/// NCHW: the gradient with respect to the input, at a stride of 1 a convolution of the output's.
const NCHW_GRAD_INPUT: &[Candidate<Problem, Algorithm>] = &[
    Candidate { applies: |problem, _| problem.shape.stride == 1, ..ROWS },
    ROW_PAIRS,
    Candidate {
        algorithm: Algorithm::Stride2Grad,
        applies: |problem, _| problem.shape.stride == 2,
        // A quarter of the taps for each parity of rows and columns.
        cost: |problem, caps| {
            let [rows, columns] = problem.results();
            problem.vectors(rows.div_ceil(2), columns.div_ceil(2), caps.lanes)
        },
    },
];
/// NCHW: the gradient with respect to the weights.
const NCHW_GRAD_WEIGHT: &[Candidate<Problem, Algorithm>] = &[ROWS, ROW_PAIRS];
/// NHWC: everything.
const NHWC: &[Candidate<Problem, Algorithm>] = &[STRIPS];

/// How a problem is computed.
pub type Plan = plan::Plan<Algorithm>;

/// All candidates for a problem, in the order of their table.
pub fn explain(problem: &Problem, caps: &Caps) -> Vec<Explained> {
    let Problem { shape: Depthwise { kernel, stride, .. }, .. } = problem;
    plan::explained(problem.candidates(), problem, caps, |algorithm| {
        let rows = algorithm.vector_rows();
        format!(
            "{}: {kernel} x {kernel} taps at a stride of {stride}, {} lanes, {rows} rows in a vector",
            algorithm.kernel(),
            caps.lanes
        )
    })
}
