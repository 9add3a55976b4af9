//! `t5gemma-export adapt`: the checkpoints that it makes, bit for bit, and what they compute after an export, against the reference of
//! `fixtures/scripts/make_adapt_fixtures.py`. What it refuses is in `broken/adaptations.rs`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ndarray::s;
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::Logits;
use t5gemma_graphs::task::Task;
use t5gemma_runtime::{Batch, Cancellation, Controls, Encoder, Model};
use tempfile::TempDir;

use crate::common::{exported_from, program, python, stdout, tests};

const FIXTURES: [&str; 3] = ["balanced", "unbalanced", "untied"];
/// As everywhere in float32.
pub const TOLERANCE: f32 = 5e-4;

/// A fixture with its cases.
struct Fixture {
    name: &'static str,
    cases: Value,
}

impl Fixture {
    fn all() -> impl Iterator<Item = Fixture> {
        FIXTURES.into_iter().map(Fixture::named)
    }

    fn named(name: &'static str) -> Fixture {
        let text = fs::read_to_string(folder(name).join("cases.json")).expect("the fixture is there");
        Fixture { name, cases: serde_json::from_str(&text).expect("JSON") }
    }

    /// The folder of one of the two sources.
    fn source(&self, side: &str) -> PathBuf {
        folder(self.name).join(self.cases[side].as_str().expect("a name"))
    }

    fn cases(&self) -> &Map<String, Value> {
        self.cases["cases"].as_object().expect("cases by name")
    }

    /// Adapts with these arguments besides; returns what is said on stderr.
    fn adapt(&self, out: &Path, arguments: &[String]) -> String {
        let mut command = program("t5gemma-export");
        command.arg("adapt").args([self.source("encoder"), self.source("decoder")]).arg(out).args(arguments);
        let output = command.output().expect("the program starts");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(stdout(output), "", "stdout is for results");
        told
    }

    /// The checkpoint of a case, in a folder of its own.
    fn adapted(&self, case: &str) -> (TempDir, PathBuf) {
        let scratch = scratch();
        let out = scratch.path().join("out");
        self.adapt(&out, &arguments(&self.cases()[case]["options"]));
        (scratch, out)
    }

    fn golden(&self) -> PathBuf {
        folder(self.name).join("golden.safetensors")
    }

    /// The sources that the golden tensors are of.
    fn batch(&self) -> Batch {
        let (rows, ids) = integers(&self.golden(), "in.input_ids");
        Batch::flat(rows, ids, integers(&self.golden(), "in.attention_mask").1).expect("a batch")
    }
}

fn folder(name: &str) -> PathBuf {
    tests().join("fixtures/adapt").join(name)
}

fn scratch() -> TempDir {
    tempfile::tempdir().expect("a temporary folder can be made")
}

/// The options of a case as flags.
fn arguments(options: &Value) -> Vec<String> {
    let options = options.as_object().expect("options");
    let flag = |(name, value): (&String, &Value)| {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_string);
        format!("--{}={value}", name.replace('_', "-"))
    };
    options.iter().map(flag).collect()
}

/// The number of rows and the elements of a tensor of integers.
pub fn integers(path: &Path, name: &str) -> (usize, Vec<i64>) {
    let bytes = fs::read(path).expect("the fixture is there");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let view = file.tensor(name).expect("it is there");
    (view.shape()[0], view.data().as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect())
}

/// Type, shape and bytes of every tensor of a checkpoint, whatever its files.
pub fn tensors(checkpoint: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let mut tensors = BTreeMap::new();
    for name in names(checkpoint).iter().filter(|name| name.ends_with(".safetensors")) {
        let bytes = fs::read(checkpoint.join(name)).expect("readable");
        for (tensor, view) in SafeTensors::deserialize(&bytes).expect("a safetensors file").tensors() {
            let told = (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec());
            assert!(tensors.insert(tensor.clone(), told).is_none(), "{tensor} is in two files");
        }
    }
    tensors
}

pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("listed");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("listed").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

pub fn json_of(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Largest differences of a model's hidden states and logits from those of golden tensors.
pub fn apart(model: &Path, golden: &Path, name: &str) -> [f32; 2] {
    let told = python("adapter_logits.py", [model.as_os_str(), golden.as_os_str(), name.as_ref()]);
    let numbers: Vec<f32> = told.split_whitespace().map(|number| number.parse().expect("a number")).collect();
    numbers.try_into().expect("two numbers")
}

/// Greedy tokens of a fixture's sources.
fn greedy(model: &Path, fixture: &Fixture) -> Value {
    let model = Model::open(model).expect("opens");
    let options =
        json!({"max_new_tokens": fixture.cases["max_new_tokens"], "eos_token_id": fixture.cases["eos_token_id"]});
    let options = model.generation_config().with_json(options.as_object().expect("an object")).expect("valid");
    let rows = model.generate_batch(&fixture.batch(), &options, Controls::default()).expect("generates");
    json!(rows.iter().map(|row| row[0].tokens.clone()).collect::<Vec<_>>())
}

#[test]
fn every_tensor_and_field_is_that_of_the_reference() {
    for fixture in Fixture::all() {
        for (name, case) in fixture.cases() {
            let what = format!("{} {name}", fixture.name);
            let (_scratch, out) = fixture.adapted(name);
            let found = tensors(&out).into_iter().map(|(tensor, (dtype, shape, bytes))| {
                (tensor, json!([dtype, shape, hex::encode(Sha256::digest(&bytes))]))
            });
            assert_eq!(Value::Object(found.collect()), case["tensors"], "{what}");
            for file in ["config", "generation_config"] {
                assert_eq!(json_of(&out.join(format!("{file}.json"))), case[file], "{what}: {file}");
            }
            let files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"];
            assert_eq!(names(&out), files, "{what}");
            let tokenizer = |folder: &Path| fs::read(folder.join("tokenizer.json")).expect("there");
            assert_eq!(tokenizer(&out), tokenizer(&fixture.source("decoder")), "{what}");
        }
    }
}

#[test]
fn exported_models_compute_what_transformers_computes() {
    for fixture in Fixture::all() {
        for (name, case) in fixture.cases() {
            let what = format!("{} {name}", fixture.name);
            let (_scratch, out) = fixture.adapted(name);
            let label = format!("adapted-{what}");
            let model = exported_from(&out, &label, Export::default().logits(Logits::All));
            let differences = apart(&model, &fixture.golden(), name);
            assert!(differences.iter().all(|difference| *difference <= TOLERANCE), "{what}: {differences:?}");
            assert_eq!(greedy(&model, &fixture), case["tokens"], "{what}");
            let model = exported_from(&out, &format!("{label}-cpu"), Export::default().target(Target::Cpu));
            assert_eq!(greedy(&model, &fixture), case["tokens"], "{what}, cpu");
        }
    }
}

/// The decoder is Gemma 2 as long as cross-attention adds nothing, whatever its matrices are and whatever the source is.
#[test]
fn a_decoder_with_closed_norms_is_gemma_2() {
    for fixture in Fixture::all() {
        for (name, case) in fixture.cases() {
            let what = format!("{} {name}", fixture.name);
            let scratch = scratch();
            let out = scratch.path().join("out");
            let mut options = case["options"].clone();
            options["cross_norms"] = "closed".into();
            fixture.adapt(&out, &arguments(&options));
            let model = exported_from(&out, &format!("closed-{what}"), Export::default().logits(Logits::All));
            let [_, logits] = apart(&model, &fixture.golden(), &format!("{name}.gemma2"));
            assert!(logits <= TOLERANCE, "{what}: {logits}");
            let tokens = greedy(&model, &fixture);
            let rows = tokens.as_array().expect("rows");
            assert!(rows.iter().all(|row| row == &rows[0]), "{what}: {tokens}");
        }
    }
}

/// A position that sees only itself is computed alike with causal and with bidirectional attention: the first of a causal model, and the
/// only one of an encoder.
#[test]
fn an_encoder_of_one_token_is_gemma_2() {
    for fixture in Fixture::all() {
        let bytes = fs::read(fixture.golden()).expect("the fixture is there");
        let golden = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let batch = fixture.batch();
        let length = batch.ids().len() / 3;
        for name in fixture.cases().keys() {
            let what = format!("{} {name}", fixture.name);
            let (_scratch, out) = fixture.adapted(name);
            let task = Task::all().into_iter().find(|task| task.name() == "feature-extraction");
            let model = exported_from(&out, &format!("encoder-{what}"), Export::default().task(task));
            let first: Vec<i64> = batch.ids().iter().step_by(length).copied().collect();
            let alone = Batch::flat(3, first, vec![1; 3]).expect("a batch");
            let found = Encoder::open(&model).expect("opens").encode(&alone, &Cancellation::new()).expect("encodes");
            let causal = golden.tensor(&format!("{name}.gemma2.encoder_last_hidden_state")).expect("it is there");
            let width = causal.shape()[2];
            for row in 0..3 {
                let start = row * length * width * 4;
                let expected =
                    causal.data()[start..start + width * 4].as_chunks().0.iter().map(|x| f32::from_le_bytes(*x));
                let found = found.slice(s![row, 0, ..]);
                assert_eq!(found.len(), width);
                assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= TOLERANCE), "{what}, row {row}");
            }
        }
    }
}

#[test]
fn random_tensors_follow_from_the_options() {
    let fixture = Fixture::named("unbalanced");
    let scratch = scratch();
    let made = |label: &str, arguments: &[&str]| {
        let out = scratch.path().join(label);
        fixture.adapt(&out, &arguments.iter().map(|argument| argument.to_string()).collect::<Vec<_>>());
        tensors(&out)
    };
    let default = made("default", &[]);
    assert_eq!(made("again", &["--seed", "0", "--std", "0.02"]), default);
    let is_random = |name: &str| name.contains(".cross_attn.");
    for (name, tensor) in made("seed", &["--seed=18446744073709551615"]) {
        assert_eq!(tensor != default[&name], is_random(&name), "{name}");
    }
    for (name, tensor) in made("std", &["--std", "0"]) {
        let is_zero = tensor.2.iter().all(|byte| byte & 0x7f == 0);
        assert_eq!(tensor != default[&name], is_random(&name), "{name}");
        assert!(is_zero || !is_random(&name), "{name}");
    }
    // Every tensor has numbers of its own, and about the deviation that was asked for.
    let random: Vec<&(String, Vec<usize>, Vec<u8>)> =
        default.iter().filter(|(name, _)| is_random(name)).map(|(_, tensor)| tensor).collect();
    for (at, (_, _, bytes)) in random.iter().enumerate() {
        let numbers = bytes.as_chunks().0.iter().map(|x| half::bf16::from_le_bytes(*x).to_f64());
        let deviation = (numbers.map(|x| x * x).sum::<f64>() / (bytes.len() / 2) as f64).sqrt();
        assert!((0.018..0.022).contains(&deviation), "{deviation}");
        assert!(random[..at].iter().all(|other| other.2[..32] != bytes[..32]));
    }
}

#[test]
fn the_deviation_is_by_default_that_of_the_decoder() {
    let fixture = Fixture::named("unbalanced");
    let scratch = scratch();
    let decoder = scratch.path().join("decoder");
    copied(&fixture.source("decoder"), &decoder);
    let path = decoder.join("config.json");
    let text = fs::read_to_string(&path).expect("copied");
    // Seventeen digits, which a careless parser rounds to another number.
    let deviation = "0.014433756729740645";
    fs::write(&path, text.replace("\"initializer_range\": 0.02", &format!("\"initializer_range\": {deviation}")))
        .expect("written");
    let made = |label: &str, decoder: &Path, arguments: &[&str]| {
        let out = scratch.path().join(label);
        let mut command = program("t5gemma-export");
        command.arg("adapt").arg(fixture.source("encoder")).args([decoder, &out]).args(arguments);
        stdout(command.arg("--dtype=float32").output().expect("starts"));
        (tensors(&out), fs::read_to_string(out.join("config.json")).expect("written"))
    };
    let (of_config, config) = made("config", &decoder, &[]);
    let (of_flag, _) = made("flag", &fixture.source("decoder"), &["--std", deviation]);
    assert!(of_config == of_flag);
    assert_eq!(config.matches(deviation).count(), 2, "of the decoder and the whole:\n{config}");
}

#[test]
fn files_are_filled_up_to_the_limit() {
    let fixture = Fixture::named("unbalanced");
    let scratch = scratch();
    let made = |limit: u64| {
        let out = scratch.path().join(limit.to_string());
        fixture.adapt(&out, &[format!("--max-shard-size={limit}")]);
        out
    };
    let whole = tensors(&made(5_000_000_000));
    for (limit, count) in [(200_000, 1), (198_304, 1), (198_303, 2), (30_000, 8), (1, 99)] {
        let out = made(limit);
        assert!(tensors(&out) == whole, "{limit}");
        let files: Vec<String> = names(&out).into_iter().filter(|name| name.ends_with(".safetensors")).collect();
        let expected: Vec<String> = match count {
            1 => vec!["model.safetensors".into()],
            _ => (1..=count).map(|at| format!("model-{at:05}-of-{count:05}.safetensors")).collect(),
        };
        assert_eq!(files, expected, "{limit}");
        if count > 1 {
            let index = json_of(&out.join("model.safetensors.index.json"));
            assert_eq!(index["metadata"], json!({"total_size": 198_304}));
            let map = index["weight_map"].as_object().expect("a map");
            assert!(map.keys().eq(whole.keys()));
            // In the order of names.
            assert!(map.values().map(|file| file.as_str()).is_sorted());
        }
        exported_from(&out, &format!("adapted-in-shards-of-{limit}"), Export::default());
    }
}

#[test]
fn numbers_beyond_float16_are_reported() {
    let fixture = Fixture::named("balanced");
    let scratch = scratch();
    let out = scratch.path().join("out");
    let options = ["--dtype=float16", "--cross-init=random", "--std=30000"].map(str::to_string);
    let told = fixture.adapt(&out, &options);
    assert!(
        told.contains("warning: numbers beyond float16 became infinite, by tensor: model.decoder.layers.0.cross_attn"),
        "{told}"
    );
    let infinite = tensors(&out).into_values().map(|(dtype, _, bytes)| {
        assert_eq!(dtype, "F16");
        bytes.as_chunks().0.iter().filter(|x| half::f16::from_le_bytes(**x).is_infinite()).count()
    });
    assert!(infinite.sum::<usize>() > 0);
    let told = fixture.adapt(&scratch.path().join("well"), &options[..2]);
    assert!(!told.contains("warning"), "{told}");
}

#[test]
fn what_was_chosen_and_that_training_follows_is_told() {
    for (name, says) in [
        ("balanced", ["copied from the decoder's self-attention; its norms: copied", "68608 parameters, 274432 bytes"]),
        ("unbalanced", ["random (seed 0, standard deviation 0.02); its norms: ones", "alone for the first steps"]),
        ("untied", ["query_pre_attn_scalar: 14 (encoder), 16 (decoder)", "the head of its own"]),
    ] {
        let scratch = scratch();
        let told = Fixture::named(name).adapt(&scratch.path().join("out"), &[]);
        for says in says.into_iter().chain(["not trained, and does not answer questions"]) {
            assert!(told.contains(says), "{name}: {says}: {told}");
        }
    }
}

/// Both folders are one, by whatever name; special tokens and files of the tokenizer come from the decoder.
#[test]
fn the_decoder_decides_what_both_have() {
    let fixture = Fixture::named("balanced");
    let scratch = scratch();
    let (encoder, decoder) = (scratch.path().join("encoder"), scratch.path().join("decoder"));
    copied(&fixture.source("encoder"), &encoder);
    copied(&fixture.source("decoder"), &decoder);
    let set = |folder: &Path, file: &str, name: &str, value: Value| {
        let mut fields = if folder.join(file).exists() { json_of(&folder.join(file)) } else { json!({}) };
        fields[name] = value;
        fs::write(folder.join(file), fields.to_string()).expect("written");
    };
    set(&encoder, "generation_config.json", "bos_token_id", json!(5));
    set(&encoder, "config.json", "use_bidirectional_attention", json!(true));
    set(&encoder, "config.json", "colour", json!("blue"));
    set(&encoder, "special_tokens_map.json", "whose", json!("encoder"));
    set(&decoder, "special_tokens_map.json", "whose", json!("decoder"));
    set(&decoder, "generation_config.json", "eos_token_id", json!([1, 7]));
    set(&decoder, "generation_config.json", "pad_token_id", Value::Null);
    set(&decoder, "config.json", "pad_token_id", Value::Null);
    fs::write(decoder.join("chat_template.jinja"), "").expect("written");
    let adapt = |label: &str, arguments: &[&str]| {
        let out = scratch.path().join(label);
        let mut command = program("t5gemma-export");
        let output = command.arg("adapt").args([&encoder, &decoder, &out]).args(arguments).output().expect("starts");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        stdout(output);
        (out, told)
    };
    let (out, told) = adapt("out", &[]);
    assert!(told.contains("warning: bos_token_id is 5 in the encoder and 2 in the decoder, whose is used"), "{told}");
    assert!(told.contains("config.json of the encoder: fields without a place in T5Gemma: colour"), "{told}");
    let config = json_of(&out.join("config.json"));
    for place in ["", "/encoder", "/decoder"] {
        let found = ["bos", "eos", "pad"].map(|token| config.pointer(&format!("{place}/{token}_token_id")));
        assert_eq!(found, [Some(&json!(2)), Some(&json!([1, 7])), Some(&json!(0))], "{place}");
    }
    assert_eq!(json_of(&out.join("generation_config.json"))["decoder_start_token_id"], 2);
    assert_eq!(json_of(&out.join("special_tokens_map.json"))["whose"], "decoder");
    assert_eq!(fs::read(out.join("chat_template.jinja")).expect("copied"), b"");
    let (out, _) = adapt("of-encoder", &["--tokenizer-from", "encoder"]);
    assert_eq!(json_of(&out.join("special_tokens_map.json"))["whose"], "encoder");
    assert!(!out.join("chat_template.jinja").exists());
}

/// The older names and places of settings, and the files that transformers 4.42 wrote.
#[test]
fn the_rotary_base_and_the_head_are_where_gemma_2_finds_them() {
    let fixture = Fixture::named("untied");
    let scratch = scratch();
    let source = fixture.source("decoder");
    for (at, (changes, theta, is_tied)) in [
        (json!({"rope_theta": 500, "rope_parameters": null}), 500.0, false),
        (json!({"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}), 700.0, false),
        (json!({"rope_parameters": {}, "rope_scaling": null}), 10000.0, false),
        // A stored head is used whatever the flag says.
        (json!({"tie_word_embeddings": true}), 10000.0, false),
    ]
    .into_iter()
    .enumerate()
    {
        let (folder, out) = (scratch.path().join(format!("in-{at}")), scratch.path().join(format!("out-{at}")));
        copied(&source, &folder);
        let mut config = json_of(&folder.join("config.json"));
        config.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
        fs::write(folder.join("config.json"), config.to_string()).expect("written");
        let mut command = program("t5gemma-export");
        stdout(command.arg("adapt").args([&folder, &folder, &out]).output().expect("starts"));
        let config = json_of(&out.join("config.json"));
        for place in ["encoder", "decoder"] {
            assert_eq!(config[place]["rope_theta"], theta, "{changes}");
            assert_eq!(config[place]["rope_parameters"], json!({"rope_type": "default", "rope_theta": theta}));
            assert_eq!(config[place]["tie_word_embeddings"], is_tied, "{changes}");
        }
        assert_eq!(config["tie_word_embeddings"], is_tied, "{changes}");
    }
}

fn copied(from: &Path, to: &Path) {
    fs::create_dir(to).expect("a new folder");
    for name in names(from) {
        fs::write(to.join(&name), fs::read(from.join(&name)).expect("readable")).expect("writable");
    }
}
