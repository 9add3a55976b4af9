//! Shortens sources that are texts to a number of tokens. The special tokens at their ends stay.

use t5gemma_protocol::Tokenize;

use crate::failure::Failure;

/// The side from which tokens are taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The beginning.
    Left,
    /// The end.
    Right,
}

/// The tokens of a text, at most `most`.
pub fn keep(text: &str, most: usize, side: Side, model: &dyn Tokenize) -> Result<Vec<i64>, Failure> {
    let tokenizer = model.tokenizer()?;
    let all = tokenizer.encode(text)?;
    if all.len() <= most {
        return Ok(all);
    }
    let bare = tokenizer.encode_target(text)?;
    Ok(shortened(&all, &bare, most, side))
}

fn shortened(all: &[i64], bare: &[i64], most: usize, side: Side) -> Vec<i64> {
    let starts = 0..=all.len().saturating_sub(bare.len());
    let before = starts.into_iter().find(|&at| all[at..].starts_with(bare)).unwrap_or(0);
    let (before, rest) = all.split_at(before);
    let (bare, after) = rest.split_at(bare.len().min(rest.len()));
    let room = most.saturating_sub(before.len() + after.len());
    let kept = match side {
        Side::Left => &bare[bare.len().saturating_sub(room)..],
        Side::Right => &bare[..room.min(bare.len())],
    };
    [before, kept, after].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_stay() {
        let cases = [
            (vec![2, 5, 6, 7], vec![5, 6, 7], 3, Side::Right, vec![2, 5, 6]),
            (vec![2, 5, 6, 7], vec![5, 6, 7], 3, Side::Left, vec![2, 6, 7]),
            (vec![2, 5, 6, 7, 1], vec![5, 6, 7], 3, Side::Right, vec![2, 5, 1]),
            (vec![5, 6, 7], vec![5, 6, 7], 1, Side::Left, vec![7]),
            (vec![2, 5, 1], vec![5], 1, Side::Right, vec![2, 1]),
        ];
        for (all, bare, most, side, expected) in cases {
            assert_eq!(shortened(&all, &bare, most, side), expected, "{all:?} {most} {side:?}");
        }
    }
}
