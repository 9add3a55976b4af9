//! Several copies of a model behind one door, and first runs before anybody waits: with the CPU for every device.

use std::sync::Arc;

use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::Logits;
use t5gemma_runtime::{Batch, Cancellation, EngineOptions, Fleet, Model, Request, Usual};

use crate::common::{demo, demo_as, exported, exported_as, exported_for, run, stdout, tests};

/// The demo's first texts as requests with various options.
fn requests(count: usize) -> Vec<Value> {
    let text = std::fs::read_to_string(tests().join("demo/expected.json")).expect("expected.json is there");
    let cases: Vec<Value> = serde_json::from_str(&text).expect("a list");
    let options = [json!({}), json!({"num_beams": 3}), json!({"repetition_penalty": 1.2})];
    let request = |(at, case): (usize, &Value)| json!({"text": case["text"], "options": options[at % options.len()]});
    cases.iter().take(count).enumerate().map(request).collect()
}

#[test]
fn two_engines_answer_as_one_does_and_share_the_work() {
    let path = demo_as("cpu", Export { target: Target::Cpu, ..Export::default() });
    let models: Vec<Arc<Model>> = (0..2).map(|_| Arc::new(Model::open(&path).expect("the model opens"))).collect();
    let fleet = Fleet::new(&models, &EngineOptions { max_rows: 8, ..EngineOptions::default() }).expect("copies");
    let model = &models[0];
    let tokenizer = model.tokenizer().expect("a tokenizer");
    let submitted: Vec<_> = (requests(12).iter())
        .map(|request| {
            let source = tokenizer.encode(request["text"].as_str().expect("a text")).expect("encoded");
            let batch = Batch::padded(&[source], 0).expect("valid");
            let options = model.options().with(request["options"].as_object().expect("an object")).expect("valid");
            let generation = fleet.submit(Request::new(batch.clone(), options.clone())).expect("taken");
            (batch, options, generation)
        })
        .collect();
    for (batch, options, generation) in submitted {
        let found = generation.wait().expect("answered");
        let expected = model.generate(&batch, &options, &mut (), &Cancellation::new()).expect("generates");
        let tokens = |rows: &[Vec<t5gemma_runtime::Hypothesis>]| rows[0][0].tokens.clone();
        assert_eq!(tokens(&found), tokens(&expected));
    }
    fleet.drain();
    let stats = fleet.stats();
    assert_eq!(stats.iter().map(|stats| stats.finished).sum::<u64>(), 12);
    assert!(stats.iter().all(|stats| stats.finished >= 3), "{stats:?}");

    assert!(Fleet::new(&[], &EngineOptions::default()).is_err());
    let other = Arc::new(Model::open(exported("tiny-balanced")).expect("the model opens"));
    let error = Fleet::new(&[models[0].clone(), other], &EngineOptions::default()).err().expect("two models");
    assert!(error.to_string().contains("models[1]: expected a copy of models[0]"), "{error}");
}

#[test]
fn several_devices_answer_in_order_what_one_answers() {
    let lines: String = requests(10).iter().map(|request| request.to_string() + "\n").collect();
    for target in [Target::Cpu, Target::TensorRt] {
        let model = demo_as(target.name(), Export { target, ..Export::default() });
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
        (&["generate", model, "--jsonl", "--device", "0,1"][..], 1, "found cpu with device 1"),
        (&["generate", model, "--device", "0,0", "text"], 1, "--device: expected one number, found 2"),
        (
            &["generate", model, "--jsonl", "--device", "0,0", "--max-batch-tokens", "9"],
            1,
            "--device: expected one number",
        ),
        (&["score", model, "--device", "0,0"], 1, "--device: expected one number, found 2"),
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
    let plan = Some("batch=1..4,source=1..24..32,target=16,beams=1..2".parse().expect("a plan"));
    let export = Export {
        target: Target::TensorRt,
        capacity: Some(16),
        plan,
        logits: Logits::Candidates(8),
        ..Export::default()
    };
    let planned = exported_as("tiny-balanced", "warm", export);
    let cases = [
        (planned, Usual { batch: 4, source: 24, beams: 2 }),
        (exported_for("tiny-balanced", Target::Cuda), Usual { batch: 1, source: 64, beams: 1 }),
        (exported("tiny-untied"), Usual { batch: 1, source: 64, beams: 1 }),
    ];
    for (path, expected) in cases {
        let batch = Batch::padded(&[vec![5, 6, 7, 8]], 0).expect("valid");
        let answer = |model: &Model| {
            let options = json!({"max_new_tokens": 8, "num_beams": 2});
            let options = model.options().with(options.as_object().expect("an object")).expect("valid");
            model.generate(&batch, &options, &mut (), &Cancellation::new()).expect("generates")
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
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--warm-up: expected a command that generates"));
}
