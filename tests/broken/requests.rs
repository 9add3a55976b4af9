//! Invalid lines among valid requests: each gets its error in its place, and the others are unaffected.

use serde_json::{Value, json};

use crate::common::{demo, exported, run};

/// A line and its expected error; empty for a valid line.
type Line = (Vec<u8>, &'static [&'static str]);

const IDS: &str = "expected integers in a list or a list of lists";
const VOCABULARY: &str = "expected a token id below 200, the size of the vocabulary";

fn lines() -> Vec<Line> {
    let good = || json!({"input_ids": [5, 6, 7], "options": {"max_new_tokens": 3}});
    let with = |changes: Value| {
        let mut request = good();
        let fields = changes.as_object().expect("an object").clone();
        request.as_object_mut().expect("an object").extend(fields);
        request
    };
    let options = |options: Value| with(json!({"options": options}));
    let ids = |ids: Value| with(json!({"input_ids": ids}));
    let mask = |ids: Value, mask: Value| with(json!({"input_ids": ids, "attention_mask": mask}));
    let prompt = |prompt: Value| with(json!({"decoder_input_ids": prompt}));
    let requests: Vec<(Value, &'static [&'static str])> = vec![
        (good(), &[]),
        // The document.
        (json!([1, 2]), &["expected a JSON object, found [1,2]"]),
        (json!("text"), &["expected a JSON object, found \"text\""]),
        (json!({}), &["expected text, messages or input_ids, found none of them"]),
        (json!({"id": "both", "text": "a", "input_ids": [5]}), &["expected text or input_ids, found both"]),
        (with(json!({"max_new_tokens": 3})), &["expected only the fields id, text", "found \"max_new_tokens\""]),
        (with(json!({"x".repeat(5000): 3})), &["expected only the fields id, text", "…"]),
        (with(json!({"id": [1]})), &["id: expected a string or a number, found [1]"]),
        (with(json!({"id": {"a": "b".repeat(5000)}})), &["id: expected a string or a number, found {", "…"]),
        (good(), &[]),
        // Sources.
        (json!({"text": 5}), &["text: expected a string or a list of strings, found 5"]),
        (json!({"text": "a"}), &["tokenizer.json: no such file: the model takes and returns token ids"]),
        (ids(json!(5)), &["input_ids: ", IDS, "found 5"]),
        (ids(json!([])), &["input_ids[0]: expected at least one token that is not padding, found none"]),
        (ids(json!([[]])), &["input_ids[0]: expected at least one token that is not padding, found none"]),
        (ids(json!([[5], []])), &["input_ids[1]: expected at least one token that is not padding, found none"]),
        (ids(json!([[5], 6])), &["input_ids: ", IDS, "found [[5],6]"]),
        (ids(json!([[[5]]])), &["input_ids: ", IDS, "found [[[5]]]"]),
        (ids(json!(["5"])), &["input_ids: ", IDS, "found [\"5\"]"]),
        (ids(json!([5, 6.5])), &["input_ids: ", IDS, "found [5,6.5]"]),
        (ids(json!([5, 1e30])), &["input_ids: ", IDS, "found [5,1e+30]"]),
        (ids(json!([5, -1])), &["input_ids[0][1]: ", VOCABULARY, "found -1"]),
        (ids(json!([[5, 6], [7, 200]])), &["input_ids[1][1]: ", VOCABULARY, "found 200"]),
        (ids(json!([i64::MAX])), &["input_ids[0][0]: ", VOCABULARY, "found 9223372036854775807"]),
        (ids(json!([u64::MAX])), &["input_ids: ", IDS, "found [18446744073709551615]"]),
        (ids(json!(vec![5; 513])), &["input_ids: expected at most 512 tokens a row", "found 513 tokens"]),
        (ids(json!(vec![5; 300_000])), &["input_ids: expected at most 512 tokens a row", "found 300000 tokens"]),
        (good(), &[]),
        // Masks.
        (mask(json!([5, 6]), json!([1])), &["attention_mask[0]: expected 2 entries", "found 1 entries"]),
        (mask(json!([5, 6]), json!([[1, 1], [1, 1]])), &["attention_mask: expected 1 rows", "found 2 rows"]),
        (mask(json!([[5, 6], [7, 8]]), json!([[1, 1], [1]])), &["attention_mask[1]: expected 2 entries"]),
        (
            mask(json!([[5, 6], [7, 8]]), json!([[1, 1], [0, 0]])),
            &["input_ids[1]: expected at least one token that is not padding, found none"],
        ),
        (mask(json!([5, 6]), json!([1, 0.5])), &["attention_mask: ", IDS, "found [1,0.5]"]),
        (mask(json!([5, 6]), json!([true, true])), &["attention_mask: ", IDS, "found [true,true]"]),
        (mask(json!([5, 6]), json!([])), &["attention_mask[0]: expected 2 entries", "found 0 entries"]),
        (good(), &[]),
        // Decoder prompts.
        (prompt(json!([[2], [2]])), &["decoder_input_ids: expected 1 rows", "found 2 rows"]),
        (prompt(json!([2, 200])), &["decoder_input_ids[0][1]: ", VOCABULARY, "found 200"]),
        (prompt(json!([-1])), &["decoder_input_ids[0][0]: ", VOCABULARY, "found -1"]),
        (prompt(json!("2")), &["decoder_input_ids: ", IDS, "found \"2\""]),
        (
            prompt(json!(vec![2; 600])),
            &["options.max_new_tokens: expected at most 512 target tokens", "600 are the prompt"],
        ),
        (
            with(json!({"input_ids": [[5], [6]], "decoder_input_ids": [[2, 5], [2]]})),
            &["decoder_input_ids[1]: expected 2 entries", "found 1 entries"],
        ),
        (good(), &[]),
        // Options.
        (options(json!([])), &["options: expected an object of generation options, found []"]),
        (options(json!({"beams": 3})), &["beams: unknown generation option"]),
        (options(json!({"do_sample": 1})), &["do_sample: expected true or false, found 1"]),
        (options(json!({"temperature": 0.5})), &["options.temperature requires do_sample true (got false)"]),
        (
            options(json!({"do_sample": true, "temperature": 0})),
            &["temperature: expected a positive number", "found 0"],
        ),
        (options(json!({"do_sample": true, "seed": -1})), &["seed: expected an integer below 2^64, found -1"]),
        (options(json!({"stop_strings": [7]})), &["stop_strings: expected a non-empty string or a list"]),
        (options(json!({"stop_strings": ["a"]})), &["tokenizer.json: no such file"]),
        (with(json!({"input_ids": [5], "decoder_text": "a"})), &["tokenizer.json: no such file"]),
        (with(json!({"input_ids": [5], "decoder_text": "a", "decoder_input_ids": [2]})), &["found both"]),
        (options(json!({"num_beams": "4"})), &["num_beams: expected an integer of at least 1, found \"4\""]),
        (options(json!({"num_beams": 0})), &["num_beams: expected an integer of at least 1, found 0"]),
        (options(json!({"num_beams": 1e9})), &["num_beams: expected an integer from 1 to 256"]),
        (
            options(json!({"num_beams": 2, "num_return_sequences": 3})),
            &["options.num_return_sequences requires num_beams of at least 3 (got num_beams 2)"],
        ),
        (options(json!({"max_new_tokens": 0})), &["max_new_tokens: expected an integer of at least 1, found 0"]),
        (
            options(json!({"max_new_tokens": 512})),
            &["options.max_new_tokens: expected at most 512 target tokens", "found 513"],
        ),
        (options(json!({"max_new_tokens": u64::MAX})), &["options.max_new_tokens: expected at most 512 target tokens"]),
        (options(json!({"eos_token_id": 200})), &["eos_token_id: expected token ids below 200", "found 200"]),
        (options(json!({"bad_words_ids": [[]]})), &["bad_words_ids: expected a list of non-empty lists of token ids"]),
        (options(json!({"sequence_bias": [[[5], 1e300]]})), &["sequence_bias: expected a list of"]),
        (options(json!({"length_penalty": 2})), &["options.length_penalty requires num_beams above 1 (got 1)"]),
        // Options that make no sense but are no errors.
        (options(json!({"num_beams": 250, "max_new_tokens": 2})), &[]),
        (options(json!({"suppress_tokens": (0..200).collect::<Vec<_>>(), "max_new_tokens": 2})), &[]),
        (options(json!({"suppress_tokens": (0..200).collect::<Vec<_>>(), "num_beams": 3, "max_new_tokens": 2})), &[]),
        (options(json!({"min_new_tokens": 9_007_199_254_740_992_u64, "max_new_tokens": 2})), &[]),
        (options(json!({"exponential_decay_length_penalty": [0, 1e308], "max_new_tokens": 2})), &[]),
        (
            options(json!({"length_penalty": -1e308, "num_beams": 2, "max_new_tokens": 2})),
            &["length_penalty: expected a number from -10 to 10"],
        ),
        (good(), &[]),
    ];
    let mut lines: Vec<Line> =
        requests.into_iter().map(|(request, says)| (request.to_string().into_bytes(), says)).collect();
    let good = good().to_string();
    lines.extend([
        ("not JSON".into(), ["expected JSON: column 2: expected ident, found `o`"].as_slice()),
        ("{\"input_ids\": [5".into(), &["expected JSON: column 16: EOF while parsing a list"]),
        (format!("{good}{good}").into(), &["expected JSON: column ", "trailing characters, found `{`"]),
        ("[".repeat(100_000).into(), &["expected JSON: column 128: ", "nested more than 127 deep"]),
        (format!("{{\"input_ids\": {}", "[".repeat(100_000)).into(), &["nested more than 127 deep"]),
        (b"{\"text\": \"\xff\xfe\"}".to_vec(), &["expected UTF-8, found the byte 0xff at byte 11"]),
        (b"\xff".to_vec(), &["expected UTF-8, found the byte 0xff at byte 1"]),
        (b"{\"text\": \"\\ud800\"}".to_vec(), &["expected JSON: column 17: unexpected end of hex escape"]),
        (b"\0\0\0\0".to_vec(), &["expected JSON: column 1: expected value, found `\\0`"]),
        ("{\"input_ids\": [5], \"input_ids\": [6]}".into(), &["the field \"input_ids\" stands twice"]),
        ("{\"input_ids\": [5], \"options\": {\"seed\": 1, \"seed\": 2}}".into(), &["the field \"seed\" stands twice"]),
        ("{\"input_ids\": [1e999]}".into(), &["expected JSON: ", "number out of range"]),
        (
            "{\"id\": 123456789012345678901234567890, \"input_ids\": [5]}".into(),
            &["id: expected a number of fewer digits"],
        ),
        ("{\"id\": true, \"input_ids\": [5]}".into(), &["id: expected a string or a number, found true"]),
        ("\u{feff}{\"input_ids\": [5]}".into(), &["expected value, found a byte-order mark"]),
        (
            format!("{{\"text\": \"{}\"}}", "a".repeat(10_000_000)).into(),
            &["text: expected at most 512 tokens, found 10000000 bytes"],
        ),
        (format!("{good}\r").into(), &[]),
        (format!("  {good}\t").into(), &[]),
    ]);
    lines
}

#[test]
fn every_line_is_answered_in_its_place() {
    let lines = lines();
    let stdin = lines.iter().map(|(line, _)| line.as_slice()).collect::<Vec<_>>().join(&b'\n');
    let model = exported("tiny-untied");
    let (mut failed, mut answers) = (Vec::new(), Vec::new());
    for batch_size in ["1", "8"] {
        let arguments = ["generate", model.to_str().expect("UTF-8"), "--jsonl", "--batch-size", batch_size];
        let output = run("t5gemma", arguments, &stdin);
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        let out = String::from_utf8(output.stdout).expect("UTF-8");
        let results: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(results.len(), lines.len());
        for (number, ((line, says), result)) in lines.iter().zip(&results).enumerate() {
            let error = result["error"].as_str().unwrap_or_default();
            let as_expected = match says.is_empty() {
                true => result["sequences"][0].is_array(),
                false => {
                    says.iter().all(|says| error.contains(says))
                        && error.len() < 400
                        && result.get("sequences").is_none()
                }
            };
            if !as_expected || (result["id"] != number && result["id"] != "both") {
                let shown = String::from_utf8_lossy(&line[..line.len().min(200)]).into_owned();
                failed.push(format!("line {number}: {shown}\n  expected {says:?}\n  found {result}"));
            }
        }
        answers.push(results);
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    let tokens = |results: &[Value]| {
        results.iter().map(|result| result["sequences"][0][0]["tokens"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(tokens(&answers[0]), tokens(&answers[1]));
}

#[test]
fn blank_lines_are_passed_over_and_counted() {
    let model = exported("tiny-untied");
    let stdin = b"\n{\"input_ids\": [5]}\n\n  \t\r\n{\"input_ids\": [6]}\r\n\n";
    let output = run("t5gemma", ["generate", model.to_str().expect("UTF-8"), "--jsonl"], stdin);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let out = String::from_utf8(output.stdout).expect("UTF-8");
    let ids: Vec<Value> =
        out.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")["id"].clone()).collect();
    assert_eq!(ids, [1, 4]);
}

#[test]
fn a_text_that_is_not_utf_8_leaves_its_line_empty() {
    let model = demo();
    let output =
        run("t5gemma", ["generate", model.to_str().expect("UTF-8")], b"It is 3:05 pm.\n\xff\xfe\nIt is 3:05 pm.\r\n");
    assert_eq!(output.status.code(), Some(1));
    let out = String::from_utf8(output.stdout).expect("UTF-8");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!((lines.len(), lines[1]), (3, ""), "{out}");
    assert_eq!(lines[0], lines[2]);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(err, "t5gemma: text 2: expected UTF-8, found the byte 0xff at byte 1\n");
}

#[test]
fn encode_leaves_out_what_it_cannot_encode() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let out = folder.path().join("states.safetensors");
    let model = exported("tiny-untied");
    let arguments = ["encode", model.to_str().expect("UTF-8"), "--jsonl", "--output", out.to_str().expect("UTF-8")];
    let stdin = b"{\"input_ids\": [5]}\n\n\xff\n{\"input_ids\": [900]}\n{\"id\": \"last\", \"input_ids\": [5, 6]}\n";
    let output = run("t5gemma", arguments, stdin);
    assert_eq!(output.status.code(), Some(1));
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(err.lines().count(), 2, "{err}");
    assert!(err.contains("t5gemma: request 2: expected UTF-8") && err.contains("request 3: input_ids[0][0]"), "{err}");
    let bytes = std::fs::read(&out).expect("written");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let mut names = tensors.names();
    names.sort();
    let parts = ["attention_mask", "input_ids", "last_hidden_state"];
    assert_eq!(names, ["0", "last"].map(|id| parts.map(|part| format!("{id}.{part}"))).as_flattened());
    super::holds(folder.path(), &["states.safetensors"]).unwrap_or_else(|wrong| panic!("{wrong}"));
}
