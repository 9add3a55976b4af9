//! Bad input of every kind. Each case exits with status 1 (2 for contradictory arguments) and a short error that names
//! the file and the problem, and leaves no files behind. Every table runs to its end, so that one run shows all failing
//! cases.

mod adaptations;
mod checkpoints;
mod libraries;
mod models;
mod outputs;
mod references;
mod requests;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;

/// Runs all cases and lists those that fail.
fn check_all<C>(cases: &[C], name: impl Fn(&C) -> &str, check: impl Fn(&C) -> Result<(), String>) {
    let failed: Vec<String> =
        cases.iter().filter_map(|case| Some(format!("{}: {}", name(case), check(case).err()?))).collect();
    assert!(failed.is_empty(), "{} of {} cases:\n\n{}", failed.len(), cases.len(), failed.join("\n\n"));
}

/// Checks that a program failed with one short error that contains each of `says`.
fn refused(output: &Output, says: &[&str]) -> Result<(), String> {
    refused_with(output, 1, says)
}

/// Checks that a program exited with this status and one short error that contains each of `says`.
fn refused_with(output: &Output, status: i32, says: &[&str]) -> Result<(), String> {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let wrong = |what: &str| Err(format!("{what}\nstatus: {:?}\nstdout: {out}\nstderr: {err}", output.status.code()));
    if output.status.code() != Some(status) || err.contains("panicked") {
        return wrong(&format!("expected exit status {status} and no panic"));
    }
    if !out.is_empty() {
        return wrong("expected nothing on stdout");
    }
    if err.is_empty() || err.lines().count() > 14 || err.len() > 2500 {
        return wrong("expected a short error");
    }
    match says.iter().find(|says| !err.contains(**says)) {
        Some(says) => wrong(&format!("expected {says:?} in the error")),
        None => Ok(()),
    }
}

/// Checks that a folder contains `expected` and nothing else.
fn holds(folder: &Path, expected: &[&str]) -> Result<(), String> {
    let found = names(folder);
    match found.iter().map(String::as_str).eq(expected.iter().copied()) {
        true => Ok(()),
        false => Err(format!("expected {expected:?} in {}, found {found:?}", folder.display())),
    }
}

/// The names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("listed").file_name().into_string().expect("names of the tests are UTF-8"))
        .collect();
    names.sort();
    names
}

/// A writable copy of a folder of files, whatever the permissions of the originals.
fn copy(from: &Path, to: &Path) -> PathBuf {
    fs::create_dir(to).expect("a new folder can be made");
    for name in names(from) {
        fs::write(to.join(&name), fs::read(from.join(&name)).expect("readable")).expect("writable");
    }
    to.to_path_buf()
}

fn write(folder: &Path, name: &str, content: impl AsRef<[u8]>) {
    fs::write(folder.join(name), content).expect("a file of a test can be written");
}

fn remove(folder: &Path, name: &str) {
    fs::remove_file(folder.join(name)).expect("a file of a test can be removed");
}

/// Changes the bytes of a file.
fn edit(folder: &Path, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(folder.join(name)).expect("readable");
    change(&mut bytes);
    write(folder, name, bytes);
}

/// Sets values in a JSON file, by JSON pointer.
fn set(folder: &Path, name: &str, changes: &[(&str, Value)]) {
    edit(folder, name, |bytes| {
        let mut document: Value = serde_json::from_slice(bytes).expect("the fixtures are JSON");
        for (pointer, value) in changes {
            let (above, key) = pointer.rsplit_once('/').expect("pointers start with a slash");
            let above = document.pointer_mut(above).unwrap_or_else(|| panic!("{name} has {pointer}"));
            match key.parse::<usize>() {
                Ok(index) => above[index] = value.clone(),
                Err(_) => above[key] = value.clone(),
            }
        }
        *bytes = document.to_string().into_bytes();
    });
}
