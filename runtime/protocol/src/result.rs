//! The JSON results: the lines that `t5gemma` prints, and what the C library returns as JSON. float32 numbers are
//! written as float64 numbers of the same value.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use t5gemma_runtime::{CrossAttentions, Error, Hypothesis, Logprobs, SpecialTokens, Tokenizer};

use crate::id::Id;

/// The answer to a `GenerateRequest`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum GenerateResponse {
    /// The generated targets.
    Result(GenerateResult),
    /// The error, if the request failed.
    Error(ErrorResult),
}

/// The answer to a `ScoreRequest`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ScoreResponse {
    /// The scores.
    Result(ScoreResult),
    /// The error, if the request failed.
    Error(ErrorResult),
}

/// The answer of a classifier to an `EncodeRequest`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ClassifyResponse {
    /// The labels of each source, from a text-classification model.
    Labels(LabelsResult),
    /// The labels of each token, from a token-classification model.
    Tokens(TokenLabelsResult),
    /// The error, if the request failed.
    Error(ErrorResult),
}

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ErrorResult {
    /// The request's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// The reason, in one line.
    pub error: String,
}

/// Generated targets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GenerateResult {
    /// The request's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// For each source, its targets, best first.
    pub sequences: Vec<Vec<Sequence>>,
    /// The random seed, if tokens were sampled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// The size of the request.
    pub usage: Usage,
}

/// A target.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sequence {
    /// The token ids, with the end token but without the prompt.
    pub tokens: Vec<i64>,
    /// The text, without special tokens; absent for a model without a tokenizer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// With beam search: the summed log-probability divided by `length^length_penalty`, plus the coverage penalty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// Why the target ended; absent for a target that was scored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<FinishReason>,
    /// With `output_logprobs`: the sum of `logprobs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprob: Option<f64>,
    /// With `output_logprobs`: the model's log-probability of each token, before any score processing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Vec<f64>>,
    /// With `top_logprobs`: for each position, pairs of a token and its log-probability, most likely first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_logprobs: Option<Vec<Vec<(i64, f64)>>>,
    /// With `output_attentions`: for each token, its attention to each source token, padding included: probabilities,
    /// averaged over heads and over the layers that the model was exported with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cross_attentions: Option<Vec<Vec<f64>>>,
}

/// Why a target ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FinishReason {
    /// The last token is an end-of-sequence token.
    Eos,
    /// The target has the maximum length.
    Length,
    /// The text contains one of `stop_strings`, which the last token completes.
    StopString,
    /// `max_time` has passed.
    Time,
    /// The target satisfies its constraint, and no token may follow, not even an end-of-sequence token.
    Constraint,
    /// The target ended before satisfying its constraint, or the options forbid every possible next token.
    ConstraintIncomplete,
}

/// The scores of given targets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScoreResult {
    /// The request's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// For each source, the score of its target.
    pub scores: Vec<Score>,
    /// The size of the request.
    pub usage: Usage,
}

/// The score of a given target. The decoder prompt is not scored.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Score {
    /// The token ids of the target, with the end token if it was scored.
    pub tokens: Vec<i64>,
    /// The sum of `logprobs`.
    pub logprob: f64,
    /// `exp(-mean)` of `logprobs`; null if that overflows.
    pub perplexity: Option<f64>,
    /// The model's log-probability of each token.
    pub logprobs: Vec<f64>,
    /// With `--top-logprobs`: for each position, pairs of a token and its log-probability, most likely first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_logprobs: Option<Vec<Vec<(i64, f64)>>>,
    /// With `--output-attentions`: for each token, its attention to each source token, as in generation results.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cross_attentions: Option<Vec<Vec<f64>>>,
}

/// The size of a request and of its result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// The number of source tokens, without padding.
    pub source_tokens: usize,
    /// The number of tokens of all targets.
    pub target_tokens: usize,
}

/// The labels of each source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelsResult {
    /// The request's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// For each source, its labels, best first.
    pub labels: Vec<Vec<Label>>,
    /// The size of the request.
    pub usage: EncoderUsage,
}

/// The labels of each token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenLabelsResult {
    /// The request's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// For each source, its tokens that are not padding.
    pub tokens: Vec<Vec<TokenLabels>>,
    /// The size of the request.
    pub usage: EncoderUsage,
}

/// The labels of a token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenLabels {
    /// The token id.
    pub token: i64,
    /// The token's vocabulary entry; absent for a model without a tokenizer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Its labels, best first.
    pub labels: Vec<Label>,
}

/// A label and its score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Label {
    /// The label's name in the model's configuration.
    pub label: String,
    /// The logit, or the probability that `function_to_apply` computes from it.
    pub score: f64,
}

/// The size of a request without targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EncoderUsage {
    /// The number of source tokens, without padding.
    pub source_tokens: usize,
}

impl Sequence {
    /// A generated target. `source_length` is the number of source tokens that the request gave.
    ///
    /// # Errors
    /// Token ids that the tokenizer cannot decode.
    pub fn generated(
        hypothesis: &Hypothesis,
        source_length: usize,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Sequence, Error> {
        let decode = |tokenizer: &Tokenizer| tokenizer.decode(&hypothesis.tokens, SpecialTokens::Skip);
        let attentions = hypothesis.cross_attentions.as_ref();
        Ok(Sequence {
            tokens: hypothesis.tokens.clone(),
            text: tokenizer.map(decode).transpose()?,
            score: hypothesis.score.map(f64::from),
            finish_reason: Some(hypothesis.finish_reason.into()),
            cross_attentions: attentions.map(|found| attention_rows(found, source_length)),
            ..Sequence::default()
        }
        .with_logprobs(hypothesis.logprobs.as_ref()))
    }

    /// Adds the log-probabilities of the tokens, if there are any.
    pub fn with_logprobs(self, found: Option<&Logprobs>) -> Sequence {
        Sequence {
            logprob: found.map(Logprobs::sum),
            logprobs: found.map(|found| widened(&found.tokens)),
            top_logprobs: found.and_then(top_logprobs),
            ..self
        }
    }
}

impl Score {
    /// The score of a target. `source_length` is the number of source tokens that the request gave.
    pub fn new(tokens: &[i64], found: &Logprobs, attentions: Option<&CrossAttentions>, source_length: usize) -> Score {
        Score {
            tokens: tokens.to_vec(),
            logprob: found.sum(),
            perplexity: Some(found.perplexity()).filter(|perplexity| perplexity.is_finite()),
            logprobs: widened(&found.tokens),
            top_logprobs: top_logprobs(found),
            cross_attentions: attentions.map(|found| attention_rows(found, source_length)),
        }
    }
}

impl From<t5gemma_runtime::FinishReason> for FinishReason {
    fn from(reason: t5gemma_runtime::FinishReason) -> FinishReason {
        match reason {
            t5gemma_runtime::FinishReason::Eos => FinishReason::Eos,
            t5gemma_runtime::FinishReason::Length => FinishReason::Length,
            t5gemma_runtime::FinishReason::StopString => FinishReason::StopString,
            t5gemma_runtime::FinishReason::Time => FinishReason::Time,
            t5gemma_runtime::FinishReason::Constraint => FinishReason::Constraint,
            t5gemma_runtime::FinishReason::ConstraintIncomplete => FinishReason::ConstraintIncomplete,
            other => unreachable!("a reason to finish that the protocol lacks: {}", other.as_str()),
        }
    }
}

fn widened(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().copied().map(f64::from).collect()
}

fn top_logprobs(found: &Logprobs) -> Option<Vec<Vec<(i64, f64)>>> {
    let pair = |&(token, logprob): &(i64, f32)| (token, f64::from(logprob));
    (!found.top.is_empty()).then(|| found.top.iter().map(|top| top.iter().map(pair).collect()).collect())
}

/// The attention of each target token to the first `source_length` source tokens, which leaves out the padding of the
/// batch.
pub fn attention_rows(found: &CrossAttentions, source_length: usize) -> Vec<Vec<f64>> {
    let given = |mut row: Vec<f64>| {
        row.truncate(source_length);
        row
    };
    found.decimals().map(given).collect()
}
