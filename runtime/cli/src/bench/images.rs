//! The images of the sources that `t5gemma bench` measures.

use anyhow::Result;
use t5gemma_runtime::{Batch, Facts, PixelValues};

use super::random_tokens;
use crate::exit::ensure_usage;

/// Sources of these tokens behind the tokens of `count` images of random numbers, the same in every source.
pub fn sources(texts: &[&[i64]], count: usize, facts: &Facts, pad: i64) -> Result<Batch> {
    if count == 0 {
        return Ok(Batch::padded(texts, pad)?);
    }
    ensure_usage!(facts.vision.is_some(), "--images requires a model that reads images");
    let Some(vision) = &facts.vision else { return Ok(Batch::padded(texts, pad)?) };
    let (tokens, longest) = (count * vision.tokens_per_image, facts.encoder.max_position_embeddings);
    let length = texts.iter().map(|text| text.len()).max().unwrap_or(0) + tokens;
    ensure_usage!(
        length <= longest,
        "--images: expected sources of at most {longest} tokens (encoder.max_position_embeddings), found {length}"
    );
    let text = |token: &i64| if *token == vision.image_token { 0 } else { *token };
    let source = |tokens_of_text: &&[i64]| {
        let of_images = std::iter::repeat_n(vision.image_token, tokens);
        of_images.chain(tokens_of_text.iter().map(text)).collect::<Vec<i64>>()
    };
    let sources: Vec<Vec<i64>> = texts.iter().map(source).collect();
    let numbers = 3 * vision.image_size * vision.image_size;
    let levels = random_tokens(256, count * numbers);
    let image = |levels: &[i64]| {
        PixelValues::new(vision.image_size, levels.iter().map(|&level| level as f32 / 127.5 - 1.0).collect())
    };
    let images: Vec<PixelValues> = levels.chunks(numbers).map(image).collect::<Result<_, _>>()?;
    Ok(Batch::padded(&sources, pad)?.with_images(vec![images; texts.len()])?)
}

/// What the sources are, for people.
pub fn text(batch: &Batch) -> String {
    let sources = format!("{} of {} tokens", batch.rows(), batch.length());
    match batch.images()[0].len() {
        0 => sources,
        images => format!("{sources}, those of {images} images among them"),
    }
}
