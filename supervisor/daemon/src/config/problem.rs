//! What is wrong with a configuration, for people.

use std::{fmt, ops::Range, path::PathBuf};

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {}: {source}; check the path and its permissions", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file was read and does not hold.
    #[error("{}", Listed { path, problems })]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Everything that is wrong with it, in the order of the lines.
        problems: Vec<Problem>,
    },
}

impl ConfigError {
    pub(super) fn too_long(path: PathBuf) -> Self {
        let message = format!("the file is longer than {} bytes", super::defaults::MAX_FILE_BYTES);
        Self::Invalid { path, problems: vec![Problem { line: 1, key: String::new(), message, suggestion: None }] }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Counted from 1.
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
        write!(f, "line {line}: ")?;
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

struct Listed<'a> {
    path: &'a PathBuf,
    problems: &'a [Problem],
}

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.problems.len();
        let plural = if count == 1 { "" } else { "s" };
        write!(f, "the configuration {} has {count} problem{plural}:", self.path.display())?;
        self.problems.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

/// Collects problems and knows which line a place in the text is on.
pub(super) struct Problems<'a> {
    text: &'a str,
    found: Vec<Problem>,
}

impl<'a> Problems<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, found: Vec::new() }
    }

    pub(super) fn add(&mut self, at: &Range<usize>, key: impl Into<String>, message: impl Into<String>) {
        self.suggest(at, key, message, None);
    }

    pub(super) fn suggest(
        &mut self,
        at: &Range<usize>,
        key: impl Into<String>,
        message: impl Into<String>,
        suggestion: Option<String>,
    ) {
        let before = self.text.as_bytes().get(..at.start).unwrap_or(self.text.as_bytes());
        // clippy's bytecount is not worth a dependency for a file of at most a megabyte.
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        self.found.push(Problem { line, key: key.into(), message: message.into(), suggestion });
    }

    /// The problems by line; `Ok` when there are none.
    pub(super) fn finish<T>(mut self, value: T) -> Result<T, Vec<Problem>> {
        if self.found.is_empty() {
            return Ok(value);
        }
        self.found.sort_by_key(|problem| problem.line);
        Err(self.found)
    }
}

/// The known name that is nearest to `given`, when one is near enough to be a slip.
pub(crate) fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    // Names that strangers wrote are compared in full; keep that cheap.
    if given.len() > 128 {
        return None;
    }
    let score = |name: &&str| strsim::damerau_levenshtein(given, name);
    let best = known.into_iter().min_by_key(score)?;
    let allowed = (best.len().max(given.len()) / 3).max(1);
    (score(&best) <= allowed).then(|| best.to_owned())
}
