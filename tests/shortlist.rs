//! Models with an output head for a subset of the tokens: their logits equal those of the full model, and they generate
//! what the full model does with all other tokens suppressed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Arc, Mutex};

use itertools::Itertools as _;
use serde_json::{Value, json};
use t5gemma_exporter::{Checkpoint, Export, Source};
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::Logits;
use t5gemma_graphs::onnx::{Blocks, Code};
use t5gemma_graphs::quantization::Quantization;
use t5gemma_runtime::verify::comparison;
use t5gemma_runtime::{Batch, Cancellation, Controls, LogitsProcessor, Model, SpecialTokens};

use crate::common::{demo, exported_as, fixture, fixtures_and_targets, run, tests};

/// Splits a vocabulary into every third token plus the end token, and the others.
fn split(vocab_size: usize) -> (Vec<usize>, Vec<usize>) {
    (0..vocab_size).partition(|&token| token % 3 == 0 || token == 1)
}

fn vocab_size(fixture_name: &str) -> usize {
    let config = fs::read_to_string(fixture(fixture_name).join("checkpoint/config.json")).expect("a config");
    let config: Value = serde_json::from_str(&config).expect("JSON");
    let size = config["decoder"]["vocab_size"].as_u64().or(config["vocab_size"].as_u64());
    size.expect("a number") as usize
}

/// A fixture with the full vocabulary and with the tokens of [`split`], otherwise exported alike.
fn both(name: &str, label: &str, export: Export) -> [Model; 2] {
    let kept = export.clone().kept_tokens(split(vocab_size(name)).0);
    [(format!("{label}-whole"), export), (format!("{label}-kept"), kept)]
        .map(|(label, export)| Model::open(exported_as(name, &label, export)).expect("opens"))
}

fn batch() -> Batch {
    Batch::padded(&[&[5, 9, 17, 30, 44][..], &[7, 9], &[8, 8, 23, 45]], 0).expect("valid")
}

/// Tokens and scores of the targets that a model generates for [`batch`].
fn generated(model: &Model, options: &Value) -> Vec<(Vec<i64>, Option<f32>)> {
    let options = model.generation_config().with_json(options.as_object().expect("an object")).expect("valid");
    let found = model.generate_batch(&batch(), &options, Controls::default()).expect("generates");
    found.into_iter().flatten().map(|found| (found.tokens, found.score)).collect()
}

#[test]
fn logits_are_those_of_the_whole_model() {
    let eight = Blocks { bits: 8, size: 32, symmetric: true, code: Code::Integer };
    let in_few_bits = Quantization {
        encoder: Some(eight),
        decoder: Some(eight),
        head: Some(Blocks { bits: 4, ..eight }),
        ..Quantization::default()
    };
    let ways = [
        ("plain", Export::default()),
        ("cuda", Export::default().target(Target::Cuda)),
        ("bits", Export::default().target(Target::Cpu).quantization(in_few_bits)),
    ];
    for name in ["tiny-balanced", "tiny-untied", "tiny-bf16"] {
        for (way, export) in &ways {
            let [whole, kept] = both(name, way, export.clone());
            let found = comparison(&kept, &whole, &[], &Cancellation::new()).expect("compares");
            assert!(found.logits_largest_error < 1e-4, "{name} {way}: {}", found.logits_largest_error);
            assert!(found.positions > 20 && found.top1_agreement > 0.99, "{name} {way}: {found:?}");
        }
    }
}

#[test]
fn what_is_generated_is_what_the_whole_model_does_without_the_other_tokens() {
    let cases = [
        json!({}),
        json!({"num_beams": 4, "num_return_sequences": 2}),
        json!({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7}),
        json!({"repetition_penalty": 1.4, "encoder_repetition_penalty": 1.2, "frequency_penalty": 0.3}),
        json!({"no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 1, "min_new_tokens": 6}),
        json!({"bad_words_ids": [[9], [4, 5], [3, 6]], "sequence_bias": [[[12], 2.0], [[5], 9.0], [[15, 18], 3.0]]}),
        json!({"begin_suppress_tokens": [3, 4], "forced_bos_token_id": 6, "forced_eos_token_id": 1}),
        json!({"exponential_decay_length_penalty": [2, 1.3]}),
        json!({"do_sample": true, "seed": 3, "top_k": 8, "temperature": 1.5}),
        json!({"do_sample": true, "seed": 4, "top_k": 0, "top_p": 0.9}),
        json!({"output_logprobs": true, "top_logprobs": 3}),
        json!({"required_phrases": [[12, 15]], "num_beams": 4}),
    ];
    for (name, target) in fixtures_and_targets() {
        let [whole, kept] = both(name, target.name(), Export::default().target(target));
        for case in &cases {
            let mut given = case.clone();
            given["max_new_tokens"] = json!(10);
            // The full model's log-softmax includes the other tokens.
            given["renormalize_logits"] = json!(true);
            let found = generated(&kept, &given);
            given["suppress_tokens"] = json!(split(vocab_size(name)).1);
            let expected = generated(&whole, &given);
            assert_eq!(found.len(), expected.len(), "{name} {}: {case}", target.name());
            for ((expected, score), (found, of_found)) in expected.iter().zip_eq(&found) {
                assert_eq!(found, expected, "{name} {}: {case}", target.name());
                let apart = score.zip(*of_found).map_or(0.0, |(a, b)| (a - b).abs());
                let both = score.is_some() == of_found.is_some();
                assert!(both && apart < 1e-4, "{name} {}: {case}: {score:?} and {of_found:?}", target.name());
            }
        }
    }
}

#[test]
fn candidates_of_the_graph_are_of_kept_tokens() {
    let export = Export::default().target(Target::Cuda).logits(Logits::Candidates(8));
    let [whole, kept] = both("tiny-balanced", "candidates", export);
    let given = json!({"num_beams": 2, "max_new_tokens": 8});
    let found = generated(&kept, &given);
    assert!(found.iter().flat_map(|(tokens, _)| tokens).all(|&token| token % 3 == 0 || token == 1), "{found:?}");
    let suppressed = json!({"max_new_tokens": 8, "suppress_tokens": split(vocab_size("tiny-balanced")).1});
    assert_eq!(generated(&kept, &json!({"max_new_tokens": 8})), generated(&whole, &suppressed));
}

#[test]
fn processors_of_a_caller_see_the_whole_vocabulary() {
    let [whole, kept] = both("tiny-balanced", "callers", Export::default());
    let [whole, kept] = [whole, kept].map(|model| {
        let shown = Arc::new(Mutex::new(Vec::new()));
        let by_processor = shown.clone();
        let mut options = model.generation_config().clone();
        options.max_new_tokens = Some(1);
        options.logits_processor =
            vec![LogitsProcessor::new(move |_, scores| by_processor.lock().expect("one thread").push(scores.to_vec()))];
        model.generate_batch(&batch(), &options, Controls::default()).expect("generates");
        let shown: Vec<Vec<f32>> = std::mem::take(&mut *shown.lock().expect("one thread"));
        shown
    });
    let (those, _) = split(vocab_size("tiny-balanced"));
    for (whole, kept) in whole.iter().zip_eq(&kept) {
        assert_eq!(whole.len(), kept.len());
        for (token, (whole, kept)) in whole.iter().zip_eq(kept).enumerate() {
            let expected = if those.contains(&token) { *whole } else { f32::NEG_INFINITY };
            assert!(*kept == expected || (kept - expected).abs() < 1e-4, "{token}: {kept} and {expected}");
        }
    }
}

#[test]
fn tokens_without_scores_are_refused_where_they_are_asked_for() {
    let [_, kept] = both("tiny-balanced", "refused", Export::default());
    let with = |options: Value| {
        let options = kept.generation_config().with_json(options.as_object().expect("an object")).expect("valid");
        let found = kept.generate_batch(&batch(), &options, Controls::default());
        found.expect_err("refused").to_string()
    };
    for option in ["forced_bos_token_id", "forced_eos_token_id"] {
        let told = with(json!({option: 5}));
        assert!(told.contains(option) && told.contains("kept_tokens.json") && told.contains('5'), "{told}");
    }
    let targets = [vec![3, 6], vec![3, 5], vec![9]];
    let told = kept.score(&batch(), &targets, 0, &Cancellation::new()).expect_err("refused").to_string();
    assert!(told.contains("target_ids[1][1]") && told.contains("kept_tokens.json"), "{told}");
    let scored = kept.score(&batch(), &[vec![3, 6], vec![3], vec![9]], 2, &Cancellation::new()).expect("scores");
    assert!(scored.iter().flat_map(|row| &row.logprobs.tokens).all(|logprob| logprob.is_finite()));
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn export(kept: &Path, out: &Path) -> String {
    let checkpoint = fixture("tiny-balanced").join("checkpoint");
    let told = run("t5gemma-export", [&checkpoint, out, Path::new("--keep-tokens"), kept], "");
    assert_eq!(told.status.code(), Some(1), "{}", stderr(&told));
    assert!(!out.exists());
    stderr(&told)
}

#[test]
fn files_of_tokens_are_held_to_the_model() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let (file, out) = (folder.path().join("tokens.json"), folder.path().join("out"));
    for (text, expected) in [
        ("[1, 2", "expected a JSON array of token ids"),
        ("{\"1\": 2}", "expected a JSON array of token ids"),
        ("[1, -2]", "expected a JSON array of token ids"),
        ("[]", "found none"),
        ("[1, 3, 123456789]", "found 123456789"),
        ("[3, 6, 9]", "eos_token_id"),
    ] {
        fs::write(&file, text).expect("can be written");
        let told = export(&file, &out);
        assert!(told.contains("--keep-tokens") && told.contains(expected), "{text}: {told}");
    }
    let told = export(&folder.path().join("none.json"), &out);
    assert!(told.contains("none.json"), "{told}");

    // A folder with the token list of another model.
    let checkpoint = Checkpoint::open(&fixture("tiny-balanced").join("checkpoint")).expect("opens");
    let kept_tokens = Some(split(vocab_size("tiny-balanced")).0);
    let exported = Export::default().kept_tokens(kept_tokens);
    exported.run(&Source::Checkpoint(checkpoint), &out).expect("exports");
    fs::write(out.join("kept_tokens.json"), "[0, 1]\n").expect("can be written");
    let told = Model::open(&out).map(|_| ()).expect_err("refused").to_string();
    assert!(told.contains("kept_tokens.json"), "{told}");
}

#[test]
fn a_shortlist_of_texts_serves_those_texts() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let at = |name: &str| -> PathBuf { folder.path().join(name) };
    let eval = fs::read_to_string(tests().join("demo/eval.jsonl")).expect("the demo has one");
    let rows: Vec<Value> = eval.lines().take(40).map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let whole = Model::open(demo()).expect("opens");
    let answers = |model: &Model| -> Vec<String> {
        let mut answer = |row: &Value| {
            let text = row["text"].as_str().expect("a source");
            let tokens = model.tokenizer().expect("has one").encode(text).expect("can be expressed");
            let batch = Batch::padded(&[&tokens[..]], 0).expect("valid");
            let options = model
                .generation_config()
                .with_json(json!({"max_new_tokens": 24}).as_object().expect("one"))
                .expect("valid");
            let found = model.generate_batch(&batch, &options, Controls::default()).expect("generates");
            model
                .tokenizer()
                .expect("has one")
                .decode(&found[0][0].tokens, SpecialTokens::Skip)
                .expect("can be decoded")
        };
        rows.iter().map(&mut answer).collect()
    };
    let expected = answers(&whole);
    fs::write(at("texts.txt"), expected.join("\n")).expect("can be written");
    let checkpoint = tests().join("demo/checkpoint");
    let told = run(
        "t5gemma",
        [
            Path::new("shortlist"),
            &checkpoint,
            Path::new("--texts"),
            &at("texts.txt"),
            Path::new("-o"),
            &at("kept.json"),
        ],
        "",
    );
    assert!(told.status.success(), "{}", stderr(&told));
    let kept: Vec<usize> = serde_json::from_slice(&fs::read(at("kept.json")).expect("was written")).expect("JSON");
    assert!(kept.is_sorted() && kept.len() < whole.facts().decoder.vocab_size, "{} tokens", kept.len());
    let out = at("out");
    let told = run("t5gemma-export", [&checkpoint, &out, Path::new("--keep-tokens"), &at("kept.json")], "");
    assert!(told.status.success(), "{}", stderr(&told));
    assert_eq!(answers(&Model::open(out).expect("opens")), expected);

    // The most frequent tokens, and those that are always listed.
    let texts = at("texts.txt");
    let fewer = |arguments: &[&str]| {
        let given =
            [&["shortlist", checkpoint.to_str().expect("text"), "--texts", texts.to_str().expect("text")], arguments]
                .concat();
        let told = run("t5gemma", given, "");
        (told.status.success(), stderr(&told))
    };
    let few = at("few.json").to_str().expect("text").to_string();
    assert!(fewer(&["--max-tokens", "1", "-o", &few]).0);
    let few: Vec<usize> = serde_json::from_slice(&fs::read(&few).expect("was written")).expect("JSON");
    assert!(few.len() < kept.len() && few.contains(&1), "{} of {}", few.len(), kept.len());
    fs::write(&texts, "\n\n").expect("can be written");
    let (done, told) = fewer(&["-o", at("none.json").to_str().expect("text")]);
    assert!(!done && told.contains("texts.txt") && !at("none.json").exists(), "{told}");
}
