//! Conversations as sources: the chat template of a model folder, opened when the first conversation needs it.

use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Value, json};
use t5gemma_protocol::{Conversations, RequestError, Tokenize, conversation};
use t5gemma_runtime::{ChatTemplate, Error, Image, ImageSettings, Model, Tokenizer};

use crate::images;

/// A model whose requests may be conversations.
pub struct Chat<'a> {
    model: &'a Model,
    folder: &'a Path,
    template: OnceLock<ChatTemplate>,
    takes_texts: bool,
    /// The system turn for conversations that have none.
    system: Option<String>,
}

impl<'a> Chat<'a> {
    /// The model of `folder`, whose template is not opened yet. Only requests with messages are conversations.
    pub fn new(folder: &'a Path, model: &'a Model) -> Chat<'a> {
        Chat { model, folder, template: OnceLock::new(), takes_texts: false, system: None }
    }

    /// Treats texts as user turns if `takes_texts` is set, and adds `system` to conversations without a system turn.
    pub fn with(self, takes_texts: bool, system: Option<String>) -> Chat<'a> {
        Chat { takes_texts, system, ..self }
    }

    /// The model's template.
    pub fn template(&self) -> Result<&ChatTemplate, Error> {
        if self.template.get().is_none() {
            let template = ChatTemplate::open(self.folder)?;
            self.template.get_or_init(|| template);
        }
        Ok(self.template.get().expect("set above"))
    }
}

impl Conversations for Chat<'_> {
    fn takes_texts(&self) -> bool {
        self.takes_texts
    }

    fn tokens(&self, messages: &[Value]) -> Result<Vec<i64>, RequestError> {
        let has_system = messages.iter().any(|message| message["role"] == "system");
        let system = self.system.iter().filter(|_| !has_system).map(|text| json!({"role": "system", "content": text}));
        let messages: Vec<Value> = system.chain(messages.iter().cloned()).collect();
        conversation(&messages, self.template()?, self)
    }
}

impl Tokenize for Chat<'_> {
    fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.model.tokenizer()
    }

    fn target_tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.model.target_tokenizer()
    }

    fn conversations(&self) -> Option<&dyn Conversations> {
        Some(self)
    }

    fn image_settings(&self) -> Result<&ImageSettings, Error> {
        self.model.image_settings()
    }

    fn image_file(&self, name: &str) -> Result<Image, RequestError> {
        images::image_file(name, self.image_limits())
    }

    fn tensor_file(&self, file: &str, tensor: &str) -> Result<(Vec<usize>, Vec<f32>), RequestError> {
        images::tensor_file(file, tensor)
    }

    fn longest_source(&self) -> usize {
        self.model.longest_source()
    }

    fn longest_target(&self) -> usize {
        self.model.longest_target()
    }
}
