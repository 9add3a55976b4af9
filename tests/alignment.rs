//! Cross-attentions of targets: against transformers, for every generation strategy, and with a coverage penalty.
//! `fixtures/alignment.json` is made by `fixtures/scripts/make_alignment_golden.py`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use itertools::Itertools as _;
use serde_json::{Value, json};
use t5gemma_exporter::{Alignment, Export};
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::Logits;
use t5gemma_runtime::{
    Batch, Cancellation, Controls, CrossAttentions, Engine, EngineOptions, GenerationConfig, Hypothesis, Model, Request,
};

use crate::common::{FIXTURES, demo, demo_as, exported, exported_as, run, stdout, tests};

/// Of probabilities in float32.
const TOLERANCE: f32 = 1e-4;

/// Every way to run a model with cross-attentions on a CPU.
fn ways(layers: &[usize]) -> Vec<(&'static str, Export)> {
    let alignment = if layers.is_empty() { Alignment::AllLayers } else { Alignment::Layers(layers.to_vec()) };
    let of = |target| Export::default().target(target).alignment(alignment.clone());
    let mut ways: Vec<_> = Target::ALL.into_iter().map(|target| (target.name(), of(target))).collect();
    let fixed = of(Target::TensorRt).capacity(64).logits(Logits::Candidates(4));
    ways.push(("tensorrt with a static cache", fixed));
    ways.push(("portable with all logits", of(Target::Portable).logits(Logits::All)));
    ways
}

fn aligned(name: &str, target: Target) -> PathBuf {
    let export = Export::default().target(target).alignment(Alignment::AllLayers);
    exported_as(name, &format!("alignment-{}", target.name()), export)
}

fn golden() -> serde_json::Map<String, Value> {
    let text = std::fs::read_to_string(tests().join("fixtures/alignment.json")).expect("the fixture is there");
    serde_json::from_str(&text).expect("JSON")
}

fn rows(value: &Value) -> Vec<Vec<i64>> {
    serde_json::from_value(value.clone()).expect("rows of tokens")
}

fn batch(case: &Value) -> Batch {
    let batch = Batch::masked(&rows(&case["input_ids"]), &rows(&case["attention_mask"])).expect("valid");
    match case.get("decoder_input_ids") {
        Some(prompts) => batch.with_decoder_input_ids(&rows(prompts)).expect("valid"),
        None => batch,
    }
}

fn options(model: &Model, request: &Value) -> GenerationConfig {
    let mut request = request.as_object().expect("an object").clone();
    request.insert("output_attentions".into(), true.into());
    model.generation_config().with_json(&request).unwrap_or_else(|error| panic!("{request:?}: {error}"))
}

fn generate(model: &Model, batch: &Batch, request: &Value) -> Vec<Vec<Hypothesis>> {
    let found = model.generate_batch(batch, &options(model, request), Controls::default());
    found.unwrap_or_else(|error| panic!("{request}: {error}"))
}

fn attended(hypothesis: &Hypothesis) -> &CrossAttentions {
    hypothesis.cross_attentions.as_ref().expect("they were asked for")
}

/// Compares results with a case, averaged over `layers` only.
fn check_case(way: &str, case: &Value, layers: &[usize], found: &[Vec<Hypothesis>]) {
    let (masks, expected_tokens) = (rows(&case["attention_mask"]), rows(&case["tokens"]));
    let expected: Vec<Vec<Vec<Vec<f32>>>> =
        serde_json::from_value(case["cross_attentions"].clone()).expect("[layers][tokens][source] of each");
    let of_source = expected_tokens.len() / masks.len();
    let found: Vec<&Hypothesis> = found.iter().flatten().collect();
    assert_eq!(found.len(), expected.len(), "{way}");
    for (at, (hypothesis, expected)) in found.into_iter().zip_eq(expected).enumerate() {
        assert_eq!(hypothesis.tokens, expected_tokens[at], "{way}: {case}");
        let (attended, mask) = (attended(hypothesis), &masks[at / of_source]);
        assert_eq!(attended.source_length(), mask.len(), "{way}");
        assert_eq!(attended.tokens().len(), hypothesis.tokens.len(), "{way}");
        for (token, row) in attended.tokens().enumerate() {
            // In a T5Gemma 2, the rest is attention to the target.
            let total: f32 = layers.iter().flat_map(|&layer| &expected[layer][token]).sum();
            let total = total / layers.len() as f32;
            assert!((row.iter().sum::<f32>() - total).abs() < 1e-4 && total < 1.0 + 1e-4, "{way}: {row:?}");
            for (place, (&x, &visible)) in row.iter().zip_eq(mask).enumerate() {
                let sum: f32 = layers.iter().map(|&layer| expected[layer][token][place]).sum();
                let mean = sum / layers.len() as f32;
                assert!((x - mean).abs() < TOLERANCE, "{way} {at} {token} {place}: {x}, expected {mean}");
                assert!(visible == 1 || x == 0.0, "{way}: padding has {x}");
            }
        }
    }
}

fn layers(case: &Value) -> usize {
    case["cross_attentions"][0].as_array().expect("a list of layers").len()
}

#[test]
fn every_way_of_running_tells_what_transformers_attends_to() {
    let golden = golden();
    for name in FIXTURES {
        let cases = golden[name].as_array().expect("a list of cases");
        for (way, export) in ways(&[]) {
            let model = Model::open(exported_as(name, &format!("alignment-{way}"), export)).expect("it opens");
            for case in cases {
                let found = generate(&model, &batch(case), &case["options"]);
                let all: Vec<usize> = (0..layers(case)).collect();
                check_case(&format!("{name} for {way}"), case, &all, &found);
            }
        }
    }
}

#[test]
fn the_layers_that_were_asked_for_are_the_ones_that_count() {
    let golden = golden();
    for (name, wanted) in [("tiny-balanced", vec![3, 1]), ("tiny-unbalanced", vec![0])] {
        for (way, export) in ways(&wanted) {
            let label = format!("alignment-{way}-{wanted:?}");
            let model = Model::open(exported_as(name, &label, export)).expect("it opens");
            let mut ascending = wanted.clone();
            ascending.sort_unstable();
            assert_eq!(model.manifest().alignment_layers, ascending);
            for case in golden[name].as_array().expect("a list of cases") {
                let found = generate(&model, &batch(case), &case["options"]);
                check_case(&format!("{name} for {way}, layers {wanted:?}"), case, &wanted, &found);
            }
        }
    }
}

/// All cases of a fixture at once: rows with different sources, lengths and numbers of beams in one batch.
#[test]
fn an_engine_tells_it_of_rows_that_share_their_steps() {
    let golden = golden();
    for name in FIXTURES {
        for target in [Target::Portable, Target::Cpu] {
            let model = Arc::new(Model::open(aligned(name, target)).expect("it opens"));
            let engine = Engine::new(model.clone(), EngineOptions::default()).expect("an engine");
            let cases = golden[name].as_array().expect("a list of cases");
            let submit = |case: &Value| {
                let request = Request::new(batch(case), options(&model, &case["options"]));
                engine.submit(request).unwrap_or_else(|error| panic!("{error}"))
            };
            let generations: Vec<_> = cases.iter().map(submit).collect();
            for (case, generation) in cases.iter().zip_eq(generations) {
                let found = generation.wait().unwrap_or_else(|error| panic!("{error}"));
                let all: Vec<usize> = (0..layers(case)).collect();
                check_case(&format!("{name} for {} in an engine", target.name()), case, &all, &found);
            }
        }
    }
}

/// The largest difference between the cross-attentions of two runs.
fn apart(a: &CrossAttentions, b: &CrossAttentions) -> f32 {
    assert_eq!((a.source_length(), a.values().len()), (b.source_length(), b.values().len()));
    a.values().iter().zip_eq(b.values()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn sources() -> Vec<Vec<i64>> {
    (0..3)
        .map(|source| (0..7 + source * 4).map(|place| 3 + (source * 37 + place * place * 11) % 190).collect())
        .collect()
}

/// Teacher forcing gives the same cross-attentions, whatever strategy generated the targets.
#[test]
fn targets_of_every_strategy_attend_to_what_they_do_when_they_are_given() {
    let requests = [
        json!({}),
        json!({"num_beams": 4, "num_return_sequences": 4}),
        json!({"num_beams": 4, "num_return_sequences": 4, "coverage_penalty": 0.4}),
        json!({"num_beams": 6, "num_return_sequences": 6, "num_beam_groups": 3, "diversity_penalty": 2.0}),
        json!({"num_beams": 4, "num_return_sequences": 4, "num_beam_groups": 2, "diversity_penalty": 2.0,
            "coverage_penalty": 1.5}),
        json!({"do_sample": true, "seed": 3, "num_return_sequences": 3}),
        json!({"do_sample": true, "seed": 4, "num_beams": 3, "num_return_sequences": 2}),
        json!({"return_alternatives": true, "num_return_sequences": 4}),
        json!({"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}),
    ];
    let ends: Vec<i64> = (0..200).step_by(17).collect();
    for name in ["tiny-balanced", "tiny-unbalanced"] {
        for target in [Target::Portable, Target::Cpu] {
            let model = Model::open(aligned(name, target)).expect("it opens");
            for request in &requests {
                let mut request = request.clone();
                request["max_new_tokens"] = 9.into();
                request["eos_token_id"] = json!(ends);
                for (row, found) in
                    generate(&model, &Batch::padded(&sources(), 0).expect("valid"), &request).into_iter().enumerate()
                {
                    let found: Vec<_> = found.iter().filter(|hypothesis| !hypothesis.tokens.is_empty()).collect();
                    let same = vec![sources()[row].clone(); found.len()];
                    let targets: Vec<_> = found.iter().map(|hypothesis| hypothesis.tokens.clone()).collect();
                    let batch = Batch::padded(&same, 0).expect("valid");
                    let scored = model.score(&batch, &targets, 0, &Cancellation::new());
                    for (hypothesis, forced) in found.iter().zip_eq(scored.expect("targets of the model's own")) {
                        let forced = forced.cross_attentions.expect("of a model with alignment");
                        let apart = apart(attended(hypothesis), &forced);
                        assert!(apart < TOLERANCE, "{name} for {}, {request}: {apart}", target.name());
                    }
                }
            }
        }
    }
}

#[test]
fn drafts_change_nothing_in_what_targets_attend_to() {
    let texts = ["mr brown paid $5 on may 3rd", "the meeting starts at nine oh five a m on elm street"];
    for target in [Target::Portable, Target::Cpu] {
        let export = Export::default().target(target).logits(Logits::All).alignment(Alignment::AllLayers);
        let model = Model::open(demo_as(&format!("drafts-{}", target.name()), export)).expect("it opens");
        for text in texts {
            let source = model.tokenizer().expect("the demo has one").encode(text).expect("text");
            let batch = Batch::padded(&[source], 0).expect("valid");
            let plain = generate(&model, &batch, &json!({"max_new_tokens": 40}));
            let drafted = generate(&model, &batch, &json!({"max_new_tokens": 40, "prompt_lookup_num_tokens": 5}));
            assert_eq!(plain[0][0].tokens, drafted[0][0].tokens);
            let apart = apart(attended(&plain[0][0]), attended(&drafted[0][0]));
            assert!(apart < TOLERANCE, "{text} for {}: {apart}", target.name());
        }
    }
}

/// `Σ log p / length^length_penalty + coverage_penalty · Σ log(min(coverage, 1))`, from the log-probabilities and the attention
/// of a target that is given.
fn score_of(model: &Model, source: &[i64], tokens: &[i64], length_penalty: f64, coverage_penalty: f64) -> f64 {
    let (batch, targets) = (Batch::padded(&[source], 0).expect("valid"), [tokens.to_vec()]);
    let scored = model.score(&batch, &targets, 0, &Cancellation::new()).expect("the model's own").remove(0);
    let attended = scored.cross_attentions.expect("of a model with alignment");
    let coverage = (0..source.len()).map(|place| attended.tokens().map(|row| f64::from(row[place])).sum::<f64>());
    let sum: f64 = coverage.map(|covered| covered.clamp(f64::from(f32::MIN_POSITIVE), 1.0).ln()).sum();
    scored.logprobs.sum() / (tokens.len() as f64).powf(length_penalty) + coverage_penalty * sum
}

#[test]
fn hypotheses_are_ranked_by_their_scores_with_what_they_cover() {
    let ends: Vec<i64> = (0..200).step_by(9).collect();
    let mut reordered = 0;
    for name in ["tiny-balanced", "tiny-unbalanced", "tiny-mha-nocap"] {
        for target in [Target::Portable, Target::Cpu] {
            let model = Model::open(aligned(name, target)).expect("it opens");
            for (length_penalty, coverage_penalty) in [(1.0, 0.2), (0.0, 1.0), (2.0, 0.05)] {
                let request = |coverage_penalty: f64| {
                    json!({"num_beams": 5, "num_return_sequences": 5, "max_new_tokens": 9, "eos_token_id": ends,
                        "length_penalty": length_penalty, "coverage_penalty": coverage_penalty})
                };
                let batch = Batch::padded(&sources(), 0).expect("valid");
                let found = generate(&model, &batch, &request(coverage_penalty));
                let without = generate(&model, &batch, &request(0.0));
                for ((source, found), without) in sources().iter().zip_eq(&found).zip_eq(&without) {
                    let mut scores = Vec::new();
                    for hypothesis in found {
                        let score = score_of(&model, source, &hypothesis.tokens, length_penalty, coverage_penalty);
                        let said = f64::from(hypothesis.score.expect("of beam search"));
                        assert!((score - said).abs() < 5e-4 * score.abs().max(1.0), "{name}: {said}, not {score}");
                        scores.push(score);
                    }
                    assert!(scores.windows(2).all(|pair| pair[0] > pair[1] - 1e-3), "{name}: {scores:?}");
                    reordered += usize::from(found[0].tokens != without[0].tokens);
                }
            }
        }
    }
    assert!(reordered > 5, "a coverage penalty changed {reordered} of 54 results");
}

#[test]
fn models_that_do_not_tell_it_say_how_to_export_them() {
    let plain = Model::open(exported("tiny-balanced")).expect("it opens");
    let batch = Batch::padded(&sources(), 0).expect("valid");
    for (request, says) in [
        (json!({"output_attentions": true}), "output_attentions requires a model exported with alignment"),
        (json!({"coverage_penalty": 0.5, "num_beams": 2}), "coverage_penalty requires a model exported with alignment"),
    ] {
        let options = plain.generation_config().with_json(request.as_object().expect("an object")).expect("options");
        let error = plain.generate_batch(&batch, &options, Controls::default()).expect_err("it cannot");
        let error = error.to_string();
        assert!(error.starts_with(says), "{error}");
    }
    let scored = plain.score(&batch, &vec![vec![5]; 3], 0, &Cancellation::new()).expect("scores");
    assert!(scored.iter().all(|score| score.cross_attentions.is_none()));
    let error = plain.check_cross_attentions().expect_err("it has none").to_string();
    assert!(error.contains("exported with alignment"), "{error}");

    let model = demo();
    for arguments in [vec!["generate", "--output-attentions", "true", "--jsonl"], vec!["score", "--output-attentions"]]
    {
        let (command, flags) = arguments.split_first().expect("a command");
        let arguments = [Path::new(command), &model].into_iter().chain(flags.iter().map(Path::new));
        let request = json!({"text": "nine", "target": "nine"});
        let request = if *command == "score" { request } else { json!({"text": "nine"}) };
        let output = run("t5gemma", arguments, request.to_string());
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("exported with alignment"), "{said}");
    }
    for flag in ["--output-attentions", "--output-logprobs"] {
        let output = run("t5gemma", [Path::new("generate"), &model, Path::new(flag), Path::new("true")], "nine\n");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{said}");
        assert!(said.contains(&format!("{flag} requires --jsonl")), "{said}");
    }
}

#[test]
fn results_have_a_number_for_every_token_of_each_source() {
    let model = demo_as("alignment", Export::default().alignment(Alignment::AllLayers));
    let texts = ["dr smith paid $3.50", "nine"];
    let requests = [
        json!({"id": "a", "text": texts, "options": {"output_attentions": true, "num_beams": 3,
            "num_return_sequences": 2, "coverage_penalty": 0.1}}),
        json!({"id": "b", "text": texts[1]}),
    ];
    let lines = requests.map(|request| request.to_string()).join("\n");
    let results = stdout(run("t5gemma", [Path::new("generate"), &model, Path::new("--jsonl")], lines));
    let results: Vec<Value> = results.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(results.len(), 2);
    let tokenizer = Model::open(&model).expect("it opens");
    let tokenizer = tokenizer.tokenizer().expect("the demo has one");
    let table = |value: &Value| -> Vec<Vec<f64>> { serde_json::from_value(value.clone()).expect("a table") };
    for (row, text) in texts.iter().enumerate() {
        let source = tokenizer.encode(text).expect("text").len();
        let found = results[0]["sequences"][row].as_array().expect("a list");
        assert_eq!(found.len(), 2);
        for sequence in found {
            let attended = table(&sequence["cross_attentions"]);
            assert_eq!(attended.len(), sequence["tokens"].as_array().expect("a list").len());
            assert!(attended.iter().all(|row| row.len() == source && (row.iter().sum::<f64>() - 1.0).abs() < 1e-5));
        }
    }
    assert!(results[1]["sequences"][0][0].get("cross_attentions").is_none());

    let target = results[0]["sequences"][0][0]["tokens"].clone();
    let request = json!({"text": texts[0], "target_ids": target}).to_string();
    let arguments = [Path::new("score"), &model, Path::new("--output-attentions")];
    let scored: Value = serde_json::from_str(&stdout(run("t5gemma", arguments, request))).expect("JSON");
    let (forced, free) = (&scored["scores"][0], &results[0]["sequences"][0][0]);
    let (forced, free) = (table(&forced["cross_attentions"]), table(&free["cross_attentions"]));
    let pairs = forced.iter().flatten().zip_eq(free.iter().flatten());
    assert!(pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) < f64::from(TOLERANCE));
}
