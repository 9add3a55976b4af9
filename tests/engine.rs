//! Continuous batching: whatever requests meet in an engine, each gets what it gets alone.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::CacheLayout;
use t5gemma_runtime::{Batch, Cancellation, Engine, EngineOptions, GenerationOptions, Hypothesis, Model, Request};

use crate::common::{exported_from, fixture, tests};

/// Numbers that look random, the same in every run.
struct Noise(u64);

impl Noise {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % limit as u64) as usize
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    fn tokens(&mut self, most: usize) -> Vec<i64> {
        let length = 1 + self.below(most);
        (0..length).map(|_| 5 + self.below(190) as i64).collect()
    }

    fn options(&mut self) -> Value {
        let most = self.pick(&[24, 24, 24, 24, 90]);
        let mut options = json!({"max_new_tokens": 1 + self.below(most)});
        let strategy = match self.below(7) {
            0 | 1 => json!({}),
            2 => json!({"num_beams": 2 + self.below(4), "length_penalty": self.pick(&[0.0, 1.0, 2.0]),
                        "early_stopping": self.pick(&[json!(true), json!(false), json!("never")]),
                        "num_return_sequences": 1 + self.below(2)}),
            3 => json!({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7, "num_return_sequences": 3}),
            4 => json!({"do_sample": true, "seed": self.below(1000), "num_return_sequences": 1 + self.below(4),
                        "temperature": self.pick(&[0.7, 1.0, 1.4]), "top_p": self.pick(&[0.8, 1.0])}),
            5 => json!({"do_sample": true, "seed": self.below(1000), "num_beams": 3, "num_return_sequences": 2}),
            _ => json!({"return_alternatives": true, "num_return_sequences": 3}),
        };
        let mut add =
            |more: Value| options.as_object_mut().expect("one").extend(more.as_object().expect("one").clone());
        add(strategy);
        let some = [
            json!({"repetition_penalty": 1.4}),
            json!({"no_repeat_ngram_size": 2}),
            json!({"encoder_no_repeat_ngram_size": 2}),
            json!({"bad_words_ids": [[7], [11, 12]]}),
            json!({"min_new_tokens": 1}),
            json!({"frequency_penalty": 0.5, "presence_penalty": 0.2}),
            json!({"suppress_tokens": [20, 21, 22]}),
            json!({"output_logprobs": true, "top_logprobs": 2}),
            json!({"allowed_sequences": [[5, 6, 7], [5, 6], [30], [31, 32, 33, 34]], "max_new_tokens": 6}),
            json!({"required_phrases": [[40, 41]], "max_new_tokens": 9}),
            json!({"stop_strings": ["a", "e"]}),
            json!({"regex": "[a-e]{2,9}", "max_new_tokens": 20}),
        ];
        for more in some {
            if self.below(9) == 0 {
                add(more);
            }
        }
        options
    }

    /// One to three sources of any lengths, some with padding of their own, some with a decoder prompt.
    fn batch(&mut self) -> Batch {
        let rows = self.pick(&[1, 1, 1, 2, 3]);
        let mut batch = match self.below(4) {
            0 => {
                let ids = self.tokens(9);
                let mut mask = vec![1; ids.len()];
                mask[0] = (ids.len() == 1) as i64;
                Batch::masked(&vec![&ids; rows], &vec![&mask; rows])
            }
            _ => Batch::padded(&(0..rows).map(|_| self.tokens(30)).collect::<Vec<_>>(), 0),
        };
        if self.below(3) == 0 {
            let prompt = self.tokens(4);
            batch = batch.and_then(|batch| batch.with_decoder_input_ids(&vec![prompt; rows]));
        }
        batch.expect("well-formed")
    }
}

fn options(model: &Model, request: &Value) -> GenerationOptions {
    model.options().with(request.as_object().expect("an object")).unwrap_or_else(|error| panic!("{request}: {error}"))
}

/// tiny-balanced with the demo's tokenizer.
fn with_text(target: Target) -> PathBuf {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    for entry in fs::read_dir(fixture("tiny-balanced").join("checkpoint")).expect("the fixture is there") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copied");
    }
    let tokenizer = tests().join("demo/checkpoint/tokenizer.json");
    fs::copy(tokenizer, folder.path().join("tokenizer.json")).expect("copied");
    let export = Export { target, ..Export::default() };
    exported_from(folder.path(), &format!("tiny-balanced-text-{}", target.name()), export)
}

fn open(target: Target) -> Arc<Model> {
    Arc::new(Model::open(with_text(target)).expect("the model opens"))
}

/// Tokens and ends are equal, scores and log-probabilities up to rounding.
fn check_same(name: &str, found: &[Vec<Hypothesis>], expected: &[Vec<Hypothesis>]) {
    let parts = |rows: &[Vec<Hypothesis>]| -> Vec<Vec<_>> {
        let part = |hypothesis: &Hypothesis| (hypothesis.tokens.clone(), hypothesis.finish_reason);
        rows.iter().map(|row| row.iter().map(part).collect()).collect()
    };
    assert_eq!(parts(found), parts(expected), "{name}");
    for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
        let numbers = |hypothesis: &Hypothesis| {
            let logprobs = hypothesis.logprobs.iter().flat_map(|logprobs| logprobs.tokens.clone());
            hypothesis.score.into_iter().chain(logprobs).collect::<Vec<f32>>()
        };
        let (found, expected) = (numbers(found), numbers(expected));
        assert_eq!(found.len(), expected.len(), "{name}");
        for (found, expected) in found.into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-4 * (1.0 + expected.abs()), "{name}: {found}, expected {expected}");
        }
    }
}

#[test]
fn random_requests_at_random_times_give_what_each_gives_alone() {
    const THREADS: usize = 8;
    for target in [Target::Portable, Target::Cpu] {
        let model = open(target);
        let is_in_place = model.manifest().cache == CacheLayout::InPlace;
        assert_eq!(is_in_place, target == Target::Cpu, "both layouts are tried");
        let mut noise = Noise(20_261_123);
        let requests: Vec<(Value, Batch)> = (0..200).map(|_| (noise.options(), noise.batch())).collect();
        let alone: Vec<_> = requests
            .iter()
            .map(|(request, batch)| model.generate(batch, &options(&model, request), &mut (), &Cancellation::new()))
            .collect();
        let refused = alone.iter().filter(|result| result.is_err()).count();
        assert!(refused < 20, "{refused} of 200 are no requests");

        let engine = Engine::new(model.clone(), EngineOptions { max_rows: 24, ..EngineOptions::default() });
        let wrong = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let (engine, model, requests, alone, wrong) = (&engine, &model, &requests, &alone, &wrong);
                scope.spawn(move || {
                    let mut noise = Noise(thread as u64);
                    let mut pending = Vec::new();
                    for at in (thread..requests.len()).step_by(THREADS) {
                        let (request, batch) = &requests[at];
                        match engine.submit(Request::new(batch.clone(), options(model, request))) {
                            Ok(generation) => pending.push((at, generation)),
                            Err(error) => {
                                let expected = alone[at].as_ref().expect_err("refused alone too").to_string();
                                assert_eq!(error.to_string(), expected);
                            }
                        }
                        // Some that nobody waits for.
                        if noise.below(5) == 0 {
                            drop(engine.submit(Request::new(batch.clone(), options(model, request))));
                        }
                        thread::sleep(Duration::from_micros(noise.below(9000) as u64));
                    }
                    for (at, generation) in pending {
                        match (generation.wait(), &alone[at]) {
                            (Ok(found), Ok(expected)) => {
                                let name = format!("{} request {at}: {}", model.manifest().target, requests[at].0);
                                let same = || check_same(&name, &found, expected);
                                if let Err(panic) = std::panic::catch_unwind(same) {
                                    let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                                    wrong.lock().expect("no panic").push(text);
                                }
                            }
                            (Err(found), Err(expected)) => assert_eq!(found.to_string(), expected.to_string()),
                            (found, expected) => panic!("{at}: {found:?}, expected {expected:?}"),
                        }
                    }
                });
            }
        });
        let wrong = wrong.into_inner().expect("no panic");
        assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
        engine.drain();
        let stats = engine.stats();
        assert_eq!(stats.submitted, stats.finished + stats.failed);
        assert_eq!((stats.waiting_requests, stats.waiting_sources), (0, 0));
        assert!(stats.stepped_rows > 2 * stats.steps, "steps are shared: {stats:?}");
    }
}
