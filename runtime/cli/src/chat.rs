//! Conversations as sources: a model's chat template beside its tokenizer, read when the first conversation comes.

use std::path::Path;
use std::sync::OnceLock;

use anyhow::Result;
use serde_json::{Value, json};
use t5gemma_runtime::{ChatTemplate, Error, Model, Tokenizer};

use crate::requests::{Conversations, Reader, check_size};

/// A model whose requests may be conversations.
pub struct Chat<'a> {
    model: &'a Model,
    folder: &'a Path,
    template: OnceLock<ChatTemplate>,
    /// Whether texts are turns of the user too.
    of_texts: bool,
    /// Goes before conversations that have no system turn.
    system: Option<String>,
}

impl<'a> Chat<'a> {
    /// The model of `folder`; nothing is read yet.
    pub fn of(folder: &'a Path, model: &'a Model, of_texts: bool, system: Option<String>) -> Chat<'a> {
        Chat { model, folder, template: OnceLock::new(), of_texts, system }
    }

    /// The model's template.
    pub fn template(&self) -> Result<&ChatTemplate> {
        if self.template.get().is_none() {
            let template = ChatTemplate::open(self.folder)?;
            self.template.get_or_init(|| template);
        }
        Ok(self.template.get().expect("set above"))
    }
}

impl Conversations for Chat<'_> {
    fn takes_texts(&self) -> bool {
        self.of_texts
    }

    fn tokens(&self, messages: &[Value]) -> Result<Vec<i64>> {
        let has_system = messages.iter().any(|message| message["role"] == "system");
        let system = self.system.iter().filter(|_| !has_system).map(|text| json!({"role": "system", "content": text}));
        let messages: Vec<Value> = system.chain(messages.iter().cloned()).collect();
        let text = self.template()?.apply(&messages)?;
        check_size("messages", &text, self.longest_source())?;
        Ok(self.model.tokenizer()?.encode_target(&text)?)
    }
}

impl Reader for Chat<'_> {
    fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.model.tokenizer()
    }

    fn chat(&self) -> Option<&dyn Conversations> {
        Some(self)
    }

    fn longest_source(&self) -> usize {
        self.model.longest_source()
    }

    fn longest_target(&self) -> usize {
        self.model.longest_target()
    }
}
