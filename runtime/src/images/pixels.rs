//! `PixelValues`: a picture as a vision tower takes it, and the crops that pan and scan makes of it.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use t5gemma_graphs::images::{ImageSettings, PanAndScan};

use super::Image;
use super::resize::{Part, resize};
use crate::error::Error;

/// The pixel values of one picture or crop, `[3, image_size, image_size]`: red, green, blue.
#[derive(Clone, PartialEq)]
pub struct PixelValues {
    image_size: usize,
    values: Arc<[f32]>,
    /// SHA-256 of the values: what caches know a picture by.
    digest: [u8; 32],
}

impl fmt::Debug for PixelValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PixelValues").field("image_size", &self.image_size).finish_non_exhaustive()
    }
}

impl PixelValues {
    /// Exact values, `3 · image_size · image_size` numbers, in place of a picture.
    ///
    /// # Errors
    /// Another number of values, or one that is not finite.
    pub fn new(image_size: usize, values: Vec<f32>) -> Result<PixelValues, Error> {
        let expected = image_size.checked_mul(image_size).and_then(|pixels| pixels.checked_mul(3));
        if expected != Some(values.len()) || values.is_empty() {
            let expected = format!("values of the shape [3, {image_size}, {image_size}]");
            return Err(Error::input("pixel_values", expected, format!("{} values", values.len())));
        }
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(Error::input(format!("pixel_values[{at}]"), "a finite number", values[at].to_string()));
        }
        Ok(PixelValues::of(image_size, values))
    }

    /// The images of a tensor `[images, 3, image_size, image_size]`, row-major.
    ///
    /// # Errors
    /// Another shape, another number of values, or one that is not finite.
    pub fn of_tensor(shape: &[usize], values: Vec<f32>) -> Result<Vec<PixelValues>, Error> {
        let &[images, 3, image_size, width] = shape else {
            let expected = "a tensor of the shape [images, 3, image_size, image_size]";
            return Err(Error::input("pixel_values", expected, format!("shape {shape:?}")));
        };
        let one = values.len().checked_div(images).unwrap_or(0);
        if image_size != width || one * images != values.len() {
            let expected = "as many values as the shape has, of square images";
            return Err(Error::input("pixel_values", expected, format!("{} of shape {shape:?}", values.len())));
        }
        values.chunks(one.max(1)).map(|values| PixelValues::new(image_size, values.to_vec())).collect()
    }

    fn of(image_size: usize, values: Vec<f32>) -> PixelValues {
        let mut sha = Sha256::new();
        let mut bytes = Vec::new();
        for values in values.chunks(1 << 14) {
            bytes.clear();
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            sha.update(&bytes);
        }
        PixelValues { image_size, values: values.into(), digest: sha.finalize().into() }
    }

    /// The side of the square.
    pub fn image_size(&self) -> usize {
        self.image_size
    }

    /// The values of red, green and blue, rows from the top.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// What caches know the picture by.
    pub(crate) fn digest(&self) -> [u8; 32] {
        self.digest
    }
}

impl Image {
    /// The pixel values of the picture, resized to a square, and with `pan_and_scan` those of its crops behind them.
    ///
    /// # Panics
    /// Settings that [`ImageSettings::check`] refuses.
    pub fn pixel_values(&self, settings: &ImageSettings, pan_and_scan: bool) -> Vec<PixelValues> {
        let whole =
            Part { rgb: &self.rgb, stride: self.width, left: 0, top: 0, width: self.width, height: self.height };
        let crops = if pan_and_scan { crops(whole, settings.pan_and_scan) } else { Vec::new() };
        std::iter::once(whole).chain(crops).map(|part| normalized(part, settings)).collect()
    }
}

fn normalized(part: Part, settings: &ImageSettings) -> PixelValues {
    let size = settings.image_size;
    let resized = resize(part, size, size);
    let mut values = Vec::with_capacity(settings.pixel_values());
    for channel in 0..3 {
        let (mean, std) = (settings.image_mean[channel], settings.image_std[channel]);
        let of_byte = |byte: usize| ((byte as f64 * settings.rescale_factor - mean) / std) as f32;
        let table: Vec<f32> = (0..256).map(of_byte).collect();
        values.extend(resized.iter().skip(channel).step_by(3).map(|byte| table[usize::from(*byte)]));
    }
    PixelValues::of(size, values)
}

/// The crops of a picture, along its longer side.
fn crops(whole: Part, settings: PanAndScan) -> Vec<Part> {
    let Part { width, height, .. } = whole;
    let is_wide = width >= height;
    let (long, short) = if is_wide { (width, height) } else { (height, width) };
    let ratio = long as f64 / short as f64;
    if ratio < settings.min_ratio_to_activate {
        return Vec::new();
    }
    let count = (long / settings.min_crop_size).min((ratio + 0.5).floor() as usize);
    let count = count.max(2).min(settings.max_num_crops);
    let length = long.div_ceil(count);
    if length.min(short) < settings.min_crop_size {
        return Vec::new();
    }
    let starts = (0..long).step_by(length);
    let part = |start: usize| {
        let length = length.min(long - start);
        match is_wide {
            true => Part { left: start, width: length, ..whole },
            false => Part { top: start, height: length, ..whole },
        }
    };
    starts.map(part).collect()
}
