//! The flags for models whose interface differs from T5Gemma's own.

use clap::{Args, ValueEnum};
use t5gemma_exporter::{Activation, CustomHead, CustomInterface};

#[derive(Args)]
#[command(next_help_heading = "Custom interfaces")]
pub struct CustomArgs {
    /// Strip PREFIX, such as backbone., from the names of the checkpoint's tensors
    ///
    /// Tensors without the prefix keep their names. If config.json has an unknown model_type, its t5_config_dict is
    /// read as the configuration. Prefixes of common wrappers are recognized without this option.
    #[arg(long, value_name = "PREFIX", conflicts_with = "dummy_weights")]
    pub weights_prefix: Option<String>,
    /// Compute rotary positions of the source from the input position_ids, float32 [batch, source]
    ///
    /// Masks and windows still count tokens. `float` positions for source or target exclude operators that take integer
    /// positions, which `inspect` lists.
    #[arg(long, value_name = "TYPE", value_enum, default_value = "integer")]
    source_positions: PositionsArg,
    /// Compute rotary positions of the target from the input decoder_position_ids, float32 [rows, target]
    #[arg(long, value_name = "TYPE", value_enum, default_value = "integer")]
    target_positions: PositionsArg,
    /// Rotate the queries and keys of cross-attention too, by target and source positions
    #[arg(long)]
    cross_rope: bool,
    /// Read vectors instead of token ids: encoder, decoder or both
    ///
    /// The encoder's input is then inputs_embeds [batch, source, hidden size], the decoder's decoder_inputs_embeds
    /// [rows, target, hidden size], of the type of --dtype. As in transformers, the graph multiplies them by the square
    /// root of the hidden size.
    #[arg(long, value_name = "STACKS", value_enum, value_delimiter = ',')]
    inputs_embeds: Vec<StackArg>,
    /// Look target tokens up in this tensor of the checkpoint, [target vocabulary, hidden size]
    #[arg(long, value_name = "TENSOR")]
    decoder_embedding: Option<String>,
    /// Replace the output head by tensors of the checkpoint
    ///
    /// HEAD is linear:W or linear:W,B, with W [vocabulary, hidden size]; mlp:W1,B1,ACTIVATION,W2,B2, two layers with
    /// gelu (exact), gelu_tanh or silu between them; or none, with which the decoder graphs return decoder_last_hidden_state.
    #[arg(long, value_name = "HEAD", value_parser = head)]
    head: Option<CustomHead>,
    /// Whether logits have the soft-cap that config.json says
    #[arg(long, value_name = "MODE", value_enum, default_value = "config")]
    head_softcap: SoftcapArg,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PositionsArg {
    /// as config.json says: the indices of the tokens, unless the model has positions of its own
    Integer,
    /// numbers that the caller passes
    Float,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StackArg {
    Encoder,
    Decoder,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SoftcapArg {
    /// the one in config.json
    Config,
    /// none
    Off,
}

impl CustomArgs {
    /// The options of an export.
    pub fn options(&self) -> CustomInterface {
        let mut custom = CustomInterface::default();
        custom.float_source_positions = self.source_positions == PositionsArg::Float;
        custom.float_target_positions = self.target_positions == PositionsArg::Float;
        custom.cross_rope = self.cross_rope;
        custom.encoder_inputs_embeds = self.inputs_embeds.contains(&StackArg::Encoder);
        custom.decoder_inputs_embeds = self.inputs_embeds.contains(&StackArg::Decoder);
        custom.decoder_embedding.clone_from(&self.decoder_embedding);
        custom.head.clone_from(&self.head);
        custom.no_head_softcap = self.head_softcap == SoftcapArg::Off;
        custom
    }
}

fn head(text: &str) -> Result<CustomHead, String> {
    let expected = || {
        let activations = Activation::ALL.map(Activation::name).join(", ");
        format!("expected linear:W, linear:W,B, mlp:W1,B1,ACTIVATION,W2,B2 (ACTIVATION: {activations}), or none")
    };
    if text == "none" {
        return Ok(CustomHead::None);
    }
    let (kind, names) = text.split_once(':').ok_or_else(expected)?;
    let names: Vec<&str> = names.split(',').collect();
    if names.iter().any(|name| name.is_empty()) {
        return Err(expected());
    }
    match (kind, names[..].as_ref()) {
        ("linear", [weight]) => Ok(CustomHead::Linear { weight: weight.to_string(), bias: None }),
        ("linear", [weight, bias]) => {
            Ok(CustomHead::Linear { weight: weight.to_string(), bias: Some(bias.to_string()) })
        }
        ("mlp", [first, first_bias, activation, second, second_bias]) => {
            let activation = Activation::ALL.into_iter().find(|known| known.name() == *activation);
            let tensors = [first, first_bias, second, second_bias].map(|name| name.to_string());
            Ok(CustomHead::Mlp { tensors, activation: activation.ok_or_else(expected)? })
        }
        _ => Err(expected()),
    }
}
