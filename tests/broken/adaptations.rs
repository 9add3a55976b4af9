//! What `t5gemma-export adapt` refuses: each error names the side, the field or tensor, and both values.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use super::checkpoints::tensors;
use super::{check_all, copy, edit, holds, refused, refused_with, remove, set, write};
use crate::common::{fixture, program, tests};

const NORM: &str = "model.norm.weight";

/// Copies of the two sources of a fixture, in folders `encoder` and `decoder`.
struct Sources {
    scratch: tempfile::TempDir,
}

impl Sources {
    fn of(name: &str) -> Sources {
        let folder = tests().join("fixtures/adapt").join(name);
        let cases: Value = serde_json::from_slice(&fs::read(folder.join("cases.json")).expect("there")).expect("JSON");
        let scratch = tempfile::tempdir().expect("a temporary folder can be made");
        for side in ["encoder", "decoder"] {
            copy(&folder.join(cases[side].as_str().expect("a name")), &scratch.path().join(side));
        }
        Sources { scratch }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn adapt(&self, arguments: &[&str]) -> std::process::Output {
        let mut command = program("t5gemma-export");
        command.arg("adapt").args(["encoder", "decoder", "out"].map(|name| self.path(name))).args(arguments);
        command.output().expect("the program starts")
    }

    /// Runs a case: exit status 1, the words in the error, and nothing beside the sources.
    fn refuse(&self, arguments: &[&str], says: &[&str]) -> Result<(), String> {
        refused(&self.adapt(arguments), says)?;
        holds(self.scratch.path(), &["decoder", "encoder"])
    }
}

/// The fixture, the file that is changed, the field and its value, and what is said.
type FieldCase = (&'static str, &'static str, &'static str, fn() -> Value, &'static [&'static str]);

#[test]
fn configurations_that_cannot_be_adapted_are_refused() {
    const DECODER: &str = "decoder/config.json";
    const ENCODER: &str = "encoder/config.json";
    let cases: &[FieldCase] = &[
        (
            "balanced",
            ENCODER,
            "model_type",
            || json!("gemma"),
            &["encoder: ", "model_type: expected \"gemma2\", found \"gemma\" (Gemma 1"],
        ),
        (
            "balanced",
            DECODER,
            "model_type",
            || json!("gemma3"),
            &["decoder: ", "found \"gemma3\" (Gemma 3 ", "T5Gemma 2, which is not supported"],
        ),
        ("balanced", DECODER, "model_type", || json!("gemma3_text"), &["found \"gemma3_text\" (Gemma 3 "]),
        (
            "balanced",
            ENCODER,
            "model_type",
            || json!("t5gemma"),
            &["found \"t5gemma\" (it is an encoder-decoder already)"],
        ),
        ("balanced", ENCODER, "model_type", || json!(null), &["model_type: expected \"gemma2\", found null"]),
        (
            "balanced",
            DECODER,
            "quantization_config",
            || json!({"quant_method": "gptq"}),
            &["decoder: ", "quantization_config: expected null", "gptq"],
        ),
        (
            "balanced",
            ENCODER,
            "rope_parameters",
            || json!({"rope_type": "yarn", "factor": 2.0}),
            &["encoder: ", "rope_parameters.rope_type: expected \"default\", found \"yarn\""],
        ),
        (
            "unbalanced",
            ENCODER,
            "rope_scaling",
            || json!({"type": "linear"}),
            &["rope_scaling.type: expected \"default\", found \"linear\""],
        ),
        (
            "balanced",
            DECODER,
            "rope_parameters",
            || json!({"full_attention": {"rope_type": "default"}}),
            &["rope_parameters.full_attention: expected nothing"],
        ),
        (
            "balanced",
            DECODER,
            "hidden_activation",
            || json!("silu"),
            &["decoder: ", "hidden_activation: expected \"gelu_pytorch_tanh\", found \"silu\""],
        ),
        (
            "balanced",
            ENCODER,
            "layer_types",
            || json!(["full_attention"]),
            &["layer_types: expected one entry per layer (num_hidden_layers is 3), found 1 entries"],
        ),
        (
            "balanced",
            ENCODER,
            "layer_types",
            || json!(["full_attention", "chunked_attention", "full_attention"]),
            &["layer_types: expected a list of", "chunked_attention"],
        ),
        (
            "untied",
            DECODER,
            "num_attention_heads",
            || json!(3),
            &["decoder: ", "hidden_size: expected a multiple of num_attention_heads (3), found 32"],
        ),
        (
            "balanced",
            DECODER,
            "num_key_value_heads",
            || json!(3),
            &["num_key_value_heads: expected a divisor of num_attention_heads (4), found 3"],
        ),
        (
            "balanced",
            ENCODER,
            "head_dim",
            || json!(11),
            &["encoder: ", "head_dim: expected an even number (rotary halves), found 11"],
        ),
        (
            "balanced",
            ENCODER,
            "hidden_size",
            || json!(0),
            &["hidden_size: expected an integer between 1 and 2147483647, found 0"],
        ),
        (
            "balanced",
            ENCODER,
            "hidden_size",
            || json!(null),
            &["hidden_size: expected an integer between 1 and 2147483647, found null"],
        ),
        (
            "balanced",
            DECODER,
            "num_hidden_layers",
            || json!(2_000_000_000),
            &["num_hidden_layers: expected at most 4096, found 2000000000"],
        ),
        (
            "balanced",
            DECODER,
            "num_hidden_layers",
            || json!("3"),
            &["num_hidden_layers: expected an integer", "found \"3\""],
        ),
        (
            "balanced",
            DECODER,
            "attn_logit_softcapping",
            || json!(-1.0),
            &["attn_logit_softcapping: expected a positive number or null, found -1.0"],
        ),
        (
            "balanced",
            DECODER,
            "attention_bias",
            || json!("no"),
            &["attention_bias: expected true or false, found \"no\""],
        ),
        (
            "balanced",
            DECODER,
            "initializer_range",
            || json!(-0.02),
            &["initializer_range: expected a number of at least 0, found -0.02"],
        ),
        (
            "balanced",
            DECODER,
            "sliding_window",
            || json!(null),
            &["sliding_window: expected a window for the layers of sliding_attention, found null"],
        ),
        (
            "balanced",
            DECODER,
            "use_bidirectional_attention",
            || json!("all"),
            &["decoder: ", "use_bidirectional_attention: expected false or null", "found \"all\""],
        ),
        (
            "balanced",
            DECODER,
            "vocab_size",
            || json!(85),
            &["decoder: model.embed_tokens.weight: expected shape [85, 32], found [84, 32]"],
        ),
        (
            "balanced",
            ENCODER,
            "attention_bias",
            || json!(true),
            &["encoder: model.layers.0.self_attn.q_proj.bias: missing (expected shape [48])"],
        ),
        ("balanced", ENCODER, "num_hidden_layers", || json!(2), &["layer_types: expected one entry per layer"]),
        (
            "unbalanced",
            ENCODER,
            "num_hidden_layers",
            || json!(3),
            &[
                "encoder: model.layers.3.input_layernorm.weight: expected no tensor of this name, found one of shape [48]",
            ],
        ),
        (
            "balanced",
            "decoder/generation_config.json",
            "bos_token_id",
            || json!("<bos>"),
            &["bos_token_id: expected a token id, found \"<bos>\""],
        ),
        (
            "balanced",
            "decoder/generation_config.json",
            "eos_token_id",
            || json!([1, -1]),
            &["eos_token_id: expected a token id or a list of them, found [1,-1]"],
        ),
        (
            "balanced",
            "decoder/tokenizer.json",
            "stub",
            || json!("another"),
            &[
                "tokenizer.json: expected the same in both checkpoints",
                "(encoder)",
                "(decoder)",
                "choose one with --tokenizer-from",
            ],
        ),
    ];
    check_all(
        cases,
        |(_, _, field, ..)| field,
        |(name, file, field, value, says)| {
            let sources = Sources::of(name);
            set(sources.scratch.path(), file, &[(&format!("/{field}"), value())]);
            sources.refuse(&[], says)
        },
    );
}

/// Changes the sources.
type Change = fn(&Path, &Path);

#[test]
fn checkpoints_that_do_not_go_together_are_refused() {
    let cases: &[(&str, &str, Change, &[&str], &[&str])] = &[
        (
            "widths for a copy",
            "unbalanced",
            |_, _| {},
            &["--cross-init=copy"],
            &["decoder: hidden_size: expected the encoder's hidden_size (48)", "found 32"],
        ),
        (
            "a tensor is missing, and one has another name",
            "balanced",
            |encoder, _| {
                tensors(encoder, |all| {
                    let norm = all.remove(NORM).expect("every checkpoint has it");
                    all.insert("model.morn.weight".into(), norm);
                });
            },
            &[],
            &[
                "encoder: model.norm.weight: missing (expected shape [32])",
                "encoder: model.morn.weight: expected no tensor of this name, found one of shape [32]",
            ],
        ),
        (
            "both forms of a name",
            "balanced",
            |_, decoder| {
                tensors(decoder, |all| {
                    all.insert("norm.weight".into(), all[NORM].clone());
                });
            },
            &[],
            &["decoder: norm.weight: expected no tensor of this name, found one of shape [32]"],
        ),
        (
            "a shape",
            "balanced",
            |_, decoder| {
                tensors(decoder, |all| all.get_mut(NORM).expect("there").1 = vec![4, 8]);
            },
            &[],
            &["decoder: model.norm.weight: expected shape [32], found [4, 8]"],
        ),
        (
            "a dtype",
            "balanced",
            |_, decoder| {
                tensors(decoder, |all| all.get_mut(NORM).expect("there").0 = Dtype::I32);
            },
            &[],
            &["decoder: ", "model.norm.weight: expected F32, BF16 or F16, found I32"],
        ),
        (
            "a head of another shape",
            "untied",
            |_, decoder| {
                tensors(decoder, |all| all.get_mut("lm_head.weight").expect("there").1 = vec![32, 84]);
            },
            &[],
            &["decoder: lm_head.weight: expected shape [84, 32], found [32, 84]"],
        ),
        (
            "an untied model without its head",
            "balanced",
            |_, decoder| set(decoder, "config.json", &[("/tie_word_embeddings", json!(false))]),
            &[],
            &["decoder: lm_head.weight: missing (tie_word_embeddings is false; expected shape [84, 32])"],
        ),
        (
            "no token that starts",
            "balanced",
            |_, decoder| {
                set(decoder, "config.json", &[("/bos_token_id", json!(null))]);
                remove(decoder, "generation_config.json");
            },
            &[],
            &["decoder: ", "bos_token_id: expected a token id, found null"],
        ),
        (
            "no token that ends",
            "balanced",
            |_, decoder| {
                set(decoder, "config.json", &[("/eos_token_id", json!(null))]);
                set(decoder, "generation_config.json", &[("/eos_token_id", json!(null))]);
            },
            &[],
            &["decoder: ", "eos_token_id: expected a token id, found null"],
        ),
        (
            "one tokenizer",
            "balanced",
            |encoder, _| remove(encoder, "tokenizer.json"),
            &[],
            &[
                "tokenizer.json: expected the same in both checkpoints, found different ones: no file (encoder), 18 bytes (decoder)",
            ],
        ),
        (
            "another SentencePiece model",
            "balanced",
            |encoder, _| write(encoder, "tokenizer.model", [8, 1]),
            &[],
            &[
                "tokenizer.model: expected the same in both checkpoints, found different ones: 2 bytes (encoder), no file (decoder)",
            ],
        ),
        (
            "a pointer to the tokenizer",
            "balanced",
            |encoder, _| write(encoder, "tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"),
            &["--tokenizer-from=encoder"],
            &["/encoder/tokenizer.json: ", "a Git LFS pointer"],
        ),
        (
            "a missing file of weights",
            "unbalanced",
            |encoder, _| remove(encoder, "model-00002-of-00004.safetensors"),
            &[],
            &["encoder: ", "model-00002-of-00004.safetensors: expected a file with", "found nothing"],
        ),
        (
            "no weights",
            "balanced",
            |encoder, _| remove(encoder, "model.safetensors"),
            &[],
            &["encoder: ", "expected model.safetensors or model.safetensors.index.json, found neither"],
        ),
        (
            "no configuration",
            "balanced",
            |_, decoder| remove(decoder, "config.json"),
            &[],
            &["decoder: ", "config.json: expected a file, found nothing"],
        ),
        (
            "no folder",
            "balanced",
            |_, decoder| fs::rename(decoder, decoder.with_file_name("moved")).expect("renamed"),
            &[],
            &["decoder: ", "expected a checkpoint folder, found nothing"],
        ),
        (
            "half of a file",
            "balanced",
            |_, decoder| edit(decoder, "model.safetensors", |bytes| bytes.truncate(bytes.len() / 2)),
            &[],
            &["decoder: ", "expected a complete safetensors file"],
        ),
    ];
    check_all(
        cases,
        |case| case.0,
        |(_, name, change, arguments, says)| {
            let sources = Sources::of(name);
            change(&sources.path("encoder"), &sources.path("decoder"));
            refused(&sources.adapt(arguments), says)?;
            if sources.path("out").exists() { Err("there is an output".to_string()) } else { Ok(()) }
        },
    );
}

/// The vocabularies differ in sources that are each as their configurations say.
#[test]
fn vocabularies_must_have_the_same_size() {
    let sources = Sources::of("balanced");
    let decoder = sources.path("decoder");
    set(&decoder, "config.json", &[("/vocab_size", json!(42))]);
    tensors(&decoder, |all| {
        let (_, shape, bytes) = all.get_mut("model.embed_tokens.weight").expect("there");
        shape[0] = 42;
        bytes.truncate(bytes.len() / 2);
    });
    let says = ["decoder: vocab_size: expected the encoder's vocab_size (84), found 42"];
    sources.refuse(&[], &says).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[test]
fn a_t5gemma_checkpoint_is_none_of_gemma_2() {
    let scratch = tempfile::tempdir().expect("a temporary folder can be made");
    let checkpoint = fixture("tiny-balanced").join("checkpoint");
    let mut command = program("t5gemma-export");
    command.arg("adapt").args([&checkpoint, &checkpoint, &scratch.path().join("out")]);
    let says = [
        "encoder: ",
        "config.json: model_type: expected \"gemma2\", found \"t5gemma\" (it is an encoder-decoder already)",
    ];
    let checked = refused(&command.output().expect("starts"), &says);
    checked.and_then(|()| holds(scratch.path(), &[])).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[test]
fn invalid_options_of_adapt_are_refused() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["--std=-1"], &["--std", "expected a number of at least 0"]),
        (&["--std=nan"], &["--std", "expected a number of at least 0"]),
        (&["--seed=-1"], &["--seed"]),
        (&["--seed=18446744073709551616"], &["--seed"]),
        (&["--cross-init=zeros"], &["--cross-init", "copy-qo"]),
        (&["--cross-norms=zeros"], &["--cross-norms", "closed"]),
        (&["--dtype=int8"], &["--dtype", "bfloat16"]),
        (&["--max-shard-size=big"], &["--max-shard-size"]),
        (&["--tokenizer-from=both"], &["--tokenizer-from"]),
        (&["another"], &["another"]),
    ];
    let sources = Sources::of("balanced");
    check_all(
        cases,
        |(arguments, _)| arguments[0],
        |(arguments, says)| {
            refused_with(&sources.adapt(arguments), 2, says)?;
            holds(sources.scratch.path(), &["decoder", "encoder"])
        },
    );
}

/// What is where the output should be, and what is said.
type OutputCase = (&'static str, fn(&Path), &'static [&'static str]);

#[test]
fn what_is_there_is_not_replaced_by_an_adaptation() {
    let cases: &[OutputCase] = &[
        (
            "a folder with something in it",
            |out| write(&folder(out), "thesis.txt", "years"),
            &["/out: exists and is not empty; choose another folder"],
        ),
        (
            "a file",
            |out| fs::write(out, "years").expect("writable"),
            &["/out: expected a folder or nothing, found a file"],
        ),
    ];
    check_all(
        cases,
        |case| case.0,
        |(_, before, says)| {
            let sources = Sources::of("balanced");
            before(&sources.path("out"));
            let output = sources.adapt(&[]);
            refused(&output, says)?;
            if String::from_utf8_lossy(&output.stderr).contains("--overwrite") {
                return Err("adapt has no --overwrite".to_string());
            }
            holds(sources.scratch.path(), &["decoder", "encoder", "out"])
        },
    );
    // An empty folder is nothing.
    let sources = Sources::of("balanced");
    folder(&sources.path("out"));
    assert!(sources.adapt(&[]).status.success());
    holds(&sources.path("out"), &["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"])
        .unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[cfg(unix)]
#[test]
fn an_adaptation_that_cannot_be_written_leaves_nothing_behind() {
    let sources = Sources::of("balanced");
    for (prepare, out, says) in [
        // The limit's signal is ignored, so that writing fails as on a full disk.
        (
            "trap '' XFSZ; ulimit -f 100",
            "models/out",
            &["model.safetensors: cannot be written (274432 bytes are needed in all)"][..],
        ),
        ("", "encoder/config.json/out", &["cannot be created"]),
        #[cfg(target_os = "linux")]
        ("", "../../../../../proc/out", &["/proc/.out.partial-"]),
    ] {
        let output = Command::new("sh")
            .args(["-c", &format!("{prepare}\n\"$0\" adapt \"$1\" \"$2\" \"$3\"")])
            .arg(program("t5gemma-export").get_program())
            .args([sources.path("encoder"), sources.path("decoder"), sources.path(out)])
            .output()
            .expect("a shell runs");
        let checked = refused(&output, says);
        checked
            .and_then(|()| holds(sources.scratch.path(), &["decoder", "encoder"]))
            .unwrap_or_else(|wrong| panic!("{out}: {wrong}"));
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_adaptation_leaves_nothing_behind() {
    let sources = Sources::of("balanced");
    // A checkpoint of two gigabytes that takes no space: an embedding of zeros at the end of its file.
    let (encoder, rows) = (sources.path("encoder"), 16 << 20);
    set(&encoder, "config.json", &[("/vocab_size", json!(rows))]);
    edit(&encoder, "model.safetensors", |bytes| {
        let length = u64::from_le_bytes(*bytes.first_chunk().expect("a header")) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("JSON");
        let end = (bytes.len() - 8 - length) as u64;
        let old = header["model.embed_tokens.weight"]["data_offsets"].clone();
        // The old table stays as a tensor that nobody reads.
        header["score.weight"] = json!({"dtype": "F32", "shape": [84, 32], "data_offsets": old});
        let offsets = [end, end + rows * 32 * 4];
        header["model.embed_tokens.weight"] = json!({"dtype": "F32", "shape": [rows, 32], "data_offsets": offsets});
        let header = header.to_string().into_bytes();
        *bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + length..]].concat();
    });
    let file = fs::File::options().write(true).open(encoder.join("model.safetensors")).expect("there");
    file.set_len(file.metadata().expect("there").len() + rows * 32 * 4).expect("sparse");
    let child = program("t5gemma-export")
        .arg("adapt")
        .args([&encoder, &encoder, &sources.path("models/out")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let weights = sources.path(&format!("models/.out.partial-{}/model.safetensors", child.id()));
    let started = Instant::now();
    while !fs::metadata(&weights).is_ok_and(|weights| weights.len() > 0) {
        assert!(started.elapsed() < Duration::from_secs(600), "{} does not grow", weights.display());
        std::thread::sleep(Duration::from_millis(1));
    }
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(sent.success());
    let output = child.wait_with_output().expect("the program ends");
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "t5gemma-export: interrupted; no output was left behind\n");
    holds(sources.scratch.path(), &["decoder", "encoder"]).unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// A new folder.
fn folder(path: &Path) -> PathBuf {
    fs::create_dir(path).expect("a new folder can be made");
    path.to_path_buf()
}
