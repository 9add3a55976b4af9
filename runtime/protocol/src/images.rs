//! The images of requests, as JSON. `tokenize` reads them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::RequestError;
use crate::json::abbreviated;

/// The images of one source, or those of each of several: data URIs, and names of files where the interface reads files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Images {
    /// Those of one source.
    One(Vec<String>),
    /// Those of each source.
    Several(Vec<Vec<String>>),
}

/// A tensor of a safetensors file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TensorFile {
    /// The file.
    pub file: String,
    /// The name of the tensor.
    pub tensor: String,
}

/// The fields of a request that are about images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ImageFields {
    /// An image for each start-of-image token of the text, or for as many image tokens of `input_ids` as an image has: a
    /// list for one source, a list of lists for several. Each is a data URI or, on the command line, a file: JPEG, PNG or
    /// WebP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images: Option<Images>,
    /// Exact pixel values instead of `images`, on the command line: a float32 tensor `[images, 3, image_size,
    /// image_size]` of a safetensors file, in the order of the tokens of all sources.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pixel_values: Option<TensorFile>,
    /// Whether crops follow images that are much wider than high or the reverse. Default: as the model's settings say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pan_and_scan: Option<bool>,
}

impl Images {
    /// `["…", "…"]` or `[["…"], []]`.
    pub(crate) fn parse(value: &Value) -> Result<Images, RequestError> {
        let strings = |value: &Value| -> Option<Vec<String>> {
            value.as_array()?.iter().map(|text| text.as_str().map(str::to_string)).collect()
        };
        let images = match value.as_array() {
            Some(list) if list.first().is_some_and(Value::is_array) => {
                list.iter().map(strings).collect::<Option<_>>().map(Images::Several)
            }
            _ => strings(value).map(Images::One),
        };
        let refused = || RequestError::form("images", "strings in a list or a list of lists", abbreviated(value));
        images.ok_or_else(refused)
    }

    /// The images of each source.
    pub fn rows(&self) -> &[Vec<String>] {
        match self {
            Images::One(images) => std::slice::from_ref(images),
            Images::Several(rows) => rows,
        }
    }
}

impl TensorFile {
    pub(crate) fn parse(value: Value) -> Result<TensorFile, RequestError> {
        let found = abbreviated(&value);
        serde_json::from_value(value)
            .map_err(|_| RequestError::form("pixel_values", "{\"file\": \"…\", \"tensor\": \"…\"}", found))
    }
}

impl ImageFields {
    /// Whether there are images.
    pub fn is_given(&self) -> bool {
        self.images.is_some() || self.pixel_values.is_some()
    }

    /// The number of images that are named.
    pub fn count(&self) -> usize {
        self.images.iter().flat_map(|images| images.rows()).map(Vec::len).sum()
    }

    /// Refuses two kinds of images, and settings without images.
    ///
    /// # Errors
    /// Fields that do not go together.
    pub fn check(&self) -> Result<(), RequestError> {
        match (&self.images, &self.pixel_values, self.pan_and_scan) {
            (Some(_), Some(_), _) => Err(RequestError::form("", "images or pixel_values", "both")),
            (None, _, Some(_)) => Err(RequestError::form("pan_and_scan", "images beside it", "none")),
            _ => Ok(()),
        }
    }
}
