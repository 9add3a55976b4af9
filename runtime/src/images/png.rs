//! The header of a PNG file, whose size is checked before the decoder allocates a row, and whose colours decide how
//! 16-bit values are narrowed.

use super::Unusable;

pub(super) struct Header {
    pub width: u32,
    pub height: u32,
    bit_depth: u8,
    color_type: u8,
}

impl Header {
    /// Of a file that begins as PNG files do.
    pub fn of(bytes: &[u8]) -> Result<Header, Unusable> {
        let Some(&[w0, w1, w2, w3, h0, h1, h2, h3, bit_depth, color_type]) =
            bytes.get(16..).and_then(|header| header.first_chunk::<10>())
        else {
            return Err(Unusable::new("a PNG image", format!("one truncated at {} bytes", bytes.len())));
        };
        Ok(Header {
            width: u32::from_be_bytes([w0, w1, w2, w3]),
            height: u32::from_be_bytes([h0, h1, h2, h3]),
            bit_depth,
            color_type,
        })
    }

    pub fn is_16_bit_grey(&self) -> bool {
        (self.bit_depth, self.color_type) == (16, 0)
    }
}
