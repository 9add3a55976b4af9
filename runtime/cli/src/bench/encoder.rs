//! `t5gemma bench` of a model that was exported for feature extraction: only encoding is measured.

use std::io::{self, Write};

use anyhow::Result;
use serde_json::{Value, json};
use t5gemma_runtime::{Cancellation, Encoder, Error, Pooling};

use super::machine::{Memory, now_ns};
use super::{Times, Workload, images, milliseconds, model_json, random_tokens};
use crate::exit::{Outcome, ensure_usage};
use crate::opening::Opening;
use crate::progress::counter;

/// Measures an encoder and prints the report.
pub fn run(opening: &Opening, workload: &Workload, json: bool, cancel: &Cancellation) -> Result<Outcome> {
    ensure_usage!(
        workload.num_beams == 1 && workload.max_new_tokens == 64,
        "--num-beams and --max-new-tokens require a model that generates (got task feature-extraction)"
    );
    let start = now_ns();
    let encoder = opening.open_encoder()?;
    let opened = now_ns();
    let features = encoder.features()?;
    let longest = features.fixed_length.unwrap_or(encoder.facts().encoder.max_position_embeddings);
    let (rows, length) = (workload.batch_size as usize, workload.source_length as usize);
    ensure_usage!(length <= longest, "--source-length: expected at most {longest} for this model, found {length}");
    let tokens = random_tokens(encoder.facts().encoder.vocab_size, rows * length);
    let sources: Vec<&[i64]> = tokens.chunks(length).collect();
    let batch = images::sources(&sources, workload.images as usize, encoder.facts(), encoder.pad_token_id())?;
    let encode = || -> Result<(), Error> {
        match features.pooling {
            Pooling::None => encoder.encode(&batch, cancel).map(drop),
            pooling => encoder.embed(&batch, pooling, cancel).map(drop),
        }
    };
    encode()?;
    let first = now_ns();
    let image = match batch.images()[0].first() {
        Some(pixels) => {
            Some(measure(workload, || encoder.encode_images(std::slice::from_ref(pixels), cancel).map(drop))?)
        }
        None => None,
    };
    let times = measure(workload, encode)?;
    let report = Report {
        open_ms: milliseconds(start, opened),
        open_to_first_result_ms: milliseconds(start, first),
        image,
        times,
        memory: Memory::now(),
    };
    let text = if json {
        format!("{:#}\n", report.json(&encoder, workload, opening))
    } else {
        report.table(&encoder, workload, opening)
    };
    io::stdout().lock().write_all(text.as_bytes())?;
    Ok(Outcome::Done)
}

fn measure(workload: &Workload, encode: impl Fn() -> Result<(), Error>) -> Result<Times> {
    let runs = counter("runs", false);
    let mut times = Vec::new();
    for run in 0..workload.warmup + workload.repeat {
        let start = now_ns();
        encode()?;
        if run >= workload.warmup {
            times.push(milliseconds(start, now_ns()));
        }
        runs.inc(1);
    }
    runs.finish_and_clear();
    Ok(Times::of(times).expect("at least one run is measured"))
}

struct Report {
    open_ms: f64,
    open_to_first_result_ms: f64,
    /// Of the vision tower, for one image.
    image: Option<Times>,
    times: Times,
    memory: Option<Memory>,
}

impl Report {
    /// Source tokens per second of the median call, without padding.
    fn tokens_per_second(&self, workload: &Workload) -> f64 {
        f64::from(workload.batch_size) * f64::from(workload.source_length) / self.times.median() * 1e3
    }

    fn json(&self, encoder: &Encoder, workload: &Workload, opening: &Opening) -> Value {
        json!({
            "model": model_json(opening, encoder.manifest()),
            "case": {
                "batch_size": workload.batch_size,
                "source_length": workload.source_length,
                "images": workload.images,
                "warmup": workload.warmup,
                "repeat": workload.repeat,
                "threads": opening.runtime.threads,
            },
            "open_ms": self.open_ms,
            "open_to_first_result_ms": self.open_to_first_result_ms,
            "image_ms": self.image.as_ref().map(Times::json),
            "encode_ms": self.times.json(),
            "source_tokens_per_second": self.tokens_per_second(workload),
            "memory_bytes": self.memory.map(Memory::json),
        })
    }

    fn table(&self, encoder: &Encoder, workload: &Workload, opening: &Opening) -> String {
        let manifest = encoder.manifest();
        let threads = opening.runtime.threads.map_or("one per core".to_string(), |threads| threads.to_string());
        let Report { open_ms, open_to_first_result_ms, image, times, memory } = self;
        let numbers = |times: &Times| times.row().map(|time| format!("{time:>10.2}")).concat();
        let rows = [
            ("model", format!("{}: {}, {}", opening.path().display(), manifest.target, manifest.dtype)),
            ("sources", format!("{} of {} tokens", workload.batch_size, workload.source_length)),
            ("runs", format!("{} after {} for warming up; threads: {threads}", workload.repeat, workload.warmup)),
            ("open", format!("{open_ms:.0} ms, until the first result {open_to_first_result_ms:.0} ms")),
            ("ms", Times::COLUMNS.map(|column| format!("{column:>10}")).concat()),
            ("  image", image.as_ref().map(numbers).unwrap_or_default()),
            ("  encode", numbers(times)),
            ("source tokens/s", format!("{:.1}", self.tokens_per_second(workload))),
            ("memory", Memory::text(*memory)),
        ];
        let rows = rows.into_iter().filter(|(_, value)| !value.is_empty());
        rows.map(|(name, value)| format!("{name:<16}{value}\n")).collect()
    }
}
