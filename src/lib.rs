//! Fast CPU kernels for the layers of parameter-efficient CNNs: grouped pointwise (1x1)
//! convolution with interleaved channels, channel interleave and depthwise convolution, each with
//! its gradients.
//!
//! The crate is built in floors, and each floor knows only the ones below it:
//!
//! | module | what it holds |
//! |---|---|
//! | [`error`], [`shape`] | what can be wrong with a call; geometry that has been validated once |
//! | [`isa`], [`lock`], [`pool`], [`scratch`], [`memory`] | the instruction set, locks, the threads, small and large memory |
//! | [`kernels`] | numbers only: rows in, rows out, one thread, one instruction set |
//! | [`ops`] | an operation = geometry + kernels + division of the work over threads |
//! | [`fused`] | whole chains of convolutions, batch norms and activations as one operation |
//! | `bindings` | NumPy, XLA and TensorFlow: conversion and error mapping (feature `python`) |
#![warn(missing_docs)]

pub mod error;
pub mod fused;
pub mod isa;
pub mod kernels;
pub mod lock;
pub mod memory;
pub mod ops;
pub mod pool;
pub mod scratch;
pub mod shape;

#[cfg(feature = "python")]
mod bindings;
