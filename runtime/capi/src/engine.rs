//! Engines: continuous batching of requests from any thread.

use std::sync::Arc;

use t5gemma_runtime::{Draws, Engine, EngineOptions, EngineStats, Request, SpecialTokens};

use crate::boundary::{fallible, free};
use crate::call::{Call, Role, t5g_call};
use crate::error::t5g_error;
use crate::gate::Gate;
use crate::handle::{Handle, Held, Object};
use crate::input::{Array, Fields, Out, Record, UNSET, integer};
use crate::model::{source_tokens, t5g_model};
use crate::options::{generation_options, t5g_generation_options};
use crate::reports::{Done, Link, Reports};
use crate::request::{Running, Submitted, Texts, t5g_request};
use crate::result::Facts;
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
    max_waiting_rows: i64,
    max_waiting_tokens: i64,
    max_waiting_bytes: i64,
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
            max_waiting_rows: UNSET,
            max_waiting_tokens: UNSET,
            max_waiting_bytes: UNSET,
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
    waiting_rows: usize,
    waiting_tokens: usize,
    waiting_bytes: usize,
    source_tokens: u64,
    new_tokens: u64,
    retry_after_seconds: f64,
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
            waiting_rows: 0,
            waiting_tokens: 0,
            waiting_bytes: 0,
            source_tokens: 0,
            new_tokens: 0,
            retry_after_seconds: 0.0,
        }
    }
}

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
            waiting_rows: found.waiting_rows,
            waiting_tokens: found.waiting_tokens,
            waiting_bytes: found.waiting_bytes,
            source_tokens: found.source_tokens,
            new_tokens: found.new_tokens,
            retry_after_seconds: self.inner.retry_after().as_secs_f64(),
        }
    }
}

/// A request for an engine, with what reading its events takes.
struct Prepared {
    request: Request,
    texts: Texts,
    facts: Facts,
    gate: Arc<Gate>,
}

fn prepare(
    engine: &Held<t5g_engine>,
    sources: Record<t5g_sources>,
    options: Record<t5g_generation_options>,
    call: &Call,
) -> Result<Prepared, t5g_error> {
    let model = &engine.model;
    let given = generation_options(options)?;
    let gate = Arc::new(Gate::default());
    let mut options = call.add_to(model.inner.generation_config().with_json(&given)?, &gate);
    if options.do_sample {
        options.seed = Some(options.seed.unwrap_or_else(Draws::random_seed));
    }
    let seed = options.seed.filter(|_| options.do_sample);
    let batch = model.read(|reader| reader.batch(sources))?;
    let facts = Facts { seed, source_tokens: source_tokens(&batch), stats: None };
    let texts = if call.wants_text() {
        let tokenizer = model.inner.target_tokenizer()?;
        (0..batch.rows()).map(|_| Some(tokenizer.stream(SpecialTokens::Skip))).collect()
    } else {
        Vec::new()
    };
    call.check_cancellation()?;
    let mut request = Request::new(batch, options).priority(call.priority());
    request.deadline = call.deadline();
    request.tenant = call.tenant().map(str::to_string);
    Ok(Prepared { request, texts: Texts(texts), facts, gate })
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
            .max_waiting(bound(given.max_waiting, "options.max_waiting")?.unwrap_or(default.max_waiting))
            .max_waiting_rows(
                bound(given.max_waiting_rows, "options.max_waiting_rows")?.unwrap_or(default.max_waiting_rows),
            )
            .max_waiting_tokens(
                bound(given.max_waiting_tokens, "options.max_waiting_tokens")?.unwrap_or(default.max_waiting_tokens),
            )
            .max_waiting_bytes(
                bound(given.max_waiting_bytes, "options.max_waiting_bytes")?.unwrap_or(default.max_waiting_bytes),
            );
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
        let Prepared { request, texts, facts, gate } = prepare(&engine, sources, options, &call)?;
        let generation = engine.inner.submit(request)?;
        let canceller = generation.canceller();
        let registered = call.register(move || canceller.cancel());
        let running =
            Running::new(Submitted { generation, texts, facts }, engine.model.inner.clone(), gate, registered);
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
        let Prepared { request, texts, facts, gate } = prepare(&engine, sources, options, &call)?;
        let link = Arc::new(Link::default());
        let mut reports = Reports {
            progress: call.progress(),
            done,
            texts,
            rows: vec![Vec::new(); request.batch.rows()],
            facts,
            model: engine.model.inner.clone(),
            gate,
            link: link.clone(),
            failed: None,
        };
        let canceller = engine.inner.submit_to(request, move |message| reports.receive(message))?;
        let to_cancel = canceller.clone();
        let registered = call.register(move || to_cancel.cancel());
        link.accept(canceller, registered);
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
