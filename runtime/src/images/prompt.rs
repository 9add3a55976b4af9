//! The tokens of a text with images, as transformers' `Gemma3Processor` builds them.

use t5gemma_graphs::images::ImageSettings;

use crate::error::Error;
use crate::tokenizer::Tokenizer;

impl Tokenizer {
    /// The tokens of a text in which each start-of-image token stands for an image; `crops` has the number of crops of
    /// each image, which follow it. A text without a character is one of nothing but the images.
    ///
    /// # Errors
    /// Another number of images than of such tokens, a tokenizer without the tokens of images, and those of
    /// [`Tokenizer::encode`].
    pub fn encode_with_images(&self, text: &str, settings: &ImageSettings, crops: &[usize]) -> Result<Vec<i64>, Error> {
        self.around_images(text, settings, crops, Tokenizer::encode)
    }

    /// [`Tokenizer::encode_with_images`] without special tokens but those of images, for the text of a conversation, whose
    /// template has written the others.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_with_images`].
    pub fn encode_conversation_with_images(
        &self,
        text: &str,
        settings: &ImageSettings,
        crops: &[usize],
    ) -> Result<Vec<i64>, Error> {
        self.around_images(text, settings, crops, Tokenizer::encode_target)
    }

    fn around_images(
        &self,
        text: &str,
        settings: &ImageSettings,
        crops: &[usize],
        encode: fn(&Tokenizer, &str) -> Result<Vec<i64>, Error>,
    ) -> Result<Vec<i64>, Error> {
        let spelled = |id: i64| {
            let missing = || Error::input("images", format!("a tokenizer with the token {id}"), "none with it");
            self.token(id).ok_or_else(missing)
        };
        let start = spelled(settings.start_of_image_token_id)?;
        // The image tokens are put between these two afterwards: they may have no text of their own.
        let image = format!("\n\n{start}{}\n\n", spelled(settings.end_of_image_token_id)?);
        let ids = encode(self, &expanded(text, &start, &image, crops)?)?;
        let images = crops.iter().map(|crops| 1 + crops).sum::<usize>();
        let found = ids.iter().filter(|id| **id == settings.start_of_image_token_id).count();
        if found != images {
            let expected = format!("a tokenizer that has {start:?} as one token ({images} of them)");
            return Err(Error::input("images", expected, format!("{found} of them")));
        }
        let with_tokens = |id: i64| {
            let tokens = if id == settings.start_of_image_token_id { settings.tokens_per_image } else { 0 };
            std::iter::once(id).chain(std::iter::repeat_n(settings.image_token_id, tokens))
        };
        Ok(ids.into_iter().flat_map(with_tokens).collect())
    }
}

/// The text with `image`, or the sentence about its crops, in the place of each `start`.
fn expanded(text: &str, start: &str, image: &str, crops: &[usize]) -> Result<String, Error> {
    let only_images;
    let text = match text {
        "" => {
            only_images = vec![start; crops.len()].join(" ");
            &only_images
        }
        text => text,
    };
    let mut pieces = text.split(start);
    let mut expanded = pieces.next().unwrap_or_default().to_string();
    let pieces: Vec<&str> = pieces.collect();
    if pieces.len() != crops.len() {
        let expected = format!("{} images, as many as the text has {start}", pieces.len());
        return Err(Error::input("images", expected, crops.len().to_string()));
    }
    for (piece, &crops) in pieces.iter().zip(crops) {
        match crops {
            0 => expanded.push_str(image),
            crops => {
                let crops = vec![image; crops].join(" ");
                expanded.push_str(&format!(
                    "Here is the original image {image} and here are some crops to help you see better {crops}"
                ));
            }
        }
        expanded.push_str(piece);
    }
    Ok(expanded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_put_where_their_tokens_stand() {
        let cases: [(&str, &[usize], &str); 5] = [
            ("What is <b>?", &[0], "What is \n\n<b><e>\n\n?"),
            ("<b> and <b>", &[0, 0], "\n\n<b><e>\n\n and \n\n<b><e>\n\n"),
            ("", &[0, 0], "\n\n<b><e>\n\n \n\n<b><e>\n\n"),
            ("text", &[], "text"),
            (
                "<b>!",
                &[2],
                "Here is the original image \n\n<b><e>\n\n and here are some crops to help you see better \
                 \n\n<b><e>\n\n \n\n<b><e>\n\n!",
            ),
        ];
        for (text, crops, expected) in cases {
            assert_eq!(expanded(text, "<b>", "\n\n<b><e>\n\n", crops).expect(text), expected);
        }
    }

    #[test]
    fn as_many_images_are_needed_as_the_text_has_tokens() {
        for (text, images, message) in [
            ("a <b> b <b>", 1, "images: expected 2 images, as many as the text has <b>, found 1"),
            ("a", 2, "images: expected 0 images, as many as the text has <b>, found 2"),
        ] {
            let error = expanded(text, "<b>", "", &vec![0; images]).expect_err(text);
            assert_eq!(error.to_string(), message);
        }
    }
}
