//! Tensors: what Gemma 2 and T5Gemma call them, their shapes, and where each tensor of the new checkpoint comes from.

use t5gemma_graphs::interface::DType;

use super::config::Sizes;
use super::random::NormalTensor;
use super::source::{EMBEDDING, HEAD, Source, same_bytes};
use super::{CrossAttention, CrossInit, CrossNorms};
use crate::checkpoint::{Checkpoint, Tensor};
use crate::error::{Error, Result};

/// The tensors of a stack outside of its layers, behind `model.` in Gemma 2 and behind `model.encoder.` or `model.decoder.` in T5Gemma.
const OF_STACK: [(&str, &[Axis]); 2] = [("embed_tokens", &[Vocabulary, Hidden]), ("norm", &[Hidden])];

/// The norms of a layer, behind `layers.i.`: their names in Gemma 2 and in T5Gemma. Shape `[hidden]`.
const NORMS: [(&str, &str); 4] = [
    ("input_layernorm", "pre_self_attn_layernorm"),
    ("post_attention_layernorm", "post_self_attn_layernorm"),
    ("pre_feedforward_layernorm", "pre_feedforward_layernorm"),
    ("post_feedforward_layernorm", "post_feedforward_layernorm"),
];

/// The matrices of a layer, behind `layers.i.`, with the same name in both.
const MATRICES: [(&str, [Axis; 2]); 7] = [
    ("self_attn.q_proj", [Queries, Hidden]),
    ("self_attn.k_proj", [KeyValues, Hidden]),
    ("self_attn.v_proj", [KeyValues, Hidden]),
    ("self_attn.o_proj", [Hidden, Queries]),
    ("mlp.gate_proj", [FeedForward, Hidden]),
    ("mlp.up_proj", [FeedForward, Hidden]),
    ("mlp.down_proj", [Hidden, FeedForward]),
];

/// The matrices of cross-attention, behind `layers.i.cross_attn.`. Heads and their width are those of the decoder's self-attention; keys
/// and values are made of the encoder's output. The last says whether `copy-qo` copies the matrix.
const CROSS: [(&str, [Axis; 2], bool); 4] = [
    ("q_proj", [Queries, Hidden], true),
    ("k_proj", [KeyValues, EncoderHidden], false),
    ("v_proj", [KeyValues, EncoderHidden], false),
    ("o_proj", [Hidden, Queries], true),
];

/// The norms around cross-attention, behind `layers.i.`, and those of self-attention that they may be copied from.
const CROSS_NORMS: [(&str, &str); 2] =
    [("pre_cross_attn_layernorm", "input_layernorm"), (POST_CROSS_NORM, "post_attention_layernorm")];
const POST_CROSS_NORM: &str = "post_cross_attn_layernorm";

use Axis::{EncoderHidden, FeedForward, Hidden, KeyValues, Queries, Vocabulary};

#[derive(Clone, Copy)]
enum Axis {
    Vocabulary,
    Hidden,
    /// `num_attention_heads * head_dim`.
    Queries,
    /// `num_key_value_heads * head_dim`.
    KeyValues,
    FeedForward,
    /// Of the encoder, in a matrix of the decoder.
    EncoderHidden,
}

impl Axis {
    fn size(self, config: &Sizes, encoder_hidden: usize) -> usize {
        match self {
            Vocabulary => config.vocab_size,
            Hidden => config.hidden_size,
            Queries => config.num_attention_heads * config.head_dim,
            KeyValues => config.num_key_value_heads * config.head_dim,
            FeedForward => config.intermediate_size,
            EncoderHidden => encoder_hidden,
        }
    }
}

/// A tensor of Gemma 2 and its place in T5Gemma.
pub struct Renamed {
    /// Behind `model.`.
    pub from: String,
    /// Behind `model.encoder.` or `model.decoder.`.
    pub to: String,
    pub shape: Vec<usize>,
}

/// All tensors of a Gemma 2 but for the head. Gemma 3 has them too, with some more.
pub fn renamed(config: &Sizes) -> Vec<Renamed> {
    let shape = |axes: &[Axis]| axes.iter().map(|axis| axis.size(config, 0)).collect::<Vec<_>>();
    let same = |name: String, shape: Vec<usize>| Renamed { from: name.clone(), to: name, shape };
    let mut tensors: Vec<Renamed> =
        OF_STACK.iter().map(|(name, axes)| same(format!("{name}.weight"), shape(axes))).collect();
    for i in 0..config.num_hidden_layers {
        let layer = |name: &str| format!("layers.{i}.{name}");
        for (from, to) in NORMS {
            let [from, to] = [from, to].map(|name| layer(&format!("{name}.weight")));
            tensors.push(Renamed { from, to, shape: shape(&[Hidden]) });
        }
        for (name, axes) in MATRICES {
            tensors.push(same(layer(&format!("{name}.weight")), shape(&axes)));
            if config.attention_bias && name.starts_with("self_attn.") {
                tensors.push(same(layer(&format!("{name}.bias")), shape(&axes[..1])));
            }
        }
    }
    tensors
}

/// A tensor of the new checkpoint.
pub struct Planned<'s> {
    pub name: String,
    pub shape: Vec<usize>,
    pub origin: Origin<'s>,
}

/// Where the elements of a tensor come from.
#[derive(Clone, Copy)]
pub enum Origin<'s> {
    Stored {
        checkpoint: &'s Checkpoint,
        dtype: DType,
        tensor: Tensor<'s>,
    },
    /// A stored one, each element multiplied.
    Scaled {
        dtype: DType,
        tensor: Tensor<'s>,
        factor: f32,
    },
    Random(NormalTensor),
    Constant(f32),
}

impl<'s> Planned<'s> {
    /// A copy of a tensor of a checkpoint whose dtypes were checked.
    pub fn copy(checkpoint: &'s Checkpoint, tensor: Tensor<'s>, name: String) -> Planned<'s> {
        let dtype = tensor.float().expect("the dtypes of a source were checked");
        Planned { name, shape: tensor.shape.to_vec(), origin: Origin::Stored { checkpoint, dtype, tensor } }
    }

    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// All tensors of the new checkpoint, by name.
pub fn plan<'s>(encoder: &'s Source, decoder: &'s Source, cross: &CrossAttention, tied: bool) -> Vec<Planned<'s>> {
    let mut planned = Vec::new();
    for (source, stack) in [(encoder, "model.encoder"), (decoder, "model.decoder")] {
        for Renamed { from, to, .. } in renamed(&source.config.sizes) {
            planned.push(stored(source, &format!("model.{from}"), format!("{stack}.{to}")));
        }
    }
    if !tied {
        planned.push(stored(decoder, HEAD, "lm_head.out_proj.weight".into()));
    }
    for i in 0..decoder.config.sizes.num_hidden_layers {
        plan_cross_attention(&mut planned, i, encoder.config.sizes.hidden_size, decoder, cross);
    }
    planned.sort_by(|a, b| a.name.cmp(&b.name));
    planned
}

/// Refuses tensors that no file can hold: those of cross-attention have rows from one source and columns from the other.
pub fn check_size(planned: &[Planned<'_>]) -> Result<()> {
    let elements = |tensor: &Planned<'_>| tensor.shape.iter().map(|&size| size as u128).product::<u128>();
    let (all, most) = (planned.iter().map(elements).sum::<u128>(), i64::MAX as u128 / 4);
    if all <= most {
        Ok(())
    } else {
        Err(Error::invalid("decoder", format!("at most {most} parameters"), all.to_string()))
    }
}

fn plan_cross_attention<'s>(
    planned: &mut Vec<Planned<'s>>,
    i: usize,
    encoder_hidden: usize,
    decoder: &'s Source,
    cross: &CrossAttention,
) {
    let (from, to) = (format!("model.layers.{i}"), format!("model.decoder.layers.{i}"));
    let new = |name: String, shape: Vec<usize>, origin| Planned { name, shape, origin };
    for (matrix, axes, is_of_target) in CROSS {
        let shape = axes.map(|axis| axis.size(&decoder.config.sizes, encoder_hidden)).to_vec();
        let is_copied = match cross.init {
            CrossInit::Copy => true,
            CrossInit::CopyQo => is_of_target,
            CrossInit::Random => false,
        };
        let [weight, bias] = ["weight", "bias"].map(|part| format!("{to}.cross_attn.{matrix}.{part}"));
        let rows = shape[0];
        planned.push(if is_copied {
            stored(decoder, &format!("{from}.self_attn.{matrix}.weight"), weight)
        } else {
            let random = NormalTensor::new(&weight, cross.seed, cross.std);
            new(weight, shape, Origin::Random(random))
        });
        if decoder.config.sizes.attention_bias {
            planned.push(if is_copied {
                stored(decoder, &format!("{from}.self_attn.{matrix}.bias"), bias)
            } else {
                new(bias, vec![rows], Origin::Constant(0.0))
            });
        }
    }
    for (norm, copied) in CROSS_NORMS {
        // A norm multiplies by 1 + w.
        let constant = match cross.norms {
            CrossNorms::Copy => None,
            CrossNorms::Ones => Some(0.0),
            CrossNorms::Closed => (norm == POST_CROSS_NORM).then_some(-1.0),
        };
        let name = format!("{to}.{norm}.weight");
        planned.push(match constant {
            None => stored(decoder, &format!("{from}.{copied}.weight"), name),
            Some(constant) => new(name, vec![decoder.config.sizes.hidden_size], Origin::Constant(constant)),
        });
    }
}

fn stored<'s>(source: &'s Source, from: &str, to: String) -> Planned<'s> {
    let tensor = source.tensor(from).expect("all tensors of a source were checked");
    Planned::copy(source.checkpoint(), tensor, to)
}

/// The dtype that holds every number of a plan's sources: their own if they have the same, or else float32.
pub fn common_dtype(sources: [&Source; 2], reads_head: bool) -> DType {
    let decoder_head = reads_head.then(|| (sources[1], HEAD.to_string()));
    let of_stacks = sources.into_iter().flat_map(|source| {
        renamed(&source.config.sizes).into_iter().map(move |tensor| (source, format!("model.{}", tensor.from)))
    });
    let mut dtypes = of_stacks.chain(decoder_head).filter_map(|(source, name)| source.tensor(&name)?.float());
    let first = dtypes.next().unwrap_or(DType::Float32);
    if dtypes.all(|dtype| dtype == first) { first } else { DType::Float32 }
}

/// Whether the head is the decoder's embedding: as Gemma 2 computes it, whatever its `tie_word_embeddings` says.
pub fn is_tied(decoder: &Source) -> bool {
    let (Some(head), Some(embedding)) = (decoder.tensor(HEAD), decoder.tensor(EMBEDDING)) else { return true };
    let checkpoint = decoder.checkpoint();
    head.dtype == embedding.dtype && same_bytes((checkpoint, head.bytes), (checkpoint, embedding.bytes))
}
