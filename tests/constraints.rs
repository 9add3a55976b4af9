//! Constrained output of the demo model, greedy and with beams: every output satisfies its constraint, checked here
//! independently of the code that enforces it.

use itertools::Itertools as _;
use regex::Regex;
use serde_json::{Map, Value, json};
use t5gemma_runtime::{
    Batch, Controls, Error, FinishReason, LogitsProcessor, Model, PrefixAllowedTokens, SpecialTokens,
};

use crate::common::{demo, run, stdout, tests};

/// Sentences of the demo, with what transformers answers without a constraint.
fn sentences(count: usize) -> Vec<(String, Value)> {
    let text = std::fs::read_to_string(tests().join("demo/expected.json")).expect("expected.json is there");
    let cases: Vec<Value> = serde_json::from_str(&text).expect("expected.json is a list");
    let of = |case: &Value| (case["text"].as_str().expect("a text").to_string(), case["greedy"].clone());
    cases.iter().take(count).map(of).collect()
}

/// The hypotheses of each sentence with some options.
fn answers(sentences: &[(String, Value)], options: &Value) -> Vec<Vec<Map<String, Value>>> {
    let requests: Vec<String> =
        sentences.iter().map(|(text, _)| json!({"text": text, "options": options}).to_string()).collect();
    let model = demo();
    let model = model.to_str().expect("temporary paths are UTF-8");
    let output = stdout(run("t5gemma", ["generate", model, "--jsonl"], requests.join("\n") + "\n"));
    output
        .lines()
        .map(|line| {
            let result: Value = serde_json::from_str(line).expect("a JSON line");
            let row = result["sequences"][0].as_array().unwrap_or_else(|| panic!("{result}"));
            row.iter().map(|hypothesis| hypothesis.as_object().expect("an object").clone()).collect()
        })
        .collect()
}

/// Runs a constraint greedily and with four beams, two of them returned, and checks every output with `is_right`.
fn check(name: &str, constraint: Value, max_new_tokens: usize, is_right: impl Fn(&str) -> bool) {
    let sentences = sentences(8);
    for (beams, returned) in [(1, 1), (4, 2)] {
        let mut options = constraint.clone();
        options["num_beams"] = beams.into();
        options["num_return_sequences"] = returned.into();
        options["max_new_tokens"] = max_new_tokens.into();
        for ((sentence, _), hypotheses) in sentences.iter().zip_eq(answers(&sentences, &options)) {
            assert!(!hypotheses.is_empty(), "{name}, {beams} beams, {sentence}");
            for hypothesis in hypotheses {
                let text = hypothesis["text"].as_str().expect("the demo has a tokenizer");
                assert_eq!(hypothesis["finish_reason"], "eos", "{name}, {beams} beams, {sentence}: {text}");
                assert!(is_right(text), "{name}, {beams} beams, {sentence}: {text}");
            }
        }
    }
}

#[test]
fn every_output_under_a_json_schema_is_json_of_it() {
    let fields = |value: &Value, names: &[&str]| {
        value.as_object().is_some_and(|object| object.keys().map(String::as_str).eq(names.iter().copied()))
    };
    let is_short = |value: &Value, most: usize| value.as_str().is_some_and(|text| text.chars().count() <= most);
    type Check<'a> = &'a dyn Fn(&Value) -> bool;
    let person = |value: &Value| {
        fields(value, &["name", "paid"])
            && is_short(&value["name"], 12)
            && value["paid"].as_i64().is_some_and(|paid| (0..=999).contains(&paid))
    };
    let list = |value: &Value| {
        value.as_array().is_some_and(|list| {
            (2..=3).contains(&list.len()) && list.iter().all(|item| ["a", "bb", "é€"].iter().any(|text| item == text))
        })
    };
    let nested = |value: &Value| {
        fields(value, &["kind", "child"])
            && ["leaf", "node"].iter().any(|kind| value["kind"] == *kind)
            && (value["child"].is_null() || fields(&value["child"], &["on"]) && value["child"]["on"].is_boolean())
    };
    let cases: [(&str, Value, Check); 3] = [
        (
            "an object",
            json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 12},
                "paid": {"type": "integer", "minimum": 0, "maximum": 999}},
                "required": ["name", "paid"], "additionalProperties": false}),
            &person,
        ),
        ("a list", json!({"type": "array", "items": {"enum": ["a", "bb", "é€"]}, "minItems": 2, "maxItems": 3}), &list),
        (
            "references",
            json!({"type": "object", "properties": {"kind": {"enum": ["leaf", "node"]},
                "child": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/switch"}]}},
                "required": ["kind", "child"], "additionalProperties": false,
                "$defs": {"switch": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
                    "additionalProperties": false}}}),
            &nested,
        ),
    ];
    for (name, schema, is_of_schema) in cases {
        let is_right = |text: &str| serde_json::from_str(text).is_ok_and(|value| is_of_schema(&value));
        check(name, json!({"json_schema": schema}), 120, is_right);
    }
}

#[test]
fn every_output_matches_its_regular_expression_as_a_whole() {
    for regex in ["[A-Z][0-9]{3}", "(doctor|professor) [a-z]{3,8}( paid)?", "[^a-z ]{2,5}", "[α-ω]{2,4}€?", "a?"] {
        let whole = Regex::new(&format!("^(?:{regex})$")).expect("an expression of both kinds");
        check(regex, json!({"regex": regex}), 40, |text| whole.is_match(text));
    }
}

#[test]
fn every_output_is_of_its_grammar() {
    let grammar = "start: who (\" and \" who)? \" \" verb\nwho: TITLE \" \" NAME\nTITLE: /doctor|professor/\n\
                   NAME: /[a-z]{2,6}/\nverb: \"paid\" | \"sold\"\n";
    let whole = Regex::new("^(doctor|professor) [a-z]{2,6}( and (doctor|professor) [a-z]{2,6})? (paid|sold)$");
    let whole = whole.expect("an expression");
    check("lark", json!({"grammar": grammar}), 60, |text| whole.is_match(text));
}

#[test]
fn only_the_allowed_sequences_come_out() {
    let allowed = ["doctor smith", "doctor smith paid", "professor lee", "nobody", "x"];
    check("texts", json!({"allowed_sequences": allowed}), 20, |text| allowed.contains(&text));

    let options = json!({"allowed_sequences": [[400], [400, 401], [402]], "num_beams": 4, "num_return_sequences": 4});
    for hypotheses in answers(&sentences(4), &options) {
        let mut tokens: Vec<String> = hypotheses.iter().map(|hypothesis| hypothesis["tokens"].to_string()).collect();
        tokens.sort();
        assert_eq!(tokens, ["[400,1]", "[400,401,1]", "[402,1]"], "each once, and no more");
    }
}

#[test]
fn required_phrases_occur_in_time() {
    let phrases = ["senator lee", "boston"];
    let has_all = |text: &str| phrases.iter().all(|phrase| text.contains(phrase));
    for max_new_tokens in [10, 12, 30, 60] {
        for num_beams in [1, 4] {
            let options =
                json!({"required_phrases": phrases, "max_new_tokens": max_new_tokens, "num_beams": num_beams});
            for hypotheses in answers(&sentences(8), &options) {
                let text = hypotheses[0]["text"].as_str().expect("the demo has a tokenizer");
                assert!(has_all(text), "{max_new_tokens} tokens, {num_beams} beams: {text}");
                assert_ne!(hypotheses[0]["finish_reason"], "constraint_incomplete", "{text}");
            }
        }
    }
}

#[test]
fn a_constraint_that_the_model_meets_by_itself_changes_nothing() {
    let sentences = sentences(30);
    for (constraint, num_beams) in [(json!({"regex": "[a-z ]*"}), 1), (json!({"required_phrases": [" "]}), 1)] {
        let mut options = constraint;
        options["max_new_tokens"] = 128.into();
        options["num_beams"] = num_beams.into();
        for ((sentence, expected), found) in sentences.iter().zip_eq(answers(&sentences, &options)) {
            assert_eq!(found[0]["tokens"], *expected, "{sentence}, {options}");
        }
    }
}

#[test]
fn what_cannot_be_completed_says_so() {
    let cases = [
        json!({"regex": "[a-z]{300}", "max_new_tokens": 10}),
        json!({"json_schema": {"type": "string", "minLength": 200}, "max_new_tokens": 10}),
        json!({"allowed_sequences": [[400, 401]], "suppress_tokens": [401]}),
        json!({"regex": "[a-z]+", "allowed_sequences": ["5"]}),
        json!({"grammar": "start: start"}),
    ];
    for mut options in cases {
        for num_beams in [1, 4] {
            options["num_beams"] = num_beams.into();
            for hypotheses in answers(&sentences(3), &options) {
                assert_eq!(hypotheses[0]["finish_reason"], "constraint_incomplete", "{options}: {hypotheses:?}");
            }
        }
    }
    let model = demo();
    let model = model.to_str().expect("temporary paths are UTF-8");
    let output = run("t5gemma", ["generate", model, "--regex", "[a-z]{300}", "--max-new-tokens", "5", "a text"], "");
    let problem = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(problem.contains("text 1: the output ended before meeting its constraint"), "{problem}");
}

#[test]
fn a_constrained_row_alone_gives_what_it_gives_in_a_batch() {
    let model = Model::open(demo()).expect("the model opens");
    let tokenizer = model.tokenizer().expect("the demo has a tokenizer");
    let sources: Vec<Vec<i64>> =
        sentences(4).iter().map(|(text, _)| tokenizer.encode(text).expect("plain text")).collect();
    for num_beams in [1, 4] {
        let schema = json!({"type": "array", "items": {"type": "integer"}, "maxItems": 4});
        let request = json!({"json_schema": schema, "num_beams": num_beams, "max_new_tokens": 40});
        let options =
            model.generation_config().with_json(request.as_object().expect("written above")).expect("valid options");
        let generate = |sources: &[Vec<i64>]| {
            let batch = Batch::padded(sources, 0).expect("valid");
            let rows = model.generate_batch(&batch, &options, Controls::default()).expect("generates");
            rows.into_iter().map(|row| row[0].tokens.clone()).collect::<Vec<_>>()
        };
        let together = generate(&sources);
        for (source, expected) in sources.iter().zip_eq(&together) {
            assert_eq!(generate(std::slice::from_ref(source)), std::slice::from_ref(expected), "{num_beams} beams");
        }
    }
}

#[test]
fn a_function_says_which_tokens_may_come_next() {
    let model = Model::open(demo()).expect("the model opens");
    let tokenizer = model.tokenizer().expect("the demo has a tokenizer");
    let words = ["doctor", "professor"].map(|word| tokenizer.encode_target(word).expect("plain text"));
    let sources = vec![tokenizer.encode("Prof. Lee sold 5 cars.").expect("plain text"); 2];
    let batch = Batch::padded(&sources, 0).expect("valid");
    for num_beams in [1, 3] {
        let request = json!({"num_beams": num_beams});
        let mut options =
            model.generation_config().with_json(request.as_object().expect("written above")).expect("valid options");
        // Row 0 may only say the first word, row 1 the second.
        let allowed = words.clone();
        options.prefix_allowed_tokens = Some(PrefixAllowedTokens::new(move |row, history| {
            vec![allowed[row].get(history.len() - 1).copied().unwrap_or(1)]
        }));
        let rows = model.generate_batch(&batch, &options, Controls::default()).expect("generates");
        for (row, word) in rows.iter().zip_eq(["doctor", "professor"]) {
            assert_eq!(tokenizer.decode(&row[0].tokens, SpecialTokens::Skip).expect("known ids"), word);
            assert_eq!(row[0].finish_reason, FinishReason::Eos);
        }
    }
}

#[test]
fn no_special_token_passes_a_constraint() {
    let cases = [
        json!({"grammar": "start: start \"a\" | \"a\""}),
        json!({"regex": "[a-z]*"}),
        json!({"regex": "[a-z]*", "required_phrases": ["e"]}),
        json!({"json_schema": {"type": "integer"}}),
    ];
    // Zero is padding, one and three may end a target.
    let biased = json!([[[0], 50.0], [[2], 40.0], [[3], 30.0]]);
    for mut options in cases {
        options["max_new_tokens"] = 8.into();
        options["sequence_bias"] = biased.clone();
        for num_beams in [1, 3] {
            options["num_beams"] = num_beams.into();
            for hypotheses in answers(&sentences(2), &options) {
                let tokens = hypotheses[0]["tokens"].as_array().expect("a list");
                let special = tokens.iter().filter(|token| token.as_i64().is_some_and(|token| token < 4 && token != 1));
                assert_eq!(special.count(), 0, "{options}: {tokens:?}");
            }
        }
    }
}

#[test]
fn functions_that_allow_nothing_or_what_does_not_exist_are_errors() {
    let model = Model::open(demo()).expect("the model opens");
    let batch = Batch::padded(&[vec![2, 300, 301], vec![2, 300, 302]], 0).expect("valid");
    for num_beams in [1, 3] {
        for (allowed, expected) in [
            (vec![], "prefix_allowed_tokens returned no token"),
            (vec![5, 1024], "prefix_allowed_tokens returned token 1024, expected token ids from 0 to 1023"),
            (vec![-1, 5], "prefix_allowed_tokens returned token -1"),
        ] {
            let request = json!({"num_beams": num_beams});
            let mut options = model
                .generation_config()
                .with_json(request.as_object().expect("written above"))
                .expect("valid options");
            options.prefix_allowed_tokens = Some(PrefixAllowedTokens::new(move |row, _| match row {
                0 => vec![5, 1],
                _ => allowed.clone(),
            }));
            let error = model.generate_batch(&batch, &options, Controls::default()).expect_err(expected).to_string();
            assert!(error.starts_with("row 1: ") && error.contains(expected), "{error}");
        }
    }
}

#[test]
fn logits_processors_that_leave_no_choice_are_errors() {
    let model = Model::open(demo()).expect("the model opens");
    let batch = Batch::padded(&[vec![2, 300, 301], vec![2, 300, 302]], 0).expect("valid");
    for num_beams in [1, 3] {
        for do_sample in [false, true] {
            for (score, expected) in [
                (f32::NAN, "logits_processor[1] wrote NaN"),
                (f32::INFINITY, "logits_processor[1] wrote +inf"),
                (f32::NEG_INFINITY, "logits_processor[1] left no token"),
            ] {
                // A row whose first drawn token ends it would not come as far as the processor.
                let request = json!({"num_beams": num_beams, "do_sample": do_sample, "min_new_tokens": 4});
                let mut options = model
                    .generation_config()
                    .with_json(request.as_object().expect("written above"))
                    .expect("valid options");
                options.logits_processor.push(LogitsProcessor::new(|_, _| ()));
                options.logits_processor.push(LogitsProcessor::new(move |place, scores| {
                    if place.history.len() == 3 && place.source[2] == 302 {
                        scores.fill(score);
                    }
                }));
                let error = model.generate_batch(&batch, &options, Controls::default()).expect_err(expected);
                assert!(matches!(error, Error::NotFinite { row: 1, step: 2, .. }), "{error:?}");
                assert!(error.to_string().contains(expected), "{error}");
            }
        }
    }
}

#[test]
fn constraints_that_cannot_be_are_refused_in_words() {
    let model = Model::open(demo()).expect("the model opens");
    let batch = Batch::padded(&[vec![2, 300, 301]], 0).expect("valid");
    let cases = [
        (json!({"regex": "[a-z"}), "regex: expected a regular expression that compiles, found"),
        (json!({"regex": "(?=a)b"}), "regex: expected a regular expression that compiles, found"),
        (json!({"json_schema": {"type": "objekt"}}), "json_schema: expected a JSON schema that compiles, found"),
        (json!({"json_schema": {"type": "integer", "multipleOf": 16_777_216}}), "takes more than 1000000 steps"),
        (
            json!({"json_schema": {"type": "integer", "multipleOf": 4_294_967_295_u32}}),
            "multipleOf 4294967295 is too large",
        ),
        (
            json!({"json_schema": {"properties": {"a": {"allOf": [{"multipleOf": 65_536}, {"multipleOf": 99_991}]}}}}),
            "common multiple is too large",
        ),
        (json!({"regex": "(".repeat(300) + "a" + &")".repeat(300)}), "nested deeper than 250"),
        (json!({"json_schema": false}), "json_schema: expected a JSON schema that compiles, found"),
        (json!({"json_schema": {"not": {}}}), "Unimplemented keys"),
        (json!({"json_schema": {"$ref": "https://example.com/x"}}), "json_schema: expected"),
        (json!({"json_schema": {"x-guidance": 5}}), "json_schema: expected"),
        (json!({"grammar": ""}), "grammar: expected a Lark grammar that compiles, found"),
        (json!({"grammar": "start: a"}), "grammar: expected a Lark grammar that compiles, found"),
        (
            json!({"allowed_sequences": ["doctor smith paid"], "max_new_tokens": 2}),
            "allowed_sequences: expected a sequence of at most 2 tokens, the maximum to generate, found",
        ),
        (
            json!({"allowed_sequences": [[400, 1, 400]]}),
            "allowed_sequences: expected end-of-sequence tokens at the end only",
        ),
        (json!({"allowed_sequences": [[1024]]}), "allowed_sequences: expected token ids below 1024"),
        (
            json!({"required_phrases": ["boston", "paris"], "max_new_tokens": 2}),
            "required_phrases: expected phrases of at most 2 tokens together, the maximum to generate, found",
        ),
        (json!({"required_phrases": [[5, 1024]]}), "required_phrases: expected token ids below 1024"),
        (json!({"required_phrases": ["<bos>"]}), "required_phrases: expected text that the model's tokens can express"),
    ];
    for (request, expected) in cases {
        let options =
            model.generation_config().with_json(request.as_object().expect("written above")).expect("well-formed");
        let refused = model.generate_batch(&batch, &options, Controls::default());
        let message = refused.map(|_| "no error".to_string()).unwrap_or_else(|error| error.to_string());
        assert!(message.contains(expected) && message.lines().count() == 1, "{request}: {message}");
    }
}
