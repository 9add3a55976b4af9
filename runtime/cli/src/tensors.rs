//! Tensor files: reads safetensors, and writes safetensors, .npy and JSON files atomically. The only place in the
//! runtime that uses safetensors or .npy.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use ndarray::ArrayD;
use ndarray_npy::WriteNpyExt;
use safetensors::tensor::Dtype;

/// A tensor to be written.
pub enum Numbers {
    /// float32
    Floats(ArrayD<f32>),
    /// int64
    Whole(ArrayD<i64>),
}

/// Writes tensors as a safetensors file.
pub fn write_safetensors(file: Aside, tensors: BTreeMap<String, Numbers>) -> Result<()> {
    let written = safetensors::serialize_to_file(tensors, None, &file.temporary);
    written.with_context(|| file.cannot())?;
    file.publish()
}

/// Writes one tensor as a .npy file.
pub fn write_npy(file: Aside, tensor: &Numbers) -> Result<()> {
    let mut out = File::create(&file.temporary).map(BufWriter::new).with_context(|| file.cannot())?;
    let written = match tensor {
        Numbers::Floats(tensor) => tensor.write_npy(&mut out),
        Numbers::Whole(tensor) => tensor.write_npy(&mut out),
    };
    written.with_context(|| file.cannot())?;
    out.into_inner().map_err(std::io::IntoInnerError::into_error).with_context(|| file.cannot())?;
    file.publish()
}

/// Writes a text file.
pub fn write_text(file: Aside, text: &str) -> Result<()> {
    fs::write(&file.temporary, text).with_context(|| file.cannot())?;
    file.publish()
}

/// A temporary file next to the one to write; renamed to it when complete, otherwise removed on drop.
pub struct Aside {
    temporary: PathBuf,
    path: PathBuf,
}

impl Aside {
    /// Creates the empty file; fails if it exists, since it then belongs to another process.
    pub fn create(path: &Path) -> Result<Aside> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".partial-{}", std::process::id()));
        let temporary = PathBuf::from(temporary);
        ensure!(!path.is_dir(), "{}: expected a file name, found a folder", path.display());
        File::create_new(&temporary).with_context(|| format!("{}: cannot be created", temporary.display()))?;
        unpublished().push(temporary.clone());
        Ok(Aside { temporary, path: path.to_path_buf() })
    }

    /// Removes all temporary files, for a program that exits without dropping them. From then on, its other threads
    /// cannot create any.
    pub fn remove_all() {
        let mut unpublished = unpublished();
        unpublished.drain(..).for_each(|temporary| drop(fs::remove_file(temporary)));
        std::mem::forget(unpublished);
    }

    fn cannot(&self) -> String {
        format!("{}: cannot be written", self.path.display())
    }

    fn publish(self) -> Result<()> {
        fs::rename(&self.temporary, &self.path).with_context(|| self.cannot())
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // Already gone if it was published.
        let _ = fs::remove_file(&self.temporary);
        unpublished().retain(|temporary| *temporary != self.temporary);
    }
}

/// The temporary files that exist.
fn unpublished() -> MutexGuard<'static, Vec<PathBuf>> {
    static UNPUBLISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
    UNPUBLISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The view that safetensors writes from: bytes are made per tensor as it is written, so that only one is in memory
/// twice.
impl safetensors::View for Numbers {
    fn dtype(&self) -> Dtype {
        match self {
            Numbers::Floats(_) => Dtype::F32,
            Numbers::Whole(_) => Dtype::I64,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Numbers::Floats(tensor) => tensor.shape(),
            Numbers::Whole(tensor) => tensor.shape(),
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(match self {
            Numbers::Floats(tensor) => tensor.iter().flat_map(|number| number.to_le_bytes()).collect(),
            Numbers::Whole(tensor) => tensor.iter().flat_map(|number| number.to_le_bytes()).collect(),
        })
    }

    fn data_len(&self) -> usize {
        match self {
            Numbers::Floats(tensor) => tensor.len() * size_of::<f32>(),
            Numbers::Whole(tensor) => tensor.len() * size_of::<i64>(),
        }
    }
}

/// The tensors of a safetensors file.
pub struct Tensors {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Tensors {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Tensors> {
        let bytes = fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        let tensors = Tensors { path: path.to_path_buf(), bytes };
        tensors.open()?;
        Ok(tensors)
    }

    fn open(&self) -> Result<safetensors::SafeTensors<'_>> {
        safetensors::SafeTensors::deserialize(&self.bytes)
            .with_context(|| format!("{}: not a safetensors file", self.path.display()))
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = self.open()?.names().into_iter().map(str::to_string).collect();
        names.sort();
        Ok(names)
    }

    /// A float32 tensor, if it is there.
    pub fn floats(&self, name: &str) -> Result<Option<ArrayD<f32>>> {
        self.read_as(name, Dtype::F32, |four: [u8; 4]| f32::from_le_bytes(four))
    }

    /// An int64 tensor, if it is there.
    pub fn whole(&self, name: &str) -> Result<Option<ArrayD<i64>>> {
        self.read_as(name, Dtype::I64, |eight: [u8; 8]| i64::from_le_bytes(eight))
    }

    fn read_as<T, const N: usize>(
        &self,
        name: &str,
        dtype: Dtype,
        read: fn([u8; N]) -> T,
    ) -> Result<Option<ArrayD<T>>> {
        let file = self.open()?;
        let Ok(view) = file.tensor(name) else { return Ok(None) };
        if view.dtype() != dtype {
            bail!("{}: {name}: expected {dtype:?}, found {:?}", self.path.display(), view.dtype());
        }
        let numbers = view.data().chunks_exact(N).map(|bytes| read(bytes.try_into().expect("chunks are N long")));
        let array = ArrayD::from_shape_vec(view.shape(), numbers.collect());
        array.map(Some).with_context(|| format!("{}: {name}", self.path.display()))
    }
}
