//! A line as it stands in a file: one JSON object, one line. What does not read as one is skipped, never trusted.

use std::{str::FromStr as _, time::SystemTime};

use plugvisor_package::PluginName;
use prost_types::Timestamp;
use serde::{Deserialize, Serialize};

use super::{LogLine, LogStream};

/// Where a line stands: which run of the supervisor kept it, and as which of that run and plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) run: u64,
    pub(super) number: u64,
}

#[derive(Debug, Deserialize, Serialize)]
struct Record<'a> {
    at: String,
    generation: u64,
    stream: &'a str,
    #[serde(default, skip_serializing_if = "is_false")]
    continues: bool,
    #[serde(default, skip_serializing_if = "is_zero")]
    dropped_before: u64,
    line: std::borrow::Cow<'a, str>,
    run: u64,
    number: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_false(flag: &bool) -> bool {
    !flag
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The line's bytes in the file, its end included.
pub(super) fn encode(line: &LogLine, place: Place) -> Vec<u8> {
    let LogLine { at, plugin: _, generation, stream, line, continues, dropped_before } = line;
    let record = Record {
        at: Timestamp::from(*at).to_string(),
        generation: *generation,
        stream: stream.as_str(),
        continues: *continues,
        dropped_before: *dropped_before,
        line: line.as_str().into(),
        run: place.run,
        number: place.number,
    };
    // Strings and numbers always have a JSON form; the other branch only keeps this free of panics.
    let mut bytes = serde_json::to_vec(&record).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// The line in these bytes; `None` when they are none.
pub(super) fn decode(plugin: &PluginName, bytes: &[u8]) -> Option<(LogLine, Place)> {
    let Record { at, generation, stream, continues, dropped_before, line, run, number } =
        serde_json::from_slice(bytes).ok()?;
    let stream = match stream {
        "stdout" => LogStream::Stdout,
        "stderr" => LogStream::Stderr,
        _ => return None,
    };
    let at = SystemTime::try_from(Timestamp::from_str(&at).ok()?).ok()?;
    let line =
        LogLine { at, plugin: plugin.clone(), generation, stream, line: line.into_owned(), continues, dropped_before };
    Some((line, Place { run, number }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn lines_come_back_as_they_were() {
        let plugin: PluginName = "gallery".parse().unwrap();
        let line = LogLine {
            at: SystemTime::UNIX_EPOCH + Duration::from_nanos(1_795_411_841_123_456_789),
            plugin: plugin.clone(),
            generation: 3,
            stream: LogStream::Stderr,
            line: "a \"b\"\u{1b}[2J\u{202e}\n\\ ü".to_owned(),
            continues: true,
            dropped_before: 7,
        };
        let place = Place { run: u64::MAX, number: 9 };
        let bytes = encode(&line, place);
        assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), 1, "one line stays one line");
        assert_eq!(decode(&plugin, &bytes), Some((line, place)));
    }

    #[test]
    fn what_is_no_line_is_skipped() {
        let plugin: PluginName = "gallery".parse().unwrap();
        let good = br#"{"at":"2026-11-23T05:30:41Z","generation":1,"stream":"stdout","line":"x","run":1,"number":1}"#;
        assert!(decode(&plugin, good).is_some());
        for cut in 0..good.len() {
            assert_eq!(decode(&plugin, &good[..cut]), None, "cut at {cut}");
        }
        let text = std::str::from_utf8(good).unwrap();
        for bad in [text.replace("stdout", "x"), text.replace("2026", "99999999"), text.replace(":1,", ":-1,")] {
            assert_eq!(decode(&plugin, bad.as_bytes()), None, "{bad}");
        }
    }
}
