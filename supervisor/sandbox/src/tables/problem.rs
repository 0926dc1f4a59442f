//! What is wrong with a file, by line and key.

use std::{fmt, ops::Range};

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Counted from 1; 0 when it stands in no line.
    pub line: usize,
    /// Such as `supervisor.metrics_address`; empty when the text is not TOML.
    pub key: String,
    /// What is wrong and what would be right.
    pub message: String,
    /// A name that was probably meant.
    pub suggestion: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, key, message, suggestion } = self;
        if *line > 0 {
            write!(f, "line {line}: ")?;
        }
        if !key.is_empty() {
            write!(f, "{key}: ")?;
        }
        f.write_str(message)?;
        match suggestion {
            Some(suggestion) => write!(f, "; did you mean {suggestion:?}?"),
            None => Ok(()),
        }
    }
}

/// Collects problems and knows which line a place in the text is on.
#[derive(Debug)]
pub struct Problems<'a> {
    text: &'a str,
    /// With where each begins, for its line.
    found: Vec<(usize, Problem)>,
}

impl<'a> Problems<'a> {
    /// None yet, in this text.
    #[must_use]
    pub fn new(text: &'a str) -> Self {
        Self { text, found: Vec::new() }
    }

    /// Notes what is wrong at a place.
    pub fn add(&mut self, at: &Range<usize>, key: impl Into<String>, message: impl Into<String>) {
        self.suggest(at, key, message, None);
    }

    /// The same, with a name that was probably meant.
    pub fn suggest(
        &mut self,
        at: &Range<usize>,
        key: impl Into<String>,
        message: impl Into<String>,
        suggestion: Option<String>,
    ) {
        let problem = Problem { line: 0, key: key.into(), message: message.into(), suggestion };
        self.found.push((at.start, problem));
    }

    /// The problems by line.
    #[must_use]
    pub fn into_sorted(self) -> Vec<Problem> {
        let Self { text, found } = self;
        if found.is_empty() {
            return Vec::new();
        }
        // Looked for once: there may be as many problems as lines.
        let ends: Vec<usize> =
            text.bytes().enumerate().filter_map(|(at, byte)| (byte == b'\n').then_some(at)).collect();
        let line = |start: usize| 1 + ends.partition_point(|end| *end < start);
        let mut sorted: Vec<Problem> =
            found.into_iter().map(|(start, problem)| Problem { line: line(start), ..problem }).collect();
        sorted.sort_by_key(|problem| problem.line);
        sorted
    }
}
