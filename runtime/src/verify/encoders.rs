//! Verifies encoders: a ragged batch against its rows alone, and the states of two encoders of one checkpoint against
//! each other, layer by layer if both return all hidden states.

use ndarray::{Array2, ArrayD, ArrayView2, Axis};
use t5gemma_graphs::task::Pooling;

use super::images::{self, sample_images};
use super::{Check, RandomTokens, SOURCES, limit, max_abs_difference, padded_left};
use crate::batch::Batch;
use crate::cancellation::Cancellation;
use crate::encoder::Encoder;
use crate::error::Error;

/// The states of an encoder compared with those of another.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderComparison {
    /// Number of vectors compared in each output: of tokens, or of sources with pooling.
    pub vectors: usize,
    /// The outputs that both encoders have, from the embedding to the last hidden state, and the features of images.
    pub outputs: Vec<OutputComparison>,
}

/// An output of two encoders.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputComparison {
    /// The name of the output.
    pub name: String,
    /// `‖a − b‖ / ‖b‖` over all vectors.
    pub relative_error: f64,
    /// The mean of `a·b / (‖a‖·‖b‖)` over the vectors.
    pub mean_cosine: f64,
    /// The least of them.
    pub min_cosine: f64,
}

/// Compares an encoder with itself: a ragged batch with its rows alone, and left with right padding. `tolerance` is as in
/// [`consistency`](super::consistency).
///
/// # Errors
/// As [`Encoder::encode`].
pub fn encoder_consistency(
    encoder: &Encoder,
    tolerance: Option<f32>,
    cancel: &Cancellation,
) -> Result<Vec<Check>, Error> {
    let sources = random_sources(encoder, &SOURCES, 7)?;
    let ragged = named_states(encoder, &Batch::padded(&sources, encoder.pad_token_id())?, cancel)?;
    let left_batch = padded_left(&sources)?;
    let left = named_states(encoder, &left_batch, cancel)?;
    let alone = |source: &Vec<i64>| {
        named_states(encoder, &Batch::padded(std::slice::from_ref(source), encoder.pad_token_id())?, cancel)
    };
    let alone: Vec<_> = sources.iter().map(alone).collect::<Result<_, Error>>()?;
    let mut checks = Vec::new();
    for (at, (name, together)) in ragged.iter().enumerate() {
        let (mut of_ragged, mut of_left) = (0.0_f32, 0.0_f32);
        for (row, source) in sources.iter().enumerate() {
            let alone = tokens_of(&alone[row][at].1, 0, 0, source.len());
            of_ragged = of_ragged.max(max_abs_difference(&alone, &tokens_of(together, row, 0, source.len())));
            let padding = left_batch.length() - source.len();
            of_left = of_left.max(max_abs_difference(&alone, &tokens_of(&left[at].1, row, padding, source.len())));
        }
        let limit = limit(encoder.manifest(), tolerance, super::largest(together.iter()));
        checks.push(Check { name: format!("{name} of a ragged batch = of its rows alone"), largest: of_ragged, limit });
        checks.push(Check { name: format!("{name} padded left = padded right"), largest: of_left, limit });
    }
    if encoder.facts().vision.is_some() && encoder.features()?.pooling == Pooling::None {
        let (largest, scale) = images::beside_texts(encoder.facts(), |batch| encoder.encode(batch, cancel))?;
        let limit = limit(encoder.manifest(), tolerance, scale);
        checks.push(Check { name: "rows with and without images = alone".into(), largest, limit });
    }
    Ok(checks)
}

/// Compares `encoder` with `other` on `sources`, or on random tokens if there are none.
///
/// # Errors
/// Encoders with different vocabularies, widths or outputs; otherwise as [`Encoder::encode`].
pub fn encoder_comparison(
    encoder: &Encoder,
    other: &Encoder,
    sources: &[Vec<i64>],
    cancel: &Cancellation,
) -> Result<EncoderComparison, Error> {
    let sizes = |encoder: &Encoder| (encoder.facts().encoder.vocab_size, encoder.facts().encoder.hidden_size);
    if sizes(encoder) != sizes(other) {
        let ((vocabulary, width), (of_other, width_of_other)) = (sizes(encoder), sizes(other));
        return Err(Error::input(
            "against",
            format!("an encoder with a vocabulary of {vocabulary} tokens and states of width {width}"),
            format!("{of_other} and {width_of_other}"),
        ));
    }
    let drawn;
    let sources = if sources.is_empty() {
        drawn = random_sources(encoder, &super::comparison::SOURCES, 11)?;
        &drawn
    } else {
        sources
    };
    let mut sums: Vec<(String, Sums)> = Vec::new();
    for source in sources {
        let batch = Batch::padded(std::slice::from_ref(source), other.pad_token_id())?;
        let (own, others) = (named_states(encoder, &batch, cancel)?, named_states(other, &batch, cancel)?);
        let both =
            own.iter().filter_map(|(name, a)| Some((name, a, &others.iter().find(|(other, _)| other == name)?.1)));
        for (at, (name, a, b)) in both.enumerate() {
            if sums.len() == at {
                sums.push((name.clone(), Sums::default()));
            }
            let (a, b) = (tokens_of(a, 0, 0, source.len()), tokens_of(b, 0, 0, source.len()));
            a.rows().into_iter().zip(b.rows()).for_each(|(a, b)| sums[at].1.add(a.iter().zip(b.iter())));
        }
    }
    if sums.is_empty() {
        let names = |encoder: &Encoder| encoder.output_names().join(", ");
        return Err(Error::input("against", format!("an encoder that returns {}", names(encoder)), names(other)));
    }
    let vectors = sums[0].1.vectors;
    let mut outputs: Vec<OutputComparison> = sums.into_iter().map(|(name, sums)| sums.finish(name)).collect();
    if let Some(vision) = images::of_both(encoder.facts(), other.facts()) {
        let images = sample_images(vision)?;
        let features = [encoder, other].map(|encoder| encoder.encode_images(&images, cancel));
        let [own, others] = features;
        outputs.push(images::compared(&own?, &others?));
    }
    Ok(EncoderComparison { vectors, outputs })
}

/// Sources of random tokens, no longer than the encoder takes them.
fn random_sources(encoder: &Encoder, lengths: &[usize], seed: u64) -> Result<Vec<Vec<i64>>, Error> {
    let mut random = RandomTokens(seed);
    let fixed = encoder.features()?.fixed_length.unwrap_or(usize::MAX);
    let longest = encoder.facts().encoder.max_position_embeddings.min(fixed);
    let vocabulary = encoder.facts().encoder.vocab_size;
    Ok(lengths.iter().map(|&length| random.tokens(length.min(longest), vocabulary)).collect())
}

/// The outputs by name, from the embedding to the last hidden state: `[rows, length, hidden_size]`, or with pooling
/// `[rows, hidden_size]`.
fn named_states(encoder: &Encoder, batch: &Batch, cancel: &Cancellation) -> Result<Vec<(String, ArrayD<f32>)>, Error> {
    let features = encoder.features()?;
    let states = if features.output_hidden_states {
        encoder.hidden_states(batch, cancel)?.into_iter().map(|states| states.into_dyn()).collect()
    } else if features.pooling == Pooling::None {
        vec![encoder.encode(batch, cancel)?.into_dyn()]
    } else {
        vec![encoder.embed(batch, features.pooling, cancel)?.into_dyn()]
    };
    Ok(encoder.output_names().into_iter().zip(states).collect())
}

/// The vectors `[tokens, hidden_size]` of a row: those of its tokens, or the only one with pooling.
fn tokens_of(states: &ArrayD<f32>, row: usize, first: usize, length: usize) -> Array2<f32> {
    let of_row = states.index_axis(Axis(0), row);
    let vectors: Result<ArrayView2<'_, f32>, _> = if of_row.ndim() == 1 {
        of_row.insert_axis(Axis(0)).into_dimensionality()
    } else {
        of_row.slice_axis_move(Axis(0), (first..first + length).into()).into_dimensionality()
    };
    vectors.expect("outputs have two or three axes").to_owned()
}

/// Vectors of a model compared with those of another.
#[derive(Default)]
pub(super) struct Sums {
    vectors: usize,
    squares: f64,
    of_other: f64,
    cosines: f64,
    least: Option<f64>,
}

impl Sums {
    pub(super) fn add<'n>(&mut self, pairs: impl Iterator<Item = (&'n f32, &'n f32)>) {
        let (mut dot, mut a_squares, mut b_squares) = (0.0, 0.0, 0.0);
        for (&a, &b) in pairs {
            let (a, b) = (f64::from(a), f64::from(b));
            dot += a * b;
            a_squares += a * a;
            b_squares += b * b;
            self.squares += (a - b) * (a - b);
        }
        self.of_other += b_squares;
        let cosine =
            if a_squares == b_squares && dot == a_squares { 1.0 } else { dot / (a_squares * b_squares).sqrt() };
        self.cosines += cosine;
        self.least = Some(self.least.map_or(cosine, |least| if cosine.is_nan() { cosine } else { least.min(cosine) }));
        self.vectors += 1;
    }

    pub(super) fn finish(self, name: String) -> OutputComparison {
        OutputComparison {
            name,
            relative_error: if self.squares == 0.0 { 0.0 } else { (self.squares / self.of_other).sqrt() },
            mean_cosine: self.cosines / self.vectors as f64,
            min_cosine: self.least.unwrap_or(f64::NAN),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosines_are_those_of_vectors_and_errors_of_all() {
        let mut sums = Sums::default();
        sums.add([1.0, 0.0].iter().zip(&[1.0, 0.0]));
        sums.add([1.0, 1.0].iter().zip(&[1.0, 0.0]));
        sums.add([0.0, 0.0].iter().zip(&[0.0, 0.0]));
        let found = sums.finish("x".into());
        assert_eq!(found.name, "x");
        assert!((found.relative_error - (1.0_f64 / 2.0).sqrt()).abs() < 1e-12, "{found:?}");
        assert!((found.min_cosine - 0.5_f64.sqrt()).abs() < 1e-12, "{found:?}");
        assert!((found.mean_cosine - (2.0 + 0.5_f64.sqrt()) / 3.0).abs() < 1e-12, "{found:?}");
    }
}
