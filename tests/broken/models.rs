//! Model folders that cannot be opened.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::DType;

use super::{check_all, copy, edit, refused, remove, set, write};
use crate::common::{exported, exported_as, fixture, run};

/// A change to a model folder, and the expected error.
struct Case {
    name: &'static str,
    change: fn(&Path),
    /// `model` is the folder's name.
    says: &'static [&'static str],
}

const MANIFEST: &str = "manifest.json";
const WEIGHTS: &str = "model.onnx_data";

#[test]
fn files_that_are_not_those_of_the_manifest() {
    check_models(&[
        Case {
            name: "no such folder",
            change: |folder| fs::remove_dir_all(folder).expect("just made"),
            says: &["model/manifest.json: no such file: not a model folder"],
        },
        Case {
            name: "no manifest",
            change: |folder| remove(folder, MANIFEST),
            says: &["model/manifest.json: no such file: not a model folder"],
        },
        Case {
            name: "a checkpoint",
            change: |folder| {
                remove(folder, MANIFEST);
                write(folder, "model.safetensors", "");
            },
            says: &["model/manifest.json: no such file: ", "model is a checkpoint; export it with `t5gemma-export "],
        },
        Case {
            name: "no encoder",
            change: |folder| remove(folder, "encoder_model.onnx"),
            says: &["model/encoder_model.onnx: cannot be read: No such file"],
        },
        Case {
            name: "a graph cut off",
            change: |folder| edit(folder, "decoder_model.onnx", |bytes| bytes.truncate(1000)),
            says: &["model/decoder_model.onnx: size: expected ", " bytes, found 1000 bytes"],
        },
        Case {
            name: "one byte of a graph changed",
            change: |folder| edit(folder, "decoder_with_past_model.onnx", |bytes| bytes[1000] ^= 1),
            says: &["model/decoder_with_past_model.onnx: sha256: expected ", "copy the folder again, or export again"],
        },
        Case {
            name: "no weights",
            change: |folder| remove(folder, WEIGHTS),
            says: &["model/model.onnx_data: cannot be read: No such file"],
        },
        Case {
            name: "weights cut off",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes.truncate(4096)),
            says: &["model/model.onnx_data: size: expected ", " bytes, found 4096 bytes"],
        },
        Case {
            name: "empty weights",
            change: |folder| write(folder, WEIGHTS, ""),
            says: &["model/model.onnx_data: size: expected ", " bytes, found 0 bytes"],
        },
        Case {
            name: "one byte of the weights changed",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes[100_000] ^= 1),
            says: &["model/model.onnx_data: sha256: expected "],
        },
        Case {
            name: "other weights of the same size",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes.reverse()),
            says: &["model/model.onnx_data: sha256: expected "],
        },
        Case {
            name: "no config.json",
            change: |folder| remove(folder, "config.json"),
            says: &["model/config.json: cannot be read: No such file"],
        },
        Case {
            name: "another config.json",
            change: |folder| set(folder, "config.json", &[("/decoder/sliding_window", json!(5))]),
            says: &["model/config.json: s"],
        },
        Case {
            name: "no generation_config.json",
            change: |folder| remove(folder, "generation_config.json"),
            says: &["model/generation_config.json: No such file"],
        },
    ]);
}

#[test]
fn manifests_that_are_not_right() {
    check_models(&[
        Case {
            name: "not JSON",
            change: |folder| write(folder, MANIFEST, "{\"format\": "),
            says: &["model/manifest.json: not JSON: "],
        },
        Case {
            name: "not an object",
            change: |folder| write(folder, MANIFEST, "[]"),
            says: &["model/manifest.json: format: expected \"t5gemma-onnx\", found null"],
        },
        Case {
            name: "another program's",
            change: |folder| write(folder, MANIFEST, "{\"name\": \"a web page\"}"),
            says: &["model/manifest.json: format: expected \"t5gemma-onnx\", found null"],
        },
        Case {
            name: "another format",
            change: |folder| set(folder, MANIFEST, &[("/format", json!("gguf"))]),
            says: &["model/manifest.json: format: expected \"t5gemma-onnx\", found \"gguf\""],
        },
        Case {
            name: "a version to come",
            change: |folder| set(folder, MANIFEST, &[("/format_version", json!(3)), ("/new", json!({}))]),
            says: &["model/manifest.json: format_version: expected 1 to 2, found 3"],
        },
        Case {
            name: "a field missing",
            change: |folder| {
                edit(folder, MANIFEST, |bytes| {
                    let mut manifest: Value = serde_json::from_slice(bytes).expect("JSON");
                    manifest.as_object_mut().expect("an object").remove("weights");
                    *bytes = manifest.to_string().into_bytes();
                });
            },
            says: &["model/manifest.json: missing field `weights`"],
        },
        Case {
            name: "an unknown field",
            change: |folder| set(folder, MANIFEST, &[("/compression", json!("int4"))]),
            says: &["model/manifest.json: unknown field `compression`"],
        },
        Case {
            name: "a family to come",
            change: |folder| set(folder, MANIFEST, &[("/family", json!("t5gemma9"))]),
            says: &["model/manifest.json: unknown variant `t5gemma9`"],
        },
        Case {
            name: "a size beyond any model's",
            change: |folder| set(folder, MANIFEST, &[("/facts/decoder/num_hidden_layers", json!(5000))]),
            says: &[
                "model/manifest.json: facts.decoder.num_hidden_layers: expected an integer between 1 and 4096, found 5000",
            ],
        },
        Case {
            name: "a size of another model",
            change: |folder| set(folder, MANIFEST, &[("/facts/encoder/hidden_size", json!(7))]),
            says: &[
                "model/manifest.json: graphs.encoder.outputs[0]: expected last_hidden_state float32 [",
                ", 7], found",
            ],
        },
        Case {
            name: "a tensor's role that there is not",
            change: |folder| set(folder, MANIFEST, &[("/weights/tensors/0/role", json!("speech"))]),
            says: &["model/manifest.json: unknown variant `speech`"],
        },
        Case {
            name: "a graph missing",
            change: |folder| {
                edit(folder, MANIFEST, |bytes| {
                    let mut manifest: Value = serde_json::from_slice(bytes).expect("JSON");
                    manifest["graphs"].as_object_mut().expect("an object").remove("decoder");
                    *bytes = manifest.to_string().into_bytes();
                });
            },
            says: &["model/manifest.json: graphs: expected decoder, found no such graph"],
        },
        Case {
            name: "a graph outside the folder",
            change: |folder| set(folder, MANIFEST, &[("/graphs/encoder/file", json!("../encoder_model.onnx"))]),
            says: &["model/manifest.json: file: expected the name of a file in the folder, found \"../encoder_model"],
        },
        Case {
            name: "graphs in each other's place",
            change: |folder| {
                edit(folder, MANIFEST, |bytes| {
                    let mut manifest: Value = serde_json::from_slice(bytes).expect("JSON");
                    for field in ["file", "bytes", "sha256", "weights"] {
                        let encoder = manifest["graphs"]["encoder"][field].take();
                        let decoder = std::mem::replace(&mut manifest["graphs"]["decoder"][field], encoder);
                        manifest["graphs"]["encoder"][field] = decoder;
                    }
                    *bytes = manifest.to_string().into_bytes();
                });
            },
            says: &["model/decoder_model.onnx: input 0: expected input_ids int64 [", "], found "],
        },
        Case {
            name: "the name of a port",
            change: |folder| set(folder, MANIFEST, &[("/graphs/encoder/inputs/1/name", json!("mask"))]),
            says: &["model/manifest.json: graphs.encoder.inputs[1]: expected attention_mask int64 ", ", found mask "],
        },
        Case {
            name: "the element type of a model",
            change: |folder| set(folder, MANIFEST, &[("/dtype", json!("float16"))]),
            says: &["model/manifest.json: graphs.encoder.outputs[0]: expected ", " float16 ", " float32 "],
        },
        Case {
            name: "no inputs",
            change: |folder| set(folder, MANIFEST, &[("/graphs/decoder_with_past/inputs", json!([]))]),
            says: &["model/manifest.json: graphs.decoder_with_past.inputs[0]: expected ", ", found none"],
        },
        Case {
            name: "a tensor past the end of the weights",
            change: |folder| set(folder, MANIFEST, &[("/weights/tensors/3/offset", json!(1_u64 << 40))]),
            says: &["model/manifest.json: weights.tensors[\"", "\"].offset: expected a tensor within the file's"],
        },
        Case {
            name: "a tensor in the place of another",
            change: |folder| set(folder, MANIFEST, &[("/weights/tensors/3/offset", json!(0))]),
            says: &["model/manifest.json: weights.tensors[\"", "\"].offset: expected at least ", ", found 0"],
        },
        Case {
            name: "a tensor of another shape",
            change: |folder| set(folder, MANIFEST, &[("/weights/tensors/0/shape", json!([u64::MAX, 2]))]),
            says: &["model/manifest.json: weights.tensors[\"", "\"].bytes: expected the size of float32 ["],
        },
        Case {
            name: "a graph's tensor that there is not",
            change: |folder| set(folder, MANIFEST, &[("/graphs/decoder/weights/0", json!("model.extra"))]),
            says: &[
                "model/manifest.json: graphs.decoder.weights: expected names of weights.tensors",
                "\"model.extra\"",
            ],
        },
    ]);
}

#[test]
fn inspect_refuses_the_same_folders() {
    let cases = [
        Case {
            name: "no manifest, no checkpoint",
            change: |folder| remove(folder, MANIFEST),
            says: &["model: expected model.safetensors or model.safetensors.index.json, found neither"],
        },
        Case {
            name: "neither",
            change: |folder| {
                remove(folder, MANIFEST);
                remove(folder, "config.json");
            },
            says: &[
                "model: expected a model folder (with manifest.json) or a checkpoint (with config.json), found neither",
            ],
        },
        Case {
            name: "no folder",
            change: |folder| fs::remove_dir_all(folder).expect("just made"),
            says: &["model: expected a model folder or a checkpoint, found nothing"],
        },
        Case {
            name: "a manifest that is not JSON",
            change: |folder| write(folder, MANIFEST, "{"),
            says: &["model/manifest.json: expected a JSON object, found JSON that is truncated"],
        },
        Case {
            name: "a graph that is not ONNX",
            change: |folder| write(folder, "encoder_model.onnx", "\u{8}\u{8}\u{8}"),
            says: &["model/encoder_model.onnx: not an ONNX model"],
        },
        Case {
            name: "no graph",
            change: |folder| remove(folder, "encoder_model.onnx"),
            says: &["model/encoder_model.onnx: cannot be read"],
        },
        Case {
            name: "a tensor of more numbers than there are",
            change: |folder| set(folder, MANIFEST, &[("/weights/tensors/0/shape", json!([u64::MAX, 2]))]),
            says: &["model/manifest.json: weights.tensors", "shape"],
        },
    ];
    check_all(
        &cases,
        |case| case.name,
        |case| with_copy(case, |model| run("t5gemma-export", ["inspect".as_ref(), model.as_os_str()], "")),
    );
}

/// The one file that users may edit is edited, and still checked.
#[test]
fn an_edited_generation_config_is_taken_with_a_word() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = copy(&exported("tiny-untied"), &folder.path().join("model"));
    let generate =
        || run("t5gemma", ["generate".as_ref(), model.as_os_str(), "--jsonl".as_ref()], "{\"input_ids\": [5, 6, 7]}");
    let tokens = |output: &std::process::Output| {
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{out}{}", String::from_utf8_lossy(&output.stderr));
        let answer: Value = serde_json::from_str(out.trim()).expect("JSON");
        answer["sequences"][0][0]["tokens"].as_array().map_or(0, Vec::len)
    };
    let said = |output: &std::process::Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let output = generate();
    assert!(tokens(&output) > 2 && !said(&output).contains("since export"), "{}", said(&output));
    write(&model, "generation_config.json", "\u{feff}{\"max_new_tokens\": 2, \"eos_token_id\": 1}");
    let output = generate();
    assert!(tokens(&output) <= 2 && said(&output).contains("model: generation_config.json was changed since export"));
    write(&model, "generation_config.json", "{\"max_new_tokens\": \"many\"}");
    refused(&generate(), &["model/generation_config.json: max_new_tokens: expected an integer"])
        .unwrap_or_else(|wrong| panic!("{wrong}"));
    write(&model, "generation_config.json", "{");
    refused(&generate(), &["model/generation_config.json: the document: expected a JSON object, found JSON that is"])
        .unwrap_or_else(|wrong| panic!("{wrong}"));
    // After resealing, there is no warning.
    write(&model, "generation_config.json", "{\"max_new_tokens\": 2}");
    assert!(reseal(&model).contains("generation_config.json changed"));
    assert!(!said(&generate()).contains("since export"));
}

fn reseal(model: &Path) -> String {
    let output = run("t5gemma-export", ["reseal".as_ref(), model.as_os_str()], "");
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{err}");
    err
}

#[test]
fn reseal_accepts_text_files_and_nothing_that_computes() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = copy(&crate::common::demo(), &folder.path().join("model"));
    let generate = || run("t5gemma", ["generate".as_ref(), model.as_os_str(), "doctor smith".as_ref()], "");
    let sealed = fs::read(model.join(MANIFEST)).expect("readable");
    assert!(reseal(&model).contains("no changes"));
    assert_eq!(fs::read(model.join(MANIFEST)).expect("readable"), sealed);

    edit(&model, "tokenizer.json", |bytes| bytes.push(b'\n'));
    refused(&generate(), &["model/tokenizer.json: size: ", "run `t5gemma-export reseal MODEL`"])
        .unwrap_or_else(|wrong| panic!("{wrong}"));
    write(&model, "chat_template.jinja", "{{ messages[0].content }}");
    let said = reseal(&model);
    assert!(said.contains("tokenizer.json changed") && said.contains("chat_template.jinja added"), "{said}");
    assert!(generate().status.success());
    remove(&model, "chat_template.jinja");
    assert!(reseal(&model).contains("chat_template.jinja removed"));

    let changes: [(&str, &str); 4] = [
        ("encoder_model.onnx", "model/encoder_model.onnx: expected the exported file, found a different one"),
        (WEIGHTS, "model/model.onnx_data: expected the exported file, found a different one"),
        ("config.json", "model/config.json: expected the exported file, found a different one"),
        ("tokenizer.json", "model/tokenizer.json: expected a JSON object, found invalid JSON"),
    ];
    for (name, says) in changes {
        let whole = fs::read(model.join(name)).expect("readable");
        edit(&model, name, |bytes| bytes[1] ^= 1);
        let sealed = fs::read(model.join(MANIFEST)).expect("readable");
        let output = run("t5gemma-export", ["reseal".as_ref(), model.as_os_str()], "");
        refused(&output, &[says]).unwrap_or_else(|wrong| panic!("{name}: {wrong}"));
        assert_eq!(fs::read(model.join(MANIFEST)).expect("readable"), sealed, "{name}");
        write(&model, name, whole);
    }
}

/// Lengths in the file are cut to the capacity of the cache; lengths in a request beyond it are errors.
#[test]
fn a_length_of_the_file_ends_at_the_capacity_of_the_cache() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let export = Export::default().target(Target::TensorRt).dtype(DType::Float32).capacity(8);
    let model = copy(&exported_as("tiny-untied", "capacity-8", export), &folder.path().join("model"));
    write(&model, "generation_config.json", "{\"max_new_tokens\": 160}");
    let generate =
        |request: &str| run("t5gemma", ["generate".as_ref(), model.as_os_str(), "--jsonl".as_ref()], request);
    let output = generate("{\"input_ids\": [5, 6, 7]}");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = generate("{\"input_ids\": [5, 6, 7], \"options\": {\"max_new_tokens\": 160}}");
    let out = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(out.contains("at most 8 target tokens (the capacity of the cache)"), "{out}");
}

/// As in transformers, `config.json` counts only if there is no `generation_config.json`.
#[test]
fn settings_for_generation_in_config_json_count_where_there_is_no_other_file() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let checkpoint = copy(&fixture("tiny-untied").join("checkpoint"), &folder.path().join("checkpoint"));
    let settings =
        [("/decoder_start_token_id", json!(7)), ("/max_length", json!(3)), ("/decoder/max_new_tokens", json!(4))];
    set(&checkpoint, "config.json", &settings);
    let defaults = |name: &str| {
        let out = folder.path().join(name);
        let output = run("t5gemma-export", [&checkpoint, &out], "");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let model = t5gemma_runtime::Model::open(&out).expect("opens");
        let options = model.generation_config();
        (options.decoder_start_token_id, options.max_new_tokens, options.max_length)
    };
    assert_eq!(defaults("with"), (2, None, None));
    remove(&checkpoint, "generation_config.json");
    assert_eq!(defaults("without"), (7, Some(4), None));
}

/// Files that the exporter copies and only the runtime interprets.
#[test]
fn settings_that_only_the_runtime_reads() {
    struct Case {
        name: &'static str,
        file: &'static str,
        content: &'static str,
        request: &'static str,
        says: &'static [&'static str],
    }
    let cases = [
        Case {
            name: "a default of a wrong type",
            file: "generation_config.json",
            content: "{\"max_length\": \"long\"}",
            request: "{\"input_ids\": [5]}",
            says: &["model/generation_config.json: max_length: expected an integer of at least 1, found \"long\""],
        },
        Case {
            name: "a tokenizer that is none, and a text",
            file: "tokenizer.json",
            content: "{}",
            request: "a text",
            says: &["model/tokenizer.json: "],
        },
    ];
    check_all(
        &cases,
        |case| case.name,
        |case| {
            let folder = tempfile::tempdir().expect("a temporary folder can be made");
            let (checkpoint, model) = (folder.path().join("checkpoint"), folder.path().join("model"));
            copy(&fixture("tiny-untied").join("checkpoint"), &checkpoint);
            write(&checkpoint, case.file, case.content);
            let exported = run("t5gemma-export", [&checkpoint, &model], "");
            if !exported.status.success() {
                return Err(String::from_utf8_lossy(&exported.stderr).into_owned());
            }
            let jsonl = case.request.starts_with('{').then_some("--jsonl");
            let arguments = ["generate", model.to_str().expect("UTF-8")].into_iter().chain(jsonl);
            refused(&run("t5gemma", arguments, case.request), case.says)
        },
    );
}

#[test]
fn a_model_without_a_tokenizer_takes_ids_only() {
    let model = exported("tiny-untied");
    let model = model.to_str().expect("temporary paths are UTF-8");
    for arguments in [["generate", model, "a text"].as_slice(), &["generate", model]] {
        let output = run("t5gemma", arguments, "a line\n");
        let says = ["tokenizer.json: no such file: the model takes and returns token ids only"];
        refused(&output, &says).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
}

#[test]
fn bfloat16_on_the_cpu_is_told() {
    let model = exported_as("tiny-untied", "bf16", Export::default().dtype(DType::BFloat16));
    let model = model.to_str().expect("temporary paths are UTF-8");
    let output = run("t5gemma", ["generate", model, "--jsonl"], "{\"input_ids\": [5]}");
    let says = [
        "encoder_model.onnx: ONNX Runtime does not compute in bfloat16 on the CPU",
        "export the model with dtype float32",
    ];
    refused(&output, &says).unwrap_or_else(|wrong| panic!("{wrong}"));
}

fn check_models(cases: &[Case]) {
    let generate = |model: &Path| {
        let arguments = ["generate".as_ref(), model.as_os_str(), "--jsonl".as_ref()];
        run("t5gemma", arguments, "{\"input_ids\": [5]}")
    };
    check_all(cases, |case| case.name, |case| with_copy(case, generate));
}

fn with_copy(case: &Case, run: impl FnOnce(&Path) -> std::process::Output) -> Result<(), String> {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = copy(&exported("tiny-untied"), &folder.path().join("model"));
    (case.change)(&model);
    refused(&run(&model), case.says)
}
