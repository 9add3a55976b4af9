//! `Admission`: how much accepted and unfinished work there may be, counted in requests, rows, source tokens and images. What
//! exceeds it is refused at once with the time after which to try again, so that memory stays bounded and the waiting line
//! short.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::auth::Tenant;
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
    images: usize,
    /// Requests of each tenant that has some.
    tenants: BTreeMap<String, usize>,
    /// The mean time from acceptance to the end, of recent requests.
    mean: Duration,
    is_closed: bool,
}

/// The place of an accepted request, until it is dropped.
#[derive(Debug)]
pub struct Permit {
    admission: Arc<Admission>,
    since: Instant,
    tenant: Option<Arc<Tenant>>,
    size: Size,
}

/// How large a request is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Target rows.
    pub rows: usize,
    /// Source tokens.
    pub tokens: usize,
    /// Images.
    pub images: usize,
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
    pub fn enter(self: &Arc<Admission>, tenant: Option<&Arc<Tenant>>) -> Result<Permit, Failure> {
        let mut counts = self.counts();
        if counts.is_closed {
            return Err(Failure::new(Reason::Unavailable, "the server is shutting down").retry_after(1));
        }
        if counts.requests >= self.limits.max_requests {
            return Err(counts.full("requests", counts.requests, self.limits.max_requests));
        }
        if let Some(tenant) = tenant {
            let count = counts.tenants.get(&tenant.name).copied().unwrap_or(0);
            if count >= tenant.max_requests {
                let most = tenant.max_requests;
                let message = format!("the key's share is in use: {count} of {most} requests");
                return Err(Failure { message, ..counts.full("requests", count, most) });
            }
            counts.tenants.insert(tenant.name.clone(), count + 1);
        }
        counts.requests += 1;
        Ok(Permit { admission: self.clone(), since: Instant::now(), tenant: tenant.cloned(), size: Size::default() })
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
    pub fn grow(&mut self, size: Size) -> Result<(), Failure> {
        let Size { rows, tokens, images } = size;
        let Limits { max_rows, max_source_tokens, max_request_rows, max_images, .. } = self.admission.limits;
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
        if images > max_images {
            return too_large("images", images, max_images);
        }
        let mut counts = self.admission.counts();
        if counts.images + images > max_images {
            return Err(counts.full("images", counts.images, max_images));
        }
        if counts.rows + rows > max_rows {
            return Err(counts.full("rows", counts.rows, max_rows));
        }
        if counts.tokens + tokens > max_source_tokens {
            return Err(counts.full("source tokens", counts.tokens, max_source_tokens));
        }
        counts.rows += rows;
        counts.tokens += tokens;
        counts.images += images;
        drop(counts);
        self.size = size;
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
        counts.rows -= self.size.rows;
        counts.tokens -= self.size.tokens;
        counts.images -= self.size.images;
        if let Some(tenant) = &self.tenant
            && let Some(count) = counts.tenants.get_mut(&tenant.name)
        {
            *count -= 1;
            if *count == 0 {
                counts.tenants.remove(&tenant.name);
            }
        }
        if self.size.rows > 0 {
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

    fn size(rows: usize, tokens: usize, images: usize) -> Size {
        Size { rows, tokens, images }
    }

    #[test]
    fn what_exceeds_a_limit_is_refused_until_something_ends() {
        let limits =
            Limits { max_requests: 2, max_rows: 10, max_source_tokens: 100, max_images: 3, ..Limits::default() };
        let admission = Admission::new(limits);
        let mut first = admission.enter(None).expect("room");
        first.grow(size(8, 10, 2)).expect("room");
        let mut second = admission.enter(None).expect("room");
        let third = admission.enter(None).expect_err("full");
        assert_eq!((third.reason, third.retry_after), (Reason::Full, Some(1)));
        assert_eq!(third.message, "the server is full: 2 of 2 requests are taken");
        let mut full = |size| second.grow(size).expect_err("full").message;
        assert_eq!(full(size(3, 1, 0)), "the server is full: 8 of 10 rows are taken");
        assert_eq!(full(size(2, 91, 0)), "the server is full: 10 of 100 source tokens are taken");
        assert_eq!(full(size(2, 1, 2)), "the server is full: 2 of 3 images are taken");
        for (given, what) in [(size(11, 1, 0), "11 rows"), (size(1, 1, 4), "4 images")] {
            let large = second.grow(given).expect_err("can never fit");
            assert_eq!((large.reason, large.retry_after), (Reason::TooLarge, None));
            assert!(large.message.contains(what), "{}", large.message);
        }
        drop(first);
        second.grow(size(10, 100, 3)).expect("room again");
        drop(second);
        assert_eq!(admission.requests(), 0);
        admission.close();
        assert_eq!(admission.enter(None).expect_err("closed").reason, Reason::Unavailable);
    }

    #[test]
    fn a_tenant_has_its_own_limit() {
        let admission = Admission::new(Limits::default());
        let priority = t5gemma_runtime::Priority::High;
        let tenant = |name: &str, max_requests| Arc::new(Tenant { name: name.into(), max_requests, priority });
        let (one, same, other) = (tenant("a", 2), tenant("a", 2), tenant("b", 1));
        let first = admission.enter(Some(&one)).expect("room");
        let _second = admission.enter(Some(&same)).expect("room");
        let third = admission.enter(Some(&one)).expect_err("its share is in use");
        assert_eq!((third.reason, third.retry_after), (Reason::Full, Some(1)));
        assert_eq!(third.message, "the key's share is in use: 2 of 2 requests");
        let _other = admission.enter(Some(&other)).expect("room for others");
        drop(first);
        admission.enter(Some(&one)).expect("room again");
    }
}
