//! What is wrong with a manifest: every finding, where it is and what to write instead.
//!
//! This module owns how findings look and how many there may be; it does not know the manifest's rules.

use std::fmt;

use serde::Serialize;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// Where, such as `security.sandbox.resourceLimits.maxMemory` or `dependencies[2]`; empty is the whole document.
    pub path: String,
    /// What is wrong there, as a sentence without a full stop.
    pub message: String,
    /// What to write instead, where that can be said.
    pub suggestion: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        match &self.suggestion {
            Some(suggestion) => write!(f, " ({suggestion})"),
            None => Ok(()),
        }
    }
}

/// Everything that is wrong with one manifest; at least one problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
pub struct Problems(pub(crate) Vec<Problem>);

impl Problems {
    /// Every problem, in the order in which the document was read.
    #[must_use]
    pub fn all(&self) -> &[Problem] {
        &self.0
    }
}

impl fmt::Display for Problems {
    /// The number of problems, then one line for each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.0.len() == 1 { "" } else { "s" };
        write!(f, "{} problem{plural} in the manifest", self.0.len())?;
        self.0.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl IntoIterator for Problems {
    type Item = Problem;
    type IntoIter = std::vec::IntoIter<Problem>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// Gathers problems up to a bound.
#[derive(Debug)]
pub(crate) struct Findings {
    problems: Vec<Problem>,
    most: usize,
    left_out: usize,
}

impl Findings {
    pub(crate) fn new(most: usize) -> Self {
        Self { problems: Vec::new(), most: most.max(1), left_out: 0 }
    }

    pub(crate) fn add(&mut self, path: impl fmt::Display, message: impl Into<String>, suggestion: Option<String>) {
        if self.problems.len() < self.most {
            self.problems.push(Problem { path: path.to_string(), message: message.into(), suggestion });
        } else {
            self.left_out += 1;
        }
    }

    /// `Ok` when nothing was found.
    pub(crate) fn into_result(mut self) -> Result<(), Problems> {
        if self.left_out > 0 {
            let message = format!("{} more problems are not listed", self.left_out);
            self.problems.push(Problem { path: String::new(), message, suggestion: None });
        }
        if self.problems.is_empty() { Ok(()) } else { Err(Problems(self.problems)) }
    }
}

/// The known word nearest to `text`, if one is near enough to be meant.
///
/// For names alone: keys, plugins, services. Where a word decides how far somebody is trusted or walled in, a guess could
/// be taken for advice, and every word that is allowed is listed in its place. For the same reason no word is near that
/// says the opposite.
pub fn nearest<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Names that strangers wrote are compared in full; keep that cheap.
    if text.len() > 128 {
        return None;
    }
    let lower = text.to_lowercase();
    let score = |word: &str| strsim::normalized_damerau_levenshtein(&lower, &word.to_lowercase());
    let scored = known.into_iter().filter(|word| !is_opposite(&lower, word)).map(|word| (score(word), word));
    let best = scored.max_by(|(a, _), (b, _)| a.total_cmp(b))?;
    (best.0 >= 0.6).then_some(best.1)
}

/// Whether two words differ in what turns the meaning of the rest, such as `enabled` and `disabled`.
fn is_opposite(one: &str, other: &str) -> bool {
    const TURNS: [&str; 12] = ["allow", "deny", "without", "with", "dis", "non", "not", "no", "un", "in", "en", "de"];
    let bare = |mut word: &str| {
        while let Some(rest) = TURNS.iter().find_map(|turn| word.strip_prefix(turn)) {
            word = rest;
        }
        word.to_owned()
    };
    let other = other.to_lowercase();
    one != other && bare(one) == bare(&other)
}

/// `did you mean "x"?` for the nearest known word.
pub(crate) fn did_you_mean<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest(text, known).map(|word| format!("did you mean {word:?}?"))
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn a_slip_is_near_and_the_opposite_is_not() {
        let known = ["enabled", "allow_degraded", "untrusted", "isolationLevel", "secure"];
        for (text, expected) in [
            ("enabeld", Some("enabled")),
            ("isolation_level", Some("isolationLevel")),
            ("isolationlevel", Some("isolationLevel")),
            ("alow_degraded", Some("allow_degraded")),
            ("disabled", None),
            ("deny_degraded", None),
            ("disallow_degraded", None),
            ("trusted", None),
            ("insecure", None),
            ("something", None),
        ] {
            assert_eq!(nearest(text, known), expected, "{text}");
        }
    }
}
