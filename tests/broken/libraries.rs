//! No usable ONNX Runtime: one line that ends with the remedy.

use std::fs;
use std::process::{Output, Stdio};

use super::{check_all, refused};
use crate::common::{exported, program};

/// A value of `ORT_DYLIB_PATH`, and the expected error.
struct Case {
    name: &'static str,
    variable: Option<&'static str>,
    says: &'static str,
}

const CASES: [Case; 4] = [
    Case { name: "none anywhere", variable: None, says: "expected ONNX Runtime 1.31 or newer, found none at " },
    Case {
        name: "a file that is not there",
        variable: Some("absent.so"),
        says: "absent.so (ORT_DYLIB_PATH): expected ONNX Runtime 1.31 or newer, found nothing",
    },
    Case { name: "a text file", variable: Some("text.so"), says: "text.so (ORT_DYLIB_PATH): " },
    Case { name: "a folder", variable: Some("folder"), says: "folder (ORT_DYLIB_PATH): " },
];

#[test]
fn every_command_says_what_to_do() {
    check_all(
        &CASES,
        |case| case.name,
        |case| {
            let model = exported("tiny-untied");
            let output = without_library(case, &["generate", model.to_str().expect("UTF-8"), "--jsonl"]);
            refused(&output, &[case.says])?;
            one_line_with_remedy(&String::from_utf8_lossy(&output.stderr))
        },
    );
}

#[test]
fn doctor_fails_and_says_what_to_do() {
    check_all(
        &CASES,
        |case| case.name,
        |case| {
            let output = without_library(case, &["doctor"]);
            let out = String::from_utf8_lossy(&output.stdout);
            if output.status.code() != Some(1) || !out.contains(case.says) || !output.stderr.is_empty() {
                return Err(format!("{:?}\n{out}{}", output.status, String::from_utf8_lossy(&output.stderr)));
            }
            one_line_with_remedy(out.lines().last().unwrap_or_default())
        },
    );
}

fn one_line_with_remedy(text: &str) -> Result<(), String> {
    match text.lines().collect::<Vec<_>>()[..] {
        [line] if line.contains("; run `make onnxruntime`") => Ok(()),
        _ => Err(format!("expected one line that ends with what to run, found\n{text}")),
    }
}

/// Runs `t5gemma` in a folder from which no library is found.
fn without_library(case: &Case, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    fs::write(folder.path().join("text.so"), "not a library\n").expect("writable");
    fs::create_dir(folder.path().join("folder")).expect("writable");
    let mut program = program("t5gemma");
    program.args(arguments).current_dir(&folder).env("HOME", folder.path()).env_remove("XDG_DATA_HOME");
    match case.variable {
        Some(name) => program.env("ORT_DYLIB_PATH", folder.path().join(name)),
        None => program.env_remove("ORT_DYLIB_PATH"),
    };
    program.stdin(Stdio::null()).output().expect("the program starts")
}
