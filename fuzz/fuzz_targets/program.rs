//! Fused programs: any integers are an error or a program, and a program runs.
#![no_main]

use std::mem::MaybeUninit;

use kconv::fused::{Arguments, FORMAT, Inference, Program, backward, forward, infer};
use kconv::isa::IsaKind;
use kconv::shape::Order;
use libfuzzer_sys::fuzz_target;

/// Numbers that a run may need, at most.
const SMALL: usize = 1 << 14;

/// Integers of a byte each, or, after the byte 127, of eight.
fn integers(mut bytes: &[u8]) -> Vec<i64> {
    let mut integers = Vec::new();
    while let Some((&first, rest)) = bytes.split_first() {
        bytes = rest;
        integers.push(match (first, rest.split_first_chunk()) {
            (127, Some((eight, rest))) => {
                bytes = rest;
                i64::from_le_bytes(*eight)
            }
            _ => i64::from(first as i8),
        });
    }
    integers
}

/// Values that `write` has written.
fn written(len: usize, write: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut memory = vec![MaybeUninit::new(0.0); len];
    write(&mut memory);
    // SAFETY: initialised above.
    memory.into_iter().map(|value| unsafe { value.assume_init() }).collect()
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&first, rest)) = bytes.split_first() else { return };
    let Ok(program) = Program::parse(&[vec![FORMAT], integers(rest)].concat()) else { return };
    let count = usize::from(first % 3);
    if program.parameters() > SMALL || !program.workspace_len(3).is_ok_and(|len| len <= SMALL) {
        return;
    }
    let (isa, order) = (IsaKind::available()[0], [Order::Nchw, Order::Nhwc][usize::from(first / 3 % 2)]);
    let [x, y] = program.sizes().map(|size| vec![0.5; count * size.iter().product::<usize>()]);
    let (parameters, masks) = (vec![0.5; program.parameters()], vec![0.5; program.masks() * count]);
    let (channels, workspace_len) = (program.norm_channels(), program.workspace_len(count).unwrap());
    let arguments = Arguments { isa, program: &program, count, order, parameters: &parameters, masks: &masks };
    let (mut statistics, mut workspace) = (Vec::new(), Vec::new());
    let output = written(y.len(), |y| {
        statistics = written(2 * channels, |statistics| {
            workspace = written(workspace_len, |workspace| {
                forward(&arguments, &x, None, y, statistics, workspace);
            });
        });
    });
    let grad_x = if program.input_grad() { x.len() } else { 0 };
    written(grad_x, |grad_x| {
        written(parameters.len(), |grad| {
            backward(&arguments, first >= 128, &statistics, &workspace, &output, grad_x, grad);
        });
    });
    let (parameters, statistics) = (&[&parameters[..]], &[&statistics[..]]);
    let inference = Inference { isa, program: &program, count, order, parameters, statistics };
    written(y.len(), |y| infer(&inference, &x, y));
});
