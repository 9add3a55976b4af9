//! Random generation requests against transformers: `fixtures/random.json`, made by `fixtures/scripts/make_random_golden.py`.
//! All requests of a fixture are submitted to an engine together, so that they meet each other as they would in a server.

use std::sync::Arc;

use itertools::Itertools as _;
use serde_json::Value;
use t5gemma_graphs::Target;
use t5gemma_runtime::{Batch, Engine, EngineOptions, Model, PixelValues, Request};

use crate::common::{exported_for, tests};

const SCORE_TOLERANCE: f64 = 5e-4;

fn rows(value: &Value) -> Vec<Vec<i64>> {
    serde_json::from_value(value.clone()).expect("rows of tokens")
}

/// The image of a seed, as `make_random_golden.py` draws it.
fn image(mut seed: u32, side: usize) -> PixelValues {
    let mut pixel = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (f64::from(seed >> 24) / 127.5 - 1.0) as f32
    };
    PixelValues::new(side, (0..3 * side * side).map(|_| pixel()).collect()).expect("finite")
}

#[test]
fn random_requests_give_the_reference_tokens_among_each_other() {
    let text = std::fs::read_to_string(tests().join("fixtures/random.json")).expect("the fixture is there");
    let golden: serde_json::Map<String, Value> = serde_json::from_str(&text).expect("JSON");
    let mut wrong = Vec::new();
    let mut count = 0;
    for (name, cases) in &golden {
        let cases = cases.as_array().expect("a list");
        for target in [Target::Portable, Target::Cpu] {
            let model = Arc::new(Model::open(exported_for(name, target)).expect("the model opens"));
            let engine = Engine::new(model.clone(), EngineOptions::default()).expect("an engine");
            let submit = |case: &Value| {
                let batch = Batch::masked(&rows(&case["input_ids"]), &rows(&case["attention_mask"])).expect("valid");
                let batch = match case.get("decoder_input_ids") {
                    Some(prompts) => batch.with_decoder_input_ids(&rows(prompts)).expect("valid"),
                    None => batch,
                };
                let batch = match case.get("image_seeds") {
                    Some(seeds) => {
                        let seeds: Vec<u32> = serde_json::from_value(seeds.clone()).expect("seeds");
                        let side = model.facts().vision.as_ref().expect("a model with a tower").image_size;
                        let images = seeds.into_iter().map(|seed| image(seed, side)).collect();
                        batch.with_images_in_order(model.facts(), images).expect("as many as there are tokens for")
                    }
                    None => batch,
                };
                let options = model.generation_config().with_json(case["options"].as_object().expect("an object"));
                let options = options.unwrap_or_else(|error| panic!("{case}: {error}"));
                engine.submit(Request::new(batch, options)).unwrap_or_else(|error| panic!("{case}: {error}"))
            };
            let generations: Vec<_> = cases.iter().map(submit).collect();
            for (at, (case, generation)) in cases.iter().zip_eq(generations).enumerate() {
                let found = generation.wait().unwrap_or_else(|error| panic!("{case}: {error}"));
                let tokens: Vec<Vec<i64>> = found.iter().flatten().map(|h| h.tokens.clone()).collect();
                let mut expected_tokens = rows(&case["tokens"]);
                let scores: Option<Vec<f64>> = found.iter().flatten().map(|h| h.score.map(f64::from)).collect();
                let expected: Option<Vec<f64>> = serde_json::from_value(case["scores"].clone()).expect("numbers");
                // A place among the best that no beam has filled has this score; what transformers fills it with is which of
                // equally impossible tokens its sort put first, and here it is empty.
                for (at, _) in expected.iter().flatten().enumerate().filter(|(_, score)| **score == -1e9) {
                    assert!(tokens[at].is_empty(), "{case}");
                    expected_tokens[at].clear();
                }
                let is_near = match (&scores, &expected) {
                    (None, None) => true,
                    (Some(found), Some(expected)) => {
                        let mut pairs = found.iter().zip_eq(expected);
                        found.len() == expected.len()
                            && pairs.all(|(a, b)| (a - b).abs() < SCORE_TOLERANCE * b.abs().max(1.0))
                    }
                    _ => false,
                };
                if tokens != expected_tokens || !is_near {
                    wrong.push(format!("{name} for {} {at}: {tokens:?} {scores:?}, expected {case}", target.name()));
                }
                count += 1;
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {count}:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(count, 2 * 400);
}
