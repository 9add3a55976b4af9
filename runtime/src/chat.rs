//! `ChatTemplate`: renders a conversation as the text that an instruction-tuned checkpoint was trained on. The only
//! user of minijinja; text in, text out, no tokens.
//!
//! Templates are Jinja as transformers runs it: trimmed blocks, Python's methods of strings and dictionaries, `tojson`
//! with Python's formatting, `raise_exception`, and the named special tokens as variables.

mod json;
mod python;
mod source;

use std::path::{Path, PathBuf};
use std::thread;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, Value};
use minijinja::{Environment, ErrorKind};
use minijinja_contrib::{filters, globals};
use serde_json::{Map, Value as Json};

use crate::error::Error;
use crate::panics;
use crate::tokenizer::{Settings, read_text};

/// A checkpoint's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The names and texts of the named special tokens, such as `bos_token`.
    special_tokens: Vec<(String, String)>,
    /// The file it was read from.
    path: PathBuf,
}

const TEMPLATE_FILE: &str = "chat_template.jinja";
/// A folder of further templates by name; the unnamed one may be in it as `default`.
const MORE_TEMPLATES: &str = "additional_chat_templates";
/// Where transformers' processors of multimodal models keep it.
const PROCESSOR_FILE: &str = "chat_template.json";
/// The name of the template in the environment, and that of the library in errors.
const NAME: &str = "chat_template";
const LIBRARY: &str = "minijinja";
/// Maximum number of instructions of a rendering, each worth [`python::BYTES`] bytes of text: far more than any
/// template needs, and less than a second of work.
const FUEL: u64 = 2_000_000;
/// The stack for rendering: nested values are dropped, compared and written recursively, as deep as the fuel allows.
/// Untouched pages cost nothing.
const STACK: usize = 512 << 20;
/// Names of a message's reasoning; transformers passes it to templates by the first two.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

impl ChatTemplate {
    /// Reads the chat template of a model folder as transformers does: from `chat_template.jinja`, else from
    /// `chat_template` in `tokenizer_config.json`, else from `chat_template.json`.
    ///
    /// # Errors
    /// The folder has none, or one that cannot be parsed.
    pub fn open(folder: impl AsRef<Path>) -> Result<ChatTemplate, Error> {
        let folder = folder.as_ref();
        let at = |name: &str| folder.join(name);
        let settings = Settings::read(folder).map_err(|(file, problem)| Error::File { path: at(&file), problem })?;
        let config_path = at(Settings::FILE);
        let more = at(MORE_TEMPLATES);
        for path in [at(TEMPLATE_FILE), more.join("default.jinja")] {
            if path.exists() {
                let source = read_text(&path).map_err(|problem| Error::File { path: path.clone(), problem })?;
                return ChatTemplate::parse(&source, &settings, path);
            }
        }
        if more.is_dir() {
            let problem = "expected default.jinja here, or chat_template.jinja in the folder above, found neither";
            return Err(Error::File { path: more, problem: problem.into() });
        }
        for path in [config_path.clone(), at(PROCESSOR_FILE)] {
            if !path.exists() {
                continue;
            }
            let wrong = |problem: String| Error::File { path: path.clone(), problem };
            let text = read_text(&path).map_err(wrong)?;
            let fields =
                serde_json::from_str(&text).map_err(|error| wrong(format!("expected a JSON object: {error}")))?;
            if let Some(source) = of_config(&fields).map_err(wrong)? {
                return ChatTemplate::parse(&source, &settings, path);
            }
        }
        let problem = "chat_template: expected a template here or in chat_template.jinja, found none (the checkpoint \
                       takes plain text)";
        Err(Error::File { path: config_path, problem: problem.into() })
    }

    fn parse(source: &str, settings: &Settings, path: PathBuf) -> Result<ChatTemplate, Error> {
        let wrong = |problem: String| Error::File { path: path.clone(), problem: format!("chat_template: {problem}") };
        let source = source::prepared(source).map_err(wrong)?;
        let parsed = on_large_stack(|| panics::catch(LIBRARY, || environment(source)).flatten()).flatten();
        let named = settings.named.iter();
        let special_tokens = named.map(|(name, token)| (name.clone(), token.content.clone())).collect();
        Ok(ChatTemplate { environment: parsed.map_err(wrong)?, special_tokens, path })
    }

    /// Renders a conversation and the beginning of the answer as the text that the model continues. Tokenize it with
    /// [`Tokenizer::encode_target`](crate::Tokenizer::encode_target), because the template writes special tokens
    /// itself. A message is an object with the fields that the template uses, usually `role` and `content`; fields that
    /// are null are dropped.
    ///
    /// # Errors
    /// No messages, messages that are not objects, or messages that the template rejects.
    pub fn apply(&self, messages: &[Json]) -> Result<String, Error> {
        if messages.is_empty() {
            return Err(Error::input("messages", "at least one message", "none"));
        }
        let messages = messages.iter().enumerate().map(|(at, message)| message_of(at, message));
        let messages: Vec<Value> = messages.collect::<Result<_, Error>>()?;
        let mut context = vec![
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(true)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        context.extend(self.special_tokens.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str()))));
        let template = self.environment.get_template(NAME).expect("`environment` adds it");
        let render = || template.render(Value::from_pairs(context)).map_err(|error| described(&error));
        on_large_stack(|| panics::catch(LIBRARY, render).flatten()).flatten().map_err(|found| {
            let expected = format!("a conversation that the template in {} accepts", self.path.display());
            Error::input("messages", expected, found)
        })
    }
}

/// Runs `work` on a thread with a stack of [`STACK`] bytes.
fn on_large_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, String> {
    thread::scope(|scope| {
        let started = thread::Builder::new().name("t5gemma-chat".into()).stack_size(STACK).spawn_scoped(scope, work);
        let started = started.map_err(|error| format!("cannot start a thread to render it: {error}"))?;
        started.join().map_err(|_| "rendering ended without a result".to_string())
    })
}

/// The environment that renders a template.
fn environment(source: String) -> Result<Environment<'static>, String> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the delimiters are Jinja's own"));
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(python::method);
    environment.set_formatter(python::written);
    environment.add_filter("tojson", json::to_json);
    environment.add_filter(source::PERCENT, python::percent);
    environment.add_filter(source::ADDED, python::added);
    environment.add_filter("center", python::center);
    environment.add_filter("join", python::join);
    environment.add_filter("string", python::string);
    environment.add_filter("pprint", python::pprint);
    environment.add_filter("truncate", filters::truncate);
    environment.add_filter("striptags", filters::striptags);
    environment.add_filter("filesizeformat", filters::filesizeformat);
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", python::strftime_now);
    // Jinja's take their items as arguments, those of minijinja-contrib as a list.
    environment.add_function("cycler", |items: Rest<Value>| globals::cycler(items.0));
    environment
        .add_function("joiner", |mark: Option<Value>| globals::joiner(Some(mark.unwrap_or_else(|| ", ".into()))));
    environment.add_template_owned(NAME, source).map_err(|error| described(&error))?;
    Ok(environment)
}

/// A message as transformers passes it to templates: without fields that are null, which templates would treat as
/// given, and with its reasoning under the names that templates use.
fn message_of(at: usize, message: &Json) -> Result<Value, Error> {
    let Json::Object(message) = message else {
        let found = t5gemma_graphs::json::shown(message);
        return Err(Error::input(format!("messages[{at}]"), "an object with role and content", found));
    };
    let mut message: Map<String, Json> = message.clone().into_iter().filter(|(_, value)| !value.is_null()).collect();
    if let Some(reasoning) = REASONING.iter().find_map(|name| message.get(*name)).cloned() {
        // The order of fields matters to templates that print a whole message.
        let first = Map::from_iter([(REASONING[1].to_string(), reasoning.clone())]);
        message = first.into_iter().chain(message).collect();
        message.insert(REASONING[0].into(), reasoning);
    }
    Ok(serde_json::from_value(Json::Object(message)).expect("every JSON value is a template value"))
}

/// `chat_template`: one template, or several by name, of which `default` is used.
fn of_config(config: &Map<String, Json>) -> Result<Option<String>, String> {
    let shown = t5gemma_graphs::json::shown;
    let default = match config.get("chat_template") {
        None | Some(Json::Null) => return Ok(None),
        Some(Json::String(template)) => return Ok(Some(template.clone())),
        Some(Json::Array(several)) => {
            several.iter().rfind(|entry| entry["name"] == "default").map(|entry| &entry["template"])
        }
        Some(Json::Object(several)) => several.get("default"),
        Some(other) => return Err(format!("chat_template: expected text, found {}", shown(other))),
    };
    match default {
        Some(Json::String(template)) => Ok(Some(template.clone())),
        Some(other) => Err(format!("chat_template: default: expected text, found {}", shown(other))),
        None => Err("chat_template: expected a template named default, found none".into()),
    }
}

/// The problem and its line, without the source around it.
fn described(error: &minijinja::Error) -> String {
    let what = match error.kind() {
        ErrorKind::OutOfFuel => format!(
            "one that takes more than {FUEL} units of fuel (one per step, and one per {} bytes of text)",
            python::BYTES
        ),
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_string),
    };
    error.line().map_or(what.clone(), |line| format!("{what} (line {line} of the template)"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokenizers::AddedToken;

    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let token = |name: &str, text: &str| (name.to_string(), AddedToken::from(text, true));
        let named = vec![token("bos_token", "<bos>"), token("eos_token", "<eos>")];
        let settings = Settings { named, ..Settings::default() };
        ChatTemplate::parse(source, &settings, PathBuf::from("chat_template.jinja")).expect("a template")
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
                vec![turn.clone(), turn.clone()],
                "messages: expected a conversation that the template in chat_template.jinja accepts, found no (line 1",
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
}
