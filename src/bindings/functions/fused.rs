//! Fused networks; their programs come as an attribute.

use std::collections::HashMap;
use std::sync::Arc;

use super::{expect, in_order, order};
use crate::bindings::call::{Array, Buffer, Call, Float, Output};
use crate::error::Result;
use crate::fused::{self, Arguments, Inference, Program};
use crate::lock::Lock;
use crate::simd;
use crate::simd::element::WideElement;

/// Programs that have been read, at most.
const REMEMBERED: usize = 64;

/// The call's program.
fn program(call: &Call<'_>) -> Result<Arc<Program>> {
    static READ: Lock<Option<HashMap<Vec<i64>, Arc<Program>>>> = Lock::new(None);
    let integers = call.integers("program")?;
    if let Some(program) = READ.with(|programs| programs.as_ref()?.get(integers).cloned()) {
        return Ok(program);
    }
    let (key, program) = (integers.to_vec(), Arc::new(Program::parse(integers)?));
    let old = READ.with(|programs| {
        let programs = programs.get_or_insert_default();
        let old = if programs.len() >= REMEMBERED { std::mem::take(programs) } else { HashMap::new() };
        programs.insert(key, program.clone());
        old
    });
    drop(old);
    Ok(program)
}

/// The number of images in a buffer of images of this size.
fn count(call: &Call<'_>, what: &str, array: &Array, size: [usize; 3]) -> Result<usize> {
    let [count, found @ ..] = super::nchw(call, array)?;
    expect(what, found, size)?;
    Ok(count)
}

/// `x, parameters, masks, statistics -> y, statistics, workspace`; masks and statistics may be empty.
pub fn fused_forward<T: Float + WideElement>(
    call: &Call<'_>,
    output: Output<'_>,
    statistics: Output<'_>,
    workspace: Output<'_>,
) -> Result<()> {
    let program = program(call)?;
    let [x, parameters, masks, given] = call.operands()?;
    let [input_size, output_size] = program.sizes();
    let n = count(call, "x", &x, input_size)?;
    expect("output", [count(call, "output", &output, output_size)?], [n])?;
    expect("statistics", statistics.dims()?, [2, program.norm_channels()])?;
    expect("workspace", workspace.dims()?, [program.workspace_len(n)?])?;
    let given = given.read::<T>()?;
    let arguments = arguments(call, &program, n, &parameters, masks.read()?)?;
    fused::forward(
        &arguments,
        x.read()?,
        (!given.is_empty()).then_some(given),
        output.write()?,
        statistics.write()?,
        workspace.write()?,
    );
    Ok(())
}

/// `x, parameters, statistics -> y`.
pub fn fused_infer<T: Float + WideElement>(call: &Call<'_>, output: Output<'_>) -> Result<()> {
    let program = program(call)?;
    let [x, parameters, statistics] = call.operands()?;
    let [input_size, output_size] = program.sizes();
    let n = count(call, "x", &x, input_size)?;
    expect("output", [count(call, "output", &output, output_size)?], [n])?;
    expect("statistics", statistics.dims()?, [2, program.norm_channels()])?;
    program.workspace_len(n)?;
    let Arguments { isa, order, parameters, .. } = arguments::<T>(call, &program, n, &parameters, &[])?;
    let (parameters, statistics) = (&[parameters], &[statistics.read()?]);
    let inference = Inference { isa, program: &program, count: n, order, parameters, statistics };
    fused::infer(&inference, x.read()?, output.write()?);
    Ok(())
}

/// `grad_output, parameters, masks, statistics, workspace -> grad_parameters, grad_x`; the latter is empty where the
/// program does not want it.
pub fn fused_backward<T: Float + WideElement>(
    call: &Call<'_>,
    grad_parameters: Output<'_>,
    grad_x: Output<'_>,
) -> Result<()> {
    let program = program(call)?;
    let [grad, parameters, masks, statistics, workspace] = call.operands()?;
    let [input_size, output_size] = program.sizes();
    let n = count(call, "grad_output", &grad, output_size)?;
    expect("statistics", statistics.dims()?, [2, program.norm_channels()])?;
    expect("workspace", workspace.dims()?, [program.workspace_len(n)?])?;
    expect("grad_parameters", grad_parameters.dims()?, [program.parameters()])?;
    if program.input_grad() {
        expect("grad_x", [count(call, "grad_x", &grad_x, input_size)?], [n])?;
    }
    let arguments = arguments::<T>(call, &program, n, &parameters, masks.read()?)?;
    fused::backward(
        &arguments,
        call.integer("frozen")? != 0,
        statistics.read()?,
        workspace.read()?,
        grad.read()?,
        grad_x.write()?,
        grad_parameters.write()?,
    );
    Ok(())
}

/// The sizes of the results of [`fused_forward`].
pub fn fused_forward_results(call: &Call<'_>) -> Result<Vec<Vec<usize>>> {
    let program = program(call)?;
    let [x, ..] = call.operands::<4>()?;
    let (n, output) = images(call, &program, &x)?;
    Ok(vec![output, vec![2, program.norm_channels()], vec![program.workspace_len(n)?]])
}

/// The sizes of the result of [`fused_infer`].
pub fn fused_infer_result(call: &Call<'_>) -> Result<Vec<Vec<usize>>> {
    let [x, ..] = call.operands::<3>()?;
    Ok(vec![images(call, &*program(call)?, &x)?.1])
}

/// The sizes of the results of [`fused_backward`].
pub fn fused_backward_results(call: &Call<'_>) -> Result<Vec<Vec<usize>>> {
    let program = program(call)?;
    let [grad, ..] = call.operands::<5>()?;
    let [[channels, height, width], output_size] = program.sizes();
    let n = count(call, "grad_output", &grad, output_size)?;
    let grad_x =
        if program.input_grad() { in_order(order(call)?, [n, channels, height, width]).to_vec() } else { vec![0] };
    Ok(vec![vec![program.parameters()], grad_x])
}

/// The number of images, and the sizes of the program's output.
fn images(call: &Call<'_>, program: &Program, x: &Array) -> Result<(usize, Vec<usize>)> {
    let [input_size, [channels, height, width]] = program.sizes();
    let n = count(call, "x", x, input_size)?;
    Ok((n, in_order(order(call)?, [n, channels, height, width]).to_vec()))
}

fn arguments<'a, T: Float + WideElement>(
    call: &Call<'_>,
    program: &'a Program,
    count: usize,
    parameters: &Buffer<'a>,
    masks: &'a [T],
) -> Result<Arguments<'a, T>> {
    expect("parameters", parameters.dims()?, [program.parameters()])?;
    if !masks.is_empty() {
        expect("masks", [masks.len()], [program.masks() * count])?;
    }
    Ok(Arguments { isa: simd::active()?, program, count, order: order(call)?, parameters: parameters.read()?, masks })
}
