//! int8 and fp8 for TensorRT: activation ranges measured by the runtime, and exports with them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use itertools::Itertools as _;
use serde_json::{Value, json};
use t5gemma_exporter::{Export, ServingPlan, TensorRtVersion, check};
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::DType;
use t5gemma_graphs::manifest::{ActivationRanges, Manifest};
use t5gemma_graphs::onnx::Blocks;
use t5gemma_graphs::quantization::{Activations, Quantization};
use t5gemma_runtime::{Batch, Cancellation, Encoder, Pooling, Task};

use crate::common::{demo, demo_as, exported, exported_as, exported_from, fixture, python, run, stdout, tests};

/// A hundred of the demo's held-out texts with their answers.
fn expected() -> Vec<Value> {
    let text = fs::read_to_string(tests().join("demo/expected.json")).expect("expected.json is there");
    serde_json::from_str(&text).expect("expected.json is a list")
}

/// Other held-out texts, as requests.
fn others(count: usize) -> String {
    let text = fs::read_to_string(tests().join("demo/eval.jsonl")).expect("eval.jsonl is there");
    let cases = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a JSON line"));
    let expected = expected();
    let others = cases.filter(|case| expected.iter().all(|known| known["text"] != case["text"]));
    others.take(count).map(|case| json!({"text": case["text"]}).to_string() + "\n").collect()
}

fn observed() -> PathBuf {
    demo_as("observed", Export::default().activations(Activations::Observed))
}

/// The ranges that `t5gemma calibrate` measures with some texts.
fn ranges(folder: &Path, texts: &str) -> ActivationRanges {
    ranges_of(&observed(), folder, texts)
}

fn ranges_of(model: &Path, folder: &Path, texts: &str) -> ActivationRanges {
    let (file, output) = (folder.join("texts.jsonl"), folder.join("ranges.json"));
    fs::write(&file, texts).expect("written");
    let arguments = ["calibrate", utf8(model), "--texts", utf8(&file), "--output", utf8(&output)];
    stdout(run("t5gemma", arguments, ""));
    serde_json::from_slice(&fs::read(&output).expect("written by the program")).expect("ranges")
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// The two ways to compute in 8 bits.
fn ways() -> [Blocks; 2] {
    [Blocks::integer(8, 128), Blocks::float8()]
}

fn in_8_bits(blocks: Blocks, ranges: ActivationRanges, dtype: DType) -> Export {
    let blocks = Some(blocks);
    let quantization = Quantization { encoder: blocks, decoder: blocks, head: blocks, ..Quantization::default() };
    let activations = Activations::Ranges(ranges.ranges);
    Export::default().target(Target::TensorRt).dtype(dtype).quantization(quantization).activations(activations)
}

#[test]
fn the_demo_keeps_its_answers_when_it_is_computed_in_8_bits() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let ranges = ranges(folder.path(), &others(40));
    assert_eq!(ranges.texts, 40);
    let requests = expected().into_iter().map(|case| json!({"text": case["text"], "options": {"max_new_tokens": 128}}));
    let requests: String = requests.map(|request| request.to_string() + "\n").collect();
    let changed = |blocks: Blocks, label: &str, ranges: ActivationRanges| {
        let model = demo_as(&format!("{}-{label}", blocks.name()), in_8_bits(blocks, ranges, DType::Float32));
        let output = stdout(run("t5gemma", ["generate", utf8(&model), "--jsonl"], &requests));
        let found = output.lines().map(|line| serde_json::from_str::<Value>(line).expect("a JSON line"));
        let expected = expected();
        found.zip_eq(&expected).filter(|(found, case)| found["sequences"][0][0]["tokens"] != case["greedy"]).count()
    };
    // That the ranges matter: with a hundredth of them nearly everything is cut.
    let cut = ranges.ranges.iter().map(|(name, range)| (name.clone(), range / 100.0)).collect();
    let cut = ActivationRanges { ranges: cut, ..ranges.clone() };
    for (blocks, most) in ways().into_iter().zip_eq([1, 3]) {
        let found = changed(blocks, "whole", ranges.clone());
        assert!(found <= most, "{}: {found} of 100 answers changed", blocks.name());
        let found = changed(blocks, "cut", cut.clone());
        assert!(found > 50, "{}: {found} of 100 answers changed", blocks.name());
    }
}

#[test]
fn the_ranges_are_the_greatest_of_all_texts() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let texts = others(6);
    let together = ranges(folder.path(), &texts);
    let alone: Vec<ActivationRanges> = texts.lines().map(|text| ranges(folder.path(), text)).collect();
    for (name, &range) in &together.ranges {
        let greatest = alone.iter().map(|alone| alone.ranges[name]).fold(0.0, f32::max);
        assert!(range > 0.0 && range == greatest, "{name}: {range} for {greatest}");
    }
}

/// Encoders and classifiers are calibrated on their sources alone.
#[test]
fn models_that_do_not_generate_compute_in_8_bits_too() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let sources: Vec<Vec<i64>> = (0..16).map(|row| (0..12).map(|at| 3 + (row * 53 + at * 17) % 40).collect()).collect();
    let texts: String = sources.iter().map(|ids| json!({"input_ids": ids}).to_string() + "\n").collect();
    let numbers = |model: &Path| -> Vec<f32> {
        let encoder = Encoder::open(model).expect("opens");
        let (batch, cancel) = (Batch::padded(&sources, 0).expect("valid"), Cancellation::new());
        match encoder.manifest().task {
            Task::TextClassification => encoder.classify(&batch, &cancel).expect("classifies").into_iter().collect(),
            Task::TokenClassification => {
                encoder.classify_tokens(&batch, &cancel).expect("classifies").into_iter().collect()
            }
            _ => encoder.embed(&batch, Pooling::Mean, &cancel).expect("embeds").into_iter().collect(),
        }
    };
    let mut all = Vec::new();
    for name in ["encoder", "sequence-encoder", "sequence-decoder", "token-encoder", "token-decoder"] {
        let checkpoint = tests().join("fixtures/tasks").join(name).join("checkpoint");
        let export =
            |label: &str, export: Export| exported_from(&checkpoint, &format!("calibrated-{name}-{label}"), export);
        let observed = export("observed", Export::default().activations(Activations::Observed));
        let found = ranges_of(&observed, folder.path(), &texts);
        assert_eq!(found.texts, sources.len(), "{name}");
        let expected = numbers(&export("plain", Export::default()));
        let length = |all: &[f32]| all.iter().map(|x| x * x).sum::<f32>().sqrt();
        let mut errors = Vec::new();
        for blocks in ways() {
            let error = |label: &str, ranges: ActivationRanges| {
                let plan = Some("batch=1..16,source=1..12".parse::<ServingPlan>().expect("a plan"));
                let label = format!("{}-{label}", blocks.name());
                let model = export(&label, in_8_bits(blocks, ranges, DType::Float32).plan(plan));
                assert_eq!(
                    check(&model, TensorRtVersion::default()).expect("ONNX files").findings,
                    [],
                    "{name} {label}"
                );
                let apart: Vec<f32> = numbers(&model).iter().zip_eq(&expected).map(|(a, b)| a - b).collect();
                length(&apart) / length(&expected)
            };
            let whole = error("whole", found.clone());
            let cut = found.ranges.iter().map(|(name, range)| (name.clone(), range / 100.0)).collect();
            let cut = error("cut", ActivationRanges { ranges: cut, ..found.clone() });
            // What is cut is worse than what is rounded, though these weights, which are random, make much of that.
            assert!(2.0 * whole < cut, "{name} {}: {whole}, with a hundredth {cut}", blocks.name());
            errors.push(whole);
        }
        let [int8, fp8] = errors[..] else { panic!("two ways") };
        all.push((name, int8, fp8));
    }
    // Rounding to 7 significant bits, and to 4; with a decoder through twice as many layers.
    let is_rounding = |&(_, int8, fp8): &(&str, f32, f32)| int8 < 0.4 && int8 < fp8 && fp8 < 4.0 * int8;
    assert!(all.iter().all(is_rounding), "{all:?}");
    let plain = exported_from(
        &tests().join("fixtures/tasks/encoder/checkpoint"),
        "calibrated-encoder-plain",
        Export::default(),
    );
    let (file, out) = (folder.path().join("texts.jsonl"), folder.path().join("out.json"));
    let observed = exported_from(
        &tests().join("fixtures/tasks/encoder/checkpoint"),
        "calibrated-encoder-observed",
        Export::default().activations(Activations::Observed),
    );
    for (model, rest, word) in [
        (&plain, &[][..], "--observe"),
        (
            &observed,
            &["--max-new-tokens", "4"],
            "--max-new-tokens requires the task text2text-generation (got feature-",
        ),
    ] {
        let arguments = [&["calibrate", utf8(model), "--texts", utf8(&file), "-o", utf8(&out)], rest].concat();
        let output = run("t5gemma", arguments, "");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && error.contains(word) && !out.exists(), "{error}");
    }
}

/// The codes of an fp8 fixture against another implementation, and the error of the dequantized weights.
#[test]
fn weights_in_fp8_are_the_nearest_and_each_part_has_its_own() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let name = "tiny-unbalanced";
    let observed = exported_as(name, "observed", Export::default().activations(Activations::Observed));
    let manifest: Value =
        serde_json::from_slice(&fs::read(observed.join("manifest.json")).expect("a manifest")).expect("JSON");
    let ids = |row: i64| (0..16).map(|at| 2 + (row * 977 + at * 131 + row * at * 29) % 200).collect::<Vec<i64>>();
    let texts: String = (0..16).map(|row| json!({"input_ids": ids(row)}).to_string() + "\n").collect();
    let ranges = ranges_of(&observed, folder.path(), &texts);
    let blocks = Blocks::float8();
    let whole = in_8_bits(blocks, ranges.clone(), DType::Float32);
    for dtype in [DType::Float32, DType::Float16, DType::BFloat16] {
        let model = exported_as(name, &format!("fp8-{dtype}"), whole.clone().dtype(dtype));
        let found = python("check_float8.py", [&model, &fixture(name).join("checkpoint")]);
        let found: Value = serde_json::from_str(&found).expect("JSON");
        let matrices = manifest["observed"].as_object().expect("an object").values();
        let matrices: BTreeSet<&str> =
            matrices.flat_map(|names| names.as_array().expect("a list")).filter_map(Value::as_str).collect();
        assert_eq!(found["matrices"], json!(matrices.len()), "{dtype}: {found}");
    }
    let plain = exported(name);
    let error = |label: &str, quantization: Quantization| {
        let model = exported_as(name, label, whole.clone().quantization(quantization));
        let arguments = ["verify", utf8(&model), "--against", utf8(&plain), "--json"];
        let found: Value = serde_json::from_str(&stdout(run("t5gemma", arguments, ""))).expect("JSON");
        found["logits_relative_error"].as_f64().expect("a number")
    };
    let all = whole.quantization.clone();
    let exclude = vec!["model.decoder.*".to_string()];
    let of_all = error("fp8-all", all.clone());
    let of_encoder = error("fp8-encoder", Quantization { decoder: None, head: None, ..all.clone() });
    let excluded = error("fp8-excluded", Quantization { exclude, head: None, ..all.clone() });
    let of_int8 = error("int8-all", in_8_bits(Blocks::integer(8, 128), ranges, DType::Float32).quantization);
    // Of 4 significant bits rather than 7, but for every number: further off than int8, and not much further.
    assert!(of_int8 < of_all && of_all < 3.0 * of_int8, "{of_int8}, {of_all}");
    assert!(0.0 < of_encoder && of_encoder != of_all && of_encoder == excluded, "{of_encoder}, {excluded}, {of_all}");
}

#[test]
fn graphs_in_8_bits_pass_the_check() {
    let model = observed();
    let manifest: Value =
        serde_json::from_slice(&fs::read(model.join("manifest.json")).expect("a manifest")).expect("JSON");
    let names = manifest["observed"].as_object().expect("an object").values().flat_map(|names| {
        names.as_array().expect("a list").iter().map(|name| name.as_str().expect("a name").to_string())
    });
    let ranges = ActivationRanges { texts: 1, percentile: 100.0, ranges: names.map(|name| (name, 8.0)).collect() };
    for (blocks, dtype) in ways().into_iter().flat_map(|blocks| [(blocks, DType::BFloat16), (blocks, DType::Float16)]) {
        let label = format!("{}-{dtype}", blocks.name());
        let model = demo_as(&label, in_8_bits(blocks, ranges.clone(), dtype));
        let checked = check(&model, TensorRtVersion::default()).expect("ONNX files");
        assert_eq!(checked.findings, [], "{label}");
        let told = checked.notes.iter().filter(|note| note.contains("fp8") && note.contains("8.9")).count();
        assert_eq!(told, if blocks == Blocks::float8() { 3 } else { 0 }, "{label}: {:?}", checked.notes);
        // Sums of whole numbers are scaled after the product, and float16 would not hold them.
        let expected = match (blocks.name(), dtype) {
            ("int8", DType::Float16) => DType::Float32,
            _ => dtype,
        };
        let text = fs::read(model.join("manifest.json")).expect("a manifest");
        let manifest: Manifest = serde_json::from_slice(&text).expect("a manifest");
        let mut scales = manifest.weights.tensors.iter().filter(|tensor| tensor.name.ends_with(".scales")).peekable();
        assert!(scales.peek().is_some() && scales.all(|scales| scales.dtype == expected), "{label}");
    }
}

#[test]
fn ranges_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let whole = ranges(folder.path(), &others(1));
    let file = folder.path().join("given.json");
    let out = folder.path().join("out");
    let checkpoint = tests().join("demo/checkpoint");
    let in_8_bits = ["--target", "tensorrt", "--quantize", "int8", "--calibrate", utf8(&file)];
    let in_fp8 = ["--quantize", "fp8", "--calibrate", utf8(&file)];
    let fp8_for = |target| [&["--target", target][..], &in_fp8].concat();
    type Plant = fn(&mut Value);
    let cases: [(&str, Plant, &[&str], &str); 14] = [
        (
            "missing",
            |ranges| {
                drop(
                    ranges
                        .as_object_mut()
                        .and_then(|ranges| ranges.remove("model.encoder.layers.0.mlp.up_proj.weight")),
                )
            },
            &in_8_bits,
            "expected a range for model.encoder.layers.0.mlp.up_proj.weight, found none",
        ),
        ("of another model", |ranges| ranges["model.decoder.layers.99.x"] = json!(1.0), &in_8_bits, "layers.99.x"),
        (
            "below nothing",
            |ranges| ranges["model.decoder.layers.0.mlp.up_proj.weight"] = json!(-1.0),
            &in_8_bits,
            "found -1",
        ),
        ("for nothing", |_| {}, &["--calibrate", utf8(&file)], "requires --target tensorrt (got portable)"),
        (
            "not there",
            |_| {},
            &["--target", "tensorrt", "--quantize", "int8"],
            "--quantize int8 with target tensorrt requires --calibrate",
        ),
        (
            "missing for fp8",
            |ranges| ranges["model.decoder.layers.0.mlp.up_proj.weight"] = json!(-2.0),
            &fp8_for("tensorrt"),
            "found -2",
        ),
        (
            "not there for fp8",
            |_| {},
            &["--target", "tensorrt", "--quantize-head", "fp8"],
            "--quantize fp8 with target tensorrt requires --cal",
        ),
        ("for a CPU", |_| {}, &fp8_for("cpu"), "--quantize fp8 requires --target tensorrt (got cpu)"),
        ("for CUDA", |_| {}, &fp8_for("cuda"), "--quantize fp8 requires --target tensorrt (got cuda)"),
        ("for any", |_| {}, &fp8_for("portable"), "--quantize fp8 requires --target tensorrt (got portable)"),
        (
            "in blocks",
            |_| {},
            &[&fp8_for("tensorrt")[..], &["--block-size", "32"]].concat(),
            "--block-size requires --quantize int8 or int4",
        ),
        (
            "with zero points",
            |_| {},
            &[&fp8_for("tensorrt")[..], &["--asymmetric"]].concat(),
            "--asymmetric requires --quantize int8 or int4",
        ),
        (
            "of a name that nothing has",
            |_| {},
            &[&fp8_for("tensorrt")[..], &["--quantize-exclude", "*.layer.0.*"]].concat(),
            "--quantize-exclude: expected",
        ),
        ("of 8 bits", |_| {}, &["--observe", "--target", "cpu"], "--observe requires --target portable"),
    ];
    for (name, plant, arguments, word) in cases {
        let mut given = serde_json::to_value(&whole).expect("JSON");
        plant(&mut given["ranges"]);
        fs::write(&file, given.to_string()).expect("written");
        let output = run("t5gemma-export", [arguments, &[utf8(&checkpoint), utf8(&out)]].concat(), "");
        let error = String::from_utf8_lossy(&output.stderr);
        // What is wrong in the file is the file's fault, all else the arguments'.
        let is_of_file = error.contains(&format!("{}: expected", utf8(&file)));
        let status = if is_of_file { 1 } else { 2 };
        assert_eq!(output.status.code(), Some(status), "{name}: {error}");
        assert!(error.contains(word) && !out.exists(), "{name}: {error}");
    }
    let (model, texts) = (demo(), folder.path().join("texts.jsonl"));
    let calibrate = |model: &Path, texts: &Path| {
        let output = run("t5gemma", ["calibrate", utf8(model), "--texts", utf8(texts), "-o", utf8(&out)], "");
        assert!(output.status.code() == Some(1) && !out.exists());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(calibrate(&model, &texts).contains("--observe"));
    fs::write(&texts, "{\"text\": 5}\n").expect("written");
    assert!(calibrate(&observed(), &texts).contains("texts.jsonl: line 1: text: expected"));
    fs::write(&texts, "\n").expect("written");
    assert!(calibrate(&observed(), &texts).contains("expected one request per line, found none"));
}
