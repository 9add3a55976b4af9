//! The logits processors against Hugging Face's on fixed scores: `fixtures/public/processors`, whose cases name the
//! processor classes of transformers and their arguments.

use std::path::PathBuf;

use itertools::Itertools as _;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use t5gemma_runtime::options::GenerationConfig;
use t5gemma_runtime::scores::Processors;

#[test]
fn processors_compute_what_transformers_computes() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/public/processors");
    let read = |name: &str| {
        let path = folder.join(name);
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let cases: Value = serde_json::from_slice(&read("cases.json")).expect("cases.json is JSON");
    let bytes = read("golden.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("golden.safetensors is a safetensors file");

    let cases = cases["cases"].as_array().expect("cases is a list");
    assert_eq!(cases.len(), 39);
    for case in cases {
        check_case(case, &tensors);
    }
}

fn check_case(case: &Value, tensors: &SafeTensors) {
    let id = case["id"].as_str().expect("a case has an id");
    let tensor = |name: &str| tensors.tensor(name).unwrap_or_else(|error| panic!("{id}: {name}: {error}"));
    let named = |key: &str| tensor(case[key].as_str().expect("tensors are named"));
    let (histories, scores) = (rows_i64(&named("input_ids")), rows_f32(&named("scores")));
    let (expected, sources) = (rows_f32(&named("expected")), rows_i64(&tensor("enc")));

    let (request, prompt_len) = options_of(case);
    let options = GenerationConfig::default().with_json(&request).unwrap_or_else(|error| panic!("{id}: {error}"));
    for (row, history) in histories.iter().enumerate() {
        let mut found = scores[row].clone();
        Processors::new(&options, &sources[row], prompt_len).apply(&mut found, history);
        if case["compare"] == "kept_count_only" {
            let kept = found.iter().filter(|score| **score != f32::NEG_INFINITY).count();
            assert_eq!(json!(kept), case["kept"][row], "{id}, row {row}: which of equals are kept is left open");
            continue;
        }
        for (token, (&found, &expected)) in found.iter().zip_eq(&expected[row]).enumerate() {
            assert!(
                found == expected || (found - expected).abs() <= 1e-6 * expected.abs().max(1.0),
                "{id}, row {row}, token {token}: {found} instead of {expected}"
            );
        }
    }
}

/// The options, and the length of the decoder prompt, that make `generate` build the processors of a case.
fn options_of(case: &Value) -> (Map<String, Value>, usize) {
    let mut options = Map::new();
    let mut prompt_len = 1;
    if case["chain"].as_array().expect("a chain is a list").iter().any(is_warper) {
        options.extend([("do_sample".into(), json!(true)), ("top_k".into(), json!(0))]);
    }
    for processor in case["chain"].as_array().expect("a chain is a list") {
        let class = processor["class"].as_str().expect("a class has a name");
        for (argument, value) in processor["args"].as_object().expect("arguments are an object") {
            let option = match (class, argument.as_str()) {
                ("RepetitionPenaltyLogitsProcessor", "penalty") => "repetition_penalty",
                ("EncoderRepetitionPenaltyLogitsProcessor", "penalty") => "encoder_repetition_penalty",
                ("NoRepeatNGramLogitsProcessor", "ngram_size") => "no_repeat_ngram_size",
                ("EncoderNoRepeatNGramLogitsProcessor", "encoder_ngram_size") => "encoder_no_repeat_ngram_size",
                ("ForcedEOSTokenLogitsProcessor", "eos_token_id") => "forced_eos_token_id",
                (_, "prompt_length_to_skip" | "begin_index" | "input_ids_seq_length") => {
                    prompt_len = value.as_u64().expect("a length") as usize;
                    continue;
                }
                (_, "encoder_input_ids") => continue,
                ("TypicalLogitsWarper", "mass") => "typical_p",
                ("EpsilonLogitsWarper", "epsilon") => "epsilon_cutoff",
                ("EtaLogitsWarper", "epsilon") => "eta_cutoff",
                (_, "min_tokens_to_keep") => {
                    // With beams, one more than there are end tokens.
                    let eos: Vec<u64> = (1..value.as_u64().expect("a number")).collect();
                    options.extend([("num_beams".into(), json!(2)), ("eos_token_id".into(), json!(eos))]);
                    continue;
                }
                (_, same) => same,
            };
            options.insert(option.to_string(), value.clone());
        }
        if class == "LogitNormalization" {
            options.insert("renormalize_logits".to_string(), json!(true));
        }
    }
    (options, prompt_len)
}

fn is_warper(processor: &Value) -> bool {
    processor["class"].as_str().is_some_and(|class| class.ends_with("LogitsWarper"))
}

fn rows_f32(tensor: &TensorView) -> Vec<Vec<f32>> {
    let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    values.chunks(tensor.shape()[1]).map(<[f32]>::to_vec).collect()
}

fn rows_i64(tensor: &TensorView) -> Vec<Vec<i64>> {
    let values: Vec<i64> = tensor.data().as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect();
    values.chunks(tensor.shape()[1]).map(<[i64]>::to_vec).collect()
}
