//! The backend for Triton Inference Server, in NVIDIA's server and asked by NVIDIA's clients (`scripts/triton_checks.py`). There is
//! a server for x86-64 Linux only; elsewhere these tests say that they are skipped.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use t5gemma_exporter::{Alignment, Export};
use t5gemma_graphs::Target;
use t5gemma_graphs::task::{Features, Pooling, Task};
use tempfile::TempDir;

use crate::capi::installed;
use crate::common::{demo_as, exported_from, from_make, program, python, stdout, tests};

/// Whether there is a server for this machine. Says so past the capture of the test harness.
fn is_there(test: &str) -> bool {
    let is_there = cfg!(all(target_os = "linux", target_arch = "x86_64"));
    if !is_there {
        let _ = writeln!(
            std::io::stderr(),
            "triton::{test}: SKIPPED, there is a Triton Inference Server for x86-64 Linux only"
        );
    }
    is_there
}

/// The folder of the backends, with ours built over the library of the tests of C.
fn backends() -> &'static Path {
    static BUILT: OnceLock<TempDir> = OnceLock::new();
    let folder = BUILT.get_or_init(|| {
        let folder = TempDir::new().expect("a temporary folder can be made");
        let mut build = Command::new(tests().join("../runtime/triton/build.sh"));
        build.arg(installed().prefix()).arg(folder.path().join("t5gemma"));
        build.env("ONNXRUNTIME", from_make("ORT_DYLIB_PATH")).env("CXXFLAGS", "-Wconversion -Werror");
        assert!(stdout(build.output().expect("the script runs")).starts_with("built "));
        folder
    });
    folder.path()
}

fn task(checkpoint: &str, label: &str, export: Export) -> PathBuf {
    exported_from(&tests().join(checkpoint), &format!("triton-{label}"), export)
}

/// Runs a check of the script in a folder.
fn check(name: &str) {
    if is_there(name) {
        check_in(name, TempDir::new().expect("a temporary folder can be made"));
    }
}

fn check_in(name: &str, work: TempDir) {
    // Rows of this model share every step; it tells the attention of its tokens, too.
    let demo = demo_as("triton", Export::default().target(Target::Cpu).alignment(Alignment::AllLayers));
    let tasks = work.path().join("tasks");
    std::fs::create_dir(&tasks).expect("it is new");
    let first = Task::FeatureExtraction(Features { pooling: Pooling::First, ..Features::default() });
    for (label, folder) in [
        ("labels", task("fixtures/tasks/sequence-decoder/checkpoint", "labels", Export::default())),
        ("tokens", task("fixtures/tasks/token-encoder/checkpoint", "tokens", Export::default())),
        ("vectors", task("demo/checkpoint", "vectors", Export::default().task(first))),
    ] {
        std::os::unix::fs::symlink(folder, tasks.join(label)).expect("it is new");
    }
    let triton = from_make("T5GEMMA_TRITON");
    let arguments = [Path::new(name), &triton, backends(), &demo, &tasks, work.path()];
    assert_eq!(python("triton_checks.py", arguments), format!("{name}\n"));
}

#[test]
fn the_declarations_are_nvidias() {
    if !is_there("the_declarations_are_nvidias") {
        return;
    }
    let source = tests().join("../runtime/triton/src");
    let compile = |of: &str| {
        let mut compiler = Command::new("c++");
        compiler.args(["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-I"]);
        compiler.arg(from_make("T5GEMMA_TRITON").join("include")).arg("-I").arg(&source).args(["-x", "c++", "-"]);
        compiler.stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let mut child = compiler.spawn().expect("there is a compiler");
        child.stdin.take().expect("piped").write_all(of.as_bytes()).expect("the compiler reads");
        child.wait_with_output().expect("the compiler ends")
    };
    stdout(compile("#include \"check.cc\""));
    // And it finds another declaration.
    let header = std::fs::read_to_string(source.join("triton.h")).expect("it is there");
    let other = header.replace("const uint64_t batch_size", "const uint32_t batch_size");
    assert_ne!(header, other);
    let check = std::fs::read_to_string(source.join("check.cc")).expect("it is there");
    let found = compile(&check.replace("#include \"triton.h\"", &other));
    assert!(!found.status.success() && String::from_utf8_lossy(&found.stderr).contains("conflicting declaration"));
}

#[test]
fn clients_get_their_answers() {
    check("clients");
}

#[test]
fn clients_that_cancel_or_crowd_do_no_harm() {
    check("faults");
}

#[test]
fn models_reload_and_end_while_they_are_asked() {
    check("reload");
}

#[test]
fn held_out_sentences_are_exact() {
    check("exact");
}

#[test]
fn exported_repositories_are_served() {
    let work = TempDir::new().expect("a temporary folder can be made");
    let folder = |name: &str| work.path().join(name).display().to_string();
    let repository = folder("repository");
    let export = |checkpoint: &str, out: &str, more: &[&str]| {
        let checkpoint = tests().join(checkpoint).display().to_string();
        let out = folder(out);
        let arguments = [&[&*checkpoint, &*out, "--quiet", "--triton-repository", &*repository], more].concat();
        program("t5gemma-export").args(arguments).output().expect("the program runs")
    };
    let demo = "demo/checkpoint";
    for (checkpoint, out) in [
        (demo, "models/beside"),
        (demo, "repository/inside/1"),
        ("fixtures/tasks/sequence-decoder/checkpoint", "models/labels"),
    ] {
        stdout(export(checkpoint, out, &[]));
    }
    for (out, words) in [
        ("models/beside", "repository/beside/config.pbtxt: exists"),
        ("repository/demo", "OUT: expected a folder outside of"),
        ("repository/demo/v2", "OUT: expected a folder outside of"),
        ("models/not a name", "OUT: expected a name of letters"),
        ("models/other/../inside", "repository/inside/config.pbtxt: exists"),
    ] {
        let refused = export(demo, out, &[]);
        let message = String::from_utf8_lossy(&refused.stderr);
        assert!(refused.status.code() == Some(1) && message.contains(words), "{out}: {message}");
    }
    let entries = |folder: &str| std::fs::read_dir(work.path().join(folder)).expect("it is there").count();
    assert_eq!((entries("models"), entries("repository")), (2, 5), "what is refused leaves nothing");
    let before = std::fs::read(work.path().join("repository/beside/1/exported")).expect("it is there");
    stdout(export(demo, "models/beside", &["--overwrite", "--target", "cpu"]));
    let after = std::fs::read(work.path().join("repository/beside/1/exported")).expect("it is there");
    assert_ne!(before, after, "Triton sees another version");
    if is_there("exported_repositories_are_served") {
        check_in("exported", work);
    }
}

#[test]
fn the_plain_repository_generates() {
    let work = TempDir::new().expect("a temporary folder can be made");
    let folder = |name: &str| work.path().join(name).display().to_string();
    let export = |backend: &str, checkpoint: &str, more: &[&str]| {
        let checkpoint = tests().join(checkpoint).display().to_string();
        let (out, repository) = (folder("demo"), folder(backend));
        let plain = ["--triton-repository", &repository, "--triton-backend", backend];
        let arguments = [&[&*checkpoint, &*out, "--quiet"], &plain[..], more].concat();
        program("t5gemma-export").args(arguments).output().expect("the program runs")
    };
    let plan = ["--target", "tensorrt", "--dtype", "float32", "--plan", "source=1..64,target=65"];
    let planned = |more: &[&'static str]| [&plan[..], more].concat();
    for (backend, checkpoint, more, expected) in [
        (
            "onnxruntime",
            "demo/checkpoint",
            vec!["--target", "cpu"],
            "expected target portable with logits, and a task that generates",
        ),
        ("onnxruntime", "demo/checkpoint", vec!["--task", "feature-extraction"], "expected target portable"),
        ("onnxruntime", "fixtures/tasks/sequence-decoder/checkpoint", vec![], "expected target portable"),
        (
            "tensorrt",
            "demo/checkpoint",
            vec![],
            "expected target tensorrt in float16 or float32 with logits, a plan from batch 1",
        ),
        ("tensorrt", "demo/checkpoint", vec!["--target", "tensorrt", "--dtype", "float32"], "plan none"),
        (
            "tensorrt",
            "demo/checkpoint",
            vec!["--target", "tensorrt", "--dtype", "bfloat16", "--plan", "source=1..64,target=65"],
            "found target tensorrt in bfloat16",
        ),
        ("tensorrt", "demo/checkpoint", planned(&["--cache", "static=65"]), "a growing cache"),
    ] {
        let refused = export(backend, checkpoint, &more);
        let message = String::from_utf8_lossy(&refused.stderr);
        assert!(message.contains(expected), "{message}");
        assert_eq!(std::fs::read_dir(work.path()).expect("it is there").count(), 0, "nothing is left behind");
    }
    for (backend, more) in [("onnxruntime", &[][..]), ("tensorrt", &plan[..])] {
        stdout(export(backend, "demo/checkpoint", &[&["--overwrite"], more].concat()));
        stdout(export(backend, "demo/checkpoint", &[&["--overwrite"], more].concat()));
        assert_eq!(python("triton_plain.py", [&*folder(backend), "demo", backend]), "plain\n");
    }
}
