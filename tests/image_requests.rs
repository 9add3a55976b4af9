//! Images through every door: JSON lines and flags of the programs, C, C++ and Python.

use std::fs;
use std::process::Command;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_runtime::{Controls, GenerationOptions, Image, ImageLimits, Model, SpecialTokens, TextWithImages};
use tempfile::TempDir;

use crate::common::{python, run, stdout, tests};
use crate::images::{folder, model_with_vision};
use crate::voice::fed;

/// The lines that `t5gemma` writes, as JSON.
fn lines(arguments: &[&str], stdin: &str) -> Vec<Value> {
    let output = run("t5gemma", arguments, stdin);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
}

#[test]
fn requests_carry_images() {
    let path = model_with_vision("default", Export::default());
    let (model, folder_of_model) = (Model::open(&path).expect("opens"), path.to_str().expect("UTF-8"));
    let (file, wide) = (folder().join("files/rgb420.jpg"), folder().join("files/palette8.png"));
    let (file, wide) = (file.to_str().expect("UTF-8"), wide.to_str().expect("UTF-8"));
    let limits = ImageLimits::default();
    let (picture, other) = (Image::open(file, limits).expect("decodes"), Image::open(wide, limits).expect("decodes"));
    let config = model.generation_config().with(&GenerationOptions::default().max_new_tokens(8)).expect("valid");
    let expected = |source: TextWithImages| -> Value {
        let batch = model.tokenize_with_images(&[source]).expect("tokenizes");
        let rows = model.generate_batch(&batch, &config, Controls::default()).expect("generates");
        json!(rows.iter().flatten().map(|hypothesis| &hypothesis.tokens).collect::<Vec<_>>())
    };
    let one = expected(TextWithImages::new("<start_of_image> a", vec![picture.clone()]));
    let both = expected(TextWithImages::new("<start_of_image>b<start_of_image>", vec![picture.clone(), other]));

    // A data URI, and the same pixel values in a file, with a text and with token ids.
    let uri = python("data_uri.py", [file]);
    let tensors = TempDir::new().expect("a temporary folder");
    let tensors = tensors.path().join("pixels.safetensors");
    let pixels = picture.pixel_values(model.image_settings().expect("reads images"), false);
    let bytes: Vec<u8> = pixels[0].values().iter().flat_map(|value| value.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1, 3, 28, 28], &bytes).expect("fits");
    fs::create_dir_all(tensors.parent().expect("in a folder")).expect("made");
    safetensors::serialize_to_file([("pixels", view)], None, &tensors).expect("written");
    let exact = json!({"file": tensors, "tensor": "pixels"});
    let ids = model.tokenize_with_images(&[TextWithImages::new("<start_of_image> a", vec![picture])]).expect("fits");
    let requests = [
        (json!({"text": "<start_of_image> a", "images": [file]}), &one),
        (json!({"text": ["<start_of_image> a"], "images": [[uri.trim()]]}), &one),
        (json!({"text": "<start_of_image> a", "pixel_values": exact}), &one),
        (json!({"input_ids": ids.ids(), "images": [file]}), &one),
        (json!({"input_ids": [ids.ids()], "pixel_values": exact}), &one),
        (json!({"text": "<start_of_image>b<start_of_image>", "images": [file, wide], "pan_and_scan": false}), &both),
    ];
    let stdin: String = requests.iter().map(|(request, _)| format!("{request}\n")).collect();
    let found = lines(&["generate", folder_of_model, "--jsonl", "--max-new-tokens", "8"], &stdin);
    assert_eq!(found.len(), requests.len());
    for ((request, expected), found) in requests.iter().zip(&found) {
        let rows = found["sequences"].as_array().unwrap_or_else(|| panic!("{request}: {found}"));
        let tokens: Vec<&Value> =
            rows.iter().flat_map(|row| row.as_array().expect("a list")).map(|s| &s["tokens"]).collect();
        assert_eq!(json!(tokens), **expected, "{request}");
    }

    // Scores and hidden states depend on the image.
    let score = |image: &str| {
        let request = json!({"text": "<start_of_image> a", "images": [image], "target_ids": [20, 21, 1]}).to_string();
        lines(&["score", folder_of_model], &request).remove(0)["scores"][0]["logprob"].as_f64().expect("a number")
    };
    assert!((score(file) - score(uri.trim())).abs() < 1e-6 && (score(file) - score(wide)).abs() > 1e-6);
    let out = TempDir::new().expect("a temporary folder");
    let out = out.path().join("states.safetensors");
    fs::create_dir_all(out.parent().expect("in a folder")).expect("made");
    let arguments =
        ["encode", folder_of_model, "--image", file, "-o", out.to_str().expect("UTF-8"), "<start_of_image> a"];
    stdout(run("t5gemma", arguments, ""));
    let states = fs::read(&out).expect("written");
    let states = SafeTensors::deserialize(&states).expect("safetensors");
    assert_eq!(states.tensor("0.last_hidden_state").expect("there").shape()[1], ids.length());

    // Texts with --image.
    let generate = |texts: &[&str]| {
        let flags = ["generate", folder_of_model, "--image", file, "--max-new-tokens", "8"];
        run("t5gemma", flags.iter().chain(texts), "")
    };
    let found = stdout(generate(&["<start_of_image> a", "<start_of_image> a"]));
    let text = model
        .tokenizer()
        .expect("there")
        .decode(&serde_json::from_value::<Vec<i64>>(one[0].clone()).expect("tokens"), SpecialTokens::Skip);
    assert_eq!(found, format!("{0}\n{0}\n", text.expect("decodes")));
    let failed = generate(&["no token"]);
    let message = String::from_utf8(failed.stderr).expect("UTF-8");
    assert_eq!(failed.status.code(), Some(1));
    assert!(
        message.contains("images: expected 0 images, as many as the text has <start_of_image>, found 1"),
        "{message}"
    );

    // What is wrong is named.
    for (request, message) in [
        (
            json!({"text": "a", "images": "x.png"}),
            "images: expected strings in a list or a list of lists, found \"x.png\"",
        ),
        (json!({"text": "a", "images": [["a"], ["b"]]}), "images: expected 1 lists, one for each source, found 2"),
        (json!({"text": "a", "images": [], "pixel_values": exact}), "expected images or pixel_values, found both"),
        (json!({"text": "a", "pan_and_scan": true}), "pan_and_scan: expected images beside it, found none"),
        (
            json!({"text": "a", "pixel_values": {"file": "x"}}),
            "pixel_values: expected {\"file\": \"…\", \"tensor\": \"…\"}",
        ),
        (
            json!({"text": "a", "images": ["data:image/png;base64,AAAA"]}),
            "images[0]: expected a JPEG, PNG or WebP image, found something else",
        ),
        (json!({"text": "a", "images": ["no/such.png"]}), "no/such.png: cannot be read"),
        (
            json!({"text": "a", "pixel_values": exact}),
            "pixel_values: expected 4 image tokens in the sources, 4 for each of 1 images, found 0",
        ),
        (json!({"text": "a", "pixel_values": {"file": tensors, "tensor": "other"}}), "without a tensor \"other\""),
        (
            json!({"messages": [], "images": [file]}),
            "images: expected text or input_ids beside them, found a conversation",
        ),
    ] {
        let found = lines(&["generate", folder_of_model, "--jsonl"], &request.to_string()).remove(0);
        let error = found["error"].as_str().unwrap_or_else(|| panic!("{request}: {found}"));
        assert!(error.contains(message), "{request}: {error}");
    }
}

#[test]
fn images_pass_through_cpp_and_python() {
    let (model, installed) = (model_with_vision("default", Export::default()), crate::capi::installed());
    let file = folder().join("files/rgb420.jpg");
    let picture = Image::open(&file, ImageLimits::default()).expect("decodes");
    let opened = Model::open(&model).expect("opens");
    let batch = opened.tokenize_with_images(&[TextWithImages::new("<start_of_image> a", vec![picture.clone()])]);
    let batch = batch.expect("tokenizes");
    let config = opened.generation_config().with(&GenerationOptions::default().max_new_tokens(8)).expect("valid");
    let rows = opened.generate_batch(&batch, &config, Controls::default()).expect("generates");
    let tokens = &rows[0][0].tokens;

    let case = json!({"width": picture.width(), "rgb": picture.rgb(), "tokens": tokens, "input_ids": batch.ids(),
        "pixel_values": batch.images()[0][0].values()});
    let mut python = installed.python();
    python.arg(tests().join("scripts/capi_python_images.py")).args([&model, &file]);
    assert_eq!(stdout(fed(python, &case.to_string())), "well\n");

    let mut cpp = Command::new(installed.program("capi/images.cpp", "plain", &[]));
    cpp.args([&model, &file]).arg(tokens.len().to_string());
    let values: Vec<String> = picture.rgb().iter().map(u8::to_string).collect();
    let found = stdout(fed(cpp, &format!("{} {}\n{}\n", picture.width(), picture.height(), values.join(" "))));
    let line: String = tokens.iter().map(|token| format!("{token} ")).collect();
    let refused = "images: expected 1 images, as many as the text has <start_of_image>, found 0";
    let uneven = "sources.images: expected 1 (one for each source), found 0";
    assert_eq!(found, format!("{line}\n{line}\n{refused}\n{uneven}\n"));
}
