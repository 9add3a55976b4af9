//! What `t5gemma-export adapt` refuses: each error names the side, the field or tensor, and both values.

mod configurations;

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

/// What is wrong, the fixture, the change to the folders of encoder and decoder, arguments, and what is said.
type SourcesCase = (&'static str, &'static str, fn(&Path, &Path), &'static [&'static str], &'static [&'static str]);

#[test]
fn checkpoints_that_do_not_go_together_are_refused() {
    let cases: &[SourcesCase] = &[
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
