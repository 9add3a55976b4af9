//! The files that `--push-layout` adds to a model folder, and the folder as it comes back from the hub.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::common::{fixture, run, stdout, tests};
use crate::hub::{COMMIT, Hub, copy, names, sha256, stderr};

/// The lines between the `---` of a card.
fn metadata(card: &str) -> Vec<&str> {
    card.strip_prefix("---\n").and_then(|card| card.split_once("\n---\n")).expect("metadata").0.lines().collect()
}

#[test]
fn a_model_card_describes_the_model() {
    const NOTICE: &str =
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms";
    let hub = Hub::start(json!([]));
    let named = hub.path("named");
    copy(&fixture("tiny-untied").join("checkpoint"), &named);
    let path = named.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("readable")).expect("JSON");
    config["_name_or_path"] = json!("google/t5gemma-s-s-ul2");
    fs::write(&path, config.to_string()).expect("writable");
    let trained = hub.path("trained");
    copy(&named, &trained);
    config["_name_or_path"] = json!("runs/checkpoint-500");
    fs::write(trained.join("config.json"), config.to_string()).expect("writable");
    let adapter = tests().join("fixtures/lora/adapters/plain");
    let adapter = adapter.to_str().expect("UTF-8");
    let generation = ["pipeline_tag: text-generation", "tags:", "- onnx", "- t5gemma", "- text2text-generation"];
    let encoder = ["pipeline_tag: feature-extraction", "tags:", "- onnx", "- t5gemma"];
    for (name, arguments, base, says) in [
        (
            "of the hub",
            &["google/tiny"][..],
            &["license: gemma", "base_model: \"google/tiny\""][..],
            &[COMMIT, "# tiny in ONNX", "t5gemma generate model"][..],
        ),
        (
            "quantized",
            &["google/tiny", "--target", "cpu", "--quantize", "int8", "--quantize-encoder", "none"],
            &["license: gemma", "base_model: \"google/tiny\"", "base_model_relation: quantized"],
            &["| quantization | decoder int8, head int8 |"],
        ),
        (
            "named",
            &["named"],
            &["license: gemma", "base_model: \"google/t5gemma-s-s-ul2\""],
            &["[google/t5gemma-s-s-ul2](htt"],
        ),
        ("of a trainer", &["trained"], &["license: gemma"], &["# T5Gemma in ONNX", "| data type | float32 |"]),
        (
            "for a GPU",
            &["named", "--target", "cuda"],
            &["license: gemma", "base_model: \"google/t5gemma-s-s-ul2\""],
            &["--provider cuda", "provider=\"cuda\"", "| data type | bfloat16 |"],
        ),
        (
            "an encoder",
            &["trained", "--task", "feature-extraction", "--pooling", "mean"],
            &["license: gemma"],
            &["t5gemma.Encoder.open", "pooling mean |"],
        ),
        (
            "with an adapter",
            &["me/base", "--adapter", adapter],
            &["license: gemma", "base_model: \"me/base\""],
            &["| merged adapter | plain (rank 4, scale 1) |", "merged with the adapters plain"],
        ),
        ("random", &["--dummy-weights", "--config", "named/config.json"], &[], &["The weights are random numbers"]),
    ] {
        let out = hub.path(&format!("model {name}"));
        stdout(hub.export(&[arguments, &[out.to_str().expect("UTF-8"), "--push-layout", "--quiet"]].concat()));
        let card = fs::read_to_string(out.join("README.md")).expect(name);
        let task: &[&str] = if name == "an encoder" { &encoder } else { &generation };
        assert_eq!(metadata(&card), [&["library_name: t5gemma"], base, task].concat(), "{name}");
        assert!(says.iter().all(|part| card.contains(part)), "{name}: expected {says:?}, found {card}");
        let manifest: Value =
            serde_json::from_slice(&fs::read(out.join("manifest.json")).expect("readable")).expect("JSON");
        for file in names(&out)
            .iter()
            .filter(|file| !["manifest.json", "README.md", ".gitattributes", "NOTICE"].contains(&file.as_str()))
        {
            assert!(card.contains(&format!("| `{file}` | ")), "{name}: {file} is not listed");
        }
        assert_eq!(card.contains(NOTICE), name != "random", "{name}");
        assert_eq!(out.join("NOTICE").exists(), name != "random", "{name}");
        if name != "random" {
            assert!(fs::read_to_string(out.join("NOTICE")).expect(name).starts_with(&format!("{NOTICE}\n")), "{name}");
        }
        assert!(manifest["files"]["README.md"]["bytes"].is_u64(), "{name}");
        // Git LFS holds what is not text, by these patterns.
        let attributes = fs::read_to_string(out.join(".gitattributes")).expect(name);
        for file in names(&out).iter().filter(|file| file.ends_with(".onnx") || file.ends_with(".onnx_data")) {
            let pattern =
                format!("*{} filter=lfs diff=lfs merge=lfs -text\n", &file[file.rfind('.').expect("a dot")..]);
            assert!(attributes.contains(&pattern), "{name}: {file}");
        }
        // Again to the same bytes, over what is there.
        let before: Vec<Vec<u8>> = names(&out).iter().map(|file| fs::read(out.join(file)).expect(name)).collect();
        stdout(hub.export(&[arguments, &[out.to_str().expect("UTF-8"), "--push-layout", "--overwrite"]].concat()));
        let after: Vec<Vec<u8>> = names(&out).iter().map(|file| fs::read(out.join(file)).expect(name)).collect();
        assert!(before == after, "{name}");
    }
}

#[cfg(unix)]
#[test]
fn a_model_folder_comes_back_from_the_hub() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = folder.path().join("model");
    let demo = tests().join("demo/checkpoint");
    let (demo, out) = (demo.to_str().expect("UTF-8"), model.to_str().expect("UTF-8"));
    stdout(run("t5gemma-export", [demo, out, "--push-layout", "--quiet"], ""));
    let generate = |model: &Path| stdout(run("t5gemma", [Path::new("generate"), model], "Dr. Smith paid $3.50.\n"));
    let expected = generate(&model);
    assert_eq!(expected, "doctor smith paid three dollars and fifty cents\n");

    // As huggingface_hub stores a repository: links to blobs by hash.
    let (blobs, snapshot) = (folder.path().join("blobs"), folder.path().join("snapshots").join(COMMIT));
    fs::create_dir(&blobs).expect("can be made");
    fs::create_dir_all(&snapshot).expect("can be made");
    for name in names(&model) {
        let blob = sha256(&fs::read(model.join(&name)).expect("readable"));
        fs::copy(model.join(&name), blobs.join(&blob)).expect("writable");
        std::os::unix::fs::symlink(Path::new("../../blobs").join(blob), snapshot.join(name)).expect("can be made");
    }
    assert_eq!(generate(&snapshot), expected);
    stdout(run("t5gemma-export", [Path::new("inspect"), &snapshot], ""));

    // The card is edited on the hub, and some files are not downloaded.
    fs::write(model.join("README.md"), "# Mine\n").expect("writable");
    fs::remove_file(model.join(".gitattributes")).expect("there");
    assert_eq!(generate(&model), expected);
    let resealed = run("t5gemma-export", [Path::new("reseal"), &model], "");
    assert!(stderr(&resealed).contains("README.md changed") && resealed.status.success(), "{}", stderr(&resealed));
    assert!(stderr(&resealed).contains(".gitattributes removed"), "{}", stderr(&resealed));
    assert_eq!(generate(&model), expected);
}
