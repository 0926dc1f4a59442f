//! What was kept, in the order of time: files first, then what is in memory, of one plugin or of all.
//!
//! Reading blocks on the disk, so it is done in batches off the runtime; nothing of a file is held but the batch.

use std::{
    collections::VecDeque,
    fs::File,
    io::{BufRead as _, BufReader, Read as _},
    sync::Arc,
    time::SystemTime,
};

use plugvisor_package::PluginName;

use super::{
    Filter, LogLine, Logs,
    files::RECORD_BYTES,
    record::{self, Place},
};

/// Lines from the oldest to the newest that was kept when it was begun.
#[derive(Debug)]
pub struct History {
    sources: Vec<Source>,
}

/// One plugin's lines.
#[derive(Debug)]
struct Source {
    plugin: PluginName,
    files: VecDeque<BufReader<File>>,
    /// Lines of this run from this number on come from memory.
    from: Place,
    memory: VecDeque<Arc<LogLine>>,
    head: Option<Arc<LogLine>>,
}

impl History {
    /// Of these plugins. Returns with it the number of each plugin's newest line in memory, where a follower goes on.
    /// Blocks on the disk.
    #[must_use]
    pub fn open(logs: &Logs, plugins: &[PluginName], since: Option<SystemTime>) -> (Self, Vec<(PluginName, u64)>) {
        let mut newest = Vec::new();
        let sources = plugins.iter().map(|plugin| {
            let kept = logs.journal(plugin).read(0, usize::MAX);
            let last = kept.entries.last().map_or(0, |(number, _)| *number);
            newest.push((plugin.clone(), last));
            let (run, files) = match logs.files() {
                Some(files) => (files.run(), files.open(plugin, since)),
                None => (0, Vec::new()),
            };
            // Of a run without lines so far, all that come are memory's.
            let number = kept.entries.first().map_or(1, |(number, _)| *number);
            let mut source = Source {
                plugin: plugin.clone(),
                files: files.into_iter().map(BufReader::new).collect(),
                from: Place { run, number },
                memory: kept.entries.into_iter().map(|(_, line)| line).collect(),
                head: None,
            };
            source.advance();
            source
        });
        let sources = sources.collect();
        (Self { sources }, newest)
    }

    /// The next lines that the filter lets through, at most `most`; empty at the end. Blocks on the disk.
    pub fn batch(&mut self, filter: &Filter, most: usize) -> Vec<Arc<LogLine>> {
        let mut lines = Vec::new();
        while lines.len() < most {
            let oldest = self.sources.iter_mut().filter(|source| source.head.is_some());
            let Some(source) = oldest.min_by_key(|source| source.head.as_ref().map(|line| line.at)) else { break };
            let line = source.head.take();
            source.advance();
            lines.extend(line.filter(|line| filter.admits(line)));
        }
        lines
    }
}

impl Source {
    fn advance(&mut self) {
        while let Some(file) = self.files.front_mut() {
            match next(file) {
                Some(bytes) => {
                    let Some((line, place)) = record::decode(&self.plugin, &bytes) else { continue };
                    if place.run == self.from.run && place.number >= self.from.number {
                        continue;
                    }
                    self.head = Some(Arc::new(line));
                    return;
                }
                None => drop(self.files.pop_front()),
            }
        }
        self.head = self.memory.pop_front();
    }
}

/// The next line's bytes; `None` at the end of the file. A line over the bound comes in pieces that are none.
fn next(file: &mut BufReader<File>) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = file.by_ref().take(RECORD_BYTES).read_until(b'\n', &mut bytes).unwrap_or(0);
    (read > 0).then_some(bytes)
}
