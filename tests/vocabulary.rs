//! A vocabulary so large that a model for a CPU computes most of its scores only roughly. The tokens that it chooses, and
//! their scores, must equal those of the portable graphs, which compute every score exactly. Rows that join others in an
//! engine must get the same results as alone.

use std::path::PathBuf;
use std::sync::Arc;

use itertools::Itertools as _;
use serde_json::{Value, json};
use t5gemma_exporter::{Export, Source};
use t5gemma_graphs::Target;
use t5gemma_runtime::{Batch, Controls, Engine, EngineOptions, Event, GenerationConfig, Model, Request};

use crate::common::fixture;
use crate::engine::check_same;

/// Random weights of a small model with a large vocabulary, as exported for a target.
fn exported(target: Target, out: PathBuf) -> Model {
    let config = std::fs::read_to_string(fixture("tiny-balanced").join("checkpoint/config.json")).expect("a config");
    let mut config: Value = serde_json::from_str(&config).expect("JSON");
    let width = config["decoder"]["hidden_size"].as_u64().expect("a number");
    let vocab_size = 9_000_000 / width;
    for side in ["/encoder", "/decoder", ""] {
        config.pointer_mut(side).expect("a side")["vocab_size"] = json!(vocab_size);
    }
    let source = Source::Dummy { config: config.to_string(), origin: "the test".into(), seed: 7 };
    Export::default().target(target).run(&source, &out).expect("exports");
    Model::open(out).expect("opens")
}

const SOURCES: [&[i64]; 3] = [&[5, 90_000, 17, 3000, 44], &[70_001, 9], &[8, 8, 123, 45_678]];

fn cases() -> [Value; 9] {
    [
        json!({}),
        json!({"num_beams": 4}),
        json!({"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 2}),
        json!({"repetition_penalty": 1.3, "suppress_tokens": [4, 5, 6], "min_new_tokens": 6}),
        json!({"do_sample": true, "seed": 3, "temperature": 0.7, "top_k": 40, "top_p": 0.9}),
        json!({"do_sample": true, "seed": 4, "top_k": 0}),
        json!({"num_beams": 2, "do_sample": true, "seed": 5, "top_k": 12}),
        json!({"repetition_penalty": 0.8}),
        json!({"return_alternatives": true, "num_return_sequences": 3}),
    ]
}

fn options(model: &Model, case: &Value, new_tokens: usize) -> GenerationConfig {
    let mut given = case.as_object().expect("an object").clone();
    given.insert("max_new_tokens".into(), json!(new_tokens));
    model.generation_config().with_json(&given).expect("valid")
}

#[test]
fn what_is_chosen_does_not_depend_on_what_is_computed_roughly() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let [portable, cpu] =
        [Target::Portable, Target::Cpu].map(|target| exported(target, folder.path().join(target.name())));
    for case in cases() {
        let generate = |model: &Model, sources: &[&[i64]]| {
            let options = options(model, &case, 12);
            let batch = Batch::padded(sources, 0).expect("valid");
            let found = model.generate_batch(&batch, &options, Controls::default()).expect("generates");
            found.into_iter().flatten().map(|found| (found.tokens, found.score)).collect::<Vec<_>>()
        };
        for sources in [&SOURCES[..], &SOURCES[..1]] {
            let (expected, found) = (generate(&portable, sources), generate(&cpu, sources));
            assert_eq!(found.len(), expected.len(), "{case}");
            for ((expected, score), (found, of_found)) in expected.iter().zip_eq(&found) {
                assert_eq!(found, expected, "{case}");
                let apart = score.zip(*of_found).map_or(0.0, |(a, b)| (a - b).abs());
                assert!(score.is_some() == of_found.is_some() && apart < 1e-4, "{case}: {score:?} and {of_found:?}");
            }
        }
    }
}

#[test]
fn rows_that_join_others_choose_as_alone() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = Arc::new(exported(Target::Cpu, folder.path().join("model")));
    let engine = Engine::new(model.clone(), EngineOptions::default()).expect("an engine");
    let prompted =
        || Batch::padded(&SOURCES[1..], 0).and_then(|batch| batch.with_decoder_input_ids(&[[2, 77], [9, 8]]));
    let batches = || [Batch::padded(&SOURCES, 0), prompted()].map(|batch| batch.expect("valid"));
    let many = options(&model, &json!({"min_new_tokens": 200}), 200);
    for case in cases() {
        let options = options(&model, &case, 12);
        for (at, batch) in batches().into_iter().enumerate() {
            let expected = model.generate_batch(&batch, &options, Controls::default()).expect("generates");
            let first = Request::new(Batch::padded(&SOURCES[..1], 0).expect("valid"), many.clone());
            let mut first = engine.submit(first).expect("taken");
            let is_in_flight = first.by_ref().any(|event| matches!(event, Ok(Event::Token { .. })));
            assert!(is_in_flight, "{case}");
            let joining = engine.submit(Request::new(batch, options.clone())).expect("taken");
            check_same(&format!("batch {at}: {case}"), &joining.wait().expect("generates"), &expected);
            first.cancel();
        }
    }
}
