//! Models that do not generate: feature extraction and classification against transformers, and the commands for them.

use std::fs;
use std::path::{Path, PathBuf};

use itertools::Itertools as _;
use ndarray::{Array2, ArrayD, ArrayView1, Axis};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::DType;
use t5gemma_graphs::task::{Features, Pooling, Task};
use t5gemma_runtime::{Batch, Cancellation, Controls, Encoder, Model, OpenOptions};

use crate::common::{demo, exported, exported_from, fixture, run, stdout, tests};

/// As everywhere in float32.
const TOLERANCE: f32 = 5e-4;
pub const BATCHES: [&str; 4] = ["right", "left", "hole", "one"];

pub fn task_fixture(name: &str) -> PathBuf {
    tests().join("fixtures/tasks").join(name)
}

pub fn checkpoint(name: &str) -> PathBuf {
    task_fixture(name).join("checkpoint")
}

/// A fixture exported for a task, once for all tests.
fn exported_for(name: &str, task: Option<Task>) -> PathBuf {
    let label = format!("task-{name}-{task:?}");
    exported_from(&checkpoint(name), &label, Export::default().task(task))
}

/// A classifier's fixture exported for a target.
fn exported_on(name: &str, target: Target) -> PathBuf {
    let label = format!("task-{name}-{}", target.name());
    exported_from(&checkpoint(name), &label, Export::default().target(target))
}

fn features(pooling: Pooling, normalize: bool, hidden_layer: i64) -> Option<Task> {
    Some(Task::FeatureExtraction(Features { pooling, normalize, hidden_layer, ..Features::default() }))
}

/// The tensors of a file.
pub struct Golden(Vec<u8>);

impl Golden {
    pub fn read(path: &Path) -> Golden {
        Golden(fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    pub fn of(name: &str) -> Golden {
        Golden::read(&task_fixture(name).join("golden.safetensors"))
    }

    fn numbers<T, const N: usize>(&self, name: &str, read: fn([u8; N]) -> T) -> ArrayD<T> {
        let file = SafeTensors::deserialize(&self.0).expect("a safetensors file");
        let view = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let numbers = view.data().chunks_exact(N).map(|bytes| read(bytes.try_into().expect("N bytes")));
        ArrayD::from_shape_vec(view.shape(), numbers.collect()).expect("as many as the shape says")
    }

    pub fn floats(&self, name: &str) -> ArrayD<f32> {
        self.numbers(name, f32::from_le_bytes)
    }

    pub fn integers(&self, name: &str) -> ArrayD<i64> {
        self.numbers(name, i64::from_le_bytes)
    }

    pub fn batch(&self, name: &str) -> Batch {
        let [ids, mask] =
            ["input_ids", "attention_mask"].map(|part| self.numbers(&format!("in.{name}.{part}"), i64::from_le_bytes));
        Batch::flat(ids.shape()[0], ids.iter().copied().collect(), mask.iter().copied().collect()).expect("a batch")
    }
}

/// The largest difference, over unmasked tokens if `mask` is given.
#[track_caller]
pub fn check_close(what: &str, found: &ArrayD<f32>, expected: &ArrayD<f32>, mask: Option<&[i64]>) {
    assert_eq!(found.shape(), expected.shape(), "{what}");
    let width = *found.shape().last().expect("not a scalar");
    let (found, expected): (Vec<f32>, Vec<f32>) = (found.iter().copied().collect(), expected.iter().copied().collect());
    let mut largest = 0.0_f32;
    for (place, (found, expected)) in found.chunks(width).zip_eq(expected.chunks(width)).enumerate() {
        if mask.is_none_or(|mask| mask[place] != 0) {
            for (a, b) in found.iter().zip_eq(expected) {
                assert!(a.is_finite(), "{what}: {a}");
                largest = largest.max((a - b).abs());
            }
        }
    }
    assert!(largest <= TOLERANCE, "{what}: {largest}");
}

#[test]
fn hidden_states_of_every_layer_are_those_of_the_reference() {
    for name in ["encoder", "headless"] {
        let golden = Golden::of(name);
        for layer in 0..4 {
            let encoder = Encoder::open(exported_for(name, features(Pooling::None, false, layer))).expect("opens");
            let port = encoder.manifest().graphs["model"].ports.outputs[0].name.clone();
            assert_eq!(port, if layer == 3 { "last_hidden_state".into() } else { format!("hidden_states.{layer}") });
            for name in BATCHES {
                let batch = golden.batch(name);
                let states = encoder.encode(&batch, &Cancellation::new()).expect("encodes").into_dyn();
                let expected = golden.floats(&format!("enc.{name}.hidden_states.{layer}"));
                check_close(&format!("{name} {layer}"), &states, &expected, Some(batch.mask()));
            }
        }
    }
}

#[test]
fn the_encoder_of_a_generating_model_is_the_same_alone() {
    let whole = Encoder::open(exported("tiny-unbalanced")).expect("opens");
    let alone = exported_from(
        &fixture("tiny-unbalanced").join("checkpoint"),
        "tiny-unbalanced-features",
        Export::default().task(features(Pooling::None, false, -1)),
    );
    let alone = Encoder::open(alone).expect("opens");
    assert!(alone.manifest().weights.record.bytes < whole.manifest().weights.record.bytes);
    let batch = Batch::padded(&[vec![5, 6, 7], vec![9]], 0).expect("a batch");
    let states = |encoder: &Encoder| encoder.encode(&batch, &Cancellation::new()).expect("encodes");
    assert_eq!(states(&whole), states(&alone));
}

/// Pooling and normalization, spelled out.
fn pooled(states: &ArrayD<f32>, mask: &[i64], pooling: Pooling, normalize: bool) -> Array2<f32> {
    let (rows, length, width) = (states.shape()[0], states.shape()[1], states.shape()[2]);
    Array2::from_shape_fn([rows, width], |(row, at)| {
        let seen: Vec<usize> = (0..length).filter(|place| mask[row * length + place] != 0).collect();
        let vector = |at: usize| match pooling {
            Pooling::None => panic!("nothing is pooled"),
            Pooling::Mean => seen.iter().map(|&place| states[[row, place, at]]).sum::<f32>() / seen.len() as f32,
            Pooling::First => states[[row, seen[0], at]],
            Pooling::Last => states[[row, seen[seen.len() - 1], at]],
        };
        let length = (0..width).map(|at| vector(at).powi(2)).sum::<f32>().sqrt();
        if normalize { vector(at) / length } else { vector(at) }
    })
}

#[test]
fn pooling_in_the_graph_and_at_run_time_are_the_same() {
    let golden = Golden::of("encoder");
    let cancel = Cancellation::new();
    let plain = Encoder::open(exported_for("encoder", None)).expect("opens");
    for pooling in [Pooling::Mean, Pooling::First, Pooling::Last] {
        for (normalize, layer) in [(false, 3), (true, 2)] {
            let in_graph = Encoder::open(exported_for("encoder", features(pooling, normalize, layer))).expect("opens");
            for name in BATCHES {
                let batch = golden.batch(name);
                let states = golden.floats(&format!("enc.{name}.hidden_states.{layer}"));
                let expected = pooled(&states, batch.mask(), pooling, normalize).into_dyn();
                let what = format!("{name} {pooling}");
                let found = in_graph.embed(&batch, pooling, &cancel).expect("embeds").into_dyn();
                check_close(&what, &found, &expected, None);
                if layer == 3 {
                    let found = if normalize {
                        plain.embed_normalized(&batch, pooling, &cancel)
                    } else {
                        plain.embed(&batch, pooling, &cancel)
                    };
                    check_close(&what, &found.expect("embeds").into_dyn(), &expected, None);
                }
            }
        }
    }
}

#[test]
fn pooled_vectors_of_half_precision_are_finite_and_near() {
    let golden = Golden::of("encoder");
    let task = features(Pooling::Mean, true, -1);
    let export = Export::default().task(task).dtype(DType::Float16);
    let encoder = Encoder::open(exported_from(&checkpoint("encoder"), "task-float16", export)).expect("opens");
    let batch = golden.batch("right");
    let found = encoder.embed(&batch, Pooling::Mean, &Cancellation::new()).expect("embeds");
    let expected = pooled(&golden.floats("enc.right.hidden_states.3"), batch.mask(), Pooling::Mean, true);
    for (found, expected) in found.outer_iter().zip_eq(expected.outer_iter()) {
        let cosine: f32 = found.iter().zip_eq(expected).map(|(a, b)| a * b).sum();
        assert!(cosine > 0.999, "{cosine}");
    }
}

#[test]
fn classifiers_of_sources_are_those_of_the_reference() {
    for (name, target) in on_all_targets(&["sequence-encoder", "sequence-decoder", "sequence-multi"]) {
        let golden = Golden::of(name);
        let encoder = Encoder::open(exported_on(name, target)).expect("opens");
        for batch in BATCHES {
            let logits = encoder.classify(&golden.batch(batch), &Cancellation::new()).expect("classifies");
            let expected = golden.floats(&format!("cls.{batch}.logits"));
            check_close(&format!("{name} {batch} {target:?}"), &logits.into_dyn(), &expected, None);
        }
    }
}

#[test]
fn classifiers_of_tokens_are_those_of_the_reference() {
    for (name, target) in on_all_targets(&["token-encoder", "token-decoder"]) {
        let golden = Golden::of(name);
        let encoder = Encoder::open(exported_on(name, target)).expect("opens");
        for batch_name in BATCHES {
            let batch = golden.batch(batch_name);
            let logits = encoder.classify_tokens(&batch, &Cancellation::new()).expect("classifies");
            let expected = golden.floats(&format!("cls.{batch_name}.logits"));
            let what = format!("{name} {batch_name} {target:?}");
            check_close(&what, &logits.into_dyn(), &expected, Some(batch.mask()));
        }
    }
}

fn on_all_targets<'n>(names: &[&'n str]) -> Vec<(&'n str, Target)> {
    names.iter().flat_map(|&name| Target::ALL.map(|target| (name, target))).collect()
}

#[test]
fn a_sources_labels_do_not_depend_on_its_neighbours() {
    for name in ["sequence-encoder", "sequence-decoder"] {
        let encoder = Encoder::open(exported_for(name, None)).expect("opens");
        let sources = [vec![5, 6, 7], vec![9], vec![8, 8, 8, 8, 8, 8], vec![3, 4, 5]];
        let classify = |sources: &[Vec<i64>]| {
            let batch = Batch::padded(sources, encoder.pad_token_id()).expect("a batch");
            encoder.classify(&batch, &Cancellation::new()).expect("classifies").into_dyn()
        };
        let together = classify(&sources);
        for (row, source) in sources.iter().enumerate() {
            let alone = classify(std::slice::from_ref(source));
            let of_batch = together.index_axis(Axis(0), row).insert_axis(Axis(0)).to_owned();
            check_close(name, &of_batch, &alone, None);
        }
    }
}

fn arguments<'a>(command: &'a str, model: &'a Path, rest: &[&'a str]) -> Vec<&'a str> {
    [&[command, model.to_str().expect("temporary paths are UTF-8")], rest].concat()
}

/// A task fixture with the demo's tokenizer, whose ids are cut to its vocabulary by the texts used here.
pub fn with_tokenizer(folder: &Path, name: &str) -> PathBuf {
    let (from, out) = (folder.join("checkpoint"), folder.join("model"));
    fs::create_dir(&from).expect("a new folder");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(checkpoint(name).join(file), from.join(file)).expect("the fixture is there");
    }
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 3, "Ada": 7, "wrote": 8, "programs": 9}},
    });
    fs::write(from.join("tokenizer.json"), tokenizer.to_string()).expect("written");
    stdout(run("t5gemma-export", [&from, &out], ""));
    out
}

#[test]
fn classify_tells_labels_of_texts_and_requests() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = with_tokenizer(folder.path(), "sequence-encoder");
    let text = stdout(run("t5gemma", arguments("classify", &model, &["Ada wrote programs", "wrote"]), ""));
    assert_eq!(text.lines().count(), 2, "{text}");
    let (label, score) = text.lines().next().and_then(|line| line.split_once('\t')).expect("label and score");
    assert!(["bad", "so-so", "good"].contains(&label), "{label}");
    assert!((1.0 / 3.0..=1.0).contains(&score.parse::<f32>().expect("a number")), "{score}");

    let requests = [
        json!({"id": "a", "text": ["Ada wrote programs", "wrote"]}),
        json!({"id": "b", "input_ids": [7, 8, 9]}),
        json!({"id": "c", "input_ids": [1000]}),
    ];
    let lines = requests.each_ref().map(Value::to_string).join("\n");
    let output = run("t5gemma", arguments("classify", &model, &["--jsonl", "--top-k", "all"]), &lines);
    assert_eq!(output.status.code(), Some(1), "a request failed");
    let results: Vec<Value> =
        String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let best = |result: &Value| result["labels"][0][0]["score"].as_f64().expect("a number");
    assert!((best(&results[0]) - best(&results[1])).abs() < 1e-5, "text and its tokens");
    assert_eq!(results[0]["labels"][0][0]["label"], label);
    assert_eq!(results[0]["usage"]["source_tokens"], 4);
    let scores = results[1]["labels"][0].as_array().expect("a list");
    let sum: f64 = scores.iter().map(|label| label["score"].as_f64().expect("a number")).sum();
    assert!(scores.len() == 3 && (sum - 1.0).abs() < 1e-6, "{scores:?}");
    assert!(results[2]["error"].as_str().is_some_and(|error| error.starts_with("input_ids[0][0]: ")), "{}", results[2]);

    let logits = arguments("classify", &model, &["--jsonl", "--function-to-apply", "none", "--top-k", "all"]);
    let result: Value = serde_json::from_str(&stdout(run("t5gemma", logits, requests[1].to_string()))).expect("JSON");
    let encoder = Encoder::open(&model).expect("opens");
    let batch = Batch::padded(&[[7, 8, 9]], 0).expect("a batch");
    let found = encoder.classify(&batch, &Cancellation::new()).expect("classifies");
    let greatest = found.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    assert!((result["labels"][0][0]["score"].as_f64().expect("a number") - f64::from(greatest)).abs() < 1e-5);
}

#[test]
fn classify_labels_tokens() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = with_tokenizer(folder.path(), "token-decoder");
    let text = stdout(run("t5gemma", arguments("classify", &model, &["Ada wrote", "programs"]), ""));
    let pieces: Vec<&str> = text.lines().map(|line| line.split('\t').next().expect("a first word")).collect();
    assert_eq!(pieces, ["Ada", "wrote", "", "programs", ""]);
    let request = json!({"input_ids": [[0, 7, 8]], "attention_mask": [[0, 1, 1]]}).to_string();
    let result: Value =
        serde_json::from_str(&stdout(run("t5gemma", arguments("classify", &model, &["--jsonl"]), request)))
            .expect("JSON");
    let tokens = result["tokens"][0].as_array().expect("a list");
    assert_eq!(tokens.iter().map(|token| &token["token"]).collect::<Vec<_>>(), [7, 8]);
    assert_eq!(tokens[0]["text"], "Ada");
    assert_eq!(tokens[0]["labels"].as_array().map(Vec::len), Some(1));
}

#[test]
fn a_model_is_told_from_what_it_was_not_exported_for() {
    let features_model = exported_for("encoder", features(Pooling::Mean, false, -1));
    let classifier = exported_for("sequence-encoder", None);
    let npy = tempfile::tempdir().expect("a temporary folder can be made");
    let npy = npy.path().join("x.npy");
    let npy = npy.to_str().expect("temporary paths are UTF-8");
    for (command, model, rest, says) in [
        (
            "generate",
            &features_model,
            vec!["text"],
            "export the checkpoint for the task text2text-generation), found feature-extraction",
        ),
        ("verify", &classifier, vec![], "task: expected text2text-generation"),
        ("classify", &features_model, vec!["text"], "task: expected text-classification"),
        ("encode", &classifier, vec!["-o", npy, "text"], "task: expected feature-extraction"),
        ("encode", &features_model, vec!["-o", npy, "--pooling", "last", "--jsonl"], "task.pooling: expected last"),
    ] {
        let output = run("t5gemma", arguments(command, model, &rest), json!({"input_ids": [5]}).to_string());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{command}: {error}");
        assert!(error.contains(says), "{command}: {error}");
    }
}

#[test]
fn exports_that_a_checkpoint_cannot_give_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let out = folder.path().join("out");
    let out = out.to_str().expect("temporary paths are UTF-8");
    let generating = fixture("tiny-balanced").join("checkpoint");
    for (from, rest, says) in [
        (
            checkpoint("encoder"),
            vec!["--task", "text2text-generation"],
            "--task: expected feature-extraction for a checkpoint of T5GemmaEncoderModel, found text2text-generation",
        ),
        (
            generating.clone(),
            vec!["--task", "text-classification"],
            "--task: expected text2text-generation or feature-extraction for a checkpoint of T5GemmaForConditionalGeneration",
        ),
        (
            checkpoint("token-encoder"),
            vec!["--task", "text-classification"],
            "--task: expected token-classification or feature-extraction for a checkpoint of",
        ),
        (generating.clone(), vec!["--pooling", "mean"], "--pooling requires --task feature-extraction"),
        (
            generating.clone(),
            vec!["--task", "feature-extraction", "--all-logits"],
            "--all-logits requires --task text2text-generation",
        ),
        (
            generating.clone(),
            vec!["--task", "feature-extraction", "--alignment"],
            "--alignment requires --task text2text-generation",
        ),
        (
            generating.clone(),
            vec!["--alignment", "--alignment-layers", "9"],
            "--alignment-layers: expected decoder layers from 0 to ",
        ),
        (
            generating.clone(),
            vec!["--alignment", "--alignment-layers", "1,0,1"],
            "--alignment-layers: expected each layer once, found 1 twice",
        ),
        (
            checkpoint("encoder"),
            vec!["--task", "feature-extraction", "--hidden-layer", "9"],
            "--hidden-layer: expected 0 to 3, or -1 to -4 from the end, found 9",
        ),
    ] {
        let from = from.to_str().expect("paths of the tests are UTF-8").to_string();
        let output = run("t5gemma-export", [&[from.as_str(), out], &rest[..]].concat(), "");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(says), "{error}");
        assert!(!Path::new(out).exists());
    }
}

#[test]
fn encode_writes_rows_of_one_length_into_one_array() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let at = |name: &str| folder.path().join(name);
    let model = demo();
    let encode = |out: &Path, rest: &[&str]| {
        let out = out.to_str().expect("temporary paths are UTF-8");
        run("t5gemma", arguments("encode", &model, &[&["-o", out], rest].concat()), "first line\nsecond\nthird one\n")
    };
    // ndarray-npy writes the shape into the header, which is text.
    let header = |name: &str| {
        let bytes = fs::read(at(name)).expect("written");
        String::from_utf8_lossy(&bytes[..bytes.len().min(128)]).into_owned()
    };
    let hidden = Encoder::open(&model).expect("opens").facts().encoder.hidden_size;
    stdout(encode(&at("pooled.npy"), &["--pooling", "mean", "--normalize"]));
    assert!(header("pooled.npy").contains(&format!("(3, {hidden})")), "{}", header("pooled.npy"));
    stdout(encode(&at("padded.npy"), &["--padding", "max_length", "--max-length", "6", "--truncation"]));
    assert!(header("padded.npy").contains(&format!("(3, 6, {hidden})")), "{}", header("padded.npy"));
    assert!(header("padded.attention_mask.npy").contains("(3, 6)"), "{}", header("padded.attention_mask.npy"));

    let refused = encode(&at("ragged.npy"), &[]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("rows of a .npy file must have equal length"));
    let refused = encode(&at("short.safetensors"), &["--max-length", "1"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("input_ids[0]: expected at most 1 tokens"));

    stdout(encode(&at("all.safetensors"), &["--batch-size", "2"]));
    stdout(encode(&at("alone.safetensors"), &["--batch-size", "1"]));
    let (all, alone) = (Golden::read(&at("all.safetensors")), Golden::read(&at("alone.safetensors")));
    for text in 0..3 {
        let name = format!("{text}.last_hidden_state");
        check_close(&name, &all.floats(&name), &alone.floats(&name), None);
        let mask = all.numbers(&format!("{text}.attention_mask"), i64::from_le_bytes);
        assert!(mask.iter().all(|&seen| seen == 1), "neighbours leave no padding");
    }
    let vectors = Golden(fs::read(at("all.safetensors")).expect("written"));
    let first = vectors.floats("0.last_hidden_state");
    let row: ArrayView1<'_, f32> = first.view().into_shape_with_order(first.len()).expect("contiguous");
    assert!(row.iter().all(|x| x.is_finite()));
}

#[test]
fn hidden_states_are_handed_back_as_sources() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let states = folder.path().join("states.safetensors");
    let states = states.to_str().expect("temporary paths are UTF-8");
    let model = demo();
    let lines = "Room 12 is 5 km away.\nDr. Lee paid $3.50.\nIt is 3:05 pm.\n";
    for options in [&["--batch-size", "2"][..], &["--num-beams", "3"], &["--encoder-no-repeat-ngram-size", "3"]] {
        stdout(run("t5gemma", arguments("encode", &model, &["-o", states]), lines));
        let direct = stdout(run("t5gemma", arguments("generate", &model, options), lines));
        let from_states = [&["--encoder-outputs", states], options].concat();
        assert_eq!(stdout(run("t5gemma", arguments("generate", &model, &from_states), "")), direct, "{options:?}");
    }
    let jsonl = arguments("generate", &model, &["--encoder-outputs", states, "--jsonl"]);
    let result = stdout(run("t5gemma", jsonl, ""));
    let result: Value = serde_json::from_str(result.lines().nth(1).expect("three results")).expect("JSON");
    assert_eq!(result["id"], 1);

    let of_another = exported("tiny-balanced");
    let output = run("t5gemma", arguments("generate", &of_another, &["--encoder-outputs", states, "--jsonl"]), "");
    assert!(String::from_utf8_lossy(&output.stdout).contains("encoder_outputs: expected states of width"));
    stdout(run("t5gemma", arguments("encode", &model, &["-o", states, "--pooling", "mean"]), lines));
    let output = run("t5gemma", arguments("generate", &model, &["--encoder-outputs", states]), "");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("expected tensors ID.last_hidden_state, found 0.sentence")
    );
}

#[test]
fn remembered_sources_give_what_encoded_ones_give() {
    let open = |encoder_cache_bytes| {
        let options = OpenOptions::default().encoder_cache_bytes(encoder_cache_bytes);
        Model::open_with(exported("tiny-unbalanced"), &options).expect("opens")
    };
    // Room for all of the sources, or for some of them.
    for cached in [open(1 << 20), open(2_000)] {
        let plain = open(0);
        let sources: [&[i64]; 4] = [&[5, 6, 7, 8], &[9], &[3, 3], &[5, 6, 7, 8]];
        for rows in [vec![0, 1], vec![1, 2], vec![3], vec![2, 0, 1], vec![0, 1, 2, 3]] {
            let sources: Vec<&[i64]> = rows.iter().map(|&row| sources[row]).collect();
            let batch = Batch::padded(&sources, 0).expect("a batch");
            let generate = |model: &Model| {
                let options = model.generation_config().clone();
                model.generate_batch(&batch, &options, Controls::default()).expect("generates")
            };
            assert_eq!(generate(&cached), generate(&plain), "{rows:?}");
            let states = |model: &Model| model.encode(&batch, &Cancellation::new()).expect("encodes").into_dyn();
            let (found, expected) = (states(&cached), states(&plain));
            assert_eq!(found, expected, "{rows:?}: to the last digit");
        }
    }
}
