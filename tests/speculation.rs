//! Drafts from the source change nothing but the number of steps.

use itertools::Itertools as _;
use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::Logits;
use t5gemma_runtime::{Batch, Controls, Model};

use crate::common::{FIXTURES, demo_as, exported, exported_as, exported_for, tests};

fn all_logits(target: Target) -> Export {
    Export::default().logits(Logits::All).target(target)
}

/// The number of target tokens of a fixture.
fn vocab_size(name: &str) -> i64 {
    let model = Model::open(exported(name)).expect("the model opens");
    model.manifest().facts.decoder.vocab_size as i64
}

fn label(target: Target) -> String {
    format!("all-logits-{}", target.name())
}

/// One whose cache grows and one whose cache is written in place.
const TARGETS: [Target; 2] = [Target::Portable, Target::Cpu];

/// Generates with and without drafts, for each source alone and for all together.
fn check(name: &str, plain: &Model, drafting: &Model, sources: &[Vec<i64>], request: &Value) {
    let generate = |model: &Model, sources: &[Vec<i64>], lookup: Value| {
        let mut request = request.as_object().expect("an object").clone();
        request.extend(lookup.as_object().expect("an object").clone());
        let options = model.generation_config().with_json(&request).unwrap_or_else(|error| panic!("{name}: {error}"));
        let batch = Batch::padded(sources, 0).expect("valid");
        let rows = model.generate_batch(&batch, &options, Controls::default());
        let rows = rows.unwrap_or_else(|error| panic!("{name}: {error}"));
        rows.into_iter().map(|row| (row[0].tokens.clone(), row[0].finish_reason)).collect::<Vec<_>>()
    };
    let expected = generate(plain, sources, json!({}));
    for (tokens, ngram) in [(5, 2), (64, 1)] {
        let lookup = json!({"prompt_lookup_num_tokens": tokens, "max_matching_ngram_size": ngram});
        for (source, expected) in sources.iter().zip_eq(&expected) {
            let found = generate(drafting, std::slice::from_ref(source), lookup.clone());
            assert_eq!(found, std::slice::from_ref(expected), "{name}: {lookup}, {request}");
        }
        assert_eq!(generate(drafting, sources, lookup.clone()), expected, "{name}: {lookup}, {request}");
    }
}

#[test]
fn fixtures_generate_the_same_with_drafts() {
    for name in FIXTURES {
        let vocab_size = vocab_size(name);
        // Tiny random models repeat tokens: sources of few tokens are where their drafts are right now and then.
        let sources: Vec<Vec<i64>> = (0..4)
            .map(|source| {
                let token = |place: i64| (source * 37 + place * place * 11 + place % (source + 2)) % vocab_size;
                (0..12 + source * 5).map(token).collect()
            })
            .collect();
        for target in TARGETS {
            let plain = Model::open(exported_for(name, target)).expect("the model opens");
            let drafting = exported_as(name, &label(target), all_logits(target));
            let drafting = Model::open(drafting).expect("the model opens");
            for request in [
                json!({"max_new_tokens": 40, "eos_token_id": [vocab_size - 1]}),
                json!({"max_new_tokens": 24, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}),
                json!({"max_new_tokens": 3, "encoder_repetition_penalty": 3.0}),
            ] {
                check(name, &plain, &drafting, &sources, &request);
            }
        }
    }
}

#[test]
fn the_demo_generates_the_same_with_drafts() {
    let text = std::fs::read_to_string(tests().join("demo/expected.json")).expect("expected.json is there");
    let sentences: Vec<Value> = serde_json::from_str(&text).expect("expected.json is a list");
    let ids = |case: &Value| serde_json::from_value(case["input_ids"].clone()).expect("token ids");
    let sources: Vec<Vec<i64>> = sentences.iter().take(12).map(ids).collect();
    for target in TARGETS {
        let plain = Model::open(demo_as(target.name(), Export::default().target(target))).expect("the model opens");
        let drafting = Model::open(demo_as(&label(target), all_logits(target))).expect("the model opens");
        check("demo", &plain, &drafting, &sources, &json!({"max_new_tokens": 128}));
        check("demo", &plain, &drafting, &sources[..4], &json!({"max_new_tokens": 60, "required_phrases": ["boston"]}));
        check("demo", &plain, &drafting, &sources[..4], &json!({"max_new_tokens": 60, "stop_strings": [" on"]}));
    }
}

#[test]
fn drafts_where_there_can_be_none_are_refused() {
    let last = Model::open(exported("tiny-balanced")).expect("the model opens");
    let all = Model::open(exported_as("tiny-balanced", &label(Target::Portable), all_logits(Target::Portable)))
        .expect("the model opens");
    let batch = Batch::padded(&[vec![5, 6]], 0).expect("valid");
    let cases = [
        (
            &last,
            json!({"prompt_lookup_num_tokens": 4}),
            "prompt_lookup_num_tokens requires a model exported with all_logits",
        ),
        (&all, json!({"prompt_lookup_num_tokens": 4, "num_beams": 2}), "requires num_beams 1 (got 2)"),
        (&all, json!({"prompt_lookup_num_tokens": 4, "do_sample": true}), "requires do_sample false (got true)"),
        (&all, json!({"max_matching_ngram_size": 2}), "requires prompt_lookup_num_tokens (got none)"),
        (&all, json!({"prompt_lookup_num_tokens": 0}), "an integer of at least 1, found 0"),
    ];
    for (model, request, expected) in cases {
        let options = model.generation_config().with_json(request.as_object().expect("written above"));
        let refused = options.map_err(t5gemma_runtime::Error::from);
        let refused = refused.and_then(|options| model.generate_batch(&batch, &options, Controls::default()));
        let message = refused.map(|_| "no error".to_string()).unwrap_or_else(|error| error.to_string());
        assert!(message.contains(expected), "{request}: {message}");
    }
}
