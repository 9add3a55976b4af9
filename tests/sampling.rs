//! Sampling, log-probabilities and control of the generation loop on real models: draws follow the model's
//! probabilities and depend only on the request, scores match the reference, and targets begin and end where they
//! should.

use std::collections::HashMap;
use std::ops::ControlFlow;

use itertools::Itertools as _;
use serde_json::{Value, json};
use t5gemma_graphs::Target;
use t5gemma_runtime::{
    Batch, Cancellation, Controls, FinishReason, GenerationConfig, Hypothesis, LogitsProcessor, Model, OpenOptions,
    SpecialTokens,
};

use crate::common::{FIXTURES, cases, demo, exported, exported_for, run, stdout};
use crate::generation::{inputs, nested};

fn options(model: &Model, request: Value) -> GenerationConfig {
    model.generation_config().with_json(request.as_object().expect("an object")).expect("valid options")
}

fn generate(model: &Model, batch: &Batch, options: &GenerationConfig) -> Vec<Vec<Hypothesis>> {
    model.generate_batch(batch, options, Controls::default()).expect("generates")
}

fn tokens(rows: &[Vec<Hypothesis>]) -> Vec<Vec<Vec<i64>>> {
    rows.iter().map(|row| row.iter().map(|hypothesis| hypothesis.tokens.clone()).collect()).collect()
}

#[test]
fn a_seed_gives_the_same_tokens_in_any_batch_and_on_any_number_of_threads() {
    Target::ALL.into_iter().for_each(check_seeds);
}

fn check_seeds(target: Target) {
    let open = |threads| {
        let options = OpenOptions::default().threads(threads);
        Model::open_with(exported_for("tiny-balanced", target), &options).expect("the model opens")
    };
    let model = open(1);
    let sources: [&[i64]; 4] = [&[5, 6, 7, 8, 9], &[10, 11], &[12; 17], &[5, 6, 7]];
    let of = |source: &[i64]| Batch::padded(&[source], 0).expect("valid").with_seed(source.len() as u64);
    for request in [
        json!({"num_return_sequences": 3}),
        json!({"num_return_sequences": 2, "top_k": 0, "temperature": 1.5, "top_p": 0.9}),
        json!({"num_beams": 3, "num_return_sequences": 2}),
    ] {
        let mut request = request;
        request["do_sample"] = true.into();
        request["max_new_tokens"] = 12.into();
        let options = options(&model, request.clone());
        let alone: Vec<_> =
            sources.iter().flat_map(|source| tokens(&generate(&model, &of(source), &options))).collect();
        let distinct: std::collections::HashSet<_> = alone.iter().flatten().collect();
        assert!(distinct.len() > 5, "{request}: {alone:?}");

        let together = Batch::joined(sources.iter().map(|source| of(source)).collect(), 0).expect("valid");
        assert_eq!(tokens(&generate(&model, &together, &options)), alone, "{request}: together");
        let turned = Batch::joined(sources.iter().rev().map(|source| of(source)).collect(), 0).expect("valid");
        let mut found = tokens(&generate(&model, &turned, &options));
        found.reverse();
        assert_eq!(found, alone, "{request}: in another order");
        let left = Batch::masked(&[[vec![0; 3], sources[1].to_vec()].concat()], &[[0, 0, 0, 1, 1]]).expect("valid");
        assert_eq!(tokens(&generate(&model, &left.with_seed(2), &options))[0], alone[1], "{request}: padded");
        assert_eq!(tokens(&generate(&open(3), &together, &options)), alone, "{request}: three threads");

        let other = tokens(&generate(&model, &of(sources[0]).with_seed(77), &options));
        assert_ne!(other[0], alone[0], "{request}: another seed");
    }
}

#[test]
fn first_tokens_are_drawn_with_the_models_probabilities() {
    const DRAWS: usize = 256;
    const CALLS: u64 = 40;
    let model = Model::open(exported("tiny-balanced")).expect("the model opens");
    let batch = Batch::padded(&[[5, 6, 7, 8]], 0).expect("valid");
    let vocab_size = model.facts().decoder.vocab_size;
    let top = model
        .score(&batch, &[vec![1]], vocab_size, &Cancellation::new())
        .expect("scores")
        .remove(0)
        .logprobs
        .top
        .remove(0);
    let temperature = 0.8;
    let weights: HashMap<i64, f64> =
        top.iter().map(|&(token, logprob)| (token, (f64::from(logprob) / temperature).exp())).collect();
    let total: f64 = weights.values().sum();

    let request = json!({"do_sample": true, "top_k": 0, "temperature": temperature, "max_new_tokens": 1,
                         "num_return_sequences": DRAWS});
    let options = options(&model, request);
    let mut counts: HashMap<i64, f64> = HashMap::new();
    for seed in 0..CALLS {
        for hypothesis in &generate(&model, &batch.clone().with_seed(seed), &options)[0] {
            *counts.entry(hypothesis.tokens[0]).or_default() += 1.0;
        }
    }
    let (mut statistic, mut cells, mut rest) = (0.0, 0, (0.0, 0.0));
    for (token, weight) in &weights {
        let (count, expected) =
            (counts.get(token).copied().unwrap_or(0.0), weight / total * (DRAWS as u64 * CALLS) as f64);
        if expected < 5.0 {
            rest = (rest.0 + count, rest.1 + expected);
        } else {
            statistic += (count - expected).powi(2) / expected;
            cells += 1;
        }
    }
    if rest.1 >= 5.0 {
        statistic += (rest.0 - rest.1).powi(2) / rest.1;
        cells += 1;
    }
    // Exceeded once in ten thousand times by chance (Wilson and Hilferty's approximation); the seeds are fixed.
    let degrees = f64::from(cells - 1);
    let spread = 2.0 / (9.0 * degrees);
    let limit = degrees * (1.0 - spread + 3.719 * spread.sqrt()).powi(3);
    assert!(cells > 10 && statistic < limit, "{statistic} with {degrees} degrees of freedom");
}

/// Processors that change beam scores, which are then not the model's log-probabilities.
const CHANGES_SCORES: [&str; 12] = [
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "min_new_tokens",
    "min_length",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
    "exponential_decay_length_penalty",
];

#[test]
fn scores_of_targets_are_those_that_transformers_gives_its_beams() {
    let mut compared = 0;
    for name in ["tiny-balanced", "tiny-bias", "tiny-unbalanced"] {
        let (cases, inputs) = (cases(name), inputs(name));
        let model = Model::open(exported(name)).expect("the model opens");
        for case in cases["cases"].as_array().expect("cases is a list") {
            let options = case["options"].as_object().expect("options are an object");
            let scores = case["expected"]["sequences_scores"].as_array();
            let (Some(scores), None) = (scores, CHANGES_SCORES.iter().find(|&&change| options.contains_key(change)))
            else {
                continue;
            };
            let (ids, mask) = &inputs[case["input"].as_str().expect("a case names its input")];
            let returned = scores.len() / ids.nrows();
            let repeated = |rows: Vec<Vec<i64>>| -> Vec<Vec<i64>> {
                rows.into_iter().flat_map(|row| std::iter::repeat_n(row, returned)).collect()
            };
            let mut batch = Batch::masked(&repeated(nested(ids)), &repeated(nested(mask))).expect("valid");
            if let Ok(prompts) = serde_json::from_value::<Vec<Vec<i64>>>(case["decoder_input_ids"].clone()) {
                batch = batch.with_decoder_input_ids(&repeated(prompts)).expect("valid");
            }
            let targets: Vec<Vec<i64>> = serde_json::from_value(case["expected"]["tokens"].clone()).expect("lists");
            let found = model.score(&batch, &targets, 0, &Cancellation::new()).expect("scores");
            let length_penalty = options.get("length_penalty").and_then(Value::as_f64).unwrap_or(1.0);
            for ((found, target), expected) in found.iter().zip_eq(&targets).zip_eq(scores) {
                let expected = expected.as_f64().expect("a number") * (target.len() as f64).powf(length_penalty);
                assert!((found.logprobs.sum() - expected).abs() < 5e-4 * target.len() as f64, "{name} {}", case["id"]);
                compared += 1;
            }
        }
    }
    assert!(compared > 300, "{compared}");
}

#[test]
fn log_probabilities_of_a_generation_are_those_of_its_score() {
    Target::ALL.into_iter().for_each(check_log_probabilities);
}

fn check_log_probabilities(target: Target) {
    let model = Model::open(exported_for("tiny-balanced", target)).expect("the model opens");
    let (ids, mask) = &inputs("tiny-balanced")["right"];
    let batch = Batch::masked(&nested(ids), &nested(mask)).expect("valid").with_seed(3);
    for request in [
        json!({}),
        json!({"repetition_penalty": 1.8}),
        json!({"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0}),
        json!({"do_sample": true, "num_return_sequences": 3, "temperature": 2}),
        // Targets that end each at another place, and go on beyond where a cache in place begins.
        json!({"do_sample": true, "num_return_sequences": 6, "top_k": 0, "max_new_tokens": 90,
               "eos_token_id": [1, 16, 66, 79]}),
        json!({"do_sample": true, "num_beams": 3, "num_return_sequences": 2}),
        json!({"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.7, "num_return_sequences": 6}),
        json!({"return_alternatives": true, "num_return_sequences": 4}),
    ] {
        let mut with_logprobs = request.clone();
        with_logprobs["output_logprobs"] = true.into();
        with_logprobs["top_logprobs"] = 3.into();
        with_logprobs.as_object_mut().expect("an object").entry("max_new_tokens").or_insert(10.into());
        let options = options(&model, with_logprobs);
        let rows = generate(&model, &batch, &options);
        let changes_scores = options.repetition_penalty != 1.0 || options.do_sample || options.num_beam_groups > 1;
        for hypothesis in 0..options.num_return_sequences {
            let targets: Vec<Vec<i64>> = rows.iter().map(|row| row[hypothesis].tokens.clone()).collect();
            let scored = model.score(&batch, &targets, 3, &Cancellation::new()).expect("scores");
            for (row, scored) in rows.iter().zip_eq(scored) {
                let scored = scored.logprobs;
                let found = row[hypothesis].logprobs.as_ref().expect("they were asked for");
                let apart = found.tokens.iter().zip_eq(&scored.tokens).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(found.tokens.len() == scored.tokens.len() && apart < 5e-4, "{request}: {apart}");
                let top = found.top.iter().flatten().zip_eq(scored.top.iter().flatten());
                assert!(top.clone().all(|((_, a), (_, b))| (a - b).abs() < 5e-4), "{request}");
                assert_eq!(found.top.len(), found.tokens.len(), "{request}");
                assert!(found.top.iter().all(|top| top.len() == 3), "{request}");
                if let (Some(score), false) = (row[hypothesis].score, changes_scores) {
                    assert!((found.sum() - f64::from(score)).abs() < 5e-4, "{request}: {score}");
                }
            }
        }
    }
}

#[test]
fn alternatives_are_the_likeliest_first_tokens_each_completed_greedily() {
    let model = Model::open(exported("tiny-balanced")).expect("the model opens");
    let batch = Batch::padded(&[vec![5, 6, 7, 8], vec![9, 10]], 0).expect("valid");
    let request = json!({"return_alternatives": true, "num_return_sequences": 4, "max_new_tokens": 9});
    let found = tokens(&generate(&model, &batch, &options(&model, request)));
    let top = model.score(&batch, &[vec![1], vec![1]], 4, &Cancellation::new()).expect("scores");
    for (row, source) in [[5, 6, 7, 8].as_slice(), &[9, 10]].iter().enumerate() {
        for (alternative, &(first, _)) in found[row].iter().zip_eq(&top[row].logprobs.top[0]) {
            assert_eq!(alternative[0], first);
            if model.generation_config().eos_token_id.contains(&first) {
                assert_eq!(alternative.len(), 1);
                continue;
            }
            let start = model.generation_config().decoder_start_token_id;
            let prompted = Batch::padded(&[source], 0).expect("valid");
            let prompted = prompted.with_decoder_input_ids(&[[start, first]]).expect("valid");
            let rest = generate(&model, &prompted, &options(&model, json!({"max_new_tokens": 8})));
            assert_eq!(alternative[1..], rest[0][0].tokens);
        }
    }
}

#[test]
fn what_a_watch_is_shown_is_the_first_hypothesis_whatever_the_search() {
    for name in FIXTURES {
        let (cases, inputs) = (cases(name), inputs(name));
        let model = Model::open(exported(name)).expect("the model opens");
        let beams = |case: &&Value| case["options"]["num_beams"].as_u64().is_some_and(|beams| beams > 1);
        let mut early = 0;
        for case in cases["cases"].as_array().expect("cases is a list").iter().filter(beams).step_by(5) {
            let (ids, mask) = &inputs[case["input"].as_str().expect("a case names its input")];
            let batch = Batch::masked(&nested(ids), &nested(mask)).expect("valid");
            let options = options(&model, case["options"].clone());
            let mut shown = vec![Vec::new(); batch.rows()];
            let mut watch = |row: usize, token: i64| {
                shown[row].push(token);
                ControlFlow::Continue(())
            };
            let rows =
                model.generate_batch(&batch, &options, Controls::default().streamer(&mut watch)).expect("generates");
            let expected: Vec<Vec<i64>> = rows.iter().map(|row| row[0].tokens.clone()).collect();
            assert_eq!(shown, expected, "{name} {}", case["id"]);
            // A watch that stops at the first token is reached before the end where beams agree early.
            let mut count = 0;
            let mut stop = |_: usize, _: i64| {
                count += 1;
                ControlFlow::Break(())
            };
            assert!(model.generate_batch(&batch, &options, Controls::default().streamer(&mut stop)).is_err());
            early += count;
        }
        assert!(early > 0, "{name}");
    }
}

#[test]
fn a_stop_string_ends_a_target_where_its_text_first_contains_it() {
    let model = Model::open(demo()).expect("the model opens");
    let tokenizer = model.tokenizer().expect("the demo has one");
    let batch = Batch::padded(&[tokenizer.encode("Dr. Smith paid $3.50 on May 3, 2019.").expect("text")], 0);
    let batch = batch.expect("valid");
    let text = |tokens: &[i64]| tokenizer.decode(tokens, SpecialTokens::Skip).expect("known ids");
    for beams in [1, 4] {
        let whole = generate(&model, &batch, &options(&model, json!({"num_beams": beams, "max_new_tokens": 64})));
        let whole = &whole[0][0].tokens;
        for stop in ["h paid", "dollars and fifty c", " ", "d", "nineteen"] {
            let request = json!({"num_beams": beams, "max_new_tokens": 64, "stop_strings": [stop, "never said"]});
            let found = generate(&model, &batch, &options(&model, request)).remove(0).remove(0);
            let length = (1..=whole.len()).find(|&length| text(&whole[..length]).contains(stop));
            assert_eq!(found.tokens, whole[..length.expect("the answer contains it")], "{stop:?}, {beams} beams");
            assert_eq!(found.finish_reason, FinishReason::StopString, "{stop:?}, {beams} beams");
        }
        let request = json!({"num_beams": beams, "max_new_tokens": 64, "stop_strings": "never said"});
        let found = generate(&model, &batch, &options(&model, request)).remove(0).remove(0);
        assert_eq!((&found.tokens, found.finish_reason), (whole, FinishReason::Eos));
        let request = json!({"num_beams": beams, "max_new_tokens": 64, "max_time": 0});
        let found = generate(&model, &batch, &options(&model, request)).remove(0).remove(0);
        assert_eq!((found.tokens.len(), found.finish_reason), (1, FinishReason::Time));
    }
}

#[test]
fn a_callers_processor_sees_its_row_and_decides() {
    let model = Model::open(exported("tiny-balanced")).expect("the model opens");
    let batch = Batch::padded(&[vec![5, 6, 7], vec![9]], 0).expect("valid");
    // Counts on from the first token of the source.
    let count_on = LogitsProcessor::new(|position, scores| {
        let next = position.source[0] as usize + position.history.len() - position.prompt_len;
        scores.iter_mut().enumerate().for_each(|(token, score)| {
            if token != next {
                *score = f32::NEG_INFINITY
            }
        });
    });
    for request in [json!({}), json!({"num_beams": 3}), json!({"do_sample": true})] {
        let mut options = options(&model, request.clone());
        options.max_new_tokens = Some(4);
        options.logits_processor.push(count_on.clone());
        let found = tokens(&generate(&model, &batch, &options));
        assert_eq!(found, [[vec![5, 6, 7, 8]], [vec![9, 10, 11, 12]]], "{request}");
    }
}

#[test]
fn requests_are_sampled_scored_and_prompted_through_jsonl() {
    let model = demo();
    let model = model.to_str().expect("temporary paths are UTF-8");
    let text = "Dr. Smith paid $3.50 on May 3, 2019.";
    let sampling = |seed: Value| json!({"do_sample": true, "temperature": 3, "max_new_tokens": 12, "seed": seed});
    let requests = [
        json!({"text": text, "options": sampling(json!(7))}),
        json!({"text": "Prof. Lee lives here.", "options": sampling(json!(8))}),
        json!({"text": text, "options": sampling(json!(7))}),
        json!({"text": text, "options": sampling(json!(null))}),
        json!({"text": text, "decoder_text": "doctor smith paid", "options": {"max_new_tokens": 64}}),
        json!({"text": [text, text], "decoder_text": ["doctor", "doctor smith paid"]}),
    ];
    let answer = |requests: &[Value]| -> Vec<Value> {
        let lines: Vec<String> = requests.iter().map(Value::to_string).collect();
        let output = run("t5gemma", ["generate", model, "--jsonl"], lines.join("\n"));
        let output = String::from_utf8(output.stdout).expect("UTF-8");
        output.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect()
    };
    let found = answer(&requests);
    assert_eq!(found[0]["sequences"], found[2]["sequences"]);
    assert_eq!((&found[0]["seed"], &found[1]["seed"]), (&json!(7), &json!(8)));
    assert_eq!(answer(&requests[1..2])[0]["sequences"], found[1]["sequences"], "alone");
    let again = answer(&[json!({"text": text, "options": sampling(found[3]["seed"].clone())})]);
    assert_eq!(again[0]["sequences"], found[3]["sequences"], "from the seed that was told");
    let rest = " three dollars and fifty cents on may third twenty nineteen";
    assert_eq!(found[4]["sequences"][0][0]["text"], rest);
    assert!(found[5]["error"].as_str().is_some_and(|error| error.starts_with("decoder_text: expected texts of")));

    let prefixed =
        run("t5gemma", ["generate", model, "--decoder-text", "doctor smith paid"], format!("{text}\n{text}"));
    assert_eq!(stdout(prefixed), format!("{rest}\n{rest}\n"));

    let target = format!("doctor smith paid{rest}");
    let requests = [
        json!({"id": "whole", "text": [text, text], "target": [target, "doctor"]}),
        json!({"id": "rest", "text": text, "decoder_text": "doctor smith paid", "target": rest}),
        json!({"id": "none", "text": text}),
        json!({"id": "too few", "text": [text, text], "target": "doctor"}),
        json!({"id": "empty", "input_ids": [5], "target_ids": []}),
        json!({"id": "outside", "input_ids": [5], "target_ids": [5, 999_999]}),
    ];
    let lines: Vec<String> = requests.iter().map(Value::to_string).collect();
    let output = run("t5gemma", ["score", model, "--top-logprobs", "2"], lines.join("\n"));
    assert_eq!(output.status.code(), Some(1));
    let output = String::from_utf8(output.stdout).expect("UTF-8");
    let found: Vec<Value> = output.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect();
    let (good, bad) = (&found[0]["scores"][0], &found[0]["scores"][1]);
    assert!(good["perplexity"].as_f64() < Some(1.1) && bad["perplexity"].as_f64() > Some(2.0), "{}", found[0]);
    assert_eq!(good["top_logprobs"][0].as_array().map(Vec::len), Some(2));
    let of_tokens = |score: &Value| serde_json::from_value::<Vec<f64>>(score["logprobs"].clone()).expect("numbers");
    let (whole, rest) = (of_tokens(good), of_tokens(&found[1]["scores"][0]));
    assert!((whole.iter().sum::<f64>() - good["logprob"].as_f64().expect("a number")).abs() < 1e-6);
    let tail = &whole[whole.len() - rest.len()..];
    assert!(rest.len() < whole.len() && tail.iter().zip_eq(&rest).all(|(a, b)| (a - b).abs() < 5e-4));
    for (result, error) in found[2..].iter().zip_eq([
        "expected target or target_ids, found neither",
        "target: expected 2 rows, one for each source, found 1",
        "target_ids[0]: expected at least one token, found none",
        "target_ids[0][1]: expected a token id below 1024",
    ]) {
        assert!(result["error"].as_str().is_some_and(|found| found.starts_with(error)), "{result}");
    }

    let scored = stdout(run("t5gemma", ["score", model, "--no-eos"], lines[0].clone()));
    let scored: Value = serde_json::from_str(&scored).expect("JSON");
    assert_eq!(of_tokens(&scored["scores"][0]).len() + 1, whole.len());
}
