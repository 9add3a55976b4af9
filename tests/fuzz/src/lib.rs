//! One function for each fuzz target: it does with the bytes what the product does with such a file or request, and has to
//! return. Errors are answers; a panic, an abort, a hang and unbounded memory are faults.
//!
//! The functions also run over the seed corpus in the ordinary tests, which include this file, so that neither the targets nor
//! the seeds grow stale.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Map, Value, json};
use t5gemma_exporter::{
    Checkpoint, Existing, Export, MemorySize, ServingPlan, Source, TensorRtVersion, check, inspect, reseal,
};
use t5gemma_graphs::config::{Config, TokenIds};
use t5gemma_graphs::interface::{CacheLayout, DType, Interface, Logits};
use t5gemma_graphs::manifest::Manifest;
use t5gemma_runtime::{
    Batch, ChatTemplate, Controls, GenerationConfig, Model, OpenOptions, Shortlist, SpecialTokens, Tokenizer,
};
use tempfile::TempDir;

/// A target's name and what it does with its bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All targets, in the order of the product: what is exported, what is opened, what is asked for.
pub const TARGETS: [Target; 10] = [
    ("config", config),
    ("checkpoint", checkpoint),
    ("onnx", onnx),
    ("model_folder", model_folder),
    ("tokenizer", tokenizer),
    ("chat_template", chat_template),
    ("options", options),
    ("constraints", constraints),
    ("json_lines", json_lines),
    ("files", files),
];

/// The folder of the committed checkpoints.
fn fixtures() -> PathBuf {
    // This file is also part of the tests' package, whose folder lies one above.
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tests = if own.ends_with("fuzz") { own.parent().expect("lies in tests") } else { own };
    tests.join("fixtures/public")
}

/// A folder of this process for what a target writes, in memory where the system has such a place.
fn scratch() -> &'static Path {
    static SCRATCH: OnceLock<TempDir> = OnceLock::new();
    let make = || {
        let memory = Path::new("/dev/shm");
        if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() }
    };
    SCRATCH.get_or_init(|| make().expect("a temporary folder can be made")).path()
}

/// Copies the files of a folder into an empty one.
fn copy_folder(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).expect("the temporary folder is writable");
    for file in fs::read_dir(from).expect("the folder is there") {
        let file = file.expect("the folder can be listed");
        fs::copy(file.path(), to.join(file.file_name())).expect("the temporary folder is writable");
    }
}

/// The first byte of an input as a choice, and the rest.
fn chosen<'d, 'c>(data: &'d [u8], choices: &[&'c str]) -> Option<(&'c str, &'d [u8])> {
    let (&first, rest) = data.split_first()?;
    Some((choices[usize::from(first) % choices.len()], rest))
}

/// A `config.json`, and the interface of what it configures; a manifest; a flag's value.
pub fn config(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    if let Ok(config) = Config::parse(text) {
        // A port for every layer: of many that only takes time, as do whole graphs, which `checkpoint` makes.
        if config.encoder.layers.len().max(config.decoder.layers.len()) <= 8 {
            let _ = Interface::of(&config.facts(), DType::Float32, Logits::Last, CacheLayout::Growing);
        }
    }
    let _ = serde_json::from_str::<Manifest>(text);
    // What flags of the exporter take.
    let _ = (text.parse::<ServingPlan>(), text.parse::<MemorySize>(), text.parse::<TensorRtVersion>());
}

/// A checkpoint folder in which one file is the input.
pub fn checkpoint(data: &[u8]) {
    let names = [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    let Some((name, contents)) = chosen(data, &names) else { return };
    static CHECKPOINT: OnceLock<PathBuf> = OnceLock::new();
    let folder = CHECKPOINT.get_or_init(|| {
        let folder = scratch().join("checkpoint");
        copy_folder(&fixtures().join("tiny-balanced/checkpoint"), &folder);
        folder
    });
    let (file, out) = (folder.join(name), scratch().join("exported"));
    let before = fs::read(&file).ok();
    fs::write(&file, contents).expect("the temporary folder is writable");
    if let Ok(checkpoint) = Checkpoint::open(folder) {
        let export = Export::default().existing(Existing::Overwrite);
        let result = export.run(&Source::Checkpoint(checkpoint), &out);
        assert_eq!(result.is_ok(), out.exists(), "an export that fails leaves nothing");
    }
    let _ = fs::remove_dir_all(&out);
    match before {
        Some(before) => fs::write(&file, before).expect("the temporary folder is writable"),
        None => fs::remove_file(&file).expect("just written"),
    }
}

/// An ONNX file, as `t5gemma-export check` reads it.
pub fn onnx(data: &[u8]) {
    let folder = scratch().join("onnx");
    fs::create_dir_all(&folder).expect("the temporary folder is writable");
    let file = folder.join("graph.onnx");
    fs::write(&file, data).expect("the temporary folder is writable");
    let _ = check(&file, TensorRtVersion::default());
    let _ = inspect(&folder);
}

/// A model folder in which one of the texts is the input, sealed with it where that is how users change it.
pub fn model_folder(data: &[u8]) {
    let names = ["manifest.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];
    let Some((name, contents)) = chosen(data, &names) else { return };
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    let folder = MODEL.get_or_init(|| {
        let checkpoint = scratch().join("checkpoint-with-tokenizer");
        copy_folder(&fixtures().join("tiny-balanced/checkpoint"), &checkpoint);
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(fixtures().join("../../demo/checkpoint").join(name), checkpoint.join(name)).expect("copied");
        }
        export(&checkpoint, "model")
    });
    let changed = [name, "manifest.json"].map(|name| folder.join(name));
    let before = changed.each_ref().map(|file| fs::read(file).expect("just exported"));
    fs::write(&changed[0], contents).expect("the temporary folder is writable");
    if name != "manifest.json" {
        let _ = reseal(folder);
    }
    if let Ok(model) = Model::open_with(folder, &OpenOptions::default().threads(1))
        && let Ok(tokenizer) = model.tokenizer()
    {
        let _ = tokenizer.encode("a text");
    }
    let _ = inspect(folder);
    for (file, before) in changed.iter().zip(before) {
        fs::write(file, before).expect("the temporary folder is writable");
    }
}

/// A `tokenizer.json`, used in every way.
pub fn tokenizer(data: &[u8]) {
    let file = scratch().join("tokenizer.json");
    fs::write(&file, data).expect("the temporary folder is writable");
    let Ok(tokenizer) = Tokenizer::open(&file) else { return };
    for text in ["a text", "", " €\0 <bos>", "\u{10ffff}\r\n"] {
        if let Ok(tokens) = tokenizer.encode(text) {
            let _ = tokenizer.decode(&tokens, SpecialTokens::Skip);
        }
        let _ = tokenizer.encode_target(text);
    }
    let ids = [0, 1, 2, 3, 255, 256, 1 << 31, (1 << 32) - 1, -1];
    let _ = tokenizer.decode(&ids[..8], SpecialTokens::Keep);
    let mut stream = tokenizer.stream(SpecialTokens::Skip);
    for id in ids {
        let _ = (tokenizer.token(id), stream.push(id));
    }
    let _ = stream.finish();
    if let Ok(mut shortlist) = Shortlist::new(&tokenizer) {
        let _ = shortlist.add("a text");
        let _ = shortlist.tokens(1, Some(10));
    }
}

/// A chat template, for a conversation.
pub fn chat_template(data: &[u8]) {
    let folder = scratch().join("chat");
    fs::create_dir_all(&folder).expect("the temporary folder is writable");
    fs::write(folder.join("chat_template.jinja"), data).expect("the temporary folder is writable");
    if let Ok(template) = ChatTemplate::open(&folder) {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let conversation = [turn("system", "be brief"), turn("user", "a \u{0} text"), turn("assistant", "one")];
        let _ = template.apply(&conversation);
        let _ = template.apply(&conversation[1..2]);
    }
}

/// A `generation_config.json` on the first line, and a request's options on the second.
pub fn options(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let (file, request) = text.split_once('\n').unwrap_or((text, "{}"));
    let Ok(options) = GenerationConfig::of_model(Some(file), &TokenIds::default()) else { return };
    let Ok(request) = serde_json::from_str::<Map<String, Value>>(request) else { return };
    if let Ok(options) = options.with_json(&request) {
        let _ = (options.check(256, 1), options.max_length(1));
    }
}

/// Generation options as JSON, constraints among them, of a request that is then generated.
pub fn constraints(data: &[u8]) {
    let Ok(request) = serde_json::from_slice::<Map<String, Value>>(data) else { return };
    static MODEL: OnceLock<Model> = OnceLock::new();
    let model = MODEL.get_or_init(|| demo("constrained"));
    let Ok(mut options) = model.generation_config().with_json(&request) else { return };
    (options.max_new_tokens, options.max_length, options.num_beams) = (Some(3), None, 1);
    let batch = Batch::padded(&[[2, 5, 1]], 0).expect("a source");
    let _ = model.generate_batch(&batch, &options, Controls::default());
}

/// A line of `t5gemma generate --jsonl`, read as each of the commands reads it.
pub fn json_lines(data: &[u8]) {
    static MODEL: OnceLock<Model> = OnceLock::new();
    let model = MODEL.get_or_init(|| demo("asked"));
    t5gemma_cli::fuzzing::read_request(data, model);
}

/// A file that a command reads besides the model: the first byte says which.
pub fn files(data: &[u8]) {
    let Some((name, contents)) = chosen(data, t5gemma_cli::fuzzing::FILES) else { return };
    let file = scratch().join("file");
    fs::write(&file, contents).expect("the temporary folder is writable");
    t5gemma_cli::fuzzing::read_file(name, &file);
}

/// A checkpoint, exported into the scratch folder.
fn export(checkpoint: &Path, to: &str) -> PathBuf {
    let folder = scratch().join(to);
    let checkpoint = Checkpoint::open(checkpoint).expect("a committed checkpoint");
    Export::default().run(&Source::Checkpoint(checkpoint), &folder).expect("it can be exported");
    folder
}

/// The demo model, opened.
fn demo(to: &str) -> Model {
    let folder = export(&fixtures().join("../../demo/checkpoint"), to);
    Model::open_with(&folder, &OpenOptions::default().threads(1)).expect("just exported")
}
