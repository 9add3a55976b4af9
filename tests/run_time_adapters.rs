//! LoRA adapters that are loaded at run time: tokens and logits against PEFT and against merged models, rows with
//! different adapters in one batch, in every cache and through every door, and adapters that cannot be loaded.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use t5gemma_runtime::{
    Batch, Cancellation, Controls, Engine, EngineOptions, Error, GenerationConfig, Hypothesis, Model, Request,
};

use crate::common::{program, python, stdout, tests};

/// The adapters of the fixture that change linear layers alone.
const ADAPTERS: [&str; 3] = ["plain", "rslora", "pattern"];
/// As everywhere in float32.
const TOLERANCE: f32 = 5e-4;

fn fixture() -> PathBuf {
    tests().join("fixtures/lora")
}

fn adapter(name: &str) -> PathBuf {
    fixture().join("adapters").join(name)
}

fn export(checkpoint: &Path, out: &Path, arguments: &[&str]) -> PathBuf {
    stdout(program("t5gemma-export").arg(checkpoint).arg(out).args(arguments).output().expect("starts"));
    out.to_path_buf()
}

/// The fixture's model for a target, with its adapters loaded.
fn model(folder: &Path, target: &str, arguments: &[&str]) -> Model {
    let arguments = [&["--target", target, "--dtype", "float32", "--lora-inputs", "16"], arguments].concat();
    let model = Model::open(export(&fixture().join("checkpoint"), &folder.join(target), &arguments)).expect("opens");
    ADAPTERS.iter().for_each(|name| model.load_adapter(name, adapter(name)).expect("loads"));
    model
}

fn golden<T>(name: &str, read: impl Fn([u8; 8]) -> T, width: usize) -> Vec<T> {
    let bytes = fs::read(fixture().join("golden.safetensors")).expect("the fixture is there");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let data = file.tensor(name).expect("it is there").data().to_vec();
    let word = |bytes: &[u8]| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        read(word)
    };
    data.chunks_exact(width).map(word).collect()
}

/// The sources of the golden tensors.
fn sources() -> Batch {
    let numbers = |name: &str| golden(name, i64::from_le_bytes, 8);
    Batch::flat(3, numbers("in.input_ids"), numbers("in.attention_mask")).expect("a batch")
}

fn floats(name: &str) -> Vec<f32> {
    golden(name, |word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]), 4)
}

fn cases(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(fixture().join("cases.json")).expect("the fixture is there");
    let cases: Value = serde_json::from_str(&text).expect("JSON");
    cases["adapters"][name]["generate"].as_array().expect("cases").clone()
}

fn tokens(rows: &[Vec<Hypothesis>]) -> Value {
    json!(rows.iter().flatten().map(|hypothesis| &hypothesis.tokens).collect::<Vec<_>>())
}

fn config(model: &Model, options: &Value) -> GenerationConfig {
    model.generation_config().with_json(options.as_object().expect("options")).expect("valid")
}

#[test]
fn adapters_compute_what_peft_computes() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    for target in ["portable", "cpu", "cuda"] {
        let model = model(folder.path(), target, &[]);
        assert_eq!(model.adapters(), ["pattern", "plain", "rslora"]);
        for name in ADAPTERS {
            let expected = floats(&format!("{name}.encoder_last_hidden_state"));
            let batch = sources().with_adapter(&model.adapter(name).expect("loaded"));
            let found = model.encode(&batch, &Cancellation::new()).expect("encodes");
            let seen = sources().mask().to_vec();
            let width = expected.len() / seen.len();
            for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(seen[at / width] == 0 || (found - expected).abs() < TOLERANCE, "{target} {name}");
            }
            for case in cases(name) {
                let mut options = case["options"].clone();
                options["adapter"] = json!(name);
                let rows = model.generate_batch(&sources(), &config(&model, &options), Controls::default());
                let rows = rows.expect("generates");
                assert_eq!(tokens(&rows), case["tokens"], "{target} {name} {}", case["id"]);
                for (hypothesis, score) in
                    rows.iter().flatten().zip(case["sequences_scores"].as_array().into_iter().flatten())
                {
                    let found = f64::from(hypothesis.score.expect("beams have scores"));
                    assert!((found - score.as_f64().expect("a number")).abs() < 5e-4, "{target} {name} {}", case["id"]);
                }
            }
        }
    }
}

#[test]
fn graphs_take_adapters_in_loops_of_ones_own() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let golden = fixture().join("golden.safetensors");
    for target in ["portable", "cpu"] {
        let out = folder.path().join(target);
        export(&fixture().join("checkpoint"), &out, &["--target", target, "--lora-inputs", "8", "--all-logits"]);
        let found = python("adapter_inputs.py", [out, golden.clone(), fixture().join("adapters")]);
        assert_eq!(found.split_whitespace().count(), 2, "{found}");
        for difference in found.split_whitespace() {
            assert!(difference.parse::<f32>().expect("a number") < TOLERANCE, "{target}: {found}");
        }
    }
}

/// Sources of three rows with these adapters.
fn rows_with(model: &Model, names: [Option<&str>; 3]) -> Batch {
    let numbers = |name: &str| golden(name, i64::from_le_bytes, 8);
    let (ids, mask) = (numbers("in.input_ids"), numbers("in.attention_mask"));
    let row = |row: usize| {
        let cut = |all: &[i64]| all[11 * row..][..11].to_vec();
        let batch = Batch::flat(1, cut(&ids), cut(&mask)).expect("a row");
        names[row].map_or(batch.clone(), |name| batch.with_adapter(&model.adapter(name).expect("loaded")))
    };
    Batch::joined((0..3).map(row).collect(), 0).expect("rows")
}

#[test]
fn rows_of_a_batch_have_adapters_of_their_own() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let targets: Vec<Vec<i64>> =
        golden("in.decoder_input_ids", i64::from_le_bytes, 8).chunks(9).map(Vec::from).collect();
    for target in ["portable", "cpu", "cuda"] {
        let model = model(folder.path(), target, &[]);
        let score = |names| {
            let batch = rows_with(&model, names);
            let scores = model.score(&batch, &targets, 0, &Cancellation::new()).expect("scores");
            scores.into_iter().map(|score| score.logprobs.tokens).collect::<Vec<_>>()
        };
        let of_all = |name| score([name; 3]);
        let mixed = score([Some("plain"), None, Some("rslora")]);
        let alone = [Some("plain"), None, Some("rslora")].map(of_all);
        for (row, found) in mixed.iter().enumerate() {
            for (other, alone) in alone.iter().enumerate() {
                let difference = found.iter().zip(&alone[row]).map(|(a, b)| (a - b).abs()).fold(0.0_f32, f32::max);
                assert_eq!(difference < 5e-4, other == row, "{target} row {row} and adapter {other}: {difference}");
            }
        }
    }
}

/// A LoRA adapter of random numbers for a model with these modules.
fn random_adapter(folder: &Path, seed: u64, rank: usize, targets: &[&str], manifest: &Value) -> PathBuf {
    let mut state = seed;
    let mut number = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.6
    };
    let mut modules: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    for module in
        manifest["lora_inputs"]["modules"].as_object().expect("graphs").values().flat_map(|all| all.as_array())
    {
        for module in module {
            let size = |name: &str| module[name].as_u64().expect("a size") as usize;
            modules.insert(module["name"].as_str().expect("a name").into(), [size("input"), size("output")]);
        }
    }
    let mut tensors: Vec<(String, [usize; 2], Vec<u8>)> = Vec::new();
    for (name, [input, output]) in modules {
        if targets.iter().any(|target| name.ends_with(&format!(".{target}"))) {
            for (part, shape) in [("lora_A", [rank, input]), ("lora_B", [output, rank])] {
                let bytes = (0..shape[0] * shape[1]).flat_map(|_| number().to_le_bytes()).collect();
                tensors.push((format!("base_model.model.{name}.{part}.weight"), shape, bytes));
            }
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.clone(), TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("as many bytes as the shape has"))
    });
    fs::create_dir_all(folder).expect("a new folder");
    fs::write(folder.join("adapter_model.safetensors"), safetensors::serialize(views, None).expect("well-formed"))
        .expect("written");
    let mut config = json!({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets});
    config["exclude_modules"] = json!(".*vision_tower.*");
    fs::write(folder.join("adapter_config.json"), config.to_string()).expect("written");
    folder.to_path_buf()
}

const ALL: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// A model with a cache in place, biases and two widths, and three random adapters.
struct InPlace {
    folder: tempfile::TempDir,
    checkpoint: PathBuf,
    names: [&'static str; 3],
}

impl InPlace {
    fn new(arguments: &[&str]) -> InPlace {
        InPlace::of("tiny-bias", arguments)
    }

    fn of(fixture: &str, arguments: &[&str]) -> InPlace {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let checkpoint = tests().join("fixtures/public").join(fixture).join("checkpoint");
        let arguments = [&["--target", "cpu", "--lora-inputs", "12"], arguments].concat();
        export(&checkpoint, &folder.path().join("model"), &arguments);
        let manifest = fs::read(folder.path().join("model/manifest.json")).expect("written");
        let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
        assert_eq!(manifest["cache"], "in_place");
        let of = |name: &str, seed, rank, targets: &[&str]| {
            random_adapter(&folder.path().join(name), seed, rank, targets, &manifest);
        };
        of("all", 1, 4, &ALL);
        of("attention", 2, 12, &["q_proj", "v_proj"]);
        of("mlp", 3, 1, &["down_proj"]);
        InPlace { folder, checkpoint, names: ["all", "attention", "mlp"] }
    }

    fn adapter(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The model, with its adapters.
    fn open(&self) -> Model {
        let model = Model::open(self.folder.path().join("model")).expect("opens");
        self.names.iter().for_each(|name| model.load_adapter(name, self.adapter(name)).expect("loads"));
        model
    }

    /// The model that an adapter is merged into.
    fn merged(&self, name: Option<&str>) -> Model {
        let out = self.folder.path().join(format!("merged-{}", name.unwrap_or("none")));
        let path = name.map(|name| self.adapter(name).display().to_string());
        let flags: Vec<&str> = path.iter().flat_map(|path| ["--adapter", path.as_str()]).collect();
        Model::open(export(&self.checkpoint, &out, &[&["--target", "cpu"], &flags[..]].concat())).expect("opens")
    }
}

/// Sources, options and the adapter of a request.
fn requests(names: &[&'static str]) -> Vec<(Vec<i64>, Value, Option<&'static str>)> {
    let options = [
        json!({"max_new_tokens": 20}),
        json!({"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 2}),
        json!({"max_new_tokens": 9, "do_sample": true, "seed": 7, "num_return_sequences": 3}),
        json!({"max_new_tokens": 30, "num_beams": 3, "length_penalty": 0.4}),
    ];
    let mut all = Vec::new();
    for (at, options) in (0..16).zip(options.iter().cycle()) {
        let source = (0..3 + at % 5).map(|token| 3 + (token * 31 + at * 17) % 170).collect();
        all.push((source, options.clone(), names.iter().copied().map(Some).chain([None]).nth(at as usize / 4)));
    }
    all.into_iter().map(|(source, options, name)| (source, options, name.flatten())).collect()
}

#[test]
fn an_engine_shares_steps_between_adapters() {
    ["tiny-bias", "t2-balanced"].into_iter().for_each(check_shared_steps);
}

fn check_shared_steps(fixture: &str) {
    let model = InPlace::of(fixture, &[]);
    let opened = Arc::new(model.open());
    assert!(Engine::shares_all_steps(&opened));
    let requests = requests(&model.names);
    let generate = |model: &Model, source: &[i64], options: &Value| {
        let batch = Batch::padded(&[source], 0).expect("a source");
        model.generate_batch(&batch, &config(model, options), Controls::default()).expect("generates")
    };
    let merged: BTreeMap<Option<&str>, Model> =
        (model.names.iter().copied().map(Some).chain([None])).map(|name| (name, model.merged(name))).collect();
    let expected: Vec<Value> =
        requests.iter().map(|(source, options, name)| tokens(&generate(&merged[name], source, options))).collect();
    let with = |options: &Value, name: &Option<&str>| {
        let mut options = options.clone();
        options["adapter"] = json!(name);
        options
    };
    for ((source, options, name), expected) in requests.iter().zip(&expected) {
        assert_eq!(tokens(&generate(&opened, source, &with(options, name))), *expected, "{name:?} {options} alone");
    }
    let engine = Engine::new(opened.clone(), EngineOptions::default()).expect("starts");
    // In three orders, so that rows join and leave beside others.
    for stride in [1, 5, 11] {
        let order: Vec<usize> = (0..requests.len()).map(|at| at * stride % requests.len()).collect();
        let running: Vec<_> = order
            .iter()
            .map(|&at| {
                let (source, options, name) = &requests[at];
                let batch = Batch::padded(&[source], 0).expect("a source");
                let request = Request::new(batch, config(&opened, &with(options, name)));
                (at, engine.submit(request).expect("accepted"))
            })
            .collect();
        for (at, generation) in running {
            let (_, options, name) = &requests[at];
            assert_eq!(tokens(&generation.wait().expect("ends")), expected[at], "{name:?} {options} in an engine");
        }
    }
    let stats = engine.stats();
    assert!(stats.stepped_rows > 2 * stats.steps, "rows share steps: {stats:?}");
}

#[test]
fn quantized_models_take_adapters() {
    ["tiny-bias", "t2-balanced"].into_iter().for_each(check_quantized);
}

fn check_quantized(fixture: &str) {
    let model = InPlace::of(fixture, &["--quantize", "int8"]);
    let opened = Arc::new(model.open());
    let engine = Engine::new(opened.clone(), EngineOptions::default()).expect("starts");
    let requests = requests(&model.names);
    let request = |(source, options, name): &(Vec<i64>, Value, Option<&str>)| {
        let mut options = options.clone();
        options["adapter"] = json!(name);
        (Batch::padded(&[source], 0).expect("a source"), config(&opened, &options))
    };
    let running: Vec<_> = requests
        .iter()
        .map(|given| {
            let (batch, config) = request(given);
            engine.submit(Request::new(batch, config)).expect("accepted")
        })
        .collect();
    let mut with_adapter = 0;
    for (given, generation) in requests.iter().zip(running) {
        let (batch, config) = request(given);
        let alone = opened.generate_batch(&batch, &config, Controls::default()).expect("generates");
        assert_eq!(tokens(&generation.wait().expect("ends")), tokens(&alone), "{given:?}");
        let mut base = config;
        base.adapter = None;
        let base = opened.generate_batch(&batch, &base, Controls::default()).expect("generates");
        with_adapter += usize::from(tokens(&base) != tokens(&alone));
    }
    assert!(with_adapter >= 8, "adapters change what is generated: {with_adapter}");
}

#[test]
fn drafts_and_encoder_caches_know_the_adapter() {
    let model = InPlace::new(&["--all-logits"]);
    let opened = model.open();
    let source: Vec<i64> = (0..12).map(|token| 5 + token % 4).collect();
    for round in 0..2 {
        for name in model.names.iter().copied().map(Some).chain([None]) {
            let batch = Batch::padded(&[&source], 0).expect("a source");
            let plain = config(&opened, &json!({"max_new_tokens": 24, "adapter": name}));
            let drafted = json!({"max_new_tokens": 24, "adapter": name, "prompt_lookup_num_tokens": 4});
            let found = [plain, config(&opened, &drafted)]
                .map(|config| opened.generate_batch(&batch, &config, Controls::default()).expect("generates"));
            let merged = model.merged_tokens(name, &source);
            assert_eq!([tokens(&found[0]), tokens(&found[1])], [merged.clone(), merged], "{name:?}, round {round}");
        }
    }
}

impl InPlace {
    /// What the merged model generates greedily.
    fn merged_tokens(&self, name: Option<&str>, source: &[i64]) -> Value {
        let out = self.folder.path().join(format!("merged-{}", name.unwrap_or("none")));
        let model = if out.exists() { Model::open(out).expect("opens") } else { self.merged(name) };
        let batch = Batch::padded(&[source], 0).expect("a source");
        let config = config(&model, &json!({"max_new_tokens": 24}));
        tokens(&model.generate_batch(&batch, &config, Controls::default()).expect("generates"))
    }
}

/// Models whose positions say how far a sequence has come take them as inputs before the adapters.
#[test]
fn models_with_inputs_of_their_own_take_adapters() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let checkpoint = tests().join("fixtures/voice/progress/checkpoint");
    for target in ["portable", "cpu", "cuda"] {
        let base = folder.path().join(target);
        export(&checkpoint, &base, &["--target", target, "--dtype", "float32", "--lora-inputs", "8"]);
        let manifest = fs::read(base.join("manifest.json")).expect("written");
        let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
        let adapter = random_adapter(&folder.path().join("adapter"), 5, 8, &ALL, &manifest);
        let merged = folder.path().join(format!("{target}-merged"));
        let path = adapter.display().to_string();
        export(&checkpoint, &merged, &["--target", target, "--dtype", "float32", "--adapter", &path]);
        let generate = |model: &Model, adapter: Value| {
            let batch = Batch::padded(&[vec![5, 9, 11, 20, 3], vec![7, 8]], 0).expect("sources");
            let batch = batch.with_progress_totals(&[19, 12]).expect("a length for each");
            let options = json!({"max_new_tokens": 16, "suppress_tokens": [73], "adapter": adapter});
            tokens(&model.generate_batch(&batch, &config(model, &options), Controls::default()).expect("generates"))
        };
        let (base, merged) = (Model::open(base).expect("opens"), Model::open(merged).expect("opens"));
        base.load_adapter("mine", adapter).expect("loads");
        assert_eq!(generate(&base, json!("mine")), generate(&merged, json!(null)), "{target}");
        assert_ne!(generate(&base, json!("mine")), generate(&base, json!(null)), "{target}");
    }
}

#[test]
fn adapters_come_and_go_while_requests_run() {
    let model = InPlace::new(&[]);
    let opened = Arc::new(model.open());
    let engine = Engine::new(opened.clone(), EngineOptions::default()).expect("starts");
    let source = vec![5, 6, 7, 8, 9];
    let expected: BTreeMap<&str, Value> =
        model.names.iter().map(|name| (*name, model.merged_tokens(Some(name), &source))).collect();
    let is_over = AtomicBool::new(false);
    let (mut generated, mut unknown) = (0, 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                for name in model.names {
                    opened.unload_adapter(name).expect("loaded");
                    opened.load_adapter(name, model.adapter(name)).expect("loads");
                }
            }
        });
        for round in 0..60 {
            let name = model.names[round % 3];
            let batch = Batch::padded(&[&source], 0).expect("a source");
            let config = config(&opened, &json!({"max_new_tokens": 24, "adapter": name}));
            match engine.submit(Request::new(batch, config)).and_then(|generation| generation.wait()) {
                Ok(rows) => {
                    assert_eq!(tokens(&rows), expected[name], "{name}");
                    generated += 1;
                }
                Err(Error::Options(error)) if error.option == "adapter" => unknown += 1,
                Err(error) => panic!("{name}: {error}"),
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });
    assert!(generated > 0, "{unknown} of 60 found no adapter");
    assert_eq!(opened.adapters(), model.names);
}

#[test]
fn models_without_adapters_are_as_they_were() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let checkpoint = fixture().join("checkpoint");
    for target in ["portable", "cpu", "cuda"] {
        let with = export(
            &checkpoint,
            &folder.path().join(format!("{target}-with")),
            &["--target", target, "--lora-inputs", "4"],
        );
        let without = export(&checkpoint, &folder.path().join(format!("{target}-without")), &["--target", target]);
        for file in ["encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx", "model.onnx_data"] {
            assert_eq!(
                fs::read(with.join(file)).expect("written"),
                fs::read(without.join(file)).expect("written"),
                "{file}"
            );
        }
    }
    let inspect =
        |folder: PathBuf| stdout(program("t5gemma-export").arg("inspect").arg(folder).output().expect("starts"));
    let told = inspect(folder.path().join("cpu-with"));
    assert!(told.contains("MODULE.lora_A, MODULE.lora_B of 27 layers"), "{told}");
    assert!(!inspect(folder.path().join("cpu-without")).contains("lora"));
    let without = Model::open(folder.path().join("cpu-without")).expect("opens");
    let error = without.load_adapter("plain", adapter("plain")).expect_err("takes none").to_string();
    assert!(error.ends_with("cpu-without: the model takes no adapters; export it with lora_inputs"), "{error}");
}

#[test]
fn adapters_that_cannot_be_loaded_are_refused_by_name() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = model(folder.path(), "cpu", &[]);
    let small =
        Model::open(export(&fixture().join("checkpoint"), &folder.path().join("small"), &["--lora-inputs", "2"]));
    let small = small.expect("opens");
    let merge = "merge it with t5gemma-export --adapter instead";
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).expect("a new folder");
    let other = InPlace::new(&[]);
    let cases: [(&Model, &str, PathBuf, &[&str]); 11] = [
        (&model, "a", adapter("dora"), &["adapter_config.json: use_dora: expected false, found true", merge]),
        (&model, "a", adapter("modules-to-save"), &["expected tensors of LoRA alone, found whole tensors", merge]),
        (&model, "a", adapter("embed-only"), &["found whole tensors", "embed_tokens", merge]),
        (&model, "a", adapter("embedding-lora"), &[merge]),
        (&small, "a", adapter("plain"), &["lora_A.weight: expected a rank of at most 2", "found 4"]),
        (&model, "a", empty.clone(), &["empty/adapter_config.json: cannot be read"]),
        (&model, "a", folder.path().join("none"), &["none/adapter_config.json: cannot be read"]),
        (&model, "", adapter("plain"), &["adapter: expected a name, found \"\""]),
        (&model, "plain", adapter("plain"), &["adapter: expected a name that no loaded adapter has", "\"plain\""]),
        (&model, "a", other.adapter("attention"), &["lora_A.weight: expected shape [12, 20]", "found [12, 32]"]),
        (&model, "a", other.adapter("all"), &["expected shape [4, 24], as in this model", "found [4, 40]"]),
    ];
    for (model, name, folder, says) in cases {
        let error = model.load_adapter(name, &folder).expect_err("refused").to_string();
        says.iter().for_each(|says| assert!(error.contains(says), "expected {says:?} in {error}"));
    }
    assert_eq!((model.adapters(), small.adapters()), (ADAPTERS_SORTED.map(String::from).to_vec(), Vec::new()));
    let options = config(&model, &json!({"adapter": "law"}));
    let error = model.generate_batch(&sources(), &options, Controls::default()).expect_err("not loaded").to_string();
    assert_eq!(error, "adapter: expected the name of a loaded adapter: pattern, plain, rslora, found \"law\"");
    let error = small.unload_adapter("law").expect_err("not loaded").to_string();
    assert_eq!(error, "adapter: expected a loaded adapter (there is none), found \"law\"");
    let foreign = other.open().adapter("mlp").expect("loaded");
    let batch = sources().with_adapter(&foreign);
    let error = model.encode(&batch, &Cancellation::new()).expect_err("of another model").to_string();
    assert_eq!(error, "adapter: expected an adapter that was loaded for this model, found \"mlp\" of another model");
}

const ADAPTERS_SORTED: [&str; 3] = ["pattern", "plain", "rslora"];

#[test]
fn exports_that_cannot_take_adapters_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let out = folder.path().join("model");
    let cases: [(&[&str], &str); 4] = [
        (&["--target", "tensorrt"], "--lora-inputs requires --target portable or cpu or cuda (got tensorrt)"),
        (&["--task", "feature-extraction"], "--lora-inputs requires --task text2text-generation"),
        (&["--observe"], "--lora-inputs"),
        (&["--lora-inputs", "0"], "--lora-inputs: expected a rank from 1 to 1024, found 0"),
    ];
    for (arguments, says) in cases {
        let rank: &[&str] = if arguments.contains(&"--lora-inputs") { &[] } else { &["--lora-inputs", "4"] };
        let arguments = [arguments, rank].concat();
        let output = program("t5gemma-export").arg(fixture().join("checkpoint")).arg(&out).args(&arguments).output();
        let output = output.expect("starts");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && told.contains(says), "{arguments:?}: {told}");
        assert!(!out.exists());
    }
}

#[test]
fn requests_of_the_program_choose_their_adapter() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let ids: Vec<Vec<i64>> = sources().ids().chunks(11).map(<[i64]>::to_vec).collect();
    let mask: Vec<Vec<i64>> = sources().mask().chunks(11).map(<[i64]>::to_vec).collect();
    for target in ["cpu", "portable"] {
        let out = folder.path().join(target);
        export(&fixture().join("checkpoint"), &out, &["--target", target, "--lora-inputs", "16"]);
        let (mut lines, mut expected) = (String::new(), Vec::new());
        for name in ADAPTERS {
            for case in cases(name) {
                let mut options = case["options"].clone();
                options["adapter"] = json!(name);
                let request = json!({"input_ids": ids, "attention_mask": mask, "options": options});
                lines += &format!("{request}\n");
                expected.push(case["tokens"].clone());
            }
        }
        lines += &format!("{}\n", json!({"input_ids": ids, "options": {"adapter": "law"}}));
        let flags: Vec<String> = ADAPTERS
            .iter()
            .flat_map(|name| ["--adapter".to_string(), format!("{name}={}", adapter(name).display())])
            .collect();
        let arguments = [vec!["generate".to_string(), out.display().to_string(), "--jsonl".into()], flags].concat();
        let output = crate::common::run("t5gemma", &arguments, &lines);
        assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
        let answers: Vec<Value> = String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        assert_eq!(answers.len(), expected.len() + 1);
        for (answer, expected) in answers.iter().zip(&expected) {
            let rows = answer["sequences"]
                .as_array()
                .expect("sequences")
                .iter()
                .flat_map(|row| row.as_array().expect("a row"));
            let found: Vec<&Value> = rows.map(|sequence| &sequence["tokens"]).collect();
            assert_eq!(json!(found), *expected, "{target}");
        }
        let error = answers.last().expect("one")["error"].as_str().expect("an error");
        assert_eq!(
            error,
            "options.adapter: expected the name of a loaded adapter: pattern, plain, rslora, found \"law\""
        );
    }
    let cpu = folder.path().join("cpu").display().to_string();
    let plain = format!("plain={}", adapter("plain").display());
    let target = json!([3, 5, 7, 9]);
    let request = |adapter: Option<&str>| {
        let request = json!({"input_ids": ids[0], "attention_mask": mask[0], "target_ids": target, "adapter": adapter});
        format!("{request}\n")
    };
    let scored = stdout(crate::common::run(
        "t5gemma",
        ["score", &cpu, "--adapter", &plain],
        request(Some("plain")) + &request(None),
    ));
    let model = model(&folder.path().join("again"), "cpu", &[]);
    for (line, name) in scored.lines().zip([Some("plain"), None]) {
        let answer: Value = serde_json::from_str(line).expect("JSON");
        let batch = Batch::flat(1, ids[0].clone(), mask[0].clone()).expect("a row");
        let batch = name.map_or(batch.clone(), |name| batch.with_adapter(&model.adapter(name).expect("loaded")));
        let expected = model.score(&batch, &[vec![3, 5, 7, 9]], 0, &Cancellation::new()).expect("scores");
        let found = answer["scores"][0]["logprobs"].as_array().unwrap_or_else(|| panic!("{answer}"));
        for (found, expected) in found.iter().zip(&expected[0].logprobs.tokens) {
            assert!((found.as_f64().expect("a number") as f32 - expected).abs() < 2e-5, "{name:?}: {answer}");
        }
    }
    for (arguments, says) in [
        (vec!["generate", &cpu, "--adapter", "plain"], "expected NAME=DIR, found plain"),
        (
            vec!["generate", &cpu, "--adapter", &plain, "--adapter", "b=c", "x"],
            "--adapter: expected one for texts, found 2",
        ),
        (
            vec!["generate", &cpu, "--jsonl", "--adapter", "b=no/folder"],
            "no/folder/adapter_config.json: cannot be read",
        ),
        (
            vec!["generate", &cpu, "--jsonl", "--adapter", &plain, "--adapter", &plain],
            "--adapter: expected a name that no loaded adapter has",
        ),
    ] {
        let output = crate::common::run("t5gemma", &arguments, "");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && told.contains(says), "{arguments:?}: {told}");
    }
}
