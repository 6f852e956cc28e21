//! Fast CPU kernels for the layers of parameter-efficient CNNs: grouped pointwise (1x1)
//! convolution with interleaved channels, channel interleave and depthwise convolution, each with
//! its gradients.
//!
//! The crate is built in floors, and each floor knows only the ones below it:
//!
//! | module | what it holds |
//! |---|---|
//! | [`error`], [`shape`] | what can be wrong with a call; geometry that has been validated once |
//! | [`simd`], [`lock`], [`scratch`], [`memory`] | vectors, locks, memory |
//! | [`library`], [`team`], [`pool`] | loaded frameworks; threads: PyTorch's, and own |
//! | [`microkernels`] | numbers only: rows in, rows out, one thread, one instruction set |
//! | [`plan`] | which algorithm: tables of candidates and what they cost |
//! | [`conv1x1`], [`dwconv`], [`interleave`] | operations: geometry, plan, division over threads |
//! | [`fused`] | whole chains of convolutions, batch norms and activations as one operation |
//! | `bindings` | NumPy, XLA and TensorFlow: conversion and error mapping (feature `python`) |
#![warn(missing_docs)]

pub mod conv1x1;
mod cpus;
pub mod dwconv;
pub mod error;
pub mod fused;
pub mod interleave;
pub mod library;
pub mod lock;
pub mod memory;
pub mod microkernels;
mod parallel;
pub mod plan;
pub mod pool;
pub mod scratch;
pub mod shape;
pub mod simd;
pub mod team;
#[cfg(test)]
mod tests;

#[cfg(feature = "python")]
mod bindings;
