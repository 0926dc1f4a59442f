//! How a command ends when it does not succeed: a stable exit code and a message that names the next command.

use std::fmt;
use std::process::ExitCode;

/// The stable exit codes; 0 is success, and clap uses 2 by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Failed,
    Usage,
    Degraded,
    NotFound,
    Denied,
    Timeout,
    DaemonDown,
    InvalidConfiguration,
}

impl Outcome {
    /// The number for the shell.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Degraded => 3,
            Self::NotFound => 4,
            Self::Denied => 5,
            Self::Timeout => 6,
            Self::DaemonDown => 7,
            Self::InvalidConfiguration => 8,
        }
    }
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        Self::from(outcome.code())
    }
}

/// A command that did not do what was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) outcome: Outcome,
    /// What happened, to what, why. Empty when the output already said everything.
    pub(crate) message: String,
    /// What to do next. May be empty.
    pub(crate) hint: String,
}

impl Failure {
    pub(crate) fn new(outcome: Outcome, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { outcome, message: message.into(), hint: hint.into() }
    }

    /// For commands whose output is the explanation.
    pub(crate) const fn silent(outcome: Outcome) -> Self {
        Self { outcome, message: String::new(), hint: String::new() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}
