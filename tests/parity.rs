//! Tensors against transformers: hidden states and logits of every fixture, through `t5gemma verify` and `t5gemma encode`,
//! and half precision against what transformers itself makes of it.

use std::path::Path;

use itertools::Itertools as _;
use safetensors::SafeTensors;
use serde_json::json;
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::{DType, Logits};
use t5gemma_graphs::manifest::EncoderWindow;
use t5gemma_graphs::onnx::Blocks;
use t5gemma_graphs::quantization::Quantization;
use t5gemma_runtime::{Batch, Cancellation, Model};

use crate::common::{FIXTURES, exported, exported_as, fixture, instruction_levels, program, run, stdout};

/// In float32, where the mask is 1.
const TOLERANCE: f32 = 5e-4;

fn verify(model: &Path, golden: &Path) -> String {
    let arguments = ["verify".as_ref(), model, "--golden".as_ref(), golden];
    stdout(run("t5gemma", arguments, ""))
}

#[test]
fn every_fixture_verifies_against_its_golden_tensors() {
    for name in FIXTURES {
        let report = verify(&exported(name), &fixture(name).join("golden.safetensors"));
        for compared in ["hidden states ", "first logits", "logits of cached steps", "logits after a prompt"] {
            assert!(report.contains(compared), "{name}: {compared} in\n{report}");
        }
    }
}

#[test]
fn logits_of_all_positions_verify_too() {
    let export = Export::default().logits(Logits::All);
    let model = exported_as("tiny-balanced", "all-logits", export);
    verify(&model, &fixture("tiny-balanced").join("golden.safetensors"));
}

#[test]
fn the_exclusive_encoder_window_is_that_of_earlier_transformers() {
    for name in ["tiny-balanced", "tiny-unbalanced"] {
        let export = Export::default().encoder_window(EncoderWindow::Exclusive);
        let model = exported_as(name, "exclusive", export);
        verify(&model, &fixture(name).join("golden.safetensors"));
        check_encoded(&model, name, ".window_exclusive");
    }
}

#[test]
fn encode_writes_the_reference_hidden_states() {
    for name in FIXTURES {
        check_encoded(&exported(name), name, "");
    }
}

/// With quantized weights, activations are rounded too; if the rounding depended on the rest of the batch, the decoder
/// would see a different source.
#[test]
fn with_weights_of_few_bits_a_source_is_encoded_to_the_same_numbers_whatever_is_beside_it() {
    let levels = instruction_levels();
    for (bits, block_size) in [(8, 32), (4, 32), (8, 64), (4, 64)] {
        let blocks = Some(Blocks::integer(bits, block_size));
        let quantization = Quantization { encoder: blocks, decoder: blocks, head: blocks, ..Quantization::default() };
        let export = Export::default().target(Target::Cpu).quantization(quantization);
        let model = exported_as("tiny-balanced", &format!("verified-in-{bits}-by-{block_size}"), export);
        for level in &levels {
            let mut command = program("t5gemma");
            command.env("T5GEMMA_MAX_CPU_ISA", level).arg("verify").arg(&model);
            let output = command.output().expect("the program starts");
            // At the lowest level ONNX Runtime computes, where it has vector instructions. It adds in another order for other
            // shapes, which can round an activation of the decoder to the next integer: then logits are far apart.
            let report = match *level {
                "generic" => String::from_utf8(output.stdout).expect("UTF-8"),
                _ => stdout(output),
            };
            for compared in
                ["hidden states: ragged batch = its rows alone", "hidden states: left padding = right padding"]
            {
                let line = report.lines().find(|line| line.contains(compared)).expect("compared");
                let is_well = if *level == "generic" { line.starts_with("ok") } else { line.contains(" 0.00e0 ") };
                assert!(is_well, "{bits} bits by {block_size}, {level}: {line}");
            }
        }
    }
}

/// A symmetric matrix has no zero points, so that the bias follows two inputs that are not there.
#[test]
fn quantized_matrices_may_have_biases() {
    let states = |label: &str, quantization: Quantization| {
        let model = exported_as("tiny-bias", label, Export::default().target(Target::Cpu).quantization(quantization));
        for level in instruction_levels() {
            let mut command = program("t5gemma");
            command.env("T5GEMMA_MAX_CPU_ISA", level).arg("bench").arg(&model).args([
                "--source-length",
                "9",
                "--max-new-tokens",
                "4",
                "--repeat",
                "1",
            ]);
            stdout(command.output().expect("starts"));
        }
        let batch = Batch::padded(&[[5, 80, 7, 120, 9, 33]], 0).expect("a source");
        let states = Model::open(model).expect("opens").encode(&batch, &Cancellation::new()).expect("encodes");
        states.into_iter().collect::<Vec<f32>>()
    };
    let exact = states("biases", Quantization::default());
    let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
    for (bits, symmetric, most) in [(8, true, 0.06), (8, false, 0.06), (4, true, 0.3), (4, false, 0.3)] {
        let blocks = Some(Blocks { symmetric, ..Blocks::integer(bits, 32) });
        let quantization = Quantization { encoder: blocks, decoder: blocks, head: blocks, ..Quantization::default() };
        let found = states(&format!("biases-{bits}-{symmetric}"), quantization);
        let apart: Vec<f32> = found.iter().zip(&exact).map(|(found, exact)| found - exact).collect();
        let lost = norm(&apart) / norm(&exact);
        assert!(lost > 0.0 && lost < most, "{bits} bits, symmetric {symmetric}: {lost}");
    }
}

/// A wrong model must not verify: the goldens of another window rule are beyond the limit.
#[test]
fn verify_fails_where_the_numbers_differ() {
    let golden = fixture("tiny-balanced").join("golden.safetensors");
    let bytes = std::fs::read(golden).expect("the fixture is there");
    let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let renamed = tensors.iter().filter_map(|(name, view)| match name.strip_suffix(".window_exclusive") {
        Some(inclusive) => Some((inclusive.to_string(), view)),
        None => name.starts_with("in.").then(|| (name.to_string(), view)),
    });
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let wrong = folder.path().join("wrong.safetensors");
    let file = safetensors::serialize(renamed.collect::<Vec<_>>(), None).expect("the tensors are well-formed");
    std::fs::write(&wrong, file).expect("written");
    let model = exported("tiny-balanced");
    let output = run("t5gemma", ["verify".as_ref(), model.as_path(), "--golden".as_ref(), &wrong], "");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("FAIL hidden states"));
}

/// The fixture holds what transformers loses in bfloat16; float16 has eight times the precision, of which half is asked.
#[test]
fn float16_loses_a_quarter_of_what_transformers_loses_in_bfloat16() {
    let name = "tiny-bf16";
    let model = exported_as(name, "float16", Export::default().dtype(DType::Float16));
    let golden = std::fs::read(fixture(name).join("golden.safetensors")).expect("the fixture is there");
    let golden = SafeTensors::deserialize(&golden).expect("a safetensors file");
    let exact = floats(&golden, "enc.right.last_hidden_state");
    let theirs = floats(&golden, "hf_bf16.enc.right.last_hidden_state");
    let mask = whole(&golden, "in.right.attention_mask");
    let ours = largest_apart(&encoded(&model, &golden, "right"), &exact, &mask);
    let theirs = largest_apart(&theirs, &exact, &mask);
    assert!(ours <= theirs / 4.0, "float16 is off by {ours}, transformers in bfloat16 by {theirs}");
}

fn check_encoded(model: &Path, name: &str, suffix: &str) {
    let bytes = std::fs::read(fixture(name).join("golden.safetensors")).expect("the fixture is there");
    let golden = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let mut compared = 0;
    for input in ["right", "left", "nopad", "single", "long", "hole"] {
        if golden.tensor(&format!("enc.{input}.last_hidden_state{suffix}")).is_err() {
            continue;
        }
        let found = encoded(model, &golden, input);
        let expected = floats(&golden, &format!("enc.{input}.last_hidden_state{suffix}"));
        let apart = largest_apart(&found, &expected, &whole(&golden, &format!("in.{input}.attention_mask")));
        assert!(apart <= TOLERANCE, "{name} {input}: {apart}");
        compared += 1;
    }
    assert!(compared >= 3, "{name}: {compared} inputs compared");
}

/// The hidden states that `t5gemma encode --jsonl` writes for an input of a fixture.
fn encoded(model: &Path, golden: &SafeTensors, input: &str) -> Vec<f32> {
    let rows = |tensor: &str| {
        let length = golden.tensor(tensor).expect("inputs have ids and a mask").shape()[1];
        whole(golden, tensor).chunks(length).map(<[i64]>::to_vec).collect::<Vec<_>>()
    };
    let (ids, mask) = (rows(&format!("in.{input}.input_ids")), rows(&format!("in.{input}.attention_mask")));
    let request = json!({"id": input, "input_ids": ids, "attention_mask": mask});
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let out = folder.path().join("states.safetensors");
    let arguments = ["encode".as_ref(), model, "--jsonl".as_ref(), "--output".as_ref(), out.as_path()];
    stdout(run("t5gemma", arguments, request.to_string()));
    let bytes = std::fs::read(&out).expect("the file is written");
    let written = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    floats(&written, &format!("{input}.last_hidden_state"))
}

fn floats(tensors: &SafeTensors, name: &str) -> Vec<f32> {
    let view = tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("4 bytes"))).collect()
}

fn whole(tensors: &SafeTensors, name: &str) -> Vec<i64> {
    let view = tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    view.data().chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().expect("8 bytes"))).collect()
}

/// The largest difference of hidden states `[tokens, width]` where the mask `[tokens]` is 1.
fn largest_apart(a: &[f32], b: &[f32], mask: &[i64]) -> f32 {
    assert_eq!(a.len(), b.len());
    let width = a.len() / mask.len();
    let real = a.chunks(width).zip_eq(b.chunks(width)).zip_eq(mask).filter(|(_, mask)| **mask == 1);
    real.flat_map(|((a, b), _)| a.iter().zip_eq(b)).map(|(a, b)| (a - b).abs()).fold(0.0, |largest, next| {
        assert!(next.is_finite());
        f32::max(largest, next)
    })
}
