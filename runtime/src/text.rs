//! The front door: texts in, texts out. Tokenizing, padding and decoding around the loop of `generate`.

use std::fmt;

use t5gemma_graphs::images::ImageSettings;

use crate::batch::Batch;
use crate::chat::ChatTemplate;
use crate::encoder::Encoder;
use crate::error::Error;
use crate::generate::Controls;
use crate::hypothesis::Hypothesis;
use crate::images::{Image, PixelValues};
use crate::model::Model;
use crate::options::{GenerationConfig, GenerationOptions};
use crate::tokenizer::{SpecialTokens, Tokenizer};

/// What [`Model::generate`] returns for one source. Displayed, it is the text of the best hypothesis.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Generated {
    /// The texts of `hypotheses`, without special tokens.
    pub texts: Vec<String>,
    /// `num_return_sequences` hypotheses, those of beam search best first: tokens, score and finish reason.
    pub hypotheses: Vec<Hypothesis>,
}

impl Generated {
    /// The text of the first hypothesis, which is the best one.
    pub fn text(&self) -> &str {
        self.texts.first().map_or("", String::as_str)
    }
}

/// A source with images. Each start-of-image token in the text stands for one of them, in their order; a text without a
/// character is one of nothing but the images.
///
/// ```no_run
/// use t5gemma_runtime::{Controls, Image, ImageLimits, Model, TextWithImages};
///
/// let model = Model::open("model")?;
/// let photo = Image::open("photo.jpg", ImageLimits::default())?;
/// let source = TextWithImages::new("<start_of_image> What is this?", vec![photo]);
/// let batch = model.tokenize_with_images(&[source])?;
/// let hypotheses = model.generate_batch(&batch, model.generation_config(), Controls::default())?;
/// # Ok::<(), t5gemma_runtime::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct TextWithImages {
    /// The text.
    pub text: String,
    /// The images.
    pub images: Vec<Image>,
    /// Whether crops follow images that are much wider than high or the reverse; by default as the model's settings say.
    pub pan_and_scan: Option<bool>,
}

impl TextWithImages {
    /// A text with these images.
    pub fn new(text: impl Into<String>, images: Vec<Image>) -> TextWithImages {
        TextWithImages { text: text.into(), images, pan_and_scan: None }
    }

    /// Sets [`TextWithImages::pan_and_scan`].
    pub fn pan_and_scan(self, pan_and_scan: bool) -> TextWithImages {
        TextWithImages { pan_and_scan: Some(pan_and_scan), ..self }
    }

    /// The tokens of the source, and the pixel values of its images and their crops.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_with_images`].
    pub fn tokenize(
        &self,
        tokenizer: &Tokenizer,
        settings: &ImageSettings,
    ) -> Result<(Vec<i64>, Vec<PixelValues>), Error> {
        let (images, crops) = self.pixel_values(settings);
        Ok((tokenizer.encode_with_images(&self.text, settings, &crops)?, images))
    }

    /// [`TextWithImages::tokenize`] for the text of a conversation, whose template has written the special tokens.
    ///
    /// # Errors
    /// As [`TextWithImages::tokenize`].
    pub fn tokenize_conversation(
        &self,
        tokenizer: &Tokenizer,
        settings: &ImageSettings,
    ) -> Result<(Vec<i64>, Vec<PixelValues>), Error> {
        let (images, crops) = self.pixel_values(settings);
        Ok((tokenizer.encode_conversation_with_images(&self.text, settings, &crops)?, images))
    }

    /// The images with their crops, and the number of crops of each.
    fn pixel_values(&self, settings: &ImageSettings) -> (Vec<PixelValues>, Vec<usize>) {
        let pan_and_scan = self.pan_and_scan.unwrap_or(settings.pan_and_scan.enabled);
        let images: Vec<_> = self.images.iter().map(|image| image.pixel_values(settings, pan_and_scan)).collect();
        let crops = images.iter().map(|image| image.len() - 1).collect();
        (images.into_iter().flatten().collect(), crops)
    }
}

impl fmt::Display for Generated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl Model {
    /// Generates a target for each text. An option that is not set has the value of the model's
    /// `generation_config.json`, or else Hugging Face's default.
    ///
    /// ```no_run
    /// use t5gemma_runtime::{GenerationOptions, Model};
    ///
    /// let model = Model::open("model")?;
    /// let options = GenerationOptions::default().num_beams(4).num_return_sequences(2);
    /// for generated in model.generate(&["The quick brown fox"], &options)? {
    ///     for (text, hypothesis) in generated.texts.iter().zip(&generated.hypotheses) {
    ///         println!("{text} ({:?}, {:?})", hypothesis.score, hypothesis.finish_reason);
    ///     }
    /// }
    /// # Ok::<(), t5gemma_runtime::Error>(())
    /// ```
    ///
    /// # Errors
    /// A model without a usable tokenizer, options that are invalid or contradict each other, and those of
    /// [`Model::generate_batch`].
    pub fn generate<T: AsRef<str>>(&self, texts: &[T], options: &GenerationOptions) -> Result<Vec<Generated>, Error> {
        self.generate_with(texts, options, Controls::default())
    }

    /// [`Model::generate`] with a streamer or a cancellation.
    ///
    /// # Errors
    /// As [`Model::generate`]; [`Error::Cancelled`] or [`Error::Deadline`].
    pub fn generate_with<T: AsRef<str>>(
        &self,
        texts: &[T],
        options: &GenerationOptions,
        controls: Controls,
    ) -> Result<Vec<Generated>, Error> {
        let config = self.generation_config().with(options)?;
        let batch = padded(self.tokenizer()?, texts, config.pad_token_id)?;
        self.generate_texts(&batch, &config, controls)
    }

    /// Generates the answer to a conversation, whose messages are objects with `role` and `content`; see
    /// [`ChatTemplate::apply`].
    ///
    /// # Errors
    /// Messages that the template refuses, and those of [`Model::generate`].
    pub fn chat(
        &self,
        template: &ChatTemplate,
        messages: &[serde_json::Value],
        options: &GenerationOptions,
    ) -> Result<Generated, Error> {
        let config = self.generation_config().with(options)?;
        // The template writes special tokens itself.
        let source = self.tokenizer()?.encode_target(&template.apply(messages)?)?;
        let batch = Batch::padded(&[source], config.pad_token_id)?;
        Ok(self.generate_texts(&batch, &config, Controls::default())?.swap_remove(0))
    }

    /// Tokenizes texts into a batch, padded on the right with the model's padding token.
    ///
    /// # Errors
    /// No text, one that the tokenizer cannot express, or a model without a usable tokenizer.
    pub fn tokenize<T: AsRef<str>>(&self, texts: &[T]) -> Result<Batch, Error> {
        padded(self.tokenizer()?, texts, self.generation_config().pad_token_id)
    }

    /// Tokenizes texts with images into a batch, padded on the right with the model's padding token.
    ///
    /// # Errors
    /// A model that reads no images, and those of [`TextWithImages::tokenize`] and [`Model::tokenize`].
    pub fn tokenize_with_images(&self, sources: &[TextWithImages]) -> Result<Batch, Error> {
        with_images(self.tokenizer()?, self.image_settings()?, sources, self.generation_config().pad_token_id)
    }

    fn generate_texts(
        &self,
        batch: &Batch,
        config: &GenerationConfig,
        controls: Controls,
    ) -> Result<Vec<Generated>, Error> {
        let tokenizer = self.target_tokenizer()?;
        let rows = self.generate_batch(batch, config, controls)?.into_iter();
        rows.map(|hypotheses| {
            let text = |hypothesis: &Hypothesis| tokenizer.decode(&hypothesis.tokens, SpecialTokens::Skip);
            Ok(Generated { texts: hypotheses.iter().map(text).collect::<Result<_, Error>>()?, hypotheses })
        })
        .collect()
    }
}

impl Encoder {
    /// Tokenizes texts into a batch, padded on the right with the model's padding token.
    ///
    /// ```no_run
    /// use t5gemma_runtime::{Cancellation, Encoder, Pooling};
    ///
    /// let encoder = Encoder::open("model")?;
    /// let batch = encoder.tokenize(&["The quick brown fox", "Hello"])?;
    /// let vectors = encoder.embed_normalized(&batch, Pooling::Mean, &Cancellation::new())?;
    /// println!("{}", vectors.row(0).dot(&vectors.row(1)));
    /// # Ok::<(), t5gemma_runtime::Error>(())
    /// ```
    ///
    /// # Errors
    /// No text, one that the tokenizer cannot express, or a model without a usable tokenizer.
    pub fn tokenize<T: AsRef<str>>(&self, texts: &[T]) -> Result<Batch, Error> {
        padded(self.tokenizer()?, texts, self.pad_token_id())
    }

    /// Tokenizes texts with images into a batch, padded on the right with the model's padding token.
    ///
    /// # Errors
    /// As [`Model::tokenize_with_images`].
    pub fn tokenize_with_images(&self, sources: &[TextWithImages]) -> Result<Batch, Error> {
        with_images(self.tokenizer()?, self.image_settings()?, sources, self.pad_token_id())
    }
}

fn with_images(
    tokenizer: &Tokenizer,
    settings: &ImageSettings,
    sources: &[TextWithImages],
    pad: i64,
) -> Result<Batch, Error> {
    let tokenized = sources.iter().map(|source| source.tokenize(tokenizer, settings));
    let (ids, images): (Vec<_>, Vec<_>) = tokenized.collect::<Result<Vec<_>, Error>>()?.into_iter().unzip();
    Batch::padded(&ids, pad)?.with_images(images)
}

fn padded<T: AsRef<str>>(tokenizer: &Tokenizer, texts: &[T], pad: i64) -> Result<Batch, Error> {
    let sources = texts.iter().map(|text| tokenizer.encode(text.as_ref())).collect::<Result<Vec<_>, Error>>()?;
    Batch::padded(&sources, pad)
}
