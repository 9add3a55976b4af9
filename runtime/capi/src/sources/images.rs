//! Images of the header's sources, as pixel values beside their tokens.

use t5gemma_protocol::Tokenize;
use t5gemma_runtime::{Batch, Error, Image, ImageLimits, ImageSettings, PixelValues, TextWithImages};

use super::t5g_sources;
use crate::error::{t5g_code, t5g_error};
use crate::input::Array;

/// A pointer to the bytes of each image.
pub type Files = Array<Array<u8>>;

/// What the caller has given.
pub enum GivenImages {
    /// The images of each source.
    Pictures(Vec<Vec<Image>>),
    /// Exact numbers, for the image tokens of all sources in their order.
    Pixels(Vec<f32>),
}

impl GivenImages {
    /// Reads and decodes the images, if there are any.
    pub fn read(given: &t5g_sources, rows: usize) -> Result<Option<GivenImages>, t5g_error> {
        let wrong = |name: &str, expected: &str, found: String| {
            Err(t5g_error::expected(t5g_code::Input, &format!("sources.{name}"), expected, found))
        };
        let numbers = given.pixel_values.optional(given.pixel_values_size, "sources.pixel_values")?;
        let Some(images) = given.images.optional(given.images_count, "sources.images")? else {
            return Ok(numbers.map(|numbers| GivenImages::Pixels(numbers.to_vec())));
        };
        if numbers.is_some() {
            return wrong("pixel_values", "NULL beside images", "numbers".into());
        }
        let sizes = given.image_sizes.get(images.len(), "sources.image_sizes")?;
        let widths = given.image_widths.optional(images.len(), "sources.image_widths")?;
        let counts = match given.image_counts.optional(rows, "sources.image_counts")? {
            Some(counts) => counts.to_vec(),
            None if rows == 1 => vec![images.len()],
            None => return wrong("image_counts", "a number for each source", "NULL".into()),
        };
        let total = counts.iter().try_fold(0usize, |sum, &count| sum.checked_add(count));
        if total != Some(images.len()) {
            let expected = format!("{} in all (images_count)", images.len());
            return wrong("image_counts", &expected, total.map_or("more".into(), |total| total.to_string()));
        }
        let mut pictures = Vec::with_capacity(images.len());
        for (at, (bytes, &size)) in images.iter().zip(sizes).enumerate() {
            let name = format!("sources.images[{at}]");
            let bytes = bytes.get(size, &name)?;
            let width = widths.map_or(0, |widths| widths[at]);
            let picture = match width {
                0 => Image::decode(bytes, ImageLimits::default()),
                width => Image::from_rgb(width, size / width / 3, bytes.to_vec()),
            };
            pictures.push(picture.map_err(|error| match error {
                Error::Input { expected, found, .. } => t5g_error::expected(t5g_code::Input, &name, expected, found),
                other => other.into(),
            })?);
        }
        let mut pictures = pictures.into_iter();
        let of_rows = counts.iter().map(|count| pictures.by_ref().take(*count).collect()).collect();
        Ok(Some(GivenImages::Pictures(of_rows)))
    }
}

/// 0 for the model's own setting.
pub fn pan_and_scan(given: &t5g_sources) -> Result<Option<bool>, t5g_error> {
    match given.pan_and_scan {
        0 => Ok(None),
        1 => Ok(Some(true)),
        2 => Ok(Some(false)),
        other => {
            let expected = "0 (as the model's settings say), 1 (yes) or 2 (no)";
            Err(t5g_error::expected(t5g_code::Argument, "sources.pan_and_scan", expected, other.to_string()))
        }
    }
}

/// Texts with the images that stand in them.
pub fn batch_of_texts(
    texts: &[&str],
    pictures: Vec<Vec<Image>>,
    pan_and_scan: Option<bool>,
    settings: &ImageSettings,
    model: &dyn Tokenize,
    pad: i64,
) -> Result<Batch, t5g_error> {
    let (mut ids, mut images) = (Vec::new(), Vec::new());
    for (text, pictures) in texts.iter().zip(pictures) {
        let source = TextWithImages::new(*text, pictures);
        let source = match pan_and_scan {
            Some(pan_and_scan) => source.pan_and_scan(pan_and_scan),
            None => source,
        };
        let (of_text, of_images) = source.tokenize(model.tokenizer()?, settings)?;
        ids.push(of_text);
        images.push(of_images);
    }
    Ok(Batch::padded(&ids, pad)?.with_images(images)?)
}

/// The pixel values of the images of each source, crops included.
pub fn pixel_values(
    pictures: Vec<Vec<Image>>,
    pan_and_scan: Option<bool>,
    settings: &ImageSettings,
) -> Vec<Vec<PixelValues>> {
    let pan_and_scan = pan_and_scan.unwrap_or(settings.pan_and_scan.enabled);
    let of_row =
        |images: Vec<Image>| images.iter().flat_map(|image| image.pixel_values(settings, pan_and_scan)).collect();
    pictures.into_iter().map(of_row).collect()
}

/// The images of exact numbers.
pub fn exact(numbers: Vec<f32>, settings: &ImageSettings) -> Result<Vec<PixelValues>, t5g_error> {
    let size = settings.image_size;
    let one = settings.pixel_values();
    if numbers.is_empty() || !numbers.len().is_multiple_of(one) {
        let expected = format!("a multiple of {one} (3 x {size} x {size})");
        let found = numbers.len().to_string();
        return Err(t5g_error::expected(t5g_code::Input, "sources.pixel_values_size", expected, found));
    }
    Ok(PixelValues::of_tensor(&[numbers.len() / one, 3, size, size], numbers)?)
}
