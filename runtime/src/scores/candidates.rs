//! What a step needs of the logits, and the candidates that it gets from them.

use t5gemma_kernels::{LogSumExp, LogitsRequest, LogitsStatsView};

use super::processor::{Processor, Row};
use super::top_k::{TopK, draw};
use super::warpers::Warper;
use super::{InvalidScores, Processors, ScoresProblem};
use crate::search::{Candidate, Search};

impl Processors {
    /// What the next step needs of the logits, or the one `ahead` tokens later.
    pub(crate) fn logits_request(&self, search: &Search, ahead: usize) -> LogitsRequest {
        let length = search.history(search.rows().start).len() + ahead;
        let log_sum_exp = search.sums_log_probabilities();
        // Rows that are not compared each choose one token.
        let mut k = if search.compares_rows() { search.candidates() } else { 1 };
        let mut depends_on_k = search.draws().is_none();
        let mut sparse = depends_on_k;
        for processor in self.processors.iter().filter(|processor| processor.is_active(length)) {
            // For each token whose score a processor may lower, another one may move up.
            let lowered = match processor {
                Processor::Forbid { tokens, .. } => tokens.len(),
                Processor::RepetitionPenalty(penalty) if *penalty >= 1.0 => length,
                Processor::OccurrencePenalty { frequency, presence, .. } if *frequency >= 0.0 && *presence >= 0.0 => {
                    length
                }
                Processor::NoRepeatNgram(_) => length,
                Processor::EncoderNoRepeatNgram { source, .. } => source.len(),
                Processor::EndOnArgmax { .. } | Processor::Warp(Warper::Temperature(_)) => 0,
                // Behind top_k, sampling no longer depends on the other tokens.
                Processor::Warp(Warper::TopK(top_k)) => {
                    depends_on_k = true;
                    *top_k
                }
                Processor::Warp(Warper::TopP { .. } | Warper::MinP { .. } | Warper::Typical { .. }) if depends_on_k => {
                    0
                }
                Processor::Warp(Warper::Epsilon { .. } | Warper::Eta { .. }) if depends_on_k => 0,
                _ => return LogitsRequest::All,
            };
            k = k.saturating_add(lowered);
            // Warpers index rows by token.
            sparse &= !matches!(processor, Processor::EndOnArgmax { .. } | Processor::Warp(_));
        }
        if depends_on_k { LogitsRequest::TopK { k, log_sum_exp, sparse } } else { LogitsRequest::All }
    }

    /// Chooses the candidates of one step. For a search that compares rows these are the best of all rows or, where it
    /// samples, draws without replacement in the order drawn; otherwise the best of each row, or a draw from it. Ties
    /// go to the earlier row and then to the lower token.
    ///
    /// `logits` holds [`Search::width`] rows, of the vocabulary or of the subset, and is overwritten where a processor
    /// acts. Beam search adds processed log-probabilities to the beams' scores; other searches compare processed
    /// logits.
    ///
    /// # Panics
    /// If `logits` is empty or its length is no multiple of the number of rows.
    pub fn candidates(&self, logits: &mut [f32], search: &Search) -> Vec<Candidate> {
        self.candidates_with_stats(logits, None, search)
    }

    /// [`Processors::candidates`] of rows that came with statistics, or as sparse rows.
    pub(crate) fn candidates_with_stats(
        &self,
        logits: &mut [f32],
        stats: Option<LogitsStatsView>,
        search: &Search,
    ) -> Vec<Candidate> {
        let row_length = logits.len() / search.width();
        assert!(row_length > 0 && row_length * search.width() == logits.len(), "logits are rows of one length");
        let mut best = TopK::new(search.candidates());
        let mut of_rows = Vec::new();
        let mut emptied_by = Vec::new();
        let (chosen, mut maxima) = (self.indices(search.chosen()), Vec::new());
        let rows = search.rows();
        for (beam, row) in logits.chunks_exact_mut(row_length).enumerate().take(rows.end).skip(rows.start) {
            let history = &*self.indices(search.history(beam));
            let mut log_sum_exp = LogSumExp::ZERO;
            maxima.clear();
            let changes = self.processors.iter().any(|processor| processor.is_active(history.len()));
            if let (Some(stats), false) = (stats, changes) {
                maxima.extend_from_slice(stats.block_maxima(beam));
            }
            if search.sums_log_probabilities() {
                log_sum_exp = match stats {
                    Some(stats) => stats.log_sum_exp(beam),
                    None => LogSumExp::with_block_maxima(row, &mut maxima),
                };
                if changes {
                    log_sum_exp.apply(row);
                    log_sum_exp = LogSumExp::ZERO;
                    maxima.clear();
                }
            }
            let tokens = stats.map_or(&[][..], |stats| stats.rows(beam, 1).tokens());
            emptied_by.push(self.apply_after(&mut Row { scores: row, tokens }, history, &chosen));
            let (step, running) = (history.len() as u32, search.running_score(beam));
            let sum = |x| log_sum_exp.log_probability(x) + running;
            match (search.compares_rows(), search.draws()) {
                (true, None) => best.take_row(beam, row, &maxima, sum),
                (true, Some(draws)) => best.draw_row(beam, row, sum, draws, step),
                (false, None) => {
                    let mut best = TopK::new(1);
                    best.take_row(beam, row, &maxima, |x| x);
                    of_rows.extend(best.candidates);
                }
                (false, Some(draws)) => {
                    let token = draw(row, draws.uniform(step, search.lane(beam)));
                    of_rows.push(Candidate { parent: beam, token: token as i64, score: row[token] });
                }
            }
        }
        self.report_empty_rows(&emptied_by, search);
        let mut candidates = if search.compares_rows() { best.candidates } else { of_rows };
        if let Some(stats) = stats.filter(|stats| !stats.tokens().is_empty()) {
            for candidate in &mut candidates {
                candidate.token = stats.token(candidate.parent, candidate.token as usize);
            }
        }
        if let Some(subset) = &self.subset {
            candidates.iter_mut().for_each(|candidate| candidate.token = subset.token(candidate.token));
        }
        candidates
    }

    /// Reports a processor of the caller's that left no token to choose; `emptied_by` has an entry for each row. Where
    /// rows are compared that takes all rows, otherwise one. Under a constraint it is no error: the target ends where
    /// it is.
    fn report_empty_rows(&self, emptied_by: &[Option<usize>], search: &Search) {
        let processor = if search.compares_rows() {
            emptied_by.iter().copied().min().flatten()
        } else {
            emptied_by.iter().copied().flatten().next()
        };
        let is_filtered = self.processors.iter().any(|processor| matches!(processor, Processor::Filter(_)));
        if let Some(processor) = processor.filter(|_| !is_filtered) {
            self.invalid().get_or_insert(InvalidScores { processor, problem: ScoresProblem::AllForbidden });
        }
    }
}
