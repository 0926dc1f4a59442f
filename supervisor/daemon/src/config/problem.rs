//! What is wrong with a configuration, for people.

use std::{fmt, path::PathBuf};

use plugvisor_sandbox::tables::Problem;

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
