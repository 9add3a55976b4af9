//! `tests/scripts/check_imports.py`, which `make check` runs, on small workspaces with planted faults.

use std::process::Command;

use crate::common::tests;

/// Names and contents.
type Files<'a> = &'a [(&'a str, &'a str)];

/// Files of a small workspace without a fault: crate `top` uses crate `low`, and of each the modules one another in one direction.
const SOUND: Files = &[
    ("Cargo.toml", "[workspace]\nmembers = [\"low\", \"top\", \"free\"]\n"),
    (
        "README.md",
        "```imports\nfree ->\nlow ->\ntop -> low::{base}\ntop::{plain} -/-> engine, ort\nort only in top/src/engine.rs\n```\n",
    ),
    ("low/Cargo.toml", "[package]\nname = \"demo-low\"\n"),
    ("low/src/lib.rs", "pub mod base;\npub mod other;\npub use base::Thing;\n"),
    ("low/src/base.rs", "pub struct Thing;\n"),
    // A module may have the name of a crate.
    ("low/src/demo_free.rs", "pub fn run() {}\n"),
    (
        "low/src/other.rs",
        "use crate::{Thing, demo_free};\n\nfn run() {\n    demo_free::run();\n}\n\n#[cfg(test)]\nmod tests {\n    use crate::base::{self};\n}\n",
    ),
    ("free/Cargo.toml", "[package]\nname = \"demo-free\"\n"),
    ("free/src/lib.rs", ""),
    ("top/Cargo.toml", "[package]\nname = \"demo-top\"\n"),
    ("top/src/lib.rs", "mod engine;\nmod plain;\n"),
];

/// Runs the script on this workspace, where later files replace earlier ones of the same name: what it says, and whether it found nothing.
fn check(changed: Files) -> (String, bool) {
    let folder = tempfile::tempdir().expect("a folder");
    let rest = [
        ("top/src/engine.rs", "use crate::plain::Table;\nuse demo_low::Thing;\nuse ort::Session;\n"),
        ("top/src/plain.rs", "//! Unlike [`crate::engine`].\npub struct Table;\n"),
    ];
    for (name, text) in SOUND.iter().chain(&rest).chain(changed) {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a file has a folder")).expect("writable");
        std::fs::write(path, text).expect("writable");
    }
    let script = tests().join("scripts/check_imports.py");
    let python = std::env::var("T5GEMMA_PYTHON").unwrap_or_else(|_| "python3".into());
    let output = Command::new(python).arg(script).arg(folder.path()).output().expect("Python runs");
    let said = [output.stdout, output.stderr].concat();
    (String::from_utf8(said).expect("UTF-8"), output.status.success())
}

#[test]
fn imports_that_run_one_way_pass() {
    assert_eq!(check(&[]), ("imports run one way: 4 arrows\n".to_owned(), true));
}

#[test]
fn planted_circles_and_forbidden_arrows_are_found() {
    let engine = "top/src/engine.rs";
    let plain = "top/src/plain.rs";
    let cases: [(&str, Files, &str); 10] = [
        (
            "a circle of two modules",
            &[(plain, "use crate::engine::Run;\n")],
            "top: a circle of imports: engine -> plain (top/src/engine.rs:1), plain -> engine (top/src/plain.rs:1)",
        ),
        (
            "a circle through a tree of imports, a nested module and `super`",
            &[(plain, "mod deep;\n"), ("top/src/plain/deep.rs", "use super::super::{engine::{self, Run}};\n")],
            "plain -> engine (top/src/plain/deep.rs:1)",
        ),
        (
            "a circle through what the root re-exports",
            &[
                ("low/src/lib.rs", "pub mod base;\npub mod other;\npub use base::Thing;\npub use other::Else;\n"),
                ("low/src/base.rs", "pub struct Thing(crate::Else);\n"),
            ],
            "low: a circle of imports: base -> other (low/src/base.rs:1), other -> base (low/src/other.rs:1)",
        ),
        (
            "a circle through a path without `use`",
            &[(plain, "fn run() {\n    crate::engine::run()\n}\n")],
            "plain -> engine (top/src/plain.rs:2)",
        ),
        ("a module that must not use another", &[(plain, "use crate::engine::Run;\n")], "plain must not use engine"),
        (
            "a module that must not use a crate",
            &[(plain, "use ort::Session;\n")],
            "top/src/plain.rs:1: plain must not use ort",
        ),
        (
            "a foreign crate outside of its home",
            &[("low/src/base.rs", "use ort::Session;\npub struct Thing;\n")],
            "low/src/base.rs:1: ort is for top/src/engine.rs only",
        ),
        (
            "a crate that must not use another",
            &[("low/src/base.rs", "use demo_top::run;\npub struct Thing;\n")],
            "low/src/base.rs:1: low must not use top",
        ),
        (
            "a module that another crate must not use",
            &[(engine, "use demo_low::other::Else;\n")],
            "top/src/engine.rs:1: top must not use low::other",
        ),
        (
            "a rule for what is not there",
            &[("README.md", "```imports\nlow ->\nnone -> low\n```\n")],
            "'none' is not a crate",
        ),
    ];
    for (name, changed, expected) in cases {
        let (said, is_sound) = check(changed);
        assert!(!is_sound && said.contains(expected), "{name}: expected '{expected}', found '{said}'");
    }
}

#[test]
fn rules_are_read_or_refused() {
    for (name, readme, expected) in [
        ("no rules", "", "no ```imports block"),
        ("a line that is no rule", "```imports\nlow uses nothing\n```\n", "found 'low uses nothing'"),
        (
            "a home that is not there",
            "```imports\nlow ->\ntop -> low\nort only in top/src/gone.rs\n```\n",
            "'top/src/gone.rs' does not",
        ),
    ] {
        let (said, is_sound) = check(&[("README.md", readme)]);
        assert!(!is_sound && said.contains(expected), "{name}: expected '{expected}', found '{said}'");
    }
}
