//! Images through every door of `t5gemma serve`: the ids are those of the library. What is not here is refused.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_runtime::{
    Batch, Cancellation, Controls, Encoder, Features, GenerationOptions, Image, ImageLimits, Model, PixelValues,
    Pooling, SpecialTokens, Task, TextWithImages,
};
use tempfile::TempDir;

use crate::common::{python, run, stdout};
use crate::images::{folder, model_with_vision, with_tokenizer};
use crate::serve::{Answer, Serving, path, receive, send};
use crate::tasks_t5gemma2::task_fixture;

/// Parts as templates of models for images read them.
const PARTS: &str = "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}\
                     {% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>{% else %}\
                     {{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}";
/// Texts only.
const TEXTS: &str = "{% for message in messages %}{{ message['content'] }}{% endfor %}";

/// The model with a chat template.
fn with_template(model: &Path, template: &str) -> TempDir {
    let folder = TempDir::new().expect("a temporary folder");
    for file in fs::read_dir(model).expect("a model").map(|file| file.expect("listed")) {
        fs::copy(file.path(), folder.path().join(file.file_name())).expect("copied");
    }
    fs::write(folder.path().join("chat_template.jinja"), template).expect("written");
    folder
}

struct Expected<'a> {
    model: &'a Model,
}

impl Expected<'_> {
    /// The tokens of the library's target, and their text.
    fn of(&self, (ids, images): (Vec<i64>, Vec<PixelValues>)) -> (Value, String) {
        let batch = Batch::masked(&[&ids[..]], &[vec![1; ids.len()]]).expect("fits").with_images(vec![images]);
        let config = self.model.generation_config().with(&GenerationOptions::default().max_new_tokens(8));
        let rows = self.model.generate_batch(&batch.expect("fits"), &config.expect("valid"), Controls::default());
        let tokens = rows.expect("generates").swap_remove(0).swap_remove(0).tokens;
        let text = self.model.tokenizer().expect("there").decode(&tokens, SpecialTokens::Skip).expect("decodes");
        (json!(tokens), text)
    }
}

fn own(answer: &Answer) -> Value {
    answer.json()["sequences"][0][0]["tokens"].clone()
}

#[test]
fn images_come_in_by_every_door() {
    let exported = model_with_vision("default", Export::default());
    let (parts, texts) = (with_template(&exported, PARTS), with_template(&exported, TEXTS));
    let model = Model::open(&exported).expect("opens");
    let (file, other) = (folder().join("files/rgb420.jpg"), folder().join("files/palette8.png"));
    let [uri, other_uri] = [&file, &other].map(|file| python("data_uri.py", [file]).trim().to_string());
    let picture = |file: &Path| Image::open(file, ImageLimits::default()).expect("decodes");
    let settings = model.image_settings().expect("reads images");
    let tokenizer = model.tokenizer().expect("there");
    let expected = Expected { model: &model };
    let source =
        |text: &str, files: &[&Path]| TextWithImages::new(text, files.iter().map(|file| picture(file)).collect());
    let one = source("<start_of_image> a", &[&file]).tokenize(tokenizer, settings).expect("fits");
    let pixels: Vec<f32> = one.1[0].values().to_vec();
    let ids = one.0.clone();
    let (one, one_text) = expected.of(one);
    let both = source("<start_of_image>b<start_of_image>", &[&file, &other]).tokenize(tokenizer, settings);
    let (both, both_text) = expected.of(both.expect("fits"));
    let chat = source("<start_of_image> a", &[&file]).tokenize_conversation(tokenizer, settings).expect("fits");
    let (chat, chat_text) = expected.of(chat);
    assert_ne!(one, both);

    let named = [("plain", path(&exported)), ("parts", path(parts.path())), ("texts", path(texts.path()))];
    let named = named.map(|(name, folder)| format!("{name}={folder}"));
    let serving = Serving::start(&["--model", &named[0], "--model", &named[1], "--model", &named[2]]);
    let options = json!({"max_new_tokens": 8});

    // JSON lines, with texts, ids and messages.
    let messages = json!([{"role": "user", "content": "<start_of_image> a"}]);
    for (model, request, tokens) in [
        ("plain", json!({"text": "<start_of_image> a", "images": [uri], "options": options}), &one),
        ("plain", json!({"text": ["<start_of_image> a"], "images": [[uri]], "options": options}), &one),
        ("plain", json!({"input_ids": ids, "images": [uri], "options": options}), &one),
        (
            "plain",
            json!({"text": "<start_of_image>b<start_of_image>", "images": [uri, other_uri], "options": options}),
            &both,
        ),
        ("texts", json!({"messages": messages, "images": [uri], "options": options}), &chat),
    ] {
        let answer = serving.post(&format!("/v1/t5gemma/{model}"), &request);
        assert_eq!(own(&answer), *tokens, "{request}: {answer:?}");
    }

    // OpenAI: parts of a message, for templates of either kind, and a completion.
    let content =
        json!([{"type": "image_url", "image_url": {"url": uri, "detail": "auto"}}, {"type": "text", "text": " a"}]);
    for model in ["parts", "texts"] {
        let mut request =
            json!({"model": model, "messages": [{"role": "user", "content": content}], "max_completion_tokens": 8});
        let answer = serving.post("/v1/chat/completions", &request);
        assert_eq!(answer.json()["choices"][0]["message"]["content"], chat_text, "{model}: {answer:?}");
        request["stream"] = true.into();
        let events = serving.post("/v1/chat/completions", &request).events();
        let streamed: String = events.iter().filter_map(|it| it["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(streamed, chat_text, "{model}");
    }
    let completion = json!({"model": "plain", "prompt": "<start_of_image>b<start_of_image>", "images": [uri, other_uri], "max_tokens": 8});
    let answer = serving.post("/v1/completions", &completion);
    assert_eq!(answer.json()["choices"][0]["text"], both_text, "{answer:?}");

    // TGI's clients write images into the text.
    let request = json!({"inputs": format!("![]({uri}) a"), "parameters": {"max_new_tokens": 8}});
    let answer = serving.post("/generate", &request);
    assert_eq!(answer.json()["generated_text"], one_text, "{answer:?}");
    let events = serving.post("/generate_stream", &request).events();
    assert_eq!(events.last().expect("events")["generated_text"], one_text);

    // The Open Inference Protocol: bytes, data URIs, numbers.
    let infer = |request: &Value, raw: &[u8]| {
        let body = request.to_string();
        let length = body.len().to_string();
        let headers = [("inference-header-content-length", length.as_str())];
        receive(send(serving.port, "POST", "/v2/models/plain/infer", &headers, &[body.as_bytes(), raw].concat()))
    };
    let text = json!({"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["<start_of_image> a"]});
    let bytes = fs::read(&file).expect("a fixture");
    let raw = [&(bytes.len() as u32).to_le_bytes()[..], &bytes].concat();
    let image =
        json!({"name": "images", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": raw.len()}});
    let given_ids = json!({"name": "input_ids", "datatype": "INT64", "shape": [1, ids.len()], "data": ids});
    let numbers = json!({"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 28, 28], "data": pixels});
    let by_uri = json!({"name": "images", "datatype": "BYTES", "shape": [1, 1], "data": [uri]});
    let (mut two_texts, mut two_images) = (text.clone(), by_uri.clone());
    two_texts["shape"] = json!([2]);
    two_texts["data"] = json!(["no image", "<start_of_image> a"]);
    two_images["shape"] = json!([2, 1]);
    two_images["data"] = json!(["", uri]);
    for (inputs, raw, row) in [
        (json!([text, image]), &raw[..], 0),
        (json!([given_ids, image]), &raw, 0),
        (json!([text, by_uri]), &[], 0),
        (json!([text, numbers]), &[], 0),
        (json!([given_ids, numbers]), &[], 0),
        (json!([two_texts, two_images]), &[], 1),
    ] {
        let request = json!({"inputs": inputs, "outputs": [{"name": "output_ids"}], "parameters": options});
        let answer = infer(&request, raw);
        let output = answer.json()["outputs"][0].clone();
        let width = output["shape"][1].as_u64().unwrap_or_else(|| panic!("{answer:?}")) as usize;
        let found = output["data"].as_array().expect("numbers")[row * width..].to_vec();
        assert_eq!(json!(found[..one.as_array().expect("tokens").len()]), one, "{inputs}");
    }
    let names: Vec<Value> = serving.get("/v2/models/plain").json()["inputs"].as_array().expect("inputs").clone();
    assert!(
        names
            .iter()
            .any(|input| *input == json!({"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, 28, 28]}))
    );
    let triton = json!({"text_input": "<start_of_image> a", "images": [uri], "max_new_tokens": 8});
    assert_eq!(serving.post("/v2/models/plain/generate", &triton).json()["text_output"], one_text);
}

#[test]
fn vectors_are_those_of_texts_with_images() {
    let exported = model_with_vision("default", Export::default());
    let pooled = model_with_vision("pooled", {
        let features = Features { pooling: Pooling::Mean, ..Features::default() };
        Export::default().task(Some(Task::FeatureExtraction(features)))
    });
    let (file, other) = (folder().join("files/rgb420.jpg"), folder().join("files/palette8.png"));
    let [uri, other_uri] = [&file, &other].map(|file| python("data_uri.py", [file]).trim().to_string());
    let model = Model::open(&exported).expect("opens");
    let picture = Image::open(&file, ImageLimits::default()).expect("decodes");
    let sources =
        [TextWithImages::new("<start_of_image> a", vec![picture]), TextWithImages::new("no image", Vec::new())];
    let batch = model.tokenize_with_images(&sources).expect("tokenizes");
    let encoder = Encoder::open(&pooled).expect("opens");
    let expected = encoder.embed_normalized(&batch, Pooling::Mean, &Cancellation::new()).expect("encodes");
    let named = [format!("model={}", path(&exported)), format!("pooled={}", path(&pooled))];
    let flags = ["--max-request-images", "2"];
    let serving = Serving::start(&[&["--model", &named[0], "--model", &named[1]], &flags[..]].concat());
    let close = |found: &Value, row: usize| {
        let found = found.as_array().unwrap_or_else(|| panic!("{found}"));
        let pairs = found.iter().zip(expected.row(row));
        assert_eq!(found.len(), expected.ncols());
        pairs.fold(0.0, |most: f64, (a, b)| most.max((a.as_f64().expect("a number") - f64::from(*b)).abs())) < 1e-5
    };
    let texts = json!(["<start_of_image> a", "no image"]);
    for model in ["model", "pooled"] {
        let request = json!({"model": model, "inputs": texts, "images": [[uri], []]});
        let vectors = serving.post("/embed", &request).json();
        assert!(close(&vectors[0], 0) && close(&vectors[1], 1), "{model}");
        let request = json!({"model": model, "input": "<start_of_image> a", "images": [uri]});
        let answer = serving.post("/v1/embeddings", &request).json();
        assert!(close(&answer["data"][0]["embedding"], 0), "{answer}");
        let request = json!({"model": model, "input": [batch.source(0)], "images": [[uri]]});
        assert!(close(&serving.post("/v1/embeddings", &request).json()["data"][0]["embedding"], 0), "{model}");
        let request = json!({"model": model, "input": "<start_of_image> a", "images": [other_uri]});
        assert!(!close(&serving.post("/v1/embeddings", &request).json()["data"][0]["embedding"], 0), "{model}");
    }
    let text = json!({"name": "text_input", "datatype": "BYTES", "shape": [2], "data": texts});
    let images = json!({"name": "images", "datatype": "BYTES", "shape": [2, 1], "data": [uri, ""]});
    let answer = serving.post("/v2/models/pooled/infer", &json!({"inputs": [text, images]})).json();
    let numbers = answer["outputs"][0]["data"].as_array().unwrap_or_else(|| panic!("{answer}")).clone();
    let rows: Vec<Value> = numbers.chunks(expected.ncols()).map(|row| json!(row)).collect();
    assert!(close(&rows[0], 0) && close(&rows[1], 1), "{answer}");
    let names = serving.get("/v2/models/pooled").json()["inputs"].to_string();
    assert!(names.contains("pixel_values"), "{names}");
    let tokens =
        serving.post("/embed_all", &json!({"model": "model", "inputs": "<start_of_image> a", "images": [uri]}));
    assert_eq!(tokens.json()[0].as_array().map(Vec::len), Some(batch.length()), "{tokens:?}");
    for (request, expected) in [
        (json!({"inputs": "a", "images": [path(&file)]}), "expected a data URI (the server opens no files"),
        (json!({"inputs": "a", "images": [uri, uri, uri]}), "the request has 3 images, but the server takes at most 2"),
        (json!({"inputs": "a", "pan_and_scan": true}), "pan_and_scan: expected images beside it, found none"),
        (json!({"inputs": "a", "images": [uri]}), "as many as the text has <start_of_image>, found 1"),
        (
            json!({"inputs": "<start_of_image>", "images": [uri], "truncate": true}),
            "truncate: expected no images beside it",
        ),
    ] {
        let answer = serving.post("/embed", &request);
        assert!(answer.json()["error"].as_str().is_some_and(|error| error.contains(expected)), "{request}: {answer:?}");
    }
}

#[test]
fn labels_are_those_of_texts_with_images() {
    let model =
        with_tokenizer(&task_fixture("sequence").join("checkpoint"), "t2-sequence-tokenizer", Export::default());
    let (file, other) = (folder().join("files/rgb420.jpg"), folder().join("files/palette8.png"));
    let [uri, other_uri] = [&file, &other].map(|file| python("data_uri.py", [file]).trim().to_string());
    let request = json!({"text": "<start_of_image> a", "images": [file]});
    let printed = stdout(run("t5gemma", ["classify", path(&model), "--jsonl", "--top-k", "all"], request.to_string()));
    let printed: Value = serde_json::from_str(&printed).expect("JSON");
    let score = |labels: &Value, label: &str| -> f64 {
        let labels = labels.as_array().unwrap_or_else(|| panic!("{labels}"));
        let found = labels.iter().find(|it| it["label"] == label).expect("every label");
        found["score"].as_f64().expect("a number")
    };
    let labels: Vec<String> = ["bad", "so-so", "good"].map(String::from).to_vec();
    let close =
        |found: &Value| labels.iter().all(|it| (score(found, it) - score(&printed["labels"][0], it)).abs() < 1e-5);
    let serving = Serving::start(&[path(&model)]);
    let name = model.file_name().and_then(|name| name.to_str()).expect("UTF-8");
    let one = json!({"inputs": "<start_of_image> a", "images": [uri]});
    let answer = serving.post("/predict", &one).json();
    assert!(close(&answer), "{answer} {printed}");
    let answer = serving.post("/predict", &json!({"inputs": "<start_of_image> a", "images": [other_uri]})).json();
    assert!(!close(&answer), "{answer}");
    let both = json!({"inputs": [["no image"], ["<start_of_image> a"]], "images": [[], [uri]]});
    let answer = serving.post("/predict", &both).json();
    assert!(close(&answer[1]) && !close(&answer[0]), "{answer}");
    let text = json!({"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["<start_of_image> a"]});
    let images = json!({"name": "images", "datatype": "BYTES", "shape": [1], "data": [uri]});
    let answer = serving.post(&format!("/v2/models/{name}/infer"), &json!({"inputs": [text, images]})).json();
    let scores = answer["outputs"][0]["data"].as_array().unwrap_or_else(|| panic!("{answer}"));
    for (label, found) in labels.iter().zip(scores) {
        assert!((found.as_f64().expect("a number") - score(&printed["labels"][0], label)).abs() < 1e-5, "{answer}");
    }
    let pair = json!({"inputs": ["<start_of_image> a", "b"], "images": [uri]});
    let alone = serving.post("/predict", &json!({"inputs": "a", "pan_and_scan": true}));
    assert!(alone.json()["error"].as_str().is_some_and(|it| it.contains("pan_and_scan: expected images")), "{alone:?}");
    let refused = serving.post("/predict", &pair);
    assert!(
        refused.json()["error"].as_str().is_some_and(|it| it.contains("images: expected single texts")),
        "{refused:?}"
    );
}

#[test]
fn images_that_are_not_in_the_request_are_refused() {
    let exported = model_with_vision("default", Export::default());
    let parts = with_template(&exported, PARTS);
    let named = [format!("plain={}", path(&exported)), format!("parts={}", path(parts.path()))];
    let flags = ["--max-request-images", "2", "--max-image-pixels", "400", "--max-body-bytes", "100000"];
    let serving = Serving::start(&[&["--model", &named[0], "--model", &named[1]], &flags[..]].concat());
    let file = folder().join("files/rgb420.jpg");
    let uri = python("data_uri.py", [&file]);
    let small = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
    let line = |images: Value| ("/v1/t5gemma/plain", json!({"text": "<start_of_image>", "images": images}), "/error");
    let chat = |url: &str| {
        let content = json!([{"type": "image_url", "image_url": {"url": url}}]);
        (
            "/v1/chat/completions",
            json!({"model": "parts", "messages": [{"role": "user", "content": content}]}),
            "/error/message",
        )
    };
    let infer = |data: Value| {
        let text = json!({"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["<start_of_image>"]});
        let images = json!({"name": "images", "datatype": "BYTES", "shape": [1], "data": data});
        ("/v2/models/plain/infer", json!({"inputs": [text, images]}), "/error")
    };
    let no_files = "expected a data URI (the server opens no files and no connections), found";
    for ((path, request, at), expected) in [
        (line(json!([path(&file)])), no_files),
        (line(json!(["https://example.com/a.png"])), no_files),
        (line(json!(["0"])), no_files),
        (line(json!([small, small, small])), "the request has 3 images, but the server takes at most 2"),
        (line(json!([uri.trim()])), "images[0]: expected an image of at most 400 pixels"),
        (line(json!(["data:image/png;base64,AAAA"])), "images[0]: expected a JPEG, PNG or WebP image"),
        (
            ("/v1/t5gemma/plain", json!({"text": "a", "pixel_values": {"file": path(&file), "tensor": "a"}}), "/error"),
            "pixel_values: expected images (files are not read here)",
        ),
        (chat("https://example.com/a.png"), "messages[0].content[0].image_url.url: expected a data URI"),
        (chat(path(&file)), no_files),
        (infer(json!([path(&file)])), no_files),
        (infer(json!(["http://example.com/a.png"])), no_files),
        (("/generate", json!({"model": "plain", "inputs": "![](https://example.com/a.png)"}), "/error"), no_files),
        (
            (
                "/generate",
                json!({"model": "plain", "inputs": format!("![]({small})"), "parameters": {"truncate": 5}}),
                "/error",
            ),
            "truncate: expected no images beside it",
        ),
    ] {
        let answer = serving.post(path, &request);
        let message = answer.json().pointer(at).and_then(Value::as_str).unwrap_or_default().to_string();
        assert!(message.contains(expected), "{request}: {answer:?}");
        assert!(matches!(answer.status, 200 | 400 | 422), "{answer:?}");
    }
    let answer = serving.post(
        "/v1/t5gemma/plain",
        &json!({"text": "<start_of_image>", "images": [small], "options": {"max_new_tokens": 2}}),
    );
    assert!(answer.json()["sequences"].is_array(), "{answer:?}");
}
