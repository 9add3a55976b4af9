//! `Cancellation`: how a call is stopped before it is done, by someone or by the clock. Whoever computes asks it before each run,
//! between steps and at the end; one thread for the whole process interrupts what is inside ONNX Runtime when its time comes.
//!
//! # Design
//! Deadlines are compared with the clock by the thread that does the work, so none is missed for want of a processor to run the
//! timer on. The timer only shortens runs that have begun. After a fork the child has no timer thread and may have inherited its
//! lock in any state, so timers are chained: each process uses the one that bears its id, and never touches its parents'.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;
use std::{process, thread};

use ort::session::RunOptions;

use crate::error::Error;

/// A way to stop calls that are given it, from any thread. Once used it stays used, as does one whose deadline has passed.
#[derive(Clone, Default)]
pub struct Cancellation(Arc<Signal>);

#[derive(Default)]
struct Signal {
    cancelled: AtomicBool,
    deadline: Option<Instant>,
    /// Made by the first run, because making it needs the library to be loaded.
    run: OnceLock<RunOptions>,
    /// By the first run, where there is a deadline.
    alarm: OnceLock<Alarm>,
}

impl Cancellation {
    /// A cancellation that has not been used.
    pub fn new() -> Cancellation {
        Cancellation::default()
    }

    /// A cancellation that also stops its calls at a time, with [`Error::Deadline`].
    pub fn until(deadline: Instant) -> Cancellation {
        Cancellation(Arc::new(Signal { deadline: Some(deadline), ..Signal::default() }))
    }

    /// When it stops its calls by itself.
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

    /// Whether to go on. Costs a look at the clock.
    ///
    /// # Errors
    /// [`Error::Cancelled`] or [`Error::Deadline`].
    pub fn check(&self) -> Result<(), Error> {
        if self.is_cancelled() {
            return Err(Error::Cancelled);
        }
        match self.0.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            true => Err(Error::Deadline),
            false => Ok(()),
        }
    }

    /// The options of a run that this cancellation ends. The run can be interrupted before the flag and the clock are read, so
    /// that a cancellation at any moment is seen by the one or the other.
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

    /// Why a run has failed: it was interrupted, or by itself.
    pub(crate) fn failed<R>(&self, during: impl Into<String>) -> impl FnOnce(ort::Error<R>) -> Error {
        |error| self.check().err().unwrap_or_else(|| Error::onnxruntime(during)(error))
    }
}

/// What is told when its time has come.
trait Ring: Send + Sync {
    fn ring(&self);
}

impl Ring for Signal {
    fn ring(&self) {
        if let Some(run) = self.run.get() {
            // Should it fail, the call still ends before its next run.
            let _ = run.terminate();
        }
    }
}

/// What has asked a timer to be told; when it is dropped, that is taken back.
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
    /// The timer of a process that was forked from this one.
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
        let told: Arc<dyn Ring> = ring.clone();
        self.waiting.insert((at, self.set), Arc::downgrade(&told));
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

    /// Has something told at a time.
    fn set<R: Ring + 'static>(&'static self, at: Instant, ring: &Arc<R>) -> Alarm {
        let mut alarms = self.alarms();
        let key = alarms.enter(at, ring);
        if !alarms.is_started {
            let started = thread::Builder::new().name("t5g-timer".into()).spawn(|| {
                loop {
                    let _ = catch_unwind(AssertUnwindSafe(|| self.run()));
                }
            });
            // Without a thread runs are not interrupted, and end their calls when they are over; the next alarm tries again.
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
            // What is told may be the last that holds it, and takes its alarm back when it goes.
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
    fn it_is_shared_between_threads() {
        fn check<T: Send + Sync>() {}
        check::<Cancellation>();
    }

    #[test]
    fn what_has_ended_says_why_at_every_check() {
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
    fn one_thread_tells_all_in_the_order_of_their_times_and_outlives_panics() {
        static TIMER: OnceLock<Timer> = OnceLock::new();
        let timer = TIMER.get_or_init(|| Timer::of(process::id()));
        let (tell, told) = channel();
        let bell = |name| Arc::new(Bell(name, tell.clone()));
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
        assert_eq!([(); 3].map(|()| told.recv().expect("told")), ["panics", "early", "late"]);
        assert!(told.try_recv().is_err(), "neither what is gone nor what is not due");
        drop(of_panics);
        assert_eq!(timer.alarms().waiting.len(), 1);
        drop(of_never);
        assert!(timer.alarms().waiting.is_empty(), "an alarm that is taken back is not kept");
    }
}
