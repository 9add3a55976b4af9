//! What each client of `t5gemma serve` gets: every door against the program, errors in every form, and real clients.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use t5gemma_exporter::Export;
use tempfile::TempDir;

use crate::common::{demo, exported_from, python, run, stdout, tests};
use crate::serve::{Answer, Serving, ask, path, receive, send};
use crate::tasks::with_tokenizer;

#[test]
fn every_door_gives_what_the_program_prints() {
    let lines = std::fs::read_to_string(tests().join("scripts/demo.txt")).expect("the lines are there");
    for beams in [1, 3] {
        let model = demo();
        let flag = format!("--num-beams={beams}");
        let printed = stdout(run("t5gemma", ["generate", path(&model), &flag], &lines));
        let serving = Serving::start(&[path(&model)]);
        let joined = |answer: Answer, text: fn(&Value) -> Option<&str>| -> String {
            answer.events().iter().filter_map(text).collect()
        };
        for (line, expected) in lines.lines().zip(printed.lines()) {
            let openai = json!({"model": "demo", "prompt": line, "num_beams": beams});
            let tgi = json!({"inputs": line, "parameters": {"num_beams": beams}});
            let triton = json!({"text_input": line, "num_beams": beams});
            let own = json!({"text": line, "options": {"num_beams": beams}});
            let oip = json!({
                "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [line]}],
                "parameters": {"num_beams": beams},
            });
            let mut stream = openai.clone();
            stream["stream"] = true.into();
            let mut root_stream = tgi.clone();
            root_stream["stream"] = true.into();
            let found = [
                ("completions", serving.post("/v1/completions", &openai).json()["choices"][0]["text"].clone()),
                (
                    "streamed completions",
                    joined(serving.post("/v1/completions", &stream), |it| it["choices"][0]["text"].as_str()).into(),
                ),
                ("TGI", serving.post("/generate", &tgi).json()["generated_text"].clone()),
                ("root", serving.post("/", &tgi).json()[0]["generated_text"].clone()),
                (
                    "streamed TGI",
                    joined(serving.post("/generate_stream", &tgi), |it| it["token"]["text"].as_str()).into(),
                ),
                (
                    "streamed root",
                    serving.post("/", &root_stream).events().last().expect("events")["generated_text"].clone(),
                ),
                ("Triton", serving.post("/v2/models/demo/generate", &triton).json()["text_output"].clone()),
                (
                    "streamed Triton",
                    joined(serving.post("/v2/models/demo/generate_stream", &triton), |it| it["text_output"].as_str())
                        .into(),
                ),
                ("infer", serving.post("/v2/models/demo/infer", &oip).json()["outputs"][0]["data"][0].clone()),
                ("JSON lines", serving.post("/v1/t5gemma", &own).json()["sequences"][0][0]["text"].clone()),
            ];
            for (door, text) in found {
                assert_eq!(text, *expected, "{door}, {beams} beams: {line}");
            }
        }
    }
}

#[test]
fn json_lines_are_those_of_the_program() {
    let requests = [
        json!({"text": ["Dr. Lee paid $3.50.", "It is 3:05 pm."], "options": {"num_beams": 4, "output_logprobs": true}}),
        json!({"id": "b", "input_ids": [5, 6, 7], "decoder_input_ids": [2, 9], "options": {"max_new_tokens": 3}}),
        json!({"id": 7, "text": "a", "options": {"do_sample": true, "seed": 5, "num_return_sequences": 2}}),
        json!({"id": 8, "txt": "a"}),
        json!({"id": 9, "text": "a", "options": {"num_beams": 0}}),
    ];
    let lines: String = requests.iter().map(|request| format!("{request}\n")).collect();
    let printed = run("t5gemma", ["generate", path(&demo()), "--jsonl"], &lines).stdout;
    let printed: Vec<Value> =
        String::from_utf8_lossy(&printed).lines().map(|it| serde_json::from_str(it).expect("JSON")).collect();
    let serving = Serving::start(&[path(&demo())]);
    let answer = ask(serving.port, "POST", "/v1/t5gemma/demo", &lines);
    let found: Vec<Value> = answer.text().lines().map(|it| serde_json::from_str(it).expect("JSON")).collect();
    assert_eq!(found[..4], printed[..4]);
    // The program names its flags and options.
    assert_eq!(found[4]["id"], printed[4]["id"]);
    assert!(found[4]["error"].as_str().is_some_and(|it| it.starts_with("num_beams: expected")), "{}", found[4]);
    let answer = send(
        serving.port,
        "POST",
        "/v1/t5gemma",
        &[("accept", "text/event-stream")],
        requests[1].to_string().as_bytes(),
    );
    let events = receive(answer).events();
    let tokens: Vec<&Value> = events.iter().filter_map(|it| it.get("token")).collect();
    assert_eq!(json!(tokens), printed[1]["sequences"][0][0]["tokens"]);
    assert_eq!(events.last(), Some(&printed[1]));
    let scored =
        json!({"input_ids": [5, 6, 7], "options": {"output_logprobs": true, "top_logprobs": 2, "max_new_tokens": 5}});
    let accept = [("accept", "text/event-stream")];
    let answer = receive(send(serving.port, "POST", "/v1/t5gemma", &accept, scored.to_string().as_bytes()));
    let (events, of) = (answer.events(), |events: &[Value], field: &str| -> Value {
        events.iter().filter_map(|event| event.get(field)).cloned().collect()
    });
    let whole = &events.last().expect("a result")["sequences"][0][0];
    assert_eq!(of(&events, "logprob"), whole["logprobs"], "{whole}");
    assert_eq!(of(&events, "top_logprobs"), whole["top_logprobs"], "{whole}");
}

#[test]
fn encoders_and_classifiers_answer_as_the_program_does() {
    let folder = TempDir::new().expect("a temporary folder");
    let model = with_tokenizer(folder.path(), "sequence-encoder");
    let of_encoder = TempDir::new().expect("a temporary folder");
    let tokens = with_tokenizer(of_encoder.path(), "token-encoder");
    let named =
        [format!("labels={}", path(&model)), format!("tokens={}", path(&tokens)), format!("demo={}", path(&demo()))];
    let serving = Serving::start(&["--model", &named[0], "--model", &named[1], "--model", &named[2]]);
    let text = "Ada wrote programs";
    let printed = stdout(run(
        "t5gemma",
        ["classify", path(&model), "--jsonl", "--top-k", "all"],
        format!("{}\n", json!({"text": text})),
    ));
    let printed: Value = serde_json::from_str(&printed).expect("JSON");
    let numbers = |labels: &Value| -> Vec<(String, f32)> {
        let one = |it: &Value| {
            (it["label"].as_str().expect("a label").to_string(), it["score"].as_f64().expect("a score") as f32)
        };
        labels.as_array().expect("labels").iter().map(one).collect()
    };
    let found = serving.post("/predict", &json!({"inputs": text})).json();
    assert_eq!(numbers(&found), numbers(&printed["labels"][0]));
    assert_eq!(serving.post("/", &json!({"inputs": text, "parameters": {}})).json(), found);
    let both = serving.post("/predict", &json!({"inputs": [[text], [text]]})).json();
    // Sources that share a batch are rounded in another way.
    for labels in both.as_array().expect("two texts") {
        for (one, alone) in numbers(labels).iter().zip(numbers(&found)) {
            assert!(one.0 == alone.0 && (one.1 - alone.1).abs() < 1e-5, "{both}");
        }
    }
    let oip = json!({"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [1, 3], "data": [7, 8, 9]}]});
    let outputs = serving.post("/v2/models/labels/infer", &oip).json()["outputs"].clone();
    assert_eq!(outputs[1]["data"][0], found[0]["label"]);
    let of_tokens = serving.post("/predict", &json!({"model": "tokens", "inputs": "Ada wrote"})).json();
    let printed = stdout(run("t5gemma", ["classify", path(&tokens), "Ada wrote"], ""));
    let printed: Vec<(&str, &str)> = printed
        .lines()
        .filter_map(|line| {
            let mut parts = line.split('\t');
            Some((parts.next()?, parts.next()?))
        })
        .collect();
    let found: Vec<(&str, &str)> = of_tokens
        .as_array()
        .expect("tokens")
        .iter()
        .map(|it| (it["word"].as_str().expect("a word"), it["entity"].as_str().expect("a label")))
        .collect();
    assert_eq!(found, printed);
    // The encoder of a model that generates embeds as well: the mean over tokens, of length 1.
    let vectors = serving.post("/embed", &json!({"inputs": ["Dr. Lee paid", "It is 3:05 pm."]})).json();
    let norm: f64 =
        vectors[0].as_array().expect("a vector").iter().map(|it| it.as_f64().expect("a number").powi(2)).sum();
    assert!((norm - 1.0).abs() < 1e-5, "{norm}");
    let alike = serving
        .post(
            "/similarity",
            &json!({"inputs": {"source_sentence": "Dr. Lee paid", "sentences": ["Dr. Lee paid", "It is 3:05 pm."]}}),
        )
        .json();
    assert!((alike[0].as_f64().expect("a number") - 1.0).abs() < 1e-5, "{alike}");
    let ranked = serving
        .post(
            "/rerank",
            &json!({"query": "Dr. Lee paid", "texts": ["It is 3:05 pm.", "Dr. Lee paid"], "return_text": true}),
        )
        .json();
    assert_eq!((&ranked[0]["index"], &ranked[0]["text"]), (&json!(1), &json!("Dr. Lee paid")));
    assert_eq!(ranked[1]["score"], alike[1]);
    let ids = serving.post("/tokenize", &json!({"model": "demo", "inputs": "Dr. Lee"})).json();
    let ids: Vec<&Value> = ids[0].as_array().expect("tokens").iter().map(|token| &token["id"]).collect();
    assert_eq!(serving.post("/decode", &json!({"model": "demo", "ids": ids})).json(), json!(["Dr. Lee"]));
}

#[test]
fn errors_have_the_form_of_their_door() {
    let serving = Serving::start(&[path(&demo()), "--max-body-bytes", "5000", "--max-request-sources", "2"]);
    let large = json!({"prompt": "a".repeat(6000)}).to_string();
    let cases = [
        ("POST", "/v1/completions", "{", 400, "/error/type", "invalid_request_error"),
        (
            "POST",
            "/v1/completions",
            "{\"prompt\": \"a\", \"max_token\": 1}",
            400,
            "/error/message",
            "max_token: no such field",
        ),
        (
            "POST",
            "/v1/completions",
            "{\"prompt\": [\"a\", \"b\"], \"num_beams\": 200}",
            400,
            "/error/message",
            "the request has 400 rows, but the server takes at most 256",
        ),
        (
            "POST",
            "/v1/completions",
            "{\"prompt\": [\"a\", \"b\", \"c\"]}",
            400,
            "/error/message",
            "the request has 3 sources, but the server takes at most 2",
        ),
        ("POST", "/v1/completions", "{\"prompt\": \"a\", \"timeout\": 0}", 504, "/error/code", "timeout"),
        (
            "POST",
            "/v1/chat/completions",
            "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}]}",
            400,
            "/error/message",
            "messages[0].content[0]: not supported: the model reads no image_url",
        ),
        ("POST", "/v1/completions", &large, 413, "/error/message", "the body is longer than 5000 bytes"),
        ("GET", "/v1/models/none", "", 404, "/error/code", "model_not_found"),
        ("POST", "/v1/responses", "{}", 404, "/error/type", "invalid_request_error"),
        ("GET", "/v1/completions", "", 405, "/error/message", "this path takes another method"),
        (
            "POST",
            "/generate",
            "{\"inputs\": \"a\", \"parameters\": {\"num_beams\": 0}}",
            422,
            "/error_type",
            "validation",
        ),
        ("POST", "/embed", "{\"inputs\": []}", 400, "/error_type", "Empty"),
        ("POST", "/embed", "{\"inputs\": 5}", 422, "/error_type", "Validation"),
        ("POST", "/embed", "{\"inputs\": [\"a\", \"b\", \"c\"]}", 413, "/error_type", "Validation"),
        (
            "POST",
            "/predict",
            "{\"inputs\": \"a\"}",
            422,
            "/error",
            "demo is a model for text2text-generation, not for classification",
        ),
        ("POST", "/v2/models/none/infer", "{}", 404, "/error", "no model of the name \"none\" is served"),
        (
            "POST",
            "/v2/models/demo/infer",
            "{}",
            400,
            "/error",
            "inputs: expected text_input or input_ids, found neither",
        ),
        ("POST", "/v2/models/demo/versions/3/infer", "{}", 404, "/error", "demo has the version 1 only, found \"3\""),
    ];
    for (method, path, body, status, at, expected) in cases {
        let answer = ask(serving.port, method, path, body);
        assert_eq!(answer.status, status, "{path} {body}: {answer:?}");
        assert_eq!(answer.json().pointer(at).and_then(Value::as_str), Some(expected), "{path} {body}");
    }
    let from = |origin: &str| {
        let headers = [("origin", origin), ("x-request-id", "abc")];
        receive(send(serving.port, "POST", "/generate", &headers, b"{\"inputs\": \"a\"}"))
    };
    assert_eq!(from("http://example.com").status, 403);
    let own = from(&format!("http://127.0.0.1:{}", serving.port));
    assert_eq!((own.status, own.header("x-request-id")), (200, Some("abc")));
    let bytes = [b"{\"inputs\": \"".as_slice(), &[0xff], b"\"}"].concat();
    assert_eq!(ask(serving.port, "POST", "/generate", bytes).status, 422);
    let long_header = "a".repeat(200_000);
    let answer = receive(send(serving.port, "GET", "/health", &[("x-a", &long_header)], b""));
    assert_eq!(answer.status, 431);
}

#[test]
fn real_clients_are_served() {
    let folder = TempDir::new().expect("a temporary folder");
    let labels = with_tokenizer(folder.path(), "sequence-encoder");
    let labels = format!("labels={}", path(&labels));
    let chat = chat_model(folder.path());
    let chat = format!("chat={}", path(&chat));
    let serving = Serving::start(&[path(&demo()), "--model", &labels, "--model", &chat]);
    let line = "Dr. Smith paid $3.50 on May 3, 2019.";
    let expected = stdout(run("t5gemma", ["generate", path(&demo()), line], ""));
    let address = format!("127.0.0.1:{}", serving.port);
    for client in ["openai", "huggingface_hub", "tritonclient_http", "tritonclient_grpc"] {
        assert_eq!(python("serve_clients.py", [client, &address, line, expected.trim_end()]), format!("{client}\n"));
    }
}

/// Requests as clients have sent them, recorded: those of clients that are too large to be installed for every run.
#[test]
fn recorded_requests_of_clients_are_answered() {
    let folder = TempDir::new().expect("a temporary folder");
    let chat = chat_model(folder.path());
    let serving = Serving::start(&["--model", &format!("chat={}", path(&chat))]);
    let recorded = std::fs::read_to_string(tests().join("fixtures/clients/requests.jsonl")).expect("the fixture");
    assert!(recorded.lines().count() > 20);
    for line in recorded.lines() {
        let request: Value = serde_json::from_str(line).expect("JSON");
        let text = |name: &str| request[name].as_str().unwrap_or_default();
        let body = if request["body"].is_null() { String::new() } else { request["body"].to_string() };
        let answer = ask(serving.port, text("method"), text("path"), body);
        assert_eq!(json!(answer.status), request["status"], "{line}: {answer:?}");
        let read = if request["stream"] == true { answer.events()[0].clone() } else { answer.json() };
        assert!(read.pointer(text("reads")).is_some_and(|it| !it.is_null()), "{line}: {read}");
    }
}

/// The demo model with a chat template.
fn chat_model(folder: &Path) -> PathBuf {
    let checkpoint = folder.join("chat-checkpoint");
    std::fs::create_dir(&checkpoint).expect("a new folder");
    for file in std::fs::read_dir(tests().join("demo/checkpoint")).expect("the checkpoint is there") {
        let file = file.expect("a file");
        std::fs::copy(file.path(), checkpoint.join(file.file_name())).expect("copied");
    }
    let template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}";
    std::fs::write(checkpoint.join("chat_template.jinja"), template).expect("written");
    exported_from(&checkpoint, "demo-chat", Export::default())
}
