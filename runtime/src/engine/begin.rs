//! Beginning sources: encoding and the first decoder step, on the thread of the steps or on one beside it.
//!
//! # Design
//! The rows in flight wait for everything that their thread does between two steps. So there it encodes only as much at
//! a time as takes about as long as a step, or two if more sources wait than are in flight. It leaves longer sources to a
//! second thread, which has sessions of its own and takes them in the order of admission; the rows join when they are
//! ready. Short sources share a first step, since each first step reads the weights. Sources that join rows in flight
//! run it without the head, the most of the weights: the next step of those rows takes the last tokens of their prompts.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::queue::{ActiveRequest, ModelCopy, Shared};
use super::rows::NewRows;
use crate::batch::{Batch, Prompts};
use crate::error::Error;
use crate::item::Item;
use crate::memory::Footprint;
use crate::model::Lane;
use crate::search::Search;
use crate::step_output::StepTensors;

/// The most source tokens that the second thread begins together, unless one source has more.
const MOST_TOKENS: usize = 512;

/// Encoding that takes no longer than this is never too long between two steps.
const LEAST_BUDGET: Duration = Duration::from_millis(20);

/// A source that has left the queue.
pub(super) struct Admitted {
    pub request: Arc<ActiveRequest>,
    /// Its row in the request.
    pub row: usize,
    pub footprint: Footprint,
    pub at: Instant,
    /// The flight that it will join: see [`Flight`](super::worker::Flight).
    pub class: usize,
    /// Whether that flight has rows, whose next step takes the last token of its prompt.
    pub shares_step: bool,
}

impl Admitted {
    /// Sources for which this is equal share their first step.
    fn group(&self) -> (usize, usize, bool) {
        (self.request.call.prompts.length, self.class, self.shares_step)
    }
}

/// A source in flight.
pub(super) struct ActiveSource {
    pub request: Arc<ActiveRequest>,
    pub item: Item,
    pub footprint: Footprint,
    pub admitted: Instant,
    /// The number of its next step.
    pub step: usize,
}

/// Sources that share their first step, which was run.
pub(super) struct Begun {
    pub members: Vec<ActiveSource>,
    /// The lengths of their sources.
    pub lengths: Vec<usize>,
    pub class: usize,
    /// With the logits, unless they come from the next step of the rows in flight.
    pub result: Result<(NewRows, Option<StepTensors>), Error>,
}

/// What became of sources that were admitted together.
#[derive(Default)]
pub(super) struct Beginning {
    pub begun: Vec<Begun>,
    /// Requests whose sources could not be encoded.
    pub failed: Vec<(Arc<ActiveRequest>, Error)>,
    /// The footprints of all, with the class of each.
    pub footprints: Vec<(usize, Footprint)>,
}

/// Encodes sources and runs their first step. Those of requests that have ended are left out.
pub(super) fn begin(copy: &ModelCopy, lane: Lane, sources: Vec<Admitted>) -> Beginning {
    let footprints = sources.iter().map(|source| (source.class, source.footprint)).collect();
    let mut beginning = Beginning { footprints, ..Beginning::default() };
    let mut left = sources;
    while let Some(first) = left.first() {
        let group = first.group();
        let (now, later) = left.into_iter().partition(|source| source.group() == group);
        left = later;
        begin_group(copy, lane, now, &mut beginning);
    }
    beginning
}

fn begin_group(ModelCopy { model, stop }: &ModelCopy, lane: Lane, sources: Vec<Admitted>, to: &mut Beginning) {
    let (mut members, mut batches) = (Vec::new(), Vec::new());
    let mut prompts = Prompts { length: 0, ids: Vec::new() };
    let (mut group, mut is_shared) = (0, false);
    for Admitted { request, row, footprint, at, class, shares_step } in sources {
        // Cancelled meanwhile, or another source of the request has failed.
        if request.has_ended() {
            continue;
        }
        let call = &request.call;
        let alone = call.batch.alone(row);
        let start = Instant::now();
        let encoded = match alone.encoder_outputs() {
            Some(_) => Ok(alone),
            None => {
                let states = model.encode_in(lane, &alone, &request.cancel);
                states.and_then(|states| alone.with_encoder_outputs(states))
            }
        };
        request.outlet.encoded(start.elapsed());
        match encoded {
            Ok(batch) => batches.push(batch),
            Err(error) => {
                to.failed.push((request, error));
                continue;
            }
        }
        let item = call.item(row, Search::new, request.stops());
        (prompts.length, group, is_shared) = (call.prompts.length, class, shares_step);
        prompts.ids.extend_from_slice(call.prompt(row));
        members.push(ActiveSource { request, item, footprint, admitted: at, step: 0 });
    }
    if members.is_empty() {
        return;
    }
    let lengths = batches.iter().map(Batch::length).collect();
    let request = Item::joint_request(members.iter().map(|member| &member.item), 0);
    let result = Batch::joined(batches, 0).and_then(|batch| {
        // At most the serving plan's batch is admitted at a time.
        let run = model.fit(&batch);
        let prompts = prompts.widened(run.rows());
        if is_shared {
            return Ok((NewRows::prefill_up_to_last(model, lane, &run, prompts, stop)?, None));
        }
        let (new, tensors) = NewRows::prefill(model, lane, &run, prompts, request, stop)?;
        Ok((new, Some(tensors)))
    });
    to.begun.push(Begun { members, lengths, class: group, result });
}

/// The thread that begins long sources.
pub(super) struct Aside {
    sources: Option<Sender<Admitted>>,
    begun: Receiver<Beginning>,
    thread: Option<JoinHandle<()>>,
    /// The sources that it was given and that were not taken back.
    waiting: Vec<(usize, Footprint)>,
}

impl Aside {
    /// Starts the thread; `None` if it cannot be started.
    pub fn start(shared: &Arc<Shared>, copy: usize) -> Option<Aside> {
        let (sources, given) = mpsc::channel::<Admitted>();
        let (to_take, begun) = mpsc::channel();
        let shared = shared.clone();
        let work = move || {
            let mut next = None;
            while let Some(first) = next.take().or_else(|| given.recv().ok()) {
                let mut sources = vec![first];
                let mut tokens = sources[0].footprint.source;
                while let Ok(more) = given.try_recv() {
                    tokens += more.footprint.source;
                    if tokens > MOST_TOKENS {
                        next = Some(more);
                        break;
                    }
                    sources.push(more);
                }
                let requests: Vec<_> = sources.iter().map(|source| source.request.clone()).collect();
                let footprints = sources.iter().map(|source| (source.class, source.footprint)).collect();
                let work = || begin(&shared.copies[copy], Lane::Aside, sources);
                let beginning = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
                    let failed = requests.into_iter().map(|request| (request, Error::Closed)).collect();
                    Beginning { failed, footprints, begun: Vec::new() }
                });
                if to_take.send(beginning).is_err() {
                    return;
                }
                shared.wake();
            }
        };
        let thread = thread::Builder::new().name("t5g-encode".into()).spawn(work).ok()?;
        Some(Aside { sources: Some(sources), begun, thread: Some(thread), waiting: Vec::new() })
    }

    /// Hands it a source, which comes back if the thread has ended.
    pub fn give(&mut self, source: Admitted) -> Option<Admitted> {
        let waiting = (source.class, source.footprint);
        let refused = match &self.sources {
            Some(sources) => sources.send(source).err().map(|refused| refused.0),
            None => Some(source),
        };
        if refused.is_none() {
            self.waiting.push(waiting);
        }
        refused
    }

    /// Takes what is ready.
    pub fn take(&mut self) -> Vec<Beginning> {
        let ready: Vec<Beginning> = self.begun.try_iter().collect();
        for footprint in ready.iter().flat_map(|beginning| &beginning.footprints) {
            if let Some(at) = self.waiting.iter().position(|waiting| waiting == footprint) {
                self.waiting.swap_remove(at);
            }
        }
        ready
    }

    /// What it was given and is not yet taken.
    pub fn waiting(&self) -> &[(usize, Footprint)] {
        &self.waiting
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        self.sources = None;
        // Those that wait are not computed any more, because the engine is closed and their requests have ended.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How long steps and beginnings take, on average of the recent ones.
#[derive(Default)]
pub(super) struct Pace {
    step: Option<Duration>,
    /// Of a source token.
    token: Option<Duration>,
}

impl Pace {
    pub fn count_step(&mut self, time: Duration) {
        average(&mut self.step, time);
    }

    pub fn count_beginning(&mut self, tokens: usize, time: Duration) {
        average(&mut self.token, time / u32::try_from(tokens.max(1)).unwrap_or(u32::MAX));
    }

    /// How long it takes to begin a source of this length.
    pub fn beginning(&self, tokens: usize) -> Duration {
        self.token.unwrap_or_default().saturating_mul(u32::try_from(tokens).unwrap_or(u32::MAX))
    }

    /// How long sources may be begun between two steps, if this many wait and this many are in flight.
    pub fn budget(&self, waiting: usize, in_flight: usize) -> Duration {
        let step = self.step.unwrap_or_default().max(LEAST_BUDGET);
        if waiting > in_flight { 2 * step } else { step }
    }

    /// Whether a source of this length takes too long between two steps.
    pub fn is_long(&self, tokens: usize) -> bool {
        self.beginning(tokens) > self.budget(1, 0)
    }
}

fn average(mean: &mut Option<Duration>, time: Duration) {
    *mean = Some(mean.map_or(time, |mean| (mean * 7 + time) / 8));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_a_step_and_long_sources_exceed_it() {
        let mut pace = Pace::default();
        assert_eq!(pace.budget(1, 1), LEAST_BUDGET);
        assert!(!pace.is_long(4096), "nothing is known yet");
        pace.count_beginning(100, Duration::from_millis(20));
        (0..9).for_each(|_| pace.count_step(Duration::from_millis(30)));
        assert_eq!((pace.budget(2, 2), pace.budget(3, 2)), (Duration::from_millis(30), Duration::from_millis(60)));
        assert_eq!(pace.beginning(100), Duration::from_millis(20));
        assert!(!pace.is_long(300) && pace.is_long(301));
        // One slow step is not the new measure.
        pace.count_step(Duration::from_millis(110));
        assert_eq!(pace.budget(1, 1), Duration::from_millis(40));
    }
}
