//! Decodes bytes as text: handles byte-order marks, detects other encodings, and locates the first byte that is not
//! UTF-8.

use std::str::Utf8Error;

use t5gemma_runtime::BYTE_ORDER_MARK;

/// Returns the text after the UTF-8 byte-order mark, or all of it if there is none.
///
/// # Errors
/// The text begins with the mark of another encoding.
pub fn without_byte_order_mark(bytes: &[u8]) -> Result<&[u8], String> {
    let mut mark = [0; 4];
    let mark = BYTE_ORDER_MARK.encode_utf8(&mut mark).as_bytes();
    let encoding = match bytes {
        _ if bytes.starts_with(mark) => return Ok(&bytes[mark.len()..]),
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => "UTF-32",
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "UTF-16",
        _ => return Ok(bytes),
    };
    Err(format!("expected UTF-8, found the byte-order mark of {encoding} (convert it: iconv -f {encoding} -t UTF-8)"))
}

/// Describes the first byte that is not UTF-8; places count from 1.
pub fn describe_invalid_utf8(bytes: &[u8], error: &Utf8Error) -> String {
    let byte = bytes.get(error.valid_up_to()).copied().unwrap_or_default();
    format!("expected UTF-8, found the byte 0x{byte:02x} at byte {}", error.valid_up_to() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_of_other_encodings_are_named() {
        assert_eq!(without_byte_order_mark(b"\xef\xbb\xbfa"), Ok(b"a".as_slice()));
        assert_eq!(without_byte_order_mark(b"a\xef\xbb\xbf"), Ok(b"a\xef\xbb\xbf".as_slice()));
        for (bytes, expected) in
            [(b"\xff\xfea\0".as_slice(), "UTF-16"), (b"\xfe\xff\0a", "UTF-16"), (b"\xff\xfe\0\0a\0\0\0", "UTF-32")]
        {
            let problem = without_byte_order_mark(bytes).expect_err("not UTF-8");
            assert!(problem.contains(&format!("found the byte-order mark of {expected} ")), "{problem}");
        }
    }
}
