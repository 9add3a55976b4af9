//! Files of numbers: safetensors and .npy written whole or not at all, safetensors read. The runtime's only user of either.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ndarray::{Array, Array3, ArrayD, Dimension};
use ndarray_npy::WriteNpyExt;
use safetensors::tensor::{Dtype, TensorView};

/// Writes float32 tensors as a safetensors file.
pub fn write_safetensors(path: &Path, tensors: &BTreeMap<String, Array3<f32>>) -> Result<()> {
    let bytes: Vec<(&String, Vec<u8>, Vec<usize>)> =
        tensors.iter().map(|(name, tensor)| (name, little_endian(tensor), tensor.shape().to_vec())).collect();
    let views = bytes
        .iter()
        .map(|(name, bytes, shape)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    let file = safetensors::serialize(views, None).context("the tensors cannot be put into one file")?;
    write_aside(path, &file)
}

/// Writes one tensor as a .npy file.
pub fn write_npy(path: &Path, tensor: &Array3<f32>) -> Result<()> {
    let mut file = Vec::new();
    tensor.write_npy(&mut file).context("the tensor cannot be written as .npy")?;
    write_aside(path, &file)
}

fn write_aside(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".partial-{}", std::process::id()));
    let aside = PathBuf::from(aside);
    let written = fs::write(&aside, bytes).and_then(|()| fs::rename(&aside, path));
    if written.is_err() {
        // What could not be written is not worth a second error.
        let _ = fs::remove_file(&aside);
    }
    written.with_context(|| format!("{}: cannot be written", path.display()))
}

fn little_endian<D: Dimension>(tensor: &Array<f32, D>) -> Vec<u8> {
    tensor.iter().flat_map(|number| number.to_le_bytes()).collect()
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
