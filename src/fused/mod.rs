//! Fused networks: chains of convolutions, batch norms, activations, squeeze-excite and sums as one
//! operation.
//!
//! Batch norm, activation and the like cost a pass over memory each when they are operations of
//! their own, more than the convolutions themselves. Here a step (a convolution, a mean, a sum)
//! writes its raw result once and gathers the batch statistics while that is in the cache; who
//! reads it normalises, activates, scales, permutes and adds on the way in ([`source`]). The
//! backward pass recomputes all this from the raw results instead of keeping it: only they are
//! kept.
//!
//! Values are held as rows, one a channel, of all images' pixels: (C, N, H, W). So every channel's
//! constants hold for a whole row, any number of pixels runs at full vectors, and a permutation of
//! channels costs nothing.
//!
//! The gradient by a value `v` that batch norms read, `y_k = act(gamma_k n_k(v) + beta_k)` with
//! `n_k(v) = (v - mean) * inverse_k`, is gathered as `w = sum over k of gamma_k inverse_k g_k`,
//! where `g_k` is the gradient by the norm's result, as if mean and deviation were constants; what
//! they add is, with means over the batch (Ioffe and Szegedy 2015, section 3),
//!
//! ```text
//! dv = w - sum over k of gamma_k inverse_k (mean(g_k) + n_k(v) mean(g_k n_k(v)))
//! ```
//!
//! a linear function of `w` and `v` that is applied when `dv` is read.
//!
//! | file | what it holds |
//! |---|---|
//! | `program`, `reader`, `analysis`, `slots` | programs: data, wire format, what follows, memory |
//! | `pass`, `source` | values in memory, statistics, how steps read values and return gradients |
//! | `forward`, `infer`, `backward` | the three ways through a program |
//! | `conv`, `pack` | what the convolutions share |
//! | `pointwise`, `by_channels`, `single`, `depthwise`, `spatial`, `unfold` | the convolutions |
//! | `pool` | means and maxima over windows |

mod analysis;
mod backward;
#[cfg(test)]
mod builder;
mod by_channels;
mod conv;
mod depthwise;
mod forward;
mod infer;
mod pack;
mod pass;
mod pointwise;
mod pool;
mod program;
mod reader;
mod single;
mod slots;
mod source;
mod spatial;
#[cfg(test)]
mod tests;
mod unfold;

pub use backward::backward;
pub use forward::forward;
pub use infer::{Inference, Prepared, infer, infer_prepared};
pub use program::{Program, StepTimes};
pub use reader::FORMAT;

use crate::shape::Order;
use crate::simd::IsaKind;

/// Sets of partial sums (statistics, weight gradients), at most: a number that does not depend on
/// the threads, so that neither do the results.
const PARTS: usize = 16;

/// What a program computes with.
pub struct Arguments<'a, T> {
    /// The instruction set.
    pub isa: IsaKind,
    /// The program.
    pub program: &'a Program,
    /// Number of images.
    pub count: usize,
    /// The order of the input's and output's axes, and of their gradients'.
    pub order: Order,
    /// All parameters, as [`Program::parse`] orders them.
    pub parameters: &'a [T],
    /// Factors of images, a set for each mask; none in inference.
    pub masks: &'a [T],
}
