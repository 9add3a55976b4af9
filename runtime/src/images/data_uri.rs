//! Data URIs (RFC 2397) with base64 data.

use super::Unusable;

/// The bytes of `data:image/png;base64,…`, at most one more than `max_bytes`.
pub(super) fn bytes(uri: &str, max_bytes: usize) -> Result<Vec<u8>, Unusable> {
    let unusable = |found: &str| Unusable::new("a data URI with base64 data, data:image/…;base64,…", found);
    let rest = uri.strip_prefix("data:").ok_or_else(|| unusable("another text"))?;
    let (kind, data) = rest.split_once(',').ok_or_else(|| unusable("one without a comma"))?;
    if !kind.ends_with(";base64") {
        return Err(unusable("one without ;base64"));
    }
    base64(data.as_bytes(), max_bytes.saturating_add(1)).map_err(|found| unusable(&found))
}

/// Decodes base64, with either alphabet, with or without padding and white space.
fn base64(data: &[u8], most: usize) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(most.min(data.len() / 4 * 3 + 3));
    let (mut bits, mut held, mut padding) = (0u32, 0, 0);
    for (at, &digit) in data.iter().enumerate() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            b'=' => {
                padding += 1;
                continue;
            }
            b' ' | b'\t' | b'\r' | b'\n' => continue,
            _ => return Err(format!("the byte {digit:#04x} at {at} of the data")),
        };
        if padding > 0 {
            return Err(format!("data behind the padding, at {at}"));
        }
        (bits, held) = (bits << 6 | u32::from(value), held + 6);
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
            if bytes.len() == most {
                return Ok(bytes);
            }
        }
    }
    match held {
        6 => Err("data that is truncated".into()),
        _ => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_uris_are_decoded() {
        let cases: [(&str, &[u8]); 6] = [
            ("data:image/png;base64,iVBORw0KGgo=", b"\x89PNG\r\n\x1a\n"),
            ("data:;base64,YWI", b"ab"),
            ("data:image/png;name=a;base64,YW\nJj", b"abc"),
            ("data:;base64,", b""),
            ("data:;base64,_-8=", &[0xff, 0xef]),
            ("data:;base64,YWJjZGVmZ2g=", b"abcdefgh"),
        ];
        for (uri, expected) in cases {
            assert_eq!(bytes(uri, 100).as_deref(), Ok(expected), "{uri}");
        }
        assert_eq!(bytes("data:;base64,YWJjZGVmZ2g=", 4).as_deref(), Ok(&b"abcde"[..]), "one more than the limit");
        for uri in
            ["", "data:image/png", "data:image/png,abc", "data:;base64,a", "data:;base64,YQ==YQ", "data:;base64,a%"]
        {
            assert!(bytes(uri, 100).is_err(), "{uri}");
        }
    }
}
