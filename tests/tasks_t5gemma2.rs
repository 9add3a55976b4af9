//! Classifiers of T5Gemma 2, whose decoder reads the source and its images again, against transformers and by the command.

use std::path::PathBuf;

use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::DType;
use t5gemma_runtime::{Batch, Cancellation, Encoder, PixelValues, Task};

use crate::common::{exported_from, fixture, run, stdout, tests};
use crate::tasks::{Golden, check_close};

const BATCHES: [&str; 4] = ["images", "images_left", "text", "two_images"];

pub fn task_fixture(name: &str) -> PathBuf {
    tests().join("fixtures/tasks_t5gemma2").join(name)
}

fn exported(name: &str, target: Target) -> PathBuf {
    let label = format!("t2-{name}-{}", target.name());
    let export = Export::default().target(target).dtype(DType::Float32);
    exported_from(&task_fixture(name).join("checkpoint"), &label, export)
}

/// The inputs of the checkpoint with the same sizes.
fn batch(encoder: &Encoder, name: &str) -> Batch {
    let inputs = Golden::read(&fixture("t2-vision").join("golden.safetensors"));
    let batch = inputs.batch(name);
    if name == "text" {
        return batch;
    }
    let pixels = inputs.floats(&format!("in.{name}.pixel_values"));
    let images = PixelValues::of_tensor(pixels.shape(), pixels.iter().copied().collect()).expect("valid images");
    batch.with_images_in_order(encoder.facts(), images).expect("as many as there are tokens for")
}

#[test]
fn logits_are_those_of_the_reference() {
    for name in ["sequence", "token"] {
        let golden = Golden::read(&task_fixture(name).join("golden.safetensors"));
        for target in Target::ALL {
            let encoder = Encoder::open(exported(name, target)).expect("opens");
            for of_batch in BATCHES {
                let batch = batch(&encoder, of_batch);
                let what = format!("{name} {of_batch} for {}", target.name());
                let expected = golden.floats(&format!("cls.{of_batch}.logits"));
                let cancel = Cancellation::new();
                if encoder.manifest().task == Task::TextClassification {
                    // Rows as transformers pads them: neighbours of one length, so that nothing is cut off.
                    let found = encoder.classify(&batch, &cancel).expect("classifies").into_dyn();
                    check_close(&what, &found, &expected, None);
                } else {
                    let found = encoder.classify_tokens(&batch, &cancel).expect("classifies").into_dyn();
                    check_close(&what, &found, &expected, Some(batch.mask()));
                }
            }
        }
    }
}

#[test]
fn the_command_labels_texts_with_images() {
    let model = exported("sequence", Target::Cpu);
    let encoder = Encoder::open(&model).expect("opens");
    let batch = batch(&encoder, "images");
    let golden = fixture("t2-vision").join("golden.safetensors");
    let rows: Vec<&[i64]> = (0..batch.rows()).map(|row| batch.source(row)).collect();
    let masks: Vec<&[i64]> = (0..batch.rows()).map(|row| batch.row_mask(row)).collect();
    let request = json!({"input_ids": rows, "attention_mask": masks,
        "pixel_values": {"file": golden, "tensor": "in.images.pixel_values"}});
    let arguments =
        ["classify", model.to_str().expect("UTF-8"), "--jsonl", "--top-k", "all", "--function-to-apply", "none"];
    let answer: Value = serde_json::from_str(&stdout(run("t5gemma", arguments, request.to_string()))).expect("JSON");
    let expected = encoder.classify(&batch, &Cancellation::new()).expect("classifies");
    for (row, found) in answer["labels"].as_array().unwrap_or_else(|| panic!("{answer}")).iter().enumerate() {
        for label in found.as_array().expect("labels") {
            let at = ["bad", "so-so", "good"].iter().position(|name| label["label"] == *name).expect("a label");
            let score = label["score"].as_f64().expect("a number");
            assert!((score - f64::from(expected[[row, at]])).abs() < 1e-5, "{answer}");
        }
    }
    let told = stdout(run("t5gemma", ["doctor", model.to_str().expect("UTF-8")], ""));
    assert!(told.ends_with(" runs: model, vision_encoder\n"), "{told}");
}
