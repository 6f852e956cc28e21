//! The part of XLA's FFI that a handler needs, written out by hand.
//!
//! XLA promises a stable C interface (`xla/ffi/api/c_api.h`), in which every struct starts with its
//! own size and only grows at its end. These declarations follow version 0.3; the structs that
//! handlers touch are the same from 0.1 (jaxlib 0.4.31) on. So no C++ and no header of XLA takes
//! part in the build, and one binary serves every jaxlib.

use std::ffi::{CString, c_char, c_int, c_void};
use std::mem::{offset_of, size_of};
use std::ptr::null_mut;
use std::slice;

use crate::bindings::arrays::Dtype;
use crate::bindings::call::{Array, Attribute, Attributes, Buffer, Call, Output, guarded};
use crate::bindings::functions::Signature;
use crate::error::{Result, bail};

/// The newest minor version of major version 0 whose structs are known here.
const NEWEST_MINOR: c_int = 3;
/// The minor version of the frameworks that want to know ours without telling theirs.
const OLDEST_MINOR: c_int = 1;

const EXTENSION_METADATA: c_int = 1;
const STAGE_EXECUTE: c_int = 3;
const ATTRIBUTE_ARRAY: c_int = 1;
const ATTRIBUTE_SCALAR: c_int = 3;
const ATTRIBUTE_STRING: c_int = 4;
const TYPE_I64: c_int = 5;
const TYPE_F32: c_int = 11;
const TYPE_F64: c_int = 12;
const TYPE_BF16: c_int = 16;

#[repr(C)]
struct Extension {
    struct_size: usize,
    kind: c_int,
    next: *mut Extension,
}

#[repr(C)]
struct Version {
    struct_size: usize,
    extension: *mut Extension,
    major: c_int,
    minor: c_int,
}

#[repr(C)]
struct MetadataExtension {
    base: Extension,
    metadata: *mut Metadata,
}

#[repr(C)]
struct Metadata {
    struct_size: usize,
    version: Version,
    traits: u32,
    /// Since 0.2.
    state_type_id: i64,
}

/// A function table; only its beginning.
#[repr(C)]
struct Api {
    struct_size: usize,
    extension: *mut Extension,
    version: Version,
    internal: *const c_void,
    create_error: unsafe extern "C" fn(*mut CreateError) -> *mut c_void,
}

#[repr(C)]
struct CreateError {
    struct_size: usize,
    extension: *mut Extension,
    message: *const c_char,
    code: c_int,
}

#[repr(C)]
struct ByteSpan {
    data: *const u8,
    len: usize,
}

#[repr(C)]
struct Scalar {
    dtype: c_int,
    value: *const c_void,
}

#[repr(C)]
struct RawArray {
    dtype: c_int,
    len: usize,
    data: *const c_void,
}

#[repr(C)]
struct RawBuffer {
    struct_size: usize,
    extension: *mut Extension,
    dtype: c_int,
    data: *mut c_void,
    rank: i64,
    dims: *const i64,
}

/// The operands or the results of a call; every element is a buffer.
#[repr(C)]
struct Buffers {
    struct_size: usize,
    extension: *mut Extension,
    len: i64,
    kinds: *const c_int,
    buffers: *const *const RawBuffer,
}

#[repr(C)]
struct RawAttributes {
    struct_size: usize,
    extension: *mut Extension,
    len: i64,
    kinds: *const c_int,
    names: *const *const ByteSpan,
    values: *const *const c_void,
}

/// A call of a handler.
#[repr(C)]
pub struct CallFrame {
    struct_size: usize,
    extension: *mut Extension,
    api: *const Api,
    context: *mut c_void,
    stage: c_int,
    operands: Buffers,
    results: Buffers,
    attributes: RawAttributes,
}

/// The type of every handler: null means success, anything else is an error that XLA then owns.
pub type Handler = unsafe extern "C" fn(*mut CallFrame) -> *mut c_void;

/// Serves one call from XLA: answers its question for our version, or runs `function`.
///
/// Errors and panics of `function` become errors of XLA, which raises them in Python.
///
/// # Safety
/// `frame` must come from XLA's call of a [`Handler`].
pub unsafe fn serve(frame: *mut CallFrame, function: &Signature) -> *mut c_void {
    // SAFETY: XLA passes a valid frame that lives until the handler returns.
    let frame = unsafe { &*frame };
    // SAFETY: as above; the extensions belong to the frame.
    if unsafe { answer_metadata(frame) } || frame.stage != STAGE_EXECUTE {
        return null_mut();
    }
    let run = || {
        let operands = frame.operands.raw().iter().map(|raw| raw.buffer()).collect::<Result<Vec<_>>>()?;
        let results = frame.results.raw().iter().map(|raw| raw.output()).collect::<Result<Vec<_>>>()?;
        function.run(&Call::new(&operands, &frame.attributes), results)
    };
    match guarded(run) {
        Ok(()) => null_mut(),
        Err((code, message)) => create_error(frame, code, &message),
    }
}

/// Tells XLA which version of the interface the handler speaks; false if it did not ask.
///
/// # Safety
/// The frame's chain of extensions must be valid.
unsafe fn answer_metadata(frame: &CallFrame) -> bool {
    let mut extension = frame.extension;
    while !extension.is_null() {
        // SAFETY: the caller vouches for every link of the chain.
        let Extension { kind, next, .. } = unsafe { &*extension };
        if *kind == EXTENSION_METADATA {
            // XLA refuses a handler that is newer than itself. Until jaxlib 0.7 it passes no API
            // here, and speaks the oldest version.
            // SAFETY: a non-null `api` points to XLA's function table.
            let minor = unsafe { frame.api.as_ref() }.map_or(OLDEST_MINOR, |api| NEWEST_MINOR.min(api.version.minor));
            // SAFETY: an extension of this kind is a `MetadataExtension`, whose `metadata` XLA
            // allocated for us to fill in; the reference ends with this block.
            let metadata = unsafe { &mut *(*extension.cast::<MetadataExtension>()).metadata };
            metadata.version = Version {
                struct_size: offset_of!(Version, minor) + size_of::<c_int>(),
                extension: null_mut(),
                major: 0,
                minor,
            };
            metadata.traits = 0;
            return true;
        }
        extension = *next;
    }
    false
}

fn create_error(frame: &CallFrame, code: c_int, message: &str) -> *mut c_void {
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    let mut arguments = CreateError {
        struct_size: offset_of!(CreateError, code) + size_of::<c_int>(),
        extension: null_mut(),
        message: message.as_ptr(),
        code,
    };
    // SAFETY: at execution `api` is XLA's function table; XLA copies the message.
    unsafe { ((*frame.api).create_error)(&mut arguments) }
}

impl Attributes for RawAttributes {
    fn attribute(&self, name: &str) -> Result<Attribute<'_>> {
        for i in 0..self.len as usize {
            // SAFETY: XLA passes `len` kinds, names and values, all valid for the call.
            let (kind, found, value) = unsafe { (*self.kinds.add(i), &**self.names.add(i), *self.values.add(i)) };
            // SAFETY: a name's span is valid for the call.
            if unsafe { found.bytes() } == name.as_bytes() {
                // SAFETY: `kind` tells the type of what `value` points to.
                return match unsafe { decode(kind, value) } {
                    Some(attribute) => Ok(attribute),
                    None => bail!("attribute {name} is neither 64-bit integers nor a string"),
                };
            }
        }
        bail!("attribute {name} is missing")
    }
}

impl Buffers {
    fn raw(&self) -> &[&RawBuffer] {
        // SAFETY: XLA passes `len` pointers to buffers, all valid for the call.
        unsafe { values(self.buffers.cast(), self.len as usize) }
    }
}

impl RawBuffer {
    fn array(&self) -> Result<Array> {
        let dtype = match self.dtype {
            TYPE_F32 => Dtype::F32,
            TYPE_F64 => Dtype::F64,
            TYPE_BF16 => Dtype::BF16,
            code => bail!("expected float32, float64 or bfloat16, got XLA's type {code}"),
        };
        // SAFETY: XLA passes `rank` sizes, valid for the call; they are not negative.
        Array::new(dtype, unsafe { values(self.dims.cast(), self.rank as usize) })
    }

    fn buffer(&self) -> Result<Buffer<'_>> {
        // SAFETY: XLA passes as many initialised values of that type, which do not change during
        // the call.
        Ok(unsafe { Buffer::new(self.array()?, self.data) })
    }

    fn output(&self) -> Result<Output<'_>> {
        // SAFETY: XLA passes writable memory, which nothing else touches during the call; `serve`
        // makes one of each.
        Ok(unsafe { Output::new(self.array()?, self.data) })
    }
}

impl ByteSpan {
    /// # Safety
    /// The span must be valid for `'a`.
    unsafe fn bytes<'a>(&self) -> &'a [u8] {
        // SAFETY: the caller's promise.
        unsafe { values(self.data, self.len) }
    }
}

/// # Safety
/// `value` must point to what `kind` says, valid for `'a`.
unsafe fn decode<'a>(kind: c_int, value: *const c_void) -> Option<Attribute<'a>> {
    match kind {
        ATTRIBUTE_SCALAR => {
            // SAFETY: the caller's promise.
            let scalar = unsafe { &*value.cast::<Scalar>() };
            // SAFETY: the value has the type that `dtype` says.
            (scalar.dtype == TYPE_I64).then(|| Attribute::Integer(unsafe { *scalar.value.cast() }))
        }
        ATTRIBUTE_ARRAY => {
            // SAFETY: the caller's promise.
            let array = unsafe { &*value.cast::<RawArray>() };
            // SAFETY: `len` values of the type that `dtype` says.
            (array.dtype == TYPE_I64).then(|| Attribute::Integers(unsafe { values(array.data.cast(), array.len) }))
        }
        ATTRIBUTE_STRING => {
            // SAFETY: the caller's promise.
            let bytes = unsafe { (*value.cast::<ByteSpan>()).bytes() };
            std::str::from_utf8(bytes).ok().map(Attribute::Text)
        }
        _ => None,
    }
}

/// A slice that C describes; its pointer may be null where it is empty.
///
/// # Safety
/// Unless `len` is 0, as many values must be readable at `data` for `'a`.
unsafe fn values<'a, T>(data: *const T, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts(data, len) }
}
