//! Runs the decoder: the first step (prefill), which creates a state, and further steps, which continue it.

use std::collections::BTreeMap;

use ort::session::SessionInputValue;
use ort::value::DynValue;
use t5gemma_graphs::interface::{CacheLayout, REORDER};
use t5gemma_kernels::{LogitsRequest, LogitsStats};

use super::encode::Encoded;
use super::{Lane, Model};
use crate::adapter::RowAdapters;
use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::folder::no_progress_total;
use crate::positions::TargetPositions;
use crate::session::{float32_tensor, int64_tensor, run};
use crate::state::{Cache, DecoderOutputs, DeviceCacheConfig, PrefillInputs, Prefilled, RaggedCache, State};
use crate::step_output::{READING_LOGITS, StepTensors};

/// The operations that errors name.
const DECODER_STEP: &str = "running a decoder step";
const FIRST_STEP: &str = "running the first decoder step";
const PREPARING_CACHE: &str = "preparing the cache";

/// The outputs of the first decoder step, in host memory.
struct FirstStep {
    /// `[items, source]`.
    mask: DynValue,
    /// Keys and values of sources and targets, in the order of the graph.
    cached: Vec<DynValue>,
    outputs: DecoderOutputs,
    /// The float positions of what follows, if the model takes any.
    positions: Option<TargetPositions>,
    adapters: Option<RowAdapters>,
}

/// The logits at the last positions of `rows` prompts.
fn first_logits(outputs: DecoderOutputs, rows: usize) -> Result<StepTensors, Error> {
    StepTensors::last_positions(outputs, rows, None).map_err(Error::onnxruntime(READING_LOGITS))
}

impl Model {
    /// Runs the first decoder step, with one target row for each source item. The request is for its logits.
    pub(crate) fn prefill(
        &self,
        lane: Lane,
        encoded: Encoded,
        prompts: Prompts,
        request: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(State, StepTensors), Error> {
        if let Some(config) = &self.device_cache {
            return self.prefill_on_device(config, encoded, prompts, request, cancel);
        }
        let first = self.first_step(lane, encoded, prompts, request, cancel)?;
        let FirstStep { mask, cached, outputs, positions, adapters } = first;
        let items = mask.shape()[0] as usize;
        let state = match self.folder.manifest.cache {
            CacheLayout::Growing => Ok(State::growing(mask, cached, self.is_cross.clone())),
            CacheLayout::Static(_) => Err(ort::Error::new(format!("a cache of fixed capacity without {REORDER}"))),
            CacheLayout::InPlace => State::in_place(mask, cached, &self.is_cross),
        };
        let state = state.map_err(Error::onnxruntime(PREPARING_CACHE))?;
        Ok((state.with_positions(positions).with_adapters(adapters), first_logits(outputs, items)?))
    }

    /// [`Model::prefill`] of a model whose cache stays on its device.
    fn prefill_on_device(
        &self,
        config: &DeviceCacheConfig,
        encoded: Encoded,
        prompts: Prompts,
        request: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(State, StepTensors), Error> {
        let rows = prompts.ids.len() / prompts.length;
        let mut target_positions = self.target_positions(&encoded)?;
        let positions = self.first_positions(&encoded, target_positions.as_ref(), prompts.length)?;
        let Encoded { hidden, mask, adapters, .. } = encoded;
        let ids = int64_tensor(rows, prompts.ids.clone())?;
        let adapters = self.adapters.of_rows(&adapters, &self.folder.manifest)?;
        let started = {
            let mut session = self.graphs(adapters.is_some())?.decoder.lock(LogitsRequest::All)?;
            let others = adapters.iter().flat_map(RowAdapters::of_first_step).collect();
            let inputs = PrefillInputs { mask, ids: &ids, hidden: &hidden, positions: &positions, others };
            State::on_device(config, &mut session, inputs, request, cancel.run_options()?)
        };
        let (state, outputs) = started.map_err(cancel.failed(FIRST_STEP))?;
        if outputs.is_some() {
            target_positions.iter_mut().for_each(|positions| positions.advance(prompts.length));
        }
        let mut state = state.with_positions(target_positions).with_adapters(adapters);
        let outputs = match outputs {
            Some(outputs) => outputs,
            None => self.run_step(&mut state, prompts.ids, request, cancel)?.0,
        };
        Ok((state, first_logits(outputs, rows)?))
    }

    /// [`Model::prefill`], to be continued among rows of other lengths; only with [`CacheLayout::InPlace`].
    pub(crate) fn prefill_ragged(
        &self,
        lane: Lane,
        encoded: Encoded,
        prompts: Prompts,
        request: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(Prefilled, StepTensors), Error> {
        let adapters = encoded.adapters.clone();
        let FirstStep { mask, cached, outputs, .. } = self.first_step(lane, encoded, prompts, request, cancel)?;
        let tensors = first_logits(outputs, adapters.len())?;
        let prefilled =
            Prefilled::new(mask, cached, &self.is_cross, adapters).map_err(Error::onnxruntime(PREPARING_CACHE))?;
        Ok((prefilled, tensors))
    }

    /// [`Model::prefill_ragged`] without logits, and without the last tokens of the prompts: the next step of the rows
    /// that these join takes them, so that the head, most of a step of few rows, is not read for them alone.
    pub(crate) fn prefill_up_to_last(
        &self,
        lane: Lane,
        encoded: Encoded,
        prompts: Prompts,
        cancel: &Cancellation,
    ) -> Result<Prefilled, Error> {
        let adapters = encoded.adapters.clone();
        let first = self.first_step(lane, encoded, prompts, LogitsRequest::Nothing, cancel)?;
        let prefilled = Prefilled::new(first.mask, first.cached, &self.is_cross, adapters);
        Ok(prefilled.map_err(Error::onnxruntime(PREPARING_CACHE))?.without_last_token())
    }

    /// The float positions of the targets of some sources, before their first step, if the model takes any.
    fn target_positions(&self, encoded: &Encoded) -> Result<Option<TargetPositions>, Error> {
        let Some(scale) = self.facts().custom.target_scale() else { return Ok(None) };
        let total = |(row, total): (usize, &Option<usize>)| total.ok_or_else(|| no_progress_total(row));
        let totals = encoded.totals.iter().enumerate().map(total).collect::<Result<_, Error>>()?;
        Ok(Some(TargetPositions::new(totals, scale)))
    }

    /// The float positions that the first step takes, of `count` tokens of each target and of the sources.
    fn first_positions(
        &self,
        encoded: &Encoded,
        targets: Option<&TargetPositions>,
        count: usize,
    ) -> Result<Vec<DynValue>, Error> {
        let rows = encoded.totals.len();
        let of_targets = targets.map(|positions| float32_tensor(rows, positions.next(rows, count))).transpose()?;
        let (_, mask) = encoded.mask.try_extract_tensor::<i64>().map_err(Error::onnxruntime("reading the mask"))?;
        let of_sources = self.base.decoder.source_positions(rows, mask)?;
        Ok(of_targets.into_iter().chain(of_sources).collect())
    }

    fn first_step(
        &self,
        lane: Lane,
        encoded: Encoded,
        prompts: Prompts,
        request: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<FirstStep, Error> {
        let mut positions = self.target_positions(&encoded)?;
        let floats = self.first_positions(&encoded, positions.as_ref(), prompts.length)?;
        positions.iter_mut().for_each(|positions| positions.advance(prompts.length));
        let Encoded { hidden, mask, adapters, .. } = encoded;
        let ids = int64_tensor(prompts.ids.len() / prompts.length, prompts.ids)?;
        let adapters = self.adapters.of_rows(&adapters, &self.folder.manifest)?;
        let (_, decoder) = self.first_graphs(lane, adapters.is_some())?;
        let others = floats.iter().chain(adapters.iter().flat_map(RowAdapters::of_first_step));
        let inputs: Vec<SessionInputValue> = [&mask, &ids, &hidden].into_iter().chain(others).map(Into::into).collect();
        let (_, seen) = mask.try_extract_tensor::<i64>().map_err(Error::onnxruntime("reading the mask"))?;
        let session = decoder.lock(request)?;
        decoder.kernels.set_source_mask(seen);
        let mut outputs = run(session, &inputs, FIRST_STEP, cancel)?;
        let cross_attentions = if self.has_cross_attentions() { outputs.pop() } else { None };
        let mut outputs = outputs.into_iter();
        let logits = outputs.next().expect("opening has verified that the logits come first");
        let cached = outputs.take(self.is_cross.len()).collect();
        let outputs = DecoderOutputs { logits, cross_attentions };
        Ok(FirstStep { mask, cached, outputs, positions, adapters })
    }

    /// Runs a further decoder step: the same number of new tokens for each target row.
    pub(crate) fn step(
        &self,
        state: &mut State,
        tokens: Vec<i64>,
        request: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<StepTensors, Error> {
        let request = if tokens.len() == state.rows() { request } else { request.dense() };
        let (outputs, stats) = self.run_step(state, tokens, request, cancel)?;
        StepTensors::last_positions(outputs, state.rows(), stats).map_err(Error::onnxruntime(READING_LOGITS))
    }

    /// [`Model::step`] of one target row, with the logits after each of its new tokens. The model has to return all
    /// positions.
    pub(crate) fn step_all_positions(
        &self,
        state: &mut State,
        tokens: Vec<i64>,
        request: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<StepTensors, Error> {
        let expected = [1, tokens.len() as i64];
        let (outputs, _) = self.run_step(state, tokens, request.dense(), cancel)?;
        let DecoderOutputs { logits, cross_attentions } = outputs;
        let values = [Some(&logits), cross_attentions.as_ref()];
        if let Some(other) = values.into_iter().flatten().find(|value| value.shape()[..2] != expected) {
            let problem = format!("expected an output of {expected:?} tokens, found shape {}", other.shape());
            return Err(Error::onnxruntime(READING_LOGITS)(ort::Error::new(problem)));
        }
        Ok(StepTensors { logits, cross_attentions, stats: None })
    }

    /// Runs a further decoder step of rows of different lengths: one token for each.
    pub(crate) fn step_ragged(
        &self,
        cache: &mut RaggedCache,
        tokens: &[i64],
        request: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<StepTensors, Error> {
        if let Some(rows) = cache.rows_without_inputs() {
            cache.set_adapters(self.adapters.of_rows(&rows, &self.folder.manifest)?);
        }
        let step = &self.graphs(cache.has_adapters())?.decoder_with_past;
        let mut session = step.lock_sparse(request)?;
        let options = cancel.run_options()?;
        let outputs = cache.step(&mut session, tokens, request, options).map_err(cancel.failed(DECODER_STEP))?;
        StepTensors::last_positions(outputs, cache.rows(), step.kernels.take_logits_stats())
            .map_err(Error::onnxruntime(READING_LOGITS))
    }

    fn run_step(
        &self,
        state: &mut State,
        tokens: Vec<i64>,
        request: LogitsRequest,
        cancel: &Cancellation,
    ) -> Result<(DecoderOutputs, Option<LogitsStats>), Error> {
        let rows = state.rows();
        let floats = state.next_positions(tokens.len() / rows);
        let floats = floats.map(|floats| float32_tensor(rows, floats)).transpose()?;
        let (cache, adapters) = state.parts_mut();
        let step = &self.graphs(adapters.is_some())?.decoder_with_past;
        if let Cache::Growing(cache) = cache {
            let ids = int64_tensor(rows, tokens)?;
            let mut inputs: Vec<SessionInputValue> = vec![cache.mask().into(), (&ids).into()];
            let others = adapters.into_iter().flat_map(RowAdapters::of_step);
            inputs.extend(floats.iter().chain(cache.past()).chain(others).map(SessionInputValue::from));
            let mut outputs = step.run(request, &inputs, DECODER_STEP, cancel)?;
            drop(inputs);
            let cross_attentions = if self.has_cross_attentions() { outputs.pop() } else { None };
            let mut outputs = outputs.into_iter();
            let logits = outputs.next().expect("opening has verified that the logits come first");
            cache.grow(outputs);
            return Ok((DecoderOutputs { logits, cross_attentions }, None));
        }
        let mut session = step.lock_sparse(request)?;
        let options = cancel.run_options()?;
        let outputs = match cache {
            Cache::InPlace(cache) => cache.step(&mut session, &tokens, adapters, request, options),
            Cache::Device(cache) => cache.step(&mut session, &tokens, floats.as_ref(), adapters, request, options),
            Cache::Growing(_) => unreachable!("returned above"),
        };
        Ok((outputs.map_err(cancel.failed(DECODER_STEP))?, step.kernels.take_logits_stats()))
    }

    /// The activation ranges for a checked source and a whole target: for each matrix, the largest absolute input
    /// value. Only for models exported with observed activations.
    pub(crate) fn observe(
        &self,
        batch: &Batch,
        target: Prompts,
        cancel: &Cancellation,
    ) -> Result<BTreeMap<String, f32>, Error> {
        const DURING: &str = "observing the activations";
        let mask = int64_tensor(batch.rows(), batch.mask().to_vec())?;
        let target = int64_tensor(batch.rows(), target.ids)?;
        let encoded = self.base.encoder.run_on_batch(batch, &[], &[], DURING, cancel)?;
        let inputs = [(&mask).into(), (&target).into(), (&encoded[0]).into()];
        let decoded = self.base.decoder.run(LogitsRequest::All, &inputs, DURING, cancel)?;
        let mut ranges = BTreeMap::new();
        for (graph, outputs) in [("encoder", &encoded), ("decoder", &decoded)] {
            let (Some(names), Some(last)) = (self.folder.manifest.observed.get(graph), outputs.last()) else {
                return Err(Error::Unsupported {
                    what: format!("{}: the graphs do not return activation ranges", self.folder.path.display()),
                    remedy: "export the model with observed activations".into(),
                });
            };
            let (_, found) = last.try_extract_tensor::<f32>().map_err(Error::onnxruntime(DURING))?;
            ranges.extend(names.iter().cloned().zip(found.iter().copied()));
        }
        Ok(ranges)
    }
}
