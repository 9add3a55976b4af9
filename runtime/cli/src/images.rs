//! Images of requests and of `--image`: the files that they name, which are the user's own.

use std::path::Path;

use serde_json::{Map, Value};
use t5gemma_protocol::{Conversations, RequestError, Tokenize};
use t5gemma_runtime::{Adapter, Error, Image, ImageLimits, ImageSettings, Tokenizer};

use crate::tensors::Tensors;

/// Flags for the images of texts.
#[derive(clap::Args)]
pub struct ImageArguments {
    /// Image for every text; repeat for a text with several
    ///
    /// A JPEG, PNG or WebP file, or a data URI. The images stand where the text has <start_of_image>; an empty text
    /// is one of nothing but the images. JSON requests without images of their own get them, too.
    #[arg(long = "image", value_name = "FILE", help_heading = "Input")]
    images: Vec<String>,
    /// Whether crops follow images that are much wider than high or the reverse [default: as the model's settings say]
    #[arg(
        long,
        value_name = "BOOL",
        help_heading = "Input",
        num_args = 0..=1,
        default_missing_value = "true",
        requires = "images"
    )]
    pan_and_scan: Option<bool>,
}

impl ImageArguments {
    /// The fields of a request with a text.
    pub fn fields(&self) -> Map<String, Value> {
        let mut fields = Map::new();
        if !self.images.is_empty() {
            fields.insert("images".into(), self.images.clone().into());
            fields.insert("pan_and_scan".into(), self.pan_and_scan.into());
        }
        fields
    }
}

/// Reads an image file.
pub fn image_file(name: &str, limits: ImageLimits) -> Result<Image, RequestError> {
    Ok(Image::open(name, limits)?)
}

/// Reads a float32 tensor.
pub fn tensor_file(file: &str, tensor: &str) -> Result<(Vec<usize>, Vec<f32>), RequestError> {
    let wrong = |found: String| RequestError::form("pixel_values", "a float32 tensor of a safetensors file", found);
    let tensors = Tensors::read(Path::new(file)).map_err(|error| wrong(format!("{error:#}")))?;
    let numbers = tensors.floats(tensor).map_err(|error| wrong(format!("{error:#}")))?;
    let numbers = numbers.ok_or_else(|| wrong(format!("{file} without a tensor {tensor:?}")))?;
    Ok((numbers.shape().to_vec(), numbers.into_iter().collect()))
}

/// A model whose requests may name files.
pub struct WithFiles<'a>(pub &'a (dyn Tokenize + Sync));

impl Tokenize for WithFiles<'_> {
    fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.0.tokenizer()
    }

    fn target_tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.0.target_tokenizer()
    }

    fn conversations(&self) -> Option<&dyn Conversations> {
        self.0.conversations()
    }

    fn adapter(&self, name: &str) -> Result<Adapter, Error> {
        self.0.adapter(name)
    }

    fn image_settings(&self) -> Result<&ImageSettings, Error> {
        self.0.image_settings()
    }

    fn image_limits(&self) -> ImageLimits {
        self.0.image_limits()
    }

    fn image_file(&self, name: &str) -> Result<Image, RequestError> {
        image_file(name, self.image_limits())
    }

    fn tensor_file(&self, file: &str, tensor: &str) -> Result<(Vec<usize>, Vec<f32>), RequestError> {
        tensor_file(file, tensor)
    }

    fn longest_source(&self) -> usize {
        self.0.longest_source()
    }

    fn longest_target(&self) -> usize {
        self.0.longest_target()
    }
}
