//! Continuous batching: every request in an engine gets the same result as alone.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use itertools::Itertools as _;
use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::CacheLayout;
use t5gemma_runtime::{
    Batch, Controls, Engine, EngineOptions, Error, Event, GenerationConfig, Hypothesis, LogitsProcessor, Model,
    PollResult, Request,
};

use crate::common::{Hold, exported_from, fixture, tests};

/// Pseudorandom numbers, the same in every run.
pub struct Noise(pub u64);

impl Noise {
    pub fn below(&mut self, limit: usize) -> usize {
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

    /// One to three sources of any lengths, some already padded, some with a decoder prompt.
    pub fn batch(&mut self) -> Batch {
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

pub fn options(model: &Model, request: &Value) -> GenerationConfig {
    model
        .generation_config()
        .with_json(request.as_object().expect("an object"))
        .unwrap_or_else(|error| panic!("{request}: {error}"))
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
    let export = Export::default().target(target);
    exported_from(folder.path(), &format!("tiny-balanced-text-{}", target.name()), export)
}

pub fn open(target: Target) -> Arc<Model> {
    Arc::new(Model::open(with_text(target)).expect("the model opens"))
}

/// Tokens and finish reasons are equal, scores and log-probabilities equal up to rounding.
pub fn check_same(name: &str, found: &[Vec<Hypothesis>], expected: &[Vec<Hypothesis>]) {
    let parts = |rows: &[Vec<Hypothesis>]| -> Vec<Vec<_>> {
        let part = |hypothesis: &Hypothesis| (hypothesis.tokens.clone(), hypothesis.finish_reason);
        rows.iter().map(|row| row.iter().map(part).collect()).collect()
    };
    assert_eq!(parts(found), parts(expected), "{name}");
    for (found, expected) in found.iter().flatten().zip_eq(expected.iter().flatten()) {
        let numbers = |hypothesis: &Hypothesis| {
            let logprobs = hypothesis.logprobs.iter().flat_map(|logprobs| logprobs.tokens.clone());
            hypothesis.score.into_iter().chain(logprobs).collect::<Vec<f32>>()
        };
        let (found, expected) = (numbers(found), numbers(expected));
        assert_eq!(found.len(), expected.len(), "{name}");
        for (found, expected) in found.into_iter().zip_eq(expected) {
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
            .map(|(request, batch)| model.generate_batch(batch, &options(&model, request), Controls::default()))
            .collect();
        let refused = alone.iter().filter(|result| result.is_err()).count();
        assert!(refused < 20, "{refused} of 200 are no requests");

        // Alone and beside another copy, as on two devices.
        for copies in [vec![model.clone()], vec![model.clone(), open(target)]] {
            let bounds = EngineOptions::default().max_rows(24);
            let engine = Engine::of_copies(&copies, bounds).expect("copies");
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
                            // Some whose results nobody waits for.
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
            engine.drain().expect("from outside");
            let stats = engine.stats();
            assert_eq!(stats.submitted, stats.finished + stats.failed);
            assert_eq!((stats.waiting_requests, stats.waiting_sources), (0, 0));
            assert_eq!((stats.sources, stats.rows, stats.planned_bytes), (0, 0, 0), "final when it was waited for");
        }
    }
}

#[test]
fn rows_that_are_admitted_together_share_their_steps() {
    for target in TARGETS {
        let model = open(target);
        let engine = Engine::new(model.clone(), EngineOptions::default()).expect("an engine");
        let hold = Hold::default();
        let first = engine.submit(hold.at(0, long(&model))).expect("taken");
        hold.wait_for(1);
        let options = options(&model, &json!({"max_new_tokens": 20, "min_new_tokens": 20}));
        let request = |at: i64| Request::new(Batch::padded(&[[5 + at, 6]], 0).expect("well-formed"), options.clone());
        let others: Vec<_> = (0..3).map(|at| engine.submit(request(at)).expect("taken")).collect();
        first.cancel();
        hold.open();
        for other in others {
            assert_eq!(other.wait().expect("generates")[0][0].tokens.len(), 20);
        }
        engine.drain().expect("from outside");
        let stats = engine.stats();
        // Those of three rows; the first's own, and one at most that it begins before it is cancelled.
        assert!((60..=62).contains(&stats.stepped_rows) && (20..=22).contains(&stats.steps), "{stats:?}");
    }
}

pub const TARGETS: [Target; 2] = [Target::Portable, Target::Cpu];

/// A request that takes many steps.
pub fn long(model: &Model) -> Request {
    let options = options(model, &json!({"max_new_tokens": 450, "min_new_tokens": 450}));
    Request::new(Batch::padded(&[[5, 6, 7]], 0).expect("well-formed"), options)
}

pub fn short(model: &Model) -> Request {
    let options = options(model, &json!({"max_new_tokens": 6, "num_beams": 2}));
    Request::new(Batch::padded(&[[8, 9]], 0).expect("well-formed"), options)
}

pub fn alone(model: &Model, Request { batch, config, .. }: &Request) -> Vec<Vec<Hypothesis>> {
    model.generate_batch(batch, config, Controls::default()).expect("generates")
}

#[test]
fn tokens_are_told_as_they_come_and_rows_as_they_finish() {
    for target in TARGETS {
        let model = open(target);
        let engine = Engine::new(model.clone(), EngineOptions::default()).expect("an engine");
        let batch = Batch::padded(&[vec![5, 6, 7], vec![8], vec![9, 10]], 0).expect("well-formed");
        for request in [
            json!({"max_new_tokens": 12}),
            json!({"max_new_tokens": 12, "num_beams": 3}),
            json!({"max_new_tokens": 12, "num_beams": 3, "required_phrases": [[40, 41]]}),
        ] {
            let request = Request::new(batch.clone(), options(&model, &request));
            let expected = alone(&model, &request);
            let mut told = vec![Vec::new(); 3];
            let mut finished = Vec::new();
            for event in engine.submit(request).expect("taken") {
                match event.expect("nothing fails") {
                    Event::Token { row, token, .. } => {
                        assert!(!finished.contains(&row), "a row that is finished says nothing more");
                        told[row].push(token);
                    }
                    Event::Row { row, hypotheses } => {
                        assert_eq!(told[row], hypotheses[0].tokens);
                        check_same("events", &[hypotheses], &expected[row..=row]);
                        finished.push(row);
                    }
                    Event::Admitted { row } => assert!(told[row].is_empty()),
                    other => panic!("{other:?}"),
                }
            }
            finished.sort();
            assert_eq!(finished, [0, 1, 2]);
        }
    }
}

#[test]
fn requests_end_when_they_are_cancelled_or_late_and_others_go_on() {
    for target in TARGETS {
        let model = open(target);
        let engine = Engine::new(model.clone(), EngineOptions::default()).expect("an engine");
        let expected = alone(&model, &short(&model));

        // Held in flight until one is cancelled and the other too late, which its caller is told while it is held.
        let hold = Hold::default();
        let mut cancelled = engine.submit(hold.at(2, long(&model))).expect("taken");
        assert!(matches!(cancelled.next(), Some(Ok(Event::Admitted { row: 0 }))));
        assert!(matches!(cancelled.next(), Some(Ok(Event::Token { row: 0, .. }))), "in flight");
        hold.wait_for(1);
        let late = long(&model).deadline(Instant::now() + Duration::from_millis(30));
        let mut late = engine.submit(late).expect("taken");
        let past = short(&model).deadline(Instant::now());
        assert!(matches!(engine.submit(past).expect("taken").wait(), Err(Error::Deadline)));
        let other = engine.submit(short(&model)).expect("taken");
        let canceller = cancelled.canceller();
        thread::spawn(move || canceller.cancel()).join().expect("does not panic");
        assert!(matches!(late.by_ref().last(), Some(Err(Error::Deadline))));
        assert!(late.next().is_none() && matches!(late.next_timeout(Duration::ZERO), PollResult::Ended));
        hold.open();
        check_same("beside", &other.wait().expect("generates"), &expected);
        assert!(matches!(cancelled.by_ref().last(), Some(Err(Error::Cancelled))));
        assert!(cancelled.next().is_none() && matches!(cancelled.next_timeout(Duration::ZERO), PollResult::Ended));
        // One that passes on the way, at whatever step: a step takes until then at least.
        let deadline = Instant::now() + Duration::from_millis(50);
        let mut slow = short(&model).deadline(deadline);
        slow.config.logits_processor.push(LogitsProcessor::new(move |_, _| {
            thread::sleep(deadline.saturating_duration_since(Instant::now()));
        }));
        assert!(matches!(engine.submit(slow).expect("taken").wait(), Err(Error::Deadline)));
        engine.drain().expect("from outside");
        let stats = engine.stats();
        assert_eq!((stats.submitted, stats.finished, stats.failed), (5, 1, 4));
        assert!(matches!(engine.submit(short(&model)).err(), Some(Error::Closed)));
    }
}

#[test]
fn what_cannot_be_taken_is_refused_with_the_figures() {
    let model = open(Target::Cpu);
    let options_of = |max_rows, max_bytes, max_waiting| {
        EngineOptions::default().max_rows(max_rows).max_bytes(max_bytes).max_waiting(max_waiting)
    };
    // One row of 64 tokens of room and 3 of source, in 8 tensors and one that is moved, of 2 heads of 16 numbers.
    let bytes = |rows: usize, room: usize, source: usize| rows * ((room + source) * 9 * 2 * 16 * 4 + 200 * 4);
    let config = &model.facts().decoder;
    assert_eq!(
        (config.num_key_value_heads, config.num_hidden_layers, config.vocab_size),
        (2, 4, 200),
        "of this fixture"
    );
    let refused = |engine: &Engine, request: Request| engine.submit(request).expect_err("refused").to_string();

    let engine = Engine::new(model.clone(), options_of(1, usize::MAX, 9)).expect("an engine");
    assert_eq!(
        refused(&engine, short(&model)),
        "the request needs 2 target rows (num_beams or num_return_sequences), but the engine's limit is 1"
    );
    let engine = Engine::new(model.clone(), options_of(9, bytes(2, 64, 2), 9)).expect("an engine");
    let needed = bytes(1, 512, 3);
    let limit = bytes(2, 64, 2);
    assert_eq!(
        refused(&engine, long(&model)),
        format!("the request needs {needed} bytes of keys, values and logits, but the engine's limit is {limit}")
    );
    check_same(
        "it fits exactly",
        &engine.submit(short(&model)).expect("taken").wait().expect("generates"),
        &alone(&model, &short(&model)),
    );

    // One in flight, one waiting, and no more.
    let engine = Engine::new(model.clone(), options_of(1, usize::MAX, 1)).expect("an engine");
    let hold = Hold::default();
    let in_flight = engine.submit(hold.at(2, long(&model))).expect("taken");
    hold.wait_for(1);
    let waiting = engine.submit(long(&model)).expect("taken");
    assert!(matches!(engine.submit(long(&model)).err(), Some(Error::Full { waiting: 1, .. })));
    drop(in_flight);
    hold.open();
    assert_eq!(waiting.wait().expect("generates")[0][0].tokens.len(), 450);
}

#[test]
fn bounds_of_nothing_are_refused_by_name() {
    let model = open(Target::Cpu);
    for (name, options) in [
        ("max_rows", EngineOptions::default().max_rows(0)),
        ("max_bytes", EngineOptions::default().max_bytes(0)),
        ("max_sources", EngineOptions::default().max_sources(0)),
        ("max_waiting", EngineOptions::default().max_waiting(0)),
        ("max_waiting_rows", EngineOptions::default().max_waiting_rows(0)),
        ("max_waiting_tokens", EngineOptions::default().max_waiting_tokens(0)),
        ("max_waiting_bytes", EngineOptions::default().max_waiting_bytes(0)),
    ] {
        for refused in
            [Engine::new(model.clone(), options.clone()), Engine::of_copies(std::slice::from_ref(&model), options)]
        {
            let error = refused.expect_err("refused").to_string();
            assert_eq!(error, format!("{name}: expected at least 1, found 0"));
        }
    }
}

#[test]
fn memory_is_never_planned_beyond_its_limit() {
    for target in TARGETS {
        let model = open(target);
        let most = 6_000_000;
        let engine = Engine::new(model.clone(), EngineOptions::default().max_bytes(most)).expect("an engine");
        let mut noise = Noise(7);
        let requests: Vec<Request> = (0..24)
            .map(|_| {
                let options = json!({"max_new_tokens": 1 + noise.below(300), "num_beams": 1 + noise.below(3)});
                Request::new(noise.batch(), self::options(&model, &options))
            })
            .collect();
        // Looked at in every step, of requests that are all there when the first begins.
        let (engine, seen) = (Arc::new(engine), Arc::new(Mutex::new(Vec::new())));
        let hold = Hold::default();
        let first = engine.submit(hold.at(0, short(&model))).expect("fits");
        hold.wait_for(1);
        let submit = |mut request: Request| {
            let (own, seen) = (Arc::downgrade(&engine), seen.clone());
            request.config.logits_processor.push(LogitsProcessor::new(move |_, _| {
                let Some(engine) = own.upgrade() else { return };
                seen.lock().expect("no panic").push(engine.stats());
            }));
            engine.submit(request).expect("fits")
        };
        let generations: Vec<_> = requests.into_iter().map(submit).collect();
        hold.open();
        first.wait().expect("generates");
        for generation in generations {
            generation.wait().expect("generates");
        }
        engine.drain().expect("from outside");
        let seen = seen.lock().expect("no panic");
        let fullest = seen.iter().map(|stats| stats.planned_bytes).max().unwrap_or(0);
        assert!(seen.iter().all(|stats| stats.planned_bytes <= most && stats.rows <= 64), "{fullest}");
        assert!(fullest > most / 2, "the limit is what held requests back: {fullest}");
    }
}

#[test]
fn a_function_that_panics_ends_its_own_request() {
    let model = open(Target::Cpu);
    let engine = Engine::new(model.clone(), EngineOptions::default()).expect("an engine");
    let mut panicking = short(&model);
    panicking.config.logits_processor = vec![LogitsProcessor::new(|place, _| assert!(place.history.len() < 3))];
    let (panicking, other) = (engine.submit(panicking).expect("taken"), engine.submit(short(&model)).expect("taken"));
    assert!(matches!(panicking.wait(), Err(Error::Panicked { row: 0 })));
    check_same("beside", &other.wait().expect("generates"), &alone(&model, &short(&model)));
}

#[test]
fn a_function_on_the_engines_thread_cannot_wait_for_it() {
    let model = open(Target::Cpu);
    let engine = Arc::new(Engine::new(model.clone(), EngineOptions::default()).expect("an engine"));
    let told = Arc::new(Mutex::new(Vec::new()));
    let (own, tell) = (Arc::downgrade(&engine), told.clone());
    let mut request = short(&model);
    request.config.logits_processor = vec![LogitsProcessor::new(move |_, _| {
        let Some(engine) = own.upgrade() else { return };
        let mut told = tell.lock().expect("no panic");
        told.extend([engine.drain(), engine.shutdown()].map(|result| result.expect_err("refused").to_string()));
    })];
    engine.submit(request).expect("taken").wait().expect("generates");
    let told = told.lock().expect("no panic");
    assert!(!told.is_empty() && told.iter().all(|text| text.contains("from another thread")), "{told:?}");
}

#[test]
fn a_shutdown_ends_everything() {
    let model = open(Target::Portable);
    let engine = Engine::new(model.clone(), EngineOptions::default().max_rows(1)).expect("an engine");
    let hold = Hold::default();
    let generations: Vec<_> = (0..3).map(|_| engine.submit(hold.at(2, long(&model))).expect("taken")).collect();
    hold.wait_for(1);
    thread::scope(|scope| {
        scope.spawn(|| engine.shutdown().expect("from outside"));
        // Held until it is closed.
        while !matches!(engine.submit(long(&model)).err(), Some(Error::Closed)) {
            thread::yield_now();
        }
        hold.open();
    });
    for generation in generations {
        assert!(matches!(generation.wait(), Err(Error::Cancelled)));
    }
    engine.drain().expect("from outside");
    assert!(matches!(engine.submit(long(&model)).err(), Some(Error::Closed)));
    assert_eq!(alone(&model, &short(&model)).len(), 1, "the model goes on");
}
