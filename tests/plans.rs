//! Serving plans, with the CPU in place of the GPU: requests are padded and run in pieces without changing their
//! answers, and what an engine would not accept is rejected before anything runs.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use itertools::Itertools as _;
use serde_json::{Value, json};
use t5gemma_exporter::{Export, ServingPlan};
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::{DType, Logits};
use t5gemma_graphs::task::{Features, Pooling, Task};
use t5gemma_runtime::{
    Batch, Cancellation, Controls, Encoder, Engine, EngineOptions, Error, GenerationConfig, Hypothesis, Model, Request,
};

use crate::common::{demo_as, exported_as, exported_from, run, stdout, tests};

const PLAN: &str = "batch=2..3,source=8..32,target=24,beams=1..4,prompt=1..3";

fn planned(capacity: Option<usize>, plan: Option<&str>, logits: Logits) -> PathBuf {
    let label = format!("plans-{capacity:?}-{plan:?}-{logits:?}");
    let plan = plan.map(|plan| plan.parse::<ServingPlan>().expect("a plan"));
    let (target, dtype) = (Target::TensorRt, DType::Float32);
    exported_as(
        "tiny-balanced",
        &label,
        Export::default().target(target).dtype(dtype).capacity(capacity).plan(plan).logits(logits),
    )
}

/// Models with a plan, in both cache layouts, each beside the same without.
fn pairs() -> [[Arc<Model>; 2]; 2] {
    [None, Some(24)].map(|capacity| {
        [Some(PLAN), None].map(|plan| {
            let path = planned(capacity, plan, Logits::Last);
            Arc::new(Model::open(path).expect("the model opens"))
        })
    })
}

fn source(length: usize, seed: usize) -> Vec<i64> {
    (0..length).map(|at| 5 + ((at * 37 + seed * 11) % 60) as i64).collect()
}

fn batch(lengths: &[usize]) -> Batch {
    let sources: Vec<_> = lengths.iter().enumerate().map(|(row, &length)| source(length, row)).collect();
    Batch::padded(&sources, 0).expect("valid")
}

fn options(model: &Model, given: &Value) -> GenerationConfig {
    model.generation_config().with_json(given.as_object().expect("an object")).expect("valid")
}

fn tokens(rows: &[Vec<Hypothesis>]) -> Vec<Vec<&[i64]>> {
    rows.iter().map(|row| row.iter().map(|hypothesis| &hypothesis.tokens[..]).collect()).collect()
}

/// Batches of one row, which is padded; of the maximum size; and of more rows, which run in pieces.
const BATCHES: [&[usize]; 4] = [&[2], &[1, 9, 30], &[3, 17], &[4, 32, 1, 12, 7, 8, 2]];

#[test]
fn a_plan_changes_no_answer() {
    let cancel = Cancellation::new();
    for [planned, plain] in pairs() {
        for lengths in BATCHES {
            let batch = batch(lengths);
            for given in [
                json!({"max_new_tokens": 12}),
                json!({"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 2}),
                json!({"max_new_tokens": 8, "num_beams": 3, "repetition_penalty": 1.3, "encoder_repetition_penalty": 1.2}),
                json!({"max_new_tokens": 10, "do_sample": true, "seed": 3, "num_return_sequences": 4}),
            ] {
                let mut shown: Vec<Vec<i64>> = vec![Vec::new(); lengths.len()];
                let mut watch = |row: usize, token: i64| {
                    shown[row].push(token);
                    ControlFlow::Continue(())
                };
                let found = planned.generate_batch(
                    &batch,
                    &options(&planned, &given),
                    Controls::default().streamer(&mut watch).cancellation(&cancel),
                );
                let found = found.expect("generates");
                let expected = plain
                    .generate_batch(&batch, &options(&plain, &given), Controls::default().cancellation(&cancel))
                    .expect("generates");
                assert_eq!(tokens(&found), tokens(&expected), "{lengths:?} {given}");
                let first: Vec<&[i64]> = found.iter().map(|row| &row[0].tokens[..]).collect();
                assert_eq!(shown, first, "{lengths:?} {given}");
            }
            let prompts = vec![[7, 9]; lengths.len()];
            let prompted = batch.clone().with_decoder_input_ids(&prompts).expect("valid");
            let [found, expected] = [&planned, &plain].map(|model| {
                let options = options(model, &json!({"max_new_tokens": 5}));
                model.generate_batch(&prompted, &options, Controls::default().cancellation(&cancel)).expect("generates")
            });
            assert_eq!(tokens(&found), tokens(&expected), "{lengths:?} with prompts");

            let targets: Vec<Vec<i64>> = (0..lengths.len()).map(|row| source(1 + row % 4, row + 9)).collect();
            let [found, expected] =
                [&planned, &plain].map(|model| model.score(&batch, &targets, 2, &cancel).expect("scores"));
            assert_eq!(found.len(), lengths.len());
            for (found, expected) in found.iter().zip_eq(&expected) {
                let (found, expected) = (&found.logprobs, &expected.logprobs);
                assert_eq!(found.tokens.len(), expected.tokens.len());
                let apart = found.tokens.iter().zip_eq(&expected.tokens).map(|(a, b)| (a - b).abs());
                assert!(apart.fold(0.0, f32::max) < 1e-4, "{lengths:?}");
            }
            let [found, expected] = [&planned, &plain].map(|model| model.encode(&batch, &cancel).expect("encodes"));
            assert_eq!(found.shape(), expected.shape());
            for (row, &length) in lengths.iter().enumerate() {
                let apart = (0..length).flat_map(|at| (0..found.shape()[2]).map(move |x| [row, at, x]));
                let apart = apart.map(|at| (found[at] - expected[at]).abs()).fold(0.0, f32::max);
                assert!(apart < 1e-4, "{lengths:?} row {row}: {apart}");
            }
        }
    }
}

#[test]
fn an_engine_holds_to_the_plan_too() {
    for [planned, plain] in pairs() {
        let engine = Engine::new(planned.clone(), EngineOptions::default()).expect("an engine");
        let requests: Vec<(Batch, Value)> = (0..12)
            .map(|at| {
                let lengths: &[usize] = [&[3][..], &[9, 1], &[30, 2, 5, 8]][at % 3];
                let beams = [1, 3, 2][at / 3 % 3];
                (batch(lengths), json!({"max_new_tokens": 4 + at, "num_beams": beams}))
            })
            .collect();
        let generations: Vec<_> = (requests.iter())
            .map(|(batch, given)| {
                let request = Request::new(batch.clone(), options(&planned, given));
                engine.submit(request).expect("within the plan")
            })
            .collect();
        for (generation, (batch, given)) in generations.into_iter().zip_eq(&requests) {
            let expected = plain.generate_batch(batch, &options(&plain, given), Controls::default());
            let found = generation.wait().expect("answered");
            assert_eq!(tokens(&found), tokens(&expected.expect("generates")), "{given}");
        }
        // Four beams fit a call, but not an engine, where each has its source's keys and values for itself.
        let four = Request::new(batch(&[3]), options(&planned, &json!({"max_new_tokens": 4, "num_beams": 4})));
        let error = engine.submit(four).expect_err("more than the batch").to_string();
        assert!(
            error.contains("needs 4 target rows")
                && error.contains("serving plan's batch")
                && error.contains("limit is 3"),
            "{error}"
        );
        let long = Request::new(batch(&[33]), options(&planned, &json!({"max_new_tokens": 4})));
        assert!(engine.submit(long).expect_err("too long").to_string().contains("the plan source=8..32"));
    }
}

/// An already cancelled cancellation: anything that runs ends with it, and what is rejected is still rejected.
fn stopped() -> Cancellation {
    let cancel = Cancellation::new();
    cancel.cancel();
    cancel
}

#[test]
fn what_is_beyond_a_plan_is_refused_before_anything_runs() {
    let stopped = stopped();
    for [planned, plain] in pairs() {
        let told = |result: Result<(), Error>| result.expect_err("refused").to_string();
        let generate = |model: &Model, batch: &Batch, given: &Value| {
            model.generate_batch(batch, &options(model, given), Controls::default().cancellation(&stopped)).map(drop)
        };
        for (batch, given, expected) in [
            (
                batch(&[33]),
                json!({"max_new_tokens": 4}),
                "input_ids: expected at most 32 tokens a row (exported with the plan source=8..32), found 33 tokens",
            ),
            (
                batch(&[3]),
                json!({"max_new_tokens": 4, "num_beams": 5}),
                "num_beams: expected at most 4 (exported with the plan beams=1..4), found 5",
            ),
            (
                batch(&[3]),
                json!({"max_new_tokens": 4, "do_sample": true, "num_return_sequences": 5}),
                "num_return_sequences: expected at most 4 (exported with the plan beams=1..4), found 5",
            ),
            (batch(&[3]), json!({"max_new_tokens": 24}), "max_length: expected at most 24 target tokens ("),
            (
                batch(&[3]).with_decoder_input_ids(&[[5, 6, 7]]).expect("valid"),
                json!({"max_new_tokens": 4}),
                "decoder_input_ids: expected 1 to 3 tokens with the start token (exported with the plan prompt=1..3), found 4",
            ),
        ] {
            let error = told(generate(&planned, &batch, &given));
            assert!(error.starts_with(expected), "{error}\n{expected}");
        }
        // Without a plan these run, until they are stopped; so does what is within it.
        assert!(matches!(generate(&plain, &batch(&[33]), &json!({"max_new_tokens": 4})), Err(Error::Cancelled)));
        assert!(matches!(generate(&planned, &batch(&[32; 9]), &json!({"max_new_tokens": 4})), Err(Error::Cancelled)));

        let error = told(planned.encode(&batch(&[33]), &stopped).map(drop));
        assert!(error.contains("the plan source=8..32"), "{error}");
        let error = told(planned.score(&batch(&[33]), &[vec![5]], 0, &stopped).map(drop));
        assert!(error.contains("the plan source=8..32"), "{error}");
        let error = told(planned.score(&batch(&[3]), &[vec![5; 24]], 0, &stopped).map(drop));
        assert!(error.contains("at most 24 target tokens"), "{error}");
        let long = batch(&[3]).with_decoder_input_ids(&[[5, 6, 7, 8]]).expect("valid");
        let error = told(planned.score(&long, &[vec![5]], 0, &stopped).map(drop));
        assert!(error.contains("the plan prompt=1..3"), "{error}");
    }
    for (capacity, expected) in
        [(None, "(got 1)"), (Some(24), "requires a serving plan with steps of at least 4 tokens (got 3)")]
    {
        let model = Model::open(planned(capacity, Some(PLAN), Logits::All)).expect("opens");
        for (drafted, is_taken) in [(2, capacity.is_some()), (3, false)] {
            let options = options(&model, &json!({"max_new_tokens": 4, "prompt_lookup_num_tokens": drafted}));
            let error = model
                .generate_batch(&batch(&[9]), &options, Controls::default().cancellation(&stopped))
                .map(drop)
                .expect_err("stopped");
            match is_taken {
                true => assert!(matches!(error, Error::Cancelled), "{error}"),
                false => assert!(error.to_string().contains(expected), "{error}"),
            }
        }
    }
}

#[test]
fn a_first_run_is_as_was_planned_with_prompts() {
    for prompt in ["prompt=2..3", "prompt=1"] {
        let plan = format!("batch=2,source=8..32,target=24,beams=2,{prompt}");
        let model = Model::open(planned(None, Some(&plan), Logits::Last)).expect("opens");
        let usual = model.warm_up(&Cancellation::new()).expect("runs within the plan");
        assert_eq!((usual.batch, usual.source, usual.beams), (2, 16, 2));
    }
}

/// A task's fixture with a plan and without.
fn encoders(name: &str, task: Option<Task>) -> [Encoder; 2] {
    let checkpoint = tests().join("fixtures/tasks").join(name).join("checkpoint");
    [Some("batch=2..3,source=8..32"), None].map(|plan| {
        let label = format!("plans-{name}-{task:?}-{plan:?}");
        let plan = plan.map(|plan| plan.parse::<ServingPlan>().expect("a plan"));
        let (target, dtype) = (Target::TensorRt, DType::Float32);
        let export = Export::default().task(task.clone()).target(target).dtype(dtype).plan(plan);
        Encoder::open(exported_from(&checkpoint, &label, export)).expect("opens")
    })
}

#[test]
fn a_plan_changes_no_vector_and_no_label() {
    let cancel = Cancellation::new();
    let near = |name: &str, found: &[f32], expected: &[f32]| {
        assert_eq!(found.len(), expected.len(), "{name}");
        let apart = found.iter().zip_eq(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-4, "{name}: {apart}");
    };
    let lengths: [&[usize]; 3] = [&[9], &[10, 9, 20], &[8, 12, 9, 31, 8, 10, 11]];
    for pooling in [Pooling::None, Pooling::Mean, Pooling::Last] {
        let task = Task::FeatureExtraction(Features { pooling, ..Features::default() });
        let both = encoders("encoder", Some(task));
        for lengths in lengths.iter().chain(&[&[1_usize, 3][..], &[2]]) {
            let [found, expected] = both.each_ref().map(|encoder| {
                let wanted = if pooling == Pooling::None { Pooling::Mean } else { pooling };
                encoder.embed(&batch(lengths), wanted, &cancel).expect("embeds").into_raw_vec_and_offset().0
            });
            near(&format!("{pooling} {lengths:?}"), &found, &expected);
        }
    }
    for name in ["sequence-encoder", "sequence-decoder"] {
        let both = encoders(name, None);
        for lengths in lengths {
            let [found, expected] = both.each_ref().map(|encoder| {
                encoder.classify(&batch(lengths), &cancel).expect("classifies").into_raw_vec_and_offset().0
            });
            near(&format!("{name} {lengths:?}"), &found, &expected);
        }
        // Of a decoder that reads padding, a source that would have to be padded is refused.
        let short = both[0].classify(&batch(&[9, 7]), &cancel);
        match name {
            "sequence-encoder" => drop(short.expect("classifies")),
            _ => {
                let error = short.expect_err("refused").to_string();
                assert!(
                    error.starts_with("input_ids[1]: expected at least 8 tokens (exported with the plan"),
                    "{error}"
                );
            }
        }
        let error = both[0].classify(&batch(&[33]), &stopped()).expect_err("too long").to_string();
        assert!(error.contains("at most 32 tokens a row (exported with the plan source=8..32)"), "{error}");
    }
    for name in ["token-encoder", "token-decoder"] {
        let both = encoders(name, None);
        for lengths in lengths.iter().chain(&[&[1_usize, 3][..]]) {
            let batch = batch(lengths);
            let [found, expected] =
                both.each_ref().map(|encoder| encoder.classify_tokens(&batch, &cancel).expect("classifies"));
            assert_eq!(found.shape(), expected.shape());
            for (row, &length) in lengths.iter().enumerate() {
                let of = |all: &ndarray::Array3<f32>| -> Vec<f32> {
                    (0..length)
                        .flat_map(|at| (0..all.shape()[2]).map(move |x| [row, at, x]))
                        .map(|at| all[at])
                        .collect()
                };
                near(&format!("{name} {lengths:?} row {row}"), &of(&found), &of(&expected));
            }
        }
    }
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

#[test]
fn commands_hold_to_a_plan_of_one_size() {
    let export = |plan: Option<&str>| {
        let plan = plan.map(|plan| plan.parse::<ServingPlan>().expect("a plan"));
        Export::default().target(Target::TensorRt).dtype(DType::Float32).plan(plan)
    };
    let one = demo_as("plans-one-size", export(Some("batch=4,source=32,target=32,beams=2")));
    let plain = demo_as("plans-none", export(None));
    let texts = "May 3rd.\nJune 5th.\n4 pm\n5 dogs\n6 cats\n7 mice\n";
    for rest in [&["--batch-size", "6"][..], &["--batch-size", "1"], &["--batch-size", "4", "--num-beams", "2"]] {
        let [found, expected] = [&one, &plain].map(|model| {
            let arguments = [&["generate", utf8(model), "--max-new-tokens", "20"], rest].concat();
            stdout(run("t5gemma", arguments, texts))
        });
        assert_eq!(found, expected, "{rest:?}");
    }
    for (rest, word) in [
        (&["--num-beams", "4"][..], "--num-beams: expected at most 2"),
        (&["--max-new-tokens", "32"], "--max-new-tokens: expected at most 32"),
    ] {
        let arguments = [&["generate", utf8(&one), "May 3rd."], rest].concat();
        let output = run("t5gemma", arguments, "");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && error.contains(word), "{rest:?}: {error}");
    }
}
