//! The weights as initializers of ONNX Runtime sessions: views of the mapped file, or of one copy of it in device
//! memory. Either way they exist once, however many sessions read them.
//!
//! # Design
//! A session uses an initializer where it is if that is where it would have put it, and otherwise makes a copy of its
//! own. Tensors that operators read on the host (integers: shapes, axes) are therefore left in the process's memory.

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
use crate::identity_model;

/// Initializers by name.
pub(crate) type Initializers<'f> = HashMap<&'f str, Arc<DynValue>>;

/// Bytes of one copy to a device: the memory it takes on both sides besides the weights.
const CHUNK: usize = 16 << 20;

/// Every tensor of the weights file as a value over the folder's bytes.
pub(crate) fn in_place(folder: &Folder) -> ort::Result<Initializers<'_>> {
    let memory = MemoryInfo::default();
    let tensors = folder.manifest.weights.tensors.iter();
    tensors
        .map(|tensor| {
            let data = folder.tensor(tensor).as_ptr().cast_mut().cast();
            // SAFETY: the bytes begin on a page, are of the tensor's size and live as long as the folder, which whoever
            // opens sessions over them keeps longer by the order of fields. Initializers are only read.
            let value = unsafe { value_over(&memory, tensor, data) }?;
            Ok((tensor.name.as_str(), Arc::new(value)))
        })
        .collect()
}

/// The weights file in the memory of a device. It has to outlive the sessions that read it.
pub(crate) struct UploadedWeights {
    /// An address on the device.
    block: usize,
    memory: MemoryInfo<'static>,
    // The allocator belongs to the session, so it comes first: fields are dropped in order.
    allocator: Mutex<Allocator>,
    session: Session,
}

impl UploadedWeights {
    /// Copies the weights file of a folder to the provider's device.
    ///
    /// # Errors
    /// An unavailable provider, or a device without enough memory.
    pub fn new(
        environment: &Environment,
        provider: &ProviderConfig,
        folder: &Folder,
    ) -> Result<UploadedWeights, Error> {
        // The default arena would double what it has, for a block of known size.
        let exact = [("arena_extend_strategy".to_string(), "kSameAsRequested".to_string())];
        let options = if provider.kind == Provider::Cpu { BTreeMap::new() } else { BTreeMap::from(exact) };
        let mut builder = provider.builder(environment, &options)?;
        let bytes = &folder.weights[..];
        let mut copy = || -> ort::Result<UploadedWeights> {
            let session = builder.commit_from_memory(identity_model::UINT8)?;
            let memory = provider.target_device().memory()?;
            let allocator = Allocator::new(&session, provider.target_device().memory()?)?;
            let block = allocator.alloc::<u8>(bytes.len())?.into_raw();
            // From here on `Drop` frees the block, whatever fails.
            let allocator = Mutex::new(allocator);
            let mut uploaded = UploadedWeights { block: block as usize, memory, allocator, session };
            copy_chunks(&mut uploaded.session, &uploaded.memory, block, bytes)?;
            Ok(uploaded)
        };
        copy().map_err(Error::onnxruntime(format!("copying {} bytes of weights to the device", bytes.len())))
    }

    /// The initializers: on the device, except for those that operators read on the host.
    pub fn initializers<'f>(&self, folder: &'f Folder) -> ort::Result<Initializers<'f>> {
        let mut all = in_place(folder)?;
        for tensor in &folder.manifest.weights.tensors {
            if matches!(tensor.dtype, DType::Int64 | DType::Int32 | DType::Bool) {
                continue;
            }
            let data = (self.block + tensor.offset as usize) as *mut c_void;
            // SAFETY: the block is an image of the file, within which `Folder` has found the tensor; it outlives the
            // sessions.
            let value = unsafe { value_over(&self.memory, tensor, data) }?;
            all.insert(&tensor.name, Arc::new(value));
        }
        Ok(all)
    }
}

impl Drop for UploadedWeights {
    fn drop(&mut self) {
        let allocator = self.allocator.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the block is this allocator's, and no session reads it any more.
        unsafe { allocator.free(self.block as *mut c_void) };
    }
}

/// Copies bytes to a block on the device, chunk by chunk.
fn copy_chunks(session: &mut Session, memory: &MemoryInfo, block: *mut c_void, bytes: &[u8]) -> ort::Result<()> {
    for (at, chunk) in bytes.chunks(CHUNK).enumerate() {
        let mut binding = session.create_binding()?;
        binding.bind_input("x", &Tensor::from_array(([chunk.len()], chunk.to_vec()))?)?;
        let target = block.cast::<u8>().wrapping_add(at * CHUNK).cast();
        let shape = Shape::new([chunk.len() as i64]);
        // SAFETY: the chunk is within the block, which is in this memory and as long as `bytes`.
        let target = unsafe { TensorRefMut::<u8>::from_raw(memory.to_owned(), target, shape) }?;
        binding.bind_output("y", target)?;
        session.run_binding(&binding)?;
    }
    Ok(())
}

/// A value that reads a tensor where it is.
///
/// # Safety
/// `data` is in `memory` and holds the tensor's bytes for as long as the value is used.
unsafe fn value_over(memory: &MemoryInfo, tensor: &TensorRecord, data: *mut c_void) -> ort::Result<DynValue> {
    let shape: Vec<i64> = tensor.shape.iter().map(|&dim| dim as i64).collect();
    let mut value = ptr::null_mut();
    // SAFETY: the caller vouches for `data`, and `Folder` has checked that the number of bytes is that of `shape` in
    // `dtype`. The value does not own the bytes.
    let status = unsafe {
        (ort::api().CreateTensorWithDataAsOrtValue)(
            memory.ptr(),
            data,
            tensor.bytes as usize,
            shape.as_ptr(),
            shape.len(),
            element_type(tensor.dtype).into(),
            &mut value,
        )
    };
    // SAFETY: the status was just returned, and is passed on once.
    unsafe { ort::Error::result_from_status(status) }?;
    let value = NonNull::new(value).ok_or_else(|| ort::Error::new("no value and no error"))?;
    // SAFETY: ONNX Runtime has just made the value, and it is passed on once.
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
