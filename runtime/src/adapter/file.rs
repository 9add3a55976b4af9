//! Reads a PEFT adapter folder: `adapter_config.json` and `adapter_model.safetensors`, the only file of that format that
//! the runtime reads.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use t5gemma_graphs::adapter::{
    AdapterConfig, AdapterTensors, CONFIG_FILE, ModuleKind, ModuleParts, PICKLE_FILE, WEIGHTS_FILE, check_modules,
};
use t5gemma_graphs::interface::{DType, LoraModule};
use t5gemma_graphs::json::{cut, list, parse, shown};
use t5gemma_graphs::manifest::{LoraInputs, Manifest};

use super::{Pair, modules_by_name};
use crate::error::Error;
use crate::tensors::float_tensor;

/// What to do with an adapter that graphs cannot take as inputs.
const MERGE: &str = "merge it with t5gemma-export --adapter instead";

/// Reads an adapter: its modules, and its greatest rank.
pub(super) fn read(
    folder: &Path,
    manifest: &Manifest,
    inputs: &LoraInputs,
) -> Result<(HashMap<String, Pair>, usize), Error> {
    let Manifest { dtype, family, .. } = *manifest;
    let config = read_config(&folder.join(CONFIG_FILE))?;
    let path = folder.join(WEIGHTS_FILE);
    if !path.exists() && folder.join(PICKLE_FILE).exists() {
        let problem = format!(
            "expected {WEIGHTS_FILE}, found {PICKLE_FILE} (a pickle: load the adapter and save it with \
             safe_serialization=True)"
        );
        return Err(Error::File { path: folder.to_path_buf(), problem });
    }
    let bytes = fs::read(&path).map_err(Error::reading(&path))?;
    let problem = |problem: String| Error::File { path: path.clone(), problem };
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| problem(format!("expected a complete safetensors file: {}", cut(&error.to_string()))))?;
    let tensors: BTreeMap<&str, TensorView> = file.iter().collect();
    let mut sorted = AdapterTensors::of(tensors.keys().copied(), family)
        .map_err(|(expected, found)| problem(format!("expected {expected}, found {found}")))?;
    let config = config.spelled(&sorted.spelling);
    let is_of_vision = |name: &str| family.tensors().vision.iter().any(|start| name.starts_with(start));
    if manifest.facts.vision.is_none() {
        sorted.modules.retain(|name, _| !is_of_vision(name));
    }
    if let Some(name) = sorted.modules.keys().find(|name| is_of_vision(name)) {
        let expected = "a linear layer of the text stacks";
        return Err(problem(format!("{}: expected {expected}, found one of the vision tower ({MERGE})", cut(name))));
    }
    let only_mergeable = sorted.replacements.values().chain(sorted.token_rows.values());
    let only_mergeable: Vec<String> = only_mergeable.cloned().collect();
    if !only_mergeable.is_empty() {
        let found = list(&only_mergeable);
        return Err(problem(format!("expected tensors of LoRA alone, found whole tensors ({MERGE}): {found}")));
    }
    if config.use_dora {
        return Err(Error::File {
            path: folder.join(CONFIG_FILE),
            problem: format!("use_dora: expected false, found true ({MERGE})"),
        });
    }
    let known = modules_by_name(inputs);
    let reader = Reader { path: &path, config: &config, tensors: &tensors, dtype, inputs };
    let mut modules = HashMap::new();
    let mut greatest = 0;
    for (name, parts) in &sorted.modules {
        let Some(module) = known.get(name.as_str()) else {
            let expected = "a linear layer of this model's encoder or decoder";
            return Err(problem(format!("{}: expected {expected}, found another module ({MERGE})", cut(name))));
        };
        let (pair, rank) = reader.module(module, parts)?;
        greatest = greatest.max(rank);
        modules.insert(name.clone(), pair);
    }
    let all: BTreeMap<String, ModuleKind> = known.keys().map(|name| (name.to_string(), ModuleKind::Linear)).collect();
    let found: BTreeSet<String> = sorted.modules.keys().cloned().collect();
    check_modules(&config.modules(&all), &found)
        .map_err(|(expected, found)| problem(format!("expected {expected}, found {found}")))?;
    Ok((modules, greatest))
}

fn read_config(path: &Path) -> Result<AdapterConfig, Error> {
    let text = fs::read_to_string(path).map_err(Error::reading(path))?;
    let problem = |problem: String| Error::File { path: path.to_path_buf(), problem };
    let fields = match parse(&text) {
        Ok(Value::Object(fields)) => fields,
        Ok(other) => return Err(problem(format!("expected a JSON object, found {}", shown(&other)))),
        Err(error) => return Err(problem(format!("expected a JSON object, found {error}"))),
    };
    AdapterConfig::parse(fields).map_err(|error| problem(error.to_string()))
}

/// What the modules of an adapter are read by.
struct Reader<'r> {
    path: &'r Path,
    config: &'r AdapterConfig,
    tensors: &'r BTreeMap<&'r str, TensorView<'r>>,
    dtype: DType,
    inputs: &'r LoraInputs,
}

impl Reader<'_> {
    fn invalid(&self, name: &str, expected: impl AsRef<str>, found: impl AsRef<str>) -> Error {
        let problem = format!("{}: expected {}, found {}", cut(name), expected.as_ref(), found.as_ref());
        Error::File { path: self.path.to_path_buf(), problem }
    }

    /// `A` and `B` of a module as its inputs, and its rank.
    fn module(&self, module: &LoraModule, parts: &ModuleParts) -> Result<(Pair, usize), Error> {
        let name = &module.name;
        if let Some(bias) = &parts.bias {
            return Err(self.invalid(bias, "an adapter without biases", format!("one with them ({MERGE})")));
        }
        if let Some(magnitude) = &parts.magnitude {
            return Err(self.invalid(magnitude, "none without use_dora", "a lora_magnitude_vector"));
        }
        let (Some(a), Some(b), false) = (&parts.a, &parts.b, parts.is_embedding) else {
            let missing = if parts.a.is_none() { "no lora_A" } else { "no lora_B" };
            let found = if parts.is_embedding { "those of an embedding" } else { missing };
            return Err(self.invalid(name, "lora_A and lora_B", found));
        };
        let rank = self.config.rank_of(name) as usize;
        if rank > self.inputs.rank {
            let expected =
                format!("a rank of at most {}, that of the model's inputs (--lora-inputs)", self.inputs.rank);
            return Err(self.invalid(a, expected, rank.to_string()));
        }
        let scale = self.config.scale_of(name) as f32;
        let (a, b) = (self.numbers(a, [rank, module.input])?, self.numbers(b, [module.output, rank])?);
        let scaled: Vec<f32> = b.iter().map(|number| number * scale).collect();
        let tensor = |shape: [usize; 2], numbers: &[f32]| {
            let [rows, columns] = shape;
            let transposed = (0..columns).flat_map(|column| (0..rows).map(move |row| numbers[row * columns + column]));
            float_tensor(self.dtype, [columns, rows], transposed.collect())
                .map(Arc::new)
                .map_err(Error::onnxruntime("preparing an adapter"))
        };
        Ok(([tensor([rank, module.input], &a)?, tensor([module.output, rank], &scaled)?], rank))
    }

    /// The numbers of a tensor that must have this shape.
    fn numbers(&self, name: &str, shape: [usize; 2]) -> Result<Vec<f32>, Error> {
        let tensor = &self.tensors[name];
        if tensor.shape() != shape {
            return Err(self.invalid(
                name,
                format!("shape {shape:?}, as in this model"),
                format!("{:?}", tensor.shape()),
            ));
        }
        let bytes = tensor.data();
        let halves = || bytes.chunks_exact(2).map(|half| [half[0], half[1]]);
        let numbers: Vec<f32> = match tensor.dtype() {
            Dtype::F32 => {
                bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
            }
            Dtype::F16 => halves().map(|half| f16::from_le_bytes(half).to_f32()).collect(),
            Dtype::BF16 => halves().map(|half| bf16::from_le_bytes(half).to_f32()).collect(),
            other => return Err(self.invalid(name, "F32, F16 or BF16", format!("{other:?}"))),
        };
        match numbers.iter().find(|number| !number.is_finite()) {
            Some(number) => Err(self.invalid(name, "finite numbers", number.to_string())),
            None => Ok(numbers),
        }
    }
}
