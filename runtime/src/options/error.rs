//! `OptionError`: an option that is refused, named as requests name it, so that a program can name it as its users
//! typed it.

use std::fmt;

/// An option that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionError {
    /// The option's name; empty for the document as a whole.
    pub option: String,
    /// What is wrong with it.
    pub problem: OptionProblem,
    /// The value that was found: the option's own, or for [`OptionProblem::Requires`] that of the option required.
    pub found: String,
}

/// What is wrong with an option.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionProblem {
    /// Its value is not one of these.
    Expected(String),
    /// It requires another option to have this value.
    Requires(String),
    /// There is no option of this name.
    Unknown,
    /// transformers has this option, and this version does not; says what to do about it.
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
