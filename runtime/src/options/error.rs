//! `OptionError`: an invalid option, under its name in requests, which a program can replace by what its users typed.

use std::fmt;

/// An invalid generation option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionError {
    /// The option's name; empty for the whole document.
    pub option: String,
    /// What is wrong with it.
    pub problem: OptionProblem,
    /// The value that was found: the option's own or, for [`OptionProblem::Requires`], that of the required option.
    pub found: String,
}

/// What is wrong with an option.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionProblem {
    /// Its value is invalid; says what is expected.
    Expected(String),
    /// It requires another option to have this value.
    Requires(String),
    /// There is no such option.
    Unknown,
    /// transformers has this option, but this version does not implement it; says what to do.
    Unsupported(String),
}

impl OptionError {
    pub(crate) fn new(option: &str, expected: impl Into<String>, found: impl Into<String>) -> OptionError {
        OptionError::of(option, OptionProblem::Expected(expected.into()), found)
    }

    pub(crate) fn requires(option: &str, required: impl Into<String>, found: impl Into<String>) -> OptionError {
        OptionError::of(option, OptionProblem::Requires(required.into()), found)
    }

    pub(super) fn of(option: &str, problem: OptionProblem, found: impl Into<String>) -> OptionError {
        OptionError { option: option.to_string(), problem, found: found.into() }
    }
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let option = if self.option.is_empty() { "the document" } else { &self.option };
        match &self.problem {
            OptionProblem::Expected(expected) => write!(f, "{option}: expected {expected}, found {}", self.found),
            OptionProblem::Requires(required) => write!(f, "{option} requires {required} (got {})", self.found),
            OptionProblem::Unknown => write!(f, "{option}: unknown generation option"),
            OptionProblem::Unsupported(remedy) => {
                write!(f, "{option}: unsupported generation option; {remedy} (got {})", self.found)
            }
        }
    }
}

impl std::error::Error for OptionError {}
