//! The gate of a request's callbacks: open while the request runs, closed before its end is reported.

use std::process;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// Keeps callbacks that change scores or tokens within the lifetime of their request: an engine's threads may be about
/// to call them when it ends, and the caller then frees their data.
pub struct Gate {
    /// The process whose threads may be inside; a forked process has none of them.
    process: u32,
    state: Mutex<GateState>,
    left: Condvar,
}

#[derive(Default)]
struct GateState {
    is_closed: bool,
    inside: Vec<ThreadId>,
}

/// A callback that is running.
pub struct Inside<'a>(&'a Gate);

impl Default for Gate {
    fn default() -> Gate {
        Gate { process: process::id(), state: Mutex::default(), left: Condvar::new() }
    }
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters until the guard is dropped; `None` if the gate is closed.
    pub fn enter(&self) -> Option<Inside<'_>> {
        let mut state = self.state();
        if state.is_closed {
            return None;
        }
        state.inside.push(thread::current().id());
        Some(Inside(self))
    }

    /// Closes the gate and waits until every running callback has returned. A callback that ends its own request does
    /// not wait for itself.
    pub fn close(&self) {
        if self.process != process::id() {
            return;
        }
        let own = thread::current().id();
        let mut state = self.state();
        state.is_closed = true;
        while !state.inside.is_empty() && !state.inside.contains(&own) {
            state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let own = thread::current().id();
        let mut state = self.0.state();
        if let Some(at) = state.inside.iter().position(|&thread| thread == own) {
            state.inside.swap_remove(at);
        }
        drop(state);
        self.0.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn closing_waits_for_other_threads_inside_and_not_for_its_own() {
        let gate = Gate::default();
        let (enter, entered) = mpsc::channel();
        let (leave, leaving) = mpsc::channel::<()>();
        let has_left = AtomicBool::new(false);
        thread::scope(|scope| {
            let (gate, has_left) = (&gate, &has_left);
            scope.spawn(move || {
                let inside = gate.enter().expect("open");
                enter.send(()).expect("the test listens");
                leaving.recv().expect("the test tells");
                has_left.store(true, Ordering::SeqCst);
                drop(inside);
            });
            entered.recv().expect("it has entered");
            let own = gate.enter().expect("open");
            gate.close();
            assert!(gate.enter().is_none());
            drop(own);
            leave.send(()).expect("it listens");
            gate.close();
            assert!(has_left.load(Ordering::SeqCst));
        });
    }
}
