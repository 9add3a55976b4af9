//! The decoder, shared by its two graphs: the layer, and the way from the last layer to logits.

use crate::attention::{KeyValue, Tokens, causal, cross};
use crate::config::LayerType;
use crate::interface::{CacheLayout, Logits};
use crate::nn::{Weights, gated_mlp, residual, rms_norm};
use crate::onnx::{Dim, Value};

/// What a layer remembers: the target so far (nothing at the first step), and the source.
pub struct Memory<'g> {
    pub past: Option<KeyValue<'g>>,
    pub source: KeyValue<'g>,
}

/// What a decoder layer is given besides its input and its memory.
pub struct Context<'g> {
    /// The target tokens.
    pub tokens: Tokens<'g>,
    /// Which source tokens they see: bool `[batch, 1, 1, 1, source]`.
    pub visible: Value<'g>,
    /// Which of them are seen at all, bool `[batch, 1, 1, 1, target]`; nothing where there is no padding.
    pub target: Option<Value<'g>>,
    /// What their self-attention sees.
    pub kind: LayerType,
    /// How their keys and values pass to the next step.
    pub cache: CacheLayout,
    /// Whether how much they attend to the source is asked for.
    pub is_aligned: bool,
}

/// What a decoder layer makes.
pub struct Layer<'g> {
    /// The residual stream behind it.
    pub output: Value<'g>,
    /// The keys and values of past and new target tokens.
    pub present: KeyValue<'g>,
    /// Where it is asked for, how much each target token attends to each source token: float32 `[batch, queries, source]`,
    /// the beams of a source row along the queries.
    pub attended: Option<Value<'g>>,
}

/// h = x + norm(self_attention(norm(x)))
/// h = h + norm(cross_attention(norm(h)))
/// y = h + norm(mlp(norm(h)))
pub fn layer<'g>(x: Value<'g>, context: &Context<'g>, memory: Memory<'g>, w: &Weights<'g>) -> Layer<'g> {
    let normed = rms_norm(x, &w.at("pre_self_attn_layernorm"));
    let (attended, present) = causal(normed, context, memory.past, &w.at("self_attn"));
    let h = residual(x, attended, &w.at("post_self_attn_layernorm"));

    let normed = rms_norm(h, &w.at("pre_cross_attn_layernorm"));
    let (read, attended) = cross(normed, context, memory.source, &w.at("cross_attn"));
    let h = residual(h, read, &w.at("post_cross_attn_layernorm"));

    let normed = rms_norm(h, &w.at("pre_feedforward_layernorm"));
    let y = residual(h, gated_mlp(normed, &w.at("mlp")), &w.at("post_feedforward_layernorm"));
    Layer { output: y, present, attended }
}

/// The mean over layers of how much each target token attends to each source token, float32 `[rows, length, source]`; nothing
/// where no layer was asked.
pub fn alignment<'g>(attended: &[Value<'g>], tokens: &Tokens<'g>) -> Option<Value<'g>> {
    let sum = attended.iter().copied().reduce(|sum, layer| sum + layer)?;
    let mean = sum * (1.0 / attended.len() as f64);
    Some(mean.reshape(&[tokens.rows.clone(), tokens.length.clone(), mean.dim(-1)]))
}

/// What stands behind the other outputs of a decoder graph: see [`Logits::Candidates`].
pub fn candidates(logits: Value<'_>, which: Logits) -> Vec<Value<'_>> {
    let Logits::Candidates(count) = which else { return Vec::new() };
    let logits = logits.squeeze(1); // [rows, vocab_size]
    let [scores, ids] = logits.top(count);
    vec![scores, ids, logits.log_sum_exp()]
}

/// `softcap(head · norm(x))` in float32, `[rows, positions, tokens]`, of x `[rows·length, hidden]`; tokens are those of the
/// vocabulary or the ones that are kept of it.
pub fn logits<'g>(x: Value<'g>, tokens: &Tokens<'g>, which: Logits, [norm, head]: [&Weights<'g>; 2]) -> Value<'g> {
    let (rows, hidden_size) = (&tokens.rows, head.side.hidden_size);
    let (x, positions) = match which {
        Logits::All => (x, tokens.length.clone()),
        Logits::Last | Logits::Candidates(_) => {
            let last = x.reshape(&[rows.clone(), tokens.length.clone(), hidden_size.into()]).last(1);
            (last.reshape(&[rows.clone(), hidden_size.into()]), Dim::fixed(1))
        }
    };
    let normed = rms_norm(x, norm);
    let _scope = head.scope();
    let scored = head.kept().unwrap_or(head.side.vocab_size);
    let table = head.matrix([scored, hidden_size]);
    let (x, cap) = (head.multiplied(normed.cast(head.factor_dtype())), head.side.final_logit_softcapping);
    head.lowering.logits(x, table, cap, [rows.clone(), positions])
}
