//! `Call` and `Item`: a request that was checked against its model, and one of its source rows in progress with
//! everything that chooses its tokens. An item turns the logits of a step into its next tokens and rows;
//! [`generate`](crate::generate) and [`engine`](crate::engine) run the model for items.

use std::ops::Range;
use std::sync::Arc;

use t5gemma_graphs::config::Progress as Estimate;
use t5gemma_graphs::interface::Logits;
use t5gemma_kernels::{LogitsRequest, LogitsStatsView};

use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::constraint::{Constraint, ConstraintState};
use crate::cross_attention::CrossAttentionTracker;
use crate::draws::Draws;
use crate::error::Error;
use crate::hypothesis::{Hypothesis, Logprobs};
use crate::logprobs::LogprobTracker;
use crate::model::{Model, TargetLimit, no_cross_attentions};
use crate::options::{GenerationConfig, OptionError};
use crate::scores::Processors;
use crate::search::{Progress, Search};
use crate::speculation::PromptLookup;
use crate::step_output::StepOutput;
use crate::stop::StoppingCriteria;
use crate::vocabulary_subset::VocabularySubset;

/// Makes the search for one source row, from the options and the decoder prompt.
pub(crate) type NewSearch = fn(&GenerationConfig, &[i64]) -> Search;

/// Sources and options that were checked against the model.
pub(crate) struct Call {
    pub batch: Batch,
    pub prompts: Prompts,
    pub options: Arc<GenerationConfig>,
    /// The greatest length of a target, prompt included.
    pub max_length: usize,
    /// The greatest number of new tokens of each row, where it follows from the row's expected length.
    max_new_tokens: Vec<Option<usize>>,
    constraint: Option<Arc<Constraint>>,
    vocabulary_subset: Option<Arc<VocabularySubset>>,
    seed: u64,
}

impl Call {
    /// Checks what depends on the model, and compiles the constraints.
    pub fn new(model: &Model, batch: &Batch, options: &GenerationConfig, cancel: &Cancellation) -> Result<Call, Error> {
        model.check(batch)?;
        let prompts = batch.prompts(options.decoder_start_token_id);
        model.check_targets(batch, prompts.length)?;
        let TargetLimit { tokens: longest, reason } = model.target_limit();
        let options = &options.clone().clipped_to(longest, prompts.length);
        options.check(model.facts().decoder.vocab_size, prompts.length)?;
        if let Some(subset) = model.vocabulary_subset() {
            options.check_subset(subset)?;
        }
        if let Some(profiles) = model.profiles() {
            profiles.check_targets(prompts.length, options.num_beams, options.num_return_sequences)?;
        }
        check_target_tokens(model, options)?;
        let max_new_tokens = new_tokens_of_rows(model, batch, options, prompts.length..longest);
        let of_row = |new_tokens: &Option<usize>| match new_tokens {
            Some(new_tokens) => prompts.length + new_tokens,
            None => options.max_length(prompts.length),
        };
        let max_length = max_new_tokens.iter().map(of_row).max().unwrap_or(prompts.length);
        if max_length > longest {
            let expected = format!("at most {longest} target tokens ({reason})");
            let found = format!("{max_length}, of which {} are the prompt", prompts.length);
            return Err(Error::input("max_length", expected, found));
        }
        if let Some(tokens) = options.prompt_lookup_num_tokens {
            check_drafts(model, tokens)?;
        }
        for (option, is_set) in
            [("output_attentions", options.output_attentions), ("coverage_penalty", options.coverage_penalty != 0.0)]
        {
            if is_set && !model.has_cross_attentions() {
                return Err(no_cross_attentions(option).into());
            }
        }
        let constraint = model.constraint_compiler().compile(options, prompts.length, cancel)?;
        if !options.stop_strings.is_empty() {
            model.tokenizer()?;
        }
        let seed = options.seed.unwrap_or_else(Draws::random_seed);
        let vocabulary_subset = model.vocabulary_subset().cloned();
        let batch = match &options.adapter {
            Some(name) => batch.clone().with_adapter(&model.adapter(name)?),
            None => batch.clone(),
        };
        let options = Arc::new(options.clone());
        Ok(Call { batch, prompts, options, max_length, max_new_tokens, constraint, vocabulary_subset, seed })
    }

    /// The prompt of a row's target.
    pub fn prompt(&self, row: usize) -> &[i64] {
        &self.prompts.ids[row * self.prompts.length..][..self.prompts.length]
    }

    /// Whether its rows take nothing but logits from the first step, and so can take them from a later one.
    pub fn takes_logits_alone(&self) -> bool {
        !self.options.output_attentions && self.options.coverage_penalty == 0.0
    }

    /// Begins a row.
    pub fn item(&self, row: usize, new_search: NewSearch, stops: &Arc<StoppingCriteria>) -> Item {
        let source = self.batch.source(row);
        let options = &match self.max_new_tokens[row] {
            None => self.options.clone(),
            max_new_tokens => Arc::new(GenerationConfig { max_new_tokens, ..(*self.options).clone() }),
        };
        let constraint = self.constraint.as_ref().map(|constraint| Arc::new(ConstraintState::new(constraint, row)));
        // The constraint decides which hypotheses are the best, so a search with beams has to return all it has.
        let of_search = match &constraint {
            Some(_) if options.num_beams > 1 => {
                &GenerationConfig { num_return_sequences: options.num_beams, ..(**options).clone() }
            }
            _ => &**options,
        };
        let mut processors = Processors::new(options, source, self.prompts.length);
        if let Some(constraint) = &constraint {
            processors = processors.filtered_by(constraint.clone());
        }
        let mut scatter_by = self.vocabulary_subset.clone();
        let needs_full_rows = options.output_logprobs || processors.need_full_rows();
        if let Some(subset) = scatter_by.take_if(|_| !needs_full_rows) {
            processors = processors.for_subset(subset);
        }
        Item {
            row,
            search: new_search(of_search, self.prompt(row)).drawing(self.batch.draws(row, self.seed)),
            processors,
            scatter_by,
            shown: 0,
            logprobs: options.output_logprobs.then(|| LogprobTracker::new(options.top_logprobs)),
            cross_attentions: CrossAttentionTracker::new(options, self.batch.row_mask(row)),
            lookup: options.prompt_lookup_num_tokens.map(|tokens| {
                let ngram_size = options.max_matching_ngram_size.unwrap_or(2);
                PromptLookup::new(source, tokens, ngram_size)
            }),
            constraint,
            stops: stops.clone(),
            options: options.clone(),
        }
    }
}

/// The greatest number of new tokens of each row, for rows with an expected length in a call without a maximum: as many
/// as are expected, and those of some seconds more. `room` is from the end of the prompts to that of the longest target.
fn new_tokens_of_rows(
    model: &Model,
    batch: &Batch,
    options: &GenerationConfig,
    room: Range<usize>,
) -> Vec<Option<usize>> {
    let progress = model.facts().custom.progress.filter(|_| options.has_no_length() && !room.is_empty());
    let of_row = |total: &Option<usize>| {
        let Estimate { tokens_per_second, extra_seconds, .. } = progress?;
        // A target ends with the first token that is too much.
        let extra = ((extra_seconds * tokens_per_second).floor() as usize).saturating_add(1);
        Some(total.as_ref()?.saturating_sub(room.start).saturating_add(extra).min(room.len()))
    };
    batch.progress_totals().iter().map(of_row).collect()
}

/// Refuses options that take targets for text, or for tokens that sources have too, of a model with others.
fn check_target_tokens(model: &Model, options: &GenerationConfig) -> Result<(), OptionError> {
    if model.facts().custom.has_text_targets() {
        return Ok(());
    }
    let of_text = [
        ("stop_strings", !options.stop_strings.is_empty()),
        ("json_schema", options.json_schema.is_some()),
        ("regex", options.regex.is_some()),
        ("grammar", options.grammar.is_some()),
        ("allowed_sequences", !options.allowed_sequences.is_empty()),
        ("required_phrases", !options.required_phrases.is_empty()),
        ("prompt_lookup_num_tokens", options.prompt_lookup_num_tokens.is_some()),
        ("encoder_repetition_penalty", options.encoder_repetition_penalty != 1.0),
        ("encoder_no_repeat_ngram_size", options.encoder_no_repeat_ngram_size > 0),
    ];
    match of_text.into_iter().find(|(_, is_set)| *is_set) {
        None => Ok(()),
        Some((option, _)) => {
            Err(OptionError::requires(option, "a model whose targets are text", "one whose targets have other tokens"))
        }
    }
}

/// Refuses drafts of `tokens` tokens for models that cannot score them in one step.
fn check_drafts(model: &Model, tokens: usize) -> Result<(), OptionError> {
    const OPTION: &str = "prompt_lookup_num_tokens";
    if model.manifest().logits != Logits::All {
        return Err(OptionError::requires(OPTION, "a model exported with all_logits", "one without"));
    }
    match model.profiles().and_then(|profiles| profiles.decoder.as_ref()) {
        Some(decoder) if tokens >= decoder.step => {
            let required = format!("a serving plan with steps of at least {} tokens", tokens.saturating_add(1));
            Err(OptionError::requires(OPTION, required, decoder.step.to_string()))
        }
        _ => Ok(()),
    }
}

/// A source row in progress.
pub(crate) struct Item {
    /// Its row in the call.
    pub row: usize,
    pub search: Search,
    /// With `prompt_lookup_num_tokens`.
    pub lookup: Option<PromptLookup>,
    processors: Processors,
    /// The subset of the vocabulary that the model has logits of, if rows of the whole vocabulary have to be made of
    /// them.
    scatter_by: Option<Arc<VocabularySubset>>,
    /// Tokens of the first hypothesis that were shown.
    shown: usize,
    /// With `output_logprobs`.
    logprobs: Option<LogprobTracker>,
    /// With `output_attentions` or `coverage_penalty`.
    cross_attentions: Option<CrossAttentionTracker>,
    /// With constraints.
    constraint: Option<Arc<ConstraintState>>,
    stops: Arc<StoppingCriteria>,
    options: Arc<GenerationConfig>,
}

/// Whether an item needs another step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ItemStatus {
    Running,
    Finished,
}

/// The results of an item.
pub(crate) struct FinishedItem {
    pub row: usize,
    pub hypotheses: Vec<Hypothesis>,
    /// Tokens of the first hypothesis that were shown before.
    pub shown: usize,
}

impl FinishedItem {
    /// The tokens of the first hypothesis that were not shown yet.
    pub fn unshown(&self) -> &[i64] {
        self.hypotheses[0].tokens.get(self.shown..).unwrap_or(&[])
    }

    /// [`FinishedItem::unshown`], each with its log-probability if those are wanted.
    pub fn unshown_with_logprobs(&self) -> Vec<(i64, Option<Logprobs>)> {
        let logprobs = self.hypotheses[0].logprobs.as_ref().map(|logprobs| logprobs.after(self.shown));
        with_logprobs(self.unshown(), logprobs)
    }
}

impl Item {
    /// The logits that it needs at the next step, or at one that is `ahead` tokens later.
    fn logits_request(&self, ahead: usize) -> LogitsRequest {
        if self.logprobs.is_some() || self.constraint.is_some() {
            LogitsRequest::All
        } else {
            self.processors.logits_request(&self.search, ahead)
        }
    }

    /// The logits that all `items` need at the next step and after each of `drafts` drafted tokens.
    pub fn joint_request<'i>(items: impl Iterator<Item = &'i Item>, drafts: usize) -> LogitsRequest {
        let each = items.flat_map(|item| (0..=drafts).map(|ahead| item.logits_request(ahead)));
        each.reduce(LogitsRequest::union).unwrap_or_default()
    }

    /// Advances by the output of a step for its rows, or for one row that stands for all of them.
    pub fn advance(&mut self, model: &Model, output: StepOutput, step: usize) -> Result<ItemStatus, Error> {
        let StepOutput { logits, mut stats, cross_attentions, row_length, .. } = output;
        let is_finite = || stats.map_or_else(|| all_finite(logits), LogitsStatsView::all_finite);
        if !self.options.remove_invalid_values && !is_finite() {
            return Err(Error::NotFinite { row: self.row, step, dtype: model.manifest().dtype, processor: None });
        }
        let width = self.search.width();
        let rows = logits.len() / row_length;
        let (mut repeated, mut full);
        let mut logits = logits;
        if let Some(subset) = &self.scatter_by {
            full = subset.scatter(logits, model.facts().decoder.vocab_size);
            (logits, stats) = (&mut full, None);
        }
        if rows < width {
            repeated = logits.repeat(width);
            (logits, stats) = (&mut repeated, None);
        }
        if let Some(tracker) = &mut self.cross_attentions {
            tracker.begin_step(cross_attentions, rows, width);
        }
        let is_over = self.stops.is_over();
        let unprocessed = self.logprobs.is_some().then(|| logits.to_vec());
        let progress = loop {
            let mut candidates = self.processors.candidates_with_stats(logits, stats, &self.search);
            if let Some(invalid) = self.processors.take_invalid_scores() {
                let dtype = model.manifest().dtype;
                return Err(Error::NotFinite { row: self.row, step, dtype, processor: Some(invalid) });
            }
            let mut ends = self.stops.of(&candidates, &self.search, is_over, || model.tokenizer())?;
            if let Some(constraint) = &self.constraint {
                constraint.take(&mut candidates, &mut ends, &self.search)?;
            }
            if let (Some(tracker), Some(logits)) = (&mut self.logprobs, &unprocessed) {
                tracker.add(&candidates, logits, width);
            }
            let mut ending_terms: &[f32] = &[];
            if let Some(tracker) = &mut self.cross_attentions {
                tracker.add(&candidates);
                ending_terms = tracker.ending_terms();
            }
            match self.search.advance_to_covered_ends(&candidates, &ends, ending_terms) {
                Progress::NextGroup => {}
                progress => break progress,
            }
        };
        if progress == Progress::Done {
            return Ok(ItemStatus::Finished);
        }
        if let Some(tracker) = &mut self.logprobs {
            tracker.follow(&self.search);
        }
        if let Some(tracker) = &mut self.cross_attentions {
            tracker.follow(&self.search);
        }
        Ok(ItemStatus::Running)
    }

    /// The tokens of the first hypothesis that have become certain since the last call.
    pub fn settled(&mut self) -> &[i64] {
        // With beams, the best hypothesis may yet give way to one that meets the constraint.
        if self.constraint.is_some() && self.search.sums_log_probabilities() {
            return &[];
        }
        let settled = self.search.settled(self.shown);
        self.shown += settled.len();
        settled
    }

    /// [`Item::settled`], each with its log-probability if those are wanted.
    pub fn settled_with_logprobs(&mut self) -> Vec<(i64, Option<Logprobs>)> {
        let from = self.shown;
        let settled = self.settled().to_vec();
        let logprobs = self.logprobs.as_ref().filter(|_| !settled.is_empty());
        let logprobs = logprobs.map(|tracker| tracker.of(&self.search.settled(0)[..from + settled.len()]).after(from));
        with_logprobs(&settled, logprobs)
    }

    /// The hypotheses.
    pub fn finish(self) -> FinishedItem {
        let found = self.search.finish();
        let mut hypotheses = match self.constraint {
            Some(constraint) => {
                let tracker = self.cross_attentions.as_ref();
                let ending_term = |tokens: &[i64]| tracker.map_or(0.0, |tracker| tracker.ending_term(tokens));
                constraint.rank(found, &self.options, ending_term)
            }
            None => found,
        };
        let cross_attentions = self.cross_attentions.filter(|_| self.options.output_attentions);
        for hypothesis in &mut hypotheses {
            hypothesis.logprobs = self.logprobs.as_ref().map(|tracker| tracker.of(&hypothesis.tokens));
            hypothesis.cross_attentions = cross_attentions.as_ref().map(|tracker| tracker.of(&hypothesis.tokens));
        }
        FinishedItem { row: self.row, hypotheses, shown: self.shown }
    }
}

fn with_logprobs(tokens: &[i64], logprobs: Option<Logprobs>) -> Vec<(i64, Option<Logprobs>)> {
    let mut each = logprobs.into_iter().flat_map(Logprobs::each);
    tokens.iter().map(|&token| (token, each.next())).collect()
}

/// Whether no number is NaN or infinite. In blocks, so that the compiler can compare many at once.
fn all_finite(numbers: &[f32]) -> bool {
    numbers.chunks(4096).all(|block| block.iter().fold(true, |finite, number| finite & number.is_finite()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_infinite_score_is_found_anywhere() {
        let mut scores = vec![0.5; 10_000];
        assert!(all_finite(&scores));
        for (at, bad) in [(0, f32::NAN), (4096, f32::INFINITY), (9_999, f32::NEG_INFINITY)] {
            let good = std::mem::replace(&mut scores[at], bad);
            assert!(!all_finite(&scores), "{at}");
            scores[at] = good;
        }
    }
}
