//! Lines that the launcher kept while no supervisor was there to read them.

use std::time::SystemTime;

use plugvisor_package::PluginName;

use super::{Lines, LogLine, LogStream, Logs};

impl Logs {
    /// Adds what a plugin wrote while nobody read, and that `lost` bytes before it are not there any more. When each
    /// line was written is not known; they bear the time at which they were read.
    pub fn kept(&self, plugin: &PluginName, generation: u64, stream: LogStream, bytes: &[u8], lost: u64) {
        if lost == 0 && bytes.is_empty() {
            return;
        }
        let log = self.of(plugin);
        let add = |line: String, continues| {
            let at = SystemTime::now();
            let line = LogLine { at, plugin: plugin.clone(), generation, stream, line, continues, dropped_before: 0 };
            self.add(&log, line);
        };
        if lost > 0 {
            add(
                format!("[plugvisor: {lost} bytes of {} were lost while no supervisor was there]", stream.as_str()),
                false,
            );
        }
        let mut lines = Lines::new(self.limits.line_bytes);
        let mut keep = |line: &[u8], continues| add(String::from_utf8_lossy(line).into_owned(), continues);
        lines.feed(bytes, &mut keep);
        lines.finish(&mut keep);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{events::Events, logs::LogLimits};

    #[test]
    fn what_was_kept_follows_a_note_of_what_was_not() {
        let logs = Logs::new(LogLimits::default(), Arc::new(Events::new()), None);
        let plugin: PluginName = "quiet".parse().unwrap();
        logs.kept(&plugin, 4, LogStream::Stdout, b"", 0);
        assert!(logs.plugins().is_empty());
        logs.kept(&plugin, 4, LogStream::Stderr, b"half a line\nand the end", 70);
        let entries = logs.journal(&plugin).read(0, usize::MAX).entries;
        let text: Vec<&str> = entries.iter().map(|(_, line)| line.line.as_str()).collect();
        let lost = "[plugvisor: 70 bytes of stderr were lost while no supervisor was there]";
        assert_eq!(text, [lost, "half a line", "and the end"]);
        assert_eq!(logs.stderr_tail(&plugin, 4, 1), ["and the end"]);
    }
}
