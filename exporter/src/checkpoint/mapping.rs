//! Maps a safetensors file into memory, and says what is there instead of one.

use std::collections::BTreeMap;
use std::path::Path;

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use safetensors::{SafeTensorError, SafeTensors};
use serde::Deserialize;
use t5gemma_graphs::json::{cut, list};

use super::Location;
use crate::convert::to_float32;
use crate::error::{Error, Result};
use crate::files;

/// Maps a safetensors file. Returns its tensors with shard 0.
pub fn map_file(path: &Path) -> Result<(Mmap, Vec<Location>)> {
    let invalid = |expected: &str, found: String| Error::invalid(path.display(), expected, found);
    let file = files::open(path)?;
    if file.metadata().is_ok_and(|metadata| metadata.len() == 0) {
        return Err(invalid(SAFETENSORS, "an empty file".into()));
    }
    // SAFETY: the mapping is only read. If another process truncates the file, this process ends with SIGBUS, as with
    // every memory-mapped file; nothing is written through the mapping.
    let bytes = unsafe { Mmap::map(&file) }.map_err(Error::io(path, "cannot be mapped"))?;
    // Checks the header against the file's length, so that the ranges below are within the file.
    let views = SafeTensors::deserialize(&bytes).map_err(|error| match identify(&bytes) {
        Some(found) => invalid(SAFETENSORS, found),
        None => {
            let reason = explain_truncation(&bytes, &error).unwrap_or_else(|| cut(&error.to_string()));
            invalid("a complete safetensors file", format!("{} bytes: {reason}", bytes.len()))
        }
    })?;
    let location = |(tensor, view): (&str, safetensors::tensor::TensorView<'_>)| {
        let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        let (shape, end) = (view.shape().to_vec(), start + view.data().len());
        Location { stored: tensor.to_string(), shard: 0, dtype: view.dtype(), shape, start, end }
    };
    let tensors = views.iter().map(location).collect();
    Ok((bytes, tensors))
}

/// Lets the system take back the memory of a part of a mapping that is not read again soon.
pub fn release(mapping: &Mmap, part: &[u8]) {
    #[cfg(unix)]
    {
        let start = (part.as_ptr() as usize).wrapping_sub(mapping.as_ptr() as usize);
        if start.checked_add(part.len()).is_some_and(|end| end <= mapping.len()) {
            // SAFETY: the mapping is of a file and only read, so that dropping its pages loses nothing: when they are read again, they
            // come from the file. A failure changes nothing.
            let _ = unsafe { mapping.unchecked_advise_range(UncheckedAdvice::DontNeed, start, part.len()) };
        }
    }
    #[cfg(not(unix))]
    let _ = (mapping, part);
}

/// Reads a vector of `size` numbers from a safetensors file.
///
/// # Errors
/// A file that cannot be read, no such tensor, or one of another size or type.
pub fn read_vector(path: &Path, name: &str, size: usize) -> Result<Vec<f32>> {
    let (bytes, tensors) = map_file(path)?;
    let invalid = |expected: String, found: String| Error::invalid(path.display(), expected, found).of(cut(name));
    let Some(tensor) = tensors.iter().find(|tensor| tensor.stored == name) else {
        let mut names: Vec<String> = tensors.into_iter().map(|tensor| tensor.stored).collect();
        names.sort();
        return Err(invalid("a tensor of this name".into(), format!("none among {}", list(&names))));
    };
    // A parameter may have axes of length 1 before its own.
    if tensor.shape.last() != Some(&size) || tensor.shape.iter().product::<usize>() != size {
        return Err(invalid(format!("shape [{size}]"), format!("{:?}", tensor.shape)));
    }
    let Some(dtype) = tensor.float() else {
        return Err(invalid("F32, F16 or BF16".into(), format!("{:?}", tensor.dtype)));
    };
    let mut numbers = vec![0.0; size];
    to_float32(&bytes[tensor.start..tensor.end], dtype, &mut numbers);
    match numbers.iter().find(|number| !number.is_finite()) {
        Some(number) => Err(invalid("finite numbers".into(), number.to_string())),
        None => Ok(numbers),
    }
}

/// What a weights file has to be, for messages.
pub const SAFETENSORS: &str = "a safetensors file";

/// Identifies a file that is not a safetensors file at all.
fn identify(bytes: &[u8]) -> Option<String> {
    let length = bytes.first_chunk::<8>().map(|length| u64::from_le_bytes(*length));
    // A header of a sane length, truncated or not, is one.
    let has_header = length.is_some_and(|length| length < 1 << 32) && bytes.get(8).is_none_or(|first| *first == b'{');
    if has_header { None } else { files::identify_or_quote(bytes) }
}

/// Explains an error that a truncated file leads to.
fn explain_truncation(bytes: &[u8], error: &SafeTensorError) -> Option<String> {
    #[derive(Deserialize)]
    struct Info {
        data_offsets: (u64, u64),
    }
    match error {
        SafeTensorError::MetadataIncompleteBuffer => {
            let length = u64::from_le_bytes(*bytes.first_chunk()?);
            let header = bytes.get(8..)?.get(..usize::try_from(length).ok()?)?;
            let tensors: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
            let ends = tensors.into_values().filter_map(|info| serde_json::from_value::<Info>(info).ok());
            let size = 8 + length + ends.map(|info| info.data_offsets.1).max()?;
            Some(format!("the header describes {size} bytes; copy or download the file again"))
        }
        SafeTensorError::HeaderTooSmall => Some("the file ends before its header".to_string()),
        SafeTensorError::InvalidHeaderLength => Some("the file ends within its header".to_string()),
        _ => None,
    }
}
