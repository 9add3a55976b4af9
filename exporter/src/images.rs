//! How a checkpoint wants its images: `processor_config.json` and `preprocessor_config.json` beside its configuration.

use std::path::Path;

use t5gemma_graphs::images::ImageSettings;

use crate::error::{Error, Result};
use crate::files;

/// The file of an image processor.
pub const PREPROCESSOR: &str = "preprocessor_config.json";
/// The file of a processor, which newer checkpoints have the image processor in.
pub const PROCESSOR: &str = "processor_config.json";

/// The settings for images of the checkpoint in `folder`: `defaults` with those of its files in their place. As in
/// transformers, an image processor in [`PROCESSOR`] counts instead of [`PREPROCESSOR`].
///
/// # Errors
/// A file that cannot be read, or a field whose value is not implemented.
pub fn image_settings(folder: &Path, defaults: ImageSettings) -> Result<ImageSettings> {
    let mut settings = defaults;
    let path = folder.join(PROCESSOR);
    if files::entry_exists(&path) {
        let (_, document) = files::read_json_object(&path)?;
        let with_processor = settings.with_processor(document);
        let (found, has_images) = with_processor.map_err(|error| Error::config(path.display(), error))?;
        if has_images {
            return Ok(found);
        }
        settings = found;
    }
    let path = folder.join(PREPROCESSOR);
    if files::entry_exists(&path) {
        let (_, document) = files::read_json_object(&path)?;
        return settings.with_preprocessor("", document).map_err(|error| Error::config(path.display(), error));
    }
    Ok(settings)
}
