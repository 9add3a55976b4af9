//! Running the decoder: the first step, which makes a state, and the further ones, which continue it.

use std::collections::BTreeMap;

use ort::session::SessionInputValue;
use ort::value::DynValue;
use t5gemma_graphs::interface::{CacheLayout, REORDER};
use t5gemma_kernels::{LogitsRequest, LogitsStats};

use super::Model;
use super::encode::Encoded;
use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::logits::{Logits, READING_LOGITS};
use crate::session::{int64_tensor, run, run_locked};
use crate::state::{Cache, First, Plan, Ragged, Returned, State};

/// What a failure of [`Model::step`] says was being done.
const DECODER_STEP: &str = "running a decoder step";
const FIRST_STEP: &str = "running the first decoder step";
const PREPARING_CACHE: &str = "preparing the cache";

impl Model {
    /// Runs the first decoder step: one target row for each source item, of whose logits so much is wanted.
    pub(crate) fn start(
        &self,
        encoded: Encoded,
        prompts: Prompts,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(State, Logits), Error> {
        if let Some(plan) = &self.resident {
            return self.start_resident(plan, (encoded, prompts), wanted, cancel);
        }
        let (mask, cached, logits) = self.first_step(encoded, prompts, wanted, cancel)?;
        let state = match self.folder.manifest.cache {
            CacheLayout::Growing => Ok(State::growing(mask, cached, self.per_item.clone())),
            CacheLayout::Static(_) => Err(ort::Error::new(format!("a cache of fixed capacity without {REORDER}"))),
            CacheLayout::InPlace => State::in_place(mask, cached, &self.per_item),
        };
        Ok((state.map_err(Error::onnxruntime(PREPARING_CACHE))?, logits))
    }

    /// [`Model::start`] of a model whose cache stays on its device.
    fn start_resident(
        &self,
        plan: &Plan,
        (Encoded { hidden, mask }, prompts): (Encoded, Prompts),
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(State, Logits), Error> {
        let rows = prompts.ids.len() / prompts.length;
        let ids = int64_tensor(rows, prompts.ids.clone())?;
        let started = {
            let mut session = self.decoder.lock(LogitsRequest::All);
            State::resident(plan, &mut session, mask, (&ids, &hidden), wanted, cancel.run_options()?)
        };
        let (mut state, returned) = started.map_err(cancel.failed(FIRST_STEP))?;
        let returned = match returned {
            Some(returned) => returned,
            None => self.run_step(&mut state, prompts.ids, wanted, cancel)?.0,
        };
        Ok((state, Logits::last(returned, rows, None).map_err(Error::onnxruntime(READING_LOGITS))?))
    }

    /// [`Model::start`], to be continued among rows of other lengths; only with [`CacheLayout::InPlace`].
    pub(crate) fn start_ragged(
        &self,
        encoded: Encoded,
        prompts: Prompts,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(First, Logits), Error> {
        let (mask, cached, logits) = self.first_step(encoded, prompts, wanted, cancel)?;
        let first = First::new(mask, cached, &self.per_item).map_err(Error::onnxruntime(PREPARING_CACHE))?;
        Ok((first, logits))
    }

    /// The sources' mask, what is cached of sources and targets, and the logits.
    fn first_step(
        &self,
        encoded: Encoded,
        prompts: Prompts,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(DynValue, Vec<DynValue>, Logits), Error> {
        let Encoded { hidden, mask } = encoded;
        let rows = prompts.ids.len() / prompts.length;
        let ids = int64_tensor(rows, prompts.ids)?;
        let inputs = [(&mask).into(), (&ids).into(), (&hidden).into()];
        let (_, seen) = mask.try_extract_tensor::<i64>().map_err(Error::onnxruntime("reading the mask"))?;
        let session = self.decoder.lock(wanted);
        self.decoder.kernels.read(seen);
        let mut outputs = run_locked(session, FIRST_STEP, &inputs, cancel)?;
        let attended = if self.attends() { outputs.pop() } else { None };
        let mut outputs = outputs.into_iter();
        let logits = outputs.next().expect("opening has verified that the logits come first");
        let returned = Returned { logits, attended };
        let logits = Logits::last(returned, rows, None).map_err(Error::onnxruntime(READING_LOGITS))?;
        Ok((mask, outputs.take(self.per_item.len()).collect(), logits))
    }

    /// Runs a further decoder step of rows of different lengths: a token for each.
    pub(crate) fn step_ragged(
        &self,
        state: &mut Ragged,
        tokens: &[i64],
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<Logits, Error> {
        let mut session = self.decoder_with_past.lock_to_list(wanted);
        let options = cancel.run_options()?;
        let returned = state.step(&mut session, tokens, wanted, options).map_err(cancel.failed(DECODER_STEP))?;
        Logits::last(returned, tokens.len(), self.decoder_with_past.kernels.summary())
            .map_err(Error::onnxruntime(READING_LOGITS))
    }

    /// Runs a further decoder step: new tokens for each target row, as many for one as for another.
    pub(crate) fn step(
        &self,
        state: &mut State,
        tokens: Vec<i64>,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<Logits, Error> {
        let wanted = if tokens.len() == state.rows() { wanted } else { wanted.dense() };
        let (returned, summary) = self.run_step(state, tokens, wanted, cancel)?;
        Logits::last(returned, state.rows(), summary).map_err(Error::onnxruntime(READING_LOGITS))
    }

    /// [`Model::step`] of one target row, with the scores of each of its new tokens one after the other; the model has to
    /// be one that gives all.
    pub(crate) fn step_all(
        &self,
        state: &mut State,
        tokens: Vec<i64>,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<Logits, Error> {
        let expected = [1, tokens.len() as i64];
        let wanted = wanted.dense();
        let (Returned { logits: value, attended }, _) = self.run_step(state, tokens, wanted, cancel)?;
        if let Some(other) =
            [Some(&value), attended.as_ref()].into_iter().flatten().find(|v| v.shape()[..2] != expected)
        {
            let problem = ort::Error::new(format!("{expected:?} tokens gave an output of shape {}", other.shape()));
            return Err(Error::onnxruntime(READING_LOGITS)(problem));
        }
        Ok(Logits { value, attended, summary: None })
    }

    fn run_step(
        &self,
        state: &mut State,
        tokens: Vec<i64>,
        wanted: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(Returned, Option<LogitsStats>), Error> {
        let rows = state.rows();
        Ok(match state.cache_mut() {
            Cache::Growing(cache) => {
                let ids = int64_tensor(rows, tokens)?;
                let mut inputs: Vec<SessionInputValue> = vec![cache.mask().into(), (&ids).into()];
                inputs.extend(cache.past().iter().map(SessionInputValue::from));
                let mut outputs = run((&self.decoder_with_past, wanted), DECODER_STEP, &inputs, cancel)?;
                drop(inputs);
                let attended = if self.attends() { outputs.pop() } else { None };
                let mut outputs = outputs.into_iter();
                let logits = outputs.next().expect("opening has verified that the logits come first");
                cache.grow(outputs);
                (Returned { logits, attended }, None)
            }
            cache => {
                let mut session = self.decoder_with_past.lock_to_list(wanted);
                let options = cancel.run_options()?;
                let stepped = match cache {
                    Cache::InPlace(cache) => cache.step(&mut session, &tokens, wanted, options),
                    Cache::Resident(cache) => cache.step(&mut session, &tokens, wanted, options),
                    Cache::Growing(_) => unreachable!("matched above"),
                };
                (stepped.map_err(cancel.failed(DECODER_STEP))?, self.decoder_with_past.kernels.summary())
            }
        })
    }

    /// What the graphs observe of a source that was checked and of a whole target: of each matrix the greatest absolute number
    /// that it is multiplied with.
    pub(crate) fn observe(
        &self,
        batch: &Batch,
        target: Prompts,
        cancel: &Cancellation,
    ) -> Result<BTreeMap<String, f32>, Error> {
        const DURING: &str = "observing the activations";
        let rectangle = |values: &[i64]| int64_tensor(batch.rows(), values.to_vec());
        let (ids, mask, target) = (rectangle(batch.ids())?, rectangle(batch.mask())?, rectangle(&target.ids)?);
        let encoded = run((&self.encoder, LogitsRequest::All), DURING, &[(&ids).into(), (&mask).into()], cancel)?;
        let hidden = &encoded[0];
        let decoded = run(
            (&self.decoder, LogitsRequest::All),
            DURING,
            &[(&mask).into(), (&target).into(), hidden.into()],
            cancel,
        )?;
        let mut ranges = BTreeMap::new();
        for (graph, outputs) in [("encoder", &encoded), ("decoder", &decoded)] {
            let (Some(names), Some(last)) = (self.folder.manifest.observed.get(graph), outputs.last()) else {
                return Err(Error::Unsupported {
                    what: format!("{}: its graphs observe nothing", self.folder.path.display()),
                    remedy: "export the model with --observe".into(),
                });
            };
            let (_, found) = last.try_extract_tensor::<f32>().map_err(Error::onnxruntime(DURING))?;
            ranges.extend(names.iter().cloned().zip(found.iter().copied()));
        }
        Ok(ranges)
    }
}
