//! Outputs that cannot be written, and interrupted exports.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::{check_all, copy, holds, names, refused, remove, set, write};
use crate::common::{exported, fixture, program, run};

/// The contents of `out` before the export, its arguments, and the expected error. Nothing changes.
struct Case {
    name: &'static str,
    before: fn(&Path),
    overwrite: &'static [&'static str],
    says: &'static [&'static str],
}

#[test]
fn what_is_not_a_model_is_not_replaced() {
    let cases = [
        Case {
            name: "a folder with something in it",
            before: |out| write(&folder(out), "thesis.txt", "years of work"),
            overwrite: &[],
            says: &["/out: exists and is not empty; choose another folder or pass --overwrite"],
        },
        Case {
            name: "a model, without --overwrite",
            before: |out| drop(copy(&exported("tiny-untied"), out)),
            overwrite: &[],
            says: &["/out: exists and is not empty; choose another folder or pass --overwrite"],
        },
        Case {
            name: "a folder that is not a model, with --overwrite",
            before: |out| write(&folder(out), "thesis.txt", "years of work"),
            overwrite: &["--overwrite"],
            says: &["/out: not replaced: it has no manifest.json of an exported model"],
        },
        Case {
            name: "another program's manifest.json, with --overwrite",
            before: |out| write(&folder(out), "manifest.json", "{\"name\": \"a web page\"}"),
            overwrite: &["--overwrite"],
            says: &["/out: not replaced: it has no manifest.json of an exported model"],
        },
        Case {
            name: "a model with other files in its folder, with --overwrite",
            before: |out| write(&copy(&exported("tiny-untied"), out), "thesis.txt", "years of work"),
            overwrite: &["--overwrite"],
            says: &["/out/thesis.txt: not replaced: the exported model beside it does not own it"],
        },
        Case {
            name: "a file",
            before: |out| fs::write(out, "years of work").expect("writable"),
            overwrite: &[],
            says: &["/out: expected a folder or nothing, found a file"],
        },
        Case {
            name: "a file, with --overwrite",
            before: |out| fs::write(out, "years of work").expect("writable"),
            overwrite: &["--overwrite"],
            says: &["/out: expected a folder or nothing, found a file"],
        },
    ];
    check_all(
        &cases,
        |case| case.name,
        |case| {
            let folder = tempfile::tempdir().expect("a temporary folder can be made");
            let out = folder.path().join("out");
            (case.before)(&out);
            let before = content(&out);
            let checkpoint = fixture("tiny-balanced").join("checkpoint");
            let arguments = [checkpoint.as_os_str(), out.as_os_str()].into_iter();
            let output = run("t5gemma-export", arguments.chain(case.overwrite.iter().map(OsStr::new)), "");
            refused(&output, case.says)?;
            holds(folder.path(), &["out"])?;
            if content(&out) == before { Ok(()) } else { Err(format!("{} was changed", out.display())) }
        },
    );
}

#[test]
fn an_empty_folder_and_an_older_model_are_replaced() {
    for older in ["nothing", "empty", "another model", "a half of a model of another version"] {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let out = folder.path().join("out");
        match older {
            "nothing" => {}
            "empty" => fs::create_dir(&out).expect("a new folder"),
            "another model" => drop(copy(&exported("tiny-untied"), &out)),
            _ => {
                copy(&exported("tiny-untied"), &out);
                remove(&out, "model.onnx_data");
                set(&out, "manifest.json", &[("/format_version", 0.into())]);
            }
        }
        let arguments = [fixture("tiny-balanced").join("checkpoint"), out.clone(), "--overwrite".into()];
        let output = run("t5gemma-export", arguments, "");
        assert!(output.status.success(), "{older}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(content(&out) == content(&exported("tiny-balanced")), "{older}");
        holds(folder.path(), &["out"]).unwrap_or_else(|wrong| panic!("{older}: {wrong}"));
    }
}

#[test]
fn places_that_cannot_be_written_to_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let file = folder.path().join("file");
    fs::write(&file, "").expect("writable");
    let below_file = file.join("models/out");
    let long = folder.path().join("n".repeat(300));
    let cases = [
        (below_file.to_str().expect("UTF-8"), "/file/models: cannot be created"),
        (long.to_str().expect("UTF-8"), "cannot be created"),
        // Not even root can create folders there.
        #[cfg(target_os = "linux")]
        ("/proc/out", "/proc/.out.partial-"),
        ("/", "/: expected the name of a folder to create"),
        ("..", "exists and is not empty"),
    ];
    check_all(
        &cases,
        |(out, _)| out,
        |(out, says)| {
            let arguments = [fixture("tiny-untied").join("checkpoint"), out.into()];
            refused(&run("t5gemma-export", arguments, ""), &[says])?;
            holds(folder.path(), &["file"])
        },
    );
}

/// Runs an export in a shell after `prepare`, whose `$1` is the folder to export into.
#[cfg(unix)]
fn export_in_shell(mut shell: Command, prepare: &str, folder: &Path) -> Output {
    let exporter = program("t5gemma-export");
    shell
        .args([
            "-c",
            &format!("{prepare}\n\"$0\" \"$2\" \"$1/models/out\""),
            exporter.get_program().to_str().expect("UTF-8"),
        ])
        .args([folder, &fixture("tiny-balanced").join("checkpoint")])
        .output()
        .expect("a shell runs")
}

#[cfg(unix)]
#[test]
fn a_file_that_may_not_grow_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    // The limit's signal is ignored, so that writing fails as on a full disk.
    let output = export_in_shell(Command::new("sh"), "trap '' XFSZ; ulimit -f 100", folder.path());
    let says = ["model.onnx_data: cannot be written (", " bytes are needed in all): File too large"];
    let checked = refused(&output, &says);
    checked.and_then(|()| holds(folder.path(), &[])).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    // A small file system that only this shell sees and that disappears with it.
    let mut shell = Command::new("unshare");
    shell.args(["--user", "--map-root-user", "--mount", "sh"]);
    let mount = "mount -t tmpfs -o size=64k tmpfs \"$1\" || exit 99\ntrap 'ls -A \"$1\"' EXIT";
    let output = export_in_shell(shell, mount, folder.path());
    if matches!(output.status.code(), Some(99 | 127)) || String::from_utf8_lossy(&output.stderr).contains("unshare") {
        eprintln!("skipped: no file system can be mounted here");
        return;
    }
    let says = ["model.onnx_data: cannot be written (", " bytes are needed in all): No space left on device"];
    refused(&output, &says).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[cfg(unix)]
#[test]
fn an_interrupted_export_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let child = program("t5gemma-export")
        .args(["--dummy-weights", "--preset", "b-b"])
        .arg(folder.path().join("models/out"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let weights = folder.path().join(format!("models/.out.partial-{}/model.onnx_data", child.id()));
    let started = Instant::now();
    while !fs::metadata(&weights).is_ok_and(|weights| weights.len() > 0) {
        assert!(started.elapsed() < Duration::from_secs(3600), "{} does not grow", weights.display());
        std::thread::sleep(Duration::from_millis(5));
    }
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(sent.success());
    let output = child.wait_with_output().expect("the program ends");
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "t5gemma-export: interrupted; no output was left behind\n");
    holds(folder.path(), &[]).unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// A new folder.
fn folder(path: &Path) -> PathBuf {
    fs::create_dir(path).expect("a new folder can be made");
    path.to_path_buf()
}

/// The bytes of a file, or of the files of a folder by name.
fn content(path: &Path) -> Vec<(String, Vec<u8>)> {
    if path.is_file() {
        return vec![(String::new(), fs::read(path).expect("readable"))];
    }
    names(path).into_iter().map(|name| (name.clone(), fs::read(path.join(name)).expect("readable"))).collect()
}
