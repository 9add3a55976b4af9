//! `ImageSettings`: how a model that reads images gets them, as pixel values and as tokens of the prompt. The exporter
//! takes them from a checkpoint's `preprocessor_config.json`, the runtime reads them from the manifest.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{ConfigError, Fields};

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

    /// The settings with those of a `preprocessor_config.json`, or of the object at `path` in a `processor_config.json`,
    /// in their place. Fields that transformers' `Gemma3ImageProcessor` does not read are ignored.
    ///
    /// # Errors
    /// A field with a value that changes pixel values and is not implemented, or a size that the vision tower does not
    /// take.
    pub fn with_preprocessor(self, path: &str, value: Value) -> Result<ImageSettings, ConfigError> {
        let mut fields = Fields::of(path, value)?;
        fields.expect("image_processor_type", "Gemma3ImageProcessor", |value| {
            value.as_str().is_some_and(|name| name.starts_with("Gemma3ImageProcessor"))
        })?;
        fields.expect("do_resize", "true (the vision tower takes one size)", |value| value == true)?;
        fields.expect("resample", "2 (bilinear)", |value| value == 2)?;
        let mut settings = self;
        let side = settings.image_size;
        let is_size = |value: &Value| match value {
            Value::Object(size) => {
                size.len() == 2 && ["height", "width"].iter().all(|axis| size.get(*axis) == Some(&side.into()))
            }
            size => *size == side,
        };
        fields.expect(
            "size",
            &format!("{{\"height\": {side}, \"width\": {side}}} (the vision tower's image_size)"),
            is_size,
        )?;
        let finite = |value: &Value| value.as_f64().filter(|number| number.is_finite());
        let of_channels = |value: &Value| match value {
            Value::Array(numbers) => {
                numbers.iter().map(finite).collect::<Option<Vec<f64>>>().and_then(|numbers| numbers.try_into().ok())
            }
            number => finite(number).map(|number| [number; 3]),
        };
        if let Some(factor) = fields.take("rescale_factor", "a number", finite)? {
            settings.rescale_factor = factor;
        }
        if fields.boolean("do_rescale")? == Some(false) {
            settings.rescale_factor = 1.0;
        }
        let numbers = "a number, or a list of one for each of three channels";
        if let Some(mean) = fields.take("image_mean", numbers, of_channels)? {
            settings.image_mean = mean;
        }
        if let Some(std) = fields.take("image_std", numbers, of_channels)? {
            settings.image_std = std;
        }
        if fields.boolean("do_normalize")? == Some(false) {
            (settings.image_mean, settings.image_std) = ([0.0; 3], [1.0; 3]);
        }
        let crops = &mut settings.pan_and_scan;
        let own = *crops;
        *crops = PanAndScan {
            enabled: fields.boolean("do_pan_and_scan")?.unwrap_or(own.enabled),
            min_crop_size: fields.size("pan_and_scan_min_crop_size")?.unwrap_or(own.min_crop_size),
            max_num_crops: fields.size_up_to(MOST_CROPS, "pan_and_scan_max_num_crops")?.unwrap_or(own.max_num_crops),
            min_ratio_to_activate: fields
                .positive("pan_and_scan_min_ratio_to_activate")?
                .unwrap_or(own.min_ratio_to_activate),
        };
        settings.check_sequence(&mut fields)?;
        settings.check().map_err(|error| ConfigError { field: fields.path_of(&error.field), ..error })?;
        Ok(settings)
    }

    /// The settings with those of a `processor_config.json`, and whether it has those of an image processor: they count
    /// instead of a `preprocessor_config.json`.
    ///
    /// # Errors
    /// As [`ImageSettings::with_preprocessor`].
    pub fn with_processor(self, document: Value) -> Result<(ImageSettings, bool), ConfigError> {
        let mut fields = Fields::of("", document)?;
        fields.expect("processor_class", "Gemma3Processor", |value| value == "Gemma3Processor")?;
        self.check_sequence(&mut fields)?;
        match fields.remove("image_processor") {
            None | Some(Value::Null) => Ok((self, false)),
            Some(value) => Ok((self.with_preprocessor("image_processor", value)?, true)),
        }
    }

    /// Checks that as many tokens are put in a text as the vision tower returns.
    fn check_sequence(&self, fields: &mut Fields) -> Result<(), ConfigError> {
        let tokens = self.tokens_per_image;
        let expected = format!("{tokens} (mm_tokens_per_image of config.json)");
        fields.expect("image_seq_length", &expected, |value| *value == tokens)
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
    use serde_json::json;

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
    fn a_preprocessor_is_laid_over() {
        let value = json!({
            "image_processor_type": "Gemma3ImageProcessorFast", "do_convert_rgb": null, "do_resize": true, "resample": 2,
            "size": {"height": 896, "width": 896}, "do_rescale": true, "rescale_factor": 0.25, "do_normalize": true,
            "image_mean": [0.1, 0.2, 0.3], "image_std": 0.4, "image_seq_length": 256, "do_pan_and_scan": true,
            "pan_and_scan_min_crop_size": 100, "pan_and_scan_max_num_crops": null, "do_pad": false, "other": 1
        });
        let found = settings().with_preprocessor("", value.clone()).expect("all is implemented");
        let crops = PanAndScan { enabled: true, min_crop_size: 100, ..PanAndScan::default() };
        let expected = ImageSettings {
            rescale_factor: 0.25,
            image_mean: [0.1, 0.2, 0.3],
            image_std: [0.4; 3],
            pan_and_scan: crops,
            ..settings()
        };
        assert_eq!(found, expected);
        let nested = json!({"processor_class": "Gemma3Processor", "image_processor": value, "image_seq_length": 256});
        assert_eq!(settings().with_processor(nested).expect("the same"), (expected, true));
        assert_eq!(settings().with_processor(json!({})).expect("nothing"), (settings(), false));

        let off = json!({"do_rescale": false, "rescale_factor": 0.5, "do_normalize": false, "size": 896});
        let found = settings().with_preprocessor("", off).expect("all is implemented");
        assert_eq!((found.rescale_factor, found.image_mean, found.image_std), (1.0, [0.0; 3], [1.0; 3]));
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        for (value, message) in [
            (json!({"image_processor_type": "SiglipImageProcessor"}), "a.image_processor_type: expected Gemma3Image"),
            (json!({"resample": 3}), "a.resample: expected 2 (bilinear), found 3"),
            (json!({"do_resize": false}), "a.do_resize: expected true"),
            (json!({"size": {"height": 224, "width": 224}}), "a.size: expected {\"height\": 896, \"width\": 896}"),
            (json!({"size": {"shortest_edge": 896}}), "a.size: expected"),
            (json!({"image_mean": [0.5, 0.5]}), "a.image_mean: expected a number, or a list of one for each"),
            (json!({"image_std": 0}), "a.image_std: expected positive numbers, found 0"),
            (json!({"image_seq_length": 64}), "a.image_seq_length: expected 256"),
            (json!({"pan_and_scan_max_num_crops": 0}), "a.pan_and_scan_max_num_crops: expected an integer between 1"),
            (json!([]), "a: expected a JSON object"),
        ] {
            let error = settings().with_preprocessor("a", value).expect_err(message).to_string();
            assert!(error.starts_with(message), "{error}");
        }
        let other = json!({"processor_class": "PaliGemmaProcessor"});
        assert_eq!(settings().with_processor(other).expect_err("another class").field, "processor_class");
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
