//! `ReadLogs`: what is kept of plugins' lines, and then, for whoever follows, what comes.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::SystemTime,
};

use plugvisor_core::{Code, Error};
use plugvisor_package::PluginName;
use plugvisor_proto::admin::v1::{LogStream as WireStream, ReadLogsRequest, ReadLogsResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{
    convert,
    error::status,
    service::{AdminService, bounded},
};
use crate::{
    journal::{Batch, Journal},
    logs::{Filter, History, LogFiles, LogLine, LogStream, Logs},
};

/// Lines read from disk at a time.
const BATCH: usize = 256;

impl AdminService {
    pub(super) fn log_lines(
        &self,
        request: ReadLogsRequest,
    ) -> Result<ReceiverStream<Result<ReadLogsResponse, Status>>, Status> {
        let ReadLogsRequest { plugin, follow, tail, since, until, stream, pattern, generation } = request;
        bounded(&plugin)?;
        let only = if plugin.is_empty() {
            None
        } else {
            let handle = self.state.fleet.find(&plugin).map_err(|error| status(&error))?;
            let name = handle.view.borrow().name.parse::<PluginName>();
            Some(name.map_err(|error| {
                status(&Error::new(Code::RequestInvalid, error.to_string(), "a rejected bundle has no log"))
            })?)
        };
        let filter = Filter {
            since: since.map(time).transpose()?,
            until: until.map(time).transpose()?,
            stream: stream_of(stream),
            generation: (generation != 0).then_some(generation),
            pattern: if pattern.is_empty() { None } else { Some(Filter::pattern(&pattern).map_err(|e| status(&e))?) },
        };
        let logs = Arc::clone(&self.state.shared.logs);
        let (sender, receiver) = mpsc::channel(1);
        let reader = Reader { logs, only, filter, sender };
        let tail = (tail > 0).then(|| usize::try_from(tail).unwrap_or(usize::MAX));
        tokio::spawn(self.state.stopped.clone().run_until_cancelled_owned(async move {
            // `None`: whoever asked has gone.
            let _ = reader.run(tail, follow).await;
        }));
        Ok(ReceiverStream::new(receiver))
    }
}

/// One answer under way.
struct Reader {
    logs: Arc<Logs>,
    only: Option<PluginName>,
    filter: Filter,
    sender: mpsc::Sender<Result<ReadLogsResponse, Status>>,
}

type Places = BTreeMap<PluginName, (Arc<Journal<LogLine>>, u64)>;

impl Reader {
    async fn run(&self, tail: Option<usize>, follow: bool) -> Option<()> {
        let mut changed = self.logs.changed();
        changed.mark_unchanged();
        let mut places = self.history(tail).await?;
        while follow && !self.filter.is_over(SystemTime::now()) {
            tokio::select! {
                changed = changed.changed() => changed.ok()?,
                () = self.sender.closed() => return None,
            }
            changed.mark_unchanged();
            self.news(&mut places).await?;
        }
        Some(())
    }

    /// What was kept, and where a follower goes on.
    async fn history(&self, tail: Option<usize>) -> Option<Places> {
        let (logs, only, since) = (Arc::clone(&self.logs), self.only.clone(), self.filter.since);
        let opened = tokio::task::spawn_blocking(move || {
            let plugins = only.map_or_else(
                || {
                    let on_disk = logs.files().map(LogFiles::plugins).unwrap_or_default();
                    let all: BTreeSet<PluginName> = logs.plugins().into_iter().chain(on_disk).collect();
                    all.into_iter().collect()
                },
                |only| vec![only],
            );
            History::open(&logs, &plugins, since)
        });
        let (mut history, newest) = opened.await.ok()?;
        let mut last = VecDeque::new();
        loop {
            // A batch at a time, so that a reader that does not read holds no thread.
            let filter = self.filter.clone();
            let (lines, rest) = tokio::task::spawn_blocking(move || {
                let lines = history.batch(&filter, BATCH);
                (lines, history)
            })
            .await
            .ok()?;
            history = rest;
            if lines.is_empty() {
                break;
            }
            match tail {
                None => self.send(lines.iter().map(|line| (0, line))).await?,
                Some(tail) => {
                    last.extend(lines);
                    last.drain(..last.len().saturating_sub(tail));
                }
            }
        }
        self.send(last.iter().map(|line| (0, line))).await?;
        Some(newest.into_iter().map(|(name, number)| (name.clone(), (self.logs.journal(&name), number))).collect())
    }

    async fn news(&self, places: &mut Places) -> Option<()> {
        for name in self.only.clone().map_or_else(|| self.logs.plugins(), |name| vec![name]) {
            let journal = self.logs.journal(&name);
            places.entry(name).or_insert((journal, 0));
        }
        let mut lines: Vec<(u64, Arc<LogLine>)> = Vec::new();
        for (journal, after) in places.values_mut() {
            let Batch { mut missed, entries } = journal.read(*after, usize::MAX);
            for (number, line) in entries {
                *after = number;
                if self.filter.admits(&line) {
                    lines.push((std::mem::take(&mut missed), line));
                }
            }
        }
        lines.sort_by_key(|(_, line)| line.at);
        self.send(lines.iter().map(|(missed, line)| (*missed, line))).await
    }

    async fn send<'a>(&self, lines: impl Iterator<Item = (u64, &'a Arc<LogLine>)>) -> Option<()> {
        for (missed, line) in lines {
            self.sender.send(Ok(convert::log_line(line, missed))).await.ok()?;
        }
        Some(())
    }
}

fn time(at: prost_types::Timestamp) -> Result<SystemTime, Status> {
    SystemTime::try_from(at).map_err(|error| {
        status(&Error::new(Code::RequestInvalid, format!("a time cannot be read: {error}"), "name a later time"))
    })
}

fn stream_of(stream: i32) -> Option<LogStream> {
    match WireStream::try_from(stream) {
        Ok(WireStream::Stdout) => Some(LogStream::Stdout),
        Ok(WireStream::Stderr) => Some(LogStream::Stderr),
        Ok(WireStream::Unspecified) | Err(_) => None,
    }
}
