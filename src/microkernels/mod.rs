//! Numbers only: rows in, rows out, one thread, one instruction set.
//!
//! The microkernels' common view of an image is a set of *rows*: row `r` holds one channel's
//! pixels, contiguous, and starts `offsets[r]` values after a base pointer. NCHW memory is such a
//! set as it stands; a tile of NHWC memory becomes one by transposing it in the L1 cache
//! ([`transpose`]). Pixels are the vector dimension, so any group size runs at full width, and
//! permuting channels (the interleave) is only another table of offsets. Where transposing costs
//! more than it saves, NHWC pixels are computed with as they are, channels being the vector
//! dimension ([`outer`], [`grouped_nhwc`], [`segmented_sum`], [`dwconv_nhwc`]), and permuted
//! ([`permute`]).

pub mod activations;
pub mod conv1x1_nchw;
pub mod dot_nt;
pub mod dwconv_nchw;
pub mod dwconv_nchw_s2_grad;
pub mod dwconv_nhwc;
pub(crate) mod exponentials;
mod factors;
pub mod grouped_nhwc;
pub mod norm_act;
pub mod outer;
pub mod permute;
pub mod pool;
pub mod probe;
pub mod reduce;
pub mod row_copy;
mod rows;
pub mod segmented_sum;
pub mod tap_view;
pub mod transpose;
pub mod window_pool;
