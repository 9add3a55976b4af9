//! Entry points for fuzzers: everything that the program reads besides models. Not a stable API.

use std::path::Path;

use serde_json::Map;
use t5gemma_runtime::Model;

use crate::bench;
use crate::constraints::{self, Constraint};
use crate::files;
use crate::requests::{self, Kind};
use crate::tensors::Tensors;
use crate::verify;

/// Reads a line like each command that takes requests, and makes a batch of it.
pub fn read_request(line: &[u8], model: &Model) {
    let kinds = [
        Kind::Generate,
        Kind::Score { end: Some(1) },
        Kind::Encode { truncates: false },
        Kind::Encode { truncates: true },
    ];
    for kind in kinds {
        if let Ok(request) = requests::read_line(line, &Map::new(), 0, kind, model) {
            let _ = t5gemma_protocol::batch(&[request], 0);
        }
    }
}

/// The kinds of files that [`read_file`] reads.
pub const FILES: &[&str] =
    &["texts", "encoder_outputs", "golden", "bench", "json_schema", "grammar", "allowed_sequences", "required_phrases"];

/// Reads a file as a command does.
pub fn read_file(kind: &str, path: &Path) {
    match kind {
        "texts" => drop(files::read_text(path)),
        "encoder_outputs" => drop(requests::read_encoder_outputs(path)),
        "golden" => drop(Tensors::read(path).and_then(|tensors| verify::read(&tensors))),
        "bench" => drop(files::read_text(path).and_then(|text| bench::check_request(&text))),
        flag => drop(constraints::of_file(flag, path).as_ref().map(Constraint::read)),
    }
}
