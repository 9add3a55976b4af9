//! `Call` and `Item`: a request that was checked against its model, and one of its source rows whose targets are not
//! finished, with everything that decides on them. An item turns the scores of a step into what its rows do next; running
//! the model for them, alone or beside others, is left to [`generate`](crate::generate) and [`engine`](crate::engine).

use std::sync::Arc;

use t5gemma_graphs::interface::Logits;
use t5gemma_kernels::{LogitsRequest, LogitsStatsView};

use crate::alignment::Attending;
use crate::batch::{Batch, Prompts};
use crate::cancellation::Cancellation;
use crate::constraint::{Constraint, ConstraintState};
use crate::draws::Draws;
use crate::error::Error;
use crate::hypothesis::Hypothesis;
use crate::logits::Said;
use crate::logprobs::Trace;
use crate::model::Model;
use crate::options::{GenerationConfig, OptionError};
use crate::scores::Processors;
use crate::search::{Progress, Search};
use crate::speculation::PromptLookup;
use crate::stop::StoppingCriteria;
use crate::vocabulary_subset::VocabularySubset;

/// Begins the search for one source row at a decoder prompt.
pub(crate) type Start = fn(&GenerationConfig, &[i64]) -> Search;

/// Sources and options that the model takes.
pub(crate) struct Call {
    pub batch: Batch,
    pub prompts: Prompts,
    pub options: Arc<GenerationConfig>,
    /// How long a target may become, prompt included.
    pub max_length: usize,
    constraint: Option<Arc<Constraint>>,
    vocabulary_subset: Option<Arc<VocabularySubset>>,
    seed: u64,
}

impl Call {
    /// Checks what depends on the model, and compiles the constraints.
    pub fn new(model: &Model, batch: &Batch, options: &GenerationConfig, cancel: &Cancellation) -> Result<Call, Error> {
        let decoder = &model.config().decoder;
        model.check(batch)?;
        let prompts = batch.prompts(options.decoder_start_token_id);
        let (longest, limit) = model.longest_target();
        let options = &options.clone().clipped_to(longest, prompts.length);
        options.check(decoder.vocab_size, prompts.length)?;
        if let Some(subset) = model.vocabulary_subset() {
            options.check_subset(subset)?;
        }
        if let Some(profiles) = model.profiles() {
            profiles.check_targets(prompts.length, options.num_beams, options.num_return_sequences)?;
        }
        let max_length = options.max_length(prompts.length);
        if max_length > longest {
            return Err(Error::input(
                "max_length",
                format!("at most {longest} target tokens ({limit})"),
                format!("{max_length}, of which {} are the prompt", prompts.length),
            ));
        }
        if let Some(tokens) = options.prompt_lookup_num_tokens
            && model.manifest().logits != Logits::All
        {
            let expected =
                "nothing for this model (drafts need the scores of all positions: export it with --all-logits)";
            return Err(OptionError::new("prompt_lookup_num_tokens", expected, tokens.to_string()).into());
        }
        let planned = model.profiles().and_then(|profiles| profiles.decoder.as_ref());
        if let (Some(tokens), Some(step)) = (options.prompt_lookup_num_tokens, planned.map(|decoder| decoder.step))
            && tokens >= step
        {
            let expected = match step {
                1 => "nothing for this model (its --plan has steps of one token)".to_string(),
                _ => format!("less than {step} (its --plan has steps of at most {step} tokens)"),
            };
            return Err(OptionError::new("prompt_lookup_num_tokens", expected, tokens.to_string()).into());
        }
        for (option, is_asked, neutral, found) in [
            ("output_attentions", options.output_attentions, "false", "true".to_string()),
            ("coverage_penalty", options.coverage_penalty != 0.0, "0", options.coverage_penalty.to_string()),
        ] {
            if is_asked && !model.attends() {
                return Err(model.tells_no_attentions(option, neutral, &found).into());
            }
        }
        let constraint = model.constraint_compiler().compile(options, prompts.length, cancel)?;
        if !options.stop_strings.is_empty() {
            model.tokenizer()?;
        }
        let seed = options.seed.unwrap_or_else(Draws::random_seed);
        let vocabulary_subset = model.vocabulary_subset().cloned();
        Ok(Call {
            batch: batch.clone(),
            prompts,
            options: Arc::new(options.clone()),
            max_length,
            constraint,
            vocabulary_subset,
            seed,
        })
    }

    /// What the target of a row begins with.
    pub fn prompt(&self, row: usize) -> &[i64] {
        &self.prompts.ids[row * self.prompts.length..][..self.prompts.length]
    }

    /// Begins a row.
    pub fn item(&self, row: usize, search: Start, stops: &Arc<StoppingCriteria>) -> Item {
        let (options, source) = (&self.options, self.batch.source(row));
        let constraint = self.constraint.as_ref().map(|constraint| Arc::new(ConstraintState::new(constraint, row)));
        // Which hypotheses are the best is for the constraint to say, so a search with beams has to give all that it has.
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
            search: search(of_search, self.prompt(row)).drawing(self.batch.draws(row, self.seed)),
            processors,
            scatter_by,
            shown: 0,
            trace: options.output_logprobs.then(|| Trace::new(options.top_logprobs)),
            attending: Attending::new(options, self.batch.row_mask(row)),
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

/// A source row whose targets are not finished.
pub(crate) struct Item {
    /// Its row in the call.
    pub row: usize,
    pub search: Search,
    /// With `prompt_lookup_num_tokens`.
    pub lookup: Option<PromptLookup>,
    processors: Processors,
    /// Of a model that keeps some tokens only, where whole rows are looked at.
    scatter_by: Option<Arc<VocabularySubset>>,
    /// Tokens of the first hypothesis that were shown.
    shown: usize,
    /// With `output_logprobs`.
    trace: Option<Trace>,
    /// With `output_attentions` or `coverage_penalty`.
    attending: Option<Attending>,
    /// With constraints.
    constraint: Option<Arc<ConstraintState>>,
    stops: Arc<StoppingCriteria>,
    options: Arc<GenerationConfig>,
}

impl Item {
    /// What it needs of the logits of its rows at the next step, or at one that is `ahead` tokens later.
    fn wanted(&self, ahead: usize) -> LogitsRequest {
        match self.trace.is_some() || self.constraint.is_some() {
            true => LogitsRequest::All,
            false => self.processors.logits_request(&self.search, ahead),
        }
    }

    /// What a step needs of the logits of the rows of all `items`, and of those of so many `drafts`.
    pub fn all_want<'i>(items: impl Iterator<Item = &'i Item>, drafts: usize) -> LogitsRequest {
        let each = items.flat_map(|item| (0..=drafts).map(|ahead| item.wanted(ahead)));
        each.reduce(LogitsRequest::union).unwrap_or_default()
    }

    /// Takes what a step says of its rows, or of the first of equal ones, and tells whether its targets are finished.
    pub fn take(&mut self, model: &Model, said: Said, step: usize) -> Result<bool, Error> {
        let Said { scores, mut known, attended, tokens, .. } = said;
        let is_finite = || known.map_or_else(|| all_finite(scores), LogitsStatsView::all_finite);
        if !self.options.remove_invalid_values && !is_finite() {
            return Err(Error::NotFinite { row: self.row, step, dtype: model.manifest().dtype, processor: None });
        }
        let width = self.search.width();
        let rows = scores.len() / tokens;
        let (mut widened, mut whole);
        let mut scores = scores;
        if let Some(subset) = &self.scatter_by {
            whole = subset.scatter(scores, model.config().decoder.vocab_size);
            (scores, known) = (&mut whole, None);
        }
        if rows < width {
            widened = scores.repeat(width);
            (scores, known) = (&mut widened, None);
        }
        if let Some(attending) = &mut self.attending {
            attending.step(attended, rows, width);
        }
        let is_over = self.stops.is_over();
        let unprocessed = self.trace.is_some().then(|| scores.to_vec());
        let progress = loop {
            let mut candidates = self.processors.candidates_with_stats(scores, known, &self.search);
            if let Some(invalid) = self.processors.take_invalid_scores() {
                let dtype = model.manifest().dtype;
                return Err(Error::NotFinite { row: self.row, step, dtype, processor: Some(invalid) });
            }
            let mut ends = self.stops.of(&candidates, &self.search, is_over, || model.tokenizer())?;
            if let Some(constraint) = &self.constraint {
                constraint.take(&mut candidates, &mut ends, &self.search)?;
            }
            if let (Some(trace), Some(logits)) = (&mut self.trace, &unprocessed) {
                trace.take(&candidates, logits, width);
            }
            let mut endings: &[f32] = &[];
            if let Some(attending) = &mut self.attending {
                attending.take(&candidates);
                endings = attending.endings();
            }
            match self.search.advance_to_covered_ends(&candidates, &ends, endings) {
                Progress::NextGroup => {}
                progress => break progress,
            }
        };
        if progress == Progress::Done {
            return Ok(true);
        }
        if let Some(trace) = &mut self.trace {
            trace.follow(&self.search);
        }
        if let Some(attending) = &mut self.attending {
            attending.follow(&self.search);
        }
        Ok(false)
    }

    /// The tokens of the first hypothesis that have become certain since they were asked for.
    pub fn settled(&mut self) -> &[i64] {
        // Of beams, the best hypothesis may be passed over for one that meets the constraint.
        if self.constraint.is_some() && self.search.sums_log_probabilities() {
            return &[];
        }
        let settled = self.search.settled(self.shown);
        self.shown += settled.len();
        settled
    }

    /// The hypotheses, and how many tokens of the first were certain before.
    pub fn finish(self) -> (Vec<Hypothesis>, usize) {
        let found = self.search.finish();
        let mut found = match self.constraint {
            Some(constraint) => {
                let ending = |tokens: &[i64]| self.attending.as_ref().map_or(0.0, |attending| attending.ending(tokens));
                constraint.rank(found, &self.options, ending)
            }
            None => found,
        };
        let told = self.attending.filter(|_| self.options.output_attentions);
        for hypothesis in &mut found {
            hypothesis.logprobs = self.trace.as_ref().map(|trace| trace.of(&hypothesis.tokens));
            hypothesis.cross_attentions = told.as_ref().map(|attending| attending.of(&hypothesis.tokens));
        }
        (found, self.shown)
    }
}

/// Whether no score is NaN or infinite. In blocks, so that the compiler can compare many at once.
fn all_finite(scores: &[f32]) -> bool {
    scores.chunks(4096).all(|block| block.iter().fold(true, |finite, score| finite & score.is_finite()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_score_is_found_anywhere() {
        let mut scores = vec![0.5; 10_000];
        assert!(all_finite(&scores));
        for (at, bad) in [(0, f32::NAN), (4096, f32::INFINITY), (9_999, f32::NEG_INFINITY)] {
            let good = std::mem::replace(&mut scores[at], bad);
            assert!(!all_finite(&scores), "{at}");
            scores[at] = good;
        }
    }
}
