//! The images of a batch's sources, and which of them stand in which row.

use t5gemma_graphs::facts::{Facts, VisionFacts};

use super::Batch;
use crate::error::Error;
use crate::images::PixelValues;

impl Batch {
    /// Sets the images of each source: their pixel values in the order in which their tokens stand in it, crops
    /// included. A source has `tokens_per_image` image tokens for each.
    ///
    /// # Errors
    /// Not one list per source.
    pub fn with_images(self, images: Vec<Vec<PixelValues>>) -> Result<Batch, Error> {
        if images.len() != self.rows {
            let expected = format!("{} lists, as many as input_ids has rows", self.rows);
            return Err(Error::input("images", expected, images.len().to_string()));
        }
        Ok(Batch { images, ..self })
    }

    /// Sets the images of all sources in reading order, as transformers takes `pixel_values`: each source gets as many as
    /// it has image tokens for.
    ///
    /// # Errors
    /// Another number of images than there are image tokens for, or a model that reads none.
    pub fn with_images_in_order(self, facts: &Facts, images: Vec<PixelValues>) -> Result<Batch, Error> {
        let vision = vision(facts)?;
        let places: Vec<usize> = (0..self.rows).map(|row| self.image_tokens(row, vision)).collect();
        if places.iter().sum::<usize>() != images.len() * vision.tokens_per_image {
            let found = format!("{} in input_ids", places.iter().sum::<usize>());
            return Err(Error::input("pixel_values", tokens_of(images.len(), vision), found));
        }
        let mut images = images.into_iter();
        let of_rows = places.iter().map(|places| images.by_ref().take(places / vision.tokens_per_image).collect());
        let of_rows = of_rows.collect();
        self.with_images(of_rows)
    }

    /// The images of each source, in the order of their tokens.
    pub fn images(&self) -> &[Vec<PixelValues>] {
        &self.images
    }

    /// Whether there is an image.
    pub(crate) fn has_images(&self) -> bool {
        self.images.iter().any(|images| !images.is_empty())
    }

    /// Checks that the model reads images if there are any, that they have its size, and that their tokens are there.
    pub(super) fn check_images(&self, facts: &Facts) -> Result<(), Error> {
        if !self.has_images() {
            return Ok(());
        }
        let vision = vision(facts)?;
        for (row, images) in self.images.iter().enumerate().filter(|(_, images)| !images.is_empty()) {
            let found = self.image_tokens(row, vision);
            if found != images.len() * vision.tokens_per_image {
                return Err(Error::input(
                    format!("input_ids[{row}]"),
                    tokens_of(images.len(), vision),
                    found.to_string(),
                ));
            }
            check_sizes(images, vision, |at| format!("images[{row}][{at}]"))?;
        }
        Ok(())
    }

    /// Whether image tokens of a source with images are hidden by its mask.
    pub(crate) fn hides_image_tokens(&self, facts: &Facts) -> bool {
        let Some(vision) = facts.vision.as_ref().filter(|_| self.has_images()) else { return false };
        self.ids.iter().zip(&self.mask).any(|(&id, &visible)| id == vision.image_token && visible == 0)
    }

    fn image_tokens(&self, row: usize, vision: &VisionFacts) -> usize {
        self.source(row).iter().filter(|id| **id == vision.image_token).count()
    }
}

/// Checks that images have the size that the model reads; `field` names one.
fn check_sizes(images: &[PixelValues], vision: &VisionFacts, field: impl Fn(usize) -> String) -> Result<(), Error> {
    let size = |side: usize| format!("{side} x {side} pixels");
    match images.iter().enumerate().find(|(_, image)| image.image_size() != vision.image_size) {
        Some((at, image)) => Err(Error::input(field(at), size(vision.image_size), size(image.image_size()))),
        None => Ok(()),
    }
}

/// Checks images of no source: that the model reads images, and that they have its size.
pub(crate) fn check_alone(images: &[PixelValues], facts: &Facts) -> Result<(), Error> {
    check_sizes(images, vision(facts)?, |at| format!("images[{at}]"))
}

/// The part of the model that reads images.
fn vision(facts: &Facts) -> Result<&VisionFacts, Error> {
    facts.vision.as_ref().ok_or_else(reads_no_images)
}

/// The error of images for a model without a vision tower.
pub(crate) fn reads_no_images() -> Error {
    Error::Unsupported {
        what: "images: the model reads none".into(),
        remedy: "export a checkpoint with a vision tower, and without --no-vision".into(),
    }
}

fn tokens_of(images: usize, vision: &VisionFacts) -> String {
    let VisionFacts { tokens_per_image, image_token, .. } = vision;
    let tokens = images * tokens_per_image;
    format!("{tokens} tokens {image_token} ({tokens_per_image} for each of {images} images)")
}
