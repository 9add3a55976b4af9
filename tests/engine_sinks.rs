//! Requests without a thread of their own: messages to a sink, times and counts, priorities, tenants, bounds of the queue.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use t5gemma_graphs::Target;
use t5gemma_runtime::{
    Batch, Canceller, Engine, EngineOptions, Error, Event, Hypothesis, Message, Model, Priority, Request, RequestStats,
};

use crate::common::Hold;
use crate::engine::{Noise, TARGETS, alone, check_same, long, open, options, short};

/// The messages of a request.
struct Told {
    messages: Receiver<Message>,
    canceller: Canceller,
}

fn submit(engine: &Engine, request: Request) -> Told {
    let (sender, messages) = mpsc::channel();
    let sink = move |message| sender.send(message).expect("the test listens");
    Told { canceller: engine.submit_to(request, sink).expect("taken"), messages }
}

/// What a request told from its submission to its end.
#[derive(Default)]
struct Story {
    admitted: Vec<usize>,
    tokens: Vec<Vec<i64>>,
    rows: Vec<Vec<Hypothesis>>,
}

impl Told {
    fn wait(self, rows: usize) -> (Story, Result<(), Error>, RequestStats) {
        let mut story = Story { tokens: vec![Vec::new(); rows], rows: vec![Vec::new(); rows], ..Story::default() };
        let mut ended = None;
        // Until the engine drops the sink.
        for message in self.messages {
            assert!(ended.is_none(), "nothing follows the end: {message:?}");
            match message {
                Message::Event(Event::Admitted { row }) => story.admitted.push(row),
                Message::Event(Event::Token { row, token, .. }) => story.tokens[row].push(token),
                Message::Event(Event::Row { row, hypotheses }) => story.rows[row] = hypotheses,
                Message::Event(other) => panic!("{other:?}"),
                Message::Ended { result, stats } => ended = Some((result, stats)),
            }
        }
        let (result, stats) = ended.expect("every request ends");
        (story, result, stats)
    }
}

fn small(model: &Model) -> Request {
    let options = options(model, &json!({"max_new_tokens": 4, "min_new_tokens": 4}));
    Request::new(Batch::padded(&[[8, 9]], 0).expect("well-formed"), options)
}

#[test]
fn a_sink_is_told_what_the_request_gives_alone_with_its_times_and_counts() {
    for target in TARGETS {
        let model = open(target);
        let engine = Engine::new(model.clone(), EngineOptions::default()).expect("an engine");
        let batch = Batch::padded(&[vec![5, 6, 7], vec![8], vec![9, 10]], 0).expect("well-formed");
        for config in [
            json!({"max_new_tokens": 12}),
            json!({"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2}),
            json!({"max_new_tokens": 1}),
        ] {
            let request = Request::new(batch.clone(), options(&model, &config));
            let expected = alone(&model, &request);
            let (story, result, stats) = submit(&engine, request).wait(3);
            result.expect("generates");
            check_same("sink", &story.rows, &expected);
            assert_eq!(story.admitted, [0, 1, 2]);
            for (told, hypotheses) in story.tokens.iter().zip(&expected) {
                assert_eq!(told, &hypotheses[0].tokens);
            }
            assert_eq!(stats.source_tokens, 6);
            assert_eq!(stats.new_tokens, expected.iter().flatten().map(|one| one.tokens.len()).sum::<usize>());
            let first = stats.first_token.expect("there are tokens");
            assert!(!stats.encoding.is_zero() && stats.queued + stats.encoding <= stats.total, "{stats:?}");
            assert!(stats.queued < first && first <= stats.total, "{stats:?}");
        }
        let counts = engine.stats();
        assert_eq!(counts.source_tokens, 18);
        assert!(counts.new_tokens > 9, "{counts:?}");
        let mut polled = engine.submit(small(&model)).expect("taken");
        assert!(polled.stats().is_none());
        polled.by_ref().for_each(|event| drop(event.expect("generates")));
        assert!(polled.stats().is_some_and(|stats| (stats.source_tokens, stats.new_tokens) == (2, 4)));
    }
}

#[test]
fn two_hundred_requests_with_random_cancellations_end_once_each_and_leave_nothing() {
    let model = open(Target::Cpu);
    let bounds = EngineOptions::default().max_rows(16);
    for copies in [vec![model.clone()], vec![model.clone(), open(Target::Cpu)]] {
        let engine = Engine::of_copies(&copies, bounds.clone()).expect("copies");
        let (sender, ends) = mpsc::channel();
        let mut noise = Noise(61);
        let requests: Vec<(usize, Request)> = (0..200)
            .map(|_| {
                let config = json!({"max_new_tokens": 1 + noise.below(60), "num_beams": 1 + noise.below(3)});
                let request = Request::new(noise.batch(), options(&model, &config));
                let request = match noise.below(8) {
                    0 => request.deadline(Instant::now() + Duration::from_millis(noise.below(400) as u64)),
                    _ => request.tenant(noise.below(5).to_string()).priority(Priority::ALL[noise.below(3)]),
                };
                (noise.below(3), request)
            })
            .collect();
        let cancelled = thread::scope(|scope| {
            let leave = |canceller: Canceller, after| {
                scope.spawn(move || {
                    thread::sleep(after);
                    canceller.cancel();
                });
            };
            let mut cancelled = 0;
            for (at, (fate, request)) in requests.into_iter().enumerate() {
                let sender = sender.clone();
                let sink = move |message| {
                    if let Message::Ended { result, .. } = message {
                        sender.send((at, result)).expect("the test listens");
                    }
                };
                let canceller = engine.submit_to(request, sink).expect("taken");
                if fate == 0 {
                    leave(canceller, Duration::from_micros(noise.below(100_000) as u64));
                    cancelled += 1;
                }
            }
            cancelled
        });
        engine.drain().expect("from outside");
        drop(sender);
        let mut ended: Vec<(usize, Result<(), Error>)> = ends.into_iter().collect();
        let (good, bad): (Vec<_>, Vec<_>) = ended.iter().partition(|(_, result)| result.is_ok());
        assert!(cancelled > 40 && !bad.is_empty() && good.len() > 60, "{cancelled}, {}, {}", good.len(), bad.len());
        assert!(bad.iter().all(|(_, result)| matches!(result, Err(Error::Cancelled | Error::Deadline))), "{bad:?}");
        let stats = engine.stats();
        assert_eq!((stats.submitted, stats.finished, stats.failed), (200, good.len() as u64, bad.len() as u64));
        assert_eq!((stats.rows, stats.sources, stats.planned_bytes, stats.waiting_requests), (0, 0, 0, 0));
        assert_eq!((stats.waiting_rows, stats.waiting_tokens, stats.waiting_bytes), (0, 0, 0));
        ended.sort_by_key(|(at, _)| *at);
        assert!(ended.into_iter().map(|(at, _)| at).eq(0..200), "each ended once");
    }
}

#[test]
fn a_sink_that_panics_ends_its_own_request() {
    let model = open(Target::Cpu);
    let engine = Engine::new(model.clone(), EngineOptions::default()).expect("an engine");
    for panics_at in [0, 1, 4, usize::MAX] {
        let mut count = 0;
        let is_end = panics_at == usize::MAX;
        engine
            .submit_to(if is_end { short(&model) } else { long(&model) }, move |message| {
                assert!(count != panics_at && !(is_end && matches!(message, Message::Ended { .. })), "as asked");
                count += 1;
            })
            .expect("taken");
    }
    let (story, result, _) = submit(&engine, short(&model)).wait(1);
    result.expect("generates");
    check_same("beside", &story.rows, &alone(&model, &short(&model)));
    engine.drain().expect("from outside");
    let stats = engine.stats();
    assert_eq!((stats.finished, stats.failed, stats.rows), (2, 3, 0), "the one that only heard badly was done");
}

#[test]
fn what_is_cancelled_while_it_waits_is_never_admitted() {
    let model = open(Target::Cpu);
    let engine = Engine::new(model.clone(), EngineOptions::default().max_rows(1)).expect("an engine");
    let hold = Hold::default();
    let first = submit(&engine, hold.at(1, small(&model)));
    hold.wait_for(1);
    let cancelled = submit(&engine, small(&model));
    let late = submit(&engine, small(&model).deadline(Instant::now()));
    let dropped = submit(&engine, small(&model));
    cancelled.canceller.cancel();
    assert_eq!(engine.stats().waiting_requests, 3);
    hold.open();
    first.wait(1).1.expect("generates");
    for (told, is_expected) in [
        (cancelled, (|error| matches!(error, Error::Cancelled)) as fn(Error) -> bool),
        (late, |error| matches!(error, Error::Deadline)),
    ] {
        let (story, result, stats) = told.wait(1);
        assert!(is_expected(result.expect_err("ended")) && story.admitted.is_empty());
        assert!(stats.queued == stats.total && stats.first_token.is_none(), "{stats:?}");
    }
    // Without anyone who could cancel it.
    dropped.wait(1).1.expect("generates");
}

#[test]
fn a_sink_may_submit_and_cancel_but_not_wait_for_the_engine() {
    let model = open(Target::Cpu);
    let engine = Arc::new(Engine::new(model.clone(), EngineOptions::default()).expect("an engine"));
    let (sender, ends) = mpsc::channel();
    let (own, next) = (engine.clone(), small(&model));
    let mut other = Some(engine.submit_to(long(&model), |_| {}).expect("taken"));
    let sink = move |message| {
        if let Message::Ended { .. } = message {
            other.take().expect("one end").cancel();
            let sender = sender.clone();
            let refused = own.drain().expect_err("would wait for itself").to_string();
            let told = move |message| {
                if let Message::Ended { result, .. } = message {
                    sender.send((refused.clone(), result)).expect("the test listens");
                }
            };
            own.submit_to(next.clone(), told).expect("taken");
        }
    };
    engine.submit_to(small(&model), sink).expect("taken");
    let (refused, result) = ends.recv().expect("one end");
    result.expect("generates");
    assert!(refused.contains("from another thread"), "{refused}");
    engine.drain().expect("from outside");
    assert_eq!(engine.stats().failed, 1);
}

#[test]
fn long_sources_join_rows_in_flight_and_give_what_each_gives_alone() {
    let noise = |length: usize| (0..length).map(|at| 5 + (at * 37 % 190) as i64).collect::<Vec<_>>();
    for target in TARGETS {
        let model = open(target);
        let engine = Engine::new(model.clone(), EngineOptions::default()).expect("an engine");
        let request = |length: usize, beams: usize| {
            let config = json!({"max_new_tokens": 30, "min_new_tokens": 30, "num_beams": beams});
            Request::new(Batch::padded(&[noise(length)], 0).expect("well-formed"), options(&model, &config))
        };
        let requests: Vec<Request> = (0..24)
            .map(|at| match at % 4 {
                0 => request(511 - at, 1 + at % 3),
                _ => request(3 + at, 1 + at % 2),
            })
            .collect();
        let running = submit(&engine, long(&model));
        let told: Vec<_> = requests.iter().map(|request| submit(&engine, request.clone())).collect();
        // One that ends while it is encoded or waits for that.
        let left = submit(&engine, request(512, 1));
        left.canceller.cancel();
        for (told, request) in told.into_iter().zip(&requests) {
            let (story, result, _) = told.wait(1);
            result.expect("generates");
            check_same("beside a long source", &story.rows, &alone(&model, request));
        }
        assert!(matches!(left.wait(1).1, Err(Error::Cancelled)));
        running.canceller.cancel();
        engine.drain().expect("from outside");
        let stats = engine.stats();
        assert_eq!((stats.rows, stats.sources, stats.planned_bytes), (0, 0, 0));
    }
}

#[test]
fn a_shutdown_tells_every_sink() {
    let model = open(Target::Portable);
    let engine = Engine::new(model.clone(), EngineOptions::default().max_rows(2)).expect("an engine");
    let told: Vec<_> = (0..5).map(|_| submit(&engine, long(&model))).collect();
    engine.shutdown().expect("from outside");
    for told in told {
        assert!(matches!(told.wait(1).1, Err(Error::Cancelled)));
    }
    let is_called = Arc::new(AtomicBool::new(false));
    let called = is_called.clone();
    let refused = engine.submit_to(small(&model), move |_| called.store(true, Ordering::SeqCst));
    assert!(matches!(refused, Err(Error::Closed)) && !is_called.load(Ordering::SeqCst));
}

#[test]
fn priorities_and_tenants_decide_who_is_admitted_next() {
    let model = open(Target::Cpu);
    let engine = Engine::new(model.clone(), EngineOptions::default().max_rows(1)).expect("an engine");
    let order = Arc::new(Mutex::new(Vec::new()));
    let hold = Hold::default();
    let first = submit(&engine, hold.at(0, small(&model)));
    hold.wait_for(1);
    for (name, request) in [
        ("low", small(&model).priority(Priority::Low)),
        ("a1", small(&model).tenant("a")),
        ("a2", small(&model).tenant("a")),
        ("a3", small(&model).tenant("a")),
        ("b1", small(&model).tenant("b")),
        ("high", small(&model).priority(Priority::High).tenant("b")),
    ] {
        let order = order.clone();
        let sink = move |message| {
            if let Message::Event(Event::Admitted { .. }) = message {
                order.lock().expect("no panic").push(name);
            }
        };
        engine.submit_to(request, sink).expect("taken");
    }
    hold.open();
    first.wait(1).1.expect("generates");
    engine.drain().expect("from outside");
    assert_eq!(*order.lock().expect("no panic"), ["high", "a1", "b1", "a2", "a3", "low"]);
}

#[test]
fn a_full_queue_says_when_to_try_again() {
    let model = open(Target::Cpu);
    let bounds = EngineOptions::default().max_rows(1).max_waiting_tokens(5).max_waiting_rows(9);
    let engine = Engine::new(model.clone(), bounds).expect("an engine");
    // Two that tell how long one takes.
    for _ in 0..2 {
        submit(&engine, small(&model)).wait(1).1.expect("generates");
    }
    assert_eq!(engine.retry_after(), Duration::ZERO, "nothing waits");
    let hold = Hold::default();
    let first = submit(&engine, hold.at(1, small(&model)));
    hold.wait_for(1);
    let second = submit(&engine, small(&model));
    let one = engine.retry_after();
    let third = submit(&engine, small(&model));
    let refused = engine.submit_to(small(&model), |_| {}).expect_err("4 tokens wait, 2 more are 6");
    let Error::Full { what: "source tokens", waiting: 4, limit: 5, retry_after } = refused else {
        panic!("{refused:?}")
    };
    assert!(!one.is_zero() && retry_after == 2 * one && retry_after < Duration::from_secs(60), "{retry_after:?}");
    let batch = Batch::padded(&[vec![5; 6]], 0).expect("well-formed");
    let refused = engine.submit_to(Request::new(batch, small(&model).config), |_| {}).expect_err("6 of 5");
    assert!(matches!(refused, Error::TooLarge { what: "source tokens", needed: 6, limit: 5 }), "{refused}");
    hold.open();
    for told in [first, second, third] {
        told.wait(1).1.expect("generates");
    }
}
