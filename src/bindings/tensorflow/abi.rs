//! The part of TensorFlow's C interface (`tensorflow/c/{ops,kernels}.h`) that registers operations.
//!
//! Its functions are looked up in the TensorFlow that the process has loaded, so nothing of it
//! takes part in the build, and one binary serves every TensorFlow.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::{NonNull, null_mut};
use std::sync::OnceLock;

use crate::bindings::arrays::Dtype;
use crate::bindings::call::{Array, Attribute, Attributes, Buffer, Call, INTERNAL, Output, guarded};
use crate::bindings::functions::{ResultLike, Signature};
use crate::bindings::operation::Dims;
use crate::error::{Result, bail};
use crate::library::Library;
use crate::memory;

/// A pointer to one of TensorFlow's own objects.
pub type Opaque = *mut c_void;

const OK: c_int = 0;
/// The types of tensors, TensorFlow's codes of them, and what distinguishes the names of their
/// kernels.
const TYPES: [(Dtype, c_int, &str); 3] =
    [(Dtype::F32, 1, "Float"), (Dtype::F64, 2, "Double"), (Dtype::BF16, 14, "Bfloat16")];

/// TensorFlow's code of a type.
fn code(dtype: Dtype) -> c_int {
    TYPES.into_iter().find_map(|(known, code, _)| (known == dtype).then_some(code)).expect("one of each type")
}

/// Declares the functions by their names and types, and how to look them up.
macro_rules! api {
    ($($name:ident: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        #[allow(non_snake_case)]
        struct Api {
            $($name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl Api {
            /// Looks the functions up.
            ///
            /// # Safety
            /// `library` must be TensorFlow's.
            unsafe fn load(library: &Library) -> Result<Self> {
                Ok(Self {
                    $($name: {
                        let name = stringify!($name);
                        let Some(symbol) = library.symbol(&text(name)) else {
                            bail!("this TensorFlow has no {name}");
                        };
                        // SAFETY: TensorFlow's headers declare a function of that type.
                        unsafe { std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn($($argument),*) $(-> $result)?>(symbol) }
                    },)*
                })
            }
        }
    };
}

api! {
    TF_NewStatus: fn() -> Opaque;
    TF_DeleteStatus: fn(Opaque);
    TF_GetCode: fn(Opaque) -> c_int;
    TF_Message: fn(Opaque) -> *const c_char;
    TF_SetStatus: fn(Opaque, c_int, *const c_char);
    TF_NewOpDefinitionBuilder: fn(*const c_char) -> Opaque;
    TF_OpDefinitionBuilderAddInput: fn(Opaque, *const c_char);
    TF_OpDefinitionBuilderAddOutput: fn(Opaque, *const c_char);
    TF_OpDefinitionBuilderAddAttr: fn(Opaque, *const c_char);
    TF_OpDefinitionBuilderSetShapeInferenceFunction: fn(Opaque, InferShape);
    TF_RegisterOpDefinition: fn(Opaque, Opaque);
    TF_NewShapeHandle: fn() -> Opaque;
    TF_DeleteShapeHandle: fn(Opaque);
    TF_ShapeInferenceContextGetInput: fn(Opaque, c_int, Opaque, Opaque);
    TF_ShapeInferenceContextSetOutput: fn(Opaque, c_int, Opaque, Opaque);
    TF_ShapeInferenceContextSetUnknownShape: fn(Opaque, Opaque);
    TF_NewKernelBuilder: fn(*const c_char, *const c_char, Create, unsafe extern "C" fn(Opaque, Opaque), unsafe extern "C" fn(Opaque)) -> Opaque;
    TF_KernelBuilder_TypeConstraint: fn(Opaque, *const c_char, c_int, Opaque);
    TF_RegisterKernelBuilder: fn(*const c_char, Opaque, Opaque);
    TF_OpKernelConstruction_GetAttrInt64: fn(Opaque, *const c_char, *mut i64, Opaque);
    TF_OpKernelConstruction_GetAttrInt64List: fn(Opaque, *const c_char, *mut i64, c_int, Opaque);
    TF_OpKernelConstruction_GetAttrString: fn(Opaque, *const c_char, *mut c_char, usize, Opaque);
    TF_OpKernelConstruction_GetAttrSize: fn(Opaque, *const c_char, *mut i32, *mut i32, Opaque);
    TF_OpKernelConstruction_Failure: fn(Opaque, Opaque);
    TF_NumInputs: fn(Opaque) -> c_int;
    TF_GetInput: fn(Opaque, c_int, *mut Opaque, Opaque);
    TF_TensorType: fn(Opaque) -> c_int;
    TF_NumDims: fn(Opaque) -> c_int;
    TF_Dim: fn(Opaque, c_int) -> i64;
    TF_TensorData: fn(Opaque) -> Opaque;
    TF_DeleteTensor: fn(Opaque);
    TF_AllocateOutput: fn(Opaque, c_int, c_int, *const i64, c_int, usize, Opaque) -> Opaque;
    TF_OpKernelContext_Failure: fn(Opaque, Opaque);
}

/// Makes a kernel for a node of a graph: from a `TF_OpKernelConstruction` to a [`Kernel`].
pub type Create = unsafe extern "C" fn(Opaque) -> Opaque;
type InferShape = unsafe extern "C" fn(Opaque, Opaque);

static API: OnceLock<Api> = OnceLock::new();

/// The functions; only code that TensorFlow calls, and so after [`load`], may use them.
fn api() -> &'static Api {
    API.get().expect("the functions were looked up before anything was registered")
}

/// Looks TensorFlow's functions up in the library at that path, which the process has loaded.
///
/// Returns false if that has been done before.
pub fn load(path: &str) -> Result<bool> {
    if API.get().is_some() {
        return Ok(false);
    }
    // On Windows it is not found: the operations are for Unix alone.
    let Some(library) = Library::loaded(Path::new(path)) else {
        bail!("{path} is not loaded, expected the library of an imported TensorFlow");
    };
    // SAFETY: TensorFlow's library.
    let api = unsafe { Api::load(&library) }?;
    Ok(API.set(api).is_ok())
}

/// Registers a function as an operation, whose name it returns, and its kernels, which `create`
/// makes by [`create_kernel`].
pub fn register(signature: &'static Signature, create: Create) -> Result<String> {
    let (api, status, operation) = (api(), Status::new(), signature.operation());
    let name = text(&operation);
    let has_bias = signature.operands.contains(&"bias");
    let typed = |name: &&str| format!("{name}: {}", if signature.is_stored(name) { "T" } else { "W" });
    let mut inputs: Vec<_> = signature.operands.iter().map(typed).collect();
    // (Saved graphs of before have one type, and where it is not float32 cannot be read.)
    let has_wide = signature.operands.iter().any(|name| !signature.is_stored(name));
    if has_bias {
        // A list of none or one.
        *inputs.last_mut().expect("a bias") = "bias: biases * T".into();
    }
    let infer_shape = match (signature.result_like(), inputs.len()) {
        (ResultLike::Nothing, _) => unknown_shape,
        (ResultLike::Operand, _) => shape_of_input::<0>,
        (ResultLike::Unknown, operands) => {
            inputs.push("like: T".into());
            if operands == 1 { shape_of_input::<1> } else { shape_of_input::<2> }
        }
    };
    // SAFETY: as TensorFlow's headers say; it copies all text and owns the builder that is
    // registered.
    unsafe {
        let builder = (api.TF_NewOpDefinitionBuilder)(name.as_ptr());
        for input in &inputs {
            (api.TF_OpDefinitionBuilderAddInput)(builder, text(input).as_ptr());
        }
        for output in signature.results {
            (api.TF_OpDefinitionBuilderAddOutput)(builder, text(&typed(output)).as_ptr());
        }
        (api.TF_OpDefinitionBuilderAddAttr)(builder, c"T: {bfloat16, float, double}".as_ptr());
        if has_wide {
            (api.TF_OpDefinitionBuilderAddAttr)(builder, c"W: {float, double} = DT_FLOAT".as_ptr());
        }
        for attribute in signature.attributes {
            (api.TF_OpDefinitionBuilderAddAttr)(builder, text(attribute).as_ptr());
        }
        if has_bias {
            (api.TF_OpDefinitionBuilderAddAttr)(builder, c"biases: int >= 0".as_ptr());
        }
        (api.TF_OpDefinitionBuilderSetShapeInferenceFunction)(builder, infer_shape);
        (api.TF_RegisterOpDefinition)(builder, status.0);
    }
    status.check()?;
    for (dtype, _, suffix) in TYPES {
        // SAFETY: as above.
        unsafe {
            let builder = (api.TF_NewKernelBuilder)(name.as_ptr(), c"CPU".as_ptr(), create, compute, delete_kernel);
            (api.TF_KernelBuilder_TypeConstraint)(builder, c"T".as_ptr(), code(dtype), status.0);
            status.check()?;
            if has_wide {
                (api.TF_KernelBuilder_TypeConstraint)(builder, c"W".as_ptr(), code(dtype.wide()), status.0);
                status.check()?;
            }
            let kernel_name = text(&format!("{operation}{suffix}"));
            (api.TF_RegisterKernelBuilder)(kernel_name.as_ptr(), builder, status.0);
        }
        status.check()?;
    }
    Ok(operation)
}

/// A function with the attributes of one node of a graph.
struct Kernel {
    signature: &'static Signature,
    attributes: Vec<(&'static str, Value)>,
}

enum Value {
    Integer(i64),
    Integers(Vec<i64>),
    Text(String),
}

impl Attributes for Kernel {
    fn attribute(&self, name: &str) -> Result<Attribute<'_>> {
        match self.attributes.iter().find(|(known, _)| *known == name) {
            Some((_, Value::Integer(value))) => Ok(Attribute::Integer(*value)),
            Some((_, Value::Integers(values))) => Ok(Attribute::Integers(values)),
            Some((_, Value::Text(text))) => Ok(Attribute::Text(text)),
            None => bail!("attribute {name} is missing"),
        }
    }
}

/// The body of a [`Create`]: null where the attributes cannot be read.
///
/// # Safety
/// `construction` must be what TensorFlow called the [`Create`] with.
pub unsafe fn create_kernel(signature: &'static Signature, construction: Opaque) -> Opaque {
    let read = |specification: &&'static str| {
        let (name, kind) = specification.split_once(": ").expect("name: type");
        // SAFETY: the caller's promise.
        unsafe { read_attribute(construction, &text(name), kind) }.map(|value| (name, value))
    };
    match signature.attributes.iter().map(read).collect::<Result<_>>() {
        Ok(attributes) => Box::into_raw(Box::new(Kernel { signature, attributes })).cast(),
        Err(error) => {
            let status = Status::of(INTERNAL, &error.to_string());
            // SAFETY: the caller's promise.
            unsafe { (api().TF_OpKernelConstruction_Failure)(construction, status.0) };
            null_mut()
        }
    }
}

/// # Safety
/// `construction` must be a `TF_OpKernelConstruction`.
unsafe fn read_attribute(construction: Opaque, name: &CStr, kind: &str) -> Result<Value> {
    let (api, status, name) = (api(), Status::new(), name.as_ptr());
    let (mut length, mut size) = (0, 0);
    // SAFETY: as TensorFlow's headers say, with room for as many values as it announces.
    let value = unsafe {
        (api.TF_OpKernelConstruction_GetAttrSize)(construction, name, &mut length, &mut size, status.0);
        status.check()?;
        match kind {
            "int" => {
                let mut value = 0;
                (api.TF_OpKernelConstruction_GetAttrInt64)(construction, name, &mut value, status.0);
                Value::Integer(value)
            }
            "list(int)" => {
                let mut values = vec![0; length.max(0) as usize];
                let room = values.as_mut_ptr();
                (api.TF_OpKernelConstruction_GetAttrInt64List)(construction, name, room, length, status.0);
                Value::Integers(values)
            }
            _ => {
                let mut bytes = vec![0; size.max(0) as usize];
                let room = bytes.as_mut_ptr().cast();
                (api.TF_OpKernelConstruction_GetAttrString)(construction, name, room, bytes.len(), status.0);
                Value::Text(String::from_utf8_lossy(&bytes).into_owned())
            }
        }
    };
    status.check()?;
    Ok(value)
}

unsafe extern "C" fn delete_kernel(kernel: Opaque) {
    if !kernel.is_null() {
        // SAFETY: made by `create_kernel`; TensorFlow is done with it.
        drop(unsafe { Box::from_raw(kernel.cast::<Kernel>()) });
    }
}

/// Runs a kernel; its errors and panics become TensorFlow's.
unsafe extern "C" fn compute(kernel: Opaque, context: Opaque) {
    // SAFETY: TensorFlow passes what `create_kernel` made, which nothing changes, and a context.
    let run = || unsafe { run(&*kernel.cast::<Kernel>(), context) };
    if let Err((code, message)) = guarded(run) {
        let status = Status::of(code, &message);
        // SAFETY: the context of this call.
        unsafe { (api().TF_OpKernelContext_Failure)(context, status.0) };
    }
}

/// # Safety
/// `context` must be the `TF_OpKernelContext` of this call.
unsafe fn run(kernel: &Kernel, context: Opaque) -> Result<()> {
    let (api, status) = (api(), Status::new());
    let tensor = |index| {
        let mut tensor = null_mut();
        // SAFETY: the caller's promise; the index is one of an input.
        unsafe { (api.TF_GetInput)(context, index, &mut tensor, status.0) };
        status.check().map(|()| Tensor(tensor))
    };
    // SAFETY: the caller's promise.
    let inputs = unsafe { (api.TF_NumInputs)(context) };
    let tensors = (0..inputs).map(tensor).collect::<Result<Vec<_>>>()?;
    let mut operands = tensors.iter().map(Tensor::buffer).collect::<Result<Vec<_>>>()?;
    let like = kernel.signature.result_like();
    let shapes = match operands.last() {
        Some(last) if like != ResultLike::Nothing => vec![*last.shape()],
        _ => kernel.signature.result_shapes(&Call::new(&operands, kernel))?,
    };
    if like == ResultLike::Unknown {
        operands.pop();
    }
    let stored = operands[0].dtype();
    let dtype = |index: usize| {
        if kernel.signature.is_stored(kernel.signature.results[index]) { stored } else { stored.wide() }
    };
    let allocate = |(index, dims): (usize, &Dims)| {
        let sizes: Vec<_> = dims.iter().map(|&size| size as i64).collect();
        let product = dims.iter().try_fold(dtype(index).size(), |product, &size| product.checked_mul(size));
        let Some(bytes) = product.filter(|&bytes| bytes <= memory::LARGEST) else {
            bail!("the result has the sizes {dims:?}, more than there can be memory for")
        };
        let (axes, code) = (sizes.len() as c_int, code(dtype(index)));
        // SAFETY: the caller's promise.
        let tensor =
            unsafe { (api.TF_AllocateOutput)(context, index as c_int, code, sizes.as_ptr(), axes, bytes, status.0) };
        status.check().map(|()| Tensor(tensor))
    };
    let results = shapes.iter().enumerate().map(allocate).collect::<Result<Vec<_>>>()?;
    let output = |(index, (tensor, dims)): (usize, (&Tensor, &Dims))| {
        // SAFETY: TensorFlow has allocated as many bytes, for this call alone.
        Ok(unsafe { Output::new(Array::new(dtype(index), dims)?, (api.TF_TensorData)(tensor.0)) })
    };
    let outputs = results.iter().zip(&shapes).enumerate().map(output).collect::<Result<Vec<_>>>()?;
    kernel.signature.run(&Call::new(&operands, kernel), outputs)
}

/// A `TF_Tensor` that is ours to delete; its memory is TensorFlow's.
struct Tensor(Opaque);

impl Tensor {
    fn buffer(&self) -> Result<Buffer<'_>> {
        let api = api();
        // SAFETY: a tensor lives as long as `self`, and its values do not change during a call.
        unsafe {
            let code = (api.TF_TensorType)(self.0);
            let Some((dtype, ..)) = TYPES.into_iter().find(|(_, known, _)| *known == code) else {
                bail!("expected float32, float64 or bfloat16, got TensorFlow's type {code}")
            };
            let axes = 0..(api.TF_NumDims)(self.0);
            let dims: Vec<_> = axes.map(|axis| (api.TF_Dim)(self.0, axis) as usize).collect();
            Ok(Buffer::new(Array::new(dtype, &dims)?, (api.TF_TensorData)(self.0)))
        }
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        // SAFETY: TensorFlow gave it to us.
        unsafe { (api().TF_DeleteTensor)(self.0) }
    }
}

/// A `TF_Status`.
struct Status(Opaque);

impl Status {
    fn new() -> Self {
        // SAFETY: always allowed.
        Self(unsafe { (api().TF_NewStatus)() })
    }

    fn of(code: c_int, message: &str) -> Self {
        let status = Self::new();
        // SAFETY: TensorFlow copies the message.
        unsafe { (api().TF_SetStatus)(status.0, code, text(message).as_ptr()) };
        status
    }

    fn check(&self) -> Result<()> {
        // SAFETY: the message lives as long as the status.
        unsafe {
            if (api().TF_GetCode)(self.0) == OK {
                return Ok(());
            }
            bail!("{}", CStr::from_ptr((api().TF_Message)(self.0)).to_string_lossy())
        }
    }
}

impl Drop for Status {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        unsafe { (api().TF_DeleteStatus)(self.0) }
    }
}

/// Gives the output the shape of input `I`.
unsafe extern "C" fn shape_of_input<const I: c_int>(context: Opaque, status: Opaque) {
    let api = api();
    // SAFETY: TensorFlow passes a `TF_ShapeInferenceContext` and a status.
    unsafe {
        let shape = (api.TF_NewShapeHandle)();
        (api.TF_ShapeInferenceContextGetInput)(context, I, shape, status);
        (api.TF_ShapeInferenceContextSetOutput)(context, 0, shape, status);
        (api.TF_DeleteShapeHandle)(shape);
    }
}

/// Leaves the outputs' shapes open: this interface shows neither strings nor lists among the
/// attributes.
unsafe extern "C" fn unknown_shape(context: Opaque, status: Opaque) {
    // SAFETY: as above.
    unsafe { (api().TF_ShapeInferenceContextSetUnknownShape)(context, status) }
}

fn text(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).unwrap_or_default()
}
