//! The arguments of one call: cancellation, deadline and callbacks.

use std::ffi::{c_char, c_void};
use std::ops::ControlFlow;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use t5gemma_runtime::{
    Cancellation, Error, GenerationConfig, LogitsProcessor, Model, Position, PrefixAllowedTokens, Priority,
    SpecialTokens, Streamer, TextStream,
};

use crate::cancellation::{Registered, t5g_cancellation};
use crate::error::t5g_error;
use crate::gate::Gate;
use crate::handle::{Handle, Held};
use crate::input::{Fields, Record, Text, flag};
use crate::tokenizer::t5g_text;

type OnPiece = extern "C" fn(*mut c_void, *const t5g_piece) -> i32;
type OnAdmitted = extern "C" fn(*mut c_void, usize) -> i32;
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
    on_admitted: Option<OnAdmitted>,
    priority: i64,
    tenant: Text,
}

// SAFETY: fields of 8 bytes. A null function pointer is `None`, and the caller promises that any other is such a
// function.
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
            on_admitted: None,
            priority: 0,
            tenant: Text::NULL,
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

/// The caller's `user` pointer, which is only passed back to the caller's callbacks.
#[derive(Clone, Copy)]
struct User(*mut c_void);

// SAFETY: the pointer is never dereferenced here. The header says on which threads callbacks run, those of engines and
// requests included, so the caller promises that its data may be used from them.
unsafe impl Send for User {}
// SAFETY: as above.
unsafe impl Sync for User {}

impl User {
    fn pointer(self) -> *mut c_void {
        self.0
    }
}

/// The kind of function that a call is passed to, which decides which callbacks it may have.
#[derive(Clone, Copy)]
pub enum Role {
    /// Generates with a model.
    Generates,
    /// Scores targets.
    Scores,
    /// Encodes sources.
    Encodes,
    /// Submits a request to be polled.
    Submits,
    /// Submits a request that reports through callbacks.
    Reports,
}

/// A `t5g_call`, checked.
pub struct Call {
    given: t5g_call,
    cancellation: Option<Held<t5g_cancellation>>,
    deadline: Option<Instant>,
    stream_text: bool,
    priority: Priority,
    tenant: Option<String>,
}

/// The time `seconds` from now; `None` for 0, and beyond the range of the clock. A negative number, which a caller may
/// have computed from a clock, is a time that has passed.
fn deadline(seconds: f64) -> Result<Option<Instant>, t5g_error> {
    if seconds.is_nan() {
        let expected = "seconds from now, 0 for no deadline, or a negative number for one that has passed";
        return Err(t5g_error::argument("call.deadline_seconds", expected, "NaN"));
    }
    if seconds == 0.0 {
        return Ok(None);
    }
    let left = Duration::try_from_secs_f64(seconds.max(0.0)).ok();
    Ok(left.and_then(|left| Instant::now().checked_add(left)))
}

/// The priority of the header's number.
fn priority(number: i64) -> Result<Priority, t5g_error> {
    match number {
        1 => Ok(Priority::High),
        0 => Ok(Priority::Normal),
        2 => Ok(Priority::Low),
        other => Err(t5g_error::argument("call.priority", "T5G_PRIORITY_HIGH, _NORMAL or _LOW", other.to_string())),
    }
}

impl Call {
    pub fn read(call: Record<t5g_call>) -> Result<Call, t5g_error> {
        let given = call.optional("call")?.unwrap_or_else(t5g_call::unset);
        Ok(Call {
            given,
            cancellation: given.cancellation.find("call.cancellation")?,
            deadline: deadline(given.deadline_seconds)?,
            stream_text: flag(given.stream_text, "call.stream_text")?,
            priority: priority(given.priority)?,
            tenant: given.tenant.optional("call.tenant")?.map(str::to_string),
        })
    }

    /// Rejects callbacks that would never be called.
    pub fn of(self, role: Role) -> Result<Call, t5g_error> {
        let t5g_call { on_piece, on_step, on_admitted, logits_processor, prefix_allowed_tokens, .. } = self.given;
        let admitted = ("on_admitted", on_admitted.is_some());
        let (pieces, steps) = (("on_piece", on_piece.is_some()), ("on_step", on_step.is_some()));
        let changes = [
            ("logits_processor", logits_processor.is_some()),
            ("prefix_allowed_tokens", prefix_allowed_tokens.is_some()),
        ];
        let (refused, why): (&[(&str, bool)], _) = match role {
            Role::Scores | Role::Encodes => (&[pieces, changes[0], changes[1], admitted], "nothing is generated"),
            Role::Generates => (&[admitted], "there is no queue"),
            Role::Submits => (&[pieces, steps, admitted], "the caller polls the request"),
            Role::Reports => (&[steps], "steps of an engine serve many requests; use on_piece"),
        };
        match refused.iter().find(|(_, is_given)| *is_given) {
            Some((name, _)) => Err(t5g_error::argument(&format!("call.{name}"), format!("NULL ({why})"), "a function")),
            None => Ok(self),
        }
    }

    /// Fails if the caller's cancellation was cancelled.
    pub fn check_cancellation(&self) -> Result<(), Error> {
        match &self.cancellation {
            Some(cancellation) if cancellation.is_used() => Err(Error::Cancelled),
            _ => Ok(()),
        }
    }

    /// The deadline.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The priority of a request.
    pub fn priority(&self) -> Priority {
        self.priority
    }

    /// The tenant of a request.
    pub fn tenant(&self) -> Option<&str> {
        self.tenant.as_deref()
    }

    /// Whether pieces have text.
    pub fn wants_text(&self) -> bool {
        self.stream_text
    }

    /// Registers a function that the caller's cancellation calls, until the guard is dropped.
    pub fn register(&self, stop: impl Fn() + Send + Sync + 'static) -> Option<Registered> {
        self.cancellation.as_ref().map(|all| t5g_cancellation::register(all.share(), Box::new(stop)))
    }

    /// The callbacks that report progress.
    pub fn progress(&self) -> Progress {
        let t5g_call { user, on_piece, on_step, on_admitted, .. } = self.given;
        Progress { user: User(user), on_piece, on_step, on_admitted }
    }

    /// Runs work that the caller's cancellation and deadline can stop.
    pub fn run<T>(&self, work: impl FnOnce(&Cancellation) -> Result<T, Error>) -> Result<T, t5g_error> {
        let own = self.deadline.map_or_else(Cancellation::new, Cancellation::until);
        let to_stop = own.clone();
        let _registered = self.register(move || to_stop.cancel());
        own.check()?;
        let result = work(&own)?;
        own.check()?;
        Ok(result)
    }

    /// [`Call::run`] for work that is one step.
    pub fn run_in_one_step<T>(&self, work: impl FnOnce(&Cancellation) -> Result<T, Error>) -> Result<T, t5g_error> {
        self.run(|cancel| {
            let result = work(cancel)?;
            if self.progress().step().is_break() { Err(Error::Cancelled) } else { Ok(result) }
        })
    }

    /// Adds the callbacks that change scores or tokens, which are called while `gate` is open.
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
                // SAFETY: the caller promises that many tokens there, valid until the next call. Not null and aligned,
                // as checked.
                unsafe { std::slice::from_raw_parts(tokens, count.min(isize::MAX as usize / 8)) }.to_vec()
            };
            options.prefix_allowed_tokens = Some(PrefixAllowedTokens::new(allowed));
        }
        options
    }

    /// The streamer that reports a generation of `rows` sources to the caller.
    pub fn watch(&self, model: &Model, rows: usize) -> Result<Pieces, t5g_error> {
        let streams = if self.stream_text && self.given.on_piece.is_some() {
            let tokenizer = model.target_tokenizer()?;
            (0..rows).map(|_| tokenizer.stream(SpecialTokens::Skip)).collect()
        } else {
            Vec::new()
        };
        Ok(Pieces { progress: self.progress(), streams, failed: None })
    }
}

/// The callbacks that report progress, with the caller's pointer for them.
#[derive(Clone, Copy)]
pub struct Progress {
    user: User,
    on_piece: Option<OnPiece>,
    on_step: Option<OnStep>,
    on_admitted: Option<OnAdmitted>,
}

impl Progress {
    pub fn user(&self) -> *mut c_void {
        self.user.pointer()
    }

    /// Reports a decoder step.
    pub fn step(&self) -> ControlFlow<()> {
        self.on_step.map_or(ControlFlow::Continue(()), |on_step| continues(on_step(self.user())))
    }

    /// Reports that a row has left the queue.
    pub fn admitted(&self, row: usize) -> ControlFlow<()> {
        self.on_admitted.map_or(ControlFlow::Continue(()), |on_admitted| continues(on_admitted(self.user(), row)))
    }

    /// Reports a token, with its text if that is wanted.
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
        continues(on_piece(self.user(), &piece))
    }
}

/// The meaning of a callback's return value.
fn continues(answer: i32) -> ControlFlow<()> {
    if answer == 0 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
}

/// Reports tokens and text as they become final.
pub struct Pieces {
    progress: Progress,
    /// One for each row if text is wanted.
    streams: Vec<TextStream>,
    failed: Option<Error>,
}

impl Pieces {
    /// Reports the rest of the text. Returns `result`, or the error that ended the generation because its text could
    /// not be decoded.
    pub fn finish<T>(mut self, result: Result<T, Error>) -> Result<T, Error> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let result = result?;
        for (row, stream) in std::mem::take(&mut self.streams).into_iter().enumerate() {
            let text = stream.finish()?;
            if !text.is_empty() && self.progress.piece(row, -1, Some(text)).is_break() {
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
        self.progress.piece(row, token, text)
    }

    fn step(&mut self) -> ControlFlow<()> {
        self.progress.step()
    }
}

#[cfg(test)]
mod tests {
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
}
