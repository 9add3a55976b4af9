//! `t5gemma generate`: text in, text out; or requests in, results out, as JSON lines.

mod continuous;
mod json_lines;

use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::{Map, Value};
use t5gemma_protocol::{GenerateResponse, GenerateResult, Sequence, TokenizedRequest, Usage};
use t5gemma_runtime::{
    Cancellation, Controls, DEFAULT_ENCODER_CACHE_BYTES, Draws, Engine, Error, FinishReason, GenerationConfig,
    Hypothesis, Model, SpecialTokens,
};

use crate::chat::Chat;
use crate::exit::Outcome;
use crate::exit::{bail_usage, ensure_usage};
use crate::flag_errors;
use crate::images::ImageArguments;
use crate::lines::Lines;
use crate::opening::{AdapterArguments, ModelArguments, Opening, RuntimeArguments};
use crate::options::GenerationFlags;
use crate::packing::Packing;
use crate::progress::counter;
use crate::requests::{self, Kind, Refused};
use crate::stderr::note;
use json_lines::JSON_LINES;

/// Generate targets for texts or JSON requests
///
/// The texts are the arguments or, without any, the lines of stdin. Targets are written to stdout, one per line, in the
/// order of the texts; if a text fails, its line is empty and the reason is on stderr. With --jsonl, requests and
/// results are JSON lines, described below.
///
/// Generation options have their Hugging Face names. Boolean options need no value: `--do-sample` means `--do-sample
/// true`. Put `--` before a text that begins with a hyphen, and between a boolean option and the text `true`.
#[derive(clap::Args)]
#[command(after_long_help = JSON_LINES)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Texts to generate targets for [default: the lines of stdin]
    #[arg(value_name = "TEXT", help_heading = None::<&str>)]
    texts: Vec<String>,
    /// Read requests and write results as JSON lines
    #[arg(long, help_heading = "Input", conflicts_with = "texts")]
    jsonl: bool,
    /// Format each text as a user's turn with the chat template
    #[arg(long, help_heading = "Input")]
    chat: bool,
    /// System turn for conversations that have none
    ///
    /// The chat template must support system turns.
    #[arg(long, value_name = "TEXT", help_heading = "Input")]
    system: Option<String>,
    /// Text that every target starts with; only what follows it is printed
    #[arg(long, value_name = "TEXT", help_heading = "Input", conflicts_with = "jsonl")]
    decoder_text: Option<String>,
    /// Read hidden states written by `t5gemma encode` instead of texts
    ///
    /// They must come from the same encoder, which then does not run. Results are in the order of the ids.
    #[arg(
        long,
        value_name = "FILE.safetensors",
        help_heading = "Input",
        conflicts_with_all = ["texts", "chat", "system", "images"]
    )]
    encoder_outputs: Option<PathBuf>,
    #[command(flatten)]
    images: ImageArguments,
    #[command(flatten)]
    adapters: AdapterArguments,
    #[command(flatten)]
    flags: GenerationFlags,
    #[command(flatten)]
    packing: Packing,
    /// Size of the cache of encoder outputs, for repeated sources; 0 turns it off
    #[arg(long, value_name = "BYTES", help_heading = "Runtime", default_value_t = DEFAULT_ENCODER_CACHE_BYTES)]
    encoder_cache_bytes: usize,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

/// Runs the command.
pub fn run(arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    let packing = arguments.packing;
    let mut opening = Opening::new(arguments.model, arguments.runtime);
    opening.encoder_cache_bytes = arguments.encoder_cache_bytes;
    opening.limits = packing.limits();
    if !arguments.jsonl {
        opening.one_device()?;
    }
    ensure_usage!(
        arguments.system.is_none() || arguments.chat || arguments.jsonl,
        "--system requires --chat, or --jsonl with requests that have messages"
    );
    let flags = &arguments.flags;
    let mut given = flags.read()?;
    if !arguments.jsonl
        && let Some(name) = arguments.adapters.of_texts()?
    {
        given.insert("adapter".into(), name.into());
    }
    let models = opening.open_all()?;
    arguments.adapters.load(&models)?;
    let model = models[0].clone();
    // Reject flags that are wrong for every request before reading any.
    let options = model.generation_config().with_json(&given).map_err(|error| flag_errors::of_flags(&error, flags))?;
    // Requests may still set the other length option.
    let are_final = !arguments.jsonl || ["max_new_tokens", "max_length"].iter().any(|name| flags.gives(name));
    if let Err(error) = options.check_lengths()
        && flags.gives(&error.option)
        && are_final
    {
        return Err(flag_errors::of_flags(&error, flags).into());
    }
    let of_jsonl = [("--output-logprobs", options.output_logprobs), ("--output-attentions", options.output_attentions)];
    if let Some((flag, _)) = of_jsonl.iter().find(|(_, is_asked)| *is_asked && !arguments.jsonl) {
        bail_usage!("{flag} requires --jsonl, since lines of text cannot hold its results");
    }
    let prompt = arguments.decoder_text.map(|text| model.target_tokenizer()?.encode_target(&text)).transpose()?;
    let chat = Chat::new(opening.path(), &model).with(arguments.chat, arguments.system);
    if arguments.chat {
        chat.template()?;
    }
    let (jsonl, images) = (arguments.jsonl, arguments.images.fields());
    ensure_usage!(images.is_empty() || !arguments.chat, "--image cannot be used with --chat");
    let (model, chat, options) = (&*model, &chat, &options);
    let answering = Answering { model, chat, cancel, options, flags, images, prompt, packing, jsonl };
    if let Some(file) = &arguments.encoder_outputs {
        return answering.given(requests::read_encoder_outputs(file)?);
    }
    if arguments.jsonl {
        // The engine neither drafts tokens nor has a token budget.
        let can_be_shared = !answering.packing.is_by_tokens() && options.prompt_lookup_num_tokens.is_none();
        if models.len() > 1 {
            let expected = "--device: expected one GPU with --max-batch-tokens or --prompt-lookup-num-tokens";
            ensure_usage!(can_be_shared, "{expected}, found {}", models.len());
            return answering.continuous(&models);
        }
        let is_shared = Engine::shares_all_steps(model) && answering.packing.rows() > 1;
        return if is_shared && can_be_shared { answering.continuous(&models) } else { answering.jsonl() };
    }
    model.target_tokenizer()?;
    if !arguments.texts.is_empty() {
        let mut texts = arguments.texts.into_iter();
        return answering.texts(|| Ok(texts.next().map(String::into_bytes)), || Ok(true));
    }
    let lines = std::cell::RefCell::new(Lines::texts());
    let next = || Ok(lines.borrow_mut().next(cancel)?.map(|(_, line)| line));
    answering.texts(next, || lines.borrow_mut().is_ready(answering.packing.patience()))
}

struct Answering<'a> {
    model: &'a Model,
    /// The model and chat template that requests are tokenized with.
    chat: &'a Chat<'a>,
    cancel: &'a Cancellation,
    /// The model's options overridden by the flags; a request's options override these.
    options: &'a GenerationConfig,
    flags: &'a GenerationFlags,
    /// The fields of the images of every request that has none of its own.
    images: Map<String, Value>,
    /// The tokens that every target starts with.
    prompt: Option<Vec<i64>>,
    packing: Packing,
    /// Whether requests have their own options.
    jsonl: bool,
}

impl Answering<'_> {
    /// Answers waiting texts in batches, or on a terminal one by one, streamed as they are generated.
    fn texts(
        &self,
        mut next: impl FnMut() -> Result<Option<Vec<u8>>>,
        mut is_ready: impl FnMut() -> Result<bool>,
    ) -> Result<Outcome> {
        let streaming = self.options.num_return_sequences == 1 && io::stdout().is_terminal();
        let window = if streaming { 1 } else { self.packing.window() };
        let mut outcome = Outcome::Done;
        let done = counter("texts", true);
        let mut number = 0;
        while let Some(text) = next()? {
            let mut texts = vec![text];
            while texts.len() < window && is_ready()? {
                match next()? {
                    Some(text) => texts.push(text),
                    None => break,
                }
            }
            let requests: Vec<Result<TokenizedRequest, Refused>> = texts
                .iter()
                .enumerate()
                .map(|(i, text)| {
                    let request = requests::read_text(text, &self.images, number + i, Kind::Generate, self.chat)?;
                    Ok(TokenizedRequest { prompts: self.prompt.clone().map(|prompt| vec![prompt]), ..request })
                })
                .collect();
            number += texts.len();
            done.set_position(number as u64);
            for (i, answer) in self.answers(requests, streaming)?.into_iter().enumerate() {
                match answer {
                    Ok((_, rows)) => {
                        for hypothesis in rows.iter().flatten() {
                            let text = if streaming {
                                String::new()
                            } else {
                                self.model.target_tokenizer()?.decode(&hypothesis.tokens, SpecialTokens::Skip)?
                            };
                            println_flushed(&text)?;
                            if hypothesis.finish_reason == FinishReason::ConstraintIncomplete {
                                let text = number - texts.len() + i + 1;
                                let problem = "the output ended before meeting its constraint";
                                done.suspend(|| note!("t5gemma: text {text}: {problem}"));
                                outcome = Outcome::SomeFailed;
                            }
                        }
                    }
                    Err(refused) => {
                        // An empty line keeps output lines aligned with input lines.
                        println_flushed("")?;
                        let text = number - texts.len() + i + 1;
                        done.suspend(|| note!("t5gemma: text {text}: {}", refused.reason));
                        outcome = Outcome::SomeFailed;
                    }
                }
            }
        }
        Ok(outcome)
    }

    /// Answers requests that have all been read, as texts or as JSON lines.
    fn given(&self, requests: Vec<TokenizedRequest>) -> Result<Outcome> {
        let jsonl = self.jsonl;
        let mut outcome = Outcome::Done;
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let group = requests.by_ref().take(self.packing.window()).map(|request| {
                let prompts = self.prompt.clone().map(|prompt| vec![prompt; request.sources.len()]);
                Ok(TokenizedRequest { prompts, ..request })
            });
            let group = group.collect();
            for answer in self.answers(group, false)? {
                match answer {
                    Ok((request, rows)) if jsonl => println_flushed(&response(Ok(self.result(&request, &rows)?))?)?,
                    Ok((_, rows)) => {
                        for hypothesis in rows.iter().flatten() {
                            let text =
                                self.model.target_tokenizer()?.decode(&hypothesis.tokens, SpecialTokens::Skip)?;
                            println_flushed(&text)?;
                        }
                    }
                    Err(refused) => {
                        outcome = Outcome::SomeFailed;
                        if jsonl {
                            println_flushed(&response(Err(refused))?)?;
                        } else {
                            println_flushed("")?;
                            note!("t5gemma: text {}: {}", refused.id, refused.reason);
                        }
                    }
                }
            }
        }
        Ok(outcome)
    }

    fn jsonl(&self) -> Result<Outcome> {
        let mut lines = Lines::requests();
        let mut outcome = Outcome::Done;
        let done = counter("requests", true);
        while let Some((number, line)) = lines.next(self.cancel)? {
            let mut requests = vec![requests::read_line(&line, &self.images, number, Kind::Generate, self.chat)];
            let rows = |requests: &[Result<TokenizedRequest, Refused>]| {
                requests.iter().flatten().map(|request| request.sources.len()).sum::<usize>()
            };
            let window = self.packing.window();
            while rows(&requests) < window && requests.len() < window && lines.is_ready(self.packing.patience())? {
                let Some((number, line)) = lines.next(self.cancel)? else { break };
                requests.push(requests::read_line(&line, &self.images, number, Kind::Generate, self.chat));
            }
            for answer in self.answers(requests, false)? {
                // A decoding failure affects only its own request.
                let result = answer.and_then(|(request, rows)| {
                    self.result(&request, &rows).map_err(|error| Refused { id: request.id, reason: error.to_string() })
                });
                if result.is_err() {
                    outcome = Outcome::SomeFailed;
                }
                println_flushed(&response(result)?)?;
                done.inc(1);
            }
        }
        Ok(outcome)
    }

    /// Answers requests in order. Requests with the same options and decoder prompt run as one batch if they are
    /// adjacent or, with a token budget, wherever they are.
    fn answers(&self, mut requests: Vec<Result<TokenizedRequest, Refused>>, stream: bool) -> Result<Vec<Answer>> {
        if self.packing.is_by_tokens() && !stream {
            requests.iter_mut().flatten().for_each(|request| request.seed = self.seed(request));
            return self.packing.run(requests, fits, |pack| self.group(pack, false));
        }
        let mut answers = Vec::with_capacity(requests.len());
        let mut group: Vec<TokenizedRequest> = Vec::new();
        for request in requests {
            match request {
                Ok(mut request) => {
                    request.seed = self.seed(&request);
                    if group.first().is_some_and(|first| !fits(first, &request)) {
                        answers.extend(self.group(std::mem::take(&mut group), stream)?);
                    }
                    group.push(request);
                }
                Err(refused) => {
                    answers.extend(self.group(std::mem::take(&mut group), stream)?);
                    answers.push(Err(refused));
                }
            }
        }
        answers.extend(self.group(group, stream)?);
        Ok(answers)
    }

    /// The seed of a request, if it samples. Invalid options are reported when the request runs.
    fn seed(&self, request: &TokenizedRequest) -> Option<u64> {
        let options = self.options.with_json(&request.options).ok().filter(|options| options.do_sample)?;
        Some(options.seed.unwrap_or_else(Draws::random_seed))
    }

    /// Answers requests that fit into one batch. If the batch fails, each request runs alone, so that only the one at
    /// fault fails.
    fn group(&self, mut group: Vec<TokenizedRequest>, stream: bool) -> Result<Vec<Answer>> {
        if group.is_empty() {
            return Ok(Vec::new());
        }
        match self.generate(&group, stream) {
            Ok(mut rows) => Ok(group
                .into_iter()
                .map(|request| {
                    let rest = rows.split_off(request.sources.len());
                    Ok((request, std::mem::replace(&mut rows, rest)))
                })
                .collect()),
            Err(Error::Cancelled) => Err(Error::Cancelled.into()),
            Err(error) if group.len() == 1 => {
                // Texts all have the options of the command line.
                match flag_errors::of_texts(&error, self.flags).filter(|_| !self.jsonl) {
                    Some(usage) => Err(usage.into()),
                    None => Ok(vec![Err(self.refused(group.remove(0), &error))]),
                }
            }
            Err(_) => {
                let alone = group.into_iter().map(|request| self.group(vec![request], stream));
                Ok(alone.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
            }
        }
    }

    /// The answer to a request that fails.
    fn refused(&self, request: TokenizedRequest, error: &Error) -> Refused {
        Refused { reason: flag_errors::of_request(error, &request.options, self.flags), id: request.id }
    }

    fn generate(&self, group: &[TokenizedRequest], stream: bool) -> Result<Vec<Vec<Hypothesis>>, Error> {
        let options = self.options.with_json(&group[0].options)?;
        let batch = t5gemma_protocol::batch(group, options.pad_token_id)?;
        if !stream {
            return self.model.generate_batch(&batch, &options, Controls::default().cancellation(self.cancel));
        }
        let mut text = self.model.target_tokenizer()?.stream(SpecialTokens::Skip);
        let mut failed = None;
        let mut show = |_row: usize, token: i64| match text.push(token).map(|piece| print_flushed(&piece)) {
            Ok(Ok(())) => ControlFlow::Continue(()),
            Ok(Err(_)) => ControlFlow::Break(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        };
        let rows = self.model.generate_batch(
            &batch,
            &options,
            Controls::default().streamer(&mut show).cancellation(self.cancel),
        );
        if let Some(error) = failed {
            return Err(error);
        }
        // A broken pipe fails again at the end of the line, where it can be told from a cancellation.
        let _ = print_flushed(&text.finish()?);
        rows
    }

    /// The result of a request.
    fn result(&self, request: &TokenizedRequest, rows: &[Vec<Hypothesis>]) -> Result<GenerateResult, Error> {
        let tokenizer = self.model.target_tokenizer().ok();
        let of_row = |(row, source): (&Vec<Hypothesis>, &Vec<i64>)| {
            row.iter().map(|hypothesis| Sequence::generated(hypothesis, source.len(), tokenizer)).collect()
        };
        let sequences = rows.iter().zip(&request.sources).map(of_row).collect::<Result<_, Error>>()?;
        let target_tokens = rows.iter().flatten().map(|hypothesis| hypothesis.tokens.len()).sum();
        let usage = Usage { source_tokens: request.source_tokens(), target_tokens };
        Ok(GenerateResult { id: Some(request.id.clone()), sequences, seed: request.seed, usage })
    }
}

type Answer = Result<(TokenizedRequest, Vec<Vec<Hypothesis>>), Refused>;

/// Whether two requests can be one batch.
fn fits(a: &TokenizedRequest, b: &TokenizedRequest) -> bool {
    same_prompt(a, b) && without_seed(a).eq(without_seed(b))
}

/// Whether all targets of both have the same decoder prompt, as a batch requires.
fn same_prompt(a: &TokenizedRequest, b: &TokenizedRequest) -> bool {
    let mut all = [a, b].into_iter().flat_map(|request| match &request.prompts {
        Some(prompts) => prompts.iter().map(Some).collect(),
        None => vec![None],
    });
    all.next().is_some_and(|first| all.all(|prompt| prompt == first))
}

/// A request's options except the seed, which is per row.
fn without_seed(request: &TokenizedRequest) -> impl Iterator<Item = (&String, &Value)> {
    request.options.iter().filter(|(name, _)| *name != "seed")
}

/// The JSON line of an answer.
fn response(answer: Result<GenerateResult, Refused>) -> Result<String> {
    Ok(serde_json::to_string(&match answer {
        Ok(result) => GenerateResponse::Result(result),
        Err(refused) => GenerateResponse::Error(refused.into()),
    })?)
}

fn print_flushed(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write to stdout")
}

fn println_flushed(text: &str) -> Result<()> {
    print_flushed(&format!("{text}\n"))
}
