//! Results: generated or scored targets.

use std::ffi::c_char;
use std::ptr;
use std::sync::{Arc, OnceLock};

use t5gemma_protocol::{GenerateResult, Sequence, Usage, attention_rows};
use t5gemma_runtime::{CrossAttentions, FinishReason, Hypothesis, Logprobs, Model, RequestStats, SpecialTokens};

use crate::boundary::{fallible, free, value};
use crate::error::t5g_error;
use crate::handle::{Handle, Object};
use crate::input::{Fields, Out, Record};
use crate::tokenizer::t5g_text;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct t5g_hypothesis {
    size: usize,
    tokens: *const i64,
    token_count: usize,
    finish_reason: i64,
    score: f64,
    logprob: f64,
    perplexity: f64,
    logprobs: *const f32,
    top_count: usize,
    top_tokens: *const i64,
    top_logprobs: *const f32,
    source_length: usize,
    cross_attentions: *const f32,
}

// SAFETY: fields of 8 bytes of which any bytes are a valid value.
unsafe impl Fields for t5g_hypothesis {
    const OLDEST: usize = 88;

    fn unset() -> t5g_hypothesis {
        t5g_hypothesis {
            size: 0,
            tokens: ptr::null(),
            token_count: 0,
            finish_reason: 0,
            score: f64::NAN,
            logprob: f64::NAN,
            perplexity: f64::NAN,
            logprobs: ptr::null(),
            top_count: 0,
            top_tokens: ptr::null(),
            top_logprobs: ptr::null(),
            source_length: 0,
            cross_attentions: ptr::null(),
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct t5g_request_stats {
    size: usize,
    queued_seconds: f64,
    encoding_seconds: f64,
    first_token_seconds: f64,
    total_seconds: f64,
    source_tokens: usize,
    new_tokens: usize,
}

// SAFETY: fields of 8 bytes of which any bytes are a valid value.
unsafe impl Fields for t5g_request_stats {
    const OLDEST: usize = 56;

    fn unset() -> t5g_request_stats {
        t5g_request_stats {
            size: 0,
            queued_seconds: f64::NAN,
            encoding_seconds: f64::NAN,
            first_token_seconds: f64::NAN,
            total_seconds: f64::NAN,
            source_tokens: 0,
            new_tokens: 0,
        }
    }
}

/// What the result of a request reports besides its targets.
#[derive(Clone, Copy, Default)]
pub struct Facts {
    /// The seed, if it samples.
    pub seed: Option<u64>,
    /// Source tokens that are not padding.
    pub source_tokens: usize,
    /// Times and counts, if an engine served it.
    pub stats: Option<RequestStats>,
}

/// A `t5g_result`.
pub struct t5g_result {
    model: Arc<Model>,
    rows: Vec<Vec<Answer>>,
    facts: Facts,
}

impl Object for t5g_result {
    const NAME: &'static str = "t5g_result";
}

/// A target in the layout of the header.
struct Answer {
    tokens: Vec<i64>,
    finish_reason: Option<FinishReason>,
    score: Option<f32>,
    logprobs: Option<Logprobs>,
    top_tokens: Vec<i64>,
    top_logprobs: Vec<f32>,
    cross_attentions: Option<CrossAttentions>,
    text: OnceLock<Result<t5g_text, t5g_error>>,
}

impl Answer {
    fn new(tokens: Vec<i64>, logprobs: Option<Logprobs>) -> Answer {
        let (mut top_tokens, mut top_logprobs) = (Vec::new(), Vec::new());
        for &(token, logprob) in logprobs.iter().flat_map(|logprobs| logprobs.top.iter().flatten()) {
            top_tokens.push(token);
            top_logprobs.push(logprob);
        }
        let (text, cross_attentions) = (OnceLock::new(), None);
        Answer { tokens, finish_reason: None, score: None, logprobs, top_tokens, top_logprobs, cross_attentions, text }
    }

    fn of(hypothesis: Hypothesis) -> Answer {
        let Hypothesis { tokens, score, finish_reason, logprobs, cross_attentions, .. } = hypothesis;
        Answer { finish_reason: Some(finish_reason), score, cross_attentions, ..Answer::new(tokens, logprobs) }
    }
}

impl t5g_result {
    /// The targets generated for each row.
    pub fn new(model: Arc<Model>, rows: Vec<Vec<Hypothesis>>, facts: Facts) -> t5g_result {
        let rows = rows.into_iter().map(|row| row.into_iter().map(Answer::of).collect()).collect();
        t5g_result { model, rows, facts }
    }

    /// Scored targets, one for each row.
    pub fn scored(
        model: Arc<Model>,
        targets: Vec<Vec<i64>>,
        found: Vec<(Logprobs, Option<CrossAttentions>)>,
        source_tokens: usize,
    ) -> t5g_result {
        let rows = targets.into_iter().zip(found).map(|(tokens, (logprobs, cross_attentions))| {
            vec![Answer { cross_attentions, ..Answer::new(tokens, Some(logprobs)) }]
        });
        t5g_result { model, rows: rows.collect(), facts: Facts { source_tokens, ..Facts::default() } }
    }

    /// The number of tokens of all targets.
    fn target_tokens(&self) -> usize {
        self.rows.iter().flatten().map(|answer| answer.tokens.len()).sum()
    }

    fn answer(&self, row: usize, index: usize) -> Result<&Answer, t5g_error> {
        let rows = self.rows.len();
        let refused =
            |name, count| move |at: usize| t5g_error::argument(name, format!("below {count}"), at.to_string());
        let row = self.rows.get(row).ok_or_else(|| refused("row", rows)(row))?;
        row.get(index).ok_or_else(|| refused("index", row.len())(index))
    }

    fn text<'a>(&self, answer: &'a Answer) -> Result<&'a t5g_text, t5g_error> {
        let decode = || {
            let tokenizer = self.model.target_tokenizer()?;
            Ok(t5g_text::new(tokenizer.decode(&answer.tokens, SpecialTokens::Skip)?))
        };
        answer.text.get_or_init(decode).as_ref().map_err(t5g_error::clone)
    }

    fn sequence(&self, answer: &Answer) -> Sequence {
        let tokenizer = self.model.target_tokenizer().ok();
        let attentions = answer.cross_attentions.as_ref();
        Sequence {
            tokens: answer.tokens.clone(),
            text: tokenizer.and_then(|tokenizer| tokenizer.decode(&answer.tokens, SpecialTokens::Skip).ok()),
            score: answer.score.map(f64::from),
            finish_reason: answer.finish_reason.map(Into::into),
            cross_attentions: attentions.map(|found| attention_rows(found, found.source_length())),
            ..Sequence::default()
        }
        .with_logprobs(answer.logprobs.as_ref())
    }
}

fn number(reason: FinishReason) -> i64 {
    match reason {
        FinishReason::Eos => 1,
        FinishReason::Length => 2,
        FinishReason::StopString => 3,
        FinishReason::Time => 4,
        FinishReason::Constraint => 5,
        FinishReason::ConstraintIncomplete => 6,
        // A new reason has to get a number in the header first.
        _ => 0,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_result_rows(result: Handle<t5g_result>) -> usize {
    value(0, || Ok(result.get("result")?.rows.len()))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_result_count(result: Handle<t5g_result>, row: usize) -> usize {
    value(0, || Ok(result.get("result")?.rows.get(row).map_or(0, Vec::len)))
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_result_get(
    result: Handle<t5g_result>,
    row: usize,
    index: usize,
    hypothesis: Record<t5g_hypothesis>,
) -> Handle<t5g_error> {
    fallible(|| {
        let result = result.get("result")?;
        let answer = result.answer(row, index)?;
        let (logprobs, attended) = (answer.logprobs.as_ref(), answer.cross_attentions.as_ref());
        let found = t5g_hypothesis {
            size: 0,
            tokens: answer.tokens.as_ptr(),
            token_count: answer.tokens.len(),
            finish_reason: answer.finish_reason.map_or(0, number),
            score: answer.score.map_or(f64::NAN, f64::from),
            logprob: logprobs.map_or(f64::NAN, Logprobs::sum),
            perplexity: logprobs.map_or(f64::NAN, Logprobs::perplexity),
            logprobs: logprobs.map_or(ptr::null(), |logprobs| logprobs.tokens.as_ptr()),
            top_count: logprobs.and_then(|logprobs| logprobs.top.first()).map_or(0, Vec::len),
            top_tokens: if answer.top_tokens.is_empty() { ptr::null() } else { answer.top_tokens.as_ptr() },
            top_logprobs: if answer.top_logprobs.is_empty() { ptr::null() } else { answer.top_logprobs.as_ptr() },
            source_length: attended.map_or(0, CrossAttentions::source_length),
            cross_attentions: attended.map_or(ptr::null(), |attended| attended.values().as_ptr()),
        };
        hypothesis.put(found, "hypothesis")
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_result_text(
    result: Handle<t5g_result>,
    row: usize,
    index: usize,
    text: Out<*const c_char>,
    size: Out<usize>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, size, result) = (text.check("text")?, size.optional("size")?, result.get("result")?);
        let text = result.text(result.answer(row, index)?)?;
        place.put(text.pointer());
        if let Some(size) = size {
            size.put(text.size());
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_result_stats(result: Handle<t5g_result>, stats: Record<t5g_request_stats>) -> Handle<t5g_error> {
    fallible(|| {
        let result = result.get("result")?;
        let found = t5g_request_stats {
            source_tokens: result.facts.source_tokens,
            new_tokens: result.target_tokens(),
            ..t5g_request_stats::unset()
        };
        let found = match &result.facts.stats {
            Some(times) => t5g_request_stats {
                queued_seconds: times.queued.as_secs_f64(),
                encoding_seconds: times.encoding.as_secs_f64(),
                first_token_seconds: times.first_token.map_or(f64::NAN, |first| first.as_secs_f64()),
                total_seconds: times.total.as_secs_f64(),
                ..found
            },
            None => found,
        };
        stats.put(found, "stats")
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_result_json(result: Handle<t5g_result>, json: Out<Handle<t5g_text>>) -> Handle<t5g_error> {
    fallible(|| {
        let (place, result) = (json.check("json")?, result.get("result")?);
        let rows = result.rows.iter();
        let sequences = rows.map(|row| row.iter().map(|answer| result.sequence(answer)).collect()).collect();
        let usage = Usage { source_tokens: result.facts.source_tokens, target_tokens: result.target_tokens() };
        let written = GenerateResult { id: None, sequences, seed: result.facts.seed, usage };
        place.put(t5g_text::handle(serde_json::to_string(&written).expect("its maps have text keys")));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_result_free(result: Handle<t5g_result>) -> i32 {
    free(result, "result")
}
