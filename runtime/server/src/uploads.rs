//! `Uploads`: images of a request that have no URI, because they came as bytes or as numbers.

use t5gemma_protocol::{Conversations, RequestError, Tokenize};
use t5gemma_runtime::{Error, Image, ImageLimits, ImageSettings, Tokenizer};

/// Images that came as bytes or as numbers. Requests name the bytes by their position.
#[derive(Clone, Debug, Default)]
pub struct Uploads {
    /// Files.
    pub files: Vec<Vec<u8>>,
    /// The shape and the elements of pixel values.
    pub pixel_values: Option<(Vec<usize>, Vec<f32>)>,
}

/// A model for the request that these came with.
pub struct WithUploads<'a>(pub &'a dyn Tokenize, pub &'a Uploads);

impl Tokenize for WithUploads<'_> {
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
        match name.parse::<usize>().ok().and_then(|at| self.1.files.get(at)) {
            Some(bytes) => Ok(Image::decode(bytes, self.image_limits())?),
            None => self.0.image_file(name),
        }
    }

    fn tensor_file(&self, file: &str, tensor: &str) -> Result<(Vec<usize>, Vec<f32>), RequestError> {
        match &self.1.pixel_values {
            Some(values) => Ok(values.clone()),
            None => self.0.tensor_file(file, tensor),
        }
    }

    fn longest_source(&self) -> usize {
        self.0.longest_source()
    }

    fn longest_target(&self) -> usize {
        self.0.longest_target()
    }
}
