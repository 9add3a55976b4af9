//! Decodes bytes as text: splits them into lines, handles byte-order marks, detects other encodings, and locates the
//! first byte that is not UTF-8.

use std::io::{self, BufRead, Read};
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

/// Maximum bytes of a line. A longer one is discarded and answered with an error.
pub const LONGEST_LINE: usize = 256 << 20;

/// Reads a line without its line ending, and the first one also without a byte-order mark. Of an overlong line, it
/// returns just enough to show that it is too long.
///
/// # Errors
/// Bytes that cannot be read, or the byte-order mark of another encoding.
pub fn next_line(from: &mut impl BufRead, is_first: bool) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let most = LONGEST_LINE as u64 + 2;
    if from.by_ref().take(most).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    match line.pop_if(|last| *last == b'\n') {
        Some(_) => drop(line.pop_if(|last| *last == b'\r')),
        None if line.len() as u64 == most => drop(from.skip_until(b'\n')?),
        None => drop(line.pop_if(|last| *last == b'\r')),
    }
    if is_first {
        let text = without_byte_order_mark(&line).map_err(io::Error::other)?;
        line.drain(..line.len() - text.len());
    }
    Ok(Some(line))
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

    #[test]
    fn lines_end_as_on_any_system_and_begin_without_a_mark() {
        let cases: &[(&[u8], &[&[u8]])] = &[
            (b"", &[]),
            (b"\n", &[b""]),
            (b"a\nb", &[b"a", b"b"]),
            (b"a\r\nb\r\n", &[b"a", b"b"]),
            (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", &[b"a", b"\xef\xbb\xbfb"]),
            (b"\xef\xbb\xbf\n", &[b""]),
            (b"a\0b\n\xff\n", &[b"a\0b", b"\xff"]),
        ];
        for (bytes, expected) in cases {
            let mut from = *bytes;
            let mut found = Vec::new();
            while let Some(line) = next_line(&mut from, found.is_empty()).expect("reads") {
                found.push(line);
            }
            assert_eq!(found, *expected, "{bytes:?}");
        }
        let error = next_line(&mut b"\xff\xfea\0\n\0".as_slice(), true).expect_err("UTF-16");
        assert!(error.to_string().contains("UTF-16"), "{error}");
    }

    #[test]
    fn the_line_after_one_that_is_too_long_is_read() {
        let long = io::repeat(b'a').take(2 * LONGEST_LINE as u64);
        let mut from = io::BufReader::new(long.chain(b"\nb\n".as_slice()));
        let line = next_line(&mut from, true).expect("reads").expect("a line");
        assert_eq!(line.len(), LONGEST_LINE + 2);
        assert_eq!(next_line(&mut from, false).expect("reads"), Some(b"b".to_vec()));
    }
}
