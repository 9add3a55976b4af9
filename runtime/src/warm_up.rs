//! The first runs of a model, before anybody waits for them: memory is taken, kernels are chosen and loaded, and engines are
//! built where there are none, for the sizes that are usual.

use ndarray::Array3;

use crate::batch::Batch;
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::generate::Controls;
use crate::model::Model;
use crate::options::GenerationConfig;
use crate::profiles::Profiles;
use crate::session::float32_values;

/// The sizes that are usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WarmUpShape {
    /// Sources in a batch.
    pub batch: usize,
    /// Tokens of a source.
    pub source: usize,
    /// Target rows of a source.
    pub beams: usize,
}

/// Without a serving plan.
const UNPLANNED: WarmUpShape = WarmUpShape { batch: 1, source: 64, beams: 1 };

/// Target tokens to generate: those of a first step, of a cached one, and of one after a change of rows.
const TOKENS: usize = 3;

impl Model {
    /// Generates a few tokens from random sources of the sizes that are usual, greedily and, where there are to be beams,
    /// with beams: what only a first run takes time for is done then. The sizes are those of the model's serving plan; without
    /// one, a source of 64 tokens. Returns them.
    ///
    /// # Errors
    /// What [`Model::generate_batch`] can fail by, or a cancellation.
    pub fn warm_up(&self, cancel: &Cancellation) -> Result<WarmUpShape, Error> {
        let usual = self.usual();
        let (vocab_size, width) = (self.config().encoder.vocab_size, self.config().encoder.hidden_size);
        let rows = |row: usize| (0..usual.source).map(|at| ((row * 31 + at * 7 + 5) % vocab_size) as i64).collect();
        let batch = Batch::padded(&(0..usual.batch).map(rows).collect::<Vec<Vec<i64>>>(), 0)?;
        self.check(&batch)?;
        // Not remembered: nobody is going to ask for it.
        let encoded = self.compute_encoder(&batch, cancel)?;
        let during = "reading the hidden states";
        let states = float32_values(&encoded.hidden).map_err(Error::onnxruntime(during))?;
        let states = Array3::from_shape_vec([usual.batch, usual.source, width], states)
            .map_err(|error| Error::onnxruntime(during)(ort::Error::wrap(error)))?;
        let batch = batch.with_encoder_outputs(states)?;
        let prompt = self.profiles().and_then(|profiles| profiles.decoder.as_ref()).map_or(1, |it| it.prompt.usual);
        let start = self.generation_config().decoder_start_token_id;
        let batch = batch.with_decoder_input_ids(&vec![vec![start; prompt]; usual.batch])?;
        let mut widths = vec![1, usual.beams];
        widths.dedup();
        for num_beams in widths {
            let options = GenerationConfig {
                num_beams,
                max_new_tokens: Some(TOKENS.min(self.longest_target().0.saturating_sub(prompt)).max(1)),
                decoder_start_token_id: start,
                pad_token_id: self.generation_config().pad_token_id,
                // What ends a target would end the runs.
                eos_token_id: vec![self.config().decoder.vocab_size as i64 - 1],
                ..GenerationConfig::default()
            };
            self.generate_batch(&batch, &options, Controls::default().cancellation(cancel))?;
        }
        Ok(usual)
    }

    fn usual(&self) -> WarmUpShape {
        match self.profiles() {
            Some(Profiles { batch, source, decoder }) => {
                let beams = decoder.as_ref().map_or(1, |decoder| decoder.beams.usual);
                WarmUpShape { batch: batch.usual, source: source.usual, beams }
            }
            None => {
                WarmUpShape { source: UNPLANNED.source.min(self.config().encoder.max_position_embeddings), ..UNPLANNED }
            }
        }
    }
}
