//! Compares two models of one checkpoint, for example with a quantized one: their hidden states of the same sources,
//! and their logits at every position of the other model's greedy targets.

use ndarray::{Array3, Axis};

use super::images::{self, sample_images};
use super::{EXPECTED_LENGTH, OutputComparison, RandomTokens, forced};
use crate::batch::Batch;
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::generate::Controls;
use crate::model::Model;
use crate::options::GenerationConfig;

/// The logits of a model compared with those of another.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Number of target positions compared.
    pub positions: usize,
    /// `‖a − b‖ / ‖b‖` over the hidden states of all source tokens.
    pub hidden_relative_error: f64,
    /// `‖a − b‖ / ‖b‖` over all logits.
    pub logits_relative_error: f64,
    /// The largest `|a − b|` of all logits.
    pub logits_largest_error: f64,
    /// The share of positions at which both have the same most likely token.
    pub top1_agreement: f64,
    /// The share of positions at which the other's most likely token is among the model's five most likely.
    pub top1_in_top5: f64,
    /// The mean over positions of `Σ p_b · (ln p_b − ln p_a)`, in nats.
    pub kl_divergence: f64,
    /// The features of images, of models that read images.
    pub image_features: Option<OutputComparison>,
}

/// Source lengths if no sources are given.
pub(super) const SOURCES: [usize; 8] = [48, 9, 1, 64, 24, 16, 4, 33];
/// Number of target tokens of each source.
const TARGETS: usize = 16;

/// Compares `model` with `other` on `sources`, or on random tokens if there are none.
///
/// # Errors
/// Models with different vocabularies; otherwise as [`Model::generate_batch`].
pub fn comparison(
    model: &Model,
    other: &Model,
    sources: &[Vec<i64>],
    cancel: &Cancellation,
) -> Result<Comparison, Error> {
    let sizes = |model: &Model| [model.facts().encoder.vocab_size, model.facts().decoder.vocab_size];
    if sizes(model) != sizes(other) {
        let [encoder, decoder] = sizes(other);
        let [own_encoder, own_decoder] = sizes(model);
        return Err(Error::input(
            "against",
            format!("a model with vocabularies of {own_encoder} and {own_decoder} tokens"),
            format!("{encoder} and {decoder}"),
        ));
    }
    let mut random = RandomTokens(11);
    let longest = model.facts().encoder.max_position_embeddings.min(other.facts().encoder.max_position_embeddings);
    let drawn: Vec<Vec<i64>>;
    let sources = match sources {
        [] => {
            drawn = SOURCES.iter().map(|&length| random.tokens(length.min(longest), sizes(model)[0])).collect();
            &drawn
        }
        sources => sources,
    };
    let steps = TARGETS.min(model.target_limit().tokens - 1).min(other.target_limit().tokens - 1);
    let own = other.generation_config();
    let greedy = GenerationConfig { max_new_tokens: Some(steps), ..own.plain() };

    let (mut hidden, mut logits) = (Difference::default(), Difference::default());
    let (mut positions, mut same, mut among, mut divergence) = (0_usize, 0_usize, 0_usize, 0.0_f64);
    for source in sources {
        let batch = Batch::padded(std::slice::from_ref(source), own.pad_token_id)?;
        let batch = batch.with_expected_lengths(&model.facts().custom, EXPECTED_LENGTH);
        hidden.add(model.encode(&batch, cancel)?.iter(), other.encode(&batch, cancel)?.iter());
        let answer = other
            .generate_batch(&batch, &greedy, Controls::default().cancellation(cancel))?
            .swap_remove(0)
            .swap_remove(0)
            .tokens;
        let targets: Vec<i64> = std::iter::once(own.decoder_start_token_id).chain(answer).take(steps).collect();
        let pieces = vec![1; targets.len()];
        let a = of_tokens(model, other, forced(model, &batch, &targets, &pieces, cancel)?);
        let b = of_tokens(other, model, forced(other, &batch, &targets, &pieces, cancel)?);
        logits.add(a.iter(), b.iter());
        for (a, b) in a.rows().into_iter().zip(b.rows()) {
            let (a, b) = (a.to_vec(), b.to_vec());
            let best = greatest(&b);
            positions += 1;
            same += usize::from(greatest(&a) == best);
            among += usize::from(a.iter().filter(|&&score| score > a[best]).count() < 5);
            let (of_a, of_b) = (log_sum_exp(&a), log_sum_exp(&b));
            let terms = a.iter().zip(&b).map(|(&a, &b)| {
                let (a, b) = (f64::from(a) - of_a, f64::from(b) - of_b);
                b.exp() * (b - a)
            });
            divergence += terms.sum::<f64>();
        }
    }
    let image_features = match images::of_both(model.facts(), other.facts()) {
        Some(vision) => {
            let images = sample_images(vision)?;
            Some(images::compared(&model.encode_images(&images, cancel)?, &other.encode_images(&images, cancel)?))
        }
        None => None,
    };
    let share = |count: usize| count as f64 / positions as f64;
    Ok(Comparison {
        positions,
        hidden_relative_error: hidden.relative(),
        logits_relative_error: logits.relative(),
        logits_largest_error: logits.largest,
        top1_agreement: share(same),
        top1_in_top5: share(among),
        kl_divergence: divergence / positions as f64,
        image_features,
    })
}

/// The logits `[.., tokens]` of the tokens for which both models have logits.
fn of_tokens(model: &Model, other: &Model, logits: Array3<f32>) -> Array3<f32> {
    let (own, others) = (model.vocabulary_subset(), other.vocabulary_subset());
    if own.is_none() && others.is_none() {
        return logits;
    }
    let place = |token: i64| own.map_or(token, |subset| subset.index(token));
    let all = 0..model.facts().decoder.vocab_size as i64;
    let both = all.filter(|&token| [own, others].into_iter().flatten().all(|subset| subset.contains(token)));
    logits.select(Axis(2), &both.map(|token| place(token) as usize).collect::<Vec<_>>())
}

#[derive(Default)]
struct Difference {
    squares: f64,
    of_other: f64,
    largest: f64,
}

impl Difference {
    fn add<'n>(&mut self, a: impl Iterator<Item = &'n f32>, b: impl Iterator<Item = &'n f32>) {
        for (&a, &b) in a.zip(b) {
            let difference = f64::from(a) - f64::from(b);
            self.squares += difference * difference;
            self.of_other += f64::from(b) * f64::from(b);
            self.largest = self.largest.max(difference.abs());
        }
    }

    fn relative(&self) -> f64 {
        if self.squares == 0.0 { 0.0 } else { (self.squares / self.of_other).sqrt() }
    }
}

fn greatest(scores: &[f32]) -> usize {
    (0..scores.len()).rev().max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap_or(0)
}

fn log_sum_exp(scores: &[f32]) -> f64 {
    let top = f64::from(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    top + scores.iter().map(|&score| (f64::from(score) - top).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_relative_to_the_other() {
        let mut difference = Difference::default();
        difference.add([1.0, 2.0].iter(), [1.0, 2.5].iter());
        difference.add([3.0].iter(), [4.0].iter());
        let expected = ((0.25 + 1.0_f64) / (1.0 + 6.25 + 16.0)).sqrt();
        assert!((difference.relative() - expected).abs() < 1e-12);
        assert_eq!(difference.largest, 1.0);
        assert_eq!(Difference::default().relative(), 0.0);
    }

    #[test]
    fn the_first_of_equal_scores_is_the_greatest() {
        assert_eq!(greatest(&[0.5, 2.0, -1.0, 2.0]), 1);
        assert!((log_sum_exp(&[0.0, 0.0]) - 2.0_f64.ln()).abs() < 1e-12);
    }
}
