//! `t5gemma batch`: shards of documents in, shards of results out. The work is done by the crate of that name; here are
//! its flags, its progress on stderr and its summary on stdout.

mod shown;

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::builder::PossibleValuesParser;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use t5gemma_batch::{
    BatchError, Classifying, Columns, Encoding, Generating, Job, Part, Scoring, Settings, Shard, Store, Summary, Task,
    VectorFormat, Worker,
};
use t5gemma_runtime::{Cancellation, EngineOptions, Error, Limits, Pooling, ScoreFunction, Task as ModelTask, task_of};

use crate::chat::Chat;
use crate::exit::{Outcome, Usage, bail_usage, ensure_usage};
use crate::flag_errors;
use crate::images::WithFiles;
use crate::opening::{AdapterArguments, ModelArguments, Opening, RuntimeArguments};
use crate::options::{GenerationFlags, as_flag};
use crate::stderr::note;
use shown::Shown;

/// Run a model over shards of documents
///
/// Each input X.jsonl, X.jsonl.gz, X.jsonl.zst or X.parquet becomes the output DIR/X…, with the rows in the same order, their
/// columns, and the columns of results. An output appears only when it is complete, so an interrupted run is simply started
/// again: outputs that exist are kept. A row that cannot be answered has an error instead. When all is done, one line of JSON on
/// stdout counts shards, rows and tokens.
///
/// Generation options have their Hugging Face names, as in `t5gemma generate`.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Shards to read: files, or patterns with *, ?, [...] and **; s3://BUCKET/PATTERN reads objects
    ///
    /// Objects are those of a store that speaks S3, with the settings of the variables AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    /// AWS_REGION, AWS_ENDPOINT_URL and so on.
    #[arg(long, value_name = "GLOB", help_heading = "Input", required = true, num_args = 1..)]
    input: Vec<String>,
    /// Run only every Nth shard in the order of names, from number I, counted from 0
    ///
    /// `auto/N` takes I from JOB_COMPLETION_INDEX (Kubernetes) or SLURM_ARRAY_TASK_ID (Slurm).
    #[arg(long, value_name = "I/N", help_heading = "Input", value_parser = part, default_value = "0/1")]
    shard: Part,
    /// Column that identifies rows [default: id]
    ///
    /// It is carried along whatever --keep-columns says, and gets the number of a line that is no JSON object.
    #[arg(long, value_name = "NAME", help_heading = "Input")]
    id_column: Option<String>,
    /// Column with the text of each row [default: text]
    ///
    /// By default a row is a request, as for `t5gemma generate --jsonl`: text, messages or input_ids, with decoder_text, options
    /// and so on. With this option, other sources than the text are carried along like any column.
    #[arg(long, value_name = "NAME", help_heading = "Input")]
    text_column: Option<String>,
    /// Column with the target to score [default: target]
    #[arg(long, value_name = "NAME", help_heading = "Input")]
    target_column: Option<String>,
    /// Format each text as a user's turn with the chat template
    #[arg(long, help_heading = "Input")]
    chat: bool,
    /// System turn for conversations that have none
    #[arg(long, value_name = "TEXT", help_heading = "Input")]
    system: Option<String>,
    /// Maximum length of a source in tokens; longer ones are errors without --truncation
    #[arg(long, value_name = "N", help_heading = "Encoding", value_parser = clap::value_parser!(u32).range(1..))]
    max_source_length: Option<u32>,
    /// Truncate longer sources on the right to --max-source-length
    #[arg(long, help_heading = "Encoding", requires = "max_source_length")]
    truncation: bool,
    /// Folder to write into, or s3://BUCKET/PREFIX
    #[arg(short, long, value_name = "DIR", help_heading = "Output")]
    output: String,
    /// What to compute [default: what the model was exported for]
    #[arg(long, value_name = "TASK", help_heading = "Output", value_parser = PossibleValuesParser::new(Task::ALL.map(Task::name)))]
    task: Option<String>,
    /// Column of results [default: generated_text, logprob, embedding or label]
    #[arg(long, value_name = "NAME", help_heading = "Output")]
    result_column: Option<String>,
    /// Column of errors
    #[arg(long, value_name = "NAME", help_heading = "Output", default_value = "error")]
    error_column: String,
    /// Columns to carry along [default: all]
    #[arg(long, value_name = "NAME[,NAME…]", help_heading = "Output", value_delimiter = ',', num_args = 1)]
    keep_columns: Option<Vec<String>>,
    /// Add a column with token ids, finish reasons and whatever else `t5gemma generate --jsonl` or `t5gemma score` returns
    #[arg(long, help_heading = "Output")]
    details: bool,
    /// With --task score: do not append the end token to targets given as text
    #[arg(long, help_heading = "Scoring")]
    no_eos: bool,
    /// With --task encode: how the hidden states of a source become one vector [default: the model's]
    #[arg(
        long,
        value_name = "METHOD",
        help_heading = "Encoding",
        value_parser = PossibleValuesParser::new(["mean", "first", "last"])
    )]
    pooling: Option<String>,
    /// With --task encode: where vectors go, a column of lists or the NumPy array X.npy beside the output
    ///
    /// An array has float32 of the shape [rows, width]. Its row n belongs to row n of the output; for a row with an error it has NaNs.
    #[arg(
        long,
        value_name = "FORMAT",
        help_heading = "Encoding",
        default_value = VectorFormat::default().name(),
        value_parser = PossibleValuesParser::new(VectorFormat::ALL.map(VectorFormat::name))
    )]
    vectors: String,
    /// With --task encode: L2-normalize the vectors
    #[arg(long, help_heading = "Encoding")]
    normalize: bool,
    /// With --task classify: number of labels, best first; several make lists
    #[arg(long, value_name = "N", help_heading = "Classification", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    top_labels: u32,
    /// With --task classify: function that turns logits into scores [default: depends on the model]
    #[arg(
        long,
        value_name = "NAME",
        help_heading = "Classification",
        value_parser = PossibleValuesParser::new(ScoreFunction::ALL.map(ScoreFunction::name))
    )]
    function_to_apply: Option<String>,
    #[command(flatten)]
    adapters: AdapterArguments,
    #[command(flatten)]
    flags: GenerationFlags,
    /// Maximum number of target rows in flight on each device
    #[arg(long, value_name = "N", help_heading = "Runtime", default_value_t = EngineOptions::default().max_rows)]
    max_rows: usize,
    /// Maximum bytes of keys, values and logits that they may come to need
    #[arg(long, value_name = "BYTES", help_heading = "Runtime", default_value_t = EngineOptions::default().max_bytes)]
    max_bytes: usize,
    /// Generate in batches of --batch-size rows that depend on the input alone
    ///
    /// This is slower, but the last bits of scores then do not depend on time. It is always so if scores are returned: with --details
    /// and several beams, log-probabilities or attentions.
    #[arg(long, help_heading = "Runtime")]
    fixed_batches: bool,
    /// Number of rows in a batch, for other tasks than generate and with --fixed-batches
    #[arg(long, value_name = "ROWS", help_heading = "Runtime", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    /// Number of rows to sort by length at a time; at most three times as many are in memory
    #[arg(long, value_name = "ROWS", help_heading = "Runtime", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    window: u32,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

const EXAMPLES: &str = r#"Examples:
  Generate for the column "text" of every shard, on this machine:
    t5gemma batch model --input 'data/*.parquet' --output out --max-new-tokens 64

  The same in an array of 100 jobs:
    t5gemma batch model --input 'data/*.parquet' --output out --max-new-tokens 64 --shard auto/100

  The same from and into buckets:
    export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... AWS_REGION=eu-central-1
    t5gemma batch model --input 's3://documents/2026/*.jsonl.gz' --output s3://results/2026 --max-new-tokens 64

  Compute normalized vectors of the column "abstract" as papers.npy, with only the ids in papers.jsonl.gz beside it:
    t5gemma batch encoder --input papers.jsonl.gz --output vectors --task encode --pooling mean --normalize \
      --text-column abstract --keep-columns id --vectors npy

Files in the output folder:
  X.jsonl, …             the outputs, each complete; with --vectors npy, X.npy is complete before them
  _batch/settings.json   model and options that the folder was begun with; a run with others is refused
  _batch/X.jsonl.json    rows, errors, tokens and SHA-256 of an output
  _batch/*.tmp           outputs in progress

Exit status:
  0    every shard has its output
  1    some shards failed, or the job could not run; stderr says why, and another run may succeed
  2    invalid arguments, or other settings than the output folder was begun with; another run fails again
  130  interrupted or terminated; finished shards stay"#;

fn part(text: &str) -> Result<Part, String> {
    let expected = || format!("expected I/N with I from 0 to N - 1, or auto/N, found {text}");
    let (index, count) = text.split_once('/').ok_or_else(expected)?;
    let index = match index {
        "auto" => {
            let variables = ["JOB_COMPLETION_INDEX", "SLURM_ARRAY_TASK_ID"];
            let value = variables.into_iter().find_map(|name| std::env::var(name).ok());
            value.ok_or_else(|| format!("auto requires {} or {}", variables[0], variables[1]))?
        }
        index => index.to_string(),
    };
    match (index.parse(), count.parse()) {
        (Ok(index), Ok(count)) if index < count => Ok(Part { index, count }),
        (Ok::<usize, _>(index), Ok::<usize, _>(_)) => Err(format!("{} (the index is {index})", expected())),
        _ => Err(expected()),
    }
}

/// Runs the command.
pub fn run(arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    let start = Instant::now();
    let store = Store::open(&arguments.output).map_err(error)?;
    let columns = columns(&arguments);
    let found = t5gemma_batch::find(&arguments.input, &store, &columns, arguments.shard).map_err(error)?;
    let mut outcome = Outcome::Done;
    for pattern in &found.unmatched {
        note!("t5gemma: --input {pattern}: no file matches");
        outcome = Outcome::SomeFailed;
    }
    let mut given = arguments.flags.read()?;
    if let Some(name) = arguments.adapters.of_texts()? {
        given.insert("adapter".into(), name.into());
    }
    let task = task(&arguments)?;
    if columns.vectors != VectorFormat::Column && task != Task::Encode {
        bail_usage!("--vectors {} requires --task encode (got {})", arguments.vectors, task.name());
    }
    let settings = settings(&arguments, task, &columns, &given)?;
    let is_begun = settings.check(&store).map_err(error)?;
    if is_begun {
        store.sweep().map_err(error)?;
    }
    let names = store.names().map_err(error)?;
    let is_done =
        |name: &String| names.contains(name) && columns.beside(name).is_none_or(|beside| names.contains(&beside));
    let (done, missing): (Vec<Shard>, Vec<Shard>) = found.shards.into_iter().partition(|shard| is_done(&shard.name));
    if let (false, Some(shard)) = (is_begun, done.first()) {
        bail_usage!("--output {store}: holds {}, which no batch has written; choose another folder", shard.name);
    }
    note!("t5gemma: {} of {} shards to do, {} have their outputs", missing.len(), found.all, done.len());
    let summary = match missing.is_empty() {
        true => Default::default(),
        false => {
            let job =
                Run { arguments: &arguments, store: &store, settings: &settings, columns: &columns, shards: &missing };
            job.run(task, &given, cancel)?
        }
    };
    if summary.failed > 0 {
        note!("t5gemma: {} of {} shards failed", summary.failed, missing.len());
        outcome = Outcome::SomeFailed;
    }
    let mut line = json!({
        "shards": missing.len() + done.len(),
        "written": summary.written,
        "skipped": done.len() + summary.written_elsewhere,
        "failed": summary.failed,
    });
    let fields = line.as_object_mut().expect("an object");
    fields.extend(summary.totals());
    fields.insert("seconds".into(), ((start.elapsed().as_secs_f64() * 1e3).round() / 1e3).into());
    writeln!(io::stdout().lock(), "{line}").context("cannot write to stdout")?;
    Ok(outcome)
}

/// The task that is asked for, or that the model was exported for.
fn task(arguments: &Arguments) -> Result<Task> {
    let own = match task_of(&arguments.model.model)? {
        ModelTask::TextClassification | ModelTask::TokenClassification => Task::Classify,
        ModelTask::FeatureExtraction { .. } => Task::Encode,
        _ => Task::Generate,
    };
    let wanted = arguments.task.as_deref();
    Ok(Task::ALL.into_iter().find(|task| Some(task.name()) == wanted).unwrap_or(own))
}

fn columns(arguments: &Arguments) -> Columns {
    let mut columns = Columns::default();
    columns.id = arguments.id_column.clone();
    columns.text = arguments.text_column.clone();
    columns.target = arguments.target_column.clone();
    columns.result = arguments.result_column.clone();
    columns.error = arguments.error_column.clone();
    columns.kept = arguments.keep_columns.clone();
    columns.details = arguments.details;
    let vectors = VectorFormat::ALL.into_iter().find(|format| format.name() == arguments.vectors);
    columns.vectors = vectors.unwrap_or_default();
    columns
}

/// What decides on the bytes of outputs.
fn settings(arguments: &Arguments, task: Task, columns: &Columns, given: &Map<String, Value>) -> Result<Settings> {
    let model = &arguments.model.model;
    let mut adapters = Map::new();
    for (name, folder) in &arguments.adapters.adapter {
        let files = ["adapter_config.json", "adapter_model.safetensors"].map(|file| folder.join(file));
        adapters.insert(name.clone(), sha256(&files)?.into());
    }
    let mut options = given.clone();
    options.sort_keys();
    // Last bits may depend on them.
    let batches = (task != Task::Generate || is_in_fixed_batches(arguments, given)).then_some(arguments.batch_size);
    let settings = json!({
        "task": task.name(),
        "model": {"sha256": sha256(&[model.join("manifest.json")])?},
        "adapters": adapters,
        "provider": arguments.runtime.provider,
        "options": options,
        "columns": columns.to_json(task),
        "chat": {"texts": arguments.chat, "system": arguments.system},
        "max_source_length": arguments.max_source_length,
        "truncation": arguments.truncation,
        "batches": batches.map(|rows| json!({"rows": rows, "window": arguments.window})),
        "of_task": match task {
            Task::Generate => json!({}),
            Task::Score => json!({"no_eos": arguments.no_eos}),
            Task::Encode => json!({"pooling": arguments.pooling, "normalize": arguments.normalize}),
            Task::Classify => json!({
                "top_labels": arguments.top_labels,
                "function_to_apply": arguments.function_to_apply,
            }),
        },
    });
    let Value::Object(settings) = settings else { unreachable!("an object") };
    Ok(Settings(settings))
}

/// Whether targets are generated in fixed batches.
fn is_in_fixed_batches(arguments: &Arguments, given: &Map<String, Value>) -> bool {
    let is_given = |name: &str| given.get(name).is_some_and(|value| *value != json!(false) && *value != json!(0));
    let has_beams = given.get("num_beams").is_some_and(|beams| *beams != json!(1));
    let has_scores = has_beams || ["output_logprobs", "top_logprobs", "output_attentions"].into_iter().any(is_given);
    arguments.fixed_batches || arguments.details && has_scores
}

/// The SHA-256 of files, one after the other.
fn sha256(files: &[PathBuf]) -> Result<String> {
    let mut hash = Sha256::new();
    for file in files {
        hash.update(fs::read(file).with_context(|| format!("{}: cannot be read", file.display()))?);
    }
    Ok(hex::encode(hash.finalize()))
}

struct Run<'a> {
    arguments: &'a Arguments,
    store: &'a Store,
    settings: &'a Settings,
    columns: &'a Columns,
    shards: &'a [Shard],
}

impl Run<'_> {
    fn run(&self, task: Task, given: &Map<String, Value>, cancel: &Cancellation) -> Result<Summary> {
        if let Some(name) = given.keys().next().filter(|_| task != Task::Generate) {
            bail_usage!("{} requires --task generate (got {})", as_flag(name), task.name());
        }
        match task {
            Task::Generate => self.generate(given, cancel),
            Task::Score => self.score(cancel),
            Task::Encode | Task::Classify => self.vectors(task, cancel),
        }
    }

    fn opening(&self) -> Opening {
        let arguments = self.arguments;
        let mut opening = Opening::new(arguments.model.clone(), arguments.runtime.clone());
        opening.limits = Limits::default().max_sources(arguments.batch_size as usize);
        opening
    }

    fn generate(&self, given: &Map<String, Value>, cancel: &Cancellation) -> Result<Summary> {
        let (arguments, flags) = (self.arguments, &self.arguments.flags);
        let opening = self.opening();
        if is_in_fixed_batches(arguments, given) {
            opening.one_device()?;
        }
        let models = opening.open_all()?;
        arguments.adapters.load(&models)?;
        let model = models[0].clone();
        let options =
            model.generation_config().with_json(given).map_err(|error| flag_errors::of_flags(&error, flags))?;
        if let Err(error) = options.check_lengths()
            && flags.gives(&error.option)
        {
            return Err(flag_errors::of_flags(&error, flags).into());
        }
        ensure_usage!(options.max_time.is_none(), "--max-time: a batch's results must not depend on time");
        ensure_usage!(
            !options.do_sample || options.seed.is_some(),
            "--do-sample requires --seed, since another run must give the same results"
        );
        let is_fixed = is_in_fixed_batches(arguments, given);
        ensure_usage!(
            is_fixed || !arguments.details || !t5gemma_batch::has_scores(&options),
            "--details requires --fixed-batches with the scores that generation_config.json asks for"
        );
        let chat = Chat::new(opening.path(), &model).with(arguments.chat, arguments.system.clone());
        if arguments.chat {
            chat.template()?;
        }
        let generating = Generating {
            models,
            tokenize: &chat,
            options,
            engine: EngineOptions::default().max_rows(arguments.max_rows).max_bytes(arguments.max_bytes),
            fixed_batches: is_fixed.then_some(arguments.batch_size as usize),
            details: arguments.details,
            explain: Box::new(|error, options| flag_errors::of_request(error, options, flags)),
        };
        self.job(Worker::Generate(Box::new(generating)), cancel)
    }

    fn score(&self, cancel: &Cancellation) -> Result<Summary> {
        let arguments = self.arguments;
        let models = [std::sync::Arc::new(self.opening().open()?)];
        arguments.adapters.load(&models)?;
        let [model] = &models;
        let end = model.generation_config().eos_token_id.first().copied().filter(|_| !arguments.no_eos);
        let tokenize = WithFiles(&**model);
        let worker = Worker::Score(Scoring {
            model,
            tokenize: &tokenize,
            end,
            top_logprobs: 0,
            details: arguments.details,
            batch_size: arguments.batch_size as usize,
        });
        self.job(worker, cancel)
    }

    fn vectors(&self, task: Task, cancel: &Cancellation) -> Result<Summary> {
        let arguments = self.arguments;
        let encoder = self.opening().open_encoder()?;
        let tokenize = WithFiles(&encoder);
        let batch_size = arguments.batch_size as usize;
        if task == Task::Classify {
            let classifier = encoder.classifier()?;
            let of_tokens = encoder.manifest().task == ModelTask::TokenClassification;
            let default = if of_tokens { ScoreFunction::Softmax } else { ScoreFunction::of(classifier) };
            let wanted = arguments.function_to_apply.as_deref();
            let function = ScoreFunction::ALL.into_iter().find(|known| Some(known.name()) == wanted).unwrap_or(default);
            let top_k = arguments.top_labels as usize;
            let worker =
                Worker::Classify(Classifying { encoder: &encoder, tokenize: &tokenize, function, top_k, batch_size });
            return self.job(worker, cancel);
        }
        let own = encoder.features()?;
        let wanted = arguments.pooling.as_deref();
        let pooling = Pooling::ALL.into_iter().find(|known| Some(known.name()) == wanted).unwrap_or(own.pooling);
        ensure_usage!(pooling != Pooling::None, "--task encode requires --pooling mean, first or last with this model");
        let worker = Worker::Encode(Encoding {
            encoder: &encoder,
            tokenize: &tokenize,
            pooling,
            normalize: arguments.normalize,
            max_length: arguments.max_source_length.map(|length| length as usize),
            truncation: arguments.truncation,
            batch_size,
        });
        self.job(worker, cancel)
    }

    fn job(&self, worker: Worker, cancel: &Cancellation) -> Result<Summary> {
        let (store, settings, columns) = (self.store, self.settings, self.columns);
        let window_rows = self.arguments.window as usize;
        let job = Job { shards: self.shards, store, settings, columns, worker, window_rows };
        let mut shown = Shown::new(self.shards.len());
        t5gemma_batch::run(&job, cancel, &mut |event| shown.event(event)).map_err(error)
    }
}

/// An error of the job in terms of the command line.
fn error(error: BatchError) -> anyhow::Error {
    match error {
        BatchError::Arguments(problem) => Usage(problem).into(),
        BatchError::Runtime(Error::Cancelled) => Error::Cancelled.into(),
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read() {
        let cases =
            [("0/1", Some((0, 1))), ("3/4", Some((3, 4))), ("4/4", None), ("0/0", None), ("x/2", None), ("2", None)];
        for (text, expected) in cases {
            let expected = expected.map(|(index, count)| Part { index, count });
            assert_eq!(part(text).ok(), expected, "{text}");
        }
    }
}
