//! `Cancellation`: stops a call early, from another thread or at a deadline. Calls check it before each run, between
//! steps and at the end; a single timer thread per process interrupts ONNX Runtime runs at their deadlines.
//!
//! # Design
//! The thread that does the work compares deadlines with the clock, so none is missed because the timer thread was not
//! scheduled. The timer only shortens runs that have begun. After a fork the child has no timer thread and may have
//! inherited its lock in any state, so timers are chained: each process uses the one with its own id, and never touches
//! its parents'.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;
use std::{process, thread};

use ort::session::RunOptions;

use crate::error::Error;

/// Stops the calls that it was passed to, from any thread. It cannot be reset: later calls with it stop too.
#[derive(Clone, Default)]
pub struct Cancellation(Arc<Signal>);

#[derive(Default)]
struct Signal {
    cancelled: AtomicBool,
    deadline: Option<Instant>,
    /// Made by the first run, because it needs the library to be loaded.
    run: OnceLock<RunOptions>,
    /// Set by the first run, if there is a deadline.
    alarm: OnceLock<Alarm>,
}

impl fmt::Debug for Cancellation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cancellation")
            .field("is_cancelled", &self.is_cancelled())
            .field("deadline", &self.deadline())
            .finish()
    }
}

impl Cancellation {
    /// A cancellation without a deadline.
    pub fn new() -> Cancellation {
        Cancellation::default()
    }

    /// A cancellation that also stops its calls at a deadline, with [`Error::Deadline`].
    pub fn until(deadline: Instant) -> Cancellation {
        Cancellation(Arc::new(Signal { deadline: Some(deadline), ..Signal::default() }))
    }

    /// The deadline.
    pub fn deadline(&self) -> Option<Instant> {
        self.0.deadline
    }

    /// Stops the calls: a running graph ends at its next operator.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
        self.0.ring();
    }

    /// Whether [`Cancellation::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Checks that the call may go on. Reads the clock if there is a deadline.
    ///
    /// # Errors
    /// [`Error::Cancelled`] or [`Error::Deadline`].
    pub fn check(&self) -> Result<(), Error> {
        if self.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let is_late = self.0.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if is_late { Err(Error::Deadline) } else { Ok(()) }
    }

    /// The options of a run that this cancellation interrupts. They are registered before the flag and the clock are
    /// read, so that no cancellation is missed in between.
    pub(crate) fn run_options(&self) -> Result<&RunOptions, Error> {
        let run = match self.0.run.get() {
            Some(run) => run,
            None => {
                let made = RunOptions::new().map_err(Error::onnxruntime("preparing a run"))?;
                self.0.run.get_or_init(|| made)
            }
        };
        if let Some(deadline) = self.0.deadline {
            self.0.alarm.get_or_init(|| timer().set(deadline, &self.0));
        }
        self.check().map(|()| run)
    }

    /// The error of a failed run: its own, unless it was interrupted.
    pub(crate) fn failed<R>(&self, during: impl Into<String>) -> impl FnOnce(ort::Error<R>) -> Error {
        |error| self.check().err().unwrap_or_else(|| Error::onnxruntime(during)(error))
    }
}

/// The callback of an alarm.
trait Ring: Send + Sync {
    fn ring(&self);
}

impl Ring for Signal {
    fn ring(&self) {
        if let Some(run) = self.run.get() {
            // If this fails, the call still ends before its next run.
            let _ = run.terminate();
        }
    }
}

/// A pending alarm; dropping it cancels it.
struct Alarm {
    timer: &'static Timer,
    key: (Instant, u64),
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if self.timer.process == process::id() {
            self.timer.alarms().waiting.remove(&self.key);
        }
    }
}

/// The thread that waits for all deadlines of a process.
struct Timer {
    process: u32,
    alarms: Mutex<Alarms>,
    changed: Condvar,
    /// The timer of a process forked from this one.
    of_fork: OnceLock<Box<Timer>>,
}

#[derive(Default)]
struct Alarms {
    set: u64,
    waiting: BTreeMap<(Instant, u64), Weak<dyn Ring>>,
    is_started: bool,
}

impl Alarms {
    fn enter<R: Ring + 'static>(&mut self, at: Instant, ring: &Arc<R>) -> (Instant, u64) {
        self.set += 1;
        let ring: Arc<dyn Ring> = ring.clone();
        self.waiting.insert((at, self.set), Arc::downgrade(&ring));
        (at, self.set)
    }
}

/// The timer of this process.
fn timer() -> &'static Timer {
    static FIRST: OnceLock<Timer> = OnceLock::new();
    let process = process::id();
    let mut timer = FIRST.get_or_init(|| Timer::of(process));
    while timer.process != process {
        timer = timer.of_fork.get_or_init(|| Box::new(Timer::of(process)));
    }
    timer
}

impl Timer {
    fn of(process: u32) -> Timer {
        Timer { process, alarms: Mutex::default(), changed: Condvar::new(), of_fork: OnceLock::new() }
    }

    fn alarms(&self) -> MutexGuard<'_, Alarms> {
        self.alarms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets an alarm.
    fn set<R: Ring + 'static>(&'static self, at: Instant, ring: &Arc<R>) -> Alarm {
        let mut alarms = self.alarms();
        let key = alarms.enter(at, ring);
        if !alarms.is_started {
            let started = thread::Builder::new().name("t5g-timer".into()).spawn(|| {
                loop {
                    let _ = catch_unwind(AssertUnwindSafe(|| self.run()));
                }
            });
            // Without a thread, runs are not interrupted, and their calls end after them; the next alarm tries again.
            alarms.is_started = started.is_ok();
        }
        drop(alarms);
        self.changed.notify_all();
        Alarm { timer: self, key }
    }

    fn run(&self) {
        let mut alarms = self.alarms();
        loop {
            let Some((&(at, _), _)) = alarms.waiting.first_key_value() else {
                alarms = self.changed.wait(alarms).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = at.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                alarms = self.changed.wait_timeout(alarms, left).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let due = alarms.waiting.pop_first();
            // `ring` may be the last reference, and dropping it locks the alarms.
            drop(alarms);
            if let Some(ring) = due.and_then(|(_, ring)| ring.upgrade()) {
                ring.ring();
            }
            alarms = self.alarms();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_check_reports_why_it_has_ended() {
        let now = Instant::now();
        let later = now + Duration::from_secs(3600);
        assert!(Cancellation::new().check().is_ok() && Cancellation::until(later).check().is_ok());
        let passed = Cancellation::until(now);
        assert!(matches!(passed.check(), Err(Error::Deadline)) && !passed.is_cancelled());
        for cancellation in [Cancellation::new(), Cancellation::until(later), passed] {
            let other = cancellation.clone();
            other.cancel();
            assert!(cancellation.is_cancelled() && matches!(cancellation.check(), Err(Error::Cancelled)));
        }
    }

    struct Bell(&'static str, Sender<&'static str>);

    impl Ring for Bell {
        fn ring(&self) {
            self.1.send(self.0).expect("the test listens");
            assert_ne!(self.0, "panics", "of this test");
        }
    }

    #[test]
    fn one_thread_rings_all_in_the_order_of_their_times_and_outlives_panics() {
        static TIMER: OnceLock<Timer> = OnceLock::new();
        let timer = TIMER.get_or_init(|| Timer::of(process::id()));
        let (sender, rung) = channel();
        let bell = |name| Arc::new(Bell(name, sender.clone()));
        let now = Instant::now();
        let [late, early, never, dropped, panics] = ["late", "early", "never", "dropped", "panics"].map(bell);
        let mut alarms = timer.alarms();
        for (at, bell) in [(40, &late), (20, &early), (30, &dropped)] {
            alarms.enter(now + Duration::from_millis(at), bell);
        }
        drop(alarms);
        drop(dropped);
        let of_panics = timer.set(now, &panics);
        let of_never = timer.set(now + Duration::from_secs(3600), &never);
        assert_eq!([(); 3].map(|()| rung.recv().expect("rung")), ["panics", "early", "late"]);
        assert!(rung.try_recv().is_err(), "neither the dropped one nor the one that is not due");
        drop(of_panics);
        assert_eq!(timer.alarms().waiting.len(), 1);
        drop(of_never);
        assert!(timer.alarms().waiting.is_empty(), "a cancelled alarm is not kept");
    }
}
