//! Forked processes. A child has only the thread that forked: locks of other threads, those of ONNX Runtime's thread
//! pool included, stay locked in it for ever. Calls are therefore counted, and a child that was forked during one
//! refuses what was opened before.
//!
//! # Design
//! The pool is one for all sessions, so a call on any model counts for all of them. Sessions opened before a fork are
//! not dropped in the child, because dropping waits for threads. A host that forks calls [`in_child`] from a handler of
//! `pthread_atfork`; the C library does.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::Error;

/// Calls in progress, since the last fork during a call.
static CALLS: AtomicUsize = AtomicUsize::new(0);
/// Forks between the first process and this one.
static FORKS: AtomicUsize = AtomicUsize::new(0);
/// Of these, the number during calls.
static FORKS_IN_CALLS: AtomicUsize = AtomicUsize::new(0);

/// Tells this module that the process has just been forked. It must not have other threads yet.
pub fn in_child() {
    FORKS.fetch_add(1, Ordering::SeqCst);
    if CALLS.swap(0, Ordering::SeqCst) > 0 {
        FORKS_IN_CALLS.fetch_add(1, Ordering::SeqCst);
    }
}

/// When something was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    forks: usize,
    forks_in_calls: usize,
}

impl Origin {
    pub fn now() -> Origin {
        Origin { forks: FORKS.load(Ordering::SeqCst), forks_in_calls: FORKS_IN_CALLS.load(Ordering::SeqCst) }
    }

    /// Whether it was opened in this process, whose threads it may have.
    pub fn is_this_process(self) -> bool {
        self.forks == FORKS.load(Ordering::SeqCst)
    }

    /// Checks that no process was forked during a call since.
    pub fn check(self) -> Result<(), Error> {
        if self.forks_in_calls == FORKS_IN_CALLS.load(Ordering::SeqCst) { Ok(()) } else { Err(Error::ForkedInCall) }
    }

    /// [`Origin::check`], and begins a call.
    pub fn enter(self) -> Result<InCall, Error> {
        self.check()?;
        CALLS.fetch_add(1, Ordering::SeqCst);
        Ok(InCall { forks_in_calls: self.forks_in_calls })
    }
}

/// A call in progress.
#[derive(Debug)]
pub(crate) struct InCall {
    forks_in_calls: usize,
}

impl Drop for InCall {
    fn drop(&mut self) {
        // A call that was forked is no longer counted in the child.
        if self.forks_in_calls == FORKS_IN_CALLS.load(Ordering::SeqCst) {
            CALLS.fetch_sub(1, Ordering::SeqCst);
        }
    }
}
