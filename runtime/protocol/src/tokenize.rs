//! Tokenizes requests with a model's tokenizer and chat template, checks them against the model's length limits, and
//! joins several requests to batches.

mod images;

use std::borrow::Borrow;

use ndarray::Array3;
use serde_json::{Map, Value, json};
use t5gemma_runtime::{
    Adapter, Batch, ChatTemplate, Encoder, Error, Image, ImageLimits, ImageSettings, Model, PixelValues, Tokenizer,
};

use crate::error::RequestError;
use crate::id::Id;
use crate::images::ImageFields;
use crate::json::abbreviated;
use crate::request::{
    EncodeRequest, GenerateRequest, ScoreRequest, SourcesGiven, Texts, TokenRows, check_prompts, check_targets,
};

use images::SourcesWithImages;

/// What tokenizing requests needs to know about a model.
pub trait Tokenize {
    /// The model's tokenizer.
    ///
    /// # Errors
    /// The model has no usable one.
    fn tokenizer(&self) -> Result<&Tokenizer, Error>;

    /// The tokenizer of targets.
    ///
    /// # Errors
    /// The model has no usable one, or its targets are not text.
    fn target_tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.tokenizer()
    }

    /// Tokenizes conversations; `None` where they are not taken.
    fn conversations(&self) -> Option<&dyn Conversations> {
        None
    }

    /// The loaded LoRA adapter `name`.
    ///
    /// # Errors
    /// No loaded adapter of that name, or a model that takes none.
    fn adapter(&self, name: &str) -> Result<Adapter, Error> {
        let expected = "none (this model takes no adapters)".to_string();
        Err(Error::Input { field: "adapter".into(), expected, found: format!("{name:?}") })
    }

    /// How the model takes images.
    ///
    /// # Errors
    /// A model that reads none.
    fn image_settings(&self) -> Result<&ImageSettings, Error> {
        let remedy = "use an interface that does, or a request without images";
        Err(Error::Unsupported { what: "images: this interface takes none".into(), remedy: remedy.into() })
    }

    /// Limits on the images of requests.
    fn image_limits(&self) -> ImageLimits {
        ImageLimits::default()
    }

    /// Reads an image file that a request names. An interface whose requests come from elsewhere must not read files for
    /// them: by default, images are data URIs.
    ///
    /// # Errors
    /// A file that is not read, or no picture.
    fn image_file(&self, name: &str) -> Result<Image, RequestError> {
        Err(RequestError::form("images", "a data URI (files are not read here)", abbreviated(&name.into())))
    }

    /// Reads the shape and the numbers of a float32 tensor of a safetensors file that a request names. By default, none
    /// is read, as in [`Tokenize::image_file`].
    ///
    /// # Errors
    /// A file that is not read, or no such tensor.
    fn tensor_file(&self, file: &str, _tensor: &str) -> Result<(Vec<usize>, Vec<f32>), RequestError> {
        Err(RequestError::form("pixel_values", "images (files are not read here)", abbreviated(&file.into())))
    }

    /// The most tokens of a source. Texts that are much longer are refused before they are tokenized.
    fn longest_source(&self) -> usize {
        usize::MAX
    }

    /// The most tokens of a target.
    fn longest_target(&self) -> usize {
        usize::MAX
    }
}

impl Tokenize for Model {
    fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        Model::tokenizer(self)
    }

    fn adapter(&self, name: &str) -> Result<Adapter, Error> {
        Model::adapter(self, name)
    }

    fn target_tokenizer(&self) -> Result<&Tokenizer, Error> {
        Model::target_tokenizer(self)
    }

    fn image_settings(&self) -> Result<&ImageSettings, Error> {
        Model::image_settings(self)
    }

    fn longest_source(&self) -> usize {
        self.facts().encoder.max_position_embeddings
    }

    fn longest_target(&self) -> usize {
        self.facts().decoder.max_position_embeddings
    }
}

impl Tokenize for Encoder {
    fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        Encoder::tokenizer(self)
    }

    fn image_settings(&self) -> Result<&ImageSettings, Error> {
        Encoder::image_settings(self)
    }

    fn longest_source(&self) -> usize {
        self.facts().encoder.max_position_embeddings
    }
}

/// A model for a caller that truncates sources itself.
pub struct AnyLength<'a>(pub &'a dyn Tokenize);

impl Tokenize for AnyLength<'_> {
    fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.0.tokenizer()
    }

    fn target_tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.0.target_tokenizer()
    }

    fn conversations(&self) -> Option<&dyn Conversations> {
        self.0.conversations()
    }

    fn image_settings(&self) -> Result<&ImageSettings, Error> {
        self.0.image_settings()
    }

    fn image_limits(&self) -> ImageLimits {
        self.0.image_limits()
    }

    fn image_file(&self, name: &str) -> Result<Image, RequestError> {
        self.0.image_file(name)
    }

    fn tensor_file(&self, file: &str, tensor: &str) -> Result<(Vec<usize>, Vec<f32>), RequestError> {
        self.0.tensor_file(file, tensor)
    }
}

/// Tokenizes conversations for a model.
pub trait Conversations {
    /// Whether each text of a request is the user's turn of a conversation.
    fn takes_texts(&self) -> bool;

    /// The token ids of a conversation.
    ///
    /// # Errors
    /// Messages that the model's chat template refuses.
    fn tokens(&self, messages: &[Value]) -> Result<Vec<i64>, RequestError>;

    /// The text of a conversation with images, in which each start-of-image token stands for one.
    ///
    /// # Errors
    /// Messages that the model's chat template refuses, or an interface whose conversations have no images.
    fn text_with_images(&self, _messages: &[Value]) -> Result<String, RequestError> {
        Err(RequestError::form("images", "text or input_ids beside them", "a conversation"))
    }
}

/// A request as token ids.
#[derive(Clone, Debug)]
pub struct TokenizedRequest {
    /// Returned with the result.
    pub id: Id,
    /// The sources.
    pub sources: Vec<Vec<i64>>,
    /// 0 where a source token is padding; of the shape of `sources`.
    pub mask: Vec<Vec<i64>>,
    /// The beginning of each source's target.
    pub prompts: Option<Vec<Vec<i64>>>,
    /// The expected length of each source's target.
    pub progress_totals: Option<Vec<i64>>,
    /// Generation options by their Hugging Face names.
    pub options: Map<String, Value>,
    /// The targets to score, one for each source.
    pub targets: Vec<Vec<i64>>,
    /// The seed of all rows, if they sample.
    pub seed: Option<u64>,
    /// The pixel values of the images of each source; empty without images.
    pub images: Vec<Vec<PixelValues>>,
    /// The encoder's hidden states of the sources, where they are known already.
    pub encoder_outputs: Option<Array3<f32>>,
    /// The LoRA adapter of all rows, if it is no option.
    pub adapter: Option<Adapter>,
}

impl GenerateRequest {
    /// Tokenizes the request for a model; `id` is returned with the result.
    ///
    /// # Errors
    /// A request that does not have exactly one kind of source, and what the tokenizer, the template or the runtime refuses.
    pub fn tokenize(&self, id: Id, model: &dyn Tokenize) -> Result<TokenizedRequest, RequestError> {
        let messages = Some(self.messages.is_some());
        SourcesGiven { text: self.text.is_some(), input_ids: self.input_ids.is_some(), messages }.check()?;
        let chat = model.conversations();
        let mut images = Vec::new();
        let is_conversation =
            self.messages.is_some() || self.text.is_some() && chat.is_some_and(|chat| chat.takes_texts());
        let sources = match (&self.text, &self.messages, &self.input_ids, chat) {
            (_, messages, _, Some(chat)) if is_conversation && self.images.is_given() => {
                let Some(messages) = messages else {
                    return Err(RequestError::form(
                        "images",
                        "messages beside them",
                        "a text as a turn of a conversation",
                    ));
                };
                let with_images = self.images.conversation(&chat.text_with_images(messages)?, model)?;
                images = with_images.images;
                with_images.ids
            }
            (text, None, ids, _) if self.images.is_given() => {
                let with_images = self.images.tokenize(text, ids, model)?;
                images = with_images.images;
                with_images.ids
            }
            (Some(texts), _, _, Some(chat)) if chat.takes_texts() => {
                let turn = |text: &String| chat.tokens(&[json!({"role": "user", "content": text})]);
                texts.rows().iter().map(turn).collect::<Result<_, _>>()?
            }
            (Some(texts), ..) => sources(texts.rows(), model)?,
            (_, Some(messages), _, Some(chat)) => vec![chat.tokens(messages)?],
            (_, Some(_), _, None) => return Err(RequestError::form("", "text or input_ids", "messages")),
            (.., ids, _) => ids.as_ref().map(TokenRows::rows).unwrap_or_default().to_vec(),
        };
        let mask = mask(&self.attention_mask, &sources);
        let prompts = prompts(&self.decoder_text, &self.decoder_input_ids, model)?;
        let progress_totals = self.progress_total.as_ref().map(|totals| totals.of_rows(sources.len()));
        let options = self.options.clone();
        let alone = TokenizedRequest::new(id, sources, mask);
        TokenizedRequest { images, prompts, progress_totals, options, ..alone }.checked()
    }
}

impl ScoreRequest {
    /// Tokenizes the request for a model; `id` is returned with the result, and `end` is appended to targets that are texts.
    ///
    /// # Errors
    /// A request that does not have exactly one kind of source and of target, or not one target for each source, and what the
    /// tokenizer or the runtime refuses.
    pub fn tokenize(&self, id: Id, model: &dyn Tokenize, end: Option<i64>) -> Result<TokenizedRequest, RequestError> {
        let SourcesWithImages { ids: sources, images } = sources_of(&self.text, &self.input_ids, &self.images, model)?;
        let mask = mask(&self.attention_mask, &sources);
        let prompts = prompts(&self.decoder_text, &self.decoder_input_ids, model)?;
        check_targets(&self.target, &self.target_ids)?;
        let targets = match (&self.target, &self.target_ids) {
            (Some(texts), _) => {
                let mut targets = targets("target", texts.rows(), model)?;
                targets.iter_mut().for_each(|target| target.extend(end));
                targets
            }
            (None, ids) => ids.as_ref().map(TokenRows::rows).unwrap_or_default().to_vec(),
        };
        if targets.len() != sources.len() {
            let expected = format!("{} rows, one for each source", sources.len());
            return Err(RequestError::form("target", expected, targets.len().to_string()));
        }
        let adapter = self.adapter.as_ref().map(|name| model.adapter(name)).transpose()?;
        let progress_totals = self.progress_total.as_ref().map(|totals| totals.of_rows(sources.len()));
        let alone = TokenizedRequest::new(id, sources, mask);
        TokenizedRequest { images, prompts, targets, progress_totals, adapter, ..alone }.checked()
    }
}

impl EncodeRequest {
    /// Tokenizes the request for a model; `id` is returned with the result.
    ///
    /// # Errors
    /// A request that does not have exactly one kind of source, and what the tokenizer or the runtime refuses.
    pub fn tokenize(&self, id: Id, model: &dyn Tokenize) -> Result<TokenizedRequest, RequestError> {
        let SourcesWithImages { ids: sources, images } = sources_of(&self.text, &self.input_ids, &self.images, model)?;
        let mask = mask(&self.attention_mask, &sources);
        TokenizedRequest { images, ..TokenizedRequest::new(id, sources, mask) }.checked()
    }
}

impl TokenizedRequest {
    /// Sources alone.
    pub fn new(id: Id, sources: Vec<Vec<i64>>, mask: Vec<Vec<i64>>) -> TokenizedRequest {
        TokenizedRequest {
            id,
            sources,
            mask,
            prompts: None,
            progress_totals: None,
            options: Map::new(),
            targets: Vec::new(),
            seed: None,
            images: Vec::new(),
            encoder_outputs: None,
            adapter: None,
        }
    }

    /// Refuses what the runtime refuses of this request alone, before it shares a batch with others.
    fn checked(self) -> Result<TokenizedRequest, RequestError> {
        batch(std::slice::from_ref(&self), 0)?;
        Ok(self)
    }

    /// The number of source tokens that are not padding.
    pub fn source_tokens(&self) -> usize {
        self.mask.iter().flatten().filter(|&&visible| visible != 0).count()
    }
}

/// Makes one batch of the sources of several requests; shorter rows are padded with `pad`.
///
/// # Errors
/// Masks of another shape, and prompts that differ in length.
pub fn batch<R: Borrow<TokenizedRequest>>(requests: &[R], pad: i64) -> Result<Batch, Error> {
    let of_one = |request: &TokenizedRequest| {
        let (mut sources, mut mask) = (request.sources.clone(), request.mask.clone());
        // A mask that does not fit is left for the runtime to refuse by name.
        let fits = sources.iter().zip(&mask).all(|(source, mask)| source.len() == mask.len());
        let length = sources.iter().map(Vec::len).max().unwrap_or(0).max(1);
        if fits {
            sources.iter_mut().for_each(|source| source.resize(length, pad));
            mask.iter_mut().for_each(|mask| mask.resize(length, 0));
        }
        let batch = Batch::masked(&sources, &mask)?;
        let batch = match request.seed {
            Some(seed) => batch.with_seed(seed),
            None => batch,
        };
        let batch = match &request.encoder_outputs {
            Some(states) => batch.with_encoder_outputs(states.clone())?,
            None => batch,
        };
        let batch = match request.images.is_empty() {
            true => batch,
            false => batch.with_images(request.images.clone())?,
        };
        let batch = match &request.adapter {
            Some(adapter) => batch.with_adapter(adapter),
            None => batch,
        };
        let batch = match &request.progress_totals {
            Some(totals) => batch.with_progress_totals(totals)?,
            None => batch,
        };
        match &request.prompts {
            Some(prompts) => batch.with_decoder_input_ids(prompts),
            None => Ok(batch),
        }
    };
    Batch::joined(requests.iter().map(|request| of_one(request.borrow())).collect::<Result<_, _>>()?, pad)
}

/// The token ids of texts as sources, with the special tokens that the tokenizer adds.
///
/// # Errors
/// A text that is much too long for the model, or that the tokenizer refuses.
pub fn sources<T: AsRef<str>>(texts: &[T], model: &dyn Tokenize) -> Result<Vec<Vec<i64>>, RequestError> {
    let encode = |text: &T| {
        check_length("text", text.as_ref(), model.longest_source())?;
        Ok(model.tokenizer()?.encode(text.as_ref())?)
    };
    texts.iter().map(encode).collect()
}

/// The token ids of texts as targets or beginnings of targets, without special tokens. `field` is named in errors.
///
/// # Errors
/// A text that is much too long for the model, or that the tokenizer refuses.
pub fn targets<T: AsRef<str>>(field: &str, texts: &[T], model: &dyn Tokenize) -> Result<Vec<Vec<i64>>, RequestError> {
    let encode = |text: &T| {
        check_length(field, text.as_ref(), model.longest_target())?;
        Ok(model.target_tokenizer()?.encode_target(text.as_ref())?)
    };
    texts.iter().map(encode).collect()
}

/// The token ids of a conversation. The template writes the special tokens, so the tokenizer adds none.
///
/// # Errors
/// Messages that the template refuses, or a conversation that is much too long for the model.
pub fn conversation(
    messages: &[Value],
    template: &ChatTemplate,
    model: &dyn Tokenize,
) -> Result<Vec<i64>, RequestError> {
    let text = template.apply(messages)?;
    check_length("messages", &text, model.longest_source())?;
    Ok(model.tokenizer()?.encode_target(&text)?)
}

/// Sources with the pixel values of their images, if there are any.
fn sources_of(
    text: &Option<Texts>,
    ids: &Option<TokenRows>,
    images: &ImageFields,
    model: &dyn Tokenize,
) -> Result<SourcesWithImages, RequestError> {
    SourcesGiven { text: text.is_some(), input_ids: ids.is_some(), messages: None }.check()?;
    if images.is_given() {
        return images.tokenize(text, ids, model);
    }
    let ids = match text {
        Some(texts) => sources(texts.rows(), model)?,
        None => ids.as_ref().map(TokenRows::rows).unwrap_or_default().to_vec(),
    };
    Ok(SourcesWithImages { ids, images: Vec::new() })
}

fn mask(given: &Option<TokenRows>, sources: &[Vec<i64>]) -> Vec<Vec<i64>> {
    match given {
        Some(mask) => mask.rows().to_vec(),
        None => sources.iter().map(|source| vec![1; source.len()]).collect(),
    }
}

fn prompts(
    text: &Option<Texts>,
    ids: &Option<TokenRows>,
    model: &dyn Tokenize,
) -> Result<Option<Vec<Vec<i64>>>, RequestError> {
    check_prompts(text, ids)?;
    let Some(texts) = text else { return Ok(ids.as_ref().map(|ids| ids.rows().to_vec())) };
    let prompts = targets("decoder_text", texts.rows(), model)?;
    if let Some(other) = prompts.iter().find(|prompt| prompt.len() != prompts[0].len()) {
        let expected = "texts of equally many tokens, or a request for each";
        let found = format!("{} and {} tokens", prompts[0].len(), other.len());
        return Err(RequestError::form("decoder_text", expected, found));
    }
    Ok(Some(prompts))
}

/// More bytes than any token has: a text of more than this many times the longest source is too long.
const MAX_TOKEN_BYTES: usize = 256;

/// Refuses a text that is too long whatever its tokens are.
fn check_length(field: &str, text: &str, longest: usize) -> Result<(), RequestError> {
    let bytes = text.len();
    if bytes / MAX_TOKEN_BYTES <= longest {
        return Ok(());
    }
    Err(RequestError::form(field, format!("at most {longest} tokens"), format!("{bytes} bytes")))
}
