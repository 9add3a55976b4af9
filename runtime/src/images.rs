//! `Image`: a picture as RGB pixels, decoded from JPEG, PNG or WebP as Pillow decodes it, and the pixel values that a
//! vision tower takes for it. The only module that uses the `image` crate. It knows no model: `batch` carries pixel
//! values beside the tokens, `model` runs the tower.
//!
//! # Design
//! Pixel values are those of transformers' `Gemma3ImageProcessor` with Pillow, bit for bit wherever Pillow defines
//! them: colours, orientation and resizing. Only lossy decoders may differ, by a few of 255 levels in a pixel.

mod data_uri;
mod decode;
mod jpeg;
mod orientation;
mod pixels;
mod png;
mod prompt;
mod resize;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use crate::error::Error;

pub use pixels::PixelValues;

/// A picture: rows of red, green and blue, from the top.
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    width: usize,
    height: usize,
    rgb: Arc<[u8]>,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("width", &self.width).field("height", &self.height).finish_non_exhaustive()
    }
}

/// Limits on the pictures that are decoded, checked before memory is allocated for pixels. Decoding takes up to 9 bytes
/// a pixel, and 3 remain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageLimits {
    /// Bytes of an encoded picture, 64 MiB by default.
    pub max_bytes: usize,
    /// Pixels, width times height; 89,478,485 by default, from which on Pillow warns of a decompression bomb.
    pub max_pixels: usize,
}

impl ImageLimits {
    /// Sets [`ImageLimits::max_bytes`].
    pub const fn max_bytes(self, max_bytes: usize) -> ImageLimits {
        ImageLimits { max_bytes, ..self }
    }

    /// Sets [`ImageLimits::max_pixels`].
    pub const fn max_pixels(self, max_pixels: usize) -> ImageLimits {
        ImageLimits { max_pixels, ..self }
    }
}

impl Default for ImageLimits {
    fn default() -> ImageLimits {
        ImageLimits { max_bytes: 64 << 20, max_pixels: 89_478_485 }
    }
}

/// Why a picture cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unusable {
    expected: String,
    found: String,
}

impl Unusable {
    fn new(expected: impl Into<String>, found: impl Into<String>) -> Unusable {
        Unusable { expected: expected.into(), found: found.into() }
    }

    /// The error of a field of a request.
    pub fn of(self, field: &str) -> Error {
        Error::input(field, self.expected, self.found)
    }

    /// The error of a file.
    fn at(self, path: &Path) -> Error {
        Error::File { path: path.into(), problem: format!("expected {}, found {}", self.expected, self.found) }
    }
}

impl Image {
    /// Decodes a JPEG, PNG or WebP file: its orientation is applied, transparency is dropped, and grey, palettes, 16
    /// bits and CMYK become RGB, all as Pillow's `convert("RGB")` does it.
    ///
    /// # Errors
    /// Another format, an animation, a broken or truncated file, or one beyond the limits.
    pub fn decode(bytes: &[u8], limits: ImageLimits) -> Result<Image, Error> {
        decode::decode(bytes, limits).map_err(|unusable| unusable.of("image"))
    }

    /// Reads and decodes a file.
    ///
    /// # Errors
    /// A file that cannot be read, and those of [`Image::decode`].
    pub fn open(path: impl AsRef<Path>, limits: ImageLimits) -> Result<Image, Error> {
        let path = path.as_ref();
        let file = File::open(path).map_err(Error::reading(path))?;
        let mut bytes = Vec::new();
        // One byte more than is accepted, so that a file which grows, or a device, is not read to its end.
        let most = limits.max_bytes as u64;
        file.take(most.saturating_add(1)).read_to_end(&mut bytes).map_err(Error::reading(path))?;
        decode::decode(&bytes, limits).map_err(|unusable| unusable.at(path))
    }

    /// Decodes a data URI, `data:image/png;base64,…`. The media type is not looked at: the bytes say what they are.
    ///
    /// # Errors
    /// A text that is not a data URI, and those of [`Image::decode`].
    pub fn from_data_uri(uri: &str, limits: ImageLimits) -> Result<Image, Error> {
        Image::of_data_uri(uri, limits).map_err(|unusable| unusable.of("image"))
    }

    /// [`Image::from_data_uri`] for callers that name the field.
    pub(crate) fn of_data_uri(uri: &str, limits: ImageLimits) -> Result<Image, Unusable> {
        decode::decode(&data_uri::bytes(uri, limits.max_bytes)?, limits)
    }

    /// A picture of `width · height · 3` bytes: rows of red, green and blue, from the top.
    ///
    /// # Errors
    /// No pixel, or another number of bytes.
    pub fn from_rgb(width: usize, height: usize, rgb: Vec<u8>) -> Result<Image, Error> {
        if width == 0 || height == 0 {
            return Err(Error::input("image", "at least one pixel", format!("{width} x {height}")));
        }
        if width.checked_mul(height).and_then(|pixels| pixels.checked_mul(3)) != Some(rgb.len()) {
            let expected = format!("{width} x {height} x 3 bytes");
            return Err(Error::input("image", expected, format!("{} bytes", rgb.len())));
        }
        Ok(Image { width, height, rgb: rgb.into() })
    }

    /// Pixels of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Rows of red, green and blue, from the top.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }
}
