//! The real Gemma 2 tokenizer, which `make test` fetches: it loads, gives the same ids as Python's `tokenizers`, and
//! decodes them back to the text.

use std::fs;
use std::path::Path;

use itertools::Itertools as _;
use serde_json::{Map, Value, json};
use t5gemma_runtime::{ChatTemplate, Shortlist, SpecialTokens, Tokenizer};

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
    for (line, expected) in lines.lines().zip_eq(expected.lines()) {
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
        // The whole text round-trips, including special tokens written in it; only Gemma's space marker becomes a
        // space.
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

fn settings() -> Value {
    let text = fs::read_to_string(tests().join("fixtures/tokenizer_settings.json")).expect("the fixture is there");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn files_beside_a_tokenizer_say_what_they_say_to_transformers() {
    let golden = settings();
    let mut wrong = Vec::new();
    for case in golden["cases"].as_array().expect("a list") {
        let name = case["name"].as_str().expect("a name");
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let write =
            |file: &str, content: &Value| fs::write(folder.path().join(file), content.to_string()).expect("written");
        write("tokenizer.json", &golden["tokenizer"]);
        write("config.json", &json!({"model_type": "t5gemma"}));
        case["files"].as_object().expect("files").iter().for_each(|(file, content)| write(file, content));
        let tokenizer =
            Tokenizer::open(&folder.path().join("tokenizer.json")).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (at, text) in golden["texts"].as_array().expect("a list").iter().enumerate() {
            let text = text.as_str().expect("a text");
            let ids = tokenizer.encode(text).expect("encodes");
            if json!(ids) != case["ids"][at] {
                wrong.push(format!("{name}: {text}: {ids:?}, expected {}", case["ids"][at]));
            }
            let decoded = tokenizer.decode(&ids, SpecialTokens::Skip).expect("decodes");
            if decoded != case["decoded"][at] {
                wrong.push(format!("{name}: {text}: {decoded:?}, expected {}", case["decoded"][at]));
            }
        }
        // The special tokens that a template sees.
        let special: &Map<String, Value> = case["special"].as_object().expect("names");
        let names = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
        let all = names.into_iter().chain(special.keys().map(String::as_str)).chain(["turn_token", "sot_token"]);
        for token in all {
            fs::write(folder.path().join("chat_template.jinja"), format!("{{{{ {token} }}}}")).expect("written");
            let template = ChatTemplate::open(folder.path()).expect("a template");
            let found = template.apply(&[json!({"role": "user", "content": ""})]).expect("renders");
            if found != special.get(token).and_then(Value::as_str).unwrap_or("") {
                wrong.push(format!("{name}: {token}: {found:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn tokenizers_that_their_library_cannot_take_are_errors() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let path = folder.path().join("tokenizer.json");
    let open = |change: &dyn Fn(&mut Value)| {
        let mut tokenizer = settings()["tokenizer"].clone();
        change(&mut tokenizer);
        fs::write(&path, tokenizer.to_string()).expect("written");
        Tokenizer::open(&path)
    };
    let prefixed = open(&|it| it["model"]["continuing_subword_prefix"] = "######".into());
    let error = prefixed.expect_err("refused").to_string();
    assert!(error.contains("tokenizer.json: the library tokenizers panicked"), "{error}");

    let without = open(&|it| it["post_processor"]["special_tokens"] = json!({})).expect("opens");
    let error = without.encode("a").expect_err("panics").to_string();
    assert!(error.starts_with("text: expected") && error.contains("panicked"), "{error}");
    assert_eq!(without.encode_target("a").expect("the next call goes on"), [5]);

    let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 1});
    let stripped =
        open(&|it| it["decoder"]["decoders"].as_array_mut().expect("a list").push(strip.clone())).expect("opens");
    let error = stripped.decode(&[], SpecialTokens::Skip).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(error.is_empty() || error.contains("panicked"), "{error}");
    assert_eq!(stripped.decode(&[8, 5, 8], SpecialTokens::Skip).expect("the next call goes on"), "a");
    let cleaned = json!({"clean_up_tokenization_spaces": true});
    fs::write(folder.path().join("tokenizer_config.json"), cleaned.to_string()).expect("written");
    open(&|_| ()).expect("not of BPE");
    let words = json!({"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"});
    let error = open(&|it| it["model"] = words.clone()).expect_err("refused").to_string();
    assert!(error.contains("tokenizer_config.json: clean_up_tokenization_spaces: expected false"), "{error}");
}

#[test]
fn an_id_may_be_any_number_without_a_table_of_that_size() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer = settings()["tokenizer"].clone();
    tokenizer["model"]["vocab"]["zzz"] = 4_294_967_295_u32.into();
    fs::write(&path, tokenizer.to_string()).expect("written");
    let tokenizer = Tokenizer::open(&path).expect("opens");
    let mut shortlist = Shortlist::new(&tokenizer).expect("tokens have texts");
    shortlist.add("a b").expect("plain text");
    // Special tokens, single characters, and counted tokens.
    assert_eq!(shortlist.tokens(1, None).last(), Some(&17));
}

#[test]
fn a_byte_order_mark_and_zero_bytes_are_no_trouble() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let at = |name: &str| folder.path().join(name);
    let write = |name: &str, text: &str| fs::write(at(name), format!("\u{feff}{text}")).expect("written");
    write("tokenizer.json", &settings()["tokenizer"].to_string());
    write("tokenizer_config.json", "{\"extra_special_tokens\": [\"a\\u0000\"]}");
    let tokenizer = Tokenizer::open(&at("tokenizer.json")).expect("opens");
    assert_eq!(tokenizer.encode_target("ba\0b").expect("encodes"), [6, 19, 6]);
    assert_eq!(tokenizer.decode(&[6, 19], SpecialTokens::Keep).expect("decodes"), "ba\0");
}

#[test]
fn a_folder_with_sentencepiece_alone_says_what_to_do() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let error = |path: &Path| Tokenizer::open(path).expect_err("there is none").to_string();
    let path = folder.path().join("tokenizer.json");
    assert!(!error(&path).contains("tokenizer.model"), "{}", error(&path));
    fs::write(folder.path().join("tokenizer.model"), "\n").expect("written");
    assert!(
        error(&path).contains("only tokenizer.model") && error(&path).contains("save_pretrained"),
        "{}",
        error(&path)
    );
}
