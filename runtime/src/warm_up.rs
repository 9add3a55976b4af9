//! The first runs of a model, before anybody waits for them: memory is taken, kernels are chosen and loaded, and engines are
//! built where there are none, for the sizes that are usual.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ndarray::Array3;
use t5gemma_graphs::interface::{DECODER_WITH_PAST, ENCODER, PROFILES_FILE};

use crate::batch::Batch;
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::model::{Model, float32_values};
use crate::options::GenerationOptions;

/// The sizes that are usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usual {
    /// Sources in a batch.
    pub batch: usize,
    /// Tokens of a source.
    pub source: usize,
    /// Target rows of a source.
    pub beams: usize,
}

/// Without a serving plan.
const UNPLANNED: Usual = Usual { batch: 1, source: 64, beams: 1 };

/// Target tokens to generate: those of a first step, of a cached one, and of one after a change of rows.
const TOKENS: usize = 3;

/// Least, usual and greatest shapes by graph and input.
type Profiles = BTreeMap<String, BTreeMap<String, [Vec<usize>; 3]>>;

impl Model {
    /// Generates a few tokens from random sources of the sizes that are usual, greedily and, where there are to be beams,
    /// with beams: what only a first run takes time for is done then. The sizes are those of the model's serving plan; without
    /// one, a source of 64 tokens. Returns them.
    ///
    /// # Errors
    /// A plan that cannot be read, what [`Model::generate`] can fail by, or a cancellation.
    pub fn warm_up(&self, cancel: &Cancellation) -> Result<Usual, Error> {
        let usual = self.usual()?;
        let (vocab_size, width) = (self.config().encoder.vocab_size, self.config().encoder.hidden_size);
        let rows = |row: usize| (0..usual.source).map(|at| ((row * 31 + at * 7 + 5) % vocab_size) as i64).collect();
        let batch = Batch::padded(&(0..usual.batch).map(rows).collect::<Vec<Vec<i64>>>(), 0)?;
        batch.check(self.config())?;
        // Not remembered: nobody is going to ask for it.
        let encoded = self.compute_encoder(&batch, cancel)?;
        let during = "reading the hidden states";
        let states = float32_values(&encoded.hidden).map_err(Error::onnxruntime(during))?;
        let states = Array3::from_shape_vec([usual.batch, usual.source, width], states)
            .map_err(|error| Error::onnxruntime(during)(ort::Error::wrap(error)))?;
        let batch = batch.with_encoder_outputs(states)?;
        let mut widths = vec![1, usual.beams];
        widths.dedup();
        for num_beams in widths {
            let options = GenerationOptions {
                num_beams,
                max_new_tokens: Some(TOKENS.min(self.longest_target().0.saturating_sub(1)).max(1)),
                decoder_start_token_id: self.options().decoder_start_token_id,
                pad_token_id: self.options().pad_token_id,
                // What ends a target would end the runs.
                eos_token_id: vec![self.config().decoder.vocab_size as i64 - 1],
                ..GenerationOptions::default()
            };
            self.generate(&batch, &options, &mut (), cancel)?;
        }
        Ok(usual)
    }

    fn usual(&self) -> Result<Usual, Error> {
        if !self.manifest().files.contains_key(PROFILES_FILE) {
            let longest = self.config().encoder.max_position_embeddings;
            return Ok(Usual { source: UNPLANNED.source.min(longest), ..UNPLANNED });
        }
        let path = self.path().join(PROFILES_FILE);
        let bytes = fs::read(&path).map_err(Error::file(&path))?;
        usual(&bytes, &path)
    }
}

/// The usual sizes of some profiles.
fn usual(profiles: &[u8], path: &Path) -> Result<Usual, Error> {
    let wrong = |problem: String| Error::File { path: path.to_path_buf(), problem };
    let profiles: Profiles = serde_json::from_slice(profiles).map_err(|error| wrong(error.to_string()))?;
    let size = |graph: &str, axis: usize| {
        let usual = profiles.get(graph).and_then(|inputs| inputs.get("input_ids")).map(|shapes| &shapes[1]);
        let size = usual.and_then(|shape| shape.get(axis)).copied().filter(|&size| size > 0);
        size.ok_or_else(|| wrong(format!("{graph}: input_ids: expected the usual size of axis {axis}, found none")))
    };
    let (batch, source) = (size(ENCODER, 0)?, size(ENCODER, 1)?);
    Ok(Usual { batch, source, beams: (size(DECODER_WITH_PAST, 0)? / batch).max(1) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_sizes_are_those_in_the_middle() {
        let whole = r#"{"encoder_model.onnx": {"input_ids": [[1, 1], [4, 32], [8, 64]]},
            "decoder_with_past_model.onnx": {"input_ids": [[1, 1], [16, 1], [64, 1]]}}"#;
        let path = Path::new("profiles.json");
        assert_eq!(usual(whole.as_bytes(), path).expect("profiles"), Usual { batch: 4, source: 32, beams: 4 });
        let cases = [
            ("{", "EOF"),
            ("{}", "encoder_model.onnx: input_ids: expected the usual size of axis 0"),
            (r#"{"encoder_model.onnx": {"input_ids": [[1, 1], [0, 32], [8, 64]]}}"#, "axis 0, found none"),
            (r#"{"encoder_model.onnx": {"input_ids": [[1, 1], [4], [8, 64]]}}"#, "axis 1, found none"),
        ];
        for (text, expected) in cases {
            let error = usual(text.as_bytes(), path).expect_err(text).to_string();
            assert!(error.contains("profiles.json") && error.contains(expected), "{text}: {error}");
        }
    }
}
