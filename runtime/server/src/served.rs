//! `Served`: one opened model and how it works: an engine for one that generates, an encoder for one that embeds or
//! classifies.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use t5gemma_protocol::{Conversations, RequestError, Tokenize, conversation};
use t5gemma_runtime::{
    Cancellation, ChatTemplate, Encoder, Engine, EngineOptions, Error, Image, ImageLimits, ImageSettings, Manifest,
    Model, Task, Tokenizer, task_of,
};
use tokio::sync::Semaphore;

use crate::config::{Config, ModelConfig};
use crate::pictures;

/// An opened model.
pub struct Served {
    /// Its name in requests.
    pub name: String,
    /// When it was opened, in seconds since 1970.
    pub created: u64,
    work: Work,
}

enum Work {
    Generate(Box<Generator>),
    Encode(Box<EncoderWork>),
}

/// A model that generates.
pub struct Generator {
    /// The first copy.
    pub model: Arc<Model>,
    /// What runs the requests.
    pub engine: Engine,
    folder: PathBuf,
    template: OnceLock<Result<ChatTemplate, ()>>,
    /// Its encoder alone, for embeddings; opened by the first request for one.
    encoder: OnceLock<Result<EncoderWork, Error>>,
    open: t5gemma_runtime::OpenOptions,
    image_limits: ImageLimits,
}

/// A model that embeds or classifies.
pub struct EncoderWork {
    /// The model.
    pub encoder: Encoder,
    /// One call runs at a time: the model's threads are all at work for it.
    pub turn: Semaphore,
    image_limits: ImageLimits,
}

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Served").field("name", &self.name).field("task", &self.task().name()).finish_non_exhaustive()
    }
}

impl Served {
    /// Opens a model and runs it once, so that the first request takes no longer than later ones.
    ///
    /// # Errors
    /// A folder that does not open, or an adapter that does not fit.
    pub fn open(model: &ModelConfig, config: &Config) -> Result<Served, Error> {
        let cancel = Cancellation::new();
        let folder = &model.folder;
        let image_limits =
            ImageLimits::default().max_bytes(config.limits.max_body_bytes).max_pixels(config.limits.max_image_pixels);
        let work = match task_of(folder)? {
            Task::Text2TextGeneration => {
                let mut copies = Vec::new();
                for &device in &config.devices {
                    let mut open = config.open.clone();
                    open.provider.device = device;
                    let copy = Model::open_with(folder, &open)?;
                    copy.fallbacks().iter().for_each(|fallback| crate::log::note(&fallback.to_string()));
                    copy.warnings().iter().for_each(|warning| crate::log::note(&format!("{}: {warning}", model.name)));
                    for (name, adapter) in &model.adapters {
                        copy.load_adapter(name, adapter)?;
                    }
                    copy.warm_up(&cancel)?;
                    copies.push(Arc::new(copy));
                }
                let options: EngineOptions = config.engine.clone().max_waiting(config.limits.max_requests);
                let engine = Engine::of_copies(&copies, options)?;
                Work::Generate(Box::new(Generator {
                    model: copies.swap_remove(0),
                    engine,
                    folder: folder.clone(),
                    template: OnceLock::new(),
                    encoder: OnceLock::new(),
                    open: config.open.clone(),
                    image_limits,
                }))
            }
            _ => {
                let work = EncoderWork::open(folder, &config.open, image_limits)?;
                work.warm_up(&cancel)?;
                Work::Encode(Box::new(work))
            }
        };
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Ok(Served { name: model.name.clone(), created, work })
    }

    /// What the exporter wrote about the model.
    pub fn manifest(&self) -> &Manifest {
        match &self.work {
            Work::Generate(generator) => generator.model.manifest(),
            Work::Encode(work) => work.encoder.manifest(),
        }
    }

    /// What the model is for.
    pub fn task(&self) -> &Task {
        &self.manifest().task
    }

    /// The model, if it generates.
    pub fn generator(&self) -> Option<&Generator> {
        match &self.work {
            Work::Generate(generator) => Some(generator),
            Work::Encode(_) => None,
        }
    }

    /// The model, if it embeds or classifies. Of a model that generates, its encoder, which is opened now: that may take
    /// as long as reading a file of its size.
    pub fn encoder(&self) -> Result<&EncoderWork, Error> {
        match &self.work {
            Work::Generate(generator) => {
                let open = || EncoderWork::open(&generator.folder, &generator.open, generator.image_limits);
                generator.encoder.get_or_init(open).as_ref().map_err(Error::clone)
            }
            Work::Encode(work) => Ok(work),
        }
    }

    /// What tokenizes the sources.
    pub fn tokenize(&self) -> &dyn Tokenize {
        match &self.work {
            Work::Generate(generator) => &**generator,
            Work::Encode(work) => &**work,
        }
    }

    /// The most tokens of a source.
    pub fn longest_source(&self) -> usize {
        self.manifest().facts.encoder.max_position_embeddings
    }

    /// The SHA-256 of the weights, which tells models apart.
    pub fn sha256(&self) -> &str {
        &self.manifest().weights.record.sha256
    }

    /// The model as an entry of OpenAI's list.
    pub fn listed(&self) -> Value {
        json!({"id": self.name, "object": "model", "created": self.created, "owned_by": "t5gemma"})
    }
}

impl EncoderWork {
    fn open(
        folder: &Path,
        options: &t5gemma_runtime::OpenOptions,
        image_limits: ImageLimits,
    ) -> Result<EncoderWork, Error> {
        Ok(EncoderWork { encoder: Encoder::open_with(folder, options)?, turn: Semaphore::new(1), image_limits })
    }

    fn warm_up(&self, cancel: &Cancellation) -> Result<(), Error> {
        let encoder = &self.encoder;
        let longest = encoder.facts().encoder.max_position_embeddings.min(16);
        let batch = t5gemma_runtime::Batch::padded(&[vec![1i64; longest]], encoder.pad_token_id())?;
        match &encoder.manifest().task {
            Task::TextClassification => encoder.classify(&batch, cancel).map(drop),
            Task::TokenClassification => encoder.classify_tokens(&batch, cancel).map(drop),
            _ => match encoder.features()?.pooling {
                t5gemma_runtime::Pooling::None => encoder.encode(&batch, cancel).map(drop),
                pooling => encoder.embed(&batch, pooling, cancel).map(drop),
            },
        }
    }
}

impl Tokenize for EncoderWork {
    fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.encoder.tokenizer()
    }

    fn image_settings(&self) -> Result<&ImageSettings, Error> {
        self.encoder.image_settings()
    }

    fn image_limits(&self) -> ImageLimits {
        self.image_limits
    }

    fn image_file(&self, name: &str) -> Result<Image, RequestError> {
        Err(pictures::no_file(name))
    }

    fn longest_source(&self) -> usize {
        self.encoder.facts().encoder.max_position_embeddings
    }
}

impl Tokenize for Generator {
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

    fn image_limits(&self) -> ImageLimits {
        self.image_limits
    }

    fn image_file(&self, name: &str) -> Result<Image, RequestError> {
        Err(pictures::no_file(name))
    }

    fn longest_source(&self) -> usize {
        self.model.longest_source()
    }

    fn longest_target(&self) -> usize {
        self.model.longest_target()
    }
}

impl Conversations for Generator {
    fn takes_texts(&self) -> bool {
        false
    }

    fn tokens(&self, messages: &[Value]) -> Result<Vec<i64>, RequestError> {
        conversation(messages, self.template()?, self)
    }

    fn text_with_images(&self, messages: &[Value]) -> Result<String, RequestError> {
        let template = self.template()?;
        let start = self.start_of_image()?;
        let is_image = |part: &&Value| part["type"] == "image";
        let parts = messages.iter().filter_map(|message| message["content"].as_array()).flatten();
        let images = parts.filter(is_image).count();
        // Templates of models for images read parts; others write texts only.
        match template.apply(messages) {
            Ok(text) if images == 0 || text.matches(&start).count() == images => Ok(text),
            _ => Ok(template.apply(&pictures::flattened(messages, &start))?),
        }
    }
}

impl Generator {
    fn template(&self) -> Result<&ChatTemplate, RequestError> {
        let open = || {
            ChatTemplate::open(&self.folder).map_err(|error| {
                crate::log::note(&format!("no conversations: {error}"));
            })
        };
        let missing = || RequestError::form("messages", "a model with a chat template", "none (it takes plain text)");
        self.template.get_or_init(open).as_ref().map_err(|()| missing())
    }

    /// What stands for an image in a text.
    ///
    /// # Errors
    /// A model that reads no images.
    pub fn start_of_image(&self) -> Result<String, Error> {
        let settings = self.model.image_settings()?;
        Ok(self.model.tokenizer()?.token(settings.start_of_image_token_id).unwrap_or_default())
    }
}
