//! A progress bar on stderr, through which an interrupt cancels the work.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use t5gemma_exporter::Progress;

use crate::stderr::note;

/// The bytes written so far, of all.
pub struct Bar<'i> {
    bar: ProgressBar,
    is_quiet: bool,
    interrupted: &'i AtomicBool,
}

impl Bar<'_> {
    /// A bar, if stderr is a terminal.
    pub fn new(interrupted: &AtomicBool) -> Bar<'_> {
        let is_terminal = io::stderr().is_terminal();
        let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        Bar { bar: ProgressBar::with_draw_target(None, target).with_style(style), is_quiet: false, interrupted }
    }

    /// Neither a bar nor notes.
    pub fn quiet(interrupted: &AtomicBool) -> Bar<'_> {
        Bar { bar: ProgressBar::hidden(), is_quiet: true, interrupted }
    }

    /// Prints a line above the bar, unless only errors and warnings are wanted.
    pub fn note(&self, message: &str) {
        if !self.is_quiet {
            self.bar.suspend(|| note!("t5gemma-export: {message}"));
        }
    }

    /// Removes the bar; the next [`Progress::started`] shows it again.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
        self.bar.reset();
    }
}

impl Progress for Bar<'_> {
    fn started(&self, bytes: u64) {
        self.bar.set_length(bytes);
    }

    fn advanced(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn noted(&self, message: &str) {
        self.note(message);
    }

    fn is_cancelled(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}
