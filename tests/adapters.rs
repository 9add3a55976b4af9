//! LoRA adapters merged into the weights: logits, hidden states and tokens against PEFT without merging, and adapters that
//! do not fit.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use ndarray::Axis;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use t5gemma_graphs::Target;
use t5gemma_runtime::{Batch, Cancellation, Controls, Encoder, Model};

use crate::common::{program, python, stdout, tests};

const ADAPTERS: [&str; 7] = ["plain", "rslora", "dora", "modules-to-save", "pattern", "embed-only", "embedding-lora"];
/// As everywhere in float32.
const TOLERANCE: f32 = 5e-4;

fn fixture() -> PathBuf {
    tests().join("fixtures/lora")
}

fn adapter(name: &str) -> PathBuf {
    fixture().join("adapters").join(name)
}

/// Exports the base model with these arguments besides.
fn export(out: &Path, arguments: &[&str]) -> Output {
    let mut command = program("t5gemma-export");
    command.arg(fixture().join("checkpoint")).arg(out).args(arguments).output().expect("starts")
}

fn merged(out: &Path, name: &str, arguments: &[&str]) {
    let adapter = adapter(name);
    let adapter = adapter.to_str().expect("UTF-8");
    stdout(export(out, &[&["--adapter", adapter], arguments].concat()));
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The sources of the golden tensors.
fn sources() -> Batch {
    let bytes = fs::read(fixture().join("golden.safetensors")).expect("the fixture is there");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let numbers = |name: &str| -> Vec<i64> {
        let data = file.tensor(name).expect("it is there").data().to_vec();
        data.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
    };
    Batch::flat(3, numbers("in.input_ids"), numbers("in.attention_mask")).expect("a batch")
}

/// The tokens and scores of every case of an adapter.
fn check_cases(model: &Path, name: &str, what: &str) {
    let text = fs::read_to_string(fixture().join("cases.json")).expect("the fixture is there");
    let cases: Value = serde_json::from_str(&text).expect("JSON");
    let model = Model::open(model).expect("opens");
    for case in cases["adapters"][name]["generate"].as_array().expect("cases") {
        let options = case["options"].as_object().expect("options");
        let options = model.generation_config().with_json(options).expect("valid");
        let rows = model.generate_batch(&sources(), &options, Controls::default()).expect("generates");
        let found: Vec<_> = rows.iter().flatten().map(|hypothesis| json!(hypothesis.tokens)).collect();
        assert_eq!(json!(found), case["tokens"], "{what} {name} {}", case["id"]);
        if let Some(scores) = case["sequences_scores"].as_array() {
            for (hypothesis, score) in rows.iter().flatten().zip(scores) {
                let difference =
                    f64::from(hypothesis.score.expect("beams have scores")) - score.as_f64().expect("a number");
                assert!(difference.abs() < 5e-4, "{what} {name} {}: {difference}", case["id"]);
            }
        }
    }
}

#[test]
fn merged_adapters_compute_what_peft_computes_without_merging() {
    for name in ADAPTERS {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let model = folder.path().join("model");
        merged(&model, name, &["--all-logits"]);
        let golden = fixture().join("golden.safetensors");
        let found = python("adapter_logits.py", [model.as_os_str(), golden.as_os_str(), name.as_ref()]);
        for difference in found.split_whitespace() {
            let difference: f32 = difference.parse().expect("a number");
            assert!(difference <= TOLERANCE, "{name}: {found}");
        }
        for target in Target::ALL {
            let model = folder.path().join(target.name());
            merged(&model, name, &["--target", target.name(), "--dtype", "float32"]);
            check_cases(&model, name, target.name());
        }
        let manifest = fs::read_to_string(model.join("manifest.json")).expect("written");
        let manifest: Value = serde_json::from_str(&manifest).expect("JSON");
        assert_eq!((&manifest["adapters"][0]["name"], &manifest["adapters"][0]["scale"]), (&json!(name), &json!(1.0)));
        assert_eq!(manifest["adapters"][0]["sha256"].as_str().map(str::len), Some(64));
        assert!(manifest["source"]["files"].as_object().is_none_or(|files| files.len() == 1), "{}", manifest["source"]);
    }
}

/// The only output of an encoder for the sources, by its exports.
fn states(folder: &Path, label: &str, arguments: &[&str]) -> ndarray::Array3<f32> {
    let out = folder.join(label);
    stdout(export(&out, &[&["--task", "feature-extraction"], arguments].concat()));
    Encoder::open(&out).expect("opens").encode(&sources(), &Cancellation::new()).expect("encodes")
}

#[test]
fn scales_and_several_adapters_add_up() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let path = |name: &str, scale: &str| format!("{}{scale}", adapter(name).display());
    let of = |label: &str, adapters: &[String]| {
        let flags: Vec<&str> = adapters.iter().flat_map(|adapter| ["--adapter", adapter.as_str()]).collect();
        states(folder.path(), label, &flags)
    };
    let none = of("none", &[]);
    assert_eq!(of("zero", &[path("plain", "=0")]), none);
    let close = |a: &ndarray::Array3<f32>, b: &ndarray::Array3<f32>| (a - b).iter().all(|x| x.abs() < 2e-5);
    let whole = of("whole", &[path("plain", "")]);
    assert!(!close(&whole, &none));
    assert!(close(&of("halves", &[path("plain", "=0.5"), path("plain", "=0.5")]), &whole));
    assert!(close(&of("undone", &[path("plain", "=1.5"), path("plain", "=-0.5")]), &whole));
    let (ab, ba) = ([path("plain", ""), path("dora", "")], [path("dora", ""), path("plain", "")]);
    assert!(close(&of("ab", &ab), &of("ba", &ba)), "each is a change of the original");
    // A folder may have the sign in its name.
    let odd = folder.path().join("a=b");
    fs::create_dir(&odd).expect("a new folder");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(adapter("plain").join(file), odd.join(file)).expect("copied");
    }
    assert_eq!(of("odd", &[odd.display().to_string()]), whole);
}

#[test]
fn quantized_and_pooled_exports_are_merged_first() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let path = adapter("rslora").display().to_string();
    let exact = states(folder.path(), "exact", &["--adapter", &path]);
    let quantized = states(folder.path(), "int8", &["--adapter", &path, "--target", "cpu", "--quantize", "int8"]);
    let without = states(folder.path(), "without", &["--target", "cpu", "--quantize", "int8"]);
    let norm = |x: ndarray::Array3<f32>| {
        let mask = sources();
        let rows = x.into_shape_with_order([33, 24]).expect("33 tokens");
        let rows = rows.axis_iter(Axis(0)).zip(mask.mask()).filter(|(_, seen)| **seen != 0);
        rows.map(|(row, _)| row.iter().map(|x| x * x).sum::<f32>()).sum::<f32>().sqrt()
    };
    assert!(norm(&quantized - &exact) < 0.1 * norm(&without - &exact));
}

#[test]
fn an_untied_head_is_told() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    for (name, is_told) in [("plain", false), ("embed-only", true), ("embedding-lora", true)] {
        let adapter = adapter(name);
        let output = export(&folder.path().join(name), &["--adapter", adapter.to_str().expect("UTF-8")]);
        assert_eq!(told(&output).contains("tied in the base model"), is_told, "{name}: {}", told(&output));
        assert!(!told(&output).contains("wrapped model"), "{}", told(&output));
    }
}

/// A copy of an adapter with other settings or tensors.
struct Changed {
    folder: tempfile::TempDir,
}

impl Changed {
    fn of(name: &str) -> Changed {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(adapter(name).join(file), folder.path().join(file)).expect("copied");
        }
        Changed { folder }
    }

    fn config(self, name: &str, value: Value) -> Changed {
        let path = self.folder.path().join("adapter_config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("copied")).expect("JSON");
        config[name] = value;
        fs::write(&path, config.to_string()).expect("written");
        self
    }

    /// Keeps, renames and reshapes tensors.
    fn tensors(self, change: impl Fn(&str, &[usize]) -> Option<(String, Vec<usize>)>) -> Changed {
        let path = self.folder.path().join("adapter_model.safetensors");
        let bytes = fs::read(&path).expect("copied");
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let tensors: Vec<(String, TensorView<'_>)> = file
            .tensors()
            .into_iter()
            .filter_map(|(name, view)| {
                let (name, shape) = change(&name, view.shape())?;
                let size = view.dtype().bitsize() / 8 * shape.iter().product::<usize>();
                let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
                let data = bytes.get(start..start + size)?;
                Some((name, TensorView::new(view.dtype(), shape, data).expect("as many bytes as the shape has")))
            })
            .collect();
        let changed = safetensors::serialize(tensors, None).expect("well-formed");
        fs::write(&path, changed).expect("written");
        self
    }
}

#[test]
fn adapters_that_cannot_be_merged_are_refused_by_name() {
    let same = |name: &str, shape: &[usize]| Some((name.to_string(), shape.to_vec()));
    let is_first = |name: &str| name.ends_with("encoder.layers.0.self_attn.q_proj.lora_A.weight");
    let without_file = |file: &str| {
        let changed = Changed::of("plain");
        fs::remove_file(changed.folder.path().join(file)).expect("copied");
        changed
    };
    let pickled = || {
        let changed = without_file("adapter_model.safetensors");
        fs::write(changed.folder.path().join("adapter_model.bin"), b"PK\x03\x04").expect("written");
        changed
    };
    let cases: Vec<(Changed, &[&str])> = vec![
        (
            Changed::of("plain").config("peft_type", json!("IA3")),
            &["adapter_config.json: peft_type: expected LORA, found \"IA3\""],
        ),
        (Changed::of("plain").config("layer_replication", json!([[0, 1]])), &["layer_replication: expected none"]),
        (
            Changed::of("plain").config("init_lora_weights", json!("pissa")),
            &["init_lora_weights:", "path_initial_model_for_weight_conversion"],
        ),
        (
            Changed::of("plain").config("r", json!(5)),
            &["lora_A.weight: expected rank 5, as adapter_config.json says, found 4"],
        ),
        (Changed::of("plain").config("use_dora", json!(true)), &["expected a lora_magnitude_vector, found none"]),
        (
            Changed::of("dora").config("use_dora", json!(false)),
            &["expected none without use_dora, found a lora_magnitude_vector"],
        ),
        (
            Changed::of("plain").config("target_modules", json!(["q_proj", "v_proj", "o_proj"])),
            &["expected tensors for all modules of adapter_config.json, found none for", "o_proj"],
        ),
        (
            Changed::of("plain").config("target_modules", json!(["q_proj"])),
            &[
                "expected tensors for the modules of adapter_config.json and of this checkpoint alone, found tensors for",
                "v_proj",
            ],
        ),
        (
            Changed::of("plain").tensors(move |name, shape| if is_first(name) { None } else { same(name, shape) }),
            &["self_attn.q_proj: expected lora_A and lora_B, found no lora_A"],
        ),
        (
            Changed::of("plain").tensors(move |name, shape| {
                if is_first(name) { Some((name.into(), vec![4, 20])) } else { same(name, shape) }
            }),
            &["lora_A.weight: expected shape [4, 24], as in the base model, found [4, 20]"],
        ),
        (
            Changed::of("plain").tensors(|name, shape| Some((name.replace("layers.1.", "layers.9."), shape.to_vec()))),
            &["layers.9.", "expected an adapter of this base model, found no model."],
        ),
        (
            Changed::of("plain").tensors(|name, shape| Some((name.replace("base_model.model.", ""), shape.to_vec()))),
            &["expected a tensor name that begins with base_model.model."],
        ),
        (
            Changed::of("modules-to-save").tensors(|name, shape| match shape {
                [64, width] => Some((name.into(), vec![63, *width])),
                _ => Some((name.into(), shape.to_vec())),
            }),
            &["expected shape [64, ", "as in the base model, found [63, "],
        ),
        (without_file("adapter_config.json"), &["adapter_config.json: expected a file, found nothing"]),
        (without_file("adapter_model.safetensors"), &["adapter_model.safetensors: expected a file, found nothing"]),
        (pickled(), &["expected adapter_model.safetensors, found adapter_model.bin", "safe_serialization=True"]),
    ];
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let out = folder.path().join("model");
    for (changed, says) in &cases {
        let output = export(&out, &["--adapter", changed.folder.path().to_str().expect("UTF-8")]);
        let told = told(&output);
        assert_eq!(output.status.code(), Some(1), "{says:?}: {told}");
        says.iter().for_each(|says| assert!(told.contains(says), "expected {says:?} in {told}"));
        assert!(!out.exists(), "{says:?}");
    }
    let (saved, plain) = (adapter("embed-only"), adapter("plain"));
    let (saved, plain) = (saved.to_str().expect("UTF-8"), plain.to_str().expect("UTF-8"));
    let twice = export(&out, &["--adapter", saved, "--adapter", saved]);
    assert!(told(&twice).contains("expected one adapter that replaces model."), "{}", told(&twice));
    let missing = export(&out, &["--adapter", "no/such/folder"]);
    assert!(told(&missing).contains("no/such/folder: expected an adapter folder, found nothing"), "{}", told(&missing));
    let scaled = export(&out, &["--adapter", &format!("{plain}=much")]);
    assert!(
        scaled.status.code() == Some(2) && told(&scaled).contains("expected DIR, or DIR=SCALE"),
        "{}",
        told(&scaled)
    );
    assert!(!out.exists());
}

#[test]
fn rows_of_tokens_are_replaced() {
    // The rows of an adapter that trains tokens, in the place of a whole embedding.
    let rows = |name: &str, shape: &[usize]| match name {
        "base_model.model.model.encoder.embed_tokens.weight" => {
            let name = "base_model.model.model.encoder.embed_tokens.token_adapter.trainable_tokens_delta";
            Some((name.to_string(), vec![2, shape[1]]))
        }
        "base_model.model.model.decoder.embed_tokens.weight" => None,
        _ => Some((name.to_string(), shape.to_vec())),
    };
    let of = |indices: Value| {
        let changed = Changed::of("embed-only").config("trainable_token_indices", indices).tensors(rows);
        changed.config("modules_to_save", json!(null)).config("lora_alpha", json!(0))
    };
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let encode = |label: &str, changed: Option<&Changed>, token: i64| {
        let out = folder.path().join(label);
        let path = changed.map(|changed| changed.folder.path().display().to_string());
        let flags: Vec<&str> = path.iter().flat_map(|path| ["--adapter", path.as_str()]).collect();
        stdout(export(&out, &[&["--task", "feature-extraction", "--hidden-layer", "0"], &flags[..]].concat()));
        let encoder = Encoder::open(&out).expect("opens");
        let batch = Batch::padded(&[[token]], 0).expect("a batch");
        encoder.encode(&batch, &Cancellation::new()).expect("encodes").into_iter().collect::<Vec<f32>>()
    };
    let changed = of(json!([7, 9]));
    // The first two rows of the saved embedding are those of the tokens 7 and 9.
    let bytes = fs::read(adapter("embed-only").join("adapter_model.safetensors")).expect("the fixture is there");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let saved = file.tensor("base_model.model.model.encoder.embed_tokens.weight").expect("it is there");
    let saved: Vec<f32> = saved.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let row = |at: usize| saved[24 * at..][..24].iter().map(|x| x * 24_f32.sqrt()).collect::<Vec<_>>();
    let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
    assert!(close(&encode("7", Some(&changed), 7), &row(0)));
    assert!(close(&encode("9", Some(&changed), 9), &row(1)));
    assert!(close(&encode("8", Some(&changed), 8), &encode("base", None, 8)));
    let outside = of(json!([7, 64]));
    let output = export(&folder.path().join("outside"), &["--adapter", outside.folder.path().to_str().expect("UTF-8")]);
    assert!(told(&output).contains("expected token ids below 64, found 64"), "{}", told(&output));
}

#[test]
fn a_t5gemma_2_is_exported_without_what_only_the_first_family_has() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("model");
    for (arguments, says) in [
        (&["--encoder-window", "exclusive"][..], "--encoder-window: expected the window of t5gemma2"),
        (&["--source-positions", "float"], "a custom interface: expected a T5Gemma, found T5Gemma2"),
    ] {
        let mut command = program("t5gemma-export");
        let checkpoint = tests().join("fixtures/public/t2-balanced/checkpoint");
        let output = command.arg(checkpoint).arg(&out).args(arguments).output().expect("starts");
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && message.contains(says) && !out.exists(), "{arguments:?}: {message}");
    }
}
