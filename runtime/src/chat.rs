//! `ChatTemplate`: turns of a conversation as the text that an instruction-tuned checkpoint was trained on. The only user
//! of minijinja; a template is text in, text out, and knows no tokens.
//!
//! Templates are Jinja as transformers runs it: blocks trimmed, Python's methods of strings and dictionaries, `tojson` as
//! Python writes JSON, `raise_exception`, and the named special tokens as variables.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Value, ValueKind};
use minijinja::{Environment, ErrorKind, Output, State};
use serde_json::{Map, Value as Json};

use crate::error::Error;

/// A checkpoint's chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and its like, with their text.
    special_tokens: Vec<(&'static str, String)>,
    /// The file it was read from.
    path: PathBuf,
}

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The name that the environment knows the template by.
const NAME: &str = "chat_template";
/// Instructions that rendering may take: far more than any template needs, and less than a second's worth.
const FUEL: u64 = 10_000_000;
/// Who may speak; which of them a template knows, it says itself.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "model", "tool"];
/// The variables that transformers gives a template besides the messages.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl ChatTemplate {
    /// Reads the chat template of a model folder: `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`.
    ///
    /// # Errors
    /// The folder has none, or one that is not a template.
    pub fn open(folder: impl AsRef<Path>) -> Result<ChatTemplate, Error> {
        let config_path = folder.as_ref().join(TOKENIZER_CONFIG);
        let config = match config_path.exists() {
            true => read_object(&config_path)?,
            false => Map::new(),
        };
        let path = folder.as_ref().join(TEMPLATE_FILE);
        if path.exists() {
            let source = fs::read_to_string(&path).map_err(Error::file(&path))?;
            return ChatTemplate::parse(&source, &config, path);
        }
        match of_config(&config) {
            Ok(Some(source)) => ChatTemplate::parse(&source, &config, config_path),
            Ok(None) => {
                let problem = "chat_template: expected a template, here or in chat_template.jinja, found none: \
                               the checkpoint takes plain text";
                Err(Error::File { path: config_path, problem: problem.into() })
            }
            Err(problem) => Err(Error::File { path: config_path, problem }),
        }
    }

    fn parse(source: &str, config: &Map<String, Json>, path: PathBuf) -> Result<ChatTemplate, Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the delimiters are Jinja's own"));
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(as_python_writes);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |_: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, "strftime_now is not supported"))
        });
        let added = environment.add_template_owned(NAME, without_generation_tags(source));
        added
            .map_err(|error| Error::File { path: path.clone(), problem: format!("chat_template: {}", told(&error)) })?;
        let text = |value: &Json| value.as_str().or(value["content"].as_str()).map(str::to_string);
        let special_tokens = SPECIAL_TOKENS.iter().filter_map(|&name| Some((name, text(config.get(name)?)?))).collect();
        Ok(ChatTemplate { environment, special_tokens, path })
    }

    /// Writes a conversation, and the beginning of the answer to it, as the text that the model continues: to be tokenized
    /// by [`Tokenizer::encode_target`](crate::Tokenizer::encode_target), because the template writes special
    /// tokens itself. A message is an object with `role` and `content`; others of its fields are the template's.
    ///
    /// # Errors
    /// Messages that are not of this form, or that the template refuses.
    pub fn apply(&self, messages: &[Json]) -> Result<String, Error> {
        if messages.is_empty() {
            return Err(Error::input("messages", "at least one message", "none"));
        }
        let messages = messages.iter().enumerate().map(|(at, message)| checked(at, message));
        let messages: Vec<Value> = messages.collect::<Result<_, Error>>()?;
        let mut context = vec![
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(true)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        context.extend(self.special_tokens.iter().map(|(name, text)| (*name, Value::from(text.as_str()))));
        let template = self.environment.get_template(NAME).expect("added when it was read");
        let refused = |found: String| {
            let expected = format!("a conversation that the template of {} takes", self.path.display());
            Error::input("messages", expected, found)
        };
        let text = template.render(Value::from_pairs(context)).map_err(|error| refused(told(&error)))?;
        if text.contains(WHOLE) {
            return Err(refused(UNKNOWN_PARTS.into()));
        }
        Ok(text)
    }
}

/// A message of the right form, without fields that are null, which templates take for something.
fn checked(at: usize, message: &Json) -> Result<Value, Error> {
    let field = |name: &str| format!("messages[{at}]{name}");
    let shown = t5gemma_graphs::config::shown;
    let Json::Object(message) = message else {
        return Err(Error::input(field(""), "an object with role and content", shown(message)));
    };
    let message: Map<String, Json> = message.clone().into_iter().filter(|(_, value)| !value.is_null()).collect();
    let found = |name: &str| message.get(name).map_or("nothing".into(), shown);
    if !message.get("role").and_then(Json::as_str).is_some_and(|role| ROLES.contains(&role)) {
        return Err(Error::input(field(".role"), format!("one of {}", ROLES.join(", ")), found("role")));
    }
    if !message.get("content").is_some_and(|content| content.is_string() || content.is_array()) {
        return Err(Error::input(field(".content"), "text, or a list of parts", found("content")));
    }
    let read =
        |json: Json| -> Value { serde_json::from_value(json).expect("a template's values are more than JSON's") };
    let value = |(name, value)| match value {
        Json::Array(parts) if name == "content" => {
            (name, Value::from_object(Parts(parts.into_iter().map(read).collect())))
        }
        other => (name, read(other)),
    };
    Ok(Value::from_pairs(message.into_iter().map(value)))
}

/// The parts that a message's content is a list of. They can be looked at one by one, but have no text as a whole.
#[derive(Debug)]
struct Parts(Vec<Value>);

/// Stands in the output where parts were written whole, as a filter or operator may do before the formatter sees them.
/// Noncharacters, which no text has in this order.
const WHOLE: &str = "\u{fdd0}\u{fdef}\u{fdd0}\u{fdef}";
const UNKNOWN_PARTS: &str = "expected content that is text, as the template writes it whole, found parts";

impl Object for Parts {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get(key.as_usize()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.0.len())
    }

    fn render(self: &Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(WHOLE)
    }
}

fn read_object(path: &Path) -> Result<Map<String, Json>, Error> {
    let text = fs::read_to_string(path).map_err(Error::file(path))?;
    serde_json::from_str(&text)
        .map_err(|error| Error::File { path: path.to_path_buf(), problem: format!("expected a JSON object: {error}") })
}

/// `chat_template`: one template, or several by name, of which `default` is meant.
fn of_config(config: &Map<String, Json>) -> Result<Option<String>, String> {
    let several = match config.get("chat_template") {
        None | Some(Json::Null) => return Ok(None),
        Some(Json::String(template)) => return Ok(Some(template.clone())),
        Some(Json::Array(several)) => several,
        Some(other) => {
            return Err(format!("chat_template: expected text, found {}", t5gemma_graphs::config::shown(other)));
        }
    };
    let default = several.iter().find(|entry| entry["name"] == "default");
    match default.and_then(|entry| entry["template"].as_str()) {
        Some(template) => Ok(Some(template.to_string())),
        None => Err("chat_template: expected one that is named default, found none".into()),
    }
}

/// `{% generation %}` marks what an assistant says for training and writes nothing: here a condition that always holds.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        let Some(end) = tag.find("%}") else { break };
        let (tag, after) = tag.split_at(end + 2);
        let inner = &tag[2..end];
        let marks = |c: char| c == '-' || c == '+' || c.is_whitespace();
        let word = inner.trim_matches(marks);
        let tag = match word {
            "generation" => format!("{{%{}%}}", inner.replace(word, " if true ")),
            "endgeneration" => format!("{{%{}%}}", inner.replace(word, " endif ")),
            _ => tag.to_string(),
        };
        out.push_str(before);
        out.push_str(&tag);
        rest = after;
    }
    out + rest
}

/// What went wrong and in which line, without the source around it.
fn told(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    error.line().map_or(what.clone(), |line| format!("{what} (line {line} of the template)"))
}

/// Truth values and nothing are written as Python writes them. A list stands for a message's parts, which a template that
/// writes it whole does not know.
fn as_python_writes(out: &mut Output, state: &mut State, value: &Value) -> Result<(), minijinja::Error> {
    let text = match value.kind() {
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        ValueKind::None => "None",
        ValueKind::Seq | ValueKind::Map => {
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, UNKNOWN_PARTS));
        }
        _ => return minijinja::escape_formatter(out, state, value),
    };
    out.write_str(text).map_err(minijinja::Error::from)
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    kwargs.assert_all_used()?;
    let failed = |error: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string());
    let value = serde_json::to_value(value).map_err(failed)?;
    let mut out = String::new();
    write_json(&mut out, &value, indent, 0);
    Ok(Value::from_safe_string(out))
}

fn write_json(out: &mut String, value: &Json, indent: Option<usize>, depth: usize) {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    let mut entries = |open: char, close: char, entries: Vec<(Option<&String>, &Json)>| {
        out.push(open);
        for (at, (key, value)) in entries.iter().enumerate() {
            out.push_str(if at > 0 { comma } else { "" });
            line(out, depth + 1);
            if let Some(key) = key {
                out.push_str(&Json::from(key.as_str()).to_string());
                out.push_str(": ");
            }
            write_json(out, value, indent, depth + 1);
        }
        if !entries.is_empty() {
            line(out, depth);
        }
        out.push(close);
    };
    match value {
        Json::Array(list) => entries('[', ']', list.iter().map(|value| (None, value)).collect()),
        Json::Object(object) => entries('{', '}', object.iter().map(|(key, value)| (Some(key), value)).collect()),
        other => out.push_str(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let config = json!({"bos_token": "<bos>", "eos_token": {"content": "<eos>"}});
        let config = config.as_object().expect("an object");
        ChatTemplate::parse(source, config, PathBuf::from("chat_template.jinja")).expect("a template")
    }

    #[test]
    fn special_tokens_are_variables() {
        let found = template("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}{{ pad_token }}");
        assert_eq!(found.apply(&[json!({"role": "user", "content": "a"})]).expect("rendered"), "<bos>a<eos>");
    }

    #[test]
    fn malformed_conversations_are_refused_by_field() {
        let found = template("{{ raise_exception('no') if messages | length == 2 }}");
        let turn = json!({"role": "user", "content": "a"});
        for (messages, expected) in [
            (vec![], "messages: expected at least one message, found none"),
            (vec![json!("hello")], "messages[0]: expected an object with role and content, found \"hello\""),
            (
                vec![turn.clone(), json!({"role": "oracle", "content": "a"})],
                "messages[1].role: expected one of system,",
            ),
            (vec![json!({"content": "a"})], "messages[0].role: expected one of"),
            (
                vec![json!({"role": "user", "content": null})],
                "messages[0].content: expected text, or a list of parts, found nothing",
            ),
            (
                vec![turn.clone(), turn.clone()],
                "messages: expected a conversation that the template of chat_template.jinja takes, found no (line 1",
            ),
        ] {
            let error = found.apply(&messages).expect_err(expected).to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        let error = template(endless).apply(&[json!({"role": "user", "content": "a"})]).expect_err("stopped");
        assert!(error.to_string().contains("fuel"), "{error}");
    }

    #[test]
    fn only_generation_tags_are_rewritten() {
        for (source, expected) in [
            ("a{%- generation -%}b{% endgeneration %}", "a{%- if true -%}b{%  endif  %}"),
            ("{% if x %}{{ generation }}{% endif %}", "{% if x %}{{ generation }}{% endif %}"),
            ("{% broken", "{% broken"),
        ] {
            let squeezed = |text: &str| text.replace(' ', "");
            assert_eq!(squeezed(&without_generation_tags(source)), squeezed(expected), "{source}");
        }
    }
}
