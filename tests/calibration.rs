//! 8 bits for TensorRT: ranges of activations found by the runtime, and what the exporter makes of them.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use t5gemma_exporter::{Export, TensorRt, check};
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::DType;
use t5gemma_graphs::manifest::ActivationRanges;
use t5gemma_graphs::onnx::Blocks;
use t5gemma_graphs::quantization::{Activations, Quantization};

use crate::common::{demo, demo_as, run, stdout, tests};

/// A hundred of the demo's held-out texts with their answers.
fn expected() -> Vec<Value> {
    let text = fs::read_to_string(tests().join("demo/expected.json")).expect("expected.json is there");
    serde_json::from_str(&text).expect("expected.json is a list")
}

/// Held-out texts that are none of these, as requests.
fn others(count: usize) -> String {
    let text = fs::read_to_string(tests().join("demo/eval.jsonl")).expect("eval.jsonl is there");
    let cases = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a JSON line"));
    let expected = expected();
    let others = cases.filter(|case| expected.iter().all(|known| known["text"] != case["text"]));
    others.take(count).map(|case| json!({"text": case["text"]}).to_string() + "\n").collect()
}

fn observed() -> PathBuf {
    demo_as("observed", Export { activations: Activations::Observed, ..Export::default() })
}

/// What `t5gemma calibrate` finds with some texts.
fn ranges(folder: &Path, texts: &str) -> ActivationRanges {
    let (file, output) = (folder.join("texts.jsonl"), folder.join("ranges.json"));
    fs::write(&file, texts).expect("written");
    let model = observed();
    let arguments = ["calibrate", utf8(&model), "--texts", utf8(&file), "--output", utf8(&output)];
    stdout(run("t5gemma", arguments, ""));
    serde_json::from_slice(&fs::read(&output).expect("written by the program")).expect("ranges")
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

fn in_8_bits(ranges: ActivationRanges, dtype: DType) -> Export {
    let blocks = Some(Blocks { bits: 8, size: 128, symmetric: true });
    let quantization = Quantization { encoder: blocks, decoder: blocks, head: blocks, exclude: Vec::new() };
    let activations = Activations::Ranges(ranges.ranges);
    Export { target: Target::TensorRt, dtype, quantization, activations, ..Export::default() }
}

#[test]
fn the_demo_keeps_its_answers_when_it_is_computed_in_8_bits() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let ranges = ranges(folder.path(), &others(40));
    assert_eq!(ranges.texts, 40);
    let requests = expected().into_iter().map(|case| json!({"text": case["text"], "options": {"max_new_tokens": 128}}));
    let requests: String = requests.map(|request| request.to_string() + "\n").collect();
    let changed = |label: &str, ranges: ActivationRanges| {
        let model = demo_as(label, in_8_bits(ranges, DType::Float32));
        let output = stdout(run("t5gemma", ["generate", utf8(&model), "--jsonl"], &requests));
        let found = output.lines().map(|line| serde_json::from_str::<Value>(line).expect("a JSON line"));
        let expected = expected();
        found.zip(&expected).filter(|(found, case)| found["sequences"][0][0]["tokens"] != case["greedy"]).count()
    };
    let found = changed("8-bits", ranges.clone());
    assert!(found <= 1, "{found} of 100 answers changed");
    // That the ranges matter: with a hundredth of them nearly everything is cut.
    let cut = ranges.ranges.into_iter().map(|(name, range)| (name, range / 100.0)).collect();
    let found = changed("8-bits-cut", ActivationRanges { ranges: cut, ..ranges });
    assert!(found > 50, "{found} of 100 answers changed");
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

#[test]
fn graphs_in_8_bits_pass_the_check() {
    let model = observed();
    let manifest: Value =
        serde_json::from_slice(&fs::read(model.join("manifest.json")).expect("a manifest")).expect("JSON");
    let names = manifest["observed"].as_object().expect("an object").values().flat_map(|names| {
        names.as_array().expect("a list").iter().map(|name| name.as_str().expect("a name").to_string())
    });
    let ranges = ActivationRanges { texts: 1, percentile: 100.0, ranges: names.map(|name| (name, 8.0)).collect() };
    for dtype in [DType::BFloat16, DType::Float16] {
        let model = demo_as(&format!("8-bits-{dtype}"), in_8_bits(ranges.clone(), dtype));
        assert_eq!(check(&model, TensorRt::default()).expect("ONNX files").findings, [], "{dtype}");
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
    type Plant = fn(&mut Value);
    let cases: [(&str, Plant, &[&str], &str); 6] = [
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
            "expected one for",
        ),
        ("of another model", |ranges| ranges["model.decoder.layers.99.x"] = json!(1.0), &in_8_bits, "layers.99.x"),
        (
            "below nothing",
            |ranges| ranges["model.decoder.layers.0.mlp.up_proj.weight"] = json!(-1.0),
            &in_8_bits,
            "found -1",
        ),
        ("for nothing", |_| {}, &["--calibrate", utf8(&file)], "--calibrate: expected --quantize int8"),
        ("not there", |_| {}, &["--target", "tensorrt", "--quantize", "int8"], "--quantize int8: expected --calibrate"),
        ("of 8 bits", |_| {}, &["--observe", "--target", "cpu"], "--observe: expected target portable"),
    ];
    for (name, plant, arguments, word) in cases {
        let mut given = serde_json::to_value(&whole).expect("JSON");
        plant(&mut given["ranges"]);
        fs::write(&file, given.to_string()).expect("written");
        let output = run("t5gemma-export", [arguments, &[utf8(&checkpoint), utf8(&out)]].concat(), "");
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{name}: {error}");
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
    assert!(calibrate(&observed(), &texts).contains("expected a request a line, found none"));
}
