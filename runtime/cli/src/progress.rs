//! Progress of long commands on stderr, unless their results appear on the same terminal.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A counter of finished `things`; hidden unless stderr is a terminal to which no results are written.
pub fn counter(things: &str, results_on_stdout: bool) -> ProgressBar {
    let hidden = !io::stderr().is_terminal() || (results_on_stdout && io::stdout().is_terminal());
    let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template(&format!("{{spinner}} {{pos}} {things}, {{per_sec}}"))
        .unwrap_or_else(|_| ProgressStyle::default_spinner());
    ProgressBar::with_draw_target(None, target).with_style(style)
}
