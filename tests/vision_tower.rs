//! The vision tower by itself: its features against the reference, with quantized layers, and in the programs that check
//! and measure it; and the files that say how it wants its images.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::DType;
use t5gemma_graphs::onnx::Blocks;
use t5gemma_graphs::quantization::Quantization;
use t5gemma_runtime::verify::comparison;
use t5gemma_runtime::{Cancellation, Encoder, Model, PixelValues};
use tempfile::TempDir;

use crate::common::{exported_as, fixture, program, run, stdout};
use crate::images::{folder, model_with_vision};

fn golden(name: &str) -> (Vec<usize>, Vec<f32>) {
    let bytes = fs::read(fixture("t2-vision").join("golden.safetensors")).expect("a fixture");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let tensor = file.tensor(name).expect("a tensor");
    (tensor.shape().to_vec(), tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

fn path(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

#[test]
fn features_are_those_of_the_reference() {
    let (shape, values) = golden("in.images.pixel_values");
    let images = PixelValues::of_tensor(&shape, values).expect("valid images");
    let (shape, expected) = golden("img.images.features");
    let cancel = Cancellation::new();
    for target in Target::ALL {
        let model = exported_as("t2-vision", target.name(), Export::default().target(target).dtype(DType::Float32));
        let of_model = Model::open(&model).expect("opens").encode_images(&images, &cancel).expect("encodes");
        let of_encoder = Encoder::open(&model).expect("opens").encode_images(&images, &cancel).expect("encodes");
        assert_eq!((of_model.shape(), &of_encoder), (&shape[..], &of_model));
        let differences = of_model.iter().zip(&expected).map(|(found, expected)| (found - expected).abs());
        let most = differences.fold(0.0, f32::max);
        assert!(most < 5e-4, "{}: {most}", target.name());
    }
    let model = Model::open(model_with_vision("default", Export::default())).expect("opens");
    let small = PixelValues::new(14, vec![0.0; 3 * 14 * 14]).expect("finite");
    let error = model.encode_images(&[small], &cancel).expect_err("another size").to_string();
    assert_eq!(error, "images[0]: expected 28 x 28 pixels, found 14 x 14 pixels");
    let blind = Model::open(model_with_vision("blind", Export::default().vision(false))).expect("opens");
    let error = blind.encode_images(&images, &cancel).expect_err("no tower").to_string();
    assert!(error.starts_with("images: the model reads none"), "{error}");
}

#[test]
fn a_quantized_tower_has_nearly_the_same_features() {
    for target in [Target::Cpu, Target::Cuda] {
        let whole = exported_as("t2-vision", target.name(), Export::default().target(target));
        let other = Model::open(&whole).expect("opens");
        for (blocks, least) in [(Blocks::integer(8, 128), 0.998), (Blocks::integer(4, 32), 0.9)] {
            let label = format!("tower-{}-{}", target.name(), blocks.name());
            let quantization = Quantization { vision: Some(blocks), ..Quantization::default() };
            let export = Export::default().target(target).quantization(quantization);
            let packed = exported_as("t2-vision", &label, export);
            let model = Model::open(&packed).expect("opens");
            let found = comparison(&model, &other, &[], &Cancellation::new()).expect("compares");
            assert_eq!(
                (found.hidden_relative_error, found.logits_relative_error),
                (0.0, 0.0),
                "texts are as they were"
            );
            let features = found.image_features.expect("both read images");
            assert!(features.mean_cosine > least && features.mean_cosine < 1.0, "{label}: {features:?}");
        }
    }
}

#[test]
fn a_tower_that_cannot_be_quantized_is_refused() {
    let checkpoint = |name: &str| fixture(name).join("checkpoint");
    let out = TempDir::new().expect("a temporary folder");
    let out = out.path().join("model");
    for (name, arguments, says) in [
        ("t2-vision", &["--target", "tensorrt"][..], "--quantize-vision requires --target cpu or cuda (got tensorrt)"),
        (
            "t2-vision",
            &["--target", "cpu", "--no-vision"],
            "--quantize-vision: expected none for a model that reads no images, found int8",
        ),
        (
            "tiny-balanced",
            &["--target", "cpu"],
            "--quantize-vision: expected none for a model that reads no images, found int8",
        ),
    ] {
        let mut command = program("t5gemma-export");
        let output =
            command.arg(checkpoint(name)).arg(&out).args(arguments).args(["--quantize-vision", "int8"]).output();
        let output = output.expect("starts");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && told.contains(says) && !out.exists(), "{arguments:?}: {told}");
    }
}

#[test]
fn programs_check_and_measure_the_tower() {
    let model = model_with_vision("default", Export::default());
    let model = path(&model);
    let told = stdout(run("t5gemma", ["doctor", model], ""));
    assert!(told.ends_with(&format!("{model} runs: encoder, decoder, decoder_with_past, vision_encoder\n")), "{told}");
    let told = stdout(run("t5gemma", ["verify", model], ""));
    assert!(told.contains("ok   hidden states: rows with and without images = alone"), "{told}");
    let told = stdout(run("t5gemma", ["verify", model, "--against", model, "--json"], ""));
    let report: Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(report["image_features"], json!({"relative_error": 0.0, "mean_cosine": 1.0, "min_cosine": 1.0}));

    let bench = ["bench", model, "--source-length", "5", "--max-new-tokens", "2", "--repeat", "2"];
    let report = stdout(run("t5gemma", [&bench[..], &["--images", "2", "--json"]].concat(), ""));
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!((&report["case"]["images"], &report["case"]["source_length"]), (&json!(2), &json!(5 + 2 * 4)));
    assert_eq!(report["image_ms"]["count"], 2, "{report}");
    let told = stdout(run("t5gemma", [&bench[..], &["--images", "1"]].concat(), ""));
    assert!(told.contains("1 of 9 tokens, those of 1 images among them\n") && told.contains("\n  image "), "{told}");
    let told = stdout(run("t5gemma", bench, ""));
    assert!(!told.contains("\n  image "), "{told}");

    // An encoder alone.
    let features = TempDir::new().expect("a temporary folder");
    let features = features.path().join("features");
    let mut export = program("t5gemma-export");
    export.arg(fixture("t2-vision").join("checkpoint")).arg(&features).args(["--task", "feature-extraction"]);
    stdout(export.output().expect("starts"));
    let features = path(&features);
    let told = stdout(run("t5gemma", ["doctor", features], ""));
    assert!(told.ends_with(&format!("{features} runs: model, vision_encoder\n")), "{told}");
    let told = stdout(run("t5gemma", ["verify", features], ""));
    assert!(told.contains("ok   rows with and without images = alone"), "{told}");
    let told = stdout(run("t5gemma", ["verify", features, "--against", features], ""));
    assert!(told.contains("\nimage_features "), "{told}");
    let report = stdout(run(
        "t5gemma",
        ["bench", features, "--source-length", "5", "--images", "1", "--repeat", "2", "--json"],
        "",
    ));
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["image_ms"]["count"], 2, "{report}");

    let blind = model_with_vision("blind", Export::default().vision(false));
    let refused = run("t5gemma", ["bench", path(&blind), "--images", "1"], "");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--images requires a model that reads images"));
    let told = stdout(run("t5gemma", ["doctor", path(&blind)], ""));
    assert!(told.ends_with("decoder_with_past\n"), "{told}");
    let refused = run("t5gemma", ["doctor", "no/model"], "");
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stdout).contains("no/model"), "{refused:?}");
}

#[test]
fn requests_without_images_get_those_of_the_flag() {
    let model = model_with_vision("default", Export::default());
    let (file, other) = (folder().join("files/rgb420.jpg"), folder().join("files/palette8.png"));
    let (file, other) = (path(&file), path(&other));
    let scores = |flags: &[&str], images: Option<&str>| -> f64 {
        let mut request = json!({"text": "<start_of_image> a", "target_ids": [20, 21, 1]});
        if let Some(image) = images {
            request["images"] = json!([image]);
        }
        let told = stdout(run("t5gemma", [&["score", path(&model)], flags].concat(), request.to_string()));
        let answer: Value = serde_json::from_str(&told).expect("JSON");
        answer["scores"][0]["logprob"].as_f64().unwrap_or_else(|| panic!("{answer}"))
    };
    let expected = scores(&[], Some(file));
    assert_eq!(scores(&["--image", file], None), expected);
    assert_eq!(scores(&["--image", other], Some(file)), expected, "its own images count");
    assert_ne!(scores(&["--image", other], None), expected);
    let request = json!({"text": "<start_of_image> a", "options": {"max_new_tokens": 6}}).to_string();
    let generated = |flags: &[&str], request: &str| {
        stdout(run("t5gemma", [&["generate", path(&model), "--jsonl"], flags].concat(), request))
    };
    let own = json!({"text": "<start_of_image> a", "images": [file], "options": {"max_new_tokens": 6}}).to_string();
    let expected = generated(&[], &own);
    assert_eq!(generated(&["--image", file], &request), expected);
}

#[test]
fn the_files_of_a_processor_are_copied() {
    let folder = TempDir::new().expect("a temporary folder");
    let checkpoint = folder.path().join("checkpoint");
    fs::create_dir(&checkpoint).expect("a new folder");
    for file in
        fs::read_dir(fixture("t2-vision").join("checkpoint")).expect("a fixture").map(|file| file.expect("listed"))
    {
        fs::copy(file.path(), checkpoint.join(file.file_name())).expect("copied");
    }
    let preprocessor = r#"{"image_mean": [0.25, 0.5, 0.75], "size": {"height": 28, "width": 28}}"#;
    let processor = r#"{"processor_class": "Gemma3Processor", "image_seq_length": 4}"#;
    fs::write(checkpoint.join("preprocessor_config.json"), preprocessor).expect("written");
    fs::write(checkpoint.join("processor_config.json"), processor).expect("written");
    let export = |out: &str, arguments: &[&str]| {
        let out = folder.path().join(out);
        (program("t5gemma-export").arg(&checkpoint).arg(&out).args(arguments).output().expect("starts"), out)
    };
    let (output, out) = export("model", &[]);
    stdout(output);
    assert_eq!(fs::read_to_string(out.join("preprocessor_config.json")).expect("copied"), preprocessor);
    assert_eq!(fs::read_to_string(out.join("processor_config.json")).expect("copied"), processor);
    let manifest: Value = serde_json::from_slice(&fs::read(out.join("manifest.json")).expect("written")).expect("JSON");
    assert_eq!(manifest["images"]["image_mean"], json!([0.25, 0.5, 0.75]));
    assert!(manifest["files"]["preprocessor_config.json"]["sha256"].is_string(), "{}", manifest["files"]);
    let (output, out) = export("text", &["--no-vision"]);
    stdout(output);
    assert!(!out.join("preprocessor_config.json").exists() && !out.join("processor_config.json").exists());
    fs::write(checkpoint.join("preprocessor_config.json"), r#"{"resample": 3}"#).expect("written");
    let (output, out) = export("cubic", &[]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        told.contains("preprocessor_config.json: resample: expected 2 (bilinear), found 3") && !out.exists(),
        "{told}"
    );
}
