//! Token ids and scores against transformers: every generation case of every fixture, through `t5gemma generate
//! --jsonl` and through the Rust API, and the demo model against recorded answers.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use itertools::Itertools as _;
use ndarray::Array2;
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::Logits;
use t5gemma_graphs::onnx::Blocks;
use t5gemma_graphs::quantization::Quantization;
use t5gemma_runtime::{
    Batch, Cancellation, Controls, Encoder, Error, FinishReason, Hypothesis, Limits, Model, OpenOptions, Pooling,
    Streamer,
};

use crate::common::{
    cases, demo, demo_as, exported, exported_as, exported_every_way, exported_for, fixture, fixtures_and_targets, run,
    stdout, tests,
};

/// Scores agree to this; those of finished beams are sums of some tens of float32 logarithms.
const SCORE_TOLERANCE: f64 = 5e-4;

#[test]
fn every_case_gives_the_reference_tokens_through_jsonl() {
    for (name, target) in fixtures_and_targets() {
        let (cases, inputs) = (cases(name), inputs(name));
        let cases = cases["cases"].as_array().expect("cases is a list");
        let requests: Vec<String> = cases
            .iter()
            .map(|case| {
                let (ids, mask) = &inputs[case["input"].as_str().expect("a case names its input")];
                let mut request = json!({
                    "id": case["id"],
                    "input_ids": lists(ids),
                    "attention_mask": lists(mask),
                    "options": case["options"],
                });
                if !case["decoder_input_ids"].is_null() {
                    request["decoder_input_ids"] = case["decoder_input_ids"].clone();
                }
                request.to_string()
            })
            .collect();
        let model = exported_for(name, target);
        let model = model.to_str().expect("temporary paths are UTF-8");
        let output = stdout(run("t5gemma", ["generate", model, "--jsonl"], &(requests.join("\n") + "\n")));
        let results: Vec<Value> = output.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect();
        assert_eq!(results.len(), cases.len(), "{name}");
        for (case, result) in cases.iter().zip_eq(&results) {
            assert_eq!(case["id"], result["id"], "{name}: results come in the order of requests");
            let found: Vec<(Value, Option<f64>)> = result["sequences"]
                .as_array()
                .unwrap_or_else(|| panic!("{name} {}: {result}", case["id"]))
                .iter()
                .flat_map(|row| row.as_array().expect("a row is a list"))
                .map(|sequence| (sequence["tokens"].clone(), sequence["score"].as_f64()))
                .collect();
            check_case(&format!("{name} for {} {}", target.name(), case["id"]), case, &found);
        }
    }
}

#[test]
fn every_case_gives_the_reference_tokens_through_rust() {
    for (name, way, model) in exported_every_way() {
        check_cases(name, way, &model);
    }
}

/// Generates every case of a fixture with one of its exports.
pub fn check_cases(name: &str, way: &str, model: &Path) {
    let (cases, inputs) = (cases(name), inputs(name));
    let model = Model::open(model).expect("the model opens");
    for case in cases["cases"].as_array().expect("cases is a list") {
        let (ids, mask) = &inputs[case["input"].as_str().expect("a case names its input")];
        let mut batch = Batch::masked(&nested(ids), &nested(mask)).expect("the fixture's inputs are valid");
        if let Ok(prompts) = serde_json::from_value::<Vec<Vec<i64>>>(case["decoder_input_ids"].clone()) {
            batch = batch.with_decoder_input_ids(&prompts).expect("the fixture's prompts are valid");
        }
        let options = case["options"].as_object().expect("options are an object");
        let options = model.generation_config().with_json(options).expect("the fixture's options are valid");
        let rows = model.generate_batch(&batch, &options, Controls::default());
        let found: Vec<(Value, Option<f64>)> = rows
            .unwrap_or_else(|error| panic!("{name} {}: {error}", case["id"]))
            .iter()
            .flatten()
            .map(|hypothesis| (json!(hypothesis.tokens), hypothesis.score.map(f64::from)))
            .collect();
        check_case(&format!("{name} for {way} {}", case["id"]), case, &found);
    }
}

#[test]
fn candidates_of_the_graph_give_what_logits_give() {
    let requests = [
        json!({}),
        json!({"min_new_tokens": 6}),
        json!({"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5}),
        // These need more than the candidates, from the first step on or only from or up to a later one.
        json!({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}),
        json!({"repetition_penalty": 1.5}),
        json!({"num_beams": 4, "no_repeat_ngram_size": 3}),
        json!({"begin_suppress_tokens": [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]}),
        json!({"output_logprobs": true}),
        json!({"do_sample": true, "seed": 7}),
    ];
    let (ids, mask) = &inputs("tiny-unbalanced")["right"];
    let batch = Batch::masked(&nested(ids), &nested(mask)).expect("the fixture's inputs are valid");
    for (target, capacity) in [(Target::Cuda, None), (Target::TensorRt, None), (Target::TensorRt, Some(64))] {
        let model = |logits: Logits| {
            let label = format!("candidates-{}-{capacity:?}-{logits:?}", target.name());
            let export = Export::default().target(target).capacity(capacity).logits(logits);
            Model::open(exported_as("tiny-unbalanced", &label, export)).expect("the model opens")
        };
        let [logits, candidates] = [Logits::Last, Logits::Candidates(10)].map(model);
        for request in &requests {
            let generate = |model: &Model| {
                let options = model
                    .generation_config()
                    .with_json(request.as_object().expect("written above"))
                    .expect("valid options");
                let options =
                    options.with_json(json!({"max_new_tokens": 20}).as_object().expect("an object")).expect("valid");
                model.generate_batch(&batch, &options, Controls::default()).expect("generates")
            };
            let (expected, found) = (generate(&logits), generate(&candidates));
            let count = |rows: &[Vec<Hypothesis>]| rows.iter().map(Vec::len).collect::<Vec<_>>();
            assert_eq!(count(&found), count(&expected), "{} {capacity:?} {request}", target.name());
            for (expected, found) in expected.iter().flatten().zip_eq(found.iter().flatten()) {
                assert_eq!(found.tokens, expected.tokens, "{} {capacity:?} {request}", target.name());
                let apart = found.score.zip(expected.score).map(|(a, b)| (a - b).abs());
                assert_eq!(apart.is_none(), expected.score.is_none(), "{} {capacity:?} {request}", target.name());
                assert!(apart.unwrap_or(0.0) < 1e-5, "{} {capacity:?} {request}: {apart:?}", target.name());
            }
        }
    }
}

#[test]
fn a_row_alone_gives_what_it_gives_in_a_batch() {
    let model = Model::open(exported("tiny-balanced")).expect("the model opens");
    let (ids, mask) = &inputs("tiny-balanced")["right"];
    for (beams, returned) in [(1, 1), (4, 3)] {
        let request = json!({"num_beams": beams, "num_return_sequences": returned, "max_new_tokens": 24});
        let options =
            model.generation_config().with_json(request.as_object().expect("written above")).expect("valid options");
        let generate = |batch: &Batch| {
            let rows = model.generate_batch(batch, &options, Controls::default()).expect("generates");
            rows.into_iter().map(|row| row.into_iter().map(|h| h.tokens).collect::<Vec<_>>()).collect::<Vec<_>>()
        };
        let together = generate(&Batch::masked(&nested(ids), &nested(mask)).expect("valid"));
        for (row, expected) in together.iter().enumerate() {
            let real: Vec<i64> =
                ids.row(row).iter().zip_eq(mask.row(row)).filter(|(_, mask)| **mask == 1).map(|(id, _)| *id).collect();
            let alone = generate(&Batch::padded(&[real], 0).expect("valid"));
            assert_eq!(&alone[0], expected, "row {row}, {beams} beams");
        }
    }
}

#[test]
fn the_demo_answers_as_recorded_from_transformers() {
    let text = std::fs::read_to_string(tests().join("demo/expected.json")).expect("expected.json is there");
    let expected: Vec<Value> = serde_json::from_str(&text).expect("expected.json is a list");
    let request = |case: &Value, options: Value| json!({"text": case["text"], "options": options}).to_string();
    let greedy = expected.iter().map(|case| request(case, json!({"max_new_tokens": 128})));
    let beam = expected.iter().map(|case| request(case, json!({"max_new_tokens": 128, "num_beams": 4})));
    let lines: Vec<String> = greedy.chain(beam).collect();
    let model = demo();
    let model = model.to_str().expect("temporary paths are UTF-8");
    let output = stdout(run("t5gemma", ["generate", model, "--jsonl"], &(lines.join("\n") + "\n")));
    let found: Vec<Value> = output.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect();
    assert_eq!(found.len(), 2 * expected.len());
    let (greedy, beam) = found.split_at(expected.len());
    for ((case, greedy), beam) in expected.iter().zip_eq(greedy).zip_eq(beam) {
        assert_eq!(greedy["sequences"][0][0]["tokens"], case["greedy"], "{}", case["text"]);
        assert_eq!(beam["sequences"][0][0]["tokens"], case["beam4"], "{}", case["text"]);
        let (score, expected) = (&beam["sequences"][0][0]["score"], &case["beam4_score"]);
        let apart = score.as_f64().zip(expected.as_f64()).map(|(a, b)| (a - b).abs());
        assert!(apart.is_some_and(|apart| apart < SCORE_TOLERANCE), "{}: {score} for {expected}", case["text"]);
    }
}

#[test]
fn the_demo_keeps_its_answers_in_few_bits() {
    let text = std::fs::read_to_string(tests().join("demo/expected.json")).expect("expected.json is there");
    let expected: Vec<Value> = serde_json::from_str(&text).expect("expected.json is a list");
    let lines: Vec<String> = (expected.iter())
        .map(|case| json!({"text": case["text"], "options": {"max_new_tokens": 128}}).to_string())
        .collect();
    // Of the held-out sentences 8 bits may change 3 in a thousand, 4 bits 15; here are a hundred.
    for (target, bits, size, changed) in
        [(Target::Cpu, 8, 128, 1), (Target::Cpu, 4, 32, 3), (Target::TensorRt, 4, 32, 3)]
    {
        let blocks = Some(Blocks::integer(bits, size));
        let quantization = Quantization { encoder: blocks, decoder: blocks, head: blocks, ..Quantization::default() };
        let export = Export::default().target(target).quantization(quantization);
        let model = demo_as(&format!("{}-int{bits}", target.name()), export);
        let model = model.to_str().expect("temporary paths are UTF-8");
        let output = stdout(run("t5gemma", ["generate", model, "--jsonl"], &(lines.join("\n") + "\n")));
        let found: Vec<Value> = output.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect();
        assert_eq!(found.len(), expected.len(), "{target:?}, {bits} bits");
        let other =
            found.iter().zip_eq(&expected).filter(|(found, case)| found["sequences"][0][0]["tokens"] != case["greedy"]);
        let other = other.count();
        assert!(other <= changed, "{target:?}, {bits} bits: {other} of {} answers changed", expected.len());
    }
}

#[test]
fn tokens_are_shown_as_they_are_chosen_and_a_watch_can_stop() {
    let model = Model::open(exported("tiny-balanced")).expect("the model opens");
    let (ids, mask) = &inputs("tiny-balanced")["right"];
    let batch = Batch::masked(&nested(ids), &nested(mask)).expect("valid");
    let mut shown = vec![Vec::new(); batch.rows()];
    let mut watch = |row: usize, token: i64| {
        shown[row].push(token);
        std::ops::ControlFlow::Continue(())
    };
    let rows = model
        .generate_batch(&batch, model.generation_config(), Controls::default().streamer(&mut watch))
        .expect("generates");
    assert_eq!(shown, rows.iter().map(|row| row[0].tokens.clone()).collect::<Vec<_>>());

    let mut count = 0;
    let mut stop = |_: usize, _: i64| {
        count += 1;
        if count == 3 { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) }
    };
    let stopped = model.generate_batch(&batch, model.generation_config(), Controls::default().streamer(&mut stop));
    assert!(matches!(stopped, Err(t5gemma_runtime::Error::Cancelled)));
    assert_eq!(count, 3);
}

#[test]
fn another_thread_can_cancel() {
    let model = Model::open(exported("tiny-balanced")).expect("the model opens");
    let batch = Batch::padded(&[vec![5; 200]], 0).expect("valid");
    let cancel = Cancellation::new();
    let from_outside = cancel.clone();
    let mut tokens = 0;
    let mut watch = |_: usize, _: i64| {
        tokens += 1;
        if tokens == 2 {
            let cancel = from_outside.clone();
            std::thread::spawn(move || cancel.cancel()).join().expect("cancelling does not panic");
        }
        std::ops::ControlFlow::Continue(())
    };
    let request = json!({"max_new_tokens": 300, "eos_token_id": [199], "suppress_tokens": [199]});
    let options =
        model.generation_config().with_json(request.as_object().expect("written above")).expect("valid options");
    let stopped =
        model.generate_batch(&batch, &options, Controls::default().streamer(&mut watch).cancellation(&cancel));
    assert!(matches!(stopped, Err(t5gemma_runtime::Error::Cancelled)));
    assert_eq!(tokens, 2);
}

#[test]
fn a_deadline_is_noticed_before_between_and_after_the_runs_of_every_call() {
    let path = exported("tiny-balanced");
    let (model, encoder) = (Model::open(&path).expect("it opens"), Encoder::open(&path).expect("it opens"));
    let batch = Batch::padded(&[vec![5; 20]], 0).expect("valid");
    let targets = [vec![6, 7, 8]];
    let is_late = |result: Result<(), Error>| assert!(matches!(result, Err(Error::Deadline)), "{result:?}");
    for deadline in [Instant::now(), Instant::now() - Duration::from_nanos(1)] {
        let passed = Cancellation::until(deadline);
        let mut watch = |_: usize, _: i64| -> std::ops::ControlFlow<()> { panic!("there is nothing to show") };
        is_late(
            model
                .generate_batch(
                    &batch,
                    model.generation_config(),
                    Controls::default().streamer(&mut watch).cancellation(&passed),
                )
                .map(drop),
        );
        is_late(model.score(&batch, &targets, 0, &passed).map(drop));
        is_late(model.encode(&batch, &passed).map(drop));
        is_late(model.warm_up(&passed).map(drop));
        is_late(encoder.encode(&batch, &passed).map(drop));
        is_late(encoder.embed(&batch, Pooling::Mean, &passed).map(drop));
    }
    // One that passes while the caller is shown a token, the last one too.
    for tokens in [1, 2, 5] {
        let deadline = Instant::now() + Duration::from_secs(1);
        let request = json!({"max_new_tokens": tokens, "min_new_tokens": tokens});
        let options =
            model.generation_config().with_json(request.as_object().expect("written above")).expect("valid options");
        let mut shown = 0;
        let mut watch = |_: usize, _: i64| {
            shown += 1;
            std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
            std::ops::ControlFlow::Continue(())
        };
        is_late(
            model
                .generate_batch(
                    &batch,
                    &options,
                    Controls::default().streamer(&mut watch).cancellation(&Cancellation::until(deadline)),
                )
                .map(drop),
        );
        assert!(shown <= 1, "{shown}");
    }
    let later = Cancellation::until(Instant::now() + Duration::from_secs(3600));
    let mut count = 0;
    let mut on_step = || {
        count += 1;
        std::ops::ControlFlow::Continue(())
    };
    let scored = model.score_with_progress(&batch, &targets, 0, &mut on_step, &later).expect("in time");
    assert_eq!((scored.len(), count), (1, 3));
}

#[test]
fn weights_that_were_read_outlive_their_file() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    for entry in fs::read_dir(exported("tiny-balanced")).expect("an exported folder") {
        let entry = entry.expect("readable");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copied");
    }
    let model = Model::open_with(&folder, &OpenOptions::default().read_weights(true)).expect("the model opens");
    let weights = fs::File::options().write(true).open(folder.path().join("model.onnx_data"));
    weights.and_then(|weights| weights.set_len(0)).expect("truncated");
    let other = Model::open(exported("tiny-balanced")).expect("the model opens");
    let batch = Batch::padded(&[vec![5; 20]], 0).expect("valid");
    let [found, expected] = [&model, &other].map(|model| {
        let config = model.generation_config().clone();
        model.generate_batch(&batch, &config, Controls::default()).expect("generates").remove(0).remove(0).tokens
    });
    assert_eq!(found, expected);
}

#[test]
fn no_time_is_over_after_the_first_token() {
    let model = Model::open(exported("tiny-balanced")).expect("the model opens");
    let batch = Batch::padded(&[vec![5; 20]], 0).expect("valid");
    let request = json!({"max_new_tokens": 9, "min_new_tokens": 9, "max_time": 0.0});
    let options =
        model.generation_config().with_json(request.as_object().expect("written above")).expect("valid options");
    let rows = model.generate_batch(&batch, &options, Controls::default()).expect("generates");
    assert_eq!((rows[0][0].tokens.len(), rows[0][0].finish_reason), (1, FinishReason::Time));
}

/// Counts steps.
struct Steps(usize);

impl Streamer for Steps {
    fn token(&mut self, _: usize, _: i64) -> std::ops::ControlFlow<()> {
        std::ops::ControlFlow::Continue(())
    }

    fn step(&mut self) -> std::ops::ControlFlow<()> {
        self.0 += 1;
        std::ops::ControlFlow::Continue(())
    }
}

/// Limits only decide how much runs at a time: they change neither draws, nor decoder prompts, nor which request an
/// error names.
#[test]
fn rows_in_pieces_give_what_they_give_together() {
    let sources: Vec<Vec<i64>> = (0..7).map(|row| (5..7 + (row * 5) % 4).map(|id| id + row).collect()).collect();
    let prompts: Vec<Vec<i64>> = (0..7).map(|row| vec![if row == 6 { 2 } else { 9 }, 20 + row]).collect();
    let requests = [
        json!({"max_new_tokens": 9, "min_new_tokens": 9}),
        json!({"max_new_tokens": 9, "num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 9}),
        json!({"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": true, "seed": 4, "num_return_sequences": 2}),
    ];
    // What a piece may be, and the pieces of the sources of 2, 3, 4, 5, 2, 3 and 4 tokens.
    let cases = [
        (Limits::NONE, 1),
        (Limits::default().max_sources(1), 7),
        (Limits::default().max_sources(3), 3),
        (Limits::default().max_tokens(9), 5),
        (Limits::default().max_bytes(1), 7),
    ];
    for target in [Target::Portable, Target::Cpu] {
        let path = exported_for("tiny-balanced", target);
        let found = cases.map(|(limits, pieces)| {
            let options = OpenOptions::default().limits(limits);
            let model = Model::open_with(&path, &options).expect("the model opens");
            let batch = Batch::padded(&sources, 0).expect("valid");
            let batches = [batch.clone(), batch.with_decoder_input_ids(&prompts).expect("valid")];
            let mut answers = Vec::new();
            for (request, batch) in
                requests.iter().flat_map(|request| batches.iter().map(move |batch| (request, batch)))
            {
                let options =
                    model.generation_config().with_json(request.as_object().expect("an object")).expect("valid");
                let mut steps = Steps(0);
                let rows =
                    model.generate_batch(batch, &options, Controls::default().streamer(&mut steps)).expect("generates");
                assert_eq!(steps.0, 9 * pieces, "{limits:?}");
                answers
                    .extend(rows.into_iter().map(|row| row.into_iter().map(|found| found.tokens).collect::<Vec<_>>()));
            }
            let targets: Vec<Vec<i64>> = (0..7).map(|row| vec![7 + row; 1 + row as usize % 3]).collect();
            let scores = model.score(&batches[1], &targets, 0, &Cancellation::new()).expect("scores");
            let states = model.encode(&batches[0], &Cancellation::new()).expect("encodes");
            let error =
                model.score(&batches[1], &targets[..6], 0, &Cancellation::new()).expect_err("one target too few");
            (answers, scores.iter().map(|score| score.logprobs.sum()).collect::<Vec<f64>>(), states, error.to_string())
        });
        let whole = &found[0];
        for (found, (limits, _)) in found.iter().zip_eq(cases) {
            assert_eq!(found.0, whole.0, "{limits:?}");
            assert_eq!((found.1.len(), &found.3), (7, &whole.3), "{limits:?}");
            assert!(found.1.iter().zip_eq(&whole.1).all(|(a, b)| (a - b).abs() < 1e-4), "{limits:?}");
            assert_eq!(found.2.shape(), whole.2.shape(), "{limits:?}");
            for (row, source) in sources.iter().enumerate() {
                let (a, b) = (found.2.index_axis(ndarray::Axis(0), row), whole.2.index_axis(ndarray::Axis(0), row));
                let real = a.iter().zip_eq(b.iter()).take(source.len() * a.shape()[1]);
                assert!(real.into_iter().all(|(a, b)| (a - b).abs() < 1e-4), "{limits:?}, row {row}");
            }
        }
    }
}

/// `from_pretrained` of transformers 5.24 does not look at config.json where there is a generation_config.json: without an
/// end token in it, or with null, a target has as many tokens as it may.
#[test]
fn the_end_token_is_that_of_the_generation_config_where_there_is_one() {
    let text = "Dr. Smith paid $3.50 on May 3, 2019.";
    let cases = [
        (json!({"eos_token_id": 1}), "eos"),
        (json!({"eos_token_id": null}), "length"),
        (json!({}), "length"),
        (Value::Null, "eos"),
    ];
    for (settings, expected) in cases {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let (checkpoint, out) = (folder.path().join("checkpoint"), folder.path().join("model"));
        std::fs::create_dir(&checkpoint).expect("a new folder");
        for file in std::fs::read_dir(tests().join("demo/checkpoint")).expect("it is there") {
            let file = file.expect("listed");
            std::fs::copy(file.path(), checkpoint.join(file.file_name())).expect("copied");
        }
        let path = checkpoint.join("generation_config.json");
        std::fs::remove_file(&path).expect("the demo has one");
        if let Value::Object(mut settings) = settings.clone() {
            settings.extend([("decoder_start_token_id".into(), 2.into()), ("pad_token_id".into(), 0.into())]);
            std::fs::write(&path, Value::Object(settings).to_string()).expect("written");
        }
        stdout(run("t5gemma-export", [&checkpoint, &out], ""));
        let model = out.to_str().expect("temporary paths are UTF-8");
        let request = json!({"text": text, "options": {"max_new_tokens": 40}}).to_string();
        let result = stdout(run("t5gemma", ["generate", model, "--jsonl"], request));
        let result: Value = serde_json::from_str(&result).expect("JSON");
        let found = &result["sequences"][0][0];
        assert_eq!(found["finish_reason"], expected, "{settings}: {found}");
        let tokens = found["tokens"].as_array().expect("tokens");
        assert_eq!(tokens.len() == 40, expected == "length", "{settings}: {found}");
        // Up to the token that would end it, it is the same.
        assert!(tokens.iter().position(|token| token == 1).is_some_and(|end| end == 17), "{settings}: {found}");
    }
}

/// Ids and masks by name.
pub type Inputs = std::collections::HashMap<String, (Array2<i64>, Array2<i64>)>;

/// Ids and masks of a fixture's inputs by name.
pub fn inputs(name: &str) -> Inputs {
    let path = fixture(name).join("golden.safetensors");
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let tensors = SafeTensors::deserialize(&bytes).expect("golden.safetensors is a safetensors file");
    let read = |tensor: &str| {
        let view = tensors.tensor(tensor).expect("every input has ids and a mask");
        let numbers = view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes")));
        Array2::from_shape_vec([view.shape()[0], view.shape()[1]], numbers.collect()).expect("a rectangle")
    };
    let names = tensors.names();
    let inputs = names.iter().filter_map(|name| name.strip_prefix("in.")?.strip_suffix(".input_ids"));
    inputs
        .map(|input| {
            let ids = read(&format!("in.{input}.input_ids"));
            (input.to_string(), (ids, read(&format!("in.{input}.attention_mask"))))
        })
        .collect()
}

/// The rows of a rectangle.
pub fn nested(rows: &Array2<i64>) -> Vec<Vec<i64>> {
    rows.outer_iter().map(|row| row.to_vec()).collect()
}

pub fn lists(rows: &Array2<i64>) -> Value {
    json!(nested(rows))
}

/// Compares hypotheses, rows flattened, with a case's expected tokens and scores.
pub fn check_case(name: &str, case: &Value, found: &[(Value, Option<f64>)]) {
    let expected: &Map<String, Value> = case["expected"].as_object().expect("expected is an object");
    let tokens = expected["tokens"].as_array().expect("tokens is a list");
    assert_eq!(found.len(), tokens.len(), "{name}: hypotheses");
    for (i, ((found, _), expected)) in found.iter().zip_eq(tokens).enumerate() {
        assert_eq!(found, expected, "{name}: hypothesis {i}");
    }
    let Some(scores) = expected.get("sequences_scores").and_then(Value::as_array) else { return };
    for (i, ((_, found), expected)) in found.iter().zip_eq(scores).enumerate() {
        let apart = found.zip(expected.as_f64()).map(|(a, b)| (a - b).abs());
        assert!(apart.is_some_and(|apart| apart < SCORE_TOLERANCE), "{name}: score {i}: {found:?} for {expected}");
    }
}
