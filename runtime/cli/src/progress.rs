//! How far a long command has come, on stderr, for a person who does not see its results on the same terminal.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A count of `things` done; shows nothing unless stderr is a terminal that results are not written to.
pub fn counter(things: &str, results_on_stdout: bool) -> ProgressBar {
    let hidden = !io::stderr().is_terminal() || (results_on_stdout && io::stdout().is_terminal());
    let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template(&format!("{{spinner}} {{pos}} {things}, {{per_sec}}"))
        .unwrap_or_else(|_| ProgressStyle::default_spinner());
    ProgressBar::with_draw_target(None, target).with_style(style)
}
