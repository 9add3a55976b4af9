//! Conversations: chat templates against transformers, and `generate --chat`.

use std::fs;
use std::path::{Path, PathBuf};

use itertools::Itertools as _;
use serde_json::{Value, json};
use t5gemma_runtime::{ChatTemplate, Tokenizer};

use crate::common::{from_make, run, stdout, tests};

fn golden() -> Value {
    let text = fs::read_to_string(tests().join("fixtures/chat.json")).expect("the fixture is there");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn conversations_are_written_as_transformers_writes_them() {
    let golden = golden();
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let gemma = Tokenizer::open(&from_make("T5GEMMA_GEMMA_TOKENIZER").join("tokenizer.json")).expect("loads");
    let mut wrong = Vec::new();
    let cases = golden["cases"].as_array().expect("a list");
    for case in cases {
        let name = case["name"].as_str().expect("a name");
        let config = &golden["templates"][case["template"].as_str().expect("a name")];
        fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).expect("written");
        let template = ChatTemplate::open(folder.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let found = template.apply(case["messages"].as_array().expect("a list"));
        match (&found, case["text"].as_str()) {
            (Ok(found), Some(expected)) if found == expected => {
                let ids = gemma.encode_target(found).expect("encodes");
                if case.get("ids").is_some_and(|expected| *expected != json!(ids)) {
                    wrong.push(format!("{name}: ids {ids:?}"));
                }
            }
            // The message of a refusal is the template's where it raises one.
            (Err(error), None) if error.to_string().starts_with("messages: ") => {
                let expected = case["error"].as_str().expect("an error");
                if ["roles must", "System role"].iter().any(|raised| expected.contains(raised))
                    && !error.to_string().contains(expected)
                {
                    wrong.push(format!("{name}: {error}"));
                }
            }
            _ => wrong.push(format!("{name}: {found:?}, expected {case}")),
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn templates_cannot_end_the_process_or_take_its_memory() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let apply = |template: &str| {
        fs::write(folder.path().join("chat_template.jinja"), template).expect("written");
        let messages = [json!({"role": "user", "content": "a"})];
        ChatTemplate::open(folder.path()).and_then(|template| template.apply(&messages))
    };
    let nested = "{% set ns = namespace(a=[]) %}{% for j in range(9) %}{% for i in range(99999) %}\
                  {% set ns.a = [ns.a] %}{% endfor %}{% endfor %}";
    let doubled =
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
    let doubled_list = |read: &str| {
        format!(
            "{{% set ns = namespace(l=[1]) %}}{{% for i in range(40) %}}{{% set ns.l = ns.l + ns.l %}}{{% endfor %}}{read}"
        )
    };
    let large = |expression: &str| format!("{{% set s = 'a' * 100000 %}}{{{{ {expression} }}}}");
    for (template, expected) in [
        ("{%}".to_string(), "line 1 of the template"),
        ("{{ [1] | tojson(indent=100000000000) }}".into(), "fuel"),
        ("{{ {'a': [1]} | tojson(indent=100000000) }}".into(), "fuel"),
        ("{{ 'a' * 10000000000 }}".into(), "fuel"),
        ("{{ '%10000000000d' % 5 }}".into(), "fuel"),
        ("{{ '%*d' % (10000000000, 5) }}".into(), "fuel"),
        ("{{ '{:>10000000000}'.format('a') }}".into(), "fuel"),
        ("{{ 'a'.ljust(10000000000) }}{{ 'a'.rjust(10000000000) }}".into(), "fuel"),
        ("{{ 'a'.center(10000000000) }}".into(), "fuel"),
        ("{{ 'a' | center(10000000000) }}".into(), "fuel"),
        ("{{ '7'.zfill(10000000000) }}".into(), "fuel"),
        ("{{ 'a' | indent(10000000000, true) }}".into(), "fuel"),
        (large("s.replace('a', s)"), "fuel"),
        (large("s.join((s * 100) | list)"), "fuel"),
        (large("([s] * 100000) | join"), "fuel"),
        (large("([s] * 100000) | string"), "fuel"),
        (large("[s] * 100000"), "fuel"),
        (large("'%s' % [[s] * 100000]"), "fuel"),
        (large("([s] * 100000) | tojson"), "fuel"),
        (doubled.to_string(), "fuel"),
        (doubled_list("{{ ns.l }}"), "fuel"),
        (doubled_list("{{ ns.l | length }}"), "fuel"),
        (doubled_list("{% for x in ns.l %}{% endfor %}"), "fuel"),
        ("{% macro f(l, n) %}{% if n %}{{ f(l + l, n - 1) }}{% endif %}{% endmacro %}{{ f([1], 40) }}".into(), "fuel"),
        (nested.to_string(), "fuel"),
        ("{{ range(10000000000) | list }}".into(), "range"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(), "recursion"),
        (format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000)), "recursion"),
        ("{% macro f() %}{{ varargs | length }}{% endmacro %}{{ f() }}".into(), "varargs"),
    ] {
        let error = apply(&template).expect_err("refused").to_string();
        assert!(error.contains(expected) && error.contains("chat_template.jinja"), "{template:.80}: {error}");
    }
    assert_eq!(apply("{{ 'a' * 1000 }}").expect("rendered").len(), 1000);
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_template_and_zero_bytes_stay() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let at = |name: &str| folder.path().join(name);
    fs::write(at("tokenizer_config.json"), "\u{feff}{\"bos_token\": \"<s>\"}").expect("written");
    fs::write(at("chat_template.jinja"), "\u{feff}{{ bos_token }}\0{{ messages[0].content }}").expect("written");
    let messages = [json!({"role": "user", "content": "a\0b"})];
    let template = ChatTemplate::open(folder.path()).expect("a template");
    assert_eq!(template.apply(&messages).expect("rendered"), "<s>\0a\0b");
}

#[test]
fn a_template_may_stand_in_a_file_of_its_own() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let at = |name: &str| folder.path().join(name);
    let messages = [json!({"role": "user", "content": "hi"})];
    let error = ChatTemplate::open(folder.path()).expect_err("there is none").to_string();
    assert!(error.contains("tokenizer_config.json: chat_template: expected a template"), "{error}");

    let several = json!([{"name": "rag", "template": "no"}, {"name": "default", "template": "several"}]);
    fs::write(at("tokenizer_config.json"), json!({"chat_template": several, "bos_token": "<s>"}).to_string())
        .expect("written");
    let apply = || ChatTemplate::open(folder.path()).expect("a template").apply(&messages).expect("written");
    assert_eq!(apply(), "several");
    fs::write(at("chat_template.jinja"), "{{ bos_token }}{{ messages[0].content }}").expect("written");
    assert_eq!(apply(), "<s>hi", "the file has precedence, the special tokens are still those of the settings");
    let only = json!({"chat_template": {"default": "by name"}});
    fs::write(at("chat_template.json"), json!({"chat_template": "of a processor"}).to_string()).expect("written");
    fs::remove_file(at("chat_template.jinja")).expect("written above");
    fs::write(at("tokenizer_config.json"), only.to_string()).expect("written");
    assert_eq!(apply(), "by name");
    fs::write(at("tokenizer_config.json"), "{}").expect("written");
    assert_eq!(apply(), "of a processor");
    fs::create_dir(at("additional_chat_templates")).expect("a new folder");
    fs::write(at("additional_chat_templates/default.jinja"), "of the folder").expect("written");
    assert_eq!(apply(), "of the folder");
    fs::write(at("chat_template.jinja"), "{% if %}").expect("written");
    let error = ChatTemplate::open(folder.path()).expect_err("malformed").to_string();
    assert!(error.contains("chat_template.jinja: chat_template: ") && error.contains("line 1"), "{error}");
}

/// The demo with a template that puts its text into brackets for the system's turn.
fn demo_with(folder: &Path, template: Option<&str>) -> PathBuf {
    let (from, out) = (folder.join("checkpoint"), folder.join("model"));
    fs::create_dir(&from).expect("a new folder");
    for entry in fs::read_dir(tests().join("demo/checkpoint")).expect("the demo is there") {
        let entry = entry.expect("an entry");
        fs::write(from.join(entry.file_name()), fs::read(entry.path()).expect("readable")).expect("writable");
    }
    if let Some(template) = template {
        fs::write(from.join("chat_template.jinja"), template).expect("writable");
    }
    stdout(run("t5gemma-export", [&from, &out], ""));
    out
}

#[test]
fn generate_takes_conversations() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let template = "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% else %}{{ m.content }}{% endif %}{% endfor %}";
    let model = demo_with(folder.path(), Some(template));
    let model = model.to_str().expect("temporary paths are UTF-8");
    let plain = stdout(run("t5gemma", ["generate", model, "Room 12 is 5 km away."], ""));
    assert_eq!(stdout(run("t5gemma", ["generate", model, "--chat", "Room 12 is 5 km away."], "")), plain);
    let with_system = ["generate", model, "--chat", "--system", "Room 12", "is 5 km away."];
    assert_eq!(stdout(run("t5gemma", with_system, "")), plain);

    let user = |content: &str| json!({"role": "user", "content": content});
    let requests = [
        json!({"messages": [user("Room 12 is 5 km away.")]}),
        json!({"messages": [json!({"role": "system", "content": "Room 12"}), user("is 5 km away.")]}),
        json!({"messages": ["?"]}),
        json!({"messages": "?"}),
        json!({"messages": [user("a")], "text": "b"}),
        json!({}),
    ];
    let lines = requests.each_ref().map(Value::to_string).join("\n");
    let output = run("t5gemma", ["generate", model, "--jsonl"], &lines);
    let results: Vec<Value> =
        String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    for result in &results[..2] {
        assert_eq!(result["sequences"][0][0]["text"], plain.trim_end(), "{result}");
    }
    for (result, says) in results[2..].iter().zip_eq([
        "messages[0]: expected an object with role and content",
        "messages: expected a list of messages",
        "expected messages alone",
        "expected text, messages or input_ids",
    ]) {
        assert!(result["error"].as_str().is_some_and(|error| error.starts_with(says)), "{result}");
    }
}

#[test]
fn a_checkpoint_without_a_template_says_so() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = demo_with(folder.path(), None);
    let model = model.to_str().expect("temporary paths are UTF-8");
    for (arguments, status, says) in [
        (&["generate", model, "--chat", "text"][..], 1, "chat_template: expected a template"),
        (&["generate", model, "--system", "a", "text"], 2, "--system requires --chat"),
    ] {
        let output = run("t5gemma", arguments, "");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{error}");
        assert!(error.contains(says), "{error}");
    }
    let request = json!({"messages": [{"role": "user", "content": "a"}]}).to_string();
    let output = run("t5gemma", ["generate", model, "--jsonl"], &request);
    let result: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(result["error"].as_str().is_some_and(|error| error.contains("chat_template: expected")), "{result}");
}
