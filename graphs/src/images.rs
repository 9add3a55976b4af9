//! `ImageSettings`: how a model that reads images gets them, as pixel values and as tokens of the prompt. The exporter
//! takes them from a checkpoint's `preprocessor_config.json`, the runtime reads them from the manifest.

use serde::{Deserialize, Serialize};

use crate::config::ConfigError;

/// The longest side of the square that images are resized to.
const MOST_IMAGE_SIZE: usize = 1 << 14;
/// The most tokens of an image.
const MOST_TOKENS: usize = 1 << 16;
/// The most crops of an image.
const MOST_CROPS: usize = 1 << 10;

/// How images become pixel values and tokens. Fields have the names that `preprocessor_config.json` gives them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSettings {
    /// The side of the square that images are resized to, in pixels.
    pub image_size: usize,
    /// What each of the values 0 to 255 of a pixel is multiplied by, before it is normalized.
    pub rescale_factor: f64,
    /// Subtracted from the rescaled values of red, green and blue.
    pub image_mean: [f64; 3],
    /// What the differences are divided by.
    pub image_std: [f64; 3],
    /// Crops that follow an image.
    pub pan_and_scan: PanAndScan,
    /// Tokens of an image.
    pub tokens_per_image: usize,
    /// The token in whose places the features of an image are put.
    pub image_token_id: i64,
    /// The token before an image, which stands for a whole image in a text.
    pub start_of_image_token_id: i64,
    /// The token behind an image.
    pub end_of_image_token_id: i64,
}

/// Pan and scan: parts of an image that is much longer than wide, or wider than long, follow it as further images.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PanAndScan {
    /// Whether images are cropped unless a request says otherwise: `do_pan_and_scan`.
    pub enabled: bool,
    /// The smallest side of a crop, in pixels of the image: `pan_and_scan_min_crop_size`.
    pub min_crop_size: usize,
    /// The most crops of an image: `pan_and_scan_max_num_crops`.
    pub max_num_crops: usize,
    /// The ratio of sides from which on an image is cropped: `pan_and_scan_min_ratio_to_activate`.
    pub min_ratio_to_activate: f64,
}

impl Default for PanAndScan {
    /// The defaults of transformers' `Gemma3Processor`.
    fn default() -> PanAndScan {
        PanAndScan { enabled: false, min_crop_size: 256, max_num_crops: 4, min_ratio_to_activate: 1.2 }
    }
}

impl ImageSettings {
    /// The settings of a checkpoint that says nothing but its configuration: the defaults of transformers'
    /// `Gemma3ImageProcessor`, with the size of the vision tower's images.
    pub fn new(image_size: usize, tokens_per_image: usize, tokens: ImageTokens) -> ImageSettings {
        ImageSettings {
            image_size,
            rescale_factor: 1.0 / 255.0,
            image_mean: [0.5; 3],
            image_std: [0.5; 3],
            pan_and_scan: PanAndScan::default(),
            tokens_per_image,
            image_token_id: tokens.image,
            start_of_image_token_id: tokens.start_of_image,
            end_of_image_token_id: tokens.end_of_image,
        }
    }

    /// Checks settings from a file, so that sizes computed from them cannot overflow and pixel values are finite.
    ///
    /// # Errors
    /// The first field outside its limits.
    pub fn check(&self) -> Result<(), ConfigError> {
        let PanAndScan { min_crop_size, max_num_crops, min_ratio_to_activate, .. } = self.pan_and_scan;
        for (field, size, most) in [
            ("image_size", self.image_size, MOST_IMAGE_SIZE),
            ("tokens_per_image", self.tokens_per_image, MOST_TOKENS),
            ("pan_and_scan.min_crop_size", min_crop_size, usize::MAX),
            ("pan_and_scan.max_num_crops", max_num_crops, MOST_CROPS),
        ] {
            if !(1..=most).contains(&size) {
                let expected = match most {
                    usize::MAX => "a positive integer".to_string(),
                    most => format!("an integer between 1 and {most}"),
                };
                return Err(ConfigError { field: field.into(), expected, found: size.to_string() });
            }
        }
        let finite = |number: f64| number.is_finite();
        let positive = |number: f64| number.is_finite() && number > 0.0;
        let mut numbers = vec![
            ("rescale_factor", self.rescale_factor, finite as fn(f64) -> bool, "a number"),
            ("pan_and_scan.min_ratio_to_activate", min_ratio_to_activate, positive, "a positive number"),
        ];
        numbers.extend(self.image_mean.map(|mean| ("image_mean", mean, finite as fn(f64) -> bool, "numbers")));
        numbers.extend(self.image_std.map(|std| ("image_std", std, positive as fn(f64) -> bool, "positive numbers")));
        for (field, number, is_accepted, expected) in numbers {
            if !is_accepted(number) {
                let (field, expected) = (field.to_string(), expected.to_string());
                return Err(ConfigError { field, expected, found: number.to_string() });
            }
        }
        for (field, token) in [
            ("image_token_id", self.image_token_id),
            ("start_of_image_token_id", self.start_of_image_token_id),
            ("end_of_image_token_id", self.end_of_image_token_id),
        ] {
            if token < 0 {
                let (field, expected) = (field.to_string(), "a token id".to_string());
                return Err(ConfigError { field, expected, found: token.to_string() });
            }
        }
        Ok(())
    }

    /// Numbers of the pixel values of one image, `3 · image_size · image_size`.
    pub fn pixel_values(&self) -> usize {
        3 * self.image_size * self.image_size
    }
}

/// The tokens of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageTokens {
    /// As [`ImageSettings::image_token_id`].
    pub image: i64,
    /// As [`ImageSettings::start_of_image_token_id`].
    pub start_of_image: i64,
    /// As [`ImageSettings::end_of_image_token_id`].
    pub end_of_image: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> ImageSettings {
        ImageSettings::new(896, 256, ImageTokens { image: 256001, start_of_image: 255999, end_of_image: 256000 })
    }

    #[test]
    fn settings_survive_json() {
        let text = serde_json::to_string(&settings()).expect("settings are an object");
        assert_eq!(serde_json::from_str::<ImageSettings>(&text).expect("reads what was written"), settings());
    }

    #[test]
    fn settings_are_checked() {
        type Change = fn(&mut ImageSettings);
        let cases: [(&str, Change); 9] = [
            ("image_size", |settings| settings.image_size = 0),
            ("image_size", |settings| settings.image_size = 1 << 15),
            ("tokens_per_image", |settings| settings.tokens_per_image = 1 << 20),
            ("pan_and_scan.max_num_crops", |settings| settings.pan_and_scan.max_num_crops = 0),
            ("pan_and_scan.min_crop_size", |settings| settings.pan_and_scan.min_crop_size = 0),
            ("pan_and_scan.min_ratio_to_activate", |settings| settings.pan_and_scan.min_ratio_to_activate = f64::NAN),
            ("image_std", |settings| settings.image_std[1] = 0.0),
            ("image_mean", |settings| settings.image_mean[2] = f64::INFINITY),
            ("start_of_image_token_id", |settings| settings.start_of_image_token_id = -1),
        ];
        settings().check().expect("those of the official checkpoints are within the limits");
        for (field, change) in cases {
            let mut settings = settings();
            change(&mut settings);
            assert_eq!(settings.check().expect_err(field).field, field);
        }
    }
}
