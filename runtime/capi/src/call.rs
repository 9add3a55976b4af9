//! What concerns one call: who may stop it, until when it may take, and the callbacks that it is given.

use std::ffi::{c_char, c_void};
use std::ops::ControlFlow;
use std::process;
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use t5gemma_runtime::{
    Cancellation, Error, GenerationConfig, LogitsProcessor, Model, Position, PrefixAllowedTokens, SpecialTokens,
    Streamer, TextStream,
};

use crate::boundary::{fallible, free, value};
use crate::error::t5g_error;
use crate::handle::{Handle, Held, Object};
use crate::input::{Fields, Out, Record, flag};
use crate::tokenizer::t5g_text;

type OnPiece = extern "C" fn(*mut c_void, *const t5g_piece) -> i32;
type OnStep = extern "C" fn(*mut c_void) -> i32;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct t5g_call {
    size: usize,
    user: *mut c_void,
    cancellation: Handle<t5g_cancellation>,
    deadline_seconds: f64,
    stream_text: i64,
    on_piece: Option<OnPiece>,
    on_step: Option<OnStep>,
    logits_processor: Option<extern "C" fn(*mut c_void, *const t5g_position, *mut f32, usize)>,
    prefix_allowed_tokens: Option<extern "C" fn(*mut c_void, usize, *const i64, usize, *mut *const i64) -> usize>,
}

// SAFETY: words; NULL is no function, and of other words the caller says that they are functions.
unsafe impl Fields for t5g_call {
    const OLDEST: usize = 72;

    fn unset() -> t5g_call {
        t5g_call {
            size: 0,
            user: ptr::null_mut(),
            cancellation: Handle::NULL,
            deadline_seconds: 0.0,
            stream_text: 0,
            on_piece: None,
            on_step: None,
            logits_processor: None,
            prefix_allowed_tokens: None,
        }
    }
}

#[repr(C)]
pub struct t5g_piece {
    size: usize,
    row: usize,
    token: i64,
    text: *const c_char,
    text_size: usize,
}

#[repr(C)]
pub struct t5g_position {
    size: usize,
    source: *const i64,
    source_length: usize,
    target: *const i64,
    target_length: usize,
    prompt_length: usize,
}

/// The caller's own pointer, which goes back to the caller's callbacks only.
#[derive(Clone, Copy)]
struct User(*mut c_void);

// SAFETY: nothing here reads what it points at. The header says on which threads callbacks come, an engine's among them, and that
// the caller's data has to bear that.
unsafe impl Send for User {}
// SAFETY: as above.
unsafe impl Sync for User {}

impl User {
    fn pointer(self) -> *mut c_void {
        self.0
    }
}

/// What a function does of what a call may concern, which decides on the callbacks that have a meaning.
#[derive(Clone, Copy)]
pub enum Role {
    Scores,
    Encodes,
    Submits,
    Tells,
}

/// A `t5g_call`, checked.
pub struct Call {
    given: t5g_call,
    cancellation: Option<Held<t5g_cancellation>>,
    deadline: Option<Instant>,
    stream_text: bool,
}

/// The time that is so many seconds from now. A number that was computed from a clock may be below 0: it has passed. Later than
/// any clock goes is never.
fn deadline(seconds: f64) -> Result<Option<Instant>, t5g_error> {
    if seconds.is_nan() {
        let expected = "seconds from now, 0 for no deadline, or less for one that has passed";
        return Err(t5g_error::argument("call.deadline_seconds", expected, "NaN"));
    }
    if seconds == 0.0 {
        return Ok(None);
    }
    let left = Duration::try_from_secs_f64(seconds.max(0.0)).ok();
    Ok(left.and_then(|left| Instant::now().checked_add(left)))
}

impl Call {
    pub fn read(call: Record<t5g_call>) -> Result<Call, t5g_error> {
        let given = call.optional("call")?.unwrap_or_else(t5g_call::unset);
        Ok(Call {
            given,
            cancellation: given.cancellation.find("call.cancellation")?,
            deadline: deadline(given.deadline_seconds)?,
            stream_text: flag(given.stream_text, "call.stream_text")?,
        })
    }

    /// Refuses callbacks that would never be called.
    pub fn of(self, role: Role) -> Result<Call, t5g_error> {
        let t5g_call { on_piece, on_step, logits_processor, prefix_allowed_tokens, .. } = self.given;
        let (pieces, steps) = (("on_piece", on_piece.is_some()), ("on_step", on_step.is_some()));
        let changes = [
            ("logits_processor", logits_processor.is_some()),
            ("prefix_allowed_tokens", prefix_allowed_tokens.is_some()),
        ];
        let (refused, why): (&[(&str, bool)], _) = match role {
            Role::Scores | Role::Encodes => (&[pieces, changes[0], changes[1]], "nothing is generated"),
            Role::Submits => (&[pieces, steps], "t5g_request_poll tells the same"),
            Role::Tells => (&[steps], "steps are of many requests; on_piece tells of this one"),
        };
        match refused.iter().find(|(_, is_given)| *is_given) {
            Some((name, _)) => Err(t5g_error::argument(&format!("call.{name}"), format!("NULL ({why})"), "a function")),
            None => Ok(self),
        }
    }

    /// That the caller's cancellation has not been used.
    pub fn check_cancellation(&self) -> Result<(), Error> {
        match &self.cancellation {
            Some(cancellation) if cancellation.calls().is_used => Err(Error::Cancelled),
            _ => Ok(()),
        }
    }

    /// Until when the call may take.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether pieces come with text.
    pub fn wants_text(&self) -> bool {
        self.stream_text
    }

    /// Has the caller's cancellation stop something, for as long as what is returned lives.
    pub fn list(&self, stop: impl Fn() + Send + Sync + 'static) -> Option<Listed> {
        self.cancellation.as_ref().map(|all| t5g_cancellation::list(all.share(), Box::new(stop)))
    }

    /// The callbacks that are shown what happens.
    pub fn shown(&self) -> Shown {
        let t5g_call { user, on_piece, on_step, .. } = self.given;
        Shown { user: User(user), on_piece, on_step }
    }

    /// Does something that the caller's cancellation and deadline can stop.
    pub fn run<T>(&self, work: impl FnOnce(&Cancellation) -> Result<T, Error>) -> Result<T, t5g_error> {
        let own = self.deadline.map_or_else(Cancellation::new, Cancellation::until);
        let to_stop = own.clone();
        let _listed = self.list(move || to_stop.cancel());
        own.check()?;
        let result = work(&own)?;
        own.check()?;
        Ok(result)
    }

    /// [`Call::run`], of something that is one step.
    pub fn run_in_one_step<T>(&self, work: impl FnOnce(&Cancellation) -> Result<T, Error>) -> Result<T, t5g_error> {
        self.run(|cancel| {
            let result = work(cancel)?;
            if self.shown().step().is_break() { Err(Error::Cancelled) } else { Ok(result) }
        })
    }

    /// Adds the callbacks that change what is generated, each of which is called as long as `gate` is open.
    pub fn add_to(&self, mut options: GenerationConfig, gate: &Arc<Gate>) -> GenerationConfig {
        let user = User(self.given.user);
        if let Some(change) = self.given.logits_processor {
            let gate = gate.clone();
            options.logits_processor.push(LogitsProcessor::new(move |place: &Position, scores: &mut [f32]| {
                let Some(_inside) = gate.enter() else { return };
                let position = t5g_position {
                    size: size_of::<t5g_position>(),
                    source: place.source.as_ptr(),
                    source_length: place.source.len(),
                    target: place.history.as_ptr(),
                    target_length: place.history.len(),
                    prompt_length: place.prompt_len,
                };
                change(user.pointer(), &position, scores.as_mut_ptr(), scores.len());
            }));
        }
        if let Some(allowed) = self.given.prefix_allowed_tokens {
            let gate = gate.clone();
            let allowed = move |row: usize, target: &[i64]| {
                let Some(_inside) = gate.enter() else { return Vec::new() };
                let mut tokens = ptr::null();
                let count = allowed(user.pointer(), row, target.as_ptr(), target.len(), &mut tokens);
                if tokens.is_null() || !tokens.is_aligned() {
                    return Vec::new();
                }
                // SAFETY: the header asks for so many tokens there, that live until the next call.
                unsafe { std::slice::from_raw_parts(tokens, count.min(isize::MAX as usize / 8)) }.to_vec()
            };
            options.prefix_allowed_tokens = Some(PrefixAllowedTokens::new(allowed));
        }
        options
    }

    /// What shows a generation of `rows` sources to the caller.
    pub fn watch(&self, model: &Model, rows: usize) -> Result<Pieces, t5g_error> {
        let streams = match self.stream_text && self.given.on_piece.is_some() {
            true => {
                let tokenizer = model.tokenizer()?;
                (0..rows).map(|_| tokenizer.stream(SpecialTokens::Skip)).collect()
            }
            false => Vec::new(),
        };
        Ok(Pieces { shown: self.shown(), streams, failed: None })
    }
}

/// The callbacks that are shown what happens, and the caller's pointer for them.
#[derive(Clone, Copy)]
pub struct Shown {
    user: User,
    on_piece: Option<OnPiece>,
    on_step: Option<OnStep>,
}

impl Shown {
    pub fn user(&self) -> *mut c_void {
        self.user.pointer()
    }

    /// Tells that all rows have chosen what a step brings them.
    pub fn step(&self) -> ControlFlow<()> {
        self.on_step.map_or(ControlFlow::Continue(()), |on_step| going_on(on_step(self.user())))
    }

    /// Shows a token, with its text where that is wanted.
    pub fn piece(&self, row: usize, token: i64, text: Option<String>) -> ControlFlow<()> {
        let Some(on_piece) = self.on_piece else { return ControlFlow::Continue(()) };
        let text = text.map(t5g_text::new);
        let piece = t5g_piece {
            size: size_of::<t5g_piece>(),
            row,
            token,
            text: text.as_ref().map_or(ptr::null(), t5g_text::pointer),
            text_size: text.as_ref().map_or(0, t5g_text::size),
        };
        going_on(on_piece(self.user(), &piece))
    }
}

/// What a callback's answer means.
fn going_on(answer: i32) -> ControlFlow<()> {
    if answer == 0 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
}

/// Shows tokens and text as they become certain.
pub struct Pieces {
    shown: Shown,
    /// One for each row, where text is wanted.
    streams: Vec<TextStream>,
    failed: Option<Error>,
}

impl Pieces {
    /// Shows the text that waited for more tokens, after `result`, which failed for reasons of showing if that was so.
    pub fn finish<T>(mut self, result: Result<T, Error>) -> Result<T, Error> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let result = result?;
        for (row, stream) in std::mem::take(&mut self.streams).into_iter().enumerate() {
            let text = stream.finish()?;
            if !text.is_empty() && self.shown.piece(row, -1, Some(text)).is_break() {
                return Err(Error::Cancelled);
            }
        }
        Ok(result)
    }
}

impl Streamer for Pieces {
    fn token(&mut self, row: usize, token: i64) -> ControlFlow<()> {
        let text = match self.streams.get_mut(row).map(|stream| stream.push(token)).transpose() {
            Ok(text) => text,
            Err(error) => {
                self.failed = Some(error);
                return ControlFlow::Break(());
            }
        };
        self.shown.piece(row, token, text)
    }

    fn step(&mut self) -> ControlFlow<()> {
        self.shown.step()
    }
}

/// Whether callbacks that change what is generated may still be called: an engine's threads may be at it when a request ends,
/// and what the caller has for them lives no longer.
pub struct Gate {
    /// Whose threads may be inside; a process that is forked has none of them.
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
struct Inside<'a>(&'a Gate);

impl Default for Gate {
    fn default() -> Gate {
        Gate { process: process::id(), state: Mutex::default(), left: Condvar::new() }
    }
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters, if it is open, for as long as what is returned lives.
    fn enter(&self) -> Option<Inside<'_>> {
        let mut state = self.state();
        if state.is_closed {
            return None;
        }
        state.inside.push(thread::current().id());
        Some(Inside(self))
    }

    /// Lets nobody enter any more, and waits until all have left; a callback that ends its own request does not wait for itself.
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

/// What a `t5g_cancellation` is: ways to stop the calls that it is given to. Each call has its own, because a deadline ends
/// one of them and not the others.
#[derive(Default)]
pub struct t5g_cancellation(Mutex<Calls>);

#[derive(Default)]
struct Calls {
    is_used: bool,
    next: usize,
    running: Vec<(usize, Stop)>,
}

type Stop = Box<dyn Fn() + Send + Sync>;

impl Object for t5g_cancellation {
    const NAME: &'static str = "t5g_cancellation";
}

impl t5g_cancellation {
    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops a call too, for as long as what is returned lives.
    fn list(all: Arc<t5g_cancellation>, stop: Stop) -> Listed {
        let mut calls = all.calls();
        if calls.is_used {
            stop();
        }
        let number = calls.next;
        calls.next += 1;
        calls.running.push((number, stop));
        drop(calls);
        Listed { all, number }
    }

    fn cancel(&self) {
        let mut calls = self.calls();
        calls.is_used = true;
        calls.running.iter().for_each(|(_, stop)| stop());
    }
}

/// A call that a cancellation can stop.
pub struct Listed {
    all: Arc<t5g_cancellation>,
    number: usize,
}

impl Drop for Listed {
    fn drop(&mut self) {
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
    value(-1, || Ok(cancellation.get("cancellation")?.calls().is_used.into()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_cancellation_free(cancellation: Handle<t5g_cancellation>) -> i32 {
    free(cancellation, "cancellation")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    use super::*;
    use crate::error::t5g_code;

    #[test]
    fn a_deadline_is_compared_with_the_clock_and_one_that_has_passed_does_nothing() {
        let call = |seconds: f64| {
            let mut given = t5g_call { size: size_of::<t5g_call>(), deadline_seconds: seconds, ..t5g_call::unset() };
            Call::read(Record::to(&mut given))
        };
        // Seconds, and whether there is work.
        for (seconds, works) in [(0.0, true), (-0.0, true), (3600.0, true), (1e300, true), (f64::INFINITY, true)]
            .into_iter()
            .chain([(1e-12, false), (-1e-12, false), (-1.0, false), (-1e300, false), (f64::NEG_INFINITY, false)])
        {
            let mut has_worked = false;
            let result = call(seconds).expect("a number").run(|_| {
                has_worked = true;
                Ok(7)
            });
            assert_eq!((has_worked, result.as_ref().ok()), (works, Some(&7).filter(|_| works)), "{seconds}");
            if let Err(error) = result {
                assert_eq!((error.code(), error.text()), (t5g_code::Deadline, "the deadline has passed"));
            }
        }
        assert_eq!(call(f64::NAN).err().expect("no number").code(), t5g_code::Argument);

        // One that passes while there is work is noticed at the end, whatever the work says.
        let result = call(1e-3).expect("a number").run(|cancel| {
            while cancel.check().is_ok() {}
            Ok(7)
        });
        assert_eq!(result.expect_err("late").code(), t5g_code::Deadline);
    }

    #[test]
    fn a_closed_gate_has_nobody_inside_and_who_is_inside_does_not_wait() {
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

    #[test]
    fn a_cancellation_stops_all_its_calls_whenever_they_begin() {
        let all = Arc::new(t5g_cancellation::default());
        let list = |call: &Cancellation| {
            let call = call.clone();
            t5g_cancellation::list(all.clone(), Box::new(move || call.cancel()))
        };
        let [first, second, third] = [(); 3].map(|()| Cancellation::new());
        let listed = list(&first);
        drop(list(&second));
        all.cancel();
        assert!(first.is_cancelled() && !second.is_cancelled(), "the second was over before");
        drop(listed);
        let _listed = list(&third);
        assert!(third.is_cancelled() && all.calls().running.len() == 1);
    }
}
