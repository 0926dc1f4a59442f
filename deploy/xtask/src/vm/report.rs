//! What the guest tells the host: one JSON object a line, on a serial line that carries nothing else.

use std::io::{self, BufRead, Write};

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// One message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Message {
    /// The guest's services are up.
    Booted {
        /// Kernel and systemd.
        release: String,
    },
    /// A part begins.
    Began {
        /// Its name in the plan.
        part: String,
    },
    /// For people.
    Line {
        /// Without a line feed.
        text: String,
    },
    /// A test said that it cannot run there.
    Skipped {
        /// The name that the list of expected skips has.
        name: String,
        /// Why.
        why: String,
    },
    /// A part has ended.
    Ended {
        /// Its name in the plan.
        part: String,
        /// What it took.
        seconds: f64,
        /// Why it failed.
        failure: Option<String>,
    },
    /// Every part has ended: nothing follows, and the machine powers itself off.
    Verdict {
        /// How many parts there were.
        parts: usize,
    },
}

/// Writes a message so that the host has it when this returns.
///
/// # Errors
/// When the line is gone.
pub(super) fn tell(message: &Message) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(message).context("a message cannot be written")?;
    line.push('\n');
    let mut out = io::stdout().lock();
    out.write_all(line.as_bytes()).and_then(|()| out.flush()).context("the host does not listen")
}

/// Reads messages until the line ends. A line that is none is an error: nobody else writes there.
///
/// # Errors
/// When the line cannot be read or carries something else.
pub(super) fn read(lines: impl BufRead, mut take: impl FnMut(Message)) -> anyhow::Result<()> {
    for line in lines.split(b'\n') {
        let line = line.context("cannot read the guest's serial line")?;
        // The terminal in between adds carriage returns.
        let text = String::from_utf8_lossy(&line);
        let text = text.trim();
        if text.is_empty() {
            continue;
        }
        take(serde_json::from_str(text).with_context(|| format!("the guest wrote {text:?}, which is no message"))?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_as_they_went() {
        let sent = [
            Message::Line { text: "a \"b\"".into() },
            Message::Ended { part: "p".into(), seconds: 1.5, failure: Some("why".into()) },
            Message::Verdict { parts: 1 },
        ];
        let text: String = sent.iter().map(|message| serde_json::to_string(message).unwrap() + "\r\n").collect();
        let mut got = Vec::new();
        read(text.as_bytes(), |message| got.push(message)).unwrap();
        assert_eq!(got, sent);
        assert!(read(&b"[ 1.0] a kernel message\n"[..], |_| ()).is_err());
        assert!(read(&b"{\"message\":\"line\",\"text\":\"\",\"more\":1}\n"[..], |_| ()).is_err());
    }
}
