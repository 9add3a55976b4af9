//! Checkpoints that cannot be exported.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde_json::json;

use super::{check_all, copy, edit, holds, names, refused, remove, set, write};
use crate::common::{fixture, run};

/// A change of a fixture's checkpoint and what is said of it.
struct Case {
    name: &'static str,
    fixture: &'static str,
    change: fn(&Path),
    /// `checkpoint` is the folder's name.
    says: &'static [&'static str],
}

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const EMBEDDING: &str = "model.decoder.embed_tokens.weight";
const HEAD: &str = "lm_head.out_proj.weight";
const NORM: &str = "model.encoder.norm.weight";

#[test]
fn folders_that_are_not_whole() {
    check_checkpoints(&[
        Case {
            name: "no such folder",
            fixture: "tiny-untied",
            change: |folder| fs::remove_dir_all(folder).expect("just made"),
            says: &["checkpoint: expected a checkpoint folder, found nothing there"],
        },
        Case {
            name: "a file in place of the folder",
            fixture: "tiny-untied",
            change: |folder| {
                fs::remove_dir_all(folder).expect("just made");
                fs::write(folder, "").expect("writable");
            },
            says: &["checkpoint: expected a checkpoint folder, found a file"],
        },
        Case {
            name: "an empty folder",
            fixture: "tiny-untied",
            change: |folder| names(folder).iter().for_each(|name| remove(folder, name)),
            says: &["checkpoint: expected model.safetensors or model.safetensors.index.json, found neither"],
        },
        Case {
            name: "a LoRA adapter",
            fixture: "tiny-untied",
            change: |folder| {
                remove(folder, WEIGHTS);
                write(folder, "adapter_config.json", "{}");
                write(folder, "adapter_model.safetensors", "");
            },
            says: &["checkpoint: expected model.safetensors", "LoRA adapter: merge it into its base model"],
        },
        Case {
            name: "pytorch_model.bin only",
            fixture: "tiny-untied",
            change: |folder| {
                remove(folder, WEIGHTS);
                write(folder, "pytorch_model.bin", "");
            },
            says: &["checkpoint: expected model.safetensors", "found pytorch_model.bin", "safe_serialization=True"],
        },
        Case {
            name: "an exported model",
            fixture: "tiny-untied",
            change: |folder| {
                remove(folder, WEIGHTS);
                write(folder, "manifest.json", "{}");
            },
            says: &["this is an exported model, not a checkpoint"],
        },
        Case {
            name: "a folder in place of the weights",
            fixture: "tiny-untied",
            change: |folder| {
                remove(folder, WEIGHTS);
                fs::create_dir(folder.join(WEIGHTS)).expect("removed before");
            },
            says: &["checkpoint/model.safetensors: cannot be "],
        },
        Case {
            name: "generation_config.json is not JSON",
            fixture: "tiny-untied",
            change: |folder| write(folder, "generation_config.json", "{\"max_length\": "),
            says: &["checkpoint/generation_config.json: expected a JSON object"],
        },
        Case {
            name: "generation_config.json is a list",
            fixture: "tiny-untied",
            change: |folder| write(folder, "generation_config.json", "[]"),
            says: &["checkpoint/generation_config.json: expected a JSON object"],
        },
        Case {
            name: "a tokenizer.json whose download was cut off",
            fixture: "tiny-untied",
            change: |folder| write(folder, "tokenizer.json", "{\"version\": \"1.0\", \"model\": {\"vocab\": {\"a"),
            says: &["checkpoint/tokenizer.json: expected a JSON object"],
        },
    ]);
}

#[test]
fn configurations_that_are_not_implemented() {
    check_checkpoints(&[
        Case {
            name: "no config.json",
            fixture: "tiny-untied",
            change: |folder| remove(folder, "config.json"),
            says: &["checkpoint/config.json: cannot be read"],
        },
        Case {
            name: "an empty config.json",
            fixture: "tiny-untied",
            change: |folder| write(folder, "config.json", ""),
            says: &["checkpoint/config.json: the document: expected a JSON object"],
        },
        Case {
            name: "a config.json that is not JSON",
            fixture: "tiny-untied",
            change: |folder| write(folder, "config.json", "{'model_type': 't5gemma'}"),
            says: &["checkpoint/config.json: the document: expected a JSON object, found key must be a string"],
        },
        Case {
            name: "a config.json that is a list",
            fixture: "tiny-untied",
            change: |folder| write(folder, "config.json", "[]"),
            says: &["checkpoint/config.json: the document: expected a JSON object, found []"],
        },
        Case {
            name: "a config.json that is not UTF-8",
            fixture: "tiny-untied",
            change: |folder| write(folder, "config.json", b"{\"model_type\": \"\xff\"}"),
            says: &["checkpoint/config.json: cannot be read", "UTF-8"],
        },
        Case {
            name: "a config.json without end",
            fixture: "tiny-untied",
            change: |folder| write(folder, "config.json", "[".repeat(1 << 20)),
            says: &["checkpoint/config.json: the document: expected a JSON object, found recursion limit"],
        },
        Case {
            name: "a Llama",
            fixture: "tiny-untied",
            change: |folder| set(folder, "config.json", &[("/model_type", json!("llama"))]),
            says: &["checkpoint/config.json: model_type: expected \"t5gemma\", found \"llama\""],
        },
        Case {
            name: "a T5Gemma 2",
            fixture: "tiny-untied",
            change: |folder| set(folder, "config.json", &[("/model_type", json!("t5gemma2"))]),
            says: &["config.json: model_type: expected \"t5gemma\", found \"t5gemma2\" (T5Gemma 2 is another"],
        },
        Case {
            name: "an unknown field",
            fixture: "tiny-untied",
            change: |folder| set(folder, "config.json", &[("/encoder/qk_norm", json!(true))]),
            says: &["checkpoint/config.json: encoder.qk_norm: expected no such field", "found true"],
        },
        Case {
            name: "an unsupported value",
            fixture: "tiny-untied",
            change: |folder| set(folder, "config.json", &[("/decoder/hidden_activation", json!("silu"))]),
            says: &["config.json: decoder.hidden_activation: expected \"gelu_pytorch_tanh\", found \"silu\""],
        },
        Case {
            name: "scaled rotary positions",
            fixture: "tiny-untied",
            change: |folder| {
                set(folder, "config.json", &[("/decoder/rope_parameters", json!({"rope_type": "yarn", "factor": 4}))]);
            },
            says: &["config.json: decoder.rope_parameters.rope_type: expected \"default\", found \"yarn\""],
        },
        Case {
            name: "a size below zero",
            fixture: "tiny-untied",
            change: |folder| set(folder, "config.json", &[("/decoder/head_dim", json!(-16))]),
            says: &["config.json: decoder.head_dim: expected a whole number between 1 and", "found -16"],
        },
        Case {
            name: "a size beyond any machine",
            fixture: "tiny-untied",
            change: |folder| set(folder, "config.json", &[("/decoder/hidden_size", json!(1e12))]),
            says: &["config.json: decoder.hidden_size: expected a whole number between 1 and"],
        },
        Case {
            name: "sizes of another model",
            fixture: "tiny-untied",
            change: |folder| {
                let width = json!(2_147_483_647);
                set(folder, "config.json", &[("/encoder/hidden_size", width.clone()), ("/decoder/hidden_size", width)]);
            },
            says: &["checkpoint: the tensors are not those that config.json describes", "more"],
        },
    ]);
}

#[test]
fn weights_that_are_damaged() {
    let cases = [
        Case {
            name: "an empty file",
            fixture: "tiny-untied",
            change: |folder| write(folder, WEIGHTS, ""),
            says: &["checkpoint/model.safetensors: not a whole safetensors file (0 bytes)"],
        },
        Case {
            name: "cut off in the header's length",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes.truncate(5)),
            says: &["checkpoint/model.safetensors: not a whole safetensors file (5 bytes)"],
        },
        Case {
            name: "cut off in the header",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes.truncate(300)),
            says: &["checkpoint/model.safetensors: not a whole safetensors file (300 bytes)"],
        },
        Case {
            name: "cut off in the numbers",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes.truncate(bytes.len() / 2)),
            says: &["checkpoint/model.safetensors: not a whole safetensors file"],
        },
        Case {
            name: "cut off by one byte",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes.truncate(bytes.len() - 1)),
            says: &["checkpoint/model.safetensors: not a whole safetensors file"],
        },
        Case {
            name: "one byte too many",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes.push(0)),
            says: &["checkpoint/model.safetensors: not a whole safetensors file"],
        },
        Case {
            name: "a header longer than any file",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes[..8].fill(0xff)),
            says: &["checkpoint/model.safetensors: not a whole safetensors file"],
        },
        Case {
            name: "a header that is not JSON",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes[8..40].fill(b'?')),
            says: &["checkpoint/model.safetensors: not a whole safetensors file"],
        },
        Case {
            name: "a pointer file of Git LFS",
            fixture: "tiny-untied",
            change: |folder| write(folder, WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"),
            says: &["checkpoint/model.safetensors: ", "Git LFS", "git lfs pull"],
        },
        Case {
            name: "float64",
            fixture: "tiny-untied",
            change: |folder| {
                tensors(folder, |all| {
                    let (dtype, _, bytes) = all.get_mut(NORM).expect("every checkpoint has it");
                    (*dtype, *bytes) = (Dtype::F64, vec![0; bytes.len() * 2]);
                });
            },
            says: &["checkpoint/model.safetensors: model.encoder.norm.weight: expected F32, F16 or BF16, found F64"],
        },
        Case {
            name: "int8",
            fixture: "tiny-untied",
            change: |folder| {
                tensors(folder, |all| {
                    let (dtype, _, bytes) = all.get_mut(NORM).expect("every checkpoint has it");
                    (*dtype, *bytes) = (Dtype::I8, vec![0; bytes.len() / 4]);
                });
            },
            says: &["checkpoint/model.safetensors: model.encoder.norm.weight: expected F32, F16 or BF16, found I8"],
        },
    ];
    check_checkpoints(&cases);
}

#[test]
fn tensors_that_do_not_fit() {
    check_checkpoints(&[
        Case {
            name: "another shape",
            fixture: "tiny-untied",
            change: |folder| {
                tensors(folder, |all| {
                    let (_, shape, bytes) = all.get_mut(NORM).expect("every checkpoint has it");
                    shape[0] -= 1;
                    bytes.truncate(bytes.len() - 4);
                });
            },
            says: &[
                "checkpoint: the tensors are not those that config.json describes",
                "model.encoder.norm.weight: expected shape [",
                "], found [",
            ],
        },
        Case {
            name: "one missing",
            fixture: "tiny-untied",
            change: |folder| tensors(folder, |all| drop(all.remove(NORM))),
            says: &["model.encoder.norm.weight: missing (expected shape ["],
        },
        Case {
            name: "many missing",
            fixture: "tiny-untied",
            change: |folder| tensors(folder, |all| all.retain(|name, _| !name.contains(".layers."))),
            says: &["model.encoder.layers.0.", "missing (expected shape [", "… and ", " more"],
        },
        Case {
            name: "all missing",
            fixture: "tiny-untied",
            change: |folder| tensors(folder, BTreeMap::clear),
            says: &["checkpoint: model.decoder.embed_tokens.weight: missing"],
        },
        Case {
            name: "an untied head missing",
            fixture: "tiny-untied",
            change: |folder| tensors(folder, |all| drop(all.remove(HEAD))),
            says: &["checkpoint: lm_head.out_proj.weight: missing", "tie_word_embeddings false"],
        },
        Case {
            name: "an untied embedding missing",
            fixture: "tiny-untied",
            change: |folder| tensors(folder, |all| drop(all.remove(EMBEDDING))),
            says: &["checkpoint: model.decoder.embed_tokens.weight: missing"],
        },
    ]);
}

#[test]
fn shards_that_do_not_fit() {
    check_checkpoints(&[
        Case {
            name: "one missing",
            fixture: "tiny-sharded",
            change: |folder| remove(folder, "model-00002-of-00004.safetensors"),
            says: &["checkpoint/model-00002-of-00004.safetensors: missing, though", INDEX],
        },
        Case {
            name: "one cut off",
            fixture: "tiny-sharded",
            change: |folder| edit(folder, "model-00003-of-00004.safetensors", |bytes| bytes.truncate(9000)),
            says: &["checkpoint/model-00003-of-00004.safetensors: not a whole safetensors file (9000 bytes)"],
        },
        Case {
            name: "one twice",
            fixture: "tiny-sharded",
            change: |folder| {
                let other = fs::read(folder.join("model-00001-of-00004.safetensors")).expect("readable");
                write(folder, "model-00002-of-00004.safetensors", other);
            },
            says: &["checkpoint/model-00002-of-00004.safetensors: ", ": is also in model-00001-of-00004.safetensors"],
        },
        Case {
            name: "a tensor in another shard than the index says",
            fixture: "tiny-sharded",
            change: |folder| set_shard(folder, EMBEDDING, json!("model-00001-of-00004.safetensors")),
            says: &[
                "index.json: model.decoder.embed_tokens.weight: expected in model-00001-of-00004.safetensors",
                "found model-0000",
            ],
        },
        Case {
            name: "a tensor in no shard",
            fixture: "tiny-sharded",
            change: |folder| set_shard(folder, "model.extra", json!("model-00001-of-00004.safetensors")),
            says: &["index.json: model.extra: expected in model-00001-of-00004.safetensors, found in no file"],
        },
        Case {
            name: "a shard outside the folder",
            fixture: "tiny-sharded",
            change: |folder| set_shard(folder, "model.extra", json!("../model.safetensors")),
            says: &["index.json: model.extra: expected a file name in the same folder, found \"../model.safetensors\""],
        },
        Case {
            name: "a shard by its path from the root",
            fixture: "tiny-sharded",
            change: |folder| set_shard(folder, "model.extra", json!("/etc/hosts")),
            says: &["index.json: model.extra: expected a file name in the same folder, found \"/etc/hosts\""],
        },
        Case {
            name: "an index that is not JSON",
            fixture: "tiny-sharded",
            change: |folder| write(folder, INDEX, "weight_map"),
            says: &["checkpoint/model.safetensors.index.json: expected a weight_map from tensor names to files"],
        },
        Case {
            name: "an index without its map",
            fixture: "tiny-sharded",
            change: |folder| write(folder, INDEX, "{}"),
            says: &["index.json: expected a weight_map from tensor names to files: missing field `weight_map`"],
        },
        Case {
            name: "an empty index",
            fixture: "tiny-sharded",
            change: |folder| write(folder, INDEX, "{\"weight_map\": {}}"),
            says: &["index.json: weight_map: expected tensors, found none"],
        },
    ]);
}

#[test]
fn a_number_beyond_float16_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let checkpoint = copy(&fixture("tiny-untied").join("checkpoint"), &folder.path().join("checkpoint"));
    tensors(&checkpoint, |all| {
        let (_, _, bytes) = all.get_mut(EMBEDDING).expect("every checkpoint has it");
        bytes[..4].copy_from_slice(&1e6_f32.to_le_bytes());
    });
    let out = folder.path().join("not/yet/out");
    let arguments = ["--dtype".as_ref(), "float16".as_ref(), checkpoint.as_os_str(), out.as_os_str()];
    let says = ["checkpoint/model.safetensors: model.decoder.embed_tokens.weight: 1000000", "does not fit float16"];
    let checked = refused(&run("t5gemma-export", arguments, ""), &says);
    checked.and_then(|()| holds(folder.path(), &["checkpoint"])).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[test]
fn random_weights_beyond_counting_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let most = json!(2_147_483_647);
    let sizes = ["/decoder/vocab_size", "/decoder/hidden_size", "/decoder/intermediate_size"];
    copy(&fixture("tiny-untied").join("checkpoint"), &folder.path().join("checkpoint"));
    set(&folder.path().join("checkpoint"), "config.json", &sizes.map(|size| (size, most.clone())));
    let (config, out) = (folder.path().join("checkpoint/config.json"), folder.path().join("out"));
    let arguments = ["--dummy-weights".as_ref(), "--config".as_ref(), config.as_os_str(), out.as_os_str()];
    let says = ["checkpoint/config.json: expected sizes of a model, found more than "];
    let checked = refused(&run("t5gemma-export", arguments, ""), &says);
    checked.and_then(|()| holds(folder.path(), &["checkpoint"])).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[test]
fn tensors_that_no_graph_uses_are_listed() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let checkpoint = copy(&fixture("tiny-untied").join("checkpoint"), &folder.path().join("checkpoint"));
    tensors(&checkpoint, |all| {
        for number in 0..12 {
            all.insert(format!("model.extra.{number:02}"), (Dtype::F32, vec![1], vec![0; 4]));
        }
    });
    let out = folder.path().join("out");
    let output = run("t5gemma-export", [&checkpoint, &out], "");
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{err}");
    for says in ["12 tensors of the checkpoint are not used", "model.extra.09", "… and 2 more"] {
        assert!(err.contains(says), "expected {says:?} in {err}");
    }
    assert!(!err.contains("model.extra.10"), "{err}");
}

/// An unreadable file cannot be made by a test that may run as root, whom permissions do not stop.
#[cfg(unix)]
#[test]
fn a_file_that_cannot_be_read_is_named() {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let checkpoint = copy(&fixture("tiny-untied").join("checkpoint"), &folder.path().join("checkpoint"));
    let weights = checkpoint.join(WEIGHTS);
    fs::set_permissions(&weights, fs::Permissions::from_mode(0o0)).expect("the file is ours");
    if fs::File::open(&weights).is_ok() {
        eprintln!("skipped: permissions do not keep this user from reading");
        return;
    }
    let output = run("t5gemma-export", [&checkpoint, &folder.path().join("out")], "");
    let checked = refused(&output, &["checkpoint/model.safetensors: cannot be opened"]);
    checked.and_then(|()| holds(folder.path(), &["checkpoint"])).unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// Exports into a folder whose parent is not there either, and checks the error and that both are still not there.
fn check_checkpoints(cases: &[Case]) {
    check_all(
        cases,
        |case| case.name,
        |case| {
            let folder = tempfile::tempdir().expect("a temporary folder can be made");
            let path = folder.path().join("checkpoint");
            copy(&fixture(case.fixture).join("checkpoint"), &path);
            (case.change)(&path);
            let before = names(folder.path());
            let before: Vec<&str> = before.iter().map(String::as_str).collect();
            refused(&run("t5gemma-export", [&path, &folder.path().join("models/out")], ""), case.says)?;
            holds(folder.path(), &before)
        },
    );
}

type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// Changes the tensors of a checkpoint that is one file.
fn tensors(folder: &Path, change: impl FnOnce(&mut BTreeMap<String, Stored>)) {
    edit(folder, WEIGHTS, |bytes| {
        let file = SafeTensors::deserialize(bytes).expect("the fixtures are sound");
        let stored = |view: &TensorView| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        let mut all: BTreeMap<String, Stored> =
            file.iter().map(|(name, view)| (name.to_string(), stored(&view))).collect();
        change(&mut all);
        let view = |(dtype, shape, bytes)| TensorView::new(dtype, shape, bytes).expect("shapes fit");
        let views = all.iter().map(|(name, (dtype, shape, bytes))| (name, view((*dtype, shape.clone(), &bytes[..]))));
        *bytes = serialize(views, None).expect("tensors can be written");
    });
}

/// Says in the index that a tensor is in some file.
fn set_shard(folder: &Path, tensor: &str, shard: serde_json::Value) {
    edit(folder, INDEX, |bytes| {
        let mut index: serde_json::Value = serde_json::from_slice(bytes).expect("the fixtures are JSON");
        index["weight_map"][tensor] = shard;
        *bytes = index.to_string().into_bytes();
    });
}

/// Arguments that go before and behind the folders.
#[test]
fn options_that_do_nothing_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let checkpoint = fixture("tiny-untied").join("checkpoint");
    let out = folder.path().join("out");
    let (checkpoint, path) = (checkpoint.to_str().expect("UTF-8"), out.to_str().expect("UTF-8"));
    for (between, says) in [
        (&["--block-size", "32"][..], "--block-size needs --quantize"),
        (&["--asymmetric"], "--asymmetric needs --quantize"),
        (&["--quantize-exclude", "*"], "--quantize-exclude needs --quantize"),
        (
            &["--target", "cpu", "--quantize", "int8", "--quantize-exclude", "*.layer.0.*"],
            "found \"*.layer.0.*\", which no weight has",
        ),
        (&["--target", "cpu", "--quantize", "int8", "--block-size", "48"], "expected 16, 32, 64 or 128, found 48"),
    ] {
        let output = run("t5gemma-export", [&[checkpoint], between, &[path]].concat(), "");
        refused(&output, &[says]).unwrap_or_else(|wrong| panic!("{between:?}: {wrong}"));
        assert!(!out.exists(), "{between:?}");
    }
    let between = ["--target", "cpu", "--quantize", "int8", "--quantize-exclude", "*.layers.0.*"];
    let output = run("t5gemma-export", [&[checkpoint], &between[..], &[path]].concat(), "");
    assert!(output.status.success() && out.exists(), "{}", String::from_utf8_lossy(&output.stderr));
}
