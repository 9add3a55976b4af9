//! Shared by the tests: the fixtures, models exported from them once, the programs, and the Python scripts.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, OnceLock};

use serde_json::Value;
use t5gemma_exporter::{Checkpoint, Export, Source};
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::Logits;
use t5gemma_runtime::{LogitsProcessor, Request};
use tempfile::TempDir;

/// The checkpoints with reference tensors and generation cases.
pub const FIXTURES: [&str; 15] = [
    "t2-balanced",
    "t2-bf16",
    "t2-fiveone",
    "t2-mha",
    "t2-sharded",
    "t2-unbalanced",
    "t2-untied",
    "tiny-balanced",
    "tiny-bf16",
    "tiny-bias",
    "tiny-legacy-config",
    "tiny-mha-nocap",
    "tiny-sharded",
    "tiny-unbalanced",
    "tiny-untied",
];

/// Holds requests within a step until it is opened or dropped, so that tests of what is in flight do not depend on
/// timing.
#[derive(Default)]
pub struct Hold(Arc<(Mutex<Held>, Condvar)>);

#[derive(Default)]
struct Held {
    count: usize,
    is_open: bool,
}

impl Hold {
    /// A request whose sources are each held once this many target tokens exist.
    pub fn at(&self, tokens: usize, mut request: Request) -> Request {
        let held = self.0.clone();
        request.config.logits_processor.push(LogitsProcessor::new(move |place, _| {
            if place.history.len() == place.prompt_len + tokens {
                let (held, changed) = &*held;
                let mut held = held.lock().expect("no panic");
                held.count += 1;
                changed.notify_all();
                drop(changed.wait_while(held, |held| !held.is_open).expect("no panic"));
            }
        }));
        request
    }

    /// Waits until this many sources are held.
    pub fn wait_for(&self, count: usize) {
        let (held, changed) = &*self.0;
        let held = held.lock().expect("no panic");
        drop(changed.wait_while(held, |held| held.count < count).expect("no panic"));
    }

    /// Lets all held sources continue.
    pub fn open(&self) {
        self.0.0.lock().expect("no panic").is_open = true;
        self.0.1.notify_all();
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.open();
    }
}

/// The instruction levels that this processor has, lowest first, as `T5GEMMA_MAX_CPU_ISA` takes them. Which are tested and which are not is
/// written to stderr, past the capture of passing tests.
pub fn instruction_levels() -> Vec<&'static str> {
    const LEVELS: [&str; 4] = ["generic", "avx2", "avx512_vnni", "avx512_amx"];
    let highest = t5gemma_runtime::instructions().expect("T5GEMMA_MAX_CPU_ISA is unset or valid");
    let count = 1 + LEVELS.iter().position(|level| *level == highest).expect("a level of this list");
    let (tested, missing) = LEVELS.split_at(count);
    let report = format!("instruction levels tested: {tested:?}, not on this processor: {missing:?}\n");
    std::io::stderr().write_all(report.as_bytes()).expect("stderr can be written");
    tested.to_vec()
}

/// This package's folder.
pub fn tests() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The folder of a fixture, with `checkpoint`, `golden.safetensors` and `cases.json`.
pub fn fixture(name: &str) -> PathBuf {
    tests().join("fixtures/public").join(name)
}

/// A fixture's `cases.json`.
pub fn cases(name: &str) -> Value {
    let path = fixture(name).join("cases.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A folder that lives as long as the test binary runs.
fn scratch() -> &'static Path {
    static SCRATCH: OnceLock<TempDir> = OnceLock::new();
    SCRATCH.get_or_init(|| TempDir::new().expect("a temporary folder can be made")).path()
}

/// A fixture's checkpoint as exported by default, once for all tests.
pub fn exported(name: &str) -> PathBuf {
    exported_as(name, "default", Export::default())
}

/// A fixture's checkpoint as exported for a target, once for all tests.
pub fn exported_for(name: &str, target: Target) -> PathBuf {
    exported_as(name, target.name(), Export::default().target(target))
}

/// Every fixture in every way that the runtime can run it on a CPU: the names of fixture and way, and the model.
pub fn exported_every_way() -> impl Iterator<Item = (&'static str, &'static str, PathBuf)> {
    let to_a_capacity = || {
        // As many candidates as most of the cases' beams need.
        let (target, capacity, logits) = (Target::TensorRt, Some(64), Logits::Candidates(12));
        Export::default().target(target).capacity(capacity).logits(logits)
    };
    FIXTURES.into_iter().flat_map(move |name| {
        let targets = Target::ALL.map(|target| (target.name(), exported_for(name, target)));
        let fixed = exported_as(name, "static", to_a_capacity());
        targets.into_iter().chain([("tensorrt with a static cache", fixed)]).map(move |(way, model)| (name, way, model))
    })
}

/// Every fixture with every target that runs on a CPU.
pub fn fixtures_and_targets() -> impl Iterator<Item = (&'static str, Target)> {
    FIXTURES.into_iter().flat_map(|name| [Target::Portable, Target::Cpu].map(|target| (name, target)))
}

/// A fixture's checkpoint exported in another way, once for all tests that say `label`.
pub fn exported_as(name: &str, label: &str, export: Export) -> PathBuf {
    exported_from(&fixture(name).join("checkpoint"), &format!("{name}-{label}"), export)
}

/// The demo checkpoint as exported by default, once for all tests.
pub fn demo() -> PathBuf {
    exported_from(&tests().join("demo/checkpoint"), "demo", Export::default())
}

/// The demo checkpoint as exported in another way, once for all tests that say `label`.
pub fn demo_as(label: &str, export: Export) -> PathBuf {
    exported_from(&tests().join("demo/checkpoint"), &format!("demo-{label}"), export)
}

/// A checkpoint exported in some way, once for all tests that say `label`.
pub fn exported_from(checkpoint: &Path, label: &str, export: Export) -> PathBuf {
    static DONE: Mutex<Option<HashMap<String, PathBuf>>> = Mutex::new(None);
    let mut done = DONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let done = done.get_or_insert_default();
    if let Some(path) = done.get(label) {
        return path.clone();
    }
    let out = scratch().join(label);
    let source = Source::Checkpoint(Checkpoint::open(checkpoint).expect("the fixture opens"));
    export.run(&source, &out).expect("the fixture exports");
    done.insert(label.to_string(), out.clone());
    out
}

/// One of the programs, built on first use; `cargo test` alone does not build other packages' programs.
pub fn program(name: &str) -> Command {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let built = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--workspace", "--locked", "--manifest-path"])
            .arg(tests().join("../Cargo.toml"))
            .status()
            .expect("cargo runs");
        assert!(built.success(), "the programs build");
    });
    let folder = std::env::current_exe().expect("a test has a path");
    let folder = folder.parent().and_then(Path::parent).expect("tests lie in the profile's deps folder");
    Command::new(folder.join(name))
}

/// Runs a program with arguments and `stdin`, which need not be text.
pub fn run<S: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = S>, stdin: impl AsRef<[u8]>) -> Output {
    let mut child = program(name)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut pipe = child.stdin.take().expect("stdin is piped");
    let bytes = stdin.as_ref().to_vec();
    // Written on a thread of its own: a program may answer before it has read everything.
    let writer = std::thread::spawn(move || {
        // A program that stops early closes its end; what it says then is for the test to judge.
        let _ = pipe.write_all(&bytes);
    });
    let output = child.wait_with_output().expect("the program ends");
    writer.join().expect("writing does not panic");
    output
}

/// A program's stdout, after checking that it succeeded.
pub fn stdout(output: Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\nstdout: {out}\nstderr: {err}", output.status);
    out.into_owned()
}

/// The path in an environment variable that `make test` sets.
pub fn from_make(variable: &str) -> PathBuf {
    let value = std::env::var_os(variable);
    value.unwrap_or_else(|| panic!("{variable} is not set: run the tests by `make test`")).into()
}

/// Runs one of the Python scripts beside the tests and returns what it prints.
pub fn python<S: AsRef<OsStr>>(script: &str, arguments: impl IntoIterator<Item = S>) -> String {
    let output = Command::new(from_make("T5GEMMA_PYTHON"))
        .arg(tests().join("scripts").join(script))
        .args(arguments)
        .output()
        .expect("Python runs");
    stdout(output)
}
