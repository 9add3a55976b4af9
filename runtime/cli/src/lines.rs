//! Reads lines of stdin ahead on its own thread: a client that waits for each answer gets it at once, and a file is
//! read while the model runs.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use t5gemma_protocol::next_line;
use t5gemma_runtime::{Cancellation, Error};

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
