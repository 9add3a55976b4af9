//! The weights as ONNX Runtime's sessions take them: values over the mapped file, or over one copy of it in the memory of the
//! device that computes. Either way they are there once, however many sessions read them.
//!
//! # Design
//! A session uses an initializer that it is given where it lies, if that is where it would have put it, and otherwise reads the
//! file for a copy of its own. What operators read in the process's memory (whole numbers: shapes, axes) is therefore left there.

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, PoisonError};

use ort::AsPointer;
use ort::environment::Environment;
use ort::memory::{Allocator, MemoryInfo};
use ort::session::Session;
use ort::value::{DynValue, Shape, Tensor, TensorElementType, TensorRefMut};
use t5gemma_graphs::interface::DType;
use t5gemma_graphs::manifest::TensorRecord;

use crate::device::{Provider, ProviderConfig};
use crate::error::Error;
use crate::folder::Folder;

/// Initializers by their names.
pub(crate) type Initializers<'f> = HashMap<&'f str, Arc<DynValue>>;

/// So much is copied to a device at a time: what it takes in the process's memory and there, besides the weights.
const PIECE: usize = 16 << 20;

/// y = Identity(x), uint8 \[n\], of opset 20.
const IDENTITY: &[u8] =
    b"\x08\t:9\n\x10\n\x01x\x12\x01y\"\x08Identity\x12\x01gZ\x10\n\x01x\x12\x0b\n\t\x08\x02\x12\x05\n\x03\x12\x01n\
    b\x10\n\x01y\x12\x0b\n\t\x08\x02\x12\x05\n\x03\x12\x01nB\x04\n\x00\x10\x14";

/// Every tensor of the weights file as a value over the mapped bytes.
pub(crate) fn mapped(folder: &Folder) -> ort::Result<Initializers<'_>> {
    let memory = MemoryInfo::default();
    let tensors = folder.manifest.weights.tensors.iter();
    tensors
        .map(|tensor| {
            let place = folder.tensor(tensor).as_ptr().cast_mut().cast();
            // SAFETY: the bytes are mapped, on a page and of that size, for as long as the folder is; whoever opens sessions
            // over them keeps it longer, by the order of fields. An initializer is only read.
            let value = unsafe { value_over(&memory, tensor, place) }?;
            Ok((tensor.name.as_str(), Arc::new(value)))
        })
        .collect()
}

/// The weights file in the memory of a device. It has to outlive the sessions that read it.
pub(crate) struct Uploaded {
    /// An address on the device.
    block: usize,
    memory: MemoryInfo<'static>,
    // The allocator is the session's, so it stands before it: fields are dropped in this order.
    allocator: Mutex<Allocator>,
    session: Session,
}

impl Uploaded {
    /// Copies the weights file of a folder.
    ///
    /// # Errors
    /// A provider that cannot be had, or a device without so much memory.
    pub fn new(environment: &Environment, provider: &ProviderConfig, folder: &Folder) -> Result<Uploaded, Error> {
        // What is asked for and no more, where an arena would double what it has.
        let exact = [("arena_extend_strategy".to_string(), "kSameAsRequested".to_string())];
        let options = if provider.kind == Provider::Cpu { BTreeMap::new() } else { BTreeMap::from(exact) };
        let mut builder = provider.builder(environment, &options)?;
        let bytes = &folder.weights[..];
        let mut copy = || -> ort::Result<Uploaded> {
            let session = builder.commit_from_memory(IDENTITY)?;
            let memory = provider.device().memory()?;
            let allocator = Allocator::new(&session, provider.device().memory()?)?;
            let block = allocator.alloc::<u8>(bytes.len())?.into_raw();
            // From here on it is given back, whatever fails.
            let allocator = Mutex::new(allocator);
            let mut uploaded = Uploaded { block: block as usize, memory, allocator, session };
            copy_pieces(&mut uploaded.session, &uploaded.memory, block, bytes)?;
            Ok(uploaded)
        };
        copy().map_err(Error::onnxruntime(format!("copying {} bytes of weights to the device", bytes.len())))
    }

    /// The initializers, on the device but for those that are read in the process's memory.
    pub fn initializers<'f>(&self, folder: &'f Folder) -> ort::Result<Initializers<'f>> {
        let mut all = mapped(folder)?;
        for tensor in &folder.manifest.weights.tensors {
            if matches!(tensor.dtype, DType::Int64 | DType::Int32 | DType::Bool) {
                continue;
            }
            let place = (self.block + tensor.offset as usize) as *mut c_void;
            // SAFETY: the block is an image of the file, in which `Folder` has found the tensor; it outlives the sessions.
            let value = unsafe { value_over(&self.memory, tensor, place) }?;
            all.insert(&tensor.name, Arc::new(value));
        }
        Ok(all)
    }
}

impl Drop for Uploaded {
    fn drop(&mut self) {
        let allocator = self.allocator.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the block is this allocator's, and no session reads it any more.
        unsafe { allocator.free(self.block as *mut c_void) };
    }
}

/// Copies bytes to a place on the device, piece by piece.
fn copy_pieces(session: &mut Session, memory: &MemoryInfo, block: *mut c_void, bytes: &[u8]) -> ort::Result<()> {
    for (at, piece) in bytes.chunks(PIECE).enumerate() {
        let mut binding = session.create_binding()?;
        binding.bind_input("x", &Tensor::from_array(([piece.len()], piece.to_vec()))?)?;
        let place = block.cast::<u8>().wrapping_add(at * PIECE).cast();
        // SAFETY: the piece lies within the block, which is of this memory and of as many bytes.
        let place =
            unsafe { TensorRefMut::<u8>::from_raw(memory.to_owned(), place, Shape::new([piece.len() as i64])) }?;
        binding.bind_output("y", place)?;
        session.run_binding(&binding)?;
    }
    Ok(())
}

/// A value that reads a tensor in place.
///
/// # Safety
/// `place` is of that memory, and has the tensor's bytes for as long as the value is used.
unsafe fn value_over(memory: &MemoryInfo, tensor: &TensorRecord, place: *mut c_void) -> ort::Result<DynValue> {
    let shape: Vec<i64> = tensor.shape.iter().map(|&dim| dim as i64).collect();
    let mut value = ptr::null_mut();
    // SAFETY: the caller's, and `Folder` has checked that the bytes are of the size of `shape` in `dtype`. The value does not
    // own them.
    let status = unsafe {
        (ort::api().CreateTensorWithDataAsOrtValue)(
            memory.ptr(),
            place,
            tensor.bytes as usize,
            shape.as_ptr(),
            shape.len(),
            element_type(tensor.dtype).into(),
            &mut value,
        )
    };
    // SAFETY: the status is the one just returned, and is given away once.
    unsafe { ort::Error::result_from_status(status) }?;
    let value = NonNull::new(value).ok_or_else(|| ort::Error::new("no value and no error"))?;
    // SAFETY: a value just made by ONNX Runtime, given away once.
    Ok(unsafe { DynValue::from_ptr(value, Some(&Allocator::default())) })
}

/// ONNX Runtime's name of a type.
pub(crate) fn element_type(dtype: DType) -> TensorElementType {
    match dtype {
        DType::Float32 => TensorElementType::Float32,
        DType::Float16 => TensorElementType::Float16,
        DType::BFloat16 => TensorElementType::Bfloat16,
        DType::Int64 => TensorElementType::Int64,
        DType::Int32 => TensorElementType::Int32,
        DType::UInt8 => TensorElementType::Uint8,
        DType::Int8 => TensorElementType::Int8,
        DType::Int4 => TensorElementType::Int4,
        DType::Float8E4M3FN => TensorElementType::Float8E4M3FN,
        DType::Bool => TensorElementType::Bool,
    }
}
