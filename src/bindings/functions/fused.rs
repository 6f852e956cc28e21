//! Fused networks; their programs come as an attribute.
//!
//! Images and what is kept of them are of the call's dtype, all else is of what that is computed
//! with: float32 for bfloat16.

use std::collections::HashMap;
use std::sync::Arc;

use crate::bindings::arrays::Dtype;
use crate::bindings::call::{Array, Buffer, Call, Float, Output};
use crate::bindings::operation::{Batch, Dims, expect_images, expect_shape, expect_values, layout};
use crate::error::{Result, bail};
use crate::fused::{self, Arguments, Inference, Program};
use crate::lock::Lock;
use crate::shape::Order;
use crate::simd;

/// What runs of a fused network.
#[derive(Clone, Copy, Debug)]
pub enum Pass {
    /// In training; masks and the statistics that are given may be empty.
    Forward,
    /// In inference.
    Infer,
    /// The gradients; that of the input is empty where the program does not want it.
    Backward,
}

/// Programs that have been read, at most.
const REMEMBERED: usize = 64;

impl Pass {
    /// The names of the operands.
    pub const fn operands(self) -> &'static [&'static str] {
        match self {
            Self::Forward => &["x", "parameters", "masks", "given"],
            Self::Infer => &["x", "parameters", "statistics"],
            Self::Backward => &["grad_output", "parameters", "masks", "statistics", "workspace"],
        }
    }

    /// The names of the results.
    pub const fn results(self) -> &'static [&'static str] {
        match self {
            Self::Forward => &["output", "statistics", "workspace"],
            Self::Infer => &["output"],
            Self::Backward => &["grad_parameters", "grad_x"],
        }
    }
}

/// Whether an operand or a result is of the images' dtype, and not of what that is computed with.
pub fn is_stored(name: &str) -> bool {
    ["x", "output", "workspace", "grad_output", "grad_x"].contains(&name)
}

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

/// The order of the images' axes.
fn order(call: &Call<'_>) -> Result<Order> {
    layout(call.text("layout")?)
}

/// The call's first operand: images.
fn first<'a>(pass: Pass, call: &Call<'a>) -> Result<Buffer<'a>> {
    match call.operand_list().first() {
        Some(&first) => Ok(first),
        None => bail!("got no operands, expected {}", pass.operands()[0]),
    }
}

/// The dtype of the call's images.
pub fn dtype(pass: Pass, call: &Call<'_>) -> Result<Dtype> {
    Ok(first(pass, call)?.dtype())
}

/// The number of images in the call's first operand.
fn count(pass: Pass, call: &Call<'_>, program: &Program) -> Result<usize> {
    let [input_size, output_size] = program.sizes();
    let size = match pass {
        Pass::Forward | Pass::Infer => input_size,
        Pass::Backward => output_size,
    };
    expect_images(pass.operands()[0], first(pass, call)?.shape(), order(call)?, size)
}

fn expect_len(name: &str, array: &Array, len: usize) -> Result<()> {
    expect_values(name, array.shape().iter().product(), len)
}

/// The shapes of a pass's results.
pub fn result_shapes(pass: Pass, call: &Call<'_>) -> Result<Vec<Dims>> {
    let (program, order) = (program(call)?, order(call)?);
    let [input_size, output_size] = program.sizes();
    let n = count(pass, call, &program)?;
    let images = |size| Dims::from(Batch::of(n, size).shape(order));
    if let Pass::Backward = pass {
        let grad_x = if program.input_grad() { images(input_size) } else { Dims::from([0]) };
        return Ok(vec![Dims::from([program.parameters()]), grad_x]);
    }
    let mut results = vec![images(output_size)];
    if let Pass::Forward = pass {
        results.push(Dims::from([2, program.norm_channels()]));
        results.push(Dims::from([program.workspace_len(n)?]));
    }
    Ok(results)
}

/// Runs a pass.
pub fn run<S: Float<Wide: Float>>(pass: Pass, call: &Call<'_>, outputs: Vec<Output<'_>>) -> Result<()> {
    let shapes = result_shapes(pass, call)?;
    for ((output, shape), name) in outputs.iter().zip(&shapes).zip(pass.results()) {
        // An unwanted gradient of the input may have any shape.
        if shape[..] != [0] || !matches!(pass, Pass::Backward) {
            expect_shape(name, output.shape(), shape)?;
        }
    }
    let program = program(call)?;
    let mut outputs = outputs.into_iter();
    let mut next = || match outputs.next() {
        Some(output) => Ok(output),
        None => bail!("got too few results, expected {}", pass.results().join(", ")),
    };
    match pass {
        Pass::Forward => {
            let [x, parameters, masks, given] = call.operands()?;
            let given = given.read::<S::Wide>()?;
            if !given.is_empty() {
                expect_values("statistics", given.len(), 2 * program.norm_channels())?;
            }
            let arguments = arguments(pass, call, &program, &parameters, masks.read()?)?;
            let given = (!given.is_empty()).then_some(given);
            let (y, statistics, workspace) = (next()?.write()?, next()?.write()?, next()?.write()?);
            fused::forward::<S>(&arguments, x.read()?, given, y, statistics, workspace);
        }
        Pass::Infer => {
            let [x, parameters, statistics] = call.operands()?;
            expect_len("statistics", &statistics, 2 * program.norm_channels())?;
            let Arguments { isa, count, order, parameters, .. } =
                arguments::<S::Wide>(pass, call, &program, &parameters, &[])?;
            program.workspace_len(count)?;
            let (parameters, statistics) = (&[parameters], &[statistics.read()?]);
            let inference = Inference { isa, program: &program, count, order, parameters, statistics };
            fused::infer::<S>(&inference, x.read()?, next()?.write()?);
        }
        Pass::Backward => {
            let [grad, parameters, masks, statistics, workspace] = call.operands()?;
            let arguments = arguments::<S::Wide>(pass, call, &program, &parameters, masks.read()?)?;
            expect_len("statistics", &statistics, 2 * program.norm_channels())?;
            expect_len("workspace", &workspace, program.workspace_len(arguments.count)?)?;
            let (grad_parameters, grad_x) = (next()?.write()?, next()?.write()?);
            fused::backward::<S>(
                &arguments,
                call.integer("frozen")? != 0,
                statistics.read()?,
                workspace.read()?,
                grad.read()?,
                grad_x,
                grad_parameters,
            );
        }
    }
    Ok(())
}

fn arguments<'a, T: Float>(
    pass: Pass,
    call: &Call<'_>,
    program: &'a Program,
    parameters: &Buffer<'a>,
    masks: &'a [T],
) -> Result<Arguments<'a, T>> {
    let (count, order) = (count(pass, call, program)?, order(call)?);
    expect_len("parameters", parameters, program.parameters())?;
    if !masks.is_empty() {
        expect_values("masks", masks.len(), program.masks() * count)?;
    }
    Ok(Arguments { isa: simd::active()?, program, count, order, parameters: parameters.read()?, masks })
}
