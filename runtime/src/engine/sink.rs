//! The engine's side of a request's events: calls the sink, and keeps the times and counts that its last message has.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::request::{Event, Message, RequestStats};
use crate::error::Error;

/// Receives the messages of a request.
pub(super) type Sink = Box<dyn FnMut(Message) + Send>;

/// The sink of a request. Several threads may serve one request; they call it in turn.
pub(super) struct Outlet {
    submitted: Instant,
    state: Mutex<State>,
}

struct State {
    /// `None` after the last message, or a panic.
    sink: Option<Sink>,
    stats: RequestStats,
    is_admitted: bool,
}

impl Outlet {
    pub fn new(sink: Sink, source_tokens: usize) -> Outlet {
        let stats = RequestStats { source_tokens, ..RequestStats::default() };
        Outlet { submitted: Instant::now(), state: Mutex::new(State { sink: Some(sink), stats, is_admitted: false }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the time that encoding a source took.
    pub fn encoded(&self, time: Duration) {
        self.state().stats.encoding += time;
    }

    /// Sends an event. Returns whether the sink still works: it is not called again after a panic.
    pub fn send(&self, event: Event) -> bool {
        let mut state = self.state();
        let time = self.submitted.elapsed();
        match &event {
            Event::Admitted { .. } => {
                if !state.is_admitted {
                    state.stats.queued = time;
                }
                state.is_admitted = true;
            }
            Event::Token { .. } => {
                state.stats.first_token.get_or_insert(time);
                state.stats.new_tokens += 1;
            }
            // The tokens of the first hypothesis had their own events.
            Event::Row { hypotheses, .. } => {
                state.stats.new_tokens += hypotheses.iter().skip(1).map(|other| other.tokens.len()).sum::<usize>();
            }
        }
        let Some(sink) = &mut state.sink else { return true };
        let told = catch_unwind(AssertUnwindSafe(|| sink(Message::Event(event))));
        if told.is_err() {
            state.sink = None;
        }
        told.is_ok()
    }

    /// Sends the last message.
    pub fn end(&self, result: Result<(), Error>) {
        let mut state = self.state();
        state.stats.total = self.submitted.elapsed();
        if !state.is_admitted {
            state.stats.queued = state.stats.total;
        }
        let (sink, stats) = (state.sink.take(), state.stats);
        drop(state);
        let Some(mut sink) = sink else { return };
        // Nobody is left to be told of a panic; a panic in the destructor of what the sink holds is caught too.
        let _ = catch_unwind(AssertUnwindSafe(move || sink(Message::Ended { result, stats })));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn watched(source_tokens: usize, panics_at: Option<usize>) -> (Outlet, Arc<Mutex<Vec<Message>>>) {
        let told = Arc::new(Mutex::new(Vec::new()));
        let own = told.clone();
        let sink = move |message| {
            let mut told = own.lock().unwrap_or_else(PoisonError::into_inner);
            told.push(message);
            assert!(panics_at != Some(told.len()), "as asked");
        };
        (Outlet::new(Box::new(sink), source_tokens), told)
    }

    #[test]
    fn the_last_message_has_times_and_counts_and_nothing_follows_it() {
        let (outlet, told) = watched(7, None);
        assert!(outlet.send(Event::Admitted { row: 0 }));
        outlet.encoded(Duration::from_millis(3));
        for token in [5, 6] {
            assert!(outlet.send(Event::Token { row: 0, token, logprobs: None }));
        }
        outlet.end(Ok(()));
        outlet.end(Err(Error::Cancelled));
        outlet.send(Event::Token { row: 0, token: 9, logprobs: None });
        let told = told.lock().expect("no panic");
        let [Message::Event(_), Message::Event(_), Message::Event(_), Message::Ended { result: Ok(()), stats }] =
            told.as_slice()
        else {
            panic!("{told:?}")
        };
        assert_eq!((stats.source_tokens, stats.new_tokens, stats.encoding), (7, 2, Duration::from_millis(3)));
        assert!(stats.first_token.is_some_and(|first| stats.queued <= first && first <= stats.total), "{stats:?}");
    }

    #[test]
    fn a_sink_that_panics_is_not_called_again() {
        for panics_at in [1, 2] {
            let (outlet, told) = watched(1, Some(panics_at));
            assert_eq!(outlet.send(Event::Admitted { row: 0 }), panics_at != 1);
            outlet.end(Ok(()));
            assert_eq!(told.lock().unwrap_or_else(PoisonError::into_inner).len(), panics_at);
        }
    }
}
