//! Checkpoints that cannot be exported.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde_json::json;

use super::{check_all, copy, edit, holds, names, refused, refused_with, remove, set, write};
use crate::common::{fixture, run};

/// A change to a fixture's checkpoint, and the expected error.
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
            says: &["checkpoint: expected a checkpoint folder, found nothing"],
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
            says: &["checkpoint: expected model.safetensors", "there is pytorch_model.bin", "safe_serialization=True"],
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
            says: &["checkpoint/model.safetensors: expected a file, found a folder"],
        },
        Case {
            name: "generation_config.json is not JSON",
            fixture: "tiny-untied",
            change: |folder| write(folder, "generation_config.json", "{\"max_length\": "),
            says: &["checkpoint/generation_config.json: expected a JSON object, found JSON that is truncated"],
        },
        Case {
            name: "generation_config.json is a list",
            fixture: "tiny-untied",
            change: |folder| write(folder, "generation_config.json", "[]"),
            says: &["checkpoint/generation_config.json: expected a JSON object, found []"],
        },
        Case {
            name: "a tokenizer.json whose download was cut off",
            fixture: "tiny-untied",
            change: |folder| write(folder, "tokenizer.json", "{\"version\": \"1.0\", \"model\": {\"vocab\": {\"a"),
            says: &["checkpoint/tokenizer.json: expected a JSON object, found JSON that is truncated at line 1"],
        },
        Case {
            name: "a folder in place of a tokenizer.json",
            fixture: "tiny-untied",
            change: |folder| fs::create_dir(folder.join("tokenizer.json")).expect("there is none"),
            says: &["checkpoint/tokenizer.json: expected a file, found a folder"],
        },
        Case {
            name: "weights whose download is not finished",
            fixture: "tiny-untied",
            change: |folder| {
                let whole = folder.join(WEIGHTS);
                fs::rename(&whole, folder.join("model.safetensors.incomplete")).expect("there is one");
            },
            says: &[
                "checkpoint/model.safetensors: ",
                "found only model.safetensors.incomplete, an unfinished download",
            ],
        },
        Case {
            name: "a shard without its index",
            fixture: "tiny-untied",
            change: |folder| {
                fs::rename(folder.join(WEIGHTS), folder.join("model-00001-of-00002.safetensors"))
                    .expect("there is one");
            },
            says: &["found neither (there is model-00001-of-00002.safetensors, a shard without its index)"],
        },
        Case {
            name: "a download cache",
            fixture: "tiny-untied",
            change: |folder| {
                names(folder).iter().for_each(|name| remove(folder, name));
                fs::create_dir_all(folder.join("snapshots/0123")).expect("can be made");
            },
            says: &["this is a download cache; pass one of its snapshots, such as ", "checkpoint/snapshots/0123"],
        },
    ]);
}

/// What failed downloads and copies leave behind, in place of each file that is read.
#[test]
fn what_lies_in_the_place_of_a_file_is_named() {
    let contents: [(&str, &[u8], &str); 8] = [
        ("nothing", b"", "found an empty file"),
        ("zeros", &[0; 5000], "found only zero bytes"),
        ("Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 12\n", "`git lfs pull`"),
        ("git-annex", b"/annex/objects/SHA256E-s12--01.json\n", "`git annex get`"),
        ("a page", b"<!DOCTYPE html><html><title>Sign in</title>", "found an HTML page with the title \"Sign in\""),
        ("an answer", b"Entry not found", "begins with \"Entry not found\""),
        ("UTF-16", b"\xff\xfe{\0}\0", "found UTF-16 text"),
        ("a folder of PyTorch", b"PK\x03\x04\x00\x00", "found a PyTorch file"),
    ];
    let files = [
        WEIGHTS,
        INDEX,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
    ];
    let cases: Vec<(String, &str, &[u8], &str)> = files
        .iter()
        .flat_map(|file| contents.map(|(name, content, says)| (format!("{name} for {file}"), *file, content, says)))
        .collect();
    check_all(
        &cases,
        |(name, ..)| name,
        |(_, file, content, says)| {
            let folder = tempfile::tempdir().expect("a temporary folder can be made");
            let path = folder.path().join("checkpoint");
            copy(&fixture(if *file == INDEX { "tiny-sharded" } else { "tiny-untied" }).join("checkpoint"), &path);
            write(&path, file, content);
            let at = format!("checkpoint/{file}: ");
            refused(&run("t5gemma-export", [&path, &folder.path().join("out")], ""), &[&at, says])?;
            holds(folder.path(), &["checkpoint"])
        },
    );
}

#[cfg(unix)]
#[test]
fn links_to_nothing_are_named() {
    use std::os::unix::fs::symlink;

    for (file, target, says) in [
        (WEIGHTS, "../../blobs/0123", "found a broken link to ../../blobs/0123 (the download cache was moved"),
        (WEIGHTS, ".git/annex/objects/x/y", "(run `git annex get model.safetensors`)"),
        ("config.json", "gone", "found a broken link to gone"),
        ("tokenizer.json", "gone", "found a broken link to gone"),
        ("generation_config.json", "gone", "found a broken link to gone"),
    ] {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let checkpoint = copy(&fixture("tiny-untied").join("checkpoint"), &folder.path().join("checkpoint"));
        if checkpoint.join(file).exists() {
            remove(&checkpoint, file);
        }
        symlink(target, checkpoint.join(file)).expect("a link can be made");
        let at = format!("checkpoint/{file}: expected a ");
        let output = run("t5gemma-export", [&checkpoint, &folder.path().join("out")], "");
        refused(&output, &[&at, says]).unwrap_or_else(|wrong| panic!("{file}: {wrong}"));
    }
    // A snapshot in a download cache consists of links to blobs, and is a checkpoint.
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let blobs = copy(&fixture("tiny-untied").join("checkpoint"), &folder.path().join("blobs"));
    let snapshot = folder.path().join("snapshots/0123");
    fs::create_dir_all(&snapshot).expect("can be made");
    for name in names(&blobs) {
        symlink(Path::new("../../blobs").join(&name), snapshot.join(&name)).expect("a link can be made");
    }
    let output = run("t5gemma-export", [&snapshot, &folder.path().join("out")], "");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn configurations_that_are_not_implemented() {
    check_checkpoints(&[
        Case {
            name: "no config.json",
            fixture: "tiny-untied",
            change: |folder| remove(folder, "config.json"),
            says: &["checkpoint/config.json: expected a file, found nothing"],
        },
        Case {
            name: "an empty config.json",
            fixture: "tiny-untied",
            change: |folder| write(folder, "config.json", ""),
            says: &["checkpoint/config.json: expected a text file, found an empty file"],
        },
        Case {
            name: "a config.json that is not JSON",
            fixture: "tiny-untied",
            change: |folder| write(folder, "config.json", "{'model_type': 't5gemma'}"),
            says: &["checkpoint/config.json: expected a JSON object, found invalid JSON (key must be"],
        },
        Case {
            name: "a config.json that is a list",
            fixture: "tiny-untied",
            change: |folder| write(folder, "config.json", "[]"),
            says: &["checkpoint/config.json: expected a JSON object, found []"],
        },
        Case {
            name: "a config.json that is not UTF-8",
            fixture: "tiny-untied",
            change: |folder| write(folder, "config.json", b"{\"model_type\": \"\xff\"}"),
            says: &["checkpoint/config.json: expected UTF-8 text, found invalid UTF-8 at byte "],
        },
        Case {
            name: "a config.json without end",
            fixture: "tiny-untied",
            change: |folder| write(folder, "config.json", "[".repeat(1 << 20)),
            says: &["checkpoint/config.json: expected a JSON object, found invalid JSON (recursion limit"],
        },
        Case {
            name: "a Llama",
            fixture: "tiny-untied",
            change: |folder| set(folder, "config.json", &[("/model_type", json!("llama"))]),
            says: &[
                "checkpoint/config.json: model_type: expected \"t5gemma\" or \"t5gemma2\" or \"t5gemma_voice\", found \"llama\"",
            ],
        },
        Case {
            name: "a T5Gemma that calls itself a T5Gemma 2",
            fixture: "tiny-untied",
            change: |folder| set(folder, "config.json", &[("/model_type", json!("t5gemma2"))]),
            says: &["checkpoint/config.json: decoder.rope_parameters: expected full_attention and sliding_attention"],
        },
        Case {
            name: "a T5Gemma 2 without a head, untied",
            fixture: "t2-untied",
            change: |folder| {
                set(folder, "config.json", &[("/tie_word_embeddings", json!(false))]);
                tensors(folder, |all| drop(all.remove("lm_head.out_proj.weight")));
            },
            says: &["lm_head.out_proj.weight: missing, though config.json has tie_word_embeddings false"],
        },
        Case {
            name: "rotary positions that transformers ignores",
            fixture: "t2-balanced",
            change: |folder| {
                set(
                    folder,
                    "config.json",
                    &[("/decoder/rope_parameters", json!({"rope_type": "linear", "factor": 8.0}))],
                )
            },
            says: &[
                "checkpoint/config.json: decoder.rope_parameters: expected full_attention and sliding_attention",
                "transformers ignores such parameters",
            ],
        },
        Case {
            name: "tokens of an image that are no square of its patches",
            fixture: "t2-balanced",
            change: |folder| set(folder, "config.json", &[("/encoder/mm_tokens_per_image", json!(3))]),
            says: &[
                "checkpoint/config.json: encoder.mm_tokens_per_image: expected the square of a number that divides",
            ],
        },
        Case {
            name: "layers of different sizes",
            fixture: "tiny-untied",
            change: |folder| {
                set(folder, "config.json", &[("/encoder/per_layer_config", json!({"1": {"head_dim": 8}}))])
            },
            says: &["checkpoint/config.json: encoder.per_layer_config: expected null or {}", "head_dim"],
        },
        Case {
            name: "quantized weights",
            fixture: "tiny-untied",
            change: |folder| set(folder, "config.json", &[("/quantization_config", json!({"quant_method": "awq"}))]),
            says: &["checkpoint/config.json: quantization_config: expected null", "awq"],
        },
        Case {
            name: "no number where one decides",
            fixture: "tiny-untied",
            change: |folder| {
                edit(folder, "config.json", |bytes| {
                    let text = String::from_utf8_lossy(bytes)
                        .replace("\"rms_norm_eps\": ", "\"rms_norm_eps\": NaN, \"was\": ");
                    *bytes = text.into_bytes();
                });
            },
            says: &["checkpoint/config.json: ", ".rms_norm_eps: expected a positive number, found \"NaN\""],
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
            says: &["config.json: decoder.head_dim: expected an integer between 1 and", "found -16"],
        },
        Case {
            name: "a size beyond any machine",
            fixture: "tiny-untied",
            change: |folder| set(folder, "config.json", &[("/decoder/hidden_size", json!(1e12))]),
            says: &["config.json: decoder.hidden_size: expected an integer between 1 and"],
        },
        Case {
            name: "sizes of another model",
            fixture: "tiny-untied",
            change: |folder| {
                let width = json!(2_147_483_647);
                set(folder, "config.json", &[("/encoder/hidden_size", width.clone()), ("/decoder/hidden_size", width)]);
            },
            says: &["checkpoint: the tensors do not match config.json", "more"],
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
            says: &["checkpoint/model.safetensors: expected a safetensors file, found an empty file"],
        },
        Case {
            name: "cut off in the header's length",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes.truncate(5)),
            says: &["checkpoint/model.safetensors: expected a complete safetensors file, found 5 bytes: "],
        },
        Case {
            name: "cut off in the header",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes.truncate(300)),
            says: &["checkpoint/model.safetensors: expected a complete safetensors file, found 300 bytes: "],
        },
        Case {
            name: "cut off in the numbers",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes.truncate(bytes.len() / 2)),
            says: &[
                "checkpoint/model.safetensors: expected a complete safetensors file",
                "the header describes ",
                "download the file again",
            ],
        },
        Case {
            name: "cut off by one byte",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes.truncate(bytes.len() - 1)),
            says: &["checkpoint/model.safetensors: expected a complete safetensors file"],
        },
        Case {
            name: "one byte too many",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes.push(0)),
            says: &["checkpoint/model.safetensors: expected a complete safetensors file"],
        },
        Case {
            name: "a header longer than any file",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes[..8].fill(0xff)),
            says: &["checkpoint/model.safetensors: expected a complete safetensors file"],
        },
        Case {
            name: "a header that is not JSON",
            fixture: "tiny-untied",
            change: |folder| edit(folder, WEIGHTS, |bytes| bytes[8..40].fill(b'?')),
            says: &["checkpoint/model.safetensors: expected a complete safetensors file"],
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
                "checkpoint: the tensors do not match config.json",
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
            says: &["model.encoder.layers.0.", "missing (expected shape [", "  and ", " more"],
        },
        Case {
            name: "all missing",
            fixture: "tiny-untied",
            change: |folder| tensors(folder, BTreeMap::clear),
            says: &[
                "checkpoint: the tensors do not match config.json: model.encoder.embed_tokens.weight: missing; the checkpoint has no",
            ],
        },
        Case {
            name: "an adapter that is not merged",
            fixture: "tiny-untied",
            change: |folder| {
                tensors(folder, |all| {
                    *all = std::mem::take(all)
                        .into_iter()
                        .map(|(name, tensor)| (format!("base_model.model.{name}"), tensor))
                        .collect();
                    let query = "base_model.model.model.encoder.layers.0.self_attn.q_proj.";
                    let tensor = all.remove(&format!("{query}weight")).expect("every checkpoint has it");
                    all.insert(format!("{query}base_layer.weight"), tensor);
                    all.insert(format!("{query}lora_A.default.weight"), (Dtype::F32, vec![1], vec![0; 4]));
                });
            },
            says: &["self_attn.q_proj.weight: missing", "PEFT adapter that is not merged", "merge_and_unload()"],
        },
        Case {
            name: "two models",
            fixture: "tiny-untied",
            change: |folder| {
                tensors(folder, |all| {
                    let both = |(name, tensor): (String, Stored)| {
                        [(format!("student.{name}"), tensor.clone()), (format!("teacher.{name}"), tensor)]
                    };
                    *all = std::mem::take(all).into_iter().flat_map(both).collect();
                });
            },
            says: &["checkpoint: expected the tensors of one model, found those of 2", "\"student.\" and \"teacher.\""],
        },
        Case {
            name: "another class",
            fixture: "tiny-untied",
            change: |folder| {
                tensors(folder, |all| {
                    let other =
                        |name: String| name.replace("model.", "").replace("layers.", "block.").replace("embed_", "");
                    *all = std::mem::take(all)
                        .into_iter()
                        .map(|(name, tensor)| (other(name), tensor))
                        .filter(|(name, _)| name.contains("block"))
                        .collect();
                });
            },
            says: &[
                "model.encoder.embed_tokens.weight: missing; none of the ",
                "tensors has a T5Gemma name",
                ".block.",
            ],
        },
        Case {
            name: "an untied head missing",
            fixture: "tiny-untied",
            change: |folder| tensors(folder, |all| drop(all.remove(HEAD))),
            says: &[
                "checkpoint: the tensors do not match",
                "lm_head.out_proj.weight: missing",
                "tie_word_embeddings false",
            ],
        },
        Case {
            name: "an untied embedding missing",
            fixture: "tiny-untied",
            change: |folder| tensors(folder, |all| drop(all.remove(EMBEDDING))),
            says: &["checkpoint: the tensors do not match", "model.decoder.embed_tokens.weight: missing"],
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
            says: &["checkpoint/model-00002-of-00004.safetensors: expected a file with ", INDEX, "found nothing"],
        },
        Case {
            name: "one cut off",
            fixture: "tiny-sharded",
            change: |folder| edit(folder, "model-00003-of-00004.safetensors", |bytes| bytes.truncate(9000)),
            says: &[
                "checkpoint/model-00003-of-00004.safetensors: expected a complete safetensors file, found 9000 bytes: ",
            ],
        },
        Case {
            name: "one twice",
            fixture: "tiny-sharded",
            change: |folder| {
                let other = fs::read(folder.join("model-00001-of-00004.safetensors")).expect("readable");
                write(folder, "model-00002-of-00004.safetensors", other);
            },
            says: &[
                "checkpoint/model-00002-of-00004.safetensors: ",
                ": expected one tensor of this name, found another in model-00001-of-00004.safetensors",
            ],
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
            says: &["index.json: model.extra: expected a file name without a folder, found \"../model.safetensors\""],
        },
        Case {
            name: "a shard by its path from the root",
            fixture: "tiny-sharded",
            change: |folder| set_shard(folder, "model.extra", json!("/etc/hosts")),
            says: &["index.json: model.extra: expected a file name without a folder, found \"/etc/hosts\""],
        },
        Case {
            name: "an index that is not JSON",
            fixture: "tiny-sharded",
            change: |folder| write(folder, INDEX, "weight_map"),
            says: &["checkpoint/model.safetensors.index.json: expected a JSON object, found "],
        },
        Case {
            name: "an index without its map",
            fixture: "tiny-sharded",
            change: |folder| write(folder, INDEX, "{}"),
            says: &["index.json: weight_map: expected an object of file names by tensor, found none"],
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
    let says = [
        "checkpoint/model.safetensors: model.decoder.embed_tokens.weight: expected numbers up to 65504 for float16, found 1000000",
    ];
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
    let says = ["checkpoint/config.json: expected the sizes of a model, found more than "];
    let checked = refused(&run("t5gemma-export", arguments, ""), &says);
    checked.and_then(|()| holds(folder.path(), &["checkpoint"])).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[test]
fn what_has_no_effect_does_not_stop_an_export() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let export = |name: &str, change: &dyn Fn(&Path)| {
        let checkpoint =
            copy(&fixture("tiny-balanced").join("checkpoint"), &folder.path().join(format!("{name}-checkpoint")));
        change(&checkpoint);
        let out = folder.path().join(name);
        let output = run("t5gemma-export", [&checkpoint, &out], "");
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{name}: {err}");
        let bytes = |file: &str| fs::read(out.join(file)).expect("a model has it");
        (err, bytes("decoder_model.onnx"), bytes("model.onnx_data"))
    };
    let (_, graph, weights) = export("plain", &|_| {});
    type Change<'c> = &'c dyn Fn(&Path);
    let wrapped = |prefix: &'static str| {
        move |folder: &Path| {
            tensors(folder, |all| {
                let renamed = |(name, tensor)| (format!("{prefix}{name}"), tensor);
                *all = std::mem::take(all).into_iter().map(renamed).collect();
            });
        }
    };
    let cases: &[(&str, Change, &[&str])] = &[
        (
            "fields",
            &|folder| {
                let fields = [
                    ("/num_beams", json!(4)),
                    ("/prefix", json!("summarize: ")),
                    ("/unsloth_version", json!("2025.9.1")),
                    ("/encoder/hidden_act", json!("silu")),
                    ("/encoder/max_length", json!(20)),
                    ("/encoder/rope_scaling", json!({"rope_type": "default"})),
                    ("/architectures", json!(["MyT5GemmaForConditionalGeneration"])),
                ];
                set(folder, "config.json", &fields);
            },
            &[
                "config.json: ignored fields: architectures, encoder.hidden_act, encoder.max_length, encoder.rope_parameters, num_beams, prefix, unsloth_version",
            ],
        ),
        (
            "numbers",
            &|folder| {
                for (file, end) in
                    [("config.json", "\"initializer_range\": NaN}"), ("generation_config.json", "\"loss\": -Infinity}")]
                {
                    edit(folder, file, |bytes| {
                        let text = String::from_utf8_lossy(bytes);
                        let text = text.trim_end().strip_suffix('}').expect("an object");
                        *bytes = format!("\u{feff}{text}, {end}").into_bytes();
                    });
                }
                write(folder, "tokenizer_config.json", "\u{feff}{\"model_max_length\": Infinity}");
            },
            &[],
        ),
        (
            "types",
            &|folder| {
                tensors(folder, |all| {
                    for (name, dtype, shape, bytes) in [
                        ("spiece_model", Dtype::U8, vec![3], 3),
                        ("scale", Dtype::F32, vec![], 4),
                        ("nothing", Dtype::F16, vec![0, 5], 0),
                        ("steps", Dtype::I64, vec![1], 8),
                        ("mask", Dtype::BOOL, vec![2], 2),
                        ("small", Dtype::F8_E4M3, vec![2], 2),
                        ("double", Dtype::F64, vec![1], 8),
                        ("halves", Dtype::F4, vec![2], 1),
                    ] {
                        all.insert(name.to_string(), (dtype, shape, vec![0; bytes]));
                    }
                });
            },
            &["8 tensors of the checkpoint are not used", "spiece_model", "nothing", "small"],
        ),
        ("module", &wrapped("module."), &["the tensor names have the prefix of a wrapper: read module."]),
        (
            "compiled",
            &wrapped("_orig_mod.module."),
            &["the tensor names have the prefix of a wrapper: read _orig_mod.module."],
        ),
        (
            "peft",
            &wrapped("base_model.model."),
            &["the tensor names have the prefix of a wrapper: read base_model.model."],
        ),
    ];
    for (name, change, says) in cases {
        let (err, same_graph, same_weights) = export(name, change);
        assert!(same_graph == graph && same_weights == weights, "{name}: the model is another");
        for says in *says {
            assert!(err.contains(says), "{name}: expected {says:?} in {err}");
        }
    }
}

#[test]
fn what_a_model_will_lack_is_told() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let checkpoint = copy(&fixture("tiny-untied").join("checkpoint"), &folder.path().join("checkpoint"));
    let told = |name: &str, arguments: &[&str]| {
        let (checkpoint, out) = (checkpoint.to_str().expect("UTF-8"), folder.path().join(name));
        let output = run("t5gemma-export", [&[checkpoint, out.to_str().expect("UTF-8")], arguments].concat(), "");
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{name}: {err}");
        err
    };
    let err = told("bare", &[]);
    assert!(err.contains("no tokenizer.json: the model accepts and returns token ids, not text"), "{err}");
    assert_eq!(told("bare-quiet", &["--quiet"]), "", "notes are not for those who want to read errors alone");
    write(&checkpoint, "tokenizer.model", "\n");
    let err = told("sentencepiece", &[]);
    assert!(err.contains("no tokenizer.json (tokenizer.model is not supported)"), "{err}");
    write(&checkpoint, "tokenizer.json", "{}");
    assert!(!told("whole", &[]).contains("tokenizer.json"));

    write(&checkpoint, "generation_config.json", "{\"max_new_tokens\": 160}");
    let err = told("static", &["--target", "tensorrt", "--cache", "static=64"]);
    assert!(err.contains("generation_config.json: max_new_tokens 160 exceeds the cache"), "{err}");

    tensors(&checkpoint, |all| {
        let (_, _, bytes) = all.get_mut(NORM).expect("every checkpoint has it");
        bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        bytes[8..12].copy_from_slice(&f32::INFINITY.to_le_bytes());
    });
    let err = told("odd", &["--quiet"]);
    assert!(err.contains("NaN or infinite weights, by tensor: model.encoder.norm.weight (2)"), "{err}");
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
    for says in ["12 tensors of the checkpoint are not used", "model.extra.09", "and 2 more"] {
        assert!(err.contains(says), "expected {says:?} in {err}");
    }
    assert!(!err.contains("model.extra.10"), "{err}");
}

/// A test that may run as root, which ignores permissions, cannot make an unreadable file.
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

/// Exports into a folder whose parent does not exist either, and checks the error and that neither was created.
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

pub type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// Changes the tensors of a single-file checkpoint.
pub fn tensors(folder: &Path, change: impl FnOnce(&mut BTreeMap<String, Stored>)) {
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

/// Makes the index claim that a tensor is in some file.
fn set_shard(folder: &Path, tensor: &str, shard: serde_json::Value) {
    edit(folder, INDEX, |bytes| {
        let mut index: serde_json::Value = serde_json::from_slice(bytes).expect("the fixtures are JSON");
        index["weight_map"][tensor] = shard;
        *bytes = index.to_string().into_bytes();
    });
}

/// Flags that contradict each other or the checkpoint: status 2, whether the parser, the program or the library finds
/// it.
#[test]
fn options_that_do_nothing_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let checkpoint = fixture("tiny-untied").join("checkpoint");
    let out = folder.path().join("out");
    let (checkpoint, path) = (checkpoint.to_str().expect("UTF-8"), out.to_str().expect("UTF-8"));
    for (between, says) in [
        (&["--block-size", "32"][..], "--block-size requires --quantize"),
        (&["--asymmetric"], "--asymmetric requires --quantize"),
        (&["--quantize-exclude", "*"], "--quantize-exclude requires --quantize"),
        (
            &["--target", "cpu", "--quantize", "int8", "--quantize-exclude", "*.layer.0.*"],
            "--quantize-exclude: expected a pattern that matches a weight, with * for any text, found \"*.layer.0.*\"",
        ),
        (&["--target", "cpu", "--quantize", "int8", "--block-size", "48"], "invalid value '48' for '--block-size <N>'"),
        (&["--quantize", "int8"], "--quantize int8 requires --target cpu or cuda or tensorrt (got portable)"),
        (&["--target", "cpu", "--quantize", "fp8"], "--quantize fp8 requires --target tensorrt (got cpu)"),
        (&["--target", "cpu", "--dtype", "float16"], "--dtype float16 requires --target "),
        (&["--plan", "source=9,target=9"], "--plan requires --target tensorrt (got portable)"),
        (&["--cache", "static=9"], "--cache static=N requires --target tensorrt (got portable)"),
        (&["--target", "tensorrt", "--cache", "static=0"], "--cache static=N: expected 1 to "),
        (&["--candidates", "0"], "--candidates: expected 1 to "),
        (&["--candidates", "5000"], "--candidates: expected 1 to "),
        (&["--observe", "--target", "cpu"], "--observe requires --target portable (got cpu)"),
        (&["--observe", "--dtype", "float16"], "--observe requires --dtype float32 (got float16)"),
        (&["--observe", "--alignment"], "--observe cannot be used with --alignment"),
        (&["--alignment", "--alignment-layers", "9"], "--alignment-layers: expected decoder layers from 0 to "),
        (&["--pooling", "mean"], "--pooling requires --task feature-extraction"),
        (&["--normalize"], "--normalize requires --task feature-extraction"),
        (&["--hidden-layer", "1"], "--hidden-layer requires --task feature-extraction"),
        (&["--task", "feature-extraction", "--hidden-layer", "99"], "--hidden-layer: expected 0 to "),
        (
            &["--task", "feature-extraction", "--all-logits"],
            "--all-logits requires --task text2text-generation (got feature-extraction)",
        ),
        (
            &["--task", "text-classification"],
            "--task: expected text2text-generation or feature-extraction for a checkpoint of",
        ),
        (&["--dummy-weights"], "--dummy-weights cannot be used with a checkpoint"),
        (&["another"], "unexpected value"),
        (&["--all-logits", "--candidates", "3"], "cannot be used with"),
        (&["--preset", "s-s"], "--dummy-weights"),
        (&["--seed", "3"], "--dummy-weights"),
    ] {
        let output = run("t5gemma-export", [&[checkpoint], between, &[path]].concat(), "");
        refused_with(&output, 2, &[says]).unwrap_or_else(|wrong| panic!("{between:?}: {wrong}"));
        assert!(!out.exists(), "{between:?}");
    }
    for (arguments, says) in [
        (&[path][..], "expected CHECKPOINT and OUT, found one folder"),
        (&["--dummy-weights", path], "--dummy-weights requires --preset or --config"),
    ] {
        let output = run("t5gemma-export", arguments, "");
        refused_with(&output, 2, &[says]).unwrap_or_else(|wrong| panic!("{arguments:?}: {wrong}"));
    }
    let between = ["--target", "cpu", "--quantize", "int8", "--quantize-exclude", "*.layers.0.*"];
    let output = run("t5gemma-export", [&[checkpoint], &between[..], &[path]].concat(), "");
    assert!(output.status.success() && out.exists(), "{}", String::from_utf8_lossy(&output.stderr));
}
