//! What decoder graphs return besides keys and values: logits, candidates and alignment; and the masks of adapters.

use crate::config::{Activation, Head};
use crate::interface::{self, Logits, Ports};
use crate::lower::softcap;
use crate::nn::rms_norm;
use crate::onnx::{DType, Dim, Value};
use crate::options::Options;
use crate::sequence::Tokens;
use crate::weights::Weights;

/// A mask of adapters for each of `length` tokens of a row, `[rows·length, rank]`, from one for each row, `[rows, rank]`.
pub fn mask_by_token<'g>(mask: Value<'g>, length: &Dim) -> Value<'g> {
    let [rows, rank] = [0, 1].map(|axis| mask.dim(axis));
    let by_token = mask.unsqueeze(&[1]).expand(&[rows.clone(), length.clone(), rank.clone()]);
    by_token.reshape(&[rows.times(length), rank])
}

/// Declares the outputs of a decoder graph: logits, the `cached` keys and values, candidates and alignment. `x` is the
/// residual stream behind the last layer, `weights` are the cross-attention weights of the layers that return them,
/// float32 `[batch, queries, source]` each, `root` is the root of the checkpoint.
pub fn outputs<'g>(
    ports: &Ports,
    x: Value<'g>,
    weights: Vec<Value<'g>>,
    cached: Vec<Value<'g>>,
    tokens: &Tokens<'g>,
    options: &Options,
    root: &Weights<'g>,
) {
    let logits = logits(x, tokens, options, root);
    let candidates = candidates(logits, options.logits);
    let alignment = alignment(weights, tokens);
    let all = [logits].into_iter().chain(cached).chain(candidates).chain(alignment);
    interface::outputs(root.graph, ports, all);
}

/// `softcap(head · norm(x))` in float32, `[rows, positions, vocab_size]` (or the number of kept tokens): x
/// `[rows·length, hidden]`.
/// Other heads have layers of their own, or return the normed states, in the dtype of the model.
fn logits<'g>(x: Value<'g>, tokens: &Tokens<'g>, options: &Options, root: &Weights<'g>) -> Value<'g> {
    let (rows, hidden_size) = (&tokens.rows, root.stack.hidden_size);
    let (x, positions) = match options.logits {
        Logits::All => (x, tokens.length.clone()),
        Logits::Last | Logits::Candidates(_) => {
            let last = x.reshape(&[rows.clone(), tokens.length.clone(), hidden_size.into()]).last(1);
            (last.reshape(&[rows.clone(), hidden_size.into()]), Dim::fixed(1))
        }
    };
    let normed = rms_norm(x, &root.at("model.decoder.norm"));
    let (vocab_size, cap) = (root.stack.vocab_size, root.stack.final_logit_softcapping);
    let biased = |x: Value<'g>, weight: &str, bias: Option<&str>, [output, input]: [usize; 2]| {
        let at = root.at(weight);
        let _scope = at.scope();
        let (matrix, dtype) = (at.matrix([output, input]), at.operand_dtype());
        let bias = bias.map(|bias| root.at(bias).tensor(&[output]).cast(dtype));
        root.lowering.linear(at.operand(x.cast(dtype)), matrix, bias).cast(root.dtype())
    };
    let scores = match &options.vocabulary.custom_head {
        Head::Stock | Head::Linear { bias: None, .. } => {
            let head = root.at(&options.vocabulary.head).keeping(options.vocabulary.kept.as_ref());
            let _scope = head.scope();
            let table = head.matrix([head.kept().unwrap_or(vocab_size), hidden_size]);
            let x = head.operand(normed.cast(head.operand_dtype()));
            return head.lowering.logits(x, table, cap, [rows.clone(), positions]);
        }
        Head::None => return normed.cast(root.dtype()).reshape(&[rows.clone(), positions, hidden_size.into()]),
        Head::Linear { weight, bias } => biased(normed, weight, bias.as_deref(), [vocab_size, hidden_size]),
        Head::Mlp { tensors: [first, first_bias, second, second_bias], size, activation } => {
            let inner = biased(normed, first, Some(first_bias), [*size, hidden_size]);
            let inner = match activation {
                Activation::Gelu => inner.gelu(),
                Activation::GeluTanh => inner.gelu_tanh(),
                Activation::Silu => inner.silu(),
            };
            biased(inner, second, Some(second_bias), [vocab_size, *size])
        }
    };
    softcap(scores.cast(DType::Float32), cap).reshape(&[rows.clone(), positions, vocab_size.into()])
}

/// The outputs of [`Logits::Candidates`]: the greatest logits float32 `[rows, count]`, their tokens int64 `[rows,
/// count]`, and the log-sum-exp of all float32 `[rows, 1]`.
fn candidates(logits: Value<'_>, which: Logits) -> Vec<Value<'_>> {
    let Logits::Candidates(count) = which else { return Vec::new() };
    let logits = logits.squeeze(1); // [rows, vocab_size]
    let [scores, ids] = logits.top_k(count);
    vec![scores, ids, logits.log_sum_exp()]
}

/// The mean over layers of their cross-attention weights, float32 `[rows, length, source]`; none without layers.
fn alignment<'g>(weights: Vec<Value<'g>>, tokens: &Tokens<'g>) -> Option<Value<'g>> {
    let sum = weights.iter().copied().reduce(|sum, layer| sum + layer)?;
    let mean = sum * (1.0 / weights.len() as f64);
    Some(mean.reshape(&[tokens.rows.clone(), tokens.length.clone(), mean.dim(-1)]))
}
