//! JSON-lines requests through an engine: new requests join running ones, whatever their options. Answers still come in
//! the order of the requests.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use t5gemma_protocol::{GenerateResult, TokenizedRequest};
use t5gemma_runtime::{Engine, EngineOptions, Error, Event, Generation, Hypothesis, Model, PollResult};

use super::{Answering, println_flushed, response};
use crate::exit::Outcome;
use crate::flag_errors;
use crate::lines::Lines;
use crate::progress::counter;
use crate::requests::{self, Kind, Refused};

/// Maximum number of requests read but not yet answered.
const WINDOW: usize = 256;

/// How long to wait for the first request's events before polling the others.
const PATIENCE: Duration = Duration::from_millis(1);

/// A request in its place in the order of answers.
enum Place {
    Answered(Result<GenerateResult, Refused>),
    Pending(Box<Pending>),
}

struct Pending {
    request: TokenizedRequest,
    generation: Generation,
    /// The results of its rows; empty for rows in flight.
    rows: Vec<Vec<Hypothesis>>,
}

impl Answering<'_> {
    /// Answers requests with `--batch-size` sources in flight on each device.
    pub(super) fn continuous(&self, models: &[Arc<Model>]) -> Result<Outcome> {
        // As many rows as that many sources need.
        let max_sources = self.packing.rows();
        let unbounded = EngineOptions::default()
            .max_rows(usize::MAX)
            .max_bytes(usize::MAX)
            .max_sources(max_sources)
            .max_waiting(usize::MAX);
        let engine = Engine::of_copies(models, unbounded)?;
        let most = self.packing.rows().saturating_mul(models.len());
        let mut lines = Lines::requests();
        let mut places: VecDeque<Place> = VecDeque::new();
        let (mut next, mut at_end, mut in_flight) = (None, false, 0);
        let mut outcome = Outcome::Done;
        let done = counter("requests", true);
        loop {
            while places.len() < WINDOW {
                if next.is_none() && !at_end && (places.is_empty() || lines.is_ready(self.packing.patience())?) {
                    match lines.next(self.cancel)? {
                        None => at_end = true,
                        Some((number, line)) => {
                            match requests::read_line(&line, &self.images, number, Kind::Generate, self.chat) {
                                Ok(request) => next = Some(request),
                                Err(refused) => places.push_back(Place::Answered(Err(refused))),
                            }
                        }
                    }
                    continue;
                }
                let has_room =
                    |request: &mut TokenizedRequest| in_flight == 0 || in_flight + request.sources.len() <= most;
                let Some(request) = next.take_if(has_room) else { break };
                places.push_back(self.submitted(&engine, request));
                if let Some(Place::Pending(pending)) = places.back() {
                    in_flight += pending.rows.len();
                }
            }
            while let Some(Place::Answered(_)) = places.front() {
                let Some(Place::Answered(answer)) = places.pop_front() else { unreachable!("looked at just above") };
                if answer.is_err() {
                    outcome = Outcome::SomeFailed;
                }
                println_flushed(&response(answer)?)?;
                done.inc(1);
            }
            if places.is_empty() && at_end && next.is_none() {
                return Ok(outcome);
            }
            if self.cancel.is_cancelled() {
                return Err(Error::Cancelled.into());
            }
            let mut patience = PATIENCE;
            for place in &mut places {
                in_flight -= self.look(place, std::mem::take(&mut patience))?;
            }
        }
    }

    /// Hands a request to the engine.
    fn submitted(&self, engine: &Engine, mut request: TokenizedRequest) -> Place {
        request.seed = self.seed(&request);
        let submit = || {
            let options = self.options.with_json(&request.options)?;
            let batch = t5gemma_protocol::batch(std::slice::from_ref(&request), options.pad_token_id)?;
            engine.submit(t5gemma_runtime::Request::new(batch, options))
        };
        match submit() {
            Ok(generation) => {
                let rows = vec![Vec::new(); generation.rows()];
                Place::Pending(Box::new(Pending { request, generation, rows }))
            }
            Err(error) => Place::Answered(Err(self.refused(request, &error))),
        }
    }

    /// Processes a request's new events and returns how many of its sources are no longer in flight.
    fn look(&self, place: &mut Place, patience: Duration) -> Result<usize> {
        let Place::Pending(pending) = place else { return Ok(0) };
        let Pending { request, generation, rows } = &mut **pending;
        let mut finished = 0;
        let left = |rows: &[Vec<Hypothesis>]| rows.iter().filter(|row| row.is_empty()).count();
        let mut wait = patience;
        let answer = loop {
            match generation.next_timeout(std::mem::take(&mut wait)) {
                PollResult::Event(Ok(Event::Row { row, hypotheses })) => {
                    rows[row] = hypotheses;
                    finished += 1;
                }
                PollResult::Event(Ok(_)) => {}
                PollResult::Event(Err(error)) => {
                    finished += left(rows);
                    let reason = flag_errors::of_request(&error, &request.options, self.flags);
                    break Err(Refused { id: request.id.clone(), reason });
                }
                PollResult::Ended => break Ok(self.result(request, rows)?),
                PollResult::TimedOut => return Ok(finished),
            }
        };
        *place = Place::Answered(answer);
        Ok(finished)
    }
}
