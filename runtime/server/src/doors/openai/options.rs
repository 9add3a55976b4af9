//! OpenAI's options as generation options. Those of Hugging Face's names may stand beside them.

use serde_json::{Map, Value, json};
use t5gemma_protocol::{GENERATION_OPTIONS, Images};

use crate::doors::sampling::samples;
use crate::failure::Failure;
use crate::fields::Fields;

/// What is asked for besides the sources.
#[derive(Debug, Default)]
pub struct Asked {
    /// The generation options.
    pub options: Map<String, Value>,
    /// The number of choices for each source.
    pub n: usize,
    /// Whether the answer is a stream.
    pub stream: bool,
    /// Whether the last chunk tells the usage.
    pub include_usage: bool,
    /// How many likely tokens to tell for each position, if log-probabilities are asked for.
    pub logprobs: Option<u64>,
    /// The texts that end a choice.
    pub stops: Vec<String>,
    /// Images of a completion, which OpenAI's API does not have: as in JSON lines.
    pub images: Option<Images>,
    /// Whether crops follow images.
    pub pan_and_scan: Option<bool>,
}

/// Fields without an effect on a result.
const WITHOUT_EFFECT: [&str; 13] = [
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "return_full_text",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
    "web_search_options",
];

/// Options of OpenAI's API that would change a result, and that no model here has.
const UNSUPPORTED: [(&str, &str); 7] = [
    ("tools", "the models call no tools"),
    ("tool_choice", "the models call no tools"),
    ("functions", "the models call no functions"),
    ("function_call", "the models call no functions"),
    ("audio", "the models return text"),
    ("suffix", "the models write no middle parts"),
    ("echo", "a target does not continue its source"),
];

/// Takes all fields but the sources and the model.
pub fn take(mut fields: Fields, is_chat: bool) -> Result<Asked, Failure> {
    let mut asked = Asked { n: 1, ..Asked::default() };
    let mut options = Map::new();
    let mut set = |name: &str, value: Value| options.insert(name.to_string(), value);
    asked.stream = fields.flag("stream")?.unwrap_or(false);
    if let Some(mut given) = fields.object("stream_options")? {
        asked.include_usage = given.flag("include_usage")?.unwrap_or(false);
    }
    let length = fields.count("max_completion_tokens")?;
    if let Some(length) = fields.count("max_tokens")?.or(length) {
        set("max_new_tokens", length.into());
    }
    let n = fields.count("n")?;
    if let Some(n) = n {
        set("num_return_sequences", n.into());
    }
    if let Some(best) = fields.count("best_of")?
        && best != n.unwrap_or(1)
    {
        return Err(Failure::unsupported("best_of", "give n, or num_beams and n"));
    }
    if let Some(stops) = fields.texts("stop")? {
        set("stop_strings", json!(stops));
    }
    if let Some(bias) = fields.take("logit_bias") {
        set(
            "sequence_bias",
            logit_bias(&bias)
                .ok_or_else(|| fields.refused("logit_bias", "an object of token ids and numbers", &bias))?,
        );
    }
    if let Some(schema) = response_format(&mut fields)? {
        set("json_schema", schema);
    }
    asked.logprobs = match is_chat {
        true => {
            let top = fields.count("top_logprobs")?;
            fields.flag("logprobs")?.unwrap_or(top.is_some()).then(|| top.unwrap_or(0))
        }
        false => match fields.take("logprobs") {
            None | Some(Value::Bool(false)) => None,
            Some(Value::Bool(true)) => Some(0),
            Some(count) => {
                Some(count.as_u64().ok_or_else(|| fields.refused("logprobs", "an integer of at least 0", &count))?)
            }
        },
    };
    if let Some(top) = asked.logprobs {
        set("output_logprobs", true.into());
        if top > 0 {
            set("top_logprobs", top.into());
        }
    }
    for option in GENERATION_OPTIONS {
        if let Some(value) = fields.take(option.name) {
            options.entry(option.name).or_insert(value);
        }
    }
    samples(&mut options);
    asked.pan_and_scan = fields.flag("pan_and_scan")?;
    if !is_chat {
        asked.images = fields.images()?;
    }
    for (name, why) in UNSUPPORTED {
        if let Some(value) = fields.take(name) {
            let is_off =
                value == json!([]) || value == json!("none") || value == json!("auto") || value == json!(false);
            if !is_off && value != json!("") {
                return Err(Failure::unsupported(name, why));
            }
        }
    }
    if let Some(modalities) = fields.take("modalities").filter(|given| *given != json!(["text"])) {
        return Err(fields.refused("modalities", "[\"text\"]", &modalities));
    }
    WITHOUT_EFFECT.iter().for_each(|name| drop(fields.take(name)));
    fields.end()?;
    asked.n = options.get("num_return_sequences").and_then(Value::as_u64).unwrap_or(1) as usize;
    asked.stops = options.get("stop_strings").and_then(crate::fields::texts).unwrap_or_default();
    asked.options = options;
    Ok(asked)
}

fn logit_bias(bias: &Value) -> Option<Value> {
    let pair = |(token, bias): (&String, &Value)| Some(json!([[token.parse::<i64>().ok()?], bias.as_f64()?]));
    bias.as_object()?.iter().map(pair).collect::<Option<Vec<_>>>().map(Value::from)
}

/// The schema that an answer must satisfy.
fn response_format(fields: &mut Fields) -> Result<Option<Value>, Failure> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(None) };
    match format.text("type")?.as_deref() {
        None | Some("text") => Ok(None),
        Some("json_object") => Ok(Some(json!({"type": "object"}))),
        Some("json_schema") => {
            let schema = format.object("json_schema")?.and_then(|mut given| given.take("schema"));
            Ok(Some(schema.unwrap_or(Value::Bool(true))))
        }
        Some(other) => {
            let expected = "text, json_object or json_schema";
            Err(Failure::field("response_format.type", expected, format_args!("{other:?}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openai_options_become_generation_options() {
        let cases = [
            (json!({}), json!({})),
            (json!({"max_tokens": 5, "stop": "x", "user": "me"}), json!({"max_new_tokens": 5, "stop_strings": ["x"]})),
            (json!({"temperature": 0}), json!({"do_sample": false})),
            (json!({"temperature": 0.5, "seed": 3}), json!({"temperature": 0.5, "seed": 3, "do_sample": true})),
            (json!({"temperature": 0.5, "do_sample": false}), json!({"temperature": 0.5, "do_sample": false})),
            (json!({"n": 2}), json!({"num_return_sequences": 2, "do_sample": true})),
            (json!({"n": 2, "num_beams": 4}), json!({"num_return_sequences": 2, "num_beams": 4})),
            (json!({"n": 1, "seed": 1, "num_beams": 4}), json!({"num_return_sequences": 1, "seed": 1, "num_beams": 4})),
            (json!({"logit_bias": {"7": -5}}), json!({"sequence_bias": [[[7], -5.0]]})),
            (json!({"response_format": {"type": "json_object"}}), json!({"json_schema": {"type": "object"}})),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}}}),
                json!({"json_schema": {"a": 1}}),
            ),
            (json!({"logprobs": 2}), json!({"output_logprobs": true, "top_logprobs": 2})),
            (json!({"tools": [], "tool_choice": "auto", "modalities": ["text"]}), json!({})),
        ];
        let read = |given: &Value| take(Fields::of(given.as_object().expect("an object").clone()), false);
        for (given, expected) in cases {
            assert_eq!(Value::from(read(&given).expect("valid").options), expected, "{given}");
        }
        let refused = [
            (json!({"max_token": 5}), "max_token: no such field"),
            (json!({"tools": [{}]}), "tools: not supported: the models call no tools"),
            (json!({"echo": true}), "echo: not supported: a target does not continue its source"),
            (json!({"best_of": 3}), "best_of: not supported: give n, or num_beams and n"),
            (json!({"n": -1}), "n: expected an integer of at least 0, found -1"),
            (
                json!({"response_format": {"type": "x"}}),
                "response_format.type: expected text, json_object or json_schema, found \"x\"",
            ),
        ];
        for (given, expected) in refused {
            assert_eq!(read(&given).expect_err(expected).message, expected);
        }
    }
}
