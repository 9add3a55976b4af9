//! What cannot be read or written, arguments that contradict each other, signals and kills.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;

use super::{Folders, gzipped, lines, sentences, stderr, text_of};
use crate::common::{demo, program, python, tests};

/// A program that is killed with the test that started it.
struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_shard_that_fails_is_named_and_the_others_go_on() {
    let folders = Folders::new();
    let good = text_of(&sentences(30));
    folders.write("good.jsonl", &good);
    folders.write("late.jsonl", &good);
    let whole = gzipped(&good.repeat(40));
    folders.write("cut.jsonl.gz", &whole[..whole.len() - 9]);
    let whole = zstd::encode_all(good.repeat(40).as_bytes(), 0).expect("memory");
    folders.write("cut.jsonl.zst", &whole[..whole.len() - 9]);
    let whole = fs::read(tests().join("fixtures/batch/documents.parquet")).expect("the fixture");
    folders.write("cut.parquet", &whole[..whole.len() - 9]);
    let mut damaged = whole.clone();
    damaged[2000..2400].fill(0xff);
    folders.write("damaged.parquet", &damaged);
    folders.write("table.csv", "a,b\n");
    folders.write("taken.jsonl", "{\"text\":\"a\"}\n{\"text\":\"a\",\"generated_text\":\"b\"}\n");
    folders.write("utf16.jsonl", b"\xff\xfea\0");
    let output = folders.batch_of(&demo(), &["*", "none-*"], "out", &["--max-new-tokens", "9"]);
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    let expected = [
        "none-*: no file matches",
        "cut.jsonl.gz: line ",
        "cut.jsonl.zst: line ",
        "cut.parquet: expected Parquet: ",
        "damaged.parquet: ",
        "table.csv: expected a name that ends in .jsonl, .jsonl.gz, .jsonl.zst or .parquet",
        "taken.jsonl: line 2: has a field \"generated_text\" already; give the results another name",
        "utf16.jsonl: line 1: cannot be read: expected UTF-8, found the byte-order mark of UTF-16",
        "7 of 9 shards failed",
    ];
    for expected in expected {
        assert!(told.contains(expected), "{expected}\n{told}");
    }
    assert_eq!(folders.outputs("out").into_keys().collect::<Vec<_>>(), ["good.jsonl", "late.jsonl"]);
    let left =
        fs::read_dir(folders.path("out/_batch")).expect("records").map(|entry| entry.expect("an entry").file_name());
    let mut left: Vec<String> = left.map(|name| name.into_string().expect("UTF-8")).collect();
    left.sort();
    assert_eq!(left, ["good.jsonl.json", "late.jsonl.json", "settings.json"]);
    let summary = lines(&output.stdout);
    assert_eq!((&summary[0]["written"], &summary[0]["failed"]), (&json!(2), &json!(7)));
}

/// A limit on the size of files stands for a full disk, whose error differs in its number only.
#[cfg(target_os = "linux")]
#[test]
fn what_cannot_be_read_or_written_fails_alone() {
    let folders = Folders::new();
    folders.write("good.jsonl", text_of(&sentences(3)));
    let large = json!({"text": 5, "padding": "x".repeat(1 << 16)});
    folders.write("large.jsonl", format!("{large}\n").repeat(64));
    std::os::unix::fs::symlink("/proc/self/mem", folders.path("in/torn.jsonl")).expect("a new link");
    let mut command = std::process::Command::new("bash");
    command.args(["-c", "trap '' XFSZ; ulimit -f 1024; exec \"$@\"", "bash"]).arg(program("t5gemma").get_program());
    command.envs(program("t5gemma").get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.args(["batch", &demo().display().to_string(), "--max-new-tokens", "9", "--input"]);
    command.arg(folders.path("in").join("*")).arg("--output").arg(folders.path("out"));
    let output = command.output().expect("bash runs");
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    for expected in [
        "large.jsonl: cannot be written: File too large (os error 27)",
        "torn.jsonl: line 1: cannot be read: Input/output error (os error 5)",
        "2 of 3 shards failed",
    ] {
        assert!(told.contains(expected), "{expected}\n{told}");
    }
    assert_eq!(folders.outputs("out").into_keys().collect::<Vec<_>>(), ["good.jsonl"]);
    let left = fs::read_dir(folders.path("out/_batch")).expect("records").count();
    assert_eq!(left, 2, "settings and one record");
    // Once there is room, the rest is done.
    fs::remove_file(folders.path("in/torn.jsonl")).expect("a link");
    let output = folders.batch(&demo(), "out", &["--max-new-tokens", "9"]);
    assert_eq!(lines(&output.stdout)[0]["written"], 1, "{}", stderr(&output));
    // A place where nobody may write, root included.
    let mut command = program("t5gemma");
    command.args(["batch", &demo().display().to_string(), "--output", "/sys/t5gemma/out", "--input"]);
    let output = command.arg(folders.path("in/good.jsonl")).output().expect("the program starts");
    let told = stderr(&output);
    assert!(output.status.code() == Some(1) && told.contains("t5gemma: /sys/t5gemma/out/_batch: "), "{told}");
}

#[test]
fn contradictory_arguments_are_refused_before_anything_runs() {
    let folders = Folders::new();
    folders.write("a.jsonl", "{\"text\":\"a\"}\n");
    fs::create_dir(folders.path("in/sub")).expect("a new folder");
    folders.write("sub/a.jsonl", "{\"text\":\"a\"}\n");
    folders.write("b.jsonl", "");
    let cases: [(&[&str], &str, &[&str], &str); 8] = [
        (&["a.jsonl", "sub/a.jsonl"], "out", &[], "expected files of different names"),
        (&["sub/a.jsonl"], "in", &[], "which is in the output folder"),
        (&["sub"], "out", &[], "expected files, found the folder"),
        (&["a.jsonl"], "in/b.jsonl", &[], "expected a folder, found the file"),
        (&["a.jsonl"], "out", &["--do-sample"], "--do-sample requires --seed"),
        (&["a.jsonl"], "out", &["--max-time", "3"], "--max-time"),
        (
            &["a.jsonl"],
            "out",
            &["--task", "score", "--num-beams", "2"],
            "--num-beams requires --task generate (got score)",
        ),
        (&["a.jsonl"], "out", &["--shard", "3/3"], "I from 0 to N - 1"),
    ];
    for (inputs, output, options, expected) in cases {
        let found = folders.batch_of(&demo(), inputs, output, options);
        assert_eq!(found.status.code(), Some(2), "{expected}: {}", stderr(&found));
        assert!(stderr(&found).contains(expected), "{expected}\n{}", stderr(&found));
        assert!(!folders.path("out/_batch").exists(), "{expected}");
    }
    // Where nothing can be written.
    let found = folders.batch_of(&demo(), &["a.jsonl"], "in/b.jsonl/out", &[]);
    assert_eq!(found.status.code(), Some(1), "{}", stderr(&found));
    assert!(stderr(&found).contains("b.jsonl/out"), "{}", stderr(&found));
}

#[cfg(unix)]
#[test]
fn signals_end_it_with_nothing_half_written() {
    let folders = Folders::new();
    folders.write("a.jsonl", text_of(&sentences(4)));
    folders.write("b.jsonl", text_of(&sentences(1000)).repeat(20));
    let mut command = program("t5gemma");
    command.args(["batch", &demo().display().to_string(), "--max-new-tokens", "100", "--window", "16", "--input"]);
    command.arg(folders.path("in").join("*")).arg("--output").arg(folders.path("out"));
    let mut child = Child(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program starts"));
    while !folders.path("out/a.jsonl").exists() {
        assert!(child.0.try_wait().expect("a child").is_none(), "it ended by itself");
        std::thread::sleep(Duration::from_millis(20));
    }
    let killed = std::process::Command::new("kill").arg("-TERM").arg(child.0.id().to_string()).status();
    assert!(killed.expect("kill runs").success());
    assert_eq!(child.0.wait().expect("a child").code(), Some(130));
    assert_eq!(folders.outputs("out").into_keys().collect::<Vec<_>>(), ["a.jsonl"]);
    let left = fs::read_dir(folders.path("out/_batch")).expect("records").count();
    assert_eq!(left, 2, "settings and one record");
}

/// Kills at random moments; `make nightly` has more of them.
#[cfg(unix)]
#[test]
fn kills_change_no_byte() {
    let kills = std::env::var("T5GEMMA_BATCH_KILLS").unwrap_or_else(|_| "6".into());
    let program = program("t5gemma").get_program().to_owned();
    let parquet = tests().join("fixtures/batch/documents.parquet");
    let arguments = [program, demo().into(), parquet.into(), kills.into()];
    let told = python("batch_kills.py", arguments);
    assert!(told.contains("byte for byte"), "{told}");
}
