//! What plugins print: read by line, kept in bounded rings, tagged, and handed to whoever follows.
//!
//! The pipes are always drained, so that no plugin blocks on its own log; what is over a plugin's rate is dropped and
//! counted, and the next line that is kept says how many were. Lines are text for people: nothing here parses them.

mod filter;
mod kept;

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use plugvisor_core::{Generation, event::ResourceEvent};
use plugvisor_package::PluginName;
use tokio::{io::AsyncReadExt as _, net::unix::pipe, sync::watch, time::Instant};

pub use self::filter::Filter;
use crate::{
    bucket::{Bucket, Rate},
    events::{Events, Subject},
    journal::{Journal, JournalLimits},
};

/// Bounds of what is read and kept, for each plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// The longest line; a longer one is kept in pieces.
    pub line_bytes: usize,
    /// What is kept.
    pub kept: JournalLimits,
    /// Lines kept in a second, in the long run and as a burst; a line counts once more for every full KiB of it.
    pub lines_per_second: u32,
}

impl Default for LogLimits {
    fn default() -> Self {
        let kept = JournalLimits { entries: 1000, weight: 256 * 1024 };
        Self { line_bytes: 8 * 1024, kept, lines_per_second: 500 }
    }
}

/// Between two events about dropped lines of one pipe.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Which pipe a line came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl LogStream {
    /// `stdout` or `stderr`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// When it was read.
    pub at: SystemTime,
    /// Whose it is.
    pub plugin: PluginName,
    /// Which generation's.
    pub generation: u64,
    /// Where it came through.
    pub stream: LogStream,
    /// The text, without its end of line; bytes that are not UTF-8 are replaced.
    pub line: String,
    /// It was longer than the limit, and goes on in the next one of its stream.
    pub continues: bool,
    /// Lines dropped before this one, because the plugin printed faster than its rate.
    pub dropped_before: u64,
}

/// The logs of every plugin.
#[derive(Debug)]
pub struct Logs {
    journals: Mutex<BTreeMap<PluginName, Arc<Journal<LogLine>>>>,
    /// Changes with every line of anyone.
    changed: watch::Sender<()>,
    limits: LogLimits,
    events: Arc<Events>,
}

impl Logs {
    /// Nothing kept yet. `events` hears of dropped lines.
    #[must_use]
    pub fn new(limits: LogLimits, events: Arc<Events>) -> Self {
        Self { journals: Mutex::default(), changed: watch::Sender::new(()), limits, events }
    }

    /// Reads a pipe until it ends. Never fails the plugin: a pipe that cannot be read ends its log.
    pub async fn read(self: Arc<Self>, plugin: PluginName, generation: u64, stream: LogStream, pipe: OwnedFd) {
        let mut pipe = match pipe::Receiver::from_owned_fd(pipe) {
            Ok(pipe) => pipe,
            Err(error) => {
                tracing::warn!(%plugin, generation, stream = stream.as_str(), %error, "the log pipe cannot be read");
                return;
            }
        };
        let journal = self.journal(&plugin);
        let mut lines = Lines::new(self.limits.line_bytes);
        let mut rate = Intake::new(self.limits.lines_per_second, Instant::now());
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let read = pipe.read(&mut buffer).await.unwrap_or(0);
            let mut keep = |line: &[u8], continues| {
                let Some(dropped_before) = rate.admit(line.len(), Instant::now()) else { return };
                let line = String::from_utf8_lossy(line).into_owned();
                tracing::info!(
                    target: "plugin", %plugin, generation, stream = stream.as_str(), dropped_before, "{}", visible(&line)
                );
                let line = LogLine {
                    at: SystemTime::now(),
                    plugin: plugin.clone(),
                    generation,
                    stream,
                    line,
                    continues,
                    dropped_before,
                };
                journal.push(line.line.len() + 128, |_| line);
                self.changed.send_replace(());
            };
            if read == 0 {
                lines.finish(&mut keep);
            } else {
                lines.feed(&buffer[..read], &mut keep);
            }
            if let Some(lines) = rate.tell(Instant::now(), read == 0) {
                let subject = Subject::Generation(plugin.clone(), Generation(generation));
                self.events.publish(subject, ResourceEvent::LogsDropped { lines });
            }
            if read == 0 {
                return;
            }
        }
    }

    /// One plugin's journal; made when it is first asked for.
    #[must_use]
    pub fn journal(&self, plugin: &PluginName) -> Arc<Journal<LogLine>> {
        let mut journals = self.lock();
        if let Some(journal) = journals.get(plugin) {
            return Arc::clone(journal);
        }
        let journal = Arc::new(Journal::new(self.limits.kept));
        journals.insert(plugin.clone(), Arc::clone(&journal));
        journal
    }

    /// Every plugin that has a journal.
    #[must_use]
    pub fn plugins(&self) -> Vec<PluginName> {
        self.lock().keys().cloned().collect()
    }

    /// Forgets a plugin's lines.
    pub fn remove(&self, plugin: &PluginName) {
        self.lock().remove(plugin);
    }

    /// Wakes on every line of anyone.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The last `count` lines on a generation's stderr.
    #[must_use]
    pub fn stderr_tail(&self, plugin: &PluginName, generation: u64, count: usize) -> Vec<String> {
        let kept = self.journal(plugin).read(0, usize::MAX).entries;
        let wanted = |line: &&LogLine| line.generation == generation && line.stream == LogStream::Stderr;
        let lines = kept.iter().map(|(_, line)| &**line).filter(wanted);
        let mut tail: Vec<String> = lines.rev().take(count).map(|line| line.line.clone()).collect();
        tail.reverse();
        tail
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PluginName, Arc<Journal<LogLine>>>> {
        self.journals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The longest message of a plugin that is passed on, in characters.
const MESSAGE: usize = 1024;

/// What a plugin says in a status or an error, fit for one line of a log: [`visible`], and cut.
pub(crate) fn message(said: &str) -> String {
    let end = said.char_indices().nth(MESSAGE).map_or(said.len(), |(end, _)| end);
    visible(&said[..end]).chars().take(MESSAGE).collect()
}

/// Control characters would let a plugin forge or hide lines on the operator's terminal.
pub(crate) fn visible(line: &str) -> std::borrow::Cow<'_, str> {
    if line.chars().any(|c| c.is_control() && c != '\t') {
        line.chars()
            .flat_map(|c| if c.is_control() && c != '\t' { c.escape_default().collect() } else { vec![c] })
            .collect()
    } else {
        line.into()
    }
}

/// Cuts a stream of bytes into lines of bounded length.
struct Lines {
    partial: Vec<u8>,
    most: usize,
}

impl Lines {
    fn new(most: usize) -> Self {
        Self { partial: Vec::new(), most }
    }

    fn feed(&mut self, mut bytes: &[u8], keep: &mut impl FnMut(&[u8], bool)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.take(&bytes[..end], keep);
            let line = std::mem::take(&mut self.partial);
            keep(line.strip_suffix(b"\r").unwrap_or(&line), false);
            bytes = &bytes[end + 1..];
        }
        self.take(bytes, keep);
    }

    fn take(&mut self, mut part: &[u8], keep: &mut impl FnMut(&[u8], bool)) {
        loop {
            let room = self.most - self.partial.len();
            if part.len() <= room {
                self.partial.extend_from_slice(part);
                return;
            }
            self.partial.extend_from_slice(&part[..room]);
            part = &part[room..];
            // A piece ends between characters, so that none is shown as two broken halves.
            let end = character_end(&self.partial);
            let rest = self.partial.split_off(end);
            keep(&std::mem::replace(&mut self.partial, rest), true);
        }
    }

    fn finish(&mut self, keep: &mut impl FnMut(&[u8], bool)) {
        if !self.partial.is_empty() {
            keep(&std::mem::take(&mut self.partial), false);
        }
    }
}

/// Where the last whole UTF-8 character ends; the end of the bytes when they are no UTF-8 there.
fn character_end(bytes: &[u8]) -> usize {
    // A character has at most four bytes; the first of several is 11xxxxxx, the others are 10xxxxxx.
    let from = bytes.len().saturating_sub(4);
    let start = bytes[from..].iter().rposition(|byte| byte & 0b1100_0000 != 0b1000_0000).map(|at| from + at);
    let Some(start) = start.filter(|start| *start > 0) else { return bytes.len() };
    let length = match bytes[start] {
        0b1100_0000..=0b1101_1111 => 2,
        0b1110_0000..=0b1110_1111 => 3,
        0b1111_0000..=0b1111_0111 => 4,
        _ => 1,
    };
    if start + length > bytes.len() { start } else { bytes.len() }
}

/// What one pipe may still say, and what was dropped of it.
struct Intake {
    left: Bucket,
    /// Since the line that was kept last.
    dropped: u64,
    /// Since it was last told.
    untold: u64,
    told_at: Option<Instant>,
}

impl Intake {
    fn new(per_second: u32, now: Instant) -> Self {
        let left = Bucket::new(Rate { per_second, burst: per_second }, now);
        Self { left, dropped: 0, untold: 0, told_at: None }
    }

    /// `Some` with the number dropped before, when one more line of so many bytes may be kept.
    fn admit(&mut self, bytes: usize, now: Instant) -> Option<u64> {
        let cost = u32::try_from(1 + bytes / 1024).unwrap_or(u32::MAX);
        if !self.left.take(cost, now) {
            self.dropped += 1;
            self.untold += 1;
            return None;
        }
        Some(std::mem::take(&mut self.dropped))
    }

    /// How many lines were dropped since this last said so; at most once in [`TELL_EVERY`], and at the end.
    fn tell(&mut self, now: Instant, end: bool) -> Option<u64> {
        let due = end || self.told_at.is_none_or(|told| now.saturating_duration_since(told) >= TELL_EVERY);
        if self.untold == 0 || !due {
            return None;
        }
        self.told_at = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn lines(most: usize, parts: &[&[u8]]) -> Vec<(String, bool)> {
        let mut found = Vec::new();
        let mut keep = |line: &[u8], continues| found.push((String::from_utf8_lossy(line).into_owned(), continues));
        let mut lines = Lines::new(most);
        for part in parts {
            lines.feed(part, &mut keep);
        }
        lines.finish(&mut keep);
        found
    }

    #[test]
    fn lines_end_where_they_end_and_long_ones_are_split() {
        let line = |text: &str| (text.to_owned(), false);
        let cut = |text: &str| (text.to_owned(), true);
        assert_eq!(lines(8, &[b"a\nb", b"c\r\n\nlast"]), [line("a"), line("bc"), line(""), line("last")]);
        assert_eq!(lines(4, &[b"12345", b"678\nnext\n"]), [cut("1234"), line("5678"), line("next")]);
        assert_eq!(lines(4, &[b"1234567890"]), [cut("1234"), cut("5678"), line("90")]);
        assert_eq!(lines(4, &["123ä5\n".as_bytes()]), [cut("123"), line("ä5")]);
        assert_eq!(lines(4, &[b"\xff\xbf\xbf\xbf\xbf\xbf\n"]).len(), 2, "what is no UTF-8 is split all the same");
        assert_eq!(lines(4, &[b"1234\n1234", b"\n"]), [line("1234"), line("1234")]);
        assert_eq!(lines(4, &[b"12", b"3456", b"78\n", b"\xff\n"]), [cut("1234"), line("5678"), line("\u{fffd}")]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_rate_drops_and_counts() {
        let mut rate = Intake::new(2, Instant::now());
        let mut admit = || rate.admit(80, Instant::now());
        assert_eq!([admit(), admit(), admit(), admit()], [Some(0), Some(0), None, None]);
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!([admit(), admit()], [Some(2), None]);
    }

    #[tokio::test(start_paused = true)]
    async fn long_lines_cost_more_and_none_is_too_long() {
        let mut rate = Intake::new(2, Instant::now());
        let mut admit = |bytes| rate.admit(bytes, Instant::now());
        assert_eq!([admit(8 * 1024), admit(1)], [Some(0), None]);
        // Nine tokens were taken of two.
        tokio::time::advance(Duration::from_millis(3900)).await;
        assert_eq!(admit(1), None);
        tokio::time::advance(Duration::from_millis(200)).await;
        assert_eq!(admit(1023), Some(2));
    }

    #[tokio::test]
    async fn a_flood_neither_blocks_the_writer_nor_grows() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let kept = JournalLimits { entries: 10, weight: 1 << 20 };
        let events = Arc::new(Events::new());
        let logs = Arc::new(Logs::new(LogLimits { line_bytes: 64, kept, lines_per_second: 100 }, Arc::clone(&events)));
        let plugin: PluginName = "noisy".parse().unwrap();
        let read = tokio::spawn(Arc::clone(&logs).read(plugin.clone(), 3, LogStream::Stderr, reader));
        let wrote = tokio::task::spawn_blocking(move || {
            let mut writer = std::fs::File::from(writer);
            // Eight megabytes without an end of line, then more lines than the rate lets through.
            for _ in 0..128 {
                writer.write_all(&[b'x'; 64 * 1024]).unwrap();
            }
            writer.write_all("\nshort".repeat(10_000).as_bytes()).unwrap();
        });
        wrote.await.unwrap();
        read.await.unwrap();
        let batch = logs.journal(&plugin).read(0, usize::MAX);
        assert_eq!(batch.entries.len(), 10);
        assert!(batch.missed < 10_000, "the rate dropped most of the lines");
        let told = events.read(0, usize::MAX).entries.len();
        assert!((1..=4).contains(&told), "dropped lines are told, and not one by one: {told}");
        assert_eq!(logs.stderr_tail(&plugin, 3, 2), ["short", "short"]);
        assert!(logs.stderr_tail(&plugin, 2, 2).is_empty());
    }

    #[test]
    fn control_characters_are_made_visible() {
        assert_eq!(visible("a\tb"), "a\tb");
        assert_eq!(visible("a\u{1b}[2Jb"), "a\\u{1b}[2Jb");
        assert_eq!(message("no\r\n2026 INFO all is well"), "no\\r\\n2026 INFO all is well");
        assert_eq!(message(&"é\n".repeat(2000)).chars().count(), 1024);
    }
}
