//! `Admission`: how much accepted and unfinished work there may be, counted in requests, rows and source tokens. What
//! exceeds it is refused at once with the time after which to try again, so that memory stays bounded and the waiting line
//! short.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::config::Limits;
use crate::failure::{Failure, Reason};

/// Counts accepted work.
#[derive(Debug)]
pub struct Admission {
    limits: Limits,
    counts: Mutex<Counts>,
    /// Told when nothing is accepted any more.
    idle: Notify,
}

#[derive(Debug, Default)]
struct Counts {
    requests: usize,
    rows: usize,
    tokens: usize,
    /// The mean time from acceptance to the end, of recent requests.
    mean: Duration,
    is_closed: bool,
}

/// The place of an accepted request, until it is dropped.
#[derive(Debug)]
pub struct Permit {
    admission: Arc<Admission>,
    since: Instant,
    rows: usize,
    tokens: usize,
}

impl Admission {
    /// Nothing accepted yet.
    pub fn new(limits: Limits) -> Arc<Admission> {
        Arc::new(Admission { limits, counts: Mutex::default(), idle: Notify::new() })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepts a request, whose size is not known yet.
    pub fn enter(self: &Arc<Admission>) -> Result<Permit, Failure> {
        let mut counts = self.counts();
        if counts.is_closed {
            return Err(Failure::new(Reason::Unavailable, "the server is shutting down").retry_after(1));
        }
        if counts.requests >= self.limits.max_requests {
            return Err(counts.full("requests", counts.requests, self.limits.max_requests));
        }
        counts.requests += 1;
        Ok(Permit { admission: self.clone(), since: Instant::now(), rows: 0, tokens: 0 })
    }

    /// Accepts nothing more.
    pub fn close(&self) {
        self.counts().is_closed = true;
    }

    /// The number of accepted and unfinished requests.
    pub fn requests(&self) -> usize {
        self.counts().requests
    }

    /// Waits until nothing is accepted any more.
    pub async fn idle(&self) {
        loop {
            let told = self.idle.notified();
            if self.requests() == 0 {
                return;
            }
            told.await;
        }
    }
}

impl Counts {
    fn full(&self, what: &str, count: usize, limit: usize) -> Failure {
        let message = format!("the server is full: {count} of {limit} {what} are taken");
        // About as long as one request takes now, of those that are in the way.
        let seconds = self.mean.as_secs_f64().ceil().clamp(1.0, 60.0) as u64;
        Failure::new(Reason::Full, message).retry_after(seconds)
    }
}

impl Permit {
    /// Adds the size of the request, once it is known.
    pub fn grow(&mut self, rows: usize, tokens: usize) -> Result<(), Failure> {
        let Limits { max_rows, max_source_tokens, max_request_rows, .. } = self.admission.limits;
        let too_large = |what, needed: usize, limit: usize| {
            let message = format!("the request has {needed} {what}, but the server takes at most {limit}");
            Err(Failure::new(Reason::TooLarge, message))
        };
        if rows > max_request_rows.min(max_rows) {
            return too_large("rows", rows, max_request_rows.min(max_rows));
        }
        if tokens > max_source_tokens {
            return too_large("source tokens", tokens, max_source_tokens);
        }
        let mut counts = self.admission.counts();
        if counts.rows + rows > max_rows {
            return Err(counts.full("rows", counts.rows, max_rows));
        }
        if counts.tokens + tokens > max_source_tokens {
            return Err(counts.full("source tokens", counts.tokens, max_source_tokens));
        }
        counts.rows += rows;
        counts.tokens += tokens;
        drop(counts);
        self.rows += rows;
        self.tokens += tokens;
        Ok(())
    }

    /// How long ago the request was accepted.
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.admission.counts();
        counts.requests -= 1;
        counts.rows -= self.rows;
        counts.tokens -= self.tokens;
        if self.rows > 0 {
            counts.mean = (counts.mean * 7 + self.since.elapsed()) / 8;
        }
        if counts.requests == 0 {
            self.admission.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_exceeds_a_limit_is_refused_until_something_ends() {
        let limits = Limits { max_requests: 2, max_rows: 10, max_source_tokens: 100, ..Limits::default() };
        let admission = Admission::new(limits);
        let mut first = admission.enter().expect("room");
        first.grow(8, 10).expect("room");
        let mut second = admission.enter().expect("room");
        let third = admission.enter().expect_err("full");
        assert_eq!((third.reason, third.retry_after), (Reason::Full, Some(1)));
        assert_eq!(third.message, "the server is full: 2 of 2 requests are taken");
        assert_eq!(second.grow(3, 1).expect_err("full").message, "the server is full: 8 of 10 rows are taken");
        assert_eq!(second.grow(2, 91).expect_err("full").reason, Reason::Full);
        let large = second.grow(11, 1).expect_err("can never fit");
        assert_eq!((large.reason, large.retry_after), (Reason::TooLarge, None));
        drop(first);
        second.grow(10, 100).expect("room again");
        drop(second);
        assert_eq!(admission.requests(), 0);
        admission.close();
        assert_eq!(admission.enter().expect_err("closed").reason, Reason::Unavailable);
    }
}
