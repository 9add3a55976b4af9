//! T5Gemma-TTS and the options behind it: float positions, rotary cross-attention, tables and heads of the checkpoint's
//! own. The references are those of `make_voice_fixture.py`.

use std::ffi::OsString;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use ndarray::ArrayD;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::{CacheLayout, DType, Logits};
use t5gemma_graphs::onnx::Blocks;
use t5gemma_graphs::quantization::Quantization;
use t5gemma_graphs::task::{Features, Task};
use t5gemma_runtime::{
    Batch, Cancellation, Controls, Encoder, Engine, EngineOptions, Event, FinishReason, Hypothesis, Model, PollResult,
    Request, verify,
};
use tempfile::tempdir;

use crate::common::{exported as stock, exported_from, fixture as stock_fixture, program, python, run, stdout, tests};
use crate::tasks::{Golden, check_close};

/// With positions that say how far a sequence has come, and with those of T5Gemma.
const FIXTURES: [&str; 2] = ["progress", "integer"];
/// The targets that run on a CPU.
const TARGETS: [Target; 3] = [Target::Portable, Target::Cpu, Target::Cuda];
/// The end token, which the cases suppress.
const END: i64 = 73;
const TOLERANCE: f32 = 5e-4;

fn fixture(name: &str) -> PathBuf {
    tests().join("fixtures/voice").join(name)
}

fn golden(name: &str) -> Golden {
    Golden::read(&fixture(name).join("golden.safetensors"))
}

fn exported(name: &str, target: Target) -> PathBuf {
    let label = format!("voice-{name}-{}", target.name());
    let export = Export::default().target(target).dtype(DType::Float32);
    exported_from(&fixture(name).join("checkpoint"), &label, export)
}

fn opened(name: &str, target: Target) -> Model {
    Model::open(exported(name, target)).expect("opens")
}

fn totals(name: &str) -> Vec<i64> {
    golden(name).integers("in.progress_total").iter().copied().collect()
}

/// The sources of a fixture with the estimates of their targets.
fn batch(name: &str) -> Batch {
    let [ids, mask] =
        ["in.input_ids", "in.attention_mask"].map(|tensor| golden(name).integers(tensor).iter().copied().collect());
    let totals = totals(name);
    let batch = Batch::flat(totals.len(), ids, mask).expect("a batch");
    batch.with_progress_totals(&totals).expect("one for each row")
}

/// The rows without their padding, as requests of their own.
fn rows(name: &str) -> Vec<Batch> {
    let (batch, length) = (batch(name), batch(name).length());
    let visible = |row: usize| batch.mask()[row * length..][..length].iter().filter(|&&visible| visible != 0).count();
    let alone = |(row, total): (usize, i64)| {
        let ids = batch.ids()[row * length..][..visible(row)].to_vec();
        let alone = Batch::padded(&[ids], 0).expect("a batch");
        alone.with_progress_totals(&[total]).expect("one row")
    };
    totals(name).into_iter().enumerate().map(alone).collect()
}

fn generated(model: &Model, batch: &Batch, options: Value) -> Vec<Vec<Hypothesis>> {
    let options = model.generation_config().with_json(options.as_object().expect("an object")).expect("valid");
    model.generate_batch(batch, &options, Controls::default()).expect("generates")
}

fn tokens(rows: &[Vec<Hypothesis>]) -> Vec<Vec<i64>> {
    rows.iter().map(|row| row[0].tokens.clone()).collect()
}

fn expected_tokens(name: &str) -> Vec<Vec<i64>> {
    let cases: Value =
        serde_json::from_str(&fs::read_to_string(fixture(name).join("cases.json")).expect("is there")).expect("JSON");
    serde_json::from_value(cases["greedy"]["tokens"].clone()).expect("rows of tokens")
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|logit| (logit - most).exp()).sum();
    logits.iter().map(|logit| logit - most - sum.ln()).collect()
}

#[test]
fn states_and_scores_are_those_of_the_reference() {
    for name in FIXTURES {
        let (golden, batch, totals) = (golden(name), batch(name), totals(name));
        let states = golden.floats("encoder_last_hidden_state");
        let logits = golden.floats("logits");
        let targets = golden.integers("in.target_ids");
        let targets: Vec<Vec<i64>> = targets.outer_iter().map(|row| row.iter().copied().skip(1).collect()).collect();
        let vocabulary = logits.shape()[2];
        for target in TARGETS {
            let what = format!("{name} {}", target.name());
            let model = opened(name, target);
            let found = model.encode(&batch, &Cancellation::new()).expect("encodes").into_dyn();
            check_close(&what, &found, &states, Some(batch.mask()));

            let scores = model.score(&batch, &targets, vocabulary, &Cancellation::new()).expect("scores");
            for (row, score) in scores.iter().enumerate() {
                for (at, top) in score.logprobs.top.iter().enumerate() {
                    let mut found = vec![f32::NAN; vocabulary];
                    top.iter().for_each(|&(token, logprob)| found[token as usize] = logprob);
                    let expected: Vec<f32> = (0..vocabulary).map(|token| logits[[row, at, token]]).collect();
                    for (token, (found, expected)) in found.iter().zip(log_softmax(&expected)).enumerate() {
                        let difference = (found - expected).abs();
                        assert!(
                            difference <= TOLERANCE,
                            "{what}: row {row}, position {at}, token {token}: {difference}"
                        );
                    }
                }
            }
            assert_eq!(scores.len(), totals.len());
        }
        // Other programs pass the positions themselves.
        let portable = exported_from(
            &fixture(name).join("checkpoint"),
            &format!("voice-{name}-all"),
            Export::default().logits(Logits::All),
        );
        python("check_custom.py", [fixture(name), PathBuf::from(format!("logits={}", portable.display()))]);
    }
}

#[test]
fn greedy_frames_are_those_of_the_reference_alone_and_in_a_batch() {
    for name in FIXTURES {
        let expected = expected_tokens(name);
        let steps = expected[0].len();
        let options = json!({"suppress_tokens": [END], "max_new_tokens": steps});
        for target in TARGETS {
            let model = opened(name, target);
            assert_eq!(tokens(&generated(&model, &batch(name), options.clone())), expected, "{name} {}", target.name());
            for (alone, expected) in rows(name).iter().zip(&expected) {
                assert_eq!(tokens(&generated(&model, alone, options.clone()))[0], *expected, "{name} alone");
            }
            // In JSON lines: all rows in one request, and a request for each.
            let rows = |batch: &Batch| batch.ids().chunks(batch.length()).map(<[i64]>::to_vec).collect::<Vec<_>>();
            let whole = batch(name);
            let mask: Vec<&[i64]> = whole.mask().chunks(whole.length()).collect();
            let mut lines =
                vec![json!({"input_ids": rows(&whole), "attention_mask": mask, "progress_total": totals(name),
                "options": options})];
            for (alone, total) in self::rows(name).iter().zip(totals(name)) {
                lines.push(json!({"input_ids": rows(alone)[0], "progress_total": total, "options": options}));
            }
            let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
            let arguments: [OsString; 3] = ["generate".into(), exported(name, target).into(), "--jsonl".into()];
            let answers = stdout(run("t5gemma", arguments, lines));
            let answers: Vec<Value> =
                answers.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect();
            let found = |answer: &Value| -> Vec<Vec<i64>> {
                let sequences = answer["sequences"].as_array().unwrap_or_else(|| panic!("{answer}"));
                sequences.iter().map(|row| serde_json::from_value(row[0]["tokens"].clone()).expect("ids")).collect()
            };
            assert_eq!(found(&answers[0]), expected);
            for (answer, expected) in answers[1..].iter().zip(&expected) {
                assert_eq!(found(answer), std::slice::from_ref(expected));
                assert!(answer["sequences"][0][0].get("text").is_none(), "frames are no text: {answer}");
            }
        }
    }
}

/// Rows leave and their beams change places, each with the positions of its own estimate.
#[test]
fn rows_of_different_estimates_get_the_same_alone_in_a_batch_and_in_an_engine() {
    for (name, target) in [
        ("progress", Target::Cpu),
        ("progress", Target::Portable),
        ("progress", Target::Cuda),
        ("integer", Target::Cpu),
    ] {
        let model = Arc::new(opened(name, target));
        let engine = Engine::new(model.clone(), EngineOptions::default()).expect("an engine");
        for options in [
            json!({"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 15, "length_penalty": 0.3}),
            json!({"do_sample": true, "seed": 4, "num_return_sequences": 2, "temperature": 1.5, "max_new_tokens": 25}),
            json!({"do_sample": true, "seed": 5, "num_beams": 2, "max_new_tokens": 12}),
            json!({"max_new_tokens": 20, "sequence_bias": [[[END], 9.0]], "min_new_tokens": 2}),
        ] {
            let together = generated(&model, &batch(name), options.clone());
            let alone: Vec<Vec<Hypothesis>> =
                rows(name).iter().map(|row| generated(&model, row, options.clone()).remove(0)).collect();
            let config = model.generation_config().with_json(options.as_object().expect("one")).expect("valid");
            let mut requests: Vec<_> = rows(name)
                .into_iter()
                .map(|row| engine.submit(Request::new(row, config.clone())).expect("admitted"))
                .collect();
            for (row, request) in requests.iter_mut().enumerate() {
                let mut found = Vec::new();
                loop {
                    match request.next_timeout(Duration::from_secs(60)) {
                        PollResult::Event(Ok(Event::Row { hypotheses, .. })) => found = hypotheses,
                        PollResult::Event(Ok(_)) => {}
                        PollResult::Ended => break,
                        other => panic!("{other:?}"),
                    }
                }
                let in_engine: Vec<_> = found.iter().map(|hypothesis| &hypothesis.tokens).collect();
                let on_its_own: Vec<_> = alone[row].iter().map(|hypothesis| &hypothesis.tokens).collect();
                assert_eq!(in_engine, on_its_own, "{name} {} {options}", target.name());
            }
            // Draws depend on the place in a batch, so that rows alone draw others.
            if options.get("do_sample").is_none() {
                assert_eq!(tokens(&together), tokens(&alone), "{name} {} {options}", target.name());
            }
        }
        let checks = verify::consistency(&model, None, &Cancellation::new()).expect("runs");
        assert!(checks.iter().all(|check| check.largest <= check.limit), "{checks:?}");
    }
}

/// In the head and in projections.
#[test]
fn quantized_heads_may_have_biases() {
    let checkpoints = [fixture("progress"), fixture("integer"), stock_fixture("tiny-bias")];
    for (checkpoint, bits) in checkpoints.iter().flat_map(|checkpoint| [8, 4].map(|bits| (checkpoint, bits))) {
        let blocks = Some(Blocks::integer(bits, 16));
        let quantization = Quantization { encoder: blocks, decoder: blocks, head: blocks, ..Quantization::default() };
        let export = Export::default().target(Target::Cpu).quantization(quantization);
        let name = checkpoint.file_name().expect("it has a name").display();
        let label = format!("voice-{name}-int{bits}");
        let model = Model::open(exported_from(&checkpoint.join("checkpoint"), &label, export)).expect("opens");
        let checks = verify::consistency(&model, None, &Cancellation::new()).expect("runs");
        assert!(checks.iter().all(|check| check.largest <= check.limit), "{label}: {checks:?}");
    }
}

#[test]
fn positions_decide_what_is_generated() {
    let model = opened("progress", Target::Cpu);
    let [short, long] = [12, 100].map(|total| {
        let source = rows("progress").remove(0).with_progress_totals(&[total]).expect("one row");
        tokens(&generated(&model, &source, json!({"suppress_tokens": [END], "max_new_tokens": 12}))).remove(0)
    });
    assert_ne!(short, long);
    // Left padding shifts nothing: positions count the tokens that are not padding.
    let source = batch("progress").source(0)[..7].to_vec();
    let padded = [vec![0, 0], source.clone()].concat();
    let left = Batch::masked(&[padded], &[[vec![0, 0], vec![1; 7]].concat()]).expect("a batch");
    let right = Batch::padded(&[source], 0).expect("a batch");
    let [left, right] = [left, right].map(|batch| batch.with_progress_totals(&[20]).expect("one row"));
    let options = json!({"suppress_tokens": [END], "max_new_tokens": 12});
    assert_eq!(tokens(&generated(&model, &left, options.clone())), tokens(&generated(&model, &right, options)));
}

/// The published loop's rules, as far as they are the model's options.
#[test]
fn targets_end_by_the_rules_of_the_model() {
    for name in FIXTURES {
        let model = opened(name, Target::Cpu);
        let (batch, totals) = (batch(name), totals(name));
        // Half a second beyond the estimate, and the token that is too much.
        for (row, total) in generated(&model, &batch, json!({"suppress_tokens": [END]})).iter().zip(&totals) {
            assert_eq!(row[0].tokens.len() as i64, total - 1 + 25 + 1, "{name}");
            assert_eq!(row[0].finish_reason, FinishReason::Length);
        }
        // A prompt is part of the estimate.
        let prompts = vec![vec![5, 6, 7]; totals.len()];
        let prompted = batch.clone().with_decoder_input_ids(&prompts).expect("one for each row");
        let found = generated(&model, &prompted, json!({"suppress_tokens": [END]}));
        assert_eq!(found[0][0].tokens.len() as i64, totals[0] - 4 + 26);
        assert_eq!(generated(&model, &batch, json!({"max_new_tokens": 4}))[0][0].tokens.len(), 4);
        // No end within a fifth of a second, ten tokens.
        let eager = json!({"sequence_bias": [[[END], 100.0]]});
        assert_eq!(generated(&model, &batch, eager)[0][0].tokens.len(), 11);
        // Drawn from flat scores, the end comes where it would come greedily, and otherwise mostly later: 75 tokens are
        // as likely.
        let sampled = |seed: u64, ends: bool| {
            let options = json!({"do_sample": true, "seed": seed, "temperature": 1e4, "top_k": 0, "top_p": 1.0,
                "sequence_bias": [[[END], 100.0]], "max_new_tokens": 30, "eos_on_argmax": ends});
            generated(&model, &batch, options)[0][0].tokens.len()
        };
        assert!((0..8).all(|seed| sampled(seed, true) == 11), "{name}");
        assert!((0..8).filter(|&seed| sampled(seed, false) > 11).count() >= 6, "{name}");
        let config = model.generation_config();
        assert_eq!((config.temperature, config.top_k, config.top_p), (0.8, 30, 0.9));
        assert!(!config.do_sample && config.eos_on_argmax);
    }
}

#[test]
fn what_does_not_fit_the_model_is_refused_by_name() {
    let model = exported("progress", Target::Cpu);
    let answer = |line: Value| {
        let arguments = ["generate".as_ref(), model.as_os_str(), "--jsonl".as_ref()];
        let output = run("t5gemma", arguments, format!("{line}\n"));
        let answer: Value = serde_json::from_slice(&output.stdout).expect("a JSON line");
        answer["error"].as_str().unwrap_or_else(|| panic!("{answer}")).to_string()
    };
    for (line, expected) in [
        (json!({"input_ids": [5, 6]}), "progress_total[0]: expected an estimate of the target's length in tokens"),
        (json!({"input_ids": [5], "progress_total": "9"}), "progress_total: expected an integer or a list of integers"),
        (
            json!({"input_ids": [5], "progress_total": [9, 9]}),
            "progress_total: expected 1 lengths, as many as input_ids",
        ),
        (json!({"input_ids": [5], "progress_total": 0}), "progress_total[0]: expected a length of at least 1, found 0"),
        (
            json!({"input_ids": [5], "progress_total": 2, "decoder_input_ids": [1, 2]}),
            "progress_total[0]: expected at least 3, the length of the decoder prompt, found 2",
        ),
        (json!({"input_ids": [60], "progress_total": 9}), "input_ids[0][0]: expected a token id below 60"),
        (
            json!({"input_ids": [5], "progress_total": 9, "decoder_input_ids": [75]}),
            "decoder_input_ids[0][0]: expected a token id below 75",
        ),
        (
            json!({"input_ids": [5], "progress_total": 9, "options": {"regex": "a"}}),
            "options.regex requires a model whose targets are text",
        ),
        (
            json!({"input_ids": [5], "progress_total": 9, "options": {"prompt_lookup_num_tokens": 2}}),
            "options.prompt_lookup_num_tokens requires a model whose targets are text",
        ),
        (
            json!({"input_ids": [5], "progress_total": 9, "options": {"do_sample": true, "num_beams": 2, "eos_on_argmax": true}}),
            "options.eos_on_argmax requires num_beams 1 (got 2)",
        ),
        (json!({"input_ids": [5], "progress_total": 9, "decoder_text": "a"}), "the model's targets are not text"),
    ] {
        let found = answer(line.clone());
        assert!(found.contains(expected), "{line}\n{found}\n{expected}");
    }
    let model = Model::open(stock("tiny-balanced")).expect("opens");
    let estimated = Batch::padded(&[[5, 6]], 0).and_then(|batch| batch.with_progress_totals(&[9])).expect("a batch");
    let error =
        model.generate_batch(&estimated, model.generation_config(), Controls::default()).expect_err("of no use");
    assert_eq!(
        error.to_string(),
        "progress_total[0]: expected none (the model's targets have no expected length), found 9"
    );
}

#[test]
fn the_encoder_alone_has_the_same_states() {
    let (golden, batch) = (golden("progress"), batch("progress"));
    for target in [Target::Portable, Target::Cpu] {
        let export = Export::default().target(target).dtype(DType::Float32);
        let export = export.task(Task::FeatureExtraction(Features::default()));
        let label = format!("voice-encoder-{}", target.name());
        let folder = exported_from(&fixture("progress").join("checkpoint"), &label, export);
        for folder in [folder, exported("progress", target)] {
            let found = Encoder::open(folder).expect("opens").encode(&batch, &Cancellation::new()).expect("encodes");
            let states: ArrayD<f32> = golden.floats("encoder_last_hidden_state");
            check_close(target.name(), &found.into_dyn(), &states, Some(batch.mask()));
        }
    }
}

/// Runs the exporter and returns what it says.
fn export(checkpoint: &Path, out: &Path, arguments: &[&str]) -> Result<(), String> {
    let output = program("t5gemma-export").arg("-q").args(arguments).arg(checkpoint).arg(out).output().expect("starts");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// The checkpoint as another project may save it: with another `model_type`, and everything below a prefix.
fn foreign(folder: &Path) {
    fs::create_dir_all(folder).expect("made");
    let checkpoint = fixture("progress").join("checkpoint");
    let config = fs::read_to_string(checkpoint.join("config.json")).expect("is there");
    fs::write(folder.join("config.json"), config.replace("t5gemma_voice", "my_voice")).expect("written");
    let bytes = fs::read(checkpoint.join("model.safetensors")).expect("is there");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let renamed = file.tensors().into_iter().map(|(name, view)| {
        let name = name.strip_prefix("backbone.").map_or(name.clone(), |rest| format!("x.t5.{rest}"));
        let view = TensorView::new(Dtype::F32, view.shape().to_vec(), view.data()).expect("as it was");
        (name, view)
    });
    let bytes = safetensors::serialize(renamed.collect::<Vec<_>>(), None).expect("well-formed");
    fs::write(folder.join("model.safetensors"), bytes).expect("written");
}

const HEAD: &str =
    "mlp:predict_layer.0.0.weight,predict_layer.0.0.bias,gelu,predict_layer.0.2.weight,predict_layer.0.2.bias";

#[test]
fn the_preset_is_its_options() {
    let folder = tempdir().expect("a folder");
    let (checkpoint, out) = (folder.path().join("checkpoint"), folder.path().join("model"));
    foreign(&checkpoint);
    let refused = export(&checkpoint, &out, &[]).expect_err("an unknown model");
    assert!(
        refused.contains("model_type: expected \"t5gemma\" or \"t5gemma2\" or \"t5gemma_voice\", found \"my_voice\""),
        "{refused}"
    );
    let options = [
        "--target",
        "cpu",
        "--weights-prefix",
        "x.t5.",
        "--source-positions",
        "float",
        "--target-positions",
        "float",
        "--cross-rope",
        "--decoder-embedding",
        "audio_embedding.0.weight",
        "--head",
        HEAD,
        "--head-softcap",
        "off",
    ];
    export(&checkpoint, &out, &options).expect("exports");
    let preset = exported("progress", Target::Cpu);
    for file in ["encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx", "model.onnx_data"] {
        let [found, expected] = [&out, &preset].map(|folder| fs::read(folder.join(file)).expect("is there"));
        assert!(found == expected, "{file} differs");
    }
    // Such a model is for a loop of its own.
    let model = Model::open(&out).expect("opens");
    let batch = Batch::padded(&[[5, 6]], 0).expect("a batch");
    let error = model.encode(&batch, &Cancellation::new()).expect_err("positions are the caller's");
    assert!(error.to_string().contains("a loop of the caller's own: its source positions are an input"), "{error}");
}

#[test]
fn custom_interfaces_compute_what_they_say() {
    let folder = tempdir().expect("a folder");
    let checkpoint = fixture("progress").join("checkpoint");
    let silu = HEAD.replace("gelu", "silu");
    for target in ["portable", "cuda"] {
        let mut models = Vec::new();
        for (kind, flags) in [
            ("embeds", vec!["--inputs-embeds", "encoder,decoder"]),
            ("states", vec!["--head", "none"]),
            ("linear", vec!["--head", "linear:predict_layer.0.2.weight,predict_layer.0.2.bias"]),
            ("silu", vec!["--head", &silu]),
        ] {
            let out = folder.path().join(format!("{kind}-{target}"));
            let arguments = [vec!["--all-logits", "--target", target, "--dtype", "float32"], flags].concat();
            export(&checkpoint, &out, &arguments).expect("exports");
            models.push(format!("{kind}={}", out.display()));
        }
        let fixture = fixture("progress").display().to_string();
        python("check_custom.py", [vec![fixture], models].concat());
    }
    let batch = Batch::padded(&[[5, 6]], 0).and_then(|batch| batch.with_progress_totals(&[9])).expect("a batch");
    for (kind, expected) in [("embeds", "its encoder reads inputs_embeds"), ("states", "its decoder has no head")] {
        let model = Model::open(folder.path().join(format!("{kind}-portable"))).expect("opens");
        let generated = model.generate_batch(&batch, model.generation_config(), Controls::default());
        let error = generated.expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
    let inspected = stdout(run("t5gemma-export", ["inspect".into(), folder.path().join("embeds-portable")], ""));
    assert!(inspected.contains("interface   the encoder reads inputs_embeds"), "{inspected}");
}

#[test]
fn inspect_says_which_fast_operators_are_left_aside() {
    let inspected = |name: &str| stdout(run("t5gemma-export", ["inspect".into(), exported(name, Target::Cpu)], ""));
    let progress = inspected("progress");
    for line in [
        "left aside  GroupQueryAttention and a cache in place (they rotate by integer positions)",
        "interface   rotary positions in cross-attention",
        "vocabulary 75",
    ] {
        assert!(progress.contains(line), "{line}\n{progress}");
    }
    // Heads of 16 suit the operator, which the other model has.
    let operators = |text: &str| text.contains("com.microsoft.GroupQueryAttention ");
    assert!(!operators(&progress) && operators(&inspected("integer")));
    assert_eq!(opened("integer", Target::Cpu).manifest().cache, CacheLayout::InPlace);
    assert_eq!(opened("progress", Target::Cpu).manifest().cache, CacheLayout::Growing);
}

#[test]
fn exports_that_cannot_be_are_refused() {
    let folder = tempdir().expect("a folder");
    let (out, checkpoint) = (folder.path().join("model"), fixture("progress").join("checkpoint"));
    let kept = folder.path().join("kept.json");
    fs::write(&kept, "[1, 2, 73]").expect("written");
    let kept = kept.to_str().expect("UTF-8");
    let stock = stock_fixture("tiny-balanced").join("checkpoint");
    let cases: [(&Path, Vec<&str>, &str); 10] = [
        (
            &checkpoint,
            vec!["--target", "tensorrt"],
            "--target: expected portable, cpu or cuda for a model with float positions",
        ),
        (&checkpoint, vec!["--observe"], "--observe: expected a model without float positions"),
        (&checkpoint, vec!["--keep-tokens", kept], "expected a model with T5Gemma's own head and target vocabulary"),
        (&checkpoint, vec!["--head", "none", "--candidates", "4"], "--candidates: expected a model with a head"),
        (
            &checkpoint,
            vec!["--weights-prefix", "trunk."],
            "tensors whose names begin with the weights prefix \"trunk.\"",
        ),
        (&checkpoint, vec!["--task", "text-classification"], "--task: expected text2text-generation"),
        (&checkpoint, vec!["--head", "mlp:a,b,relu,c,d"], "expected linear:W, linear:W,B, mlp:W1,B1,ACTIVATION,W2,B2"),
        (&stock, vec!["--decoder-embedding", "missing"], "--decoder-embedding: expected a tensor of"),
        (
            &stock,
            vec!["--head", "linear:model.encoder.norm.weight"],
            "--head: expected model.encoder.norm.weight of shape [rows, ",
        ),
        (
            &stock,
            vec!["--head", "linear:model.decoder.layers.0.self_attn.q_proj.weight"],
            "rows, as the table of target tokens has",
        ),
    ];
    for (checkpoint, arguments, expected) in cases {
        let refused = export(checkpoint, &out, &arguments).expect_err(expected);
        assert!(refused.contains(expected), "{arguments:?}\n{refused}\n{expected}");
        assert!(!out.exists(), "{arguments:?}");
    }
}

#[test]
fn estimates_pass_through_cpp_and_python() {
    let (model, batch, totals) = (exported("progress", Target::Cpu), batch("progress"), totals("progress"));
    let (expected, installed) = (expected_tokens("progress"), crate::capi::installed());
    let rows = |numbers: &[i64]| numbers.chunks(batch.length()).map(<[i64]>::to_vec).collect::<Vec<_>>();
    let case = json!({"input_ids": rows(batch.ids()), "attention_mask": rows(batch.mask()), "progress_total": totals,
        "tokens": expected, "end": END});
    let mut python = installed.python();
    python.arg(tests().join("scripts/capi_python_voice.py")).arg(&model);
    assert_eq!(stdout(fed(python, &case.to_string())), "well\n");

    let mut cpp = Command::new(installed.program("capi/voice.cpp", "plain", &[]));
    cpp.arg(&model).args([END.to_string(), expected[0].len().to_string()]);
    let line = |(source, total): (&Batch, &i64)| {
        let ids: Vec<String> = source.ids().iter().map(i64::to_string).collect();
        format!("{total} {} {}\n", source.length(), ids.join(" "))
    };
    let lines: String = self::rows("progress").iter().zip(&totals).map(line).collect();
    let found = stdout(fed(cpp, &lines));
    let found: Vec<Vec<i64>> =
        found.lines().map(|line| line.split_whitespace().map(|id| id.parse().expect("an id")).collect()).collect();
    assert_eq!(found, expected);
}

/// Runs a command with `stdin`, which is short.
pub fn fed(mut command: Command, stdin: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    child.stdin.take().expect("piped").write_all(stdin.as_bytes()).expect("it reads");
    child.wait_with_output().expect("it ends")
}
