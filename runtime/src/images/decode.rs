//! Decodes JPEG, PNG and WebP files to RGB, as Pillow's `convert("RGB")` does.

use std::io::Cursor;

use image::codecs::jpeg::JpegDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::{ColorType, ImageDecoder, ImageError};

use super::{Image, ImageLimits, Unusable, jpeg, orientation, png};
use crate::panics;

const FORMATS: &str = "a JPEG, PNG or WebP image";

/// What a file begins with.
#[derive(Clone, Copy)]
enum Format {
    Jpeg,
    Png,
    WebP,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Format::Jpeg => "a JPEG image",
            Format::Png => "a PNG image",
            Format::WebP => "a WebP image",
        }
    }

    fn of(bytes: &[u8]) -> Result<Format, Unusable> {
        let found = match bytes {
            [0xff, 0xd8, 0xff, ..] => return Ok(Format::Jpeg),
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => return Ok(Format::Png),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => return Ok(Format::WebP),
            [] => "an empty file",
            [b'G', b'I', b'F', b'8', ..] => "GIF",
            [b'B', b'M', ..] => "BMP",
            [b'I', b'I', b'*', 0, ..] | [b'M', b'M', 0, b'*', ..] => "TIFF",
            [_, _, _, _, b'f', b't', b'y', b'p', b'a', b'v', b'i', ..] => "AVIF",
            [_, _, _, _, b'f', b't', b'y', b'p', b'h', b'e', b'i' | b'v', ..] => "HEIF",
            [b'%', b'P', b'D', b'F', ..] => "PDF",
            _ if bytes.trim_ascii_start().starts_with(b"<") => "text that begins with \"<\" (SVG or a web page)",
            _ => "something else",
        };
        Err(Unusable::new(FORMATS, found))
    }
}

/// Decodes a file.
pub(super) fn decode(bytes: &[u8], limits: ImageLimits) -> Result<Image, Unusable> {
    if bytes.len() > limits.max_bytes {
        let found = format!("more than {} bytes", limits.max_bytes);
        return Err(Unusable::new(format!("an image of at most {} bytes", limits.max_bytes), found));
    }
    let format = Format::of(bytes)?;
    let decoded = panics::catch("image", || match format {
        Format::Jpeg => {
            jpeg::check_complete(bytes)?;
            let decoder = JpegDecoder::new(Cursor::new(bytes)).map_err(|error| broken(format, &error))?;
            read(format, decoder, limits, |value| (value >> 8) as u8)
        }
        Format::Png => {
            let header = png::Header::of(bytes)?;
            check_size(header.width as usize, header.height as usize, limits)?;
            let mut of_decoder = image::Limits::no_limits();
            of_decoder.max_alloc = Some((8 * limits.max_pixels as u64).saturating_add(limits.max_bytes as u64));
            let decoder = PngDecoder::with_limits(Cursor::new(bytes), of_decoder);
            let decoder = decoder.map_err(|error| broken(format, &error))?;
            if decoder.is_apng().is_ok_and(|is_animated| is_animated) {
                return Err(animated("PNG"));
            }
            // Pillow has a mode of its own for 16-bit grey, which it clips; of other 16-bit values it keeps the upper
            // half.
            match header.is_16_bit_grey() {
                true => read(format, decoder, limits, |value| value.min(255) as u8),
                false => read(format, decoder, limits, |value| (value >> 8) as u8),
            }
        }
        Format::WebP => {
            let decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(|error| broken(format, &error))?;
            if decoder.has_animation() {
                return Err(animated("WebP"));
            }
            read(format, decoder, limits, |value| (value >> 8) as u8)
        }
    });
    decoded.map_err(|panic| Unusable::new(format.name(), panic))?
}

/// Reads the pixels; `narrow` turns values of 16 bits into values of 8.
fn read(
    format: Format,
    mut decoder: impl ImageDecoder,
    limits: ImageLimits,
    narrow: fn(u16) -> u8,
) -> Result<Image, Unusable> {
    let (width, height) = decoder.dimensions();
    let (width, height) = (width as usize, height as usize);
    check_size(width, height, limits)?;
    let orientation = orientation::of(&mut decoder);
    let color = decoder.color_type();
    // The product fits: the number of pixels is limited.
    let mut values = vec![0; width * height * usize::from(color.bytes_per_pixel())];
    decoder.read_image(&mut values).map_err(|error| broken(format, &error))?;
    let Some(rgb) = to_rgb(values, color, narrow) else {
        return Err(Unusable::new("an image with 1 to 4 channels of at most 16 bits", format!("{color:?}")));
    };
    Ok(orientation::applied(orientation, width, height, rgb))
}

fn check_size(width: usize, height: usize, limits: ImageLimits) -> Result<(), Unusable> {
    match width.checked_mul(height) {
        Some(0) => Err(Unusable::new("at least one pixel", format!("{width} x {height}"))),
        Some(pixels) if pixels <= limits.max_pixels => Ok(()),
        _ => {
            let expected = format!("an image of at most {} pixels", limits.max_pixels);
            Err(Unusable::new(expected, format!("{width} x {height}")))
        }
    }
}

/// Pixels of any kind as RGB: transparency is dropped, grey is repeated.
fn to_rgb(mut values: Vec<u8>, color: ColorType, narrow: fn(u16) -> u8) -> Option<Vec<u8>> {
    let channels = match color {
        ColorType::L8 | ColorType::L16 => 1,
        ColorType::La8 | ColorType::La16 => 2,
        ColorType::Rgb8 | ColorType::Rgb16 => 3,
        ColorType::Rgba8 | ColorType::Rgba16 => 4,
        _ => return None,
    };
    if matches!(color, ColorType::L16 | ColorType::La16 | ColorType::Rgb16 | ColorType::Rgba16) {
        let narrowed = values.len() / 2;
        for at in 0..narrowed {
            values[at] = narrow(u16::from_ne_bytes([values[2 * at], values[2 * at + 1]]));
        }
        values.truncate(narrowed);
    }
    let pixels = values.len() / channels;
    match channels {
        3 => {}
        4 => {
            // In place: every pixel moves towards the front.
            for pixel in 0..pixels {
                values.copy_within(4 * pixel..4 * pixel + 3, 3 * pixel);
            }
            values.truncate(3 * pixels);
            values.shrink_to_fit();
        }
        _ => values = values.chunks_exact(channels).flat_map(|pixel| [pixel[0]; 3]).collect(),
    }
    Some(values)
}

fn animated(format: &str) -> Unusable {
    Unusable::new("an image without animation", format!("an animated {format}"))
}

fn broken(format: Format, error: &ImageError) -> Unusable {
    let found = match error {
        ImageError::Decoding(error) => {
            std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
        }
        error => error.to_string(),
    };
    Unusable::new(format!("{} that can be decoded", format.name()), found.lines().collect::<Vec<_>>().join(" "))
}
