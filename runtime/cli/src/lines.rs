//! Reads lines of stdin ahead on its own thread: a client that waits for each answer gets it at once, and a file is
//! read while the model runs.

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use t5gemma_protocol::without_byte_order_mark;
use t5gemma_runtime::{Cancellation, Error};

/// Maximum bytes of a line. A longer one is discarded and answered with an error.
pub const LONGEST_LINE: usize = 256 << 20;

/// Reads a line without its line ending, and the first one also without a byte-order mark. Of an overlong line, it
/// returns just enough to show that it is too long.
fn next_line(from: &mut impl BufRead, is_first: bool) -> io::Result<Option<Vec<u8>>> {
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

/// Lines of stdin.
pub struct Lines {
    received: Receiver<io::Result<Line>>,
    pending: Option<Line>,
}

/// A line's number from 0 and its bytes, which need not be UTF-8.
type Line = (usize, Vec<u8>);

impl Lines {
    /// Starts reading texts, one per line, including blank lines.
    pub fn texts() -> Lines {
        Lines::read(|_| true)
    }

    /// Starts reading requests: blank lines are skipped, but counted.
    pub fn requests() -> Lines {
        Lines::read(|line| !line.trim_ascii().is_empty())
    }

    fn read(wanted: fn(&[u8]) -> bool) -> Lines {
        let (lines, received) = sync_channel(256);
        thread::spawn(move || {
            let mut stdin = io::stdin().lock();
            for number in 0.. {
                let line = match next_line(&mut stdin, number == 0) {
                    Ok(Some(line)) if !wanted(&line) => continue,
                    Ok(Some(line)) => Ok((number, line)),
                    Ok(None) => break,
                    Err(error) => Err(error),
                };
                let is_last = line.is_err();
                if lines.send(line).is_err() || is_last {
                    break;
                }
            }
        });
        Lines { received, pending: None }
    }

    /// Waits for the next line; `None` at the end.
    pub fn next(&mut self, cancel: &Cancellation) -> Result<Option<Line>> {
        if let Some(line) = self.pending.take() {
            return Ok(Some(line));
        }
        loop {
            match self.received.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => return line.context("cannot read stdin").map(Some),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) if cancel.is_cancelled() => bail!(Error::Cancelled),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Whether another line arrives within `patience`.
    pub fn is_ready(&mut self, patience: Duration) -> Result<bool> {
        if self.pending.is_none()
            && let Ok(line) = self.received.recv_timeout(patience)
        {
            self.pending = Some(line.context("cannot read stdin")?);
        }
        Ok(self.pending.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
