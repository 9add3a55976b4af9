//! Engines: continuous batching of requests from any thread.

use std::ffi::c_void;
use std::sync::Arc;
use std::thread;

use t5gemma_runtime::{Draws, Engine, EngineOptions, EngineStats, Error, Request, SpecialTokens};

use crate::boundary::{fallible, free, guarded};
use crate::call::{Call, Role, t5g_call};
use crate::error::{t5g_code, t5g_error};
use crate::gate::Gate;
use crate::handle::{Handle, Held, Object};
use crate::input::{Array, Fields, Out, Record, UNSET, integer};
use crate::model::{source_tokens, t5g_model};
use crate::options::{generation_options, t5g_generation_options};
use crate::request::{Facts, RequestEvent, Running, Submitted, t5g_request};
use crate::result::t5g_result;
use crate::sources::t5g_sources;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct t5g_engine_options {
    size: usize,
    max_rows: i64,
    max_bytes: i64,
    max_waiting: i64,
    devices: Array<i64>,
    device_count: usize,
}

// SAFETY: fields of 8 bytes of which any bytes are a valid value.
unsafe impl Fields for t5g_engine_options {
    const OLDEST: usize = 32;

    fn unset() -> t5g_engine_options {
        t5g_engine_options {
            size: 0,
            max_rows: UNSET,
            max_bytes: UNSET,
            max_waiting: UNSET,
            devices: Array::NULL,
            device_count: 0,
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct t5g_engine_counts {
    size: usize,
    submitted: u64,
    finished: u64,
    failed: u64,
    waiting_requests: usize,
    waiting_sources: usize,
    sources: usize,
    rows: usize,
    planned_bytes: usize,
    steps: u64,
    stepped_rows: u64,
    max_rows: usize,
    max_bytes: usize,
    max_waiting: usize,
    copies: usize,
}

// SAFETY: fields of 8 bytes of which any bytes are a valid value.
unsafe impl Fields for t5g_engine_counts {
    const OLDEST: usize = 112;

    fn unset() -> t5g_engine_counts {
        t5g_engine_counts {
            size: 0,
            submitted: 0,
            finished: 0,
            failed: 0,
            waiting_requests: 0,
            waiting_sources: 0,
            sources: 0,
            rows: 0,
            planned_bytes: 0,
            steps: 0,
            stepped_rows: 0,
            max_rows: 0,
            max_bytes: 0,
            max_waiting: 0,
            copies: 0,
        }
    }
}

type Done = extern "C" fn(*mut c_void, Handle<t5g_result>, Handle<t5g_error>);

/// A `t5g_engine`.
pub struct t5g_engine {
    inner: Engine,
    options: EngineOptions,
    model: Arc<t5g_model>,
}

impl Object for t5g_engine {
    const NAME: &'static str = "t5g_engine";
}

impl t5g_engine {
    fn counts(&self, found: EngineStats) -> t5g_engine_counts {
        t5g_engine_counts {
            size: 0,
            submitted: found.submitted,
            finished: found.finished,
            failed: found.failed,
            waiting_requests: found.waiting_requests,
            waiting_sources: found.waiting_sources,
            sources: found.sources,
            rows: found.rows,
            planned_bytes: found.planned_bytes,
            steps: found.steps,
            stepped_rows: found.stepped_rows,
            max_rows: self.options.max_rows,
            max_bytes: self.options.max_bytes,
            max_waiting: self.options.max_waiting,
            copies: self.inner.copies(),
        }
    }
}

/// Submits a request.
fn submit(
    engine: &Held<t5g_engine>,
    sources: Record<t5g_sources>,
    options: Record<t5g_generation_options>,
    call: &Call,
) -> Result<Running, t5g_error> {
    let model = &engine.model;
    let given = generation_options(options)?;
    let gate = Arc::new(Gate::default());
    let mut options = call.add_to(model.inner.generation_config().with_json(&given)?, &gate);
    if options.do_sample {
        options.seed = Some(options.seed.unwrap_or_else(Draws::random_seed));
    }
    let seed = options.seed.filter(|_| options.do_sample);
    let batch = model.read(|reader| reader.batch(sources))?;
    let (rows, source_tokens) = (batch.rows(), source_tokens(&batch));
    let streams = if call.wants_text() {
        let tokenizer = model.inner.target_tokenizer()?;
        (0..rows).map(|_| Some(tokenizer.stream(SpecialTokens::Skip))).collect()
    } else {
        Vec::new()
    };
    call.check_cancellation()?;
    let mut request = Request::new(batch, options);
    request.deadline = call.deadline();
    let generation = engine.inner.submit(request)?;
    let canceller = generation.canceller();
    let registered = call.register(move || canceller.cancel());
    let submitted = Submitted { generation, streams, facts: Facts { seed, source_tokens } };
    Ok(Running::new(submitted, model.inner.clone(), gate, registered))
}

/// A limit, if it is set.
fn bound(value: i64, name: &str) -> Result<Option<usize>, t5g_error> {
    match integer(value, name)? {
        Some(0) => Err(t5g_error::argument(name, "at least 1, or T5G_UNSET", "0")),
        bound => Ok(bound),
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_new(
    model: Handle<t5g_model>,
    options: Record<t5g_engine_options>,
    engine: Out<Handle<t5g_engine>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, model) = (engine.check("engine")?, model.get("model")?);
        let given = options.optional("options")?.unwrap_or_else(t5g_engine_options::unset);
        let default = EngineOptions::default();
        let options = EngineOptions::default()
            .max_rows(bound(given.max_rows, "options.max_rows")?.unwrap_or(default.max_rows))
            .max_bytes(bound(given.max_bytes, "options.max_bytes")?.unwrap_or(default.max_bytes))
            .max_waiting(bound(given.max_waiting, "options.max_waiting")?.unwrap_or(default.max_waiting));
        let devices = given.devices.get(given.device_count, "options.devices")?;
        let models = if devices.is_empty() { vec![model.inner.clone()] } else { model.copies(devices)? };
        let inner = Engine::of_copies(&models, options.clone())?;
        place.put(Handle::new(t5g_engine { inner, options, model: model.share() }));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_submit(
    engine: Handle<t5g_engine>,
    sources: Record<t5g_sources>,
    options: Record<t5g_generation_options>,
    call: Record<t5g_call>,
    request: Out<Handle<t5g_request>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, engine) = (request.check("request")?, engine.get("engine")?);
        let call = Call::read(call)?.of(Role::Submits)?;
        let running = submit(&engine, sources, options, &call)?;
        place.put(Handle::new(t5g_request::new(running)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_call(
    engine: Handle<t5g_engine>,
    sources: Record<t5g_sources>,
    options: Record<t5g_generation_options>,
    call: Record<t5g_call>,
    done: Option<Done>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (engine, call) = (engine.get("engine")?, Call::read(call)?.of(Role::Reports)?);
        let done = done.ok_or_else(|| t5g_error::argument("done", "a function", "NULL"))?;
        let mut running = submit(&engine, sources, options, &call)?;
        let progress = call.progress();
        let report = move || {
            let result = guarded(|| {
                while let Some(event) = running.next_or_end()? {
                    if let RequestEvent::Piece { row, token, text } = event
                        && progress.piece(row, token, text).is_break()
                    {
                        running.cancel();
                        return Err(Error::Cancelled.into());
                    }
                }
                Ok(running.result())
            });
            // Ends the request before its end is reported.
            drop(running);
            match result {
                Ok(result) => done(progress.user(), Handle::new(result), Handle::NULL),
                Err(failure) => done(progress.user(), Handle::NULL, Handle::new(failure)),
            }
        };
        let started = thread::Builder::new().name("t5g-request".into()).spawn(report);
        started.map_err(|error| t5g_error::new(t5g_code::Internal, format!("no thread for the callbacks: {error}")))?;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_stats(engine: Handle<t5g_engine>, counts: Record<t5g_engine_counts>) -> Handle<t5g_error> {
    fallible(|| {
        let engine = engine.get("engine")?;
        engine.inner.check_process()?;
        counts.put(engine.counts(engine.inner.stats()), "counts")
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_stats_of_copy(
    engine: Handle<t5g_engine>,
    copy: usize,
    counts: Record<t5g_engine_counts>,
) -> Handle<t5g_error> {
    fallible(|| {
        let engine = engine.get("engine")?;
        engine.inner.check_process()?;
        let copies = engine.inner.stats_of_copies();
        let refused = || t5g_error::argument("copy", format!("less than {}", copies.len()), copy.to_string());
        counts.put(engine.counts(*copies.get(copy).ok_or_else(refused)?), "counts")
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_drain(engine: Handle<t5g_engine>) -> Handle<t5g_error> {
    fallible(|| Ok(engine.get("engine")?.inner.drain()?))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_shutdown(engine: Handle<t5g_engine>) -> Handle<t5g_error> {
    fallible(|| Ok(engine.get("engine")?.inner.shutdown()?))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_engine_free(engine: Handle<t5g_engine>) -> i32 {
    free(engine, "engine")
}
