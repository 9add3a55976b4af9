//! `t5gemma serve`: limits, faults, keys, and how it ends. `serve_doors.rs` has what each client gets.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{demo, program, run};

/// How long anything here may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running server; ended when it is dropped.
pub struct Serving {
    child: Child,
    pub port: u16,
    admin_port: Option<u16>,
    log: Receiver<String>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    headers: String,
    body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let line = self.headers.lines().find_map(|line| line.split_once(": ").filter(|(found, _)| *found == name));
        line.map(|(_, value)| value)
    }

    /// The JSON of server-sent events.
    pub fn events(&self) -> Vec<Value> {
        let text = self.text();
        let data = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
        data.map(|data| serde_json::from_str(data).expect("JSON")).collect()
    }
}

/// Begins a request. HTTP/1.0, so that the answer ends with the connection.
pub fn send(port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the server listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut head = format!("{method} {path} HTTP/1.0\r\nhost: 127.0.0.1:{port}\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).expect("the server reads");
    // A server that refuses a body need not read it.
    let _ = stream.write_all(body);
    stream
}

pub fn receive(mut stream: TcpStream) -> Answer {
    let mut all = Vec::new();
    let read = stream.read_to_end(&mut all);
    assert!(read.is_ok() || !all.is_empty(), "{read:?}");
    let at = all.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap_or_else(|| panic!("an answer: {all:?}"));
    let head = String::from_utf8(all[..at].to_vec()).expect("headers are ASCII");
    let (status, headers) = head.split_once("\r\n").unwrap_or((&head, ""));
    let status = status.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    Answer { status, headers: headers.replace("\r\n", "\n"), body: all[at + 4..].to_vec() }
}

pub fn ask(port: u16, method: &str, path: &str, body: impl AsRef<[u8]>) -> Answer {
    receive(send(port, method, path, &[], body.as_ref()))
}

impl Serving {
    pub fn start(arguments: &[&str]) -> Serving {
        Serving::start_with(&[], arguments)
    }

    /// Starts with environment variables.
    pub fn start_with(environment: &[(&str, &str)], arguments: &[&str]) -> Serving {
        let mut child = program("t5gemma")
            .envs(environment.iter().copied())
            .args(["serve", "--port", "0"])
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let (tell, log) = mpsc::channel();
        thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(tell.send(line))));
        let mut serving = Serving { child, port: 0, admin_port: None, log };
        let port = |line: &str| line.trim_end_matches("\"}").rsplit(':').next().and_then(|port| port.parse().ok());
        serving.port = port(&serving.logged("listening on ")).expect("a port");
        if arguments.contains(&"--admin-port") {
            serving.admin_port = port(&serving.logged("administration on "));
        }
        serving.logged("ready");
        serving
    }

    /// The next line of the log with `part` in it.
    pub fn logged(&self, part: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self.log.recv_timeout(left).unwrap_or_else(|error| panic!("{part}: {error}"));
            if line.contains(part) {
                return line;
            }
        }
    }

    pub fn get(&self, path: &str) -> Answer {
        ask(self.port, "GET", path, "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        ask(self.port, "POST", path, body.to_string())
    }

    /// The number of a series.
    pub fn metric(&self, series: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{series} in\n{text}")).parse().expect("a number")
    }

    /// Waits until a series has a number.
    pub fn wait_for(&self, series: &str, expected: impl Fn(f64) -> bool, within: Duration) {
        let begun = Instant::now();
        while !expected(self.metric(series)) {
            assert!(begun.elapsed() < within, "{series} is {} after {within:?}", self.metric(series));
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        let sent = std::process::Command::new("kill").args([name, &self.child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
    }

    pub fn ended(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("it can be waited for") {
                return status;
            }
            assert!(Instant::now() < end, "the server still runs");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn path(folder: &Path) -> &str {
    folder.to_str().expect("temporary paths are UTF-8")
}

/// A request that takes some hundred steps of several rows.
pub fn long() -> Value {
    json!({"inputs": "Dr. Lee paid $3.50.", "parameters": {"max_new_tokens": 500, "min_new_tokens": 500, "num_beams": 8}})
}

pub const ROWS: &str = "t5gemma_rows_in_flight{model=\"demo\"}";

#[test]
fn a_full_server_says_when_to_come_again() {
    let serving = Serving::start(&[path(&demo()), "--max-requests", "1"]);
    let held = send(serving.port, "POST", "/generate_stream", &[], long().to_string().as_bytes());
    serving.wait_for(ROWS, |rows| rows == 8.0, PATIENCE);
    for (path, body) in [
        ("/generate", json!({"inputs": "a"})),
        ("/v1/completions", json!({"prompt": "a"})),
        ("/v2/models/demo/generate", json!({"text_input": "a"})),
        ("/embed", json!({"inputs": "a"})),
    ] {
        let answer = serving.post(path, &body);
        assert_eq!((answer.status, answer.header("retry-after")), (429, Some("1")), "{path}");
    }
    assert_eq!(serving.metric("t5gemma_refused_total{reason=\"full\"}"), 4.0);
    assert_eq!(receive(held).events().len(), 500);
    assert_eq!(serving.post("/generate", &json!({"inputs": "a"})).status, 200);
}

#[test]
fn a_client_that_leaves_takes_its_rows_with_it() {
    let serving = Serving::start(&[path(&demo())]);
    let body = long();
    let openai = json!({"prompt": "a", "max_tokens": 500, "min_new_tokens": 500, "num_beams": 8});
    let mut stream = openai.clone();
    stream["stream"] = true.into();
    let triton = json!({"text_input": "a", "max_new_tokens": 500, "min_new_tokens": 500, "num_beams": 8});
    let own = json!({"text": "a", "options": {"max_new_tokens": 500, "min_new_tokens": 500, "num_beams": 8}});
    for (at, (path, body)) in [
        ("/generate", &body),
        ("/generate_stream", &body),
        ("/v1/completions", &openai),
        ("/v1/completions", &stream),
        ("/v2/models/demo/generate", &triton),
        ("/v2/models/demo/generate_stream", &triton),
        ("/v1/t5gemma", &own),
    ]
    .into_iter()
    .enumerate()
    {
        let client = send(serving.port, "POST", path, &[], body.to_string().as_bytes());
        serving.wait_for(ROWS, |rows| rows == 8.0, PATIENCE);
        client.shutdown(Shutdown::Both).expect("the client leaves");
        drop(client);
        serving.wait_for(ROWS, |rows| rows == 0.0, Duration::from_secs(1));
        serving.wait_for("t5gemma_requests_in_flight", |requests| requests == 0.0, Duration::from_secs(1));
        serving.wait_for("t5gemma_client_disconnected_total", |left| left == (at + 1) as f64, Duration::from_secs(1));
    }
}

#[test]
fn what_was_accepted_is_answered_before_the_end() {
    let mut serving = Serving::start(&[path(&demo()), "--drain-delay", "0.5"]);
    let whole = send(serving.port, "POST", "/generate", &[], long().to_string().as_bytes());
    let stream = send(serving.port, "POST", "/generate_stream", &[], long().to_string().as_bytes());
    serving.wait_for("t5gemma_requests_in_flight", |requests| requests == 2.0, PATIENCE);
    assert_eq!(serving.get("/health").status, 200);
    serving.signal("-TERM");
    serving.logged("shutting down");
    let health = serving.get("/v2/health/ready");
    assert_eq!((health.status, health.json()), (503, json!({"ready": false})));
    assert_eq!(serving.get("/v2/health/live").json(), json!({"live": true}));
    // In the delay, requests of those who have not noticed are still answered.
    assert_eq!(serving.post("/generate", &json!({"inputs": "a"})).status, 200);
    assert_eq!((receive(whole).status, receive(stream).events().len()), (200, 500));
    assert!(serving.ended().success());
}

#[test]
fn a_second_signal_ends_at_once_and_an_end_of_time_is_a_failure() {
    let mut serving = Serving::start(&[path(&demo())]);
    let body =
        json!({"inputs": vec!["a"; 30], "parameters": {"max_new_tokens": 500, "min_new_tokens": 500, "num_beams": 8}});
    let _client = send(serving.port, "POST", "/", &[], body.to_string().as_bytes());
    serving.wait_for(ROWS, |rows| rows > 0.0, PATIENCE);
    serving.signal("-TERM");
    serving.logged("shutting down");
    serving.signal("-TERM");
    assert_eq!(serving.ended().code(), Some(130));
    let mut serving = Serving::start(&[path(&demo()), "--drain-seconds", "0"]);
    let _client = send(serving.port, "POST", "/", &[], body.to_string().as_bytes());
    serving.wait_for(ROWS, |rows| rows > 0.0, PATIENCE);
    serving.signal("-INT");
    assert!(serving.logged("cut off").contains("1 requests"));
    assert_eq!(serving.ended().code(), Some(1));
}

#[test]
fn keys_are_needed_and_read_again() {
    let folder = TempDir::new().expect("a temporary folder");
    let keys = folder.path().join("keys");
    std::fs::write(&keys, "one\ntwo\n").expect("written");
    let serving = Serving::start(&[path(&demo()), "--api-keys", path(&keys), "--log-json"]);
    let with = |path: &str, key: &str| {
        let headers = [("authorization", key)];
        receive(send(serving.port, "POST", path, if key.is_empty() { &[] } else { &headers }, b"{\"inputs\": \"a\"}"))
    };
    for path in ["/generate", "/v1/completions", "/embed", "/v2/models/demo/infer", "/v2/repository/models/demo/unload"]
    {
        for key in ["", "Bearer three", "Basic one"] {
            let answer = with(path, key);
            assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("Bearer")), "{path} {key}");
        }
    }
    assert_eq!((with("/generate", "Bearer one").status, with("/generate", "Bearer two").status), (200, 200));
    for path in ["/health", "/v2/health/live", "/ping", "/metrics"] {
        assert_eq!(serving.get(path).status, 200, "{path}");
    }
    std::fs::write(&keys, "three\n").expect("written");
    serving.signal("-HUP");
    serving.logged("the file of keys was read again");
    assert_eq!((with("/generate", "Bearer one").status, with("/generate", "Bearer three").status), (401, 200));
    // A line for each request, without a word of it.
    let line: Value = serde_json::from_str(&serving.logged("\"status\":200")).expect("JSON");
    assert!(line["request_id"].is_string() && line["seconds"].is_number(), "{line}");
}

#[test]
fn a_model_is_loaded_again_while_it_answers() {
    let serving = Serving::start(&[path(&demo()), "--admin-port", "0"]);
    let admin = serving.admin_port.expect("a port of its own");
    for path in ["/metrics", "/v2/repository/index"] {
        assert_eq!(serving.get(path).status, 404, "{path}");
    }
    assert_eq!(ask(admin, "POST", "/generate", "{}").status, 404);
    assert_eq!(ask(admin, "GET", "/health", "").status, 200);
    let port = serving.port;
    let client = thread::spawn(move || {
        let statuses = (0..40).map(|_| ask(port, "POST", "/generate", json!({"inputs": "Dr. Lee"}).to_string()).status);
        statuses.collect::<Vec<u16>>()
    });
    for _ in 0..3 {
        assert_eq!(ask(admin, "POST", "/v2/repository/models/demo/load", "").status, 200);
    }
    assert_eq!(client.join().expect("no panic"), vec![200; 40]);
    let index = || ask(admin, "POST", "/v2/repository/index", "{}").json()[0]["state"].clone();
    assert_eq!(index(), "READY");
    assert_eq!(ask(admin, "POST", "/v2/repository/models/demo/unload", "{}").status, 200);
    assert_eq!(index(), "UNAVAILABLE");
    assert_eq!(serving.post("/generate", &json!({"inputs": "a"})).status, 503);
    assert_eq!(serving.get("/health").status, 503);
    assert_eq!(ask(admin, "POST", "/v2/repository/models/demo/load", "{}").status, 200);
    assert_eq!(serving.post("/generate", &json!({"inputs": "a"})).status, 200);
    assert_eq!(ask(admin, "POST", "/v2/repository/models/none/load", "{}").status, 404);
}

#[test]
fn what_cannot_be_served_is_said_at_the_start() {
    let model = demo();
    let named = format!("a={}", path(&model));
    let cases: [(&[&str], i32, &str); 6] = [
        (&["serve", "/none"], 1, "model none: /none/manifest.json: no such file"),
        (&["serve", "--model", "a"], 2, "expected NAME=FOLDER, found a"),
        (&["serve", "--model", &named, "--model", &named], 2, "two models have the name a"),
        (&["serve", "--model", "a/b=/none"], 2, "the name of a model: expected letters"),
        (&["serve", path(&model), "--api-keys", "/none"], 1, "/none: No such file"),
        (&["serve", path(&model), "--adapter", "x/y=z"], 2, "--adapter: expected the name of a served model before /"),
    ];
    for (arguments, code, expected) in cases {
        let output = run("t5gemma", [arguments, &["--port", "0"]].concat(), "");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
}
