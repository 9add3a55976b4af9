//! The orientation that cameras write beside the pixels, applied as Pillow's `ImageOps.exif_transpose` does.

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, RgbImage};

use super::Image;

/// The orientation of a picture: the tag of its Exif data, or else that of its XMP data. What cannot be read is as if
/// it was not there.
pub(super) fn of(decoder: &mut impl ImageDecoder) -> Orientation {
    let exif = decoder.exif_metadata().ok().flatten();
    // Some programs write the prefix that only JPEG has.
    let exif = exif.as_deref().map(|exif| exif.strip_prefix(b"Exif\0\0").unwrap_or(exif));
    let of_exif = exif.and_then(Orientation::from_exif_chunk);
    let of_xmp = || in_xmp(&decoder.xmp_metadata().ok().flatten()?);
    of_exif.or_else(of_xmp).unwrap_or(Orientation::NoTransforms)
}

/// `tiff:Orientation="6"` or `<tiff:Orientation>6`.
fn in_xmp(xmp: &[u8]) -> Option<Orientation> {
    const TAG: &[u8] = b"tiff:Orientation";
    let starts = xmp.windows(TAG.len()).enumerate().filter(|(_, text)| *text == TAG);
    let digits = starts.filter_map(|(start, _)| match &xmp[start + TAG.len()..] {
        [b'=', b'"', digit @ b'0'..=b'9', ..] | [b'>', digit @ b'0'..=b'9', ..] => Some(digit - b'0'),
        _ => None,
    });
    Orientation::from_exif({ digits }.next()?)
}

/// The picture upright.
pub(super) fn applied(orientation: Orientation, width: usize, height: usize, rgb: Vec<u8>) -> Image {
    if orientation == Orientation::NoTransforms {
        return Image { width, height, rgb: rgb.into() };
    }
    let image = RgbImage::from_raw(width as u32, height as u32, rgb).expect("as many bytes as pixels need");
    let mut image = DynamicImage::ImageRgb8(image);
    image.apply_orientation(orientation);
    let image = image.into_rgb8();
    let (width, height) = (image.width() as usize, image.height() as usize);
    Image { width, height, rgb: image.into_raw().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xmp_has_an_orientation() {
        let cases: [(&[u8], Option<u8>); 5] = [
            (b"<rdf tiff:Orientation=\"6\"/>", Some(6)),
            (b"<tiff:Orientation>3</tiff:Orientation>", Some(3)),
            (b"tiff:Orientation='3' tiff:Orientation=\"8\"", Some(8)),
            (b"tiff:Orientation=\"9\"", None),
            (b"tiff:Orientation", None),
        ];
        for (xmp, expected) in cases {
            assert_eq!(in_xmp(xmp).map(Orientation::to_exif), expected, "{}", xmp.escape_ascii());
        }
    }
}
