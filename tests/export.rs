//! What an export writes: names, types, one copy of each tensor, the same bytes each time, and what `inspect` says of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use itertools::Itertools as _;
use serde_json::Value;
use t5gemma_exporter::{Checkpoint, Export, Source, inspect, preset};
use t5gemma_graphs::Target;
use t5gemma_graphs::config::Config;
use t5gemma_graphs::interface::{CacheLayout, DType, Interface, Logits};
use t5gemma_graphs::manifest::Manifest;
use t5gemma_graphs::onnx::Blocks;
use t5gemma_graphs::quantization::Quantization;

use crate::common::{FIXTURES, demo_as, exported, exported_as, fixture, program, run, stdout};

fn manifest(model: &Path) -> Manifest {
    let text = fs::read_to_string(model.join("manifest.json")).expect("a model has a manifest");
    serde_json::from_str(&text).expect("the manifest is well-formed")
}

#[test]
fn the_port_names_are_those_of_optimum() {
    let manifest = manifest(&exported("tiny-untied"));
    let names = |graph: &str, outputs: bool| {
        let ports = &manifest.graphs[graph].ports;
        let ports = if outputs { &ports.outputs } else { &ports.inputs };
        ports.iter().map(|port| port.name.clone()).collect::<Vec<_>>()
    };
    let layers = |prefix: &str, sides: &[&str]| {
        let part = |layer| {
            let sides = sides.iter().flat_map(move |side| [(side, "key"), (side, "value")]);
            sides.map(move |(side, part)| format!("{prefix}.{layer}.{side}.{part}")).collect::<Vec<_>>()
        };
        (0..2).flat_map(part).collect::<Vec<_>>()
    };
    let with =
        |first: &[&str], rest: Vec<String>| first.iter().map(|name| name.to_string()).chain(rest).collect::<Vec<_>>();
    assert_eq!(names("encoder", false), ["input_ids", "attention_mask"]);
    assert_eq!(names("encoder", true), ["last_hidden_state"]);
    assert_eq!(names("decoder", false), ["encoder_attention_mask", "input_ids", "encoder_hidden_states"]);
    assert_eq!(names("decoder", true), with(&["logits"], layers("present", &["decoder", "encoder"])));
    let past = layers("past_key_values", &["decoder", "encoder"]);
    assert_eq!(names("decoder_with_past", false), with(&["encoder_attention_mask", "input_ids"], past));
    assert_eq!(names("decoder_with_past", true), with(&["logits"], layers("present", &["decoder"])));
}

#[test]
fn a_manifest_holds_the_interface_of_its_config() {
    for (label, dtype, logits) in [
        ("default", DType::Float32, Logits::Last),
        ("all-logits", DType::Float32, Logits::All),
        ("bfloat16", DType::BFloat16, Logits::Last),
    ] {
        let model = exported_as("tiny-unbalanced", label, Export::default().dtype(dtype).logits(logits));
        let config = fs::read_to_string(model.join("config.json")).expect("the config is carried along");
        let expected = Interface::of(
            &Config::parse(&config).expect("a valid config").facts(),
            dtype,
            logits,
            CacheLayout::Growing,
        );
        let graphs = manifest(&model).graphs;
        assert_eq!(graphs["encoder"].ports, expected.encoder, "{label}");
        assert_eq!(graphs["decoder"].ports, expected.decoder, "{label}");
        assert_eq!(graphs["decoder_with_past"].ports, expected.decoder_with_past, "{label}");
    }
}

#[test]
fn each_tensor_is_stored_once_and_a_tied_head_with_its_embedding() {
    for (name, heads) in [("tiny-balanced", 0), ("tiny-untied", 1)] {
        let manifest = manifest(&exported(name));
        let names: Vec<&str> = manifest.weights.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{name}");
        assert_eq!(names.iter().filter(|name| name.starts_with("lm_head")).count(), heads, "{name}");
        let shared = "model.decoder.embed_tokens.weight".to_string();
        assert!(manifest.graphs["decoder"].weights.contains(&shared), "{name}");
        assert!(manifest.graphs["decoder_with_past"].weights.contains(&shared), "{name}");
        for tensor in &manifest.weights.tensors {
            assert_eq!(tensor.offset % 4096, 0, "{name}: {}", tensor.name);
        }
        let count: u64 = manifest.weights.tensors.iter().map(|t| t.shape.iter().product::<usize>() as u64).sum();
        assert_eq!(manifest.parameters, count, "{name}");
    }
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let again = folder.path().join("again");
    let source = Checkpoint::open(&fixture("tiny-sharded").join("checkpoint")).expect("the fixture opens");
    Export::default().run(&Source::Checkpoint(source), &again).expect("exports");
    let first = exported("tiny-sharded");
    let names = |model: &Path| {
        let entries = fs::read_dir(model).expect("a folder").map(|entry| entry.expect("an entry").file_name());
        entries.collect::<BTreeSet<_>>()
    };
    assert_eq!(names(&first), names(&again));
    for name in names(&first) {
        let bytes = |model: &Path| fs::read(model.join(&name)).expect("a file");
        assert!(bytes(&first) == bytes(&again), "{name:?} differs");
    }
}

#[test]
fn half_precision_keeps_its_float32_islands() {
    for dtype in [DType::Float16, DType::BFloat16] {
        let model = exported_as("tiny-untied", &dtype.to_string(), Export::default().dtype(dtype));
        for tensor in manifest(&model).weights.tensors {
            let expected = if tensor.name.ends_with("norm.weight.one_plus") { DType::Float32 } else { dtype };
            assert_eq!(tensor.dtype, expected, "{}", tensor.name);
        }
        let graphs = manifest(&model).graphs;
        assert_eq!(graphs["decoder"].ports.outputs[0].dtype, DType::Float32, "logits");
        assert_eq!(graphs["decoder"].ports.outputs[1].dtype, dtype, "keys");
    }
}

#[test]
fn dummy_weights_are_random_seeded_and_never_zero() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let config = fs::read_to_string(fixture("tiny-unbalanced").join("checkpoint/config.json")).expect("a config");
    let weights = |seed, label: &str| {
        let out = folder.path().join(label);
        let source = Source::Dummy { config: config.clone(), origin: "the fixture".into(), seed };
        Export::default().run(&source, &out).expect("exports");
        let manifest = manifest(&out);
        let bytes = fs::read(out.join("model.onnx_data")).expect("weights");
        let numbers = |tensor: &t5gemma_graphs::manifest::TensorRecord| {
            bytes[tensor.offset as usize..][..tensor.bytes as usize]
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes")))
                .collect::<Vec<f32>>()
        };
        manifest.weights.tensors.iter().map(numbers).collect::<Vec<_>>()
    };
    let (first, again, other) = (weights(1, "a"), weights(1, "b"), weights(2, "c"));
    assert!(first == again);
    for (tensor, other) in first.iter().zip_eq(&other) {
        assert!(tensor.iter().all(|number| number.is_finite() && *number != 0.0));
        assert!(tensor != other);
    }
}

#[test]
fn the_presets_have_the_published_numbers_of_parameters() {
    for (name, published) in [
        ("s-s", 312_517_632),
        ("b-b", 591_490_560),
        ("l-l", 1_241_761_792),
        ("ml-ml", 2_200_345_344),
        ("xl-xl", 3_766_980_608),
        ("2b-2b", 5_596_853_760),
        ("9b-2b", 12_292_375_296),
        ("9b-9b", 20_333_401_088_u64),
    ] {
        let config = Config::parse(preset(name).expect("a preset")).expect("a valid config");
        let counted = t5gemma_exporter::parameters(&config);
        assert_eq!(counted, published, "{name}");
    }
}

#[test]
fn inspect_tells_what_a_model_and_a_checkpoint_hold() {
    for name in FIXTURES {
        let of_checkpoint = inspect(&fixture(name).join("checkpoint")).expect("a checkpoint");
        let of_model = inspect(&exported(name)).expect("a model");
        assert_eq!(of_checkpoint.parameters, of_model.parameters, "{name}");
        assert_eq!(of_checkpoint.parts, of_model.parts, "{name}");
    }
    // However the numbers are held: packed, filled up to whole blocks, twice, or left out of the head.
    let whole = |bits, size| Some(Blocks::integer(bits, size));
    for (label, target, blocks) in [
        ("inspect-int8", Target::Cpu, whole(8, 128)),
        ("inspect-int4", Target::Cpu, whole(4, 32)),
        ("inspect-cuda", Target::Cuda, whole(4, 64)),
    ] {
        for name in ["tiny-balanced", "tiny-untied"] {
            let quantization =
                Quantization { encoder: blocks, decoder: blocks, head: blocks, ..Quantization::default() };
            let export = Export::default().target(target).dtype(DType::Float32).quantization(quantization);
            let model = exported_as(name, label, export);
            let (of_model, of_checkpoint) =
                (inspect(&model).expect("a model"), inspect(&fixture(name).join("checkpoint")).expect("a checkpoint"));
            assert_eq!(of_model.parts, of_checkpoint.parts, "{name} {label}");
            assert_eq!(of_model.parameters, manifest(&model).parameters, "{name} {label}");
        }
    }
    let quantization =
        Quantization { encoder: whole(4, 32), decoder: whole(4, 32), head: whole(4, 32), ..Quantization::default() };
    let export = Export::default().target(Target::TensorRt).dtype(DType::Float32).quantization(quantization);
    let twice = demo_as("inspect-tensorrt", export);
    assert_eq!(inspect(&twice).expect("a model").parameters, manifest(&twice).parameters);
    let kept = exported_as("tiny-untied", "inspect-kept", Export::default().kept_tokens((0..20).collect::<Vec<_>>()));
    assert_eq!(inspect(&kept).expect("a model").parameters, manifest(&kept).parameters);
    let model = exported("tiny-balanced");
    let model = model.to_str().expect("temporary paths are UTF-8");
    let report: Value =
        serde_json::from_str(&stdout(run("t5gemma-export", ["inspect", model, "--json"], ""))).expect("JSON");
    assert_eq!(report["kind"], "model");
    assert_eq!(report["model"]["graphs"][0]["opset"], 20);
    assert!(report["model"]["graphs"][1]["operators"]["Gemm"].as_u64().is_some_and(|count| count > 10));
    let text = stdout(run("t5gemma-export", ["inspect", model], ""));
    assert!(text.contains("past_key_values.0.encoder.key"), "{text}");
    assert!(text.contains(", vocabulary 200, at most "), "{text}");
    assert!(text.contains(" with a sliding window of "), "{text}");
}

#[test]
fn help_fits_a_terminal_and_ends_with_examples() {
    for command in [&[][..], &["inspect"], &["check"], &["reseal"]] {
        for (flag, columns) in [("-h", 80), ("--help", 80), ("--help", 120)] {
            let mut program = program("t5gemma-export");
            let shown = program.args(command).arg(flag).env("COLUMNS", columns.to_string()).output().expect("it runs");
            let shown = stdout(shown);
            let longest = shown.lines().map(|line| line.chars().count()).max();
            assert!(longest.is_some_and(|longest| longest <= columns), "{command:?} {flag}: {shown}");
            assert_eq!(shown.contains("\nExamples:\n"), flag == "--help", "{command:?} {flag}: {shown}");
        }
    }
}

#[test]
fn completions_and_man_pages_know_all_options() {
    for shell in ["bash", "zsh", "fish"] {
        let script = stdout(run("t5gemma-export", ["completions", shell], ""));
        assert!(script.contains("quantize-exclude") && script.contains("reseal"), "{shell}");
    }
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    stdout(run("t5gemma-export", ["man".as_ref(), folder.path().as_os_str()], ""));
    let page = |name: &str| fs::read_to_string(folder.path().join(name)).expect("a page");
    assert!(page("t5gemma-export.1").contains("\\-\\-quantize\\-exclude"));
    assert!(page("t5gemma-export-check.1").contains("tensorrt=VERSION"));
}
