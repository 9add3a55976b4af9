//! `Vision`: the part of a model that reads images, a SigLIP tower (arXiv 2303.15343) and a projector.

use super::ConfigError;

/// The sizes of the part that reads images, under the names that `config.json` has for them.
#[derive(Clone, Debug, PartialEq)]
pub struct Vision {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Added to the variance in LayerNorm, and to the mean square in the projector's RMSNorm.
    pub layer_norm_eps: f64,
    /// Pixels of a side of the square image.
    pub image_size: usize,
    /// Pixels of a side of a patch; the pixels beyond the last whole patch are not read.
    pub patch_size: usize,
    /// Tokens of an image, a square.
    pub tokens_per_image: usize,
    /// The token that stands for a token of an image: `image_token_index`.
    pub image_token: i64,
    /// The token before an image: `boi_token_index`.
    pub start_of_image: i64,
}

impl Vision {
    /// Checks that the tokens of an image are squares of its patches, which matters only where images are read.
    ///
    /// # Errors
    /// The first field of `config.json` that does not fit the others.
    pub fn check(&self) -> Result<(), ConfigError> {
        let error = |field: &str, expected: String, found: usize| {
            let field = format!("encoder.{field}");
            Err(ConfigError { field, expected, found: found.to_string() })
        };
        let (heads, side, grid) = (self.num_attention_heads, self.tokens_per_side(), self.grid());
        if !self.hidden_size.is_multiple_of(heads) {
            let expected = format!("a multiple of num_attention_heads ({heads})");
            return error("vision_config.hidden_size", expected, self.hidden_size);
        }
        if grid == 0 {
            let expected = format!("at most image_size ({})", self.image_size);
            return error("vision_config.patch_size", expected, self.patch_size);
        }
        if side * side != self.tokens_per_image || side > grid || grid / (grid / side) != side {
            let expected = format!("the square of a number that divides {grid}, the patches of a side");
            return error("mm_tokens_per_image", expected, self.tokens_per_image);
        }
        Ok(())
    }

    /// Patches of a side.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Tokens of a side, after pooling.
    pub fn tokens_per_side(&self) -> usize {
        self.tokens_per_image.isqrt()
    }
}
