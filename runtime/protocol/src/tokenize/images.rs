//! Images of requests as pixel values beside the tokens of their sources.

use t5gemma_runtime::{Error, Image, ImageSettings, PixelValues, TextWithImages};

use super::{Tokenize, check_length};
use crate::error::RequestError;
use crate::images::{ImageFields, TensorFile};
use crate::request::{Texts, TokenRows};

/// Sources as token ids, with the pixel values of the images of each, if there are any.
pub(super) struct SourcesWithImages {
    pub ids: Vec<Vec<i64>>,
    pub images: Vec<Vec<PixelValues>>,
}

impl ImageFields {
    /// The sources with these images.
    pub(super) fn tokenize(
        &self,
        text: &Option<Texts>,
        ids: &Option<TokenRows>,
        model: &dyn Tokenize,
    ) -> Result<SourcesWithImages, RequestError> {
        self.check()?;
        let settings = model.image_settings()?;
        match (&self.images, &self.pixel_values, text, ids) {
            (Some(images), _, Some(texts), _) => self.texts(images.rows(), texts.rows(), settings, model),
            (Some(images), _, None, ids) => {
                let ids = ids.as_ref().map(TokenRows::rows).unwrap_or_default().to_vec();
                let pictures = loaded(images.rows(), ids.len(), model)?;
                let pan_and_scan = self.pan_and_scan.unwrap_or(settings.pan_and_scan.enabled);
                let of_row = |images: Vec<Image>| {
                    images.iter().flat_map(|image| image.pixel_values(settings, pan_and_scan)).collect()
                };
                Ok(SourcesWithImages { ids, images: pictures.into_iter().map(of_row).collect() })
            }
            (None, Some(TensorFile { file, tensor }), text, ids) => {
                let (shape, values) = model.tensor_file(file, tensor)?;
                let images = PixelValues::of_tensor(&shape, values)?;
                let ids = match text {
                    Some(texts) => with_places(texts.rows(), settings, model)?,
                    None => ids.as_ref().map(TokenRows::rows).unwrap_or_default().to_vec(),
                };
                in_order(ids, images, settings)
            }
            (None, None, ..) => unreachable!("called where there are images"),
        }
    }

    /// The source that is a conversation, of this text.
    pub(super) fn conversation(&self, text: &str, model: &dyn Tokenize) -> Result<SourcesWithImages, RequestError> {
        self.check()?;
        let settings = model.image_settings()?;
        let Some(images) = &self.images else {
            return Err(RequestError::form("pixel_values", "images beside messages", "numbers"));
        };
        check_length("messages", text, model.longest_source())?;
        let pictures = loaded(images.rows(), 1, model)?.remove(0);
        let source = self.with_images(text, pictures);
        let (ids, images) = source.tokenize_conversation(model.tokenizer()?, settings)?;
        Ok(SourcesWithImages { ids: vec![ids], images: vec![images] })
    }

    fn with_images(&self, text: &str, images: Vec<Image>) -> TextWithImages {
        let source = TextWithImages::new(text, images);
        match self.pan_and_scan {
            Some(pan_and_scan) => source.pan_and_scan(pan_and_scan),
            None => source,
        }
    }

    fn texts(
        &self,
        images: &[Vec<String>],
        texts: &[String],
        settings: &ImageSettings,
        model: &dyn Tokenize,
    ) -> Result<SourcesWithImages, RequestError> {
        let pictures = loaded(images, texts.len(), model)?;
        let mut sources = SourcesWithImages { ids: Vec::new(), images: Vec::new() };
        for (text, pictures) in texts.iter().zip(pictures) {
            check_length("text", text, model.longest_source())?;
            let source = self.with_images(text, pictures);
            let (ids, images) = source.tokenize(model.tokenizer()?, settings)?;
            sources.ids.push(ids);
            sources.images.push(images);
        }
        Ok(sources)
    }
}

/// The pictures of each of `rows` sources.
fn loaded(images: &[Vec<String>], rows: usize, model: &dyn Tokenize) -> Result<Vec<Vec<Image>>, RequestError> {
    if images.len() != rows {
        let expected = format!("{rows} lists, one for each source");
        return Err(RequestError::form("images", expected, images.len().to_string()));
    }
    let picture = |(row, at, name): (usize, usize, &String)| {
        let field = if rows == 1 { format!("images[{at}]") } else { format!("images[{row}][{at}]") };
        let picture = match name.starts_with("data:") {
            true => Image::from_data_uri(name, model.image_limits()).map_err(RequestError::from),
            false => model.image_file(name),
        };
        picture.map_err(|error| match error {
            RequestError::Runtime(Error::Input { expected, found, .. }) => RequestError::form(&field, expected, found),
            RequestError::Form { expected, found, .. } => RequestError::form(&field, expected, found),
            other => other,
        })
    };
    let of_row = |(row, images): (usize, &Vec<String>)| {
        images.iter().enumerate().map(|(at, name)| picture((row, at, name))).collect::<Result<Vec<_>, _>>()
    };
    images.iter().enumerate().map(of_row).collect()
}

/// The tokens of texts with as many images as they have start-of-image tokens.
fn with_places(
    texts: &[String],
    settings: &ImageSettings,
    model: &dyn Tokenize,
) -> Result<Vec<Vec<i64>>, RequestError> {
    let tokenizer = model.tokenizer()?;
    let start = tokenizer.token(settings.start_of_image_token_id).unwrap_or_default();
    let encode = |text: &String| {
        check_length("text", text, model.longest_source())?;
        let images = if start.is_empty() { 0 } else { text.matches(&start).count() };
        Ok(tokenizer.encode_with_images(text, settings, &vec![0; images])?)
    };
    texts.iter().map(encode).collect()
}

/// The images of each source: as many as it has image tokens for.
fn in_order(
    ids: Vec<Vec<i64>>,
    images: Vec<PixelValues>,
    settings: &ImageSettings,
) -> Result<SourcesWithImages, RequestError> {
    let tokens = |row: &Vec<i64>| row.iter().filter(|id| **id == settings.image_token_id).count();
    let found = ids.iter().map(tokens).sum::<usize>();
    if found != images.len() * settings.tokens_per_image {
        let expected = format!(
            "{} image tokens in the sources, {} for each of {} images",
            images.len() * settings.tokens_per_image,
            settings.tokens_per_image,
            images.len()
        );
        return Err(RequestError::form("pixel_values", expected, found.to_string()));
    }
    let mut images = images.into_iter();
    let images =
        ids.iter().map(|row| images.by_ref().take(tokens(row) / settings.tokens_per_image).collect()).collect();
    Ok(SourcesWithImages { ids, images })
}
