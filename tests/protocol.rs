//! The committed JSON Schema against real lines: every line that the program prints, and every request that it accepts, conforms.

use std::path::Path;

use serde_json::{Value, json};
use t5gemma_exporter::{Alignment, Export};
use t5gemma_protocol::{ClassifyResponse, GenerateRequest, GenerateResponse, ScoreRequest, ScoreResponse};

use crate::common::{demo_as, exported_from, run, tests};

/// A committed schema.
fn schema(name: &str) -> Value {
    let path = tests().join(format!("../runtime/protocol/schema/{name}.json"));
    serde_json::from_slice(&std::fs::read(&path).expect("the schema is committed")).expect("JSON")
}

/// Whether a value conforms to a schema. Supports only the keywords in the committed schemas.
fn conforms(value: &Value, schema: &Value, root: &Value) -> bool {
    let Value::Object(keywords) = schema else { return schema.as_bool().expect("a schema is an object or a boolean") };
    let is = |schema: &Value, value: &Value| conforms(value, schema, root);
    let list = |schemas: &Value| schemas.as_array().expect("a list of schemas").clone();
    let has_type = |name: &Value| match name.as_str().expect("a type has a name") {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|number| number.fract() == 0.0),
        other => panic!("the type {other}"),
    };
    keywords.iter().all(|(keyword, rule)| match keyword.as_str() {
        "$schema" | "$defs" | "title" | "description" | "format" => true,
        "$ref" => {
            let place = rule.as_str().expect("a reference is a text").trim_start_matches('#');
            is(root.pointer(place).expect("a reference has its place"), value)
        }
        "type" => rule.as_array().map_or_else(|| has_type(rule), |names| names.iter().any(has_type)),
        "const" => value == rule,
        "enum" => list(rule).contains(value),
        "minimum" => value.as_f64().is_none_or(|number| number >= rule.as_f64().expect("a number")),
        "allOf" => list(rule).iter().all(|schema| is(schema, value)),
        "anyOf" => list(rule).iter().any(|schema| is(schema, value)),
        "oneOf" => list(rule).iter().filter(|schema| is(schema, value)).count() == 1,
        "not" => !is(rule, value),
        "required" => value.as_object().is_none_or(|fields| {
            list(rule).iter().all(|name| fields.contains_key(name.as_str().expect("a field has a name")))
        }),
        "properties" => value.as_object().is_none_or(|fields| {
            fields.iter().all(|(name, value)| rule.get(name).is_none_or(|schema| is(schema, value)))
        }),
        "additionalProperties" => value.as_object().is_none_or(|fields| {
            let others = fields.iter().filter(|(name, _)| schema["properties"].get(name.as_str()).is_none());
            others.into_iter().all(|(_, value)| is(rule, value))
        }),
        "prefixItems" => {
            value.as_array().is_none_or(|items| items.iter().zip(list(rule)).all(|(item, schema)| is(&schema, item)))
        }
        "items" => value.as_array().is_none_or(|items| {
            let first = schema.get("prefixItems").map_or(0, |schemas| list(schemas).len());
            items.iter().skip(first).all(|item| is(rule, item))
        }),
        "minItems" => value.as_array().is_none_or(|items| items.len() as u64 >= rule.as_u64().expect("a number")),
        "maxItems" => value.as_array().is_none_or(|items| items.len() as u64 <= rule.as_u64().expect("a number")),
        other => panic!("the keyword {other}"),
    })
}

/// Runs a command on requests, and checks each line that it prints and each request that it answers. Returns how many
/// were answered.
fn check_lines(
    arguments: &[&str],
    model: &Path,
    requests: &[Value],
    schemas: (&str, &str),
    written: fn(&str) -> String,
) -> usize {
    let (request_schema, response_schema) = (schema(schemas.0), schema(schemas.1));
    let lines: Vec<String> = requests.iter().map(Value::to_string).collect();
    let model = model.to_str().expect("temporary paths are UTF-8");
    let output = run("t5gemma", [&[arguments[0], model], &arguments[1..]].concat(), lines.join("\n"));
    let out = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(out.lines().count(), requests.len(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut answered = 0;
    for (request, line) in requests.iter().zip(out.lines()) {
        let response: Value = serde_json::from_str(line).expect("JSON");
        assert!(conforms(&response, &response_schema, &response_schema), "{}: {line}", schemas.1);
        assert_eq!(rounded(&written(line)), rounded(line), "read and written again");
        let is_answered = response.get("error").is_none();
        assert!(!is_answered || conforms(request, &request_schema, &request_schema), "{}: {request}", schemas.0);
        answered += usize::from(is_answered);
    }
    answered
}

/// A line with its fields in order and numbers of twelve digits: the parser may miss the last of seventeen.
fn rounded(line: &str) -> String {
    fn round(value: &mut Value) {
        match value {
            Value::Number(number) if number.is_f64() => {
                *value = format!("{:.11e}", number.as_f64().unwrap_or(0.0)).into()
            }
            Value::Array(values) => values.iter_mut().for_each(round),
            Value::Object(fields) => fields.values_mut().for_each(round),
            _ => {}
        }
    }
    let mut value = serde_json::from_str(line).expect("JSON");
    round(&mut value);
    value.to_string()
}

/// A line re-serialized through its type.
fn again<T: serde::Serialize + for<'de> serde::Deserialize<'de>>(line: &str) -> String {
    let read: T = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    serde_json::to_string(&read).expect("it was JSON")
}

#[test]
fn generated_lines_conform_to_the_schema() {
    let model = demo_as("alignment", Export::default().alignment(Alignment::AllLayers));
    let text = "Dr. Lee paid $3.50.";
    let options = [
        json!({}),
        json!({"num_beams": 3, "num_return_sequences": 2, "early_stopping": "never", "length_penalty": 0.5}),
        json!({"output_logprobs": true, "eos_token_id": [1]}),
        json!({"output_logprobs": true, "top_logprobs": 2, "num_beams": 2, "stop_strings": "x"}),
        json!({"do_sample": true, "seed": 7, "top_k": null}),
        json!({"output_attentions": true, "suppress_tokens": [5], "sequence_bias": [[[17], -2.5]]}),
        json!({"regex": "[a-c]{1,3}", "exponential_decay_length_penalty": [3, 1.5]}),
        json!({"json_schema": {"type": "integer"}, "max_new_tokens": 2.0}),
        json!({"stop_strings": ["doctor"], "bad_words_ids": [[5, 6]], "forced_eos_token_id": 1}),
        json!({"max_time": 0.0001, "sequence_bias": {"(17, 5)": 2}}),
    ];
    let mut requests: Vec<Value> = options.iter().map(|options| json!({"text": text, "options": options})).collect();
    requests.extend([
        json!({"id": "x", "text": [text, "Room 12."], "decoder_text": ["doctor", "doctor"]}),
        json!({"id": -1.5, "input_ids": [[5, 6], [7, 8]], "attention_mask": [[1, 0], [1, 1]], "text": null}),
        json!({"id": null, "input_ids": [5, 6], "decoder_input_ids": [5], "options": null}),
    ]);
    let answered = requests.len();
    requests.extend([
        json!({}),
        json!({"text": text, "input_ids": [5]}),
        json!({"text": text, "decoder_text": "a", "decoder_input_ids": [5]}),
        json!({"text": 5}),
        json!({"text": text, "more": 1}),
        json!({"text": text, "options": []}),
        json!({"messages": 5}),
        json!({"text": text, "options": {"num_beams": "4"}}),
    ]);
    let schemas = ("generate-request", "generate-response");
    let found = check_lines(&["generate", "--jsonl"], &model, &requests, schemas, again::<GenerateResponse>);
    assert_eq!(found, answered);

    // Negative controls: the schema rejects what the program rejects for its form, and results with missing fields.
    let (request, response) = (schema(schemas.0), schema(schemas.1));
    for refused in &requests[answered..] {
        assert!(!conforms(refused, &request, &request), "{refused}");
    }
    let result = json!({"id": 1, "sequences": [[{"tokens": [1], "finish_reason": "eos"}]],
        "usage": {"source_tokens": 1, "target_tokens": 1}});
    assert!(conforms(&result, &response, &response));
    for (pointer, value) in [
        ("/usage/source_tokens", json!(-1)),
        ("/sequences/0/0/tokens", json!(["1"])),
        ("/sequences/0/0/finish_reason", json!("ended")),
        ("/sequences/0", json!({})),
    ] {
        let mut wrong = result.clone();
        *wrong.pointer_mut(pointer).expect("it is there") = value;
        assert!(!conforms(&wrong, &response, &response), "{wrong}");
    }
}

#[test]
fn requests_are_written_as_they_are_read() {
    let generate = json!({"id": 5, "text": ["a", "b"], "attention_mask": [[1], [0]], "options": {"num_beams": 2}});
    assert_eq!(again::<GenerateRequest>(&generate.to_string()), generate.to_string());
    let score = json!({"id": "x", "input_ids": [5, 6], "target_ids": [[7]], "decoder_text": "a"});
    assert_eq!(again::<ScoreRequest>(&score.to_string()), score.to_string());
    let refused = serde_json::from_str::<ScoreRequest>("{\"text\": \"a\"}").expect_err("no target");
    assert!(refused.to_string().starts_with("expected target or target_ids, found neither"), "{refused}");
}

#[test]
fn scored_and_classified_lines_conform_to_the_schema() {
    let text = "Dr. Lee paid $3.50.";
    let requests = [
        json!({"text": text, "target": "doctor lee"}),
        json!({"id": "x", "text": [text, text], "target": ["doctor lee", "a"]}),
        json!({"input_ids": [5, 6], "target_ids": [5, 6], "decoder_input_ids": [5]}),
        json!({"text": text}),
        json!({"text": text, "target": "a", "target_ids": [5]}),
    ];
    let model = demo_as("alignment", Export::default().alignment(Alignment::AllLayers));
    let schemas = ("score-request", "score-response");
    for flags in [["score"].as_slice(), &["score", "--top-logprobs", "2", "--output-attentions"]] {
        assert_eq!(check_lines(flags, &model, &requests, schemas, again::<ScoreResponse>), 3);
    }

    let requests =
        [json!({"input_ids": [[5, 6], [7, 8]]}), json!({"id": 1, "input_ids": [5]}), json!({"input_ids": 5})];
    let schemas = ("encode-request", "classify-response");
    for task in ["sequence-decoder", "token-encoder"] {
        let checkpoint = tests().join("fixtures/tasks").join(task).join("checkpoint");
        let model = exported_from(&checkpoint, "protocol", Export::default());
        let flags = ["classify", "--jsonl", "--top-k", "all"];
        assert_eq!(check_lines(&flags, &model, &requests, schemas, again::<ClassifyResponse>), 2, "{task}");
    }
}
