//! Several copies of a model behind one queue, and warm-up runs, with the CPU in place of every device.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use itertools::Itertools as _;
use serde_json::{Value, json};
use t5gemma_exporter::{Alignment, Export, ServingPlan};
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::Logits;
use t5gemma_runtime::{
    Batch, Cancellation, Controls, Engine, EngineOptions, Error, Hypothesis, Model, OpenOptions, Request, WarmUpShape,
};

use crate::common::{Hold, demo, demo_as, exported, exported_as, exported_for, run, stdout, tests};

/// The demo's first texts as requests with various options.
fn requests(count: usize) -> Vec<Value> {
    let text = std::fs::read_to_string(tests().join("demo/expected.json")).expect("expected.json is there");
    let cases: Vec<Value> = serde_json::from_str(&text).expect("a list");
    let options = [json!({}), json!({"num_beams": 3}), json!({"repetition_penalty": 1.2})];
    let request = |(at, case): (usize, &Value)| json!({"text": case["text"], "options": options[at % options.len()]});
    cases.iter().take(count).enumerate().map(request).collect()
}

/// Two copies of a model with a cache in place and two with a growing one.
fn pairs() -> [[Arc<Model>; 2]; 2] {
    let open = |path: &Path| Arc::new(Model::open(path).expect("the model opens"));
    [exported_for("tiny-balanced", Target::Cpu), exported("tiny-balanced")].map(|path| [open(&path), open(&path)])
}

/// A request that takes `steps` steps of `beams` rows for each of its sources.
fn request(model: &Model, sources: usize, steps: usize, beams: usize) -> Request {
    let options = json!({"max_new_tokens": steps, "min_new_tokens": steps, "num_beams": beams});
    let options = model.generation_config().with_json(options.as_object().expect("an object")).expect("valid");
    let source = |at: usize| vec![5 + at as i64, 6, 7];
    Request::new(Batch::padded(&(0..sources).map(source).collect::<Vec<_>>(), 0).expect("valid"), options)
}

fn alone(model: &Model, request: &Request) -> Vec<Vec<Hypothesis>> {
    model.generate_batch(&request.batch, &request.config, Controls::default()).expect("generates")
}

fn tokens(rows: &[Vec<Hypothesis>]) -> Vec<&[i64]> {
    rows.iter().map(|row| &row[0].tokens[..]).collect()
}

#[test]
fn copies_share_one_line_and_none_is_idle_while_a_source_waits() {
    for models in pairs() {
        let model = &models[0];
        let engine = Engine::of_copies(&models, EngineOptions::default().max_rows(2));
        let engine = engine.expect("copies");
        // The sources of one request are spread over both copies.
        let many = request(model, 6, 40, 1);
        let generation = engine.submit(many.clone()).expect("taken");
        assert_eq!(tokens(&generation.wait().expect("answered")), tokens(&alone(model, &many)));
        // Each copy has one source while both are held.
        let hold = Hold::default();
        let pair = engine.submit(hold.at(2, request(model, 2, 40, 2))).expect("taken");
        hold.wait_for(2);
        hold.open();
        pair.wait().expect("answered");
        // While one copy is full, the other serves new requests.
        let short = request(model, 1, 4, 2);
        let expected = alone(model, &short);
        let hold = Hold::default();
        let long = engine.submit(hold.at(2, request(model, 1, 450, 2))).expect("taken");
        hold.wait_for(1);
        for _ in 0..3 {
            let generation = engine.submit(short.clone()).expect("taken");
            assert_eq!(tokens(&generation.wait().expect("answered")), tokens(&expected));
        }
        assert_eq!(engine.stats().finished, 5);
        long.cancel();
        hold.open();
        engine.drain().expect("from outside");
        let stats = engine.stats();
        assert_eq!((stats.submitted, stats.finished, stats.failed), (6, 5, 1));
        assert_eq!((stats.sources, stats.rows, stats.planned_bytes), (0, 0, 0));
        assert!(engine.stats_of_copies().iter().all(|copy| copy.stepped_rows >= 40), "{:?}", engine.stats_of_copies());
        assert!(matches!(engine.submit(many).err(), Some(Error::Closed)));
    }
}

#[test]
fn sources_are_taken_in_the_order_of_their_arrival() {
    for models in pairs() {
        let model = &models[0];
        // Beside four rows there is room for one, which is not for who comes behind four others.
        let engine = Engine::of_copies(&models, EngineOptions::default().max_rows(5));
        let engine = engine.expect("copies");
        let holds = [Hold::default(), Hold::default()];
        let [first, second] = [0, 1].map(|at| {
            let generation = engine.submit(holds[at].at(2, request(model, 1, 40, 4))).expect("taken");
            holds[at].wait_for(1);
            generation
        });
        let large = engine.submit(request(model, 1, 20, 4)).expect("taken");
        let mut small = engine.submit(request(model, 1, 4, 1)).expect("taken");
        assert_eq!(engine.stats().waiting_requests, 2);
        // The second goes on for many steps, beside which there is room for the small one only.
        holds[1].open();
        second.wait().expect("answered");
        small.next().expect("an event").expect("no error");
        assert_eq!(engine.stats().waiting_requests, 0, "the large one was taken first");
        holds[0].open();
        first.wait().expect("answered");
        large.wait().expect("answered");
    }
}

#[test]
fn the_line_of_copies_has_one_bound_and_ends_as_one() {
    for models in pairs() {
        let model = &models[0];
        let bounds = EngineOptions::default().max_rows(1).max_waiting(2);
        let engine = Engine::of_copies(&models, bounds).expect("copies");
        let hold = Hold::default();
        let long = || hold.at(2, request(model, 1, 450, 1));
        let in_flight = [1, 2].map(|held| {
            let generation = engine.submit(long()).expect("taken");
            hold.wait_for(held);
            generation
        });
        let late = long().deadline(Instant::now() + Duration::from_millis(5));
        let late = engine.submit(late).expect("taken");
        let waiting = engine.submit(long()).expect("taken");
        // A waiting caller gets its deadline error although no thread looks.
        assert!(matches!(late.wait(), Err(Error::Deadline)));
        let other = engine.submit(long()).expect("there is room");
        assert!(matches!(engine.submit(long()).err(), Some(Error::Full { waiting: 2, .. })));
        thread::scope(|scope| {
            scope.spawn(|| engine.shutdown().expect("from outside"));
            while !matches!(engine.submit(long()).err(), Some(Error::Closed)) {
                thread::yield_now();
            }
            hold.open();
        });
        for generation in in_flight.into_iter().chain([waiting, other]) {
            assert!(matches!(generation.wait(), Err(Error::Cancelled)));
        }
        let stats = engine.stats();
        assert_eq!((stats.submitted, stats.failed, stats.waiting_sources, stats.rows), (5, 5, 0, 0));
        assert!(matches!(engine.submit(long()).err(), Some(Error::Closed)));
    }
}

#[test]
fn only_copies_share_a_line() {
    let none: Option<Error> = Engine::of_copies(&[], EngineOptions::default()).err();
    assert!(none.expect("no model").to_string().contains("models: expected at least one"));
    let [[model, _], [other, _]] = pairs();
    let error = Engine::of_copies(&[model, other], EngineOptions::default()).expect_err("two models");
    assert!(error.to_string().contains("models[1]: expected a copy of models[0]"), "{error}");
}

#[test]
fn several_devices_answer_in_order_what_one_answers() {
    let lines: String = requests(10).iter().map(|request| request.to_string() + "\n").collect();
    for target in [Target::Cpu, Target::TensorRt] {
        let model = demo_as(target.name(), Export::default().target(target));
        let model = model.to_str().expect("temporary paths are UTF-8");
        let answers = |devices: &str| -> Vec<Value> {
            let output = stdout(run("t5gemma", ["generate", model, "--jsonl", "--device", devices], &lines));
            let answers = output.lines().map(|line| serde_json::from_str::<Value>(line).expect("a JSON line"));
            answers.map(|answer| json!([answer["id"], answer["sequences"][0][0]["tokens"]])).collect()
        };
        assert_eq!(answers("0,0"), answers("0"), "{target:?}");
    }
    let model = demo();
    let model = model.to_str().expect("temporary paths are UTF-8");
    for (arguments, code, word) in [
        (&["generate", model, "--jsonl", "--device", "0,1"][..], 2, "--device 1 requires a provider with devices"),
        (&["generate", model, "--device", "0,0", "text"], 2, "--device: expected one GPU, found 2"),
        (
            &["generate", model, "--jsonl", "--device", "0,0", "--max-batch-tokens", "9"],
            2,
            "--device: expected one GPU",
        ),
        (&["score", model, "--device", "0,0"], 2, "--device: expected one GPU, found 2"),
        (&["generate", model, "--device", "0,x"], 2, "invalid value"),
    ] {
        let output = run("t5gemma", arguments, "");
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(word), "{arguments:?}: {error}");
    }
}

#[test]
fn the_first_runs_are_those_of_the_plan() {
    let plan = Some("batch=1..4,source=1..24..32,target=16,beams=1..2".parse::<ServingPlan>().expect("a plan"));
    let export = Export::default().target(Target::TensorRt).capacity(16).plan(plan).logits(Logits::Candidates(8));
    let planned = exported_as("tiny-balanced", "warm", export);
    let cases = [
        (planned, WarmUpShape { batch: 4, source: 24, beams: 2 }),
        (exported_for("tiny-balanced", Target::Cuda), WarmUpShape { batch: 1, source: 64, beams: 1 }),
        (exported("tiny-untied"), WarmUpShape { batch: 1, source: 64, beams: 1 }),
    ];
    for (path, expected) in cases {
        let batch = Batch::padded(&[vec![5, 6, 7, 8]], 0).expect("valid");
        let answer = |model: &Model| {
            let options = json!({"max_new_tokens": 8, "num_beams": 2});
            let options = model.generation_config().with_json(options.as_object().expect("an object")).expect("valid");
            model.generate_batch(&batch, &options, Controls::default()).expect("generates")
        };
        let [cold, warm] = [(); 2].map(|()| Model::open(&path).expect("the model opens"));
        assert_eq!(warm.warm_up(&Cancellation::new()).expect("runs"), expected);
        assert_eq!(answer(&warm), answer(&cold), "{}", path.display());
        let stopped = Cancellation::new();
        stopped.cancel();
        assert!(matches!(warm.warm_up(&stopped), Err(t5gemma_runtime::Error::Cancelled)));
    }
    let model = demo();
    let model = model.to_str().expect("temporary paths are UTF-8");
    let text = "May 3rd.";
    let [warm, cold] =
        [&["--warm-up"][..], &[]].map(|flag| stdout(run("t5gemma", [&["generate", model, text], flag].concat(), "")));
    assert_eq!(warm, cold);
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let file = folder.path().join("states.safetensors");
    let file = file.to_str().expect("temporary paths are UTF-8");
    let refused = run("t5gemma", ["encode", model, "--warm-up", "-o", file, text], "");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--warm-up requires a command that generates"));
}

/// A folder with the files of a model, and its answers before and after its weights file is overwritten with zeros.
fn answers_around_a_lost_file(target: Target) -> [Option<Vec<Vec<i64>>>; 2] {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let from = exported_for("tiny-balanced", target);
    for entry in fs::read_dir(from).expect("a model") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copied");
    }
    let options = OpenOptions::default().encoder_cache_bytes(0);
    let model = Model::open_with(folder.path(), &options).expect("the model opens");
    let wanted = request(&model, 2, 12, 2);
    let answer = || {
        let found = model.generate_batch(&wanted.batch, &wanted.config, Controls::default());
        found.ok().map(|rows| tokens(&rows).into_iter().map(<[i64]>::to_vec).collect())
    };
    let before = answer();
    let weights = folder.path().join(&model.manifest().weights.file);
    let bytes = fs::metadata(&weights).expect("there").len() as usize;
    let mut file = fs::OpenOptions::new().write(true).open(weights).expect("writable");
    file.write_all(&vec![0; bytes]).expect("written");
    [before, answer()]
}

#[test]
fn a_device_has_a_copy_of_the_weights_that_all_graphs_read() {
    let [before, after] = answers_around_a_lost_file(Target::Cuda);
    assert!(before.is_some() && before == after, "{before:?}, {after:?}");
    // A model for the CPU reads the mapped file itself.
    let [before, after] = answers_around_a_lost_file(Target::Cpu);
    assert!(before.is_some() && before != after, "{before:?}, {after:?}");
}

#[test]
fn steps_in_memory_that_stays_give_what_others_do() {
    let open = |export: Export, label: &str, fixed_step_buffers: bool| {
        let path = exported_as("tiny-balanced", &format!("steady-{label}"), export);
        let options = OpenOptions::default().fixed_step_buffers(fixed_step_buffers);
        Arc::new(Model::open_with(path, &options).expect("the model opens"))
    };
    let export = |logits: Logits, alignment: Alignment| {
        Export::default().target(Target::Cuda).logits(logits).alignment(alignment)
    };
    let wanted = [
        json!({"max_new_tokens": 40}),
        // Beyond the initial capacity, and the next one.
        json!({"max_new_tokens": 200, "min_new_tokens": 200}),
        json!({"max_new_tokens": 30, "do_sample": true, "seed": 7, "num_return_sequences": 2}),
        json!({"max_new_tokens": 30, "num_beams": 3}),
        json!({"max_new_tokens": 30, "num_beams": 4, "num_return_sequences": 2}),
        json!({"max_new_tokens": 30, "repetition_penalty": 1.3, "output_logprobs": true}),
    ];
    let source = |length: usize| (0..length).map(|at| 5 + (at * 37 % 190) as i64).collect::<Vec<_>>();
    let batches = [vec![3], vec![5, 64, 1], vec![65, 20], vec![3]]
        .map(|lengths| Batch::padded(&lengths.into_iter().map(source).collect::<Vec<_>>(), 0).expect("valid"));
    for (logits, alignment, label) in [
        (Logits::Last, Alignment::None, "last"),
        (Logits::Candidates(12), Alignment::None, "candidates"),
        (Logits::All, Alignment::AllLayers, "alignment"),
    ] {
        let is_attending = alignment != Alignment::None;
        let [moving, steady] = [false, true].map(|steady| open(export(logits, alignment.clone()), label, steady));
        let mut requests = Vec::new();
        for (batch, wanted) in batches.iter().flat_map(|batch| wanted.iter().map(move |wanted| (batch, wanted))) {
            let mut wanted = wanted.as_object().expect("an object").clone();
            if is_attending {
                wanted.insert("output_attentions".into(), json!(true));
                wanted.insert("prompt_lookup_num_tokens".into(), json!(3));
                wanted.retain(|name, _| !name.starts_with("num_") && name != "do_sample" && name != "seed");
            }
            // Drafts require a single source.
            if batch.rows() > 1 {
                wanted.remove("prompt_lookup_num_tokens");
            }
            let options = moving.generation_config().with_json(&wanted).expect("valid");
            requests.push(Request::new(batch.clone(), options));
        }
        let check = |found: &[Vec<Hypothesis>], expected: &[Vec<Hypothesis>], name: &str| {
            for (found, expected) in found.iter().flatten().zip_eq(expected.iter().flatten()) {
                assert_eq!(found.tokens, expected.tokens, "{label} {name}");
                assert_eq!(found.score.is_some(), expected.score.is_some(), "{label} {name}");
                let apart = found.score.zip(expected.score).map_or(0.0, |(a, b)| (a - b).abs());
                assert!(apart < 1e-4, "{label} {name}: {apart}");
                let [found, expected] = [found, expected].map(|hypothesis| &hypothesis.cross_attentions);
                assert_eq!(found.is_some(), is_attending);
                if let (Some(found), Some(expected)) = (found, expected) {
                    assert_eq!(found.source_length(), expected.source_length());
                    assert_eq!(found.values().len(), expected.values().len());
                    let numbers = found.values().iter().zip_eq(expected.values());
                    assert!(numbers.into_iter().all(|(a, b)| (a - b).abs() < 1e-5), "{label} {name}");
                }
            }
        };
        let expected: Vec<_> = requests.iter().map(|request| alone(&moving, request)).collect();
        for (at, (request, expected)) in requests.iter().zip_eq(&expected).enumerate() {
            check(&alone(&steady, request), expected, &format!("request {at}"));
        }
        // Buffers are kept for a limited number of sizes, and only if requested.
        let sizes = steady.fixed_buffer_sets();
        assert!((2..=8).contains(&sizes) && moving.fixed_buffer_sets() == 0, "{sizes}");
        alone(&steady, &requests[0]);
        let again = steady.fixed_buffer_sets();
        alone(&steady, &requests[0]);
        assert_eq!(steady.fixed_buffer_sets(), again, "it serves the next request");
        // Concurrent requests have their own buffers.
        if !is_attending {
            let engine = Engine::new(steady.clone(), EngineOptions::default()).expect("an engine");
            let generations: Vec<_> =
                requests.iter().map(|request| engine.submit(request.clone()).expect("taken")).collect();
            for (at, (generation, expected)) in generations.into_iter().zip_eq(&expected).enumerate() {
                check(&generation.wait().expect("answered"), expected, &format!("request {at} of many"));
            }
        }
    }
    let options = OpenOptions::default().fixed_step_buffers(true);
    let refused = Model::open_with(exported("tiny-balanced"), &options).expect_err("it has no such cache");
    assert!(refused.to_string().contains("fixed_step_buffers true requires a cache in place"), "{refused}");
}
