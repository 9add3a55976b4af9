//! Hugging Face's generation options that this version does not implement.

use std::fmt;

use serde_json::Value;

/// An option that is not implemented.
pub(super) struct Unsupported {
    name: &'static str,
    /// The value at which it has no effect.
    pub neutral: Neutral,
    /// Whether ignoring it in `generation_config.json` would change what is generated; others concern speed, memory or
    /// the form of results.
    pub changes_results: bool,
}

/// The value of an option at which it has no effect.
pub(super) enum Neutral {
    /// There is none but leaving it out.
    Absent,
    Flag(bool),
    Number(f64),
}

impl Neutral {
    pub fn is(&self, value: &Value) -> bool {
        match self {
            Neutral::Absent => false,
            Neutral::Flag(flag) => value.as_bool() == Some(*flag),
            Neutral::Number(number) => value.as_f64() == Some(*number),
        }
    }
}

impl fmt::Display for Neutral {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Neutral::Absent => write!(f, "nothing"),
            Neutral::Flag(flag) => write!(f, "{flag}"),
            Neutral::Number(number) => write!(f, "{number}"),
        }
    }
}

pub(super) fn unsupported(name: &str) -> Option<&'static Unsupported> {
    UNSUPPORTED.iter().find(|option| option.name == name)
}

const fn changes_results(name: &'static str, neutral: Neutral) -> Unsupported {
    Unsupported { name, neutral, changes_results: true }
}

const fn harmless(name: &'static str, neutral: Neutral) -> Unsupported {
    Unsupported { name, neutral, changes_results: false }
}

const UNSUPPORTED: &[Unsupported] = &[
    changes_results("penalty_alpha", Neutral::Number(0.0)),
    changes_results("constraints", Neutral::Absent),
    changes_results("force_words_ids", Neutral::Absent),
    changes_results("guidance_scale", Neutral::Number(1.0)),
    changes_results("watermarking_config", Neutral::Absent),
    changes_results("token_healing", Neutral::Flag(false)),
    changes_results("dola_layers", Neutral::Absent),
    harmless("use_mtp", Neutral::Flag(false)),
    harmless("is_assistant", Neutral::Flag(false)),
    harmless("num_assistant_tokens", Neutral::Absent),
    harmless("num_assistant_tokens_schedule", Neutral::Absent),
    harmless("assistant_confidence_threshold", Neutral::Absent),
    harmless("assistant_early_exit", Neutral::Absent),
    harmless("assistant_lookbehind", Neutral::Absent),
    harmless("assistant_ensemble_weight", Neutral::Absent),
    harmless("target_lookbehind", Neutral::Absent),
    harmless("speculation_type", Neutral::Absent),
    harmless("use_cache", Neutral::Flag(true)),
    harmless("cache_implementation", Neutral::Absent),
    harmless("cache_config", Neutral::Absent),
    harmless("max_cache_len", Neutral::Absent),
    harmless("prefill_chunk_size", Neutral::Absent),
    harmless("low_memory", Neutral::Flag(false)),
    harmless("compile_config", Neutral::Absent),
    harmless("disable_compile", Neutral::Absent),
    harmless("continuous_batching_config", Neutral::Absent),
    harmless("output_hidden_states", Neutral::Flag(false)),
    harmless("output_scores", Neutral::Flag(false)),
    harmless("output_logits", Neutral::Flag(false)),
    harmless("return_dict_in_generate", Neutral::Flag(false)),
];
