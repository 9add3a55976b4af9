//! A request to an engine, and what the engine tells about it: events, and times and counts at its end.

use std::time::{Duration, Instant};

use crate::batch::Batch;
use crate::error::Error;
use crate::hypothesis::{Hypothesis, Logprobs};
use crate::options::GenerationConfig;

/// A request to an [`Engine`](crate::Engine).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Request {
    /// The sources, which are admitted one by one.
    pub batch: Batch,
    /// The generation options. The clock of `max_time` starts when the first source is admitted.
    pub config: GenerationConfig,
    /// When the request, waiting or in flight, ends with [`Error::Deadline`] if it is not done.
    pub deadline: Option<Instant>,
    /// Which of the waiting sources are admitted first.
    pub priority: Priority,
    /// The user or client that it belongs to. Tenants with waiting sources of one priority get equal shares of the
    /// engine, however many requests each submits. Requests without a tenant belong to one tenant.
    pub tenant: Option<String>,
}

impl Request {
    /// A request of normal priority, without a deadline and without a tenant.
    pub fn new(batch: Batch, config: GenerationConfig) -> Request {
        Request { batch, config, deadline: None, priority: Priority::Normal, tenant: None }
    }

    /// Sets [`Request::deadline`].
    pub fn deadline(self, deadline: Instant) -> Request {
        Request { deadline: Some(deadline), ..self }
    }

    /// Sets [`Request::priority`].
    pub fn priority(self, priority: Priority) -> Request {
        Request { priority, ..self }
    }

    /// Sets [`Request::tenant`].
    pub fn tenant(self, tenant: impl Into<String>) -> Request {
        Request { tenant: Some(tenant.into()), ..self }
    }
}

/// The priority of a request while it waits; once admitted, all rows share the steps.
///
/// The source with the highest priority is admitted first. If higher ones keep waiting, a priority still gets one turn
/// for every eight of the next higher one, so that none starves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Before all others, such as a user who is typing.
    High,
    /// The default.
    #[default]
    Normal,
    /// After all others, such as a batch job.
    Low,
}

impl Priority {
    /// All priorities, the highest first.
    pub const ALL: [Priority; 3] = [Priority::High, Priority::Normal, Priority::Low];

    /// `high`, `normal` or `low`.
    pub fn name(self) -> &'static str {
        match self {
            Priority::High => "high",
            Priority::Normal => "normal",
            Priority::Low => "low",
        }
    }

    /// The priority of this name.
    pub fn from_name(name: &str) -> Option<Priority> {
        Priority::ALL.into_iter().find(|priority| priority.name() == name)
    }
}

/// An event of a request.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A source row has left the queue and is about to be encoded.
    Admitted {
        /// The source's row in the request's batch.
        row: usize,
    },
    /// The next token of a source row's first hypothesis is final: with beams, once all beams agree.
    Token {
        /// The source's row in the request's batch.
        row: usize,
        /// The token.
        token: i64,
        /// Its log-probability, with `output_logprobs`, and with `top_logprobs` the likeliest tokens in its place.
        logprobs: Option<Logprobs>,
    },
    /// A source row is finished; it follows the events of all its tokens.
    Row {
        /// The source's row in the request's batch.
        row: usize,
        /// The `num_return_sequences` hypotheses; those of beam search are best first.
        hypotheses: Vec<Hypothesis>,
    },
}

/// What the sink of [`Engine::submit_to`](crate::Engine::submit_to) receives.
#[derive(Clone, Debug)]
pub enum Message {
    /// An event of a row.
    Event(Event),
    /// The last message.
    Ended {
        /// How the request has ended; after `Ok`, each row had its [`Event::Row`].
        result: Result<(), Error>,
        /// Its times and counts.
        stats: RequestStats,
    },
}

/// Times and counts of a request that has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RequestStats {
    /// From its submission until its first source was admitted, or its end if none was.
    pub queued: Duration,
    /// How long its sources were encoded, all together; almost zero for those in the model's encoder cache.
    pub encoding: Duration,
    /// From its submission until its first token was final; `None` if none was.
    pub first_token: Option<Duration>,
    /// From its submission to its end.
    pub total: Duration,
    /// Tokens of its sources, without padding.
    pub source_tokens: usize,
    /// New tokens of the returned hypotheses; of a request that has failed, those that its events have told.
    pub new_tokens: usize,
}
