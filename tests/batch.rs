//! `t5gemma batch`: every format and task, the same bytes however it is run and interrupted, and what it refuses.

mod faults;
mod objects;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Output;

use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch};
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use tempfile::TempDir;

use crate::common::{demo, demo_as, exported, exported_from, program, run, stdout, tests};

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
    let generated = |tokens: &str, text: &str| {
        let model = demo().display().to_string();
        stdout(run("t5gemma", ["generate", model.as_str(), "--max-new-tokens", tokens, text], ""))
            .trim_end()
            .to_string()
    };
    let (smith, bell, start) = (generated("9", "Dr. Smith"), generated("9", "Mt. Bell"), generated("1", "Mt. Bell"));
    let expected = [
        &*format!(
            "{{\"text\" : \"Dr. Smith\", \"id\":1.50, \"x\": [1e40, 123456789012345678901234567890],\"generated_text\":\"{smith}\"}}"
        ),
        &format!("{{ \"id\": \"ü\", \"text\": \"Mt. Bell\",\"generated_text\":\"{bell}\"}}"),
        "{\"id\":7,\"text\":5,\"error\":\"text: expected a string or a list of strings, found 5\"}",
        "{\"id\":4,\"error\":\"expected JSON: column 2: expected ident, found `o`\"}",
        "{\"id\":8,\"text\":[\"a\",\"b\"],\"error\":\"expected one source in a row, found 2\"}",
        &format!(
            "{{\"id\":9,\"text\":\"Mt. Bell\",\"options\":{{\"max_new_tokens\":1}},\"generated_text\":\"{start}\"}}"
        ),
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
    let options = ["--text-column", "body", "--max-new-tokens", "100", "--details", "--result-column", "spoken"];
    let summary = summary(folders.batch(&demo(), "out", &options));
    assert_eq!((&summary["rows"], &summary["errors"]), (&json!(60), &json!(1)));
    let [before] = &records(&input)[..] else { panic!("one record") };
    let [after] = &records(&folders.path("out/documents.parquet"))[..] else { panic!("one record") };
    let width = before.num_columns();
    assert_eq!(before.columns(), &after.columns()[..width]);
    let names: Vec<&String> = after.schema_ref().fields().iter().skip(width).map(|field| field.name()).collect();
    assert_eq!(names, ["spoken", "spoken_details", "error"]);
    assert_eq!(before.schema_ref().fields()[..], after.schema_ref().fields()[..width]);
    let file = File::open(folders.path("out/documents.parquet")).expect("an output");
    let schema = ParquetRecordBatchReaderBuilder::try_new(file).expect("Parquet").schema().clone();
    let metadata = schema.metadata();
    assert_eq!((metadata.get("author").map(String::as_str), metadata.get("huggingface")), (Some("demo"), None));
    // The same as from JSON lines.
    folders.write("same.jsonl", text_of(&sentences(60)));
    stdout(folders.batch_of(&demo(), &["same.jsonl"], "lines", &["--max-new-tokens", "100"]));
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

/// Options that must not change bytes, and with an engine not even the next ones.
const RUNS: [&[&str]; 2] = [&[], &["--threads", "1", "--max-rows", "3"]];
const OF_ENGINE: [&[&str]; 2] = [&["--window", "1", "--max-rows", "1"], &["--window", "130", "--batch-size", "3"]];

/// Checks that outputs have the same bytes however they are computed.
fn check_bytes(model: &Path, options: &[&str], runs: &[&[&str]]) {
    let folders = Folders::new();
    let body = |row: Value| json!({"body": row["text"], "target": row["target"]});
    let rows: Vec<Value> = sentences(150).into_iter().map(body).collect();
    folders.write("a.jsonl", text_of(&rows));
    folders.write("b.jsonl.gz", gzipped(&text_of(&rows[..20])));
    let options = &[options, &["--text-column", "body"]].concat();
    if !options.contains(&"score") {
        fs::copy(tests().join("fixtures/batch/documents.parquet"), folders.path("in/c.parquet")).expect("the fixture");
    }
    let mut expected = None;
    for (at, run) in runs.iter().enumerate() {
        let out = format!("out{at}");
        stdout(folders.batch(model, &out, &[options, *run].concat()));
        let found = folders.outputs(&out);
        let expected = expected.get_or_insert_with(|| found.clone());
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (name, bytes) in &found {
            assert!(expected[name] == *bytes, "{options:?}, {run:?}: {name} differs");
        }
    }
}

#[test]
fn bytes_do_not_depend_on_how_they_are_computed() {
    let demo = || demo_as("cpu", Export::default().target(Target::Cpu));
    let all = [RUNS, OF_ENGINE].concat();
    check_bytes(&demo(), &["--max-new-tokens", "20", "--details"], &all);
    check_bytes(&demo(), &["--max-new-tokens", "12", "--do-sample", "--seed", "5"], &all);
    check_bytes(
        &demo(),
        &["--max-new-tokens", "12", "--num-beams", "3", "--num-return-sequences", "2", "--details"],
        &RUNS,
    );
    check_bytes(&demo(), &["--task", "score", "--details"], &RUNS);
    check_bytes(&demo(), &["--task", "encode", "--pooling", "mean", "--normalize"], &RUNS);
}

/// A fixture of `tests/fixtures/tasks`.
fn classifier(name: &str) -> PathBuf {
    let checkpoint = tests().join("fixtures/tasks").join(name).join("checkpoint");
    exported_from(&checkpoint, &format!("batch-{name}"), Export::default())
}

/// Checks numbers that are computed in other batches.
fn check_close(found: &Value, expected: &Value) {
    match (found, expected) {
        (Value::Number(found), Value::Number(expected)) => {
            let (found, expected) = (found.as_f64().expect("finite"), expected.as_f64().expect("finite"));
            assert!((found - expected).abs() <= 1e-4, "{found}, {expected}");
        }
        (Value::Array(found), Value::Array(expected)) => {
            assert_eq!(found.len(), expected.len());
            found.iter().zip(expected).for_each(|(found, expected)| check_close(found, expected));
        }
        _ => assert_eq!(found, expected),
    }
}

#[test]
fn other_tasks_find_what_their_commands_find() {
    let folders = Folders::new();
    folders.write("a.jsonl", text_of(&sentences(20)));
    let model = demo().display().to_string();
    stdout(folders.batch(&demo(), "scores", &["--task", "score"]));
    let expected = stdout(run("t5gemma", ["score", &model], text_of(&sentences(20))));
    for (row, expected) in folders.rows("scores", "a.jsonl").iter().zip(lines(expected.as_bytes())) {
        check_close(&row["logprob"], &expected["scores"][0]["logprob"]);
    }
    let ids: Vec<Value> =
        [&[5, 6, 7][..], &[9], &[4, 4, 8, 3, 12], &[], &[11, 2]].map(|ids| json!({"input_ids": ids})).into();
    folders.write("a.jsonl", text_of(&ids));
    for (name, options) in [("sequence-encoder", &["--top-labels", "2"][..]), ("token-encoder", &[])] {
        let model = classifier(name);
        let summary = summary(folders.batch(&model, name, options));
        assert_eq!((&summary["rows"], &summary["errors"]), (&json!(5), &json!(1)), "{name}");
        let command = [
            "classify",
            &model.display().to_string(),
            "--jsonl",
            "--top-k",
            if name == "token-encoder" { "1" } else { "2" },
        ];
        let expected = lines(&run("t5gemma", command, text_of(&ids)).stdout);
        for (row, expected) in folders.rows(name, "a.jsonl").iter().zip(&expected) {
            if let Some(error) = expected.get("error") {
                assert_eq!(&row["error"], error);
                continue;
            }
            let of_tokens = expected.get("tokens").map(|tokens| &tokens[0]);
            let list = of_tokens.unwrap_or(&expected["labels"][0]).as_array().expect("a list");
            let best = |at: &Value| if of_tokens.is_some() { at["labels"][0].clone() } else { at.clone() };
            let labels: Vec<Value> = list.iter().map(|at| best(at)["label"].clone()).collect();
            let scores: Vec<Value> = list.iter().map(|at| best(at)["score"].clone()).collect();
            assert_eq!(row["label"], json!(labels), "{name}");
            check_close(&row["label_score"], &json!(scores));
        }
    }
}

/// A NumPy array of float32.
fn array(bytes: &[u8]) -> ndarray::Array2<f32> {
    let (magic, rest) = bytes.split_at(8);
    assert_eq!(magic, b"\x93NUMPY\x01\x00");
    let length = usize::from(u16::from_le_bytes([rest[0], rest[1]]));
    let (header, data) = rest[2..].split_at(length);
    assert_eq!((10 + length) % 64, 0);
    let header = str::from_utf8(header).expect("ASCII");
    let shape =
        header.strip_prefix("{'descr': '<f4', 'fortran_order': False, 'shape': (").expect("a header of float32");
    let shape = shape.split_once("), }").map(|(shape, _)| shape).expect("a shape");
    let shape: Vec<usize> = shape.split(", ").map(|size| size.parse().expect("a size")).collect();
    let numbers = data.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four bytes")));
    ndarray::Array2::from_shape_vec((shape[0], shape[1]), numbers.collect()).expect("as many numbers as the shape says")
}

#[test]
fn vectors_are_arrays_beside_their_outputs() {
    let folders = Folders::new();
    let body = |row: Value| json!({"id": row["id"], "body": row["text"]});
    let rows: Vec<Value> = sentences(20).into_iter().map(body).collect();
    folders.write("a.b.jsonl.gz", gzipped(&(text_of(&rows) + "no object\n")));
    fs::copy(tests().join("fixtures/batch/documents.parquet"), folders.path("in/c.parquet")).expect("the fixture");
    folders.write("empty.jsonl", "");
    let options = ["--task", "encode", "--pooling", "mean", "--text-column", "body", "--keep-columns", "id"];
    let arrays = [&options[..], &["--vectors", "npy"]].concat();
    stdout(folders.batch(&demo(), "lists", &options));
    let first = summary(folders.batch(&demo(), "arrays", &arrays));
    assert_eq!((&first["written"], &first["errors"]), (&json!(3), &json!(2)));
    let outputs = folders.outputs("arrays");
    let names = ["a.b.jsonl.gz", "a.b.npy", "c.npy", "c.parquet", "empty.jsonl", "empty.npy"];
    assert_eq!(outputs.keys().collect::<Vec<_>>(), names);
    let array = |name: &str| array(&outputs[name]);
    let width = array("a.b.npy").ncols();
    assert_eq!(
        (array("a.b.npy").nrows(), array("c.npy").dim(), array("empty.npy").dim()),
        (21, (60, width), (0, width))
    );
    let text = |folder: &str| {
        let mut text = String::new();
        let bytes = folders.outputs(folder)["a.b.jsonl.gz"].clone();
        MultiGzDecoder::new(bytes.as_slice()).read_to_string(&mut text).expect("gzip");
        lines(text.as_bytes())
    };
    for ((list, row), vector) in text("lists").iter().zip(&text("arrays")).zip(array("a.b.npy").rows()) {
        match &list["embedding"] {
            Value::Null => assert!(vector.iter().all(|number| number.is_nan()) && row["error"] == list["error"]),
            numbers => {
                let number = |number: &Value| number.as_f64().expect("a number") as f32;
                let numbers: Vec<f32> = numbers.as_array().expect("a list").iter().map(number).collect();
                assert_eq!(numbers, vector.to_vec());
                assert_eq!(*row, json!({"id": list["id"]}));
            }
        }
    }
    let [lists] = &records(&folders.path("lists/c.parquet"))[..] else { panic!("one record") };
    let [without] = &records(&folders.path("arrays/c.parquet"))[..] else { panic!("one record") };
    let names: Vec<&String> = without.schema_ref().fields().iter().map(|field| field.name()).collect();
    assert_eq!(names, ["id", "error"]);
    let vectors = lists.column_by_name("embedding").expect("a column").as_list::<i32>();
    for (row, vector) in array("c.npy").rows().into_iter().enumerate() {
        match vectors.is_null(row) {
            true => assert!(row == 17 && vector.iter().all(|number| number.is_nan())),
            false => {
                let list = vectors.value(row);
                assert_eq!(list.as_primitive::<arrow_array::types::Float32Type>().values()[..], vector.to_vec());
            }
        }
    }
    let record = &folders.record("arrays", "c.parquet.json")["vectors"];
    assert_eq!((&record["output"], &record["shape"]), (&json!("c.npy"), &json!([60, width])));
    assert_eq!(record["sha256"], hex::encode(<sha2::Sha256 as sha2::Digest>::digest(&outputs["c.npy"])));
    // A lost array is computed again.
    fs::remove_file(folders.path("arrays/c.npy")).expect("an array");
    let again = summary(folders.batch(&demo(), "arrays", &arrays));
    assert_eq!((&again["skipped"], &again["rows"]), (&json!(3), &json!(60)));
    assert_eq!(folders.outputs("arrays"), outputs);
    let refused = |options: &[&str], expected: &str| {
        let output = folders.batch(&demo(), "other", options);
        assert_eq!((output.status.code(), stderr(&output).contains(expected)), (Some(2), true), "{}", stderr(&output));
    };
    refused(&["--vectors", "npy"], "--vectors npy requires --task encode (got generate)");
    folders.write("c.jsonl", "");
    refused(&arrays, "expected files with vectors of their own, found c.jsonl and c.parquet, both for c.npy");
}

#[test]
fn ids_are_carried_along_as_they_are() {
    let folders = Folders::new();
    folders.write("a.jsonl", "{\"doc\": 1.0, \"text\": \"Mt. Bell\"}\n{\"id\": [7], \"text\": \"Mt. Bell\"}\nx\n");
    let ids = |output: &str, options: &[&str]| -> Vec<Value> {
        stdout(folders.batch(&demo(), output, &[options, &["--max-new-tokens", "1"]].concat()));
        let rows = folders.rows(output, "a.jsonl");
        rows.iter().map(|row| json!([row.get("id"), row.get("doc"), row.get("text").is_some()])).collect()
    };
    let text = |has_text: bool| move |ids: [Value; 2]| json!([ids[0], ids[1], has_text]);
    let default = [[Value::Null, json!(1.0)], [json!([7]), Value::Null]].map(text(true));
    assert_eq!(ids("default", &[]), [&default[..], &[json!([2, null, false])]].concat());
    let named = [[Value::Null, json!(1.0)], [Value::Null, Value::Null], [Value::Null, json!(2)]].map(text(false));
    assert_eq!(ids("named", &["--id-column", "doc", "--keep-columns", "other"]), named);
    fs::remove_file(folders.path("in/a.jsonl")).expect("an input");
    fs::copy(tests().join("fixtures/batch/documents.parquet"), folders.path("in/c.parquet")).expect("the fixture");
    let output = folders.batch(&demo(), "parquet", &["--text-column", "body", "--id-column", "doc"]);
    assert!(stderr(&output).contains("c.parquet: expected a column \"doc\", found "), "{}", stderr(&output));
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
