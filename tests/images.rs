//! Pictures: decoding against Pillow, pixel values and prompts against transformers, and what is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_runtime::{
    Batch, Cancellation, Controls, Encoder, Engine, EngineOptions, GenerationOptions, Image, ImageLimits,
    ImageSettings, ImageTokens, Model, OpenOptions, PanAndScan, PixelValues, Request, TextWithImages, Tokenizer,
};
use tempfile::TempDir;

use crate::common::{cases as common_cases, exported_from, fixture, tests};
use crate::generation::check_case;
use crate::tasks::Golden;

/// How far pixels of lossy formats may be from Pillow's decoders, in levels of 255: at most, and on average.
const LOSSY: (u8, f64) = (8, 0.5);

pub fn folder() -> PathBuf {
    tests().join("fixtures/images")
}

fn cases() -> Value {
    let text = fs::read_to_string(folder().join("cases.json")).expect("a fixture");
    serde_json::from_str(&text).expect("JSON")
}

pub fn read(file: &str) -> Vec<u8> {
    fs::read(folder().join("files").join(file)).expect("a fixture")
}

/// A size, and rows of RGB.
type Pixels = (usize, usize, Vec<u8>);

fn pixels(golden: &SafeTensors, name: &str) -> Pixels {
    let tensor = golden.tensor(name).expect("named by a case");
    (tensor.shape()[1], tensor.shape()[0], tensor.data().to_vec())
}

fn settings() -> ImageSettings {
    ImageSettings::new(28, 4, ImageTokens { image: 7, start_of_image: 5, end_of_image: 6 })
}

#[test]
fn pictures_are_decoded_as_by_pillow() {
    let golden = fs::read(folder().join("golden.safetensors")).expect("a fixture");
    let golden = SafeTensors::deserialize(&golden).expect("safetensors");
    let cases = cases();
    let cases = cases["decode"].as_array().expect("cases");
    assert!(cases.len() > 40);
    for case in cases {
        let name = case["file"].as_str().expect("a name");
        let image =
            Image::decode(&read(name), ImageLimits::default()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (width, height, expected) = pixels(&golden, &format!("rgb.{name}"));
        assert_eq!((image.width(), image.height()), (width, height), "{name}");
        let differences = image.rgb().iter().zip(&expected).map(|(found, expected)| found.abs_diff(*expected));
        let most = differences.clone().max().unwrap_or(0);
        let mean = differences.map(f64::from).sum::<f64>() / expected.len() as f64;
        println!("{name}: {most} levels at most, {mean:.3} on average");
        let is_lossy = case["lossy"].as_bool().expect("a bool");
        let (accepted, accepted_mean) = if is_lossy { LOSSY } else { (0, 0.0) };
        assert!(most <= accepted && mean <= accepted_mean, "{name}: {most} levels, {mean} on average");
    }
}

#[test]
fn pixel_values_are_those_of_transformers() {
    let golden = fs::read(folder().join("golden.safetensors")).expect("a fixture");
    let golden = SafeTensors::deserialize(&golden).expect("safetensors");
    let cases = cases();
    let cases = cases["pixel_values"].as_array().expect("cases");
    assert!(cases.len() > 20);
    for case in cases {
        let (width, height, rgb) = pixels(&golden, case["image"].as_str().expect("a name"));
        let image = Image::from_rgb(width, height, rgb).expect("a picture");
        let mut settings = settings();
        settings.image_size = case["image_size"].as_u64().expect("a size") as usize;
        let crops = &case["pan_and_scan"];
        if let Some(crops) = crops.as_array() {
            let whole = |at: usize| crops[at].as_u64().expect("a size") as usize;
            let (min_crop_size, max_num_crops) = (whole(0), whole(1));
            let min_ratio_to_activate = crops[2].as_f64().expect("a ratio");
            settings.pan_and_scan =
                PanAndScan { min_crop_size, max_num_crops, min_ratio_to_activate, ..PanAndScan::default() };
        }
        let found = image.pixel_values(&settings, crops.is_array());
        let expected = golden.tensor(case["expected"].as_str().expect("a name")).expect("named by a case");
        assert_eq!(expected.shape(), [found.len(), 3, settings.image_size, settings.image_size], "{case}");
        let found: Vec<f32> = found.iter().flat_map(|image| image.values().to_vec()).collect();
        let expected = expected.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four")));
        let most = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs()).fold(0.0, f32::max);
        assert!(most <= 1e-6, "{case}: {most}");
    }
}

#[test]
fn prompts_are_those_of_transformers() {
    let tokenizer = Tokenizer::open(&folder().join("tokenizer.json")).expect("a tokenizer");
    let cases = cases();
    for case in cases["prompts"].as_array().expect("cases") {
        let text = case["text"].as_str().expect("a text");
        let numbers = |field: &str| case[field].as_array().expect("numbers").iter().filter_map(Value::as_i64);
        let crops: Vec<usize> = numbers("crops").map(|count| count as usize).collect();
        let found = tokenizer.encode_with_images(text, &settings(), &crops).expect(text);
        assert_eq!(found, numbers("ids").collect::<Vec<_>>(), "{text}");
    }
    let missing = ImageSettings { end_of_image_token_id: 999, ..settings() };
    let error = tokenizer.encode_with_images("<start_of_image>", &missing, &[0]).expect_err("no such token");
    assert_eq!(error.to_string(), "images: expected a tokenizer with the token 999, found none with it");
}

#[test]
fn what_cannot_be_used_is_refused() {
    let cut = |file: &str, bytes: usize| read(file)[..bytes].to_vec();
    let without_end = |file: &str| cut(file, read(file).len() - 2);
    let jpeg_of_a_size = |size: [u8; 4]| {
        let mut bytes = read("grey.jpg");
        let header = bytes.windows(2).position(|pair| pair == [0xff, 0xc0]).expect("a header");
        bytes[header + 5..header + 9].copy_from_slice(&size);
        bytes
    };
    let mut png_without_pixels = read("rgb8.png");
    png_without_pixels[16..20].fill(0);
    let cases = [
        ("animated.webp", read("animated.webp"), "expected an image without animation, found an animated WebP"),
        ("animated.png", read("animated.png"), "expected an image without animation, found an animated PNG"),
        ("animated.gif", read("animated.gif"), "expected a JPEG, PNG or WebP image, found GIF"),
        ("bomb.png", read("bomb.png"), "expected an image of at most 89478485 pixels, found 20000 x 20000"),
        ("a JPEG bomb", jpeg_of_a_size([0xff; 4]), "expected an image of at most 89478485 pixels, found 65535 x 65535"),
        ("a PNG without pixels", png_without_pixels, "expected at least one pixel, found 0 x 19"),
        ("checksum.png", read("checksum.png"), "expected a PNG image that can be decoded, found CRC error"),
        (
            "a JPEG without its end",
            without_end("rgb420.jpg"),
            "expected a JPEG image with its end, found one truncated at",
        ),
        // What is missing is behind the end of a preview.
        (
            "half of a JPEG",
            cut("preview.jpg", 1300),
            "expected a JPEG image with its end, found one truncated at 1300 bytes",
        ),
        (
            "the start of a JPEG",
            cut("rgb420.jpg", 3),
            "expected a JPEG image with its end, found one truncated at 3 bytes",
        ),
        ("half of a PNG", cut("rgb8.png", 900), "expected a PNG image that can be decoded, found "),
        ("the start of a PNG", cut("rgb8.png", 20), "expected a PNG image, found one truncated at 20 bytes"),
        ("half of a WebP", cut("lossy.webp", 200), "expected a WebP image that can be decoded, found "),
        ("half of a lossless WebP", cut("lossless.webp", 500), "expected a WebP image that can be decoded, found "),
        ("nothing", Vec::new(), "expected a JPEG, PNG or WebP image, found an empty file"),
        ("a page", b"\n<svg>".to_vec(), "found text that begins with \"<\" (SVG or a web page)"),
        ("noise", vec![7; 100], "expected a JPEG, PNG or WebP image, found something else"),
    ];
    for (name, bytes, message) in cases {
        let error = Image::decode(&bytes, ImageLimits::default()).expect_err(name).to_string();
        assert!(error.starts_with("image: expected ") && error.contains(message), "{name}: {error}");
    }

    let png = read("rgb8.png");
    let error = Image::decode(&png, ImageLimits::default().max_bytes(1000)).expect_err("too long").to_string();
    assert_eq!(error, "image: expected an image of at most 1000 bytes, found more than 1000 bytes");
    let error = Image::decode(&png, ImageLimits::default().max_pixels(26 * 19 - 1)).expect_err("too large").to_string();
    assert_eq!(error, "image: expected an image of at most 493 pixels, found 26 x 19");
    Image::decode(&png, ImageLimits::default().max_pixels(26 * 19)).expect("exactly within the limit");

    let path = folder().join("files/animated.gif");
    let error = Image::open(&path, ImageLimits::default()).expect_err("a GIF").to_string();
    assert_eq!(error, format!("{}: expected a JPEG, PNG or WebP image, found GIF", path.display()));
    assert!(Image::open("no/such/file.png", ImageLimits::default()).is_err());
    assert!(Image::from_rgb(2, 2, vec![0; 11]).is_err() && Image::from_rgb(0, 2, Vec::new()).is_err());
    assert!(PixelValues::new(2, vec![0.0; 11]).is_err() && PixelValues::new(1, vec![0.0, f32::NAN, 0.0]).is_err());
}

#[test]
fn no_byte_of_a_file_can_do_harm() {
    let limits = ImageLimits::default().max_pixels(1 << 20);
    for file in [
        "rgb420.jpg",
        "progressive.jpg",
        "orientation6.jpg",
        "palette8-transparent.png",
        "lossless-alpha.webp",
        "lossy-alpha.webp",
    ] {
        let bytes = read(file);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0xa5;
            let _ = Image::decode(&changed, limits);
            let _ = Image::decode(&bytes[..at], limits);
        }
    }
}

#[test]
fn a_checkpoint_says_how_it_wants_its_images() {
    let folder = tempfile::TempDir::new().expect("a temporary folder");
    let read = || t5gemma_exporter::image_settings(folder.path(), settings());
    assert_eq!(read().expect("no files"), settings());

    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("written");
    write("preprocessor_config.json", r#"{"image_mean": [0.25, 0.5, 0.75], "size": {"height": 28, "width": 28}}"#);
    let expected = ImageSettings { image_mean: [0.25, 0.5, 0.75], ..settings() };
    assert_eq!(read().expect("one file"), expected);
    write("processor_config.json", r#"{"processor_class": "Gemma3Processor", "image_seq_length": 4}"#);
    assert_eq!(read().expect("a processor without an image processor"), expected);
    write("processor_config.json", r#"{"image_processor": {"image_std": 0.25}}"#);
    assert_eq!(read().expect("a processor with one"), ImageSettings { image_std: [0.25; 3], ..settings() });

    for (text, message) in [
        (
            r#"{"image_processor": {"resample": 3}}"#,
            "processor_config.json: image_processor.resample: expected 2 (bilinear), found 3",
        ),
        (
            r#"{"image_seq_length": 256}"#,
            "processor_config.json: image_seq_length: expected 4 (mm_tokens_per_image of config.json), found 256",
        ),
        ("[1]", "processor_config.json: expected a JSON object, found [1]"),
    ] {
        write("processor_config.json", text);
        let error = read().expect_err(message).to_string();
        assert!(error.ends_with(message), "{error}");
    }
}

/// The model with a vision tower, with the tokenizer of the prompts.
pub fn model_with_vision(label: &str, export: Export) -> PathBuf {
    with_tokenizer(&fixture("t2-vision").join("checkpoint"), &format!("t2-vision-{label}"), export)
}

/// The model of a checkpoint that has no tokenizer, with that of the prompts.
pub fn with_tokenizer(from: &Path, label: &str, export: Export) -> PathBuf {
    let checkpoint = TempDir::new().expect("a temporary folder");
    for file in fs::read_dir(from).expect("a fixture").map(|file| file.expect("listed")) {
        fs::copy(file.path(), checkpoint.path().join(file.file_name())).expect("copied");
    }
    fs::copy(folder().join("tokenizer.json"), checkpoint.path().join("tokenizer.json")).expect("copied");
    exported_from(checkpoint.path(), label, export)
}

/// The inputs of the fixture, by name, with pixel values where they have any.
fn inputs_with_vision(model: &Model, name: &str) -> Batch {
    let bytes = fs::read(fixture("t2-vision").join("golden.safetensors")).expect("a fixture");
    let golden = SafeTensors::deserialize(&bytes).expect("safetensors");
    let integers = |field: &str| {
        let tensor = golden.tensor(&format!("in.{name}.{field}")).expect("an input");
        let numbers = tensor.data().chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().expect("eight")));
        (tensor.shape()[0], numbers.collect::<Vec<_>>())
    };
    let ((rows, ids), (_, mask)) = (integers("input_ids"), integers("attention_mask"));
    let batch = Batch::flat(rows, ids, mask).expect("the fixture's inputs are valid");
    let Ok(tensor) = golden.tensor(&format!("in.{name}.pixel_values")) else { return batch };
    let values = tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four")));
    let images = PixelValues::of_tensor(tensor.shape(), values.collect()).expect("the fixture's images are valid");
    batch.with_images_in_order(model.facts(), images).expect("as many as there are tokens for")
}

#[test]
fn images_give_the_reference_tokens_and_states() {
    for target in [Target::Portable, Target::Cpu] {
        let model = Model::open(model_with_vision(target.name(), Export::default().target(target))).expect("opens");
        let golden = Golden::read(&fixture("t2-vision").join("golden.safetensors"));
        for name in ["images", "images_left", "two_images", "text"] {
            let batch = inputs_with_vision(&model, name);
            let states = model.encode(&batch, &Cancellation::new()).expect(name);
            let expected = golden.floats(&format!("enc.{name}.last_hidden_state"));
            let width = states.shape()[2];
            let visible = batch.mask().iter().flat_map(|&visible| vec![visible != 0; width]);
            let pairs = states.iter().zip(&expected).zip(visible).filter(|(_, visible)| *visible);
            let most = pairs.map(|((found, expected), _)| (found - expected).abs()).fold(0.0, f32::max);
            assert!(most < 5e-4, "{name}: {most}");
        }
        for case in common_cases("t2-vision")["cases"].as_array().expect("cases") {
            let mut batch = inputs_with_vision(&model, case["input"].as_str().expect("a name"));
            if let Ok(prompts) = serde_json::from_value::<Vec<Vec<i64>>>(case["decoder_input_ids"].clone()) {
                batch = batch.with_decoder_input_ids(&prompts).expect("the fixture's prompts are valid");
            }
            let options = case["options"].as_object().expect("options are an object");
            let options = model.generation_config().with_json(options).expect("the fixture's options are valid");
            let rows = model.generate_batch(&batch, &options, Controls::default()).expect("generates");
            let found: Vec<(Value, Option<f64>)> = rows
                .iter()
                .flatten()
                .map(|hypothesis| (json!(hypothesis.tokens), hypothesis.score.map(f64::from)))
                .collect();
            check_case(&format!("t2-vision for {} {}", target.name(), case["id"]), case, &found);
        }
    }
}

#[test]
fn rows_with_and_without_images_do_not_change_each_other() {
    let path = model_with_vision("default", Export::default());
    let model = Model::open(&path).expect("opens");
    let picture = Image::decode(&read("rgb420.jpg"), ImageLimits::default()).expect("a picture");
    let other = Image::decode(&read("palette8.png"), ImageLimits::default()).expect("a picture");
    let text = |text: &str, images: &[&Image]| {
        let source = TextWithImages::new(text, images.iter().map(|image| (*image).clone()).collect());
        model.tokenize_with_images(&[source]).expect(text)
    };
    // The token of an image in a text without images is an ordinary token.
    let plain = Batch::padded(&[[9, 7, 7, 10]], 0).expect("a row");
    let alone = [
        text("<start_of_image> a", &[&picture]),
        plain.clone(),
        text("b<start_of_image><start_of_image>", &[&other, &picture]),
        text("no image", &[]),
    ];
    assert_eq!(alone[2].images()[0].len(), 2);
    let options = GenerationOptions::default().max_new_tokens(12);
    let config = model.generation_config().with(&options).expect("valid");
    let tokens = |batch: &Batch| -> Vec<Vec<i64>> {
        let rows = model.generate_batch(batch, &config, Controls::default()).expect("generates");
        rows.into_iter().flatten().map(|hypothesis| hypothesis.tokens).collect()
    };
    let expected: Vec<Vec<i64>> = alone.iter().flat_map(&tokens).collect();
    let joined = Batch::joined(alone.to_vec(), 0).expect("they have no prompts");
    assert_eq!(tokens(&joined), expected);
    assert_ne!(tokens(&text("<start_of_image> a", &[&other]))[0], expected[0], "another picture");

    // Without a cache, with the encoder alone, and with an engine.
    let uncached = Model::open_with(&path, &OpenOptions::default().encoder_cache_bytes(0)).expect("opens");
    let states = uncached.encode(&joined, &Cancellation::new()).expect("encodes");
    let encoder = Encoder::open(&path).expect("opens");
    let found = encoder.encode(&joined, &Cancellation::new()).expect("encodes");
    assert!(states.iter().zip(&found).all(|(one, other)| (one - other).abs() < 1e-5));
    let engine = Engine::new(Arc::new(uncached), EngineOptions::default()).expect("starts");
    let generation = engine.submit(Request::new(joined.clone(), config.clone())).expect("accepted");
    let found: Vec<Vec<i64>> =
        generation.wait().expect("generates").into_iter().flatten().map(|hypothesis| hypothesis.tokens).collect();
    assert_eq!(found, expected);
}

#[test]
fn images_are_checked_against_the_model() {
    let model = Model::open(model_with_vision("default", Export::default())).expect("opens");
    let image = |side: usize| PixelValues::new(side, vec![0.5; 3 * side * side]).expect("finite");
    let with = |ids: &[i64], images: Vec<PixelValues>| {
        let batch = Batch::padded(&[ids], 0).and_then(|batch| batch.with_images(vec![images])).expect("one row");
        model.encode(&batch, &Cancellation::new())
    };
    with(&[5, 7, 7, 7, 7, 6], vec![image(28)]).expect("four tokens of one image");
    for (ids, images, message) in [
        (vec![5, 7, 7, 7, 6], vec![image(28)], "input_ids[0]: expected 4 tokens 7 (4 for each of 1 images), found 3"),
        (vec![7; 4], vec![image(28); 2], "input_ids[0]: expected 8 tokens 7 (4 for each of 2 images), found 4"),
        (vec![7; 4], vec![image(14)], "images[0][0]: expected 28 x 28 pixels, found 14 x 14 pixels"),
    ] {
        assert_eq!(with(&ids, images).expect_err(message).to_string(), message);
    }
    let plain = Batch::padded(&[vec![7; 4], vec![9]], 0).expect("rows");
    let error = plain.clone().with_images_in_order(model.facts(), vec![image(28); 2]).expect_err("one too many");
    assert_eq!(error.to_string(), "pixel_values: expected 8 tokens 7 (4 for each of 2 images), found 4 in input_ids");
    assert!(plain.clone().with_images(vec![vec![image(28)]]).is_err(), "not one list per row");
    let source = TextWithImages::new("a <start_of_image>", Vec::new());
    let error = model.tokenize_with_images(&[source]).expect_err("an image is missing").to_string();
    assert_eq!(error, "images: expected 1 images, as many as the text has <start_of_image>, found 0");

    let blind = Model::open(model_with_vision("blind", Export::default().vision(false))).expect("opens");
    let refused = "images: the model reads none; export a checkpoint with a vision tower, and without --no-vision";
    let source = TextWithImages::new("", Vec::new());
    assert_eq!(blind.tokenize_with_images(&[source]).expect_err("no tower").to_string(), refused);
    let batch = plain.with_images(vec![vec![image(28)], Vec::new()]).expect("two lists");
    assert_eq!(blind.encode(&batch, &Cancellation::new()).expect_err("no tower").to_string(), refused);
}
