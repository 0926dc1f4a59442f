//! Which lines a reader wants.

use std::time::SystemTime;

use plugvisor_core::{Code, Error};
use regex::{Regex, RegexBuilder};

use super::{LogLine, LogStream};

/// The longest pattern, in bytes, and what it may need when it is compiled: an operator's pattern is no attack, but it is
/// run over every line.
const PATTERN_BYTES: usize = 1024;
const COMPILED_BYTES: usize = 1024 * 1024;

/// What a line must be to be shown. The default shows every line.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Read at this time or later.
    pub since: Option<SystemTime>,
    /// Read before this time.
    pub until: Option<SystemTime>,
    /// Of this stream.
    pub stream: Option<LogStream>,
    /// Of this generation.
    pub generation: Option<u64>,
    /// Matched somewhere.
    pub pattern: Option<Regex>,
}

impl Filter {
    /// A pattern as the filter has it.
    pub fn pattern(text: &str) -> Result<Regex, Error> {
        let invalid = |why: String| {
            let message = format!("the pattern is no regular expression: {why}");
            Error::new(
                Code::RequestInvalid,
                message,
                "put a backslash before characters such as ( [ * that you mean as they are",
            )
        };
        if text.len() > PATTERN_BYTES {
            return Err(invalid(format!("it is longer than {PATTERN_BYTES} bytes")));
        }
        let compiled = RegexBuilder::new(text).size_limit(COMPILED_BYTES).dfa_size_limit(COMPILED_BYTES).build();
        compiled.map_err(|error| invalid(error.to_string()))
    }

    /// Whether the line is wanted.
    #[must_use]
    pub fn admits(&self, line: &LogLine) -> bool {
        let Self { since, until, stream, generation, pattern } = self;
        since.is_none_or(|since| line.at >= since)
            && until.is_none_or(|until| line.at < until)
            && stream.is_none_or(|stream| line.stream == stream)
            && generation.is_none_or(|generation| line.generation == generation)
            && pattern.as_ref().is_none_or(|pattern| pattern.is_match(&line.line))
    }

    /// Whether no line that comes from now on can be wanted.
    #[must_use]
    pub fn is_over(&self, now: SystemTime) -> bool {
        self.until.is_some_and(|until| until <= now)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn line(second: u64, stream: LogStream, generation: u64, text: &str) -> LogLine {
        LogLine {
            at: SystemTime::UNIX_EPOCH + Duration::from_secs(second),
            plugin: "gallery".parse().unwrap(),
            generation,
            stream,
            line: text.to_owned(),
            continues: false,
            dropped_before: 0,
        }
    }

    #[test]
    fn each_condition_holds_alone() {
        let at = |second| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(second));
        let one = line(10, LogStream::Stderr, 3, "cannot open /a.b");
        let of = |filter: Filter| filter.admits(&one);
        assert!(of(Filter::default()));
        assert!(
            of(Filter { since: at(10), ..Filter::default() }) && !of(Filter { since: at(11), ..Filter::default() })
        );
        assert!(
            of(Filter { until: at(11), ..Filter::default() }) && !of(Filter { until: at(10), ..Filter::default() })
        );
        assert!(!of(Filter { stream: Some(LogStream::Stdout), ..Filter::default() }));
        assert!(!of(Filter { generation: Some(2), ..Filter::default() }));
        let pattern = |text: &str| Filter { pattern: Some(Filter::pattern(text).unwrap()), ..Filter::default() };
        assert!(of(pattern("open /a\\.b$")) && !of(pattern("^open")));
    }

    #[test]
    fn patterns_are_bounded() {
        for bad in ["(", "a{1000}{1000}", &"a".repeat(2000)] {
            assert_eq!(Filter::pattern(bad).unwrap_err().code, Code::RequestInvalid);
        }
    }
}
