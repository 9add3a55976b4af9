//! `t5gemma bench --clients`: how fast an engine serves clients that each send their next request when the last one is
//! answered. Sources have different lengths, so that rows of different lengths share steps.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};
use t5gemma_runtime::{
    Batch, Cancellation, Engine, EngineOptions, EngineStats, Error, Event, GenerationConfig, Message, Model, Request,
    RequestStats,
};

use super::machine::Memory;
use super::{Case, Times, Workload, model_json, random_tokens};
use crate::exit::{Outcome, ensure_usage};
use crate::opening::Opening;
use crate::progress::counter;

/// How often the main thread looks whether it was cancelled.
const PATIENCE: Duration = Duration::from_millis(100);

/// Measures an engine and prints the report.
pub fn run(opening: &Opening, workload: &Workload, clients: u32, json: bool, cancel: &Cancellation) -> Result<Outcome> {
    let model = Arc::new(opening.open()?);
    let longest = model.facts().encoder.max_position_embeddings;
    for (flag, length) in
        [("--source-length", workload.source_length), ("--long-sources", workload.long_sources.unwrap_or(1))]
    {
        ensure_usage!(
            length as usize <= longest,
            "{flag}: expected at most {longest} (encoder.max_position_embeddings), found {length}"
        );
    }
    let found = Clients::new(&model, workload, clients as usize)?.measure(cancel)?;
    let memory = Memory::now();
    let text = if json {
        format!("{:#}\n", report_json(&model, workload, clients, opening, &found, memory))
    } else {
        report_table(&model, workload, clients, opening, &found, memory)
    };
    io::stdout().lock().write_all(text.as_bytes())?;
    Ok(Outcome::Done)
}

/// What a sink tells the main thread.
enum Told {
    /// Tokens of a client's source are final.
    Token {
        client: usize,
        at: Instant,
    },
    Ended {
        client: usize,
        at: Instant,
        result: Result<(), Error>,
        stats: RequestStats,
    },
}

struct Clients {
    engine: Engine,
    model: Arc<Model>,
    options: GenerationConfig,
    /// The length of each client's sources.
    lengths: Vec<usize>,
    /// The number of clients whose requests are measured; one more sends long sources.
    measured: usize,
    warmup: usize,
    repeat: usize,
    sender: Sender<Told>,
    receiver: Receiver<Told>,
}

/// What was measured.
struct Measured {
    seconds: f64,
    tokens: usize,
    requests: usize,
    queued: Times,
    first_token: Times,
    whole: Times,
    /// Between two tokens of one request.
    gap: Option<Times>,
    before: EngineStats,
    after: EngineStats,
}

impl Clients {
    fn new(model: &Arc<Model>, workload: &Workload, clients: usize) -> Result<Clients> {
        let rows = clients.saturating_mul(workload.num_beams as usize);
        let bounds = EngineOptions::default().max_rows(rows.max(64)).max_bytes(usize::MAX);
        let (longest, tokens) = (workload.source_length as usize, workload.max_new_tokens as usize);
        let mut options = Case::options(model, workload.num_beams as usize);
        (options.max_new_tokens, options.min_new_tokens) = (Some(tokens), Some(tokens));
        // From an eighth of the longest to the longest, evenly, in mixed order.
        let shortest = longest.div_ceil(8);
        let mut lengths: Vec<usize> = (0..clients)
            .map(|client| {
                shortest + (longest - shortest) * (client * 7 % clients.max(1)) / clients.max(2).saturating_sub(1)
            })
            .map(|length| length.min(longest))
            .collect();
        lengths.extend(workload.long_sources.map(|length| length as usize));
        let (sender, receiver) = mpsc::channel();
        Ok(Clients {
            engine: Engine::new(model.clone(), bounds)?,
            model: model.clone(),
            options,
            lengths,
            measured: clients,
            warmup: workload.warmup.max(1) as usize,
            repeat: workload.repeat as usize,
            sender,
            receiver,
        })
    }

    /// A request of a client, with other tokens each time, so that no source is in the encoder cache.
    fn request(&self, client: usize, round: usize) -> Result<Request> {
        let (model, length) = (&self.model, self.lengths[client]);
        let skipped = round % 9973;
        let tokens = random_tokens(model.facts().encoder.vocab_size, skipped + length);
        let batch = Batch::padded(&[&tokens[skipped..]], self.options.pad_token_id)?;
        let new_tokens = self.options.max_new_tokens.unwrap_or_default();
        let Case { batch, options, .. } = Case::new(model, batch, self.options.clone(), new_tokens)?;
        Ok(Request::new(batch, options))
    }

    fn submit(&self, client: usize, round: usize) -> Result<()> {
        let sender = self.sender.clone();
        let request = self.request(client, round)?;
        self.engine.submit_to(request, move |message| {
            let at = Instant::now();
            // The receiver is gone once everything is measured.
            let _ = match message {
                Message::Event(Event::Token { .. }) => sender.send(Told::Token { client, at }),
                Message::Ended { result, stats } => sender.send(Told::Ended { client, at, result, stats }),
                Message::Event(_) => Ok(()),
            };
        })?;
        Ok(())
    }

    /// Serves until every client has had its measured requests. Counts from the moment when every client has warmed up.
    fn measure(self, cancel: &Cancellation) -> Result<Measured> {
        let done = counter("requests", false);
        let clients = self.lengths.len();
        let mut finished = vec![0; clients];
        let mut last_token: Vec<Option<Instant>> = vec![None; clients];
        let (mut queued, mut first, mut whole, mut gaps) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        let mut start: Option<(Instant, EngineStats)> = None;
        let (mut tokens, mut requests) = (0, 0);
        for client in 0..clients {
            self.submit(client, client)?;
        }
        loop {
            let told = match self.receiver.recv_timeout(PATIENCE) {
                Ok(told) => told,
                Err(_) => {
                    cancel.check()?;
                    continue;
                }
            };
            match told {
                Told::Token { client, at } => {
                    let before = last_token[client].replace(at);
                    if let Some((start, _)) = start
                        && client < self.measured
                    {
                        tokens += 1;
                        gaps.extend(before.filter(|&before| before >= start).map(|before| milliseconds(at - before)));
                    }
                }
                Told::Ended { client, at, result, stats } => {
                    result?;
                    last_token[client] = None;
                    finished[client] += 1;
                    if client < self.measured {
                        if let Some((start, _)) = start
                            && at - start >= stats.total
                        {
                            requests += 1;
                            done.inc(1);
                            queued.push(milliseconds(stats.queued));
                            first.extend(stats.first_token.map(milliseconds));
                            whole.push(milliseconds(stats.total));
                        }
                        if start.is_none() && finished[..self.measured].iter().all(|&count| count >= self.warmup) {
                            start = Some((at, self.engine.stats()));
                        }
                        if let Some((start, before)) = start
                            && requests >= self.measured * self.repeat
                        {
                            done.finish_and_clear();
                            let times = "at least one request is measured";
                            return Ok(Measured {
                                seconds: (at - start).as_secs_f64(),
                                tokens,
                                requests,
                                queued: Times::of(queued).expect(times),
                                first_token: Times::of(first).expect(times),
                                whole: Times::of(whole).expect(times),
                                gap: Times::of(gaps),
                                before,
                                after: self.engine.stats(),
                            });
                        }
                    }
                    self.submit(client, finished[client] * clients + client)?;
                }
            }
        }
    }
}

impl Measured {
    fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    fn steps(&self) -> u64 {
        self.after.steps - self.before.steps
    }

    fn rows_per_step(&self) -> f64 {
        (self.after.stepped_rows - self.before.stepped_rows) as f64 / self.steps().max(1) as f64
    }
}

fn report_json(
    model: &Model,
    workload: &Workload,
    clients: u32,
    opening: &Opening,
    found: &Measured,
    memory: Option<Memory>,
) -> Value {
    json!({
        "model": model_json(opening, model.manifest()),
        "case": {
            "clients": clients,
            "num_beams": workload.num_beams,
            "source_length": workload.source_length,
            "long_sources": workload.long_sources,
            "max_new_tokens": workload.max_new_tokens,
            "warmup": workload.warmup,
            "repeat": workload.repeat,
            "threads": opening.runtime.threads,
        },
        "seconds": found.seconds,
        "requests": found.requests,
        "tokens_per_second": found.tokens_per_second(),
        "steps": found.steps(),
        "rows_per_step": found.rows_per_step(),
        "queued_ms": found.queued.json(),
        "first_token_ms": found.first_token.json(),
        "token_gap_ms": found.gap.as_ref().map(Times::json),
        "request_ms": found.whole.json(),
        "memory_bytes": memory.map(Memory::json),
    })
}

fn report_table(
    model: &Model,
    workload: &Workload,
    clients: u32,
    opening: &Opening,
    found: &Measured,
    memory: Option<Memory>,
) -> String {
    let manifest = model.manifest();
    let times = |times: Option<&Times>| match times {
        Some(times) => times.row().map(|time| format!("{time:>10.2}")).concat(),
        None => "not available".to_string(),
    };
    let threads = opening.runtime.threads.map_or("one per core".to_string(), |threads| threads.to_string());
    let long = workload.long_sources.map_or(String::new(), |length| format!(", and one with sources of {length}"));
    let longest = workload.source_length;
    [
        ("model", format!("{}: {}, {}", opening.path().display(), manifest.target, manifest.dtype)),
        ("clients", format!("{clients} with sources of {} to {longest} tokens{long}", longest.div_ceil(8))),
        ("targets", format!("{} tokens, num_beams {}", workload.max_new_tokens, workload.num_beams)),
        ("requests", format!("{} in {:.1} s; threads: {threads}", found.requests, found.seconds)),
        ("ms", Times::COLUMNS.map(|column| format!("{column:>10}")).concat()),
        ("  queued", times(Some(&found.queued))),
        ("  first token", times(Some(&found.first_token))),
        ("  token gap", times(found.gap.as_ref())),
        ("  request", times(Some(&found.whole))),
        ("tokens/s", format!("{:.1}", found.tokens_per_second())),
        ("steps", format!("{} of {:.1} rows each", found.steps(), found.rows_per_step())),
        ("memory", Memory::text(memory)),
    ]
    .map(|(name, value)| format!("{name:<16}{value}\n"))
    .concat()
}
