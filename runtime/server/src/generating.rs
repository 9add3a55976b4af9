//! `Ask` and `Generating`: what every door turns a request for targets into, and the answer as it arrives. Tokenizing,
//! admission, deadlines and counting are done here, once for all doors.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use t5gemma_protocol::{GENERATION_OPTIONS, GenerateRequest, Id, OptionGroup, TokenRows, TokenizedRequest};
use t5gemma_runtime::{
    Draws, Event, GenerationConfig, Hypothesis, Message, Priority, Request, RequestStats, SpecialTokens, TextStream,
    Tokenizer,
};

use crate::admission::{Permit, Size};
use crate::app::App;
use crate::call::Call;
use crate::events::Events;
use crate::failure::{Failure, Reason};
use crate::served::{Generator, Served};
use crate::traces::Trace;
use crate::truncation;
use crate::uploads::{Uploads, WithUploads};

/// A request for targets.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    /// The request: sources, decoder prompts and options.
    pub request: GenerateRequest,
    /// Sources as token ids, which need not be of equal length; in place of those of the request.
    pub tokens: Option<Vec<Vec<i64>>>,
    /// What its images are, where they have no URI.
    pub uploads: Uploads,
    /// Sources that are texts keep only their last tokens, this many.
    pub keep_last: Option<usize>,
    /// Whether options of sampling are ignored where nothing is sampled, as clients send them always.
    pub is_lenient: bool,
    /// Maximum number of generated tokens, if neither the request nor the server says.
    pub default_new_tokens: Option<usize>,
}

/// A request in progress. Dropping it ends it.
#[derive(Debug)]
pub struct Generating {
    /// The model.
    pub served: Arc<Served>,
    /// The options, complete.
    pub config: GenerationConfig,
    /// The tokens of each source as given.
    pub source_lengths: Vec<usize>,
    /// The number of source tokens, without padding.
    pub source_tokens: usize,
    /// The number of generated tokens so far, of finished rows.
    pub target_tokens: usize,
    /// The seed, if tokens are sampled.
    pub seed: Option<u64>,
    app: Arc<App>,
    events: Events,
    permit: Permit,
    trace: Trace,
    submitted: SystemTime,
    /// From acceptance until the engine had the request.
    prepared: Duration,
    has_ended: bool,
}

impl Call {
    /// Accepts a request, tokenizes it and hands it to the model's engine.
    ///
    /// # Errors
    /// A request that is invalid, too large, or too much now.
    pub async fn generate(&self, served: Arc<Served>, ask: Ask) -> Result<Generating, Failure> {
        let permit = self.app.admission.enter(self.tenant.as_ref())?;
        let app = self.app.clone();
        // Each needs several times the memory of its pixels while it is decoded.
        let turn = match ask.request.images.is_given() {
            true => Some(self.app.decoding.clone().acquire_owned().await.expect("nobody closes it")),
            false => None,
        };
        let trace = self.trace.clone();
        let caller = Caller {
            trace,
            deadline: self.deadline,
            priority: self.priority,
            tenant: self.tenant.as_ref().map(|it| it.name.clone()),
        };
        // Tokenizing and compiling constraints take their time.
        let begun = tokio::task::spawn_blocking(move || {
            let begun = begin(app, served, ask, permit, caller);
            drop(turn);
            begun
        });
        begun.await.map_err(|_| Failure::new(Reason::Internal, "the request could not be prepared"))?.map_err(named)
    }
}

/// What the engine is told of the caller.
struct Caller {
    trace: Trace,
    deadline: Instant,
    priority: Priority,
    tenant: Option<String>,
}

/// The runtime checks the two length options as one.
fn named(failure: Failure) -> Failure {
    match failure.field.as_deref() {
        Some("max_length") => Failure {
            field: Some("max_new_tokens".into()),
            message: failure.message.replacen("max_length", "max_new_tokens or max_length", 1),
            ..failure
        },
        _ => failure,
    }
}

fn begin(
    app: Arc<App>,
    served: Arc<Served>,
    ask: Ask,
    mut permit: Permit,
    caller: Caller,
) -> Result<Generating, Failure> {
    let Some(generator) = served.generator() else {
        return Err(Failure::new(Reason::Invalid, format!("{} does not generate", served.name)));
    };
    check_images(ask.request.images.count(), &app)?;
    let mut request = tokenized(&ask, generator)?;
    let limit = app.config.limits.max_request_sources;
    if request.sources.len() > limit {
        let message =
            format!("the request has {} sources, but the server takes at most {limit}", request.sources.len());
        return Err(Failure::new(Reason::TooLarge, message));
    }
    let config = options(&request, &ask, generator, &app)?;
    if config.do_sample {
        request.seed = Some(config.seed.unwrap_or_else(Draws::random_seed));
    }
    let rows = request.sources.len() * config.num_beams.max(config.num_return_sequences);
    let images = request.images.iter().map(Vec::len).sum();
    check_images(images, &app)?;
    permit.grow(Size { rows, tokens: request.sources.iter().map(Vec::len).sum(), images })?;
    let batch = t5gemma_protocol::batch(std::slice::from_ref(&request), config.pad_token_id)?;
    let mut engine_request = Request::new(batch, config.clone()).deadline(caller.deadline).priority(caller.priority);
    engine_request.tenant = caller.tenant;
    let (prepared, submitted) = (permit.age(), SystemTime::now());
    let (counted, name) = (app.clone(), served.name.clone());
    let mut last_tokens = vec![None; request.sources.len()];
    let on_token = move |row: usize| {
        let now = Instant::now();
        let before: Option<Instant> = last_tokens.get_mut(row).and_then(|last| last.replace(now));
        if let (Some(metrics), Some(before)) = (counted.metrics.model(&name), before) {
            metrics.between_tokens.observe(now - before);
        }
    };
    let events = Events::submit(&generator.engine, engine_request, on_token)?;
    let source_lengths: Vec<usize> = request.sources.iter().map(Vec::len).collect();
    Ok(Generating {
        config,
        source_tokens: request.source_tokens(),
        target_tokens: 0,
        seed: request.seed,
        source_lengths,
        trace: caller.trace,
        submitted,
        prepared,
        has_ended: false,
        app,
        events,
        permit,
        served,
    })
}

/// Refuses a request with more images than the server takes in one.
pub fn check_images(count: usize, app: &App) -> Result<(), Failure> {
    let limit = app.config.limits.max_request_images;
    if count > limit {
        let message = format!("the request has {count} images, but the server takes at most {limit}");
        return Err(Failure::new(Reason::TooLarge, message));
    }
    Ok(())
}

fn tokenized(ask: &Ask, generator: &Generator) -> Result<TokenizedRequest, Failure> {
    let of = |sources: Vec<Vec<i64>>| {
        let mask = sources.iter().map(|source| vec![1; source.len()]).collect();
        let options = ask.request.options.clone();
        TokenizedRequest { options, ..TokenizedRequest::new(0.into(), sources, mask) }
    };
    match (&ask.tokens, ask.keep_last, &ask.request.text) {
        (tokens, keep, _) if ask.request.images.is_given() => {
            if keep.is_some() {
                return Err(Failure::field("truncate", "no images beside it", "images"));
            }
            let input_ids = tokens.clone().map(TokenRows::Several).or(ask.request.input_ids.clone());
            let request = GenerateRequest { input_ids, ..ask.request.clone() };
            let id = request.id.clone().unwrap_or(Id::from(0));
            Ok(request.tokenize(id, &WithUploads(generator, &ask.uploads))?)
        }
        (Some(tokens), ..) => Ok(of(tokens.clone())),
        (None, Some(keep), Some(texts)) => {
            let keep_last = |text: &String| truncation::keep(text, keep, truncation::Side::Left, generator);
            Ok(of(texts.rows().iter().map(keep_last).collect::<Result<_, _>>()?))
        }
        _ => {
            let id = ask.request.id.clone().unwrap_or(Id::from(0));
            Ok(ask.request.tokenize(id, generator)?)
        }
    }
}

/// The options of the request, over those of the model.
fn options(
    request: &TokenizedRequest,
    ask: &Ask,
    generator: &Generator,
    app: &App,
) -> Result<GenerationConfig, Failure> {
    let own = generator.model.generation_config();
    let mut given = request.options.clone();
    let is_sampled = given.get("do_sample").and_then(Value::as_bool).unwrap_or(own.do_sample);
    if ask.is_lenient && !is_sampled {
        let of_sampling = GENERATION_OPTIONS.iter().filter(|option| option.group == OptionGroup::Sampling);
        of_sampling.filter(|option| option.name != "do_sample").for_each(|option| drop(given.remove(option.name)));
    }
    let says = |name: &str| given.get(name).is_some_and(|value| !value.is_null());
    let default = match (own.max_new_tokens, own.max_length) {
        (None, None) => app.config.max_new_tokens.or(ask.default_new_tokens),
        _ => app.config.max_new_tokens,
    };
    if let Some(default) = default.filter(|_| !says("max_new_tokens") && !says("max_length")) {
        let prompt = request.prompts.as_ref().and_then(|prompts| prompts.first()).map_or(1, Vec::len);
        let room = generator.model.max_target_length().saturating_sub(prompt).max(1);
        given.insert("max_new_tokens".into(), Value::from(default.min(room)));
    }
    Ok(own.with_json(&given).map_err(t5gemma_runtime::Error::from)?)
}

impl Generating {
    /// The next event; `None` after the last.
    ///
    /// # Errors
    /// Why the request failed; nothing follows.
    pub async fn next(&mut self) -> Result<Option<Event>, Failure> {
        if self.has_ended {
            return Ok(None);
        }
        match self.events.next().await {
            Some(Message::Event(event)) => {
                self.count(&event);
                Ok(Some(event))
            }
            Some(Message::Ended { result, stats }) => {
                self.has_ended = true;
                let result = result.map_err(Failure::from);
                let failure = result.as_ref().err().map(|failure| failure.reason.name());
                self.trace.generated(&self.served.name, self.submitted, &stats, failure);
                self.count_end(&stats, result.is_ok());
                result.map(|()| None)
            }
            None => {
                self.has_ended = true;
                Err(t5gemma_runtime::Error::Closed.into())
            }
        }
    }

    fn count(&mut self, event: &Event) {
        let Event::Row { hypotheses, .. } = event else { return };
        self.target_tokens += hypotheses.iter().map(|hypothesis| hypothesis.tokens.len()).sum::<usize>();
        let Some(metrics) = self.app.metrics.model(&self.served.name) else { return };
        hypotheses.iter().for_each(|hypothesis| metrics.finished(hypothesis.finish_reason.as_str()));
    }

    /// Counts a request at its end. What its preparation took counts as well.
    fn count_end(&self, stats: &RequestStats, is_ok: bool) {
        let Some(metrics) = self.app.metrics.model(&self.served.name) else { return };
        metrics.target_tokens.fetch_add(stats.new_tokens as u64, Ordering::Relaxed);
        metrics.queue.observe(self.prepared + stats.queued);
        if let Some(first) = stats.first_token {
            metrics.first_token.observe(self.prepared + first);
        }
        if is_ok {
            metrics.source_tokens.fetch_add(stats.source_tokens as u64, Ordering::Relaxed);
            metrics.encode.observe(stats.encoding);
            metrics.request.observe(self.permit.age());
        }
    }

    /// Waits for all rows: the targets of each source, best first.
    ///
    /// # Errors
    /// Why the request failed.
    pub async fn rows(&mut self) -> Result<Vec<Vec<Hypothesis>>, Failure> {
        self.events.skip_tokens();
        let mut rows = vec![Vec::new(); self.source_lengths.len()];
        while let Some(event) = self.next().await? {
            if let Event::Row { row, hypotheses } = event {
                rows[row] = hypotheses;
            }
        }
        Ok(rows)
    }

    /// The tokenizer of targets.
    ///
    /// # Errors
    /// A model without one.
    pub fn tokenizer(&self) -> Result<&Tokenizer, Failure> {
        let generator = self.served.generator().expect("it has begun to generate");
        Ok(generator.model.target_tokenizer()?)
    }

    /// The text of tokens, without special tokens.
    ///
    /// # Errors
    /// Tokens that the tokenizer cannot decode.
    pub fn text(&self, tokens: &[i64]) -> Result<String, Failure> {
        Ok(self.tokenizer()?.decode(tokens, SpecialTokens::Skip)?)
    }

    /// A decoder of a target that arrives token by token.
    ///
    /// # Errors
    /// A model without a tokenizer.
    pub fn text_stream(&self) -> Result<TextStream, Failure> {
        Ok(self.tokenizer()?.stream(SpecialTokens::Skip))
    }
}
