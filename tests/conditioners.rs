//! Encoders as conditioners of other models: states at padding, sources of a fixed length, the type of the output, all
//! hidden states, and checkpoints as such models come with.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ndarray::{ArrayD, Axis};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use t5gemma_exporter::{Export, PaddingRow};
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::DType;
use t5gemma_graphs::task::{Features, PaddingRows, Pooling, Task};
use t5gemma_runtime::{Batch, Cancellation, Encoder, Limits, OpenOptions};
use tempfile::TempDir;

use crate::capi::installed;
use crate::common::{exported_from, program, run, stdout, tests};
use crate::tasks::{BATCHES, Golden, check_close, checkpoint};

/// The width of the fixtures' states.
const WIDTH: usize = 24;
const VECTOR: &str = "conditioner.padding_embedding";

/// A vector for padding that no encoder computes.
fn vector() -> Vec<f32> {
    (0..WIDTH).map(|at| at as f32 / 4.0 - 3.0).collect()
}

/// Writes a safetensors file.
fn write_tensors(path: &Path, tensors: &BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).expect("as many bytes as the shape has"))
    });
    fs::write(path, safetensors::serialize(views, None).expect("well-formed")).expect("written");
}

fn read_tensors(path: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let tensors = file.tensors().into_iter();
    tensors.map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))).collect()
}

fn of_floats(numbers: &[f32]) -> (Dtype, Vec<usize>, Vec<u8>) {
    (Dtype::F32, vec![numbers.len()], numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
}

/// The file of [`vector`], as long as the tests run.
fn vector_file() -> PathBuf {
    static FOLDER: std::sync::OnceLock<TempDir> = std::sync::OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let mut tensors = BTreeMap::from([(VECTOR.to_string(), of_floats(&vector()))]);
        tensors.insert("other".to_string(), of_floats(&[1.0, 2.0]));
        tensors.insert("infinite".to_string(), of_floats(&[f32::INFINITY; WIDTH]));
        // A parameter of another model may have axes of length 1.
        let (dtype, _, bytes) = of_floats(&vector());
        tensors.insert("row".to_string(), (dtype, vec![1, 1, WIDTH], bytes));
        write_tensors(&folder.path().join("conditioner.safetensors"), &tensors);
        folder
    });
    folder.path().join("conditioner.safetensors")
}

fn export(features: Features) -> Export {
    let learned = features.padding_rows == PaddingRows::Learned;
    let row = learned.then(|| PaddingRow { file: vector_file(), tensor: VECTOR.into() });
    Export::default().task(Task::FeatureExtraction(features)).padding_row(row)
}

/// The fixture of an encoder exported for a target, once for all tests.
fn exported(target: Target, features: Features) -> PathBuf {
    let label = format!("conditioner-{}-{features:?}", target.name());
    exported_from(&checkpoint("headless"), &label, export(features).target(target).dtype(DType::Float32))
}

fn conditioner(padding_rows: PaddingRows, fixed_length: Option<usize>) -> Features {
    Features { padding_rows, fixed_length, ..Features::default() }
}

/// The reference's states with rows of padding in their place, and padding up to `length`.
fn expected(golden: &Golden, name: &str, rows: PaddingRows, length: usize) -> ArrayD<f32> {
    let (states, batch) = (golden.floats(&format!("enc.{name}.hidden_states.3")), golden.batch(name));
    let mut expected = ArrayD::zeros(vec![batch.rows(), length, WIDTH]);
    for (row, mut states_of_row) in expected.outer_iter_mut().enumerate() {
        for (at, mut state) in states_of_row.outer_iter_mut().enumerate() {
            if at < batch.length() && batch.mask()[row * batch.length() + at] != 0 {
                state.assign(&states.index_axis(Axis(0), row).index_axis(Axis(0), at));
            } else if rows == PaddingRows::Learned {
                state.iter_mut().zip(vector()).for_each(|(to, number)| *to = number);
            }
        }
    }
    expected
}

#[test]
fn padding_has_the_states_that_the_model_was_exported_with() {
    let golden = Golden::of("headless");
    for target in Target::ALL {
        for (rows, fixed) in
            [PaddingRows::Zero, PaddingRows::Learned].map(|rows| [(rows, None), (rows, Some(14))]).concat()
        {
            let encoder = Encoder::open(exported(target, conditioner(rows, fixed))).expect("opens");
            // In pieces of a source each, padding is the same.
            let mut limits = Limits::default();
            limits.max_sources = 1;
            let options = OpenOptions::default().limits(limits);
            let by_source = Encoder::open_with(exported(target, conditioner(rows, fixed)), &options).expect("opens");
            for name in BATCHES {
                let batch = golden.batch(name);
                let expected = expected(&golden, name, rows, fixed.unwrap_or(batch.length()));
                for encoder in [&encoder, &by_source] {
                    let states = encoder.encode(&batch, &Cancellation::new()).expect("encodes").into_dyn();
                    check_close(&format!("{} {rows:?} {fixed:?} {name}", target.name()), &states, &expected, None);
                    let padded = encoder.pad(&batch);
                    assert_eq!((padded.rows(), padded.length()), (batch.rows(), states.shape()[1]));
                }
            }
        }
    }
}

#[test]
fn sources_of_padding_alone_have_its_states_and_no_others() {
    let none: [Vec<i64>; 2] = [vec![], vec![]];
    let some = [vec![5, 6, 7], vec![]];
    for target in Target::ALL {
        for fixed in [None, Some(6)] {
            let encoder = Encoder::open(exported(target, conditioner(PaddingRows::Learned, fixed))).expect("opens");
            for sources in [&none, &some] {
                let batch = Batch::padded(sources, 0).expect("a batch");
                let states = encoder.encode(&batch, &Cancellation::new()).expect("encodes");
                assert_eq!(states.shape()[1], fixed.unwrap_or(batch.length()), "{fixed:?}");
                for state in states.index_axis(Axis(0), 1).rows() {
                    assert_eq!(state.to_vec(), vector(), "{} {fixed:?}", target.name());
                }
                assert!(states.iter().all(|number| number.is_finite()));
            }
            let batch = Batch::padded(&some, 0).expect("a batch");
            let error = encoder.embed(&batch, Pooling::Mean, &Cancellation::new()).expect_err("a mean of nothing");
            assert!(error.to_string().starts_with("input_ids[1]: expected at least one token"), "{error}");
        }
    }
    // Other encoders refuse such sources, whatever their length.
    for features in [Features::default(), conditioner(PaddingRows::Unspecified, Some(6))] {
        let encoder = Encoder::open(exported(Target::Portable, features)).expect("opens");
        let batch = Batch::padded(&some, 0).expect("a batch");
        let error = encoder.encode(&batch, &Cancellation::new()).expect_err("nothing to encode");
        assert_eq!(error.to_string(), "input_ids[1]: expected at least one token that is not padding, found none");
    }
}

#[test]
fn sources_beyond_a_fixed_length_are_refused() {
    let encoder = Encoder::open(exported(Target::Cpu, conditioner(PaddingRows::Zero, Some(4)))).expect("opens");
    let port = &encoder.manifest().graphs["model"].ports.inputs[0];
    assert_eq!(t5gemma_graphs::onnx::Dim::list(&port.shape), "[batch_size, 4]");
    let batch = Batch::padded(&[vec![5; 4], vec![6; 5]], 0).expect("a batch");
    let error = encoder.encode(&batch, &Cancellation::new()).expect_err("too long").to_string();
    assert_eq!(error, "input_ids: expected at most 4 tokens a row (exported with fixed_length 4), found 5 tokens");
}

#[test]
fn the_output_has_its_own_type() {
    let golden = Golden::of("headless");
    for target in Target::ALL {
        let features = Features { output_dtype: Some(DType::Float16), ..conditioner(PaddingRows::Learned, None) };
        let encoder = Encoder::open(exported(target, features)).expect("opens");
        assert_eq!(encoder.manifest().graphs["model"].ports.outputs[0].dtype, DType::Float16);
        let (batch, full) = (golden.batch("right"), exported(target, conditioner(PaddingRows::Learned, None)));
        let states = encoder.encode(&batch, &Cancellation::new()).expect("encodes");
        let full = Encoder::open(full).expect("opens").encode(&batch, &Cancellation::new()).expect("encodes");
        // The model computes in float32, and only its output is rounded.
        assert_eq!(states, full.mapv(|number| half::f16::from_f32(number).to_f32()), "{}", target.name());
    }
}

#[test]
fn all_hidden_states_are_those_of_the_reference() {
    let golden = Golden::of("encoder");
    for target in Target::ALL {
        let features = Features { output_hidden_states: true, ..Features::default() };
        let label = format!("all-states-{}", target.name());
        let model =
            exported_from(&checkpoint("encoder"), &label, export(features).target(target).dtype(DType::Float32));
        let encoder = Encoder::open(&model).expect("opens");
        let names = ["hidden_states.0", "hidden_states.1", "hidden_states.2", "last_hidden_state"];
        assert_eq!(encoder.output_names(), names);
        for name in BATCHES {
            let batch = golden.batch(name);
            let all = encoder.hidden_states(&batch, &Cancellation::new()).expect("encodes");
            assert_eq!(all.len(), 4);
            for (layer, states) in all.iter().enumerate() {
                let expected = golden.floats(&format!("enc.{name}.hidden_states.{layer}"));
                check_close(&format!("{name} {layer}"), &states.clone().into_dyn(), &expected, Some(batch.mask()));
            }
            assert_eq!(encoder.encode(&batch, &Cancellation::new()).expect("encodes"), all[3]);
        }
    }
    let encoder = Encoder::open(exported(Target::Cpu, Features::default())).expect("opens");
    let error =
        encoder.hidden_states(&golden.batch("one"), &Cancellation::new()).expect_err("not returned").to_string();
    assert!(error.contains("task.output_hidden_states: expected true"), "{error}");
}

#[test]
fn encoders_are_verified_alone_and_against_others() {
    let features = Features { output_hidden_states: true, ..Features::default() };
    let exact = exported(Target::Portable, features);
    let for_cpu = exported(Target::Cpu, features);
    for (model, lines) in [(&exact, 8), (&exported(Target::Cpu, conditioner(PaddingRows::Zero, Some(8))), 2)] {
        let text = stdout(run("t5gemma", ["verify".as_ref(), model.as_os_str()], ""));
        assert_eq!(text.lines().count(), lines, "{text}");
        assert!(text.lines().all(|line| line.starts_with("ok  ")), "{text}");
    }
    let pooled = Features { pooling: Pooling::Mean, normalize: true, ..Features::default() };
    let pooled = exported(Target::Portable, pooled);
    assert!(stdout(run("t5gemma", ["verify".as_ref(), pooled.as_os_str()], "")).contains("sentence_embedding"));

    let report = |model: &Path, other: &Path| -> Value {
        let arguments =
            ["verify".as_ref(), model.as_os_str(), "--against".as_ref(), other.as_os_str(), "--json".as_ref()];
        serde_json::from_str(&stdout(run("t5gemma", arguments, ""))).expect("JSON")
    };
    let found = report(&for_cpu, &exact);
    let outputs = found["outputs"].as_array().expect("the outputs");
    let names: Vec<&str> = outputs.iter().filter_map(|output| output["name"].as_str()).collect();
    assert_eq!(names, ["hidden_states.0", "hidden_states.1", "hidden_states.2", "last_hidden_state"]);
    for output in outputs {
        assert!(output["relative_error"].as_f64().is_some_and(|error| error < 1e-5), "{output}");
        assert!(output["min_cosine"].as_f64().is_some_and(|cosine| cosine > 0.999999), "{output}");
    }
    // Quantized weights cost something, and more with each layer.
    let quantized = Export::default().quantization(t5gemma_graphs::quantization::Quantization {
        encoder: Some(t5gemma_graphs::onnx::Blocks::integer(4, 16)),
        ..Default::default()
    });
    let quantized = quantized.task(Task::FeatureExtraction(features)).target(Target::Cpu);
    let quantized = exported_from(&checkpoint("headless"), "conditioner-int4", quantized);
    let found = report(&quantized, &exact);
    let cosines: Vec<f64> = (0..4).filter_map(|at| found["outputs"][at]["mean_cosine"].as_f64()).collect();
    assert!(cosines[1] < 1.0 && cosines[1] > cosines[2] && cosines[3] > 0.5, "{cosines:?}");
    // Where only one returns all, the last are compared.
    let found = report(&quantized, &exported(Target::Portable, Features::default()));
    assert_eq!(found["outputs"].as_array().map(Vec::len), Some(1));
    let arguments = ["verify".as_ref(), exact.as_os_str(), "--against".as_ref(), pooled.as_os_str()];
    let output = run("t5gemma", arguments, "");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("found sentence_embedding"), "{error}");
}

/// A single file with the encoder's tensors of a fixture, named as `name` makes them, and a SentencePiece model.
fn single_file(folder: &Path, name: impl Fn(&str) -> Option<String>) -> PathBuf {
    let mut tensors: BTreeMap<_, _> = read_tensors(&checkpoint("headless").join("model.safetensors"))
        .into_iter()
        .filter_map(|(stored, tensor)| Some((name(&stored)?, tensor)))
        .collect();
    tensors.insert("spiece_model".into(), (Dtype::U8, vec![5], vec![1, 2, 250, 4, 0]));
    let path = folder.join("t5gemma_encoder.safetensors");
    write_tensors(&path, &tensors);
    path
}

#[test]
fn a_single_file_without_the_decoder_is_a_checkpoint() {
    let golden = Golden::of("headless");
    let names: [fn(&str) -> Option<String>; 3] = [
        |name| name.starts_with("encoder.").then(|| name.to_string()),
        |name| name.starts_with("encoder.").then(|| format!("model.{name}")),
        |name| Some(format!("text_encoder.model.{name}")),
    ];
    let config = checkpoint("headless").join("config.json");
    for (at, name) in names.into_iter().enumerate() {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let (file, out) = (single_file(folder.path(), name), folder.path().join("model"));
        let tokenizer = tests().join("demo/checkpoint");
        let mut command = program("t5gemma-export");
        command.args([&file, &out]).args(["--task", "feature-extraction", "--write-sentencepiece", "--config"]);
        let output = command.arg(&config).arg("--tokenizer").arg(&tokenizer).output().expect("starts");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && !told.contains("not used"), "{told}");
        assert_eq!(fs::read(out.join("tokenizer.model")).expect("written"), [1, 2, 250, 4, 0], "{at}");
        assert_eq!(fs::read(out.join("config.json")).ok(), fs::read(&config).ok());
        assert_eq!(fs::read(out.join("tokenizer.json")).ok(), fs::read(tokenizer.join("tokenizer.json")).ok());
        let encoder = Encoder::open(&out).expect("opens");
        let (batch, expected) = (golden.batch("right"), golden.floats("enc.right.hidden_states.3"));
        let states = encoder.encode(&batch, &Cancellation::new()).expect("encodes").into_dyn();
        check_close(&format!("{at}"), &states, &expected, Some(batch.mask()));

        // Without the option, the tensor is listed; beside the file, the configuration is found.
        fs::copy(&config, folder.path().join("config.json")).expect("copied");
        let arguments = [file.as_os_str(), out.as_os_str(), "--task".as_ref(), "feature-extraction".as_ref()];
        let output = run("t5gemma-export", arguments.into_iter().chain(["--overwrite".as_ref()]), "");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success() && told.contains("1 tensor of the checkpoint is not used:\n  spiece_model"),
            "{told}"
        );
        assert!(!out.join("tokenizer.model").exists());
    }
}

#[test]
fn shards_of_the_decoder_may_be_missing_where_it_is_not_exported() {
    let golden = Golden::of("headless");
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let (from, out) = (folder.path().join("checkpoint"), folder.path().join("model"));
    fs::create_dir(&from).expect("a new folder");
    fs::copy(checkpoint("headless").join("config.json"), from.join("config.json")).expect("copied");
    let tensors = read_tensors(&checkpoint("headless").join("model.safetensors"));
    let (encoder, decoder): (BTreeMap<_, _>, BTreeMap<_, _>) =
        tensors.into_iter().partition(|(name, _)| name.starts_with("encoder."));
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    write_tensors(&from.join(first), &encoder);
    let shards = encoder.keys().map(|name| (name, first)).chain(decoder.keys().map(|name| (name, second)));
    let index = json!({"weight_map": shards.collect::<BTreeMap<_, _>>()});
    fs::write(from.join("model.safetensors.index.json"), index.to_string()).expect("written");
    stdout(run(
        "t5gemma-export",
        [from.as_os_str(), out.as_os_str(), "--task".as_ref(), "feature-extraction".as_ref()],
        "",
    ));
    let batch = golden.batch("right");
    let encoded = Encoder::open(&out).expect("opens").encode(&batch, &Cancellation::new()).expect("encodes");
    check_close("shards", &encoded.into_dyn(), &golden.floats("enc.right.hidden_states.3"), Some(batch.mask()));
    // The manifest has the hashes of the files that were read.
    let manifest = fs::read_to_string(out.join("manifest.json")).expect("written");
    assert!(manifest.contains(first) && !manifest.contains(second));

    let output = run("t5gemma-export", ["inspect".as_ref(), from.as_os_str()], "");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains(&format!("{second}: expected a file with decoder.")), "{error}");
    // A missing shard of the encoder is missed.
    fs::rename(from.join(first), from.join("aside")).expect("renamed");
    write_tensors(&from.join(second), &decoder);
    let output = run(
        "t5gemma-export",
        [from.as_os_str(), out.as_os_str(), "--task".as_ref(), "feature-extraction".as_ref()],
        "",
    );
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains(&format!("{first}: expected a file with encoder.")), "{error}");
}

#[test]
fn what_cannot_be_a_conditioner_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let (checkpoint, out) = (checkpoint("headless"), folder.path().join("model"));
    let vectors = vector_file();
    let tensor = |name: &str| format!("{}:{name}", vectors.display());
    let alone = single_file(folder.path(), |name| name.starts_with("encoder.").then(|| name.to_string()));
    let file = |name: &str| vectors.with_file_name(name).display().to_string();
    let cases: &[(&Path, &[&str], i32, &[&str])] = &[
        (&checkpoint, &["--pad-rows", "zero"], 2, &["--pad-rows requires --task feature-extraction"]),
        (&checkpoint, &["--fixed-length", "8"], 2, &["--fixed-length requires --task feature-extraction"]),
        (&checkpoint, &["FE", "--pad-rows", "zeros"], 2, &["--pad-rows", "expected zero, or a safetensors file"]),
        (
            &checkpoint,
            &["FE", "--pad-rows", &tensor("nothing")],
            1,
            &["conditioner.safetensors: nothing: expected a tensor", VECTOR],
        ),
        (&checkpoint, &["FE", "--pad-rows", &tensor("other")], 1, &["other: expected shape [24], found [2]"]),
        (&checkpoint, &["FE", "--pad-rows", &tensor("infinite")], 1, &["infinite: expected finite numbers, found inf"]),
        (&checkpoint, &["FE", "--pad-rows", &file("missing:x")], 1, &["missing: expected a file, found nothing"]),
        (
            &checkpoint,
            &["FE", "--pad-rows", "zero", "--pooling", "mean"],
            2,
            &["--pad-rows requires --pooling none (got mean)"],
        ),
        (
            &checkpoint,
            &["FE", "--output-dtype", "float16", "--pooling", "last"],
            2,
            &["--output-dtype requires --pooling none (got last)"],
        ),
        (
            &checkpoint,
            &["FE", "--output-hidden-states", "--pooling", "last"],
            2,
            &["--output-hidden-states requires --pooling none"],
        ),
        (
            &checkpoint,
            &["FE", "--output-hidden-states", "--hidden-layer", "1"],
            2,
            &["--output-hidden-states requires --hidden-layer last (got 1)"],
        ),
        (
            &checkpoint,
            &["FE", "--fixed-length", "0"],
            2,
            &["--fixed-length: expected 1 to 64 (encoder.max_position_embeddings), found 0"],
        ),
        (&checkpoint, &["FE", "--fixed-length", "65"], 2, &["--fixed-length: expected 1 to 64", "found 65"]),
        (
            &checkpoint,
            &["FE", "--fixed-length", "16", "--target", "tensorrt", "--plan", "source=1..16"],
            2,
            &["--fixed-length 16 requires --plan source=16 (got source=1..16)"],
        ),
        (
            &checkpoint,
            &["FE", "--write-sentencepiece"],
            1,
            &["spiece_model: expected a SentencePiece model", "found no such tensor"],
        ),
        (
            &checkpoint,
            &["FE", "--tokenizer", "no/such"],
            1,
            &["no/such/tokenizer.json: expected a tokenizer, found nothing"],
        ),
        (&alone, &["FE"], 2, &["t5gemma_encoder.safetensors requires config.json in its folder, or --config FILE"]),
        (&alone, &["FE", "--config", "no/such.json"], 1, &["no/such.json: expected a file, found nothing"]),
    ];
    for (checkpoint, arguments, status, says) in cases {
        let mut command = program("t5gemma-export");
        command.args([checkpoint, out.as_path()]);
        for argument in *arguments {
            if *argument == "FE" {
                command.args(["--task", "feature-extraction"])
            } else {
                command.arg(argument)
            };
        }
        let output = command.output().expect("starts");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(*status), "{arguments:?}: {told}");
        says.iter().for_each(|says| assert!(told.contains(says), "{arguments:?}: expected {says:?} in {told}"));
        assert!(!out.exists(), "{arguments:?}");
    }
    // A vector with leading axes is one.
    let mut command = program("t5gemma-export");
    command.args([checkpoint.as_path(), out.as_path()]).args(["--task", "feature-extraction", "--pad-rows"]);
    assert!(command.arg(tensor("row")).output().expect("starts").status.success());
}

#[test]
fn every_door_returns_the_padding_of_a_conditioner() {
    let model = exported(Target::Cpu, conditioner(PaddingRows::Learned, Some(6)));
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let out = folder.path().join("states.safetensors");
    let lines = [json!({"id": "a", "input_ids": [[5, 6, 7], []]}), json!({"id": "b", "input_ids": []})];
    let arguments = ["encode".as_ref(), model.as_os_str(), "--jsonl".as_ref(), "-o".as_ref(), out.as_os_str()];
    stdout(run("t5gemma", arguments, lines.map(|line| line.to_string()).join("\n")));
    let found = read_tensors(&out);
    let shapes: Vec<(&str, &[usize])> = found.iter().map(|(name, (_, shape, _))| (name.as_str(), &shape[..])).collect();
    let expected: [(&str, &[usize]); 6] = [
        ("a.attention_mask", &[2, 6]),
        ("a.input_ids", &[2, 6]),
        ("a.last_hidden_state", &[2, 6, WIDTH]),
        ("b.attention_mask", &[1, 6]),
        ("b.input_ids", &[1, 6]),
        ("b.last_hidden_state", &[1, 6, WIDTH]),
    ];
    assert_eq!(shapes, expected);
    let vector: Vec<u8> = of_floats(&vector()).2;
    let rows = |name: &str| found[name].2.chunks(4 * WIDTH).map(<[u8]>::to_vec).collect::<Vec<_>>();
    assert_eq!(rows("b.last_hidden_state"), vec![vector.clone(); 6]);
    assert_eq!(rows("a.last_hidden_state")[3..], vec![vector.clone(); 9]);

    // Python, and through it the C library.
    let script = "import sys, numpy as np, t5gemma\n\
        encoder = t5gemma.Encoder.open(sys.argv[1])\n\
        states, mask = encoder.encode([[5, 6, 7], []])\n\
        assert states.shape == (2, 6, 24) and mask.tolist() == [[1, 1, 1, 0, 0, 0], [0] * 6], (states.shape, mask)\n\
        vector = np.arange(24, dtype=np.float32) / 4 - 3\n\
        assert (states[0, 3:] == vector).all() and (states[1] == vector).all() and (states[0, :3] != vector).any()\n\
        print('well')";
    let mut python = installed().python();
    python.args(["-c", script]).arg(&model);
    assert_eq!(stdout(python.output().expect("Python runs")), "well\n");
}

#[test]
fn the_speed_of_encoding_is_measured() {
    let model = exported(Target::Cpu, conditioner(PaddingRows::Zero, Some(8)));
    let bench = |arguments: &[&str]| {
        let arguments = arguments.iter().map(std::ffi::OsStr::new);
        run("t5gemma", ["bench".as_ref(), model.as_os_str()].into_iter().chain(arguments), "")
    };
    let text = stdout(bench(&["--source-length", "5", "--batch-size", "3", "--repeat", "4", "--json"]));
    let report: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((&report["case"]["batch_size"], &report["case"]["source_length"]), (&json!(3), &json!(5)));
    assert_eq!(report["encode_ms"]["count"], json!(4));
    assert!(report["source_tokens_per_second"].as_f64().is_some_and(|speed| speed > 0.0), "{report}");
    for (arguments, says) in [
        (&["--source-length", "9"][..], "--source-length: expected at most 8 for this model, found 9"),
        (&["--source-length", "4", "--num-beams", "2"], "require a model that generates"),
    ] {
        let output = bench(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && error.contains(says), "{arguments:?}: {error}");
    }
}
