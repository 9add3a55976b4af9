//! Inputs and outputs in a store that speaks S3: the bytes of files, whatever the store does to requests and whoever is
//! killed, and the messages about a store that cannot be used.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Folders, gzipped, lines, sentences, stderr, summary, text_of};
use crate::common::{demo, from_make, program, tests};

/// A store with the bucket `data`, whose objects are files.
struct S3 {
    server: Child,
    port: u16,
    root: TempDir,
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl S3 {
    fn start(arguments: &[&str]) -> S3 {
        let root = TempDir::new().expect("a temporary folder can be made");
        fs::create_dir(root.path().join("data")).expect("a new folder");
        let mut server = Command::new(from_make("T5GEMMA_PYTHON"))
            .arg(tests().join("scripts/object_store.py"))
            .arg(root.path())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python runs");
        let mut port = String::new();
        BufReader::new(server.stdout.as_mut().expect("piped")).read_line(&mut port).expect("it starts");
        S3 { server, port: port.trim().parse().expect("a port"), root }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.root.path().join("data").join(key)
    }

    /// Copies the inputs of a test into the folder `in`.
    fn take(&self, folders: &Folders) {
        fs::create_dir(self.path("in")).expect("a new folder");
        for entry in fs::read_dir(folders.path("in")).expect("a folder") {
            let entry = entry.expect("an entry");
            fs::copy(entry.path(), self.path("in").join(entry.file_name())).expect("it can be copied");
        }
    }

    /// `t5gemma batch` with the settings of this store.
    fn command(&self, input: &str, output: &str, options: &[&str]) -> Command {
        let mut command = program("t5gemma");
        for (name, _) in std::env::vars() {
            if name.starts_with("AWS_") || name.to_lowercase().ends_with("_proxy") {
                command.env_remove(name);
            }
        }
        command
            .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", self.port))
            .env("AWS_ALLOW_HTTP", "true")
            .env("AWS_ACCESS_KEY_ID", "test")
            .env("AWS_SECRET_ACCESS_KEY", "secret")
            .args(["batch", &demo().display().to_string(), "--input", input, "--output", output])
            .args(options);
        command
    }

    fn batch(&self, input: &str, output: &str, options: &[&str]) -> Output {
        self.command(input, output, options).output().expect("the program starts")
    }

    /// The outputs under a prefix, without their records.
    fn outputs(&self, prefix: &str) -> BTreeMap<String, Vec<u8>> {
        let Ok(entries) = fs::read_dir(self.path(prefix)) else { return BTreeMap::new() };
        let files = entries.map(|entry| entry.expect("a folder can be read")).filter(|entry| entry.path().is_file());
        files
            .map(|entry| {
                let name = entry.file_name().into_string().expect("UTF-8");
                (name, fs::read(entry.path()).expect("outputs can be read"))
            })
            .collect()
    }

    fn ask(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("it listens");
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        while reader.read_line(&mut line).expect("it answers") > 2 {
            line.clear();
        }
        let mut body = String::new();
        std::io::Read::read_to_string(&mut reader, &mut body).expect("it answers");
        body
    }

    /// How many requests, faults and unfinished uploads there were.
    fn state(&self) -> Value {
        serde_json::from_str(&self.ask("GET /_state HTTP/1.1\r\nConnection: close\r\n\r\n")).expect("JSON")
    }

    /// From now on, no request fails.
    fn recover(&self) {
        self.ask("POST /_faults HTTP/1.1\r\nConnection: close\r\nContent-Length: 1\r\n\r\n0");
    }
}

const OPTIONS: [&str; 4] = ["--max-new-tokens", "9", "--text-column", "body"];

/// Shards in every format, among them one whose output has several parts.
fn inputs() -> Folders {
    let folders = Folders::new();
    let body = |row: Value| json!({"id": row["id"], "body": row["text"]});
    let rows: Vec<Value> = sentences(12).into_iter().map(body).collect();
    folders.write("a.jsonl", text_of(&rows) + "no object\n");
    folders.write("b #1 [x].jsonl.gz", gzipped(&text_of(&rows[..5])));
    folders.write("empty.jsonl", "");
    fs::copy(tests().join("fixtures/batch/documents.parquet"), folders.path("in/c.parquet")).expect("the fixture");
    let padding = "x".repeat(1 << 20);
    let large: Vec<Value> = (0..40).map(|id| json!({"id": id, "body": 5, "padding": padding})).collect();
    folders.write("large.jsonl", text_of(&large));
    folders
}

#[test]
fn objects_have_the_bytes_of_files() {
    let folders = inputs();
    let expected = summary(folders.batch(&demo(), "out", &OPTIONS));
    let files = folders.outputs("out");
    assert_eq!(files.len(), 5);
    for arguments in [&[][..], &["--faults", "1"]] {
        let store = S3::start(arguments);
        store.take(&folders);
        // Neither is read: the one is deeper, the other is hidden.
        fs::create_dir(store.path("in/deeper")).expect("a new folder");
        fs::write(store.path("in/deeper/x.jsonl"), "").expect("writable");
        fs::write(store.path("in/.hidden"), "").expect("writable");
        let mut found = summary(store.batch("s3://data/in/*", "s3://data/results/1", &OPTIONS));
        found["seconds"] = expected["seconds"].clone();
        if arguments.is_empty() {
            assert_eq!(found, expected);
        }
        assert!(store.outputs("results/1") == files, "{arguments:?}");
        let record = |path: PathBuf| serde_json::from_slice::<Value>(&fs::read(path).expect("a record")).expect("JSON");
        for name in files.keys() {
            let own = store.path("results/1/_batch").join(format!("{name}.json"));
            assert_eq!(record(own), folders.record("out", &format!("{name}.json")));
        }
        let state = store.state();
        assert_eq!(state["uploads"], 0, "{state}");
        assert!(
            !store.path("results/1/_batch/uploads").is_dir() || store.outputs("results/1/_batch/uploads").is_empty()
        );
        assert_eq!(state["faults"].as_u64().unwrap_or(0) > 3, !arguments.is_empty(), "{state}");
        // The outputs are kept, other settings are refused.
        let again = summary(store.batch("s3://data/in/*", "s3://data/results/1/", &OPTIONS));
        assert_eq!((&again["written"], &again["skipped"]), (&json!(0), &json!(5)));
        let other = store.batch("s3://data/in/a.jsonl", "s3://data/results/1", &["--max-new-tokens", "8"]);
        assert_eq!(other.status.code(), Some(2));
        assert!(stderr(&other).contains("s3://data/results/1: expected "), "{}", stderr(&other));
        // Between a folder and a bucket, and back.
        let local = folders.path("local").display().to_string();
        summary(store.batch("s3://data/*n/[ab]*", &format!("file://{local}"), &OPTIONS));
        let own = |name: &str| fs::read(folders.path("local").join(name)).expect("an output");
        assert!(own("a.jsonl") == files["a.jsonl"] && own("b #1 [x].jsonl.gz") == files["b #1 [x].jsonl.gz"]);
        fs::remove_dir_all(folders.path("local")).expect("a folder");
        let input = folders.path("in/a.jsonl").display().to_string();
        summary(store.batch(&input, "s3://data", &OPTIONS));
        assert!(store.outputs("")["a.jsonl"] == files["a.jsonl"]);
    }
}

#[cfg(unix)]
#[test]
fn killed_workers_of_one_shard_leave_one_output() {
    let folders = inputs();
    summary(folders.batch(&demo(), "out", &OPTIONS));
    let files = folders.outputs("out");
    let store = S3::start(&["--faults", "2"]);
    store.take(&folders);
    let start = || {
        let mut command = store.command("s3://data/in/*", "s3://data/out", &OPTIONS);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts")
    };
    let is_part = || store.outputs("out").iter().all(|(name, bytes)| files[name] == *bytes);
    for round in 0..3_u64 {
        let mut workers = [start(), start()];
        std::thread::sleep(Duration::from_millis(400 + 500 * round));
        for worker in &mut workers {
            worker.kill().expect("it is a child");
            worker.wait().expect("it is a child");
        }
        assert!(is_part(), "round {round}");
    }
    let outputs = [start(), start()].map(|worker| worker.wait_with_output().expect("it is a child"));
    let mut written = 0;
    for output in outputs {
        let summary = summary(output);
        assert_eq!(summary["failed"], 0);
        written += summary["written"].as_u64().expect("a count");
    }
    assert!(written <= 5, "{written}");
    assert!(store.outputs("out") == files);
    // What killed workers have left of uploads ends once it is an hour old.
    store.recover();
    for name in store.outputs("out/_batch/uploads").keys() {
        let file = fs::File::options().write(true).open(store.path("out/_batch/uploads").join(name)).expect("a file");
        file.set_modified(SystemTime::now() - Duration::from_secs(4000)).expect("it can be set");
    }
    summary(store.batch("s3://data/in/*", "s3://data/out", &OPTIONS));
    assert!(store.outputs("out/_batch/uploads").is_empty());
}

#[test]
fn a_store_that_cannot_be_used_is_named() {
    let store = S3::start(&[]);
    fs::create_dir(store.path("in")).expect("a new folder");
    fs::write(store.path("in/a.jsonl"), "{\"text\":\"a\"}\n").expect("writable");
    let input = "s3://data/in/a.jsonl";
    let endpoint = format!("http://127.0.0.1:{}", store.port);
    type Variables<'a> = &'a [(&'a str, &'a str)];
    let cases: [(&str, &str, Variables, i32, &[&str]); 13] = [
        (
            input,
            "s3://data/out",
            &[("AWS_ACCESS_KEY_ID", "other")],
            1,
            &[input, "403 Forbidden; the credentials", "AWS_ACCESS_KEY_ID"],
        ),
        (
            input,
            "s3://data/out",
            &[("AWS_SECRET_ACCESS_KEY", "other")],
            1,
            &[input, "403 Forbidden", "AWS_SECRET_ACCESS_KEY"],
        ),
        (
            input,
            "s3://data/out",
            &[("AWS_ACCESS_KEY_ID", "")],
            1,
            &["s3://data", "there are no credentials", "AWS_SKIP_SIGNATURE"],
        ),
        (
            input,
            "s3://data/out",
            &[("AWS_ALLOW_HTTP", "false")],
            1,
            &[input, "127.0.0.1 is not encrypted", "AWS_ALLOW_HTTP=true"],
        ),
        (input, "s3://data/out", &[("AWS_CA_BUNDLE", "/no/such.pem")], 1, &["AWS_CA_BUNDLE: /no/such.pem"]),
        (
            "s3://data/*",
            "s3://data/out",
            &[("AWS_ACCESS_KEY_ID", "other")],
            1,
            &["s3://data", "403 Forbidden, InvalidAccessKeyId: The"],
        ),
        ("s3://none/*", "s3://data/out", &[], 1, &["s3://none: 404 Not Found, NoSuchBucket", "AWS_ENDPOINT_URL"]),
        (input, "s3://none/out", &[], 1, &["s3://none/out: 404 Not Found, NoSuchBucket"]),
        ("s3://data/in", "s3://data/out", &[], 2, &["expected objects, found a folder (write s3://data/in/*)"]),
        (input, "s3://data/in", &[], 2, &["which is in the output folder s3://data/in"]),
        ("s3://data/in/[", "s3://data/out", &[], 2, &["--input s3://data/in/[", "of the key"]),
        ("gs://data/in/*", "s3://data/out", &[], 2, &["expected a path, file:///… or s3://…, found gs://data/in/*"]),
        ("s3://data/in/b.jsonl", "s3://data/out", &[], 1, &["--input s3://data/in/b.jsonl: no file matches"]),
    ];
    for (input, output, variables, status, expected) in cases {
        let mut command = store.command(input, output, &["--max-new-tokens", "2"]);
        for (name, value) in variables {
            match *value {
                "" => command.env_remove(name).env_remove("AWS_SECRET_ACCESS_KEY"),
                value => command.env(name, value),
            };
        }
        let found = command.output().expect("the program starts");
        let told = stderr(&found);
        assert_eq!(found.status.code(), Some(status), "{input} {output}: {told}");
        for expected in expected {
            assert!(told.contains(expected), "{expected}\n{told}");
        }
        assert!(told.lines().count() < 3 && !told.contains("<Error>") && !told.contains(&endpoint), "{told}");
        assert!(!Path::exists(&store.path("out/a.jsonl")));
    }
    // A store without conditional writes.
    let store = S3::start(&["--no-conditions"]);
    fs::create_dir(store.path("in")).expect("a new folder");
    fs::write(store.path("in/a.jsonl"), "{\"text\":\"a\"}\n").expect("writable");
    let mut command = store.command(input, "s3://data/out", &["--max-new-tokens", "2"]);
    let found = command.output().expect("the program starts");
    assert_eq!(found.status.code(), Some(1));
    assert!(stderr(&found).contains("set AWS_CONDITIONAL_PUT=disabled"), "{}", stderr(&found));
    let found = command.env("AWS_CONDITIONAL_PUT", "disabled").output().expect("the program starts");
    assert_eq!(lines(&found.stdout)[0]["written"], 1, "{}", stderr(&found));
}
