//! `t5gemma batch`: every format and task, the same bytes however it is run and interrupted, and what it refuses.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch};
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{demo, exported, program, python, run, stdout, tests};

/// Inputs and outputs of a test.
struct Folders(TempDir);

impl Folders {
    fn new() -> Folders {
        let folders = Folders(TempDir::new().expect("a temporary folder can be made"));
        fs::create_dir(folders.path("in")).expect("a new folder");
        folders
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path("in").join(name), bytes).expect("inputs can be written");
    }

    /// Runs `t5gemma batch` on all inputs.
    fn batch(&self, model: &Path, output: &str, options: &[&str]) -> Output {
        self.batch_of(model, &["*"], output, options)
    }

    fn batch_of(&self, model: &Path, inputs: &[&str], output: &str, options: &[&str]) -> Output {
        let mut arguments = vec!["batch".into(), model.display().to_string(), "--input".into()];
        arguments.extend(inputs.iter().map(|input| self.path("in").join(input).display().to_string()));
        arguments.extend(["--output".into(), self.path(output).display().to_string()]);
        arguments.extend(options.iter().map(|option| option.to_string()));
        run("t5gemma", arguments, "")
    }

    /// The outputs of a folder, without its records.
    fn outputs(&self, output: &str) -> BTreeMap<String, Vec<u8>> {
        let Ok(entries) = fs::read_dir(self.path(output)) else { return BTreeMap::new() };
        let files = entries.map(|entry| entry.expect("a folder can be read")).filter(|entry| entry.path().is_file());
        let read = |entry: fs::DirEntry| {
            let name = entry.file_name().into_string().expect("UTF-8");
            (name, fs::read(entry.path()).expect("outputs can be read"))
        };
        files.map(read).collect()
    }

    /// The rows of an output in JSON lines.
    fn rows(&self, output: &str, name: &str) -> Vec<Value> {
        lines(&self.outputs(output)[name])
    }

    fn record(&self, output: &str, name: &str) -> Value {
        let path = self.path(output).join("_batch").join(name);
        serde_json::from_slice(&fs::read(path).expect("a record")).expect("JSON")
    }
}

fn lines(bytes: &[u8]) -> Vec<Value> {
    let text = str::from_utf8(bytes).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn summary(output: Output) -> Value {
    serde_json::from_str(&stdout(output)).expect("a line of JSON")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Lines of the demo's held-out sentences.
fn sentences(count: usize) -> Vec<Value> {
    let text = fs::read_to_string(tests().join("demo/eval.jsonl")).expect("the demo has sentences");
    text.lines().take(count).map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn text_of(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

fn gzipped(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(text.as_bytes()).and_then(|()| encoder.finish()).expect("writing to memory")
}

fn records(path: &Path) -> Vec<RecordBatch> {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let reader =
        ParquetRecordBatchReaderBuilder::try_new(file).and_then(|builder| builder.with_batch_size(4096).build());
    reader.expect("Parquet").map(|record| record.expect("Parquet")).collect()
}

/// A program that is killed with the test that started it.
struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn held_out_sentences_are_as_in_transformers() {
    let folders = Folders::new();
    let rows = sentences(1000);
    for (shard, rows) in rows.chunks(250).enumerate() {
        folders.write(&format!("{shard}.jsonl"), text_of(rows));
    }
    let summary = summary(folders.batch(&demo(), "out", &["--max-new-tokens", "100"]));
    assert_eq!((&summary["written"], &summary["rows"], &summary["errors"]), (&json!(4), &json!(1000), &json!(0)));
    let answers: Vec<Value> = (0..4).flat_map(|shard| folders.rows("out", &format!("{shard}.jsonl"))).collect();
    assert_eq!(answers.len(), 1000);
    for (row, answer) in rows.iter().zip(&answers) {
        assert_eq!((&row["text"], &row["target"]), (&answer["text"], &answer["target"]));
    }
    let exact = answers.iter().filter(|answer| answer["generated_text"] == answer["target"]).count();
    assert_eq!(exact, 984);
}

#[test]
fn a_line_is_carried_along_as_it_is() {
    let folders = Folders::new();
    let text = concat!(
        "\u{feff}{\"text\" : \"Dr. Smith\", \"id\":1.50, \"x\": [1e400, 123456789012345678901234567890]}\r\n",
        "\n",
        " { \"id\": \"ü\", \"text\": \"Mt. Bell\" } \n",
        "{\"id\":7,\"text\":5}\n",
        "no object\n",
        "{\"id\":8,\"text\":[\"a\",\"b\"]}\n",
        "{\"id\":9,\"text\":\"Mt. Bell\",\"options\":{\"max_new_tokens\":1}}\n",
        "{}\n",
        "{\"text\":\"a\",\"options\":{\"max_time\":1}}\n",
        "{\"text\":\"a\",\"options\":{\"num_beams\":0}}",
    );
    // A number that no float64 holds is no JSON here either.
    let text = text.replace("1e400", "1e40");
    let compressed = zstd::encode_all(text.as_bytes(), 0).expect("memory");
    folders.write("a.jsonl", &text);
    folders.write("b.jsonl.gz", [gzipped(&text[..40]), gzipped(&text[40..])].concat());
    folders.write("c.jsonl.zst", compressed);
    folders.write("empty.jsonl", "");
    let summary = summary(folders.batch(&demo(), "out", &["--max-new-tokens", "9"]));
    assert_eq!((&summary["rows"], &summary["errors"]), (&json!(27), &json!(18)));
    let outputs = folders.outputs("out");
    let plain = str::from_utf8(&outputs["a.jsonl"]).expect("UTF-8");
    let expected = [
        "{\"text\" : \"Dr. Smith\", \"id\":1.50, \"x\": [1e40, 123456789012345678901234567890],\"generated_text\":\"doctor smith\"}",
        "{ \"id\": \"ü\", \"text\": \"Mt. Bell\",\"generated_text\":\"mount bell\"}",
        "{\"id\":7,\"text\":5,\"error\":\"text: expected a text or a list of texts, found 5\"}",
        "{\"id\":4,\"error\":\"expected JSON: column 2: expected ident, found `o`\"}",
        "{\"id\":8,\"text\":[\"a\",\"b\"],\"error\":\"expected one source in a row, found 2\"}",
        "{\"id\":9,\"text\":\"Mt. Bell\",\"options\":{\"max_new_tokens\":1},\"generated_text\":\"mount\"}",
        "{\"error\":\"expected text, messages or input_ids, found none of them\"}",
        "{\"text\":\"a\",\"options\":{\"max_time\":1},\"error\":\"options.max_time: expected none in a batch, found a time\"}",
        "{\"text\":\"a\",\"options\":{\"num_beams\":0},\"error\":\"options.num_beams: expected an integer of at least 1, found 0\"}",
    ];
    assert_eq!(plain.lines().collect::<Vec<_>>(), expected);
    let mut text = String::new();
    MultiGzDecoder::new(outputs["b.jsonl.gz"].as_slice()).read_to_string(&mut text).expect("gzip");
    assert_eq!(text, plain);
    assert_eq!(zstd::decode_all(outputs["c.jsonl.zst"].as_slice()).expect("zstd"), plain.as_bytes());
    assert!(outputs["empty.jsonl"].is_empty());
    let record = folders.record("out", "a.jsonl.json");
    assert_eq!((&record["rows"], &record["errors"], &record["bytes"]), (&json!(9), &json!(6), &json!(plain.len())));
    assert_eq!(record["sha256"], hex::encode(<sha2::Sha256 as sha2::Digest>::digest(plain)));
    assert_eq!(record["settings"], folders.record("out", "settings.json"));
}

#[test]
fn parquet_keeps_its_columns() {
    let folders = Folders::new();
    let input = tests().join("fixtures/batch/documents.parquet");
    fs::copy(&input, folders.path("in/documents.parquet")).expect("the fixture is there");
    let options = ["--text-column", "body", "--max-new-tokens", "40", "--details", "--result-column", "spoken"];
    let summary = summary(folders.batch(&demo(), "out", &options));
    assert_eq!((&summary["rows"], &summary["errors"]), (&json!(300), &json!(1)));
    let [before] = &records(&input)[..] else { panic!("one record") };
    let [after] = &records(&folders.path("out/documents.parquet"))[..] else { panic!("one record") };
    let width = before.num_columns();
    assert_eq!(before.columns(), &after.columns()[..width]);
    let names: Vec<&String> = after.schema_ref().fields().iter().skip(width).map(|field| field.name()).collect();
    assert_eq!(names, ["spoken", "spoken_details", "error"]);
    assert_eq!(before.schema_ref().fields()[..], after.schema_ref().fields()[..width]);
    let metadata = after.schema_ref().metadata();
    assert_eq!((metadata.get("author").map(String::as_str), metadata.get("huggingface")), (Some("demo"), None));
    // The same as from JSON lines.
    folders.write("same.jsonl", text_of(&sentences(300)));
    stdout(folders.batch_of(&demo(), &["same.jsonl"], "lines", &["--max-new-tokens", "40"]));
    let found = after.column(width).as_string::<i32>();
    let details = after.column(width + 1).as_string::<i32>();
    for (row, line) in folders.rows("lines", "same.jsonl").iter().enumerate() {
        if row == 17 {
            assert!(found.is_null(row) && details.is_null(row) && !after.column(width + 2).is_null(row));
            continue;
        }
        assert!(after.column(width + 2).is_null(row), "row {row}");
        assert_eq!(line["generated_text"], found.value(row), "row {row}");
        let details: Value = serde_json::from_str(details.value(row)).expect("JSON");
        assert_eq!(details["sequences"][0]["text"], found.value(row));
        assert_eq!(details["sequences"][0]["finish_reason"], "eos");
    }
}

/// Options that must not change bytes.
const RUNS: [&[&str]; 4] = [
    &[],
    &["--threads", "1", "--window", "1", "--max-rows", "1"],
    &["--threads", "2", "--window", "130", "--max-rows", "7", "--batch-size", "3"],
    &["--batch-size", "64", "--window", "100000"],
];

/// Checks that outputs have the same bytes however they are computed.
fn check_bytes(model: &Path, options: &[&str]) {
    let folders = Folders::new();
    let body = |row: Value| json!({"body": row["text"], "target": row["target"]});
    let rows: Vec<Value> = sentences(300).into_iter().map(body).collect();
    folders.write("a.jsonl", text_of(&rows));
    folders.write("b.jsonl.gz", gzipped(&text_of(&rows[..50])));
    let options = &[options, &["--text-column", "body"]].concat();
    fs::copy(tests().join("fixtures/batch/documents.parquet"), folders.path("in/c.parquet")).expect("the fixture");
    let mut expected = None;
    for (at, run) in RUNS.into_iter().enumerate() {
        let out = format!("out{at}");
        stdout(folders.batch(model, &out, &[options, run].concat()));
        let found = folders.outputs(&out);
        assert_eq!(found.len(), 3);
        let expected = expected.get_or_insert_with(|| found.clone());
        for (name, bytes) in &found {
            assert!(expected[name] == *bytes, "{options:?}, {run:?}: {name} differs");
        }
    }
}

#[test]
fn generated_bytes_do_not_depend_on_how_they_are_computed() {
    check_bytes(&demo(), &["--max-new-tokens", "30"]);
    check_bytes(&demo(), &["--max-new-tokens", "30", "--num-beams", "3", "--num-return-sequences", "2", "--details"]);
    check_bytes(&demo(), &["--max-new-tokens", "30", "--do-sample", "--seed", "5", "--details", "--output-logprobs"]);
}

#[test]
fn a_second_run_computes_what_is_missing_and_refuses_other_settings() {
    let folders = Folders::new();
    for shard in 0..4 {
        folders.write(&format!("{shard}.jsonl"), text_of(&sentences(20)));
    }
    let options = ["--max-new-tokens", "20"];
    assert_eq!(summary(folders.batch(&demo(), "out", &options))["written"], 4);
    let whole = folders.outputs("out");
    let again = summary(folders.batch(&demo(), "out", &options));
    assert_eq!((&again["written"], &again["skipped"], &again["rows"]), (&json!(0), &json!(4), &json!(0)));
    fs::remove_file(folders.path("out/2.jsonl")).expect("an output");
    let again = summary(folders.batch(&demo(), "out", &options));
    assert_eq!((&again["written"], &again["skipped"], &again["rows"]), (&json!(1), &json!(3), &json!(20)));
    assert_eq!(folders.outputs("out"), whole);

    let out = folders.path("out").display().to_string();
    let refused = |output: Output, expected: &str| {
        assert_eq!((output.status.code(), stderr(&output).contains(expected)), (Some(2), true), "{}", stderr(&output));
        assert_eq!(folders.outputs("out"), whole);
    };
    let begun = "with which this output folder was begun, found";
    refused(
        folders.batch(&demo(), "out", &["--max-new-tokens", "21"]),
        &format!("{out}: expected options.max_new_tokens 20, {begun} 21; choose another --output"),
    );
    let other = folders.batch(&demo(), "out", &["--max-new-tokens", "20", "--num-beams", "2"]);
    refused(other, &format!("expected options.num_beams null, {begun} 2"));
    let other = folders.batch(&exported("tiny-balanced"), "out", &options);
    refused(other, &format!("{out}: expected model.sha256 \""));
    refused(folders.batch(&demo(), "out", &["--task", "encode", "--pooling", "mean"]), "expected task \"generate\"");
    // A folder with files of another kind.
    fs::create_dir(folders.path("foreign")).expect("a new folder");
    fs::copy(folders.path("in/1.jsonl"), folders.path("foreign/1.jsonl")).expect("a file");
    let foreign = folders.batch(&demo(), "foreign", &options);
    assert_eq!(foreign.status.code(), Some(2));
    assert!(stderr(&foreign).contains("holds 1.jsonl, which no batch has written"), "{}", stderr(&foreign));
}

#[test]
fn shards_are_divided() {
    let folders = Folders::new();
    for shard in 0..5 {
        folders.write(&format!("{shard}.jsonl"), text_of(&sentences(3)));
    }
    let options = ["--max-new-tokens", "9"];
    let part = |part: &str| summary(folders.batch(&demo(), "out", &[&options[..], &["--shard", part]].concat()));
    assert_eq!(part("1/2")["written"], 2);
    assert_eq!(folders.outputs("out").into_keys().collect::<Vec<_>>(), ["1.jsonl", "3.jsonl"]);
    let mut indexed = program("t5gemma");
    indexed.args(["batch", &demo().display().to_string(), "--max-new-tokens", "9", "--shard", "auto/2", "--input"]);
    indexed.arg(folders.path("in").join("*")).arg("--output").arg(folders.path("out"));
    let output = indexed.env("JOB_COMPLETION_INDEX", "0").output().expect("the program starts");
    assert_eq!(summary(output)["written"], 3);
    assert_eq!(folders.outputs("out").len(), 5);
    let output = indexed.env("JOB_COMPLETION_INDEX", "2").output().expect("the program starts");
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("(the index is 2)"), "{}", stderr(&output));
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
