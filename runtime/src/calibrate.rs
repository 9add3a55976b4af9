//! `Calibration`: collects the input ranges of a model's matrix multiplications, on given sources and on the targets
//! that the model generates for them. An export with 8-bit activations needs them.

use std::collections::BTreeMap;
use std::path::Path;

use t5gemma_graphs::manifest::{ActivationRanges, Manifest};

use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::encoder::Encoder;
use crate::error::Error;
use crate::generate::Controls;
use crate::model::Model;
use crate::options::GenerationConfig;

/// Collects activation ranges, source by source.
#[derive(Debug)]
pub struct Calibration<'m> {
    observed: Observed<'m>,
    /// For each matrix the largest absolute activation in each source.
    found: BTreeMap<String, Vec<f32>>,
    texts: usize,
}

/// The model to calibrate.
#[derive(Debug)]
enum Observed<'m> {
    Model(&'m Model),
    Encoder(&'m Encoder),
}

impl<'m> Calibration<'m> {
    /// Starts the calibration of a generation model.
    ///
    /// # Errors
    /// A model that was not exported with observers.
    pub fn new(model: &'m Model) -> Result<Calibration<'m>, Error> {
        check(model.manifest(), model.path())?;
        Ok(Calibration { observed: Observed::Model(model), found: BTreeMap::new(), texts: 0 })
    }

    /// Starts the calibration of an encoder or a classifier.
    ///
    /// # Errors
    /// A model that was not exported with observers, or a generation model, whose decoder would be missing.
    pub fn of_encoder(encoder: &'m Encoder) -> Result<Calibration<'m>, Error> {
        check(encoder.manifest(), encoder.path())?;
        let task = &encoder.manifest().task;
        if task.is_generation() {
            return Err(
                encoder.other_task(task, "feature-extraction or another with one graph, to be calibrated alone")
            );
        }
        Ok(Calibration { observed: Observed::Encoder(encoder), found: BTreeMap::new(), texts: 0 })
    }

    /// Observes each source of a batch alone and, for a generation model, the target that it generates with `options`.
    ///
    /// # Errors
    /// As [`Model::generate_batch`] or [`Encoder::encode`]; activations that are not finite.
    pub fn add(&mut self, batch: &Batch, options: &GenerationConfig, cancel: &Cancellation) -> Result<(), Error> {
        for row in 0..batch.rows() {
            let alone = batch.alone(row);
            let (found, dtype) = match self.observed {
                Observed::Model(model) => (of_model(model, &alone, options, cancel)?, model.manifest().dtype),
                Observed::Encoder(encoder) => (encoder.observe(&alone, cancel)?, encoder.manifest().dtype),
            };
            for (name, range) in found {
                if !range.is_finite() {
                    return Err(Error::NotFinite { row, step: 0, dtype, processor: None });
                }
                self.found.entry(name).or_default().push(range);
            }
            self.texts += 1;
        }
        Ok(())
    }

    /// The range of each matrix: a percentile over the sources, 100 for the maximum.
    pub fn ranges(self, percentile: f64) -> ActivationRanges {
        let ranges = self.found.into_iter().map(|(name, found)| (name, at_percentile(found, percentile))).collect();
        ActivationRanges { texts: self.texts, percentile, ranges }
    }
}

/// The ranges of a source and of the target that the model generates for it.
fn of_model(
    model: &Model,
    alone: &Batch,
    options: &GenerationConfig,
    cancel: &Cancellation,
) -> Result<BTreeMap<String, f32>, Error> {
    let found = model.generate_batch(alone, options, Controls::default().cancellation(cancel))?;
    let Prompts { mut ids, .. } = alone.prompts(options.decoder_start_token_id);
    ids.extend_from_slice(&found[0][0].tokens);
    ids.truncate(model.target_limit().tokens);
    model.observe(alone, Prompts { length: ids.len(), ids }, cancel)
}

fn check(manifest: &Manifest, folder: &Path) -> Result<(), Error> {
    if !manifest.observed.is_empty() {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("{}: the graphs do not return activation ranges", folder.display()),
        remedy: "export the model with observed activations".into(),
    })
}

/// The smallest number that is at least as large as `percentile` percent of the numbers.
fn at_percentile(mut found: Vec<f32>, percentile: f64) -> f32 {
    found.sort_by(f32::total_cmp);
    let place = (found.len() as f64 * percentile / 100.0).ceil() as usize;
    found.get(place.clamp(1, found.len().max(1)) - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_number_that_was_found() {
        let found: Vec<f32> = (1..=10).rev().map(|number| number as f32).collect();
        for (percentile, expected) in [(100.0, 10.0), (99.9, 10.0), (90.0, 9.0), (50.0, 5.0), (0.0, 1.0)] {
            assert_eq!(at_percentile(found.clone(), percentile), expected, "{percentile}");
        }
        assert_eq!(at_percentile(vec![3.0], 50.0), 3.0);
    }
}
