//! What operators of `t5gemma serve` need: TLS, limits of keys, traces, and the files for deployment.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use crate::common::{demo, program, python, run, tests};
use crate::serve::{PATIENCE, ROWS, Serving, long, path, receive, send};

fn certificate(name: &str) -> [PathBuf; 2] {
    ["crt", "key"].map(|ending| tests().join(format!("fixtures/tls/{name}.{ending}")))
}

#[test]
fn tls_is_spoken_and_its_certificate_read_again() {
    let folder = TempDir::new().expect("a temporary folder");
    let (crt, key) = (folder.path().join("crt"), folder.path().join("key"));
    let install = |name: &str| {
        let [certificate, secret] = certificate(name);
        fs::copy(certificate, &crt).expect("copied");
        fs::copy(secret, &key).expect("copied");
    };
    install("one");
    let serving = Serving::start(&[path(&demo()), "--tls-certificate", path(&crt), "--tls-key", path(&key)]);
    let address = format!("127.0.0.1:{}", serving.port);
    let speaks = |name: &str| python("serve_tls.py", [&address, path(&certificate(name)[0])]);
    let all = "http/1.1, h2, none, TLSv1.2, gRPC\n";
    assert_eq!(speaks("one"), all);
    install("two");
    serving.signal("-HUP");
    serving.logged("the certificate was read again");
    assert_eq!(speaks("two"), all);
    fs::copy(&certificate("one")[1], &key).expect("copied");
    serving.signal("-HUP");
    serving.logged("the old certificate stays");
    assert_eq!(speaks("two"), all);

    for (flags, code, expected) in [
        (vec!["--tls-certificate", path(&crt)], 2, "--tls-key"),
        (vec!["--tls-certificate", path(&key), "--tls-key", path(&key)], 1, "expected certificates in PEM, found none"),
        (vec!["--tls-certificate", path(&crt), "--tls-key", path(&crt)], 1, "expected a private key in PEM"),
        (vec!["--tls-certificate", "/none", "--tls-key", path(&key)], 1, "/none: No such file"),
        (vec!["--tls-certificate", path(&crt), "--tls-key", path(&key)], 1, "crt and "),
    ] {
        let model = demo();
        let output = run("t5gemma", [&["serve", path(&model), "--port", "0"], &flags[..]].concat(), "");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {said}");
        assert!(said.contains(expected), "{flags:?}: {said}");
    }
}

#[test]
fn keys_have_limits() {
    let folder = TempDir::new().expect("a temporary folder");
    let keys = folder.path().join("keys");
    fs::write(&keys, "one tenant=a max-requests=1\nsame tenant=a max-requests=1\nother priority=low\n")
        .expect("written");
    let serving = Serving::start(&[path(&demo()), "--api-keys", path(&keys)]);
    let with = |key: &str, path: &str, body: &str| {
        let key = format!("Bearer {key}");
        send(serving.port, "POST", path, &[("authorization", &key), ("x-priority", "high")], body.as_bytes())
    };
    let held = with("one", "/generate_stream", &long().to_string());
    serving.wait_for(ROWS, |rows| rows == 8.0, PATIENCE);
    let asked = |key: &str| receive(with(key, "/v1/completions", "{\"prompt\": \"a\"}"));
    for key in ["one", "same"] {
        let answer = asked(key);
        assert_eq!((answer.status, answer.header("retry-after")), (429, Some("1")), "{key}");
        assert_eq!(answer.json()["error"]["message"], "the key's share is in use: 1 of 1 requests");
    }
    assert_eq!(asked("other").status, 200);
    assert_eq!(receive(held).events().len(), 500);
    assert_eq!(asked("same").status, 200);
    fs::write(&keys, "one limit=3\n").expect("written");
    let output = run("t5gemma", ["serve", path(&demo()), "--port", "0", "--api-keys", path(&keys)], "");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("keys:1: expected tenant=NAME, max-requests=N or priority="), "{said}");
}

/// A span as OTLP has it.
#[derive(Clone, Debug, Default)]
struct Span {
    trace: Vec<u8>,
    id: Vec<u8>,
    parent: Vec<u8>,
    name: String,
    begin: u64,
    end: u64,
    attributes: Vec<String>,
}

/// The fields of a message of protocol buffers: their numbers, and their bytes or numbers.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>, u64)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (first, rest) = bytes.split_first().expect("a whole number");
            *bytes = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                break;
            }
        }
        value
    }
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let (length, number) = match tag & 7 {
            0 => (0, varint(&mut bytes)),
            1 => (8, u64::from_le_bytes(bytes[..8].try_into().expect("eight"))),
            2 => (varint(&mut bytes) as usize, 0),
            _ => (4, 0),
        };
        found.push((tag >> 3, bytes[..length].to_vec(), number));
        bytes = &bytes[length..];
    }
    found
}

/// Receives traces by OTLP over HTTP, as collectors do.
fn collector() -> (u16, Receiver<Span>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.expect("a connection"));
            loop {
                let (mut length, mut line) = (None, String::new());
                while stream.read_line(&mut line).is_ok_and(|read| read > 2) {
                    let lower = line.to_ascii_lowercase();
                    length =
                        lower.strip_prefix("content-length:").map(|it| it.trim().parse().expect("a number")).or(length);
                    line.clear();
                }
                let Some(length) = length else { break };
                let mut body = vec![0; length];
                stream.read_exact(&mut body).expect("the whole body");
                stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").expect("answered");
                let inner = |bytes: &[u8], number: u64| {
                    fields(bytes).into_iter().filter(move |(found, ..)| *found == number).map(|(_, bytes, _)| bytes)
                };
                let resources: Vec<Vec<u8>> = inner(&body, 1).collect();
                for resource in &resources {
                    for span in inner(resource, 2).flat_map(|scope| inner(&scope, 2).collect::<Vec<_>>()) {
                        let mut read = Span::default();
                        for (number, bytes, value) in fields(&span) {
                            match number {
                                1 => read.trace = bytes,
                                2 => read.id = bytes,
                                4 => read.parent = bytes,
                                5 => read.name = String::from_utf8(bytes).expect("UTF-8"),
                                7 => read.begin = value,
                                8 => read.end = value,
                                9 => read.attributes.push(String::from_utf8_lossy(&bytes).into_owned()),
                                _ => {}
                            }
                        }
                        let of_resource = String::from_utf8_lossy(resource).into_owned();
                        read.attributes.push(of_resource);
                        drop(tell.send(read));
                    }
                }
            }
        }
    });
    (port, told)
}

#[test]
fn the_parts_of_a_request_are_traced() {
    let (port, spans) = collector();
    let endpoint = format!("http://127.0.0.1:{port}");
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()), ("OTEL_SERVICE_NAME", "spoken")];
    let mut serving = Serving::start_with(&environment, &[path(&demo())]);
    let (trace, parent) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let traceparent = format!("00-{trace}-{parent}-01");
    let headers = [("traceparent", traceparent.as_str()), ("x-request-id", "seven")];
    let body = json!({"inputs": "Dr. Lee paid $3.50.", "parameters": {"max_new_tokens": 20}}).to_string();
    assert_eq!(receive(send(serving.port, "POST", "/generate_stream", &headers, body.as_bytes())).status, 200);
    let unsampled = [("traceparent", "00-0af7651916cd43dd8448eb211c80319d-b7ad6b7169203331-00")];
    assert_eq!(receive(send(serving.port, "POST", "/generate", &unsampled, body.as_bytes())).status, 200);
    assert_eq!(serving.get("/health").status, 200);
    // What has not been sent is sent at the end.
    serving.signal("-TERM");
    assert!(serving.ended().success());
    let mut found: Vec<Span> = Vec::new();
    while let Ok(span) = spans.recv_timeout(Duration::from_secs(if found.len() < 5 { 30 } else { 1 })) {
        found.push(span);
    }
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let named = |name: &str| {
        let mut of_name = found.iter().filter(|span| span.name == name);
        let one = of_name.next().unwrap_or_else(|| panic!("{name} in {found:?}")).clone();
        assert!(of_name.next().is_none(), "{name} twice in {found:?}");
        one
    };
    assert_eq!(found.len(), 5, "{found:?}");
    let root = named("t5gemma generate");
    assert_eq!((hex(&root.trace), hex(&root.parent)), (trace.to_string(), parent.to_string()));
    let has = |part: &str| root.attributes.iter().any(|attribute| attribute.contains(part));
    assert!(
        has("seven") && has("gen_ai.usage.output_tokens") && has("spoken") && has("http.response.status_code"),
        "{root:?}"
    );
    let mut last = root.begin;
    for name in ["queue", "encode", "first token", "decode"] {
        let part = named(name);
        assert_eq!((&part.trace, &part.parent), (&root.trace, &root.id), "{name}");
        assert!(last <= part.begin && part.begin <= part.end && part.end <= root.end, "{name}: {found:?}");
        last = part.end;
    }
}

#[test]
fn deployment_files_fit_the_server() {
    let serving = Serving::start(&[path(&demo())]);
    let program = program("t5gemma").get_program().to_os_string();
    let program = Path::new(&program);
    let address = format!("127.0.0.1:{}", serving.port);
    assert_eq!(python("deploy_files.py", [path(program), &address]), "deploy\n");
}
