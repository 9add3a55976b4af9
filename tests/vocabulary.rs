//! A vocabulary so large that a model for a CPU computes most of its scores only roughly: what is chosen, and the scores of
//! what is chosen, are those of the portable graphs, which compute all.

use std::path::PathBuf;

use itertools::Itertools as _;
use serde_json::{Value, json};
use t5gemma_exporter::{Export, Source};
use t5gemma_graphs::Target;
use t5gemma_runtime::{Batch, Controls, Model};

use crate::common::fixture;

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

#[test]
fn what_is_chosen_does_not_depend_on_what_is_computed_roughly() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let [portable, cpu] =
        [Target::Portable, Target::Cpu].map(|target| exported(target, folder.path().join(target.name())));
    let sources: [&[i64]; 3] = [&[5, 90_000, 17, 3000, 44], &[70_001, 9], &[8, 8, 123, 45_678]];
    let cases = [
        json!({}),
        json!({"num_beams": 4}),
        json!({"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 2}),
        json!({"repetition_penalty": 1.3, "suppress_tokens": [4, 5, 6], "min_new_tokens": 6}),
        json!({"do_sample": true, "seed": 3, "temperature": 0.7, "top_k": 40, "top_p": 0.9}),
        json!({"do_sample": true, "seed": 4, "top_k": 0}),
        json!({"num_beams": 2, "do_sample": true, "seed": 5, "top_k": 12}),
        json!({"repetition_penalty": 0.8}),
    ];
    for case in cases {
        let generate = |model: &Model, sources: &[&[i64]]| {
            let mut given = case.as_object().expect("an object").clone();
            given.insert("max_new_tokens".into(), json!(12));
            let options = model.generation_config().with_json(&given).expect("valid");
            let batch = Batch::padded(sources, 0).expect("valid");
            let found = model.generate_batch(&batch, &options, Controls::default()).expect("generates");
            found.into_iter().flatten().map(|found| (found.tokens, found.score)).collect::<Vec<_>>()
        };
        for sources in [&sources[..], &sources[..1]] {
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
