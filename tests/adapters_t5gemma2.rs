//! LoRA adapters of a T5Gemma 2 that reads images, merged and at run time, against PEFT without merging: in every spelling
//! of the names of modules, beside rows with and without images, and those that change the vision tower.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use t5gemma_graphs::Target;
use t5gemma_runtime::{
    Batch, Cancellation, Controls, Engine, EngineOptions, GenerationConfig, Hypothesis, Model, PixelValues, Request,
};

use crate::common::{fixture as public, program, stdout, tests};

const ADAPTERS: [&str; 4] = ["embeddings", "pattern", "text", "tower"];
/// Those that change linear layers of the text stacks alone.
const AT_RUN_TIME: [&str; 2] = ["pattern", "text"];
/// As everywhere in float32.
const TOLERANCE: f32 = 5e-4;

fn fixture() -> PathBuf {
    tests().join("fixtures/lora_t5gemma2")
}

fn adapter(name: &str) -> PathBuf {
    fixture().join("adapters").join(name)
}

fn export(out: &Path, arguments: &[&str]) -> Model {
    let checkpoint = public("t2-vision").join("checkpoint");
    let arguments = [&["--dtype", "float32"], arguments].concat();
    stdout(program("t5gemma-export").arg(checkpoint).arg(out).args(arguments).output().expect("starts"));
    Model::open(out).expect("opens")
}

fn merged(out: &Path, adapter: &Path, target: &str) -> Model {
    export(out, &["--target", target, "--adapter", adapter.to_str().expect("UTF-8")])
}

/// The rows of the golden tensors, of which two have an image each.
fn sources(model: &Model) -> Batch {
    let bytes = fs::read(public("t2-vision").join("golden.safetensors")).expect("a fixture");
    let golden = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let integers = |name: &str| {
        let data = golden.tensor(&format!("in.images.{name}")).expect("an input").data().to_vec();
        data.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect::<Vec<_>>()
    };
    let pixels = golden.tensor("in.images.pixel_values").expect("an input");
    let values = pixels.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let images = PixelValues::of_tensor(pixels.shape(), values).expect("valid images");
    let batch = Batch::flat(3, integers("input_ids"), integers("attention_mask")).expect("a batch");
    batch.with_images_in_order(model.facts(), images).expect("as many as there are tokens for")
}

/// One of those rows.
fn source(model: &Model, row: usize) -> Batch {
    let all = sources(model);
    let batch = Batch::masked(&[all.source(row)], &[all.row_mask(row)]).expect("a source");
    batch.with_images(vec![all.images()[row].clone()]).expect("its images")
}

fn tokens(rows: &[Vec<Hypothesis>]) -> Value {
    json!(rows.iter().flatten().map(|hypothesis| &hypothesis.tokens).collect::<Vec<_>>())
}

fn config(model: &Model, options: &Value) -> GenerationConfig {
    model.generation_config().with_json(options.as_object().expect("options")).expect("valid")
}

/// Compares hidden states, tokens and scores with those of PEFT.
fn check(model: &Model, name: &str, loaded: bool, what: &str) {
    let bytes = fs::read(fixture().join("golden.safetensors")).expect("a fixture");
    let golden = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let expected = golden.tensor(&format!("{name}.encoder_last_hidden_state")).expect("a tensor").data().to_vec();
    let sources = sources(model);
    let batch = if loaded { sources.clone().with_adapter(&model.adapter(name).expect("loaded")) } else { sources };
    let states = model.encode(&batch, &Cancellation::new()).expect("encodes");
    let width = states.shape()[2];
    for (at, (found, expected)) in states.iter().zip(expected.as_chunks().0).enumerate() {
        let difference = (found - f32::from_le_bytes(*expected)).abs();
        assert!(batch.mask()[at / width] == 0 || difference < TOLERANCE, "{what} {name}: {difference}");
    }
    let cases: Value =
        serde_json::from_str(&fs::read_to_string(fixture().join("cases.json")).expect("a fixture")).expect("JSON");
    for case in cases["adapters"][name]["generate"].as_array().expect("cases") {
        let mut options = case["options"].clone();
        options["eos_token_id"] = json!([179]);
        let mut config = config(model, &options);
        config.adapter = loaded.then(|| name.to_string());
        let rows = model.generate_batch(&batch, &config, Controls::default()).expect("generates");
        assert_eq!(tokens(&rows), case["tokens"], "{what} {name} {}", case["id"]);
        let scores = case["sequences_scores"].as_array().into_iter().flatten();
        for (hypothesis, score) in rows.iter().flatten().zip(scores) {
            let found = f64::from(hypothesis.score.expect("beams have scores"));
            assert!((found - score.as_f64().expect("a number")).abs() < 5e-4, "{what} {name} {}", case["id"]);
        }
    }
}

#[test]
fn merged_adapters_compute_what_peft_computes() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    for name in ADAPTERS {
        for target in Target::ALL.map(Target::name) {
            let model = merged(&folder.path().join(format!("{name}-{target}")), &adapter(name), target);
            check(&model, name, false, target);
        }
    }
}

#[test]
fn adapters_at_run_time_compute_what_peft_computes() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    for target in ["portable", "cpu", "cuda"] {
        let model = export(&folder.path().join(target), &["--target", target, "--lora-inputs", "8"]);
        for name in AT_RUN_TIME {
            model.load_adapter(name, adapter(name)).expect("loads");
            check(&model, name, true, target);
        }
    }
}

/// A copy of an adapter with other names of modules.
fn respelled(folder: &Path, name: &str, spelling: impl Fn(&str) -> String) -> PathBuf {
    let out = folder.join(name);
    fs::create_dir_all(&out).expect("a new folder");
    let bytes = fs::read(adapter(name).join("adapter_model.safetensors")).expect("a fixture");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let tensors = file.iter().map(|(name, tensor)| (spelling(name), tensor));
    fs::write(out.join("adapter_model.safetensors"), safetensors::serialize(tensors, None).expect("well-formed"))
        .expect("written");
    let config = fs::read_to_string(adapter(name).join("adapter_config.json")).expect("a fixture");
    fs::write(out.join("adapter_config.json"), spelling(&config)).expect("written");
    out
}

#[test]
fn modules_are_found_in_every_spelling() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let weights = |label: &str, adapter: &Path| {
        let out = folder.path().join(label);
        merged(&out, adapter, "portable");
        fs::read(out.join("model.onnx_data")).expect("written")
    };
    for name in ["pattern", "tower", "embeddings"] {
        let expected = weights(name, &adapter(name));
        let older = respelled(&folder.path().join("older"), name, |text| {
            text.replace("vision_tower.", "vision_tower.vision_model.")
        });
        assert!(weights(&format!("{name}-older"), &older) == expected, "{name} of transformers 5.0");
        let plain = respelled(&folder.path().join("plain"), name, |text| {
            let text = text.replace(r".*(encoder\\.text_model|decoder)", r"model\\.(encoder|decoder)");
            text.replace("text_model.", "").replace(r"text_model\\.", "")
        });
        assert!(weights(&format!("{name}-plain"), &plain) == expected, "{name} without text_model");
    }
}

#[test]
fn a_vision_tower_takes_no_adapter_at_run_time() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = export(&folder.path().join("model"), &["--target", "cpu", "--lora-inputs", "8"]);
    let error = model.load_adapter("a", adapter("tower")).expect_err("of the tower").to_string();
    let says = "model.encoder.vision_tower.encoder.layers.0.mlp.fc1: expected a linear layer of the text stacks, found one of \
                the vision tower (merge it with t5gemma-export --adapter instead)";
    assert!(error.contains(says), "{error}");
    let error = model.load_adapter("a", adapter("embeddings")).expect_err("whole tensors").to_string();
    assert!(error.contains("found whole tensors (merge it"), "{error}");
    // Without the tower, what an adapter says about it has no effect.
    let text = export(&folder.path().join("text"), &["--target", "cpu", "--lora-inputs", "8", "--no-vision"]);
    text.load_adapter("tower", adapter("tower")).expect("loads");
    let alone = merged(&folder.path().join("merged"), &adapter("tower"), "cpu");
    let batch = Batch::padded(&[[9, 12, 31, 17, 44]], 0).expect("a source");
    let generate = |model: &Model, adapter: Option<&str>| {
        let config = config(model, &json!({"max_new_tokens": 16, "adapter": adapter}));
        tokens(&model.generate_batch(&batch, &config, Controls::default()).expect("generates"))
    };
    assert_eq!(generate(&text, Some("tower")), generate(&alone, None));
}

#[test]
fn rows_with_images_and_adapters_share_an_engine() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = Arc::new(export(&folder.path().join("model"), &["--target", "cpu", "--lora-inputs", "8"]));
    let names = [Some("text"), None, Some("pattern")];
    AT_RUN_TIME.iter().for_each(|name| model.load_adapter(name, adapter(name)).expect("loads"));
    let merged: Vec<Model> = AT_RUN_TIME
        .iter()
        .map(|name| merged(&folder.path().join(format!("{name}-merged")), &adapter(name), "cpu"))
        .collect();
    let engine = Engine::new(model.clone(), EngineOptions::default()).expect("starts");
    let options = json!({"max_new_tokens": 20, "num_beams": 2});
    let mut running = Vec::new();
    for round in 0..2 {
        for (at, name) in names.iter().enumerate() {
            for row in 0..3 {
                let batch = source(&model, (row + at + round) % 3);
                let mut config = config(&model, &options);
                config.adapter = name.map(String::from);
                let generation = engine.submit(Request::new(batch, config)).expect("accepted");
                running.push((*name, (row + at + round) % 3, generation));
            }
        }
    }
    for (name, row, generation) in running {
        let alone = match name {
            Some(name) => &merged[AT_RUN_TIME.iter().position(|other| *other == name).expect("one of them")],
            None => &*model,
        };
        let batch = source(alone, row);
        let expected = alone.generate_batch(&batch, &config(alone, &options), Controls::default()).expect("generates");
        assert_eq!(tokens(&generation.wait().expect("ends")), tokens(&expected), "{name:?}, row {row}");
    }
}
