//! `t5gemma bench`: consistent figures, and the request and response files of a harness.

use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use itertools::Itertools as _;
use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::onnx::Blocks;
use t5gemma_graphs::quantization::Quantization;
use t5gemma_runtime::{Batch, Controls, Error, GenerationConfig, GenerationOptions, Model, Streamer};

use crate::common::{exported, exported_as, program, run, stdout};

fn bench(model: &str, arguments: &[&str]) -> Output {
    let model = exported(model);
    run("t5gemma", [&["bench", model.to_str().expect("temporary paths are UTF-8")], arguments].concat(), "")
}

fn manifest(model: &str) -> Value {
    let text = std::fs::read_to_string(exported(model).join("manifest.json")).expect("the model has a manifest");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn the_figures_agree_with_each_other() {
    let arguments =
        ["--json", "--batch-size", "2", "--num-beams", "3", "--source-length", "9", "--max-new-tokens", "6"];
    let report = stdout(bench("tiny-balanced", &[&arguments[..], &["--repeat", "4", "--threads", "1"]].concat()));
    let report: Value = serde_json::from_str(&report).expect("JSON");
    let number = |pointer: &str| {
        let number = report.pointer(pointer).and_then(Value::as_f64);
        number.unwrap_or_else(|| panic!("{pointer} is no number: {report:#}"))
    };
    let case = json!({"batch_size": 2, "num_beams": 3, "source_length": 9, "images": 0, "max_new_tokens": 6,
        "warmup": 1, "repeat": 4, "threads": 1});
    assert_eq!(report["case"], case);
    assert_eq!(report["model"]["parameters"], manifest("tiny-balanced")["parameters"]);

    assert!(0.0 < number("/open_ms") && number("/open_ms") < number("/open_to_first_token_ms"));
    for (times, count) in [("encode_ms", 4.0), ("first_token_ms", 4.0), ("step_ms", 4.0 * 5.0), ("generate_ms", 4.0)] {
        let [min, median, p90, p99] =
            ["min", "median", "p90", "p99"].map(|column| number(&format!("/{times}/{column}")));
        assert!(0.0 < min && min <= median && median <= p90 && p90 <= p99, "{times}: {report:#}");
        assert_eq!(number(&format!("/{times}/count")), count, "{times}");
    }
    let call = number("/generate_ms/min");
    assert!(number("/first_token_ms/min") + 5.0 * number("/step_ms/min") <= call, "{report:#}");
    assert!((number("/tokens_per_second") * number("/generate_ms/median") / 1e3 - 12.0).abs() < 1e-6);

    let share = number("/bandwidth/step_limit_ms") / number("/step_ms/median");
    assert!((number("/bandwidth/share_of_limit") - share).abs() < 1e-9);
    let read = number("/bandwidth/step_weight_bytes") + number("/bandwidth/step_cache_bytes");
    let limit = read / number("/bandwidth/read_bytes_per_second") * 1e3;
    assert!((number("/bandwidth/step_limit_ms") - limit).abs() < 1e-9);
    assert!((1e8..1e13).contains(&number("/bandwidth/read_bytes_per_second")), "{report:#}");

    if cfg!(target_os = "linux") {
        let [peak, resident, anonymous, file_backed] =
            ["peak", "resident", "anonymous", "file_backed"].map(|kind| number(&format!("/memory_bytes/{kind}")));
        assert!(0.0 < anonymous && 0.0 < file_backed && anonymous + file_backed <= resident && resident <= peak);
        // The library alone is some megabytes; the probe's memory does not count.
        assert!((1e6..5e8).contains(&peak), "{report:#}");
    } else {
        assert_eq!(report["memory_bytes"], Value::Null);
    }
}

/// A step reads all weights of its graph, except that it reads only a few rows of an embedding table that is not the
/// head.
#[test]
fn a_step_reads_the_head_but_not_an_embedding_table_of_its_own() {
    for (model, reads_table) in [("tiny-balanced", true), ("tiny-untied", false)] {
        let report = stdout(bench(model, &["--json", "--source-length", "2", "--max-new-tokens", "2"]));
        let report: Value = serde_json::from_str(&report).expect("JSON");
        let manifest = manifest(model);
        let used = manifest["graphs"]["decoder_with_past"]["weights"].as_array().expect("a list");
        let bytes = |wanted: &dyn Fn(&Value) -> bool| {
            let tensors = manifest["weights"]["tensors"].as_array().expect("a list").iter();
            tensors.filter(|tensor| wanted(&tensor["name"])).filter_map(|tensor| tensor["bytes"].as_u64()).sum::<u64>()
        };
        let table = bytes(&|name| name == "model.decoder.embed_tokens.weight");
        let all = bytes(&|name| used.contains(name));
        assert!(0 < table && table < all);
        assert_eq!(report["bandwidth"]["step_weight_bytes"], if reads_table { all } else { all - table }, "{model}");
    }
}

/// The packed head is the embedding table under another name, at the same offset of the weights file.
#[test]
fn a_step_reads_a_tied_table_once() {
    let blocks = Some(Blocks::integer(8, 16));
    let quantization = Quantization { encoder: blocks, decoder: blocks, head: blocks, ..Quantization::default() };
    let export = Export::default().target(Target::Cpu).quantization(quantization);
    let model = exported_as("tiny-balanced", "bench-int8", export);
    let arguments = ["--json", "--source-length", "2", "--max-new-tokens", "2"];
    let output = run("t5gemma", [&["bench", model.to_str().expect("UTF-8")], &arguments[..]].concat(), "");
    let report: Value = serde_json::from_str(&stdout(output)).expect("JSON");
    let text = std::fs::read_to_string(model.join("manifest.json")).expect("the model has a manifest");
    let manifest: Value = serde_json::from_str(&text).expect("JSON");
    let tensors = manifest["weights"]["tensors"].as_array().expect("a list");
    let used = manifest["graphs"]["decoder_with_past"]["weights"].as_array().expect("a list");
    let used = || tensors.iter().filter(|tensor| used.contains(&tensor["name"]));
    let aliases = used().filter(|tensor| !tensor["same_bytes_as"].is_null()).count();
    let once = used().filter(|tensor| tensor["same_bytes_as"].is_null());
    assert!(aliases > 0, "the head is the table");
    let bytes: u64 = once.filter_map(|tensor| tensor["bytes"].as_u64()).sum();
    assert_eq!(report["bandwidth"]["step_weight_bytes"], bytes);
}

#[test]
fn clients_of_an_engine_are_measured() {
    let arguments = ["--clients", "3", "--long-sources", "200", "--source-length", "17", "--max-new-tokens", "6"];
    let more = ["--repeat", "4", "--threads", "1"];
    let report = stdout(bench("tiny-balanced", &[&arguments[..], &more, &["--json"]].concat()));
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!((&report["case"]["clients"], &report["case"]["long_sources"]), (&json!(3), &json!(200)));
    let number = |pointer: &str| report.pointer(pointer).and_then(Value::as_f64).expect(pointer);
    assert_eq!(number("/requests"), 12.0);
    for times in ["queued_ms", "first_token_ms", "request_ms"] {
        assert_eq!(number(&format!("/{times}/count")), 12.0);
        assert!(number(&format!("/{times}/min")) <= number(&format!("/{times}/p99")), "{report:#}");
    }
    assert!(number("/queued_ms/median") <= number("/first_token_ms/median"));
    assert!(number("/first_token_ms/min") <= number("/request_ms/min"));
    // Five gaps between the six tokens of each request, and those of requests that began before.
    assert!((60.0..100.0).contains(&number("/token_gap_ms/count")), "{report:#}");
    assert!(number("/tokens_per_second") * number("/seconds") >= 72.0 && number("/rows_per_step") >= 1.0);
    let table = stdout(bench("tiny-balanced", &[&arguments[..], &more].concat()));
    assert!(table.contains("3 with sources of 3 to 17 tokens, and one with sources of 200"), "{table}");
}

#[test]
fn the_table_says_what_is_not_there() {
    let table = stdout(bench("tiny-balanced", &["--max-new-tokens", "1", "--repeat", "1", "--warmup", "0"]));
    let line = |name: &str| {
        let line = table.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name}: {table}")).trim().to_string()
    };
    assert_eq!(line("  further step"), "not available");
    assert_eq!(line("sources"), "1 of 64 tokens");
    for name in ["model", "open", "  encode", "  first token", "  whole call", "tokens/s", "memory", "memory reads"] {
        assert_ne!(line(name), "", "{name}");
    }
}

#[test]
fn arguments_that_cannot_be_measured_are_refused() {
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--source-length", "100000"], 2, "--source-length: expected at most 512 (encoder.max_position_embeddings)"),
        (&["--max-new-tokens", "512"], 2, "--max-new-tokens: expected less than 512 (decoder.max_position_embeddings)"),
        (&["--num-beams", "0"], 2, "--num-beams"),
        (&["--num-beams", "257"], 2, "--num-beams"),
        (&["--repeat", "0"], 2, "--repeat"),
        (&["--batch-size", "4294967295"], 2, "--batch-size"),
        (&["--clients", "0"], 2, "--clients"),
        (&["--clients", "2", "--batch-size", "2"], 2, "--batch-size"),
        (&["--long-sources", "9"], 2, "--clients"),
        (&["--clients", "2", "--long-sources", "9999"], 2, "--long-sources: expected at most 512"),
        (&["--request", "a.json"], 2, "--response"),
        (&["--response", "a.json"], 2, "--request"),
        (&["--request", "a.json", "--response", "b.json", "--threads", "1"], 2, "--threads"),
        (&["--request", "a.json", "--response", "b.json", "--json"], 2, "--json"),
    ];
    for (arguments, status, says) in cases {
        let output = bench("tiny-untied", arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(*status), "{arguments:?}: {error}");
        assert!(error.contains(says) && output.stdout.is_empty(), "{arguments:?}: {error}");
    }
}

/// Writes a request into a folder and runs it; the response, if there is one.
fn answer(folder: &Path, model: &str, request: &str) -> (Output, Option<Value>) {
    let (from, to) = (folder.join("request.json"), folder.join("response.json"));
    std::fs::write(&from, request).expect("written");
    let paths = [&from, &to].map(|path| path.to_str().expect("temporary paths are UTF-8"));
    let output = bench(model, &["--request", paths[0], "--response", paths[1]]);
    let response = std::fs::read_to_string(&to).ok();
    (output, response.map(|response| serde_json::from_str(&response).expect("JSON")))
}

#[test]
fn a_response_holds_what_the_request_asks_for() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let ragged = json!([[5, 6, 7, 8], [9], [10, 11]]);
    let case = |id: &str, src: &Value, beams: usize, ops: &[&str]| {
        json!({"id": id, "src": src, "beams": beams, "gen": 5, "ops": ops, "tries": 2,
            "repeats": {"encode": 2, "ttft": 1, "generate": 2}})
    };
    let all = ["encode", "ttft", "generate"];
    let request = json!({
        "protocol": 1, "model": "tiny", "threads": 1, "paths": {}, "t0_ns": 0, "decoder_start_token_id": 2,
        "eos_token_id": 1, "pad_token_id": 0, "gate": {"busy": 1.0, "max_wait_s": 1, "total_wait_s": 1},
        "cases": [
            case("greedy", &ragged, 1, &all),
            case("outside", &json!([[5, 999]]), 1, &all),
            case("beams", &ragged, 2, &["ttft", "generate"]),
        ],
    });
    let (output, response) = answer(folder.path(), "tiny-untied", &request.to_string());
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("case \"outside\": input_ids[0][1]: expected a token id below 200"), "{error}");
    let response = response.expect("a case that fails does not cost the others");
    assert_eq!((&response["protocol"], &response["peer"]), (&json!(1), &json!("t5gemma")));
    let ids: Vec<&Value> = response["cases"].as_array().expect("a list").iter().map(|case| &case["id"]).collect();
    assert_eq!(ids, ["greedy", "outside", "beams"]);
    let (loaded, first) = (&response["load"]["loaded_ns"], &response["load"]["first_token_ns"]);
    let mut last = first.as_u64().expect("a time");
    assert!(0 < loaded.as_u64().expect("a time") && loaded.as_u64() < first.as_u64());

    // The same by `generate`.
    let model = exported("tiny-untied");
    let generated = |beams: usize| {
        let sources = ragged.as_array().expect("a list");
        let lines: Vec<String> = sources
            .iter()
            .map(|source| {
                json!({"input_ids": source,
                    "options": {"num_beams": beams, "max_new_tokens": 5, "min_new_tokens": 5, "eos_token_id": 1}})
                .to_string()
            })
            .collect();
        let arguments = ["generate", model.to_str().expect("temporary paths are UTF-8"), "--jsonl"];
        let results = stdout(run("t5gemma", arguments, lines.join("\n")));
        let results = results.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        results.map(|mut result| result["sequences"][0][0].take()).collect::<Vec<_>>()
    };
    for (index, beams, encodes) in [(0, 1, 2), (2, 2, 0)] {
        let case = &response["cases"][index];
        assert_eq!(case.get("error"), None);
        for (op, least, most) in [("encode", encodes, 2 * encodes), ("ttft", 1, 2), ("generate", 2, 4)] {
            let runs = case[op].as_array().expect("a list");
            assert!((least..=most).contains(&runs.len()), "{op}: {runs:?}");
            for run in runs {
                let (start, end) = (run["start_ns"].as_u64().expect("a time"), run["end_ns"].as_u64().expect("a time"));
                assert!(last <= start && start < end, "{op}: {run}");
                last = end;
                let steps = run["steps_ns"].as_array();
                assert_eq!(steps.map(Vec::len), (op == "generate").then_some(5), "{op}: {run}");
                let steps: Vec<u64> = steps.into_iter().flatten().filter_map(Value::as_u64).collect();
                assert!(steps.is_sorted_by(|a, b| a < b) && steps.iter().all(|step| (start..=end).contains(step)));
            }
        }
        let expected = generated(beams);
        let tokens: Vec<&Value> = expected.iter().map(|best| &best["tokens"]).collect();
        assert_eq!(case["ids"].as_array().expect("a list").iter().collect::<Vec<_>>(), tokens);
        match case["scores"].as_array() {
            None => assert_eq!((beams, &case["scores"]), (1, &Value::Null)),
            Some(scores) => {
                for (score, best) in scores.iter().zip_eq(&expected) {
                    let [score, best] = [score, &best["score"]].map(|score| score.as_f64().expect("a number"));
                    assert!((score - best).abs() < 1e-5 && beams == 2, "{score} {best}");
                }
            }
        }
    }
    let failed = &response["cases"][1];
    assert!(failed["error"].is_string() && failed["encode"] == json!([]) && failed.get("ids").is_none(), "{failed}");
}

#[test]
fn a_request_that_cannot_be_read_leaves_no_response() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let case = json!({"id": "a", "src": [[5]], "beams": 1, "gen": 1, "ops": ["ttft"]});
    for (request, says) in [
        ("[".to_string(), "expected JSON: column 1: EOF"),
        (json!({"protocol": 2}).to_string(), "protocol: expected 1, found 2"),
        (json!({"protocol": 1, "cases": [{}]}).to_string(), "cases[0].id: missing"),
        (json!({"protocol": 1, "threads": 5000, "cases": [case]}).to_string(), "threads: expected 1 to 1024"),
        (json!({"protocol": 1, "cases": [case], "eos_token_id": 999}).to_string(), "eos_token_id: expected token ids"),
    ] {
        let (output, response) = answer(folder.path(), "tiny-untied", &request);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{request}: {error}");
        assert!(error.contains(says), "{request}: {error}");
        assert_eq!(response, None);
        assert_eq!(std::fs::read_dir(folder.path()).expect("listed").count(), 1, "only the request is left");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_measurement_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let [request, response] = ["request.json", "response.json"].map(|name| folder.path().join(name));
    let case = json!({"id": "long", "src": [[5]], "beams": 1, "gen": 64, "ops": ["generate"],
        "repeats": {"generate": 1_000_000_000}});
    std::fs::write(&request, json!({"protocol": 1, "cases": [case]}).to_string()).expect("written");
    let mut child = program("t5gemma")
        .arg("bench")
        .arg(exported("tiny-untied"))
        .args(["--request".as_ref(), request.as_path(), "--response".as_ref(), response.as_path()])
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts");
    // Once the response is begun the handler is set.
    while std::fs::read_dir(folder.path()).expect("listed").count() < 2 {
        assert_eq!(child.try_wait().expect("the program runs"), None, "it does not end by itself");
        std::thread::sleep(Duration::from_millis(10));
    }
    let told = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    assert!(told.expect("kill runs").success());
    assert_eq!(child.wait().expect("the program ends").code(), Some(130));
    assert_eq!(std::fs::read_dir(folder.path()).expect("listed").count(), 1, "only the request is left");
}

/// Counts steps, and ends the call after some.
struct Steps {
    seen: usize,
    most: usize,
}

impl Streamer for Steps {
    fn token(&mut self, _: usize, _: i64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn step(&mut self) -> ControlFlow<()> {
        self.seen += 1;
        if self.seen < self.most { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

#[test]
fn a_watch_is_told_of_every_step() {
    let model = Model::open(exported("tiny-untied")).expect("the model opens");
    let batch = Batch::padded(&[vec![5, 6, 7], vec![8]], 0).expect("well-formed");
    for num_beams in [1, 3] {
        let options = GenerationOptions::default().num_beams(num_beams).max_new_tokens(7).min_new_tokens(7);
        let options = GenerationConfig::default().with(&options).expect("valid");
        let steps = |most| {
            let mut steps = Steps { seen: 0, most };
            let result = model.generate_batch(&batch, &options, Controls::default().streamer(&mut steps));
            (result, steps.seen)
        };
        let (result, seen) = steps(usize::MAX);
        assert!(result.is_ok() && seen == 7, "{num_beams} beams: {seen} steps");
        let (result, seen) = steps(3);
        assert!(matches!(result, Err(Error::Cancelled)) && seen == 3, "{num_beams} beams: {seen} steps");
    }
}
