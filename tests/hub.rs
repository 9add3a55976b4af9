//! Checkpoints and adapters from the Hugging Face hub, of which `scripts/hub_server.py` is a stand-in on this machine.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{fixture, from_make, program, stdout, tests};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const SHARD: &str = "model-00003-of-00004.safetensors";

/// A running stand-in.
pub struct Hub {
    server: Child,
    endpoint: String,
    /// Its log, the home folder of Hugging Face's programs, and outputs.
    folder: TempDir,
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.server.kill().expect("it runs");
        self.server.wait().expect("it ends");
    }
}

impl Hub {
    /// Starts a hub with these faults. It has a sharded checkpoint `google/tiny`, with files that no export needs, the same
    /// gated and private, and an adapter.
    pub fn start(faults: Value) -> Hub {
        Hub::start_with(faults, &[])
    }

    fn start_with(faults: Value, arguments: &[&str]) -> Hub {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let checkpoint = folder.path().join("tiny");
        copy(&fixture("tiny-sharded").join("checkpoint"), &checkpoint);
        for name in ["README.md", "pytorch_model.bin", "tiny.gguf", "other.safetensors"] {
            fs::write(checkpoint.join(name), "not needed").expect("writable");
        }
        let templates = checkpoint.join("additional_chat_templates");
        fs::create_dir(&templates).expect("can be made");
        fs::write(templates.join("default.jinja"), "{{ messages[0].content }}").expect("writable");
        let pickle = folder.path().join("pickle");
        fs::create_dir(&pickle).expect("can be made");
        fs::write(pickle.join("config.json"), "{}").expect("writable");
        fs::write(pickle.join("pytorch_model.bin"), "PK").expect("writable");
        let repository = |path: &Path, access: Option<&str>| json!({"folder": path, "commit": COMMIT, "revisions": ["main", "v1", "refs/pr/1"], "access": access});
        let lora = tests().join("fixtures/lora");
        let settings = json!({"faults": faults, "repositories": {
            "google/tiny": repository(&checkpoint, None),
            "google/gated": repository(&checkpoint, Some("gated")),
            "me/private": repository(&checkpoint, Some("hf_mine")),
            "me/pickle": repository(&pickle, None),
            "me/base": repository(&lora.join("checkpoint"), None),
            "me/lora": repository(&lora.join("adapters/plain"), None),
        }});
        let mut server = Command::new(from_make("T5GEMMA_PYTHON"))
            .arg(tests().join("scripts/hub_server.py"))
            .arg(folder.path().join("log"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python runs");
        writeln!(server.stdin.as_mut().expect("piped"), "{settings}").expect("it reads");
        let mut port = String::new();
        BufReader::new(server.stdout.as_mut().expect("piped")).read_line(&mut port).expect("it starts");
        let scheme = if arguments.is_empty() { "http" } else { "https" };
        Hub { server, endpoint: format!("{scheme}://127.0.0.1:{}", port.trim()), folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `t5gemma-export` in the folder, with this hub and no other settings.
    fn command(&self) -> Command {
        let mut command = program("t5gemma-export");
        for (name, _) in std::env::vars() {
            let is_of_hub = name.starts_with("HF_") || name.starts_with("HUGGING") || name.starts_with("SSL_");
            if is_of_hub || name.to_lowercase().ends_with("_proxy") || name == "TRANSFORMERS_OFFLINE" {
                command.env_remove(name);
            }
        }
        command.env("HF_ENDPOINT", &self.endpoint).env("HF_HOME", self.path("home")).current_dir(self.folder.path());
        command
    }

    pub fn export(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().expect("the program starts")
    }

    /// The requests since the last call.
    fn requests(&self) -> Vec<Value> {
        let log = fs::read_to_string(self.path("log")).expect("it has one");
        fs::write(self.path("log"), "").expect("writable");
        log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// The bytes ranges of the requests for the content of a file since the last call.
    fn ranges(&self, file: &str) -> Vec<String> {
        let of_file = |request: &Value| {
            let path = request["path"].as_str().expect("a path");
            request["method"] == "GET" && path.starts_with("/storage/") && path.ends_with(file)
        };
        let range = |request: Value| request["range"].as_str().unwrap_or("all").to_string();
        self.requests().into_iter().filter(of_file).map(range).collect()
    }

    fn blob(&self, suffix: &str) -> PathBuf {
        let content = fs::read(fixture("tiny-sharded").join("checkpoint").join(SHARD)).expect("a fixture");
        let etag = sha256(&content);
        self.path("home/hub/models--google--tiny/blobs").join(format!("{etag}{suffix}"))
    }
}

pub fn sha256(content: &[u8]) -> String {
    let mut child = Command::new(from_make("T5GEMMA_PYTHON"))
        .args(["-c", "import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("Python runs");
    child.stdin.take().expect("piped").write_all(content).expect("it reads");
    stdout(child.wait_with_output().expect("it ends")).trim().to_string()
}

pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("can be made");
    for entry in fs::read_dir(from).expect("a folder") {
        let path = entry.expect("readable").path();
        fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("writable");
    }
}

/// The names of a folder's files.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("readable").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

fn check_same(folder: &Path, other: &Path) {
    assert_eq!(names(folder), names(other));
    for name in names(folder) {
        let read = |folder: &Path| fs::read(folder.join(&name)).expect("readable");
        assert!(read(folder) == read(other), "{name} differs");
    }
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn check_fails(name: &str, output: &Output, says: &[&str]) {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{name}: {message}");
    assert!(says.iter().all(|part| message.contains(part)), "{name}: expected {says:?}, found {message}");
}

#[test]
fn a_repository_is_exported_like_its_folder() {
    let hub = Hub::start(json!([]));
    let checkpoint = hub.path("tiny");
    stdout(hub.export(&[checkpoint.to_str().expect("UTF-8"), "local"]));
    let message = |output: Output| {
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    };
    let first = message(hub.export(&["google/tiny", "first"]));
    assert!(first.contains(&format!("google/tiny: commit {COMMIT}, 8 files of ")), "{first}");
    check_same(&hub.path("first"), &hub.path("local"));
    let snapshot = hub.path("home/hub/models--google--tiny/snapshots").join(COMMIT);
    let mut expected = names(&fixture("tiny-sharded").join("checkpoint"));
    expected.insert(0, "additional_chat_templates".into());
    assert_eq!(names(&snapshot), expected);
    let link = fs::read_link(snapshot.join("additional_chat_templates/default.jinja")).expect("a link");
    assert!(link.starts_with("../../../blobs"), "{}", link.display());
    hub.requests();

    // The same commit by other names, whose files the cache has.
    for (name, out) in
        [("hf://google/tiny", "second"), ("google/tiny@v1", "third"), ("google/tiny@refs/pr/1", "fourth")]
    {
        let again = message(hub.export(&[name, out]));
        assert!(again.contains("in the cache"), "{again}");
        check_same(&hub.path(out), &hub.path("local"));
        assert_eq!(hub.requests().len(), 1, "{name}: only the list of files");
    }
    assert!(message(hub.export(&["--quiet", "google/tiny", "fifth"])).is_empty());
    let by_commit = format!("google/tiny@{COMMIT}");
    stdout(hub.command().args([&by_commit, "sixth"]).env("HF_HUB_OFFLINE", "1").output().expect("starts"));
    assert_eq!(names(&hub.path("home/hub/models--google--tiny/refs")), ["main", "refs", "v1"]);
}

#[test]
fn an_encoder_needs_only_its_shards() {
    let hub = Hub::start(json!([]));
    stdout(hub.export(&["google/tiny", "out", "--task", "feature-extraction"]));
    let snapshot = names(&hub.path("home/hub/models--google--tiny/snapshots").join(COMMIT));
    let shards: Vec<&String> = snapshot.iter().filter(|name| name.ends_with(".safetensors")).collect();
    assert_eq!(shards, ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]);
    // The others follow when they are needed.
    stdout(hub.export(&["google/tiny", "all"]));
    assert_eq!(hub.ranges(SHARD), ["all"]);
}

#[test]
fn adapters_come_from_the_hub_too() {
    let hub = Hub::start(json!([]));
    let lora = tests().join("fixtures/lora");
    let (base, adapter) = (lora.join("checkpoint"), lora.join("adapters/plain"));
    let (base, scaled) = (base.to_str().expect("UTF-8"), format!("{}=0.5", adapter.display()));
    stdout(hub.export(&[base, "local", "--adapter", &scaled]));
    stdout(hub.export(&["me/base", "hub", "--adapter", "hf://me/lora@v1=0.5"]));
    let read = |out: &str| fs::read(hub.path(out).join("model.onnx_data")).expect("readable");
    assert!(read("hub") == read("local"));
    check_fails(
        "an adapter",
        &hub.export(&["me/lora", "out"]),
        &["me/lora: expected config.json and", "a LoRA adapter"],
    );
    check_fails("a model", &hub.export(&["me/base", "out", "--adapter", "me/base"]), &["expected adapter_config.json"]);
}

#[test]
fn access_that_is_refused_is_explained() {
    let hub = Hub::start(json!([{"path": "private/resolve", "method": "HEAD", "status": 418, "times": 9}]));
    let page = format!("accept the licence on {}/google/gated", hub.endpoint);
    fs::create_dir_all(hub.path("home")).expect("can be made");
    for (name, token, says) in [
        ("google/none", None, &["neither a local folder nor a repository on", "set HF_TOKEN"][..]),
        ("google/none", Some("hf_x"), &["google/none: neither", "that the token gives access to"]),
        ("me/private", None, &["me/private: neither", "set HF_TOKEN"]),
        ("me/private", Some("hf_mine"), &["/me/private/resolve/", "expected a file or listing, found 418"]),
        ("google/gated", None, &[&page, "set HF_TOKEN to a token of your account"]),
        ("google/gated", Some("hf_x"), &[&page, "use a token of the account that accepted it"]),
        (
            "google/gated",
            Some("hf_invalid"),
            &["does not accept the token in HF_TOKEN or the token file: Invalid cred"],
        ),
        ("google/tiny@v2", None, &["google/tiny: no branch, tag or commit v2"]),
        (
            "me/pickle",
            None,
            &["me/pickle: expected config.json and model.safetensors or", "found pytorch_model.bin (a pickle"],
        ),
    ] {
        let mut command = hub.command();
        command.args([name, "out"]);
        if let Some(token) = token {
            command.env("HF_TOKEN", token);
        }
        check_fails(name, &command.output().expect("starts"), says);
        assert!(!hub.path("out").exists(), "{name}");
    }
    let output = hub.export(&["hf://google", "out"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("expected hf://ORG/NAME or hf://ORG/NAME@REVISION, found hf://google"));

    // The token file that `hf auth login` writes. The storage server does not get the token.
    hub.requests();
    fs::write(hub.path("home/token"), "hf_accepted\n").expect("writable");
    stdout(hub.export(&["google/gated", "out"]));
    for request in hub.requests() {
        let is_storage = request["path"].as_str().is_some_and(|path| path.starts_with("/storage/"));
        assert_eq!(request["token"], if is_storage { "" } else { "hf_accepted" }, "{request}");
    }
}

#[test]
fn passing_faults_are_tried_again() {
    let size = fs::metadata(fixture("tiny-sharded").join("checkpoint").join(SHARD)).expect("a fixture").len();
    for (name, faults, ranges, says) in [
        ("a full server", json!({"path": SHARD, "status": 503, "times": 2}), &["all"][..], "503 Service Unavailable"),
        (
            "a rate limit",
            json!({"path": "api/models", "status": 429, "headers": {"Retry-After": "1"}}),
            &["all"],
            "429 Too Many Requests; trying again in 1.0 s",
        ),
        (
            "a lost connection",
            json!({"path": "/storage/.*3-of", "cut": 1000}),
            &["all", "bytes=1000-"],
            "trying again in",
        ),
        (
            "a server without ranges",
            json!([{"path": "/storage/.*3-of", "cut": 1000}, {"path": "/storage/.*3-of", "whole": true}]),
            &["all", "bytes=1000-"],
            "trying again in",
        ),
        ("other bytes", json!({"path": "/storage/.*3-of", "garble": true}), &["all", "all"], "expected SHA-256 "),
    ] {
        let hub = Hub::start(if faults.is_array() { faults } else { json!([faults]) });
        let output = hub.export(&["google/tiny", "out"]);
        assert!(output.status.success() && stderr(&output).contains(says), "{name}: {}", stderr(&output));
        assert_eq!(hub.ranges(SHARD), ranges, "{name}");
        assert_eq!(fs::metadata(hub.blob("")).expect(name).len(), size, "{name}");
    }
}

#[test]
fn a_download_that_failed_continues() {
    let hub = Hub::start(json!([
        {"path": "/storage/.*3-of", "cut": 1000},
        {"path": "/storage/.*3-of", "status": 503, "times": 4},
    ]));
    check_fails(
        "a broken server",
        &hub.export(&["google/tiny", "out"]),
        &["cannot be reached: ", "503", "(5 attempts)"],
    );
    assert_eq!(fs::metadata(hub.blob(".incomplete")).expect("kept").len(), 1000);
    hub.requests();
    stdout(hub.export(&["google/tiny", "out"]));
    assert_eq!(hub.ranges(SHARD), ["bytes=1000-"]);

    // Killed between the last byte and the name, or left by something else: complete, too long, or of other bytes.
    let content = fs::read(hub.blob("")).expect("complete");
    let long = [&content[..], b"more"].concat();
    let other = vec![1; content.len()];
    for (name, left, expected) in
        [("complete", &content, &[][..]), ("too long", &long, &["all"]), ("other bytes", &other, &["all"])]
    {
        fs::remove_file(hub.blob("")).expect("complete");
        fs::write(hub.blob(".incomplete"), left).expect("writable");
        stdout(hub.export(&["google/tiny", "out", "--overwrite"]));
        assert_eq!(hub.ranges(SHARD), expected, "{name}");
        assert!(fs::read(hub.blob("")).expect(name) == content && !hub.blob(".incomplete").exists(), "{name}");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_download_continues() {
    let hub = Hub::start(json!([{"path": "/storage/.*3-of", "cut": 1000, "stall": true}]));
    let mut command = hub.command();
    let child = command.args(["google/tiny", "out"]).env("HF_HUB_DOWNLOAD_TIMEOUT", "1").stderr(Stdio::piped()).spawn();
    let child = child.expect("starts");
    let start = Instant::now();
    while fs::metadata(hub.blob(".incomplete")).map_or(0, |file| file.len()) < 1000 {
        assert!(start.elapsed() < Duration::from_secs(60), "the download does not begin");
        std::thread::sleep(Duration::from_millis(20));
    }
    let told = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(told.expect("kill runs").success());
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    hub.requests();
    stdout(hub.export(&["google/tiny", "out"]));
    assert_eq!(hub.ranges(SHARD), ["bytes=1000-"]);
}

#[test]
fn the_cache_serves_without_a_network() {
    let hub = Hub::start(json!([]));
    let run = |name: &str, out: &str, variable: &str, value: &str| {
        hub.command().args([name, out]).env(variable, value).output().expect("starts")
    };
    let nowhere = "http://127.0.0.1:1";
    check_fails("offline", &run("google/tiny", "out", "HF_HUB_OFFLINE", "1"), &["google/tiny: HF_HUB_OFFLINE is set"]);
    check_fails(
        "no server",
        &run("google/tiny", "out", "HF_ENDPOINT", nowhere),
        &["http://127.0.0.1:1 cannot be reached", "HF_HUB_OFFLINE=1", "a local folder works too"],
    );
    assert_eq!(hub.requests().len(), 0);
    stdout(hub.export(&["google/tiny", "first"]));
    hub.requests();
    for (out, variable, value, says) in [
        ("second", "HF_HUB_OFFLINE", "yes", ""),
        ("third", "TRANSFORMERS_OFFLINE", "TRUE", ""),
        ("fourth", "HF_ENDPOINT", nowhere, "warning: http://127.0.0.1:1 cannot be reached: "),
    ] {
        let output = run("google/tiny", out, variable, value);
        assert!(output.status.success() && stderr(&output).contains(says), "{out}: {}", stderr(&output));
        check_same(&hub.path(out), &hub.path("first"));
    }
    check_fails(
        "a revision",
        &run("google/tiny@v1", "out", "HF_HUB_OFFLINE", "ON"),
        &["google/tiny@v1: HF_HUB_OFFLINE"],
    );
    assert_eq!(hub.requests().len(), 0);
    // A part of the files, as another program may have downloaded it.
    fs::remove_file(hub.path("home/hub/models--google--tiny/snapshots").join(COMMIT).join(SHARD)).expect("a link");
    check_fails(
        "a shard",
        &run("google/tiny", "out", "HF_HUB_OFFLINE", "1"),
        &[SHARD, "expected a file with", "found nothing"],
    );
}

#[test]
fn local_folders_come_first() {
    let hub = Hub::start(json!([]));
    copy(&fixture("tiny-untied").join("checkpoint"), &hub.path("google/tiny"));
    let output = hub.export(&["google/tiny", "local"]);
    let says = "google/tiny is taken for a local folder; hf://google/tiny is the repository on the hub";
    assert!(output.status.success() && stderr(&output).contains(says), "{}", stderr(&output));
    // A name that is missing from a folder is a mistake, not a repository.
    let message =
        ["google/gated is taken for a local folder", "google/gated: expected a checkpoint folder, found nothing"];
    check_fails("a missing folder", &hub.export(&["google/gated", "out"]), &message);
    assert_eq!(hub.requests().len(), 0);
    stdout(hub.export(&["hf://google/tiny", "hub"]));
    assert_ne!(names(&hub.path("hub")).len(), 0);
    assert_ne!(hub.requests().len(), 0);
}

#[test]
fn two_programs_share_a_download() {
    let hub = Hub::start(json!([]));
    let children = ["one", "two"].map(|out| hub.command().args(["google/tiny", out]).spawn().expect("starts"));
    for mut child in children {
        assert!(child.wait().expect("ends").success());
    }
    assert_eq!(hub.ranges(SHARD).len(), 1);
    check_same(&hub.path("one"), &hub.path("two"));
}

#[test]
fn connections_are_encrypted() {
    let certificate = tests().join("fixtures/hub/localhost.pem");
    let hub = Hub::start_with(json!([]), &["--tls", certificate.to_str().expect("UTF-8")]);
    check_fails("an unknown issuer", &hub.export(&["google/tiny", "out"]), &["cannot be reached: ", "certificate"]);
    stdout(hub.command().args(["google/tiny", "out"]).env("SSL_CERT_FILE", &certificate).output().expect("starts"));
    let none = fixture("tiny-sharded").join("checkpoint/config.json");
    let output = hub.command().args(["google/tiny", "out"]).env("SSL_CERT_FILE", none).output().expect("starts");
    check_fails("no certificate", &output, &["SSL_CERT_FILE: expected PEM certificates, found none in "]);
}

#[test]
fn proxies_are_used() {
    let hub = Hub::start(json!([]));
    // The stand-in answers for any host. It is its own storage server, which is not reached by the proxy.
    let mut command = hub.command();
    command.args(["google/tiny", "out"]).env("HF_ENDPOINT", "http://hub.invalid").env("HTTP_PROXY", &hub.endpoint);
    stdout(command.env("NO_PROXY", "localhost").output().expect("starts"));
    let hosts: Vec<Value> = hub.requests().into_iter().map(|request| request["host"].clone()).collect();
    assert!(hosts.contains(&json!("hub.invalid")), "{hosts:?}");
}

#[test]
fn huggingface_hub_uses_the_same_cache() {
    let hub = Hub::start(json!([]));
    stdout(hub.export(&["google/tiny", "first"]));
    let snapshot = |offline: bool, home: &Path| {
        let code = "import huggingface_hub as hub; print(hub.snapshot_download('google/tiny', allow_patterns=['*.json', 'model-*']))";
        let mut command = Command::new(from_make("T5GEMMA_PYTHON"));
        command.args(["-c", code]).env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", home);
        command.env("HF_HUB_OFFLINE", if offline { "1" } else { "0" }).env("HF_HUB_DISABLE_TELEMETRY", "1");
        command.env_remove("HF_TOKEN").env_remove("HF_HUB_CACHE");
        PathBuf::from(stdout(command.output().expect("Python runs")).trim())
    };
    let ours = snapshot(true, &hub.path("home"));
    assert_eq!(ours, hub.path("home/hub/models--google--tiny/snapshots").join(COMMIT));
    hub.requests();
    let theirs = snapshot(false, &hub.path("other"));
    for name in names(&theirs) {
        let link = |folder: &Path| fs::read_link(folder.join(&name)).expect("a link");
        assert_eq!(link(&theirs), link(&ours), "{name}");
    }
    hub.requests();
    let output = hub.command().args(["google/tiny", "second"]).env("HF_HOME", hub.path("other")).output();
    stdout(output.expect("starts"));
    assert_eq!(hub.ranges(SHARD).len(), 0);
    check_same(&hub.path("second"), &hub.path("first"));
}
