//! Depthwise convolution and its gradients.

use std::mem::MaybeUninit;

use super::{Shared, estimate};
use crate::isa::Active;
use crate::kernels::Element;
use crate::pool::{parallel_for, threads_for};
use crate::shape::{Depthwise, Order};

struct Strides {
    image: usize,
    channel: usize,
    row: usize,
    col: usize,
}
fn strides(s: &Depthwise, h: usize, w: usize) -> Strides {
    match s.order {
        Order::Nchw => Strides { image: s.channels * h * w, channel: h * w, row: w, col: 1 },
        Order::Nhwc => Strides { image: s.channels * h * w, channel: 1, row: w * s.channels, col: s.channels },
    }
}

/// Calls f(tap, input index, output index) for every product of channel c of image n.
fn visit(s: &Depthwise, n: usize, c: usize, mut f: impl FnMut(usize, usize, usize)) {
    let (i, o) = (
        strides(s, s.vertical.input, s.horizontal.input),
        strides(s, s.vertical.output, s.horizontal.output),
    );
    for oy in 0..s.vertical.output {
        for ox in 0..s.horizontal.output {
            for tap in 0..s.kernel * s.kernel {
                let iy = (oy * s.stride + tap / s.kernel).wrapping_sub(s.vertical.before);
                let ix = (ox * s.stride + tap % s.kernel).wrapping_sub(s.horizontal.before);
                if iy < s.vertical.input && ix < s.horizontal.input {
                    f(
                        tap,
                        n * i.image + c * i.channel + iy * i.row + ix * i.col,
                        n * o.image + c * o.channel + oy * o.row + ox * o.col,
                    );
                }
            }
        }
    }
}

/// forward
pub fn forward<T: Element + std::ops::Mul<Output = T>>(_isa: Active, s: &Depthwise, x: &[T], weight: &[T], bias: Option<&[T]>, y: &mut [MaybeUninit<T>]) {
    let (ih, iw) = (s.vertical.output, s.horizontal.output);
    let st = strides(s, ih, iw);
    let y = Shared::new(y);
    parallel_for(threads_for(estimate(s.output_len(), 0)), s.count * s.channels, |t| {
        let (n, c) = (t / s.channels, t % s.channels);
        for yy in 0..ih { for xx in 0..iw {
            unsafe { *y.ptr().add(n * st.image + c * st.channel + yy * st.row + xx * st.col) = bias.map_or(T::default(), |b| b[c]) };
        } }
        visit(s, n, c, |tap, i, o| unsafe { *y.ptr().add(o) += x[i] * weight[s.weight_index(c, tap)] });
    });
}
/// grad input
pub fn grad_input<T: Element + std::ops::Mul<Output = T>>(_isa: Active, s: &Depthwise, gy: &[T], weight: &[T], gx: &mut [MaybeUninit<T>]) {
    for v in gx.iter_mut() { v.write(T::default()); }
    let gx = Shared::new(gx);
    parallel_for(threads_for(estimate(s.output_len(), 0)), s.count * s.channels, |t| {
        let (n, c) = (t / s.channels, t % s.channels);
        visit(s, n, c, |tap, i, o| unsafe { *gx.ptr().add(i) += gy[o] * weight[s.weight_index(c, tap)] });
    });
}
/// grad weight
pub fn grad_weight<T: Element + std::ops::Mul<Output = T>>(_isa: Active, s: &Depthwise, x: &[T], gy: &[T], gw: &mut [MaybeUninit<T>]) {
    for v in gw.iter_mut() { v.write(T::default()); }
    let gw = Shared::new(gw);
    parallel_for(threads_for(estimate(s.output_len(), 0)), s.channels, |c| {
        for n in 0..s.count {
            visit(s, n, c, |tap, i, o| unsafe { *gw.ptr().add(s.weight_index(c, tap)) += gy[o] * x[i] });
        }
    });
}
