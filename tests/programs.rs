//! The programs as users and other programs run them: what they print where, exit codes, and the order of results.

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use itertools::Itertools as _;
use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::onnx::Blocks;
use t5gemma_graphs::quantization::Quantization;

use crate::common::{demo, demo_as, exported, exported_as, fixture, instruction_levels, program, run, stdout};

#[test]
fn generate_answers_arguments_and_lines_alike() {
    let model = demo();
    let model = model.to_str().expect("temporary paths are UTF-8");
    let texts = ["Room 12 is 5 km away.", "Dr. Lee paid $3.50.", "It is 3:05 pm."];
    let from_arguments = stdout(run("t5gemma", [&["generate", model], &texts[..]].concat(), ""));
    let from_lines = stdout(run("t5gemma", ["generate", model], &(texts.join("\n") + "\n")));
    assert_eq!(from_arguments, from_lines);
    assert_eq!(from_arguments.lines().count(), texts.len());
    let beams = ["generate", model, "--num-beams", "4", "--num-return-sequences", "3", texts[0]];
    assert_eq!(stdout(run("t5gemma", beams, "")).lines().count(), 3);
}

/// `t5gemma generate --jsonl` waiting for requests, with its stdin and the lines of its stdout.
fn serving() -> (Child, ChildStdin, Lines<BufReader<ChildStdout>>) {
    let mut child = program("t5gemma")
        .arg("generate")
        .arg(exported("tiny-balanced"))
        .arg("--jsonl")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let stdin = child.stdin.take().expect("piped");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    (child, stdin, lines)
}

#[test]
fn a_result_is_written_before_the_next_request_is_read() {
    let (mut child, mut stdin, mut lines) = serving();
    for id in ["first", "second", "third"] {
        writeln!(stdin, "{}", json!({"id": id, "input_ids": [5, 6, 7]})).expect("the program reads");
        stdin.flush().expect("the program reads");
        let line = lines.next().expect("a result").expect("a line");
        let result: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(result["id"], id);
    }
    drop(stdin);
    assert!(child.wait().expect("the program ends").success());
}

#[test]
fn results_come_in_order_whatever_the_batches() {
    let requests: Vec<String> = (0..23)
        .map(|i| {
            let source: Vec<i64> = (3..5 + i % 7).collect();
            let options = if i % 3 == 0 { json!({"num_beams": 2}) } else { json!({}) };
            json!({"id": format!("r{i}"), "input_ids": source, "options": options}).to_string()
        })
        .collect();
    let model = exported("tiny-untied");
    let model = model.to_str().expect("temporary paths are UTF-8");
    let answers = |batch_size: &str| {
        let arguments = ["generate", model, "--jsonl", "--batch-size", batch_size];
        stdout(run("t5gemma", arguments, requests.join("\n")))
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).expect("JSON"))
            .map(|result| (result["id"].clone(), result["sequences"][0][0]["tokens"].clone()))
            .collect::<Vec<_>>()
    };
    let (one_by_one, batched) = (answers("1"), answers("8"));
    assert_eq!(one_by_one, batched);
    assert!(one_by_one.iter().enumerate().all(|(i, (id, _))| *id == format!("r{i}")));
}

#[test]
fn usage_counts_what_took_part_and_what_was_generated() {
    let model = exported("tiny-untied");
    let model = model.to_str().expect("temporary paths are UTF-8");
    let request = json!({"input_ids": [[5, 6, 0], [7, 0, 0]], "attention_mask": [[1, 1, 0], [1, 0, 0]],
        "options": {"max_new_tokens": 3, "min_new_tokens": 3}});
    let result: Value =
        serde_json::from_str(&stdout(run("t5gemma", ["generate", model, "--jsonl"], request.to_string())))
            .expect("JSON");
    assert_eq!(result["id"], 0);
    assert_eq!(result["usage"], json!({"source_tokens": 3, "target_tokens": 6}));
    assert_eq!(result["sequences"][1][0]["finish_reason"], "length");
}

#[test]
fn encode_writes_npy_for_one_and_safetensors_for_many() {
    let model = demo();
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let (npy, many) = (folder.path().join("one.npy"), folder.path().join("many.safetensors"));
    let encode = |out: &std::path::Path, texts: &[&str]| {
        let arguments = ["encode".as_ref(), model.as_path(), "--output".as_ref(), out];
        run("t5gemma", arguments.into_iter().chain(texts.iter().map(|text| text.as_ref())), "")
    };
    stdout(encode(&npy, &["one text"]));
    assert!(std::fs::read(&npy).expect("written").starts_with(b"\x93NUMPY"));
    stdout(encode(&many, &["one text", "and another"]));
    let bytes = std::fs::read(&many).expect("written");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let mut names = tensors.names();
    names.sort();
    let parts = ["attention_mask", "input_ids", "last_hidden_state"];
    assert_eq!(names, ["0", "1"].map(|id| parts.map(|part| format!("{id}.{part}"))).as_flattened());

    let refused = encode(&folder.path().join("two.npy"), &["one text", "and another, which is longer"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(!folder.path().join("two.npy").exists());
}

/// A fixture exported with another `generation_config.json`.
fn with_settings(folder: &Path, settings: Value) -> PathBuf {
    let (checkpoint, out) = (folder.join("checkpoint"), folder.join("model"));
    std::fs::create_dir(&checkpoint).expect("a new folder");
    for name in ["config.json", "model.safetensors"] {
        let from = fixture("tiny-balanced").join("checkpoint").join(name);
        std::fs::copy(from, checkpoint.join(name)).expect("the fixture is there");
    }
    std::fs::write(checkpoint.join("generation_config.json"), settings.to_string()).expect("written");
    stdout(run("t5gemma-export", [&checkpoint, &out], ""));
    out
}

#[test]
fn a_model_that_asks_for_sampling_samples_unless_told_not_to() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = with_settings(folder.path(), json!({"do_sample": true, "top_k": 64, "eos_token_id": [1, 999]}));
    let request = json!({"input_ids": [5, 6]}).to_string();
    let generate = |flags: &[&str]| {
        let arguments = ["generate".as_ref(), model.as_os_str(), "--jsonl".as_ref()];
        run("t5gemma", arguments.into_iter().chain(flags.iter().map(|flag| flag.as_ref())), &request)
    };
    let result = |flags: &[&str]| serde_json::from_str::<Value>(&stdout(generate(flags))).expect("a result");
    let sampled = result(&[]);
    let seed = sampled["seed"].as_u64().expect("a result tells what it drew from").to_string();
    assert_eq!(result(&["--seed", &seed])["sequences"], sampled["sequences"]);
    assert!(result(&["--do-sample", "false"]).get("seed").is_none());
    stdout(run("t5gemma", ["verify".as_ref(), model.as_path()], ""));
}

/// Logits processors act on logits in greedy search and on log-probabilities in beam search, which `verify` compares.
#[test]
fn verify_looks_past_a_models_processors() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = with_settings(folder.path(), json!({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}));
    stdout(run("t5gemma", ["verify".as_ref(), model.as_path()], ""));
}

#[test]
fn a_result_does_not_depend_on_its_neighbours_padding() {
    let model = exported("tiny-balanced");
    let model = model.to_str().expect("temporary paths are UTF-8");
    let options = json!({"encoder_repetition_penalty": 5.0, "max_new_tokens": 12});
    let short = json!({"input_ids": [5, 6, 7], "options": options}).to_string();
    let long = json!({"input_ids": [9, 8, 7, 6, 5, 4, 3, 9, 9], "options": options}).to_string();
    let tokens = |lines: &[&str]| {
        let output = stdout(run("t5gemma", ["generate", model, "--jsonl"], lines.join("\n")));
        let first: Value = serde_json::from_str(output.lines().next().expect("a result")).expect("JSON");
        first["sequences"][0][0]["tokens"].clone()
    };
    assert_eq!(tokens(&[&short]), tokens(&[&short, &long]));
}

#[test]
fn a_request_and_the_flags_do_not_contradict_each_other_in_silence() {
    let model = exported("tiny-balanced");
    let model = model.to_str().expect("temporary paths are UTF-8");
    let answer = |options: Value| {
        let request = json!({"input_ids": [5, 6], "options": options}).to_string();
        let output = run("t5gemma", ["generate", model, "--jsonl", "--max-new-tokens", "3"], &request);
        serde_json::from_slice::<Value>(&output.stdout).expect("JSON")
    };
    let refused = answer(json!({"max_length": 4}));
    assert!(refused["error"].as_str().is_some_and(|error| error.starts_with("options.max_length: ")), "{refused}");
    let kept = answer(json!({"max_new_tokens": null}));
    assert_eq!(kept["usage"]["target_tokens"], 3, "a null leaves the flag as it is");
}

#[cfg(unix)]
#[test]
fn an_idle_program_ends_when_it_is_told_to() {
    let (mut child, mut stdin, mut lines) = serving();
    writeln!(stdin, "{}", json!({"input_ids": [5]})).expect("the program reads");
    lines.next().expect("a result").expect("a line");
    let told = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    assert!(told.expect("kill runs").success());
    // Its stdin is open still: only the signal can end it.
    assert_eq!(child.wait().expect("the program ends").code(), Some(130));
    drop(stdin);
}

#[test]
fn an_id_given_twice_costs_only_its_own_request() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let out = folder.path().join("states.safetensors");
    let lines = r#"{"id": "x", "input_ids": [5]}
{"id": "x", "input_ids": [6]}
{"id": "y", "input_ids": [7]}"#;
    let model = exported("tiny-balanced");
    let arguments = ["encode".as_ref(), model.as_path(), "--jsonl".as_ref(), "-o".as_ref(), out.as_path()];
    let output = run("t5gemma", arguments, lines);
    assert_eq!(output.status.code(), Some(1));
    let bytes = std::fs::read(&out).expect("written");
    assert_eq!(safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file").len(), 2 * 3);
    assert_eq!(std::fs::read_dir(folder.path()).expect("listed").count(), 1, "nothing else is left");
}

#[test]
fn doctor_names_the_library_it_uses() {
    let report = stdout(run("t5gemma", ["doctor"], ""));
    assert!(report.contains("using ") && report.contains("CPUExecutionProvider"), "{report}");
    let model = exported("tiny-balanced");
    let model = model.to_str().expect("temporary paths are UTF-8");
    let report = stdout(run("t5gemma", ["doctor", model], ""));
    assert!(report.ends_with(&format!("{model} runs: encoder, decoder, decoder_with_past\n")), "{report}");
}

#[test]
fn older_instructions_give_the_same_answers() {
    let int8 = Blocks::integer(8, 128);
    let quantization =
        Quantization { encoder: Some(int8), decoder: Some(int8), head: Some(int8), ..Quantization::default() };
    let export = |quantization| Export::default().target(Target::Cpu).quantization(quantization);
    let models =
        [demo_as("instructions", export(Quantization::default())), demo_as("instructions-int8", export(quantization))];
    let lines = std::fs::read_to_string(crate::common::tests().join("scripts/demo.txt")).expect("it is there");
    let answers = |model: &Path, limit: &str| {
        let mut command = program("t5gemma");
        command.arg("generate").arg(model).args(lines.lines()).args(["--num-beams", "2"]);
        command.env("T5GEMMA_MAX_CPU_ISA", limit).output().expect("the program starts")
    };
    let levels = instruction_levels();
    let (newest, older) = levels.split_last().expect("every processor has the lowest level");
    for model in &models {
        let expected = stdout(answers(model, newest));
        for level in older {
            assert_eq!(stdout(answers(model, level)), expected, "{}: {level} and {newest}", model.display());
        }
    }
    let refused = answers(&models[0], "avx3");
    let message = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && message.contains("T5GEMMA_MAX_CPU_ISA: expected generic, avx2"), "{message}");
}

/// ONNX Runtime would write a database of events into the user's cache folder, and start a thread to send them.
#[test]
fn running_a_model_records_no_telemetry() {
    let home = tempfile::tempdir().expect("a folder");
    let mut command = program("t5gemma");
    command.arg("generate").arg(demo()).arg("hello there").env("HOME", home.path());
    for variable in ["ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI", "GITHUB_ACTIONS", "TF_BUILD"] {
        command.env_remove(variable);
    }
    stdout(command.output().expect("the program starts"));
    let left: Vec<_> = home.path().read_dir().expect("a folder").map(|entry| entry.expect("readable").path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_closed_pipe_is_success() {
    let mut child = program("t5gemma-export")
        .arg("inspect")
        .arg(exported("tiny-balanced"))
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(child.stdout.take());
    assert!(child.wait().expect("the program ends").success());
}

/// Messages are for people, and a result does not depend on them.
#[test]
fn a_stderr_that_cannot_be_written_changes_neither_results_nor_exit_codes() {
    let model = demo();
    let model = model.to_str().expect("temporary paths are UTF-8");
    let checkpoint = fixture("tiny-balanced").join("checkpoint");
    let checkpoint = checkpoint.to_str().expect("paths of the repository are UTF-8");
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let out = folder.path().join("out");
    let out = out.to_str().expect("temporary paths are UTF-8");
    let cases: [(&str, &[&str], i32); 11] = [
        ("t5gemma-export", &[checkpoint, out, "--target", "cpu", "--overwrite"], 0),
        ("t5gemma-export", &["check", out], 1),
        ("t5gemma-export", &["reseal", out], 0),
        ("t5gemma-export", &["inspect", "nope"], 1),
        ("t5gemma-export", &[checkpoint, out], 1),
        ("t5gemma-export", &[checkpoint, out, "--unknown"], 2),
        ("t5gemma", &["generate", "nope", "x"], 1),
        ("t5gemma", &["generate", model, "--num-beams", "0", "x"], 2),
        ("t5gemma", &["generate", model, "--max-new-tokens", "2", "x"], 0),
        ("t5gemma", &["score", model, "--unknown"], 2),
        ("t5gemma", &["encode", model, "x", &"y ".repeat(5000), "-o", &format!("{out}.safetensors")], 1),
    ];
    let closed = || {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        Stdio::from(writer)
    };
    let full = || Stdio::from(std::fs::OpenOptions::new().write(true).open("/dev/full").expect("a Linux device"));
    for (name, arguments, expected) in cases {
        for (what, stderr) in [("closed", closed()), ("full", full())] {
            let ended = program(name).args(arguments).stdin(Stdio::null()).stderr(stderr).output().expect("it runs");
            assert_eq!(ended.status.code(), Some(expected), "{name} {arguments:?}, {what}");
        }
    }
    // As `2>&1 | head -0`: nobody reads the findings, nor that there are any.
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let both = writer.try_clone().expect("a pipe");
    let ended = program("t5gemma-export").args(["check", out]).stdout(writer).stderr(both).status().expect("it runs");
    assert_eq!(ended.code(), Some(0));
}

#[test]
fn the_smallest_official_size_exports_and_generates() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let out = folder.path().join("s-s");
    let out = out.to_str().expect("temporary paths are UTF-8");
    stdout(run("t5gemma-export", ["--dummy-weights", "--preset", "s-s", out], ""));
    let request = json!({"input_ids": [2, 651, 4320, 8426], "options": {"max_new_tokens": 4, "min_new_tokens": 4}});
    let result: Value =
        serde_json::from_str(&stdout(run("t5gemma", ["generate", out, "--jsonl"], request.to_string()))).expect("JSON");
    assert_eq!(result["sequences"][0][0]["tokens"].as_array().map(Vec::len), Some(4), "{result}");
}

#[test]
fn packed_requests_are_answered_in_order_and_as_alone() {
    let lines = std::fs::read_to_string(crate::common::tests().join("scripts/demo.txt")).expect("the lines are there");
    let lines = [&*lines, "It is 3:05 pm.\n", "Room 12 is 5 km away.\n", "\u{1}\n"].concat();
    let model = crate::common::demo();
    let run_with = |command: &str, more: &[&str], stdin: &str| {
        let arguments = [&[command, model.to_str().expect("temporary paths are UTF-8")], more].concat();
        stdout(run("t5gemma", arguments, stdin))
    };
    let alone = run_with("generate", &["--batch-size", "1"], &lines);
    for packing in [["--max-batch-tokens", "60"], ["--max-batch-tokens", "9999"]] {
        assert_eq!(run_with("generate", &packing, &lines), alone, "{packing:?}");
    }

    // Other options, several sources, prompts, and lines that are no requests, all among each other.
    let request = |(at, text): (usize, &str)| match at % 5 {
        0 => json!({"id": at, "text": text}).to_string(),
        1 => json!({"id": at, "text": text, "options": {"num_beams": 2}}).to_string(),
        2 => json!({"id": at, "text": [text, "Room 7."]}).to_string(),
        3 => json!({"id": at, "text": text, "options": {"num_beam": 2}}).to_string(),
        _ => json!({"id": at, "text": text, "decoder_text": "the"}).to_string(),
    };
    let requests: Vec<String> = lines.lines().enumerate().map(request).collect();
    let program = |more: &[&str]| -> Vec<Value> {
        let arguments = [&["generate", model.to_str().expect("temporary paths are UTF-8"), "--jsonl"], more].concat();
        let output = run("t5gemma", arguments, requests.join("\n"));
        let texts = |line: &str| {
            let result: Value = serde_json::from_str(line).expect("JSON");
            let sequences = result["sequences"].as_array().cloned().unwrap_or_default();
            let texts: Vec<Value> = sequences.iter().map(|row| row[0]["text"].clone()).collect();
            json!([result["id"], result["error"], texts])
        };
        String::from_utf8_lossy(&output.stdout).lines().map(texts).collect()
    };
    let expected = program(&["--batch-size", "1"]);
    assert_eq!(program(&["--max-batch-tokens", "50"]), expected);
    assert_eq!(program(&["--max-batch-tokens", "50", "--batch-size", "2"]), expected);

    let targets = |(at, text): (usize, &str)| json!({"id": at, "text": text, "target": "room seven"}).to_string();
    let targets: Vec<String> = lines.lines().enumerate().map(targets).collect();
    let scores = |more: &[&str]| -> Vec<(Value, f64)> {
        let read = |line: &str| {
            let result: Value = serde_json::from_str(line).expect("JSON");
            (result["id"].clone(), result["scores"][0]["logprob"].as_f64().expect("a number"))
        };
        run_with("score", more, &targets.join("\n")).lines().map(read).collect()
    };
    for (found, expected) in scores(&["--max-batch-tokens", "70"]).into_iter().zip_eq(scores(&["--batch-size", "1"])) {
        assert_eq!(found.0, expected.0);
        assert!((found.1 - expected.1).abs() < 1e-3, "{found:?}, expected {expected:?}");
    }

    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let vectors = |name: &str, more: &[&str]| {
        let file = folder.path().join(name);
        let output = ["-o", file.to_str().expect("temporary paths are UTF-8"), "--pooling", "mean"];
        run_with("encode", &[&output, more].concat(), &lines);
        let bytes = std::fs::read(file).expect("written");
        let floats =
            bytes[bytes.len() % 4..].chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().expect("4")));
        floats.collect::<Vec<f32>>()
    };
    let (packed, alone) = (vectors("a.npy", &["--max-batch-tokens", "70"]), vectors("b.npy", &["--batch-size", "1"]));
    assert_eq!(packed.len(), alone.len());
    // The header is the same bytes, whatever they are as numbers.
    assert!(packed.iter().zip_eq(&alone).all(|(a, b)| a.to_bits() == b.to_bits() || (a - b).abs() < 1e-4));
}

#[test]
fn verify_tells_how_far_two_models_are_apart() {
    let own = exported("tiny-balanced");
    let fewer = {
        let blocks = |bits| Some(Blocks::integer(bits, 16));
        let quantization = |bits| Quantization {
            encoder: blocks(bits),
            decoder: blocks(bits),
            head: blocks(bits),
            ..Quantization::default()
        };
        let export = |bits| Export::default().target(Target::Cpu).quantization(quantization(bits));
        [8, 4].map(|bits| exported_as("tiny-balanced", &format!("apart-{bits}"), export(bits)))
    };
    let report = |model: &Path, other: &Path| -> Value {
        let arguments =
            ["verify".as_ref(), model.as_os_str(), "--against".as_ref(), other.as_os_str(), "--json".as_ref()];
        serde_json::from_str(&stdout(run("t5gemma", arguments, ""))).expect("JSON")
    };
    let itself = report(&own, &own);
    assert_eq!(itself["logits_relative_error"], 0.0, "{itself}");
    assert_eq!((&itself["top1_agreement"], &itself["kl_divergence"]), (&json!(1.0), &json!(0.0)), "{itself}");
    let error = |report: &Value| report["logits_relative_error"].as_f64().expect("a number");
    let [eight, four] = fewer.each_ref().map(|model| report(model, &own));
    // Four bits are sixteen times as coarse.
    assert!(error(&eight) > 1e-5 && error(&four) > 3.0 * error(&eight), "{eight} {four}");
    assert!(eight["top1_agreement"].as_f64() > four["top1_agreement"].as_f64(), "{eight} {four}");
    let other = exported("tiny-unbalanced");
    let arguments = ["verify".as_ref(), own.as_os_str(), "--against".as_ref(), other.as_os_str()];
    let refused = run("t5gemma", arguments, "");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("against: expected a model with vocabularies of 200 and 200 tokens"), "{said}");
}

#[test]
fn requests_with_other_options_run_beside_each_other_and_are_answered_in_order() {
    let export = Export::default().target(Target::Cpu);
    let model = crate::common::exported_as("tiny-balanced", "cpu", export);
    let model = model.to_str().expect("temporary paths are UTF-8");
    let request = |at: i64| match at % 6 {
        0 => json!({"input_ids": [5, 6, 7 + at], "options": {"max_new_tokens": 40}}).to_string(),
        1 => json!({"input_ids": [5 + at], "options": {"max_new_tokens": 3, "num_beams": 3}}).to_string(),
        2 => json!({"input_ids": [[5, at], [9, 9]], "options": {"do_sample": true, "seed": at}}).to_string(),
        3 => json!({"input_ids": [5], "decoder_input_ids": [7, at]}).to_string(),
        4 => json!({"input_ids": [5, at + 1000]}).to_string(),
        _ => "no request".to_string(),
    };
    let lines: Vec<String> = (0..60).map(request).collect();
    let results = |more: &[&str]| {
        let output = run("t5gemma", [&["generate", model, "--jsonl"], more].concat(), lines.join("\n"));
        assert_eq!(output.status.code(), Some(1));
        let result = |line: &str| {
            let result: Value = serde_json::from_str(line).expect("JSON");
            let rows = result["sequences"].as_array().cloned().unwrap_or_default();
            let tokens: Vec<Value> = rows.iter().map(|row| row[0]["tokens"].clone()).collect();
            json!([result["id"], result["error"], result["seed"], result["usage"], tokens])
        };
        String::from_utf8_lossy(&output.stdout).lines().map(result).collect::<Vec<Value>>()
    };
    let alone = results(&["--batch-size", "1"]);
    assert_eq!(alone.len(), 60);
    for more in [&[][..], &["--batch-size", "3"], &["--batch-size", "500"]] {
        assert_eq!(results(more), alone, "{more:?}");
    }
}

/// One request with many sources obeys the same limits as many requests with one.
#[test]
fn a_request_of_many_sources_is_answered_in_pieces_as_whole() {
    let sources: Vec<Vec<i64>> = (0..11).map(|row| vec![5 + row; 4]).collect();
    let requests = [
        json!({"input_ids": sources, "options": {"max_new_tokens": 6}}),
        json!({"input_ids": sources, "options": {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}}),
        json!({"input_ids": sources, "options": {"max_new_tokens": 6, "do_sample": true, "seed": 5}}),
        json!({"input_ids": sources, "decoder_input_ids": vec![[9, 8]; 11], "options": {"max_new_tokens": 6}}),
    ];
    let lines = requests.map(|request| request.to_string()).join("\n");
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    for target in [Target::Portable, Target::Cpu] {
        let model = crate::common::exported_for("tiny-balanced", target);
        let model = model.to_str().expect("temporary paths are UTF-8");
        let answer = |bound: &[&str]| -> Vec<Value> {
            let output = stdout(run("t5gemma", [&["generate", model, "--jsonl"], bound].concat(), &lines));
            let read = |line: &str| {
                let result: Value = serde_json::from_str(line).expect("JSON");
                let rows = result["sequences"].as_array().expect("an answer");
                let tokens =
                    rows.iter().map(|row| row.as_array().expect("a row").iter().map(|found| found["tokens"].clone()));
                json!([result["id"], tokens.map(Iterator::collect::<Vec<Value>>).collect::<Vec<_>>()])
            };
            output.lines().map(read).collect()
        };
        let whole = answer(&["--batch-size", "11"]);
        assert_eq!(whole.len(), 4);
        let bounds: [&[&str]; 4] = [
            &["--batch-size", "1"],
            &["--batch-size", "4"],
            &["--max-batch-tokens", "9"],
            &["--max-batch-tokens", "1"],
        ];
        for bound in bounds {
            assert_eq!(answer(bound), whole, "{target:?} {bound:?}");
        }
        let scores = |bound: &str| -> Vec<f64> {
            let request = json!({"input_ids": sources, "target_ids": vec![[7, 9]; 11]}).to_string();
            let output = stdout(run("t5gemma", ["score", model, "--batch-size", bound], request));
            let result: Value = serde_json::from_str(&output).expect("JSON");
            let scores = result["scores"].as_array().expect("an answer");
            scores.iter().map(|score| score["logprob"].as_f64().expect("a number")).collect()
        };
        let states = |bound: &str| -> Vec<f32> {
            let file = folder.path().join("states.npy");
            let request = json!({"input_ids": sources}).to_string();
            let output = ["-o", file.to_str().expect("temporary paths are UTF-8"), "--batch-size", bound];
            stdout(run("t5gemma", [&["encode", model, "--jsonl"], &output[..]].concat(), request));
            let bytes = std::fs::read(file).expect("written");
            let numbers = bytes[128..].chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().expect("4")));
            numbers.collect()
        };
        let (whole, pieces) = (scores("11"), scores("4"));
        assert_eq!((whole.len(), pieces.len()), (11, 11));
        assert!(whole.iter().zip_eq(&pieces).all(|(a, b)| (a - b).abs() < 1e-4), "{whole:?} {pieces:?}");
        let (whole, pieces) = (states("11"), states("4"));
        assert!(whole.len() == pieces.len() && whole.len() > 11 * 4);
        assert!(whole.iter().zip_eq(&pieces).all(|(a, b)| (a - b).abs() < 1e-4));
    }
}

/// Whether the parser, the program or the library finds the error.
#[test]
fn wrong_arguments_are_one_exit_status_and_are_told_as_they_were_typed() {
    let model = demo();
    let model = model.to_str().expect("temporary paths are UTF-8");
    let cases: &[(&[&str], &str)] = &[
        (&["generate", "--no-such-flag"], "--no-such-flag"),
        (&["generate", "--batch-size", "0", "a"], "--batch-size"),
        (&["generate", "--do-sample=yes", "a"], "--do-sample"),
        (&["generate", "--temperature", "0.5", "a"], "t5gemma: --temperature requires --do-sample\n"),
        (&["generate", "--seed", "5", "--jsonl"], "t5gemma: --seed requires --do-sample\n"),
        (
            &["generate", "--length-penalty", "2", "a"],
            "t5gemma: --length-penalty requires --num-beams above 1 (got 1)\n",
        ),
        (
            &["generate", "--min-new-tokens", "10", "--max-new-tokens", "5", "a"],
            "t5gemma: --min-new-tokens requires --max-new-tokens of at least 10 (got 5)\n",
        ),
        (&["generate", "--num-beams", "four", "a"], "--num-beams: expected an integer of at least 1, found \"four\""),
        (&["generate", "--max-time", "NaN", "a"], "--max-time: expected a number of seconds, 0 or more, found \"NaN\""),
        (&["generate", "--max-time", "-1", "a"], "--max-time: expected a number of seconds, 0 or more, found -1"),
        (&["generate", "--max-new-tokens", "9999", "a"], "t5gemma: --max-new-tokens: expected at most "),
        (&["generate", "--eos-token-id", "9999", "a"], "t5gemma: --eos-token-id: expected token ids below "),
        (
            &["generate", "--stop-strings", "[a", "a"],
            "--stop-strings: expected JSON: column 2: expected value, found `a`",
        ),
        (&["generate", "--required-phrases", "[a", "a"], "--required-phrases: expected JSON: "),
        (&["generate", "--json-schema", "{", "a"], "--json-schema: expected JSON: "),
        (&["generate", "--regex", "(", "a"], "--regex: "),
        (&["generate", "--regex", "(", "a"], "found unclosed group at character 1\n"),
        (&["generate", "--regex", "a", "--grammar", "no/such/file", "--jsonl", "a"], "--jsonl"),
        (&["generate", "--output-logprobs", "a"], "--output-logprobs requires --jsonl"),
        (&["generate", "--system", "a", "b"], "--system requires --chat"),
        (&["generate", "--encoder-outputs", "a.safetensors", "--system", "a", "--jsonl"], "--system"),
        (&["generate", "--device", "0,1", "a"], "--device: expected one GPU"),
        (&["generate", "--threads", "0", "a"], "t5gemma: --threads: expected 1 to 1024, found 0\n"),
        (&["generate", "--device", "1", "a"], "--device 1 requires a provider with devices"),
        (&["encode", "-o", "a.txt", "a"], "--output: expected a name that ends in .safetensors or .npy"),
        (&["encode", "-o", "a.npy", "--padding", "max_length", "a"], "--padding max_length requires --max-length"),
        (&["encode", "-o", "a.npy", "--normalize", "a"], "--normalize requires --pooling"),
        (&["encode", "-o", "a.npy", "--warm-up", "a"], "--warm-up requires a command that generates"),
        (&["verify", "--tolerance", "NaN"], "--tolerance"),
        (&["verify", "--texts", "a.txt"], "--against"),
        (&["bench", "--source-length", "99999"], "--source-length: expected at most "),
    ];
    let failed: Vec<String> = (cases.iter())
        .filter_map(|(arguments, says)| {
            let (command, flags) = arguments.split_first().expect("a command");
            let output = run("t5gemma", [&[*command, model], flags].concat(), "");
            let error = String::from_utf8_lossy(&output.stderr);
            let is_right = output.status.code() == Some(2) && error.contains(says) && output.stdout.is_empty();
            (!is_right).then(|| format!("{arguments:?}: {:?} {error}", output.status.code()))
        })
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    // Files and requests are none of the arguments' business.
    for (arguments, stdin) in [
        (&["generate", model, "--json-schema", "no/such/file", "a"][..], ""),
        (&["generate", "no/such/model", "a"], ""),
        (&["generate", model, "--jsonl"], "{\"text\": \"a\", \"options\": {\"temperature\": 0.5}}"),
    ] {
        assert_eq!(run("t5gemma", arguments, stdin).status.code(), Some(1), "{arguments:?}");
    }
}

#[test]
fn an_option_that_stands_alone_leaves_the_text_behind_it_a_text() {
    let model = demo();
    let model = model.to_str().expect("temporary paths are UTF-8");
    let text = "Room 12 is 5 km away.";
    let answer = |flags: &[&str]| stdout(run("t5gemma", [&["generate", model], flags].concat(), ""));
    let (plain, sampled) = (answer(&[text]), answer(&["--do-sample", "true", "--seed", "3", text]));
    assert_eq!(answer(&["--seed", "3", "--do-sample", text]), sampled);
    assert_eq!(answer(&[text, "--seed", "3", "--do-sample=true"]), sampled);
    assert_eq!(answer(&["--do-sample", "false", text]), plain);
    let beams = ["--num-beams", "3"];
    assert_eq!(answer(&[&beams[..], &["--early-stopping", text]].concat()).lines().count(), 1);
    assert_eq!(answer(&[&beams[..], &["--early-stopping", "never", text]].concat()).lines().count(), 1);
    // A text is what it looks like, also one that is JSON.
    assert_eq!(answer(&["--stop-strings", "5", text]), answer(&["--stop-strings", "[\"5\"]", text]));
}

#[test]
fn text_that_windows_wrote_is_text() {
    let model = demo();
    let model = model.to_str().expect("temporary paths are UTF-8");
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let file = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).expect("written");
        path.to_str().expect("temporary paths are UTF-8").to_string()
    };
    let with_mark = |text: &str| [b"\xef\xbb\xbf", text.as_bytes()].concat();
    let answer = |arguments: &[&str], stdin: &[u8]| run("t5gemma", [&["generate", model], arguments].concat(), stdin);
    let lines = "Room 12 is 5 km away.\r\nIt is 3:05 pm.\r\n";
    let expected = stdout(answer(&[], lines.replace('\r', "").as_bytes()));
    assert_eq!(stdout(answer(&[], &with_mark(lines))), expected);
    let request = "{\"text\": \"Room 12 is 5 km away.\"}\r\n";
    assert_eq!(stdout(answer(&["--jsonl"], &with_mark(request))), stdout(answer(&["--jsonl"], request.as_bytes())));
    let answers = "twelve\r\nfive\r\n";
    let (plain, marked) = (file("plain.txt", answers.as_bytes()), file("marked.txt", &with_mark(answers)));
    let of_list = |list: &str| stdout(answer(&["--allowed-sequences", list, "12"], b""));
    assert_eq!(of_list(&marked), of_list(&plain));
    let schema = file("schema.json", &with_mark("{\"type\": \"boolean\"}"));
    assert!(["true\n", "false\n"].contains(&&*stdout(answer(&["--json-schema", &schema, "12"], b""))));
    let tokens = folder.path().join("tokens.json");
    let tokens = tokens.to_str().expect("temporary paths are UTF-8");
    let listed = |texts: &str| {
        stdout(run("t5gemma", ["shortlist", model, "--texts", texts, "-o", tokens], ""));
        std::fs::read(tokens).expect("written")
    };
    assert_eq!(listed(&marked), listed(&plain));

    let utf_16: Vec<u8> = [0xfeff_u16].into_iter().chain("12\r\n".encode_utf16()).flat_map(u16::to_le_bytes).collect();
    let wide = file("wide.txt", &utf_16);
    for (arguments, stdin) in [
        (&["generate", model][..], &*utf_16),
        (&["generate", model, "--jsonl"], &utf_16),
        (&["generate", model, "--allowed-sequences", &wide, "12"], b""),
        (&["shortlist", model, "--texts", &wide, "-o", tokens], b""),
    ] {
        let output = run("t5gemma", arguments, stdin);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
        assert!(error.contains("found the byte-order mark of UTF-16"), "{arguments:?}: {error}");
    }
    // A zero byte is one of the text.
    let [with, without] = [&b"a\0b\n"[..], b"ab\n"].map(|text| {
        let states = folder.path().join("states.safetensors");
        let arguments = ["encode", model, "-o", states.to_str().expect("temporary paths are UTF-8")];
        stdout(run("t5gemma", arguments, text));
        let bytes = std::fs::read(states).expect("written");
        let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
        tensors.tensor("0.input_ids").expect("written").data().to_vec()
    });
    assert!(with.len() > without.len());
}

#[test]
fn a_comparison_says_first_what_its_sources_are() {
    let model = demo();
    let model = model.to_str().expect("temporary paths are UTF-8");
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let texts = folder.path().join("texts.txt");
    std::fs::write(&texts, "It is 3:05 pm.\nRoom 12.\n").expect("written");
    let texts = texts.to_str().expect("temporary paths are UTF-8");
    let first = |more: &[&str]| {
        let report = stdout(run("t5gemma", [&["verify", model, "--against", model], more].concat(), ""));
        report.lines().next().expect("a line").to_string()
    };
    assert!(first(&[]).starts_with("sources: random tokens; use --texts FILE "), "{}", first(&[]));
    assert_eq!(first(&["--texts", texts]), format!("sources: 2 texts of {texts}"));
}

const COMMANDS: [&str; 10] =
    ["generate", "score", "encode", "classify", "verify", "bench", "calibrate", "shortlist", "build-engines", "doctor"];

#[test]
fn help_fits_a_terminal_and_ends_with_examples() {
    for command in COMMANDS.map(Some).into_iter().chain([None]) {
        for (flag, columns) in [("-h", 80), ("--help", 80), ("--help", 120)] {
            let mut program = program("t5gemma");
            let shown = program.args(command).arg(flag).env("COLUMNS", columns.to_string()).output().expect("it runs");
            let shown = stdout(shown);
            // The usage is one line, however long.
            let lines = shown.lines().filter(|line| !line.starts_with("Usage:"));
            let longest = lines.map(|line| line.chars().count()).max();
            assert!(longest.is_some_and(|longest| longest <= columns), "{command:?} {flag}: {shown}");
            assert_eq!(shown.contains("\nExamples:\n"), flag == "--help", "{command:?} {flag}: {shown}");
        }
    }
    let help = stdout(run("t5gemma", ["--help"], ""));
    assert!(help.contains("Exit status:\n  0    success\n"), "{help}");
    assert_eq!(stdout(run("t5gemma", ["--version"], "")), format!("t5gemma {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn completions_and_man_pages_know_all_options() {
    for shell in ["bash", "zsh", "fish"] {
        let script = stdout(run("t5gemma", ["completions", shell], ""));
        assert!(script.contains("max-batch-tokens") && script.contains("build-engines"), "{shell}");
    }
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    stdout(run("t5gemma", ["man".as_ref(), folder.path().as_os_str()], ""));
    let page = |name: &str| std::fs::read_to_string(folder.path().join(name)).expect("a page");
    assert!(page("t5gemma.1").contains("t5gemma doctor"));
    for command in COMMANDS {
        assert!(page(&format!("t5gemma-{command}.1")).contains("Examples:"), "{command}");
    }
    assert!(page("t5gemma-generate.1").contains("\\-\\-max\\-batch\\-tokens"));
}
