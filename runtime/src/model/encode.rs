//! Runs the encoder, unless the hidden states are given or cached; in pieces if a batch exceeds the limits.

use std::ops::Range;
use std::sync::PoisonError;

use ndarray::{Array3, s};
use ort::value::DynValue;

use super::{Lane, LazyOpener, Model};
use crate::adapter::Adapter;
use crate::batch::{Batch, check_alone};
use crate::cancellation::Cancellation;
use crate::encoder_cache::States;
use crate::error::Error;
use crate::images::PixelValues;
use crate::limits::pieces_to_encode;
use crate::ragged_batch::{self, Grouping, OutputUnit};
use crate::session::{Opener, float32_values, int64_tensor};
use crate::tensors::float_tensor;
use crate::vision;

const READING_STATES: &str = "reading the hidden states";

/// The encoder's output with the mask of its sources.
pub(crate) struct Encoded {
    /// `[items, source, hidden_size]`.
    pub hidden: DynValue,
    /// `[items, source]`.
    pub(super) mask: DynValue,
    /// The expected lengths of the targets, where they were given.
    pub(super) totals: Vec<Option<usize>>,
    /// The adapter of each item.
    pub(super) adapters: Vec<Option<Adapter>>,
}

impl Model {
    /// The encoder's last hidden states, `[rows, length, hidden_size]`; those of padding are meaningless.
    ///
    /// # Errors
    /// Tokens outside the vocabulary, too many of them, or a cancellation.
    pub fn encode(&self, batch: &Batch, cancel: &Cancellation) -> Result<Array3<f32>, Error> {
        self.encode_in(Lane::Main, batch, cancel)
    }

    /// The features of images, `[images, tokens_per_image, hidden_size]`, which the encoder takes in the places of image
    /// tokens.
    ///
    /// # Errors
    /// A model that reads no images, images of another size than it reads, or a cancellation.
    pub fn encode_images(&self, images: &[PixelValues], cancel: &Cancellation) -> Result<Array3<f32>, Error> {
        check_alone(images, self.facts())?;
        let features = self.features(&[images.to_vec()], cancel)?;
        vision::stacked(&features[0], self.facts())
    }

    /// [`Model::encode`] with the sessions of a lane.
    pub(crate) fn encode_in(&self, lane: Lane, batch: &Batch, cancel: &Cancellation) -> Result<Array3<f32>, Error> {
        self.check(batch)?;
        cancel.check()?;
        let encoder = &self.folder.manifest.facts.encoder;
        let mut states = Array3::zeros([batch.rows(), batch.length(), encoder.hidden_size]);
        for rows in pieces_to_encode(batch, &self.folder.manifest, &self.limits) {
            let piece = batch.piece(rows.clone());
            let run = self.fit(&piece);
            let hidden = self.run_encoder(lane, &run, cancel)?.hidden;
            let values = float32_values(&hidden).map_err(Error::onnxruntime(READING_STATES))?;
            let found = Array3::from_shape_vec([run.rows(), run.length(), encoder.hidden_size], values)
                .map_err(|error| Error::onnxruntime(READING_STATES)(ort::Error::wrap(error)))?;
            let found = found.slice(s![..piece.rows(), ..piece.length(), ..]);
            states.slice_mut(s![rows, ..piece.length(), ..]).assign(&found);
        }
        cancel.check()?;
        Ok(states)
    }

    /// Encodes a checked batch, unless its hidden states were given with it or are cached.
    pub(crate) fn run_encoder(&self, lane: Lane, batch: &Batch, cancel: &Cancellation) -> Result<Encoded, Error> {
        if let Some(states) = batch.encoder_outputs() {
            return self.encoded(batch, states.iter().copied().collect());
        }
        let runs: Vec<_> = batch.encoder_runs().collect();
        if runs.len() > 1 {
            return self.encode_runs(lane, batch, &runs, cancel);
        }
        let Some(cache) = &self.encoder_cache else { return self.compute_encoder(lane, batch, cancel) };
        let _in_call = self.enter()?;
        if let Some(states) = cache.get(batch) {
            return self.encoded(batch, states.to_vec());
        }
        let computed = self.compute_encoder(lane, batch, cancel)?;
        let states = float32_values(&computed.hidden).map_err(Error::onnxruntime(READING_STATES))?;
        cache.put(batch, &states);
        Ok(computed)
    }

    /// Encodes a batch whose sources have different adapters, of which the encoder takes one at a time, or some of which have
    /// images.
    fn encode_runs(
        &self,
        lane: Lane,
        batch: &Batch,
        runs: &[Range<usize>],
        cancel: &Cancellation,
    ) -> Result<Encoded, Error> {
        let (length, width) = (batch.length(), self.folder.manifest.facts.encoder.hidden_size);
        let mut states = vec![0.0; batch.rows() * length * width];
        for rows in runs {
            let piece = batch.piece(rows.clone());
            let hidden = self.run_encoder(lane, &piece, cancel)?.hidden;
            let found = float32_values(&hidden).map_err(Error::onnxruntime(READING_STATES))?;
            for (row, found) in rows.clone().zip(found.chunks(piece.length() * width)) {
                states[row * length * width..][..found.len()].copy_from_slice(found);
            }
        }
        self.encoded(batch, states)
    }

    /// Encodes a checked batch, all of whose sources have the same adapter or none, and images or none, bypassing the cache.
    pub(crate) fn compute_encoder(&self, lane: Lane, batch: &Batch, cancel: &Cancellation) -> Result<Encoded, Error> {
        let adapter = batch.adapters()[0].as_ref();
        let others = match adapter {
            Some(adapter) => self.adapters.of_sources(adapter, &self.folder.manifest)?,
            None => Vec::new(),
        };
        let (encoder, _) = self.first_graphs(lane, adapter.is_some())?;
        let features = self.image_features(batch, cancel)?;
        if self.on_cpu
            && !batch.hides_image_tokens(self.facts())
            && let Some(groups) = ragged_batch::groups(batch, Grouping::of(&self.folder.manifest))
        {
            let output = ragged_batch::run(encoder, &others, batch, &features, &groups, OutputUnit::Token, cancel)?;
            return self.encoded(batch, output.values);
        }
        let outputs = encoder.run_on_batch(batch, &features, &others, "running the encoder", cancel)?;
        let hidden = outputs.into_iter().next().expect("opening has verified that the encoder has one output");
        self.with_mask(batch, hidden)
    }

    /// The features of the images of each row; empty without images.
    fn image_features(&self, batch: &Batch, cancel: &Cancellation) -> Result<Vec<Vec<States>>, Error> {
        if batch.has_images() { self.features(batch.images(), cancel) } else { Ok(Vec::new()) }
    }

    fn features(&self, images: &[Vec<PixelValues>], cancel: &Cancellation) -> Result<Vec<Vec<States>>, Error> {
        let Some(vision) = &self.facts().vision else { return Ok(Vec::new()) };
        let open = || {
            let opener = self.lazy_opener.lock().unwrap_or_else(PoisonError::into_inner);
            let LazyOpener { options, prepacked } = &*opener;
            Opener::with_weights(&self.folder, options, prepacked.clone(), self._uploaded.as_ref())?.open_vision()
        };
        self.vision.features(images, vision, self.encoder_cache.as_ref(), self.on_cpu, open, cancel)
    }

    fn with_mask(&self, batch: &Batch, hidden: DynValue) -> Result<Encoded, Error> {
        let mask = int64_tensor(batch.rows(), batch.mask().to_vec())?;
        Ok(Encoded { hidden, mask, totals: batch.progress_totals().to_vec(), adapters: batch.adapters().to_vec() })
    }

    /// Hidden states as the decoder takes them.
    fn encoded(&self, batch: &Batch, states: Vec<f32>) -> Result<Encoded, Error> {
        let shape = [batch.rows(), batch.length(), self.folder.manifest.facts.encoder.hidden_size];
        let hidden = float_tensor(self.folder.manifest.dtype, shape, states);
        let hidden = hidden.map_err(Error::onnxruntime("preparing a run"))?;
        self.with_mask(batch, hidden)
    }
}
