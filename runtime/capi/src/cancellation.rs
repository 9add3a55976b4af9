//! Cancellations, each of which can stop many calls.

use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::boundary::{fallible, free, value};
use crate::error::t5g_error;
use crate::handle::{Handle, Object};
use crate::input::Out;

/// The functions that stop the calls it was passed to. Each call has a cancellation of its own, because a deadline ends
/// one call and not the others.
#[derive(Default)]
pub struct t5g_cancellation(Mutex<Calls>);

#[derive(Default)]
struct Calls {
    is_used: bool,
    next: usize,
    running: Vec<(usize, Stop)>,
}

/// Stops a call.
pub type Stop = Box<dyn Fn() + Send + Sync>;

impl Object for t5g_cancellation {
    const NAME: &'static str = "t5g_cancellation";
}

impl t5g_cancellation {
    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was used.
    pub fn is_used(&self) -> bool {
        self.calls().is_used
    }

    /// Registers a call, until the guard is dropped. If it was used already, the call is stopped at once.
    pub fn register(all: Arc<t5g_cancellation>, stop: Stop) -> Registered {
        let mut calls = all.calls();
        if calls.is_used {
            stop();
        }
        let number = calls.next;
        calls.next += 1;
        calls.running.push((number, stop));
        drop(calls);
        Registered { process: process::id(), all, number }
    }

    fn cancel(&self) {
        let mut calls = self.calls();
        calls.is_used = true;
        calls.running.iter().for_each(|(_, stop)| stop());
    }
}

/// A registered call.
pub struct Registered {
    /// In a forked process another thread of the parent may hold the lock for ever.
    process: u32,
    all: Arc<t5g_cancellation>,
    number: usize,
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.process != process::id() {
            return;
        }
        self.all.calls().running.retain(|(number, _)| *number != self.number);
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_cancellation_new(cancellation: Out<Handle<t5g_cancellation>>) -> Handle<t5g_error> {
    fallible(|| {
        cancellation.check("cancellation")?.put(Handle::new(t5g_cancellation::default()));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_cancellation_cancel(cancellation: Handle<t5g_cancellation>) -> Handle<t5g_error> {
    fallible(|| {
        cancellation.get("cancellation")?.cancel();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_cancellation_is_cancelled(cancellation: Handle<t5g_cancellation>) -> i32 {
    value(-1, || Ok(cancellation.get("cancellation")?.is_used().into()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_cancellation_free(cancellation: Handle<t5g_cancellation>) -> i32 {
    free(cancellation, "cancellation")
}

#[cfg(test)]
mod tests {
    use t5gemma_runtime::Cancellation;

    use super::*;

    #[test]
    fn a_cancellation_stops_all_its_calls_whenever_they_begin() {
        let all = Arc::new(t5g_cancellation::default());
        let register = |call: &Cancellation| {
            let call = call.clone();
            t5g_cancellation::register(all.clone(), Box::new(move || call.cancel()))
        };
        let [first, second, third] = [(); 3].map(|()| Cancellation::new());
        let registered = register(&first);
        drop(register(&second));
        all.cancel();
        assert!(first.is_cancelled() && !second.is_cancelled(), "the second was over before");
        drop(registered);
        let _registered = register(&third);
        assert!(third.is_cancelled() && all.calls().running.len() == 1);
    }
}
