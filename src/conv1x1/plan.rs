//! Which algorithm computes a pointwise convolution, and why.
//!
//! A [`Problem`] is a convolution, its geometry and direction. For each layout and direction a
//! table lists the candidates: [`NCHW_CONV`], [`NHWC_CONV`], [`NCHW_GRAD_WEIGHT`],
//! [`NHWC_GRAD_WEIGHT`]. [`Plan::choose`] takes the cheapest that applies, by the cost [`Weights`],
//! and nothing else chooses. [`explain`] lists all of them, and [`crate::plan::with_algorithm`]
//! forces one. `docs/ALGORITHMS.md` says what was measured.

use super::grouped;
use crate::interleave::{self, ChannelOrder};
use crate::microkernels::grouped_nhwc::MAX_STEPS;
use crate::microkernels::segmented_sum::has_segments;
use crate::plan::{self, Algorithm as _, Candidate, Caps, Direction, Explained, Tabled};
use crate::shape::{Images, Order, Pointwise};

/// Every algorithm of the unfused pointwise convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// Rows of pixels times a small matrix, all input rows at once.
    Rows,
    /// The same, some input rows at a time: sums wait in the output.
    RowsInPasses,
    /// NHWC pixels transposed to rows, in a cache, and back.
    Transposed,
    /// A group's channels are the vector, one input value for all of them.
    Outer,
    /// Several groups' channels in a vector, permuted input values.
    Grouped,
    /// Groups of one output channel: sums of neighbouring products.
    SegmentedSum,
    /// Weight gradient: dot products of rows.
    Dot,
    /// Weight gradient: the input's rows transposed, outer products.
    OuterInput,
    /// Weight gradient: the gradient's rows transposed, outer products.
    OuterGrad,
    /// Weight gradient: matrixmultiply's matrix product.
    Gemm,
    /// Weight gradient: vectors of input channels, for each output channel where it is stored.
    OuterByInput,
    /// Weight gradient: vectors of output channels.
    OuterByOutput,
}

impl plan::Algorithm for Algorithm {
    const UNIT: &'static str = "vectors of multiply-adds a pixel of a group";

    fn kernel(self) -> &'static str {
        match self {
            Self::Rows | Self::RowsInPasses => "conv1x1_nchw.rs",
            Self::Transposed => "transpose.rs, conv1x1_nchw.rs",
            Self::Outer | Self::OuterByInput | Self::OuterByOutput => "outer.rs",
            Self::Grouped => "grouped_nhwc.rs",
            Self::SegmentedSum => "segmented_sum.rs",
            Self::Dot => "dot_nt.rs",
            Self::OuterInput | Self::OuterGrad => "transpose.rs, outer.rs",
            Self::Gemm => "the crate matrixmultiply",
        }
    }
}

/// Groups and the channels of each; of the input gradient with the roles exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Groups {
    pub count: usize,
    pub inputs: usize,
    pub outputs: usize,
}

/// A validated convolution, its geometry and direction.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    /// What is computed.
    pub direction: Direction,
    /// The convolution.
    pub shape: Pointwise,
    /// The input's images, `shape.in_channels` channels each.
    pub images: Images,
    /// See [`Problem::groups`]: divisions, of which a small call would feel a dozen.
    groups: Groups,
    /// What permuting a pixel's interleaved channels costs; infinite where no kernel does.
    permutation: f64,
}

impl Tabled for Problem {
    type Algorithm = Algorithm;

    fn candidates(&self) -> &'static [Candidate<Self, Algorithm>] {
        match (self.direction, self.is_rows()) {
            (Direction::Forward | Direction::GradInput, true) => NCHW_CONV,
            (Direction::Forward | Direction::GradInput, false) => NHWC_CONV,
            (Direction::GradWeight, true) => NCHW_GRAD_WEIGHT,
            (Direction::GradWeight, false) => NHWC_GRAD_WEIGHT,
        }
    }
}

impl Problem {
    /// That of a direction; `images` may have any number of channels.
    pub fn new(caps: &Caps, direction: Direction, shape: &Pointwise, images: Images) -> Self {
        let images = images.with_channels(shape.in_channels);
        let (k, m) = (shape.group_in(), shape.group_out());
        let (inputs, outputs) = if direction == Direction::GradInput { (m, k) } else { (k, m) };
        let groups = Groups { count: shape.groups, inputs, outputs };
        let this = Self { direction, shape: *shape, images, groups, permutation: 0.0 };
        if this.is_rows() || !this.is_interleaved() {
            return this;
        }
        let inverse = direction != Direction::Forward;
        let permutation = interleave::Problem::new(this.order(), inverse, Order::Nhwc, this.pixels(), caps);
        Self { permutation: permutation.kernel_cost(caps).unwrap_or(f64::INFINITY), ..this }
    }

    /// Whether channels are rows of pixels. (One pixel an image is the same memory in both
    /// layouts.)
    pub fn is_rows(&self) -> bool {
        self.images.order == Order::Nchw && self.images.pixels > 1
    }

    /// Whether the output's channels are not in their own order.
    pub fn is_interleaved(&self) -> bool {
        self.shape.interleave > 1 && self.shape.interleave < self.shape.out_channels
    }

    /// The order of the interleaved output's channels.
    pub(crate) fn order(&self) -> ChannelOrder {
        ChannelOrder { channels: self.shape.out_channels, step: self.shape.interleave }
    }

    /// Pixels of all images.
    pub fn pixels(&self) -> usize {
        self.images.count * self.images.pixels
    }

    /// The groups as the direction multiplies them.
    pub(crate) fn groups(&self) -> Groups {
        self.groups
    }

    /// Steps of a group's sums.
    fn steps(&self, caps: &Caps) -> usize {
        self.groups().inputs.div_ceil(caps.terms)
    }

    /// Whether a kernel permutes interleaved channels, where there are any.
    fn can_permute(&self) -> bool {
        self.permutation.is_finite()
    }

    /// What a group's share of the permutation costs.
    fn permuted(&self, caps: &Caps) -> f64 {
        Weights::of_machine(caps).permute * self.permutation / self.shape.groups as f64
    }
}

const fn candidate(
    algorithm: Algorithm,
    applies: fn(&Problem, &Caps) -> bool,
    cost: fn(&Problem, &Caps) -> f64,
) -> Candidate<Problem, Algorithm> {
    Candidate { algorithm, applies, cost }
}

/// Forward and input gradient over NCHW planes. In all tables, the first of equal costs is taken.
pub const NCHW_CONV: &[Candidate<Problem, Algorithm>] = &[
    candidate(Algorithm::Rows, always, rows_cost),
    candidate(Algorithm::RowsInPasses, has_passes, rows_in_passes_cost),
];

/// Forward and input gradient over NHWC pixels.
pub const NHWC_CONV: &[Candidate<Problem, Algorithm>] = &[
    candidate(Algorithm::SegmentedSum, has_segmented_sum, segmented_sum_cost),
    candidate(Algorithm::Outer, has_outer, outer_cost),
    candidate(Algorithm::Transposed, always, transposed_cost),
    candidate(Algorithm::Grouped, has_grouped, grouped_cost),
];

/// Weight gradient over NCHW planes.
pub const NCHW_GRAD_WEIGHT: &[Candidate<Problem, Algorithm>] = &[
    candidate(Algorithm::Gemm, has_gemm, gemm_cost),
    candidate(Algorithm::Dot, always, dot_cost),
    candidate(Algorithm::OuterInput, always, outer_input_cost),
    candidate(Algorithm::OuterGrad, always, outer_grad_cost),
];

/// Weight gradient over NHWC pixels.
pub const NHWC_GRAD_WEIGHT: &[Candidate<Problem, Algorithm>] = &[
    candidate(Algorithm::OuterByInput, always, outer_by_input_cost),
    candidate(Algorithm::OuterByOutput, has_outer_by_output, outer_by_output_cost),
    candidate(Algorithm::Grouped, has_grouped_grad_weight, grouped_grad_weight_cost),
];

/// Relative costs of what is no multiply-add, in vectors of multiply-adds. `docs/ALGORITHMS.md` has
/// the measurements.
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    /// Storing a vector of sums.
    pub store: f64,
    /// A step over transposed rows, which are short.
    pub short_row: f64,
    /// Transposing a value of NHWC pixels to rows or back.
    pub transpose: f64,
    /// A step with permuted values, or storing half of its sums.
    pub grouped: f64,
    /// The same of a weight gradient.
    pub grouped_grad: f64,
    /// A vector of products of neighbours that are added up.
    pub segment: f64,
    /// A window that a vector of channels is permuted from.
    pub permute: f64,
    /// Reading a cache line once more for each group, where it holds others' channels too.
    pub line: f64,
    /// A step of dot products over rows whose vectors are cache lines.
    pub dot: f64,
    /// The same over other rows.
    pub dot_unaligned: f64,
    /// Transposing a value of NCHW rows.
    pub transpose_rows: f64,
    /// Input rows in passes, beside all at once.
    pub pass: f64,
}

/// Measured with AVX-512 on an Intel Xeon and an AMD EPYC, which agree.
pub const AVX512: Weights = Weights {
    store: 2.0,
    short_row: 1.3,
    transpose: 0.35,
    grouped: 1.5,
    grouped_grad: 1.4,
    segment: 2.0,
    permute: 1.6,
    line: 1.2,
    dot: 1.75,
    dot_unaligned: 2.2,
    transpose_rows: 1.5,
    pass: 0.9,
};

impl Weights {
    /// The machine's. No other one has been measured.
    pub fn of_machine(_caps: &Caps) -> &'static Self {
        &AVX512
    }
}

/// Input rows of a group in NCHW that one pass takes, at most: what prefetchers follow.
pub(super) const PASS_ROWS: usize = 32;
/// Values of a group's rows from which on they are taken in passes: they exceed the L2 cache.
pub(super) const PASS_TILE: usize = 128 << 10;
/// Pixels for which making the vectors of groups is worth the while, at least.
const GROUPED_PIXELS: usize = 128;
/// The same with an input that is permuted first.
const PERMUTED_PIXELS: usize = 1024;
/// Pixels of a tile of a weight gradient, at least.
pub(super) const GRAD_TILE: usize = 96;
/// Pixels of a tile of a weight gradient in NHWC, at least: its sums go through memory once a tile.
pub(super) const OUTER_TERMS: usize = 48;
/// Bytes of a tile of `grad_output` that stay in the L1 cache.
const GRAD_TILE_BYTES: usize = 40 << 10;
/// Weights of a group from which on matrixmultiply's blocks of sums pay.
const GEMM_WEIGHTS: usize = 1 << 20;

fn always(_: &Problem, _: &Caps) -> bool {
    true
}

/// Vectors of multiply-adds of a pixel of a group, as rows of pixels.
fn rows_cost(problem: &Problem, caps: &Caps) -> f64 {
    (problem.steps(caps) * problem.groups().outputs) as f64 / caps.lanes as f64
}

fn has_passes(problem: &Problem, caps: &Caps) -> bool {
    let inputs = problem.groups().inputs;
    // Sums wait in the output where that rounds nothing.
    caps.bytes == caps.wide_bytes && inputs > PASS_ROWS && inputs * problem.images.pixels >= PASS_TILE
}

fn rows_in_passes_cost(problem: &Problem, caps: &Caps) -> f64 {
    Weights::of_machine(caps).pass * rows_cost(problem, caps)
}

fn has_segmented_sum(problem: &Problem, caps: &Caps) -> bool {
    let Groups { inputs, outputs, .. } = problem.groups();
    let in_order = problem.direction == Direction::Forward || !problem.is_interleaved();
    outputs == 1 && has_segments(inputs, caps.permute) && in_order && problem.can_permute()
}

fn segmented_sum_cost(problem: &Problem, caps: &Caps) -> f64 {
    let vectors = problem.groups().inputs as f64 / caps.lanes as f64;
    Weights::of_machine(caps).segment * vectors + problem.permuted(caps)
}

/// An interleaved input is read as it is where each group's channels are equidistant.
fn has_outer(problem: &Problem, caps: &Caps) -> bool {
    match problem.direction {
        Direction::Forward => problem.can_permute(),
        _ => !problem.is_interleaved() || caps.terms == 1 && has_equidistant_groups(problem),
    }
}

/// Whether the interleaved channels of each group are at equal distances.
fn has_equidistant_groups(problem: &Problem) -> bool {
    let (Groups { count, inputs, .. }, order) = (problem.groups(), problem.order());
    (0..count).all(|group| {
        let index = |i: usize| order.dst_index(group * inputs + i);
        let distance = |i: usize| index(i + 1).checked_sub(index(i));
        inputs < 2 || distance(0).is_some() && (1..inputs - 1).all(|i| distance(i) == distance(0))
    })
}

fn outer_cost(problem: &Problem, caps: &Caps) -> f64 {
    let vectors = problem.groups().outputs.div_ceil(caps.lanes) as f64;
    let permuted = if problem.direction == Direction::Forward { problem.permuted(caps) } else { 0.0 };
    (problem.steps(caps) as f64 + Weights::of_machine(caps).store) * vectors + permuted
}

fn transposed_cost(problem: &Problem, caps: &Caps) -> f64 {
    let (Groups { inputs, outputs, .. }, weights) = (problem.groups(), Weights::of_machine(caps));
    weights.short_row * rows_cost(problem, caps) + weights.transpose * (inputs + outputs) as f64
}

fn has_grouped(problem: &Problem, caps: &Caps) -> bool {
    let permuted_input = problem.direction == Direction::GradInput && problem.is_interleaved();
    let least = if permuted_input { PERMUTED_PIXELS } else { GROUPED_PIXELS };
    caps.permute
        && problem.pixels() >= least
        && problem.can_permute()
        && grouped::count(problem.groups(), caps.lanes, caps.terms).is_some()
}

fn grouped_cost(problem: &Problem, caps: &Caps) -> f64 {
    let (groups, weights) = (problem.groups(), Weights::of_machine(caps));
    let vectors = grouped::count(groups, caps.lanes, caps.terms).map_or(f64::INFINITY, |found| found.vectors as f64);
    let each = (problem.steps(caps) as f64 + weights.store) / groups.count as f64;
    weights.grouped * vectors * each + problem.permuted(caps)
}

fn has_gemm(problem: &Problem, _: &Caps) -> bool {
    let Groups { inputs, outputs, .. } = problem.groups();
    inputs * outputs >= GEMM_WEIGHTS && !problem.is_interleaved()
}

/// It runs at the machine's limit: nothing is stored, transposed or permuted beside.
fn gemm_cost(problem: &Problem, caps: &Caps) -> f64 {
    let Groups { inputs, outputs, .. } = problem.groups();
    (inputs * outputs) as f64 / caps.lanes as f64
}

fn dot_cost(problem: &Problem, caps: &Caps) -> f64 {
    let Groups { inputs, outputs, .. } = problem.groups();
    dot_rows_cost(caps, inputs * outputs, problem.images.pixels)
}

fn outer_input_cost(problem: &Problem, caps: &Caps) -> f64 {
    let Groups { inputs, outputs, .. } = problem.groups();
    outer_rows_cost(caps, inputs, outputs)
}

fn outer_grad_cost(problem: &Problem, caps: &Caps) -> f64 {
    let Groups { inputs, outputs, .. } = problem.groups();
    outer_rows_cost(caps, outputs, inputs)
}

/// Of pairs of rows, at distances that are multiples of `pixels`.
fn dot_rows_cost(caps: &Caps, pairs: usize, pixels: usize) -> f64 {
    let Weights { dot, dot_unaligned, .. } = *Weights::of_machine(caps);
    let each = if pixels.is_multiple_of(caps.lanes) { dot } else { dot_unaligned };
    each * pairs as f64 / caps.lanes as f64
}

/// With `columns` rows transposed, which are the vectors, beside `rows` rows as they are.
fn outer_rows_cost(caps: &Caps, columns: usize, rows: usize) -> f64 {
    Weights::of_machine(caps).transpose_rows * columns as f64 + (rows * columns.div_ceil(caps.lanes)) as f64
}

/// [`NCHW_GRAD_WEIGHT`] without matrixmultiply, for `[gradient, input]` rows: what fused chains
/// choose from, whose rows come and go in tiles.
pub(crate) fn dot_nt_algorithm(caps: &Caps, [grad, input]: [usize; 2], pixels: usize) -> Algorithm {
    let dot = dot_rows_cost(caps, grad * input, pixels);
    let [outer_input, outer_grad] = [outer_rows_cost(caps, input, grad), outer_rows_cost(caps, grad, input)];
    if dot <= outer_input.min(outer_grad) {
        Algorithm::Dot
    } else if outer_input <= outer_grad {
        Algorithm::OuterInput
    } else {
        Algorithm::OuterGrad
    }
}

/// Interleaved output channels are rows where they are stored: their lines are read for each group.
fn outer_by_input_cost(problem: &Problem, caps: &Caps) -> f64 {
    let channels = problem.shape.out_channels;
    let in_cache = OUTER_TERMS * channels * caps.wide_bytes <= GRAD_TILE_BYTES;
    let lines = if problem.is_interleaved() && !in_cache {
        problem.groups().outputs.min(channels.div_ceil(caps.lanes))
    } else {
        0
    };
    let Groups { inputs, outputs, .. } = problem.groups();
    (outputs * inputs.div_ceil(caps.lanes)) as f64 + Weights::of_machine(caps).line * lines as f64
}

fn has_outer_by_output(problem: &Problem, _: &Caps) -> bool {
    problem.can_permute()
}

fn outer_by_output_cost(problem: &Problem, caps: &Caps) -> f64 {
    let Groups { inputs, outputs, .. } = problem.groups();
    // Of equal costs, the one with fewer rows.
    let tie = if inputs < outputs { 1e-6 } else { 0.0 };
    (inputs * outputs.div_ceil(caps.lanes)) as f64 - tie + problem.permuted(caps)
}

/// The groups of a weight gradient whose vectors are of the side that has more channels, and
/// whether that is the input.
pub(super) fn grad_weight_groups(problem: &Problem) -> (Groups, bool) {
    let Groups { count, inputs, outputs } = problem.groups();
    (Groups { count, inputs: inputs.min(outputs), outputs: inputs.max(outputs) }, inputs > outputs)
}

fn has_grouped_grad_weight(problem: &Problem, caps: &Caps) -> bool {
    let (groups, _) = grad_weight_groups(problem);
    groups.inputs <= MAX_STEPS
        && caps.permute
        && problem.pixels() >= GRAD_TILE
        && problem.can_permute()
        && grouped::count(groups, caps.lanes, 1).is_some_and(|found| found.windows_only)
}

fn grouped_grad_weight_cost(problem: &Problem, caps: &Caps) -> f64 {
    let (groups, _) = grad_weight_groups(problem);
    let vectors = grouped::count(groups, caps.lanes, 1).map_or(f64::INFINITY, |found| found.vectors as f64);
    let steps = vectors * groups.inputs as f64 / groups.count as f64;
    Weights::of_machine(caps).grouped_grad * steps + problem.permuted(caps)
}

/// How a problem is computed.
pub type Plan = plan::Plan<Algorithm>;

/// All candidates for a problem, in the order of their table.
pub fn explain(problem: &Problem, caps: &Caps) -> Vec<Explained> {
    let Groups { count, inputs, outputs } = problem.groups();
    let Caps { lanes, terms, .. } = caps;
    let permuted = if problem.is_rows() || !problem.is_interleaved() {
        String::new()
    } else {
        format!(", permuting a pixel costs {:.1}", problem.permutation)
    };
    plan::explained(problem.candidates(), problem, caps, |algorithm| {
        let kernel = algorithm.kernel();
        format!("{kernel}: {count} groups of {inputs} to {outputs}, {lanes} lanes, {terms} a step{permuted}")
    })
}
