//! The files that a model repository on the Hugging Face hub has besides the model: the card `README.md` with its
//! metadata, the notice that Gemma's terms require, and which files Git LFS holds.

use std::fmt::Write;

use serde_json::Value;
use t5gemma_graphs::manifest::{self, CARD, GIT_ATTRIBUTES, Manifest, NOTICE};
use t5gemma_graphs::onnx::Code;
use t5gemma_graphs::quantization::Quantization;
use t5gemma_graphs::task::Task;

use crate::repository::Repository;
use crate::source::Source;

/// The notice that a copy of Gemma or of a model derived from it comes with, by section 3.1 of Gemma's terms.
const GEMMA_NOTICE: &str =
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms";
const GEMMA_TERMS: &str = "https://ai.google.dev/gemma/terms";

/// The repository that the weights come from: of a checkpoint in the hub's cache its own, otherwise the one that
/// `config.json` names, as far as it can be one.
pub fn base_model(source: &Source, config: &str) -> Option<Repository> {
    let Source::Checkpoint(checkpoint) = source else { return None };
    let named = || {
        let config: Value = serde_json::from_str(config).ok()?;
        let name = config.get("_name_or_path")?.as_str()?.to_string();
        // transformers stores paths too, and a trainer's folders look like names.
        let is_folder = name.split('/').next_back().is_none_or(|name| name.starts_with("checkpoint"));
        Repository::parse(&name).ok().flatten().filter(|_| !is_folder)
    };
    Repository::of_snapshot(checkpoint.folder()).or_else(named)
}

/// The files, by name, with their content.
pub fn files(manifest: &Manifest, base: Option<&Repository>) -> Vec<(&'static str, String)> {
    let mut files = vec![(CARD, card(manifest, base)), (GIT_ATTRIBUTES, attributes())];
    if is_gemma(manifest) {
        files.push((NOTICE, format!("{GEMMA_NOTICE}\n\n{}\n", changes(manifest))));
    }
    files
}

/// Whether the weights are those of a trained model.
fn is_gemma(manifest: &Manifest) -> bool {
    matches!(manifest.source, manifest::Source::Checkpoint(_))
}

fn attributes() -> String {
    let patterns = ["*.onnx", "*.onnx_data", "*.plan", "tokenizer.json", "tokenizer.model"];
    patterns.map(|pattern| format!("{pattern} filter=lfs diff=lfs merge=lfs -text\n")).concat()
}

fn card(manifest: &Manifest, base: Option<&Repository>) -> String {
    let mut card = metadata(manifest, base);
    let name = base.map_or("T5Gemma", |base| base.id().rsplit('/').next().unwrap_or_default());
    let mut line = |text: &str| {
        card += text;
        card.push('\n');
    };
    line(&format!("# {name} in ONNX\n"));
    line(&match base {
        Some(base) => {
            let (id, commit) =
                (base.id(), base.revision().map_or(String::new(), |commit| format!(" (commit {commit})")));
            format!("[{id}](https://huggingface.co/{id}){commit}, exported to ONNX by {}.\n", manifest.exporter)
        }
        None => format!("A T5Gemma model, exported to ONNX by {}.\n", manifest.exporter),
    });
    line("| | |\n|---|---|");
    let mut row = |name: &str, value: String| line(&format!("| {name} | {value} |"));
    row("task", manifest.task.to_string());
    row("target", target(&manifest.target));
    row("data type", manifest.dtype.to_string());
    row("quantization", quantization(manifest).unwrap_or_else(|| "none".into()));
    row("parameters", manifest.parameters.to_string());
    if let Some(kept) = manifest.kept_tokens {
        row("tokens that can be generated", format!("{kept}, see kept_tokens.json"));
    }
    if let Some(plan) = &manifest.plan {
        row("serving plan", format!("`{plan}`"));
    }
    for adapter in &manifest.adapters {
        row("merged adapter", format!("{} (rank {}, scale {})", cell(&adapter.name), adapter.r, adapter.scale));
    }
    line("\n## Use\n");
    line("Download the repository into a folder, here `model`, with `hf download REPOSITORY --local-dir model`.\n");
    line(&usage(manifest));
    line("## Files\n\n| file | bytes |\n|---|--:|");
    let graphs = manifest.graphs.values().map(|graph| (&graph.file, &graph.record));
    let weights = [(&manifest.weights.file, &manifest.weights.record)];
    for (name, record) in graphs.chain(weights).chain(&manifest.files) {
        line(&format!("| `{name}` | {} |", record.bytes));
    }
    line("\n`manifest.json` has the SHA-256 of each file, and the inputs and outputs of each graph.\n");
    line("## Licence\n");
    line(&if is_gemma(manifest) {
        format!("{GEMMA_NOTICE} ([the terms]({GEMMA_TERMS})).\n\n{}", changes(manifest))
    } else {
        "The weights are random numbers, for measurements of a model size.".to_string()
    });
    card
}

/// The metadata that the hub reads.
fn metadata(manifest: &Manifest, base: Option<&Repository>) -> String {
    let mut text = String::from("---\nlibrary_name: t5gemma\n");
    if is_gemma(manifest) {
        text += "license: gemma\n";
    }
    if let Some(base) = base {
        // A name may look like a number.
        writeln!(text, "base_model: \"{}\"", base.id()).expect("a String can be written");
        if manifest.quantization.is_any() {
            text += "base_model_relation: quantized\n";
        }
    }
    // The hub has no task for text-to-text models of their own any more.
    let pipeline = match manifest.task {
        Task::Text2TextGeneration => "text-generation",
        _ => manifest.task.name(),
    };
    writeln!(text, "pipeline_tag: {pipeline}").expect("a String can be written");
    text += "tags:\n- onnx\n- t5gemma\n";
    if manifest.task.is_generation() {
        text += "- text2text-generation\n";
    }
    text + "---\n\n"
}

fn target(name: &str) -> String {
    let runtime = match name {
        "cpu" => "ONNX Runtime on a CPU",
        "cuda" => "ONNX Runtime with its CUDA provider",
        "tensorrt" => "TensorRT, alone or as a provider of ONNX Runtime",
        _ => "any ONNX runtime",
    };
    format!("{name}: {runtime}")
}

fn quantization(manifest: &Manifest) -> Option<String> {
    let quantization = &manifest.quantization;
    let Quantization { encoder, decoder, head, vision, .. } = quantization;
    let parts = [("encoder", *encoder), ("decoder", *decoder), ("head", *head), ("vision tower", *vision)];
    let parts = parts.into_iter().filter_map(|(name, blocks)| {
        let blocks = blocks?;
        let format = match blocks.code {
            Code::Integer => format!("int{}", blocks.bits),
            _ => "fp8".to_string(),
        };
        Some(format!("{name} {format}"))
    });
    let parts: Vec<String> = parts.collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// What was changed, which Gemma's terms want to be stated.
fn changes(manifest: &Manifest) -> String {
    let mut changes = vec![format!("converted to ONNX with data type {}", manifest.dtype)];
    changes.extend(quantization(manifest).map(|formats| format!("quantized ({formats})")));
    changes.extend(manifest.kept_tokens.map(|kept| format!("reduced to {kept} tokens in the output head")));
    let adapters: Vec<&str> = manifest.adapters.iter().map(|adapter| adapter.name.as_str()).collect();
    if !adapters.is_empty() {
        changes.push(format!("merged with the adapters {}", adapters.join(", ")));
    }
    format!("The files were modified: the weights were {}.", changes.join(", "))
}

/// How to run the model from a shell and from Python.
fn usage(manifest: &Manifest) -> String {
    let provider = match manifest.target.as_str() {
        provider @ ("cuda" | "tensorrt") => Some(provider),
        _ => None,
    };
    let flag = provider.map_or(String::new(), |provider| format!(" --provider {provider}"));
    let argument = provider.map_or(String::new(), |provider| format!(", provider=\"{provider}\""));
    let has_tokenizer = manifest.files.contains_key("tokenizer.json");
    // Ids that every T5Gemma vocabulary has.
    let source = if has_tokenizer { "\"The meeting starts at 9:05 am.\"" } else { "[[2, 5, 6]]" };
    let (command, class, call) = match manifest.task {
        Task::Text2TextGeneration => (format!("t5gemma generate model{flag}"), "Model", "generate"),
        Task::FeatureExtraction(_) => (format!("t5gemma encode model{flag} -o states.npy"), "Encoder", "encode"),
        Task::TextClassification | Task::TokenClassification => {
            (format!("t5gemma classify model{flag}"), "Encoder", "classify")
        }
    };
    let shell = match (has_tokenizer, &manifest.task) {
        (true, _) => format!("```sh\n{command} {source}\n```\n\n"),
        (false, Task::FeatureExtraction(_)) => String::new(),
        (false, _) => format!("```sh\necho '{{\"input_ids\": [2, 5, 6]}}' | {command} --jsonl\n```\n\n"),
    };
    let without = if has_tokenizer { "" } else { "The repository has no tokenizer: sources are token ids.\n\n" };
    let (variable, result) = match manifest.task {
        Task::Text2TextGeneration if has_tokenizer => ("model", "[0][0].text"),
        Task::Text2TextGeneration => ("model", "[0][0].tokens"),
        _ => ("encoder", ""),
    };
    format!(
        "{without}{shell}```python\nimport t5gemma\n\n{variable} = t5gemma.{class}.open(\"model\"{argument})\n\
         print({variable}.{call}({source}){result})\n```\n"
    )
}

/// A text in a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}
