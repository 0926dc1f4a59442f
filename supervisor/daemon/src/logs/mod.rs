//! What plugins print: read by line, kept in bounded rings and in files, tagged, and handed to whoever follows.
//!
//! ```text
//!   pipe ──▶ Lines ──▶ Intake ──▶ Journal ──▶ followers, stderr tails
//!          (split)    (rate)  └──▶ LogFiles ──▶ History
//!                                 (own thread)
//! ```
//!
//! The pipes are always drained, so that no plugin blocks on its own log; what is over a plugin's rate is dropped and
//! counted, and the next line that is kept says how many were. Lines are text for people: nothing here parses them.

mod files;
mod filter;
mod history;
mod intake;
mod kept;
mod lines;
mod record;

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use plugvisor_core::{Generation, event::ResourceEvent};
use plugvisor_package::PluginName;
use tokio::{io::AsyncReadExt as _, net::unix::pipe, sync::watch, time::Instant};

pub use self::{
    files::{FileLimits, LogDirectory, LogDirectoryError, LogFiles},
    filter::Filter,
    history::History,
};
use self::{intake::Intake, lines::Lines};
use crate::{
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
    plugins: Mutex<BTreeMap<PluginName, PluginLog>>,
    /// Changes with every line of anyone.
    changed: watch::Sender<()>,
    limits: LogLimits,
    events: Arc<Events>,
    files: Option<LogFiles>,
}

/// What is kept of one plugin in memory.
#[derive(Clone, Debug)]
struct PluginLog {
    journal: Arc<Journal<LogLine>>,
    figures: Arc<Figures>,
}

/// Counts of one plugin's lines since the supervisor started.
#[derive(Debug, Default)]
pub struct Figures {
    kept: AtomicU64,
    over_rate: AtomicU64,
    lost: AtomicU64,
}

impl Figures {
    /// Lines that were kept.
    pub fn kept(&self) -> u64 {
        self.kept.load(Ordering::Relaxed)
    }

    /// Lines that were dropped because the plugin printed faster than its rate.
    pub fn over_rate(&self) -> u64 {
        self.over_rate.load(Ordering::Relaxed)
    }

    /// Lines that were kept in memory and not on disk.
    pub fn not_on_disk(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    fn lost(&self, lines: u64) {
        self.lost.fetch_add(lines, Ordering::Relaxed);
    }
}

impl Logs {
    /// Nothing kept yet. `events` hears of dropped lines. Without `files` nothing is kept on disk.
    #[must_use]
    pub fn new(limits: LogLimits, events: Arc<Events>, files: Option<LogFiles>) -> Self {
        Self { plugins: Mutex::default(), changed: watch::Sender::new(()), limits, events, files }
    }

    /// What keeps lines on disk.
    #[must_use]
    pub fn files(&self) -> Option<&LogFiles> {
        self.files.as_ref()
    }

    /// Waits, not for long, until what was kept is on disk; later lines are not.
    pub async fn close(&self) {
        if let Some(files) = &self.files {
            files.close().await;
        }
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
        let log = self.of(&plugin);
        let mut lines = Lines::new(self.limits.line_bytes);
        let mut rate = Intake::new(self.limits.lines_per_second, Instant::now());
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let read = pipe.read(&mut buffer).await.unwrap_or(0);
            let mut keep = |line: &[u8], continues| {
                let Some(dropped_before) = rate.admit(line.len(), Instant::now()) else {
                    log.figures.over_rate.fetch_add(1, Ordering::Relaxed);
                    return;
                };
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
                self.add(&log, line);
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
        self.of(plugin).journal
    }

    /// One plugin's counts.
    #[must_use]
    pub fn figures(&self, plugin: &PluginName) -> Arc<Figures> {
        self.of(plugin).figures
    }

    /// Keeps a line in memory and on disk, and wakes whoever follows.
    fn add(&self, log: &PluginLog, line: LogLine) {
        let PluginLog { journal, figures } = log;
        figures.kept.fetch_add(1, Ordering::Relaxed);
        let weight = line.line.len() + 128;
        match &self.files {
            Some(files) => {
                let number = journal.push(weight, |_| line.clone());
                files.keep(line, number, figures);
            }
            None => drop(journal.push(weight, |_| line)),
        }
        self.changed.send_replace(());
    }

    fn of(&self, plugin: &PluginName) -> PluginLog {
        let mut plugins = self.lock();
        if let Some(log) = plugins.get(plugin) {
            return log.clone();
        }
        let log = PluginLog { journal: Arc::new(Journal::new(self.limits.kept)), figures: Arc::default() };
        plugins.insert(plugin.clone(), log.clone());
        log
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

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PluginName, PluginLog>> {
        self.plugins.lock().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    // With a clock that stands still, so that the rate lets through the same whatever else the machine does.
    #[tokio::test(start_paused = true)]
    async fn a_flood_neither_blocks_the_writer_nor_grows() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let kept = JournalLimits { entries: 10, weight: 1 << 20 };
        let events = Arc::new(Events::new());
        let logs =
            Arc::new(Logs::new(LogLimits { line_bytes: 64, kept, lines_per_second: 100 }, Arc::clone(&events), None));
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
        assert!(batch.missed < 100_000, "the rate dropped most of the lines");
        let told = events.read(0, usize::MAX).entries.len();
        assert!((1..=4).contains(&told), "dropped lines are told, and not one by one: {told}");
        assert_eq!(logs.stderr_tail(&plugin, 3, 2).len(), 2);
        assert!(logs.stderr_tail(&plugin, 2, 2).is_empty());
        let figures = logs.figures(&plugin);
        assert!(figures.kept() > 0 && figures.over_rate() > 100_000, "{figures:?}");
    }

    #[test]
    fn control_characters_are_made_visible() {
        assert_eq!(visible("a\tb"), "a\tb");
        assert_eq!(visible("a\u{1b}[2Jb"), "a\\u{1b}[2Jb");
        assert_eq!(message("no\r\n2026 INFO all is well"), "no\\r\\n2026 INFO all is well");
        assert_eq!(message(&"é\n".repeat(2000)).chars().count(), 1024);
    }
}
