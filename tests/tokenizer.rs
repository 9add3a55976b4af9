//! The real Gemma 2 tokenizer, which `make test` fetches: it loads, gives the ids that Python's `tokenizers` gives, and its
//! ids become the text again.

use serde_json::Value;
use t5gemma_runtime::{SpecialTokens, Tokenizer};

use crate::common::{from_make, python, tests};

/// Rows of Gemma 2's embedding table.
const VOCAB_SIZE: i64 = 256_000;

#[test]
fn gemmas_tokenizer_gives_pythons_ids_and_round_trips() {
    let path = from_make("T5GEMMA_GEMMA_TOKENIZER").join("tokenizer.json");
    let texts = tests().join("fixtures/multilingual.jsonl");
    let tokenizer = Tokenizer::open(&path).expect("the tokenizer loads");
    let expected = python("tokenizer_ids.py", [&path, &texts]);
    let lines = std::fs::read_to_string(&texts).expect("the texts are there");
    let mut compared = 0;
    for (line, expected) in lines.lines().zip(expected.lines()) {
        let (case, expected): (Value, Value) =
            (serde_json::from_str(line).expect("JSON"), serde_json::from_str(expected).expect("JSON"));
        let (name, text) = (&case["name"], case["text"].as_str().expect("a text"));
        let expected_text = expected["decoded"].as_str().expect("a text");
        let expected: Vec<i64> = serde_json::from_value(expected["ids"].clone()).expect("a list of ids");

        let ids = tokenizer.encode(text).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(ids, expected, "{name}");
        assert!(ids.iter().all(|id| (0..VOCAB_SIZE).contains(id)), "{name}: {ids:?}");
        let decoded = tokenizer.decode(&ids, SpecialTokens::Skip).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(decoded, expected_text, "{name}");
        // All of a text comes back, special tokens written in it too; but Gemma's mark for a space becomes a space.
        let after_bos =
            tokenizer.decode(&ids[1..], SpecialTokens::Keep).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(after_bos, text.replace('▁', " "), "{name}");

        let mut stream = tokenizer.stream(SpecialTokens::Skip);
        let mut streamed = String::new();
        for id in ids {
            streamed += &stream.push(id).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        streamed += &stream.finish().unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(streamed, decoded, "{name}: streamed");
        compared += 1;
    }
    assert_eq!(compared, lines.lines().count());
    assert!(compared >= 60);
}
