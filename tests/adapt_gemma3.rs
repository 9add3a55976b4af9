//! `t5gemma-export adapt` of Gemma 3 to T5Gemma 2: the tensors that it writes, bit for bit, and what they compute after an export, against the
//! reference of `fixtures/scripts/make_adapt_gemma3_fixtures.py`; and what it refuses.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::Logits;
use t5gemma_runtime::{Batch, Controls, Engine, EngineOptions, Hypothesis, Model, Request};
use tempfile::TempDir;

use crate::adapt::{TOLERANCE, apart, integers, json_of, names, tensors};
use crate::common::{exported_as, exported_from, program, tests};

fn folder(name: &str) -> PathBuf {
    tests().join("fixtures/adapt_gemma3").join(name)
}

fn run(encoder: &Path, decoder: &Path, out: &Path, arguments: &[&str]) -> std::process::Output {
    let mut command = program("t5gemma-export");
    command.arg("adapt").args([encoder, decoder, out]).args(arguments).output().expect("the program starts")
}

/// The checkpoint of a fixture, in a folder of its own, and what is said about it.
fn adapted(name: &str, cases: &Value) -> (TempDir, PathBuf, String) {
    let scratch = tempfile::tempdir().expect("a temporary folder can be made");
    let out = scratch.path().join("out");
    let [encoder, decoder] = ["encoder", "decoder"].map(|side| folder(cases[side].as_str().expect("a name")));
    let output = run(&encoder, &decoder, &out, &[]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && output.stdout.is_empty(), "{name}: {told}");
    (scratch, out, told)
}

#[test]
fn gemma_3_becomes_t5gemma_2_bit_for_bit_and_computes_what_transformers_computes() {
    for name in ["text", "images"] {
        let cases = json_of(&folder(name).join("cases.json"));
        let (_scratch, out, told) = adapted(name, &cases);
        let found = tensors(&out).into_iter().map(|(tensor, (dtype, shape, bytes))| {
            (tensor, json!([dtype, shape, hex::encode(Sha256::digest(&bytes))]))
        });
        assert_eq!(Value::Object(found.collect::<Map<_, _>>()), cases["tensors"], "{name}");
        assert!(told.contains("is where training starts") && !told.contains("cross-attention"), "{told}");
        assert_eq!(told.contains("the encoder reads no images"), name == "text", "{told}");
        let has_processor = names(&out).contains(&"preprocessor_config.json".to_string());
        assert_eq!(has_processor, name == "images");

        let golden = folder(name).join("golden.safetensors");
        let portable = Export::default().logits(Logits::All).vision(false);
        let model = exported_from(&out, &format!("adapted-gemma3-{name}"), portable);
        let differences = apart(&model, &golden, "auto");
        assert!(differences.iter().all(|difference| *difference <= TOLERANCE), "{name}: {differences:?}");
        for target in [Target::Portable, Target::Cpu] {
            let label = format!("adapted-gemma3-{name}-{}", target.name());
            let model = Model::open(exported_from(&out, &label, Export::default().target(target))).expect("opens");
            let (rows, ids) = integers(&golden, "in.input_ids");
            let batch = Batch::flat(rows, ids, integers(&golden, "in.attention_mask").1).expect("a batch");
            let options = json!({"max_new_tokens": cases["max_new_tokens"]});
            let options = model.generation_config().with_json(options.as_object().expect("an object")).expect("valid");
            let rows = model.generate_batch(&batch, &options, Controls::default()).expect("generates");
            let tokens = json!(rows.iter().map(|row| row[0].tokens.clone()).collect::<Vec<_>>());
            assert_eq!(tokens, cases["tokens"], "{name} for {}", target.name());
            assert_eq!(model.facts().vision.is_some(), name == "images");
        }
    }
}

/// The decoder by itself, which is a Gemma 3.
#[test]
fn a_hidden_source_changes_nothing() {
    for target in [Target::Portable, Target::Cpu] {
        let model = exported_as("t2-balanced", target.name(), Export::default().target(target));
        let model = Arc::new(Model::open(model).expect("opens"));
        let row = |ids: &[i64], visible: i64| {
            let batch = Batch::masked(&[ids], &[vec![visible; ids.len()]]).expect("a source");
            batch.with_decoder_input_ids(&[[9, 30, 41]]).expect("a prompt")
        };
        for options in [json!({"max_new_tokens": 16}), json!({"max_new_tokens": 9, "num_beams": 3})] {
            let options = options.as_object().expect("an object");
            let config = model.generation_config().with_json(options).expect("valid");
            let tokens =
                |rows: Vec<Vec<Hypothesis>>| rows.into_iter().flatten().map(|row| row.tokens).collect::<Vec<_>>();
            let alone =
                |batch: &Batch| tokens(model.generate_batch(batch, &config, Controls::default()).expect("generates"));
            let hidden = alone(&row(&[20, 21, 22, 23], 0));
            assert_eq!(alone(&row(&[77], 0)), hidden, "{}", target.name());
            assert_ne!(alone(&row(&[20, 21, 22, 23], 1)), hidden, "{}", target.name());
            let empty = Batch::padded(&[Vec::new()], 0).expect("a row");
            let error = model.generate_batch(&empty, &config, Controls::default()).expect_err("no source").to_string();
            assert_eq!(error, "input_ids[0]: expected at least one token, found none");
            let engine = Engine::new(model.clone(), EngineOptions::default()).expect("starts");
            let submit = |batch| engine.submit(Request::new(batch, config.clone())).expect("accepted");
            let running = [submit(row(&[20; 9], 1)), submit(row(&[77; 30], 0)), submit(row(&[5], 0))];
            let [seen, far, near] = running.map(|generation| tokens(generation.wait().expect("generates")));
            assert_eq!((seen, far, near), (alone(&row(&[20; 9], 1)), hidden.clone(), hidden), "{}", target.name());
        }
    }
}

#[test]
fn gemma_3_that_does_not_go_together_is_refused_by_name() {
    let scratch = tempfile::tempdir().expect("a temporary folder can be made");
    let changed = |at: &str, change: &dyn Fn(&mut Value)| {
        let to = scratch.path().join(at);
        fs::create_dir_all(&to).expect("made");
        for name in names(&folder("gemma3-text")) {
            fs::copy(folder("gemma3-text").join(&name), to.join(&name)).expect("copied");
        }
        let mut config = json_of(&to.join("config.json"));
        change(&mut config);
        fs::write(to.join("config.json"), config.to_string()).expect("written");
        to
    };
    let set = |at: &str, field: &'static str, value: Value| changed(at, &|config| config[field] = value.clone());
    let (text, images) = (folder("gemma3-text"), folder("gemma3-images"));
    let gemma2 = tests().join("fixtures/adapt/balanced/gemma2-a");
    // encoder, decoder, arguments, what is said
    let cases: Vec<(PathBuf, PathBuf, &[&str], &str)> = vec![
        (text.clone(), gemma2.clone(), &[], "decoder: "),
        (gemma2, text.clone(), &[], "model_type: expected \"gemma3_text\" or \"gemma3\", as on the other side"),
        (
            text.clone(),
            text.clone(),
            &["--cross-init", "random"],
            "cross_init: expected nothing (Gemma 3 adapts to T5Gemma 2",
        ),
        (text.clone(), text.clone(), &["--std", "0.1"], "std: expected nothing"),
        (
            text.clone(),
            set("a", "hidden_size", json!(36)),
            &[],
            "embed_tokens.weight: expected shape [96, 36], found [96, 32]",
        ),
        (set("b", "num_hidden_layers", json!(5)), text.clone(), &[], "model.layers.4.input_layernorm.weight: missing"),
        (
            set("c", "num_hidden_layers", json!(3)),
            text.clone(),
            &[],
            "model.layers.3.input_layernorm.weight: expected no tensor",
        ),
        (set("d", "rope_scaling", json!(8)), text.clone(), &[], "rope_scaling: expected an object or null, found 8"),
        (
            set("e", "rope_parameters", json!({"rope_theta": 8.0})),
            text.clone(),
            &[],
            "rope_parameters: expected an object of",
        ),
        (set("f", "quantization_config", json!({"bits": 4})), text.clone(), &[], "quantization_config: expected null"),
        (text.clone(), set("g", "use_bidirectional_attention", json!(true)), &[], "decoder: "),
        (text.clone(), images.clone(), &["--tokenizer-from", "sideways"], "--tokenizer-from"),
        (
            set("h", "sliding_window_pattern", json!(0)),
            text.clone(),
            &[],
            "sliding_window_pattern: expected an integer",
        ),
        (text.clone(), set("i", "rope_scaling", json!({"rope_type": "yarn", "factor": 8.0})), &[], "rope_type"),
        (text.clone(), set("j", "vocab_size", json!(90)), &[], "embed_tokens.weight: expected shape [90, 32]"),
    ];
    for (encoder, decoder, arguments, expected) in cases {
        let out = scratch.path().join("out");
        let output = run(&encoder, &decoder, &out, arguments);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && told.contains(expected) && !told.contains("panicked"),
            "{expected}: {told}"
        );
        assert!(!out.exists(), "{expected}");
    }
    // A bidirectional encoder is one already.
    let bidirectional = set("k", "use_bidirectional_attention", json!(true));
    let output = run(&bidirectional, &text, &scratch.path().join("fine"), &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
