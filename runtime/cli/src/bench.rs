//! `t5gemma bench`: how fast a model is on this machine, and how close to the memory bandwidth limit. Measures one case
//! from flags, or the cases of a request file (`protocol.rs`); `machine.rs` measures the machine.

mod clients;
mod encoder;
mod images;
mod machine;
mod protocol;
mod step_bytes;
mod times;

pub use protocol::check as check_request;

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Value, json};
use t5gemma_runtime::{
    Batch, Cancellation, Controls, Error, GenerationConfig, Hypothesis, Limits, Manifest, Model, Streamer, Task,
    task_of,
};

use crate::exit::Outcome;
use crate::exit::ensure_usage;
use crate::opening::{ModelArguments, Opening, RuntimeArguments};
use crate::progress::counter;
use machine::{Memory, now_ns, read_bandwidth};
use step_bytes::StepBytes;
use times::{Times, megabytes, milliseconds};

/// Benchmark a model on this machine
///
/// Sources are random tokens of equal length, and every target has exactly --max-new-tokens tokens: end tokens are
/// suppressed. Measures the time to open the model and to its first token; then, repeatedly, the time of encoding, of
/// the first token, of each further step and of whole calls; then the memory of this process, and the machine's read
/// bandwidth compared with the bytes that a step must read. Uses only the token ids of the model's generation config.
///
/// For a model exported with --task feature-extraction, measures only encoding.
///
/// With --clients, measures continuous batching: clients that each send their next request when the last one is
/// answered, with sources from an eighth of --source-length to --source-length; --repeat and --warmup are requests of
/// each client.
///
/// With --request, measures the cases of a JSON file and writes their times as JSON, so that one harness can compare
/// several runtimes.
#[derive(clap::Args)]
#[command(after_long_help = PROTOCOL)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    workload: Workload,
    /// Measure the cases of a JSON file, described below
    #[arg(long, value_name = "FILE", help_heading = "Input", requires = "response", conflicts_with_all =
        ["threads", "json", "batch_size", "num_beams", "source_length", "images","max_new_tokens", "repeat", "warmup", "clients"])]
    request: Option<PathBuf>,
    /// Print JSON instead of a table
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// File for the times of --request
    #[arg(long, value_name = "FILE", help_heading = "Output", requires = "request")]
    response: Option<PathBuf>,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

/// The case to measure.
#[derive(clap::Args)]
struct Workload {
    /// Number of sources
    #[arg(
        long,
        value_name = "ROWS",
        help_heading = "Input",
        default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=4096)
    )]
    batch_size: u32,
    /// Length of each source in tokens
    #[arg(
        long,
        value_name = "N",
        help_heading = "Input",
        default_value_t = 64,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    source_length: u32,
    /// Number of images in each source, whose tokens come on top of --source-length
    ///
    /// Also measures the vision tower for one image. Images are random numbers, the same every time.
    #[arg(
        long,
        value_name = "N",
        help_heading = "Input",
        default_value_t = 0,
        value_parser = clap::value_parser!(u32).range(0..=64),
        conflicts_with = "clients"
    )]
    images: u32,
    /// Number of beams; 1 is greedy search
    #[arg(
        long,
        value_name = "N",
        help_heading = "Generation",
        default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=256)
    )]
    num_beams: u32,
    /// Number of tokens to generate
    #[arg(
        long,
        value_name = "N",
        help_heading = "Generation",
        default_value_t = 64,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    max_new_tokens: u32,
    /// Number of measured runs
    #[arg(
        long,
        value_name = "N",
        help_heading = "Generation",
        default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    repeat: u32,
    /// Number of runs before the measured ones
    #[arg(long, value_name = "N", help_heading = "Generation", default_value_t = 1)]
    warmup: u32,
    /// Measure an engine with this many clients at once
    #[arg(
        long,
        value_name = "N",
        help_heading = "Input",
        conflicts_with = "batch_size",
        value_parser = clap::value_parser!(u32).range(1..=4096)
    )]
    clients: Option<u32>,
    /// With --clients, also serve a client with sources of N tokens, whose requests are not measured
    #[arg(
        long,
        value_name = "N",
        help_heading = "Input",
        requires = "clients",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    long_sources: Option<u32>,
}

const PROTOCOL: &str = r#"Files of --request and --response:

  request   {"protocol": 1, "threads"?, "decoder_start_token_id"?,
             "eos_token_id"?, "pad_token_id"?,
             "gate"?: {"busy", "max_wait_s", "total_wait_s"},
             "cases": [{"id", "src": [[ids], ...], "beams", "gen",
             "ops": ["encode", "ttft", "generate"],
             "repeats"?: {"encode", ...}, "tries"?}, ...]}
  response  {"protocol": 1, "peer", "version", "notes",
             "load": {"loaded_ns", "first_token_ns"},
             "cases": [{"id", "encode": [{"start_ns", "end_ns", "foreign"?,
             "steps_ns"?}, ...], "ttft": [...], "generate": [...],
             "ids": [[...], ...], "scores": [...] or null, "error"?}, ...]}

Times are from the monotonic clock. With "gate", a run waits until other processes use less than "busy" of the machine, and is repeated if they used much of it ("foreign"), up to "tries" times.

Examples:
  Measure greedy search, then eight sources with four beams:
    t5gemma bench model
    t5gemma bench model --batch-size 8 --num-beams 4

  Serve 32 clients, while another sends sources of 4096 tokens:
    t5gemma bench model --clients 32 --long-sources 4096

  Compare thread counts:
    for n in 1 2 4; do t5gemma bench model --threads $n --json > $n.json; done"#;

/// Runs the command.
pub fn run(arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    if let (Some(request), Some(response)) = (&arguments.request, &arguments.response) {
        return protocol::run(Opening::new(arguments.model, arguments.runtime), request, response, cancel);
    }
    let start = now_ns();
    let mut opening = Opening::new(arguments.model, arguments.runtime);
    // Measure one batch, whatever memory it takes.
    opening.limits = Limits::NONE;
    if let Task::FeatureExtraction(_) = task_of(opening.path())? {
        return encoder::run(&opening, &arguments.workload, arguments.json, cancel);
    }
    if let Some(clients) = arguments.workload.clients {
        return clients::run(&opening, &arguments.workload, clients, arguments.json, cancel);
    }
    let model = opening.open()?;
    let opened = now_ns();
    let case = Case::random(&model, &arguments.workload)?;
    case.generate(&model, 1, cancel)?;
    let first_token = now_ns();
    let measured = measure(&model, &case, &arguments.workload, cancel)?;
    // Before the bandwidth, since measuring that takes memory too.
    let memory = Memory::now();
    let bandwidth = read_bandwidth(opening.runtime.threads.unwrap_or(usize::MAX), cancel)?;
    let report = Report {
        open_ms: milliseconds(start, opened),
        open_to_first_token_ms: milliseconds(start, first_token),
        measured,
        memory,
        bandwidth,
        step: StepBytes::of(&model, &case),
    };
    let text = if arguments.json {
        format!("{:#}\n", report.json(&model, &case, &arguments.workload, &opening))
    } else {
        report.table(&model, &case, &arguments.workload, &opening)
    };
    io::stdout().lock().write_all(text.as_bytes())?;
    Ok(Outcome::Done)
}

/// A batch to generate for, always to the full length.
struct Case {
    batch: Batch,
    /// The options except the length.
    options: GenerationConfig,
    /// Number of tokens to generate per target.
    tokens: usize,
}

impl Case {
    /// Random sources, the same every time.
    fn random(model: &Model, workload: &Workload) -> Result<Case> {
        let (rows, length) = (workload.batch_size as usize, workload.source_length as usize);
        let longest = model.facts().encoder.max_position_embeddings;
        ensure_usage!(
            length <= longest,
            "--source-length: expected at most {longest} (encoder.max_position_embeddings), found {length}"
        );
        let tokens = random_tokens(model.facts().encoder.vocab_size, rows * length);
        let options = Case::options(model, workload.num_beams as usize);
        let sources: Vec<&[i64]> = tokens.chunks(length).collect();
        let batch = images::sources(&sources, workload.images as usize, model.facts(), options.pad_token_id)?;
        let longest = model.facts().decoder.max_position_embeddings;
        ensure_usage!(
            (workload.max_new_tokens as usize) < longest,
            "--max-new-tokens: expected less than {longest} (decoder.max_position_embeddings), found {}",
            workload.max_new_tokens
        );
        Case::new(model, batch, options, workload.max_new_tokens as usize)
    }

    /// A case whose targets have their full length, for models that have to know it.
    fn new(model: &Model, batch: Batch, options: GenerationConfig, tokens: usize) -> Result<Case> {
        let batch = match model.facts().custom.target_scale() {
            None => batch,
            Some(_) => {
                let totals = vec![tokens as i64 + 1; batch.rows()];
                batch.with_progress_totals(&totals)?
            }
        };
        Ok(Case { batch, options, tokens })
    }

    /// Plain greedy or beam search; of the model's own options, only the token ids.
    fn options(model: &Model, num_beams: usize) -> GenerationConfig {
        let mut options = model.generation_config().plain();
        options.num_beams = num_beams;
        options
    }

    /// Generates `tokens` tokens per row and records when each step's tokens were chosen.
    fn generate(&self, model: &Model, tokens: usize, cancel: &Cancellation) -> Result<Generated, Error> {
        let mut options = self.options.clone();
        (options.max_new_tokens, options.min_new_tokens) = (Some(tokens), Some(tokens));
        let mut moments = Moments(Vec::with_capacity(tokens));
        let start = now_ns();
        let rows = model.generate_batch(
            &self.batch,
            &options,
            Controls::default().streamer(&mut moments).cancellation(cancel),
        )?;
        Ok(Generated { start, end: now_ns(), steps: moments.0, rows })
    }
}

/// Random tokens from a vocabulary, except its first four, which are special.
fn random_tokens(vocab_size: usize, count: usize) -> Vec<i64> {
    let first = 4.min(vocab_size - 1);
    let mut state = 0u64;
    // SplitMix64, https://prng.di.unimi.it/splitmix64.c
    let mut random = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..count).map(|_| first as i64 + (random() % (vocab_size - first) as u64) as i64).collect()
}

/// The results of a generation, with times by [`now_ns`].
struct Generated {
    start: u64,
    end: u64,
    /// When the tokens of each step were chosen.
    steps: Vec<u64>,
    rows: Vec<Vec<Hypothesis>>,
}

struct Moments(Vec<u64>);

impl Streamer for Moments {
    fn token(&mut self, _: usize, _: i64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn step(&mut self) -> ControlFlow<()> {
        self.0.push(now_ns());
        ControlFlow::Continue(())
    }
}

/// The model of a report.
fn model_json(opening: &Opening, manifest: &Manifest) -> Value {
    json!({
        "path": opening.path().to_string_lossy(),
        "target": manifest.target,
        "dtype": manifest.dtype.to_string(),
        "parameters": manifest.parameters,
        "weights_bytes": manifest.weights.record.bytes,
    })
}

/// The times of the measured runs, in milliseconds.
struct Measured {
    /// Of the vision tower, for one image.
    image: Option<Times>,
    encode: Times,
    first_token: Times,
    /// None if there is no step after the first token.
    step: Option<Times>,
    call: Times,
}

fn measure(model: &Model, case: &Case, workload: &Workload, cancel: &Cancellation) -> Result<Measured> {
    let runs = counter("runs", false);
    let (mut encode, mut first_token, mut step, mut call) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (pixels, mut image) = (case.batch.images()[0].first().cloned(), Vec::new());
    for run in 0..u64::from(workload.warmup) + u64::from(workload.repeat) {
        let is_measured = run >= u64::from(workload.warmup);
        if let Some(pixels) = &pixels {
            let start = now_ns();
            model.encode_images(std::slice::from_ref(pixels), cancel)?;
            image.extend(is_measured.then(|| milliseconds(start, now_ns())));
        }
        let start = now_ns();
        model.encode(&case.batch, cancel)?;
        let encoded = now_ns();
        let generated = case.generate(model, case.tokens, cancel)?;
        if is_measured {
            encode.push(milliseconds(start, encoded));
            first_token.extend(generated.steps.first().map(|&first| milliseconds(generated.start, first)));
            step.extend(generated.steps.windows(2).map(|pair| milliseconds(pair[0], pair[1])));
            call.push(milliseconds(generated.start, generated.end));
        }
        runs.inc(1);
    }
    runs.finish_and_clear();
    let measured = "at least one run is measured, and each generates at least one token";
    Ok(Measured {
        image: Times::of(image),
        encode: Times::of(encode).expect(measured),
        first_token: Times::of(first_token).expect(measured),
        step: Times::of(step),
        call: Times::of(call).expect(measured),
    })
}

struct Report {
    open_ms: f64,
    open_to_first_token_ms: f64,
    measured: Measured,
    memory: Option<Memory>,
    /// Bytes a second.
    bandwidth: Option<f64>,
    step: StepBytes,
}

impl Report {
    /// New tokens per second over all returned rows, in the median call.
    fn tokens_per_second(&self, case: &Case) -> f64 {
        (case.batch.rows() * case.tokens) as f64 / self.measured.call.median() * 1e3
    }

    /// The least time in milliseconds that reading a step's bytes takes, and its share of the median step.
    fn limit(&self) -> Option<(f64, Option<f64>)> {
        let limit = self.step.total() as f64 / self.bandwidth? * 1e3;
        Some((limit, self.measured.step.as_ref().map(|step| limit / step.median())))
    }

    fn json(&self, model: &Model, case: &Case, workload: &Workload, opening: &Opening) -> Value {
        let (manifest, measured) = (model.manifest(), &self.measured);
        let (limit, share) = self.limit().unzip();
        json!({
            "model": model_json(opening, manifest),
            "case": {
                "batch_size": case.batch.rows(),
                "num_beams": case.options.num_beams,
                "source_length": case.batch.length(),
                "images": case.batch.images()[0].len(),
                "max_new_tokens": case.tokens,
                "warmup": workload.warmup,
                "repeat": workload.repeat,
                "threads": opening.runtime.threads,
            },
            "open_ms": self.open_ms,
            "open_to_first_token_ms": self.open_to_first_token_ms,
            "image_ms": measured.image.as_ref().map(Times::json),
            "encode_ms": measured.encode.json(),
            "first_token_ms": measured.first_token.json(),
            "step_ms": measured.step.as_ref().map(Times::json),
            "generate_ms": measured.call.json(),
            "tokens_per_second": self.tokens_per_second(case),
            "memory_bytes": self.memory.map(Memory::json),
            "bandwidth": {
                "read_bytes_per_second": self.bandwidth,
                "step_weight_bytes": self.step.weights,
                "step_cache_bytes": self.step.caches,
                "step_limit_ms": limit,
                "share_of_limit": share.flatten(),
            },
        })
    }

    fn table(&self, model: &Model, case: &Case, workload: &Workload, opening: &Opening) -> String {
        let (manifest, measured) = (model.manifest(), &self.measured);
        let not_available = || "not available".to_string();
        let times = |times: Option<&Times>| match times {
            Some(times) => times.row().map(|time| format!("{time:>10.2}")).concat(),
            None => not_available(),
        };
        let bandwidth = match (self.bandwidth, self.limit()) {
            (Some(bandwidth), Some((limit, share))) => {
                let share =
                    share.map_or_else(String::new, |share| format!(", {:.0}% of the median step", share * 100.0));
                format!("{:.1} GB/s: {limit:.2} ms to read what a step needs{share}", bandwidth / 1e9)
            }
            _ => not_available(),
        };
        let threads = opening.runtime.threads.map_or("one per core".to_string(), |threads| threads.to_string());
        let rows = [
            ("model", format!("{}: {}, {}", opening.path().display(), manifest.target, manifest.dtype)),
            ("sources", images::text(&case.batch)),
            ("targets", format!("{} tokens, num_beams {}", case.tokens, case.options.num_beams)),
            ("runs", format!("{} after {} warm-up runs; threads: {threads}", workload.repeat, workload.warmup)),
            ("open", format!("{:.0} ms; first token after {:.0} ms", self.open_ms, self.open_to_first_token_ms)),
            ("ms", Times::COLUMNS.map(|column| format!("{column:>10}")).concat()),
            ("  image", times(measured.image.as_ref())),
            ("  encode", times(Some(&measured.encode))),
            ("  first token", times(Some(&measured.first_token))),
            ("  further step", times(measured.step.as_ref())),
            ("  whole call", times(Some(&measured.call))),
            ("tokens/s", format!("{:.1}", self.tokens_per_second(case))),
            ("memory", Memory::text(self.memory)),
            (
                "a step reads",
                format!(
                    "{} of weights, {} of keys and values",
                    megabytes(self.step.weights),
                    megabytes(self.step.caches)
                ),
            ),
            ("memory reads", bandwidth),
        ];
        let rows = rows.into_iter().filter(|(name, _)| *name != "  image" || measured.image.is_some());
        rows.map(|(name, value)| format!("{name:<16}{value}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_tokens_are_of_the_vocabulary_and_always_the_same() {
        for vocab_size in [1, 3, 5, 200, 256_000] {
            let tokens = random_tokens(vocab_size, 1000);
            let first = 4.min(vocab_size as i64 - 1);
            assert!(tokens.iter().all(|token| (first..vocab_size as i64).contains(token)), "{vocab_size}");
            assert_eq!(tokens, random_tokens(vocab_size, 1000));
        }
        let distinct: std::collections::HashSet<i64> = random_tokens(256_000, 64).into_iter().collect();
        assert!(distinct.len() > 60);
    }
}
