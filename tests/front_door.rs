//! The Rust API as a program uses it: texts in, texts out, options by builder methods.

use std::fs;
use std::ops::ControlFlow;

use serde_json::json;
use t5gemma_runtime::{
    Batch, Cancellation, ChatTemplate, Controls, Encoder, Error, FinishReason, GenerationOptions, Model, Pooling,
    SpecialTokens,
};

use crate::common::demo;

const TEXTS: [&str; 3] = ["Dr. Smith paid $3.50.", "On May 5, 2021 it rained.", "a"];

#[test]
fn texts_become_texts_with_the_options_that_are_set() {
    let model = Model::open(demo()).expect("the model opens");
    let tokenizer = model.tokenizer().expect("the demo has one");
    let default = GenerationOptions::default;
    for options in [
        default(),
        default().num_beams(4).num_return_sequences(3).length_penalty(0.6),
        default().do_sample(true).seed(7).temperature(1.5).num_return_sequences(2),
        default().max_new_tokens(3).output_logprobs(true),
    ] {
        let config = model.generation_config().with(&options).expect("valid");
        let batch = model.tokenize(&TEXTS).expect("texts");
        let expected = model.generate_batch(&batch, &config, Controls::default()).expect("generates");
        let found = model.generate(&TEXTS, &options).expect("generates");
        assert_eq!(found.len(), TEXTS.len());
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!(found.hypotheses, expected);
            assert_eq!(found.texts.len(), config.num_return_sequences);
            let text = tokenizer.decode(&expected[0].tokens, SpecialTokens::Skip).expect("tokens");
            assert_eq!((found.text(), found.to_string()), (text.as_str(), text.clone()));
        }
    }
    let short = model.generate(&TEXTS[..1], &default().max_new_tokens(2)).expect("generates");
    let [hypothesis] = short[0].hypotheses.as_slice() else { panic!("{short:?}") };
    assert_eq!((hypothesis.tokens.len(), hypothesis.finish_reason), (2, FinishReason::Length));
    // What is not set is the model's: its own limit is above Hugging Face's 20 tokens.
    let unset = model.generate(&TEXTS[..1], &default()).expect("generates");
    assert_eq!(unset[0].hypotheses[0].finish_reason, FinishReason::Eos, "{unset:?}");
}

#[test]
fn wrong_options_and_texts_are_errors_of_the_call() {
    let model = Model::open(demo()).expect("the model opens");
    let default = GenerationOptions::default;
    for (options, expected) in [
        (default().temperature(0.5), "temperature requires do_sample true (got false)"),
        (default().num_beams(2).num_return_sequences(3), "num_return_sequences requires num_beams of at least 3"),
        (default().suppress_tokens(vec![1 << 40]), "suppress_tokens: expected token ids below"),
        (default().regex("(".into()), "regex: expected a regular expression that compiles"),
    ] {
        let error = model.generate(&TEXTS, &options).expect_err(expected).to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let error = model.generate::<&str>(&[], &default()).expect_err("nothing to do").to_string();
    assert_eq!(error, "input_ids: expected at least one row, found none");
}

#[test]
fn a_call_can_be_streamed_and_cancelled() {
    let model = Model::open(demo()).expect("the model opens");
    let options = GenerationOptions::default();
    let mut tokens = vec![Vec::new(); TEXTS.len()];
    let mut streamer = |row: usize, token: i64| {
        tokens[row].push(token);
        ControlFlow::Continue(())
    };
    let found = model.generate_with(&TEXTS, &options, Controls::default().streamer(&mut streamer)).expect("generates");
    let expected: Vec<Vec<i64>> = found.iter().map(|found| found.hypotheses[0].tokens.clone()).collect();
    assert_eq!(tokens, expected);

    let cancellation = Cancellation::new();
    cancellation.cancel();
    let cancelled = model.generate_with(&TEXTS, &options, Controls::default().cancellation(&cancellation));
    assert!(matches!(cancelled, Err(Error::Cancelled)), "{cancelled:?}");
}

#[test]
fn conversations_are_answered_by_a_template() {
    let model = Model::open(demo()).expect("the model opens");
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    fs::write(folder.path().join("tokenizer_config.json"), "{}").expect("written");
    fs::write(folder.path().join("chat_template.jinja"), "{{ messages[0].content }}").expect("written");
    let template = ChatTemplate::open(folder.path()).expect("a template");
    let options = GenerationOptions::default().num_beams(2);
    let messages = [json!({"role": "user", "content": TEXTS[0]})];
    let found = model.chat(&template, &messages, &options).expect("generates");
    let source = model.tokenizer().expect("the demo has one").encode_target(TEXTS[0]).expect("text");
    let batch = Batch::padded(&[source], 0).expect("well-formed");
    let config = model.generation_config().with(&options).expect("valid");
    let expected = model.generate_batch(&batch, &config, Controls::default()).expect("generates");
    assert_eq!(found.hypotheses, expected[0]);
}

#[test]
fn an_encoder_takes_texts() {
    let encoder = Encoder::open(demo()).expect("the encoder opens");
    let batch = encoder.tokenize(&TEXTS).expect("texts");
    let vectors = encoder.embed_normalized(&batch, Pooling::Mean, &Cancellation::new()).expect("embeds");
    assert_eq!(vectors.nrows(), TEXTS.len());
    assert!((vectors.row(0).dot(&vectors.row(0)) - 1.0).abs() < 1e-5);
}
