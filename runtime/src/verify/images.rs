//! Verifies how images are read: rows with images beside others, and the features of two towers of one checkpoint.

use ndarray::{Array3, Axis, s};
use t5gemma_graphs::facts::{Facts, VisionFacts};

use super::encoders::{OutputComparison, Sums};
use super::{RandomTokens, largest, max_abs_difference};
use crate::batch::Batch;
use crate::error::Error;
use crate::images::PixelValues;

/// Images to verify with, as the tower takes them: squares of different colours on a slope of brightness, and noise.
pub(super) fn sample_images(vision: &VisionFacts) -> Result<Vec<PixelValues>, Error> {
    let side = vision.image_size;
    let mut random = RandomTokens(13);
    let noise = random.tokens(3 * side * side, 256);
    let square = (side / 7).max(1);
    let of_pixel = |kind: usize, channel: usize, y: usize, x: usize| match kind {
        0 => {
            let slope = (x + (channel + 1) * y) as f32 / (side * (channel + 2)) as f32;
            let of_square = ((x / square) * (channel + 1) + (y / square) * (3 - channel)) as f32 % 5.0 / 4.0;
            (slope + of_square) / 2.0
        }
        _ => noise[(channel * side + y) * side + x] as f32 / 255.0,
    };
    let image = |kind: usize| {
        let places = (0..3).flat_map(|channel| (0..side).flat_map(move |y| (0..side).map(move |x| (channel, y, x))));
        PixelValues::new(side, places.map(|(channel, y, x)| 2.0 * of_pixel(kind, channel, y, x) - 1.0).collect())
    };
    (0..2).map(image).collect()
}

/// The part that reads images, if both models have the same.
pub(super) fn of_both<'f>(a: &'f Facts, b: &Facts) -> Option<&'f VisionFacts> {
    let same = |b: &VisionFacts| {
        let a = a.vision.as_ref()?;
        (a.image_size == b.image_size && a.tokens_per_image == b.tokens_per_image).then_some(a)
    };
    b.vision.as_ref().and_then(same)
}

/// The features of the same images by two models.
pub(super) fn compared(own: &Array3<f32>, others: &Array3<f32>) -> OutputComparison {
    let mut sums = Sums::default();
    for (a, b) in own.lanes(Axis(2)).into_iter().zip(others.lanes(Axis(2))) {
        sums.add(a.iter().zip(b.iter()));
    }
    sums.finish("image_features".to_string())
}

/// The largest difference between rows of a batch with images and without and the same rows alone, and the largest number.
pub(super) fn beside_texts(
    facts: &Facts,
    encode: impl Fn(&Batch) -> Result<Array3<f32>, Error>,
) -> Result<(f32, f32), Error> {
    let Some(vision) = &facts.vision else { return Ok((0.0, 0.0)) };
    let images = sample_images(vision)?;
    let mut random = RandomTokens(17);
    let mut text = |count: usize| {
        let tokens = random.tokens(count, facts.encoder.vocab_size).into_iter();
        tokens.map(|token| if token == vision.image_token { 0 } else { token }).collect::<Vec<i64>>()
    };
    let of_image = vec![vision.image_token; vision.tokens_per_image];
    let rows = [(text(7), Vec::new()), ([text(3), of_image, text(2)].concat(), images[..1].to_vec())];
    let longest = facts.encoder.max_position_embeddings;
    let rows: Vec<_> = rows.into_iter().filter(|(ids, _)| ids.len() <= longest).collect();
    let (ids, images): (Vec<Vec<i64>>, Vec<_>) = rows.into_iter().unzip();
    let together = encode(&Batch::padded(&ids, 0)?.with_images(images.clone())?)?;
    let mut difference = 0.0_f32;
    for (row, (ids, images)) in ids.iter().zip(images).enumerate() {
        let alone = encode(&Batch::padded(std::slice::from_ref(ids), 0)?.with_images(vec![images])?)?;
        let of_row = together.slice(s![row, ..ids.len(), ..]);
        difference = difference.max(max_abs_difference(&alone.slice(s![0, ..ids.len(), ..]), &of_row));
    }
    Ok((difference, largest(together.iter())))
}
