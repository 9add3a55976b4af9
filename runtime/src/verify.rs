//! Verifies a model folder: different ways to compute the same numbers must agree with each other and, if given, with
//! reference numbers. In the library because it runs the model in ways that generation never does; callers read the
//! files of reference numbers.

mod comparison;
mod encoders;
mod images;

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};

use ndarray::{Array2, Array3, ArrayD, ArrayView2, Axis, s};
use t5gemma_graphs::interface::DType;
use t5gemma_graphs::manifest::{EncoderWindow, Manifest};
use t5gemma_kernels::LogitsRequest;

use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::error::Error;
use crate::generate::{self, Controls};
use crate::images::PixelValues;
use crate::model::{Lane, Model};
use crate::options::GenerationConfig;
use crate::search::Search;
use crate::step_output::StepTensors;

pub use comparison::{Comparison, comparison};
pub use encoders::{EncoderComparison, OutputComparison, encoder_comparison, encoder_consistency};

/// One comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    /// What was compared.
    pub name: String,
    /// The largest absolute difference found.
    pub largest: f32,
    /// The largest difference that passes.
    pub limit: f32,
}

impl Check {
    /// Whether the difference is within the limit.
    pub fn passed(&self) -> bool {
        self.largest <= self.limit
    }
}

/// Reference tensors by the names of the project's fixtures: `in.B.input_ids` and `in.B.attention_mask` `[rows,
/// source]` for any batch name `B`, and for each of these, where present, `enc.B.last_hidden_state`,
/// `dec.B.first.logits`, `dec.B.forced_ids` with `dec.B.forced_logits`, and `dec.B.prefill.logits`.
#[derive(Clone, Debug, Default)]
pub struct Golden {
    /// int64 tensors.
    pub integers: BTreeMap<String, ArrayD<i64>>,
    /// float32 tensors.
    pub floats: BTreeMap<String, ArrayD<f32>>,
}

/// Number of target tokens in the checks without a reference.
const TARGETS: usize = 8;
/// Source lengths of the ragged batch of these checks, with the shortest possible one.
const SOURCES: [usize; 5] = [23, 9, 1, 16, 4];

/// The expected length of targets, for models whose positions depend on it.
const EXPECTED_LENGTH: usize = 20;

/// Checks the model against itself: cached steps against recomputation, one step with many tokens against many steps
/// with one, a ragged batch against its rows alone, left against right padding, beam search with one beam against
/// greedy search, and beam scores against recomputed ones; and rows with images beside others against the same alone.
///
/// `tolerance` replaces the default limit of each comparison: 5e-4 in float32; with quantized weights, where
/// activations are rounded too, a thousandth of the largest number compared if that is more; in half precision, a tenth
/// of the largest number compared.
///
/// # Errors
/// As [`Model::generate_batch`].
pub fn consistency(model: &Model, tolerance: Option<f32>, cancel: &Cancellation) -> Result<Vec<Check>, Error> {
    let limit = |largest: f32| limit(model.manifest(), tolerance, largest);
    let (encoder, decoder) = (&model.facts().encoder, &model.facts().decoder);
    let mut random = RandomTokens(7);
    let longest = encoder.max_position_embeddings;
    let sources = SOURCES.map(|length| random.tokens(length.min(longest), encoder.vocab_size));
    let rows = sources.len();
    let targets = random.tokens(rows * TARGETS, decoder.vocab_size);
    let ragged = Batch::padded(&sources, model.generation_config().pad_token_id)?;
    let ragged = ragged.with_expected_lengths(&model.facts().custom, EXPECTED_LENGTH);

    let one_by_one = forced(model, &ragged, &targets, &[1; TARGETS], cancel)?;
    let scale = largest(one_by_one.iter());
    let mut checks = Vec::new();
    let mut check = |name: &str, largest: f32, limit: f32| checks.push(Check { name: name.into(), largest, limit });

    let mut difference = 0.0_f32;
    for length in 1..=TARGETS {
        let prefix: Vec<i64> = targets.chunks(TARGETS).flat_map(|row| &row[..length]).copied().collect();
        let whole = forced(model, &ragged, &prefix, &[length], cancel)?;
        difference =
            difference.max(max_abs_difference(&whole.slice(s![0, .., ..]), &one_by_one.slice(s![length - 1, .., ..])));
    }
    check("cached steps = recomputation", difference, limit(scale));

    let in_two = forced(model, &ragged, &targets, &[1, TARGETS - 1], cancel)?;
    let difference = max_abs_difference(&in_two.slice(s![1, .., ..]), &one_by_one.slice(s![TARGETS - 1, .., ..]));
    check("one step with many tokens = many steps with one", difference, limit(scale));

    let hidden = model.encode(&ragged, cancel)?;
    let (mut of_hidden, mut of_logits) = (0.0_f32, 0.0_f32);
    for (row, source) in sources.iter().enumerate() {
        let alone = Batch::padded(std::slice::from_ref(source), 0)?;
        let states = model.encode(&alone, cancel)?;
        of_hidden =
            of_hidden.max(max_abs_difference(&states.slice(s![0, .., ..]), &hidden.slice(s![row, ..source.len(), ..])));
        let logits = forced(model, &alone, &targets[row * TARGETS..][..TARGETS], &[1; TARGETS], cancel)?;
        of_logits = of_logits.max(max_abs_difference(&logits.slice(s![.., 0, ..]), &one_by_one.slice(s![.., row, ..])));
    }
    let hidden_scale = largest(hidden.iter());
    check("hidden states: ragged batch = its rows alone", of_hidden, limit(hidden_scale));
    check("logits: ragged batch = its rows alone", of_logits, limit(scale));

    let left = padded_left(&sources)?;
    let (mut of_hidden, states) = (0.0_f32, model.encode(&left, cancel)?);
    for (row, source) in sources.iter().enumerate() {
        let padding = left.length() - source.len();
        let (a, b) = (states.slice(s![row, padding.., ..]), hidden.slice(s![row, ..source.len(), ..]));
        of_hidden = of_hidden.max(max_abs_difference(&a, &b));
    }
    let logits = forced(model, &left, &targets, &[1; TARGETS], cancel)?;
    check("hidden states: left padding = right padding", of_hidden, limit(hidden_scale));
    check("logits: left padding = right padding", max_abs_difference(&logits, &one_by_one), limit(scale));

    if model.facts().vision.is_some() {
        let encode = |batch: &Batch| model.encode(batch, cancel);
        let (difference, scale) = images::beside_texts(model.facts(), encode)?;
        check("hidden states: rows with and without images = alone", difference, limit(scale));
    }

    // Without the model's other options: processors act on logits in greedy search and on log-probabilities in beam
    // search, so that the two rightly differ.
    let greedy = GenerationConfig {
        max_new_tokens: Some(16.min(model.target_limit().tokens - 1)),
        ..model.generation_config().plain()
    };
    let tokens = |search: fn(&GenerationConfig, &[i64]) -> Search| -> Result<Vec<Vec<i64>>, Error> {
        let mut ignored = |_: usize, _: i64| ControlFlow::Continue(());
        let found = generate::generate(model, &ragged, &greedy, search, &mut ignored, cancel)?;
        Ok(found.into_iter().map(|mut row| row.swap_remove(0).tokens).collect())
    };
    let (by_greedy, by_beam) = (tokens(Search::new)?, tokens(Search::beam)?);
    let different = by_greedy.iter().zip(&by_beam).filter(|(a, b)| a != b).count();
    check("rows that differ: one beam = greedy search", different as f32, 0.0);

    let beams = GenerationConfig { num_beams: 4, ..greedy };
    let difference = beam_scores(model, &ragged, &beams, cancel)?;
    check("beam scores = recomputed from logits", difference, limit(scale));
    Ok(checks)
}

/// Compares the model with reference numbers; hidden states count where the mask is 1.
///
/// # Errors
/// As [`Model::generate_batch`]; [`Error::Input`] for reference tensors that are missing or whose shapes do not fit
/// each other.
pub fn against(
    model: &Model,
    golden: &Golden,
    tolerance: Option<f32>,
    cancel: &Cancellation,
) -> Result<Vec<Check>, Error> {
    let mut checks: BTreeMap<&str, Check> = BTreeMap::new();
    let mut compare = |name: &'static str, largest: f32, scale: f32| {
        let limit = limit(model.manifest(), tolerance, scale);
        let check = checks.entry(name).or_insert(Check { name: name.into(), largest: 0.0, limit });
        check.largest = check.largest.max(largest);
        check.limit = check.limit.max(limit);
    };
    let is_exclusive = model.manifest().encoder_window == EncoderWindow::Exclusive;
    let start = model.generation_config().decoder_start_token_id;
    for (name, ids) in &golden.integers {
        let Some(batch_name) = name.strip_prefix("in.").and_then(|name| name.strip_suffix(".input_ids")) else {
            continue;
        };
        let mask_name = format!("in.{batch_name}.attention_mask");
        let mask = golden.integers.get(&mask_name).ok_or_else(|| Error::input(&mask_name, "a tensor", "none"))?;
        let rows = ids.shape().first().copied().unwrap_or(0);
        let batch = Batch::flat(rows, ids.iter().copied().collect(), mask.iter().copied().collect())?;
        let batch = match golden.floats.get(&format!("in.{batch_name}.pixel_values")) {
            Some(values) => {
                let images = PixelValues::of_tensor(values.shape(), values.iter().copied().collect())?;
                batch.with_images_in_order(model.facts(), images)?
            }
            None => batch,
        };
        batch.check(model.facts())?;

        let suffix = if is_exclusive { ".window_exclusive" } else { "" };
        let hidden_name = format!("enc.{batch_name}.last_hidden_state{suffix}");
        if let Some(expected) = golden.floats.get(&hidden_name) {
            let states = model.encode(&batch, cancel)?;
            same_shape(&hidden_name, expected.shape(), states.shape())?;
            let real = batch.mask().iter().map(|&visible| visible != 0);
            let width = states.shape()[2];
            let pairs =
                states.exact_chunks([1, 1, width]).into_iter().zip(expected.exact_chunks([1, 1, width].as_ref()));
            let largest_difference = pairs
                .zip(real)
                .filter(|(_, real)| *real)
                .map(|((a, b), _)| max_abs_difference_of(a.iter(), b.iter()))
                .fold(0.0, f32::max);
            compare("hidden states", largest_difference, largest(expected.iter()));
        }
        if is_exclusive {
            // The reference's decoder numbers follow its own window rule.
            continue;
        }
        let mut compare_logits = |name: &'static str, tensor: String, found: Array2<f32>, position: usize| {
            let Some(expected) = golden.floats.get(&tensor) else { return Ok(()) };
            let positions = expected.shape().get(1).copied().unwrap_or(0);
            same_shape(&tensor, expected.shape(), &[found.shape()[0], positions.max(position + 1), found.shape()[1]])?;
            let expected = expected.index_axis(Axis(1), position);
            compare(name, max_abs_difference_of(found.iter(), expected.iter()), largest(expected.iter()));
            Ok::<(), Error>(())
        };
        let first = forced(model, &batch, &vec![start; rows], &[1], cancel)?;
        compare_logits("first logits", format!("dec.{batch_name}.first.logits"), piece(&first, 0), 0)?;
        let forced_name = format!("dec.{batch_name}.forced_ids");
        let Some(ids) = golden.integers.get(&forced_name) else { continue };
        let steps = ids.shape().last().copied().unwrap_or(0);
        same_shape(&forced_name, ids.shape(), &[rows, steps])?;
        let targets: Vec<i64> = ids
            .as_standard_layout()
            .rows()
            .into_iter()
            .flat_map(|row| [start].into_iter().chain(row.to_vec()).collect::<Vec<_>>())
            .collect();
        let stepped = forced(model, &batch, &targets, &vec![1; steps + 1], cancel)?;
        for step in 0..steps {
            let found = piece(&stepped, step + 1);
            compare_logits("logits of cached steps", format!("dec.{batch_name}.forced_logits"), found, step)?;
        }
        let prefill = format!("dec.{batch_name}.prefill.logits");
        let Some(expected) = golden.floats.get(&prefill) else { continue };
        let length = expected.shape().get(1).copied().unwrap_or(0);
        if !(1..=steps + 1).contains(&length) {
            let most = format!("1 to {} positions, at most one more than in {forced_name}", steps + 1);
            return Err(Error::input(prefill, most, format!("shape {:?}", expected.shape())));
        }
        let prompt: Vec<i64> = targets.chunks(steps + 1).flat_map(|row| &row[..length]).copied().collect();
        let found = forced(model, &batch, &prompt, &[length], cancel)?;
        compare_logits("logits after a prompt", prefill, piece(&found, 0), length - 1)?;
    }
    Ok(checks.into_values().collect())
}

fn limit(manifest: &Manifest, tolerance: Option<f32>, largest: f32) -> f32 {
    match manifest.dtype {
        _ if tolerance.is_some() => tolerance.unwrap_or_default(),
        DType::Float32 if manifest.quantization.is_any() => (largest / 1000.0).max(5e-4),
        DType::Float32 => 5e-4,
        _ => largest / 10.0,
    }
}

/// Feeds `targets` `[rows, Σ pieces]` in steps of the given lengths and returns the logits after each, `[pieces, rows,
/// tokens]`: of the vocabulary, or of the model's subset of it.
fn forced(
    model: &Model,
    batch: &Batch,
    targets: &[i64],
    pieces: &[usize],
    cancel: &Cancellation,
) -> Result<Array3<f32>, Error> {
    let (rows, length) = (batch.rows(), targets.len() / batch.rows());
    let part = |from: usize, count: usize| -> Vec<i64> {
        targets.chunks(length).flat_map(|row| &row[from..from + count]).copied().collect()
    };
    let tokens = model.vocabulary_subset().map_or(model.facts().decoder.vocab_size, |subset| subset.tokens().len());
    let mut all = Array3::zeros([pieces.len(), rows, tokens]);
    let mut take = |piece: usize, rows: &Range<usize>, tensors: &mut StepTensors| {
        let logits = tensors.logits_mut()?;
        let logits = ArrayView2::from_shape([logits.len() / tokens, tokens], logits);
        let logits = logits.expect("each run returns one row of logits for each row");
        all.slice_mut(s![piece, rows.clone(), ..]).assign(&logits.slice(s![..rows.len(), ..]));
        Ok::<(), Error>(())
    };
    if let Some(profiles) = model.profiles() {
        profiles.check_targets(pieces[0], 1, 1)?;
    }
    let most = model.limits().max_sources;
    let runs = (0..rows).step_by(most.min(rows)).map(|first| first..first.saturating_add(most).min(rows));
    for of_run in runs {
        let run = batch.piece(of_run.clone()).with_expected_lengths(&model.facts().custom, EXPECTED_LENGTH);
        let run = model.fit(&run);
        let encoded = model.run_encoder(Lane::Main, &run, cancel)?;
        let prompts = Prompts { length: pieces[0], ids: part(0, pieces[0]) };
        let prompts = prompts.piece(of_run.clone()).widened(run.rows());
        let (mut state, mut tensors) = model.prefill(Lane::Main, encoded, prompts, LogitsRequest::All, cancel)?;
        take(0, &of_run, &mut tensors)?;
        let kept: Vec<usize> = (0..of_run.len()).collect();
        state.select(&kept, &kept)?;
        let mut fed = pieces[0];
        for (piece, &count) in (1..).zip(&pieces[1..]) {
            let tokens = Prompts { length: count, ids: part(fed, count) }.piece(of_run.clone()).ids;
            tensors = model.step(&mut state, tokens, LogitsRequest::All, cancel)?;
            take(piece, &of_run, &mut tensors)?;
            fed += count;
        }
    }
    Ok(all)
}

/// The largest difference between the scores that beam search returns and those recomputed from the logits.
fn beam_scores(model: &Model, batch: &Batch, options: &GenerationConfig, cancel: &Cancellation) -> Result<f32, Error> {
    let mut difference = 0.0_f32;
    for (row, found) in
        model.generate_batch(batch, options, Controls::default().cancellation(cancel))?.into_iter().enumerate()
    {
        let best = &found[0];
        let alone = Batch::flat(1, batch.source(row).to_vec(), batch.row_mask(row).to_vec())?;
        let mut targets = vec![options.decoder_start_token_id];
        targets.extend_from_slice(&best.tokens[..best.tokens.len() - 1]);
        let logits = forced(model, &alone, &targets, &vec![1; targets.len()], cancel)?;
        let log_probability: f32 = best
            .tokens
            .iter()
            .zip(logits.outer_iter())
            .map(|(&token, logits)| {
                let top = largest_signed(logits.iter());
                let sum: f32 = logits.iter().map(|logit| (logit - top).exp()).sum();
                let place = model.vocabulary_subset().map_or(token, |subset| subset.index(token));
                logits[[0, place as usize]] - top - sum.ln()
            })
            .sum();
        let score = log_probability / (best.tokens.len() as f32).powf(options.length_penalty as f32);
        difference = difference.max((score - best.score.unwrap_or(f32::NAN)).abs());
    }
    Ok(difference)
}

fn padded_left(sources: &[Vec<i64>]) -> Result<Batch, Error> {
    let length = sources.iter().map(Vec::len).max().unwrap_or(0);
    let row = |source: &Vec<i64>, value: fn(i64) -> i64| {
        let padding = std::iter::repeat_n(0, length - source.len());
        padding.chain(source.iter().map(|&id| value(id))).collect::<Vec<i64>>()
    };
    let ids: Vec<Vec<i64>> = sources.iter().map(|source| row(source, |id| id)).collect();
    let mask: Vec<Vec<i64>> = sources.iter().map(|source| row(source, |_| 1)).collect();
    Batch::masked(&ids, &mask)
}

fn piece(logits: &Array3<f32>, piece: usize) -> Array2<f32> {
    logits.index_axis(Axis(0), piece).to_owned()
}

fn same_shape(name: &str, expected: &[usize], found: &[usize]) -> Result<(), Error> {
    if expected == found {
        return Ok(());
    }
    Err(Error::input(name, format!("shape {found:?}, as the model computes it"), format!("{expected:?}")))
}

fn max_abs_difference<D: ndarray::Dimension>(a: &ndarray::ArrayRef<f32, D>, b: &ndarray::ArrayRef<f32, D>) -> f32 {
    max_abs_difference_of(a.iter(), b.iter())
}

/// The largest absolute difference; NaN on either side counts as infinite.
fn max_abs_difference_of<'n>(a: impl Iterator<Item = &'n f32>, b: impl Iterator<Item = &'n f32>) -> f32 {
    let difference = |(a, b): (&f32, &f32)| if a == b { 0.0 } else { (a - b).abs() };
    a.zip(b).map(difference).fold(0.0, |largest, next| if next.is_nan() { f32::INFINITY } else { largest.max(next) })
}

fn largest<'n>(numbers: impl Iterator<Item = &'n f32>) -> f32 {
    numbers.fold(0.0, |largest, number| largest.max(number.abs()))
}

fn largest_signed<'n>(numbers: impl Iterator<Item = &'n f32>) -> f32 {
    numbers.copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Random tokens, the same on every machine (a 64-bit linear congruential generator with Knuth's MMIX constants).
struct RandomTokens(u64);

impl RandomTokens {
    fn tokens(&mut self, count: usize, vocab_size: usize) -> Vec<i64> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((self.0 >> 33) % vocab_size as u64) as i64
        };
        (0..count).map(|_| next()).collect()
    }
}
