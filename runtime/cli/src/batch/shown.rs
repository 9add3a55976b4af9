//! The progress of a batch on stderr, which is for people.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use t5gemma_batch::{Event, Progress};

use crate::stderr::note;

/// How often a line of progress is written where there is no terminal.
const REPORT: Duration = Duration::from_secs(30);

/// Progress on stderr: a bar on a terminal, otherwise a line now and then.
pub struct Shown {
    bar: ProgressBar,
    is_terminal: bool,
    start: Instant,
    last: Instant,
    shards: usize,
    ended: usize,
}

impl Shown {
    pub fn new(shards: usize) -> Shown {
        let is_terminal = io::stderr().is_terminal();
        let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let style = ProgressStyle::with_template("{bar:30} {msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(1000), target).with_style(style);
        Shown { bar, is_terminal, start: Instant::now(), last: Instant::now(), shards, ended: 0 }
    }

    pub fn event(&mut self, event: Event) {
        match event {
            Event::Done { shard, rows, errors, is_new } => {
                self.ended += 1;
                let of_errors = if errors > 0 { format!(", {errors} with errors") } else { String::new() };
                let elsewhere = if is_new { "" } else { " (another process was faster)" };
                self.bar.suspend(|| note!("t5gemma: {}: {rows} rows{of_errors}{elsewhere}", shard.name));
            }
            Event::Failed { problem, .. } => {
                self.ended += 1;
                self.bar.suspend(|| note!("t5gemma: {problem}"));
            }
            Event::Running(progress) => self.running(progress),
            _ => {}
        }
    }

    fn running(&mut self, progress: Progress) {
        let pause = if self.is_terminal { Duration::from_millis(200) } else { REPORT };
        if self.last.elapsed() < pause {
            return;
        }
        self.last = Instant::now();
        let seconds = self.start.elapsed().as_secs_f64();
        let left = match progress.part > 0.0 {
            true => time(seconds * (1.0 - progress.part).max(0.0) / progress.part),
            false => "unknown time".into(),
        };
        let message = format!(
            "{} of {} shards, {} rows, {:.0} rows/s, {:.0} tokens/s, {left} left",
            self.ended,
            self.shards,
            progress.rows,
            progress.rows as f64 / seconds,
            progress.tokens as f64 / seconds
        );
        match self.is_terminal {
            true => {
                self.bar.set_position((progress.part * 1000.0) as u64);
                self.bar.set_message(message);
            }
            false => note!("t5gemma: {message}"),
        }
    }
}

/// A time for people.
fn time(seconds: f64) -> String {
    let seconds = seconds as u64;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}
