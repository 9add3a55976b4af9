//! Whether a JPEG file has its end, which the decoder does not ask for: it fills what is missing with grey.

use super::Unusable;

/// Checks that the end-of-image marker follows the first scan.
pub(super) fn check_complete(bytes: &[u8]) -> Result<(), Unusable> {
    match scan(bytes).is_some_and(|start| bytes[start..].windows(2).any(|pair| pair == [0xff, 0xd9])) {
        true => Ok(()),
        false => Err(Unusable::new("a JPEG image with its end", format!("one truncated at {} bytes", bytes.len()))),
    }
}

/// Where the data of the first scan starts. There, 0xff is followed by 0, a restart marker, or the next segment's
/// marker; before it, segments may hold anything, such as a preview with its own end.
fn scan(bytes: &[u8]) -> Option<usize> {
    const START_OF_SCAN: u8 = 0xda;
    let mut at = 2;
    loop {
        if *bytes.get(at)? != 0xff {
            // Decoders skip what stands between segments.
            at += 1;
            continue;
        }
        let marker = *bytes.get(at + 1)?;
        at += match marker {
            // Fill bytes come before a marker.
            0xff => 1,
            0x00 | 0x01 | 0xd0..=0xd9 => 2,
            _ => {
                let length = usize::from(u16::from_be_bytes([*bytes.get(at + 2)?, *bytes.get(at + 3)?]));
                2 + length.max(2)
            }
        };
        if marker == START_OF_SCAN {
            return (at <= bytes.len()).then_some(at);
        }
    }
}
