//! The values of flags: their names with their help, and their texts.

use std::path::Path;

use clap::builder::PossibleValue;
use t5gemma_exporter::PaddingRow;
use t5gemma_graphs::Target;
use t5gemma_graphs::task::Pooling;

use crate::arguments::{AdapterArg, PadRows};

pub fn targets() -> [PossibleValue; 4] {
    Target::ALL.map(|target| {
        PossibleValue::new(target.name()).help(match target {
            Target::Portable => "any ONNX runtime",
            Target::Cpu => "ONNX Runtime on a CPU",
            Target::Cuda => "ONNX Runtime on an NVIDIA GPU, with its CUDA provider",
            Target::TensorRt => "TensorRT, alone or as a provider of ONNX Runtime",
        })
    })
}

pub fn poolings() -> [PossibleValue; 4] {
    Pooling::ALL.map(|pooling| {
        PossibleValue::new(pooling.name()).help(match pooling {
            Pooling::None => "return the hidden state of every token",
            Pooling::Mean => "mean over the tokens",
            Pooling::First => "state of the first token",
            Pooling::Last => "state of the last token",
        })
    })
}

pub fn capacity(text: &str) -> Result<usize, String> {
    let number = text.strip_prefix("static=").and_then(|number| number.parse().ok());
    number.ok_or_else(|| "expected static=N".to_string())
}

pub fn pad_rows(text: &str) -> Result<PadRows, String> {
    if text == "zero" {
        return Ok(PadRows::Zero);
    }
    match text.rsplit_once(':') {
        Some((file, tensor)) if !file.is_empty() && !tensor.is_empty() => {
            Ok(PadRows::Learned(PaddingRow { file: file.into(), tensor: tensor.into() }))
        }
        _ => Err("expected zero, or a safetensors file and the name of a tensor in it as FILE:TENSOR".to_string()),
    }
}

pub fn adapter(text: &str) -> Result<AdapterArg, String> {
    // A folder may have a = in its name.
    let scaled = text.rsplit_once('=').filter(|_| !Path::new(text).exists());
    let Some((folder, scale)) = scaled else { return Ok(AdapterArg { folder: text.into(), scale: 1.0 }) };
    let scale = scale.parse().ok().filter(|scale: &f32| scale.is_finite());
    let scale = scale.ok_or_else(|| "expected DIR, or DIR=SCALE with a number for SCALE".to_string())?;
    Ok(AdapterArg { folder: folder.into(), scale })
}

pub fn hidden_layer(text: &str) -> Result<i64, String> {
    if text == "last" { Ok(-1) } else { text.parse().map_err(|_| "expected an integer or last".to_string()) }
}
