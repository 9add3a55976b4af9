//! Options of the header: typed fields and JSON become one JSON object, which the runtime checks.

use std::path::PathBuf;

use serde_json::{Map, Value, json};
use t5gemma_runtime::{OpenOptions, Provider};

use crate::error::{t5g_code, t5g_error};
use crate::input::{Array, Fields, Record, Text, UNSET, ZERO_TERMINATED};

#[derive(Clone, Copy)]
#[repr(C)]
pub struct t5g_open_options {
    size: usize,
    library: Text,
    provider: Text,
    device: i64,
    threads: i64,
    check_weights: i64,
    encoder_cache_bytes: i64,
    json: Text,
}

// SAFETY: fields of 8 bytes of which any bytes are a valid value.
unsafe impl Fields for t5g_open_options {
    const OLDEST: usize = 64;

    fn unset() -> t5g_open_options {
        t5g_open_options {
            size: 0,
            library: Text::NULL,
            provider: Text::NULL,
            device: UNSET,
            threads: UNSET,
            check_weights: UNSET,
            encoder_cache_bytes: UNSET,
            json: Text::NULL,
        }
    }
}

/// A limit, which is not 0.
fn bound(value: usize) -> Option<usize> {
    Some(value).filter(|&value| value > 0)
}

/// Reads the options of opening a model.
pub fn open_options(options: Record<t5g_open_options>) -> Result<OpenOptions, t5g_error> {
    let given = options.optional("options")?.unwrap_or_else(t5g_open_options::unset);
    let mut all = Given::of_json(given.json)?;
    all.text("library", given.library)?;
    all.text("provider", given.provider)?;
    all.integer("device", given.device)?;
    all.integer("threads", given.threads)?;
    all.flag("check_weights", given.check_weights)?;
    all.integer("encoder_cache_bytes", given.encoder_cache_bytes)?;

    let mut options = OpenOptions::default();
    for (name, value) in all.options.into_iter().filter(|(_, value)| !value.is_null()) {
        let refused = |expected: &str| t5g_error::expected(t5g_code::Options, &name, expected, value.to_string());
        let integer =
            || value.as_u64().and_then(|value| usize::try_from(value).ok()).ok_or_else(|| refused("an integer"));
        match name.as_str() {
            "library" => options.library = Some(PathBuf::from(value.as_str().ok_or_else(|| refused("a path"))?)),
            "engines" => options.engines = Some(PathBuf::from(value.as_str().ok_or_else(|| refused("a path"))?)),
            "max_sources" => options.limits.max_sources = bound(integer()?).ok_or_else(|| refused("at least 1"))?,
            "max_tokens" => options.limits.max_tokens = bound(integer()?).ok_or_else(|| refused("at least 1"))?,
            "max_bytes" => {
                options.limits.max_bytes = Some(bound(integer()?).ok_or_else(|| refused("at least 1"))?);
            }
            "max_source_bytes" => {
                options.limits.max_source_bytes = Some(bound(integer()?).ok_or_else(|| refused("at least 1"))?);
            }
            "provider" => {
                let known = Provider::ALL.into_iter().find(|provider| value == provider.name());
                let names = Provider::ALL.map(|provider| format!("{:?}", provider.name())).join(", ");
                options.provider.kind = known.ok_or_else(|| refused(&names))?;
            }
            "device" => {
                let device = integer()?.try_into();
                options.provider.device = device.map_err(|_| refused("a GPU index"))?;
            }
            "provider_options" => {
                let given = value.as_object().ok_or_else(|| refused("an object of the provider's options"))?;
                let text = |value: &Value| match value {
                    Value::String(text) => Ok(text.clone()),
                    Value::Number(number) => Ok(number.to_string()),
                    _ => Err(refused("an object of strings and numbers")),
                };
                let given = given.iter().map(|(name, value)| Ok((name.clone(), text(value)?)));
                options.provider.options = given.collect::<Result<_, t5g_error>>()?;
            }
            "threads" => options.threads = Some(integer()?),
            "check_weights" => options.check_weights = value.as_bool().ok_or_else(|| refused("true or false"))?,
            "encoder_cache_bytes" => options.encoder_cache_bytes = integer()?,
            _ => {
                let message = format!("{name}: unknown option of t5g_open_options");
                return Err(t5g_error::new(t5g_code::Options, message).at(&name));
            }
        }
    }
    check_device(&options, "device")?;
    Ok(options)
}

/// Refuses a device other than 0 for a provider without devices.
pub fn check_device(options: &OpenOptions, name: &str) -> Result<(), t5g_error> {
    let provider = &options.provider;
    if provider.kind == Provider::Cpu && provider.device != 0 {
        return Err(t5g_error::expected(t5g_code::Options, name, "0 (there is one cpu)", provider.device.to_string()));
    }
    Ok(())
}

/// Options by name, each set in one place.
struct Given {
    options: Map<String, Value>,
}

impl Given {
    fn of_json(text: Text) -> Result<Given, t5g_error> {
        let refused = |found: String| t5g_error::expected(t5g_code::Options, "json", "a JSON object of options", found);
        let options = match text.optional("json")? {
            None => Map::new(),
            Some(text) => serde_json::from_str(text).map_err(|error| refused(error.to_string()))?,
        };
        Ok(Given { options })
    }

    fn put(&mut self, name: &str, value: Value) -> Result<(), t5g_error> {
        match self.options.insert(name.to_string(), value) {
            None | Some(Value::Null) => Ok(()),
            Some(_) => Err(t5g_error::expected(t5g_code::Options, name, "it once", "it in the struct and in json")),
        }
    }

    fn integer(&mut self, name: &str, value: i64) -> Result<(), t5g_error> {
        if value == UNSET { Ok(()) } else { self.put(name, value.into()) }
    }

    fn number(&mut self, name: &str, value: f64) -> Result<(), t5g_error> {
        if value.is_nan() {
            return Ok(());
        }
        let refused = || t5g_error::expected(t5g_code::Options, name, "a finite number", value.to_string());
        self.put(name, serde_json::Number::from_f64(value).map(Value::Number).ok_or_else(refused)?)
    }

    fn flag(&mut self, name: &str, value: i64) -> Result<(), t5g_error> {
        match value {
            UNSET => Ok(()),
            0 | 1 => self.put(name, (value == 1).into()),
            other => Err(t5g_error::expected(t5g_code::Options, name, "0 or 1", other.to_string())),
        }
    }

    fn text(&mut self, name: &str, value: Text) -> Result<(), t5g_error> {
        match value.optional(name)? {
            None => Ok(()),
            Some(text) => self.put(name, text.into()),
        }
    }

    fn json(&mut self, name: &str, value: Text) -> Result<(), t5g_error> {
        let refused = |found: String| t5g_error::expected(t5g_code::Options, name, "JSON", found);
        match value.optional(name)? {
            None => Ok(()),
            Some(text) => self.put(name, serde_json::from_str(text).map_err(|error| refused(error.to_string()))?),
        }
    }

    fn tokens(&mut self, name: &str, tokens: Array<i64>, count: usize) -> Result<(), t5g_error> {
        if tokens.is_null() && count == 0 {
            return Ok(());
        }
        self.put(name, tokens.get(count, name)?.into())
    }

    fn texts(&mut self, name: &str, texts: Array<Text>, count: usize) -> Result<(), t5g_error> {
        if texts.is_null() && count == 0 {
            return Ok(());
        }
        let texts = texts.get(count, name)?.iter().map(|text| text.get(ZERO_TERMINATED, name));
        self.put(name, texts.collect::<Result<Vec<&str>, t5g_error>>()?.into())
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct t5g_generation_options {
    size: usize,
    json: Text,
    max_new_tokens: i64,
    max_length: i64,
    min_new_tokens: i64,
    min_length: i64,
    num_beams: i64,
    num_return_sequences: i64,
    do_sample: i64,
    seed: i64,
    temperature: f64,
    top_k: i64,
    top_p: f64,
    min_p: f64,
    top_h: f64,
    top_n_sigma: f64,
    typical_p: f64,
    epsilon_cutoff: f64,
    eta_cutoff: f64,
    num_beam_groups: i64,
    diversity_penalty: f64,
    length_penalty: f64,
    early_stopping: i64,
    repetition_penalty: f64,
    encoder_repetition_penalty: f64,
    frequency_penalty: f64,
    presence_penalty: f64,
    no_repeat_ngram_size: i64,
    encoder_no_repeat_ngram_size: i64,
    max_time: f64,
    return_alternatives: i64,
    renormalize_logits: i64,
    remove_invalid_values: i64,
    output_logprobs: i64,
    top_logprobs: i64,
    prompt_lookup_num_tokens: i64,
    max_matching_ngram_size: i64,
    decoder_start_token_id: i64,
    bos_token_id: i64,
    pad_token_id: i64,
    forced_bos_token_id: i64,
    eos_token_id: Array<i64>,
    eos_token_id_count: usize,
    forced_eos_token_id: Array<i64>,
    forced_eos_token_id_count: usize,
    suppress_tokens: Array<i64>,
    suppress_tokens_count: usize,
    begin_suppress_tokens: Array<i64>,
    begin_suppress_tokens_count: usize,
    exponential_decay_start: i64,
    exponential_decay_factor: f64,
    stop_strings: Array<Text>,
    stop_strings_count: usize,
    json_schema: Text,
    regex: Text,
    grammar: Text,
    coverage_penalty: f64,
    patience: f64,
    output_attentions: i64,
    adapter: Text,
}

// SAFETY: fields of 8 bytes of which any bytes are a valid value.
unsafe impl Fields for t5g_generation_options {
    const OLDEST: usize = 56 * 8;

    fn unset() -> t5g_generation_options {
        const NAN: f64 = f64::NAN;
        t5g_generation_options {
            size: 0,
            json: Text::NULL,
            max_new_tokens: UNSET,
            max_length: UNSET,
            min_new_tokens: UNSET,
            min_length: UNSET,
            num_beams: UNSET,
            num_return_sequences: UNSET,
            do_sample: UNSET,
            seed: UNSET,
            temperature: NAN,
            top_k: UNSET,
            top_p: NAN,
            min_p: NAN,
            top_h: NAN,
            top_n_sigma: NAN,
            typical_p: NAN,
            epsilon_cutoff: NAN,
            eta_cutoff: NAN,
            num_beam_groups: UNSET,
            diversity_penalty: NAN,
            length_penalty: NAN,
            early_stopping: UNSET,
            repetition_penalty: NAN,
            encoder_repetition_penalty: NAN,
            frequency_penalty: NAN,
            presence_penalty: NAN,
            no_repeat_ngram_size: UNSET,
            encoder_no_repeat_ngram_size: UNSET,
            max_time: NAN,
            return_alternatives: UNSET,
            renormalize_logits: UNSET,
            remove_invalid_values: UNSET,
            output_logprobs: UNSET,
            top_logprobs: UNSET,
            prompt_lookup_num_tokens: UNSET,
            max_matching_ngram_size: UNSET,
            decoder_start_token_id: UNSET,
            bos_token_id: UNSET,
            pad_token_id: UNSET,
            forced_bos_token_id: UNSET,
            eos_token_id: Array::NULL,
            eos_token_id_count: 0,
            forced_eos_token_id: Array::NULL,
            forced_eos_token_id_count: 0,
            suppress_tokens: Array::NULL,
            suppress_tokens_count: 0,
            begin_suppress_tokens: Array::NULL,
            begin_suppress_tokens_count: 0,
            exponential_decay_start: UNSET,
            exponential_decay_factor: NAN,
            stop_strings: Array::NULL,
            stop_strings_count: 0,
            json_schema: Text::NULL,
            regex: Text::NULL,
            grammar: Text::NULL,
            coverage_penalty: NAN,
            patience: NAN,
            output_attentions: UNSET,
            adapter: Text::NULL,
        }
    }
}

/// Reads generation options by their Hugging Face names.
pub fn generation_options(options: Record<t5g_generation_options>) -> Result<Map<String, Value>, t5g_error> {
    let Some(given) = options.optional("options")? else { return Ok(Map::new()) };
    let mut all = Given::of_json(given.json)?;
    macro_rules! take {
        ($($kind:ident: $($name:ident)*;)*) => { $($(all.$kind(stringify!($name), given.$name)?;)*)* };
    }
    take! {
        integer: max_new_tokens max_length min_new_tokens min_length num_beams num_return_sequences seed top_k
            num_beam_groups no_repeat_ngram_size encoder_no_repeat_ngram_size top_logprobs prompt_lookup_num_tokens
            max_matching_ngram_size decoder_start_token_id bos_token_id pad_token_id forced_bos_token_id;
        flag: do_sample return_alternatives renormalize_logits remove_invalid_values output_logprobs output_attentions;
        number: temperature top_p min_p top_h top_n_sigma typical_p epsilon_cutoff eta_cutoff diversity_penalty
            length_penalty repetition_penalty encoder_repetition_penalty frequency_penalty presence_penalty max_time
            coverage_penalty patience;
        json: json_schema;
        text: regex grammar adapter;
    }
    all.tokens("eos_token_id", given.eos_token_id, given.eos_token_id_count)?;
    all.tokens("forced_eos_token_id", given.forced_eos_token_id, given.forced_eos_token_id_count)?;
    all.tokens("suppress_tokens", given.suppress_tokens, given.suppress_tokens_count)?;
    all.tokens("begin_suppress_tokens", given.begin_suppress_tokens, given.begin_suppress_tokens_count)?;
    all.texts("stop_strings", given.stop_strings, given.stop_strings_count)?;
    match given.early_stopping {
        2 => all.put("early_stopping", "never".into())?,
        other => all.flag("early_stopping", other)?,
    }
    match (given.exponential_decay_start, given.exponential_decay_factor) {
        (UNSET, factor) if factor.is_nan() => {}
        (start, factor) => {
            let start = if start == UNSET { Value::Null } else { start.into() };
            all.put("exponential_decay_length_penalty", json!([start, factor]))?;
        }
    }
    Ok(all.options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use t5gemma_runtime::Limits;

    fn read(options: &mut t5g_generation_options) -> Result<Value, String> {
        options.size = size_of::<t5g_generation_options>();
        let read = generation_options(Record::to(options));
        read.map(Value::Object).map_err(|error| error.text().to_string())
    }

    #[test]
    fn the_folder_of_engines_is_an_option_of_opening() {
        let open = |json: Text| {
            let size = size_of::<t5g_open_options>();
            let mut options = t5g_open_options { size, json, ..t5g_open_options::unset() };
            open_options(Record::to(&mut options)).map_err(|error| error.text().to_string())
        };
        let read = open(Text::of(c"{\"engines\": \"/a/b\", \"provider\": \"tensorrt\"}"));
        assert_eq!(read.map(|options| options.engines), Ok(Some(PathBuf::from("/a/b"))));
        let refused = open(Text::of(c"{\"engines\": 5}")).map(|options| options.engines);
        assert_eq!(refused, Err("engines: expected a path, found 5".into()));
    }

    #[test]
    fn what_a_call_runs_at_a_time_is_an_option_of_opening() {
        let open = |json: Text| {
            let size = size_of::<t5g_open_options>();
            let mut options = t5g_open_options { size, json, ..t5g_open_options::unset() };
            let read = open_options(Record::to(&mut options)).map_err(|error| error.text().to_string());
            read.map(|options| options.limits)
        };
        let read = open(Text::of(
            c"{\"max_sources\": 3, \"max_tokens\": 500, \"max_bytes\": 1000000, \"max_source_bytes\": 2000000}",
        ));
        let expected = Limits::NONE.max_sources(3).max_tokens(500).max_bytes(1_000_000).max_source_bytes(2_000_000);
        assert_eq!(read, Ok(expected));
        assert_eq!(open(Text::of(c"{}")), Ok(Limits::default()));
        let refused = open(Text::of(c"{\"max_bytes\": 0}"));
        assert_eq!(refused, Err("max_bytes: expected at least 1, found 0".into()));
    }

    #[test]
    fn typed_fields_become_the_options_of_their_names() {
        let stops = [Text::of(c"."), Text::of(c"!")];
        let tokens = [1, 107];
        let mut options = t5g_generation_options {
            max_new_tokens: 5,
            do_sample: 1,
            temperature: 0.5,
            early_stopping: 2,
            eos_token_id: Array::of(&tokens),
            eos_token_id_count: 2,
            stop_strings: Array::of(&stops),
            stop_strings_count: 2,
            exponential_decay_start: 3,
            exponential_decay_factor: 1.5,
            coverage_penalty: 0.25,
            output_attentions: 1,
            json_schema: Text::of(c"{\"type\": \"object\"}"),
            json: Text::of(c"{\"bad_words_ids\": [[5]]}"),
            ..t5g_generation_options::unset()
        };
        let expected = json!({
            "bad_words_ids": [[5]], "max_new_tokens": 5, "do_sample": true, "temperature": 0.5,
            "json_schema": {"type": "object"}, "eos_token_id": [1, 107], "stop_strings": [".", "!"],
            "early_stopping": "never", "exponential_decay_length_penalty": [3, 1.5], "coverage_penalty": 0.25,
            "output_attentions": true,
        });
        assert_eq!(read(&mut options), Ok(expected));
        assert_eq!(read(&mut t5g_generation_options::unset()), Ok(json!({})));
    }

    #[test]
    fn what_cannot_be_an_option_is_refused_by_name() {
        let unset = t5g_generation_options::unset;
        let cases = [
            (t5g_generation_options { do_sample: 2, ..unset() }, "do_sample: expected 0 or 1, found 2"),
            (t5g_generation_options { top_p: f64::INFINITY, ..unset() }, "top_p: expected a finite number, found inf"),
            (
                t5g_generation_options { suppress_tokens_count: 1, ..unset() },
                "suppress_tokens: expected a pointer, found NULL",
            ),
            (
                t5g_generation_options { json: Text::of(c"{\"num_beams\": 2}"), num_beams: 2, ..unset() },
                "num_beams: expected it once, found it in the struct and in json",
            ),
            (
                t5g_generation_options { json: Text::of(c"[]"), ..unset() },
                "json: expected a JSON object of options, found ",
            ),
        ];
        for (mut options, expected) in cases {
            let found = read(&mut options).expect_err(expected);
            assert!(found.starts_with(expected), "{found}");
        }
    }
}
