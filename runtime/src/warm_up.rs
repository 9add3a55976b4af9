//! `Model::warm_up`: the first runs of a model, before any request waits for them. They allocate memory, choose and
//! load kernels, and build missing engines for typical sizes.

use ndarray::Array3;

use crate::batch::Batch;
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::generate::Controls;
use crate::model::{Lane, Model};
use crate::options::GenerationConfig;
use crate::profiles::Profiles;
use crate::session::float32_values;

/// The sizes that a model was warmed up with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WarmUpShape {
    /// Sources in a batch.
    pub batch: usize,
    /// Tokens of a source.
    pub source: usize,
    /// Target rows for each source.
    pub beams: usize,
}

/// The sizes without a serving plan.
const UNPLANNED: WarmUpShape = WarmUpShape { batch: 1, source: 64, beams: 1 };

/// Target tokens to generate: of a first step, of a cached one, and of one after a change of rows.
const TOKENS: usize = 3;

impl Model {
    /// Generates a few tokens from made-up sources of typical sizes, greedily and, if the sizes have beams, with beams,
    /// so that later calls do not pay for one-time work. The sizes are those that the model's serving plan is optimized
    /// for; without a plan, one source of 64 tokens. Returns the sizes.
    ///
    /// # Errors
    /// As [`Model::generate_batch`].
    pub fn warm_up(&self, cancel: &Cancellation) -> Result<WarmUpShape, Error> {
        let shape = self.warm_up_shape();
        let (vocab_size, width) = (self.facts().encoder.vocab_size, self.facts().encoder.hidden_size);
        let rows = |row: usize| (0..shape.source).map(|at| ((row * 31 + at * 7 + 5) % vocab_size) as i64).collect();
        let batch = Batch::padded(&(0..shape.batch).map(rows).collect::<Vec<Vec<i64>>>(), 0)?;
        self.check(&batch)?;
        // Without the cache: no request will have these sources.
        let encoded = self.compute_encoder(Lane::Main, &batch, cancel)?;
        let during = "reading the hidden states";
        let states = float32_values(&encoded.hidden).map_err(Error::onnxruntime(during))?;
        let states = Array3::from_shape_vec([shape.batch, shape.source, width], states)
            .map_err(|error| Error::onnxruntime(during)(ort::Error::wrap(error)))?;
        let batch = batch.with_encoder_outputs(states)?;
        let prompt = self.profiles().and_then(|profiles| profiles.decoder.as_ref()).map_or(1, |it| it.prompt.opt);
        let start = self.generation_config().decoder_start_token_id;
        let batch = batch.with_decoder_input_ids(&vec![vec![start; prompt]; shape.batch])?;
        let batch = batch.with_expected_lengths(&self.facts().custom, prompt + TOKENS);
        let mut widths = vec![1, shape.beams];
        widths.dedup();
        for num_beams in widths {
            let options = GenerationConfig {
                num_beams,
                max_new_tokens: Some(TOKENS.min(self.target_limit().tokens.saturating_sub(prompt)).max(1)),
                decoder_start_token_id: start,
                pad_token_id: self.generation_config().pad_token_id,
                // An end-of-sequence token would end the runs.
                eos_token_id: vec![self.facts().decoder.vocab_size as i64 - 1],
                ..GenerationConfig::default()
            };
            self.generate_batch(&batch, &options, Controls::default().cancellation(cancel))?;
        }
        Ok(shape)
    }

    fn warm_up_shape(&self) -> WarmUpShape {
        match self.profiles() {
            Some(Profiles { batch, source, decoder }) => {
                let beams = decoder.as_ref().map_or(1, |decoder| decoder.beams.opt);
                WarmUpShape { batch: batch.opt, source: source.opt, beams }
            }
            None => {
                let source = UNPLANNED.source.min(self.facts().encoder.max_position_embeddings);
                WarmUpShape { source, ..UNPLANNED }
            }
        }
    }
}
